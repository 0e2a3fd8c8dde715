//! What judges a backend.
//!
//! The [`oracle`] computes every operation as `docs/numerics.md` writes it, in exact integers and single f32 roundings,
//! and shares no code with any backend nor with `hoist-quant`. The [`golden`] vectors come from a second program, in
//! Python with exact rationals, written from the same page.
//!
//! The suite is a list of [`Case`]s with stable ids ([`suites::all`]). The [`runner`] chooses some of them, runs each
//! group in a child process with a time limit, and judges outcomes by [`profile`]s and [`expectation`]s; [`report`]
//! writes what was found. A case opens the backend under test through a [`Target`], which the program provides: this
//! crate depends on no backend and on no host of plugins.
#![deny(unsafe_code)]

pub mod audit;
pub mod case;
pub mod context;
pub mod expectation;
pub mod fixture;
pub mod golden;
pub mod guard;
pub mod judge;
mod mutation;
pub mod operands;
pub mod oracle;
pub mod outcome;
pub mod pattern;
pub mod profile;
pub mod report;
pub mod runner;
pub mod suites;
pub mod worker;

pub use case::{Case, Need};
pub use context::{Context, PluginFacts, Target};
pub use outcome::{Expect, Failure, Outcome, Stop, Verdict};

/// The suite's version: a claim of conformance names it. It changes whenever a case is added, removed or judged otherwise.
pub const SUITE_VERSION: &str = "1.0";
