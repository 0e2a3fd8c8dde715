use hoist_backend::{
    DeviceInfo, DeviceMemory, Error, MemoryByClass, OpenOptions, Outline, Provider, Result, UnsupportedWhat,
    WeightBackend,
};

use crate::backend::{CudaBackend, describe};
use crate::decode::Engine;
use crate::driver::{self, Device};

/// Finds CUDA devices.
#[derive(Clone, Copy, Debug, Default)]
pub struct CudaProvider;

impl Provider for CudaProvider {
    fn name(&self) -> &str {
        crate::NAME
    }

    fn devices(&self) -> Result<Vec<DeviceInfo>> {
        let found = driver::probe()?;
        (0..driver::device_count()?)
            .map(|ordinal| {
                let device = Device::new(ordinal)?;
                let (major, minor) = device.capability;
                Ok(DeviceInfo {
                    ordinal,
                    name: device.name,
                    total_memory: device.total_memory,
                    details: vec![
                        ("compute capability".into(), format!("{major}.{minor}")),
                        ("multiprocessors".into(), device.multiprocessors.to_string()),
                        ("PCI".into(), device.pci),
                        ("driver".into(), format!("CUDA {}.{}", found.cuda.0, found.cuda.1)),
                    ],
                    id: device.id,
                })
            })
            .collect()
    }

    fn open(&self, ordinal: u32, options: &OpenOptions) -> Result<Box<dyn WeightBackend>> {
        Ok(Box::new(CudaBackend::open(ordinal, options)?))
    }

    /// All devices hold weights and run steps alike; only their memory differs.
    fn outline(&self, options: &OpenOptions) -> Result<Option<Outline>> {
        if options.import {
            return Err(Error::Unsupported {
                backend: crate::NAME.into(),
                what: UnsupportedWhat::Other("mapping weights from files instead of copying them".into()),
            });
        }
        let memory = options.memory_budget.unwrap_or(0);
        let memory = DeviceMemory {
            device: crate::NAME.into(),
            total: memory,
            free: memory,
            budget: options.memory_budget,
            resident: MemoryByClass::default(),
            mapped: 0,
        };
        Ok(Some(Outline {
            info: describe(crate::NAME, "a device that is not here", options, vec![memory]),
            workspace_bytes: Engine::workspace_bytes,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_is_told_so_and_nothing_panics() {
        match CudaProvider.devices() {
            Ok(devices) => assert!(devices.iter().all(|d| d.id.starts_with("cuda:"))),
            Err(error) => {
                assert!(matches!(error, Error::Unavailable { .. }), "{error}");
                let opened = CudaProvider.open(0, &OpenOptions::default());
                assert!(matches!(opened.map(|_| ()), Err(Error::Unavailable { .. })));
            }
        }
    }
}
