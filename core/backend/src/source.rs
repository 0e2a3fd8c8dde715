use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use crate::{MemoryByClass, Result, WeightId};

/// What tells one version of a file from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileIdentity {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Length in bytes.
    pub len: u64,
    /// Modification time in nanoseconds since 1970.
    pub modified_ns: i128,
}

/// A file, or a buffer that stands for one, that plans speak of by number.
#[derive(Clone, Debug)]
pub struct SourceFile {
    /// Path, for messages and for backends that open it themselves.
    pub path: PathBuf,
    /// Length in bytes of what [`crate::SourceView`] offsets count in.
    pub len: u64,
    /// The open file; `None` if the bytes are in memory (a decompressed APR file, an embedded model).
    pub file: Option<Arc<File>>,
    /// The file as it was when its header was read; `None` if the bytes are in memory.
    pub identity: Option<FileIdentity>,
}

/// A file's bytes, mapped or in memory, alive as long as this is held.
pub trait Mapping: Send + Sync {
    /// The bytes.
    fn bytes(&self) -> &[u8];
}

/// Where canonical bytes come from.
pub trait WeightSource: Sync {
    /// Fills `out` with canonical bytes of `weight` from `offset` on. Value changes, fused splits and strides are applied
    /// already.
    ///
    /// # Errors
    /// [`crate::Error::SourceIo`], [`crate::Error::SourceChanged`], [`crate::Error::InvalidArgument`] past the end.
    fn read_at(&self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()>;

    /// The files that the plan's views speak of, for backends that read byte runs themselves.
    fn files(&self) -> &[SourceFile];

    /// A mapping of a file, for backends that import; `None` if it cannot be mapped.
    fn share(&self, file: u32) -> Option<Arc<dyn Mapping>>;

    /// Checks that every file is still the one that was opened. Called before and after a load.
    ///
    /// # Errors
    /// [`crate::Error::SourceChanged`]
    fn check_unchanged(&self) -> Result<()>;
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Reading headers.
    Open,
    /// Making the plan.
    Plan,
    /// Moving weights.
    Upload,
    /// Building the index.
    Index,
    /// Comparing what is resident with the file.
    Verify,
    /// Making the workspace.
    Workspace,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// The weight in hand, if there is one.
    pub weight: Option<WeightId>,
    /// Bytes done in this phase.
    pub done: u64,
    /// Bytes of this phase.
    pub total: u64,
}

/// Sees progress, and can stop a load.
pub trait LoadWatch: Sync {
    /// Called from any thread, often; must be quick.
    fn progress(&self, progress: Progress);

    /// Whether to stop: the backend returns [`crate::Error::Cancelled`] soon after.
    fn cancelled(&self) -> bool;
}

/// Sees nothing, stops nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unwatched;

impl LoadWatch for Unwatched {
    fn progress(&self, _: Progress) {}

    fn cancelled(&self) -> bool {
        false
    }
}

/// What `finish_load` vouches for: every byte of the plan arrived.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReceipt {
    /// Weights that are resident.
    pub weights: u32,
    /// Owned bytes by class.
    pub resident: MemoryByClass,
    /// Bytes mapped from files instead of owned.
    pub mapped: u64,
    /// Choices the backend made that a report should show, such as which path bytes took, as (name, value).
    pub notes: Vec<(String, String)>,
}
