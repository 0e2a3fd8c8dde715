//! The interface itself, of plugins: header, versions, pointers, handles, order, chunks, errors. The host refuses most
//! misuse before a plugin sees it; here nothing stands between.

mod decode;
mod raw;

use std::sync::atomic::Ordering;

use hoist_plugin_abi as abi;
use hoist_plugin_abi::{Handle, Status};

use super::support::mixed_model;
use crate::fixture::Model;
use crate::judge::{self, equal, holds};
use crate::{Case, Context, Failure, Need, Stop, Verdict, audit};
use raw::{Loaded, Opening, Plan, Raw};

/// The cases.
pub fn cases() -> Vec<Case> {
    let case = |group, name, run: fn(&mut Context<'_>) -> Verdict| {
        Case::new("interface", group, name, run)
            .needs(Need::Plugin)
            .needs(Need::Process)
            .unseeded()
    };
    let mut cases = vec![
        case("header", "says_who_it_is", header),
        case("load", "constructors_leave_the_process_alone", constructors),
        case("entry", "a_minor_out_of_range_is_refused", wrong_minor),
        case("entry", "null_is_refused", entry_null),
        case("table", "all_or_none_of_the_decoding_entries", table_is_whole),
        case("devices", "are_well_formed", devices),
        case("pointers", "null_is_refused", null_pointers),
        case("pointers", "a_missing_or_short_record", records),
        case("sizes", "of_the_caller_are_respected", sizes),
        case("options", "an_unknown_flag_is_refused", unknown_flag),
        case("plan", "an_unknown_encoding_is_refused", unknown_encoding),
        case("order", "calls_out_of_order", out_of_order),
        case("handles", "that_never_were", no_handles),
        case("handles", "of_another_kind", wrong_kind),
        case("handles", "that_are_stale", stale),
        case("handles", "of_a_closed_device", closed),
        case("chunks", "that_cannot_be", bad_chunks),
        case("chunks", "swapped_and_whole", swapped_chunks),
        case("commit", "with_a_missing_block", missing_block),
        case("ranges", "that_cannot_be_read_back", bad_ranges),
        case("memory", "is_what_was_planned", memory),
        case("threads", "another_for_each_call", threads),
        case("shutdown", "only_when_all_is_closed", shutdown),
        case(
            "shutdown",
            "leaves_no_thread_and_says_no_more",
            silent_after_shutdown,
        ),
    ];
    cases.extend(decode::cases());
    cases
}

const OK: &[Status] = &[Status::OK];
const INVALID: &[Status] = &[Status::INVALID_ARGUMENT];
const BAD_HANDLE: &[Status] = &[Status::BAD_HANDLE];
const BAD_STATE: &[Status] = &[Status::BAD_STATE];

/// A device with a load in progress, of a model of several weights.
struct Loading {
    raw: Raw,
    device: Handle,
    load: Handle,
    model: Model,
    plan: Plan,
}

fn model(cx: &mut Context<'_>) -> Result<Model, Stop> {
    loop {
        let model = mixed_model(cx, 4)?;
        // Some weight has three blocks or more, and none a prefix, so that chunks can be bad in every way.
        let three = |w: &hoist_backend::WeightPlan| w.nbytes >= 3 * w.granule() && w.granule() > 1;
        if model.plan.weights.first().is_some_and(three) {
            return Ok(model);
        }
    }
}

impl Loading {
    fn new(cx: &mut Context<'_>) -> Result<Self, Stop> {
        let model = model(cx)?;
        let plan = Plan::new(&model.plan);
        let raw = Raw::new(cx)?;
        let device = raw.device()?;
        let (answer, load) = raw.load_begin(device, &plan)?;
        answer.ok("load_begin")?;
        holds("handle of a load", load != 0, "not 0", load)?;
        Ok(Self {
            raw,
            device,
            load,
            model,
            plan,
        })
    }

    fn upload(&self, weight: usize, from: usize, to: usize) -> Result<(), Failure> {
        let bytes = &self.model.canonical[weight][from..to];
        let answer = self
            .raw
            .upload(self.load, weight as u32, from as u64, Some(bytes), 0)?;
        answer.ok("upload")
    }

    fn upload_rest(&self, but: usize) -> Result<(), Failure> {
        for (i, bytes) in self.model.canonical.iter().enumerate() {
            if i != but {
                self.upload(i, 0, bytes.len())?;
            }
        }
        Ok(())
    }

    fn commit(&self) -> Result<Handle, Failure> {
        let (answer, model, receipt) = self.raw.commit(self.load)?;
        answer.ok("load_commit")?;
        holds("handle of a model", model != 0, "not 0", model)?;
        equal(
            "tensors of the receipt",
            self.model.plan.weights.len() as u32,
            receipt.tensors,
        )?;
        Ok(model)
    }

    fn check(&self, model: Handle) -> Result<(), Failure> {
        for (i, canonical) in self.model.canonical.iter().enumerate() {
            let (answer, found) = self.raw.read_back(model, i as u32, 0, canonical.len())?;
            answer.ok("readback")?;
            judge::bytes(&format!("readback of tensor {i}"), canonical, &found)?;
        }
        Ok(())
    }

    /// All uploaded and committed.
    fn loaded(cx: &mut Context<'_>) -> Result<(Self, Handle), Stop> {
        let loading = Self::new(cx)?;
        loading.upload_rest(usize::MAX)?;
        let model = loading.commit()?;
        loading.check(model)?;
        Ok((loading, model))
    }
}

fn header(cx: &mut Context<'_>) -> Verdict {
    let plugin = cx.plugin()?;
    for (what, text) in [
        ("name", &plugin.name),
        ("vendor", &plugin.vendor),
        ("version", &plugin.version),
    ] {
        holds(what, !text.trim().is_empty(), "text", "none")?;
    }
    let (major, least, most) = plugin.abi;
    equal("major", abi::ABI_MAJOR, major)?;
    holds("minors", least <= most, "a range", format!("{least}..={most}"))?;
    let machine = std::env::consts::ARCH;
    holds(
        "target",
        plugin.target.starts_with(machine),
        format!("one of {machine}"),
        &plugin.target,
    )?;
    equal(
        "the minor that both speak",
        abi::negotiate((abi::ABI_MINOR_MIN, abi::ABI_MINOR_MAX), (least, most)),
        Some(plugin.minor),
    )?;
    Ok(())
}

/// Loading a library runs its constructors: they print nothing, start no thread and leave the floating-point mode alone.
fn constructors(cx: &mut Context<'_>) -> Verdict {
    let (mode, threads, printed) = (audit::float_mode(), audit::threads()?, audit::printed()?);
    let folder = std::env::current_dir().ok();
    let _loaded = Loaded::new(cx)?;
    equal(
        "floating-point mode after the library was loaded",
        mode,
        audit::float_mode(),
    )?;
    let inherited = std::thread::spawn(audit::float_mode).join().ok();
    equal("floating-point mode of a new thread", Some(mode), inherited)?;
    equal(
        "bytes printed (stdout, stderr) by its constructors",
        printed,
        audit::printed()?,
    )?;
    equal("current folder", folder, std::env::current_dir().ok())?;
    audit::expect_none_added("threads of its constructors", &threads, audit::threads)
}

fn wrong_minor(cx: &mut Context<'_>) -> Verdict {
    let (_, least, most) = cx.plugin()?.abi;
    let loaded = Loaded::new(cx)?;
    for minor in [most + 1, u32::MAX, least.wrapping_sub(1)] {
        if (least..=most).contains(&minor) {
            continue;
        }
        let answer = loaded.call_entry(true, minor, true)?;
        answer.is(&format!("the entry with minor {minor}"), &[Status::VERSION])?;
    }
    // And it can still be opened.
    loaded.open()?.device()?;
    Ok(())
}

fn entry_null(cx: &mut Context<'_>) -> Verdict {
    let minor = cx.plugin()?.minor;
    let loaded = Loaded::new(cx)?;
    loaded
        .call_entry(false, minor, true)?
        .is("the entry without a host", INVALID)?;
    loaded
        .call_entry(true, minor, false)?
        .is("the entry with nowhere to put the table", INVALID)?;
    loaded.open()?.device()?;
    Ok(())
}

fn table_is_whole(cx: &mut Context<'_>) -> Verdict {
    let raw = Raw::new(cx)?;
    let t = &raw.table;
    for (name, there) in [
        ("device_count", t.device_count.is_some()),
        ("device_info", t.device_info.is_some()),
        ("device_open", t.device_open.is_some()),
        ("caps", t.caps.is_some()),
        ("memory_info", t.memory_info.is_some()),
        ("plan_check", t.plan_check.is_some()),
        ("load_begin", t.load_begin.is_some()),
        ("upload", t.upload.is_some()),
        ("load_commit", t.load_commit.is_some()),
        ("load_abort", t.load_abort.is_some()),
        ("readback", t.readback.is_some()),
        ("model_destroy", t.model_destroy.is_some()),
        ("device_close", t.device_close.is_some()),
        ("shutdown", t.shutdown.is_some()),
    ] {
        holds(&format!("entry `{name}`"), there, "a function", "NULL")?;
    }
    holds(
        "struct_size of the table",
        raw.table_size <= 1 << 16,
        "at most 64 KiB",
        raw.table_size,
    )?;
    let decode = [t.prepare.is_some(), t.forward.is_some(), t.truncate.is_some()];
    holds(
        "entries `prepare`, `forward`, `truncate`",
        decode == [true; 3] || decode == [false; 3],
        "all or none",
        format!("{decode:?}"),
    )?;
    let (answer, caps) = raw.caps(raw.device()?, size_of::<abi::Caps>())?;
    answer.ok("caps")?;
    equal(
        "a `forward`, if and only if operations are claimed",
        decode[1],
        caps.ops != 0,
    )?;
    Ok(())
}

fn devices(cx: &mut Context<'_>) -> Verdict {
    let raw = Raw::new(cx)?;
    let (answer, count) = raw.device_count(true)?;
    answer.ok("device_count")?;
    holds("devices", (1..=1024).contains(&count), "1 to 1024", count)?;
    for ordinal in 0..count {
        let (answer, info) = raw.device_info(ordinal, true)?;
        answer.ok("device_info")?;
        equal("ordinal", ordinal, info.ordinal)?;
        for (what, field) in [("id", &info.id[..]), ("name", &info.name[..])] {
            let end = field.iter().position(|b| *b == 0);
            let text = end.and_then(|end| std::str::from_utf8(&field[..end]).ok());
            holds(
                &format!("{what} of device {ordinal}"),
                text.is_some_and(|t| !t.is_empty()),
                "some UTF-8 that ends with a NUL",
                format!("{text:?}"),
            )?;
        }
    }
    for ordinal in [count, u32::MAX] {
        let (answer, _) = raw.device_info(ordinal, true)?;
        answer.is(&format!("device_info of device {ordinal}"), INVALID)?;
    }
    Ok(())
}

fn null_pointers(cx: &mut Context<'_>) -> Verdict {
    let (loading, model) = Loading::loaded(cx)?;
    let raw = &loading.raw;
    raw.device_count(false)?.0.is("device_count into NULL", INVALID)?;
    raw.device_info(0, false)?
        .0
        .is("device_info into NULL", INVALID)?;
    raw.open_with_null(true)?
        .is("device_open without options", INVALID)?;
    raw.open_with_null(false)?.is("device_open into NULL", INVALID)?;
    raw.caps_null(loading.device)?.is("caps into NULL", INVALID)?;
    raw.read_back_null(model)?.is("readback into NULL", INVALID)?;
    raw.destroy(model)?.ok("model_destroy")?;
    raw.load_begin_null(loading.device, None)?
        .is("load_begin without a plan", INVALID)?;
    raw.load_begin_null(loading.device, Some(&loading.plan))?
        .is("load_begin into NULL", INVALID)?;
    // None of them left a load behind.
    let (answer, load) = raw.load_begin(loading.device, &loading.plan)?;
    answer.ok("load_begin after calls with NULL")?;
    raw.upload_null(load)?.is("upload of no chunk", INVALID)?;
    raw.upload(load, 0, 0, None, 0)?.is("upload from NULL", INVALID)?;
    raw.abort(load)?.ok("load_abort")?;
    Ok(())
}

fn records(cx: &mut Context<'_>) -> Verdict {
    let raw = Raw::new(cx)?;
    let status = raw.close_without_record(0)?;
    equal(
        "status of device_close(0) without a record",
        Status::BAD_HANDLE,
        status,
    )?;
    for size in [4, 8, 40, 64] {
        let (status, clean) = raw.close_with_short_record(0, size)?;
        equal(
            "status of device_close(0) with a short record",
            Status::BAD_HANDLE,
            status,
        )?;
        holds(
            &format!("bytes past a record of {size}"),
            clean,
            "nothing written",
            "other bytes",
        )?;
    }
    Ok(())
}

fn sizes(cx: &mut Context<'_>) -> Verdict {
    let raw = Raw::new(cx)?;
    let device = raw.device()?;
    let whole = size_of::<abi::Caps>();
    let (answer, caps) = raw.caps(device, whole)?;
    answer.ok("caps")?;
    // A caller from the future has room for more, one from the past for less: the first minor's ended before the last field.
    let first_minor = std::mem::offset_of!(abi::Caps, max_row_bytes);
    for size in [whole + 64, first_minor, first_minor - 8, 72, 8] {
        let (answer, other) = raw.caps(device, size)?;
        answer.ok(&format!("caps with room for {size} bytes"))?;
        equal("numerics class, whatever the room", caps.numerics, other.numerics)?;
        if size >= 72 {
            equal(
                "encodings, whatever the room",
                (caps.stored, caps.computed),
                (other.stored, other.computed),
            )?;
        }
    }
    Ok(())
}

fn unknown_flag(cx: &mut Context<'_>) -> Verdict {
    let raw = Raw::new(cx)?;
    for flags in [1 << 31, 1 << 2, u32::MAX] {
        let (answer, handle) = raw.open(Opening { flags, budget: 0 })?;
        answer.is(&format!("device_open with flags {flags:#x}"), INVALID)?;
        equal("handle of a refused device_open", 0, handle)?;
    }
    raw.device()?;
    Ok(())
}

fn unknown_encoding(cx: &mut Context<'_>) -> Verdict {
    let raw = Raw::new(cx)?;
    let device = raw.device()?;
    let model = model(cx)?;
    for number in [250, 9999, u32::MAX] {
        let plan = Plan::new(&model.plan).with_encoding(1, number);
        let (_, caps) = raw.caps(device, size_of::<abi::Caps>())?;
        if number < 256 && caps.stored[(number / 64) as usize] >> (number % 64) & 1 == 1 {
            // It claims to hold whatever comes.
            continue;
        }
        let (answer, refusals) = raw.plan_check(device, &plan)?;
        answer.is(
            "plan_check of an unknown encoding",
            &[Status::OK, Status::UNSUPPORTED],
        )?;
        let refused = answer.status == Status::UNSUPPORTED || refusals > 0;
        let (begun, load) = raw.load_begin(device, &plan)?;
        if !refused && begun.status == Status::OK {
            let what = format!("a plan with encoding number {number}");
            return Err(Failure::new(what, "", "a refusal", "it was taken").into());
        }
        if begun.status == Status::OK {
            raw.abort(load)?.ok("load_abort")?;
        }
    }
    let (answer, refusals) = raw.plan_check(device, &Plan::new(&model.plan))?;
    answer.ok("plan_check")?;
    Ok(equal("refusals of a plan that it can take", 0, refusals)?)
}

fn out_of_order(cx: &mut Context<'_>) -> Verdict {
    let loading = Loading::new(cx)?;
    let (raw, device) = (&loading.raw, loading.device);
    let (answer, _) = raw.load_begin(device, &loading.plan)?;
    answer.is("load_begin while loading", BAD_STATE)?;
    raw.plan_check(device, &loading.plan)?
        .0
        .is("plan_check while loading", BAD_STATE)?;
    loading.upload_rest(usize::MAX)?;
    let model = loading.commit()?;
    raw.load_begin(device, &loading.plan)?
        .0
        .is("load_begin with a model", BAD_STATE)?;
    loading.check(model)?;
    for (name, answer) in raw.optional_on(model)? {
        if ["truncate", "forward"].contains(&name) {
            answer.is(&format!("{name} of a model without a program"), BAD_STATE)?;
        }
    }
    // Nothing changed, unless `build_index` was right to succeed.
    loading.check(model)?;
    raw.destroy(model)?.ok("model_destroy")?;
    let (answer, load) = raw.load_begin(device, &loading.plan)?;
    answer.ok("load_begin after model_destroy")?;
    raw.abort(load)?.ok("load_abort")?;
    Ok(raw.close(device)?.ok("device_close")?)
}

/// Every entry that takes a handle, with one that is not a handle of its kind.
fn expect_bad_handle(loading: &Loading, what: &str, handle: Handle, kinds: &[&str]) -> Verdict {
    let raw = &loading.raw;
    let call = |entry: &str| format!("{entry} of {what}");
    if kinds.contains(&"device") {
        raw.caps(handle, size_of::<abi::Caps>())?
            .0
            .is(&call("caps"), BAD_HANDLE)?;
        raw.memory(handle)?.0.is(&call("memory_info"), BAD_HANDLE)?;
        raw.plan_check(handle, &loading.plan)?
            .0
            .is(&call("plan_check"), BAD_HANDLE)?;
        raw.load_begin(handle, &loading.plan)?
            .0
            .is(&call("load_begin"), BAD_HANDLE)?;
        raw.close(handle)?.is(&call("device_close"), BAD_HANDLE)?;
    }
    if kinds.contains(&"load") {
        let granule = loading.model.plan.weights[0].granule() as usize;
        let bytes = &loading.model.canonical[0][..granule];
        raw.upload(handle, 0, 0, Some(bytes), 0)?
            .is(&call("upload"), BAD_HANDLE)?;
        raw.commit(handle)?.0.is(&call("load_commit"), BAD_HANDLE)?;
        raw.abort(handle)?.is(&call("load_abort"), BAD_HANDLE)?;
    }
    if kinds.contains(&"model") {
        let granule = loading.model.plan.weights[0].granule() as usize;
        raw.read_back(handle, 0, 0, granule)?
            .0
            .is(&call("readback"), BAD_HANDLE)?;
        for (name, answer) in raw.optional_on(handle)? {
            answer.is(&call(name), BAD_HANDLE)?;
        }
        raw.destroy(handle)?.is(&call("model_destroy"), BAD_HANDLE)?;
    }
    Ok(())
}

const EVERY_KIND: &[&str] = &["device", "load", "model"];

fn no_handles(cx: &mut Context<'_>) -> Verdict {
    let loading = Loading::new(cx)?;
    for handle in [0, u64::MAX, 0xDEAD_BEEF_0000_0001, loading.load ^ (1 << 23), 7] {
        if handle == loading.load || handle == loading.device {
            continue;
        }
        expect_bad_handle(&loading, &format!("the number {handle:#x}"), handle, EVERY_KIND)?;
    }
    // The load is still there.
    loading.upload_rest(usize::MAX)?;
    let model = loading.commit()?;
    Ok(loading.check(model)?)
}

fn wrong_kind(cx: &mut Context<'_>) -> Verdict {
    let loading = Loading::new(cx)?;
    expect_bad_handle(&loading, "a load's handle", loading.load, &["device", "model"])?;
    expect_bad_handle(&loading, "a device's handle", loading.device, &["load", "model"])?;
    loading.upload_rest(usize::MAX)?;
    let model = loading.commit()?;
    expect_bad_handle(&loading, "a model's handle", model, &["device", "load"])?;
    Ok(loading.check(model)?)
}

fn stale(cx: &mut Context<'_>) -> Verdict {
    let (loading, model) = Loading::loaded(cx)?;
    let (raw, device) = (&loading.raw, loading.device);
    expect_bad_handle(&loading, "a load that was committed", loading.load, &["load"])?;
    raw.destroy(model)?.ok("model_destroy")?;
    expect_bad_handle(&loading, "a model that was destroyed", model, &["model"])?;
    let (answer, second) = raw.load_begin(device, &loading.plan)?;
    answer.ok("load_begin")?;
    // A new load does not bring old handles back to life.
    expect_bad_handle(
        &loading,
        "a load that was committed, during another",
        loading.load,
        &["load"],
    )?;
    expect_bad_handle(
        &loading,
        "a model that was destroyed, during a load",
        model,
        &["model"],
    )?;
    raw.abort(second)?.ok("load_abort")?;
    expect_bad_handle(&loading, "a load that was aborted", second, &["load"])?;
    Ok(raw.close(device)?.ok("device_close")?)
}

fn closed(cx: &mut Context<'_>) -> Verdict {
    // With a load, with a model, and empty: closing destroys what is left.
    let loading = Loading::new(cx)?;
    loading.upload(0, 0, loading.model.canonical[0].len())?;
    loading
        .raw
        .close(loading.device)?
        .ok("device_close during a load")?;
    expect_bad_handle(&loading, "a device that was closed", loading.device, &["device"])?;
    expect_bad_handle(
        &loading,
        "a load whose device was closed",
        loading.load,
        &["load"],
    )?;
    let other = loading.raw.device()?;
    expect_bad_handle(
        &loading,
        "a device that was closed, with another open",
        loading.device,
        &["device"],
    )?;
    expect_bad_handle(
        &loading,
        "a load of a closed device, with another open",
        loading.load,
        &["load"],
    )?;
    loading.raw.close(other)?.ok("device_close")?;
    let (loading, model) = Loading::loaded(cx)?;
    loading
        .raw
        .close(loading.device)?
        .ok("device_close with a model")?;
    expect_bad_handle(&loading, "a model whose device was closed", model, &["model"])
}

fn bad_chunks(cx: &mut Context<'_>) -> Verdict {
    let loading = Loading::new(cx)?;
    let weight = &loading.model.plan.weights[0];
    let (nbytes, granule) = (weight.nbytes, weight.granule());
    loading.upload(0, granule as usize, 2 * granule as usize)?;
    let long = vec![0u8; (nbytes + granule) as usize];
    for (which, tensor, offset, len, semantics) in [
        ("that arrived already", 0, granule, granule, 0),
        ("that covers one that arrived", 0, 0, nbytes, 0),
        ("that ends inside one that arrived", 0, 0, 2 * granule, 0),
        ("that is empty", 0, 0, 0, 0),
        ("that starts at the end", 0, nbytes, granule, 0),
        ("that ends past the end", 0, nbytes - granule, 2 * granule, 0),
        ("that begins at 2^64", 0, u64::MAX - granule + 1, granule, 0),
        ("that starts inside a block", 0, 1, granule, 0),
        ("that ends inside a block", 0, 2 * granule, granule - 1, 0),
        ("of a tensor that is not in the plan", u32::MAX, 0, granule, 0),
        ("of unknown semantics", 0, 2 * granule, granule, 77),
    ] {
        let answer = loading.raw.upload(
            loading.load,
            tensor,
            offset,
            Some(&long[..len as usize]),
            semantics,
        )?;
        answer.is(&format!("upload of a chunk {which}"), INVALID)?;
    }
    // They left no trace: both gaps are still open, and what arrived is right.
    loading.upload_rest(0)?;
    loading
        .raw
        .commit(loading.load)?
        .0
        .is("load_commit with gaps", INVALID)?;
    loading.upload(0, 0, granule as usize)?;
    loading.upload(0, 2 * granule as usize, nbytes as usize)?;
    let model = loading.commit()?;
    Ok(loading.check(model)?)
}

fn swapped_chunks(cx: &mut Context<'_>) -> Verdict {
    let loading = Loading::new(cx)?;
    let granule = loading.model.plan.weights[0].granule() as usize;
    for weight in (0..loading.model.canonical.len()).rev() {
        let len = loading.model.canonical[weight].len();
        if weight == 0 {
            loading.upload(0, 2 * granule, len)?;
            loading.upload(0, 0, granule)?;
            loading.upload(0, granule, 2 * granule)?;
        } else {
            loading.upload(weight, 0, len)?;
        }
    }
    let model = loading.commit()?;
    Ok(loading.check(model)?)
}

fn missing_block(cx: &mut Context<'_>) -> Verdict {
    let loading = Loading::new(cx)?;
    let weight = &loading.model.plan.weights[0];
    let (nbytes, granule) = (weight.nbytes as usize, weight.granule() as usize);
    loading.upload_rest(0)?;
    for (from, to) in [(0, 0), (0, granule), (2 * granule, nbytes)] {
        if from < to {
            loading.upload(0, from, to)?;
        }
        let gap = if to == 0 { 0 } else { granule as u64 };
        let (answer, handle, _) = loading.raw.commit(loading.load)?;
        answer.is("load_commit with a missing block", INVALID)?;
        equal("handle of a refused load_commit", 0, handle)?;
        equal("tensor of the record", 0, answer.record.tensor)?;
        equal("byte offset of the record", gap, answer.record.byte_offset)?;
    }
    loading.upload(0, granule, 2 * granule)?;
    let model = loading.commit()?;
    Ok(loading.check(model)?)
}

fn bad_ranges(cx: &mut Context<'_>) -> Verdict {
    let (loading, model) = Loading::loaded(cx)?;
    let weight = &loading.model.plan.weights[0];
    let (nbytes, granule) = (weight.nbytes, weight.granule());
    for (which, tensor, offset, len) in [
        ("past the end", 0, nbytes - granule, 2 * granule),
        ("that starts at the end", 0, nbytes, granule),
        ("that starts at 2^64", 0, u64::MAX - granule + 1, granule),
        ("that starts inside a block", 0, 1, granule),
        ("that ends inside a block", 0, 0, granule + 1),
        ("of a tensor that is not in the plan", u32::MAX, 0, granule),
    ] {
        let (answer, _) = loading.raw.read_back(model, tensor, offset, len as usize)?;
        answer.is(&format!("readback of a range {which}"), INVALID)?;
    }
    Ok(loading.check(model)?)
}

fn memory(cx: &mut Context<'_>) -> Verdict {
    let model = model(cx)?;
    let plan = Plan::new(&model.plan);
    let raw = Raw::new(cx)?;
    let budget = model.plan.resident.total() + (1 << 20);
    let (answer, device) = raw.open(Opening { flags: 0, budget })?;
    answer.ok("device_open with a budget")?;
    let ask = |when: &str| -> Result<abi::DeviceMemory, Failure> {
        let (answer, memory) = raw.memory(device)?;
        answer.ok("memory_info")?;
        equal(&format!("budget {when}"), budget, memory.budget)?;
        holds(
            &format!("free memory {when}"),
            memory.free <= memory.total,
            format!("at most {}", memory.total),
            memory.free,
        )?;
        Ok(memory)
    };
    equal(
        "resident bytes of a fresh device",
        [0; 7],
        ask("of a fresh device")?.resident,
    )?;
    let (answer, load) = raw.load_begin(device, &plan)?;
    answer.ok("load_begin")?;
    for (i, bytes) in model.canonical.iter().enumerate() {
        raw.upload(load, i as u32, 0, Some(bytes), 0)?.ok("upload")?;
    }
    let (answer, handle, receipt) = raw.commit(load)?;
    answer.ok("load_commit")?;
    let planned = model.plan.resident;
    let planned = [planned.quantized, planned.float, planned.gamma, planned.bias];
    equal("bytes of the receipt", planned, receipt.bytes)?;
    let resident = ask("with a model")?.resident;
    equal("resident bytes of weights", &planned[..], &resident[..4])?;
    raw.destroy(handle)?.ok("model_destroy")?;
    Ok(equal(
        "resident bytes after model_destroy",
        [0; 7],
        ask("after model_destroy")?.resident,
    )?)
}

fn threads(cx: &mut Context<'_>) -> Verdict {
    let model = model(cx)?;
    let plan = Plan::new(&model.plan);
    // Addresses inside a plan are only read.
    let shared = Shared(Raw::new(cx)?, plan);
    let shared = &shared;
    fn elsewhere<T: Send>(work: impl FnOnce() -> Result<T, Failure> + Send) -> Result<T, Failure> {
        std::thread::scope(|scope| match scope.spawn(work).join() {
            Ok(result) => result,
            Err(_) => Err(Failure::new(
                "a call from another thread",
                "",
                "no panic",
                "a panic",
            )),
        })
    }
    let device = elsewhere(|| shared.raw().device())?;
    let load = elsewhere(|| {
        let (answer, load) = shared.raw().load_begin(device, shared.plan())?;
        answer.ok("load_begin").map(|()| load)
    })?;
    for (i, bytes) in model.canonical.iter().enumerate() {
        elsewhere(|| {
            shared
                .raw()
                .upload(load, i as u32, 0, Some(bytes), 0)?
                .ok("upload")
        })?;
    }
    let handle = elsewhere(|| {
        let (answer, handle, _) = shared.raw().commit(load)?;
        answer.ok("load_commit").map(|()| handle)
    })?;
    for (i, canonical) in model.canonical.iter().enumerate() {
        let (answer, found) = elsewhere(|| shared.raw().read_back(handle, i as u32, 0, canonical.len()))?;
        answer.ok("readback")?;
        judge::bytes(&format!("readback of tensor {i}"), canonical, &found)?;
    }
    elsewhere(|| shared.raw().destroy(handle)?.ok("model_destroy"))?;
    Ok(elsewhere(|| shared.raw().close(device)?.ok("device_close"))?)
}

use raw::Shared;

fn shutdown(cx: &mut Context<'_>) -> Verdict {
    let raw = Raw::new(cx)?;
    let (first, second) = (raw.device()?, raw.device()?);
    raw.shutdown()?.is("shutdown with two devices open", BAD_STATE)?;
    raw.close(first)?.ok("device_close")?;
    raw.shutdown()?.is("shutdown with a device open", BAD_STATE)?;
    let (answer, _) = raw.memory(second)?;
    answer.is("memory_info after a refused shutdown", OK)?;
    raw.close(second)?.ok("device_close")?;
    Ok(raw.shutdown()?.ok("shutdown")?)
}

fn silent_after_shutdown(cx: &mut Context<'_>) -> Verdict {
    let before = audit::threads()?;
    let (loading, model) = Loading::loaded(cx)?;
    let raw = &loading.raw;
    raw.destroy(model)?.ok("model_destroy")?;
    raw.close(loading.device)?.ok("device_close")?;
    raw.shutdown()?.ok("shutdown")?;
    audit::expect_none_added("threads when shutdown has returned", &before, audit::threads)?;
    std::thread::sleep(std::time::Duration::from_millis(100));
    equal("messages after shutdown", 0, raw.log.late.load(Ordering::Relaxed))?;
    cx.measure(
        "messages to the host's log",
        raw.log.messages.load(Ordering::Relaxed) as f64,
        "",
    );
    Ok(())
}
