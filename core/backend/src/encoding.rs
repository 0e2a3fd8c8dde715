use crate::{Error, Result, Shape};

/// How a tensor's values are stored.
///
/// Ids, block sizes and byte sizes of the first group are GGML's (`ggml_type`, as written in GGUF files); `APR_*` are
/// APR v2's own. Variant names are the formats' own spelling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(
    non_camel_case_types,
    reason = "variants are spelled as GGML and APR spell them"
)]
#[non_exhaustive]
#[repr(u8)]
#[allow(
    missing_docs,
    reason = "each variant is the encoding of that name; the table below is its documentation"
)]
pub enum Encoding {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_K,
    IQ2_XXS,
    IQ2_XS,
    IQ3_XXS,
    IQ1_S,
    IQ4_NL,
    IQ3_S,
    IQ2_S,
    IQ4_XS,
    IQ1_M,
    TQ1_0,
    TQ2_0,
    MXFP4,
    NVFP4,
    Q1_0,
    Q2_0,
    APR_Q4,
    APR_Q8,
    F64,
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Bool,
}

/// What an encoding can be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EncodingKind {
    /// F32, F16, BF16: matrices, norm vectors and biases.
    Float,
    /// A weight quantisation: matrices only.
    Quantized,
    /// Q8_1 and Q8_K, GGML's formats for activations: never accepted as weights.
    Activation,
    /// F64 and the integers: carried by files for other purposes, never accepted as weights.
    Other,
}

struct Facts {
    encoding: Encoding,
    name: &'static str,
    /// `ggml_type` in GGUF files; `None` for APR's own encodings and for types that only SafeTensors and APR have.
    ggml_id: Option<u32>,
    /// Weights a block, bytes a block.
    block: (u64, u64),
    kind: EncodingKind,
}

macro_rules! facts {
    ($($v:ident $name:literal $id:expr, $w:literal $b:literal $kind:ident;)*) => {
        &[$(Facts { encoding: Encoding::$v, name: $name, ggml_id: $id, block: ($w, $b), kind: EncodingKind::$kind }),*]
    };
}

/// In the order of the enum, which a test checks. Source: `ggml_type` and the `block_*` structs of ggml (0.26).
const FACTS: &[Facts] = facts! {
    F32 "f32" Some(0), 1 4 Float;
    F16 "f16" Some(1), 1 2 Float;
    BF16 "bf16" Some(30), 1 2 Float;
    Q4_0 "q4_0" Some(2), 32 18 Quantized;
    Q4_1 "q4_1" Some(3), 32 20 Quantized;
    Q5_0 "q5_0" Some(6), 32 22 Quantized;
    Q5_1 "q5_1" Some(7), 32 24 Quantized;
    Q8_0 "q8_0" Some(8), 32 34 Quantized;
    Q8_1 "q8_1" Some(9), 32 36 Activation;
    Q2_K "q2_k" Some(10), 256 84 Quantized;
    Q3_K "q3_k" Some(11), 256 110 Quantized;
    Q4_K "q4_k" Some(12), 256 144 Quantized;
    Q5_K "q5_k" Some(13), 256 176 Quantized;
    Q6_K "q6_k" Some(14), 256 210 Quantized;
    Q8_K "q8_k" Some(15), 256 292 Activation;
    IQ2_XXS "iq2_xxs" Some(16), 256 66 Quantized;
    IQ2_XS "iq2_xs" Some(17), 256 74 Quantized;
    IQ3_XXS "iq3_xxs" Some(18), 256 98 Quantized;
    IQ1_S "iq1_s" Some(19), 256 50 Quantized;
    IQ4_NL "iq4_nl" Some(20), 32 18 Quantized;
    IQ3_S "iq3_s" Some(21), 256 110 Quantized;
    IQ2_S "iq2_s" Some(22), 256 82 Quantized;
    IQ4_XS "iq4_xs" Some(23), 256 136 Quantized;
    IQ1_M "iq1_m" Some(29), 256 56 Quantized;
    TQ1_0 "tq1_0" Some(34), 256 54 Quantized;
    TQ2_0 "tq2_0" Some(35), 256 66 Quantized;
    MXFP4 "mxfp4" Some(39), 32 17 Quantized;
    NVFP4 "nvfp4" Some(40), 64 36 Quantized;
    Q1_0 "q1_0" Some(41), 128 18 Quantized;
    Q2_0 "q2_0" Some(42), 64 18 Quantized;
    APR_Q4 "apr_q4" None, 32 18 Quantized;
    APR_Q8 "apr_q8" None, 1 1 Quantized;
    F64 "f64" Some(28), 1 8 Other;
    I8 "i8" Some(24), 1 1 Other;
    I16 "i16" Some(25), 1 2 Other;
    I32 "i32" Some(26), 1 4 Other;
    I64 "i64" Some(27), 1 8 Other;
    U8 "u8" None, 1 1 Other;
    U16 "u16" None, 1 2 Other;
    U32 "u32" None, 1 4 Other;
    U64 "u64" None, 1 8 Other;
    Bool "bool" None, 1 1 Other;
};

/// `ggml_type` ids that once had a meaning and were removed from GGML: 4, 5 (Q4_2, Q4_3), 31–33 (Q4_0_4_4 and kin),
/// 36–38 (IQ4_NL_4_4 and kin).
const REMOVED_GGML_IDS: &[u32] = &[4, 5, 31, 32, 33, 36, 37, 38];

impl Encoding {
    /// Every encoding, in a fixed order.
    pub fn all() -> impl ExactSizeIterator<Item = Encoding> + Clone {
        FACTS.iter().map(|f| f.encoding)
    }

    fn facts(self) -> &'static Facts {
        &FACTS[self as usize]
    }

    /// A dense index below 64, for bit sets and tables.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The lower-case name used on the command line and in reports, such as `q4_k`.
    pub fn name(self) -> &'static str {
        self.facts().name
    }

    /// The encoding of that [`name`](Self::name), in any case.
    pub fn from_name(name: &str) -> Option<Self> {
        FACTS
            .iter()
            .find(|f| f.name.eq_ignore_ascii_case(name))
            .map(|f| f.encoding)
    }

    /// The `ggml_type` id in GGUF files; `None` for APR's own encodings.
    pub fn ggml_id(self) -> Option<u32> {
        self.facts().ggml_id
    }

    /// The encoding of that `ggml_type` id.
    pub fn from_ggml_id(id: u32) -> Option<Self> {
        FACTS.iter().find(|f| f.ggml_id == Some(id)).map(|f| f.encoding)
    }

    /// Whether GGML once gave this id a meaning and then removed it.
    pub fn is_removed_ggml_id(id: u32) -> bool {
        REMOVED_GGML_IDS.contains(&id)
    }

    /// What it can be used for.
    pub fn kind(self) -> EncodingKind {
        self.facts().kind
    }

    /// Whether weights of this encoding are uploaded as quantised blocks.
    pub fn is_quantized(self) -> bool {
        self.kind() == EncodingKind::Quantized
    }

    /// Whether this is F32, F16 or BF16.
    pub fn is_float(self) -> bool {
        self.kind() == EncodingKind::Float
    }

    /// Weights in a block; 1 for element-wise encodings.
    pub fn block_weights(self) -> u64 {
        self.facts().block.0
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> u64 {
        self.facts().block.1
    }

    /// Bytes in front of each matrix: 4 for [`Encoding::APR_Q8`] (the matrix's one f32 scale), otherwise 0.
    pub fn matrix_prefix_bytes(self) -> u64 {
        if self == Encoding::APR_Q8 { 4 } else { 0 }
    }

    /// Bytes of one row of `cols` weights.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `cols` is no multiple of the block, or the product overflows.
    pub fn row_bytes(self, cols: u64) -> Result<u64> {
        let (weights, bytes) = self.facts().block;
        if !cols.is_multiple_of(weights) {
            return Err(Error::InvalidArgument {
                what: format!("columns of a {self} matrix"),
                expected: format!("a multiple of {weights}"),
                found: cols.to_string(),
            });
        }
        (cols / weights)
            .checked_mul(bytes)
            .ok_or_else(|| Error::InvalidArgument {
                what: format!("columns of a {self} matrix"),
                expected: "a size below 2^64 bytes".into(),
                found: cols.to_string(),
            })
    }

    /// Canonical bytes of a weight of that shape: prefix and rows of each matrix, one after the other.
    ///
    /// # Errors
    /// As [`Encoding::row_bytes`].
    pub fn nbytes(self, shape: Shape) -> Result<u64> {
        let row = self.row_bytes(shape.cols)?;
        shape
            .rows
            .checked_mul(row)
            .and_then(|n| n.checked_add(self.matrix_prefix_bytes()))
            .and_then(|n| n.checked_mul(shape.matrices))
            .ok_or_else(|| Error::InvalidArgument {
                what: format!("shape of a {self} weight"),
                expected: "a size below 2^64 bytes".into(),
                found: shape.to_string(),
            })
    }
}

impl std::fmt::Display for Encoding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (i, f) in FACTS.iter().enumerate() {
            assert_eq!(f.encoding as usize, i, "{}", f.name);
        }
        assert!(FACTS.len() <= 64, "EncodingSet is a u64");
    }

    #[test]
    fn names_and_ids_are_unique_and_round_trip() {
        for e in Encoding::all() {
            assert_eq!(Encoding::from_name(e.name()), Some(e));
            if let Some(id) = e.ggml_id() {
                assert_eq!(Encoding::from_ggml_id(id), Some(e));
                assert!(!Encoding::is_removed_ggml_id(id));
            }
        }
    }

    #[test]
    fn a_row_that_splits_a_block_has_no_size() {
        assert_eq!(Encoding::Q4_K.row_bytes(512).unwrap(), 288);
        assert!(Encoding::Q4_K.row_bytes(480).is_err());
        assert!(Encoding::F32.row_bytes(u64::MAX).is_err());
    }
}
