//! The CPU backend: Hoist's reference for the numerics contract, and a fast one.
//!
//! Weights lie in one arena, or in the mappings of their files ([`hoist_backend::OpenOptions::import`]); decode programs
//! are interpreted over them. Linux on x86-64 is what is tested; other processors run the portable code.

mod backend;
mod cache;
mod contention;
mod decode;
mod elementary;
mod finite;
mod kernels;
mod load;
mod memory;
mod ops;
mod pool;
mod program;
mod provider;
mod residency;
mod simd;
mod transpose;
mod view;
mod workspace;

pub use backend::CpuBackend;
pub use elementary::{exp, tanh};
pub use provider::CpuProvider;
pub use view::FloatView;

/// The backend's name, and its one device's id.
pub const NAME: &str = "cpu";
