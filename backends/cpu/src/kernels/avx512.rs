//! AVX-512 F, BW, DQ and VL with VNNI: sixteen rows a vector, and dots in 32 bits.

use std::arch::x86_64::*;

use super::avx2::Avx2;
use super::lanes::{Job, Lanes, Sums, Wide, forward, lanes};

/// Proof that this machine has AVX-512 F, BW, DQ and VL, VNNI, and what [`Avx2`] proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Avx512 {
    pub(super) avx2: Avx2,
}

impl Avx512 {
    pub(super) fn new() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        Avx2::new().filter(|_| found).map(|avx2| Self { avx2 })
    }
}

type V = __m512i;
type F = __m512;

lanes!(Avx512, rows: 16, narrow: false, V, F);

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn vectorise<J: Job>(lanes: Avx512, job: J) -> J::Output {
    job.run(lanes)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn prefetch(bytes: &[u8]) {
    _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().cast());
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load(bytes: &[u8]) -> V {
    assert!(bytes.len() == 64);
    // SAFETY: 64 bytes are readable, as just asserted; any alignment is allowed.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store(v: V, bytes: &mut [u8]) {
    assert!(bytes.len() == 64);
    // SAFETY: 64 bytes are writable, as just asserted; any alignment is allowed.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), v) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_32_bytes(bytes: &[u8]) -> __m256i {
    assert!(bytes.len() == 32);
    // SAFETY: 32 bytes are readable, as just asserted; any alignment is allowed.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_u8(bytes: &[u8]) -> V {
    assert!(bytes.len() == 16);
    // SAFETY: 16 bytes are readable, as just asserted; any alignment is allowed.
    _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_i16(bytes: &[u8]) -> V {
    _mm512_cvtepi16_epi32(load_32_bytes(bytes))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_f16(bytes: &[u8]) -> F {
    _mm512_cvtph_ps(load_32_bytes(bytes))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn splat(word: u32) -> V {
    _mm512_set1_epi32(word as i32)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn and(a: V, b: V) -> V {
    _mm512_and_si512(a, b)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn or(a: V, b: V) -> V {
    _mm512_or_si512(a, b)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn shl<const N: u32>(a: V) -> V {
    _mm512_slli_epi32::<N>(a)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn shr<const N: u32>(a: V) -> V {
    _mm512_srli_epi32::<N>(a)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn add(a: V, b: V) -> V {
    _mm512_add_epi32(a, b)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn sub(a: V, b: V) -> V {
    _mm512_sub_epi32(a, b)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn min(a: V, b: V) -> V {
    _mm512_min_epi32(a, b)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn xor(a: V, b: V) -> V {
    _mm512_xor_si512(a, b)
}

#[target_feature(enable = "avx512bw")]
#[inline]
fn sub8(a: V, b: V) -> V {
    _mm512_sub_epi8(a, b)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn shr_by(a: V, by: V) -> V {
    _mm512_srlv_epi32(a, by)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn table(bytes: &[u8; 16]) -> V {
    // SAFETY: 16 bytes are readable; any alignment is allowed.
    let bytes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
    _mm512_broadcast_i32x4(bytes)
}

#[target_feature(enable = "avx512bw")]
#[inline]
fn look_up(table: V, at: V) -> V {
    _mm512_shuffle_epi8(table, at)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn gather<const N: usize>(table: &[u32; N], at: V) -> V {
    const { assert!(N.is_power_of_two() && N < 1 << 31) };
    let at = and(at, splat(N as u32 - 1));
    // SAFETY: each place is below `N`, the table's length, as its mask has just made it.
    unsafe { _mm512_i32gather_epi32::<4>(at, table.as_ptr().cast()) }
}

#[target_feature(enable = "avx512bw")]
#[inline]
fn flip(w: V, signs: V) -> V {
    _mm512_mask_sub_epi8(w, _mm512_movepi8_mask(signs), _mm512_setzero_si512(), w)
}

#[target_feature(enable = "avx512bw")]
#[inline]
fn mul16(a: V, b: V) -> V {
    _mm512_mullo_epi16(a, b)
}

#[target_feature(enable = "avx512bw")]
#[inline]
fn madd16(a: V, b: V) -> V {
    _mm512_madd_epi16(a, b)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn pow2(e: V) -> F {
    _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
        e,
        _mm512_set1_epi32(127),
    )))
}

#[target_feature(enable = "avx512dq")]
#[inline]
fn negate(a: F) -> F {
    _mm512_xor_ps(a, _mm512_set1_ps(-0.0))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn mul_floor(a: F, b: F) -> V {
    _mm512_cvt_roundps_epi32::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(_mm512_mul_ps(a, b))
}

#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn dot(acc: V, w: V, q: u32) -> V {
    _mm512_dpbusd_epi32(acc, w, splat(q))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn dot_add(a: V, b: V) -> V {
    _mm512_add_epi32(a, b)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn dot_end(acc: V, factor: V) -> V {
    _mm512_mullo_epi32(acc, factor)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn factor(twice: u32) -> V {
    splat(twice & 0xffff)
}

/// In each word, the bytes that `places` names, the first in the lowest bits; 0x80 and above: zero.
#[target_feature(enable = "avx512bw")]
#[inline]
fn shuffle(v: V, places: u32) -> V {
    let word = places as i32;
    // The zeroing bit survives the sums: 0x80 + 12 is still above 0x7f.
    let lane = _mm_setr_epi32(word, word + 0x0404_0404, word + 0x0808_0808, word + 0x0c0c_0c0c);
    _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(lane))
}

#[target_feature(enable = "avx512bw")]
#[inline]
fn sub_scale<const J: i32>(v: V) -> V {
    shuffle(v, 0x8080_8000 | J as u32)
}

#[target_feature(enable = "avx512bw")]
#[inline]
fn signed_sub_scale<const J: i32>(v: V) -> V {
    _mm512_srai_epi32::<24>(shuffle(v, 0x0080_8080 | (J as u32) << 24))
}

/// Sub-scales fit an i16, and the factor's upper half is 0.
#[target_feature(enable = "avx512bw")]
#[inline]
fn times(sub_scale: V, twice: u32) -> V {
    _mm512_madd_epi16(sub_scale, splat(twice & 0xffff))
}

#[target_feature(enable = "avx512bw")]
#[inline]
fn pair<const J: i32>(v: V) -> V {
    shuffle(v, 0x8000_8000 | J as u32 | (J as u32 + 1) << 16)
}

#[target_feature(enable = "avx512bw")]
#[inline]
fn signed_pair<const J: i32>(v: V) -> V {
    _mm512_srai_epi16::<8>(shuffle(v, 0x0080_0080 | (J as u32) << 8 | (J as u32 + 1) << 24))
}

/// Raised by 128, to be unsigned.
#[target_feature(enable = "avx512f")]
#[inline]
fn prepare_signed(w: V) -> Wide<V> {
    let raised = _mm512_xor_si512(w, splat(0x8080_8080));
    Wide {
        even: raised,
        odd: raised,
    }
}

#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn dot_signed(acc: V, w: Wide<V>, q: u32) -> V {
    _mm512_dpbusd_epi32(acc, w.even, splat(q))
}

/// Sums wrap on the way; the result fits.
#[target_feature(enable = "avx512f")]
#[inline]
fn dot_signed_end(acc: V, twice: u32, sum: i32) -> V {
    _mm512_sub_epi32(
        _mm512_mullo_epi32(acc, factor(twice)),
        _mm512_slli_epi32::<7>(splat(sum as u32)),
    )
}

/// Weights were raised by 128.
#[target_feature(enable = "avx512f")]
#[inline]
fn dot_signed_scaled(acc: V, sub_scale: V, twice: u32, us: i32) -> V {
    let dot = _mm512_sub_epi32(_mm512_mullo_epi32(acc, factor(twice)), splat((us << 7) as u32));
    _mm512_mullo_epi32(dot, sub_scale)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn zero_wide() -> Wide<V> {
    Wide {
        even: _mm512_setzero_si512(),
        odd: _mm512_setzero_si512(),
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn mul_add_wide(acc: Wide<V>, a: V, b: V) -> Wide<V> {
    mul_add_parted(acc, a, Wide { even: b, odd: odd(b) })
}

#[target_feature(enable = "avx512f")]
#[inline]
fn odd(a: V) -> V {
    _mm512_srli_epi64::<32>(a)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn mul_add_parted(acc: Wide<V>, a: V, b: Wide<V>) -> Wide<V> {
    Wide {
        even: _mm512_add_epi64(acc.even, _mm512_mul_epi32(a, b.even)),
        odd: _mm512_add_epi64(acc.odd, _mm512_mul_epi32(odd(a), b.odd)),
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn mul_add_splat(acc: Wide<V>, a: i32, b: Wide<V>) -> Wide<V> {
    let a = splat(a as u32);
    Wide {
        even: _mm512_add_epi64(acc.even, _mm512_mul_epi32(a, b.even)),
        odd: _mm512_add_epi64(acc.odd, _mm512_mul_epi32(a, b.odd)),
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn add_wide(a: Wide<V>, b: Wide<V>) -> Wide<V> {
    Wide {
        even: _mm512_add_epi64(a.even, b.even),
        odd: _mm512_add_epi64(a.odd, b.odd),
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn sub_wide(a: Wide<V>, b: Wide<V>) -> Wide<V> {
    Wide {
        even: _mm512_sub_epi64(a.even, b.even),
        odd: _mm512_sub_epi64(a.odd, b.odd),
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn shift_wide(a: Wide<V>, by: V) -> Wide<V> {
    let low = _mm512_set1_epi64(0xffff_ffff);
    Wide {
        even: _mm512_srav_epi64(a.even, _mm512_and_si512(by, low)),
        odd: _mm512_srav_epi64(a.odd, odd(by)),
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_wide(sums: &Sums) -> Wide<V> {
    let bytes: &[u8] = bytemuck::cast_slice(&sums.0);
    Wide {
        even: load(&bytes[..64]),
        odd: load(&bytes[64..128]),
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store_wide(a: Wide<V>, sums: &mut Sums) {
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut sums.0);
    store(a.even, &mut bytes[..64]);
    store(a.odd, &mut bytes[64..128]);
}

/// The sums rounded to f32, times `2^e` in the low words of `e`, rounded to f32. The product is exact in f64.
#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
fn round_eight(x: V, e: V) -> __m256 {
    // The bits above the exponent's eleven fall out of the shift.
    let power = _mm512_slli_epi64::<52>(_mm512_add_epi64(e, _mm512_set1_epi64(1023)));
    let y = _mm512_cvtps_pd(_mm512_cvtepi64_ps(x));
    _mm512_cvtpd_ps(_mm512_mul_pd(y, _mm512_castsi512_pd(power)))
}

#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
fn round(a: Wide<V>, exponents: V, y: &mut [f32]) -> bool {
    assert!(y.len() == 16);
    let even = _mm512_castps256_ps512(round_eight(a.even, exponents));
    let odd = _mm512_castps256_ps512(round_eight(a.odd, odd(exponents)));
    let order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let rows = _mm512_permutex2var_ps(even, order, odd);
    // SAFETY: sixteen f32 are writable, as asserted; any alignment is allowed.
    unsafe { _mm512_storeu_ps(y.as_mut_ptr(), rows) };
    true
}
