//! Seeded random-weight models of real shapes: for benchmarks and tests, not for talking.
//!
//! The same shape, encoding and seed give the same bytes on every machine: each chunk of each tensor has a generator of its
//! own, and float arithmetic is single IEEE operations.
#![forbid(unsafe_code)]

mod blocks;
mod metadata;
mod mix;
mod rng;
mod shape;
mod tensors;
mod write;

pub use mix::Mix;
pub use shape::{Arch, Experts, ModelShape, SHAPES, shape};
pub use write::{Container, Error, Options, Summary, write, write_unless};
