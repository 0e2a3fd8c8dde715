//! Every instruction set against the scalar code, which reads like the contract, bit for bit.

use hoist_backend::{Encoding, EncodingKind};

use super::side::row_bytes;
use super::*;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Roughly normal, variance 1.
    fn normal(&mut self) -> f32 {
        let sum: f32 = (0..12).map(|_| self.next() as u16 as f32 / 65536.0).sum();
        sum - 6.0
    }
}

fn quantised() -> impl Iterator<Item = Encoding> {
    Encoding::all().filter(|e| e.kind() == EncodingKind::Quantized)
}

/// Where a block's f16 are; empty for encodings that have none, or none in one piece.
fn f16_offsets(encoding: Encoding) -> &'static [usize] {
    match encoding {
        Encoding::Q4_1 | Encoding::Q5_1 | Encoding::Q4_K | Encoding::Q5_K => &[0, 2],
        Encoding::Q6_K => &[208],
        Encoding::Q2_K => &[80, 82],
        Encoding::Q3_K => &[108],
        Encoding::TQ1_0 => &[52],
        Encoding::TQ2_0 => &[64],
        Encoding::MXFP4 | Encoding::NVFP4 | Encoding::IQ1_M | Encoding::APR_Q8 => &[],
        _ => &[0],
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Scales {
    /// Any finite f16: spreads of up to 29 binary orders inside a segment.
    Any,
    /// Of a size, as trained weights have.
    Alike,
    /// Subnormal.
    Subnormal,
    /// The largest, of either sign.
    Largest,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Codes {
    Any,
    /// All bytes of a row equal, at the edges of their ranges.
    Extreme,
}

/// Rows of an encoding; the first segment of every other row is zero.
fn matrix(
    random: &mut Random,
    encoding: Encoding,
    rows: usize,
    cols: usize,
    scales: Scales,
    codes: Codes,
) -> Vec<u8> {
    let row = row_bytes(encoding, cols);
    let block = encoding.block_bytes() as usize;
    let mut bytes = Vec::with_capacity(rows * row);
    for _ in 0..rows {
        let all = [0x00, 0xff, 0x80, 0x7f, 0x88, 0x77][random.below(6)];
        bytes.extend((0..row).map(|_| {
            if codes == Codes::Any {
                random.next() as u8
            } else {
                all
            }
        }));
    }
    for block in bytes.chunks_exact_mut(block) {
        for at in f16_offsets(encoding) {
            let sign = (random.next() as u16) & 0x8000;
            let bits = match scales {
                Scales::Any => random.next() as u16 % 0x7c00,
                Scales::Alike => 0x1c00 + random.below(0x0800) as u16,
                Scales::Subnormal => random.below(0x0400) as u16,
                Scales::Largest => 0x7bff,
            };
            block[*at..at + 2].copy_from_slice(&(bits | sign).to_le_bytes());
        }
        let any = random.next() as u8;
        if encoding == Encoding::MXFP4 {
            block[0] = match scales {
                Scales::Any => any.min(254),
                Scales::Alike => 116 + any % 8,
                Scales::Subnormal => any % 2,
                Scales::Largest => 254 - any % 2,
            };
        }
        if encoding == Encoding::NVFP4 {
            for (s, byte) in block[..4].iter_mut().enumerate() {
                let any = any.rotate_left(2 * s as u32);
                *byte = match scales {
                    Scales::Any => any,
                    Scales::Alike => any & 0x8f | 0x30,
                    Scales::Subnormal => any & 0x87,
                    Scales::Largest => any & 0x81 | 0x7e,
                };
            }
        }
    }
    if encoding == Encoding::APR_Q8 {
        return bytes;
    }
    // Scales that are elsewhere.
    while let Err(hoist_quant::Error::NonFinite { offset, .. }) = hoist_quant::check_finite(encoding, &bytes)
    {
        let start = offset as usize / block * block;
        for byte in &mut bytes[start..start + block] {
            *byte = random.next() as u8;
        }
    }
    for row in bytes.chunks_exact_mut(row).step_by(2) {
        let zero = row_bytes(encoding, cols.min(256));
        if f16_offsets(encoding) == [0] {
            row[..zero].fill(0);
        }
    }
    bytes
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Activations {
    Ordinary,
    /// The first segment 2^24 larger, so that every low bit of what follows an empty first segment shows.
    Revealing,
    /// One sign and one magnitude, so that `q` is ±127 everywhere.
    Saturated,
    /// Blocks of very different sizes, zero blocks and zero segments.
    Uneven,
    /// Around the smallest normal step.
    Tiny,
}

const ACTIVATIONS: [Activations; 5] = [
    Activations::Ordinary,
    Activations::Revealing,
    Activations::Saturated,
    Activations::Uneven,
    Activations::Tiny,
];

fn vector(random: &mut Random, cols: usize, kind: Activations) -> Vec<f32> {
    let mut x: Vec<f32> = (0..cols).map(|_| random.normal()).collect();
    match kind {
        Activations::Ordinary => {}
        Activations::Revealing => x[..cols.min(256)].iter_mut().for_each(|x| *x *= 2f32.powi(24)),
        Activations::Saturated => {
            let sign = if random.next() & 1 == 0 { 1.0 } else { -1.0 };
            x.fill(sign * 2032.0);
        }
        Activations::Uneven => {
            for block in x.chunks_exact_mut(32) {
                let by =
                    2f32.powi(random.below(12) as i32 - 8) * if random.below(5) == 0 { 0.0 } else { 1.0 };
                block.iter_mut().for_each(|x| *x *= by);
            }
            for segment in x.chunks_mut(256) {
                let by =
                    2f32.powi(random.below(80) as i32 - 60) * if random.below(4) == 0 { 0.0 } else { 1.0 };
                segment.iter_mut().for_each(|x| *x *= by);
            }
        }
        Activations::Tiny => x.iter_mut().for_each(|x| *x *= 2f32.powi(-116)),
    }
    x
}

fn quantise_all(isa: Isa, x: &[f32], cols: usize) -> Vec<Segment> {
    let n = segments(cols);
    let mut out = vec![bytemuck::Zeroable::zeroed(); x.len() / cols * n];
    for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(n)) {
        quantise(isa, x, out).unwrap();
    }
    out
}

struct Problem {
    encoding: Encoding,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
    side: Vec<u8>,
    x: Vec<Segment>,
}

impl Problem {
    fn new(encoding: Encoding, cols: usize, bytes: Vec<u8>, x: Vec<Segment>) -> Self {
        let rows = bytes.len() / row_bytes(encoding, cols);
        let mut side = vec![0; rows * side_row_bytes(cols)];
        prepare_side(encoding, cols, &bytes, &mut side).unwrap();
        Self {
            encoding,
            rows,
            cols,
            bytes,
            side,
            x,
        }
    }

    fn tokens(&self) -> usize {
        self.x.len() / segments(self.cols)
    }

    fn run(&self, isa: Isa, pack_it: bool) -> Result<Vec<u32>, NonFinite> {
        let (mut bytes, mut side) = (self.bytes.clone(), self.side.clone());
        let packed = pack_it && pack(isa, self.encoding, self.cols, &mut bytes, &mut side);
        let w = QuantMatrix {
            encoding: self.encoding,
            rows: self.rows,
            cols: self.cols,
            bytes: &bytes,
            side: &side,
            packed,
            scale: (self.encoding == Encoding::APR_Q8).then_some(0.37),
        };
        let stride = self.rows + 3;
        let mut out = vec![f32::from_bits(0x7fc0_1234); self.tokens() * stride];
        let mut scratch = Scratch::new();
        let mut results = Results::new(&mut out, stride);
        let cut = (self.rows / 2).next_multiple_of(isa.group()).min(self.rows);
        matmul(isa, &w, 0..cut, &self.x, &mut results, &mut scratch)?;
        matmul(isa, &w, cut..self.rows, &self.x, &mut results, &mut scratch)?;
        for row in out.chunks_exact(stride) {
            assert!(
                row[self.rows..].iter().all(|y| y.to_bits() == 0x7fc0_1234),
                "wrote past its rows"
            );
        }
        Ok(out.iter().map(|y| y.to_bits()).collect())
    }

    /// Compares every instruction set, packed and not, with the scalar code.
    fn check(&self, what: &str) -> bool {
        let expected = self.run(Isa::scalar(), false);
        for isa in Isa::tested() {
            for packed in [false, true] {
                let found = self.run(isa, packed);
                if expected != found {
                    let at = expected
                        .as_ref()
                        .ok()
                        .zip(found.as_ref().ok())
                        .and_then(|(e, f)| {
                            (0..e.len())
                                .find(|i| e[*i] != f[*i])
                                .map(|i| (i, f32::from_bits(e[i]), f32::from_bits(f[i])))
                        });
                    panic!(
                        "{} {}×{} × {} tokens, {}, packed {packed}, {what}: {at:?}",
                        self.encoding,
                        self.rows,
                        self.cols,
                        self.tokens(),
                        isa.name()
                    );
                }
            }
        }
        expected.is_ok()
    }
}

fn columns(encoding: Encoding) -> impl Iterator<Item = usize> {
    [32, 64, 96, 128, 288, 448, 512, 576, 640, 896, 1024]
        .into_iter()
        .filter(move |c| hoist_quant::check_input_dimension(encoding, *c as u64).is_ok())
}

#[test]
fn simd_equals_scalar_for_every_encoding_and_kind_of_operand() {
    println!(
        "instruction sets here: {:?}",
        Isa::tested().map(Isa::name).collect::<Vec<_>>()
    );
    let mut random = Random(1);
    for encoding in quantised() {
        let mut finite = 0;
        for cols in columns(encoding) {
            for scales in [Scales::Any, Scales::Alike, Scales::Subnormal, Scales::Largest] {
                for codes in [Codes::Any, Codes::Extreme] {
                    let rows = [1, 7, 8, 9, 16, 17, 33][random.below(7)];
                    let bytes = matrix(&mut random, encoding, rows, cols, scales, codes);
                    for tokens in [1, [2, 3, 4, 5, 7, 8][random.below(6)]] {
                        for kind in ACTIVATIONS {
                            let x: Vec<f32> = (0..tokens)
                                .flat_map(|_| vector(&mut random, cols, kind))
                                .collect();
                            let x = quantise_all(Isa::scalar(), &x, cols);
                            let problem = Problem::new(encoding, cols, bytes.clone(), x);
                            finite += usize::from(problem.check(&format!("{scales:?} {codes:?} {kind:?}")));
                        }
                    }
                }
            }
        }
        assert!(finite > 0, "{encoding}: nothing to compare");
    }
}

#[test]
fn simd_equals_scalar_for_many_tokens_and_long_rows() {
    let mut random = Random(2);
    for encoding in quantised() {
        for (rows, cols, tokens) in [(9, 2048, 33), (24, 1536, 1), (17, 512, 131), (65, 512, 6)] {
            let bytes = matrix(&mut random, encoding, rows, cols, Scales::Alike, Codes::Any);
            let x: Vec<f32> = (0..tokens)
                .flat_map(|t| vector(&mut random, cols, ACTIVATIONS[t % ACTIVATIONS.len()]))
                .collect();
            let x = quantise_all(Isa::scalar(), &x, cols);
            Problem::new(encoding, cols, bytes, x).check("long");
        }
    }
}

#[test]
fn a_token_gets_the_same_bits_alone_and_among_others() {
    let mut random = Random(3);
    for encoding in quantised() {
        let (rows, cols, tokens) = (17, 768, 6);
        let bytes = matrix(&mut random, encoding, rows, cols, Scales::Alike, Codes::Any);
        let x: Vec<f32> = (0..tokens)
            .flat_map(|_| vector(&mut random, cols, Activations::Uneven))
            .collect();
        let x = quantise_all(Isa::scalar(), &x, cols);
        for isa in Isa::tested() {
            let together = Problem::new(encoding, cols, bytes.clone(), x.clone()).run(isa, true);
            let alone: Result<Vec<u32>, NonFinite> = x
                .chunks_exact(segments(cols))
                .map(|x| Problem::new(encoding, cols, bytes.clone(), x.to_vec()).run(isa, true))
                .collect::<Result<Vec<_>, _>>()
                .map(|all| all.concat());
            assert_eq!(together, alone, "{encoding} {}", isa.name());
        }
    }
}

#[test]
fn unpack_undoes_pack_for_any_range() {
    let mut random = Random(4);
    let mut packed_encodings = 0;
    for encoding in quantised() {
        for isa in Isa::tested() {
            for cols in columns(encoding) {
                let rows = [1, 8, 15, 16, 33][random.below(5)];
                let bytes = matrix(&mut random, encoding, rows, cols, Scales::Any, Codes::Any);
                let mut side = vec![0; rows * side_row_bytes(cols)];
                prepare_side(encoding, cols, &bytes, &mut side).unwrap();
                let mut packed = bytes.clone();
                if !pack(isa, encoding, cols, &mut packed, &mut side) {
                    assert_eq!(packed, bytes);
                    continue;
                }
                packed_encodings += 1;
                assert!(rows < isa.group() || packed != bytes, "{encoding}: nothing moved");
                for _ in 0..50 {
                    let start = random.below(bytes.len() + 1);
                    let end = start + random.below(bytes.len() + 1 - start);
                    let mut out = vec![0; end - start];
                    unpack(isa, encoding, cols, &packed, start..end, &mut out);
                    assert_eq!(out, bytes[start..end], "{encoding} {start}..{end}");
                }
            }
        }
    }
    assert!(packed_encodings > 0 || Isa::tested().count() == 1);
}

#[test]
fn every_encoding_but_one_is_packed() {
    for isa in Isa::tested().filter(|isa| *isa != Isa::scalar()) {
        let plain: Vec<Encoding> = quantised()
            .filter(|encoding| {
                let cols = 768;
                let mut bytes = vec![0; isa.group() * row_bytes(*encoding, cols)];
                let mut side = vec![0; isa.group() * side_row_bytes(cols)];
                !pack(isa, *encoding, cols, &mut bytes, &mut side)
            })
            .collect();
        assert_eq!(plain, [Encoding::IQ1_M]);
    }
}

#[test]
fn what_is_kept_beside_rows_is_what_their_integers_say() {
    let mut random = Random(8);
    for encoding in quantised() {
        for (cols, scales) in columns(encoding).flat_map(|c| [(c, Scales::Any), (c, Scales::Subnormal)]) {
            let bytes = matrix(&mut random, encoding, 5, cols, scales, Codes::Any);
            let mut side = vec![0; 5 * side_row_bytes(cols)];
            prepare_side(encoding, cols, &bytes, &mut side).unwrap();
            let rows = bytes.chunks_exact(row_bytes(encoding, cols));
            for (row, side) in rows.zip(side.chunks_exact(side_row_bytes(cols))) {
                let e_w = hoist_quant::row_exponent(encoding, row).unwrap();
                assert_eq!(side[..2], e_w.to_le_bytes(), "{encoding} {cols}");
                let mut view = hoist_quant::SegmentView::default();
                for (segment, below) in side[2..].chunks_exact(2).enumerate() {
                    hoist_quant::read_segment(encoding, row, segment, &mut view).unwrap();
                    let expected = [e_w - view.e, e_w - view.e_min].map(|b| b as u8);
                    assert_eq!(below, expected, "{encoding} {cols}");
                }
            }
        }
    }
}

#[test]
fn a_scale_that_is_not_finite_is_refused_with_its_place() {
    let mut random = Random(9);
    for encoding in quantised() {
        for at in f16_offsets(encoding) {
            let cols = 512;
            let mut bytes = matrix(&mut random, encoding, 3, cols, Scales::Alike, Codes::Any);
            let mut side = vec![0; 3 * side_row_bytes(cols)];
            assert!(prepare_side(encoding, cols, &bytes, &mut side).is_ok());
            let at = row_bytes(encoding, cols) + encoding.block_bytes() as usize + at;
            bytes[at..at + 2].copy_from_slice(&0xfc00u16.to_le_bytes());
            let error = prepare_side(encoding, cols, &bytes, &mut side).unwrap_err();
            assert!(
                matches!(error, hoist_quant::Error::NonFinite { offset, .. } if offset == at as u64),
                "{encoding}: {error}"
            );
        }
    }
}

#[test]
fn quantise_gives_the_same_bits_on_every_instruction_set() {
    let mut random = Random(5);
    for kind in ACTIVATIONS {
        for cols in [32, 64, 224, 256, 288, 576, 1536] {
            for _ in 0..40 {
                let x = vector(&mut random, cols, kind);
                let expected = quantise_all(Isa::scalar(), &x, cols);
                for isa in Isa::available() {
                    assert_eq!(
                        quantise_all(isa, &x, cols),
                        expected,
                        "{} {kind:?} {cols}",
                        isa.name()
                    );
                }
            }
        }
    }
}

#[test]
fn quantise_follows_the_contract() {
    let mut random = Random(6);
    for kind in ACTIVATIONS {
        let x = vector(&mut random, 544, kind);
        let out = quantise_all(Isa::scalar(), &x, 544);
        let e_max = out[0].e_max;
        let mut least_shift = i32::MAX;
        for (x, out) in x.chunks(256).zip(&out) {
            assert_eq!(out.e_max, e_max);
            least_shift = least_shift.min(out.shift);
            let e = e_max - out.shift;
            let q: &[i8] = bytemuck::cast_slice(&out.q);
            let largest = x.iter().fold(0f32, |a, x| a.max(x.abs()));
            if largest / 2032.0 < f32::MIN_POSITIVE {
                assert_eq!((out.m, e), (0, -133));
                assert!(q.iter().all(|q| *q == 0));
                continue;
            }
            let d = f64::from(out.m) * 2f64.powi(e);
            assert!((128..256).contains(&out.m));
            assert!(
                d >= f64::from(largest / 2032.0) && d <= f64::from(largest / 2032.0) * (1.0 + 1.0 / 128.0)
            );
            for (j, x) in x.chunks_exact(32).enumerate() {
                let u = (out.u_twice[j] & 0xffff) as i32;
                let a = f64::from(x.iter().fold(0f32, |a, x| a.max(x.abs())));
                assert!((1..=16).contains(&u) && a <= f64::from(u * 127) * d);
                assert!(u == 1 || a > f64::from((u - 1) * 127) * d, "u is the smallest");
                let q = &q[32 * j..32 * j + 32];
                for (x, q) in x.iter().zip(q) {
                    assert!(
                        (f64::from(*x) - f64::from(*q) * f64::from(u) * d).abs() <= 0.5001 * f64::from(u) * d
                    );
                }
                let s = |q: &[i8]| q.iter().map(|q| i32::from(*q)).sum::<i32>();
                assert_eq!(out.mus[j], out.m * u * s(q));
                assert_eq!(out.mus_half[2 * j + 1], out.m * u * s(&q[16..]));
                assert_eq!(out.us_halves[j] as i16 as i32, u * s(&q[..16]));
                assert_eq!((out.s_pair[j / 2] >> (16 * (j % 2))) as i16 as i32, s(q));
                assert_eq!((out.u_pair[j / 2] >> (16 * (j % 2))) as i16 as i32, u);
                assert_eq!(out.um_twice[j], (u * out.m) as u32 * 0x10001);
            }
            assert!(q[x.len()..].iter().all(|q| *q == 0));
        }
        assert_eq!(least_shift, 0);
    }
}

#[test]
fn quantise_refuses_what_is_not_finite() {
    for isa in Isa::available() {
        for bad in [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::from_bits(0xffc0_0001),
        ] {
            for at in [0, 31, 300, 575] {
                let mut x = vec![1.0; 576];
                let mut out = vec![bytemuck::Zeroable::zeroed(); 3];
                assert_eq!(quantise(isa, &x, &mut out), Ok(()));
                x[at] = bad;
                assert_eq!(quantise(isa, &x, &mut out), Err(NonFinite));
            }
        }
        // The largest finite values are accepted.
        let x = vec![f32::MAX; 64];
        assert_eq!(quantise(isa, &x, &mut [bytemuck::Zeroable::zeroed()]), Ok(()));
    }
}

#[test]
fn an_overflowing_result_is_refused() {
    let mut random = Random(7);
    let bytes = matrix(
        &mut random,
        Encoding::Q8_0,
        16,
        64,
        Scales::Largest,
        Codes::Extreme,
    );
    for isa in Isa::tested() {
        for packed in [false, true] {
            let run = |x: f32| {
                Problem::new(Encoding::Q8_0, 64, bytes.clone(), quantise_all(isa, &[x; 64], 64))
                    .run(isa, packed)
            };
            assert!(run(1.0).is_ok());
            assert_eq!(run(f32::MAX), Err(NonFinite));
        }
    }
}
