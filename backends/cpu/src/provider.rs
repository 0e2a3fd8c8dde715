use std::sync::OnceLock;

use hoist_backend::{DeviceInfo, Error, OpenOptions, Provider, Result, WeightBackend};

use crate::backend::CpuBackend;
use crate::memory::SystemMemory;

/// Finds the one CPU there is.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuProvider;

/// The processor's name, as Linux gives it; read once.
pub(crate) fn device_name() -> String {
    static NAME: OnceLock<String> = OnceLock::new();
    NAME.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        text.lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or_else(|| std::env::consts::ARCH.into(), |(_, name)| name.trim().into())
    })
    .clone()
}

/// Threads that the machine lets this process run at once; asked once, since the answer takes four files.
pub(crate) fn parallelism() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

impl Provider for CpuProvider {
    fn name(&self) -> &str {
        crate::NAME
    }

    fn devices(&self) -> Result<Vec<DeviceInfo>> {
        let memory = SystemMemory::read()?;
        let details = vec![
            ("threads".into(), parallelism().to_string()),
            ("instructions".into(), instructions()),
        ];
        Ok(vec![DeviceInfo {
            ordinal: 0,
            id: crate::NAME.into(),
            name: device_name(),
            total_memory: memory.total,
            details,
        }])
    }

    fn open(&self, ordinal: u32, options: &OpenOptions) -> Result<Box<dyn WeightBackend>> {
        if ordinal != 0 {
            return Err(Error::Unavailable {
                backend: crate::NAME.into(),
                reason: format!("there is no CPU device {ordinal}"),
                hint: Some("its only device is 0".into()),
            });
        }
        Ok(Box::new(CpuBackend::open(options)?))
    }
}

#[cfg(target_arch = "x86_64")]
fn instructions() -> String {
    let found = [
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("f16c", std::arch::is_x86_feature_detected!("f16c")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ("avx512bw", std::arch::is_x86_feature_detected!("avx512bw")),
        ("avx512vnni", std::arch::is_x86_feature_detected!("avx512vnni")),
    ];
    let names: Vec<_> = found
        .iter()
        .filter(|(_, has)| *has)
        .map(|(name, _)| *name)
        .collect();
    if names.is_empty() {
        "none beyond x86-64's own".into()
    } else {
        names.join(" ")
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn instructions() -> String {
    "portable".into()
}
