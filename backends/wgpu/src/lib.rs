//! The portable backend: weights on any GPU with Vulkan, Metal or DX12, and on Mesa's CPU driver where there is none.
//!
//! Every kernel computes in integers, f32 operations included (`shaders/softfloat.wgsl`): WGSL leaves contraction,
//! subnormals and the rounding of divisions to drivers, and the numerics contract does not. So the backend is exact on
//! every adapter, and its speed in attention and norms is that of integer code.
//!
//! Weights lie on the device as their canonical bytes; kernels decode them as they multiply.

#[cfg(test)]
mod arithmetic_tests;
mod backend;
mod decode;
mod device;
mod fusion;
mod grids;
mod load;
mod panics;
mod pipelines;
mod program;
mod provider;
mod residency;
mod shaders;
mod workspace;

pub use backend::{AsIf, WgpuBackend};
pub use provider::WgpuProvider;

/// The backend's name; its devices are `wgpu:0` and so on.
pub const NAME: &str = "wgpu";
