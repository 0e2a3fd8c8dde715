//! The CUDA backend: weights resident at the speed of the link, on cudarc's bindings of the driver.
//!
//! Only the driver is needed at run time, and nothing at all to build: the kernels are committed as PTX and as machine
//! code for compute capability 9.0, made from `kernels/*.cu` by `scripts/kernels.py`.
//!
//! | module | what it knows |
//! |---|---|
//! | `driver` | the driver's calls as typed values: context, streams, events, memory, errors |
//! | `modules` | the embedded kernels, and how they are launched |
//! | `shared` | what the backends of a process share: contexts, kernels, and what loads leave for the next one |
//! | `residency` | where each weight lies on the device |
//! | `layout` | private layouts: made when a weight has arrived, undone when it is read |
//! | `tables` | what kernels read: mirrors of the structs in `kernels/*.cu` |
//! | `load` | how bytes get from files to the device |
//! | `decode` | programs as kernels over the resident weights |
//! | `digest` | BLAKE3 where the bytes are |
//! | `backend`, `provider` | the contract |

mod backend;
mod decode;
mod digest;
mod driver;
mod layout;
mod load;
pub mod measure;
mod modules;
mod provider;
mod residency;
mod shared;
mod tables;

pub use backend::CudaBackend;
pub use provider::CudaProvider;
pub use shared::release_unused;

/// The backend's name.
pub const NAME: &str = "cuda";
