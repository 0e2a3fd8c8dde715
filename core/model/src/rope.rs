//! RoPE tables, computed on the host.
//!
//! Pair `j` of position `p` turns by `p · f_j`, in f64, where `f_j = base^(-2j / n_rot)` after scaling; cos and sin come from
//! the `libm` crate in f64, are multiplied by the attention factor, and are rounded once to f32. So the bits are the same on
//! every machine.

use std::f64::consts::PI;
use std::sync::Arc;

use crate::{RopeParameters, RopeScaling};

/// Positions a thread computes at least: below that, starting it costs more than it saves.
const ROWS_PER_THREAD: usize = 4096;

/// The frequency of each pair, in radians a position; `n_rot / 2` of them. Long-rope picks its factors by `max_context`.
pub(crate) fn frequencies(rope: &RopeParameters, max_context: u32) -> Vec<f64> {
    let n_rot = f64::from(rope.n_rot);
    let mut frequencies: Vec<f64> = (0..rope.n_rot / 2)
        .map(|j| libm::pow(rope.base, -2.0 * f64::from(j) / n_rot))
        .collect();
    match &rope.scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => {
            for f in &mut frequencies {
                *f /= factor;
            }
        }
        RopeScaling::Llama3 {
            factor,
            low,
            high,
            original,
        } => {
            let original = f64::from(*original);
            for f in &mut frequencies {
                let wavelength = 2.0 * PI / *f;
                if wavelength > original / low {
                    *f /= factor;
                } else if wavelength >= original / high {
                    // Interpolated by how many turns fit the original context.
                    let smooth = (original / wavelength - low) / (high - low);
                    *f = (1.0 - smooth) * *f / factor + smooth * *f;
                }
            }
        }
        RopeScaling::Yarn {
            factor,
            original,
            beta_fast,
            beta_slow,
            truncate,
            ..
        } => {
            // The pair that makes `turns` turns within the original context.
            let pair = |turns: f64| {
                n_rot * libm::log(f64::from(*original) / (turns * 2.0 * PI)) / (2.0 * libm::log(rope.base))
            };
            let (mut low, mut high) = (pair(*beta_fast), pair(*beta_slow));
            if *truncate {
                (low, high) = (libm::floor(low), libm::ceil(high));
            }
            let low = low.max(0.0);
            let high = high.min(n_rot - 1.0);
            // arXiv:2309.00071's code keeps the ramp from being a division by zero in the same way.
            let span = if high == low { 0.001 } else { high - low };
            for (j, f) in frequencies.iter_mut().enumerate() {
                let divided = ((j as f64 - low) / span).clamp(0.0, 1.0);
                *f = *f / factor * divided + *f * (1.0 - divided);
            }
        }
        RopeScaling::LongRope {
            short,
            long,
            original,
            ..
        } => {
            let divisors = if max_context > *original { long } else { short };
            for (f, divisor) in frequencies.iter_mut().zip(divisors) {
                *f /= divisor;
            }
        }
    }
    if let Some(divisors) = &rope.frequency_divisors {
        for (f, divisor) in frequencies.iter_mut().zip(divisors) {
            *f /= f64::from(*divisor);
        }
    }
    frequencies
}

/// What cos and sin are multiplied with.
pub(crate) fn attention_factor(rope: &RopeParameters) -> f64 {
    match rope.scaling {
        RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
            attention_factor
        }
        RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
    }
}

/// The table `[max_context, n_rot]`: for pair `j` cos at `2j` and sin at `2j + 1`.
pub(crate) fn table(rope: &RopeParameters, max_context: u32) -> Arc<[f32]> {
    let frequencies = frequencies(rope, max_context);
    let factor = attention_factor(rope);
    let cols = frequencies.len() * 2;
    let mut data: Arc<[f32]> = std::iter::repeat_n(0f32, max_context as usize * cols).collect();
    let Some(values) = Arc::get_mut(&mut data) else {
        return data; // never: nobody else holds it yet
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let rows = (max_context as usize).div_ceil(threads).max(ROWS_PER_THREAD);
    // Every value is computed alone, so how rows are shared among threads changes no bit.
    std::thread::scope(|scope| {
        for (block, chunk) in values.chunks_mut(rows * cols).enumerate() {
            let frequencies = &frequencies;
            let mut fill = move || {
                for (row, values) in chunk.chunks_exact_mut(cols).enumerate() {
                    let position = (block * rows + row) as f64;
                    for (pair, f) in values.as_chunks_mut::<2>().0.iter_mut().zip(frequencies) {
                        let angle = position * f;
                        *pair = [
                            (libm::cos(angle) * factor) as f32,
                            (libm::sin(angle) * factor) as f32,
                        ];
                    }
                }
            };
            if max_context as usize <= rows {
                fill();
            } else {
                scope.spawn(fill);
            }
        }
    });
    data
}

#[cfg(test)]
mod tests {
    use super::*;
    use hoist_backend::RopeStyle;

    fn rope(scaling: RopeScaling) -> RopeParameters {
        RopeParameters {
            style: RopeStyle::HalfSplit,
            n_rot: 8,
            base: 10_000.0,
            scaling,
            frequency_divisors: None,
        }
    }

    #[test]
    fn unscaled_frequencies_are_powers_of_the_base() {
        let f = frequencies(&rope(RopeScaling::None), 16);
        for (found, expected) in f.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!((found / expected - 1.0f64).abs() < 1e-15, "{found} {expected}");
        }
        let table = table(&rope(RopeScaling::None), 16);
        assert_eq!(table.len(), 16 * 8);
        assert_eq!(&table[..4], [1.0, 0.0, 1.0, 0.0]);
        assert_eq!(table[3 * 8 + 2], libm::cos(3.0 * f[1]) as f32);
        assert_eq!(table[3 * 8 + 3], libm::sin(3.0 * f[1]) as f32);
    }

    #[test]
    fn a_table_made_by_many_threads_is_the_table_of_one() {
        let rope = rope(RopeScaling::Linear { factor: 4.0 });
        let long = table(&rope, 3 * ROWS_PER_THREAD as u32 + 5);
        let short = table(&rope, 100);
        assert_eq!(&long[..short.len()], &short[..]);
        let f = frequencies(&rope, 1);
        for position in [4095usize, 4096, 8191, 8192, 12292] {
            assert_eq!(
                long[position * 8 + 1],
                libm::sin(position as f64 * f[0]) as f32,
                "{position}"
            );
        }
    }

    #[test]
    fn llama3_divides_low_frequencies_and_keeps_high_ones() {
        let plain = frequencies(&rope(RopeScaling::None), 1);
        let scaled = frequencies(
            &rope(RopeScaling::Llama3 {
                factor: 8.0,
                low: 1.0,
                high: 4.0,
                original: 1000,
            }),
            1,
        );
        // Wavelengths are 6.3, 63, 628 and 6283 positions; the bounds are 1000 and 250.
        assert_eq!(scaled[..2], plain[..2]);
        assert!(scaled[2] < plain[2] && scaled[2] > plain[2] / 8.0);
        assert_eq!(scaled[3], plain[3] / 8.0);
    }

    #[test]
    fn yarn_goes_from_kept_to_divided() {
        let yarn = |truncate| {
            rope(RopeScaling::Yarn {
                factor: 4.0,
                original: 1000,
                beta_fast: 32.0,
                beta_slow: 1.0,
                truncate,
                attention_factor: 1.25,
            })
        };
        let plain = frequencies(&rope(RopeScaling::None), 1);
        // Bounds of the ramp: 0.70 and 2.20, truncated 0 and 3.
        let scaled = frequencies(&yarn(true), 1);
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[1] / (plain[1] * (1.0 / 3.0 / 4.0 + 2.0 / 3.0)) - 1.0).abs() < 1e-12);
        assert_eq!(scaled[3], plain[3] / 4.0);
        assert!(frequencies(&yarn(false), 1)[1] > scaled[1]);
        assert_eq!(table(&yarn(true), 1)[..2], [1.25, 0.0]);
    }

    #[test]
    fn long_rope_chooses_by_the_context_and_never_by_position() {
        let rope = rope(RopeScaling::LongRope {
            short: vec![1.0; 4],
            long: vec![2.0; 4],
            original: 64,
            attention_factor: 1.5,
        });
        let plain = frequencies(&rope, 64);
        assert_eq!(frequencies(&rope, 65)[0], plain[0] / 2.0);
        assert_eq!(table(&rope, 64)[8], (libm::cos(1.0) * 1.5) as f32);
        assert_eq!(table(&rope, 65)[8], (libm::cos(0.5) * 1.5) as f32);
    }
}
