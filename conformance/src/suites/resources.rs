//! Nothing is left behind: memory, descriptors, threads over many cycles.

use std::time::Duration;

use hoist_backend::{Encoding, OpenOptions, Shape, Unwatched};

use super::support::{Small, layers, matrix, tokens};
use crate::fixture::Model;
use crate::mutation::{Rule, holds};
use crate::operands::Scales;
use crate::{Case, Context, Expect, Failure, Need, Stop, Verdict, audit};

/// Cycles before anything is counted, and cycles that are counted.
const WARM_UP: usize = 30;
const CYCLES: usize = 100;
/// Growth a cycle that is taken for noise of allocators: far below any handle's model, about a page.
const NOISE: f64 = 4096.0;

/// The cases.
pub fn cases() -> Vec<Case> {
    let case = |group, name, run: fn(&mut Context<'_>) -> Verdict| {
        Case::new("resources", group, name, run)
            .needs(Need::Process)
            .unseeded()
            .limit_s(60)
    };
    vec![
        case("load", "loading_and_unloading", load_and_unload),
        case("load", "pulling_and_unloading", pull_and_unload),
        case("open", "opening_and_closing", open_and_close),
        case("open", "closing_a_loaded_backend", close_loaded),
        case("abort", "loads_that_are_given_up", aborted),
        case("refuse", "loads_that_are_refused", refused),
        case("decode", "workspaces_and_programs", workspaces).needs(Need::Decode),
        case("decode", "steps", steps).needs(Need::Decode),
    ]
}

/// A model of some 300 KiB: a leak of one shows at once, and so does one of its plan.
fn model(cx: &mut Context<'_>) -> Result<Model, Stop> {
    let info = cx.info();
    let encoding = info.stored.iter().next().unwrap_or(Encoding::F32);
    let cols = encoding.block_weights() * 8;
    let rows = (1u64 << 15) / encoding.row_bytes(cols)?;
    let mut weights = Vec::new();
    for place in 0..10 {
        let shape = Shape::matrix(rows.max(1), cols);
        weights.push(matrix(&mut cx.random, place, encoding, shape, Scales::Ordinary)?);
    }
    Ok(Model::new(info, layers(10), weights, Vec::new())?)
}

/// Runs a cycle many times, and demands that memory, descriptors and threads do not grow with their number.
fn audit_cycles(cx: &mut Context<'_>, mut cycle: impl FnMut(&mut Context<'_>) -> Verdict) -> Verdict {
    for _ in 0..WARM_UP {
        cycle(cx)?;
    }
    let (descriptors, threads) = (audit::descriptors()?, audit::threads()?);
    let mut resident = Vec::with_capacity(CYCLES);
    for _ in 0..CYCLES {
        cycle(cx)?;
        resident.push(audit::resident_bytes()? as f64);
    }
    let slope = growth(&resident);
    cx.measure("growth of memory", slope, "B/cycle");
    check_growth(slope)?;
    audit::expect_none_added("descriptors after many cycles", &descriptors, audit::descriptors)?;
    let more = || -> Result<_, Stop> {
        let now = audit::threads()?;
        // A pool may replace its threads; it may not have more of them each time.
        Ok(if now.len() <= threads.len() {
            threads.clone()
        } else {
            now
        })
    };
    audit::expect_none_added("threads after many cycles", &threads, more)
}

/// Demands that memory does not grow, in bytes a cycle.
pub(crate) fn check_growth(slope: f64) -> Result<(), Failure> {
    if slope > NOISE && holds(Rule::GrowthIsALeak) {
        let what = format!("memory over {CYCLES} cycles");
        let found = format!("{slope:.0} bytes more a cycle");
        return Err(Failure::new(what, "", "no growth", found));
    }
    Ok(())
}

/// Bytes a cycle, robust against single jumps: the median of slopes between the first and the second half.
fn growth(resident: &[f64]) -> f64 {
    let half = resident.len() / 2;
    let mut slopes: Vec<f64> = (0..half)
        .map(|i| (resident[i + half] - resident[i]) / half as f64)
        .collect();
    slopes.sort_by(f64::total_cmp);
    slopes.get(slopes.len() / 2).copied().unwrap_or(0.0)
}

fn load_and_unload(cx: &mut Context<'_>) -> Verdict {
    let model = model(cx)?;
    let mut backend = cx.open()?;
    audit_cycles(cx, |_| {
        model.load(&mut *backend)?;
        backend.build_index(&model.index).succeeds("build_index")?;
        Ok(backend.unload().succeeds("unload")?)
    })
}

fn pull_and_unload(cx: &mut Context<'_>) -> Verdict {
    let model = model(cx)?;
    let source = model.file_source()?;
    let mut backend = cx.open()?;
    audit_cycles(cx, |_| {
        backend.begin_load(&model.plan).succeeds("begin_load")?;
        backend
            .load_from(&model.plan, &source, &Unwatched)
            .succeeds("load_from")?;
        backend.finish_load().succeeds("finish_load")?;
        Ok(backend.unload().succeeds("unload")?)
    })
}

fn open_and_close(cx: &mut Context<'_>) -> Verdict {
    audit_cycles(cx, |cx| {
        let backend = cx.open()?;
        backend.memory().succeeds("memory")?;
        Ok(())
    })
}

fn close_loaded(cx: &mut Context<'_>) -> Verdict {
    let model = model(cx)?;
    audit_cycles(cx, |cx| {
        let mut backend = cx.open()?;
        model.load(&mut *backend)?;
        Ok(())
    })
}

fn aborted(cx: &mut Context<'_>) -> Verdict {
    let model = model(cx)?;
    let mut backend = cx.open()?;
    audit_cycles(cx, |_| {
        backend.begin_load(&model.plan).succeeds("begin_load")?;
        let granule = model.plan.weights[0].granule() as usize;
        model.upload(&mut *backend, 0, 0, granule)?.succeeds("upload")?;
        model
            .upload(&mut *backend, 0, 2 * granule, granule)?
            .succeeds("upload")?;
        Ok(backend.abort_load().succeeds("abort_load")?)
    })
}

fn refused(cx: &mut Context<'_>) -> Verdict {
    let model = model(cx)?;
    let mut backend = cx.open_with(&OpenOptions {
        memory_budget: Some(model.plan.resident.weights() - 1),
        ..OpenOptions::default()
    })?;
    audit_cycles(cx, |_| {
        backend
            .begin_load(&model.plan)
            .fails("begin_load past the budget", "OutOfMemory", |e| {
                matches!(e, hoist_backend::Error::OutOfMemory { .. })
            })?;
        Ok(())
    })
}

fn workspaces(cx: &mut Context<'_>) -> Verdict {
    let small = Small::new(cx, Small::capacity(256, 4, 16))?;
    let mut backend = cx.open()?;
    let text = tokens(&mut cx.random, 3);
    audit_cycles(cx, |_| {
        small.prepare(&mut *backend)?;
        small.forward(&mut *backend, 1, &text)?;
        Ok(backend.unload().succeeds("unload")?)
    })
}

fn steps(cx: &mut Context<'_>) -> Verdict {
    let small = Small::new(cx, Small::capacity(64, 2, 8))?;
    let mut backend = small.prepared(cx, &OpenOptions::default())?;
    let text = tokens(&mut cx.random, 5);
    audit_cycles(cx, |_| {
        for sequence in 0..2 {
            small.forward(&mut *backend, sequence, &text)?;
            super::support::decoder(&mut *backend)?
                .truncate(hoist_backend::SequenceId(sequence), 0)
                .succeeds("truncate")?;
        }
        Ok(())
    })?;
    // What a step does after it returned, such as work left to a thread, ends.
    std::thread::sleep(Duration::from_millis(20));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::growth;

    #[test]
    fn a_jump_is_no_leak_and_a_slope_is() {
        let jump: Vec<f64> = (0..100).map(|i| if i < 20 { 0.0 } else { 3e5 }).collect();
        assert!(growth(&jump) < super::NOISE);
        let leak: Vec<f64> = (0..100).map(|i| f64::from(i) * 5000.0).collect();
        assert!(growth(&leak) > super::NOISE);
    }
}
