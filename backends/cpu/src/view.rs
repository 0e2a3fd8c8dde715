//! Resident float weights as arrays.

use half::{bf16, f16};
use hoist_backend::{Encoding, FloatLayout, WeightId};
use ndarray::ArrayView3;

use crate::backend::CpuBackend;
use crate::residency::Resident;

/// A resident F32, F16 or BF16 weight where it lies, as `[matrices, rows, cols]`; strided if it is kept transposed.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "each variant is a view of values of that encoding")]
pub enum FloatView<'a> {
    F32(ArrayView3<'a, f32>),
    F16(ArrayView3<'a, f16>),
    BF16(ArrayView3<'a, bf16>),
}

fn array<'a, T: bytemuck::Pod>(weight: &Resident, bytes: &'a [u8]) -> Option<ArrayView3<'a, T>> {
    let values: &[T] = bytemuck::try_cast_slice(bytes).ok()?;
    let shape = weight.shape;
    let (matrices, rows, cols) = (shape.matrices as usize, shape.rows as usize, shape.cols as usize);
    match weight.layout {
        FloatLayout::OutIn => ArrayView3::from_shape((matrices, rows, cols), values).ok(),
        FloatLayout::InOut => {
            let stored = ArrayView3::from_shape((matrices, cols, rows), values).ok()?;
            Some(stored.permuted_axes((0, 2, 1)))
        }
    }
}

impl CpuBackend {
    /// A resident float weight as an array; `None` if nothing is resident, the weight is unknown or it is quantised.
    pub fn float_view(&self, weight: WeightId) -> Option<FloatView<'_>> {
        let residency = self.resident()?;
        let weight = residency.weight(weight).ok()?;
        let bytes = residency.bytes(weight);
        match weight.encoding {
            Encoding::F32 => array(weight, bytes).map(FloatView::F32),
            Encoding::F16 => array(weight, bytes).map(FloatView::F16),
            Encoding::BF16 => array(weight, bytes).map(FloatView::BF16),
            _ => None,
        }
    }
}
