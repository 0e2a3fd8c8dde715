//! Block encodings: exact decode to f32, and the integers that the numerics contract computes with.
//!
//! | call | what it does |
//! |---|---|
//! | [`dequantize`] | whole blocks to f32, as GGML computes them, bit for bit |
//! | [`dequantize_matrix`] | a whole weight, `[matrices, rows, cols]`, to f32 |
//! | [`dequantize_row`] | one row of a matrix to f32, without allocating: embedding rows |
//! | [`read_segment`] | 256 weights of a row as integers: a [`SegmentView`] |
//! | [`row_exponent`] | `E_w`, the exponent kept beside each row |
//! | [`matrix_scale`] | the one multiplier of an AprQ8 matrix |
//! | [`check_input_dimension`] | whether the contract multiplies with so many columns |
//! | [`check_finite`], [`check_finite_weight`] | where the first NaN or infinity is; reads scales only |
//!
//! Sizes of blocks are [`hoist_backend::Encoding`]'s. Every encoding whose kind is `Float`, `Quantized` or `Activation`
//! decodes; those whose kind is `Quantized` have an integer view.
//!
//! # Prefix
//!
//! [`hoist_backend::Encoding::APR_Q8`] has one f32 scale in front of each matrix. Calls that take a *matrix*, or its
//! *bytes*, expect it in front; calls that take a *row* expect the row's codes alone.
//!
//! # How an encoding is described
//!
//! Once, by two traits (`codec.rs`): where its scales are, and which integer code each weight has. The decode to f32 and
//! the integer view are both read from that description, so that they cannot disagree about a code. Families are in files
//! of their own: `legacy`, `k_quants`, `i_quants`, `ternary`, `fp4`, `apr`; `float` and `activation` are decoded directly.
//!
//! # Example
//!
//! ```
//! use hoist_backend::Encoding;
//! use hoist_quant::{SegmentView, dequantize, read_segment, row_exponent};
//!
//! // One Q8_0 block: scale 0.5, codes 0, 1, … 31.
//! let mut row = vec![0x00, 0x38];
//! row.extend(0..32u8);
//! let mut values = [0.0; 32];
//! dequantize(Encoding::Q8_0, &row, &mut values)?;
//! assert_eq!(values[3], 1.5);
//!
//! let mut view = SegmentView::default();
//! read_segment(Encoding::Q8_0, &row, 0, &mut view)?;
//! assert_eq!((view.len, view.weights[3]), (32, 3));
//! assert_eq!(view.value(3), 1.5);
//! assert_eq!(row_exponent(Encoding::Q8_0, &row)?, view.e);
//! # Ok::<(), hoist_quant::Error>(())
//! ```
#![forbid(unsafe_code)]

mod activation;
mod apr;
mod codec;
mod dequantize;
mod error;
mod finite;
mod float;
mod fp4;
mod i_quants;
pub mod iq_grids;
mod k_quants;
mod legacy;
mod scale;
mod segment;
mod ternary;

pub use dequantize::{dequantize, dequantize_matrix, dequantize_row};
pub use error::{Error, Result};
pub use finite::{check_finite, check_finite_weight};
pub use segment::{
    MAX_COLS, SEGMENT_WEIGHTS, SegmentView, check_input_dimension, matrix_scale, read_segment, row_exponent,
    segments,
};
