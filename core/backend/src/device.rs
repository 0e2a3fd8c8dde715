use std::fmt;

use crate::{Encoding, MemoryInfo, OpName, Result, Shape, WorkspaceBytes, WorkspaceDims};

/// A device that a [`crate::Provider`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Number to open it by.
    pub ordinal: u32,
    /// Name to open it by on the command line, such as `cpu` or `cuda:0`.
    pub id: String,
    /// The product's name, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Memory in bytes.
    pub total_memory: u64,
    /// Facts worth showing, such as driver or instruction sets, as (name, value).
    pub details: Vec<(String, String)>,
}

/// How a backend is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Most bytes the backend may own on its device; the device's own limit if `None`.
    pub memory_budget: Option<u64>,
    /// Host threads; the backend's own choice if `None`.
    pub threads: Option<u32>,
    /// Map weights from the files instead of copying them, where a weight's bytes stand in the file as they are needed.
    pub import: bool,
    /// Use only portable scalar code, for comparison. A backend that has no other on the host, as one of a GPU, accepts it.
    pub force_scalar: bool,
    /// Ask for this layout of float matrices instead of the backend's own choice; a test switch.
    pub float_layout: Option<FloatLayout>,
}

/// Whether a backend promises the contract's bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumericsClass {
    /// Every result equals [`crate::NUMERICS_CONTRACT`] bit for bit.
    Exact,
    /// Results are within documented bounds of it.
    Bounded,
}

impl fmt::Display for NumericsClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NumericsClass::Exact => "exact",
            NumericsClass::Bounded => "bounded",
        })
    }
}

/// A set of encodings.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct EncodingSet(u64);

impl EncodingSet {
    /// The empty set.
    pub const EMPTY: Self = Self(0);

    /// Every encoding that a weight can have.
    pub fn weights() -> Self {
        Encoding::all()
            .filter(|e| e.is_float() || e.is_quantized())
            .collect()
    }

    /// Whether `encoding` is a member.
    pub fn contains(self, encoding: Encoding) -> bool {
        self.0 >> encoding.index() & 1 == 1
    }

    /// The members, in index order.
    pub fn iter(self) -> impl Iterator<Item = Encoding> {
        Encoding::all().filter(move |e| self.contains(*e))
    }
}

impl FromIterator<Encoding> for EncodingSet {
    fn from_iter<I: IntoIterator<Item = Encoding>>(iter: I) -> Self {
        Self(iter.into_iter().fold(0, |bits, e| bits | 1 << e.index()))
    }
}

impl fmt::Debug for EncodingSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// A set of operations of the decode program.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct OpSet(u32);

impl OpSet {
    /// The empty set.
    pub const EMPTY: Self = Self(0);

    /// Every operation of this version.
    pub fn all() -> Self {
        OpName::all().collect()
    }

    /// Whether `op` is a member.
    pub fn contains(self, op: OpName) -> bool {
        self.0 >> op.id() & 1 == 1
    }

    /// The members, in id order.
    pub fn iter(self) -> impl Iterator<Item = OpName> {
        OpName::all().filter(move |op| self.contains(*op))
    }
}

impl FromIterator<OpName> for OpSet {
    fn from_iter<I: IntoIterator<Item = OpName>>(iter: I) -> Self {
        Self(iter.into_iter().fold(0, |bits, op| bits | 1 << op.id()))
    }
}

impl fmt::Debug for OpSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// Where the input dimension of a resident float matrix runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FloatLayout {
    /// `[out, in]`, as canonical bytes: a row is one output.
    #[default]
    OutIn,
    /// `[in, out]`: transposed by the backend for its GEMM. Asked of matmul weights only, never of embeddings.
    InOut,
}

/// Bounds of a backend; `None` means none beyond memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of one weight.
    pub max_weight_bytes: Option<u64>,
    /// Most canonical bytes of one row of a weight; a vector is one row.
    pub max_row_bytes: Option<u64>,
    /// Most tokens in one batch.
    pub max_batch_tokens: Option<u32>,
    /// Most sequences.
    pub max_sequences: Option<u32>,
    /// Most positions of a sequence.
    pub max_context: Option<u32>,
}

/// A bound of a backend that a weight breaks. In bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokenLimit {
    /// What is too large: `the size` or `a row`.
    pub what: &'static str,
    /// The most there may be.
    pub limit: u64,
    /// How much there is.
    pub found: u64,
}

impl fmt::Display for BrokenLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, limit, found } = self;
        write!(f, "{what} has {found} bytes, the limit is {limit}")
    }
}

impl Limits {
    /// The first bound that a weight of `nbytes` canonical bytes breaks. Its shape is one that the encoding can have.
    pub fn broken_by(&self, encoding: Encoding, shape: Shape, nbytes: u64) -> Option<BrokenLimit> {
        let row = (shape.cols / encoding.block_weights()).saturating_mul(encoding.block_bytes());
        let sizes = [
            ("the size", nbytes, self.max_weight_bytes),
            ("a row", row, self.max_row_bytes),
        ];
        sizes.into_iter().find_map(|(what, found, limit)| {
            let limit = limit.filter(|limit| found > *limit)?;
            Some(BrokenLimit { what, limit, found })
        })
    }
}

/// How a plan computes the exact bytes a weight takes on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizing {
    /// Each weight starts at a multiple of this in the arena; a power of two.
    pub weight_alignment: u64,
    /// Bytes kept beside each row of a quantised matrix.
    pub quantized_row_bytes: u64,
    /// Bytes kept beside each 256-weight segment (the last may be shorter) of each row of a quantised matrix.
    pub quantized_segment_bytes: u64,
    /// Bytes of the indexed table for each (layer, role) entry.
    pub index_entry_bytes: u64,
}

/// What an open backend is and wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendInfo {
    /// The backend's name, such as `cpu`.
    pub name: String,
    /// The device's id, such as `cpu` or `cuda:0`.
    pub device: String,
    /// The device's product name.
    pub device_name: String,
    /// Whether results equal the contract's bit for bit.
    pub numerics: NumericsClass,
    /// Encodings it can hold and read back.
    pub stored: EncodingSet,
    /// Encodings it can multiply with and embed from; a subset of `stored`.
    pub computed: EncodingSet,
    /// Operations it can run; empty for a backend that only holds weights.
    pub ops: OpSet,
    /// The layout it wants for F32, F16 and BF16 matmul weights.
    pub float_layout: FloatLayout,
    /// Its bounds.
    pub limits: Limits,
    /// Its sizes.
    pub sizing: Sizing,
    /// Memory when it was opened.
    pub memory: MemoryInfo,
}

/// A backend as a plan sees it, without a device.
#[derive(Clone, Debug)]
pub struct Outline {
    /// What an open backend would say of itself. Its device is one that nobody has seen, with as much memory as
    /// [`OpenOptions::memory_budget`] allows, or none.
    pub info: BackendInfo,
    /// What [`crate::WeightBackend::workspace_bytes`] would say.
    pub workspace_bytes: fn(&WorkspaceDims) -> Result<WorkspaceBytes>,
}
