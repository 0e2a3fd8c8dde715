//! Random weights, block by block, with scales that keep a model's activations near one.

use half::{bf16, f16};
use hoist_backend::Encoding;

use crate::rng::Rng;

/// How the values of a tensor are spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Spread {
    /// Around zero with this standard deviation.
    Centred {
        /// Standard deviation.
        deviation: f32,
    },
    /// Uniform in `1 ± 0.25`: norm vectors.
    AroundOne,
}

/// Fills `out`, whole blocks of `encoding`, with random weights.
///
/// Quants are random bits; the scale fields of each block are then set so that the decoded values have the wanted
/// deviation, each within a factor of `1 ± 1/8` of it. Where an encoding has mins they centre the block on zero.
pub(crate) fn fill(encoding: Encoding, spread: Spread, rng: &mut Rng, out: &mut [u8]) {
    match encoding {
        Encoding::F32 => each(out, 4, |b| b.copy_from_slice(&element(spread, rng).to_le_bytes())),
        Encoding::F16 => each(out, 2, |b| {
            b.copy_from_slice(&f16::from_f32(element(spread, rng)).to_le_bytes());
        }),
        Encoding::BF16 => each(out, 2, |b| {
            b.copy_from_slice(&bf16::from_f32(element(spread, rng)).to_le_bytes());
        }),
        _ => {
            let Spread::Centred { deviation } = spread else {
                unreachable!("norm vectors are never quantised")
            };
            rng.fill(out);
            let layout = Layout::of(encoding);
            let block = encoding.block_bytes() as usize;
            let unit = deviation / layout.deviation;
            for b in out.chunks_exact_mut(block) {
                layout.set_scales(b, unit, rng);
            }
        }
    }
}

fn each(out: &mut [u8], size: usize, mut f: impl FnMut(&mut [u8])) {
    out.chunks_exact_mut(size).for_each(&mut f);
}

/// Uniform, with the wanted deviation: `[-√3, √3) · deviation`.
fn element(spread: Spread, rng: &mut Rng) -> f32 {
    // 24 bits, so that the conversion and the division are exact.
    let unit = (rng.next() >> 40) as f32 / 8_388_608.0 - 1.0;
    match spread {
        Spread::Centred { deviation } => unit * (deviation * 1.732_050_8),
        Spread::AroundOne => 1.0 + unit * 0.25,
    }
}

/// Where the scales of a block are, and what random quants are worth: measured on 4,000 random blocks of each encoding,
/// decoded by the Python package `gguf`.
struct Layout {
    scales: Scales,
    /// Standard deviation of a decoded value when the scale is 1 and the quants are random bits.
    deviation: f32,
}

enum Scales {
    /// One f16 at this byte.
    F16(usize),
    /// An f16 scale and an f16 min that is `factor` times it.
    F16WithMin { scale: usize, min: usize, factor: f32 },
    /// Q4_K, Q5_K: as `F16WithMin` at 0 and 2, with 6-bit sub-scales and sub-mins packed in bytes 4..16 made equal.
    KQuant { factor: f32 },
    /// IQ1_M: the f16 is spread over the top nibbles of four u16 at bytes 48..56.
    Iq1M,
    /// MXFP4: a power of two, biased by 127.
    E8M0,
    /// NVFP4: four UE4M3 bytes.
    Ue4m3,
}

impl Layout {
    fn of(encoding: Encoding) -> Self {
        use Encoding as E;
        let f16 = |at, deviation| Self {
            scales: Scales::F16(at),
            deviation,
        };
        let with_min = |scale, min, factor, deviation| Self {
            scales: Scales::F16WithMin { scale, min, factor },
            deviation,
        };
        match encoding {
            E::Q4_0 => f16(0, 4.61),
            E::Q4_1 => with_min(0, 2, -7.5, 4.62),
            E::Q5_0 => f16(0, 9.24),
            E::Q5_1 => with_min(0, 2, -15.5, 9.22),
            E::Q8_0 => f16(0, 73.9),
            // q in 0..=3, 4-bit sub-scale and sub-min.
            E::Q2_K => with_min(80, 82, 1.5, 13.8),
            E::Q3_K => f16(108, 43.4),
            E::Q4_K => Self {
                scales: Scales::KQuant { factor: 7.5 },
                deviation: 169.0,
            },
            E::Q5_K => Self {
                scales: Scales::KQuant { factor: 15.5 },
                deviation: 338.0,
            },
            E::Q6_K => f16(208, 1366.0),
            E::IQ4_NL => f16(0, 67.4),
            E::IQ4_XS => f16(0, 1246.0),
            E::IQ2_XXS => f16(0, 53.4),
            E::IQ2_XS | E::IQ2_S => f16(0, 56.0),
            E::IQ3_XXS => f16(0, 143.0),
            E::IQ3_S => f16(0, 140.0),
            E::IQ1_S => f16(0, 7.2),
            E::IQ1_M => Self {
                scales: Scales::Iq1M,
                deviation: 7.2,
            },
            E::TQ1_0 => f16(52, 0.8),
            E::TQ2_0 => f16(64, 1.2),
            E::Q1_0 => f16(0, 1.0),
            E::Q2_0 => f16(0, 1.2),
            E::MXFP4 => Self {
                scales: Scales::E8M0,
                deviation: 2.9,
            },
            E::NVFP4 => Self {
                scales: Scales::Ue4m3,
                deviation: 2.9,
            },
            other => unreachable!("{other} is no weight encoding"),
        }
    }

    fn set_scales(&self, block: &mut [u8], unit: f32, rng: &mut Rng) {
        // Six random bits move each scale by up to an eighth.
        let scale = unit * (0.875 + (rng.next() >> 58) as f32 / 256.0);
        match self.scales {
            Scales::F16(at) => put_f16(block, at, scale),
            Scales::F16WithMin {
                scale: at,
                min,
                factor,
            } => {
                put_f16(block, at, scale);
                put_f16(block, min, scale * factor);
            }
            Scales::KQuant { factor } => {
                put_f16(block, 0, scale);
                put_f16(block, 2, scale * factor);
                // Byte j of 4..8 and byte j + 4 hold sub-scale and sub-min j; the nibbles of bytes 12..16 hold the low
                // bits of sub-scale and sub-min 4 + j.
                block.copy_within(4..8, 8);
                for b in &mut block[12..16] {
                    *b = (*b & 15) * 17;
                }
            }
            Scales::Iq1M => {
                let bits = f16::from_f32(scale).to_bits();
                for i in 0..4 {
                    let top = &mut block[48 + 2 * i + 1];
                    *top = *top & 0x0F | ((bits >> (4 * i)) as u8 & 0x0F) << 4;
                }
            }
            Scales::E8M0 => block[0] = (127 + exponent(scale)).clamp(1, 254) as u8,
            // Bias 7, three mantissa bits; the power of two alone is near enough.
            Scales::Ue4m3 => block[..4].fill(((exponent(scale) + 7).clamp(1, 14) as u8) << 3),
        }
    }
}

fn put_f16(block: &mut [u8], at: usize, value: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// `floor(log2(x))` of a positive normal number.
fn exponent(x: f32) -> i32 {
    (x.to_bits() >> 23) as i32 - 127
}
