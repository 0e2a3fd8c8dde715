//! Super-blocks of 256 weights with integer sub-scales: Q2_K … Q6_K. Layouts are those of the `block_q*_K` structs in
//! ggml (with `QK_K = 256`).
#![expect(non_camel_case_types, reason = "encodings are spelled as GGML spells them")]

use crate::codec::{SuperBlock, twice, u16_at};

/// 16 bytes of sub-scale (low nibble) and min (high nibble) for 16 weights each; 64 bytes of 2-bit codes; f16 `d`; f16
/// `dmin`.
pub(crate) struct Q2_K;

/// 32 bytes of inverted third bits; 64 bytes of 2-bit codes; 12 bytes of 6-bit sub-scales for 16 weights each; f16 `d`.
pub(crate) struct Q3_K;

/// f16 `d`; f16 `dmin`; 12 bytes of 6-bit sub-scales and mins for 32 weights each; 128 bytes of nibbles.
pub(crate) struct Q4_K;

/// f16 `d`; f16 `dmin`; 12 bytes as in Q4_K; 32 bytes of fifth bits; 128 bytes of nibbles.
pub(crate) struct Q5_K;

/// 128 bytes of low nibbles; 64 bytes of high bit pairs; 16 × i8 sub-scales for 16 weights each; f16 `d`.
pub(crate) struct Q6_K;

/// 2-bit codes of 64 bytes: bits `2s..` of byte `32g + j` are weight `128g + 32s + j`.
#[inline]
pub(crate) fn bit_pairs(bytes: &[u8; 64], out: &mut [i8; 256]) {
    for (g, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let bytes = &bytes[32 * g..32 * g + 32];
        for (s, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (q, code) in bytes.iter().zip(out) {
                *code = (q >> (2 * s) & 3) as i8;
            }
        }
    }
}

/// Nibbles of 128 bytes: byte `32g + j` holds weight `64g + j` low and weight `64g + 32 + j` high.
#[inline]
fn nibbles(bytes: &[u8; 128], out: &mut [i8; 256]) {
    for (bytes, out) in bytes.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<64>().0) {
        let (low, high) = out.split_at_mut(32);
        for ((q, low), high) in bytes.iter().zip(low).zip(high) {
            *low = (q & 15) as i8;
            *high = (q >> 4) as i8;
        }
    }
}

/// Sub-scale `j` of 12 packed bytes: the low 6 bits of byte `j` for `j < 4`; later ones have their low nibble in byte
/// `j + 4` and their high two bits on top of byte `j − 4`.
#[inline]
fn packed_sub(packed: &[u8], j: usize) -> i16 {
    (if j < 4 {
        packed[j] & 63
    } else {
        packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
    })
    .into()
}

/// Min `j` of 12 packed bytes: as the sub-scales, with bytes 4 … 7 and high nibbles.
#[inline]
fn packed_min(packed: &[u8], j: usize) -> i16 {
    (if j < 4 {
        packed[j + 4] & 63
    } else {
        packed[j + 4] >> 4 | packed[j] >> 6 << 4
    })
    .into()
}

/// The `N` bytes at `at`.
#[inline]
pub(crate) fn field<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
    &bytes[at..].as_chunks::<N>().0[0]
}

impl SuperBlock<84> for Q2_K {
    const HALVES: bool = true;
    const MINS: bool = true;

    #[inline]
    fn d(block: &[u8; 84]) -> u16 {
        u16_at(block, 80)
    }

    #[inline]
    fn dmin(block: &[u8; 84]) -> u16 {
        u16_at(block, 82)
    }

    #[inline]
    fn subs(block: &[u8; 84]) -> [i16; 16] {
        std::array::from_fn(|half| i16::from(block[half] & 15))
    }

    #[inline]
    fn mins(block: &[u8; 84]) -> [i16; 16] {
        std::array::from_fn(|half| i16::from(block[half] >> 4))
    }

    #[inline]
    fn codes(block: &[u8; 84], out: &mut [i8; 256]) {
        bit_pairs(field(block, 16), out);
    }
}

impl SuperBlock<110> for Q3_K {
    const HALVES: bool = true;

    #[inline]
    fn d(block: &[u8; 110]) -> u16 {
        u16_at(block, 108)
    }

    #[inline]
    fn subs(block: &[u8; 110]) -> [i16; 16] {
        std::array::from_fn(|half| {
            let low = block[96 + half % 8] >> (4 * (half / 8)) & 15;
            let high = block[104 + half % 4] >> (2 * (half / 4)) & 3;
            i16::from(low | high << 4) - 32
        })
    }

    #[inline]
    fn codes(block: &[u8; 110], out: &mut [i8; 256]) {
        let third: &[u8; 32] = field(block, 0);
        bit_pairs(field(block, 32), out);
        for (block_of_32, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (bits, code) in third.iter().zip(out) {
                // A set bit means that nothing is subtracted.
                let clear = !bits >> block_of_32 & 1;
                *code = (*code & 3) - (clear << 2) as i8;
            }
        }
    }
}

impl SuperBlock<144> for Q4_K {
    const HALVES: bool = false;
    const MINS: bool = true;

    #[inline]
    fn d(block: &[u8; 144]) -> u16 {
        u16_at(block, 0)
    }

    #[inline]
    fn dmin(block: &[u8; 144]) -> u16 {
        u16_at(block, 2)
    }

    #[inline]
    fn subs(block: &[u8; 144]) -> [i16; 16] {
        twice(|j| packed_sub(&block[4..16], j))
    }

    #[inline]
    fn mins(block: &[u8; 144]) -> [i16; 16] {
        twice(|j| packed_min(&block[4..16], j))
    }

    #[inline]
    fn codes(block: &[u8; 144], out: &mut [i8; 256]) {
        nibbles(field(block, 16), out);
    }
}

impl SuperBlock<176> for Q5_K {
    const HALVES: bool = false;
    const MINS: bool = true;

    #[inline]
    fn d(block: &[u8; 176]) -> u16 {
        u16_at(block, 0)
    }

    #[inline]
    fn dmin(block: &[u8; 176]) -> u16 {
        u16_at(block, 2)
    }

    #[inline]
    fn subs(block: &[u8; 176]) -> [i16; 16] {
        twice(|j| packed_sub(&block[4..16], j))
    }

    #[inline]
    fn mins(block: &[u8; 176]) -> [i16; 16] {
        twice(|j| packed_min(&block[4..16], j))
    }

    #[inline]
    fn codes(block: &[u8; 176], out: &mut [i8; 256]) {
        let fifth: &[u8; 32] = field(block, 16);
        nibbles(field(block, 48), out);
        for (block_of_32, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (bits, code) in fifth.iter().zip(out) {
                *code |= ((bits >> block_of_32 & 1) << 4) as i8;
            }
        }
    }
}

impl SuperBlock<210> for Q6_K {
    const HALVES: bool = true;

    #[inline]
    fn d(block: &[u8; 210]) -> u16 {
        u16_at(block, 208)
    }

    #[inline]
    fn subs(block: &[u8; 210]) -> [i16; 16] {
        std::array::from_fn(|half| i16::from(block[192 + half] as i8))
    }

    #[inline]
    fn codes(block: &[u8; 210], out: &mut [i8; 256]) {
        let (low, high): (&[u8; 128], &[u8; 64]) = (field(block, 0), field(block, 128));
        for (g, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
            for (s, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                // Nibbles go through 64 bytes twice, bit pairs through 32 bytes four times.
                let low = &low[64 * g + 32 * (s % 2)..][..32];
                let high = &high[32 * g..][..32];
                for ((l, h), code) in low.iter().zip(high).zip(out) {
                    let q = l >> (4 * (s / 2)) & 15 | (h >> (2 * s) & 3) << 4;
                    *code = q as i8 - 32;
                }
            }
        }
    }
}
