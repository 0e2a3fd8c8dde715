//! Devices and how they are opened.

use std::collections::BTreeSet;

use hoist_backend::{Encoding, EncodingSet, Error, OpenOptions, Role, Shape, State, WeightBackend};

use super::support::mixed_model;
use crate::fixture::{Model, Weight};
use crate::judge::{equal, holds};
use crate::{Case, Context, Expect, Failure, Need, Verdict, audit};

/// The cases.
pub fn cases() -> Vec<Case> {
    let case = |group, name, run: fn(&mut Context<'_>) -> Verdict| Case::new("device", group, name, run);
    vec![
        case("list", "is_well_formed", list_is_well_formed).unseeded(),
        case("list", "is_the_same_twice", list_is_the_same_twice).unseeded(),
        case("open", "information_is_consistent", information_is_consistent).unseeded(),
        case("open", "a_device_that_is_not_there_is_refused", absent_device).unseeded(),
        case("open", "a_budget_is_shown", budget_is_shown).unseeded(),
        case("open", "options_are_honoured_or_refused", options).unseeded(),
        case("open", "two_at_once_are_independent", two_at_once),
        case("open", "a_fresh_backend_is_empty", fresh_is_empty).unseeded(),
        case("place", "weights_are_where_it_says", place)
            .unseeded()
            .needs(Need::Stored(Encoding::F32))
            .needs(Need::Process),
    ]
}

/// A device whose own memory is as free as before, while this process grew by what was loaded, is the host in disguise.
fn place(cx: &mut Context<'_>) -> Verdict {
    const SIDE: u64 = 4096;
    let values: Vec<u8> = (0..SIDE * SIDE)
        .flat_map(|i| ((i % 1021) as f32).to_le_bytes())
        .collect();
    let nbytes = values.len() as u64;
    let weight = Weight::matrix(
        None,
        Role::TokenEmbd,
        Encoding::F32,
        Shape::matrix(SIDE, SIDE),
        values,
    );
    let model = Model::new(cx.info(), 0, vec![weight], Vec::new())?;
    let mut backend = cx.open()?;
    let free = |backend: &dyn WeightBackend| -> Result<Vec<u64>, Failure> {
        let memory = backend.memory().succeeds("memory")?;
        Ok(memory.devices.iter().map(|d| d.free).collect())
    };
    let (free_before, host_before) = (free(backend.as_ref())?, audit::resident_bytes()?);
    model.load(backend.as_mut())?;
    let (free_after, host_after) = (free(backend.as_ref())?, audit::resident_bytes()?);
    let grew = host_after.saturating_sub(host_before);
    cx.measure(
        "host memory for each byte loaded",
        grew as f64 / nbytes as f64,
        "",
    );
    if grew >= nbytes / 4 * 3 && free_before == free_after {
        return Err(Failure::new(
            format!("memory of {} after {nbytes} bytes were loaded", cx.info().device),
            "",
            "less that is free there, or as much that is used here",
            format!("{free_after:?} bytes free, as before, and {grew} more used by this process"),
        )
        .into());
    }
    Ok(())
}

fn list_is_well_formed(cx: &mut Context<'_>) -> Verdict {
    let devices = cx.target().devices().succeeds("devices")?;
    holds("devices", !devices.is_empty(), "at least one", "none")?;
    let mut ids = BTreeSet::new();
    for (device, place) in devices.iter().zip(0..) {
        equal("ordinal of a device", place, device.ordinal)?;
        let what = format!("id of device {place}");
        holds(
            &what,
            !device.id.is_empty() && device.id.is_ascii(),
            "ASCII text",
            format!("`{}`", device.id),
        )?;
        holds(
            &what,
            ids.insert(device.id.clone()),
            "one of its own",
            format!("`{}` again", device.id),
        )?;
        holds(
            &format!("name of device {place}"),
            !device.name.trim().is_empty(),
            "a name",
            "none",
        )?;
        holds(
            &format!("memory of device {place}"),
            (1 << 20..1 << 50).contains(&device.total_memory),
            "1 MiB to 1 PiB",
            format!("{} bytes", device.total_memory),
        )?;
    }
    Ok(())
}

fn list_is_the_same_twice(cx: &mut Context<'_>) -> Verdict {
    let first = cx.target().devices().succeeds("devices")?;
    let second = cx.target().devices().succeeds("devices")?;
    Ok(equal("devices, asked twice", first, second)?)
}

fn information_is_consistent(cx: &mut Context<'_>) -> Verdict {
    let mut backend = cx.open()?;
    let info = backend.info().clone();
    let weights = EncodingSet::weights();
    holds("name", !info.name.is_empty(), "a name", "none")?;
    holds("device", !info.device.is_empty(), "an id", "none")?;
    holds(
        "stored encodings",
        info.stored.iter().next().is_some(),
        "at least one",
        "none",
    )?;
    if let Some(e) = info.stored.iter().find(|e| !weights.contains(*e)) {
        return Err(Failure::new("stored encodings", "", "encodings of weights", e).into());
    }
    if let Some(e) = info.computed.iter().find(|e| !info.stored.contains(*e)) {
        return Err(Failure::new("computed encodings", "", "a part of those it holds", e).into());
    }
    let decodes = info.ops.iter().next().is_some();
    equal(
        "a decoder, if and only if it declares operations",
        decodes,
        backend.as_decode().is_some(),
    )?;
    holds(
        "computed encodings of a backend that decodes",
        !decodes || info.computed.iter().next().is_some(),
        "at least one",
        "none",
    )?;
    let sizing = info.sizing;
    holds(
        "weight alignment",
        sizing.weight_alignment.is_power_of_two() && sizing.weight_alignment <= 1 << 30,
        "a power of two up to 2^30",
        sizing.weight_alignment,
    )?;
    for (what, bytes) in [
        ("bytes beside a row", sizing.quantized_row_bytes),
        ("bytes beside a segment", sizing.quantized_segment_bytes),
        ("bytes of an index entry", sizing.index_entry_bytes),
    ] {
        holds(what, bytes <= 1 << 20, "at most 1 MiB", bytes)?;
    }
    for memory in [&info.memory, &backend.memory().succeeds("memory")?] {
        holds(
            "devices in its memory",
            !memory.devices.is_empty(),
            "at least one",
            "none",
        )?;
        for device in &memory.devices {
            holds("total memory", device.total > 0, "more than 0", device.total)?;
            holds(
                "free memory",
                device.free <= device.total,
                format!("at most {}", device.total),
                device.free,
            )?;
            equal("budget, where none was given", None, device.budget)?;
        }
    }
    Ok(())
}

fn absent_device(cx: &mut Context<'_>) -> Verdict {
    let n = cx.target().devices().succeeds("devices")?.len() as u32;
    for ordinal in [n, u32::MAX] {
        let opened = cx.target().open_ordinal(ordinal, &OpenOptions::default());
        opened.map(|_| ()).fails(
            format!("opening device {ordinal} of {n}"),
            "Unavailable or InvalidArgument",
            |e| matches!(e, Error::Unavailable { .. } | Error::InvalidArgument { .. }),
        )?;
    }
    Ok(())
}

fn budget_is_shown(cx: &mut Context<'_>) -> Verdict {
    let budget = 123 << 20;
    let backend = cx.open_with(&OpenOptions {
        memory_budget: Some(budget),
        ..OpenOptions::default()
    })?;
    let memory = backend.memory().succeeds("memory")?;
    let shown: Option<u64> = memory.devices.iter().map(|d| d.budget).sum();
    Ok(equal("budget of all devices", Some(budget), shown)?)
}

fn options(cx: &mut Context<'_>) -> Verdict {
    let all = [
        OpenOptions {
            threads: Some(1),
            ..OpenOptions::default()
        },
        OpenOptions {
            threads: Some(3),
            ..OpenOptions::default()
        },
        OpenOptions {
            import: true,
            ..OpenOptions::default()
        },
        OpenOptions {
            force_scalar: true,
            ..OpenOptions::default()
        },
        OpenOptions {
            float_layout: Some(hoist_backend::FloatLayout::InOut),
            ..OpenOptions::default()
        },
        OpenOptions {
            float_layout: Some(hoist_backend::FloatLayout::OutIn),
            ..OpenOptions::default()
        },
    ];
    for options in all {
        match cx.target().open(&options) {
            Ok(backend) => {
                if let Some(layout) = options.float_layout {
                    equal(
                        "layout of float matrices, which was asked for",
                        layout,
                        backend.info().float_layout,
                    )?;
                }
            }
            Err(Error::Unsupported { .. }) => {}
            Err(other) => {
                let what = format!("opening with {options:?}");
                return Err(Failure::new(what, "", "success or Unsupported", other).into());
            }
        }
    }
    Ok(())
}

fn two_at_once(cx: &mut Context<'_>) -> Verdict {
    let (a, b) = (mixed_model(cx, 4)?, mixed_model(cx, 6)?);
    let (mut first, mut second) = (cx.open()?, cx.open()?);
    first.begin_load(&a.plan).succeeds("begin_load of the first")?;
    b.load(&mut *second)?;
    a.upload_all(&mut *first)?;
    first.finish_load().succeeds("finish_load of the first")?;
    a.check_read_back(&mut *first)?;
    b.check_read_back(&mut *second)?;
    second.unload().succeeds("unload of the second")?;
    drop(second);
    Ok(a.check_read_back(&mut *first)?)
}

fn fresh_is_empty(cx: &mut Context<'_>) -> Verdict {
    let backend = cx.open()?;
    for device in backend.memory().succeeds("memory")?.devices {
        equal(
            &format!("resident bytes of {} ({})", device.device, State::Empty),
            hoist_backend::MemoryByClass::default(),
            device.resident,
        )?;
        equal("mapped bytes", 0, device.mapped)?;
    }
    Ok(())
}
