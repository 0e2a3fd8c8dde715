//! Cases of the `decode` suite: whole tiny models of every architecture, what is asked for, and what is refused.

use hoist_backend::{
    Encoding, Error, OpKind, OpName, OpenOptions, Outputs, Result, Role, Run, SequenceId, TokenBatch, Want,
    WeightRef,
};

use super::ops::session::{Feed, Oracle, Session, capacity, compare, run};
use super::ops::sketch::{Sketch, transformer};
use crate::{Case, Context, Expect, Failure, Need, Verdict, judge};

mod models;

/// The cases.
pub fn cases() -> Vec<Case> {
    let mut cases = models::cases();
    for (name, step) in LIMITS {
        cases.push(decoding("limits", name, move |cx| refused(cx, *step)));
    }
    cases.push(decoding("limits", "truncate", truncate_is_checked));
    cases.push(decoding("limits", "prepare", programs_are_checked));
    cases.push(decoding("outputs", "mixed_wants", mixed_wants));
    cases.push(
        Case::new("decode", "outputs", "arg_max_ties", ties)
            .needs(Need::Decode)
            .needs(Need::Computed(Encoding::F32))
            .needs(Need::Op(OpName::Embed)),
    );
    cases.push(decoding("memory", "fixed_after_workspace", memory_is_fixed));
    cases.push(decoding("random", "transformer", |cx| {
        for _ in 0..3 {
            let sketch = transformer(cx, 40)?;
            let batches = several_sequences(cx, &sketch, 3);
            run(
                cx,
                "a random transformer",
                &sketch,
                &batches,
                &OpenOptions::default(),
            )?;
        }
        Ok(())
    }));
    cases
}

/// A case that decodes random transformers.
pub(crate) fn decoding(
    group: &'static str,
    name: &'static str,
    run: impl Fn(&mut Context<'_>) -> Verdict + Send + Sync + 'static,
) -> Case {
    decoding_in("decode", group, name, run)
}

/// As [`decoding`], in another suite.
pub(crate) fn decoding_in(
    suite: &'static str,
    group: &'static str,
    name: &'static str,
    run: impl Fn(&mut Context<'_>) -> Verdict + Send + Sync + 'static,
) -> Case {
    let ops = [
        OpName::Embed,
        OpName::RmsNorm,
        OpName::Quantise,
        OpName::MatMul,
        OpName::Rope,
        OpName::StoreKv,
        OpName::Attention,
        OpName::Activation,
        OpName::Mul,
        OpName::Add,
        OpName::Logits,
    ];
    let case = Case::new(suite, group, name, run)
        .needs(Need::Decode)
        .needs(Need::Computed(Encoding::F32))
        .limit_s(60);
    ops.into_iter().fold(case, |case, op| case.needs(Need::Op(op)))
}

/// Random tokens of a sketch's vocabulary.
pub(crate) fn some_tokens(cx: &mut Context<'_>, sketch: &Sketch, n: usize) -> Vec<u32> {
    let vocab = u64::from(sketch.program.vocab);
    (0..n).map(|_| cx.random.below(vocab) as u32).collect()
}

/// Batches that feed several sequences at once, of different lengths, within the context.
pub(crate) fn several_sequences(cx: &mut Context<'_>, sketch: &Sketch, sequences: u32) -> Vec<Vec<Feed>> {
    let mut lengths = vec![0u32; sequences as usize];
    let mut batches = Vec::new();
    for _ in 0..5 {
        let mut batch = Vec::new();
        for (sequence, length) in (0..).zip(&mut lengths) {
            let room = sketch.program.max_context - *length;
            let n = cx.random.below(6).min(u64::from(room)) as usize;
            if n > 0 {
                batch.push(Feed::logits(sequence, &some_tokens(cx, sketch, n)));
                *length += n as u32;
            }
        }
        // The order of sequences in a batch is free.
        if cx.random.below(2) == 0 {
            batch.reverse();
        }
        if !batch.is_empty() {
            batches.push(batch);
        }
    }
    batches
}

/// A step that must be refused: what it calls with.
type Step = fn(&mut Session, &Sketch) -> std::result::Result<Result<()>, Failure>;

/// Positions of the sketches that steps are refused on, sequences, and tokens of a batch.
const ROOM: (u32, u32, u32) = (12, 2, 8);

fn plain(session: &mut Session, feeds: &[Feed]) -> std::result::Result<Result<()>, Failure> {
    Ok(session.forward(feeds)?.map(drop))
}

const LIMITS: &[(&str, Step)] = &[
    ("token_out_of_range", |s, sketch| {
        plain(s, &[Feed::logits(0, &[0, sketch.program.vocab])])
    }),
    ("token_far_out_of_range", |s, _| {
        plain(s, &[Feed::logits(1, &[0]), Feed::logits(0, &[1, u32::MAX])])
    }),
    // Three tokens are there already.
    ("context_exceeded", |s, _| {
        plain(s, &[Feed::logits(0, &[0; 8])])?
            .map_or_else(|e| Ok(Err(e)), |()| plain(s, &[Feed::logits(0, &[0, 0])]))
    }),
    ("unknown_sequence", |s, _| plain(s, &[Feed::logits(ROOM.1, &[0])])),
    ("repeated_sequence", |s, _| {
        plain(s, &[Feed::logits(0, &[0]), Feed::logits(0, &[1])])
    }),
    ("no_runs", |s, _| plain(s, &[])),
    ("empty_run", |s, _| {
        plain(s, &[Feed::logits(0, &[0]), Feed::logits(1, &[])])
    }),
    ("too_many_tokens", |s, _| {
        plain(s, &[Feed::logits(0, &[0; 4]), Feed::logits(1, &[0; 5])])
    }),
    ("wants_of_another_length", |s, _| {
        let feed = Feed {
            sequence: 0,
            tokens: vec![0, 1],
            want: vec![Want::Logits],
        };
        plain(s, &[feed])
    }),
    ("logits_too_short", |s, sketch| {
        with_outputs(s, 0, sketch.program.vocab as usize - 1)
    }),
    ("logits_too_long", |s, sketch| {
        with_outputs(s, 0, sketch.program.vocab as usize + 1)
    }),
    ("arg_max_too_long", |s, sketch| {
        with_outputs(s, 1, sketch.program.vocab as usize)
    }),
];

/// One token that wants logits, with outputs of those sizes.
fn with_outputs(s: &mut Session, argmax: usize, logits: usize) -> std::result::Result<Result<()>, Failure> {
    let runs = [Run {
        sequence: SequenceId(0),
        tokens: &[0],
        want: &[Want::Logits],
    }];
    let mut out = (vec![0; argmax], vec![0.0; logits]);
    let mut outputs = Outputs {
        argmax: &mut out.0,
        logits: &mut out.1,
    };
    Ok(s.decode()?.forward(&TokenBatch { runs: &runs }, &mut outputs))
}

/// A step that is refused changes nothing: lengths are as before, and what comes after is right.
fn refused(cx: &mut Context<'_>, step: Step) -> Verdict {
    let (context, sequences, batch) = ROOM;
    let sketch = transformer(cx, context)?;
    let capacity = capacity(cx.info(), &sketch, sequences, batch)?;
    let mut session = Session::open(cx, &sketch, capacity, &OpenOptions::default())?;
    let mut oracle = Oracle::new(cx, &sketch);
    let start = [
        Feed::logits(0, &some_tokens(cx, &sketch, 3)),
        Feed::logits(1, &some_tokens(cx, &sketch, 2)),
    ];
    compare(cx, "before the refusal", &mut session, &mut oracle, &start)?;
    let error = step(&mut session, &sketch)?.fails("a step that must be refused", "an error", |e| {
        matches!(
            e,
            Error::InvalidArgument { .. } | Error::TokenOutOfRange { .. } | Error::ContextExceeded { .. }
        )
    })?;
    let exceeded = matches!(error, Error::ContextExceeded { .. });
    if exceeded {
        // The eight tokens before it were taken.
        session.check_lengths("after the refusal", &[(0, 11), (1, 2)])?;
        session.decode()?.truncate(SequenceId(0), 3)?;
    }
    session.check_lengths("after the refusal", &[(0, 3), (1, 2)])?;
    let after = [
        Feed::logits(1, &some_tokens(cx, &sketch, 2)),
        Feed::logits(0, &some_tokens(cx, &sketch, 4)),
    ];
    compare(cx, "after the refusal", &mut session, &mut oracle, &after)
}

fn truncate_is_checked(cx: &mut Context<'_>) -> Verdict {
    let (context, sequences, batch) = ROOM;
    let sketch = transformer(cx, context)?;
    let capacity = capacity(cx.info(), &sketch, sequences, batch)?;
    let mut session = Session::open(cx, &sketch, capacity, &OpenOptions::default())?;
    let mut oracle = Oracle::new(cx, &sketch);
    let feeds = [Feed::logits(0, &some_tokens(cx, &sketch, 5))];
    compare(cx, "before", &mut session, &mut oracle, &feeds)?;
    for (sequence, length) in [(0, 6), (0, u32::MAX), (1, 1), (sequences, 0)] {
        session.decode()?.truncate(SequenceId(sequence), length).fails(
            format!("truncate of sequence {sequence} to {length}"),
            "InvalidArgument",
            |e| matches!(e, Error::InvalidArgument { .. }),
        )?;
    }
    session.check_lengths("after refusals", &[(0, 5), (1, 0)])?;
    let feeds = [Feed::logits(0, &some_tokens(cx, &sketch, 2))];
    compare(cx, "after refusals", &mut session, &mut oracle, &feeds)
}

/// Programs that do not fit the index or the workspace are refused; a good one can be prepared after that.
fn programs_are_checked(cx: &mut Context<'_>) -> Verdict {
    let sketch = transformer(cx, 12)?;
    let capacity = capacity(cx.info(), &sketch, 1, 4)?;
    let mut session = Session::open(cx, &sketch, capacity, &OpenOptions::default())?;
    let mut no_weight = sketch.program.clone();
    for op in &mut no_weight.ops {
        if let OpKind::Logits { weight, .. } = &mut op.kind {
            *weight = WeightRef {
                layer: Some(0),
                role: Role::OutputBias,
            };
        }
    }
    let mut longer = sketch.program.clone();
    longer.max_context += 1;
    for (what, program) in [
        ("a weight that the index lacks", no_weight),
        ("a context beyond the workspace", longer),
    ] {
        session
            .decode()?
            .prepare(&program)
            .fails(format!("prepare with {what}"), "an error", |e| {
                !matches!(e, Error::DeviceLost { .. } | Error::BadState { .. })
            })?;
    }
    session.decode()?.prepare(&sketch.program).succeeds("prepare")?;
    let mut oracle = Oracle::new(cx, &sketch);
    let feeds = [Feed::logits(0, &some_tokens(cx, &sketch, 4))];
    compare(cx, "after refusals", &mut session, &mut oracle, &feeds)
}

/// Tokens that want nothing, the arg-max or logits, in one batch of several sequences.
fn mixed_wants(cx: &mut Context<'_>) -> Verdict {
    for _ in 0..3 {
        let sketch = transformer(cx, 32)?;
        let mut batches = several_sequences(cx, &sketch, 3);
        for feed in batches.iter_mut().flatten() {
            for want in &mut feed.want {
                *want = cx.random.choose([Want::Nothing, Want::ArgMax, Want::Logits]);
            }
        }
        run(
            cx,
            "tokens that want different things",
            &sketch,
            &batches,
            &OpenOptions::default(),
        )?;
    }
    Ok(())
}

/// The lowest of equal maxima.
fn ties(cx: &mut Context<'_>) -> Verdict {
    let width = 3 + cx.random.below(400) as u32;
    let mut sketch = Sketch::new(width, 64);
    let rows: Vec<f32> = (0..width * width)
        .map(|_| cx.random.below(3) as f32 - 1.0)
        .collect();
    let out = sketch.input_of(width, &rows);
    let sketch = sketch.finish(out);
    let tokens = some_tokens(cx, &sketch, 24);
    let batches = [vec![Feed {
        sequence: 0,
        want: vec![Want::ArgMax; tokens.len()],
        tokens,
    }]];
    run(cx, "equal logits", &sketch, &batches, &OpenOptions::default())
}

/// Decoding allocates nothing on the device.
fn memory_is_fixed(cx: &mut Context<'_>) -> Verdict {
    let sketch = transformer(cx, 40)?;
    let capacity = capacity(cx.info(), &sketch, 2, 8)?;
    let mut session = Session::open(cx, &sketch, capacity, &OpenOptions::default())?;
    let resident = |session: &Session| -> std::result::Result<Vec<_>, Failure> {
        let memory = session.backend.memory().succeeds("memory")?;
        Ok(memory.devices.iter().map(|d| d.resident).collect())
    };
    let before = resident(&session)?;
    for step in 0..12 {
        let n = 1 + step % 8;
        let tokens = some_tokens(cx, &sketch, n);
        session
            .forward(&[Feed::logits(0, &tokens)])?
            .succeeds("forward")?;
        session.decode()?.truncate(SequenceId(0), 0)?;
        judge::equal(
            "memory that is resident after a step",
            &before,
            &resident(&session)?,
        )?;
    }
    Ok(())
}
