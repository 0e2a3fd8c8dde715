//! The paved path to Hoist: every crate that a program needs, under one name each.
//!
//! ```text
//! file ──formats──▶ Manifest ──model──▶ roles ──orchestrator──▶ LoadPlan ──▶ a backend, loaded and verified
//! ```
//!
//! Backends are crates of their own and are never re-exported here: a program chooses which to link.
#![forbid(unsafe_code)]

pub use hoist_backend as backend;
pub use hoist_formats as formats;
pub use hoist_model as model;
pub use hoist_orchestrator as orchestrator;
pub use hoist_quant as quant;
pub use hoist_text as text;
