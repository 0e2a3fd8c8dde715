//! The scan for NaNs and infinities in floats and prefixes; scales of blocks are in `segment_view.rs`.

use hoist_backend::{Encoding, Shape};
use hoist_quant::{Error, check_finite, check_finite_weight, matrix_scale};

#[test]
fn the_first_non_finite_float_is_found_at_any_place() {
    for (encoding, inf, nan) in [
        (
            Encoding::F32,
            &[0u8, 0, 0x80, 0x7f][..],
            &[1u8, 0, 0x80, 0xff][..],
        ),
        (Encoding::F16, &[0, 0x7c], &[1, 0xfc]),
        (Encoding::BF16, &[0x80, 0x7f], &[0x81, 0xff]),
    ] {
        let size = inf.len();
        // The largest finite number, everywhere else.
        let largest: &[u8] = match encoding {
            Encoding::F32 => &[0xff, 0xff, 0x7f, 0x7f],
            Encoding::F16 => &[0xff, 0x7b],
            _ => &[0x7f, 0x7f],
        };
        for at in [0, 1, 255, 256, 257, 999] {
            let mut bytes = largest.repeat(1000);
            check_finite(encoding, &bytes).unwrap();
            // A later one must not be reported instead.
            bytes[999 * size..].copy_from_slice(nan);
            for special in [inf, nan] {
                bytes[at * size..(at + 1) * size].copy_from_slice(special);
                let offset = (at * size) as u64;
                assert_eq!(
                    check_finite(encoding, &bytes),
                    Err(Error::NonFinite { encoding, offset })
                );
            }
        }
    }
}

#[test]
fn every_matrix_of_an_apr_q8_weight_is_looked_at() {
    let encoding = Encoding::APR_Q8;
    let shape = Shape {
        matrices: 3,
        rows: 1,
        cols: 32,
    };
    let matrix = |scale: f32| [&scale.to_le_bytes()[..], &[0xff; 32]].concat();
    let fine = [matrix(1.0), matrix(f32::MAX), matrix(-0.0)].concat();
    check_finite_weight(encoding, shape, &fine).unwrap();
    let bad = [matrix(1.0), matrix(1.0), matrix(f32::NEG_INFINITY)].concat();
    assert_eq!(
        check_finite_weight(encoding, shape, &bad),
        Err(Error::NonFinite { encoding, offset: 72 })
    );
    assert!(check_finite_weight(encoding, shape, &fine[1..]).is_err());
    assert_eq!(matrix_scale(encoding, &fine[36..]), Ok(Some(f32::MAX)));
    assert_eq!(
        matrix_scale(encoding, &bad[72..]),
        Err(Error::NonFinite { encoding, offset: 0 })
    );
    assert_eq!(matrix_scale(Encoding::Q4_0, &bad), Ok(None));
}

#[test]
fn an_error_becomes_the_contracts_with_the_weights_name_and_offset() {
    let error = Error::NonFinite {
        encoding: Encoding::Q4_0,
        offset: 18,
    };
    assert_eq!(
        error.for_weight("blk.0.attn_q.weight", 1800).to_string(),
        "weight `blk.0.attn_q.weight` holds a NaN or infinity at byte 1818 of its canonical bytes"
    );
}

#[test]
fn integers_and_partial_blocks_are_refused() {
    assert_eq!(
        check_finite(Encoding::I32, &[0; 4]),
        Err(Error::NotDecodable {
            encoding: Encoding::I32
        })
    );
    assert!(matches!(
        check_finite(Encoding::Q4_0, &[0; 19]),
        Err(Error::PartialBlock { found: 19, .. })
    ));
    check_finite(Encoding::Q4_0, &[0; 18]).unwrap();
}
