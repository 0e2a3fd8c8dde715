use crate::{
    BackendInfo, DecodeProgram, DeviceInfo, Error, IndexLayout, IndexReceipt, LoadPlan, LoadReceipt,
    LoadWatch, MemoryInfo, OpenOptions, Outline, Outputs, PhaseTime, Result, SequenceId, TokenBatch,
    UnsupportedWhat, WeightId, WeightSource, WorkspaceBytes, WorkspaceDims, push_all,
};

/// A kind of backend: finds devices and opens one.
pub trait Provider: Send + Sync {
    /// Its name, such as `cpu` or `cuda`.
    fn name(&self) -> &str;

    /// The devices this machine has.
    ///
    /// # Errors
    /// [`Error::Unavailable`] with a reason and a hint, if there are none.
    fn devices(&self) -> Result<Vec<DeviceInfo>>;

    /// Opens a device.
    ///
    /// # Errors
    /// [`Error::Unavailable`]; [`Error::Unsupported`] for an option it cannot honour: no option is ignored.
    fn open(&self, ordinal: u32, options: &OpenOptions) -> Result<Box<dyn WeightBackend>>;

    /// What a plan must know of a backend opened so, said without a device; `None` if that depends on the device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an option it cannot honour.
    fn outline(&self, options: &OpenOptions) -> Result<Option<Outline>> {
        let _ = options;
        Ok(None)
    }
}

/// Canonical bytes on their way to a device.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// The weight.
    pub weight: WeightId,
    /// Where in its canonical bytes they start; a multiple of its block.
    pub offset: u64,
    /// The bytes; a multiple of its block. Borrowed for the call only.
    pub bytes: &'a [u8],
}

/// Owns a model's weights on one device, or one group of devices.
///
/// The crate's documentation gives the order of calls, ownership, threads and who validates what.
pub trait WeightBackend: Send {
    /// What it is and wants.
    fn info(&self) -> &BackendInfo;

    /// Memory now.
    ///
    /// # Errors
    /// [`Error::DeviceLost`]
    fn memory(&self) -> Result<MemoryInfo>;

    /// Starts a load: sees the whole plan, allocates one arena.
    ///
    /// # Errors
    /// [`Error::BadState`] unless empty; [`Error::OutOfMemory`] with numbers; [`Error::Unsupported`] for a weight it
    /// cannot hold. Nothing is resident then.
    fn begin_load(&mut self, plan: &LoadPlan) -> Result<()>;

    /// Takes source blocks of a quantised matrix, as they are.
    ///
    /// # Errors
    /// [`Error::InvalidChunk`], [`Error::NonFiniteWeight`], [`Error::BadState`] unless loading.
    fn upload_quantized(&mut self, chunk: Chunk<'_>) -> Result<()>;

    /// Takes values of an F32, F16 or BF16 matrix, in that encoding, or of a bias, in f32.
    ///
    /// # Errors
    /// As [`WeightBackend::upload_quantized`].
    fn upload_f32(&mut self, chunk: Chunk<'_>) -> Result<()>;

    /// Takes values of a norm vector, in f32.
    ///
    /// # Errors
    /// As [`WeightBackend::upload_quantized`].
    fn upload_gamma(&mut self, chunk: Chunk<'_>) -> Result<()>;

    /// Pulls the whole plan from the source. The default reads and pushes; a fast backend overrides it.
    ///
    /// # Errors
    /// What the source and the uploads return; [`Error::Cancelled`]. The caller then calls `abort_load`.
    fn load_from(&mut self, plan: &LoadPlan, source: &dyn WeightSource, watch: &dyn LoadWatch) -> Result<()> {
        push_all(self, plan, source, watch)
    }

    /// Ends a load and vouches for every byte.
    ///
    /// # Errors
    /// [`Error::Incomplete`] with the first missing range; the load can then go on or be aborted.
    fn finish_load(&mut self) -> Result<LoadReceipt>;

    /// Gives a load up; leaves nothing resident.
    ///
    /// # Errors
    /// [`Error::BadState`] unless loading; [`Error::DeviceLost`].
    fn abort_load(&mut self) -> Result<()>;

    /// Builds the device's table over (layer, role). The host's [`crate::WeightIndex`] is built once, for all backends.
    ///
    /// # Errors
    /// [`Error::BadState`] unless loaded; [`Error::OutOfMemory`]; [`Error::UnknownWeight`].
    fn build_index(&mut self, layout: &IndexLayout) -> Result<IndexReceipt>;

    /// BLAKE3 of a weight's canonical bytes, computed where they are; `None` if the device cannot, and the caller reads
    /// them back.
    ///
    /// # Errors
    /// [`Error::BadState`] unless resident; [`Error::UnknownWeight`].
    fn digest(&mut self, weight: WeightId) -> Result<Option<[u8; 32]>> {
        let _ = weight;
        Ok(None)
    }

    /// Copies canonical bytes of a weight to the host, private layouts undone.
    ///
    /// # Errors
    /// [`Error::BadState`] unless resident; [`Error::UnknownWeight`]; [`Error::InvalidArgument`] past the end or if the
    /// range splits a block.
    fn read_back(&mut self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()>;

    /// Bytes that [`WeightBackend::init_workspace`] would take; asks for nothing. The default counts keys, values,
    /// activations and tables; a backend with scratch of its own adds it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the sizes overflow; [`Error::Unsupported`] for a size that no buffer of the device has.
    fn workspace_bytes(&self, dims: &WorkspaceDims) -> Result<WorkspaceBytes> {
        dims.kv_bytes()
            .zip(dims.value_bytes())
            .map(|(kv, workspace)| WorkspaceBytes { kv, workspace })
            .ok_or_else(|| {
                Error::invalid(
                    "workspace",
                    "a size below 2^64 bytes",
                    format!("{:?}", dims.capacity),
                )
            })
    }

    /// Allocates activations, keys and values, tables and scratch: the last allocation there is.
    ///
    /// # Errors
    /// [`Error::BadState`] unless indexed; [`Error::OutOfMemory`], after which the backend is still indexed.
    fn init_workspace(&mut self, dims: &WorkspaceDims) -> Result<WorkspaceBytes>;

    /// The decoding side, if it has one.
    fn as_decode(&mut self) -> Option<&mut dyn DecodeBackend> {
        None
    }

    /// Gives everything back; the backend is empty again. Legal in every state.
    ///
    /// # Errors
    /// [`Error::DeviceLost`]
    fn unload(&mut self) -> Result<()>;
}

/// Runs decode programs over resident weights. Allocates nothing.
pub trait DecodeBackend: WeightBackend {
    /// Compiles a program. Every sequence is reset to length 0.
    ///
    /// # Errors
    /// [`Error::BadState`] unless ready; [`Error::Unsupported`] for an operation or an encoding it cannot run;
    /// [`Error::InvalidArgument`] if the program does not fit the workspace or the index.
    fn prepare(&mut self, program: &DecodeProgram) -> Result<()>;

    /// Appends tokens to sequences and yields what they want. On any error all sequence lengths are unchanged.
    ///
    /// # Errors
    /// [`Error::BadState`] unless prepared; [`Error::TokenOutOfRange`]; [`Error::ContextExceeded`];
    /// [`Error::InvalidArgument`] for an unknown or repeated sequence, an empty run, too many tokens, or outputs of the
    /// wrong size; [`Error::NonFinite`]; [`Error::DeviceLost`].
    fn forward(&mut self, batch: &TokenBatch<'_>, out: &mut Outputs<'_>) -> Result<()>;

    /// Does what [`DecodeBackend::forward`] does, and adds to `phases` where the time went, in the order in which the device
    /// ran it. Timing may cost time of its own; results are the same.
    ///
    /// # Errors
    /// As [`DecodeBackend::forward`]; [`Error::Unsupported`] from a backend that cannot tell.
    fn profile(
        &mut self,
        batch: &TokenBatch<'_>,
        out: &mut Outputs<'_>,
        phases: &mut Vec<PhaseTime>,
    ) -> Result<()> {
        let _ = (batch, out, phases);
        Err(Error::Unsupported {
            backend: self.info().name.clone(),
            what: UnsupportedWhat::Other("profiles of a step".into()),
        })
    }

    /// Bytes a second at which the device reads its own memory, measured now; `None` if the backend does not measure it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`].
    fn read_rate(&mut self) -> Result<Option<f64>> {
        Ok(None)
    }

    /// Cuts a sequence back to `length` tokens; 0 resets it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the sequence is unknown or shorter.
    fn truncate(&mut self, sequence: SequenceId, length: u32) -> Result<()>;

    /// Tokens that a sequence holds.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the sequence is unknown.
    fn sequence_length(&self, sequence: SequenceId) -> Result<u32>;
}
