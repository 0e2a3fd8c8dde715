//! The CPU reference as a plugin with one misbehaviour, chosen by the environment variable `HOIST_FAULT`: what the
//! conformance suite is tested with. Unset, it behaves. With `HOIST_FAULT_CLASS` set to `bounded` it declares itself *bounded*,
//! whatever else it does.
//!
//! `conformance/faults/table.txt` says which case of the suite must catch which fault. `faulty.c` beside this crate is the
//! backend in C with the faults that tests of the host need; ids that both have mean the same.
//!
//! # The library
//!
//! | id | what happens |
//! |---|---|
//! | `constructor-abort` | the constructor aborts |
//! | `constructor-hang` | it never returns |
//! | `constructor-exit` | it ends the process with 0 |
//! | `constructor-flush` | it sets flush-to-zero for the thread |
//! | `constructor-print` | it writes to stdout |
//! | `replaces-itself` | it puts another file in the library's place, `HOIST_FAULT_FILE` |
//! | `open-null` | the entry returns OK and no table |
//! | `open-status` | the entry returns an undocumented status |
//! | `size-zero`, `size-short`, `size-huge` | `struct_size` of the table is 0, too short for the profile, or huge |
//! | `yes` | every function returns OK and does nothing |
//! | `no` | it supports no encoding and no operation |
//! | `callback-late` | a thread calls the host's log after `shutdown` |
//!
//! Faults of the file and its header (`file-…`, `header-…`, `symbol-…`) are patched copies, which the test of the table makes:
//! [`HOIST_PLUGIN_HEADER_V1`] is found by its magic.
//!
//! # Any function, `KIND:ENTRY`
//!
//! | kind | what happens in that function |
//! |---|---|
//! | `null` | the entry is NULL |
//! | `abort`, `segfault`, `overflow`, `hang`, `exit` | it aborts, writes to address 8, recurses until the stack ends, never returns, ends the process with 0 |
//! | `throw` | a panic unwinds out of it |
//! | `panic` | it catches a panic of its own and returns PANIC |
//! | `status` | it returns an undocumented status |
//! | `lost` | it returns DEVICE_LOST |
//! | `message` | it fails, and its message does not end |
//! | `swallows` | it returns OK where it failed |
//! | `zero` | it works and hands out handle 0 |
//! | `flush`, `print` | it works, and sets flush-to-zero or writes to stdout |
//! | `leak`, `descriptor`, `thread` | it works, and leaves 1 MiB, a file descriptor or a thread behind |
//! | `directory`, `environment` | it works, and changes the working directory or the environment |
//!
//! # Answers
//!
//! | id | what happens |
//! |---|---|
//! | `devices-none`, `devices-huge` | there are no devices, or 4 billion |
//! | `strings` | the device's name does not end |
//! | `caps-numerics`, `caps-alignment`, `caps-operations` | an unknown class, an alignment that is no power of two, an operation number that does not exist and nothing else |
//! | `claims-encoding` | Q5_1 is claimed, and `load_begin` refuses it |
//! | `computes-less` | Q4_K is claimed as computed, and `prepare` refuses it |
//! | `claims-operation` | SoftCap is claimed, and `prepare` refuses it |
//! | `unclaimed-encoding` | Q4_1 works and is not claimed |
//! | `claims-exact` | every logit is one unit in the last place away |
//! | `memory-lies` | `memory_info` says that nothing is resident |
//! | `receipt-tensors` | `load_commit` vouches for one tensor less |
//! | `workspace-lies` | `workspace_bytes` says half of what `workspace_create` takes |
//! | `out-of-order-ok` | a call out of order returns OK |
//! | `stale-handle-ok` | a stale handle is accepted |
//! | `double-destroy-aborts` | a handle that was destroyed already aborts |
//! | `lost-then-ok` | after DEVICE_LOST calls return OK, with garbage |
//! | `token-accepted`, `context-accepted` | a token outside the vocabulary, or beyond the context, is accepted |
//! | `thread-bound` | calls from another thread than the one that opened the device fail |
//! | `host-fallback` | the device says that it is a GPU, and its memory is the host's |
//!
//! # Residency
//!
//! | id | what happens |
//! |---|---|
//! | `ignores-offset` | chunks go to the start of the tensor |
//! | `truncates-offset` | offsets lose what is above 4 GiB |
//! | `drops-chunk`, `drops-last` | the last chunk of a tensor, or the last byte of every chunk, is lost |
//! | `swaps-chunks` | two chunks of a tensor, of equal length, change places |
//! | `wrong-tensor` | chunks go to the tensor before |
//! | `accepts-overlap`, `accepts-short` | chunks may overlap, or split a block |
//! | `commits-incomplete` | `load_commit` does not look for missing bytes |
//! | `keeps-pointer` | bytes are copied only when the load is committed |
//! | `reads-past` | a byte past the chunk is read |
//! | `writes-input` | uploads write to the caller's bytes |
//! | `non-finite-accepted` | a NaN in a weight is accepted |
//! | `gamma-quantised` | norm vectors keep eight significant bits |
//! | `transposes-wrongly` | float matrices are transposed and keep their shape |
//! | `readback-wrong`, `readback-overrun` | the first byte that is read back is wrong; one byte too many is read back |
//! | `digest-wrong` | digests are of other bytes |
//! | `leaks-device` | what was resident stays so after `model_destroy` |
//!
//! # Decoding
//!
//! | id | what happens |
//! |---|---|
//! | `index-layer` | layers are off by one in the index |
//! | `gate-up-swapped` | gate and up change places in the index |
//! | `bias-omitted` | optional biases are not added |
//! | `workspace-short` | the last token of a full batch is wrong |
//! | `allocates-in-forward` | every step allocates device memory |
//! | `wrong-last-block` | products take the last, partial segment of a row wrongly; read-back is right |
//! | `wrong-lane` | one column in 64 does not count |
//! | `wrong-row` | the last row of an odd number of rows is the one before |
//! | `wrong-batch` | tokens after the first of a batch are wrong in one logit |
//! | `wrong-later` | the second step of a device, and those after it, are wrong in one logit |
//! | `wrong-threads` | more than one thread gives other results |
//! | `stale-kv` | a sequence that is cut to 0 keeps its first token |
//! | `stale-workspace` | the first logit is the one of the step before |
//! | `sequences-mixed` | cutting a sequence cuts the others, too |
//! | `fixed-inputs` | right only for sequences that start with token 1 |
//! | `argmax-wrong` | the arg-max is the next token |
//! | `non-finite-ok` | NonFinite is returned as OK, with zeros |
//! | `logits-overrun`, `argmax-overrun` | one logit, or arg-max, too many is written |
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "misbehaving is what it is for"
)]

mod backend;
mod crash;
mod table;
mod yes;

use std::sync::OnceLock;

use hoist_plugin_sdk::abi::{ErrorRecord, HeaderV1, Host, Plugin, Status};
use hoist_plugin_sdk::hoist_backend::Provider;

/// What this plugin says of itself, read from the file.
#[unsafe(no_mangle)]
pub static HOIST_PLUGIN_HEADER_V1: HeaderV1 =
    hoist_plugin_sdk::header("faulty", "Hoist", env!("CARGO_PKG_VERSION"));

/// The fault that the environment chose; empty: none.
fn chosen() -> &'static str {
    static CHOSEN: OnceLock<String> = OnceLock::new();
    CHOSEN.get_or_init(|| std::env::var("HOIST_FAULT").unwrap_or_default())
}

/// Whether the backend is to declare itself *bounded* instead of *exact*, whatever its fault.
fn bounded() -> bool {
    std::env::var_os("HOIST_FAULT_CLASS").is_some_and(|class| class == "bounded")
}

/// Whether the fault is that one.
fn is(id: &str) -> bool {
    chosen() == id
}

/// Whether the fault is `kind` in `entry`.
fn is_of(kind: &str, entry: &str) -> bool {
    chosen().split_once(':') == Some((kind, entry))
}

fn provider() -> Box<dyn Provider> {
    Box::new(backend::FaultyProvider)
}

/// The plugin's entry.
///
/// # Safety
/// As `hoist_plugin.h` says: pointers are valid for the call, `host` until `shutdown` returns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hoist_plugin_open_v1(
    host: *const Host,
    minor: u32,
    plugin: *mut *const Plugin,
    error: *mut ErrorRecord,
) -> Status {
    if let Some(status) = crash::misbehave("open", error) {
        return status;
    }
    if is("open-null") {
        return Status::OK;
    }
    if is("open-status") {
        return crash::UNDOCUMENTED;
    }
    // SAFETY: passes on what the caller vouches for.
    let status = unsafe { hoist_plugin_sdk::open(provider, !is("no"), host, minor, plugin, error) };
    if status != Status::OK || (chosen().is_empty() && !bounded()) {
        return status;
    }
    // SAFETY: the entry of the SDK returned OK: it wrote here.
    let base = unsafe { plugin.read() };
    // SAFETY: what it wrote is the address of its table, which is static.
    let base: &'static Plugin = unsafe { &*base };
    // SAFETY: the caller vouches for the host until `shutdown` returns.
    let log = unsafe { (*host).log };
    let faulty = table::make(base, log);
    // SAFETY: the caller vouches for the place.
    unsafe { plugin.write(faulty) };
    status
}
