//! Cases of the `determinism` suite: nothing but model and tokens decides what comes out.
//!
//! Everything is compared with the oracle, so that what is equal for an *exact* backend is equal bit for bit, and for a
//! *bounded* one within the bounds of the computation.

use hoist_backend::{OpenOptions, SequenceId};

use super::decode::{decoding_in, several_sequences, some_tokens};
use super::ops::session::{Feed, Oracle, Session, capacity, compare, judge_step, open, run};
use super::ops::sketch::transformer;
use crate::{Case, Context, Expect, Failure, Verdict};

/// The cases.
pub fn cases() -> Vec<Case> {
    let case =
        |group, name, run: fn(&mut Context<'_>) -> Verdict| decoding_in("determinism", group, name, run);
    let mut cases = Vec::new();
    for threads in [1, 2, 3, 8] {
        let run = move |cx: &mut Context<'_>| {
            with_options(
                cx,
                &OpenOptions {
                    threads: Some(threads),
                    ..OpenOptions::default()
                },
            )
        };
        cases.push(decoding_in("determinism", "threads", "count", run).with("threads", threads));
    }
    cases.push(case("threads", "changing_callers", changing_callers));
    cases.push(case("code", "scalar", |cx| {
        with_options(
            cx,
            &OpenOptions {
                force_scalar: true,
                ..OpenOptions::default()
            },
        )
    }));
    cases.push(case("chunks", "prefill", chunks));
    cases.push(case("chunks", "full_batches", full_batches));
    cases.push(case("sequences", "neighbours", neighbours));
    cases.push(case("sequences", "cutting_one_leaves_others", cutting));
    cases.push(case("again", "after_reset", after_reset));
    cases.push(case("again", "after_truncation", after_truncation));
    cases.push(case("again", "after_prepare", after_prepare));
    cases.push(case("again", "after_another_model", after_another_model));
    cases.push(case("again", "beside_another_backend", beside));
    cases
}

fn with_options(cx: &mut Context<'_>, options: &OpenOptions) -> Verdict {
    for _ in 0..2 {
        let sketch = transformer(cx, 40)?;
        let batches = several_sequences(cx, &sketch, 3);
        run(cx, &format!("{options:?}"), &sketch, &batches, options)?;
    }
    Ok(())
}

/// Loading and every step on another thread than the one before, never two at once.
fn changing_callers(cx: &mut Context<'_>) -> Verdict {
    let sketch = transformer(cx, 24)?;
    let capacity = capacity(cx.info(), &sketch, 1, 4)?;
    let backend = open(cx, &OpenOptions::default())?;
    let lost = || Failure::new("a thread of the suite", "", "a result", "a panic");
    let shared: &Context<'_> = cx;
    let mut session = std::thread::scope(|scope| {
        let loading = scope.spawn(|| Session::on(shared, backend, &sketch, capacity));
        loading.join().unwrap_or_else(|_| Err(lost().into()))
    })?;
    let mut oracle = Oracle::new(cx, &sketch);
    for _ in 0..6 {
        let feeds = [Feed::logits(0, &some_tokens(cx, &sketch, 3))];
        let found = std::thread::scope(|scope| {
            let step = scope.spawn(|| session.forward(&feeds));
            step.join().unwrap_or_else(|_| Err(lost()))
        })?;
        let what = "a step on a thread of its own";
        judge_step(cx, what, &mut session, &mut oracle, &feeds, found)?;
    }
    Ok(())
}

/// One prompt in chunks of every size gives one answer.
fn chunks(cx: &mut Context<'_>) -> Verdict {
    let sketch = transformer(cx, 32)?;
    let capacity = capacity(cx.info(), &sketch, 1, 20)?;
    let mut session = Session::open(cx, &sketch, capacity, &OpenOptions::default())?;
    let mut oracle = Oracle::new(cx, &sketch);
    let prompt = some_tokens(cx, &sketch, 20);
    for size in [1, 2, 3, 7, 8, 19, 20] {
        for chunk in prompt.chunks(size) {
            let what = format!("a prompt in chunks of {size}");
            compare(cx, &what, &mut session, &mut oracle, &[Feed::logits(0, chunk)])?;
        }
        session.decode()?.truncate(SequenceId(0), 0)?;
        oracle.truncate(0, 0)?;
    }
    Ok(())
}

/// Batches as large as the workspace, and one less.
fn full_batches(cx: &mut Context<'_>) -> Verdict {
    for most in [2u32, 5, 16, 33] {
        let sketch = transformer(cx, 3 * most)?;
        let batches: Vec<Vec<Feed>> = [most, most - 1, most]
            .into_iter()
            .map(|n| vec![Feed::logits(0, &some_tokens(cx, &sketch, n as usize))])
            .collect();
        let what = format!("batches of {most} tokens, all that there is room for");
        run(cx, &what, &sketch, &batches, &OpenOptions::default())?;
    }
    Ok(())
}

/// A sequence alone, and beside others.
fn neighbours(cx: &mut Context<'_>) -> Verdict {
    let sketch = transformer(cx, 40)?;
    for sequences in [1, 2, 5] {
        let batches = several_sequences(cx, &sketch, sequences);
        let what = format!("{sequences} sequences");
        run(cx, &what, &sketch, &batches, &OpenOptions::default())?;
    }
    Ok(())
}

fn cutting(cx: &mut Context<'_>) -> Verdict {
    let sketch = transformer(cx, 24)?;
    let capacity = capacity(cx.info(), &sketch, 3, 12)?;
    let mut session = Session::open(cx, &sketch, capacity, &OpenOptions::default())?;
    let mut oracle = Oracle::new(cx, &sketch);
    let feeds = |cx: &mut Context<'_>, n: usize| -> Vec<Feed> {
        (0..3)
            .map(|s| Feed::logits(s, &some_tokens(cx, &sketch, n)))
            .collect()
    };
    let start = feeds(cx, 4);
    compare(cx, "three sequences", &mut session, &mut oracle, &start)?;
    for (sequence, length) in [(1, 2), (0, 0), (2, 4)] {
        session
            .decode()?
            .truncate(SequenceId(sequence), length)
            .succeeds("truncate")?;
        oracle.truncate(sequence, length)?;
        let lengths: Vec<_> = (0..3).map(|s| (s, oracle.length(s))).collect();
        session.check_lengths("after cutting one", &lengths)?;
        let next = feeds(cx, 2);
        let what = format!("after sequence {sequence} was cut to {length}");
        compare(cx, &what, &mut session, &mut oracle, &next)?;
    }
    Ok(())
}

/// The same prompt again after a reset: nothing of the first run is left.
fn after_reset(cx: &mut Context<'_>) -> Verdict {
    let sketch = transformer(cx, 24)?;
    let capacity = capacity(cx.info(), &sketch, 1, 8)?;
    let mut session = Session::open(cx, &sketch, capacity, &OpenOptions::default())?;
    let mut oracle = Oracle::new(cx, &sketch);
    let prompt = some_tokens(cx, &sketch, 8);
    let other = some_tokens(cx, &sketch, 6);
    for (run, tokens) in [&prompt, &other, &prompt, &prompt].into_iter().enumerate() {
        for part in [&tokens[..4], &tokens[4..]] {
            let what = format!("run {run} of a sequence");
            compare(cx, &what, &mut session, &mut oracle, &[Feed::logits(0, part)])?;
        }
        session
            .decode()?
            .truncate(SequenceId(0), 0)
            .succeeds("truncate")?;
        oracle.truncate(0, 0)?;
    }
    Ok(())
}

fn after_truncation(cx: &mut Context<'_>) -> Verdict {
    let sketch = transformer(cx, 24)?;
    let capacity = capacity(cx.info(), &sketch, 1, 8)?;
    let mut session = Session::open(cx, &sketch, capacity, &OpenOptions::default())?;
    let mut oracle = Oracle::new(cx, &sketch);
    for _ in 0..8 {
        let feeds = [Feed::logits(0, &some_tokens(cx, &sketch, 5))];
        compare(cx, "a sequence that was cut", &mut session, &mut oracle, &feeds)?;
        let most = oracle.length(0).min(18);
        let length = cx.random.below(u64::from(most) + 1) as u32;
        session
            .decode()?
            .truncate(SequenceId(0), length)
            .succeeds("truncate")?;
        oracle.truncate(0, length)?;
        session.check_lengths("after truncate", &[(0, length)])?;
    }
    Ok(())
}

/// Preparing again resets every sequence.
fn after_prepare(cx: &mut Context<'_>) -> Verdict {
    let sketch = transformer(cx, 24)?;
    let capacity = capacity(cx.info(), &sketch, 2, 8)?;
    let mut session = Session::open(cx, &sketch, capacity, &OpenOptions::default())?;
    for _ in 0..2 {
        let mut oracle = Oracle::new(cx, &sketch);
        let feeds = [
            Feed::logits(0, &some_tokens(cx, &sketch, 4)),
            Feed::logits(1, &some_tokens(cx, &sketch, 3)),
        ];
        compare(cx, "after prepare", &mut session, &mut oracle, &feeds)?;
        session.decode()?.prepare(&sketch.program).succeeds("prepare")?;
        session.check_lengths("after prepare", &[(0, 0), (1, 0)])?;
    }
    Ok(())
}

/// One backend, one model after the other.
fn after_another_model(cx: &mut Context<'_>) -> Verdict {
    let mut backend = open(cx, &OpenOptions::default())?;
    for round in 0..4 {
        let sketch = transformer(cx, 16)?;
        let capacity = capacity(cx.info(), &sketch, 1, 6)?;
        let mut session = Session::on(cx, backend, &sketch, capacity)?;
        let mut oracle = Oracle::new(cx, &sketch);
        for n in [6, 1, 3] {
            let feeds = [Feed::logits(0, &some_tokens(cx, &sketch, n))];
            let what = format!("model {round} on one backend");
            compare(cx, &what, &mut session, &mut oracle, &feeds)?;
        }
        backend = session.backend;
        backend.unload().succeeds("unload")?;
    }
    Ok(())
}

/// Two backends on one device, with different models, step by step.
fn beside(cx: &mut Context<'_>) -> Verdict {
    let sketches = [transformer(cx, 16)?, transformer(cx, 16)?];
    let mut pairs = Vec::new();
    for sketch in &sketches {
        let capacity = capacity(cx.info(), sketch, 1, 4)?;
        let session = Session::open(cx, sketch, capacity, &OpenOptions::default())?;
        pairs.push((sketch, session, Oracle::new(cx, sketch)));
    }
    for _ in 0..3 {
        for (sketch, session, oracle) in &mut pairs {
            let feeds = [Feed::logits(0, &some_tokens(cx, sketch, 3))];
            compare(cx, "one of two backends", session, oracle, &feeds)?;
        }
    }
    Ok(())
}
