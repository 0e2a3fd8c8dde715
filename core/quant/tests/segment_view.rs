//! The integer view against the numerics contract and against the decode to f32, on random rows.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use half::f16;
use hoist_backend::Encoding;
use hoist_quant::{
    Error, SEGMENT_WEIGHTS, SegmentView, check_finite, check_input_dimension, dequantize, read_segment,
    row_exponent, segments,
};
use proptest::prelude::*;

/// Where an encoding keeps its f16 scale, its f16 mins if any, and how the contract shifts the scale's exponent. Written
/// from the contract and ggml's structs, not from the crate.
struct Facts {
    encoding: Encoding,
    scale: Site,
    min: Option<usize>,
    kind: Kind,
    halves: bool,
}

enum Site {
    F16(usize),
    /// IQ1_M: top nibbles of four u16.
    Spread,
    E8m0,
    /// Four scales.
    Ue4m3,
}

enum Kind {
    /// One `d` for 256 weights, with `e = e_d + shift`.
    Super { shift: i16 },
    /// Scales aligned to the segment's largest.
    Aligned,
}

fn facts() -> Vec<Facts> {
    use Encoding as E;
    use Kind::{Aligned, Super};
    use Site::{E8m0, F16, Spread, Ue4m3};
    let row = |encoding, scale, min, kind, halves| Facts {
        encoding,
        scale,
        min,
        kind,
        halves,
    };
    vec![
        row(E::Q4_0, F16(0), None, Aligned, false),
        row(E::Q4_1, F16(0), Some(2), Aligned, false),
        row(E::Q5_0, F16(0), None, Aligned, false),
        row(E::Q5_1, F16(0), Some(2), Aligned, false),
        row(E::Q8_0, F16(0), None, Aligned, false),
        row(E::Q2_K, F16(80), Some(82), Super { shift: 0 }, true),
        row(E::Q3_K, F16(108), None, Super { shift: 0 }, true),
        row(E::Q4_K, F16(0), Some(2), Super { shift: 0 }, false),
        row(E::Q5_K, F16(0), Some(2), Super { shift: 0 }, false),
        row(E::Q6_K, F16(208), None, Super { shift: 0 }, true),
        row(E::IQ2_XXS, F16(0), None, Super { shift: -3 }, false),
        row(E::IQ2_XS, F16(0), None, Super { shift: -3 }, true),
        row(E::IQ2_S, F16(0), None, Super { shift: -3 }, true),
        row(E::IQ3_XXS, F16(0), None, Super { shift: -2 }, false),
        row(E::IQ3_S, F16(0), None, Super { shift: 0 }, false),
        row(E::IQ1_S, F16(0), None, Super { shift: -3 }, false),
        row(E::IQ1_M, Spread, None, Super { shift: -3 }, true),
        row(E::IQ4_NL, F16(0), None, Aligned, false),
        row(E::IQ4_XS, F16(0), None, Super { shift: 0 }, false),
        row(E::TQ1_0, F16(52), None, Aligned, false),
        row(E::TQ2_0, F16(64), None, Aligned, false),
        row(E::MXFP4, E8m0, None, Aligned, false),
        row(E::NVFP4, Ue4m3, None, Aligned, true),
        row(E::Q1_0, F16(0), None, Aligned, false),
        row(E::Q2_0, F16(0), None, Aligned, false),
        row(E::APR_Q4, F16(0), None, Aligned, false),
    ]
}

/// A number and the exponent that the contract gives it.
#[derive(Clone, Copy)]
struct Scale {
    value: f64,
    e: i16,
}

fn f16_scale(bits: u16) -> Scale {
    Scale {
        value: f16::from_bits(bits).to_f64(),
        e: (bits >> 10 & 31).max(1) as i16 - 25,
    }
}

impl Facts {
    fn block_bytes(&self) -> usize {
        self.encoding.block_bytes() as usize
    }

    fn block_weights(&self) -> usize {
        self.encoding.block_weights() as usize
    }

    fn scales(&self, block: &[u8]) -> Vec<Scale> {
        match self.scale {
            Site::F16(at) => vec![f16_scale(u16::from_le_bytes([block[at], block[at + 1]]))],
            Site::Spread => {
                let nibbles = [49, 51, 53, 55].map(|at| u16::from(block[at] >> 4));
                let bits = nibbles.iter().rev().fold(0, |bits, nibble| bits << 4 | nibble);
                vec![f16_scale(bits)]
            }
            Site::E8m0 => {
                let e = i16::from(block[0]) - 128;
                let value = 2f64.powi(e.into());
                vec![Scale { value, e }]
            }
            Site::Ue4m3 => block[..4]
                .iter()
                .map(|byte| match byte {
                    0x7f => Scale { value: 0.0, e: 4 },
                    byte => {
                        let (exponent, fraction) = (i16::from(byte >> 3 & 15), f64::from(byte & 7));
                        let e = exponent.max(1) - 11;
                        let m = if exponent == 0 { fraction } else { 8.0 + fraction };
                        let value = m * 2f64.powi(e.into());
                        Scale { value, e }
                    }
                })
                .collect(),
        }
    }

    /// What is subtracted: the negated min of Q4_1 and Q5_1, `dmin` elsewhere.
    fn min(&self, block: &[u8]) -> Option<Scale> {
        let at = self.min?;
        let mut scale = f16_scale(u16::from_le_bytes([block[at], block[at + 1]]));
        if matches!(self.kind, Kind::Aligned) {
            scale.value = -scale.value;
        }
        Some(scale)
    }

    /// Makes every scale of the row finite and, if asked, all of similar size.
    fn tame(&self, row: &mut [u8], similar: bool) {
        for block in row.chunks_exact_mut(self.block_bytes()) {
            let f16_at = |block: &mut [u8], at: usize| {
                let bits = u16::from_le_bytes([block[at], block[at + 1]]);
                let exponent = bits >> 10 & 31;
                let exponent = if similar { 10 + exponent % 9 } else { exponent % 31 };
                let bits = bits & !0x7c00 | exponent << 10;
                block[at..at + 2].copy_from_slice(&bits.to_le_bytes());
            };
            match self.scale {
                Site::F16(at) => f16_at(block, at),
                Site::Spread => block[55] &= 0xbf,
                Site::E8m0 if similar => block[0] = 100 + block[0] % 9,
                Site::E8m0 => block[0] = block[0].min(254),
                Site::Ue4m3 if similar => block[..4].iter_mut().for_each(|b| *b &= 0x3f),
                // One scale in four is the zero with the largest exponent.
                Site::Ue4m3 if block[4] & 1 == 0 => block[usize::from(block[5] & 3)] = 0x7f,
                Site::Ue4m3 => {}
            }
            if let Some(at) = self.min {
                f16_at(block, at);
            }
        }
    }
}

/// A row of random blocks, mostly longer than a segment and not always whole segments.
fn row_of(facts: &Facts, blocks: usize, similar: bool, bytes: &[u8]) -> Vec<u8> {
    let len = (blocks * facts.block_bytes()).min(bytes.len() / facts.block_bytes() * facts.block_bytes());
    let mut row = bytes[..len].to_vec();
    facts.tame(&mut row, similar);
    row
}

fn views(encoding: Encoding, row: &[u8]) -> Vec<SegmentView> {
    let cols = row.len() / encoding.block_bytes() as usize * encoding.block_weights() as usize;
    (0..segments(cols))
        .map(|s| {
            let mut view = SegmentView::default();
            // What an earlier call left behind must not show.
            view.weights.fill(99);
            view.c.fill(99);
            view.k.fill(99);
            read_segment(encoding, row, s, &mut view).unwrap();
            view
        })
        .collect()
}

fn decoded(encoding: Encoding, row: &[u8]) -> Vec<f32> {
    let blocks = row.len() / encoding.block_bytes() as usize;
    let mut out = vec![0.0; blocks * encoding.block_weights() as usize];
    dequantize(encoding, row, &mut out).unwrap();
    out
}

/// `floor(value / 2^e)`, exactly: every operand fits f64.
fn floor_to(value: f64, e: i16) -> i32 {
    (value * 2f64.powi(-i32::from(e))).floor() as i32
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    /// Super-blocks lose nothing: their view, rounded once, is GGML's value.
    #[test]
    fn a_super_block_view_is_the_decoded_value(
        which in 0usize..26, blocks in 1usize..4, similar: bool, bytes in prop::collection::vec(any::<u8>(), 800..=800),
    ) {
        let facts = &facts()[which];
        let Kind::Super { shift } = facts.kind else { return Ok(()) };
        let row = row_of(facts, blocks, similar, &bytes);
        let expected = decoded(facts.encoding, &row);
        for ((view, block), expected) in views(facts.encoding, &row)
            .iter()
            .zip(row.chunks_exact(facts.block_bytes()))
            .zip(expected.chunks_exact(256))
        {
            let d = facts.scales(block)[0];
            prop_assert_eq!(view.e, d.e + shift);
            prop_assert_eq!(view.e_min, facts.min(block).map_or(view.e, |dmin| dmin.e));
            prop_assert_eq!((view.len, view.halves, view.has_mins), (256, facts.halves, facts.min.is_some()));
            for (i, expected) in expected.iter().enumerate() {
                prop_assert_eq!(view.value(i) as f32, *expected, "{} weight {}", facts.encoding, i);
            }
        }
    }

    /// Aligned scales are the file's, rounded down to multiples of 2^(e* − 8), and codes are the decoder's.
    #[test]
    fn aligned_scales_are_rounded_down_to_the_segments_unit(
        which in 0usize..26, blocks in 1usize..40, similar: bool,
        bytes in prop::collection::vec(any::<u8>(), 1400..=1400),
    ) {
        let facts = &facts()[which];
        let Kind::Aligned = facts.kind else { return Ok(()) };
        let row = row_of(facts, blocks, similar, &bytes);
        let expected = decoded(facts.encoding, &row);
        let blocks_a_segment = SEGMENT_WEIGHTS / facts.block_weights();
        let segment_bytes = blocks_a_segment * facts.block_bytes();
        for ((view, blocks), expected) in views(facts.encoding, &row)
            .iter()
            .zip(row.chunks(segment_bytes))
            .zip(expected.chunks(SEGMENT_WEIGHTS))
        {
            let blocks: Vec<&[u8]> = blocks.chunks_exact(facts.block_bytes()).collect();
            let scales: Vec<Scale> = blocks.iter().flat_map(|b| facts.scales(b)).collect();
            let mins: Vec<Scale> = blocks.iter().filter_map(|b| facts.min(b)).collect();
            let largest = |scales: &[Scale]| scales.iter().map(|s| s.e).max();
            prop_assert_eq!(view.len, expected.len());
            prop_assert_eq!((view.halves, view.has_mins), (facts.halves, facts.min.is_some()));
            prop_assert_eq!(view.e, largest(&scales).unwrap() - 8);
            prop_assert_eq!(view.e_min, largest(&mins).map_or(view.e, |e| e - 8));
            let weights_a_scale = view.len / scales.len();
            for (i, expected) in expected.iter().enumerate() {
                let scale = scales[i / weights_a_scale];
                let min = mins.get(i / facts.block_weights()).map_or(0.0, |min| min.value);
                prop_assert_eq!(view.c[i / 16], floor_to(scale.value, view.e));
                prop_assert_eq!(view.k[i / 16], floor_to(min, view.e_min));
                let exact = scale.value * f64::from(view.weights[i]) - min;
                prop_assert_eq!(exact as f32, *expected, "{} weight {}", facts.encoding, i);
                if similar {
                    prop_assert_eq!(view.value(i), exact, "{} weight {}", facts.encoding, i);
                }
            }
            prop_assert!(view.weights[view.len..].iter().all(|w| *w == 0));
            prop_assert!(view.c[view.len / 16..].iter().chain(&view.k[view.len / 16..]).all(|c| *c == 0));
        }
    }

    /// What 64-bit accumulation relies on: `|m_a · I|` and `|m_a · J|` stay below 2^53 for the largest activations.
    #[test]
    fn a_segments_largest_sum_is_below_2_to_53(
        which in 0usize..26, similar: bool, bytes in prop::collection::vec(any::<u8>(), 300..=300),
    ) {
        let facts = &facts()[which];
        let row = row_of(facts, 8, similar, &bytes);
        let (m_a, u, q) = (255, 16, 127);
        for view in views(facts.encoding, &row) {
            let sums = view.weights.iter().enumerate().fold((0i64, 0i64), |(i_sum, j_sum), (i, w)| {
                let (c, k) = (i64::from(view.c[i / 16]), i64::from(view.k[i / 16]));
                (i_sum + (c * i64::from(*w)).abs() * u * q, j_sum + k.abs() * u * q)
            });
            prop_assert!(m_a * sums.0 < 1 << 53 && m_a * sums.1 < 1 << 53, "{} {:?}", facts.encoding, sums);
        }
    }

    #[test]
    fn a_rows_exponent_is_the_largest_of_its_segments(
        which in 0usize..26, blocks in 1usize..40, similar: bool,
        bytes in prop::collection::vec(any::<u8>(), 1400..=1400),
    ) {
        let facts = &facts()[which];
        let row = row_of(facts, blocks, similar, &bytes);
        let of_segments = views(facts.encoding, &row).iter().map(|v| v.e.max(v.e_min)).max();
        prop_assert_eq!(Some(row_exponent(facts.encoding, &row).unwrap()), of_segments);
    }

    /// No input panics, whatever its length.
    #[test]
    fn arbitrary_bytes_are_read_or_refused(
        which in 0usize..64, segment in 0usize..4, bytes in prop::collection::vec(any::<u8>(), 0..700),
    ) {
        let Some(encoding) = Encoding::all().nth(which) else { return Ok(()) };
        let mut view = SegmentView::default();
        let read = read_segment(encoding, &bytes, segment, &mut view);
        if !encoding.is_quantized() {
            prop_assert_eq!(read, Err(Error::NotQuantized { encoding }));
        }
        // A row whose exponent can be told has no refused scale, and then every segment can be read.
        if row_exponent(encoding, &bytes).is_ok() && segment == 0 {
            prop_assert!(read_segment(encoding, &bytes, segment, &mut view).is_ok());
        }
        let _ = check_finite(encoding, &bytes);
    }
}

#[test]
fn every_quantised_encoding_but_apr_q8_is_in_the_table() {
    let mut listed: Vec<_> = facts().iter().map(|f| f.encoding).collect();
    listed.push(Encoding::APR_Q8);
    listed.sort();
    let all: Vec<_> = Encoding::all().filter(|e| e.is_quantized()).collect();
    assert_eq!(listed, all);
}

#[test]
fn apr_q8_codes_are_its_integers() {
    let row: Vec<u8> = (0..320u32).map(|i| (i * 7) as u8).collect();
    let views = views(Encoding::APR_Q8, &row);
    assert_eq!(views.iter().map(|v| v.len).collect::<Vec<_>>(), [256, 64]);
    for (i, byte) in row.iter().enumerate() {
        let view = &views[i / 256];
        assert_eq!(view.value(i % 256), f64::from(*byte as i8));
        assert_eq!((view.e, view.c[i % 256 / 16]), (0, 1));
    }
    assert_eq!(views[1].c[4..], [0; 12]);
    assert_eq!(row_exponent(Encoding::APR_Q8, &row), Ok(0));
}

#[test]
fn a_scale_far_below_its_segments_largest_is_rounded_down() {
    // Two Q8_0 blocks: scale 2^15, and scales of either sign 2^9 … 2^24 smaller.
    let block = |scale: f16| [&scale.to_le_bytes()[..], &[1; 32]].concat();
    for (scale, floor) in [
        (64.0, 512),
        (63.9375, 511),
        (-63.9375, -512),
        (0.01, 0),
        (-0.01, -1),
        (-0.0, 0),
    ] {
        let row = [block(f16::from_f32(32768.0)), block(f16::from_f32(scale))].concat();
        let view = &views(Encoding::Q8_0, &row)[0];
        // 2^15 is 2^10 · 2^5, and 2^8 finer.
        assert_eq!(view.e, 5 - 8);
        assert_eq!(view.c[..4], [1 << 18, 1 << 18, floor, floor], "{scale}");
    }
}

#[test]
fn a_non_finite_scale_is_refused_where_it_is_and_only_there() {
    for facts in facts() {
        let encoding = facts.encoding;
        let blocks_a_segment = SEGMENT_WEIGHTS / facts.block_weights();
        // Two segments, the refused scale in the last block of the second.
        let mut row = vec![0; 2 * blocks_a_segment * facts.block_bytes()];
        let block = row.len() - facts.block_bytes();
        let mut view = SegmentView::default();
        let (bytes, at): (&[(usize, u8)], usize) = match facts.scale {
            Site::F16(at) => (&[(at + 1, 0x7c)], at),
            Site::Spread => (&[(53, 0xc0), (55, 0x70)], 48),
            Site::E8m0 => (&[(0, 255)], 0),
            Site::Ue4m3 => {
                row.fill(255);
                check_finite(encoding, &row).unwrap();
                continue;
            }
        };
        check_finite(encoding, &row).unwrap();
        row_exponent(encoding, &row).unwrap();
        for (at, byte) in bytes {
            row[block + at] = *byte;
        }
        let offset = (block + at) as u64;
        let refused = Error::NonFinite { encoding, offset };
        assert_eq!(check_finite(encoding, &row), Err(refused.clone()));
        assert_eq!(row_exponent(encoding, &row), Err(refused.clone()));
        assert_eq!(read_segment(encoding, &row, 1, &mut view), Err(refused));
        read_segment(encoding, &row, 0, &mut view).unwrap();

        if let Some(at) = facts.min {
            row[block..].fill(0);
            row[block + at + 1] = 0xfc;
            let offset = (block + at) as u64;
            assert_eq!(
                check_finite(encoding, &row),
                Err(Error::NonFinite { encoding, offset })
            );
        }
    }
}

#[test]
fn input_dimensions_are_multiples_of_32_and_of_the_block_up_to_131072() {
    for (encoding, cols, accepted) in [
        (Encoding::Q8_0, 32, true),
        (Encoding::Q8_0, 0, false),
        (Encoding::Q8_0, 16, false),
        (Encoding::APR_Q8, 32, true),
        (Encoding::APR_Q8, 33, false),
        (Encoding::Q4_K, 256, true),
        (Encoding::Q4_K, 128, false),
        (Encoding::Q1_0, 128, true),
        (Encoding::Q1_0, 64, false),
        (Encoding::Q4_K, 131_072, true),
        (Encoding::Q4_K, 131_328, false),
    ] {
        assert_eq!(
            check_input_dimension(encoding, cols).is_ok(),
            accepted,
            "{encoding} {cols}"
        );
    }
    for encoding in [Encoding::F16, Encoding::Q8_1, Encoding::Q8_K, Encoding::I8] {
        assert_eq!(
            check_input_dimension(encoding, 256),
            Err(Error::NotQuantized { encoding })
        );
    }
}

#[test]
fn a_segment_past_the_last_is_refused() {
    let row = vec![0; 9 * 34];
    let mut view = SegmentView::default();
    read_segment(Encoding::Q8_0, &row, 1, &mut view).unwrap();
    assert_eq!(view.len, 32);
    assert_eq!(
        read_segment(Encoding::Q8_0, &row, 2, &mut view),
        Err(Error::SegmentOutOfRange {
            segment: 2,
            segments: 2
        })
    );
}
