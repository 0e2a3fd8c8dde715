//! Activations as integers (§1.1).

use bytemuck::{Pod, Zeroable};

use super::{Isa, Kind, NonFinite};

/// Elements of a segment; the last of a vector may have fewer.
pub(super) const SEGMENT: usize = 256;

/// Blocks of 32 in a segment.
pub(super) const BLOCKS: usize = 8;

/// Segments of a vector of `cols` elements.
pub(crate) const fn segments(cols: usize) -> usize {
    cols.div_ceil(SEGMENT)
}

/// 256 elements of a quantised vector, or fewer at its end: `x_i ≈ m_a · 2^e_a · u_j · q_i`, and the sums and products that
/// kernels would otherwise form again for every row. All that lies past the vector's end is zero, and `u` there is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Segment {
    /// `q_i`: four i8 in each, the first in the lowest bits.
    pub(super) q: [u32; 64],
    /// `u_j · m_a` (below 2^12), as two equal i16.
    pub(super) um_twice: [u32; BLOCKS],
    /// `u_j`, as two equal i16.
    pub(super) u_twice: [u32; BLOCKS],
    /// `m_a · u_j · s_h` for half blocks `h`.
    pub(super) mus_half: [i32; 2 * BLOCKS],
    /// `m_a · u_j · s_j`.
    pub(super) mus: [i32; BLOCKS],
    /// `u_j · s_h` of a block's two half blocks, each an i16.
    pub(super) us_halves: [u32; BLOCKS],
    /// `s_j` of two blocks, each an i16.
    pub(super) s_pair: [u32; BLOCKS / 2],
    /// `u_j` of two blocks, each an i16.
    pub(super) u_pair: [u32; BLOCKS / 2],
    /// `m_a`.
    pub(super) m: i32,
    /// `E_a − e_a`.
    pub(super) shift: i32,
    /// `E_a` of the vector.
    pub(super) e_max: i32,
    padding: [u32; 5],
}

const _: () = assert!(size_of::<Segment>() == 512);

impl Segment {
    /// `u_j · s` of a block, or of a half block.
    #[inline(always)]
    pub(super) fn us(&self, halves: bool, part: usize) -> i32 {
        let half = |h: usize| (self.us_halves[h / 2] >> (16 * (h % 2))) as i16 as i32;
        if halves {
            half(part)
        } else {
            half(2 * part) + half(2 * part + 1)
        }
    }

    /// A zero segment, but for its exponents.
    pub(super) const ZERO: Self = Self {
        q: [0; 64],
        um_twice: [0; BLOCKS],
        u_twice: [0x1_0001; BLOCKS],
        mus_half: [0; 2 * BLOCKS],
        mus: [0; BLOCKS],
        us_halves: [0; BLOCKS],
        s_pair: [0; BLOCKS / 2],
        u_pair: [0x1_0001; BLOCKS / 2],
        m: 0,
        shift: 0,
        e_max: 0,
        padding: [0; 5],
    };
}

/// Two integers as the i16 halves of a word, the first one low.
fn pair(low: i32, high: i32) -> u32 {
    low as u16 as u32 | (high as u16 as u32) << 16
}

/// `d` of a segment whose largest magnitude is `a`: `a / 2032` rounded up to 8 significant bits; `None` for a zero segment.
pub(super) fn step(a: f32) -> Option<f32> {
    let d0 = a / 2032.0;
    (d0 >= f32::MIN_POSITIVE).then(|| f32::from_bits((d0.to_bits() + 0xffff) & 0xffff_0000))
}

/// `m_a` and `e_a` of a step: `m · 2^e` with `128 ≤ m ≤ 255`.
pub(super) fn take_apart(d: f32) -> (i32, i32) {
    let bits = d.to_bits();
    let m = 128 | (bits >> 16 & 127);
    let e = (bits >> 23) as i32 - 127 - 7;
    (m as i32, e)
}

/// `e_a` of a zero segment.
pub(super) const ZERO_EXPONENT: i32 = -133;

/// Quantises the vector `x` into `out`, which has [`segments`] of its length.
///
/// # Errors
/// [`NonFinite`] if an element is NaN or infinite; `out` is then unspecified.
pub(crate) fn quantise(isa: Isa, x: &[f32], out: &mut [Segment]) -> Result<(), NonFinite> {
    assert_eq!(out.len(), segments(x.len()));
    assert!(x.len().is_multiple_of(32), "vectors are whole blocks");
    match isa.0 {
        Kind::Scalar => quantise_by(x, out, quantise_segment),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2(avx2) => avx2.quantise(x, out),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512(avx512) => avx512.avx2.quantise(x, out),
        #[cfg(all(test, target_arch = "x86_64"))]
        Kind::Portable(_) => quantise_by(x, out, quantise_segment),
    }
}

/// Quantises segment by segment: `quantise_segment` fills in all but `shift` and `e_max`, and returns `e_a`.
#[inline(always)]
pub(super) fn quantise_by(
    x: &[f32],
    out: &mut [Segment],
    quantise_segment: impl Fn(&[f32], &mut Segment) -> Result<i32, NonFinite>,
) -> Result<(), NonFinite> {
    let mut largest = ZERO_EXPONENT;
    for (x, out) in x.chunks(SEGMENT).zip(out.iter_mut()) {
        let e = quantise_segment(x, out)?;
        out.shift = e;
        largest = largest.max(e);
    }
    for segment in out {
        segment.shift = largest - segment.shift;
        segment.e_max = largest;
    }
    Ok(())
}

/// Fills in all but `shift` and `e_max`; returns `e_a`.
fn quantise_segment(x: &[f32], out: &mut Segment) -> Result<i32, NonFinite> {
    // Magnitudes are ordered as their bits are, and NaNs come after infinity.
    let magnitude = |x: &f32| x.to_bits() & 0x7fff_ffff;
    let mut maxima = [0f32; BLOCKS];
    for (x, a) in x.chunks_exact(32).zip(&mut maxima) {
        *a = f32::from_bits(x.iter().map(magnitude).max().unwrap_or_default());
        if !a.is_finite() {
            return Err(NonFinite);
        }
    }
    let a = maxima.iter().fold(0f32, |a, b| a.max(*b));
    let Some(d) = step(a) else {
        *out = Segment::ZERO;
        return Ok(ZERO_EXPONENT);
    };
    let mut q = [0i8; SEGMENT];
    let mut u = [1i32; BLOCKS];
    for (((x, q), a), u) in x
        .chunks_exact(32)
        .zip(q.chunks_exact_mut(32))
        .zip(maxima)
        .zip(&mut u)
    {
        while *u < 16 && a > (*u * 127) as f32 * d {
            *u += 1;
        }
        let r = 1.0 / (*u as f32 * d);
        for (x, q) in x.iter().zip(q) {
            *q = (x * r).round_ties_even() as i8;
        }
    }
    let (m, e) = take_apart(d);
    describe(&q, &u, m, out);
    Ok(e)
}

/// Fills in all but `shift` and `e_max` from the integers of the contract.
fn describe(q: &[i8; SEGMENT], u: &[i32; BLOCKS], m: i32, out: &mut Segment) {
    bytemuck::cast_slice_mut::<u32, i8>(&mut out.q).copy_from_slice(q);
    let mut halves = [0i32; 2 * BLOCKS];
    for (q, s) in q.chunks_exact(16).zip(&mut halves) {
        *s = q.iter().map(|q| i32::from(*q)).sum();
    }
    sums(&halves, u, m, out);
}

/// Fills in all but `q`, `shift` and `e_max`.
pub(super) fn sums(halves: &[i32; 2 * BLOCKS], u: &[i32; BLOCKS], m: i32, out: &mut Segment) {
    out.m = m;
    out.padding = [0; 5];
    for j in 0..BLOCKS {
        let (s0, s1) = (halves[2 * j], halves[2 * j + 1]);
        let um = u[j] * m;
        out.um_twice[j] = pair(um, um);
        out.u_twice[j] = pair(u[j], u[j]);
        out.mus_half[2 * j] = um * s0;
        out.mus_half[2 * j + 1] = um * s1;
        out.mus[j] = um * (s0 + s1);
        out.us_halves[j] = pair(u[j] * s0, u[j] * s1);
    }
    for j in 0..BLOCKS / 2 {
        let s = |j: usize| halves[2 * j] + halves[2 * j + 1];
        out.s_pair[j] = pair(s(2 * j), s(2 * j + 1));
        out.u_pair[j] = pair(u[2 * j], u[2 * j + 1]);
    }
}
