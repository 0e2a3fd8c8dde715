use hoist_backend::{Encoding, Result, Role, ValueChange, WeightBackend, WeightPlan};
use hoist_quant::dequantize;

use crate::FileSource;
use crate::verify::for_each_chunk;

/// Canonical bytes that are read and decoded at a time.
const CHUNK_BYTES: u64 = 256 << 10;
/// Values that are shown.
const FIRST_VALUES: usize = 10;

/// Numbers that tell a weight from a mistake.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Statistics {
    /// Number of values.
    pub count: u64,
    /// Their mean, summed in f64.
    pub mean: f64,
    /// The smallest; NaN if there are no values.
    pub min: f32,
    /// The largest; NaN if there are no values.
    pub max: f32,
    /// The first ten, in canonical order.
    pub first: Vec<f32>,
}

/// A weight as its file holds it, and as it came out.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightTrace {
    /// Name in reports.
    pub name: String,
    /// Layer, or `None` for weights of the whole model.
    pub layer: Option<u32>,
    /// Role.
    pub role: Role,
    /// Encoding in the file.
    pub source_encoding: Encoding,
    /// Encoding where it is resident.
    pub encoding: Encoding,
    /// Values of the source views, before value changes.
    pub before: Statistics,
    /// Values read back from the backend.
    pub after: Statistics,
}

/// Reads a weight's values from its source and from the backend, and decodes both.
///
/// # Errors
/// What the backend and the source return.
pub fn trace_weight(
    backend: &mut dyn WeightBackend,
    weight: &WeightPlan,
    source: &FileSource,
) -> Result<WeightTrace> {
    let source_encoding = weight.change.source_encoding().unwrap_or(weight.encoding);
    let before = match weight.change {
        ValueChange::Keep => statistics(weight, |offset, out| {
            source.read_unchanged_at(weight.id, offset, out)
        })?,
        ValueChange::Widen { from } | ValueChange::WidenAddOne { from } => {
            // The same shape, in the source's encoding.
            let mut unchanged = weight.clone();
            unchanged.encoding = from;
            unchanged.nbytes = from.nbytes(weight.shape)?;
            statistics(&unchanged, |offset, out| {
                source.read_unchanged_at(weight.id, offset, out)
            })?
        }
    };
    let after = statistics(weight, |offset, out| backend.read_back(weight.id, offset, out))?;
    Ok(WeightTrace {
        name: weight.name.clone(),
        layer: weight.layer,
        role: weight.role,
        source_encoding,
        encoding: weight.encoding,
        before,
        after,
    })
}

fn statistics(weight: &WeightPlan, mut read: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<Statistics> {
    let encoding = weight.encoding;
    let prefix = encoding.matrix_prefix_bytes();
    let mut all = Statistics {
        min: f32::NAN,
        max: f32::NAN,
        ..Statistics::default()
    };
    let mut sum = 0.0;
    let (mut bytes, mut values) = (vec![], vec![]);
    // Each matrix on its own, since an encoding may have something in front of each.
    let matrix_bytes = weight.nbytes / weight.shape.matrices.max(1);
    for start in (0..weight.shape.matrices).map(|matrix| matrix * matrix_bytes) {
        let mut head = vec![0; prefix as usize];
        if prefix > 0 {
            read(start, &mut head)?;
        }
        let mut blocks = weight.clone();
        blocks.nbytes = matrix_bytes.saturating_sub(prefix);
        for_each_chunk(&blocks, CHUNK_BYTES, |offset, len| {
            bytes.resize(head.len() + len, 0);
            bytes[..head.len()].copy_from_slice(&head);
            read(start + prefix + offset, &mut bytes[head.len()..])?;
            let count = len as u64 / encoding.block_bytes() * encoding.block_weights();
            values.resize(count as usize, 0.0);
            dequantize(encoding, &bytes, &mut values)
                .map_err(|error| error.for_weight(&weight.name, start + prefix + offset))?;
            let missing = FIRST_VALUES - all.first.len();
            all.first.extend(values.iter().take(missing));
            for value in &values {
                sum += f64::from(*value);
                all.min = all.min.min(*value);
                all.max = all.max.max(*value);
            }
            all.count += count;
            Ok(())
        })?;
    }
    all.mean = sum / all.count as f64;
    Ok(all)
}

#[cfg(test)]
mod tests {
    use hoist_backend::{LoadPlan, Shape, SourceView, Unwatched, WeightClass, WeightId};

    use super::*;
    use crate::{LoadOptions, fake, load};

    fn traced(plan: &LoadPlan, bytes: Vec<u8>) -> Vec<WeightTrace> {
        let source = FileSource::new(&fake::manifest_in_memory(bytes), plan).unwrap();
        let mut backend = fake::Backend::new();
        let options = LoadOptions {
            verify: false,
            workspace: None,
            watch: &Unwatched,
        };
        load(&mut backend, &fake::index_of(plan), plan, &source, &options).unwrap();
        plan.weights
            .iter()
            .map(|w| trace_weight(&mut backend, w, &source).unwrap())
            .collect()
    }

    #[test]
    fn the_one_that_gemma_norms_lack_shows_between_before_and_after() {
        let mut plan = fake::plan(&[("norm", WeightClass::Gamma, 12 * 4)]);
        let weight = &mut plan.weights[0];
        weight.shape = Shape::vector(12);
        weight.encoding = Encoding::F32;
        weight.change = ValueChange::WidenAddOne { from: Encoding::BF16 };
        weight.views = vec![SourceView::contiguous(0, 0, 24)];
        // 0, 1, 2, … 11 in bf16.
        let bytes = (0..12u8)
            .flat_map(|i| ((f32::from(i).to_bits() >> 16) as u16).to_le_bytes())
            .collect();
        let [trace] = traced(&plan, bytes).try_into().unwrap();
        assert_eq!(trace.source_encoding, Encoding::BF16);
        let first: Vec<f32> = (0..10u8).map(f32::from).collect();
        assert_eq!(
            trace.before,
            Statistics {
                count: 12,
                mean: 5.5,
                min: 0.0,
                max: 11.0,
                first
            }
        );
        assert_eq!(
            (trace.after.mean, trace.after.min, trace.after.max),
            (6.5, 1.0, 12.0)
        );
    }

    #[test]
    fn every_matrix_of_a_prefixed_encoding_is_decoded_with_its_own_scale() {
        let mut plan = fake::plan(&[("w", WeightClass::Quantized, 2 * (4 + 6))]);
        plan.weights[0].encoding = Encoding::APR_Q8;
        plan.weights[0].shape = Shape {
            matrices: 2,
            rows: 2,
            cols: 3,
        };
        let mut bytes = vec![];
        for (scale, code) in [(0.5f32, 4u8), (2.0, 1)] {
            bytes.extend(scale.to_le_bytes());
            bytes.extend([code; 6]);
        }
        let [trace] = traced(&plan, bytes).try_into().unwrap();
        assert_eq!((trace.before.count, trace.before.mean), (12, 2.0));
        assert_eq!(trace.before.first, [2.0; 10]);
        assert_eq!(trace.after, trace.before);
        assert_eq!(plan.weights[0].id, WeightId(0));
    }

    #[test]
    fn quantised_weights_larger_than_a_chunk_are_counted_whole() {
        let rows = 9000;
        let mut plan = fake::plan(&[("w", WeightClass::Quantized, rows * 34)]);
        plan.weights[0].encoding = Encoding::Q8_0;
        plan.weights[0].shape = Shape::matrix(rows, 32);
        let mut bytes = vec![];
        for i in 0..rows {
            bytes.extend([0x00, 0x3c]); // scale 1
            bytes.extend([(i % 3) as u8; 32]);
        }
        let [trace] = traced(&plan, bytes).try_into().unwrap();
        assert_eq!(trace.after.count, rows * 32);
        assert_eq!(
            (trace.after.mean, trace.after.min, trace.after.max),
            (1.0, 0.0, 2.0)
        );
        assert_eq!(trace.before, trace.after);
    }
}
