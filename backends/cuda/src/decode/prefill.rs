//! Products of quantised matrices with many tokens: `kernels/prefill.cuh` and `kernels/prefill_k.cuh`, on int8 tensor cores; the tiles of the
//! latter that do not come out even are shared out (`kernels/prefill_parted.cu`).
//!
//! A vector's integers are packed into tiles of eight tokens once, and read by every product that takes them in that form. The bits are
//! those of the kernels for few tokens, since every sum is one of integers.

use std::cell::Cell;

use hoist_backend::{Encoding, Result};

use super::params::{Pack, Tiled, Tiles};
use crate::driver::Device;
use crate::modules::{Function, Launch, Modules};

/// Fewest tokens for which packing them is worth it.
pub(super) const FEWEST_TOKENS: u32 = 8;
/// Tokens of a tile.
const TILE_TOKENS: u32 = 8;
/// Segments that a block of the packing kernel takes.
const PACKED_SEGMENTS: u32 = 4;
const WARPS: u32 = 8;
/// Rows of a warp.
const WARP_ROWS: u32 = 16;
/// The largest second dimension of a grid.
const GRID_LIMIT: u32 = 65_535;
/// Most shared memory that a block takes.
const SHARED: u32 = 220 << 10;

/// How vectors are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As `kernels/prefill.cuh` takes them: integers, and the multiplier of each block.
    Plain,
    /// As `kernels/prefill_k.cuh` takes them for Q4_K: integers times multipliers.
    Folded,
    /// As it takes them for Q6_K: integers half block by half block.
    Halved,
}

impl Form {
    /// Bytes of a tile of one segment.
    const fn tile_bytes(self) -> u64 {
        match self {
            Self::Plain => 2848,
            Self::Folded => 4608,
            Self::Halved => 2816,
        }
    }

    /// Bytes of the tiles of so many vectors, and of the exponent of each; `None` past 2^64.
    pub(super) fn bytes(self, segments: u64, tokens: u32) -> Option<u64> {
        let tiles = u64::from(tokens.div_ceil(TILE_TOKENS));
        let exponents = tiles.checked_mul(u64::from(TILE_TOKENS) * 4)?;
        segments
            .checked_mul(tiles)?
            .checked_mul(self.tile_bytes())?
            .checked_add(exponents)?
            .checked_next_multiple_of(256)
    }
}

/// In the order in which they lie in scratch.
pub(super) const FORMS: [Form; 3] = [Form::Plain, Form::Folded, Form::Halved];

/// Room for vectors of so many segments in every form; `None` past 2^64.
pub(super) fn packed_bytes(segments: u64, tokens: u32) -> Option<u64> {
    FORMS
        .iter()
        .try_fold(0u64, |sum, form| sum.checked_add(form.bytes(segments, tokens)?))
}

/// Where packed vectors lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packed {
    pub(super) tiles: u64,
    pub(super) vector_exponents: u64,
}

impl Packed {
    /// The tiles come first.
    pub(super) fn at(scratch: u64, form: Form, segments: u32, tokens: u32) -> Self {
        let of_tiles = u64::from(segments) * u64::from(tokens.div_ceil(TILE_TOKENS)) * form.tile_bytes();
        // A value that fits has a size in each form.
        let before = FORMS.iter().take(form as usize);
        let tiles = before.fold(scratch, |at, f| {
            at + f.bytes(segments.into(), tokens).unwrap_or_default()
        });
        Self {
            tiles,
            vector_exponents: tiles + of_tiles,
        }
    }
}

/// What kernels that pack are told of the forms that are wanted.
pub(super) fn tiles(scratch: u64, forms: &[Form], segments: u32, tokens: u32) -> Tiles {
    let mut tiles = Tiles::default();
    for form in forms {
        let packed = Packed::at(scratch, *form, segments, tokens);
        tiles.tiles[*form as usize] = packed.tiles;
        tiles.vector_exponents[*form as usize] = packed.vector_exponents;
    }
    tiles
}

/// How a block divides a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    /// Tiles of eight tokens.
    tiles: u32,
    /// Groups of rows.
    row_warps: u32,
    /// Segments of a step: warps with the same rows and tokens divide them.
    depth: u32,
    warps: u32,
}

impl Shape {
    const fn new(tiles: u32, row_warps: u32, depth: u32, warps: u32) -> Self {
        Self {
            tiles,
            row_warps,
            depth,
            warps,
        }
    }

    const fn rows(self) -> u32 {
        self.row_warps * WARP_ROWS
    }

    /// Tiles of eight tokens of a warp.
    const fn warp_tiles(self) -> u32 {
        self.tiles * self.row_warps * self.depth / self.warps
    }

    fn blocks(self, rows: u32, tokens: u32) -> (u32, u32) {
        (
            rows.div_ceil(self.rows()),
            tokens.div_ceil(self.tiles * TILE_TOKENS),
        )
    }
}

/// For few tokens, for more, and for many with few and with many rows: as in `kernels/prefill.cuh`.
const PLAIN_SHAPES: &[Shape] = &[
    Shape::new(1, 1, 8, 8),
    Shape::new(4, 2, 4, 8),
    Shape::new(8, 4, 2, 8),
    Shape::new(8, 8, 1, 8),
];
/// As in `kernels/prefill_k.cu`.
const STAYING_SHAPES: &[Shape] = &[
    Shape::new(1, 1, 8, 8),
    Shape::new(1, 2, 8, 16),
    Shape::new(4, 2, 4, 8),
    Shape::new(8, 4, 2, 16),
    Shape::new(8, 8, 1, 16),
];

/// What the kernels know of an encoding.
#[derive(Clone, Copy, Debug)]
struct Coding {
    file: &'static str,
    /// One for each of [`Coding::shapes`].
    kernels: &'static [&'static str],
    /// Bytes of a segment.
    bytes: u32,
    /// Bytes of a row's segment in shared memory, where the form is plain.
    slot: u32,
    /// Whether mins are as wide as scales.
    wide_mins: bool,
    form: Form,
    /// The kernel of `prefill_parted`.
    parted: Option<&'static str>,
}

macro_rules! coding {
    ($name:literal, $bytes:literal, $slot:literal, $wide_mins:literal) => {
        Some(Coding {
            file: "prefill_blocks",
            kernels: &[
                concat!("prefill_", $name, "_1_1"),
                concat!("prefill_", $name, "_4_2"),
                concat!("prefill_", $name, "_8_4"),
                concat!("prefill_", $name, "_8_8"),
            ],
            bytes: $bytes,
            slot: $slot,
            wide_mins: $wide_mins,
            form: Form::Plain,
            parted: None,
        })
    };
    ($name:literal, $bytes:literal, $form:ident) => {
        Some(Coding {
            file: "prefill_k",
            kernels: &[
                concat!("prefill_", $name, "_1_1"),
                concat!("prefill_", $name, "_1_2"),
                concat!("prefill_", $name, "_4_2"),
                concat!("prefill_", $name, "_8_4"),
                concat!("prefill_", $name, "_8_8"),
            ],
            bytes: $bytes,
            slot: 0,
            wide_mins: false,
            form: Form::$form,
            parted: Some(concat!("prefill_", $name, "_parted")),
        })
    };
}

fn coding(encoding: Encoding) -> Option<Coding> {
    match encoding {
        Encoding::Q4_K => coding!("q4_k", 144, Folded),
        Encoding::Q5_K => coding!("q5_k", 176, 224, false).map(|c| Coding {
            file: "prefill_k",
            ..c
        }),
        Encoding::Q6_K => coding!("q6_k", 210, Halved),
        Encoding::Q4_0 => coding!("q4_0", 144, 160, false),
        Encoding::Q4_1 => coding!("q4_1", 160, 160, true),
        Encoding::Q5_0 => coding!("q5_0", 176, 224, false),
        Encoding::Q5_1 => coding!("q5_1", 192, 224, true),
        Encoding::Q8_0 => coding!("q8_0", 272, 288, false),
        _ => None,
    }
}

impl Coding {
    fn shapes(self) -> &'static [Shape] {
        match self.form {
            Form::Plain => PLAIN_SHAPES,
            Form::Folded | Form::Halved => STAYING_SHAPES,
        }
    }

    /// Bytes of a row's segments of a step in shared memory, spread over its banks.
    fn row_slot(self, shape: Shape) -> u32 {
        let bytes = shape.depth * self.bytes;
        match self.form {
            Form::Plain => shape.depth * self.slot,
            Form::Folded => bytes + (96 - bytes % 64) % 64,
            Form::Halved => {
                let copied = (bytes + 29) / 16 * 16;
                copied + (48 - copied % 32) % 32
            }
        }
    }

    /// Shared memory of a block: two or three stages of weights and activations; and what each warp prepares of its rows, or
    /// sums of other segments.
    fn shared(self, shape: Shape) -> u32 {
        let weights = shape.rows() * self.row_slot(shape);
        let stage = weights + shape.tiles * shape.depth * self.form.tile_bytes() as u32;
        let mins = if self.wide_mins { 9 } else { 4 };
        let beside = match self.form {
            Form::Plain => WARPS * WARP_ROWS * (4 * (9 + mins) + 16 + 8),
            Form::Folded | Form::Halved => shape.row_warps * shape.tiles * (shape.depth - 1) * (4 * 32 * 8),
        };
        let three = 3 * stage + beside;
        if three <= SHARED {
            three
        } else {
            2 * stage + beside
        }
    }
}

/// Bytes that a block of a product in parts may hand over.
const HANDED_BYTES: u64 = 64 << 10;
/// Most blocks of one: each has a word to say that it has handed over.
pub(super) const MOST_PARTS: u32 = 1024;
/// What a product in parts takes beside its steps, in steps: bringing sums to the second-level cache and back, and waiting.
const HANDING_STEPS: u64 = 2;

/// The kernels of one encoding, and of packing.
#[derive(Debug)]
pub(super) struct Product {
    pack: Function,
    pub(super) form: Form,
    shapes: &'static [Shape],
    /// Of each shape, with its shared memory.
    kernels: Vec<(Function, u32)>,
    /// Of the last shape, where blocks share the last tiles out.
    parted: Option<Function>,
    multiprocessors: u32,
}

impl Product {
    /// `None` where the encoding has no such kernels, the rows are not whole segments or too many, or the device has not the
    /// shared memory.
    pub(super) fn new(
        modules: &Modules,
        device: &Device,
        encoding: Encoding,
        rows: u32,
        cols: u32,
    ) -> Result<Option<Self>> {
        let Some(coding) = coding(encoding) else {
            return Ok(None);
        };
        // Rows are the grid's second dimension.
        let too_many = rows.div_ceil(WARP_ROWS) > GRID_LIMIT;
        if !cols.is_multiple_of(256) || too_many || device.shared_memory_optin < SHARED {
            return Ok(None);
        }
        let kernel = |(name, shape): (&&'static str, &Shape)| -> Result<(Function, u32)> {
            let function = modules.function(coding.file, name)?;
            let shared = coding.shared(*shape);
            function.allow_shared(shared)?;
            Ok((function, shared))
        };
        let kernels = coding.kernels.iter().zip(coding.shapes()).map(kernel);
        let parted = coding.parted.filter(|_| device.multiprocessors <= MOST_PARTS);
        let parted = parted
            .map(|name| {
                let function = modules.function("prefill_parted", name)?;
                let last = coding.shapes().last().map_or(0, |shape| coding.shared(*shape));
                function.allow_shared(last)?;
                Ok(function)
            })
            .transpose()?;
        Ok(Some(Self {
            parted,
            pack: modules.function("prefill", "pack")?,
            form: coding.form,
            shapes: coding.shapes(),
            kernels: kernels.collect::<Result<_>>()?,
            multiprocessors: device.multiprocessors,
        }))
    }

    /// The launch that packs `tokens` vectors, as this product takes them.
    pub(super) fn packing(
        &self,
        x: u64,
        scratch: u64,
        segments: u32,
        tokens: u32,
    ) -> (&Function, Launch, Pack) {
        let params = Pack {
            x,
            tiles: tiles(scratch, &[self.form], segments, tokens),
            segments,
            tokens,
        };
        let grid = (
            tokens.div_ceil(TILE_TOKENS),
            segments.div_ceil(PACKED_SEGMENTS),
            1,
        );
        let launch = Launch {
            grid,
            ..Launch::linear(1, 256)
        };
        (&self.pack, launch, params)
    }

    /// The launch of the product itself.
    pub(super) fn launch(&self, params: &Tiled) -> (&Function, Launch) {
        let at = choose(
            self.shapes,
            params.rows,
            params.segments,
            params.tokens,
            self.multiprocessors,
        );
        self.launch_as(at, params)
    }

    /// The launch that shares the last tiles out among all blocks, and how many tiles are a block's own, where that is quicker
    /// than [`Product::launch`] and `bytes` of scratch hold what blocks hand over.
    pub(super) fn launch_parted(&self, params: &Tiled, bytes: u64) -> Option<(&Function, Launch, u32)> {
        let fits = bytes >= u64::from(self.multiprocessors) * HANDED_BYTES;
        let blocks = (params.rows, params.segments, params.tokens);
        (fits && is_better_parted(self.shapes, blocks, self.multiprocessors)).then_some(())?;
        let (rows, tokens) = self.shapes.last()?.blocks(params.rows, params.tokens);
        let tiles = rows.checked_mul(tokens)?;
        self.launch_parted_as(tiles / self.multiprocessors * self.multiprocessors)
    }

    fn launch_parted_as(&self, own: u32) -> Option<(&Function, Launch, u32)> {
        let ((_, shared), shape) = (self.kernels.last()?, self.shapes.last()?);
        let launch = Launch {
            shared: *shared,
            // Blocks wait for each other.
            cooperative: true,
            ..Launch::linear(self.multiprocessors, shape.warps * 32)
        };
        Some((self.parted.as_ref()?, launch, own))
    }

    fn launch_as(&self, at: usize, params: &Tiled) -> (&Function, Launch) {
        let (rows, tokens) = self.shapes[at].blocks(params.rows, params.tokens);
        let (function, shared) = &self.kernels[at];
        let grid = match self.form {
            // Those of the same rows are neighbours, so that weights come from memory once.
            Form::Plain => (tokens, rows, 1),
            // Blocks stay and take one after the other; a multiprocessor holds one.
            Form::Folded | Form::Halved => {
                (tokens.saturating_mul(rows).min(self.multiprocessors.max(1)), 1, 1)
            }
        };
        let launch = Launch {
            grid,
            shared: *shared,
            ..Launch::linear(1, self.shapes[at].warps * 32)
        };
        (function, launch)
    }
}

/// The shape that takes the fewest steps: waves of blocks, times the steps of each, times what a step costs. A warp's step costs
/// what decoding its rows takes, and each tile's multiplications; twice as many warps take half as long again, since they wait
/// less.
fn choose(shapes: &[Shape], rows: u32, segments: u32, tokens: u32, multiprocessors: u32) -> usize {
    let cost = |shape: Shape| {
        let (x, y) = shape.blocks(rows, tokens);
        let waves = (u64::from(x) * u64::from(y)).div_ceil(multiprocessors.max(1).into());
        let steps = u64::from(segments.div_ceil(shape.depth)) + 2;
        let of_warps = if shape.warps > WARPS { 3 } else { 2 };
        waves * steps * u64::from(3 + shape.warp_tiles()) * of_warps
    };
    // Of equals the later one, which reads activations less often.
    (0..shapes.len())
        .min_by_key(|at| (cost(shapes[*at]), std::cmp::Reverse(*at)))
        .unwrap_or(0)
}

/// Whether a product of so many (rows, segments, tokens) takes at least a twentieth less time if blocks of the last shape share out the tiles
/// that do not come out even.
fn is_better_parted(
    shapes: &[Shape],
    (rows, segments, tokens): (u32, u32, u32),
    multiprocessors: u32,
) -> bool {
    let chosen = shapes[choose(shapes, rows, segments, tokens, multiprocessors)];
    let (Some(last), blocks) = (shapes.last(), u64::from(multiprocessors.max(1))) else {
        return false;
    };
    let of_step = |shape: Shape| u64::from(3 + shape.warp_tiles()) * if shape.warps > WARPS { 3 } else { 2 };
    let tiles = |shape: Shape| {
        let (x, y) = shape.blocks(rows, tokens);
        u64::from(x) * u64::from(y)
    };
    // Blocks stay, so that copies begin once.
    let steps = u64::from(segments.div_ceil(chosen.depth));
    let whole = (tiles(chosen).div_ceil(blocks) * steps + 2) * of_step(chosen);
    let shared = tiles(*last).saturating_mul(segments.into()).div_ceil(blocks);
    let parted = (shared + 2 + HANDING_STEPS) * of_step(*last);
    20 * parted <= 19 * whole
}

/// Which value is packed in each form at the moment.
#[derive(Debug, Default)]
pub(super) struct Held([Cell<Option<usize>>; FORMS.len()]);

impl Held {
    pub(super) fn holds(&self, form: Form, value: usize) -> bool {
        self.0[form as usize].get() == Some(value)
    }

    /// Where a form lies depends on the value, so that no other value is packed any more.
    pub(super) fn hold(&self, form: Form, value: usize) {
        for held in &self.0 {
            if held.get() != Some(value) {
                held.set(None);
            }
        }
        self.0[form as usize].set(Some(value));
    }

    /// A value is written anew.
    pub(super) fn written(&self, value: usize) {
        for held in &self.0 {
            if held.get() == Some(value) {
                held.set(None);
            }
        }
    }
}

/// Tokens of whole tiles.
pub(super) fn whole_tiles(tokens: u32) -> u32 {
    tokens.next_multiple_of(TILE_TOKENS)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::params::{Parted, PartedTiled};
    use super::*;
    use crate::driver::{Context, DeviceBuffer, Stream};
    use crate::modules::arguments;

    const EACH: [Encoding; 8] = [
        Encoding::Q4_0,
        Encoding::Q4_1,
        Encoding::Q5_0,
        Encoding::Q5_1,
        Encoding::Q8_0,
        Encoding::Q4_K,
        Encoding::Q5_K,
        Encoding::Q6_K,
    ];

    #[test]
    fn blocks_of_every_shape_fit_an_h100() {
        for encoding in EACH {
            let coding = coding(encoding).unwrap();
            assert_eq!(coding.kernels.len(), coding.shapes().len());
            for shape in coding.shapes() {
                assert!(coding.shared(*shape) <= SHARED, "{encoding} {shape:?}");
            }
        }
        assert!(coding(Encoding::Q3_K).is_none());
    }

    #[test]
    fn tiles_are_followed_by_exponents() {
        let mut end = 1 << 20;
        for form in FORMS {
            let packed = Packed::at(1 << 20, form, 3, 9);
            assert_eq!(packed.tiles, end);
            assert_eq!(packed.vector_exponents - packed.tiles, 3 * 2 * form.tile_bytes());
            end += form.bytes(3, 9).unwrap();
            assert!(packed.vector_exponents + 16 * 4 <= end);
        }
        assert_eq!(packed_bytes(3, 9), Some(end - (1 << 20)));
        assert_eq!(packed_bytes(u64::MAX, 9), None);
    }

    /// Numbers that look random: xorshift64*.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
        }
    }

    /// A quantised segment, as `Segment` in `kernels/decode.cuh`.
    #[derive(Clone)]
    struct Integers {
        q: [i8; 256],
        u: [u8; 8],
        m: i32,
        e: i32,
    }

    impl Integers {
        fn sum(&self, half: usize) -> i16 {
            self.q[16 * half..16 * half + 16]
                .iter()
                .map(|q| i16::from(*q))
                .sum()
        }

        fn bytes(&self) -> Vec<u8> {
            let mut bytes: Vec<u8> = self.q.iter().map(|q| *q as u8).collect();
            bytes.extend((0..16).flat_map(|half| self.sum(half).to_le_bytes()));
            bytes.extend(self.u);
            bytes.extend(self.m.to_le_bytes());
            bytes.extend(self.e.to_le_bytes());
            bytes
        }

        fn random(random: &mut Random, extreme: bool) -> Self {
            // One in eight is of zeros.
            if !extreme && random.below(8) == 0 {
                return Self {
                    q: [0; 256],
                    u: [1; 8],
                    m: 0,
                    e: -133,
                };
            }
            let sign = if random.below(2) == 0 { 127 } else { -127 };
            Self {
                q: std::array::from_fn(|_| {
                    if extreme {
                        sign
                    } else {
                        (random.below(255) as i32 - 127) as i8
                    }
                }),
                u: std::array::from_fn(|_| if extreme { 16 } else { random.below(16) as u8 + 1 }),
                m: if extreme {
                    255
                } else {
                    random.below(128) as i32 + 128
                },
                e: -(random.below(if extreme { 2 } else { 70 }) as i32),
            }
        }
    }

    /// Rows of blocks with finite scales.
    fn matrix(encoding: Encoding, rows: usize, cols: usize, random: &mut Random, extreme: bool) -> Vec<u8> {
        let block = encoding.block_bytes() as usize;
        let scales: &[usize] = match encoding {
            Encoding::Q6_K => &[208],
            Encoding::Q4_K | Encoding::Q5_K | Encoding::Q4_1 | Encoding::Q5_1 => &[0, 2],
            _ => &[0],
        };
        let mut bytes = vec![0; rows * encoding.row_bytes(cols as u64).unwrap() as usize];
        for block in bytes.chunks_exact_mut(block) {
            let fill = [0, 0x80, 0xff][random.below(3) as usize];
            for byte in &mut *block {
                *byte = if extreme { fill } else { random.below(256) as u8 };
            }
            for at in scales {
                // An exponent field of at most 15.
                block[at + 1] &= 0xbf;
            }
        }
        bytes
    }

    /// Product of a row and a vector by the contract's words (docs/numerics.md §1.3).
    fn product(encoding: Encoding, row: &[u8], x: &[Integers], bias: f32) -> f32 {
        let ew = i32::from(hoist_quant::row_exponent(encoding, row).unwrap());
        let ea = x.iter().map(|s| s.e).max().unwrap();
        let mut view = hoist_quant::SegmentView::default();
        let mut acc = 0i64;
        for (at, s) in x.iter().enumerate() {
            hoist_quant::read_segment(encoding, row, at, &mut view).unwrap();
            let (mut i, mut j) = (0i64, 0i64);
            for half in 0..16 {
                let elements = 16 * half..16 * half + 16;
                let dot: i64 = elements
                    .map(|n| i64::from(view.weights[n]) * i64::from(s.q[n]))
                    .sum();
                let u = i64::from(s.u[half / 2]);
                i += u * i64::from(view.c[half]) * dot;
                j += u * i64::from(view.k[half]) * i64::from(s.sum(half));
            }
            let shift = |e: i16| (ew - i32::from(e) + ea - s.e).min(63);
            acc += (i64::from(s.m) * i) >> shift(view.e);
            acc -= (i64::from(s.m) * j) >> shift(view.e_min);
        }
        // A double holds the product of an f32 and such a power exactly.
        (f64::from(acc as f32) * 2f64.powi(ew + ea)) as f32 + bias
    }

    fn uploaded(stream: &Stream, bytes: &[u8]) -> DeviceBuffer {
        let buffer = DeviceBuffer::new(stream.context(), "a test", bytes.len() as u64).unwrap();
        // SAFETY: the buffer is as long as the bytes, which stay until the stream has been waited for.
        unsafe { stream.copy_htod(buffer.ptr(), bytes) }.unwrap();
        stream.synchronize().unwrap();
        buffer
    }

    /// A product on the device, by each shape.
    struct Case {
        encoding: Encoding,
        rows: usize,
        cols: usize,
        tokens: usize,
        extreme: bool,
    }

    fn check(context: &Arc<Context>, modules: &Modules, stream: &Stream, case: &Case) {
        let Case {
            encoding,
            rows,
            cols,
            tokens,
            extreme,
        } = *case;
        let mut random = Random((rows * cols + tokens) as u64 * 2 + 1);
        let segments = cols / 256;
        let mut weight = matrix(encoding, rows, cols, &mut random, extreme);
        let row_bytes = weight.len() / rows;
        let x: Vec<Vec<Integers>> = (0..tokens)
            .map(|_| {
                (0..segments)
                    .map(|_| Integers::random(&mut random, extreme))
                    .collect()
            })
            .collect();
        let bias: Vec<f32> = (0..rows).map(|_| random.below(1000) as f32).collect();
        let exponents: Vec<i16> = weight
            .chunks_exact(row_bytes)
            .map(|row| hoist_quant::row_exponent(encoding, row).unwrap())
            .collect();
        let expected: Vec<u32> = x
            .iter()
            .flat_map(|x| {
                let rows = weight.chunks_exact(row_bytes).zip(&bias);
                rows.map(|(row, bias)| product(encoding, row, x, *bias).to_bits())
            })
            .collect();
        // A weight's place is whole multiples of 256 bytes.
        weight.resize(weight.len().next_multiple_of(256), 0);
        let vectors: Vec<u8> = x.iter().flatten().flat_map(Integers::bytes).collect();
        let weight = uploaded(stream, &weight);
        let exponents = uploaded(stream, bytemuck::cast_slice(&exponents));
        let bias = uploaded(stream, bytemuck::cast_slice(&bias));
        let fault = uploaded(stream, &[0xff; 4]);
        let vectors = uploaded(stream, &vectors);
        let scratch = packed_bytes(segments as u64, tokens as u32).unwrap();
        let scratch = DeviceBuffer::new(context, "packed vectors", scratch).unwrap();
        let product = Product::new(modules, &context.device, encoding, rows as u32, cols as u32)
            .unwrap()
            .unwrap();
        let packed = Packed::at(scratch.ptr(), product.form, segments as u32, tokens as u32);
        let (function, launch, params) =
            product.packing(vectors.ptr(), scratch.ptr(), segments as u32, tokens as u32);
        // SAFETY: the kernel takes that struct, whose buffers are as long as it says.
        unsafe { function.launch(stream, launch, &mut arguments![params]) }.unwrap();
        let blocks = product.multiprocessors;
        let (last_rows, last_tokens) = product.shapes.last().unwrap().blocks(rows as u32, tokens as u32);
        let tiles = last_rows * last_tokens;
        let sums = DeviceBuffer::new(context, "sums", u64::from(blocks) * HANDED_BYTES).unwrap();
        let handed = uploaded(stream, &vec![0; blocks as usize * 8]);
        // Each shape; and in parts, with as many whole tiles as there can be, one less, and none.
        let most = tiles / blocks * blocks;
        let own = [most, most.saturating_sub(blocks), 0];
        let ways = (0..product.shapes.len())
            .map(|at| (at, None))
            .chain(own.map(|own| (product.shapes.len() - 1, Some(own))));
        for (turn, (at, own)) in ways.enumerate() {
            if own.is_some() && product.parted.is_none() {
                continue;
            }
            let shape = product.shapes[at];
            let y = uploaded(stream, &vec![0xff; rows * tokens * 4]);
            let params = Tiled {
                weight: weight.ptr(),
                exponents: exponents.ptr(),
                x: packed.tiles,
                vector_exponents: packed.vector_exponents,
                bias: bias.ptr(),
                y: y.ptr(),
                fault: fault.ptr(),
                row_bytes: row_bytes as u64,
                step: 0,
                rows: rows as u32,
                segments: segments as u32,
                tokens: tokens as u32,
            };
            if let Some(own) = own {
                let (function, launch, own) = product.launch_parted_as(own).unwrap();
                let parted = Parted {
                    own,
                    number: turn as u32 + 1,
                    sums: sums.ptr(),
                    handed: handed.ptr(),
                };
                let params = PartedTiled {
                    product: params,
                    parted,
                };
                // SAFETY: as above.
                unsafe { function.launch(stream, launch, &mut arguments![params]) }.unwrap();
            } else {
                let (function, launch) = product.launch_as(at, &params);
                // SAFETY: as above.
                unsafe { function.launch(stream, launch, &mut arguments![params]) }.unwrap();
            }
            let mut found = vec![0u32; rows * tokens];
            // SAFETY: as long as the buffer; waited for below.
            unsafe { stream.copy_dtoh(bytemuck::cast_slice_mut(&mut found), y.ptr()) }.unwrap();
            stream.synchronize().unwrap();
            let wrong = found.iter().zip(&expected).position(|(a, b)| a != b);
            if let Some(wrong) = wrong {
                panic!(
                    "{encoding} {rows} × {cols}, {tokens} tokens, extreme {extreme}, {shape:?}, own {own:?}: token {} row {}: {:?} for {:?}",
                    wrong / rows,
                    wrong % rows,
                    f32::from_bits(found[wrong]),
                    f32::from_bits(expected[wrong])
                );
            }
        }
    }

    #[test]
    fn products_are_those_of_the_contract() {
        // On the emulated device, where it could be built.
        if hoist_cuda_emulator::load().is_none() {
            eprintln!("no C++ compiler, so that there is no emulated device to multiply on");
            return;
        }
        let context = Context::open(0).unwrap();
        let modules = Modules::new(&context);
        let stream = Stream::new(&context).unwrap();
        for encoding in EACH {
            // Rows, columns and tokens that fill tiles and that do not; more segments than a block has at once, and fewer.
            for (rows, cols, tokens) in [(1, 256, 8), (17, 512, 9), (130, 768, 64), (33, 1280, 130)] {
                for extreme in [false, true] {
                    let case = Case {
                        encoding,
                        rows,
                        cols,
                        tokens,
                        extreme,
                    };
                    check(&context, &modules, &stream, &case);
                }
            }
        }
    }

    #[test]
    fn tiles_that_do_not_come_out_even_are_shared_out() {
        // Of 7B and 8B models on 132 multiprocessors, 512 tokens: 224 tiles of 74 segments, and of 14; 256 of 56; 896 of 16.
        for (rows, segments, better) in [
            (3584, 74, true),
            (3584, 14, true),
            (4096, 56, false),
            (14_336, 16, false),
        ] {
            assert_eq!(
                is_better_parted(STAYING_SHAPES, (rows, segments, 512), 132),
                better,
                "{rows}"
            );
        }
        // Two tiles on three multiprocessors; three.
        assert!(is_better_parted(STAYING_SHAPES, (256, 16, 64), 3));
        assert!(!is_better_parted(STAYING_SHAPES, (384, 8, 64), 3));
        assert!(!is_better_parted(STAYING_SHAPES, (u32::MAX, 512, 512), 1));
    }

    #[test]
    fn shapes_follow_tokens_and_rows() {
        let chosen =
            |shapes: &[Shape], rows, segments, tokens| shapes[choose(shapes, rows, segments, tokens, 132)];
        for shapes in [PLAIN_SHAPES, STAYING_SHAPES] {
            // Few tokens: many small blocks, which divide the segments.
            assert_eq!(chosen(shapes, 4096, 16, 8).tiles, 1);
            // A whole chunk of a wide matrix: the largest blocks; of a narrow one: more of them.
            assert_eq!(chosen(shapes, 14_336, 16, 512).row_warps, 8);
            assert!(chosen(shapes, 512, 8, 512).row_warps < 8);
        }
        // Activations of few tokens are shared by more rows where these suffice.
        assert_eq!(chosen(STAYING_SHAPES, 4096, 16, 8).row_warps, 2);
        assert_eq!(chosen(STAYING_SHAPES, 2048, 8, 8).row_warps, 1);
    }
}
