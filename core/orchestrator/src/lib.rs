//! Drives a load from a model file to a backend that is ready to decode.
//!
//! [`plan`] is pure: a resolved model and what a backend wants become a [`LoadPlan`](hoist_backend::LoadPlan), with every
//! byte counted before anything is read. [`load`] executes a plan on any [`WeightBackend`](hoist_backend::WeightBackend),
//! all or nothing. [`FileSource`] is where the bytes come from, [`verify`] proves that what is resident is what the file
//! holds, and [`open`] does all of it in
//! order.
#![deny(unsafe_code)]

mod error;
mod load;
mod plan;
mod session;
mod source;
mod trace;
mod verify;

#[cfg(test)]
mod fake;

pub use error::{Error, Result};
pub use load::{LoadOptions, LoadReport, LoadTiming, WeightCounts, load};
pub use plan::{Fit, PlanError, fits, importable_bytes, is_importable, plan, plan_for, plan_outlined};
pub use session::{DecodeOptions, LoadedModel, OpenedModel, SessionOptions, SessionTiming, open};
pub use source::FileSource;
pub use trace::{Statistics, WeightTrace, trace_weight};
pub use verify::{Verification, verify};
