//! What a process holds: memory, descriptors, threads, its floating-point mode, what it has printed.

use std::collections::BTreeMap;
use std::fs;

use crate::{Failure, Stop};

fn unreadable(what: &str, error: impl std::fmt::Display) -> Stop {
    Stop::Skip(format!("{what} cannot be read: {error}"))
}

/// Bytes of memory that are resident.
///
/// # Errors
/// [`Stop::Skip`] where `/proc` does not say.
pub fn resident_bytes() -> Result<u64, Stop> {
    let path = "/proc/self/statm";
    let text = fs::read_to_string(path).map_err(|e| unreadable(path, e))?;
    let pages: u64 = text
        .split(' ')
        .nth(1)
        .and_then(|n| n.parse().ok())
        .ok_or_else(|| unreadable(path, "no second number"))?;
    Ok(pages * rustix::param::page_size() as u64)
}

/// Bytes of memory that the machine can still give.
///
/// # Errors
/// [`Stop::Skip`] where `/proc` does not say.
pub fn available_bytes() -> Result<u64, Stop> {
    let path = "/proc/meminfo";
    let text = fs::read_to_string(path).map_err(|e| unreadable(path, e))?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map(|kib| kib * 1024)
        .ok_or_else(|| unreadable(path, "no MemAvailable"))
}

/// Open descriptors by number, with what they are.
///
/// # Errors
/// [`Stop::Skip`] where `/proc` does not say.
pub fn descriptors() -> Result<BTreeMap<u32, String>, Stop> {
    let path = "/proc/self/fd";
    let entries = fs::read_dir(path).map_err(|e| unreadable(path, e))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            // The descriptor of this listing itself is gone by now.
            let target = fs::read_link(entry.path()).ok()?;
            let target = target.display().to_string();
            (!target.starts_with("/proc/") || !target.ends_with("/fd")).then_some((number, target))
        })
        .collect())
}

/// Threads by number, with their names.
///
/// # Errors
/// [`Stop::Skip`] where `/proc` does not say.
pub fn threads() -> Result<BTreeMap<u32, String>, Stop> {
    let path = "/proc/self/task";
    let entries = fs::read_dir(path).map_err(|e| unreadable(path, e))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            let name = fs::read_to_string(entry.path().join("comm")).ok()?;
            Some((number, name.trim().to_owned()))
        })
        .collect())
}

/// What stands in `after` and not in `before`.
pub fn added(before: &BTreeMap<u32, String>, after: &BTreeMap<u32, String>) -> Vec<String> {
    after
        .iter()
        .filter(|(number, name)| before.get(number) != Some(name))
        .map(|(number, name)| format!("{number} ({name})"))
        .collect()
}

/// Demands that nothing was added; a thread that is ending gets a moment to be gone.
///
/// # Errors
/// What was added.
pub fn expect_none_added(
    what: &str,
    before: &BTreeMap<u32, String>,
    now: impl Fn() -> Result<BTreeMap<u32, String>, Stop>,
) -> Result<(), Stop> {
    let mut new = Vec::new();
    for _ in 0..50 {
        new = added(before, &now()?);
        if new.is_empty() || !crate::mutation::holds(crate::mutation::Rule::NothingAdded) {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Err(Failure::new(what, "", "none left behind", new.join(", ")).into())
}

/// Bytes that this process has written to stdout and stderr, where both are files, as they are for a case's process.
///
/// # Errors
/// [`Stop::Skip`] where they are not.
pub fn printed() -> Result<(u64, u64), Stop> {
    let length = |what: &str, stat: rustix::io::Result<rustix::fs::Stat>| {
        let stat = stat.map_err(|e| unreadable(what, e))?;
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile {
            return Err(Stop::Skip(format!("{what} is no file")));
        }
        u64::try_from(stat.st_size).map_err(|e| unreadable(what, e))
    };
    Ok((
        length("stdout", rustix::fs::fstat(std::io::stdout()))?,
        length("stderr", rustix::fs::fstat(std::io::stderr()))?,
    ))
}

/// The control bits of this thread's floating-point mode: rounding, flush-to-zero, denormals-are-zero, exception masks.
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "a control register is read by an instruction")]
pub fn float_mode() -> Option<u32> {
    let mut mxcsr = 0u32;
    // SAFETY: stores a control word to the local, and nothing else.
    unsafe {
        std::arch::asm!("stmxcsr [{}]", in(reg) &mut mxcsr, options(nostack, preserves_flags));
    }
    // The low six bits are flags that any inexact operation sets.
    Some(mxcsr & !0x3F)
}

/// The control bits of this thread's floating-point mode; `None` where the suite cannot read them.
#[cfg(not(target_arch = "x86_64"))]
pub fn float_mode() -> Option<u32> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_and_a_descriptor_are_seen_to_come_and_go() {
        let (threads_before, files_before) = (threads().unwrap(), descriptors().unwrap());
        let file = fs::File::open("/proc/self/status").unwrap();
        assert!(
            added(&files_before, &descriptors().unwrap())
                .iter()
                .any(|f| f.contains("status"))
        );
        drop(file);
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let (ready, is_ready) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("left-behind".into())
            .spawn(move || (ready.send(()), stopped.recv()))
            .unwrap();
        is_ready.recv().unwrap();
        let is_there = || {
            added(&threads_before, &threads().unwrap())
                .iter()
                .any(|t| t.contains("left-behind"))
        };
        assert!(is_there());
        drop(stop);
        assert!(thread.join().unwrap().1.is_err());
        // The kernel takes it from the list a moment after it was joined.
        assert!((0..100).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            !is_there()
        }));
        assert!(resident_bytes().unwrap() > 1 << 20);
        assert!(available_bytes().unwrap() > 1 << 20);
    }
}
