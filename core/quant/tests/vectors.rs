//! The committed vectors: blocks of every encoding and what independent decoders make of them. They are written by
//! `scripts/quant/make_vectors.py`.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use hoist_backend::{Encoding, EncodingKind, Shape};
use hoist_quant::{check_finite, dequantize, dequantize_matrix, dequantize_row};

struct Vector {
    encoding: Encoding,
    bytes: &'static [u8],
    values: Vec<f32>,
}

fn vectors() -> Vec<Vector> {
    let mut rest: &'static [u8] = include_bytes!("data/vectors.bin");
    let mut take = |n: usize| {
        let (head, tail) = rest.split_at(n);
        rest = tail;
        head
    };
    let mut vectors = Vec::new();
    while let [len] = *take(1) {
        let name = std::str::from_utf8(take(len.into())).unwrap();
        let mut count = || u32::from_le_bytes(take(4).try_into().unwrap()) as usize;
        let (nbytes, values) = (count(), count());
        vectors.push(Vector {
            encoding: Encoding::from_name(name).unwrap(),
            bytes: take(nbytes),
            values: take(4 * values)
                .as_chunks()
                .0
                .iter()
                .map(|x| f32::from_le_bytes(*x))
                .collect(),
        });
        if vectors.len() == EXPECTED {
            assert_eq!(rest.len(), 0, "bytes after the last vector");
            break;
        }
    }
    vectors
}

/// Encodings that decode to f32.
const EXPECTED: usize = 32;

fn assert_same_bits(encoding: Encoding, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{encoding}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(
            found.to_bits(),
            expected.to_bits(),
            "{encoding}: value {i} is {found:e}, expected {expected:e}"
        );
    }
}

#[test]
fn the_vectors_cover_every_encoding_that_decodes() {
    let mut covered: Vec<_> = vectors().iter().map(|v| v.encoding).collect();
    covered.sort();
    let all: Vec<_> = Encoding::all()
        .filter(|e| e.kind() != EncodingKind::Other)
        .collect();
    assert_eq!(covered, all);
}

#[test]
fn the_vectors_hold_subnormal_and_negative_zero_values() {
    let values: Vec<f32> = vectors().into_iter().flat_map(|v| v.values).collect();
    assert!(values.iter().any(|x| x.to_bits() == 0x8000_0000));
    assert!(values.iter().any(|x| x.is_subnormal()));
    assert!(!values.iter().any(|x| x.is_nan()));
}

#[test]
fn every_encoding_decodes_to_the_expected_bits() {
    for v in vectors() {
        let mut out = vec![f32::NAN; v.values.len()];
        dequantize(v.encoding, v.bytes, &mut out).unwrap();
        assert_same_bits(v.encoding, &out, &v.values);
        check_finite(v.encoding, v.bytes).unwrap();
    }
}

#[test]
fn a_matrix_and_its_rows_decode_to_the_same_bits() {
    for v in vectors() {
        let blocks = v.values.len() as u64 / v.encoding.block_weights();
        let rows = [6, 4, 3, 2]
            .into_iter()
            .find(|r| blocks.is_multiple_of(*r))
            .unwrap();
        let cols = v.values.len() as u64 / rows;

        let mut out = vec![f32::NAN; v.values.len()];
        dequantize_matrix(v.encoding, Shape::matrix(rows, cols), v.bytes, &mut out).unwrap();
        assert_same_bits(v.encoding, &out, &v.values);

        let mut row = vec![f32::NAN; cols as usize];
        for (r, expected) in v.values.chunks_exact(cols as usize).enumerate() {
            dequantize_row(v.encoding, v.bytes, rows, cols, r as u64, &mut row).unwrap();
            assert_same_bits(v.encoding, &row, expected);
        }
    }
}
