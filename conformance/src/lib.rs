//! What judges a backend: an oracle for the numerics contract, and golden vectors that judge the oracle.
//!
//! The [`oracle`] computes every operation as `docs/numerics.md` writes it, in exact integers and single f32 roundings,
//! and shares no code with any backend nor with `hoist-quant`. The [`golden`] vectors come from a second program, in
//! Python with exact rationals, written from the same page.
#![forbid(unsafe_code)]

pub mod golden;
pub mod operands;
pub mod oracle;
