use crate::{Encoding, Error, FloatLayout, MemoryByClass, Result, Role, UnsupportedWhat};

/// A weight of a plan: an index into [`LoadPlan::weights`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightId(pub u32);

impl WeightId {
    /// As an index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// `[matrices, rows, cols]`, row-major. Vectors are `[1, 1, n]`, plain matrices `[1, out, in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Number of matrices: experts, otherwise 1.
    pub matrices: u64,
    /// Output dimension.
    pub rows: u64,
    /// Input dimension.
    pub cols: u64,
}

impl Shape {
    /// `[1, 1, n]`
    pub fn vector(n: u64) -> Self {
        Self {
            matrices: 1,
            rows: 1,
            cols: n,
        }
    }

    /// `[1, rows, cols]`
    pub fn matrix(rows: u64, cols: u64) -> Self {
        Self {
            matrices: 1,
            rows,
            cols,
        }
    }

    /// Number of values, if below 2^64.
    pub fn elements(self) -> Option<u64> {
        self.matrices.checked_mul(self.rows)?.checked_mul(self.cols)
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.matrices, self.rows) {
            (1, 1) => write!(f, "[{}]", self.cols),
            (1, _) => write!(f, "[{}, {}]", self.rows, self.cols),
            _ => write!(f, "[{}, {}, {}]", self.matrices, self.rows, self.cols),
        }
    }
}

/// What kind of memory a weight belongs to, and which upload carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WeightClass {
    /// Matrices of a quantised encoding: `upload_quantized`.
    Quantized,
    /// F32, F16 and BF16 matrices: `upload_f32`.
    Float,
    /// Norm vectors, f32: `upload_gamma`.
    Gamma,
    /// Biases, f32: `upload_f32`.
    Bias,
}

/// A two-dimensional view of a source file.
///
/// Unit `(r, c)` is the `unit` bytes at `offset + r · row_stride + c · col_stride`; canonical order is row-major over
/// `(r, c)`. A contiguous run is one unit: `rows = cols = 1`. Rows of a fused tensor are `rows × 1` units of a row each;
/// a column range of a `[in, out]` Conv1D tensor, read as `[out, in]`, is units of one element with both strides set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceView {
    /// Index into [`crate::WeightSource::files`].
    pub file: u32,
    /// First byte.
    pub offset: u64,
    /// Units per column.
    pub rows: u64,
    /// Units per row.
    pub cols: u64,
    /// Bytes of a unit.
    pub unit: u64,
    /// Bytes from a unit to the one below it.
    pub row_stride: u64,
    /// Bytes from a unit to the one right of it.
    pub col_stride: u64,
}

impl SourceView {
    /// A run of `len` bytes.
    pub fn contiguous(file: u32, offset: u64, len: u64) -> Self {
        Self {
            file,
            offset,
            rows: 1,
            cols: 1,
            unit: len,
            row_stride: len,
            col_stride: len,
        }
    }

    /// Bytes the view yields; the plan has checked that they do not overflow.
    pub fn nbytes(&self) -> u64 {
        self.rows * self.cols * self.unit
    }

    /// The one run this view is, as `(offset, len)`, if its units follow each other without gaps.
    pub fn as_contiguous(&self) -> Option<(u64, u64)> {
        let rows_touch = self.rows == 1 || self.row_stride == self.cols * self.unit;
        let cols_touch = self.cols == 1 || self.col_stride == self.unit;
        (rows_touch && cols_touch).then(|| (self.offset, self.nbytes()))
    }
}

/// How source values become canonical values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueChange {
    /// The source's own bytes.
    Keep,
    /// F32, F16 or BF16 to f32, exactly.
    Widen {
        /// The source's encoding.
        from: Encoding,
    },
    /// To f32, then one added (round to nearest even): Hugging Face gemma norms, which store `gamma − 1`.
    WidenAddOne {
        /// The source's encoding.
        from: Encoding,
    },
}

impl ValueChange {
    /// Bytes of a source value for each 4 canonical bytes; `None` for [`ValueChange::Keep`].
    pub fn source_encoding(self) -> Option<Encoding> {
        match self {
            ValueChange::Keep => None,
            ValueChange::Widen { from } | ValueChange::WidenAddOne { from } => Some(from),
        }
    }
}

/// One weight: where it comes from and what it becomes.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightPlan {
    /// Its place in the plan.
    pub id: WeightId,
    /// The name in reports: the source tensor's, or the first one's for weights made of several.
    pub name: String,
    /// Layer, or `None` for weights of the whole model.
    pub layer: Option<u32>,
    /// What it is for.
    pub role: Role,
    /// Memory class, and so which upload carries it.
    pub class: WeightClass,
    /// Encoding of the canonical bytes.
    pub encoding: Encoding,
    /// Canonical shape.
    pub shape: Shape,
    /// Canonical bytes.
    pub nbytes: u64,
    /// Where the source bytes are: concatenated, in order.
    pub views: Vec<SourceView>,
    /// How source values become canonical values.
    pub change: ValueChange,
    /// The layout wanted on the device. Anything but `OutIn` only for float matmul weights.
    pub layout: FloatLayout,
    /// Bytes it takes on the device, with padding and what is kept beside it, as [`crate::Sizing`] says.
    pub resident_bytes: u64,
}

impl WeightPlan {
    /// Uploads are aligned to multiples of this many canonical bytes: a block.
    pub fn granule(&self) -> u64 {
        self.encoding.block_bytes()
    }

    /// Checks what every backend relies on: the id of its place in the plan, an encoding of weights, and a shape, canonical
    /// bytes and a class that agree. The caller has validated the model.
    ///
    /// # Errors
    /// [`Error::Unsupported`], in the name of `backend`, for an encoding that no weight has; [`Error::InvalidArgument`].
    pub fn check(&self, backend: &str, place: usize) -> Result<()> {
        let name = &self.name;
        if self.id.index() != place {
            return Err(Error::invalid(format!("id of weight `{name}`"), place, self.id.0));
        }
        let (encoding, shape) = (self.encoding, self.shape);
        if !(encoding.is_float() || encoding.is_quantized()) {
            return Err(Error::Unsupported {
                backend: backend.into(),
                what: UnsupportedWhat::Encoding {
                    encoding,
                    usage: "weights",
                },
            });
        }
        if shape.matrices == 0 || shape.rows == 0 || shape.cols == 0 {
            return Err(Error::invalid(
                format!("shape of `{name}`"),
                "no zero dimension",
                shape,
            ));
        }
        let nbytes = encoding.nbytes(shape)?;
        if nbytes != self.nbytes {
            return Err(Error::invalid(
                format!("canonical bytes of `{name}`"),
                nbytes,
                self.nbytes,
            ));
        }
        let class_fits = match self.class {
            WeightClass::Quantized => encoding.is_quantized(),
            WeightClass::Float => encoding.is_float(),
            WeightClass::Gamma | WeightClass::Bias => encoding == Encoding::F32,
        };
        if !class_fits {
            return Err(Error::invalid(
                format!("class of `{name}`"),
                format!("one that holds {encoding}"),
                format!("{:?}", self.class),
            ));
        }
        Ok(())
    }
}

/// Everything that will be resident, known before the first byte is read.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadPlan {
    /// Architecture, such as `llama`; for reports only, a backend must not look at it.
    pub architecture: String,
    /// Number of layers.
    pub layers: u32,
    /// The weights; `weights[i].id == WeightId(i)`.
    pub weights: Vec<WeightPlan>,
    /// Resident bytes by class: weights, index, and KV and workspace if a capacity was planned.
    pub resident: MemoryByClass,
    /// Canonical bytes of all weights: what uploads carry.
    pub nbytes: u64,
    /// Source bytes of all weights: what is read.
    pub source_bytes: u64,
}

/// Checks a range of a weight's canonical bytes that is to be read back: whole blocks of `granule` bytes within `nbytes`. `name`
/// is the weight's, for messages.
///
/// # Errors
/// [`Error::InvalidArgument`]
pub fn check_read_back(name: &str, nbytes: u64, granule: u64, offset: u64, len: u64) -> Result<()> {
    let what = || format!("range of `{name}` to read back");
    let Some(end) = offset.checked_add(len).filter(|end| *end <= nbytes) else {
        return Err(Error::invalid(
            what(),
            format!("one that ends by {nbytes}"),
            format!("{offset} + {len}"),
        ));
    };
    if !offset.is_multiple_of(granule) || !end.is_multiple_of(granule) {
        return Err(Error::invalid(
            what(),
            format!("multiples of a block of {granule} bytes"),
            format!("{offset}..{end}"),
        ));
    }
    Ok(())
}

impl LoadPlan {
    /// The weight of that id.
    ///
    /// # Errors
    /// [`crate::Error::UnknownWeight`]
    pub fn weight(&self, id: WeightId) -> crate::Result<&WeightPlan> {
        self.weights.get(id.index()).ok_or(crate::Error::UnknownWeight {
            weight: id,
            weights: self.weights.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_blocks_are_read_back() {
        let check = |offset, len| check_read_back("w", 54, 18, offset, len).is_ok();
        assert!(check(0, 54) && check(36, 18) && check(54, 0));
        assert!(!check(0, 72) && !check(54, 18) && !check(u64::MAX - 17, 18));
        assert!(!check(9, 18) && !check(0, 9));
    }

    #[test]
    fn a_view_is_contiguous_only_without_gaps() {
        assert_eq!(SourceView::contiguous(0, 5, 9).as_contiguous(), Some((5, 9)));
        let rows = SourceView {
            file: 0,
            offset: 8,
            rows: 3,
            cols: 1,
            unit: 18,
            row_stride: 18,
            col_stride: 18,
        };
        assert_eq!(rows.as_contiguous(), Some((8, 54)));
        assert_eq!(
            SourceView {
                row_stride: 36,
                ..rows
            }
            .as_contiguous(),
            None
        );
        let conv = SourceView {
            file: 0,
            offset: 0,
            rows: 4,
            cols: 3,
            unit: 4,
            row_stride: 4,
            col_stride: 16,
        };
        assert_eq!(conv.as_contiguous(), None);
        assert_eq!(conv.nbytes(), 48);
    }
}
