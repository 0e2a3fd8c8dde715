//! Keys, values, activations and tables: one allocation, of the size that was told before, and none after it.

use hoist_backend::{Error, OpenOptions, WeightBackend};

use super::support::{Small, tokens};
use crate::{Case, Context, Expect, Failure, Need, Stop, Verdict, judge};

/// The cases.
pub fn cases() -> Vec<Case> {
    let case = |group, name, run: fn(&mut Context<'_>) -> Verdict| {
        Case::new("workspace", group, name, run).needs(Need::Decode)
    };
    vec![
        case("size", "is_told_before_and_accounted_after", size),
        case("size", "grows_with_each_capacity", grows),
        case("size", "past_2_to_the_64_is_refused", too_large).unseeded(),
        case("fixed", "decoding_allocates_nothing", fixed),
        case("fixed", "weights_are_untouched_by_decoding", weights_untouched),
        case("full", "every_position_of_every_sequence", every_position),
    ]
}

fn resident(backend: &dyn WeightBackend) -> Result<(u64, u64, u64), Failure> {
    let devices = backend.memory().succeeds("memory")?.devices;
    Ok(devices.iter().fold((0, 0, 0), |(kv, workspace, all), d| {
        (
            kv + d.resident.kv,
            workspace + d.resident.workspace,
            all + d.resident.total(),
        )
    }))
}

fn size(cx: &mut Context<'_>) -> Verdict {
    let context = 8 + cx.random.below(50) as u32;
    let capacity = Small::capacity(
        context,
        1 + cx.random.below(3) as u32,
        1 + cx.random.below(8) as u32,
    );
    let small = Small::new(cx, capacity)?;
    let dims = small.dims()?;
    let mut backend = cx.open()?;
    let before = backend
        .workspace_bytes(&dims)
        .succeeds("workspace_bytes before a load")?;
    small.index(&mut *backend)?;
    let told = backend.workspace_bytes(&dims).succeeds("workspace_bytes")?;
    judge::equal("workspace_bytes before and after a load", before, told)?;
    let taken = backend.init_workspace(&dims).succeeds("init_workspace")?;
    judge::equal("bytes taken, as workspace_bytes told", told, taken)?;
    let (kv, workspace, _) = resident(&*backend)?;
    judge::equal("keys and values of the memory", taken.kv, kv)?;
    judge::equal("workspace of the memory", taken.workspace, workspace)?;
    let least = dims.kv_bytes().unwrap_or(u64::MAX);
    judge::holds(
        "bytes of keys and values",
        taken.kv >= least,
        format!("at least {least}"),
        taken.kv,
    )?;
    backend.unload().succeeds("unload")?;
    Ok(judge::equal(
        "bytes after unload",
        (0, 0, 0),
        resident(&*backend)?,
    )?)
}

fn grows(cx: &mut Context<'_>) -> Verdict {
    let small = Small::new(cx, Small::capacity(16, 1, 2))?;
    let backend = cx.open()?;
    let dims = small.dims()?;
    let base = backend.workspace_bytes(&dims).succeeds("workspace_bytes")?;
    let mut more = dims.clone();
    more.capacity.max_sequences *= 16;
    let sequences = backend.workspace_bytes(&more).succeeds("workspace_bytes")?;
    judge::holds(
        "bytes of keys and values of 16 sequences",
        sequences.kv >= 15 * base.kv,
        format!("about 16 times {}", base.kv),
        sequences.kv,
    )?;
    let mut more = dims;
    more.capacity.max_batch_tokens *= 64;
    let batch = backend.workspace_bytes(&more).succeeds("workspace_bytes")?;
    judge::holds(
        "workspace of batches 64 times as large",
        batch.workspace >= base.workspace && batch.kv == base.kv,
        format!("at least {base:?}"),
        format!("{batch:?}"),
    )?;
    Ok(())
}

fn too_large(cx: &mut Context<'_>) -> Verdict {
    let small = Small::new(cx, Small::capacity(16, 1, 2))?;
    let mut dims = small.dims()?;
    dims.capacity.max_sequences = u32::MAX;
    dims.capacity.max_context = u32::MAX;
    let mut backend = cx.open()?;
    small.index(&mut *backend)?;
    backend.init_workspace(&dims).map(|_| ()).fails(
        "init_workspace of 2^64 positions",
        "OutOfMemory, InvalidArgument or Unsupported",
        |e| {
            matches!(
                e,
                Error::OutOfMemory { .. } | Error::InvalidArgument { .. } | Error::Unsupported { .. }
            )
        },
    )?;
    // Still indexed.
    backend
        .init_workspace(&small.dims()?)
        .succeeds("init_workspace")?;
    Ok(())
}

fn fixed(cx: &mut Context<'_>) -> Verdict {
    let small = Small::new(cx, Small::capacity(64, 2, 8))?;
    let mut backend = small.prepared(cx, &OpenOptions::default())?;
    let before = resident(&*backend)?;
    for _ in 0..10 {
        let n = 1 + cx.random.below(5) as usize;
        let tokens = tokens(&mut cx.random, n);
        small.forward(&mut *backend, cx.random.below(2) as u32, &tokens)?;
        judge::equal(
            "resident bytes (kv, workspace, all) after a step",
            before,
            resident(&*backend)?,
        )?;
    }
    super::support::decoder(&mut *backend)?
        .prepare(&small.program)
        .succeeds("prepare, again")?;
    Ok(judge::equal(
        "resident bytes after preparing again",
        before,
        resident(&*backend)?,
    )?)
}

fn weights_untouched(cx: &mut Context<'_>) -> Verdict {
    let small = Small::new(cx, Small::capacity(16, 1, 8))?;
    let mut backend = small.prepared(cx, &OpenOptions::default())?;
    small.model.check_read_back(&mut *backend)?;
    let tokens = tokens(&mut cx.random, 8);
    small.forward(&mut *backend, 0, &tokens)?;
    Ok(small.model.check_read_back(&mut *backend)?)
}

/// Every sequence filled to its last position, in batches of every size that fits: a workspace that is too small for one
/// of them overwrites another.
fn every_position(cx: &mut Context<'_>) -> Verdict {
    let (context, sequences, batch) = (19, 3, 7);
    let small = Small::new(cx, Small::capacity(context, sequences, batch))?;
    let mut backend = small.prepared(cx, &OpenOptions::default())?;
    let texts: Vec<Vec<u32>> = (0..sequences)
        .map(|_| tokens(&mut cx.random, context as usize))
        .collect();
    let vocab = small.program.vocab as usize;
    let mut found = vec![Vec::with_capacity(context as usize * vocab); sequences as usize];
    while let Some(sequence) = {
        let open: Vec<usize> = (0..found.len())
            .filter(|s| found[*s].len() < context as usize * vocab)
            .collect();
        open.get(cx.random.below(open.len().max(1) as u64) as usize)
            .copied()
    } {
        let at = found[sequence].len() / vocab;
        let n = (1 + cx.random.below(batch.into()) as usize).min(context as usize - at);
        let logits = small.forward(&mut *backend, sequence as u32, &texts[sequence][at..at + n])?;
        found[sequence].extend(logits);
    }
    for (sequence, (text, found)) in texts.iter().zip(&found).enumerate() {
        let what = format!("logits of sequence {sequence}, filled to the last position");
        small.judge(cx, &what, &small.expected(text)?, found)?;
    }
    let over = super::support::decoder(&mut *backend)?.sequence_length(hoist_backend::SequenceId(0))?;
    judge::equal("tokens of a full sequence", context, over)?;
    match small.forward(&mut *backend, 0, &[1]) {
        Err(Stop::Fail(_)) => Ok(()),
        _ => Err(Failure::new("forward of a full sequence", "", "ContextExceeded", "success").into()),
    }
}
