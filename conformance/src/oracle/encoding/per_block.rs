//! Encodings with one f16 scale for each 32, 64 or 128 weights, and APR's two.

use super::{BadScale, Group, IQ4_CODE_BOOK, Min, Scale, bits, split_nibble, u32_at};

type Groups = Result<Vec<Group>, BadScale>;

fn one_scale(scale: Scale, min: Option<Scale>, w: &[i64]) -> Vec<Group> {
    w.chunks(32)
        .map(|w| Group {
            scale,
            sub_scale: 1,
            min: min.map(|scale| Min { scale, sub_min: 1 }),
            w: w.to_vec(),
        })
        .collect()
}

/// f16 d, 16 bytes of nibbles; value `(nibble − 8) · d`.
pub(super) fn q4_0(b: &[u8]) -> Groups {
    let w: Vec<_> = (0..32).map(|i| split_nibble(&b[2..18], i) - 8).collect();
    Ok(one_scale(Scale::f16(b, 0)?, None, &w))
}

/// f16 d, f16 m, 16 bytes of nibbles; value `nibble · d + m`.
pub(super) fn q4_1(b: &[u8]) -> Groups {
    let w: Vec<_> = (0..32).map(|i| split_nibble(&b[4..20], i)).collect();
    Ok(one_scale(Scale::f16(b, 0)?, Some(Scale::f16(b, 2)?), &w))
}

/// Nibble `i` with bit `i` of `high` above it.
fn five_bits(low: &[u8], high: u32, i: usize) -> i64 {
    split_nibble(low, i) + 16 * i64::from(high >> i & 1)
}

/// f16 d, 32 high bits, 16 bytes of nibbles; value `(q − 16) · d`.
pub(super) fn q5_0(b: &[u8]) -> Groups {
    let high = u32_at(b, 2);
    let w: Vec<_> = (0..32).map(|i| five_bits(&b[6..22], high, i) - 16).collect();
    Ok(one_scale(Scale::f16(b, 0)?, None, &w))
}

/// f16 d, f16 m, 32 high bits, 16 bytes of nibbles; value `q · d + m`.
pub(super) fn q5_1(b: &[u8]) -> Groups {
    let high = u32_at(b, 4);
    let w: Vec<_> = (0..32).map(|i| five_bits(&b[8..24], high, i)).collect();
    Ok(one_scale(Scale::f16(b, 0)?, Some(Scale::f16(b, 2)?), &w))
}

/// f16 d, 32 i8.
pub(super) fn q8_0(b: &[u8]) -> Groups {
    let w: Vec<_> = b[2..34].iter().map(|q| i64::from(*q as i8)).collect();
    Ok(one_scale(Scale::f16(b, 0)?, None, &w))
}

/// f16 d, 128 bits, the lowest first; a set bit is `+d`, a clear one `−d`.
pub(super) fn q1_0(b: &[u8]) -> Groups {
    let w: Vec<_> = (0..128).map(|i| 2 * bits(b[2 + i / 8], i % 8, 1) - 1).collect();
    Ok(one_scale(Scale::f16(b, 0)?, None, &w))
}

/// f16 d, 64 codes of 2 bits, the lowest first; value `(code − 1) · d`.
pub(super) fn q2_0(b: &[u8]) -> Groups {
    let w: Vec<_> = (0..64).map(|i| bits(b[2 + i / 4], 2 * (i % 4), 2) - 1).collect();
    Ok(one_scale(Scale::f16(b, 0)?, None, &w))
}

/// f16 d, 16 bytes of nibbles that index the code book.
pub(super) fn iq4_nl(b: &[u8]) -> Groups {
    let w: Vec<_> = (0..32)
        .map(|i| IQ4_CODE_BOOK[split_nibble(&b[2..18], i) as usize])
        .collect();
    Ok(one_scale(Scale::f16(b, 0)?, None, &w))
}

/// f16 d, 16 bytes; elements `2i` and `2i + 1` are the low and high nibble of byte `i`; value `(nibble − 8) · d`.
pub(super) fn apr_q4(b: &[u8]) -> Groups {
    let w: Vec<_> = (0..32).map(|i| bits(b[2 + i / 2], 4 * (i % 2), 4) - 8).collect();
    Ok(one_scale(Scale::f16(b, 0)?, None, &w))
}

/// i8 after i8; the matrix's one scale stands in front of it all.
pub(super) fn apr_q8_row(row: &[u8]) -> Vec<Group> {
    let w: Vec<_> = row.iter().map(|q| i64::from(*q as i8)).collect();
    one_scale(Scale::new(1, 0), None, &w)
}
