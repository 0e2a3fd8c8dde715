//! Vectors whose lanes are rows: what the kernels ask of an instruction set.

/// 64-bit integers of the rows of a vector, those of even and those of odd rows apart, as widening products come.
#[derive(Clone, Copy)]
pub(super) struct Wide<V> {
    pub(super) even: V,
    pub(super) odd: V,
}

/// Work that is compiled for an instruction set as a whole: everything it calls is inlined into
/// [`Lanes::vectorise`].
pub(super) trait Job {
    type Output;

    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// An instruction set that this machine has: a value of it is the proof. `V` holds one 32-bit integer, or four bytes, for
/// each of [`Lanes::ROWS`] rows; `F` one f32. Slices given to loads and stores have exactly the length that they move.
pub(super) trait Lanes: Copy {
    /// Rows of a vector.
    const ROWS: usize;
    /// Whether [`Lanes::dot`] accumulates in 16 bits: then `n` dots of weights up to `max` need `n · 2 · 127 · max < 2^15`.
    const NARROW: bool;
    type V: Copy;
    type F: Copy;

    fn vectorise<J: Job>(self, job: J) -> J::Output;

    /// Asks for the cache line in which `bytes` start.
    fn prefetch(self, bytes: &[u8]);
    fn load(self, bytes: &[u8]) -> Self::V;
    fn store(self, v: Self::V, bytes: &mut [u8]);
    /// One u8 for each row.
    fn load_u8(self, bytes: &[u8]) -> Self::V;
    /// One i16 for each row.
    fn load_i16(self, bytes: &[u8]) -> Self::V;
    /// One f16 for each row.
    fn load_f16(self, bytes: &[u8]) -> Self::F;
    /// The same word in every row.
    fn splat(self, word: u32) -> Self::V;

    fn and(self, a: Self::V, b: Self::V) -> Self::V;
    fn or(self, a: Self::V, b: Self::V) -> Self::V;
    fn shl<const N: u32>(self, a: Self::V) -> Self::V;
    fn shr<const N: u32>(self, a: Self::V) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    fn xor(self, a: Self::V, b: Self::V) -> Self::V;
    /// Differences of bytes.
    fn sub8(self, a: Self::V, b: Self::V) -> Self::V;
    /// Logical shift to the right by a number of bits for each row; 32 and more leave nothing.
    fn shr_by(self, a: Self::V, by: Self::V) -> Self::V;
    /// Sixteen bytes for [`Lanes::look_up`].
    fn table(self, bytes: &[u8; 16]) -> Self::V;
    /// Of a table, the byte that each byte of `at`, which is below 16, names.
    fn look_up(self, table: Self::V, at: Self::V) -> Self::V;
    /// Of a table whose length is a power of two, the word that each row's `at` names; bits of `at` beyond it do not count.
    fn gather<const N: usize>(self, table: &[u32; N], at: Self::V) -> Self::V;
    /// Negates those bytes whose byte of `signs` has its upper bit set.
    fn flip(self, w: Self::V, signs: Self::V) -> Self::V;
    /// Products of i16 halves, low 16 bits.
    fn mul16(self, a: Self::V, b: Self::V) -> Self::V;
    /// Products of i16 halves, summed.
    fn madd16(self, a: Self::V, b: Self::V) -> Self::V;

    /// `2^e`, for exponents of normal numbers.
    fn pow2(self, e: Self::V) -> Self::F;
    fn negate(self, a: Self::F) -> Self::F;
    /// `a · b`, rounded down to an integer; the product is exact.
    fn mul_floor(self, a: Self::F, b: Self::F) -> Self::V;

    /// Adds products of four u8 weights with four i8 activations, in a form of its own that starts at 0.
    fn dot(self, acc: Self::V, w: Self::V, q: u32) -> Self::V;
    /// Adds two accumulations of [`Lanes::dot`], within its bound.
    fn dot_add(self, a: Self::V, b: Self::V) -> Self::V;
    /// The accumulated sum times a factor.
    fn dot_end(self, acc: Self::V, factor: Self::V) -> Self::V;
    /// A factor that is the same for all rows, given as two equal i16.
    fn factor(self, twice: u32) -> Self::V;
    /// Bytes `J` of the rows' words as unsigned sub-scales.
    fn sub_scale<const J: i32>(self, v: Self::V) -> Self::V;
    /// Bytes `J` of the rows' words as signed sub-scales.
    fn signed_sub_scale<const J: i32>(self, v: Self::V) -> Self::V;
    /// A factor: sub-scales times a `u`, given as two equal i16.
    fn times(self, sub_scale: Self::V, twice: u32) -> Self::V;
    /// Bytes `J` and `J + 1` of the rows' words as two unsigned i16.
    fn pair<const J: i32>(self, v: Self::V) -> Self::V;
    /// Bytes `J` and `J + 1` of the rows' words as two signed i16.
    fn signed_pair<const J: i32>(self, v: Self::V) -> Self::V;

    /// What [`Lanes::dot_signed`] wants of four i8 weights.
    fn prepare_signed(self, w: Self::V) -> Wide<Self::V>;
    /// Adds products of four i8 weights with four i8 activations, in a form of its own that starts at 0.
    fn dot_signed(self, acc: Self::V, w: Wide<Self::V>, q: u32) -> Self::V;
    /// The accumulated sum times a factor, given as two equal i16; `sum`: the activations' sum times the factor.
    fn dot_signed_end(self, acc: Self::V, twice: u32, sum: i32) -> Self::V;

    /// The accumulated sum times sub-scales and a `u`, given as two equal i16; `us`: the activations' sum times `u`.
    fn dot_signed_scaled(self, acc: Self::V, sub_scale: Self::V, twice: u32, us: i32) -> Self::V;

    fn zero_wide(self) -> Wide<Self::V>;
    /// Adds products of 32-bit integers.
    fn mul_add_wide(self, acc: Wide<Self::V>, a: Self::V, b: Self::V) -> Wide<Self::V>;
    /// Odd rows' words in the places of the even rows before them.
    fn odd(self, a: Self::V) -> Self::V;
    /// Adds products of 32-bit integers, `b`'s odd rows being in even places already.
    fn mul_add_parted(self, acc: Wide<Self::V>, a: Self::V, b: Wide<Self::V>) -> Wide<Self::V>;
    /// Adds products of `a` and 32-bit integers, `b`'s odd rows being in even places already.
    fn mul_add_splat(self, acc: Wide<Self::V>, a: i32, b: Wide<Self::V>) -> Wide<Self::V>;
    fn add_wide(self, a: Wide<Self::V>, b: Wide<Self::V>) -> Wide<Self::V>;
    fn sub_wide(self, a: Wide<Self::V>, b: Wide<Self::V>) -> Wide<Self::V>;
    /// Arithmetic shift to the right by 0 … 63.
    fn shift_wide(self, a: Wide<Self::V>, by: Self::V) -> Wide<Self::V>;
    fn load_wide(self, sums: &Sums) -> Wide<Self::V>;
    fn store_wide(self, a: Wide<Self::V>, sums: &mut Sums);

    /// The end of §1.3: `a` rounded to f32, times `2^exponents`, rounded to f32, in the order of rows. `false`, and nothing
    /// of use in `y`, if a sum is too large for this way of doing it.
    fn round(self, a: Wide<Self::V>, exponents: Self::V, y: &mut [f32]) -> bool;
}

/// Methods of [`Lanes`] as calls of the functions of that name beside the implementation.
macro_rules! forward {
    ($(fn $name:ident $(<const $c:ident: $ct:ty>)? ($($a:ident: $t:ty),*) $(-> $r:ty)?;)*) => {$(
        #[inline(always)]
        fn $name $(<const $c: $ct>)? (self, $($a: $t),*) $(-> $r)? {
            // SAFETY: a value of this type exists only where the instructions do.
            unsafe { $name $(::<$c>)? ($($a),*) }
        }
    )*};
}
pub(super) use forward;

/// Implements [`Lanes`] for a proof of an instruction set by functions, all of one set of target features or of part of it,
/// that stand beside it.
macro_rules! lanes {
    ($proof:ty, rows: $rows:literal, narrow: $narrow:literal, $v:ty, $f:ty) => {
        impl Lanes for $proof {
            const ROWS: usize = $rows;
            const NARROW: bool = $narrow;
            type V = $v;
            type F = $f;

            #[inline(always)]
            fn vectorise<J: Job>(self, job: J) -> J::Output {
                // SAFETY: a value of this type exists only where the instructions do.
                unsafe { vectorise(self, job) }
            }

            forward! {
                fn prefetch(bytes: &[u8]);
                fn load(bytes: &[u8]) -> $v;
                fn store(v: $v, bytes: &mut [u8]);
                fn load_u8(bytes: &[u8]) -> $v;
                fn load_i16(bytes: &[u8]) -> $v;
                fn load_f16(bytes: &[u8]) -> $f;
                fn splat(word: u32) -> $v;
                fn and(a: $v, b: $v) -> $v;
                fn or(a: $v, b: $v) -> $v;
                fn shl<const N: u32>(a: $v) -> $v;
                fn shr<const N: u32>(a: $v) -> $v;
                fn add(a: $v, b: $v) -> $v;
                fn sub(a: $v, b: $v) -> $v;
                fn min(a: $v, b: $v) -> $v;
                fn xor(a: $v, b: $v) -> $v;
                fn sub8(a: $v, b: $v) -> $v;
                fn shr_by(a: $v, by: $v) -> $v;
                fn table(bytes: &[u8; 16]) -> $v;
                fn look_up(table: $v, at: $v) -> $v;
                fn gather<const N: usize>(table: &[u32; N], at: $v) -> $v;
                fn flip(w: $v, signs: $v) -> $v;
                fn mul16(a: $v, b: $v) -> $v;
                fn madd16(a: $v, b: $v) -> $v;
                fn pow2(e: $v) -> $f;
                fn negate(a: $f) -> $f;
                fn mul_floor(a: $f, b: $f) -> $v;
                fn dot(acc: $v, w: $v, q: u32) -> $v;
                fn dot_add(a: $v, b: $v) -> $v;
                fn dot_end(acc: $v, factor: $v) -> $v;
                fn factor(twice: u32) -> $v;
                fn sub_scale<const J: i32>(v: $v) -> $v;
                fn signed_sub_scale<const J: i32>(v: $v) -> $v;
                fn times(sub_scale: $v, twice: u32) -> $v;
                fn pair<const J: i32>(v: $v) -> $v;
                fn signed_pair<const J: i32>(v: $v) -> $v;
                fn prepare_signed(w: $v) -> Wide<$v>;
                fn dot_signed(acc: $v, w: Wide<$v>, q: u32) -> $v;
                fn dot_signed_end(acc: $v, twice: u32, sum: i32) -> $v;
                fn dot_signed_scaled(acc: $v, sub_scale: $v, twice: u32, us: i32) -> $v;
                fn zero_wide() -> Wide<$v>;
                fn mul_add_wide(acc: Wide<$v>, a: $v, b: $v) -> Wide<$v>;
                fn odd(a: $v) -> $v;
                fn mul_add_parted(acc: Wide<$v>, a: $v, b: Wide<$v>) -> Wide<$v>;
                fn mul_add_splat(acc: Wide<$v>, a: i32, b: Wide<$v>) -> Wide<$v>;
                fn add_wide(a: Wide<$v>, b: Wide<$v>) -> Wide<$v>;
                fn sub_wide(a: Wide<$v>, b: Wide<$v>) -> Wide<$v>;
                fn shift_wide(a: Wide<$v>, by: $v) -> Wide<$v>;
                fn load_wide(sums: &Sums) -> Wide<$v>;
                fn store_wide(a: Wide<$v>, sums: &mut Sums);
                fn round(a: Wide<$v>, exponents: $v, y: &mut [f32]) -> bool;
            }
        }
    };
}
pub(super) use lanes;

/// Most rows of a vector.
pub(super) const MAX_ROWS: usize = 16;

/// Sums of a group of rows: those of even rows, then those of odd ones.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [i64; MAX_ROWS]);

impl Sums {
    pub(super) const ZERO: Self = Self([0; MAX_ROWS]);

    /// The sum of row `row` of `rows`.
    #[inline(always)]
    pub(super) fn row(&self, row: usize, rows: usize) -> i64 {
        self.0[row / 2 + row % 2 * (rows / 2)]
    }
}
