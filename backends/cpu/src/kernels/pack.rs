//! Rearranging a matrix in place, so that one load reads the same word of several rows.
//!
//! Rows are packed in groups of [`Isa::group`]; those after the last whole group stay as they are. A group is its segments,
//! one after the other. In a segment come the fields of the encoding's block, in their order; in a field the segment's
//! blocks; of each block the field's words; of each word the rows. So the canonical byte `k` of word `i` of a field at
//! `offset` stands, for row `r` of `n` and block `b` of `blocks`, at
//! `n · (blocks · offset + b · len + i · width) + r · width + k`.
//!
//! Words of single bits (Q5_0's and Q5_1's fifth bits, Q1_0) are transposed as well: bit `i` goes to bit `i / 4` of byte
//! `i % 4`, so that four consecutive weights find theirs at the same place in four bytes. So are Q2_0's bit pairs, and
//! AprQ4's nibbles become Q4_0's, and the sign bits of the IQ encodings, of which some leave out each eighth. Q6_K's words of nibbles and bit pairs are interleaved,
//! because a processor foresees one stream and not three.

use std::ops::Range;

use hoist_backend::Encoding;

use super::Isa;
use super::activations::SEGMENT;
use super::side::{SIDE_ROW_BYTES, SIDE_SEGMENT_BYTES, row_bytes, side_row_bytes};

/// A run of equal words of a block.
struct Field {
    /// Where in the block it starts.
    offset: usize,
    /// Its bytes.
    len: usize,
    /// Bytes of a word.
    width: usize,
    /// What becomes of its words.
    order: Order,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// They stay as they are.
    Kept,
    /// Words of single bits, transposed.
    Bits,
    /// Words of bit pairs, transposed.
    Pairs,
    /// Words of four times seven sign bits, and four other bits on top, transposed.
    Signs,
    /// Every other word such a one.
    OddSigns,
    /// Four u16 of seven sign bits over nine others: a word of low bytes, and one of signs with the ninth bits on top.
    NineBits,
    /// Sixteen bytes of nibbles in the order of weights, as Q4_0 has them.
    Halves,
    /// Q6_K's codes, in the order in which they are needed.
    Interleaved,
}

/// The word that stands at each place of [`Order::Interleaved`]. Of each half of a super-block, words `g` and `8 + g` of 16
/// words of nibbles go with word `g` of 8 words of bit pairs, which come after all nibbles.
const INTERLEAVED: [u8; 48] = {
    let mut order = [0; 48];
    let mut i = 0;
    while i < 48 {
        let (h, g, part) = (i / 24, i / 3 % 8, i % 3);
        order[i as usize] = if part < 2 {
            16 * h + 8 * part + g
        } else {
            32 + 8 * h + g
        };
        i += 1;
    }
    order
};

impl Order {
    /// The word that stands at place `i`.
    fn word(self, i: usize) -> usize {
        if self == Order::Interleaved {
            INTERLEAVED[i].into()
        } else {
            i
        }
    }
}

const fn halves(offset: usize) -> Field {
    Field {
        offset,
        len: 2,
        width: 2,
        order: Order::Kept,
    }
}

const fn words(offset: usize, len: usize) -> Field {
    Field {
        offset,
        len,
        width: 4,
        order: Order::Kept,
    }
}

const fn bits(offset: usize, len: usize) -> Field {
    Field {
        offset,
        len,
        width: 4,
        order: Order::Bits,
    }
}

const fn interleaved(offset: usize, len: usize) -> Field {
    Field {
        offset,
        len,
        width: 4,
        order: Order::Interleaved,
    }
}

const fn single(offset: usize) -> Field {
    Field {
        offset,
        len: 1,
        width: 1,
        order: Order::Kept,
    }
}

const fn pairs(offset: usize, len: usize) -> Field {
    Field {
        offset,
        len,
        width: 4,
        order: Order::Pairs,
    }
}

const fn in_order(offset: usize) -> Field {
    Field {
        offset,
        len: 16,
        width: 4,
        order: Order::Halves,
    }
}

const fn ordered(offset: usize, len: usize, order: Order) -> Field {
    Field {
        offset,
        len,
        width: 4,
        order,
    }
}

const Q4_0: &[Field] = &[halves(0), words(2, 16)];
const Q4_1: &[Field] = &[halves(0), halves(2), words(4, 16)];
const Q5_0: &[Field] = &[halves(0), bits(2, 4), words(6, 16)];
const Q5_1: &[Field] = &[halves(0), halves(2), bits(4, 4), words(8, 16)];
const Q8_0: &[Field] = &[halves(0), words(2, 32)];
const Q4_K: &[Field] = &[halves(0), halves(2), words(4, 140)];
const Q5_K: &[Field] = &[halves(0), halves(2), words(4, 172)];
const Q6_K: &[Field] = &[interleaved(0, 192), words(192, 16), halves(208)];

const Q2_K: &[Field] = &[words(0, 80), halves(80), halves(82)];
const Q3_K: &[Field] = &[words(0, 108), halves(108)];
const IQ4_XS: &[Field] = &[halves(0), halves(2), words(4, 132)];
const MXFP4: &[Field] = &[single(0), words(1, 16)];
const NVFP4: &[Field] = &[words(0, 36)];
const TQ1_0: &[Field] = &[words(0, 52), halves(52)];
const TQ2_0: &[Field] = &[words(0, 64), halves(64)];
const Q1_0: &[Field] = &[halves(0), bits(2, 16)];
const Q2_0: &[Field] = &[halves(0), pairs(2, 16)];
const APR_Q4: &[Field] = &[halves(0), in_order(2)];
const APR_Q8: &[Field] = &[words(0, 32)];

const IQ3_S: &[Field] = &[halves(0), words(2, 72), bits(74, 32), words(106, 4)];
const IQ3_XXS: &[Field] = &[halves(0), words(2, 64), ordered(66, 32, Order::Signs)];
const IQ2_S: &[Field] = &[halves(0), words(2, 32), bits(34, 32), words(66, 16)];
const IQ2_XS: &[Field] = &[halves(0), ordered(2, 64, Order::NineBits), words(66, 8)];
const IQ2_XXS: &[Field] = &[halves(0), ordered(2, 64, Order::OddSigns)];
const IQ1_S: &[Field] = &[halves(0), words(2, 48)];

/// Bytes that are packed as a block.
fn block_bytes(encoding: Encoding) -> usize {
    match encoding {
        // Its own is a single weight.
        Encoding::APR_Q8 => 32,
        _ => encoding.block_bytes() as usize,
    }
}

/// Fields of an encoding's block; `None` for encodings that are not packed.
fn fields(encoding: Encoding) -> Option<&'static [Field]> {
    Some(match encoding {
        Encoding::Q4_0 | Encoding::IQ4_NL => Q4_0,
        Encoding::Q4_1 => Q4_1,
        Encoding::Q5_0 => Q5_0,
        Encoding::Q5_1 => Q5_1,
        Encoding::Q8_0 => Q8_0,
        Encoding::Q4_K => Q4_K,
        Encoding::Q5_K => Q5_K,
        Encoding::Q6_K => Q6_K,
        Encoding::Q2_K => Q2_K,
        Encoding::Q3_K => Q3_K,
        Encoding::IQ4_XS => IQ4_XS,
        Encoding::MXFP4 => MXFP4,
        Encoding::NVFP4 => NVFP4,
        Encoding::TQ1_0 => TQ1_0,
        Encoding::TQ2_0 => TQ2_0,
        Encoding::Q1_0 => Q1_0,
        Encoding::Q2_0 => Q2_0,
        Encoding::APR_Q4 => APR_Q4,
        Encoding::APR_Q8 => APR_Q8,
        Encoding::IQ3_S => IQ3_S,
        Encoding::IQ3_XXS => IQ3_XXS,
        Encoding::IQ2_S => IQ2_S,
        Encoding::IQ2_XS => IQ2_XS,
        Encoding::IQ2_XXS => IQ2_XXS,
        Encoding::IQ1_S => IQ1_S,
        _ => return None,
    })
}

/// Most bytes of a segment of a packed encoding's row: Q8_0's.
pub(super) const MAX_SEGMENT_BYTES: usize = 272;

/// Bit `i` to bit `i / 4` of byte `i % 4`.
fn transpose_bits(word: u32) -> u32 {
    // The eight bits that stand four apart, from bit `k` on, moved together.
    let byte = |k: u32| {
        let bits = word >> k & 0x1111_1111;
        let bits = (bits | bits >> 3) & 0x0303_0303;
        let bits = (bits | bits >> 6) & 0x000f_000f;
        (bits | bits >> 12) & 0xff
    };
    byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24
}

/// The inverse of [`transpose_bits`].
fn restore_bits(word: u32) -> u32 {
    (0..32).fold(0, |out, i| out | (word >> (8 * (i % 4) + i / 4) & 1) << i)
}

/// Bit pair `i` of byte `k` to bit pair `k` of byte `i`; its own inverse.
fn transpose_pairs(word: u32) -> u32 {
    // Squares of two by two, then their elements.
    let squares = (word ^ word >> 12) & 0x0000_f0f0;
    let word = word ^ squares ^ squares << 12;
    let elements = (word ^ word >> 6) & 0x00cc_00cc;
    word ^ elements ^ elements << 6
}

/// Weights in order, two a byte, become those of the lower half in low nibbles and those of the upper one in high nibbles.
fn split_halves(bytes: [u8; 16]) -> [u8; 16] {
    let nibble = |i: usize| bytes[i / 2] >> (4 * (i % 2)) & 15;
    std::array::from_fn(|i| nibble(i) | nibble(16 + i) << 4)
}

/// The inverse of [`split_halves`].
fn join_halves(bytes: [u8; 16]) -> [u8; 16] {
    let nibble = |i: usize| bytes[i % 16] >> (4 * (i / 16)) & 15;
    std::array::from_fn(|i| nibble(2 * i) | nibble(2 * i + 1) << 4)
}

/// Where bit `i` of a word of signs goes: sign `i % 7` of the eight weights `i / 7` to the place that [`transpose_bits`]
/// gives that weight, the four bits on top to those of the signs that are not written.
const fn sign_place(i: u32) -> u32 {
    let weight = if i < 28 {
        8 * (i / 7) + i % 7
    } else {
        8 * (i - 28) + 7
    };
    8 * (weight % 4) + weight / 4
}

/// A word of four times seven sign bits and four others, so that signs are where [`transpose_bits`] has them.
fn transpose_signs(word: u32) -> u32 {
    // Eight bits for each seven signs, the fourth of those on top.
    let spread = |l: u32| (word >> (7 * l) & 127 | (word >> (28 + l) & 1) << 7) << (8 * l);
    transpose_bits(spread(0) | spread(1) | spread(2) | spread(3))
}

/// The inverse of [`transpose_signs`].
fn restore_signs(word: u32) -> u32 {
    (0..32).fold(0, |out, i| out | (word >> sign_place(i) & 1) << i)
}

/// Four u16 of nine bits under seven signs: low bytes, and signs under the ninth bits, transposed.
fn split_nine_bits([a, b]: [u32; 2]) -> [u32; 2] {
    let parts = [a & 0xffff, a >> 16, b & 0xffff, b >> 16];
    let mut out = [0, 0];
    for (l, part) in parts.into_iter().enumerate() {
        out[0] |= (part & 255) << (8 * l);
        out[1] |= (part >> 9) << (7 * l) | (part >> 8 & 1) << (28 + l);
    }
    [out[0], transpose_signs(out[1])]
}

/// The inverse of [`split_nine_bits`].
fn join_nine_bits([low, signs]: [u32; 2]) -> [u32; 2] {
    let signs = restore_signs(signs);
    let part = |l: u32| low >> (8 * l) & 255 | (signs >> (28 + l) & 1) << 8 | (signs >> (7 * l) & 127) << 9;
    [part(0) | part(1) << 16, part(2) | part(3) << 16]
}

/// Fields of an encoding that is packed. Without them bytes would be lost silently.
#[expect(
    clippy::expect_used,
    reason = "`pack` refuses what has no fields, and no kernel of packed rows exists for it"
)]
fn fields_of_packed(encoding: Encoding) -> &'static [Field] {
    fields(encoding).expect("an encoding that is packed has fields")
}

/// Packs one segment of up to `group` rows into `out`; rows that are missing are zeros. `rows` are whole rows of canonical
/// bytes, and the segment is bytes `at` of each.
pub(super) fn pack_segment(
    encoding: Encoding,
    group: usize,
    rows: &[u8],
    row_bytes: usize,
    at: Range<usize>,
    out: &mut [u8],
) {
    match group {
        8 => pack_rows::<8>(encoding, rows, row_bytes, at, out),
        _ => pack_rows::<16>(encoding, rows, row_bytes, at, out),
    }
}

fn pack_rows<const G: usize>(
    encoding: Encoding,
    rows: &[u8],
    row_bytes: usize,
    at: Range<usize>,
    out: &mut [u8],
) {
    const MISSING: &[u8] = &[0; MAX_SEGMENT_BYTES];
    let block_bytes = block_bytes(encoding);
    let blocks = at.len() / block_bytes;
    let mut segments = [MISSING; G];
    for (row, segment) in rows.chunks_exact(row_bytes).zip(&mut segments) {
        *segment = &row[at.clone()];
    }
    for field in fields_of_packed(encoding) {
        let start = G * blocks * field.offset;
        let out = &mut out[start..start + G * blocks * field.len];
        for (b, out) in out.chunks_exact_mut(G * field.len).enumerate() {
            let from = b * block_bytes + field.offset;
            for (r, segment) in segments.iter().enumerate() {
                let words = &segment[from..from + field.len];
                match field.len {
                    1 => out[r] = words[0],
                    2 => out[2 * r..2 * r + 2].copy_from_slice(words),
                    4 => scatter::<G, 1>(field.order, r, words, out),
                    8 => scatter::<G, 2>(field.order, r, words, out),
                    16 => scatter::<G, 4>(field.order, r, words, out),
                    36 => scatter::<G, 9>(field.order, r, words, out),
                    48 => scatter::<G, 12>(field.order, r, words, out),
                    52 => scatter::<G, 13>(field.order, r, words, out),
                    64 => scatter::<G, 16>(field.order, r, words, out),
                    72 => scatter::<G, 18>(field.order, r, words, out),
                    80 => scatter::<G, 20>(field.order, r, words, out),
                    108 => scatter::<G, 27>(field.order, r, words, out),
                    132 => scatter::<G, 33>(field.order, r, words, out),
                    32 => scatter::<G, 8>(field.order, r, words, out),
                    140 => scatter::<G, 35>(field.order, r, words, out),
                    172 => scatter::<G, 43>(field.order, r, words, out),
                    192 => scatter::<G, 48>(field.order, r, words, out),
                    _ => debug_assert!(false, "a field of {} bytes", field.len),
                }
            }
        }
    }
}

/// Puts one row's `N` words of a field into their places.
#[inline(always)]
fn scatter<const G: usize, const N: usize>(order: Order, r: usize, words: &[u8], out: &mut [u8]) {
    let ([words], [out]) = (
        words.as_chunks::<4>().0.as_chunks::<N>().0,
        out.as_chunks_mut::<4>()
            .0
            .as_chunks_mut::<G>()
            .0
            .as_chunks_mut::<N>()
            .0,
    ) else {
        return;
    };
    match order {
        Order::Kept => {
            for (word, out) in words.iter().zip(out) {
                out[r] = *word;
            }
        }
        Order::Bits => {
            for (word, out) in words.iter().zip(out) {
                out[r] = transpose_bits(u32::from_le_bytes(*word)).to_le_bytes();
            }
        }
        Order::Pairs => {
            for (word, out) in words.iter().zip(out) {
                out[r] = transpose_pairs(u32::from_le_bytes(*word)).to_le_bytes();
            }
        }
        Order::Signs => {
            for (word, out) in words.iter().zip(out) {
                out[r] = transpose_signs(u32::from_le_bytes(*word)).to_le_bytes();
            }
        }
        Order::OddSigns => {
            for (words, out) in words.as_chunks::<2>().0.iter().zip(out.as_chunks_mut::<2>().0) {
                out[0][r] = words[0];
                out[1][r] = transpose_signs(u32::from_le_bytes(words[1])).to_le_bytes();
            }
        }
        Order::NineBits => {
            for (words, out) in words.as_chunks::<2>().0.iter().zip(out.as_chunks_mut::<2>().0) {
                let split = split_nine_bits(words.map(u32::from_le_bytes));
                out[0][r] = split[0].to_le_bytes();
                out[1][r] = split[1].to_le_bytes();
            }
        }
        Order::Halves => {
            for (words, out) in words.as_chunks::<4>().0.iter().zip(out.as_chunks_mut::<4>().0) {
                let split = split_halves(bytemuck::cast(*words));
                for (word, out) in split.as_chunks::<4>().0.iter().zip(out) {
                    out[r] = *word;
                }
            }
        }
        Order::Interleaved => {
            for (place, out) in INTERLEAVED.iter().zip(out) {
                out[r] = words[usize::from(*place)];
            }
        }
    }
}

/// Reads one row's words of a field back.
fn gather(field: &Field, group: usize, r: usize, packed: &[u8], words: &mut [u8]) {
    if field.width < 4 {
        words.copy_from_slice(&packed[field.width * r..field.width * (r + 1)]);
        return;
    }
    let words = words.as_chunks_mut::<4>().0;
    for (i, packed) in packed.as_chunks::<4>().0[r..].iter().step_by(group).enumerate() {
        words[field.order.word(i)] = match field.order {
            Order::Bits => restore_bits(u32::from_le_bytes(*packed)).to_le_bytes(),
            Order::Pairs => transpose_pairs(u32::from_le_bytes(*packed)).to_le_bytes(),
            Order::Signs => restore_signs(u32::from_le_bytes(*packed)).to_le_bytes(),
            Order::OddSigns if i % 2 == 1 => restore_signs(u32::from_le_bytes(*packed)).to_le_bytes(),
            Order::Kept | Order::Halves | Order::Interleaved | Order::OddSigns | Order::NineBits => *packed,
        };
    }
    if field.order == Order::NineBits {
        for words in words.as_chunks_mut::<2>().0 {
            *words = join_nine_bits(words.map(u32::from_le_bytes)).map(u32::to_le_bytes);
        }
    }
    if field.order == Order::Halves {
        for words in words.as_chunks_mut::<4>().0 {
            *words = bytemuck::cast(join_halves(bytemuck::cast(*words)));
        }
    }
}

/// Byte ranges of a row's segments.
pub(super) fn segment_bytes(encoding: Encoding, cols: usize, segment: usize) -> Range<usize> {
    let end = (SEGMENT * (segment + 1)).min(cols);
    row_bytes(encoding, SEGMENT * segment)..row_bytes(encoding, end)
}

/// What stands beside up to `group` rows, rearranged: `E_w` of all, then for each segment `E_w − e` of all and `E_w − e'` of
/// all. Rows that are missing are zeros.
pub(super) fn pack_side(group: usize, cols: usize, rows: &[u8], out: &mut [u8]) {
    let (exponents, segments) = out.split_at_mut(SIDE_ROW_BYTES * group);
    exponents.fill(0);
    segments.fill(0);
    for (r, row) in rows.chunks_exact(side_row_bytes(cols)).enumerate() {
        let (e, below) = row.split_at(SIDE_ROW_BYTES);
        exponents[2 * r..2 * r + 2].copy_from_slice(e);
        for (out, below) in segments
            .chunks_exact_mut(SIDE_SEGMENT_BYTES * group)
            .zip(below.chunks_exact(SIDE_SEGMENT_BYTES))
        {
            out[r] = below[0];
            out[group + r] = below[1];
        }
    }
}

/// Rearranges a matrix and what is kept beside it for the kernels of `isa`; says whether it did. Both keep their sizes.
/// `bytes` are all rows of one matrix, without prefix; `side` is what [`super::prepare_side`] wrote for them.
pub(crate) fn pack(isa: Isa, encoding: Encoding, cols: usize, bytes: &mut [u8], side: &mut [u8]) -> bool {
    let group = isa.group();
    if group == 1
        || fields(encoding).is_none()
        || hoist_quant::check_input_dimension(encoding, cols as u64).is_err()
    {
        return false;
    }
    let row = row_bytes(encoding, cols);
    let beside = side_row_bytes(cols);
    assert_eq!(bytes.len() / row, side.len() / beside);
    let mut rows = vec![0; group * row];
    for group_bytes in bytes.chunks_exact_mut(group * row) {
        rows.copy_from_slice(group_bytes);
        for segment in 0..super::segments(cols) {
            let at = segment_bytes(encoding, cols, segment);
            let out = &mut group_bytes[group * at.start..group * at.end];
            pack_segment(encoding, group, &rows, row, at, out);
        }
    }
    let mut rows = vec![0; group * beside];
    for group_side in side.chunks_exact_mut(group * beside) {
        rows.copy_from_slice(group_side);
        pack_side(group, cols, &rows, group_side);
    }
    true
}

/// Copies canonical bytes `range` of a matrix that [`pack`] rearranged for `isa` into `out`, which is as long. Any range is
/// allowed.
pub(crate) fn unpack(
    isa: Isa,
    encoding: Encoding,
    cols: usize,
    bytes: &[u8],
    range: Range<usize>,
    out: &mut [u8],
) {
    assert_eq!(range.len(), out.len());
    let group = isa.group();
    let row = row_bytes(encoding, cols);
    let block_bytes = block_bytes(encoding);
    let whole_groups = bytes.len() / (group * row) * group * row;
    let mut at = range.start;
    let mut out = out;
    while !out.is_empty() {
        let mut block = [0; MAX_SEGMENT_BYTES];
        let block = &mut block[..block_bytes];
        if at >= whole_groups {
            out.copy_from_slice(&bytes[at..range.end]);
            return;
        }
        unpack_block(encoding, cols, group, bytes, at / block_bytes, block);
        let from = at % block_bytes;
        let n = (block_bytes - from).min(out.len());
        let (now, later) = out.split_at_mut(n);
        now.copy_from_slice(&block[from..from + n]);
        out = later;
        at += n;
    }
}

/// Block `index` of the matrix, counted in canonical order, which is in a whole group.
fn unpack_block(encoding: Encoding, cols: usize, group: usize, bytes: &[u8], index: usize, out: &mut [u8]) {
    let block_bytes = block_bytes(encoding);
    let row_blocks = row_bytes(encoding, cols) / block_bytes;
    let segment_blocks = row_bytes(encoding, SEGMENT) / block_bytes;
    let (row, block) = (index / row_blocks, index % row_blocks);
    let (segment, b) = (block / segment_blocks, block % segment_blocks);
    let at = segment_bytes(encoding, cols, segment);
    let blocks = at.len() / block_bytes;
    let group_start = row / group * group * row_bytes(encoding, cols);
    let unit = &bytes[group_start + group * at.start..group_start + group * at.end];
    for field in fields_of_packed(encoding) {
        let start = group * (blocks * field.offset + b * field.len);
        let packed = &unit[start..start + group * field.len];
        gather(
            field,
            group,
            row % group,
            packed,
            &mut out[field.offset..field.offset + field.len],
        );
    }
}
