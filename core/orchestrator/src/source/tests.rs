use std::io::Write as _;
use std::path::Path;

use hoist_backend::{SourceView, WeightClass};
use hoist_formats::Shard;
use proptest::prelude::*;

use super::*;
use crate::fake;

/// A source of one weight over a file in memory.
fn of_memory(bytes: Vec<u8>, views: Vec<SourceView>, change: ValueChange, nbytes: u64) -> Result<FileSource> {
    let mut plan = fake::plan(&[("w", WeightClass::Quantized, nbytes)]);
    plan.weights[0].views = views;
    plan.weights[0].change = change;
    FileSource::new(&fake::manifest_in_memory(bytes), &plan)
}

fn all(source: &FileSource, nbytes: usize) -> Vec<u8> {
    let mut out = vec![0; nbytes];
    source.read_at(WeightId(0), 0, &mut out).unwrap();
    out
}

/// What a view yields, unit by unit, by its definition.
fn by_definition(bytes: &[u8], views: &[SourceView]) -> Vec<u8> {
    let mut out = vec![];
    for v in views {
        for r in 0..v.rows {
            for c in 0..v.cols {
                let at = (v.offset + r * v.row_stride + c * v.col_stride) as usize;
                out.extend_from_slice(&bytes[at..at + v.unit as usize]);
            }
        }
    }
    out
}

fn ramp(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 256) as u8).collect()
}

#[test]
fn a_transposed_matrix_larger_than_a_tile_is_read_by_its_definition() {
    // [in, out] = [70, 9000] of f32 in the file; the columns 500..8900 of it, read as [out, in].
    let (inputs, outputs) = (70u64, 9000u64);
    let bytes = ramp((inputs * outputs * 4) as usize);
    let view = SourceView {
        file: 0,
        offset: 500 * 4,
        rows: 8400,
        cols: inputs,
        unit: 4,
        row_stride: 4,
        col_stride: outputs * 4,
    };
    let source = of_memory(bytes.clone(), vec![view], ValueChange::Keep, view.nbytes()).unwrap();
    let expected = by_definition(&bytes, &[view]);
    assert_eq!(all(&source, expected.len()), expected);
    for (start, len) in [(1, 3), (279, 900_000), (280, 560), (13, 2_000_001)] {
        let mut out = vec![0; len];
        source.read_at(WeightId(0), start as u64, &mut out).unwrap();
        assert_eq!(out, expected[start..start + len], "{len} at {start}");
    }
}

proptest! {
    #[test]
    fn any_range_of_any_views_is_what_the_definition_says(
        shapes in prop::collection::vec(
            (0u64..60, 0u64..5, 1u64..7, prop::sample::select(vec![1u64, 2, 4, 5, 8, 18]), 0u64..9, 0u64..3),
            1..4,
        ),
        cut in (0.0f64..1.0, 0.0f64..1.0),
    ) {
        let mut views = vec![];
        let mut len = 0;
        for (offset, rows, cols, unit, gap, kind) in shapes {
            let (row_stride, col_stride) = match kind {
                0 => (cols * unit + gap, unit),              // rows, with or without gaps
                1 => (unit, rows * unit + gap),              // transposed
                _ => (cols * (unit + gap) + 3, unit + gap),  // gaps everywhere
            };
            let view = SourceView { file: 0, offset, rows, cols, unit, row_stride, col_stride };
            len = len.max(offset + rows * row_stride + cols * col_stride + unit);
            views.push(view);
        }
        let bytes = ramp(len as usize);
        let expected = by_definition(&bytes, &views);
        let source = of_memory(bytes, views, ValueChange::Keep, expected.len() as u64).unwrap();
        let (a, b) = cut;
        let start = (a * expected.len() as f64) as usize;
        let end = start + (b * (expected.len() - start) as f64) as usize;
        let mut out = vec![0; end - start];
        source.read_at(WeightId(0), start as u64, &mut out).unwrap();
        prop_assert_eq!(&out[..], &expected[start..end]);
        prop_assert_eq!(all(&source, expected.len()), expected);
    }

    #[test]
    fn widening_any_range_equals_widening_all(
        values in prop::collection::vec(any::<u16>(), 1..6000),
        bf16 in any::<bool>(),
        add in any::<bool>(),
        cut in (0.0f64..1.0, 0.0f64..1.0),
    ) {
        let from = if bf16 { Encoding::BF16 } else { Encoding::F16 };
        // Not a number stays that, but its payload is not promised.
        let values: Vec<u16> = values
            .into_iter()
            .map(|v| if bf16 && v & 0x7f80 == 0x7f80 || !bf16 && v & 0x7c00 == 0x7c00 { 0x0001 } else { v })
            .collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let expected: Vec<u8> = values
            .iter()
            .map(|v| if bf16 { half::bf16::from_bits(*v).to_f32() } else { half::f16::from_bits(*v).to_f32() })
            .map(|v| if add { v + 1.0 } else { v })
            .flat_map(f32::to_le_bytes)
            .collect();
        let change = if add { ValueChange::WidenAddOne { from } } else { ValueChange::Widen { from } };
        let views = vec![SourceView::contiguous(0, 0, bytes.len() as u64)];
        let source = of_memory(bytes, views, change, expected.len() as u64).unwrap();
        let start = (cut.0 * expected.len() as f64) as usize;
        let end = start + (cut.1 * (expected.len() - start) as f64) as usize;
        let mut out = vec![0; end - start];
        source.read_at(WeightId(0), start as u64, &mut out).unwrap();
        prop_assert_eq!(&out[..], &expected[start..end]);
    }
}

#[test]
fn one_is_added_with_a_single_rounding() {
    // 2^-24 is half an ulp of 1: a tie, which goes to the even 1.0; the next f32 above it rounds up.
    let tie = 2f32.powi(-24);
    let above = f32::from_bits(tie.to_bits() + 1);
    let bytes: Vec<u8> = [tie, above, -0.0, -1.0]
        .into_iter()
        .flat_map(f32::to_le_bytes)
        .collect();
    let views = vec![SourceView::contiguous(0, 0, 16)];
    let change = ValueChange::WidenAddOne { from: Encoding::F32 };
    let source = of_memory(bytes.clone(), views.clone(), change, 16).unwrap();
    let values: Vec<u32> = all(&source, 16)
        .chunks_exact(4)
        .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    assert_eq!(values, [0x3f80_0000, 0x3f80_0001, 0x3f80_0000, 0]);
    // Widening alone keeps every bit, the sign of zero included.
    let kept = of_memory(
        bytes.clone(),
        views,
        ValueChange::Widen { from: Encoding::F32 },
        16,
    )
    .unwrap();
    assert_eq!(all(&kept, 16), bytes);
}

#[test]
fn a_view_past_the_end_of_its_file_is_refused() {
    let fits = SourceView {
        file: 0,
        offset: 4,
        rows: 3,
        cols: 2,
        unit: 4,
        row_stride: 12,
        col_stride: 8,
    };
    let len = 4 + 24 + 8 + 4;
    let make = |view: SourceView, len| of_memory(ramp(len), vec![view], ValueChange::Keep, 24).map(|_| ());
    make(fits, len).unwrap();
    assert!(make(fits, len - 1).is_err());
    for bad in [
        SourceView { file: 1, ..fits },
        SourceView {
            offset: u64::MAX,
            ..fits
        },
        SourceView {
            row_stride: u64::MAX,
            ..fits
        },
        SourceView {
            col_stride: u64::MAX / 2 + 1,
            cols: 3,
            ..fits
        },
        SourceView {
            rows: u64::MAX,
            ..fits
        },
        SourceView {
            unit: u64::MAX,
            ..fits
        },
    ] {
        assert!(make(bad, len).is_err(), "{bad:?}");
    }
}

#[test]
fn a_range_past_the_weight_is_refused() {
    let source = of_memory(
        ramp(8),
        vec![SourceView::contiguous(0, 0, 8)],
        ValueChange::Keep,
        8,
    )
    .unwrap();
    for (offset, len) in [(0, 9), (8, 1), (u64::MAX, 2)] {
        assert!(source.read_at(WeightId(0), offset, &mut vec![0; len]).is_err());
    }
    assert!(source.read_at(WeightId(1), 0, &mut []).is_err());
    source.read_at(WeightId(0), 8, &mut []).unwrap();
}

/// A source over a real file that holds one weight of `len` bytes.
fn of_file(path: &Path, len: u64) -> FileSource {
    let file = std::fs::File::open(path).unwrap();
    let identity = read::identity(&file.metadata().unwrap());
    let mut manifest = fake::manifest_in_memory(vec![]);
    manifest.shards = vec![Shard {
        source: SourceFile {
            path: path.to_owned(),
            len: identity.len,
            file: Some(Arc::new(file)),
            identity: Some(identity),
        },
        memory: None,
    }];
    FileSource::new(&manifest, &fake::plan(&[("w", WeightClass::Quantized, len)])).unwrap()
}

#[test]
fn every_way_a_file_can_change_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let bytes = ramp(5000);
    let fresh = || {
        std::fs::write(&path, &bytes).unwrap();
        of_file(&path, 5000)
    };
    let noticed = |source: &FileSource, what: &str| {
        let error = source.check_unchanged().unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };

    let source = fresh();
    source.check_unchanged().unwrap();

    std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(4000)
        .unwrap();
    noticed(&source, "its length was 5000 and is 4000");
    let mut out = vec![0; 5000];
    assert!(matches!(
        source.read_at(WeightId(0), 0, &mut out),
        Err(Error::SourceChanged { .. })
    ));

    let source = fresh();
    std::fs::OpenOptions::new()
        .append(true)
        .open(&path)
        .unwrap()
        .write_all(b"x")
        .unwrap();
    noticed(&source, "its length");

    let source = fresh();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(1))
        .unwrap();
    noticed(&source, "its modification time");

    let source = fresh();
    std::fs::rename(&path, folder.path().join("away")).unwrap();
    noticed(&source, "its path");
    std::fs::write(&path, &bytes).unwrap();
    noticed(&source, "its inode");
}

#[test]
fn a_file_is_shared_as_one_mapping_of_its_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, ramp(5000)).unwrap();
    let source = of_file(&path, 5000);
    let mapping = source.share(0).unwrap();
    assert_eq!(mapping.bytes(), ramp(5000));
    assert!(Arc::ptr_eq(&mapping, &source.share(0).unwrap()));
    assert!(source.share(1).is_none());
    drop(source);
    assert_eq!(mapping.bytes()[4999], ramp(5000)[4999]);

    let memory = of_memory(
        ramp(8),
        vec![SourceView::contiguous(0, 0, 8)],
        ValueChange::Keep,
        8,
    )
    .unwrap();
    assert_eq!(memory.share(0).unwrap().bytes(), ramp(8));
}

#[test]
fn views_follow_each_other_in_the_order_of_the_plan() {
    // A weight of two views from one file: the second before the first.
    let views = vec![SourceView::contiguous(0, 6, 2), SourceView::contiguous(0, 0, 3)];
    let source = of_memory(ramp(8), views.clone(), ValueChange::Keep, 5).unwrap();
    assert_eq!(all(&source, 5), by_definition(&ramp(8), &views));
}
