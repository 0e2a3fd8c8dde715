//! Operations of many tokens that one kernel does together, where nobody else reads what lies between them: a sum, its norm and
//! the integers of that; a gated activation, or what attention yields, and its integers; turning queries and keys and storing
//! them. Where only products on tensor cores read the integers, they go straight to tiles. The bits are those of the
//! operations one by one.

use hoist_backend::{ActivationKind, KvDtype, ResolvedProgram, Result, Step, StepKind};

use super::prefill::Form;
use super::workspace::Workspace;
use crate::modules::{Function, Modules};

/// Operations from one on that a kernel does together.
#[derive(Debug)]
pub(super) struct Fused {
    pub(super) function: Function,
    pub(super) kind: Kind,
    /// The last operation.
    pub(super) last: usize,
    /// What is quantised by the last operation, if it does so.
    pub(super) integers: Option<Quantised>,
}

/// Integers, and who reads them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Quantised {
    pub(super) cols: u32,
    pub(super) out: usize,
    /// How they are packed; where this is empty, they are not.
    pub(super) forms: Vec<Form>,
}

/// What a kernel does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    /// An RmsNorm, of a sum where there is one: its other operand, and where it goes.
    Normed {
        input: usize,
        plus: Option<(usize, usize)>,
        weight: usize,
        eps: f32,
    },
    /// An activation of one value times another.
    Gated { gate: usize, up: usize },
    /// Attention.
    Attended,
    /// Rope of queries, of keys, and StoreKv.
    Turned,
}

/// Whether an operation reads a value.
fn reads(kind: &StepKind, value: usize) -> bool {
    let read = |values: &[usize]| values.contains(&value);
    match *kind {
        StepKind::Embed { .. } | StepKind::EmbedPosition { .. } => false,
        StepKind::RmsNorm { input, .. }
        | StepKind::LayerNorm { input, .. }
        | StepKind::Quantise { input, .. }
        | StepKind::MatMul { input, .. }
        | StepKind::Activation { input, .. }
        | StepKind::Scale { input, .. }
        | StepKind::SoftCap { input, .. } => read(&[input]),
        StepKind::Rope { value, .. } => read(&[value]),
        StepKind::StoreKv { key, value, .. } => read(&[key, value]),
        StepKind::Attention { query, .. } => read(&[query]),
        StepKind::Mul { a, b, .. } | StepKind::Add { a, b, .. } => read(&[a, b]),
        StepKind::RouterTopK { logits, .. } => read(&[logits]),
        StepKind::ExpertMatMul { input, experts, .. } => read(&[input, experts]),
        StepKind::WeightedSum {
            input,
            experts,
            weights,
            ..
        } => read(&[input, experts, weights]),
    }
}

/// Whether an operation writes all of a value.
fn writes(kind: &StepKind, value: usize) -> bool {
    match *kind {
        StepKind::Embed { out, .. }
        | StepKind::EmbedPosition { out, .. }
        | StepKind::RmsNorm { out, .. }
        | StepKind::LayerNorm { out, .. }
        | StepKind::Quantise { out, .. }
        | StepKind::MatMul { out, .. }
        | StepKind::Attention { out, .. }
        | StepKind::Activation { out, .. }
        | StepKind::Mul { out, .. }
        | StepKind::Add { out, .. }
        | StepKind::Scale { out, .. }
        | StepKind::SoftCap { out, .. }
        | StepKind::ExpertMatMul { out, .. }
        | StepKind::WeightedSum { out, .. } => out == value,
        StepKind::RouterTopK { experts, weights, .. } => experts == value || weights == value,
        // In place, or in the cache.
        StepKind::Rope { .. } | StepKind::StoreKv { .. } => false,
    }
}

/// Whether a value is of no use to these operations.
fn unused(value: usize, after: &[Step]) -> bool {
    for step in after {
        if reads(&step.kind, value) {
            return false;
        }
        if writes(&step.kind, value) {
            return true;
        }
    }
    true
}

/// What begins with the first of some operations.
#[derive(Debug, PartialEq)]
struct Match {
    kind: Kind,
    /// How many operations.
    count: usize,
    /// Columns and the integers' value.
    quantised: Option<(u32, usize)>,
}

fn matches(steps: &[Step], width: impl Fn(usize) -> u32) -> Option<Match> {
    let kind = |at: usize| steps.get(at).map(|s| &s.kind);
    let whole = |value: usize, cols: usize| width(value) as usize == cols;
    let free = |value: usize, from: usize| unused(value, &steps[from..]);
    // A norm and its integers, from an operation on.
    let normed = |at: usize| match (kind(at)?, kind(at + 1)?) {
        (
            &StepKind::RmsNorm {
                input,
                weight,
                eps,
                out: normed,
            },
            &StepKind::Quantise {
                input: quantised,
                cols,
                out,
            },
        ) if quantised == normed && whole(normed, cols) && free(normed, at + 2) => {
            // In place, the norm's input is what nobody may read.
            Some((input, weight, eps, normed, cols, out))
        }
        _ => None,
    };
    let found = |kind, count, cols: usize, out| {
        Some(Match {
            kind,
            count,
            quantised: Some((cols as u32, out)),
        })
    };
    match (kind(0)?, kind(1)?, kind(2)) {
        (StepKind::RmsNorm { .. }, ..) => {
            let (input, weight, eps, _, cols, out) = normed(0)?;
            let kind = Kind::Normed {
                input,
                plus: None,
                weight,
                eps,
            };
            found(kind, 2, cols, out)
        }
        (&StepKind::Add { a, b, out: sum }, ..) => {
            let (input, weight, eps, normed, cols, out) = normed(1)?;
            let kind = Kind::Normed {
                input: a,
                plus: Some((b, sum)),
                weight,
                eps,
            };
            // A norm in place would be read as the sum.
            (input == sum && normed != sum && whole(sum, cols)).then_some(())?;
            found(kind, 3, cols, out)
        }
        (
            &StepKind::Activation {
                input: gate,
                out: activated,
                ..
            },
            &StepKind::Mul { a, b, out: product },
            Some(&StepKind::Quantise {
                input: quantised,
                cols,
                out,
            }),
        ) if quantised == product && whole(product, cols) && (a == activated) != (b == activated) => {
            let up = if a == activated { b } else { a };
            // The kernel reads the gate as it was before the activation, and leaves it so.
            (free(activated, 3) && free(product, 3)).then_some(())?;
            found(Kind::Gated { gate, up }, 3, cols, out)
        }
        (
            &StepKind::Attention { out: attended, .. },
            &StepKind::Quantise {
                input: quantised,
                cols,
                out,
            },
            _,
        ) if quantised == attended && whole(attended, cols) && free(attended, 2) => {
            found(Kind::Attended, 2, cols, out)
        }
        (
            &StepKind::Rope { value: query, .. },
            &StepKind::Rope { value: turned, .. },
            Some(&StepKind::StoreKv { key, value, .. }),
        ) if turned == key && query != key && query != value => Some(Match {
            kind: Kind::Turned,
            count: 3,
            quantised: None,
        }),
        _ => None,
    }
}

/// How the products that read integers want them packed, where nobody else reads them: `form` tells of an operation's product.
fn forms(
    out: usize,
    resolved: &ResolvedProgram,
    last: usize,
    form: impl Fn(usize) -> Option<Form>,
) -> Vec<Form> {
    let steps = &resolved.steps;
    let end = if last < resolved.tail {
        resolved.tail
    } else {
        steps.len()
    };
    let mut forms = Vec::new();
    for (at, step) in steps.iter().enumerate().take(end).skip(last + 1) {
        if reads(&step.kind, out) {
            match form(at) {
                Some(form) if forms.contains(&form) => {}
                Some(form) => forms.push(form),
                None => return Vec::new(),
            }
        }
        if writes(&step.kind, out) {
            return forms;
        }
    }
    // What is carried to the tail may be read there by other kernels.
    if unused(out, &steps[end..]) {
        forms
    } else {
        Vec::new()
    }
}

/// For each operation, what begins there. `norm_cols` yields the length of a norm's weight, `form` how the product of an
/// operation takes its vectors.
pub(super) fn find(
    modules: &Modules,
    resolved: &ResolvedProgram,
    work: &Workspace,
    norm_cols: impl Fn(usize) -> Result<u64>,
    form: impl Fn(usize) -> Option<Form>,
) -> Result<Vec<Option<Fused>>> {
    let steps = &resolved.steps;
    let mut found = Vec::with_capacity(steps.len());
    for at in 0..steps.len() {
        let matched = matches(&steps[at..], |value| work.values[value].width);
        let Some(matched) = matched.filter(|m| at >= resolved.tail || at + m.count <= resolved.tail) else {
            found.push(None);
            continue;
        };
        let last = at + matched.count - 1;
        let integers = matched.quantised.map(|(cols, out)| Quantised {
            cols,
            out,
            forms: forms(out, resolved, last, &form),
        });
        let kernel = match (matched.kind, &steps[at].kind) {
            // Norms of heads have shorter weights.
            (Kind::Normed { weight, .. }, _) => {
                let cols = matched.quantised.map(|(cols, _)| u64::from(cols));
                (Some(norm_cols(weight)?) == cols).then_some("rms_norm_quantise")
            }
            (
                Kind::Gated { .. },
                StepKind::Activation {
                    kind: ActivationKind::GeluTanh,
                    ..
                },
            ) => Some("gelu_tanh_quantise"),
            (Kind::Gated { .. }, _) => Some("silu_quantise"),
            // Eight elements of a head are read at a time.
            (Kind::Attended, StepKind::Attention { layer, .. }) => work.cache[*layer]
                .head_dim
                .is_multiple_of(8)
                .then_some("merge_quantise"),
            (Kind::Attended, _) => None,
            (Kind::Turned, _) => Some(match work.dims.capacity.kv {
                KvDtype::F16 => "rope_store_f16",
                KvDtype::F32 => "rope_store_f32",
            }),
        };
        found.push(match kernel {
            Some(kernel) => Some(Fused {
                function: modules.function("prefill", kernel)?,
                kind: matched.kind,
                last,
                integers,
            }),
            None => None,
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::params::{Elements, Gated, Integers, Norm, Normed, Pack, Quantise, Tiles};
    use super::super::prefill;
    use super::*;
    use crate::driver::{Context, DeviceBuffer, Stream};
    use crate::modules::{Launch, arguments};
    use hoist_backend::OpName;

    fn step(kind: StepKind) -> Step {
        Step {
            layer: None,
            op: OpName::Mul,
            kind,
        }
    }

    fn gated(after: Vec<StepKind>) -> Option<Match> {
        let first = [
            StepKind::Activation {
                input: 0,
                kind: ActivationKind::Silu,
                out: 0,
            },
            StepKind::Mul { a: 0, b: 1, out: 0 },
            StepKind::Quantise {
                input: 0,
                cols: 512,
                out: 2,
            },
        ];
        let steps: Vec<Step> = first.into_iter().chain(after).map(step).collect();
        matches(&steps, |_| 512)
    }

    #[test]
    fn a_gated_activation_that_nobody_else_reads_goes_straight_to_integers() {
        let found = Some(Match {
            kind: Kind::Gated { gate: 0, up: 1 },
            count: 3,
            quantised: Some((512, 2)),
        });
        assert_eq!(gated(vec![]), found);
        let overwritten = StepKind::Scale {
            input: 1,
            factor: 1.0,
            out: 0,
        };
        let read = StepKind::Add { a: 3, b: 0, out: 3 };
        assert_eq!(gated(vec![overwritten, read.clone()]), found);
        assert_eq!(gated(vec![read]), None);
    }

    #[test]
    fn a_norm_that_a_router_reads_too_is_written() {
        let norm = StepKind::RmsNorm {
            input: 0,
            weight: 0,
            eps: 0.0,
            out: 1,
        };
        let quantise = |cols| StepKind::Quantise {
            input: 1,
            cols,
            out: 2,
        };
        let router = StepKind::MatMul {
            input: 1,
            weight: 1,
            bias: None,
            out: 3,
        };
        let find = |kinds: &[&StepKind]| {
            let steps: Vec<Step> = kinds.iter().map(|k| step((*k).clone())).collect();
            matches(&steps, |_| 256).map(|found| found.kind)
        };
        let normed = |plus| Kind::Normed {
            input: 0,
            plus,
            weight: 0,
            eps: 0.0,
        };
        assert_eq!(find(&[&norm, &quantise(256)]), Some(normed(None)));
        let sum = |out| StepKind::Add { a: 0, b: 3, out };
        assert_eq!(
            find(&[&sum(0), &norm, &quantise(256)]),
            Some(normed(Some((3, 0))))
        );
        // The sum of something else.
        assert_eq!(find(&[&sum(4), &norm, &quantise(256)]), None);
        assert_eq!(find(&[&norm, &quantise(256), &router]), None);
        // Several vectors of one value.
        assert_eq!(find(&[&norm, &quantise(128)]), None);
    }

    #[test]
    fn integers_are_those_of_the_operations_one_by_one() {
        // On the emulated device, where it could be built.
        if hoist_cuda_emulator::load().is_none() {
            eprintln!("no C++ compiler, so that there is no emulated device to quantise on");
            return;
        }
        let context = Context::open(0).unwrap();
        let modules = Modules::new(&context);
        let stream = Stream::new(&context).unwrap();
        let uploaded = |values: &[f32]| {
            let bytes: &[u8] = bytemuck::cast_slice(values);
            let to = DeviceBuffer::new(&context, "a test", bytes.len() as u64).unwrap();
            // SAFETY: the buffer is as long as the bytes, which stay until the stream has been waited for.
            unsafe { stream.copy_htod(to.ptr(), bytes) }.unwrap();
            stream.synchronize().unwrap();
            to
        };
        // The second has a last segment of half the length.
        for (cols, vectors) in [(512u32, 9u32), (1152, 3)] {
            let n = cols * vectors;
            let wave = |step: f32| -> Vec<f32> { (0..n).map(|i| (i as f32 * step).sin() * 5.0).collect() };
            let (a, b) = (uploaded(&wave(0.37)), uploaded(&wave(1.91)));
            let (c, fault) = (uploaded(&wave(0.0)), uploaded(&[-1.0]));
            let segments = cols.div_ceil(256);
            let nbytes = u64::from(segments * vectors) * super::super::params::SEGMENT_BYTES;
            let run =
                |file: &str, kernel: &'static str, blocks: u32, threads: u32, arguments: &mut [*mut _]| {
                    let function = modules.function(file, kernel).unwrap();
                    // SAFETY: the arguments are the struct that the kernel takes, whose buffers are as long as it says.
                    unsafe { function.launch(&stream, Launch::linear(blocks, threads), arguments) }.unwrap();
                };
            let downloaded = |from: &DeviceBuffer| {
                let mut bytes = vec![0u8; nbytes as usize];
                // SAFETY: as long as the buffer; waited for below.
                unsafe { stream.copy_dtoh(&mut bytes, from.ptr()) }.unwrap();
                stream.synchronize().unwrap();
                bytes
            };
            let warps = (segments * vectors).div_ceil(4);
            let [one, all] = [(); 2].map(|()| DeviceBuffer::new(&context, "integers", nbytes).unwrap());
            let quantise = Quantise {
                x: c.ptr(),
                out: one.ptr(),
                fault: fault.ptr(),
                step: 0,
                cols,
                segments,
                vectors,
            };
            let norm = Norm {
                x: a.ptr(),
                weight: b.ptr(),
                bias: 0,
                y: c.ptr(),
                n: cols,
                eps: 1e-5,
            };
            let to = Integers {
                out: all.ptr(),
                tiles: Tiles::default(),
                fault: fault.ptr(),
                step: 0,
                cols,
                segments,
                tokens: vectors,
            };
            let normed = Normed {
                x: a.ptr(),
                plus: 0,
                sum: 0,
                weight: b.ptr(),
                to,
                eps: 1e-5,
            };
            // In tiles of each form, of a sum: as the sum is packed.
            let tiles_bytes = prefill::packed_bytes(segments.into(), vectors).unwrap();
            let zeros = vec![0.0; tiles_bytes as usize / 4];
            let [packed, fused] = [(); 2].map(|()| uploaded(&zeros));
            let sum = uploaded(&wave(0.0));
            let tiles = |to: &DeviceBuffer| prefill::tiles(to.ptr(), &prefill::FORMS, segments, vectors);
            let added = Elements {
                a: a.ptr(),
                b: b.ptr(),
                out: c.ptr(),
                n: n.into(),
                factor: 0.0,
            };
            let of_sum = Normed { x: c.ptr(), ..normed };
            let pack = Pack {
                x: all.ptr(),
                tiles: tiles(&packed),
                segments,
                tokens: vectors,
            };
            let at_once = Normed {
                plus: b.ptr(),
                sum: sum.ptr(),
                to: Integers {
                    out: 0,
                    tiles: tiles(&fused),
                    ..to
                },
                ..normed
            };
            run("decode", "elements_add", 4, 256, &mut arguments![added]);
            run(
                "prefill",
                "rms_norm_quantise",
                vectors,
                512,
                &mut arguments![of_sum],
            );
            let grid = (vectors.div_ceil(8), segments.div_ceil(4), 1);
            let launch = Launch {
                grid,
                ..Launch::linear(1, 256)
            };
            let function = modules.function("prefill", "pack").unwrap();
            // SAFETY: as above.
            unsafe { function.launch(&stream, launch, &mut arguments![pack]) }.unwrap();
            let blocks = prefill::whole_tiles(vectors);
            run(
                "prefill",
                "rms_norm_quantise",
                blocks,
                512,
                &mut arguments![at_once],
            );
            let bytes_of = |from: &DeviceBuffer, nbytes: u64| {
                let mut bytes = vec![0u8; nbytes as usize];
                // SAFETY: as long as the buffer; waited for below.
                unsafe { stream.copy_dtoh(&mut bytes, from.ptr()) }.unwrap();
                stream.synchronize().unwrap();
                bytes
            };
            let expected = bytes_of(&packed, tiles_bytes);
            assert!(expected == bytes_of(&fused, tiles_bytes) && expected.iter().any(|b| *b != 0));
            assert!(bytes_of(&c, 4 * u64::from(n)) == bytes_of(&sum, 4 * u64::from(n)));
            run("decode", "rms_norm", vectors, 256, &mut arguments![norm]);
            run("decode", "quantise", warps, 128, &mut arguments![quantise]);
            run(
                "prefill",
                "rms_norm_quantise",
                vectors,
                512,
                &mut arguments![normed],
            );
            let expected = downloaded(&one);
            assert!(expected == downloaded(&all) && expected.iter().any(|b| *b != 0));
            for (activation, gated) in [
                ("elements_silu", "silu_quantise"),
                ("elements_gelu_tanh", "gelu_tanh_quantise"),
            ] {
                let elements = |a: u64, b: u64| Elements {
                    a,
                    b,
                    out: c.ptr(),
                    n: n.into(),
                    factor: 0.0,
                };
                let (activate, multiply) = (elements(a.ptr(), 0), elements(c.ptr(), b.ptr()));
                let params = Gated {
                    gate: a.ptr(),
                    up: b.ptr(),
                    to,
                };
                run("decode", activation, 4, 256, &mut arguments![activate]);
                run("decode", "elements_mul", 4, 256, &mut arguments![multiply]);
                run("decode", "quantise", warps, 128, &mut arguments![quantise]);
                run("prefill", gated, vectors, 1024, &mut arguments![params]);
                assert!(downloaded(&one) == downloaded(&all), "{gated}");
            }
        }
    }
}
