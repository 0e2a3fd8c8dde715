//! What a function does besides, or instead of, its work.

use std::ffi::c_int;
use std::io::Write;
use std::panic::catch_unwind;
use std::time::Duration;

use hoist_plugin_sdk::abi::{ErrorRecord, Status};

use crate::{is, is_of};

/// A status that no version documents.
pub(crate) const UNDOCUMENTED: Status = Status(-999);

// Runs when the library is loaded, before its entry can be asked for.
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

extern "C" fn constructor() {
    match crate::chosen() {
        "constructor-abort" => std::process::abort(),
        "constructor-hang" => hang(),
        "constructor-exit" => exit(),
        "constructor-flush" => flush_to_zero(),
        "constructor-print" => print("a constructor"),
        "replaces-itself" => replace_file(),
        _ => {}
    }
}

/// Puts another file in the place of the library, as an update would: what was judged is not what stands there now.
fn replace_file() {
    let Some(path) = std::env::var_os("HOIST_FAULT_FILE").map(std::path::PathBuf::from) else {
        return;
    };
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.push(0);
    let other = path.with_extension("new");
    std::fs::write(&other, bytes).unwrap();
    std::fs::rename(&other, &path).unwrap();
}

/// Misbehaves in `entry` if that is the fault; a status ends the call.
pub(crate) fn misbehave(entry: &str, error: *mut ErrorRecord) -> Option<Status> {
    let (kind, at) = crate::chosen().split_once(':')?;
    if at != entry {
        return None;
    }
    match kind {
        "abort" => std::process::abort(),
        "segfault" => segfault(),
        "overflow" => {
            std::hint::black_box(overflow(0));
        }
        "hang" => hang(),
        "exit" => exit(),
        "throw" => panic!("thrown by {entry}"),
        "panic" => {
            let _ = catch_unwind(|| panic!("in {entry}"));
            return Some(fail(error, Status::PANIC, "a panic that was caught"));
        }
        "status" => return Some(UNDOCUMENTED),
        "lost" => return Some(fail(error, Status::DEVICE_LOST, "the device fell off")),
        "message" => {
            if !error.is_null() {
                // SAFETY: the caller vouches for a record.
                unsafe { (*error).message = [b'x'; 256] };
            }
            return Some(Status::INTERNAL);
        }
        "flush" => flush_to_zero(),
        "print" => print(entry),
        "leak" => {
            std::hint::black_box(Box::leak(vec![1u8; 1 << 20].into_boxed_slice()));
        }
        "descriptor" => std::mem::forget(std::fs::File::open("/dev/null").unwrap()),
        "thread" => {
            std::thread::spawn(hang);
        }
        "directory" => std::env::set_current_dir("/").unwrap(),
        // SAFETY: unsound beside threads that read the environment, which is why a plugin must not.
        "environment" => unsafe { std::env::set_var("HOIST_FAULTY", entry) },
        _ => {}
    }
    None
}

/// Fills the record's status and message.
pub(crate) fn fail(error: *mut ErrorRecord, status: Status, message: &str) -> Status {
    if !error.is_null() {
        let mut record = ErrorRecord::new();
        record.code = status.0;
        record.message[..message.len()].copy_from_slice(message.as_bytes());
        // SAFETY: the caller vouches for a record.
        unsafe { error.write(record) };
    }
    status
}

/// What is done after a function worked: the handle of `zero:ENTRY`.
pub(crate) fn hand_out(entry: &str, handle: *mut u64) {
    if is_of("zero", entry) && !handle.is_null() {
        // SAFETY: the caller vouches for the place.
        unsafe { handle.write(0) };
    }
}

pub(crate) fn hang() {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn exit() {
    unsafe extern "C" {
        fn exit(code: c_int) -> !;
    }
    // SAFETY: runs the handlers at exit, as a library that calls it would.
    unsafe { exit(0) }
}

fn segfault() {
    let address = std::hint::black_box(8usize) as *mut u32;
    // SAFETY: none: nothing is mapped there.
    unsafe { address.write_volatile(0) };
}

#[expect(unconditional_recursion, reason = "until the stack ends")]
#[inline(never)]
fn overflow(n: u64) -> u64 {
    let frame = std::hint::black_box([n; 512]);
    overflow(n + 1) + frame[(n % 512) as usize]
}

fn print(place: &str) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "hello from {place}");
    let _ = out.flush();
}

fn flush_to_zero() {
    #[cfg(target_arch = "x86_64")]
    {
        let mut mode = 0u32;
        // SAFETY: stores the mode to `mode`.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &mut mode) };
        mode |= 0x8040;
        // SAFETY: sets flush-to-zero and denormals-are-zero.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &mode) };
    }
}

/// Whether a failed call is to be returned as OK.
pub(crate) fn swallows(entry: &str, status: Status) -> bool {
    match status {
        Status::OK => false,
        Status::BAD_STATE if is("out-of-order-ok") => true,
        Status::BAD_HANDLE if is("stale-handle-ok") => true,
        Status::TOKEN_OUT_OF_RANGE if is("token-accepted") => true,
        Status::CONTEXT_EXCEEDED if is("context-accepted") => true,
        _ => is_of("swallows", entry),
    }
}
