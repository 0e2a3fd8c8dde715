//! exp and tanh (§5).

/// Below it exp is 0.
const EXP_LOW: f32 = -104.0;
/// The largest f32 whose exponential is finite: 0x1.62e42ep+6.
const EXP_HIGH: f32 = f32::from_bits(0x42b1_7217);
/// log2(e), rounded: 0x1.715476p+0.
const LOG2_E: f32 = f32::from_bits(0x3fb8_aa3b);
/// 1.5 · 2^23: adding it rounds to an integer, which then stands in the low bits.
const ROUND: f32 = 12_582_912.0;
/// ln 2, rounded and negated: -0x1.62e430p-1.
const MINUS_LN2: f32 = f32::from_bits(0xbf31_7218);
/// What that is too much: 0x1.05c610p-29.
const LN2_EXCESS: f32 = f32::from_bits(0x3102_e308);
/// `(e^r − 1 − r) / r²` for `|r| ≤ ln 2 / 2`, highest coefficient first: 0x1.6a2352p-10, 0x1.123a6cp-7, 0x1.5558f4p-5,
/// 0x1.555490p-3, 0x1.fffffcp-2.
const EXP: [f32; 5] = [
    f32::from_bits(0x3ab5_11a9),
    f32::from_bits(0x3c09_1d36),
    f32::from_bits(0x3d2a_ac7a),
    f32::from_bits(0x3e2a_aa48),
    f32::from_bits(0x3eff_fffe),
];
/// `(tanh(a) − a) / a³` in `a²` for `a < 0.625`, highest coefficient first: -0x1.6e1a18p-8, 0x1.50701ep-6, -0x1.b7fa90p-5,
/// 0x1.11053cp-3, -0x1.55552ap-2.
const TANH: [f32; 5] = [
    f32::from_bits(0xbbb7_0d0c),
    f32::from_bits(0x3ca8_380f),
    f32::from_bits(0xbd5b_fd48),
    f32::from_bits(0x3e08_829e),
    f32::from_bits(0xbeaa_aa95),
];
/// From here on tanh goes through exp.
const TANH_SMALL: f32 = 0.625;

/// Horner's scheme in fma, highest coefficient first.
#[inline(always)]
fn polynomial(coefficients: [f32; 5], x: f32) -> f32 {
    let [a, b, c, d, e] = coefficients;
    a.mul_add(x, b).mul_add(x, c).mul_add(x, d).mul_add(x, e)
}

/// `2^n` for `−126 ≤ n ≤ 127`.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// `e^x`; a NaN stays one.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Two comparisons rather than `clamp`, so that a NaN passes and each is one instruction.
    let x = if EXP_LOW > x { EXP_LOW } else { x };
    let x = if EXP_HIGH < x { EXP_HIGH } else { x };
    let rounded = x.mul_add(LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(MINUS_LN2, x);
    let r = n.mul_add(LN2_EXCESS, r);
    let y = (r * r).mul_add(polynomial(EXP, r), r) + 1.0;
    // `n` from the bits of the sum: a conversion would have to handle what cannot occur.
    let n = (rounded.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    (y * power_of_two(half)) * power_of_two(n.wrapping_sub(half))
}

/// Hyperbolic tangent; a NaN stays one.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let z = a * a;
    let small = (a * z).mul_add(polynomial(TANH, z), a);
    let large = 1.0 - 2.0 / (exp(a + a) + 1.0);
    let t = if a < TANH_SMALL { small } else { large };
    t.copysign(x)
}

/// `cap · tanh(x / cap)`
#[inline(always)]
pub(crate) fn soft_cap(x: f32, cap: f32) -> f32 {
    cap * tanh(x / cap)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Kernel, Level};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU64, Ordering};

    const CHUNK: usize = 1 << 16;

    /// `f` of the f32 with the bits `start ..`.
    struct Range<'a, F>(F, u32, &'a mut [f32]);

    impl<F: Fn(f32) -> f32> Kernel for Range<'_, F> {
        type Output = ();

        #[inline(always)]
        fn run<const F16C: bool>(self) {
            for (i, out) in self.2.iter_mut().enumerate() {
                *out = (self.0)(f32::from_bits(self.1 + i as u32));
            }
        }
    }

    /// Steps between two f32 in the order of values; 0 for two NaN.
    fn steps(a: f32, b: f32) -> u32 {
        let order = |x: f32| {
            let bits = x.to_bits() as i32;
            if bits < 0 {
                i32::MIN.wrapping_sub(bits)
            } else {
                bits
            }
        };
        if a.is_nan() && b.is_nan() {
            0
        } else {
            order(a).abs_diff(order(b))
        }
    }

    /// Every `stride`-th chunk of all 2^32 inputs, on all processors; `check` sees a chunk's first input and the results of
    /// each instruction set, the fastest one last. Portable code calls a function for each fma where the compiler may not
    /// assume the instruction: it takes part in every `portable`-th of these chunks.
    fn sweep(
        stride: usize,
        portable: usize,
        f: fn(Level, u32, &mut [f32]),
        check: impl Fn(u32, &[Vec<f32>]) + Sync,
    ) {
        let levels: Vec<Level> = Level::available().collect();
        let next = AtomicU64::new(0);
        let work = || {
            let mut results = vec![vec![0.0; CHUNK]; levels.len()];
            loop {
                let chunk = next.fetch_add(stride as u64, Ordering::Relaxed);
                let Ok(start) = u32::try_from(chunk * CHUNK as u64) else {
                    return;
                };
                let first =
                    usize::from(levels.len() > 1 && !(chunk as usize / stride).is_multiple_of(portable));
                for (level, out) in levels.iter().zip(&mut results).skip(first) {
                    f(*level, start, out);
                }
                check(start, &results[first..]);
            }
        };
        std::thread::scope(|s| {
            for _ in 0..crate::provider::parallelism() {
                s.spawn(work);
            }
        });
    }

    fn exp_range(level: Level, start: u32, out: &mut [f32]) {
        level.run(Range(exp, start, out));
    }

    fn tanh_range(level: Level, start: u32, out: &mut [f32]) {
        level.run(Range(tanh, start, out));
    }

    fn assert_levels_agree(start: u32, results: &[Vec<f32>]) {
        for other in &results[1..] {
            let same = results[0]
                .iter()
                .zip(other)
                .all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan());
            assert!(same, "from {start:#010x} on");
        }
    }

    #[test]
    fn exp_is_monotonic_over_all_inputs_and_equal_on_every_instruction_set() {
        // What each chunk starts and ends with, to compare neighbours.
        let edges = Mutex::new(vec![(0.0, 0.0); 1 << 16]);
        sweep(1, 64, exp_range, |start, results| {
            assert_levels_agree(start, results);
            let y = &results[results.len() - 1];
            let negative = start >= 1 << 31;
            for pair in y.windows(2).filter(|p| !p[0].is_nan() && !p[1].is_nan()) {
                let (lower, higher) = if negative {
                    (pair[1], pair[0])
                } else {
                    (pair[0], pair[1])
                };
                assert!(lower <= higher, "{lower} > {higher} from {start:#010x} on");
            }
            edges.lock().unwrap()[start as usize / CHUNK] = (y[0], y[CHUNK - 1]);
        });
        let edges = edges.into_inner().unwrap();
        let infinity = 0x7f80;
        for i in 1..infinity {
            assert!(edges[i - 1].1 <= edges[i].0);
            assert!(edges[i - 1 + (1 << 15)].1 >= edges[i + (1 << 15)].0);
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::INFINITY).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_equal_on_every_instruction_set() {
        sweep(8, 16, tanh_range, assert_levels_agree);
        assert_eq!(tanh(-0.0).to_bits(), (-0.0f32).to_bits());
        assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)), (1.0, -1.0));
        assert!(tanh(f32::NAN).is_nan());
    }

    fn worst(
        stride: usize,
        f: fn(Level, u32, &mut [f32]),
        exact: fn(f64) -> f64,
        inputs: fn(f32) -> bool,
    ) -> u32 {
        let worst = AtomicU64::new(0);
        sweep(stride, usize::MAX, f, |start, results| {
            for (i, y) in results[results.len() - 1].iter().enumerate() {
                let x = f32::from_bits(start + i as u32);
                if inputs(x) {
                    let off = steps(*y, exact(x.into()) as f32);
                    worst.fetch_max(off.into(), Ordering::Relaxed);
                }
            }
        });
        worst.into_inner() as u32
    }

    fn exp_inputs(x: f32) -> bool {
        (EXP_LOW..=EXP_HIGH).contains(&x)
    }

    #[test]
    fn a_sixty_fourth_of_all_inputs_is_within_the_stated_error() {
        assert!(worst(64, exp_range, f64::exp, exp_inputs) <= 1);
        assert!(worst(64, tanh_range, f64::tanh, |x| !x.is_nan()) <= 2);
    }

    #[test]
    #[ignore = "minutes; the tests above take a part of the same inputs"]
    fn every_instruction_set_agrees_on_all_inputs() {
        sweep(1, 1, exp_range, assert_levels_agree);
        sweep(1, 1, tanh_range, assert_levels_agree);
    }

    #[test]
    #[ignore = "minutes; the test above takes every 64th chunk of the same inputs"]
    fn all_inputs_are_within_the_stated_error() {
        let exp = worst(1, exp_range, f64::exp, exp_inputs);
        let tanh = worst(1, tanh_range, f64::tanh, |x| !x.is_nan());
        println!("steps from the correctly rounded value: exp {exp}, tanh {tanh}");
        assert!(exp <= 1 && tanh <= 2);
    }
}
