use crate::{KvSpec, ValueSpec};

/// A weight by its place in the index.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightRef {
    /// Layer, or `NO_LAYER`.
    pub layer: u32,
    /// Role number; `UINT32_MAX` if the operand is absent.
    pub role: u32,
}

/// One operation. Operands that an operation does not use are 0, absent weights have role `UINT32_MAX`.
///
/// | op | name | values in | values out | weights | integers | floats |
/// |---|---|---|---|---|---|---|
/// | 0 | embed | | out | weight | | |
/// | 1 | embed_position | | out | weight | | |
/// | 2 | rms_norm | input | out | weight | rows | eps |
/// | 3 | layer_norm | input | out | weight, bias | | eps |
/// | 4 | quantise | input | out | | | |
/// | 5 | matmul | input | out | weight, bias? | | |
/// | 6 | rope | value | (in place) | | table, style (0 interleaved, 1 half-split), heads, n_rot | |
/// | 7 | store_kv | key, value | | | | |
/// | 8 | attention | query | out | | heads, window (0: none) | scale, soft cap (0: none) |
/// | 9 | activation | input | out | | kind (0 silu, 1 gelu_tanh) | |
/// | 10 | mul | a, b | out | | | |
/// | 11 | add | a, b | out | | | |
/// | 12 | scale | input | out | | | factor |
/// | 13 | soft_cap | input | out | | | cap |
/// | 14 | router_top_k | logits | experts, weights | | k, normalise | |
/// | 15 | expert_matmul | input, experts | out | weight | | |
/// | 16 | weighted_sum | input, experts, weights | out | | | |
/// | 17 | logits | input | out | weight, bias? | | |
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Op {
    pub struct_size: u32,
    pub op: u32,
    /// Layer, or `NO_LAYER`.
    pub layer: u32,
    pub reserved: u32,
    pub inputs: [u32; 3],
    pub outputs: [u32; 3],
    pub weights: [WeightRef; 2],
    pub integers: [u32; 4],
    pub floats: [f32; 4],
}

/// Host-computed data, `[rows, cols]` f32.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Table {
    pub rows: u32,
    pub cols: u32,
    pub data: *const f32,
}

/// A forward pass. Valid for the call only.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Program {
    pub struct_size: u32,
    pub vocab: u32,
    pub max_context: u32,
    /// The value that holds the logits.
    pub logits: u32,
    pub kv: *const KvSpec,
    pub kv_count: u64,
    pub values: *const ValueSpec,
    pub value_count: u64,
    pub ops: *const Op,
    pub op_count: u64,
    /// Stride of `ops` in bytes.
    pub op_size: u64,
    /// First operation that only tokens with an output need.
    pub tail: u64,
    pub tables: *const Table,
    pub table_count: u64,
}

pub const WANT_NOTHING: u8 = 0;
pub const WANT_ARGMAX: u8 = 1;
pub const WANT_LOGITS: u8 = 2;

/// Tokens to append to one sequence.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Run {
    pub sequence: u32,
    pub token_count: u32,
    pub tokens: *const u32,
    /// `WANT_*`, one a token.
    pub want: *const u8,
}

/// Runs of different sequences. Valid for the call only.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    pub struct_size: u32,
    pub reserved: u32,
    pub runs: *const Run,
    pub run_count: u64,
}

/// Where results go, in the order of runs and of tokens within them. Never written past the counts.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Outputs {
    pub struct_size: u32,
    pub reserved: u32,
    pub argmax: *mut u32,
    pub argmax_count: u64,
    /// `vocab` for each token that wants logits.
    pub logits: *mut f32,
    pub logits_count: u64,
}
