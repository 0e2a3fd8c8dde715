//! What a panic says, and to whom: the host's log instead of standard error, and the record of the call.

use std::any::Any;
use std::cell::Cell;
use std::ffi::c_void;
use std::sync::{Mutex, Once, PoisonError};

use hoist_plugin_abi::{Host, LOG_ERROR, LogFn};

/// The host's log, until `shutdown`.
#[derive(Clone, Copy)]
struct Log {
    context: *mut c_void,
    log: LogFn,
}

// SAFETY: the log may be called from any thread, and the context is the host's own.
unsafe impl Send for Log {}

static LOG: Mutex<Option<Log>> = Mutex::new(None);

thread_local! {
    /// Where this thread panicked last.
    static PLACE: Cell<Option<String>> = const { Cell::new(None) };
}

/// Sends panics of this library, on any thread, to the host's log. A library's hook is its own: it has its own copy of the
/// standard library, so that the host's panics go where they went.
pub(crate) fn tell(host: &Host) {
    static HOOK: Once = Once::new();
    let log = host.log.map(|log| Log {
        context: host.context,
        log,
    });
    *lock() = log;
    HOOK.call_once(|| {
        std::panic::set_hook(Box::new(|panic| {
            let place = panic.location().map(ToString::to_string);
            let text = format!(
                "panic at {}: {}",
                place.as_deref().unwrap_or("an unknown place"),
                text(panic.payload())
            );
            PLACE.set(place);
            // Held during the call, so that it does not come after `shutdown`.
            if let Some(Log { context, log }) = *lock() {
                // SAFETY: the host's log takes so many bytes, at any time before `shutdown` has returned.
                unsafe { log(context, LOG_ERROR, text.as_ptr(), text.len() as u64) };
            }
        }));
    });
}

/// Forgets the host's log when dropped.
pub(crate) struct Untell;

impl Drop for Untell {
    fn drop(&mut self) {
        *lock() = None;
    }
}

fn lock() -> std::sync::MutexGuard<'static, Option<Log>> {
    LOG.lock().unwrap_or_else(PoisonError::into_inner)
}

fn text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
}

/// A caught panic in words: what it said, and where it was.
pub(crate) fn message(panic: &(dyn Any + Send)) -> String {
    match PLACE.take() {
        Some(place) => format!("{} ({place})", text(panic)),
        None => text(panic).to_owned(),
    }
}
