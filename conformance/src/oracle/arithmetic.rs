//! Roundings and conversions, done on integers so that they depend on no library and no processor.

use super::deviation::by_contract;

/// A positive value `significand · 2^exponent` after rounding to a binary format.
struct Rounded {
    significand: u128,
    exponent: i32,
}

/// Rounds `magnitude · 2^exponent` to `precision` significant bits, ties to even; no bit below `2^lowest` is kept
/// (gradual underflow).
fn round_binary(magnitude: u128, exponent: i32, precision: i32, lowest: i32) -> Rounded {
    let bits = 128 - magnitude.leading_zeros() as i32;
    let last = (exponent + bits - precision).max(lowest);
    let drop = last - exponent;
    if drop <= 0 {
        return Rounded {
            significand: magnitude << -drop,
            exponent: last,
        };
    }
    if drop > bits {
        // Below half of the last place.
        return Rounded {
            significand: 0,
            exponent: last,
        };
    }
    let (kept, rest, half) = if drop == 128 {
        (0, magnitude, 1 << 127)
    } else {
        (magnitude >> drop, magnitude & ((1 << drop) - 1), 1 << (drop - 1))
    };
    let ties_up = by_contract!(kept & 1 == 1, TiesAwayFromZero => true);
    let up = rest > half || (rest == half && ties_up);
    Rounded {
        significand: kept + u128::from(up),
        exponent: last,
    }
}

/// `±magnitude · 2^exponent` rounded once to f32: to nearest, ties to even, gradual underflow; infinity on overflow.
pub(super) fn round_to_f32(negative: bool, magnitude: u128, exponent: i32) -> f32 {
    let sign = u32::from(negative) << 31;
    if magnitude == 0 {
        return f32::from_bits(sign);
    }
    let mut r = round_binary(magnitude, exponent, 24, -149);
    if r.significand == 1 << 24 {
        r = Rounded {
            significand: 1 << 23,
            exponent: r.exponent + 1,
        };
    }
    let significand = r.significand as u32; // at most 2^24 - 1
    let bits = if significand < 1 << 23 {
        by_contract!(significand, UnderflowFlushed => 0) // subnormal: the last place is 2^-149
    } else if r.exponent > 104 {
        f32::INFINITY.to_bits()
    } else {
        ((r.exponent + 150) as u32) << 23 | (significand - (1 << 23))
    };
    f32::from_bits(sign | bits)
}

/// An integer rounded to f32, ties to even.
pub fn integer_to_f32(value: i64) -> f32 {
    round_to_f32(value < 0, value.unsigned_abs().into(), 0)
}

/// `x · 2^n` rounded once, with gradual underflow; infinity on overflow.
pub fn times_power_of_two(x: f32, n: i32) -> f32 {
    if !x.is_finite() {
        return x;
    }
    let bits = x.to_bits();
    let field = (bits >> 23 & 0xff) as i32;
    let fraction = u128::from(bits & 0x7f_ffff);
    let (significand, exponent) = if field == 0 {
        (fraction, -149)
    } else {
        (fraction | 1 << 23, field - 150)
    };
    round_to_f32(bits >> 31 == 1, significand, exponent + n)
}

/// The f32 of an f16, which is exact; infinities and NaN stay what they are.
pub fn f16_to_f32(half: u16) -> f32 {
    let negative = half >> 15 == 1;
    let field = i32::from(half >> 10 & 0x1f);
    let fraction = half & 0x3ff;
    match field {
        0 => round_to_f32(negative, fraction.into(), -24),
        31 if fraction == 0 && negative => f32::NEG_INFINITY,
        31 if fraction == 0 => f32::INFINITY,
        31 => f32::NAN,
        _ => round_to_f32(negative, (fraction | 1 << 10).into(), field - 25),
    }
}

/// §4 StoreKv: an f32 rounded to f16, ties to even, gradual underflow; `None` for a NaN, an infinity and a magnitude that
/// would round to infinity.
pub fn f32_to_f16(x: f32) -> Option<u16> {
    if !x.is_finite() {
        return None;
    }
    let bits = x.to_bits();
    let sign = ((bits >> 31) as u16) << 15;
    let field = (bits >> 23 & 0xff) as i32;
    let fraction = u128::from(bits & 0x7f_ffff);
    let (significand, exponent) = if field == 0 {
        (fraction, -149)
    } else {
        (fraction | 1 << 23, field - 150)
    };
    if significand == 0 {
        return Some(sign);
    }
    let mut r = round_binary(significand, exponent, 11, -24);
    if r.significand == 1 << 11 {
        r = Rounded {
            significand: 1 << 10,
            exponent: r.exponent + 1,
        };
    }
    let significand = r.significand as u16; // at most 2^11 - 1
    if significand < 1 << 10 {
        return Some(sign | by_contract!(significand, KvSubnormalsFlushed => 0));
    }
    if r.exponent > 5 {
        return None;
    }
    Some(sign | ((r.exponent + 25) as u16) << 10 | (significand - (1 << 10)))
}

/// The nearest integer, ties to even. `x` is finite and small.
pub(super) fn nearest_integer(x: f32) -> i64 {
    let floor = x.floor();
    let rest = x - floor; // exact: both are multiples of x's last place
    let floor_integer = floor as i64;
    let ties_up = by_contract!(floor_integer & 1 == 1, QuantTiesAway => x > 0.0);
    floor_integer + i64::from(rest > 0.5 || (rest == 0.5 && ties_up))
}

/// `>>` of the contract: the floor of `value / 2^by`.
pub(super) fn shift_right(value: i128, by: u32) -> i128 {
    by_contract!(value >> by, ShiftTruncates => value / (1 << by))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit patterns that reach every exponent, both signs and the ends of the significand.
    fn patterns() -> impl Iterator<Item = u32> {
        (0..=0x1ffu32).flat_map(|high| {
            [
                0, 1, 2, 3, 0x3f_ffff, 0x40_0000, 0x40_0001, 0x7f_fffe, 0x7f_ffff, 0x2a_aaab,
            ]
            .map(|fraction| high << 23 | fraction)
        })
    }

    #[test]
    fn integers_convert_as_the_processor_does() {
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        for i in 0..200_000u64 {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(i | 1);
            let v = (x as i64) >> (x >> 58);
            assert_eq!(integer_to_f32(v).to_bits(), (v as f32).to_bits(), "{v}");
        }
        for p in 24..63 {
            for d in -3..=3i64 {
                for half in [0, 1i64 << (p - 24)] {
                    let v = (1i64 << p) + half + d;
                    assert_eq!(integer_to_f32(v).to_bits(), (v as f32).to_bits(), "{v}");
                    assert_eq!(integer_to_f32(-v).to_bits(), (-v as f32).to_bits(), "-{v}");
                }
            }
        }
        assert_eq!(integer_to_f32(i64::MIN), i64::MIN as f32);
        assert_eq!(integer_to_f32(i64::MAX), i64::MAX as f32);
    }

    #[test]
    fn powers_of_two_scale_as_f64_rounded_once() {
        for bits in patterns() {
            let x = f32::from_bits(bits);
            if !x.is_finite() {
                continue;
            }
            for n in -300..300 {
                // Exact in f64: an f32 has 24 bits and the exponent stays within f64's range.
                let exact = f64::from(x) * 2f64.powi(n);
                assert_eq!(
                    times_power_of_two(x, n).to_bits(),
                    (exact as f32).to_bits(),
                    "{x} · 2^{n}"
                );
            }
        }
    }

    #[test]
    fn every_f16_round_trips_and_neighbours_round_to_even() {
        for half in 0..=u16::MAX {
            let x = f16_to_f32(half);
            if half >> 10 & 0x1f == 31 {
                assert!(!x.is_finite());
                assert_eq!(f32_to_f16(x), None);
                continue;
            }
            assert_eq!(f32_to_f16(x), Some(half));
            // Halfway to the next magnitude goes to the even one, a hair past it up, a hair before it down.
            let next = half + 1;
            if next >> 10 & 0x1f == 31 || half & 0x7fff == 0x7fff {
                continue;
            }
            let middle = (x + f16_to_f32(next)) / 2.0;
            let even = if half & 1 == 0 { half } else { next };
            assert_eq!(f32_to_f16(middle), Some(even));
            assert_eq!(f32_to_f16(f32::from_bits(middle.to_bits() + 1)), Some(next));
            assert_eq!(f32_to_f16(f32::from_bits(middle.to_bits() - 1)), Some(half));
        }
        assert_eq!(f32_to_f16(65519.996), Some(0x7bff));
        assert_eq!(f32_to_f16(65520.0), None);
        assert_eq!(f32_to_f16(-65520.0), None);
        assert_eq!(f32_to_f16(f32::from_bits(1)), Some(0));
        assert_eq!(f32_to_f16(f32::MAX), None);
    }

    #[test]
    fn halves_round_to_the_even_integer() {
        for i in -4096..4096 {
            let x = i as f32 / 32.0;
            assert_eq!(nearest_integer(x), x.round_ties_even() as i64, "{x}");
        }
    }
}
