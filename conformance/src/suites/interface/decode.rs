//! Decoding through the table: what the host refuses before a plugin sees it, the plugin must refuse itself.
#![expect(
    unsafe_code,
    reason = "functions of a C table are called, wrongly on purpose where the interface says that they survive it"
)]

use hoist_backend::{Encoding, Role, Shape};
use hoist_plugin_abi as abi;
use hoist_plugin_abi::{Handle, Status};

use super::raw::{Answer, Plan, Raw, answer};
use crate::fixture::{Model, Weight};
use crate::guard::{Writable, WritableF32};
use crate::judge;
use crate::{Case, Context, Failure, Need, Verdict};

pub(super) fn cases() -> Vec<Case> {
    let case = |name, run: fn(&mut Context<'_>) -> Verdict| {
        Case::new("interface", "decode", name, run)
            .needs(Need::Plugin)
            .needs(Need::Process)
            .needs(Need::Decode)
            .needs(Need::Computed(Encoding::F32))
            .needs(Need::Op(hoist_backend::OpName::Embed))
    };
    vec![
        case("calls_out_of_order", out_of_order),
        case("tokens_out_of_range_are_refused", tokens_out_of_range),
        case("a_context_is_not_exceeded", context_exceeded),
        case("batches_that_cannot_be", bad_batches),
        case("a_prepared_program_is_replaced", prepared_again),
    ]
}

/// Vocabulary, width of a row, positions, sequences, tokens of a batch.
const WIDTH: u32 = 32;
const CONTEXT: u32 = 6;
const SEQUENCES: u32 = 2;
const BATCH: u32 = 4;

/// Sequences with their tokens.
type Runs<'a> = &'a [(u32, &'a [u32])];

/// A model of one embedding, whose rows are its logits.
struct Decoding {
    raw: Raw,
    model: Handle,
    rows: Vec<f32>,
}

impl Decoding {
    /// Resident; nothing more.
    fn loaded(cx: &mut Context<'_>) -> Result<Self, crate::Stop> {
        let rows: Vec<f32> = (0..WIDTH * WIDTH).map(|_| cx.random.bell()).collect();
        let bytes = rows.iter().flat_map(|v| v.to_le_bytes()).collect();
        let shape = Shape::matrix(WIDTH.into(), WIDTH.into());
        let weight = Weight::matrix(None, Role::TokenEmbd, Encoding::F32, shape, bytes);
        let model = Model::new(cx.info(), 0, vec![weight], Vec::new())?;
        let plan = Plan::new(&model.plan);
        let raw = Raw::new(cx)?;
        let device = raw.device()?;
        let (begun, load) = raw.load_begin(device, &plan)?;
        begun.ok("load_begin")?;
        raw.upload(load, 0, 0, Some(&model.canonical[0]), 0)?
            .ok("upload")?;
        let (committed, model, _) = raw.commit(load)?;
        committed.ok("load_commit")?;
        Ok(Self { raw, model, rows })
    }

    /// Ready to decode.
    fn prepared(cx: &mut Context<'_>) -> Result<Self, crate::Stop> {
        let decoding = Self::loaded(cx)?;
        decoding.index()?.ok("build_index")?;
        decoding.workspace()?.ok("workspace_create")?;
        decoding.prepare()?.ok("prepare")?;
        Ok(decoding)
    }

    /// `build_index`, or OK for a plugin that leaves the table to the host.
    fn index(&self) -> Result<Answer, Failure> {
        let entries = [abi::IndexEntry {
            layer: abi::NO_LAYER,
            role: Role::TokenEmbd.id(),
            slot: abi::SLOT_PRESENT,
            tensor: 0,
        }];
        let layout = abi::IndexLayout {
            struct_size: size_of::<abi::IndexLayout>() as u32,
            layers: 0,
            entries: entries.as_ptr(),
            entry_count: entries.len() as u64,
        };
        let mut receipt = abi::IndexReceipt {
            struct_size: size_of::<abi::IndexReceipt>() as u32,
            ..abi::IndexReceipt::default()
        };
        answer("build_index", |record| match self.raw.table.build_index {
            // SAFETY: layout, its entries and the receipt are valid for the call.
            Some(f) => unsafe { f(self.model, &layout, &mut receipt, record) },
            None => Status::OK,
        })
    }

    fn workspace(&self) -> Result<Answer, Failure> {
        let values = [value()];
        let dims = abi::WorkspaceDims {
            struct_size: size_of::<abi::WorkspaceDims>() as u32,
            vocab: WIDTH,
            capacity: abi::Capacity {
                max_context: CONTEXT,
                max_sequences: SEQUENCES,
                max_batch_tokens: BATCH,
                kv_dtype: 0,
            },
            kv: std::ptr::null(),
            kv_count: 0,
            values: values.as_ptr(),
            value_count: values.len() as u64,
            table_bytes: 0,
        };
        let mut bytes = abi::WorkspaceBytes {
            struct_size: size_of::<abi::WorkspaceBytes>() as u32,
            ..abi::WorkspaceBytes::default()
        };
        let f = self
            .raw
            .table
            .workspace_create
            .ok_or_else(|| missing("workspace_create"))?;
        // SAFETY: the dimensions, their array and the result are valid for the call.
        answer("workspace_create", |record| unsafe {
            f(self.model, &dims, &mut bytes, record)
        })
    }

    fn prepare(&self) -> Result<Answer, Failure> {
        let values = [value()];
        let absent = abi::WeightRef {
            layer: abi::NO_LAYER,
            role: u32::MAX,
        };
        let ops = [abi::Op {
            struct_size: size_of::<abi::Op>() as u32,
            op: hoist_backend::OpName::Embed.id(),
            layer: abi::NO_LAYER,
            reserved: 0,
            inputs: [0; 3],
            outputs: [0; 3],
            weights: [
                abi::WeightRef {
                    layer: abi::NO_LAYER,
                    role: Role::TokenEmbd.id(),
                },
                absent,
            ],
            integers: [0; 4],
            floats: [0.0; 4],
        }];
        let program = abi::Program {
            struct_size: size_of::<abi::Program>() as u32,
            vocab: WIDTH,
            max_context: CONTEXT,
            logits: 0,
            kv: std::ptr::null(),
            kv_count: 0,
            values: values.as_ptr(),
            value_count: values.len() as u64,
            ops: ops.as_ptr(),
            op_count: ops.len() as u64,
            op_size: size_of::<abi::Op>() as u64,
            tail: 0,
            tables: std::ptr::null(),
            table_count: 0,
        };
        let f = self.raw.table.prepare.ok_or_else(|| missing("prepare"))?;
        // SAFETY: the program and its arrays are valid for the call.
        answer("prepare", |record| unsafe { f(self.model, &program, record) })
    }

    /// One step; every token of `runs` wants its logits, of which there are `logits`.
    fn forward(&self, runs: Runs<'_>, logits: usize) -> Result<(Answer, Vec<f32>), Failure> {
        let wants: Vec<Vec<u8>> = runs
            .iter()
            .map(|(_, tokens)| vec![abi::WANT_LOGITS; tokens.len()])
            .collect();
        let c_runs: Vec<abi::Run> = runs
            .iter()
            .zip(&wants)
            .map(|((sequence, tokens), want)| abi::Run {
                sequence: *sequence,
                token_count: tokens.len() as u32,
                tokens: tokens.as_ptr(),
                want: want.as_ptr(),
            })
            .collect();
        let batch = abi::Batch {
            struct_size: size_of::<abi::Batch>() as u32,
            reserved: 0,
            runs: c_runs.as_ptr(),
            run_count: c_runs.len() as u64,
        };
        let mut found = WritableF32::new(logits)?;
        let mut argmax = Writable::new(0)?;
        let mut outputs = abi::Outputs {
            struct_size: size_of::<abi::Outputs>() as u32,
            reserved: 0,
            argmax: argmax.as_mut_ptr().cast(),
            argmax_count: 0,
            logits: found.as_mut_ptr(),
            logits_count: logits as u64,
        };
        let f = self.raw.table.forward.ok_or_else(|| missing("forward"))?;
        // SAFETY: the batch, its arrays and the outputs are valid for the call.
        let given = answer("forward", |record| unsafe {
            f(self.model, &batch, &mut outputs, record)
        })?;
        found.check("forward")?;
        Ok((given, found.to_vec()))
    }

    fn truncate(&self, sequence: u32, length: u32) -> Result<Answer, Failure> {
        let f = self.raw.table.truncate.ok_or_else(|| missing("truncate"))?;
        // SAFETY: numbers and a record.
        answer("truncate", |record| unsafe {
            f(self.model, sequence, length, record)
        })
    }

    /// A step that must work, and yields the rows of its tokens.
    fn check(&self, sequence: u32, tokens: &[u32]) -> Result<(), Failure> {
        let width = WIDTH as usize;
        let (given, found) = self.forward(&[(sequence, tokens)], tokens.len() * width)?;
        given.ok("forward")?;
        for (token, row) in tokens.iter().zip(found.chunks(width)) {
            let at = *token as usize * width;
            judge::exact(&format!("row of token {token}"), &self.rows[at..at + width], row)?;
        }
        Ok(())
    }
}

fn value() -> abi::ValueSpec {
    abi::ValueSpec {
        kind: 0,
        width: WIDTH,
        vectors: 0,
        reserved: 0,
    }
}

fn missing(entry: &str) -> Failure {
    Failure::new(format!("entry `{entry}`"), "", "a function", "NULL")
}

fn out_of_order(cx: &mut Context<'_>) -> Verdict {
    let bad_state = &[Status::BAD_STATE];
    let d = Decoding::loaded(cx)?;
    let step = |d: &Decoding| d.forward(&[(0, &[1])], WIDTH as usize);
    d.workspace()?
        .is("workspace_create before build_index", bad_state)?;
    d.prepare()?.is("prepare before build_index", bad_state)?;
    step(&d)?.0.is("forward before build_index", bad_state)?;
    d.index()?.ok("build_index")?;
    d.prepare()?.is("prepare before workspace_create", bad_state)?;
    step(&d)?.0.is("forward before workspace_create", bad_state)?;
    d.workspace()?.ok("workspace_create")?;
    d.workspace()?.is("workspace_create again", bad_state)?;
    step(&d)?.0.is("forward before prepare", bad_state)?;
    d.truncate(0, 0)?.is("truncate before prepare", bad_state)?;
    d.prepare()?.ok("prepare")?;
    d.check(0, &[3, 1])?;
    Ok(())
}

fn tokens_out_of_range(cx: &mut Context<'_>) -> Verdict {
    let d = Decoding::prepared(cx)?;
    let width = WIDTH as usize;
    d.check(0, &[2])?;
    for tokens in [[WIDTH, 0], [0, WIDTH], [1, u32::MAX]] {
        let (given, _) = d.forward(&[(0, &tokens)], 2 * width)?;
        given.is(
            &format!("forward of tokens {tokens:?} of {WIDTH}"),
            &[Status::TOKEN_OUT_OF_RANGE],
        )?;
    }
    // The sequence still has one token: five more fit, in two steps.
    d.check(0, &[0, 1, 2, 3])?;
    d.check(0, &[4])?;
    Ok(())
}

fn context_exceeded(cx: &mut Context<'_>) -> Verdict {
    let d = Decoding::prepared(cx)?;
    let width = WIDTH as usize;
    d.check(1, &[5, 6, 7, 8])?;
    let (given, _) = d.forward(&[(1, &[1, 2, 3])], 3 * width)?;
    given.is("forward beyond the context", &[Status::CONTEXT_EXCEEDED])?;
    d.check(1, &[9, 10])?;
    let (given, _) = d.forward(&[(1, &[1])], width)?;
    given.is("forward at the end of the context", &[Status::CONTEXT_EXCEEDED])?;
    d.truncate(1, 7)?
        .is("truncate to more than there is", &[Status::INVALID_ARGUMENT])?;
    d.truncate(1, 3)?.ok("truncate")?;
    d.check(1, &[11, 12, 13])?;
    Ok(())
}

fn bad_batches(cx: &mut Context<'_>) -> Verdict {
    let d = Decoding::prepared(cx)?;
    let width = WIDTH as usize;
    let batches: [(&str, Runs<'_>, usize); 7] = [
        ("no runs", &[], 0),
        ("an empty run", &[(0, &[])], 0),
        ("an unknown sequence", &[(SEQUENCES, &[1])], width),
        ("a sequence twice", &[(0, &[1]), (0, &[2])], 2 * width),
        ("too many tokens", &[(0, &[1, 2, 3, 4, 5])], 5 * width),
        ("too few logits", &[(0, &[1])], width - 1),
        ("too many logits", &[(0, &[1])], width + 1),
    ];
    for (what, runs, logits) in batches {
        let (given, _) = d.forward(runs, logits)?;
        given.is(&format!("forward with {what}"), &[Status::INVALID_ARGUMENT])?;
    }
    d.truncate(SEQUENCES, 0)?
        .is("truncate of an unknown sequence", &[Status::INVALID_ARGUMENT])?;
    d.check(0, &[1, 2, 3, 4])?;
    d.check(0, &[5, 6])?;
    Ok(())
}

fn prepared_again(cx: &mut Context<'_>) -> Verdict {
    let d = Decoding::prepared(cx)?;
    for _ in 0..3 {
        // Full, so that a sequence that is not reset shows.
        d.check(0, &[1, 2, 3])?;
        d.check(0, &[4, 5, 6])?;
        d.prepare()?.ok("prepare")?;
    }
    Ok(())
}
