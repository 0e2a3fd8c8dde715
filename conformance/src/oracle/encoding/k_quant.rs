//! Super-blocks of 256 with sub-scales: the K family and IQ4_XS.

use super::{BadScale, Group, IQ4_CODE_BOOK, Scale, bits, groups_of, split_nibble, u16_at};

type Groups = Result<Vec<Group>, BadScale>;

/// Two-bit code `i` of 64 bytes: each run of 32 bytes holds 128 codes, bit pair by bit pair.
pub(super) fn two_bits(qs: &[u8], i: usize) -> i64 {
    bits(qs[i / 128 * 32 + i % 32], 2 * (i % 128 / 32), 2)
}

/// scales[16] (4-bit scale, 4-bit min), qs[64], f16 d, f16 dmin.
pub(super) fn q2_k(b: &[u8]) -> Groups {
    let (scales, qs) = (&b[..16], &b[16..80]);
    let w: Vec<_> = (0..256).map(|i| two_bits(qs, i)).collect();
    let sub_scales: Vec<_> = scales.iter().map(|s| bits(*s, 0, 4)).collect();
    let sub_mins: Vec<_> = scales.iter().map(|s| bits(*s, 4, 4)).collect();
    let (d, dmin) = (Scale::f16(b, 80)?, Scale::f16(b, 82)?);
    Ok(groups_of(&w, d, &sub_scales, Some((dmin, &sub_mins))))
}

/// hmask[32], qs[64], scales[12] (6-bit, 32 too large), f16 d. A clear bit in hmask takes 4 away.
pub(super) fn q3_k(b: &[u8]) -> Groups {
    let (hmask, qs, scales) = (&b[..32], &b[32..96], &b[96..108]);
    let w: Vec<_> = (0..256)
        .map(|i| two_bits(qs, i) + 4 * bits(hmask[i % 32], i / 32, 1) - 4)
        .collect();
    let sub_scales: Vec<_> = (0..16)
        .map(|g| {
            let low = bits(scales[g % 8], 4 * (g / 8), 4);
            let high = bits(scales[8 + g % 4], 2 * (g / 4), 2);
            low + 16 * high - 32
        })
        .collect();
    Ok(groups_of(&w, Scale::f16(b, 108)?, &sub_scales, None))
}

/// The eight 6-bit scales and mins of Q4_K and Q5_K, packed in 12 bytes.
fn six_bit_scales(s: &[u8]) -> (Vec<i64>, Vec<i64>) {
    (0..8)
        .map(|j| {
            if j < 4 {
                (bits(s[j], 0, 6), bits(s[j + 4], 0, 6))
            } else {
                (
                    bits(s[j + 4], 0, 4) + 16 * bits(s[j - 4], 6, 2),
                    bits(s[j + 4], 4, 4) + 16 * bits(s[j], 6, 2),
                )
            }
        })
        .unzip()
}

/// Nibble `i` of 128 bytes: each run of 32 bytes holds 64, low nibbles first.
fn k_nibble(qs: &[u8], i: usize) -> i64 {
    split_nibble(&qs[i / 64 * 32..][..32], i % 64)
}

/// f16 d, f16 dmin, scales[12], qs[128].
pub(super) fn q4_k(b: &[u8]) -> Groups {
    let w: Vec<_> = (0..256).map(|i| k_nibble(&b[16..144], i)).collect();
    let (sub_scales, sub_mins) = six_bit_scales(&b[4..16]);
    let (d, dmin) = (Scale::f16(b, 0)?, Scale::f16(b, 2)?);
    Ok(groups_of(&w, d, &sub_scales, Some((dmin, &sub_mins))))
}

/// f16 d, f16 dmin, scales[12], qh[32], qs[128].
pub(super) fn q5_k(b: &[u8]) -> Groups {
    let (qh, qs) = (&b[16..48], &b[48..176]);
    let w: Vec<_> = (0..256)
        .map(|i| k_nibble(qs, i) + 16 * bits(qh[i % 32], i / 32, 1))
        .collect();
    let (sub_scales, sub_mins) = six_bit_scales(&b[4..16]);
    let (d, dmin) = (Scale::f16(b, 0)?, Scale::f16(b, 2)?);
    Ok(groups_of(&w, d, &sub_scales, Some((dmin, &sub_mins))))
}

/// ql[128], qh[64], scales[16] (i8), f16 d.
pub(super) fn q6_k(b: &[u8]) -> Groups {
    let (ql, qh, scales) = (&b[..128], &b[128..192], &b[192..208]);
    let w: Vec<_> = (0..256)
        .map(|i| {
            let low = split_nibble(&ql[i / 128 * 64..][..64], i % 128);
            low + 16 * two_bits(qh, i) - 32
        })
        .collect();
    let sub_scales: Vec<_> = scales.iter().map(|s| i64::from(*s as i8)).collect();
    Ok(groups_of(&w, Scale::f16(b, 208)?, &sub_scales, None))
}

/// f16 d, scales_h (16 bits), scales_l[4], qs[128]; each 16 bytes hold 32 nibbles that index the code book.
pub(super) fn iq4_xs(b: &[u8]) -> Groups {
    let (high, low, qs) = (u16_at(b, 2), &b[4..8], &b[8..136]);
    let w: Vec<_> = (0..256)
        .map(|i| IQ4_CODE_BOOK[split_nibble(&qs[i / 32 * 16..][..16], i % 32) as usize])
        .collect();
    let sub_scales: Vec<_> = (0..8)
        .map(|j| bits(low[j / 2], 4 * (j % 2), 4) + 16 * i64::from(high >> (2 * j) & 3) - 32)
        .collect();
    Ok(groups_of(&w, Scale::f16(b, 0)?, &sub_scales, None))
}
