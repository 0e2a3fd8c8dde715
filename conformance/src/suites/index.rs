//! The table over (layer, role).

use hoist_backend::{Encoding, Error, IndexEntry, IndexLayout, OpenOptions, Role, Shape, Slot, WeightId};

use super::support::{Small, layers, matrix, mixed_model, tokens};
use crate::fixture::Model;
use crate::operands::Scales;
use crate::{Case, Context, Expect, Failure, Need, Verdict, judge};

/// The cases.
pub fn cases() -> Vec<Case> {
    let case = |group, name, run: fn(&mut Context<'_>) -> Verdict| Case::new("index", group, name, run);
    vec![
        case("build", "every_entry_is_counted", every_entry_is_counted),
        case("build", "tied_and_absent_entries", tied_and_absent),
        case("build", "many_layers", many_layers),
        case("build", "weights_stay_as_they_are", weights_stay),
        case("look_up", "each_weight_is_found_in_its_place", each_in_its_place).needs(Need::Decode),
        case("look_up", "a_tied_matrix_serves_both", tied_serves_both).needs(Need::Decode),
        case("look_up", "an_absent_weight_is_not_another", absent_is_absent).needs(Need::Decode),
        case("refusals", "an_unknown_weight", unknown_weight).needs(Need::Decode),
    ]
}

fn build(cx: &Context<'_>, model: &Model, layout: &IndexLayout) -> Verdict {
    let mut backend = cx.open()?;
    model.load(&mut *backend)?;
    let receipt = backend.build_index(layout).succeeds("build_index")?;
    judge::equal("layers of the receipt", layout.layers, receipt.layers)?;
    judge::equal("entries of the receipt", layout.present() as u32, receipt.entries)?;
    let memory = backend.memory().succeeds("memory")?;
    let index: u64 = memory.devices.iter().map(|d| d.resident.index).sum();
    judge::equal(
        "index bytes of the memory, as the receipt says",
        receipt.bytes,
        index,
    )?;
    Ok(model.check_read_back(&mut *backend)?)
}

fn every_entry_is_counted(cx: &mut Context<'_>) -> Verdict {
    let places = 1 + cx.random.below(40) as usize;
    let model = mixed_model(cx, places)?;
    build(cx, &model, &model.index)
}

fn tied_and_absent(cx: &mut Context<'_>) -> Verdict {
    let model = mixed_model(cx, 14)?;
    let mut layout = model.index.clone();
    layout.entries.extend([
        IndexEntry {
            layer: None,
            role: Role::Output,
            slot: Slot::Tied(WeightId(0)),
        },
        IndexEntry {
            layer: Some(0),
            role: Role::AttnQBias,
            slot: Slot::Absent,
        },
        IndexEntry {
            layer: Some(1),
            role: Role::FfnDownBias,
            slot: Slot::Absent,
        },
    ]);
    build(cx, &model, &layout)
}

fn many_layers(cx: &mut Context<'_>) -> Verdict {
    let info = cx.info();
    let encoding = info.stored.iter().next().unwrap_or(Encoding::F32);
    let places = 7 * 120;
    let mut weights = Vec::new();
    for place in 0..places {
        let shape = Shape::matrix(1, encoding.block_weights());
        weights.push(matrix(&mut cx.random, place, encoding, shape, Scales::Ordinary)?);
    }
    let model = Model::new(info, layers(places), weights, Vec::new())?;
    build(cx, &model, &model.index)
}

fn weights_stay(cx: &mut Context<'_>) -> Verdict {
    let model = mixed_model(cx, 10)?;
    let mut backend = cx.open()?;
    model.load(&mut *backend)?;
    model.check_read_back(&mut *backend)?;
    backend.build_index(&model.index).succeeds("build_index")?;
    model.check_read_back(&mut *backend)?;
    let again = backend.build_index(&model.index).map(|_| ());
    again.fails("build_index of an indexed backend", "BadState", |e| {
        matches!(e, Error::BadState { .. })
    })?;
    Ok(model.check_read_back(&mut *backend)?)
}

/// Two layers whose weights all differ, a bias that only the first has, a gate beside an up projection of the same shape:
/// logits tell any two of them apart.
fn each_in_its_place(cx: &mut Context<'_>) -> Verdict {
    let small = Small::new(cx, Small::capacity(8, 1, 8))?;
    let tokens = tokens(&mut cx.random, 5);
    let mut backend = small.prepared(cx, &OpenOptions::default())?;
    let found = small.forward(&mut *backend, 0, &tokens)?;
    Ok(small.judge(
        cx,
        "logits of a model of two layers",
        &small.expected(&tokens)?,
        &found,
    )?)
}

fn tied_serves_both(cx: &mut Context<'_>) -> Verdict {
    let mut small = Small::new(cx, Small::capacity(8, 1, 8))?;
    let embedding = small
        .model
        .index
        .entries
        .iter()
        .find(|e| e.role == Role::TokenEmbd)
        .and_then(|e| e.slot.weight());
    let Some(embedding) = embedding else {
        return Err(Failure::new("the suite's own model", "", "an embedding", "none").into());
    };
    for entry in &mut small.model.index.entries {
        if entry.role == Role::Output {
            entry.slot = Slot::Tied(embedding);
        }
    }
    let tokens = tokens(&mut cx.random, 4);
    let mut backend = small.prepared(cx, &OpenOptions::default())?;
    let found = small.forward(&mut *backend, 0, &tokens)?;
    Ok(small.judge(
        cx,
        "logits of a tied output matrix",
        &small.expected(&tokens)?,
        &found,
    )?)
}

/// A program that names a weight the index says is absent cannot be prepared.
fn absent_is_absent(cx: &mut Context<'_>) -> Verdict {
    let mut small = Small::new(cx, Small::capacity(8, 1, 8))?;
    let mut changed = false;
    for op in &mut small.program.ops {
        if let hoist_backend::OpKind::MatMul { weight, bias, .. } = &mut op.kind
            && weight.role == Role::AttnQ
            && weight.layer == Some(1)
        {
            *bias = Some(hoist_backend::WeightRef {
                layer: Some(1),
                role: Role::AttnQBias,
            });
            changed = true;
        }
    }
    judge::holds(
        "the suite's own program",
        changed,
        "a query projection in layer 1",
        "none",
    )?;
    let mut backend = cx.open()?;
    small.index(&mut *backend)?;
    backend
        .init_workspace(&small.dims()?)
        .succeeds("init_workspace")?;
    super::support::decoder(&mut *backend)?
        .prepare(&small.program)
        .fails(
            "prepare of a program that names an absent weight",
            "InvalidArgument",
            |e| matches!(e, Error::InvalidArgument { .. }),
        )?;
    Ok(())
}

fn unknown_weight(cx: &mut Context<'_>) -> Verdict {
    let model = mixed_model(cx, 3)?;
    let mut layout = model.index.clone();
    layout.entries[0].slot = Slot::Present(WeightId(model.plan.weights.len() as u32));
    let mut backend = cx.open()?;
    model.load(&mut *backend)?;
    backend.build_index(&layout).map(|_| ()).fails(
        "build_index with a weight that is not there",
        "UnknownWeight or InvalidArgument",
        |e| matches!(e, Error::UnknownWeight { .. } | Error::InvalidArgument { .. }),
    )?;
    // Still loaded, and to be indexed rightly.
    backend.build_index(&model.index).succeeds("build_index")?;
    Ok(model.check_read_back(&mut *backend)?)
}
