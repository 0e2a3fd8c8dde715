//! Forward passes as data.

mod builder;
mod dump;
mod gpt2;
mod transformer;
mod validate;

use hoist_backend::DecodeProgram;

pub use dump::dump;
pub use validate::validate_program;

use crate::{Architecture, Error, ResolvedModel, Result};

/// Most positions of a program: what tables and caches are sized by stays within what 32-bit shaders can index.
const MAX_CONTEXT: u32 = 1 << 20;

/// Writes a model's forward pass for sequences of up to `max_context` positions.
///
/// Which operations quantise activations depends on the encodings in `model`; long-rope factors are chosen by
/// `max_context`, never by position. The result has passed [`validate_program`].
///
/// # Errors
/// [`Error::ContextOutOfRange`] for 0, for more than 2^20 positions, or for more than the learned ones;
/// [`Error::TooLarge`], [`Error::QuantizedColumns`] for dimensions that a program cannot hold.
pub fn build_program(model: &ResolvedModel, max_context: u32) -> Result<DecodeProgram> {
    let limit = model
        .hyper
        .learned_positions
        .unwrap_or(MAX_CONTEXT)
        .min(MAX_CONTEXT);
    if max_context == 0 || max_context > limit {
        return Err(Error::ContextOutOfRange {
            asked: max_context,
            limit,
            architecture: model.architecture,
        });
    }
    let program = match model.kind {
        Architecture::Gpt2 => gpt2::build(model, max_context)?,
        Architecture::Llama
        | Architecture::Mistral
        | Architecture::Qwen2
        | Architecture::Qwen3
        | Architecture::Qwen3Moe
        | Architecture::Gemma2
        | Architecture::Gemma3
        | Architecture::Phi3 => transformer::build(model, max_context)?,
    };
    validate_program(&program, model)?;
    Ok(program)
}
