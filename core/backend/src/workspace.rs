use crate::{DecodeProgram, Error, KvSpec, Result, ValueKind};

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// The contract's: f16, rounded to nearest even.
    #[default]
    F16,
    /// A test switch, outside the contract: for comparing with f32 engines.
    F32,
}

impl KvDtype {
    /// Bytes of an element.
    pub fn bytes(self) -> u64 {
        match self {
            KvDtype::F16 => 2,
            KvDtype::F32 => 4,
        }
    }
}

/// How much is to be decoded at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Most positions of a sequence.
    pub max_context: u32,
    /// Most sequences.
    pub max_sequences: u32,
    /// Most tokens of one batch.
    pub max_batch_tokens: u32,
    /// How keys and values are stored.
    pub kv: KvDtype,
}

/// All that `init_workspace` allocates for: sizes from a program and a capacity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkspaceDims {
    /// How much is to be decoded at once.
    pub capacity: Capacity,
    /// The cache of each layer.
    pub kv: Vec<KvSpec>,
    /// For each value of the program: its kind and elements per token.
    pub values: Vec<(ValueKind, u32)>,
    /// Bytes of all tables.
    pub table_bytes: u64,
    /// Vocabulary.
    pub vocab: u32,
}

/// Bytes of a workspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkspaceBytes {
    /// Keys and values of all sequences.
    pub kv: u64,
    /// Activations, tables and scratch.
    pub workspace: u64,
}

impl WorkspaceDims {
    /// The dimensions a program needs at a capacity.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a capacity is zero or the context is not the program's.
    pub fn new(program: &DecodeProgram, capacity: Capacity) -> Result<Self> {
        for (what, n) in [
            ("max_context", capacity.max_context),
            ("max_sequences", capacity.max_sequences),
            ("max_batch_tokens", capacity.max_batch_tokens),
        ] {
            if n == 0 {
                return Err(Error::invalid(what, "at least 1", 0));
            }
        }
        if capacity.max_context != program.max_context {
            return Err(Error::invalid(
                "max_context",
                program.max_context,
                capacity.max_context,
            ));
        }
        Ok(Self {
            capacity,
            kv: program.kv.clone(),
            values: program.values.iter().map(|v| (v.kind, v.width)).collect(),
            table_bytes: program.tables.iter().map(|t| t.data.len() as u64 * 4).sum(),
            vocab: program.vocab,
        })
    }

    /// Bytes of keys and values: `Σ layers 2 · kv_heads · head_dim · context · sequences · element`; `None` past 2^64.
    pub fn kv_bytes(&self) -> Option<u64> {
        let elements = self.kv.iter().try_fold(0u64, |sum, kv| {
            sum.checked_add(
                2u64.checked_mul(kv.kv_heads.into())?
                    .checked_mul(kv.head_dim.into())?,
            )
        })?;
        elements
            .checked_mul(self.capacity.max_context.into())?
            .checked_mul(self.capacity.max_sequences.into())?
            .checked_mul(self.capacity.kv.bytes())
    }

    /// Bytes of values at 4 bytes an element, and of tables; `None` past 2^64. A backend's own scratch comes on top:
    /// [`crate::WeightBackend::workspace_bytes`].
    pub fn value_bytes(&self) -> Option<u64> {
        let width = self
            .values
            .iter()
            .try_fold(0u64, |sum, (_, width)| sum.checked_add(u64::from(*width)))?;
        width
            .checked_mul(4)?
            .checked_mul(self.capacity.max_batch_tokens.into())?
            .checked_add(self.table_bytes)
    }
}
