//! What kernels read: mirrors of the structs in `kernels/residency.cu` and `kernels/blake3.cu`.

use bytemuck::{Pod, Zeroable};
use hoist_backend::Encoding;

/// Bytes of a contiguous piece that one block of threads moves; `BLOCK_BYTES` in the kernel.
const BLOCK_BYTES: u64 = 1 << 16;
/// Units of any other piece that one block of threads moves; `BLOCK_UNITS` in the kernel.
const BLOCK_UNITS: u64 = 1 << 14;
/// Bytes of a float weight that one block of threads checks; `ITEM_BYTES` in the kernel.
pub(crate) const ITEM_BYTES: u64 = 1 << 18;
/// Bytes of a BLAKE3 chunk.
pub(crate) const CHUNK_BYTES: u64 = 1024;
/// Bytes of a subtree that one block of threads hashes: 256 chunks.
pub(crate) const SUBTREE_BYTES: u64 = 256 * CHUNK_BYTES;

/// What a [`Piece`]'s units are and become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum PieceKind {
    /// `cols` contiguous bytes.
    Bytes = 0,
    /// Units of two bytes.
    Unit2 = 1,
    /// Units of four bytes.
    Unit4 = 2,
    /// f16 to f32.
    WidenF16 = 3,
    /// bf16 to f32.
    WidenBf16 = 4,
}

/// Added to a kind whose results are f32: one is added to each.
pub(crate) const ADD_ONE: u32 = 0x100;

/// Bytes that go from a chunk of a file, as it lies in the file, to where a weight lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Piece {
    /// From the source's base.
    pub(crate) from: u64,
    pub(crate) from_row: u64,
    pub(crate) from_col: u64,
    /// Device address.
    pub(crate) to: u64,
    pub(crate) to_row: u64,
    pub(crate) to_col: u64,
    pub(crate) rows: u32,
    pub(crate) cols: u32,
    pub(crate) kind: u32,
    pub(crate) pad: u32,
}

impl Piece {
    /// Contiguous bytes.
    pub(crate) fn bytes(from: u64, to: u64, nbytes: u32) -> Self {
        Self {
            from,
            from_row: 0,
            from_col: 0,
            to,
            to_row: 0,
            to_col: 0,
            rows: 1,
            cols: nbytes,
            kind: PieceKind::Bytes as u32,
            pad: 0,
        }
    }

    /// Blocks of threads it takes.
    pub(crate) fn blocks(&self) -> u32 {
        let blocks = if self.kind == PieceKind::Bytes as u32 {
            u64::from(self.cols).div_ceil(BLOCK_BYTES)
        } else {
            (u64::from(self.rows) * u64::from(self.cols)).div_ceil(BLOCK_UNITS)
        };
        u32::try_from(blocks).unwrap_or(u32::MAX)
    }
}

/// A weight that has arrived, for `finish_weights`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Weight {
    pub(crate) ptr: u64,
    pub(crate) nbytes: u64,
    /// Where its row exponents go; 0 if it has none.
    pub(crate) exponents: u64,
    /// Rows of all matrices.
    pub(crate) rows: u64,
    pub(crate) rows_per_matrix: u64,
    pub(crate) row_bytes: u64,
    pub(crate) rows_per_item: u32,
    pub(crate) block_bytes: u32,
    /// Bytes in front of each matrix.
    pub(crate) prefix: u32,
    pub(crate) scales: u32,
    pub(crate) at: u32,
    pub(crate) at2: u32,
    pub(crate) shift: i32,
    pub(crate) pad: u32,
}

/// What one block of threads finishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Item {
    pub(crate) weight: u32,
    pub(crate) part: u32,
}

/// At most [`SUBTREE_BYTES`] of a BLAKE3 input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Subtree {
    pub(crate) ptr: u64,
    /// Number of its first chunk.
    pub(crate) counter: u64,
    pub(crate) nbytes: u32,
    /// 1 if it is the whole input.
    pub(crate) whole: u32,
}

/// Nodes that one block of threads merges.
pub(crate) const GROUP_NODES: usize = 256;

/// Neighbouring nodes of one BLAKE3 tree, at most [`GROUP_NODES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Group {
    pub(crate) first: u32,
    pub(crate) count: u32,
    /// 1 if they are all of the tree's.
    pub(crate) whole: u32,
    pub(crate) pad: u32,
}

/// Where an encoding's exponents are: `enum Scales` in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Scales {
    F16 = 0,
    TwoF16 = 1,
    Mxfp4 = 2,
    Nvfp4 = 3,
    Iq1M = 4,
    AprQ8 = 5,
    Float4 = 6,
    FloatF16 = 7,
    FloatBf16 = 8,
}

/// Where exponents stand in an encoding's blocks, and what is added to the largest one of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ScaleRule {
    pub(crate) scales: Scales,
    pub(crate) at: u32,
    pub(crate) at2: u32,
    pub(crate) shift: i32,
}

/// The rule of an encoding (docs/numerics.md §1.2; offsets are those of ggml's `block_*` structs); `None` if it is no
/// weight's.
pub(crate) fn scale_rule(encoding: Encoding) -> Option<ScaleRule> {
    use Encoding as E;
    /// Scales of the encodings with a scale for each block are aligned with 8 bits of room below the largest.
    const ALIGNED: i32 = -8;
    let one = |at, shift| (Scales::F16, at, 0, shift);
    let (scales, at, at2, shift) = match encoding {
        E::F32 => (Scales::Float4, 0, 0, 0),
        E::F16 => (Scales::FloatF16, 0, 0, 0),
        E::BF16 => (Scales::FloatBf16, 0, 0, 0),
        E::Q4_0 | E::Q5_0 | E::Q8_0 | E::IQ4_NL | E::Q1_0 | E::Q2_0 | E::APR_Q4 => one(0, ALIGNED),
        E::Q4_1 | E::Q5_1 => (Scales::TwoF16, 0, 2, ALIGNED),
        E::MXFP4 => (Scales::Mxfp4, 0, 0, ALIGNED),
        E::NVFP4 => (Scales::Nvfp4, 0, 0, ALIGNED),
        E::Q2_K => (Scales::TwoF16, 80, 82, 0),
        E::Q3_K => one(108, 0),
        E::Q4_K | E::Q5_K => (Scales::TwoF16, 0, 2, 0),
        E::Q6_K => one(208, 0),
        E::IQ4_XS | E::IQ3_S => one(0, 0),
        E::IQ3_XXS => one(0, -2),
        E::IQ2_XXS | E::IQ2_XS | E::IQ2_S | E::IQ1_S => one(0, -3),
        E::IQ1_M => (Scales::Iq1M, 48, 0, -3),
        E::TQ1_0 => one(52, -8),
        E::TQ2_0 => one(64, -8),
        E::APR_Q8 => (Scales::AprQ8, 0, 0, 0),
        _ => return None,
    };
    Some(ScaleRule {
        scales,
        at,
        at2,
        shift,
    })
}

#[cfg(test)]
mod tests {
    use hoist_backend::EncodingSet;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_the_kernels() {
        assert_eq!(size_of::<Piece>(), 64);
        assert_eq!(size_of::<Weight>(), 80);
        assert_eq!(size_of::<Item>(), 8);
        assert_eq!(size_of::<Subtree>(), 24);
        assert_eq!(size_of::<Group>(), 16);
    }

    #[test]
    fn every_weight_encoding_has_a_rule_within_its_block() {
        for encoding in EncodingSet::weights().iter() {
            let rule = scale_rule(encoding).unwrap();
            let last = u64::from(rule.at.max(rule.at2));
            assert!(last < encoding.block_bytes(), "{encoding}");
        }
        assert_eq!(scale_rule(Encoding::Q8_K), None);
    }

    /// What the kernel computes, on the host.
    fn exponent(rule: ScaleRule, block_bytes: usize, row: &[u8]) -> i32 {
        let f16 = |block: &[u8], at: u32| {
            let bits = u16::from_le_bytes([block[at as usize], block[at as usize + 1]]);
            i32::from(bits >> 10 & 31).max(1) - 25
        };
        let of = |block: &[u8]| match rule.scales {
            Scales::F16 => f16(block, rule.at),
            Scales::TwoF16 => f16(block, rule.at).max(f16(block, rule.at2)),
            Scales::Mxfp4 => i32::from(block[0]) - 128,
            Scales::Nvfp4 => (0..4)
                .map(|i| i32::from(block[i] >> 3 & 15).max(1) - 11)
                .max()
                .unwrap(),
            Scales::Iq1M => {
                let d = (0..4).fold(0, |d, i| {
                    d | u16::from(block[rule.at as usize + 2 * i + 1] >> 4) << (4 * i)
                });
                i32::from(d >> 10 & 31).max(1) - 25
            }
            _ => -rule.shift,
        };
        row.chunks_exact(block_bytes).map(of).max().unwrap() + rule.shift
    }

    proptest! {
        #[test]
        fn the_rules_yield_the_row_exponents_of_the_reference(
            which in 0usize..64,
            blocks in 1usize..5,
            seed in prop::collection::vec(any::<u8>(), 5 * 256),
        ) {
            let quantized: Vec<_> = EncodingSet::weights().iter().filter(|e| e.is_quantized()).collect();
            let encoding = quantized[which % quantized.len()];
            let block = encoding.block_bytes() as usize;
            // Whole blocks, and a multiple of 32 weights.
            let blocks = if encoding == Encoding::APR_Q8 { 32 * blocks } else { blocks };
            let row: Vec<u8> = seed.iter().copied().cycle().take(blocks * block).collect();
            if let Ok(expected) = hoist_quant::row_exponent(encoding, &row) {
                let rule = scale_rule(encoding).unwrap();
                prop_assert_eq!(exponent(rule, block, &row), i32::from(expected), "{}", encoding);
            }
        }
    }
}
