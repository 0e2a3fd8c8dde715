/// A required weight, or an optional one that the file has.
pub const SLOT_PRESENT: u32 = 1;
/// A weight that stands at another entry too.
pub const SLOT_TIED: u32 = 2;
/// Optional, and not in this file.
pub const SLOT_ABSENT: u32 = 0;

/// What stands at one (layer, role).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct IndexEntry {
    /// Layer, or `NO_LAYER`.
    pub layer: u32,
    pub role: u32,
    /// `SLOT_*`
    pub slot: u32,
    /// The tensor; 0 if absent.
    pub tensor: u32,
}

/// The table to build. Valid for the call only.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct IndexLayout {
    pub struct_size: u32,
    pub layers: u32,
    pub entries: *const IndexEntry,
    pub entry_count: u64,
}

/// What was built.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct IndexReceipt {
    pub struct_size: u32,
    pub layers: u32,
    /// Entries that hold a weight.
    pub entries: u32,
    pub reserved: u32,
    pub bytes: u64,
}

/// How much is to be decoded at once.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Capacity {
    pub max_context: u32,
    pub max_sequences: u32,
    pub max_batch_tokens: u32,
    /// 0: f16, the contract's; 1: f32, a test switch.
    pub kv_dtype: u32,
}

/// Keys and values of one layer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct KvSpec {
    pub kv_heads: u32,
    pub head_dim: u32,
}

/// A value of a program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ValueSpec {
    /// 0: f32; 1: quantised activations; 2: expert numbers (u32).
    pub kind: u32,
    /// Elements per token.
    pub width: u32,
    /// Vectors per token, for kind 1; otherwise 0.
    pub vectors: u32,
    pub reserved: u32,
}

/// All that the workspace is sized by. Valid for the call only.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WorkspaceDims {
    pub struct_size: u32,
    pub vocab: u32,
    pub capacity: Capacity,
    pub kv: *const KvSpec,
    pub kv_count: u64,
    pub values: *const ValueSpec,
    pub value_count: u64,
    pub table_bytes: u64,
}

/// What the workspace takes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct WorkspaceBytes {
    pub struct_size: u32,
    pub reserved: u32,
    pub kv: u64,
    pub workspace: u64,
}
