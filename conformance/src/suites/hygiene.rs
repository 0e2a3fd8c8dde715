//! A backend is a guest in a process: what it may not touch, print or leave.

use std::collections::BTreeMap;
use std::fs;

use hoist_backend::{OpenOptions, WeightBackend};

use super::support::{Small, mixed_model, tokens};
use crate::{Case, Context, Expect, Failure, Need, Stop, Verdict, audit, judge};

/// The cases.
pub fn cases() -> Vec<Case> {
    let case = |group, name, run: fn(&mut Context<'_>) -> Verdict| {
        Case::new("hygiene", group, name, run)
            .needs(Need::Process)
            .unseeded()
    };
    vec![
        case("output", "nothing_is_printed", nothing_is_printed),
        case("process", "floating_point_mode", float_mode),
        // A process of its own: what another case has changed would be what this one finds.
        case(
            "surroundings",
            "signals_folder_and_environment",
            process_is_unchanged,
        ),
        case("leavings", "threads", threads_are_joined),
        case("leavings", "descriptors", descriptors_are_closed),
        case("library", "exported_names", exported_names).needs(Need::Plugin),
        case("decode", "nothing_is_printed", decode_quietly).needs(Need::Decode),
    ]
}

/// All that a backend that holds weights is for, once.
fn whole_life(cx: &mut Context<'_>) -> Verdict {
    let model = mixed_model(cx, 12)?;
    let mut backend = cx.open()?;
    model.load(&mut *backend)?;
    backend.build_index(&model.index).succeeds("build_index")?;
    model.check_read_back(&mut *backend)?;
    backend.memory().succeeds("memory")?;
    // Errors are told by values, too.
    let refused = backend.begin_load(&model.plan);
    judge::holds(
        "begin_load of an indexed backend",
        refused.is_err(),
        "an error",
        "success",
    )?;
    backend.unload().succeeds("unload")?;
    backend.begin_load(&model.plan).succeeds("begin_load")?;
    Ok(backend.abort_load().succeeds("abort_load")?)
}

/// Runs a program, if the backend decodes it.
fn decode(cx: &mut Context<'_>) -> Verdict {
    let small = match Small::new(cx, Small::capacity(16, 2, 4)) {
        Ok(small) => small,
        Err(Stop::Unsupported(_)) => return Ok(()),
        Err(other) => return Err(other),
    };
    let mut backend: Box<dyn WeightBackend> = small.prepared(cx, &OpenOptions::default())?;
    let text = tokens(&mut cx.random, 4);
    small.forward(&mut *backend, 0, &text)?;
    Ok(())
}

/// Since the process began, not since the case did: constructors count.
fn expect_silence() -> Verdict {
    let (stdout, stderr) = audit::printed()?;
    judge::equal("bytes on stdout", 0, stdout)?;
    Ok(judge::equal("bytes on stderr", 0, stderr)?)
}

fn nothing_is_printed(cx: &mut Context<'_>) -> Verdict {
    whole_life(cx)?;
    expect_silence()
}

fn decode_quietly(cx: &mut Context<'_>) -> Verdict {
    decode(cx)?;
    expect_silence()
}

/// The calling thread's mode after every call, and the one that threads started after the library was loaded have.
fn float_mode(cx: &mut Context<'_>) -> Verdict {
    /// Round to nearest, nothing flushed, all exceptions masked: how every thread begins.
    const INITIAL: u32 = 0x1F80;
    let Some(now) = audit::float_mode() else {
        return Err(Stop::Skip(
            "the floating-point mode of this machine is not known to the suite".into(),
        ));
    };
    let shown = |mode: Option<u32>| mode.map_or_else(|| "unknown".into(), |m| format!("{m:#06x}"));
    judge::equal(
        "mode of the thread that opened the device",
        shown(Some(INITIAL)),
        shown(Some(now)),
    )?;
    whole_life(cx)?;
    decode(cx)?;
    judge::equal(
        "mode after calls",
        shown(Some(INITIAL)),
        shown(audit::float_mode()),
    )?;
    let inherited = std::thread::spawn(audit::float_mode).join();
    let inherited =
        inherited.map_err(|_| Failure::new("a thread of the suite", "", "no panic", "a panic"))?;
    judge::equal("mode of a new thread", shown(Some(INITIAL)), shown(inherited))?;
    Ok(())
}

/// Signals that have a handler of their own, as a mask.
fn handlers() -> Result<u64, Stop> {
    let path = "/proc/self/status";
    let text = fs::read_to_string(path).map_err(|e| Stop::Skip(format!("{path}: {e}")))?;
    text.lines()
        .find_map(|line| line.strip_prefix("SigCgt:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .ok_or_else(|| Stop::Skip(format!("{path} has no SigCgt")))
}

/// Signals that are handled before any library is loaded: SIGSEGV and SIGBUS by the runtime of this language, for
/// overflowing stacks, and the two that the C library keeps for its threads.
const OWN_HANDLERS: u64 = 1 << (11 - 1) | 1 << (7 - 1) | 0b11 << (32 - 1);

fn process_is_unchanged(cx: &mut Context<'_>) -> Verdict {
    let folder = std::env::current_dir().map_err(|e| Stop::Skip(format!("no current folder: {e}")))?;
    let environment: BTreeMap<_, _> = std::env::vars_os().collect();
    whole_life(cx)?;
    decode(cx)?;
    judge::equal("signals that are handled", 0, handlers()? & !OWN_HANDLERS)?;
    judge::equal("current folder", Some(folder), std::env::current_dir().ok())?;
    let now: BTreeMap<_, _> = std::env::vars_os().collect();
    let changed: Vec<_> = now
        .iter()
        .filter(|(k, v)| environment.get(*k) != Some(v))
        .map(|(k, _)| k.clone())
        .chain(environment.keys().filter(|k| !now.contains_key(*k)).cloned())
        .collect();
    judge::holds(
        "environment",
        changed.is_empty(),
        "as it was",
        format!("{changed:?} changed"),
    )?;
    Ok(())
}

fn threads_are_joined(cx: &mut Context<'_>) -> Verdict {
    // What the first use starts for the whole process may stay; what each backend starts may not.
    whole_life(cx)?;
    decode(cx)?;
    let before = audit::threads()?;
    for _ in 0..3 {
        whole_life(cx)?;
        decode(cx)?;
    }
    let now = || -> Result<_, Stop> {
        let now = audit::threads()?;
        Ok(if now.len() <= before.len() {
            before.clone()
        } else {
            now
        })
    };
    audit::expect_none_added("threads when every backend is closed", &before, now)
}

fn descriptors_are_closed(cx: &mut Context<'_>) -> Verdict {
    whole_life(cx)?;
    decode(cx)?;
    let before = audit::descriptors()?;
    for _ in 0..3 {
        whole_life(cx)?;
        decode(cx)?;
    }
    audit::expect_none_added(
        "descriptors when every backend is closed",
        &before,
        audit::descriptors,
    )
}

/// Two names and nothing else: what else a library exports can take the place of another's.
fn exported_names(cx: &mut Context<'_>) -> Verdict {
    use hoist_plugin_abi::{HEADER_SYMBOL, OPEN_SYMBOL};
    let plugin = cx.plugin()?;
    let others: Vec<&str> = plugin
        .exports
        .iter()
        .map(String::as_str)
        .filter(|name| ![HEADER_SYMBOL, OPEN_SYMBOL].contains(name))
        // What the linker of C++ and Rust makes, and never collides.
        .filter(|name| !name.starts_with("_init") && !name.starts_with("_fini"))
        .collect();
    judge::holds(
        "exported names",
        others.is_empty(),
        format!("{HEADER_SYMBOL} and {OPEN_SYMBOL}"),
        format!("{} besides", others.join(", ")),
    )?;
    Ok(())
}
