use hoist_backend::{DeviceInfo, OpenOptions, Provider, Result, WeightBackend};

use crate::backend::CudaBackend;
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
}

#[cfg(test)]
mod tests {
    use hoist_backend::Error;

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
