//! Scales: small floating-point numbers, as f32 and taken apart into integers.

/// A scale: `value = m · 2^e`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scale {
    /// Significand with its sign, not normalised; below 2^11 in magnitude.
    pub(crate) m: i16,
    /// Exponent: that of its format's field even where `m` is zero.
    pub(crate) e: i16,
    /// The same number in f32. It alone tells −0 from +0, and infinities and NaNs from numbers.
    pub(crate) value: f32,
}

impl Scale {
    /// IEEE binary16: `e = max(E, 1) − 25`, so that subnormals are not normalised. For `E = 31` only `value` has a
    /// meaning.
    #[inline]
    pub(crate) fn from_f16(bits: u16) -> Self {
        let exponent = bits >> 10 & 31;
        let fraction = bits & 0x3ff;
        let magnitude = if exponent == 0 { fraction } else { fraction | 0x400 } as i16;
        Self {
            m: if bits & 0x8000 == 0 { magnitude } else { -magnitude },
            e: f16_exponent(bits),
            value: f16_to_f32(bits),
        }
    }

    /// OCP E8M0, halved because MXFP4's codes are doubled: `2^(byte − 128)`. GGML gives 255, NaN in the standard, no
    /// meaning of its own: it is refused where weights are checked.
    #[inline]
    pub(crate) fn from_e8m0_half(byte: u8) -> Self {
        let bits = match byte {
            0 | 1 => 0x0020_0000 << byte,
            _ => u32::from(byte - 1) << 23,
        };
        Self {
            m: 1,
            e: i16::from(byte) - 128,
            value: f32::from_bits(bits),
        }
    }

    /// Unsigned E4M3 with bias 7, halved because NVFP4's codes are doubled: `m · 2^(max(E, 1) − 11)`. As in GGML bit 7
    /// is ignored, except that 0x7F alone is zero; it keeps the exponent of its field, `E = 15`.
    #[inline]
    pub(crate) fn from_ue4m3_half(byte: u8) -> Self {
        let exponent = i16::from(byte >> 3 & 15);
        let fraction = i16::from(byte & 7);
        let m = match (byte, exponent) {
            (0x7f, _) => 0,
            (_, 0) => fraction,
            _ => fraction | 8,
        };
        let e = exponent.max(1) - 11;
        Self {
            m,
            e,
            value: f32::from(m) * exp2(e),
        }
    }
}

/// `max(E, 1) − 25` of an IEEE binary16.
#[inline]
pub(crate) fn f16_exponent(bits: u16) -> i16 {
    ((bits >> 10 & 31) as i16).max(1) - 25
}

/// `2^e` for exponents of normal f32.
#[inline]
pub(crate) fn exp2(e: i16) -> f32 {
    debug_assert!((-126..=127).contains(&e));
    f32::from_bits(((i32::from(e) + 127) as u32) << 23)
}

/// IEEE binary16 to f32, exactly; signs of zeros and payloads of NaNs are kept. Without branches, so that loops over it
/// become SIMD code on any target.
#[inline]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    let subnormal = (magnitude as f32 * exp2(-24)).to_bits();
    let normal = (magnitude << 13) + (112 << 23);
    let special = magnitude << 13 | 0x7f80_0000;
    f32::from_bits(
        sign | if magnitude < 0x400 {
            subnormal
        } else if magnitude < 0x7c00 {
            normal
        } else {
            special
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_converts_as_the_half_crate_does() {
        for bits in 0..=u16::MAX {
            let ours = f16_to_f32(bits);
            let theirs = half::f16::from_bits(bits).to_f32_const();
            if theirs.is_nan() {
                assert!(ours.is_nan());
            } else {
                assert_eq!(ours.to_bits(), theirs.to_bits(), "{bits:#06x}");
            }
        }
    }

    #[test]
    fn every_finite_f16_equals_its_parts() {
        for bits in 0..=u16::MAX {
            let s = Scale::from_f16(bits);
            if s.value.is_finite() {
                assert!(s.m.unsigned_abs() < 1 << 11);
                assert_eq!(f32::from(s.m) * exp2(s.e), s.value, "{bits:#06x}");
            }
        }
    }

    #[test]
    fn every_e8m0_equals_its_parts() {
        for byte in 0..=255 {
            let s = Scale::from_e8m0_half(byte);
            assert_eq!(
                f64::from(s.value),
                f64::from(s.m) * 2f64.powi(s.e.into()),
                "{byte}"
            );
        }
    }

    #[test]
    fn ue4m3_has_one_code_beside_zero_that_reads_as_zero() {
        let zeros: Vec<u8> = (0..=255)
            .filter(|b| Scale::from_ue4m3_half(*b).value == 0.0)
            .collect();
        assert_eq!(zeros, [0, 0x7f, 0x80]);
        assert_eq!(
            [0, 0x7f, 0x80].map(|b| Scale::from_ue4m3_half(b).e),
            [-10, 4, -10]
        );
        // 1.0 is exponent 7, fraction 0; halved.
        assert_eq!(Scale::from_ue4m3_half(7 << 3).value, 0.5);
        assert_eq!(Scale::from_ue4m3_half(0xff).value, 240.0);
    }
}
