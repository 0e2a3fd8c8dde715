//! Which encoding each tensor gets.

use hoist_backend::Encoding;

use crate::shape::ModelShape;
use crate::tensors::{Part, Tensor};

/// An assignment of encodings to tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// llama.cpp's `Q4_K_M`: Q4_K, with Q6_K for the output matrix and for attn_v and ffn_down of some layers.
    Q4KM,
    /// Every matrix in one encoding.
    All(Encoding),
}

impl Mix {
    /// `q4_k_m`, or the name of an encoding.
    pub fn from_name(name: &str) -> Option<Self> {
        if name.eq_ignore_ascii_case("q4_k_m") {
            return Some(Mix::Q4KM);
        }
        let encoding = Encoding::from_name(name)?;
        let written = encoding.ggml_id().is_some() && (encoding.is_float() || encoding.is_quantized());
        written.then_some(Mix::All(encoding))
    }

    pub(crate) fn encoding(self, shape: &ModelShape, t: &Tensor) -> Encoding {
        if t.is_vector() || matches!(t.part, Part::Router | Part::PositionEmbd) {
            return Encoding::F32;
        }
        let wanted = match self {
            Mix::All(encoding) => encoding,
            Mix::Q4KM => q4_k_m(shape, t),
        };
        fall_back(wanted, t.cols)
    }
}

fn q4_k_m(shape: &ModelShape, t: &Tensor) -> Encoding {
    match t.part {
        Part::Output => Encoding::Q6_K,
        Part::TokenEmbd if shape.tied => Encoding::Q6_K,
        Part::AttnV | Part::FfnDown | Part::FfnDownExps
            if uses_more_bits(t.layer.unwrap_or(0), shape.layers) =>
        {
            Encoding::Q6_K
        }
        // llama.cpp gives a fused qkv five bits.
        Part::AttnQkv => Encoding::Q5_K,
        _ => Encoding::Q4_K,
    }
}

/// llama.cpp's choice of layers: the first and last eighth, and every third between.
fn uses_more_bits(layer: u32, layers: u32) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// llama.cpp's substitute for a row that is no multiple of the block.
fn fall_back(encoding: Encoding, cols: u32) -> Encoding {
    use Encoding as E;
    if u64::from(cols) % encoding.block_weights() == 0 {
        return encoding;
    }
    let substitute = match encoding {
        E::Q4_K => E::Q5_0,
        E::Q5_K => E::Q5_1,
        E::Q6_K => E::Q8_0,
        E::Q2_K | E::Q3_K | E::TQ1_0 | E::TQ2_0 => E::Q4_0,
        _ => E::IQ4_NL,
    };
    if u64::from(cols) % substitute.block_weights() == 0 {
        substitute
    } else {
        E::F16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_split_a_block_get_llama_cpps_substitute() {
        assert_eq!(fall_back(Encoding::Q4_K, 640), Encoding::Q5_0);
        assert_eq!(fall_back(Encoding::Q6_K, 640), Encoding::Q8_0);
        assert_eq!(fall_back(Encoding::Q4_K, 1024), Encoding::Q4_K);
        assert_eq!(fall_back(Encoding::Q4_0, 100), Encoding::F16);
    }

    #[test]
    fn sixteen_of_thirty_two_layers_get_more_bits() {
        assert_eq!((0..32).filter(|l| uses_more_bits(*l, 32)).count(), 16);
    }
}
