//! Activations as integers, with AVX2.

use std::arch::x86_64::*;

use super::NonFinite;
use super::activations::{BLOCKS, Segment, ZERO_EXPONENT, quantise_by, step, sums, take_apart};
use super::avx2::Avx2;

impl Avx2 {
    /// [`super::quantise`].
    pub(super) fn quantise(self, x: &[f32], out: &mut [Segment]) -> Result<(), NonFinite> {
        quantise_by(x, out, |x, out| {
            // SAFETY: a value of `Avx2` exists only where the instructions do.
            unsafe { quantise_segment(x, out) }
        })
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn load(x: &[f32; 8]) -> __m256 {
    // SAFETY: eight f32 are readable; any alignment is allowed.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

/// The largest of eight unsigned integers below 2^31.
#[target_feature(enable = "avx2")]
#[inline]
fn largest(v: __m256i) -> u32 {
    let v = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let v = _mm_max_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
    let v = _mm_max_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v));
    _mm_cvtsi128_si32(v) as u32
}

/// Fills in all but `shift` and `e_max`; returns `e_a`.
#[target_feature(enable = "avx2,fma")]
fn quantise_segment(x: &[f32], out: &mut Segment) -> Result<i32, NonFinite> {
    // Magnitudes are ordered as their bits are, and NaNs come after infinity.
    let magnitude = _mm256_set1_epi32(0x7fff_ffff);
    let mut maxima = [0u32; BLOCKS];
    let blocks = x.as_chunks::<32>().0;
    for (x, a) in blocks.iter().zip(&mut maxima) {
        let mut most = _mm256_setzero_si256();
        for x in x.as_chunks::<8>().0 {
            most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(load(x)), magnitude));
        }
        *a = largest(most);
    }
    let a = maxima.iter().fold(0, |a, b| a.max(*b));
    if a >= f32::INFINITY.to_bits() {
        return Err(NonFinite);
    }
    let Some(d) = step(f32::from_bits(a)) else {
        *out = Segment::ZERO;
        return Ok(ZERO_EXPONENT);
    };
    // The thresholds of `u`: 127, 254, … times `d`; `u − 1` of them are below a block's maximum.
    let d8 = _mm256_set1_ps(d);
    let low = _mm256_mul_ps(
        _mm256_setr_ps(127.0, 254.0, 381.0, 508.0, 635.0, 762.0, 889.0, 1016.0),
        d8,
    );
    let high = _mm256_mul_ps(
        _mm256_setr_ps(
            1143.0,
            1270.0,
            1397.0,
            1524.0,
            1651.0,
            1778.0,
            1905.0,
            f32::INFINITY,
        ),
        d8,
    );
    let mut u = [1i32; BLOCKS];
    let mut halves = [0i32; 2 * BLOCKS];
    let quads = out.q.as_chunks_mut::<8>().0;
    quads[blocks.len()..].fill([0; 8]);
    for (j, (x, q)) in blocks.iter().zip(quads).enumerate() {
        let a = _mm256_set1_ps(f32::from_bits(maxima[j]));
        let above_low = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, low));
        let above_high = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, high));
        u[j] = 1 + (above_low.count_ones() + above_high.count_ones()) as i32;
        let r = _mm256_set1_ps(1.0 / (u[j] as f32 * d));
        let [x0, x1, x2, x3] = x.as_chunks::<8>().0 else {
            continue;
        };
        // Conversion rounds to nearest, ties to even: the mode that Rust runs in.
        let i0 = _mm256_cvtps_epi32(_mm256_mul_ps(load(x0), r));
        let i1 = _mm256_cvtps_epi32(_mm256_mul_ps(load(x1), r));
        let i2 = _mm256_cvtps_epi32(_mm256_mul_ps(load(x2), r));
        let i3 = _mm256_cvtps_epi32(_mm256_mul_ps(load(x3), r));
        // Packing works in 128-bit lanes: words then come in the order 0 2 4 6 1 3 5 7.
        let packed = _mm256_packs_epi16(_mm256_packs_epi32(i0, i1), _mm256_packs_epi32(i2, i3));
        let packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        // SAFETY: eight words are writable; any alignment is allowed.
        unsafe { _mm256_storeu_si256(q.as_mut_ptr().cast(), packed) };
        // Sums of a half block in each 128-bit lane: bytes raised by 128, summed, lowered again.
        let raised = _mm256_xor_si256(packed, _mm256_set1_epi8(-128));
        let sums = _mm256_sad_epu8(raised, _mm256_setzero_si256());
        halves[2 * j] = (_mm256_extract_epi64::<0>(sums) + _mm256_extract_epi64::<1>(sums)) as i32 - 16 * 128;
        halves[2 * j + 1] =
            (_mm256_extract_epi64::<2>(sums) + _mm256_extract_epi64::<3>(sums)) as i32 - 16 * 128;
    }
    let (m, e) = take_apart(d);
    sums(&halves, &u, m, out);
    Ok(e)
}
