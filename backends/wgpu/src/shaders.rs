//! Puts kernels together: what all share, integer arithmetic, an encoding, and the kernel itself.

use hoist_backend::Encoding;

use crate::grids::Grid;

const COMMON: &str = include_str!("../shaders/common.wgsl");
const SOFT_FLOAT: &str = include_str!("../shaders/softfloat.wgsl");
const BYTES: &str = include_str!("../shaders/bytes.wgsl");
const RECORD_LAYOUT: &str = include_str!("../shaders/record.wgsl");
const WORDS: &str = include_str!("../shaders/words.wgsl");
const VECTORS: &str = include_str!("../shaders/vectors.wgsl");
const WEIGHT_WORDS: &str = include_str!("../shaders/weight_words.wgsl");
const WEIGHT_VECTORS: &str = include_str!("../shaders/weight_vectors.wgsl");
const SLICES: &str = include_str!("../shaders/slices.wgsl");
const SLICE_SCALES: &str = include_str!("../shaders/slice_scales.wgsl");
const SUPER_BLOCK: &str = include_str!("../shaders/super_block.wgsl");
const SUPER_BLOCK_SCALE: &str = include_str!("../shaders/super_block_scale.wgsl");
const SUPER_BLOCK_NO_MINS: &str = include_str!("../shaders/super_block_no_mins.wgsl");
const SUPER_BLOCK_PRODUCT: &str = include_str!("../shaders/super_block_product.wgsl");
const SCALED_BLOCK: &str = include_str!("../shaders/scaled_block.wgsl");
const SCALED_BLOCK_SCALE: &str = include_str!("../shaders/scaled_block_scale.wgsl");
const SCALED_BLOCK_NO_MINS: &str = include_str!("../shaders/scaled_block_no_mins.wgsl");
const SCALED_BLOCK_PRODUCT: &str = include_str!("../shaders/scaled_block_product.wgsl");
const MATMUL_PARAMETERS: &str = include_str!("../shaders/matmul_parameters.wgsl");
const MATMUL_QUANTISED: &str = include_str!("../shaders/matmul_quantised.wgsl");
const MATMUL_FLOAT: &str = include_str!("../shaders/matmul_float.wgsl");
const EXPONENTS: &str = include_str!("../shaders/exponents.wgsl");
const EMBED_QUANTISED: &str = include_str!("../shaders/embed_quantised.wgsl");
const EMBED_FLOAT: &str = include_str!("../shaders/embed_float.wgsl");
const QUANTISE_SEGMENT: &str = include_str!("../shaders/quantise_segment.wgsl");
const QUANTISE: &str = include_str!("../shaders/quantise.wgsl");
const NORM: &str = include_str!("../shaders/norm.wgsl");
const NORM_QUANTISE: &str = include_str!("../shaders/norm_quantise.wgsl");
const ELEMENTWISE: &str = include_str!("../shaders/elementwise.wgsl");
const ROPE: &str = include_str!("../shaders/rope.wgsl");
const ROPE_ALONE: &str = include_str!("../shaders/rope_alone.wgsl");
const ROPE_STORE_KV: &str = include_str!("../shaders/rope_store_kv.wgsl");
const CACHE: &str = include_str!("../shaders/cache.wgsl");
const STORE_KV: &str = include_str!("../shaders/store_kv.wgsl");
const STORE_KV_ALONE: &str = include_str!("../shaders/store_kv_alone.wgsl");
const ATTENTION: &str = include_str!("../shaders/attention.wgsl");
const ROUTER: &str = include_str!("../shaders/router.wgsl");
const RESULTS: &str = include_str!("../shaders/results.wgsl");

/// Words of a quantised segment of activations; `record.wgsl` says the same.
pub(crate) const RECORD_WORDS: u64 = 96;

/// Threads of a workgroup of most kernels.
pub(crate) const THREADS: u64 = 64;

/// Positions of a split of attention.
pub(crate) const SPLIT: u64 = 256;

/// The widest head that attention holds in workgroup memory.
pub(crate) const MAX_HEAD_DIM: u64 = 1024;

/// Pairs of a row and a segment that a workgroup of a quantised product has.
pub(crate) const PAIRS: u64 = 32;

/// Threads of a quantised product's workgroup where threads run side by side: loads of many are under way together.
pub(crate) const WIDE: u32 = 128;

/// And where a processor runs them one after the other, a thread without work costing as much as one with it.
pub(crate) const NARROW: u32 = 32;

/// Logits of which one workgroup finds the largest.
pub(crate) const PART_LOGITS: u64 = 2048;

/// What one pipeline does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    Embed(Encoding),
    /// With so many vectors at a time, in workgroups of so many threads. Those of float matrices have 64 of them.
    MatMul(Encoding, u32, u32),
    Exponents(Encoding),
    Quantise,
    /// A gate, and Quantise of its result.
    SiluMulQuantise,
    GeluTanhMulQuantise,
    RmsNorm,
    /// RmsNorm, and Quantise of its result.
    NormQuantise,
    LayerNorm,
    Rope,
    StoreKv,
    /// Rope of queries and keys, and StoreKv.
    RopeStoreKv,
    Attend,
    Merge,
    Mul,
    Add,
    Scale,
    SoftCap,
    Silu,
    GeluTanh,
    SiluMul,
    GeluTanhMul,
    RouterTopK,
    WeightedSum,
    ArgMaxOfPart,
    ArgMax,
    Gather,
}

impl Kernel {
    /// The entry point of its module.
    pub(crate) fn entry(self) -> &'static str {
        match self {
            Kernel::Embed(_)
            | Kernel::MatMul(..)
            | Kernel::Exponents(_)
            | Kernel::Quantise
            | Kernel::SiluMulQuantise
            | Kernel::GeluTanhMulQuantise
            | Kernel::Rope
            | Kernel::StoreKv
            | Kernel::RopeStoreKv => "main",
            Kernel::RmsNorm => "rms_norm",
            Kernel::NormQuantise => "rms_norm_quantise",
            Kernel::LayerNorm => "layer_norm",
            Kernel::Attend => "attend",
            Kernel::Merge => "merge",
            Kernel::Mul => "mul",
            Kernel::Add => "add",
            Kernel::Scale => "scale",
            Kernel::SoftCap => "soft_cap",
            Kernel::Silu => "silu",
            Kernel::GeluTanh => "gelu_tanh",
            Kernel::SiluMul => "silu_mul",
            Kernel::GeluTanhMul => "gelu_tanh_mul",
            Kernel::RouterTopK => "router_top_k",
            Kernel::WeightedSum => "weighted_sum",
            Kernel::ArgMaxOfPart => "arg_max_of_part",
            Kernel::ArgMax => "arg_max",
            Kernel::Gather => "gather",
        }
    }

    /// The whole module; `None` for an encoding that is no weight.
    pub(crate) fn source(self) -> Option<String> {
        let mut parts = vec![COMMON.to_string(), SOFT_FLOAT.to_string()];
        let decodes = match self {
            Kernel::Embed(encoding) | Kernel::MatMul(encoding, ..) | Kernel::Exponents(encoding) => {
                Some(encoding)
            }
            _ => None,
        };
        parts.push(match decodes {
            Some(encoding) if encoding.is_quantized() => VECTORS.into(),
            _ => WORDS.into(),
        });
        parts.push(match decodes {
            Some(Encoding::Q4_K | Encoding::Q5_K) => WEIGHT_VECTORS.into(),
            _ => WEIGHT_WORDS.into(),
        });
        let float = |encoding| -> Option<[String; 3]> {
            Some([BYTES.into(), MATMUL_PARAMETERS.into(), float_at(encoding)?])
        };
        let quantise = |slots: u32| -> [String; 3] {
            let threads = format!(
                "const SLOT_THREADS: u32 = {}u;\nconst SLOT_BLOCKS: u32 = {}u;\n",
                64 * slots,
                8 * slots
            );
            [RECORD_LAYOUT.into(), threads, QUANTISE_SEGMENT.into()]
        };
        let element = |value: &str| {
            format!(
                "fn element_at(i: u32) -> u32 {{\n    let x = work[param(X) + i];\n    return {value};\n}}\n"
            )
        };
        match self {
            Kernel::Embed(encoding) if encoding.is_float() => {
                parts.extend(float(encoding)?);
                parts.push(EMBED_FLOAT.into());
            }
            Kernel::Embed(encoding) => parts.extend([decoder(encoding)?, EMBED_QUANTISED.into()]),
            Kernel::MatMul(encoding, ..) if encoding.is_float() => {
                parts.extend(float(encoding)?);
                parts.push(MATMUL_FLOAT.into());
            }
            Kernel::MatMul(encoding, tokens, threads) => {
                parts.extend([
                    decoder(encoding)?,
                    product(encoding, tokens, threads)?,
                    MATMUL_QUANTISED.into(),
                ]);
            }
            Kernel::Exponents(encoding) => parts.extend([decoder(encoding)?, EXPONENTS.into()]),
            Kernel::Quantise => {
                parts.extend(quantise(1));
                parts.extend([QUANTISE.into(), element("x")]);
            }
            Kernel::SiluMulQuantise => {
                parts.extend(quantise(1));
                parts.extend([QUANTISE.into(), element("f_mul(f_silu(x), work[param(Y) + i])")]);
            }
            Kernel::GeluTanhMulQuantise => {
                parts.extend(quantise(1));
                parts.extend([
                    QUANTISE.into(),
                    element("f_mul(f_gelu_tanh(x), work[param(Y) + i])"),
                ]);
            }
            Kernel::RmsNorm | Kernel::LayerNorm => parts.push(NORM.into()),
            Kernel::NormQuantise => {
                parts.extend(quantise(4));
                parts.extend([NORM.into(), NORM_QUANTISE.into()]);
            }
            Kernel::Rope => parts.extend([ROPE.into(), ROPE_ALONE.into()]),
            Kernel::StoreKv => parts.extend([CACHE.into(), STORE_KV.into(), STORE_KV_ALONE.into()]),
            Kernel::RopeStoreKv => {
                parts.extend([CACHE.into(), ROPE.into(), STORE_KV.into(), ROPE_STORE_KV.into()]);
            }
            Kernel::Attend | Kernel::Merge => {
                let most = format!("const MAX_HEAD_DIM: u32 = {MAX_HEAD_DIM}u;\n");
                parts.extend([CACHE.into(), most, ATTENTION.into()]);
            }
            Kernel::RouterTopK | Kernel::WeightedSum => parts.push(ROUTER.into()),
            Kernel::ArgMaxOfPart | Kernel::ArgMax | Kernel::Gather => {
                parts.extend([
                    format!("const PART_LOGITS: u32 = {PART_LOGITS}u;\n"),
                    RESULTS.into(),
                ]);
            }
            Kernel::Mul
            | Kernel::Add
            | Kernel::Scale
            | Kernel::SoftCap
            | Kernel::Silu
            | Kernel::GeluTanh
            | Kernel::SiluMul
            | Kernel::GeluTanhMul => parts.push(ELEMENTWISE.into()),
        }
        Some(parts.join("\n"))
    }
}

/// What tests of the arithmetic put in front of a kernel of their own.
#[cfg(test)]
pub(crate) fn arithmetic() -> String {
    [COMMON, SOFT_FLOAT, WORDS, WEIGHT_WORDS].join("\n")
}

/// How an element of a float matrix is read.
fn float_at(encoding: Encoding) -> Option<String> {
    let body = match encoding {
        Encoding::F32 => "weight_word((row >> 2u) + i)",
        Encoding::F16 => "f16_to_f32(half_at(row + 2u * i))",
        Encoding::BF16 => "half_at(row + 2u * i) << 16u",
        _ => return None,
    };
    Some(format!(
        "fn float_at(row: u32, i: u32) -> u32 {{\n    return {body};\n}}\n"
    ))
}

/// The shape of an encoding's blocks.
enum Blocks {
    /// 256 weights under one scale with integer sub-scales; the exponent of `d` is shifted.
    Super {
        shift: i32,
        halves: bool,
        mins: bool,
        grid: Option<Grid>,
    },
    /// So many weights with so many scales.
    Scaled { weights: u32, scales: u32, mins: bool },
}

/// Whether an encoding's own source has a function, so that it needs none that others share.
fn has(codes: &str, function: &str) -> bool {
    codes.contains(&format!("fn {function}("))
}

fn describe(encoding: Encoding) -> Option<(Blocks, &'static str)> {
    let plain = |shift, halves, mins| Blocks::Super {
        shift,
        halves,
        mins,
        grid: None,
    };
    let book = |shift, halves, grid| Blocks::Super {
        shift,
        halves,
        mins: false,
        grid: Some(grid),
    };
    let scaled = |weights, scales, mins| Blocks::Scaled {
        weights,
        scales,
        mins,
    };
    macro_rules! file {
        ($($name:literal),+) => {
            concat!($(include_str!(concat!("../shaders/encodings/", $name, ".wgsl"))),+)
        };
    }
    Some(match encoding {
        Encoding::Q2_K => (plain(0, true, true), file!("q2_k")),
        Encoding::Q3_K => (plain(0, true, false), file!("q3_k")),
        Encoding::Q4_K => (plain(0, false, true), file!("six_bits", "q4_k")),
        Encoding::Q5_K => (plain(0, false, true), file!("six_bits", "q5_k")),
        Encoding::Q6_K => (plain(0, true, false), file!("q6_k")),
        Encoding::IQ4_XS => (plain(0, false, false), file!("iq4_xs")),
        Encoding::TQ1_0 => (plain(-8, false, false), file!("tq1_0")),
        Encoding::TQ2_0 => (plain(-8, false, false), file!("tq2_0")),
        Encoding::APR_Q8 => (plain(0, false, false), file!("apr_q8")),
        Encoding::IQ2_XXS => (book(-3, false, Grid::Iq2Xxs), file!("iq2_xxs")),
        Encoding::IQ2_XS => (book(-3, true, Grid::Iq2Xs), file!("iq2_xs")),
        Encoding::IQ2_S => (book(-3, true, Grid::Iq2S), file!("iq2_s")),
        Encoding::IQ3_XXS => (book(-2, false, Grid::Iq3Xxs), file!("iq3_xxs")),
        Encoding::IQ3_S => (book(0, false, Grid::Iq3S), file!("iq3_s")),
        Encoding::IQ1_S => (book(-3, false, Grid::Iq1), file!("iq1_s")),
        Encoding::IQ1_M => (book(-3, true, Grid::Iq1), file!("iq1_m")),
        Encoding::Q4_0 => (scaled(32, 1, false), file!("q4_0")),
        Encoding::Q4_1 => (scaled(32, 1, true), file!("q4_1")),
        Encoding::Q5_0 => (scaled(32, 1, false), file!("q5_0")),
        Encoding::Q5_1 => (scaled(32, 1, true), file!("q5_1")),
        Encoding::Q8_0 => (scaled(32, 1, false), file!("q8_0")),
        Encoding::IQ4_NL => (scaled(32, 1, false), file!("iq4_nl")),
        Encoding::MXFP4 => (scaled(32, 1, false), file!("mxfp4")),
        Encoding::NVFP4 => (scaled(64, 4, false), file!("nvfp4")),
        Encoding::Q1_0 => (scaled(128, 1, false), file!("q1_0")),
        Encoding::Q2_0 => (scaled(64, 1, false), file!("q2_0")),
        Encoding::APR_Q4 => (scaled(32, 1, false), file!("apr_q4")),
        _ => return None,
    })
}

/// Everything that reads rows of an encoding.
fn decoder(encoding: Encoding) -> Option<String> {
    let (blocks, codes) = describe(encoding)?;
    let apr_q8 = encoding == Encoding::APR_Q8;
    let block_bytes = encoding.block_bytes();
    // Blocks of whole words start at words, since rows do.
    let word_at = if block_bytes.is_multiple_of(4) {
        "aligned_at"
    } else {
        "unaligned_at"
    };
    let (halves, mins, segment_bytes, rest, shape, shared) = match blocks {
        Blocks::Super {
            shift,
            halves,
            mins,
            grid,
        } => {
            let grid = grid.map_or(0, Grid::offset);
            let scale = if apr_q8 {
                "Scale(1, 0)".to_string()
            } else {
                "f16_scale(d_bits(b))".to_string()
            };
            let rest = format!(
                "const GRID: u32 = {grid}u;\nconst EXPONENT_SHIFT: i32 = {shift};\n\n\
                 fn super_scale(b: u32) -> Scale {{\n    let scale = {scale};\n    \
                 return Scale(scale.m, scale.e + EXPONENT_SHIFT);\n}}\n"
            );
            let segment = if apr_q8 { 256 } else { block_bytes };
            let shared = [
                (has(codes, "d_bits"), SUPER_BLOCK_SCALE),
                (mins, SUPER_BLOCK_NO_MINS),
            ];
            (halves, mins, segment, rest, SUPER_BLOCK, shared)
        }
        Blocks::Scaled {
            weights,
            scales,
            mins,
        } => {
            let rest = format!(
                "const BLOCK_WEIGHTS: u32 = {weights}u;\nconst BLOCK_BYTES: u32 = {block_bytes}u;\n\
                 const SCALES: u32 = {scales}u;\n"
            );
            let segment = u64::from(256 / weights) * block_bytes;
            let shared = [
                (has(codes, "scale_at"), SCALED_BLOCK_SCALE),
                (mins, SCALED_BLOCK_NO_MINS),
            ];
            (weights / scales < 32, mins, segment, rest, SCALED_BLOCK, shared)
        }
    };
    let constants = format!(
        "const HALVES: bool = {halves};\nconst MINS: bool = {mins};\n\
         const SEGMENT_BYTES: u32 = {segment_bytes}u;\nconst MATRIX_SCALE: bool = {apr_q8};\n\n\
         fn word_at(at: u32) -> u32 {{\n    return {word_at}(at);\n}}\n",
    );
    let mut parts = vec![BYTES, RECORD_LAYOUT, MATMUL_PARAMETERS, &constants, codes];
    parts.extend(shared.iter().filter(|(own, _)| !own).map(|(_, source)| source));
    parts.extend([rest.as_str(), shape]);
    Some(parts.join("\n"))
}

/// What a product of an encoding with so many vectors at a time needs besides.
fn product(encoding: Encoding, tokens: u32, threads: u32) -> Option<String> {
    let (blocks, codes) = describe(encoding)?;
    // One place more than slices, so that pairs lie in different banks.
    let places = 9 * PAIRS;
    let constants = format!(
        "const TOKENS: u32 = {tokens}u;\nconst THREADS: u32 = {threads}u;\nconst WORKGROUP_SUMS: u32 = {}u;\nconst PLACES: u32 = {places}u;\n\n\
         // What slices add to the sums of their segments.\n\
         var<workgroup> partials: array<vec2<i32>, {}>;\n",
        PAIRS * u64::from(tokens),
        places * u64::from(tokens)
    );
    let mut parts = vec![constants];
    if !has(codes, "slice_codes") {
        parts.push(SLICES.into());
    }
    parts.push(match blocks {
        Blocks::Super { .. } => SUPER_BLOCK_PRODUCT.into(),
        Blocks::Scaled { .. } => SCALED_BLOCK_PRODUCT.into(),
    });
    if matches!(blocks, Blocks::Super { .. }) && !has(codes, "slice_halves") {
        parts.push(SLICE_SCALES.into());
    }
    Some(parts.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hoist_backend::EncodingSet;

    fn every_kernel() -> Vec<Kernel> {
        let mut kernels = vec![
            Kernel::Quantise,
            Kernel::SiluMulQuantise,
            Kernel::GeluTanhMulQuantise,
            Kernel::RmsNorm,
            Kernel::NormQuantise,
            Kernel::LayerNorm,
            Kernel::Rope,
            Kernel::StoreKv,
            Kernel::RopeStoreKv,
            Kernel::Attend,
            Kernel::Merge,
            Kernel::Mul,
            Kernel::Add,
            Kernel::Scale,
            Kernel::SoftCap,
            Kernel::Silu,
            Kernel::GeluTanh,
            Kernel::SiluMul,
            Kernel::GeluTanhMul,
            Kernel::RouterTopK,
            Kernel::WeightedSum,
            Kernel::ArgMaxOfPart,
            Kernel::ArgMax,
            Kernel::Gather,
        ];
        for encoding in EncodingSet::weights().iter() {
            kernels.extend([
                Kernel::Embed(encoding),
                Kernel::MatMul(encoding, 1, WIDE),
                Kernel::MatMul(encoding, 4, NARROW),
            ]);
            if encoding.is_quantized() {
                kernels.push(Kernel::Exponents(encoding));
            }
        }
        kernels
    }

    #[test]
    fn every_kernel_is_valid_without_a_device() {
        for kernel in every_kernel() {
            let source = kernel.source().unwrap();
            let module = naga::front::wgsl::parse_str(&source)
                .unwrap_or_else(|e| panic!("{kernel:?}: {}", e.emit_to_string(&source)));
            naga::valid::Validator::new(
                naga::valid::ValidationFlags::all(),
                naga::valid::Capabilities::empty(),
            )
            .validate(&module)
            .unwrap_or_else(|e| panic!("{kernel:?}: {}", e.emit_to_string(&source)));
            assert!(module.entry_points.iter().any(|e| e.name == kernel.entry()));
        }
    }

    #[test]
    fn no_kernel_computes_with_the_drivers_floats() {
        for kernel in every_kernel() {
            let source = kernel.source().unwrap();
            let code = source.lines().map(|l| l.split("//").next().unwrap_or_default());
            for (i, line) in code.enumerate() {
                assert!(
                    !line.contains("f32>") && !line.contains(": f32"),
                    "{kernel:?}:{i}: {line}"
                );
            }
        }
    }
}
