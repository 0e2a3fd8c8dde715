//! Quantised matrix × activations, exactly as `docs/numerics.md` §1 writes it, and fast.
//!
//! | call | what it does |
//! |---|---|
//! | [`Isa::detect`] | the instruction set to use: AVX-512 with VNNI, AVX2, or plain scalar code |
//! | [`quantise`] | one activation vector to [`Segment`]s (§1.1) |
//! | [`prepare_side`] | the exponents kept beside rows (§1.2) |
//! | [`pack`], [`unpack`] | rearrange a matrix in place so that SIMD lanes are rows, and read canonical bytes back |
//! | [`matmul`] | rows of a matrix × tokens (§1.3), on one thread |
//!
//! # Threads
//!
//! A call of [`matmul`] runs on the caller's thread. To use several, split the rows at multiples of [`Isa::group`] and give
//! each thread its own [`Scratch`] and its own part of the [`Results`].
//!
//! # Memory
//!
//! Nothing here allocates but [`Scratch::new`]. Activations are [`Segment`]s, plain data of 512 bytes for each 256 elements, in
//! memory of the caller's: `tokens · segments(cols)` of them. Beside each row of a matrix stand [`SIDE_ROW_BYTES`] and, for
//! each segment, [`SIDE_SEGMENT_BYTES`].
//!
//! # Exactness
//!
//! Every instruction set gives the same bits: sums are sums of integers, and the few float operations (the division and
//! products of §1.1, the last two roundings of §1.3) are single IEEE operations in each of them.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_activations;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod blocks;
#[cfg(target_arch = "x86_64")]
mod codec;
#[cfg(target_arch = "x86_64")]
mod grids;
#[cfg(target_arch = "x86_64")]
mod lanes;
mod matrix;
#[cfg(test)]
mod measure;
#[cfg(target_arch = "x86_64")]
mod multiply;
mod pack;
#[cfg(target_arch = "x86_64")]
mod panel;
#[cfg(all(test, target_arch = "x86_64"))]
mod portable;
mod round;
mod scalar;
mod side;
#[cfg(target_arch = "x86_64")]
mod super_blocks;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tokens;

pub(crate) use activations::{Segment, quantise, segments};
pub(crate) use matrix::{QuantMatrix, Results, Scratch, matmul};
pub(crate) use pack::{pack, unpack};
pub(crate) use side::{SIDE_ROW_BYTES, SIDE_SEGMENT_BYTES, prepare_side, side_row_bytes};

/// A NaN or infinity among operands or results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NonFinite;

/// An instruction set that this machine has: there is no other way to come by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Isa(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    #[cfg(all(test, target_arch = "x86_64"))]
    Portable(portable::Portable),
}

impl Isa {
    /// The fastest one.
    pub(crate) fn detect() -> Self {
        Self::available().last().unwrap_or(Self::scalar())
    }

    /// Portable code that reads like the contract.
    pub(crate) const fn scalar() -> Self {
        Self(Kind::Scalar)
    }

    /// All that this machine has, the slowest first.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn available() -> impl Iterator<Item = Self> {
        let avx2 = avx2::Avx2::new().map(Kind::Avx2);
        let avx512 = avx512::Avx512::new().map(Kind::Avx512);
        [Some(Kind::Scalar), avx2, avx512].into_iter().flatten().map(Self)
    }

    /// All that this machine has, the slowest first.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn available() -> impl Iterator<Item = Self> {
        std::iter::once(Self::scalar())
    }

    /// Those that this machine has, and the one of sixteen rows in plain code.
    #[cfg(all(test, target_arch = "x86_64"))]
    pub(crate) fn tested() -> impl Iterator<Item = Self> {
        Self::available().chain([Self(Kind::Portable(portable::Portable))])
    }

    /// Those that this machine has.
    #[cfg(all(test, not(target_arch = "x86_64")))]
    pub(crate) fn tested() -> impl Iterator<Item = Self> {
        Self::available()
    }

    /// Name for reports.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => "avx512",
            #[cfg(all(test, target_arch = "x86_64"))]
            Kind::Portable(_) => "sixteen rows in plain code",
        }
    }

    /// Rows that are computed together. Row ranges given to [`matmul`] start at multiples of it; they end at one too, or
    /// at the matrix's last row.
    pub(crate) fn group(self) -> usize {
        match self.0 {
            Kind::Scalar => 1,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => <avx2::Avx2 as lanes::Lanes>::ROWS,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => <avx512::Avx512 as lanes::Lanes>::ROWS,
            #[cfg(all(test, target_arch = "x86_64"))]
            Kind::Portable(_) => <portable::Portable as lanes::Lanes>::ROWS,
        }
    }
}
