//! What is kept beside the rows of a quantised matrix: exponents, so that kernels need not look for the largest.
//!
//! Beside each row stand `E_w` as an i16, then for each segment `E_w − e` and `E_w − e'` as u8. No encoding's exponents lie
//! further apart than a u8 can say (MXFP4's: 254).

use hoist_backend::Encoding;
use hoist_quant::SegmentView;

use super::activations::{SEGMENT, segments};

/// Bytes kept beside each row, for every quantised encoding.
pub(crate) const SIDE_ROW_BYTES: usize = 2;

/// Bytes kept beside each segment of a row, for every quantised encoding.
pub(crate) const SIDE_SEGMENT_BYTES: usize = 2;

/// Bytes kept beside a row of `cols` weights.
pub(crate) const fn side_row_bytes(cols: usize) -> usize {
    SIDE_ROW_BYTES + segments(cols) * SIDE_SEGMENT_BYTES
}

/// Computes what is kept beside whole rows of canonical bytes, without the matrix's prefix. `rows` and `side` hold equally
/// many rows.
///
/// # Errors
/// What [`hoist_quant`] says of the rows: an encoding or dimension that the contract does not multiply, or a scale that is
/// NaN or infinite, with its offset in `rows`.
pub(crate) fn prepare_side(
    encoding: Encoding,
    cols: usize,
    rows: &[u8],
    side: &mut [u8],
) -> Result<(), hoist_quant::Error> {
    hoist_quant::check_input_dimension(encoding, cols as u64)?;
    let row_bytes = row_bytes(encoding, cols);
    let beside = side_row_bytes(cols);
    assert_eq!(rows.len() / row_bytes, side.len() / beside);
    for (i, (row, side)) in rows
        .chunks_exact(row_bytes)
        .zip(side.chunks_exact_mut(beside))
        .enumerate()
    {
        let described = match Scales::of(encoding) {
            Some(scales) => scales.prepare(encoding, row, side),
            None => false,
        };
        if !described {
            prepare_row(encoding, row, side).map_err(|e| offset_by(e, (i * row_bytes) as u64))?;
        }
    }
    Ok(())
}

/// Any encoding, by its integers.
fn prepare_row(encoding: Encoding, row: &[u8], side: &mut [u8]) -> Result<(), hoist_quant::Error> {
    let mut view = SegmentView::default();
    let largest = hoist_quant::row_exponent(encoding, row)?;
    let (first, rest) = side.split_at_mut(SIDE_ROW_BYTES);
    first.copy_from_slice(&largest.to_le_bytes());
    for (segment, out) in rest.chunks_exact_mut(SIDE_SEGMENT_BYTES).enumerate() {
        hoist_quant::read_segment(encoding, row, segment, &mut view)?;
        out[0] = below(largest, view.e);
        out[1] = below(largest, view.e_min);
    }
    Ok(())
}

/// Where an encoding's blocks have their scales: the same exponents, read without the weights.
struct Scales {
    kind: Kind,
    /// Offset of the scale in a block.
    scale: usize,
    /// Offset of the min, or of the scale again where there is none.
    min: usize,
    /// Exponent of the smallest numbers.
    smallest: i16,
}

#[derive(Clone, Copy)]
enum Kind {
    /// The exponent field of an f16; 31 is not finite.
    F16,
    /// MXFP4's byte; 255 is refused.
    E8M0,
    /// NVFP4's four bytes.
    Ue4m3,
}

impl Scales {
    fn of(encoding: Encoding) -> Option<Self> {
        let (scale, min) = match encoding {
            Encoding::Q4_0 | Encoding::Q5_0 | Encoding::Q8_0 | Encoding::IQ4_NL | Encoding::APR_Q4 => (0, 0),
            Encoding::Q1_0 | Encoding::Q2_0 | Encoding::MXFP4 | Encoding::NVFP4 => (0, 0),
            Encoding::IQ4_XS | Encoding::IQ3_S | Encoding::IQ3_XXS | Encoding::IQ1_S => (0, 0),
            Encoding::IQ2_XXS | Encoding::IQ2_XS | Encoding::IQ2_S => (0, 0),
            Encoding::Q4_1 | Encoding::Q5_1 | Encoding::Q4_K | Encoding::Q5_K => (0, 2),
            Encoding::Q2_K => (80, 82),
            Encoding::Q3_K => (108, 108),
            Encoding::Q6_K => (208, 208),
            Encoding::TQ1_0 => (52, 52),
            Encoding::TQ2_0 => (64, 64),
            _ => return None,
        };
        let (kind, smallest) = match encoding {
            Encoding::MXFP4 => (Kind::E8M0, -128),
            Encoding::NVFP4 => (Kind::Ue4m3, -11),
            _ => (Kind::F16, -25),
        };
        // Scales of their own are aligned to the segment's largest, with room for 8 bits below it; those of super-blocks are
        // not, but have the powers of two that make their sub-scales integers.
        let below = match encoding {
            Encoding::TQ1_0 | Encoding::TQ2_0 => 8,
            Encoding::IQ3_XXS => 2,
            Encoding::IQ2_XXS | Encoding::IQ2_XS | Encoding::IQ2_S | Encoding::IQ1_S => 3,
            _ if encoding.block_weights() < SEGMENT as u64 => 8,
            _ => 0,
        };
        Some(Self {
            kind,
            scale,
            min,
            smallest: smallest - below,
        })
    }

    /// Whether all scales are finite; if not, `side` is unspecified.
    fn prepare(&self, encoding: Encoding, row: &[u8], side: &mut [u8]) -> bool {
        // A loop for each kind, in which nothing is decided any more.
        match self.kind {
            Kind::F16 => self.prepare_kind(encoding, row, side, 31, |bytes, at| {
                // Subnormals have the exponent of the smallest normal numbers.
                (u16::from_le_bytes([bytes[at], bytes[at + 1]]) >> 10 & 31).max(1)
            }),
            Kind::E8M0 => self.prepare_kind(encoding, row, side, 255, |bytes, at| bytes[at].into()),
            Kind::Ue4m3 => self.prepare_kind(encoding, row, side, u16::MAX, |bytes, _| {
                let field = |s: usize| u16::from(bytes[s] >> 3 & 15);
                field(0).max(field(1)).max(field(2)).max(field(3)).max(1)
            }),
        }
    }

    #[inline(always)]
    fn prepare_kind(
        &self,
        encoding: Encoding,
        row: &[u8],
        side: &mut [u8],
        not_finite: u16,
        exponent: impl Fn(&[u8], usize) -> u16,
    ) -> bool {
        let block = encoding.block_bytes() as usize;
        let per_segment = SEGMENT / encoding.block_weights() as usize;
        let (first, rest) = side.split_at_mut(SIDE_ROW_BYTES);
        let (mut largest, mut invalid) = (0, false);
        for (blocks, out) in row
            .chunks(per_segment * block)
            .zip(rest.chunks_exact_mut(SIDE_SEGMENT_BYTES))
        {
            let (mut scale, mut min) = (0, 0);
            for block in blocks.chunks_exact(block) {
                scale = exponent(block, self.scale).max(scale);
                min = exponent(block, self.min).max(min);
            }
            invalid |= scale == not_finite || min == not_finite;
            largest = largest.max(scale).max(min);
            out.copy_from_slice(&[scale as u8, min as u8]);
        }
        for exponent in rest {
            *exponent = largest as u8 - *exponent;
        }
        first.copy_from_slice(&(largest as i16 + self.smallest).to_le_bytes());
        !invalid
    }
}

/// `E_w − e`; a segment's exponents are at most their row's.
fn below(largest: i16, e: i16) -> u8 {
    (largest - e).clamp(0, 255) as u8
}

/// Moves the offset that an error speaks of.
fn offset_by(error: hoist_quant::Error, by: u64) -> hoist_quant::Error {
    match error {
        hoist_quant::Error::NonFinite { encoding, offset } => hoist_quant::Error::NonFinite {
            encoding,
            offset: offset + by,
        },
        other => other,
    }
}

/// Canonical bytes of a row, for dimensions that the contract multiplies.
pub(super) fn row_bytes(encoding: Encoding, cols: usize) -> usize {
    cols / encoding.block_weights() as usize * encoding.block_bytes() as usize
}
