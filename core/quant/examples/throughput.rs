//! Prints how fast each encoding is decoded, read as integers and scanned, on one core: median of several rounds over a
//! buffer larger than the caches. GB/s of encoded bytes; for the decode also of f32 written.
//!
//! `cargo run --release -p hoist-quant --example throughput [ENCODING …]`

use std::hint::black_box;
use std::time::Instant;

use hoist_backend::{Encoding, EncodingKind};
use hoist_quant::{SegmentView, check_finite, dequantize, read_segment, row_exponent, segments};

const BYTES: usize = 64 << 20;
const COLS: usize = 4096;
const ROUNDS: usize = 7;

fn main() -> Result<(), hoist_quant::Error> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    println!(
        "{:8} {:>12} {:>12} {:>12} {:>12} {:>12}",
        "", "decode", "(f32 out)", "segments", "exponents", "scan"
    );
    for encoding in Encoding::all().filter(|e| e.kind() != EncodingKind::Other) {
        if !wanted.is_empty() && !wanted.iter().any(|name| name == encoding.name()) {
            continue;
        }
        let row_bytes = COLS / encoding.block_weights() as usize * encoding.block_bytes() as usize;
        let rows = BYTES / row_bytes;
        // The same byte everywhere is no code with a special meaning in any encoding, and no exponent of 31.
        let bytes = vec![0x35u8; rows * row_bytes];
        let gb = bytes.len() as f64 / 1e9;

        // Rows into one buffer, as embedding rows and whole-model evaluations in f32 do.
        let mut row = vec![0.0f32; COLS];
        let prefix = encoding.matrix_prefix_bytes() as usize;
        let decode = median(|| {
            for bytes in bytes.chunks_exact(row_bytes + prefix) {
                dequantize(encoding, bytes, &mut row[..])?;
                black_box(&mut row);
            }
            Ok(())
        })?;
        print!(
            "{:8} {:12.2} {:12.2}",
            encoding.name(),
            gb / decode,
            (rows * COLS * 4) as f64 / 1e9 / decode
        );
        if encoding.is_quantized() {
            let mut view = SegmentView::default();
            let read = median(|| {
                for row in bytes.chunks_exact(row_bytes) {
                    for segment in 0..segments(COLS) {
                        read_segment(encoding, row, segment, &mut view)?;
                        black_box(&mut view);
                    }
                }
                Ok(())
            })?;
            let exponents = median(|| {
                for row in bytes.chunks_exact(row_bytes) {
                    black_box(row_exponent(encoding, row)?);
                }
                Ok(())
            })?;
            print!(" {:12.2} {:12.2}", gb / read, gb / exponents);
        } else {
            print!(" {:>12} {:>12}", "", "");
        }
        let scan = median(|| check_finite(encoding, black_box(&bytes)))?;
        println!(" {:12.2}", gb / scan);
    }
    Ok(())
}

fn median(mut run: impl FnMut() -> Result<(), hoist_quant::Error>) -> Result<f64, hoist_quant::Error> {
    let mut seconds = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        run()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[ROUNDS / 2])
}
