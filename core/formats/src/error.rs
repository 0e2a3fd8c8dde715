use hoist_backend::Encoding;

/// Result of reading a header.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model file was refused.
///
/// `file` is the path as it was given, or the name of an embedded model; `at` is a byte offset in that file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant's message names its fields")]
pub enum Error {
    // ---- the environment ----
    /// The file cannot be opened or read.
    #[error("cannot read `{path}`: {error}")]
    Io { path: String, error: std::io::Error },
    /// Something that is neither a regular file nor a folder.
    #[error("`{file}`: expected a regular file or a folder, found {found}")]
    NotAFile { file: String, found: &'static str },

    // ---- which format ----
    /// No bytes at all.
    #[error("`{file}` is empty")]
    Empty { file: String },
    /// The first bytes belong to no format that is read here.
    #[error("`{file}`: expected {expected} at byte 0, found {found}")]
    WrongMagic {
        file: String,
        expected: &'static str,
        found: String,
    },
    /// A folder that holds no model.
    #[error("folder `{folder}` holds no model: expected {expected}, which is not there")]
    FolderWithoutModel { folder: String, expected: &'static str },
    /// A big-endian GGUF file.
    #[error(
        "`{file}` is a big-endian GGUF file (version field {found:#010x}); only little-endian ones are read"
    )]
    BigEndian { file: String, found: u32 },
    /// A version of the format that is not read here.
    #[error("`{file}`: {format} version {found} is not supported, expected {expected}")]
    UnsupportedVersion {
        file: String,
        format: &'static str,
        expected: &'static str,
        found: String,
    },
    /// An encrypted file.
    #[error("`{file}` is encrypted, which is not supported")]
    Encrypted { file: String },
    /// A compression that is not read here.
    #[error("`{file}` is compressed with {found}, which is not supported")]
    UnsupportedCompression { file: String, found: &'static str },
    /// A file flagged as LZ4-compressed that is neither raw nor one LZ4 block.
    #[error(
        "`{file}` is flagged as LZ4-compressed; read as raw data: {as_raw}; read as one LZ4 block: {as_block}"
    )]
    Lz4 {
        file: String,
        as_raw: Box<Error>,
        as_block: Box<Error>,
    },

    // ---- the header as bytes ----
    /// The file ends inside something.
    #[error("`{file}` is truncated: {what} needs bytes {at}..{end}, the file has {file_len}", end = at.saturating_add(*needed))]
    Truncated {
        file: String,
        what: String,
        at: u64,
        needed: u64,
        file_len: u64,
    },
    /// Bytes after the end of what the header describes, in a format that has none there.
    #[error("`{file}`: expected the file to end at byte {expected}, found {found} bytes")]
    TrailingBytes { file: String, expected: u64, found: u64 },
    /// A count or length that the rest of the file cannot hold.
    #[error("`{file}`: {what} at byte {at} is {found}, the rest of the file holds at most {max}")]
    CountTooLarge {
        file: String,
        what: String,
        at: u64,
        found: u64,
        max: u64,
    },
    /// A header that needs more memory than any real one does.
    #[error("`{file}`: {what} would bring the header to {needed} bytes of memory, the limit is {limit}")]
    HeaderTooLarge {
        file: String,
        what: String,
        needed: u64,
        limit: u64,
    },
    /// A field with a value that it cannot have.
    #[error("`{file}`: {what} at byte {at}: expected {expected}, found {found}")]
    InvalidField {
        file: String,
        what: String,
        at: u64,
        expected: String,
        found: String,
    },
    /// A name, key or text that is not UTF-8.
    #[error("`{file}`: {what} at byte {at} is not UTF-8")]
    NotUtf8 { file: String, what: String, at: u64 },
    /// JSON that cannot be parsed, or is not of the expected shape.
    #[error("`{file}`: {what} is not as expected: {reason}")]
    Json {
        file: String,
        what: &'static str,
        reason: String,
    },
    /// A stored checksum that its bytes do not have.
    #[error("`{file}`: {what}: expected CRC32 {expected:#010x}, found {found:#010x}")]
    Checksum {
        file: String,
        what: &'static str,
        expected: u32,
        found: u32,
    },

    // ---- metadata ----
    /// A metadata key that is there twice.
    #[error("`{file}`: metadata key `{key}` is there twice")]
    DuplicateKey { file: String, key: String },
    /// A metadata value of a type that GGUF does not have.
    #[error("`{file}`: metadata `{key}` at byte {at}: expected a value type from 0 to 12, found {found}")]
    UnknownMetaType {
        file: String,
        key: String,
        at: u64,
        found: u32,
    },
    /// An array of arrays.
    #[error("`{file}`: metadata `{key}` at byte {at} is an array of arrays, which is not supported")]
    NestedArray { file: String, key: String, at: u64 },
    /// An alignment that is not a power of two.
    #[error("`{file}`: `general.alignment`: expected a power of two, found {found}")]
    InvalidAlignment { file: String, found: u64 },
    /// A metadata value of another type than its key requires.
    #[error("metadata `{key}`: expected {expected}, found {found}")]
    WrongMetaType {
        key: String,
        expected: &'static str,
        found: String,
    },
    /// A metadata key that is required and missing.
    #[error("metadata `{key}` is missing: expected {expected}")]
    MissingKey { key: String, expected: &'static str },

    // ---- tensors ----
    /// Two tensors of one name.
    #[error("`{file}`: tensor `{name}` is there twice")]
    DuplicateTensor { file: String, name: String },
    /// A tensor without a name.
    #[error("`{file}`: tensor {index} has an empty name")]
    EmptyName { file: String, index: u64 },
    /// More dimensions than the format allows, or none where it requires one.
    #[error("`{file}`: tensor `{name}`: expected {expected} dimensions, found {found}")]
    InvalidRank {
        file: String,
        name: String,
        expected: &'static str,
        found: u64,
    },
    /// A dimension of zero.
    #[error("`{file}`: tensor `{name}` has a dimension of zero in its shape {shape:?}")]
    ZeroDimension {
        file: String,
        name: String,
        shape: Vec<u64>,
    },
    /// Dimensions whose product has no size in 64 bits.
    #[error(
        "`{file}`: tensor `{name}`: expected a size below 2^64 bytes, found shape {shape:?} of {encoding}"
    )]
    ShapeOverflow {
        file: String,
        name: String,
        encoding: Encoding,
        shape: Vec<u64>,
    },
    /// A row that splits a block.
    #[error(
        "`{file}`: tensor `{name}`: expected rows of a multiple of {block} weights for {encoding}, found {cols}"
    )]
    PartialBlock {
        file: String,
        name: String,
        encoding: Encoding,
        block: u64,
        cols: u64,
    },
    /// A type id that never had a meaning, or has one since this program was written.
    #[error("`{file}`: tensor `{name}` has the unknown {format} type id {found}: expected {expected}")]
    UnknownEncoding {
        file: String,
        name: String,
        format: &'static str,
        found: u32,
        expected: &'static str,
    },
    /// A type id that was removed from GGML.
    #[error(
        "`{file}`: tensor `{name}` has type id {found}, which was removed from GGML: expected a current type, convert the model again"
    )]
    RemovedEncoding { file: String, name: String, found: u32 },
    /// A known type that is not supported here.
    #[error("`{file}`: tensor `{name}` has type {found}, which is not supported: expected {expected}")]
    UnsupportedDtype {
        file: String,
        name: String,
        found: String,
        expected: &'static str,
    },
    /// A tensor that does not start at a multiple of the alignment.
    #[error("`{file}`: tensor `{name}`: expected an offset at a multiple of {alignment}, found {offset}")]
    Misaligned {
        file: String,
        name: String,
        alignment: u64,
        offset: u64,
    },
    /// A tensor's bytes, or the padding after them, reach past the end of the file.
    #[error("`{file}`: tensor `{name}` needs bytes {start}..{end}, the file has {file_len}")]
    TensorOutOfBounds {
        file: String,
        name: String,
        start: u64,
        end: u64,
        file_len: u64,
    },
    /// A tensor whose stated size is not the one of its type and shape.
    #[error("`{file}`: tensor `{name}` of {encoding} {shape:?}: expected {expected} bytes, found {found}")]
    SizeMismatch {
        file: String,
        name: String,
        encoding: Encoding,
        shape: Vec<u64>,
        expected: u64,
        found: u64,
    },
    /// Two tensors that share bytes.
    #[error(
        "`{file}`: tensors `{first}` and `{second}` overlap: the first ends at byte {end}, the second starts at {start}"
    )]
    Overlap {
        file: String,
        first: String,
        second: String,
        end: u64,
        start: u64,
    },
    /// Bytes that belong to no tensor, in a format that allows none.
    #[error("`{file}`: bytes {start}..{end} before tensor `{name}` belong to no tensor")]
    Gap {
        file: String,
        name: String,
        start: u64,
        end: u64,
    },

    // ---- models of several files ----
    /// A shard that is not there.
    #[error("`{file}` names shard `{shard}`, which is not there")]
    MissingShard { file: String, shard: String },
    /// A shard that says something else than its place in the set.
    #[error("`{file}`: {what}: expected {expected}, found {found}")]
    ShardMismatch {
        file: String,
        what: String,
        expected: String,
        found: String,
    },
    /// One shard where a whole model was expected.
    #[error("`{file}` is one of {shards} shards: open {instead}")]
    OneShardOfMany {
        file: String,
        shards: u64,
        instead: &'static str,
    },

    // ---- the caller ----
    /// A tensor larger than the caller allows.
    #[error("tensor `{name}` has {nbytes} bytes, the limit here is {limit}")]
    TensorTooLarge { name: String, nbytes: u64, limit: u64 },
    /// Something that a writer cannot write.
    #[error("{what}: expected {expected}, found {found}")]
    CannotWrite {
        what: String,
        expected: String,
        found: String,
    },
}
