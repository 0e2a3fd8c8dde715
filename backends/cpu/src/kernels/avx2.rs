//! AVX2, FMA and F16C: eight rows a vector.

use std::arch::x86_64::*;

use super::lanes::{Job, Lanes, Sums, Wide, forward, lanes};

/// Proof that this machine has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Avx2(());

impl Avx2 {
    pub(super) fn new() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }
}

type V = __m256i;
type F = __m256;

lanes!(Avx2, rows: 8, narrow: true, V, F);

#[target_feature(enable = "avx2,fma,f16c")]
fn vectorise<J: Job>(lanes: Avx2, job: J) -> J::Output {
    job.run(lanes)
}

#[target_feature(enable = "avx2")]
#[inline]
fn prefetch(bytes: &[u8]) {
    _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().cast());
}

#[target_feature(enable = "avx2")]
#[inline]
fn load(bytes: &[u8]) -> V {
    assert!(bytes.len() == 32);
    // SAFETY: 32 bytes are readable, as just asserted; any alignment is allowed.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store(v: V, bytes: &mut [u8]) {
    assert!(bytes.len() == 32);
    // SAFETY: 32 bytes are writable, as just asserted; any alignment is allowed.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), v) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_16_bytes(bytes: &[u8]) -> __m128i {
    assert!(bytes.len() == 16);
    // SAFETY: 16 bytes are readable, as just asserted; any alignment is allowed.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_u8(bytes: &[u8]) -> V {
    assert!(bytes.len() == 8);
    // SAFETY: 8 bytes are readable, as just asserted; any alignment is allowed.
    _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) })
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_i16(bytes: &[u8]) -> V {
    _mm256_cvtepi16_epi32(load_16_bytes(bytes))
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn load_f16(bytes: &[u8]) -> F {
    _mm256_cvtph_ps(load_16_bytes(bytes))
}

#[target_feature(enable = "avx2")]
#[inline]
fn splat(word: u32) -> V {
    _mm256_set1_epi32(word as i32)
}

#[target_feature(enable = "avx2")]
#[inline]
fn and(a: V, b: V) -> V {
    _mm256_and_si256(a, b)
}

#[target_feature(enable = "avx2")]
#[inline]
fn or(a: V, b: V) -> V {
    _mm256_or_si256(a, b)
}

#[target_feature(enable = "avx2")]
#[inline]
fn shl<const N: u32>(a: V) -> V {
    // The intrinsic's own constant is an i32; a match on a constant costs nothing.
    match N {
        1 => _mm256_slli_epi32::<1>(a),
        2 => _mm256_slli_epi32::<2>(a),
        3 => _mm256_slli_epi32::<3>(a),
        4 => _mm256_slli_epi32::<4>(a),
        5 => _mm256_slli_epi32::<5>(a),
        _ => _mm256_sll_epi32(a, _mm_cvtsi32_si128(N as i32)),
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn shr<const N: u32>(a: V) -> V {
    match N {
        1 => _mm256_srli_epi32::<1>(a),
        2 => _mm256_srli_epi32::<2>(a),
        3 => _mm256_srli_epi32::<3>(a),
        4 => _mm256_srli_epi32::<4>(a),
        _ => _mm256_srl_epi32(a, _mm_cvtsi32_si128(N as i32)),
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn add(a: V, b: V) -> V {
    _mm256_add_epi32(a, b)
}

#[target_feature(enable = "avx2")]
#[inline]
fn sub(a: V, b: V) -> V {
    _mm256_sub_epi32(a, b)
}

#[target_feature(enable = "avx2")]
#[inline]
fn min(a: V, b: V) -> V {
    _mm256_min_epi32(a, b)
}

#[target_feature(enable = "avx2")]
#[inline]
fn xor(a: V, b: V) -> V {
    _mm256_xor_si256(a, b)
}

#[target_feature(enable = "avx2")]
#[inline]
fn sub8(a: V, b: V) -> V {
    _mm256_sub_epi8(a, b)
}

#[target_feature(enable = "avx2")]
#[inline]
fn shr_by(a: V, by: V) -> V {
    _mm256_srlv_epi32(a, by)
}

#[target_feature(enable = "avx2")]
#[inline]
fn table(bytes: &[u8; 16]) -> V {
    // SAFETY: 16 bytes are readable; any alignment is allowed.
    let bytes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
    _mm256_broadcastsi128_si256(bytes)
}

#[target_feature(enable = "avx2")]
#[inline]
fn look_up(table: V, at: V) -> V {
    _mm256_shuffle_epi8(table, at)
}

#[target_feature(enable = "avx2")]
#[inline]
fn gather<const N: usize>(table: &[u32; N], at: V) -> V {
    const { assert!(N.is_power_of_two() && N < 1 << 31) };
    let at = and(at, splat(N as u32 - 1));
    // SAFETY: each place is below `N`, the table's length, as its mask has just made it.
    unsafe { _mm256_i32gather_epi32::<4>(table.as_ptr().cast(), at) }
}

/// Signs are never zero, which would make zeros of bytes.
#[target_feature(enable = "avx2")]
#[inline]
fn flip(w: V, signs: V) -> V {
    _mm256_sign_epi8(w, or(signs, splat(0x0101_0101)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn mul16(a: V, b: V) -> V {
    _mm256_mullo_epi16(a, b)
}

#[target_feature(enable = "avx2")]
#[inline]
fn madd16(a: V, b: V) -> V {
    _mm256_madd_epi16(a, b)
}

#[target_feature(enable = "avx2")]
#[inline]
fn pow2(e: V) -> F {
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
        e,
        _mm256_set1_epi32(127),
    )))
}

#[target_feature(enable = "avx2")]
#[inline]
fn negate(a: F) -> F {
    _mm256_xor_ps(a, _mm256_set1_ps(-0.0))
}

#[target_feature(enable = "avx2")]
#[inline]
fn mul_floor(a: F, b: F) -> V {
    _mm256_cvttps_epi32(_mm256_floor_ps(_mm256_mul_ps(a, b)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn dot(acc: V, w: V, q: u32) -> V {
    _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, splat(q)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn dot_add(a: V, b: V) -> V {
    _mm256_add_epi16(a, b)
}

#[target_feature(enable = "avx2")]
#[inline]
fn dot_end(acc: V, factor: V) -> V {
    _mm256_madd_epi16(acc, factor)
}

#[target_feature(enable = "avx2")]
#[inline]
fn factor(twice: u32) -> V {
    splat(twice)
}

/// A shuffle that puts byte `a` of each word in place 0 (`at` 0) or 1, and byte `b` two places further; zeros elsewhere.
#[target_feature(enable = "avx2")]
#[inline]
fn spread(a: i32, b: i32, at: u32) -> V {
    let word = ((a as u32) << (8 * at)) | ((b as u32) << (8 * at + 16)) | (0x0080_0080 << (8 * (1 - at)));
    let word = word as i32;
    let (w1, w2, w3) = (0x0404_0404, 0x0808_0808, 0x0c0c_0c0c);
    let lane = _mm_setr_epi32(word, word + w1, word + w2, word + w3);
    // The zeroing bit survives: 0x80 + 12 is still above 0x7f.
    _mm256_broadcastsi128_si256(lane)
}

#[target_feature(enable = "avx2")]
#[inline]
fn sub_scale<const J: i32>(v: V) -> V {
    _mm256_shuffle_epi8(v, spread(J, J, 0))
}

#[target_feature(enable = "avx2")]
#[inline]
fn signed_sub_scale<const J: i32>(v: V) -> V {
    _mm256_srai_epi16::<8>(_mm256_shuffle_epi8(v, spread(J, J, 1)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn times(sub_scale: V, twice: u32) -> V {
    _mm256_mullo_epi16(sub_scale, splat(twice))
}

#[target_feature(enable = "avx2")]
#[inline]
fn pair<const J: i32>(v: V) -> V {
    _mm256_shuffle_epi8(v, spread(J, J + 1, 0))
}

#[target_feature(enable = "avx2")]
#[inline]
fn signed_pair<const J: i32>(v: V) -> V {
    _mm256_srai_epi16::<8>(_mm256_shuffle_epi8(v, spread(J, J + 1, 1)))
}

/// Magnitudes, which reach 128 and are unsigned, and the weights, whose signs the activations take.
#[target_feature(enable = "avx2")]
#[inline]
fn prepare_signed(w: V) -> Wide<V> {
    Wide {
        even: _mm256_abs_epi8(w),
        odd: w,
    }
}

/// Two products of 128 · 127 just fit an i16.
#[target_feature(enable = "avx2")]
#[inline]
fn dot_signed(acc: V, w: Wide<V>, q: u32) -> V {
    let products = _mm256_maddubs_epi16(w.even, _mm256_sign_epi8(splat(q), w.odd));
    _mm256_add_epi32(acc, _mm256_madd_epi16(products, _mm256_set1_epi16(1)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn dot_signed_end(acc: V, twice: u32, _sum: i32) -> V {
    _mm256_mullo_epi32(acc, splat(twice & 0xffff))
}

#[target_feature(enable = "avx2")]
#[inline]
fn dot_signed_scaled(acc: V, sub_scale: V, twice: u32, _us: i32) -> V {
    _mm256_mullo_epi32(acc, _mm256_srai_epi32::<16>(times(sub_scale, twice)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn zero_wide() -> Wide<V> {
    Wide {
        even: _mm256_setzero_si256(),
        odd: _mm256_setzero_si256(),
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn mul_add_wide(acc: Wide<V>, a: V, b: V) -> Wide<V> {
    let (a_odd, b_odd) = (_mm256_srli_epi64::<32>(a), _mm256_srli_epi64::<32>(b));
    Wide {
        even: _mm256_add_epi64(acc.even, _mm256_mul_epi32(a, b)),
        odd: _mm256_add_epi64(acc.odd, _mm256_mul_epi32(a_odd, b_odd)),
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn odd(a: V) -> V {
    _mm256_srli_epi64::<32>(a)
}

#[target_feature(enable = "avx2")]
#[inline]
fn mul_add_parted(acc: Wide<V>, a: V, b: Wide<V>) -> Wide<V> {
    Wide {
        even: _mm256_add_epi64(acc.even, _mm256_mul_epi32(a, b.even)),
        odd: _mm256_add_epi64(acc.odd, _mm256_mul_epi32(odd(a), b.odd)),
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn mul_add_splat(acc: Wide<V>, a: i32, b: Wide<V>) -> Wide<V> {
    let a = splat(a as u32);
    Wide {
        even: _mm256_add_epi64(acc.even, _mm256_mul_epi32(a, b.even)),
        odd: _mm256_add_epi64(acc.odd, _mm256_mul_epi32(a, b.odd)),
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn add_wide(a: Wide<V>, b: Wide<V>) -> Wide<V> {
    Wide {
        even: _mm256_add_epi64(a.even, b.even),
        odd: _mm256_add_epi64(a.odd, b.odd),
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn sub_wide(a: Wide<V>, b: Wide<V>) -> Wide<V> {
    Wide {
        even: _mm256_sub_epi64(a.even, b.even),
        odd: _mm256_sub_epi64(a.odd, b.odd),
    }
}

/// `⌊x / 2^n⌋ = ⌊(x + 2^63) / 2^n⌋ − 2^(63 − n)`, with logical shifts.
#[target_feature(enable = "avx2")]
#[inline]
fn shift_right(x: V, n: V) -> V {
    let sign = _mm256_set1_epi64x(i64::MIN);
    let raised = _mm256_srlv_epi64(_mm256_xor_si256(x, sign), n);
    _mm256_sub_epi64(raised, _mm256_srlv_epi64(sign, n))
}

#[target_feature(enable = "avx2")]
#[inline]
fn shift_wide(a: Wide<V>, by: V) -> Wide<V> {
    let low = _mm256_set1_epi64x(0xffff_ffff);
    Wide {
        even: shift_right(a.even, _mm256_and_si256(by, low)),
        odd: shift_right(a.odd, _mm256_srli_epi64::<32>(by)),
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_wide(sums: &Sums) -> Wide<V> {
    let bytes: &[u8] = bytemuck::cast_slice(&sums.0);
    Wide {
        even: load(&bytes[..32]),
        odd: load(&bytes[32..64]),
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store_wide(a: Wide<V>, sums: &mut Sums) {
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut sums.0);
    store(a.even, &mut bytes[..32]);
    store(a.odd, &mut bytes[32..64]);
}

/// Four sums below 2^51 in magnitude, exactly.
#[target_feature(enable = "avx2")]
#[inline]
fn to_f64(x: V) -> __m256d {
    // 2^52 + 2^51: an integer added to these bits is added to the number.
    let offset = _mm256_set1_pd(6_755_399_441_055_744.0);
    let raised = _mm256_add_epi64(x, _mm256_castpd_si256(offset));
    _mm256_sub_pd(_mm256_castsi256_pd(raised), offset)
}

/// The sums rounded to f32, times `2^e` in the low words of `e`, rounded to f32. The product is exact in f64.
#[target_feature(enable = "avx2")]
#[inline]
fn round_four(x: V, e: V) -> __m128 {
    let power = _mm256_slli_epi64::<52>(_mm256_add_epi64(e, _mm256_set1_epi64x(1023)));
    let y = _mm256_cvtps_pd(_mm256_cvtpd_ps(to_f64(x)));
    _mm256_cvtpd_ps(_mm256_mul_pd(y, _mm256_castsi256_pd(power)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn round(a: Wide<V>, exponents: V, y: &mut [f32]) -> bool {
    assert!(y.len() == 8);
    let limit = _mm256_set1_epi64x(1 << 51);
    let high = _mm256_or_si256(_mm256_add_epi64(a.even, limit), _mm256_add_epi64(a.odd, limit));
    if _mm256_testz_si256(high, _mm256_set1_epi64x(!0 << 52)) == 0 {
        return false;
    }
    // The bits above the exponent's eleven fall out of the shift.
    let (even, odd) = (round_four(a.even, exponents), round_four(a.odd, odd(exponents)));
    let (low, high) = (_mm_unpacklo_ps(even, odd), _mm_unpackhi_ps(even, odd));
    let rows = _mm256_set_m128(high, low);
    // SAFETY: eight f32 are writable, as asserted; any alignment is allowed.
    unsafe { _mm256_storeu_ps(y.as_mut_ptr(), rows) };
    true
}
