//! Things that go wrong around a backend: no memory, a user who cancels, a source that fails. All or nothing each time,
//! and the backend goes on.

use std::sync::atomic::{AtomicU64, Ordering};

use hoist_backend::{Encoding, Error, LoadWatch, OpenOptions, Progress, Shape, Unwatched, WeightBackend};

use super::support::{Small, decoder, layers, matrix, mixed_model, tokens};
use crate::fixture::Model;
use crate::operands::Scales;
use crate::{Case, Context, Expect, Failure, Need, Stop, Verdict, judge};

/// The cases.
pub fn cases() -> Vec<Case> {
    let case = |group, name, run: fn(&mut Context<'_>) -> Verdict| Case::new("faults", group, name, run);
    let mut cases: Vec<Case> = (0..=8)
        .map(|eighths| {
            Case::new("faults", "memory", "a_budget_below_the_plan", move |cx| {
                budget_below(cx, eighths)
            })
            .with("eighths", eighths)
        })
        .collect();
    cases.extend([
        case("memory", "the_exact_budget_suffices", exact_budget),
        case("memory", "at_each_step_of_a_load", each_step),
        case("memory", "more_than_there_is", more_than_there_is).unseeded(),
        case("workspace", "no_room_for_it", no_room_for_workspace).needs(Need::Decode),
        case("cancel", "before_the_first_byte", |cx| cancel(cx, 0)),
        case("cancel", "after_some_bytes", |cx| cancel(cx, 2)),
        case("cancel", "at_the_end", |cx| cancel(cx, 7)),
        case("source", "each_read_fails_in_turn", each_read_fails),
        case("source", "the_file_is_cut_short", cut_short),
        case("plan", "what_no_backend_can_hold", impossible_plans).unseeded(),
    ]);
    cases
}

fn with_budget(budget: u64) -> OpenOptions {
    OpenOptions {
        memory_budget: Some(budget),
        ..OpenOptions::default()
    }
}

fn out_of_memory(error: &Error) -> bool {
    matches!(error, Error::OutOfMemory { .. })
}

/// Demands numbers that make sense.
fn check_numbers(error: &Error, budget: u64) -> Result<(), Failure> {
    if let Error::OutOfMemory {
        needed, available, ..
    } = error
    {
        judge::holds(
            "numbers of OutOfMemory",
            needed > available && *available <= budget,
            format!("more needed than available, and at most {budget} available"),
            format!("{needed} needed, {available} available"),
        )?;
    }
    Ok(())
}

fn expect_nothing_resident(backend: &dyn WeightBackend) -> Result<(), Failure> {
    for device in backend.memory().succeeds("memory")?.devices {
        judge::equal("resident bytes after a refusal", 0, device.resident.total())?;
    }
    Ok(())
}

fn budget_below(cx: &mut Context<'_>, eighths: u64) -> Verdict {
    let large = mixed_model(cx, 30)?;
    let weights = large.plan.resident.weights();
    let budget = (weights * eighths / 8).clamp(1, weights - 1);
    let mut backend = cx.open_with(&with_budget(budget))?;
    let error = backend.begin_load(&large.plan).fails(
        format!("begin_load of {weights} bytes with a budget of {budget}"),
        "OutOfMemory",
        out_of_memory,
    )?;
    check_numbers(&error, budget)?;
    expect_nothing_resident(&*backend)?;
    // What fits is still taken.
    let small = mixed_model(cx, 1)?;
    if small.plan.resident.weights() <= budget {
        small.load(&mut *backend)?;
        small.check_read_back(&mut *backend)?;
    }
    Ok(())
}

fn exact_budget(cx: &mut Context<'_>) -> Verdict {
    let model = mixed_model(cx, 25)?;
    let mut backend = cx.open_with(&with_budget(model.plan.resident.total()))?;
    model.load(&mut *backend)?;
    backend.build_index(&model.index).succeeds("build_index")?;
    model.check_read_back(&mut *backend)?;
    let resident: u64 = backend
        .memory()
        .succeeds("memory")?
        .devices
        .iter()
        .map(|d| d.resident.total())
        .sum();
    Ok(judge::holds(
        "resident bytes",
        resident <= model.plan.resident.total(),
        format!("at most the budget of {}", model.plan.resident.total()),
        resident,
    )?)
}

/// Budgets from nothing to enough, close together: each call takes what it needs or says that it cannot, and what is
/// resident never exceeds the budget.
fn each_step(cx: &mut Context<'_>) -> Verdict {
    let model = mixed_model(cx, 9)?;
    let all = model.plan.resident.total();
    let mut enough_at = None;
    for step in 1..=40 {
        let budget = (all * step / 32).max(1);
        let mut backend = cx.open_with(&with_budget(budget))?;
        let mut steps = || -> Result<bool, Stop> {
            match backend.begin_load(&model.plan) {
                Err(error) if out_of_memory(&error) => {
                    check_numbers(&error, budget)?;
                    return Ok(false);
                }
                other => other.succeeds("begin_load")?,
            }
            model.upload_all(&mut *backend)?;
            backend.finish_load().succeeds("finish_load")?;
            match backend.build_index(&model.index) {
                Err(error) if out_of_memory(&error) => return Ok(false),
                other => other.succeeds("build_index")?,
            };
            model.check_read_back(&mut *backend)?;
            Ok(true)
        };
        let fits = steps()?;
        let memory = backend.memory().succeeds("memory")?;
        let resident: u64 = memory.devices.iter().map(|d| d.resident.total()).sum();
        judge::holds(
            "resident bytes",
            resident <= budget.max(model.plan.resident.total()),
            format!("at most the budget of {budget}"),
            resident,
        )?;
        match enough_at {
            None if fits => enough_at = Some(budget),
            Some(enough) if !fits => {
                return Err(Failure::new(
                    format!("a load with a budget of {budget}"),
                    "",
                    format!("success, since {enough} bytes were enough"),
                    "OutOfMemory",
                )
                .into());
            }
            _ => {}
        }
        backend.unload().succeeds("unload")?;
        expect_nothing_resident(&*backend)?;
    }
    judge::holds(
        "a load with a quarter more than its plan",
        enough_at.is_some_and(|at| at <= all * 33 / 32),
        format!("success from {all} bytes on"),
        format!("{enough_at:?}"),
    )?;
    Ok(())
}

/// A plan of more bytes than any device has, that is valid otherwise.
fn more_than_there_is(cx: &mut Context<'_>) -> Verdict {
    let info = cx.info();
    let encoding = info.stored.iter().next().unwrap_or(Encoding::F32);
    let shape = Shape::matrix(1, encoding.block_weights());
    let weight = matrix(&mut cx.random, 0, encoding, shape, Scales::Ordinary)?;
    let mut model = Model::new(info, 1, vec![weight], Vec::new())?;
    for rows in [1u64 << 44, 1 << 52] {
        let weight = &mut model.plan.weights[0];
        weight.shape.rows = rows;
        weight.nbytes = encoding.nbytes(weight.shape)?;
        weight.resident_bytes = weight.nbytes;
        let nbytes = weight.nbytes;
        weight.views = vec![hoist_backend::SourceView::contiguous(0, 0, nbytes)];
        *model.plan.resident.class_mut(model.plan.weights[0].class) = nbytes;
        (model.plan.nbytes, model.plan.source_bytes) = (nbytes, nbytes);
        let mut backend = cx.open()?;
        backend.begin_load(&model.plan).fails(
            format!("begin_load of {nbytes} bytes"),
            "OutOfMemory, Unsupported or InvalidArgument",
            |e| out_of_memory(e) || matches!(e, Error::Unsupported { .. } | Error::InvalidArgument { .. }),
        )?;
        expect_nothing_resident(&*backend)?;
    }
    Ok(())
}

fn no_room_for_workspace(cx: &mut Context<'_>) -> Verdict {
    let small = Small::new(cx, Small::capacity(32, 2, 4))?;
    let dims = small.dims()?;
    let taken = cx.open()?.workspace_bytes(&dims).succeeds("workspace_bytes")?;
    let needed = taken.kv + taken.workspace;
    let before = small.model.plan.resident.total();
    for part in [0, needed / 2, needed - 1] {
        let mut backend = cx.open_with(&with_budget(before + part))?;
        small.index(&mut *backend)?;
        let indexed: u64 = backend
            .memory()
            .succeeds("memory")?
            .devices
            .iter()
            .map(|d| d.resident.total())
            .sum();
        if before + part >= indexed + needed {
            // Its index is smaller than planned, so that there is room after all.
            continue;
        }
        let error = backend.init_workspace(&dims).map(|_| ()).fails(
            format!("init_workspace of {needed} bytes with room for {part}"),
            "OutOfMemory",
            out_of_memory,
        )?;
        check_numbers(&error, before + part)?;
        // Still indexed: weights can be read, and a second attempt is refused the same way.
        small.model.check_read_back(&mut *backend)?;
        backend.init_workspace(&dims).map(|_| ()).fails(
            "init_workspace, again",
            "OutOfMemory",
            out_of_memory,
        )?;
    }
    let mut backend = cx.open_with(&with_budget(before + needed))?;
    small.prepare(&mut *backend)?;
    let tokens = tokens(&mut cx.random, 3);
    let found = small.forward(&mut *backend, 0, &tokens)?;
    small.judge(
        cx,
        "logits with the exact budget",
        &small.expected(&tokens)?,
        &found,
    )?;
    decoder(&mut *backend)?;
    Ok(())
}

/// Says stop from the n-th question on.
struct StopAfter {
    asked: AtomicU64,
    after: u64,
}

impl LoadWatch for StopAfter {
    fn progress(&self, _: Progress) {}

    fn cancelled(&self) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed) >= self.after
    }
}

/// A model of many weights, so that a load asks several times.
fn large_model(cx: &mut Context<'_>) -> Result<Model, Stop> {
    let info = cx.info();
    let encoding = info.stored.iter().next().unwrap_or(Encoding::F32);
    let cols = encoding.block_weights() * 16;
    let rows = ((1u64 << 16) / encoding.row_bytes(cols)?).max(1);
    let mut weights = Vec::new();
    for place in 0..12 {
        weights.push(matrix(
            &mut cx.random,
            place,
            encoding,
            Shape::matrix(rows, cols),
            Scales::Ordinary,
        )?);
    }
    Ok(Model::new(info, layers(12), weights, Vec::new())?)
}

fn cancel(cx: &mut Context<'_>, after: u64) -> Verdict {
    let model = large_model(cx)?;
    let mut backend = cx.open()?;
    for source in [model.source()?, model.file_source()?] {
        let watch = StopAfter {
            asked: AtomicU64::new(0),
            after,
        };
        backend.begin_load(&model.plan).succeeds("begin_load")?;
        match backend.load_from(&model.plan, &source, &watch) {
            Err(Error::Cancelled) => backend.abort_load().succeeds("abort_load after a cancel")?,
            // It was done before it was told to stop.
            Ok(()) if watch.asked.load(Ordering::Relaxed) <= after && after > 0 => {
                backend.finish_load().succeeds("finish_load")?;
                backend.unload().succeeds("unload")?;
            }
            Ok(()) => {
                let found = format!("success, having been told to stop at question {after}");
                return Err(Failure::new("load_from", "", "Cancelled", found).into());
            }
            Err(other) => return Err(Failure::new("load_from, cancelled", "", "Cancelled", other).into()),
        }
        expect_nothing_resident(&*backend)?;
    }
    model.load(&mut *backend)?;
    Ok(model.check_read_back(&mut *backend)?)
}

fn each_read_fails(cx: &mut Context<'_>) -> Verdict {
    let model = mixed_model(cx, 8)?;
    let mut backend = cx.open()?;
    let mut n = 0;
    loop {
        let source = model.source()?.failing_from(n);
        backend.begin_load(&model.plan).succeeds("begin_load")?;
        match backend.load_from(&model.plan, &source, &Unwatched) {
            Err(Error::SourceIo { .. }) => backend.abort_load().succeeds("abort_load after a failed read")?,
            Ok(()) if source.reads.load(Ordering::Relaxed) <= n => {
                backend.finish_load().succeeds("finish_load")?;
                model.check_read_back(&mut *backend)?;
                backend.unload().succeeds("unload")?;
                break;
            }
            Ok(()) => {
                let what = format!("load_from, whose read {n} failed");
                return Err(Failure::new(what, "", "SourceIo", "success").into());
            }
            Err(other) => {
                let what = format!("load_from, whose read {n} failed");
                return Err(Failure::new(what, "", "SourceIo", other).into());
            }
        }
        expect_nothing_resident(&*backend)?;
        n += 1;
        if n > 200 {
            break;
        }
    }
    cx.measure("reads of a small model", n as f64, "");
    model.load(&mut *backend)?;
    Ok(model.check_read_back(&mut *backend)?)
}

/// The file on disk has lost its last bytes since the plan was made.
fn cut_short(cx: &mut Context<'_>) -> Verdict {
    let model = mixed_model(cx, 8)?;
    let source = model.file_source()?.cut_by(100)?;
    let mut backend = cx.open()?;
    backend.begin_load(&model.plan).succeeds("begin_load")?;
    match backend.load_from(&model.plan, &source, &Unwatched) {
        Err(Error::SourceIo { .. } | Error::SourceChanged { .. }) => {
            backend.abort_load().succeeds("abort_load")?;
            expect_nothing_resident(&*backend)?;
        }
        Err(other) => {
            let expected = "SourceIo or SourceChanged";
            return Err(Failure::new("load_from of a file that was cut short", "", expected, other).into());
        }
        // It asked for the bytes instead of reading the file, and got them.
        Ok(()) => {
            backend.finish_load().succeeds("finish_load")?;
            model.check_read_back(&mut *backend)?;
            backend.unload().succeeds("unload")?;
        }
    }
    model.load(&mut *backend)?;
    Ok(model.check_read_back(&mut *backend)?)
}

/// Encodings of activations and integers are no weights' encodings.
fn impossible_plans(cx: &mut Context<'_>) -> Verdict {
    for encoding in [Encoding::Q8_1, Encoding::Q8_K, Encoding::F64, Encoding::I32] {
        let mut model = mixed_model(cx, 1)?;
        let weight = &mut model.plan.weights[0];
        weight.encoding = encoding;
        weight.shape = Shape::matrix(1, encoding.block_weights());
        weight.nbytes = encoding.block_bytes();
        let mut backend = cx.open()?;
        let begun = backend.begin_load(&model.plan);
        if cx.info().ops.iter().next().is_none() && begun.is_ok() {
            // A backend that only holds bytes may hold these too.
            backend.abort_load().succeeds("abort_load")?;
            continue;
        }
        begun.fails(
            format!("begin_load of {encoding}"),
            "Unsupported or InvalidArgument",
            |e| matches!(e, Error::Unsupported { .. } | Error::InvalidArgument { .. }),
        )?;
        expect_nothing_resident(&*backend)?;
    }
    Ok(())
}
