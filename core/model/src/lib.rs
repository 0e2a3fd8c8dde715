//! What the tensors of a model mean.
//!
//! Names become roles in [`resolve`], by the conventions of each source format; an architecture says which roles it
//! requires and with which shapes; [`build_program`] writes its forward pass as data. No backend knows any of this.
#![forbid(unsafe_code)]

mod architecture;
mod error;
mod host;
mod hyper;
mod names;
mod program;
mod requirements;
mod resolve;
mod resolved;
mod rope;
mod views;

pub use architecture::{Architecture, Lineage};
pub use error::{Error, Result};
pub use hyper::{ExpertParameters, HyperParameters, LayerAttention, RopeParameters, RopeScaling};
pub use program::{build_program, dump, validate_program};
pub use resolve::resolve;
pub use resolved::{ResolvedModel, ResolvedWeight};
