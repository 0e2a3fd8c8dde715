//! The numerics contract, computed slowly and plainly.
//!
//! Section numbers are those of `docs/numerics.md`. Every function computes what its section says, one rounding at a
//! time; nothing here is fast and nothing is shared with a backend. [`Interpreter`] runs a whole decode program.
//!
//! A NaN or infinity is [`hoist_backend::Error::NonFinite`] where the contract looks for it: in what Quantise and StoreKv are
//! given, in what a quantised product yields, and in the logits of a program. Every other operation goes on with it, by its formula.

mod activation;
mod arithmetic;
mod attention;
pub(crate) mod deviation;
mod elementary;
mod encoding;
mod float;
mod interpreter;
mod matmul;
mod norm;
mod router;
mod weight;

pub use activation::{QuantizedSegment, QuantizedVector, quantise};
pub use arithmetic::{f16_to_f32, f32_to_f16, integer_to_f32, times_power_of_two};
pub use attention::{AttentionSpec, KvCache, attention, rope};
pub use elementary::{activate, add, exp, mul, scale, soft_cap, tanh};
pub use float::{dot64, sum256, sum256_of_squares};
pub use interpreter::{Interpreter, Weight, Weights};
pub use matmul::{Matrix, matmul, matmul_quantized};
pub use norm::{layer_norm, rms_norm};
pub use router::{arg_max, router_top_k, weighted_sum};
pub use weight::{WeightPart, WeightRow, WeightSegment, embed_row, weight_row};

use hoist_backend::{Error, OpName, Result};

/// The finite-values rule: passes values on, or says which operation met a NaN or infinity.
fn finite(op: OpName, values: Vec<f32>) -> Result<Vec<f32>> {
    if values.iter().all(|v| v.is_finite()) {
        Ok(values)
    } else {
        Err(Error::NonFinite { op, layer: None })
    }
}

/// Demands equal lengths of operands.
fn same_length(what: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        Ok(())
    } else {
        Err(Error::invalid(format!("length of {what}"), expected, found))
    }
}
