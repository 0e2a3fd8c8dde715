//! What is to go wrong.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What a test asked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Faults {
    pub(crate) storage_buffers: Option<u32>,
    pub(crate) storage_range: Option<u32>,
    allocations: Option<u64>,
    submits: Option<u64>,
}

impl Faults {
    fn parse(text: &str) -> Result<Self, String> {
        let mut faults = Self::default();
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| format!("`{pair}` is no key=number"))?;
            let long: u64 = value
                .parse()
                .map_err(|_| format!("`{value}` of `{key}` is no number"))?;
            let short = || u32::try_from(long).map_err(|_| format!("`{value}` of `{key}` exceeds 32 bits"));
            match key {
                "storage_buffers" => faults.storage_buffers = Some(short()?),
                "storage_range" => faults.storage_range = Some(short()?),
                "allocations" => faults.allocations = Some(long),
                "submits" => faults.submits = Some(long),
                _ => return Err(format!("there is no fault `{key}`")),
            }
        }
        Ok(faults)
    }

    /// What this process was asked for; `None`, and a line on stderr, if that cannot be understood.
    pub(crate) fn of_process() -> Option<&'static Self> {
        static FAULTS: OnceLock<Option<Faults>> = OnceLock::new();
        FAULTS
            .get_or_init(|| {
                let text = std::env::var("HOIST_VULKAN_FAULTS").unwrap_or_default();
                Self::parse(&text)
                    .inspect_err(|error| eprintln!("HOIST_VULKAN_FAULTS: {error}"))
                    .ok()
            })
            .as_ref()
    }

    /// Counts an allocation; whether it is refused.
    pub(crate) fn refuses_allocation(&self) -> bool {
        static DONE: AtomicU64 = AtomicU64::new(0);
        self.allocations
            .is_some_and(|most| DONE.fetch_add(1, Ordering::Relaxed) >= most)
    }

    /// Counts a submission; whether the device is lost by it, or was before.
    pub(crate) fn loses_device(&self) -> bool {
        static DONE: AtomicU64 = AtomicU64::new(0);
        let loses = self
            .submits
            .is_some_and(|most| DONE.fetch_add(1, Ordering::Relaxed) >= most);
        if loses {
            LOST.store(true, Ordering::Relaxed);
        }
        loses
    }
}

static LOST: AtomicBool = AtomicBool::new(false);

/// Whether the device was lost.
pub(crate) fn is_lost() -> bool {
    LOST.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_pairs_of_known_keys_and_numbers() {
        assert_eq!(Faults::parse(""), Ok(Faults::default()));
        let parsed = Faults::parse("storage_range=65536;submits=3;").unwrap();
        assert_eq!((parsed.storage_range, parsed.submits), (Some(65536), Some(3)));
        for text in ["submits", "submits=x", "storage_range=4294967296", "sumbits=1"] {
            assert!(Faults::parse(text).is_err(), "{text}");
        }
    }
}
