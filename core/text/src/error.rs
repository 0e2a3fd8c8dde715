use std::path::PathBuf;

/// Result of this crate's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a tokenizer, a template or a sampler was refused, or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant's message names its fields")]
pub enum Error {
    // ---- the model file ----
    /// The model comes without a tokenizer.
    #[error("`{path}` has no tokenizer: {reason}")]
    NoTokenizer { path: PathBuf, reason: &'static str },
    /// A metadata key that the tokenizer needs.
    #[error("metadata key `{key}` is missing")]
    MissingKey { key: &'static str },
    /// A metadata value of another type.
    #[error("metadata key `{key}` should be {expected} and is {found}")]
    WrongType {
        key: &'static str,
        expected: &'static str,
        found: &'static str,
    },
    /// Arrays that describe the same tokens differ in length.
    #[error("metadata array `{key}` should have {expected} items and has {found}")]
    WrongLength {
        key: &'static str,
        expected: usize,
        found: usize,
    },
    /// A vocabulary without tokens, or with more than can be numbered.
    #[error("a vocabulary of {found} tokens (1 to {limit} are possible)")]
    VocabularySize { found: u64, limit: u64 },
    /// A tokenizer algorithm that is not known.
    #[error("unknown tokenizer model `{found}` (known: {known})")]
    UnknownModel { found: String, known: String },
    /// A way to split text before merging that is not known.
    #[error("unknown pre-tokenizer `{found}` (known: {known})")]
    UnknownPreTokenizer { found: String, known: String },
    /// A merge that the vocabulary cannot carry out.
    #[error("merge {index} `{merge}`: {reason}")]
    BadMerge {
        index: usize,
        merge: String,
        reason: &'static str,
    },
    /// A score that cannot be ordered.
    #[error("the score of token {token} is NaN")]
    BadScore { token: u32 },
    /// A special token's id that no token has.
    #[error("metadata key `{key}` names token {id} of a vocabulary of {vocab}")]
    SpecialOutOfRange { key: &'static str, id: u64, vocab: u32 },
    /// A token type that the format does not define.
    #[error("token {token} has type {found} (0 to 6 are defined)")]
    UnknownTokenType { token: u32, found: i64 },
    /// A tokenizer that is told to add a token that it does not name.
    #[error("`{flag}` is set but there is no {token} token")]
    NoTokenToAdd { flag: &'static str, token: &'static str },
    /// A file beside the model that cannot be read.
    #[error("cannot read `{path}`: {error}")]
    Io { path: PathBuf, error: std::io::Error },
    /// A file beside the model that is larger than any real one.
    #[error("`{path}` has {len} bytes; at most {limit} are read")]
    FileTooLarge { path: PathBuf, len: u64, limit: u64 },
    /// A file beside the model that does not say what it should.
    #[error("`{path}` is malformed: {reason}")]
    Malformed { path: PathBuf, reason: String },
    /// A regular expression, a decoder or another part that cannot be carried out.
    #[error("unsupported tokenizer: {what}")]
    Unsupported { what: String },

    // ---- the text and the tokens ----
    /// A byte of the text for which the vocabulary has no token.
    #[error("the vocabulary has no token for byte {byte:#04x} and no unknown token")]
    NoTokenForByte { byte: u8 },
    /// A text that is too long for one call.
    #[error("a text of {len} bytes; at most {limit} are encoded at once")]
    TextTooLong { len: usize, limit: usize },
    /// A token outside the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocab}")]
    TokenOutOfRange { token: u32, vocab: u32 },
    /// The tokenizer library failed on this text.
    #[error("encoding failed: {reason}")]
    Encode { reason: String },

    // ---- chat templates ----
    /// A template that is not valid Jinja.
    #[error("the chat template does not compile: {reason}")]
    TemplateSyntax { reason: String },
    /// A template that stopped with an error, such as one that it raised itself.
    #[error("the chat template failed: {reason}")]
    TemplateFailed { reason: String },
    /// A template that did not end within its allowance of instructions.
    #[error("the chat template did not end within {fuel} instructions")]
    TemplateEndless { fuel: u64 },
    /// A template that wrote more than any prompt may hold.
    #[error("the chat template wrote more than {limit} bytes")]
    TemplateOutput { limit: usize },
    /// A template text that is larger than any real one.
    #[error("a chat template of {len} bytes; at most {limit} are compiled")]
    TemplateTooLarge { len: usize, limit: usize },

    // ---- sampling ----
    /// A sampling parameter outside its range.
    #[error("{name} should be {expected} and is {found}")]
    InvalidOption {
        name: &'static str,
        expected: &'static str,
        found: String,
    },
    /// Logits that are not one per token of the vocabulary.
    #[error("{found} logits for a vocabulary of {expected}")]
    LogitCount { expected: usize, found: usize },
    /// A logit that is NaN or infinite.
    #[error("the logit of token {token} is {value}")]
    NonFiniteLogit { token: u32, value: f32 },
}
