//! How fast the kernels are here: bytes of weights and multiply-adds a second, for each encoding and instruction set.
//!
//! `cargo test --release -p hoist-cpu kernels::measure -- --ignored --nocapture`; `HOIST_MEASURE` names encodings to keep to.

use std::time::{Duration, Instant};

use hoist_backend::{Encoding, EncodingKind};

use super::side::row_bytes;
use super::*;

/// The quickest of several runs, in seconds.
fn quickest(budget: Duration, mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed() < budget {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// Rows of codes without a pattern under scales of one size.
fn matrix(encoding: Encoding, rows: usize, cols: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut bytes: Vec<u8> = (0..rows * row_bytes(encoding, cols))
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect();
    let f16: &[usize] = match encoding {
        Encoding::Q4_1 | Encoding::Q5_1 | Encoding::Q4_K | Encoding::Q5_K => &[0, 2],
        Encoding::Q6_K => &[208],
        Encoding::Q2_K => &[80, 82],
        Encoding::Q3_K => &[108],
        Encoding::TQ1_0 => &[52],
        Encoding::TQ2_0 => &[64],
        // No f16, or none in one piece.
        Encoding::MXFP4 | Encoding::NVFP4 | Encoding::IQ1_M | Encoding::APR_Q8 => &[],
        _ => &[0],
    };
    if encoding == Encoding::MXFP4 {
        for block in bytes.chunks_exact_mut(encoding.block_bytes() as usize) {
            block[0] = 118 + block[0] % 4;
        }
    }
    if encoding.block_bytes() > 1 {
        for block in bytes.chunks_exact_mut(encoding.block_bytes() as usize) {
            for at in f16 {
                block[*at + 1] = 0x1c | block[*at + 1] & 3;
            }
        }
    }
    while let Err(hoist_quant::Error::NonFinite { offset, .. }) = hoist_quant::check_finite(encoding, &bytes)
    {
        let start = offset as usize / encoding.block_bytes() as usize * encoding.block_bytes() as usize;
        bytes[start..start + encoding.block_bytes() as usize].fill(0x11);
    }
    bytes
}

struct Bench {
    encoding: Encoding,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
    side: Vec<u8>,
    packed: bool,
}

impl Bench {
    fn new(isa: Isa, encoding: Encoding, rows: usize, cols: usize, packed: bool) -> Self {
        let mut bytes = matrix(encoding, rows, cols);
        let mut side = vec![0; rows * side_row_bytes(cols)];
        prepare_side(encoding, cols, &bytes, &mut side).unwrap();
        let packed = packed && pack(isa, encoding, cols, &mut bytes, &mut side);
        Self {
            encoding,
            rows,
            cols,
            bytes,
            side,
            packed,
        }
    }

    /// Seconds of one product with that many tokens.
    fn time(&self, isa: Isa, tokens: usize, budget: Duration) -> f64 {
        let x: Vec<f32> = (0..self.cols).map(|i| (i as f32 * 0.7).sin()).collect();
        let n = segments(self.cols);
        let mut segments = vec![bytemuck::Zeroable::zeroed(); tokens * n];
        for segments in segments.chunks_exact_mut(n) {
            quantise(isa, &x, segments).unwrap();
        }
        let mut out = vec![0.0; tokens * self.rows];
        let mut scratch = Scratch::new();
        let w = QuantMatrix {
            encoding: self.encoding,
            rows: self.rows,
            cols: self.cols,
            bytes: &self.bytes,
            side: &self.side,
            packed: self.packed,
            scale: (self.encoding == Encoding::APR_Q8).then_some(0.37),
        };
        quickest(budget, || {
            let mut results = Results::new(&mut out, self.rows);
            matmul(isa, &w, 0..self.rows, &segments, &mut results, &mut scratch).unwrap();
        })
    }
}

fn wanted(encoding: Encoding) -> bool {
    match std::env::var("HOIST_MEASURE") {
        Ok(names) => names.split(',').any(|n| n == encoding.name()),
        Err(_) => true,
    }
}

/// Bytes a second that one thread can read from memory.
fn read_bandwidth() -> f64 {
    let words: Vec<u64> = (0..1 << 25).collect();
    let mut sum = 0u64;
    let seconds = quickest(Duration::from_millis(500), || {
        let sums = words.as_chunks::<16>().0.iter().fold([0u64; 16], |mut sums, w| {
            for (s, w) in sums.iter_mut().zip(w) {
                *s ^= w;
            }
            sums
        });
        sum ^= sums.iter().fold(0, |a, b| a ^ b);
    });
    assert!(sum < u64::MAX);
    (words.len() * 8) as f64 / seconds
}

#[test]
#[ignore = "a measurement, to be run alone"]
fn kernels() {
    println!("one thread reads {:.1} GB/s from memory", read_bandwidth() / 1e9);
    println!(
        "{:8} {:7} | one token, weights in cache, in memory, in memory unpacked | 64 tokens",
        "", ""
    );
    let budget = Duration::from_millis(150);
    for encoding in Encoding::all().filter(|e| e.kind() == EncodingKind::Quantized && wanted(*e)) {
        for isa in Isa::available() {
            if isa == Isa::scalar() && std::env::var("HOIST_MEASURE").is_err() {
                continue;
            }
            let cols = match encoding.block_weights() {
                256 => 2048,
                128 => 640,
                _ => 576,
            };
            let small = Bench::new(isa, encoding, 384, cols, true);
            let large_rows = (64 << 20) / row_bytes(encoding, cols) / 16 * 16;
            let large = Bench::new(isa, encoding, large_rows, cols, true);
            let unpacked = Bench::new(isa, encoding, large_rows, cols, false);
            let rate = |b: &Bench| (b.bytes.len() + b.side.len()) as f64 / b.time(isa, 1, budget) / 1e9;
            let tokens = 64;
            let macs = (small.rows * cols * tokens) as f64 / small.time(isa, tokens, budget) / 1e9;
            println!(
                "{:8} {:7} | {:6.1} GB/s ({:5.1} GMAC/s) {:6.1} GB/s {:6.1} GB/s | {:6.1} GMAC/s",
                encoding.name(),
                isa.name(),
                rate(&small),
                (small.rows * cols) as f64 / small.time(isa, 1, budget) / 1e9,
                rate(&large),
                rate(&unpacked),
                macs
            );
        }
    }
    for encoding in Encoding::all().filter(|e| e.kind() == EncodingKind::Quantized && wanted(*e)) {
        let bytes = matrix(encoding, 1024, 2048);
        let mut side = vec![0; 1024 * side_row_bytes(2048)];
        let beside = quickest(budget, || {
            prepare_side(encoding, 2048, &bytes, &mut side).unwrap();
        });
        let mut packed = bytes.clone();
        let packing = quickest(budget, || {
            pack(Isa::detect(), encoding, 2048, &mut packed, &mut side);
        });
        let rate = |seconds: f64| bytes.len() as f64 / seconds / 1e9;
        println!(
            "{:8} prepare_side {:6.1} GB/s, pack {:6.1} GB/s",
            encoding.name(),
            rate(beside),
            rate(packing)
        );
    }
    let x: Vec<f32> = (0..1536).map(|i| (i as f32 * 0.7).sin()).collect();
    let mut out = vec![bytemuck::Zeroable::zeroed(); segments(x.len())];
    for isa in Isa::available() {
        let seconds = quickest(budget, || quantise(isa, &x, &mut out).unwrap());
        println!("quantise 1536 elements, {}: {:.2} µs", isa.name(), seconds * 1e6);
    }
}
