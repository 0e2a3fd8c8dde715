//! Values of float matrices and of the cache, and how they widen to f32: exactly.

use half::{bf16, f16};

/// Lanes that the loops of this module work in.
pub(crate) const LANES: usize = 16;

/// A stored float.
pub(crate) trait Element: bytemuck::Pod + Send + Sync {
    /// Its value.
    fn widen(self) -> f32;

    /// The values of sixteen. `F16C`: the instruction set converts f16.
    fn widen_lanes<const F16C: bool>(values: &[Self; LANES]) -> [f32; LANES];
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn widen_lanes<const F16C: bool>(values: &[Self; LANES]) -> [f32; LANES] {
        *values
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn widen_lanes<const F16C: bool>(values: &[Self; LANES]) -> [f32; LANES] {
        values.map(Element::widen)
    }
}

impl Element for f16 {
    /// The exponent moves by 112 with one exact multiplication, which also makes subnormals normal. Infinity and NaN, which
    /// no weight and no cache holds, would become numbers.
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
        f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn widen_lanes<const F16C: bool>(values: &[Self; LANES]) -> [f32; LANES] {
        #[cfg(target_arch = "x86_64")]
        if F16C {
            use std::arch::x86_64::{__m128i, __m256, _mm256_cvtph_ps};
            let [low, high]: [__m128i; 2] = bytemuck::cast(*values);
            // SAFETY: `F16C` says that the processor has the instruction.
            let low: __m256 = unsafe { _mm256_cvtph_ps(low) };
            // SAFETY: as above.
            let high: __m256 = unsafe { _mm256_cvtph_ps(high) };
            return bytemuck::cast([low, high]);
        }
        values.map(Element::widen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Kernel, Level};

    struct Widen(u16);

    impl Kernel for Widen {
        type Output = [f32; LANES];

        #[inline(always)]
        fn run<const F16C: bool>(self) -> [f32; LANES] {
            f16::widen_lanes::<F16C>(&std::array::from_fn(|i| f16::from_bits(self.0 + i as u16)))
        }
    }

    #[test]
    fn every_finite_f16_widens_exactly() {
        for level in Level::available() {
            for start in (0..=u16::MAX).step_by(LANES) {
                for (i, wide) in level.run(Widen(start)).iter().enumerate() {
                    let narrow = f16::from_bits(start + i as u16);
                    if narrow.is_finite() {
                        assert_eq!(wide.to_bits(), narrow.to_f32().to_bits(), "{level:?} {narrow:?}");
                    }
                }
            }
        }
    }
}
