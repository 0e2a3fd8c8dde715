//! Seeded random operands: weights with chosen scales and activations with chosen magnitudes.
//!
//! Ordinary operands hide wrong floors and exponents in the last rounding; the others here are made to reveal them.

use hoist_backend::{Encoding, Result, Shape};

use crate::oracle::f32_to_f16;

/// A generator of repeatable numbers (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator; equal seeds give equal numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is at least 1.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.bits() % bound
    }

    /// One of several.
    pub fn choose<T: Copy, const N: usize>(&mut self, of: [T; N]) -> T {
        of[self.below(N as u64) as usize]
    }

    /// Uniform in −1 … 1.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// About normal: the sum of four uniform numbers, with variance 4/3.
    pub fn bell(&mut self) -> f32 {
        (0..4).map(|_| self.unit()).sum()
    }
}

/// How the scales of quantised weights are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// About as in real models.
    Ordinary,
    /// Exponents all over the range, subnormals, zeros and negative ones among them.
    Spread,
    /// Subnormal f16; the smallest of other kinds.
    Subnormal,
}

/// Random canonical bytes of a weight: quantised blocks are random but for their scales, float values are small.
///
/// # Errors
/// [`hoist_backend::Error::InvalidArgument`] for a shape that the encoding does not allow.
pub fn weight(random: &mut Random, encoding: Encoding, shape: Shape, scales: Scales) -> Result<Vec<u8>> {
    let nbytes = encoding.nbytes(shape)? as usize;
    let values = || 0..nbytes as u64 / encoding.block_bytes();
    Ok(match encoding {
        Encoding::F32 => values()
            .flat_map(|_| (random.bell() * 0.1).to_le_bytes())
            .collect(),
        Encoding::F16 => values()
            .flat_map(|_| f16(random.bell() * 0.1).to_le_bytes())
            .collect(),
        Encoding::BF16 => values()
            .flat_map(|_| (((random.bell() * 0.1).to_bits() >> 16) as u16).to_le_bytes())
            .collect(),
        Encoding::APR_Q8 => {
            let mut bytes: Vec<u8> = (0..nbytes).map(|_| random.bits() as u8).collect();
            for matrix in bytes.chunks_mut(nbytes / shape.matrices.max(1) as usize) {
                let scale = match scales {
                    Scales::Ordinary => 0.002,
                    Scales::Spread => -0.7,
                    Scales::Subnormal => 1e-41,
                };
                matrix[..4].copy_from_slice(&f32::to_le_bytes(scale));
            }
            bytes
        }
        _ => {
            let mut bytes: Vec<u8> = (0..nbytes).map(|_| random.bits() as u8).collect();
            for block in bytes.chunks_mut(encoding.block_bytes() as usize) {
                set_scales(random, encoding, block, scales);
            }
            bytes
        }
    })
}

fn f16(x: f32) -> u16 {
    f32_to_f16(x).unwrap_or(0)
}

/// Overwrites the scales of a random block.
fn set_scales(random: &mut Random, encoding: Encoding, block: &mut [u8], scales: Scales) {
    use Encoding::*;
    let places: &[usize] = match encoding {
        Q4_1 | Q5_1 | Q4_K | Q5_K => &[0, 2],
        Q2_K => &[80, 82],
        Q3_K => &[108],
        Q6_K => &[208],
        TQ1_0 => &[52],
        TQ2_0 => &[64],
        MXFP4 => {
            block[0] = match scales {
                Scales::Ordinary => 116 + random.below(8) as u8,
                Scales::Spread => random.choose([140, 138, 133, 131, 107, 104, 101, 70]),
                Scales::Subnormal => random.below(3) as u8,
            };
            return;
        }
        NVFP4 => {
            for scale in &mut block[..4] {
                *scale = match scales {
                    Scales::Ordinary => 0x18 + random.below(0x30) as u8,
                    Scales::Spread => random.bits() as u8,
                    Scales::Subnormal => random.below(16) as u8,
                };
            }
            return;
        }
        IQ1_M => {
            // The f16 is spread over the top four bits of four words.
            let bits = scale_bits(random, scales);
            for i in 0..4 {
                let high = &mut block[48 + 2 * i + 1];
                *high = *high & 0x0f | ((bits >> (4 * i) & 15) as u8) << 4;
            }
            return;
        }
        _ => &[0],
    };
    for at in places {
        block[*at..at + 2].copy_from_slice(&scale_bits(random, scales).to_le_bytes());
    }
}

/// A finite f16.
fn scale_bits(random: &mut Random, scales: Scales) -> u16 {
    let sign = random.choose([0, 0, 0, 0x8000]);
    match scales {
        Scales::Ordinary => (0x1800 + random.below(0x0c00) as u16) | sign,
        Scales::Spread => match random.below(8) {
            0 => random.choose([0, 1, 0x8000, 0x83ff]),
            _ => random.below(0x7c00) as u16 | sign,
        },
        Scales::Subnormal => (1 + random.below(0x3ff) as u16) | sign,
    }
}

/// How activations are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Magnitudes {
    /// About normal.
    Ordinary,
    /// About normal, one in fifty 300 times as large.
    Outliers,
    /// The first segment zero or 2^24 times as large, the others smaller and smaller.
    Revealing,
    /// Every segment with an exponent of its own, far apart, some zero.
    Spread,
    /// So small that results underflow.
    Tiny,
}

impl Magnitudes {
    /// Every kind.
    pub const ALL: [Self; 5] = [
        Self::Ordinary,
        Self::Outliers,
        Self::Revealing,
        Self::Spread,
        Self::Tiny,
    ];
}

/// A random vector of activations.
pub fn vector(random: &mut Random, n: usize, magnitudes: Magnitudes) -> Vec<f32> {
    let mut x = Vec::with_capacity(n);
    for segment in 0..n.div_ceil(256) {
        let power = match magnitudes {
            Magnitudes::Ordinary | Magnitudes::Outliers => 0,
            Magnitudes::Revealing if segment == 0 => 24,
            Magnitudes::Revealing => -2 * segment as i32,
            Magnitudes::Spread => random.below(80) as i32 - 60,
            Magnitudes::Tiny => -114 + random.below(6) as i32,
        };
        let zero = magnitudes == Magnitudes::Spread && random.below(4) == 0;
        let factor = if zero {
            0.0
        } else {
            crate::oracle::times_power_of_two(1.0, power)
        };
        for _ in 0..256.min(n - x.len()) {
            let spike = magnitudes == Magnitudes::Outliers && random.below(50) == 0;
            let v = random.bell() * factor;
            x.push(if spike { v * 300.0 } else { v });
        }
    }
    x
}
