//! A quantised matrix, where results go, and the way into the kernels.

use std::marker::PhantomData;
use std::ops::Range;

use hoist_backend::Encoding;

use super::activations::{Segment, segments};
#[cfg(target_arch = "x86_64")]
use super::multiply;
use super::side::{SIDE_ROW_BYTES, row_bytes, side_row_bytes};
use super::{Isa, Kind, NonFinite, scalar};

/// One matrix `[rows, cols]`, resident.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QuantMatrix<'a> {
    /// A quantised encoding.
    pub(crate) encoding: Encoding,
    /// Output dimension.
    pub(crate) rows: usize,
    /// Input dimension; one that [`hoist_quant::check_input_dimension`] accepts.
    pub(crate) cols: usize,
    /// All rows, without the prefix of an AprQ8 matrix; canonical, or as [`super::pack`] left them.
    pub(crate) bytes: &'a [u8],
    /// What [`super::prepare_side`] wrote for all rows, and [`super::pack`] rearranged if it rearranged `bytes`.
    pub(crate) side: &'a [u8],
    /// Whether [`super::pack`] rearranged it.
    pub(crate) packed: bool,
    /// The scale in front of an AprQ8 matrix; `None` for every other encoding.
    pub(crate) scale: Option<f32>,
}

impl<'a> QuantMatrix<'a> {
    pub(super) fn segments(&self) -> usize {
        segments(self.cols)
    }

    /// Canonical bytes of a row that is not packed.
    pub(super) fn row(&self, row: usize) -> &'a [u8] {
        let len = row_bytes(self.encoding, self.cols);
        &self.bytes[row * len..][..len]
    }

    /// What is kept beside a row that is not packed.
    pub(super) fn row_side(&self, row: usize) -> &'a [u8] {
        let len = side_row_bytes(self.cols);
        &self.side[row * len..][..len]
    }

    /// `E_w` of a row that is not packed.
    pub(super) fn row_exponent(&self, row: usize) -> i32 {
        let side = self.row_side(row);
        debug_assert!(side.len() >= SIDE_ROW_BYTES);
        i16::from_le_bytes([side[0], side[1]]).into()
    }

    fn check(&self) {
        assert!(hoist_quant::check_input_dimension(self.encoding, self.cols as u64).is_ok());
        assert_eq!(self.bytes.len(), self.rows * row_bytes(self.encoding, self.cols));
        assert_eq!(self.side.len(), self.rows * side_row_bytes(self.cols));
    }
}

/// Where results go: `[tokens][stride]` f32, in which token `t`'s result of row `r` is element `t · stride + r`.
#[derive(Debug)]
pub(crate) struct Results<'a> {
    base: *mut f32,
    len: usize,
    stride: usize,
    values: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a `&mut [f32]`, or a part of one that nobody else writes, which whoever called `share` upholds.
unsafe impl Send for Results<'_> {}

impl<'a> Results<'a> {
    /// All of `values`.
    pub(crate) fn new(values: &'a mut [f32], stride: usize) -> Self {
        Self {
            base: values.as_mut_ptr(),
            len: values.len(),
            stride,
            values: PhantomData,
        }
    }

    /// Results over the same memory, for another thread.
    ///
    /// # Safety
    /// Of all that are shared from one, no two are given to [`matmul`] at the same time with rows in common, nor is the memory
    /// used in another way meanwhile.
    pub(crate) unsafe fn share(&self) -> Results<'a> {
        Self {
            base: self.base,
            len: self.len,
            stride: self.stride,
            values: PhantomData,
        }
    }

    /// Writes one token's results of the rows from `row` on.
    #[inline(always)]
    pub(super) fn write(&mut self, token: usize, row: usize, y: &[f32]) {
        let at = token * self.stride + row;
        assert!(row + y.len() <= self.stride && at + y.len() <= self.len);
        // SAFETY: in bounds, as just asserted.
        let to = unsafe { self.base.add(at) };
        // SAFETY: `to` points to `y.len()` writable f32 that nobody else writes now (`new`, `share`); `y` cannot overlap them.
        unsafe { std::ptr::copy_nonoverlapping(y.as_ptr(), to, y.len()) };
    }
}

/// Memory of one thread for [`matmul`]; its size depends on nothing.
#[derive(Debug)]
pub(crate) struct Scratch {
    #[cfg(target_arch = "x86_64")]
    buffers: Box<multiply::Buffers>,
}

impl Scratch {
    /// Bytes that [`Scratch::new`] allocates.
    #[cfg(target_arch = "x86_64")]
    pub(crate) const BYTES: usize = size_of::<multiply::Buffers>();
    /// Bytes that [`Scratch::new`] allocates.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) const BYTES: usize = 0;

    /// Allocates it.
    pub(crate) fn new() -> Self {
        Self {
            #[cfg(target_arch = "x86_64")]
            buffers: Box::new(multiply::Buffers::new()),
        }
    }
}

/// Multiplies rows of `w` with every token of `x` and writes the results.
///
/// `x` are `tokens · segments(cols)` segments, token by token. `rows` starts at a multiple of [`Isa::group`] and ends at one
/// or at the last row. A matrix that is packed was packed for this `isa`.
///
/// # Errors
/// [`NonFinite`] if a result is infinite; some results are written then and some are not.
pub(crate) fn matmul(
    isa: Isa,
    w: &QuantMatrix<'_>,
    rows: Range<usize>,
    x: &[Segment],
    out: &mut Results<'_>,
    scratch: &mut Scratch,
) -> Result<(), NonFinite> {
    w.check();
    assert!(x.len().is_multiple_of(w.segments()));
    if rows.is_empty() {
        return Ok(());
    }
    assert!(rows.end <= w.rows);
    assert!(rows.start.is_multiple_of(isa.group()));
    assert!(rows.end == w.rows || rows.end.is_multiple_of(isa.group()));
    match isa.0 {
        Kind::Scalar => {
            let _ = scratch;
            assert!(!w.packed, "scalar code reads canonical bytes");
            scalar::matmul(w, rows, x, out)
        }
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2(lanes) => multiply::matmul(lanes, call(w, rows, x, out, scratch)),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512(lanes) => multiply::matmul(lanes, call(w, rows, x, out, scratch)),
        #[cfg(all(test, target_arch = "x86_64"))]
        Kind::Portable(lanes) => multiply::matmul(lanes, call(w, rows, x, out, scratch)),
    }
}

/// What every instruction set is asked.
#[cfg(target_arch = "x86_64")]
fn call<'a, 'w, 'o>(
    w: &'a QuantMatrix<'w>,
    rows: Range<usize>,
    x: &'a [Segment],
    out: &'a mut Results<'o>,
    scratch: &'a mut Scratch,
) -> multiply::Call<'a, 'w, 'o> {
    let buffers = &mut scratch.buffers;
    multiply::Call {
        w,
        rows,
        x,
        out,
        buffers,
    }
}
