use hoist_backend::{DeviceInfo, OpenOptions, Provider, Result, WeightBackend};

use crate::backend::WgpuBackend;
use crate::device;

/// Finds adapters of Vulkan, Metal and DX12.
#[derive(Clone, Copy, Debug, Default)]
pub struct WgpuProvider;

impl Provider for WgpuProvider {
    fn name(&self) -> &str {
        crate::NAME
    }

    fn devices(&self) -> Result<Vec<DeviceInfo>> {
        let adapters = device::adapters()?;
        Ok((0u32..)
            .zip(&adapters)
            .map(|(ordinal, adapter)| device::describe(ordinal, adapter))
            .collect())
    }

    fn open(&self, ordinal: u32, options: &OpenOptions) -> Result<Box<dyn WeightBackend>> {
        Ok(Box::new(WgpuBackend::open(ordinal, options)?))
    }
}
