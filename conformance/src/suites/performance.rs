//! How fast it is: measured and reported, never judged.

use std::time::Instant;

use hoist_backend::{Encoding, OpenOptions, SequenceId, Shape, Unwatched};

use super::support::{Small, decoder, layers, matrix};
use crate::fixture::Model;
use crate::guard::Writable;
use crate::operands::Scales;
use crate::{Case, Context, Expect, Need, Stop, Verdict};

/// The cases.
pub fn cases() -> Vec<Case> {
    let each = |encoding: Encoding| {
        Case::new("performance", "load", "upload_and_read_back", move |cx| {
            load(cx, encoding)
        })
        .with("encoding", encoding)
        .needs(Need::Stored(encoding))
        .unseeded()
        .limit_s(60)
    };
    let mut cases: Vec<Case> = [Encoding::F16, Encoding::Q8_0, Encoding::Q4_K].map(each).into();
    cases.push(
        Case::new("performance", "calls", "a_step_of_a_small_model", step)
            .needs(Need::Decode)
            .unseeded(),
    );
    cases
}

const BYTES: u64 = 64 << 20;

fn load(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    let info = cx.info();
    let cols = 2048;
    let rows = BYTES / 8 / encoding.row_bytes(cols)?;
    // One random matrix, several times: making random bytes takes longer than loading them.
    let one = matrix(
        &mut cx.random,
        0,
        encoding,
        Shape::matrix(rows, cols),
        Scales::Ordinary,
    )?;
    let mut weights = Vec::new();
    for place in 0..8 {
        let mut weight = one.clone();
        weight.layer = Some(place);
        weights.push(weight);
    }
    let model = Model::new(info, layers(8).max(8), weights, Vec::new())?;
    drop(one);
    let source = model.file_source()?;
    let bytes = model.plan.nbytes as f64 / 1e9;
    let (mut pull, mut push, mut back) = (f64::INFINITY, f64::INFINITY, f64::INFINITY);
    let mut backend = cx.open()?;
    for _ in 0..3 {
        backend.begin_load(&model.plan).succeeds("begin_load")?;
        let started = Instant::now();
        backend
            .load_from(&model.plan, &source, &Unwatched)
            .succeeds("load_from")?;
        backend.finish_load().succeeds("finish_load")?;
        pull = pull.min(started.elapsed().as_secs_f64());
        backend.unload().succeeds("unload")?;
        backend.begin_load(&model.plan).succeeds("begin_load")?;
        let started = Instant::now();
        for (plan, canonical) in model.plan.weights.iter().zip(&model.canonical) {
            crate::fixture::upload_bytes(&mut *backend, plan.class, plan.id, 0, canonical)
                .succeeds("upload")?;
        }
        backend.finish_load().succeeds("finish_load")?;
        push = push.min(started.elapsed().as_secs_f64());
        let mut out = Writable::new(model.canonical[0].len())?;
        let started = Instant::now();
        for plan in &model.plan.weights {
            backend.read_back(plan.id, 0, &mut out).succeeds("read_back")?;
        }
        back = back.min(started.elapsed().as_secs_f64());
        backend.unload().succeeds("unload")?;
    }
    cx.measure("pulled from a file", bytes / pull, "GB/s");
    cx.measure("pushed", bytes / push, "GB/s");
    cx.measure("read back", bytes / back, "GB/s");
    Ok(())
}

fn step(cx: &mut Context<'_>) -> Verdict {
    let small = Small::new(cx, Small::capacity(32, 1, 1))?;
    let mut backend = small.prepared(cx, &OpenOptions::default())?;
    let mut times = Vec::new();
    for n in 0..400u32 {
        if n % 16 == 0 {
            decoder(&mut *backend)?
                .truncate(SequenceId(0), 0)
                .succeeds("truncate")?;
        }
        let started = Instant::now();
        small.forward(&mut *backend, 0, &[n % 8])?;
        times.push(started.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    let median = times
        .get(times.len() / 2)
        .copied()
        .ok_or_else(|| Stop::Skip("nothing was timed".into()))?;
    cx.measure("a step of a model of two small layers", median, "µs");
    Ok(())
}
