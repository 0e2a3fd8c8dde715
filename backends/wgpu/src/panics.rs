//! Panics of wgpu that are no bugs of ours: it panics where a driver says, while one waits for it, that its device is lost.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Lets panics within [`caught`] print nothing; all others are told as before. To be called by a thread that does not panic.
pub(crate) fn hush() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |panic| {
            if !CAUGHT.get() {
                before(panic);
            }
        }));
    });
}

/// Calls it; a panic is an error, in its own words. The call must leave nothing behind that is half done.
pub(crate) fn caught<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    let outer = CAUGHT.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    CAUGHT.set(outer);
    result.map_err(|panic| words(panic.as_ref()))
}

fn words(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
        .unwrap_or_else(|| "a panic without words".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_in_its_own_words() {
        hush();
        assert_eq!(caught(|| 3), Ok(3));
        assert_eq!(caught(|| panic!("as it was")), Err::<(), _>("as it was".into()));
        assert_eq!(caught(|| panic!("{}", 4)), Err::<(), _>("4".into()));
        assert!(!CAUGHT.get());
    }
}
