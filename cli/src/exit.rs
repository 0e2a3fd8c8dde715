//! What the program's exit code says, and how an error is told.

use std::io;

use hoist_core::backend::Error as BackendError;
use hoist_core::formats::Error as FormatError;
use hoist_core::model::Error as ModelError;
use hoist_core::orchestrator::{Error as LoadError, PlanError};
use hoist_core::text::Error as TextError;
use hoist_plugin_host::Error as PluginError;

use crate::say::say;

/// Exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// Done.
    Ok = 0,
    /// Done, and the answer is no: it does not fit, it differs, it does not conform.
    No = 1,
    /// The command line, or a request that the model cannot meet.
    Usage = 2,
    /// A model file that is refused.
    BadModel = 3,
    /// A backend or device that is not there, or cannot do this.
    Unavailable = 4,
    /// Out of memory.
    OutOfMemory = 5,
    /// A plugin that breaks a rule.
    PluginRejected = 6,
    /// Reading or writing failed.
    Io = 7,
    /// A bug.
    Internal = 70,
    /// Stopped by a signal: 128 + SIGINT.
    Cancelled = 130,
}

impl From<Code> for std::process::ExitCode {
    fn from(code: Code) -> Self {
        (code as u8).into()
    }
}

/// A request that cannot be met, found only after the command line was parsed.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Prints an error with what caused it and a hint, and gives the exit code. A reader that went away is no error.
pub(crate) fn report(error: &anyhow::Error) -> Code {
    if is_broken_pipe(error) {
        return Code::Ok;
    }
    let code = code_of(error);
    let mut message = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        // Many errors repeat what caused them.
        if !message.ends_with(&cause) {
            if !message.is_empty() {
                message.push_str(": ");
            }
            message.push_str(&cause);
        }
    }
    say("error", message);
    if let Some(hint) = hint_of(error) {
        say("hint", hint);
    }
    code
}

/// Prints what the command line asks for instead of a command: help, the version, or what is wrong with it.
pub(crate) fn answer(answer: &clap::Error) -> Code {
    let printed = answer.print().and_then(|()| io::Write::flush(&mut io::stdout()));
    if answer.use_stderr() {
        return Code::Usage;
    }
    match printed {
        Ok(()) => Code::Ok,
        Err(error) => report(&anyhow::Error::new(error).context("writing to standard output")),
    }
}

/// Prints what plugins failed at while they gave back what they held. It is not silently passed over: what was done is
/// done, and the plugin is rejected all the same, unless something else failed before.
pub(crate) fn report_parting(code: Code) -> Code {
    let errors = hoist_plugin_host::take_parting_errors();
    for error in &errors {
        say("error", error);
    }
    match code {
        Code::Ok if !errors.is_empty() => Code::PluginRejected,
        code => code,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn code_of(error: &anyhow::Error) -> Code {
    error.chain().find_map(code_of_cause).unwrap_or(Code::Internal)
}

fn code_of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<Code> {
    if let Some(error) = cause.downcast_ref::<LoadError>() {
        return Some(of_load(error));
    }
    if let Some(error) = cause.downcast_ref::<PlanError>() {
        return Some(of_plan(error));
    }
    if let Some(error) = cause.downcast_ref::<FormatError>() {
        return Some(of_format(error));
    }
    if let Some(error) = cause.downcast_ref::<ModelError>() {
        return Some(of_model(error));
    }
    if let Some(error) = cause.downcast_ref::<BackendError>() {
        return Some(of_backend(error));
    }
    if let Some(error) = cause.downcast_ref::<TextError>() {
        return Some(of_text(error));
    }
    if cause.is::<PluginError>() {
        return Some(Code::PluginRejected);
    }
    if cause.is::<Usage>() {
        return Some(Code::Usage);
    }
    cause.is::<io::Error>().then_some(Code::Io)
}

fn of_load(error: &LoadError) -> Code {
    match error {
        LoadError::Format(error) => of_format(error),
        LoadError::Model(error) => of_model(error),
        LoadError::Plan(error) => of_plan(error),
        LoadError::Backend(error) => of_backend(error),
        LoadError::DoesNotFit { .. } => Code::OutOfMemory,
        LoadError::Mismatch { .. } => Code::No,
        LoadError::NotGivenBack { error, .. } => of_load(error),
        _ => Code::Internal,
    }
}

fn of_plan(error: &PlanError) -> Code {
    match error {
        PlanError::Encoding { .. } | PlanError::Limit { .. } => Code::Unavailable,
        PlanError::Overflow { .. } => Code::BadModel,
        PlanError::Contract(error) => of_backend(error),
        _ => Code::Internal,
    }
}

fn of_format(error: &FormatError) -> Code {
    match error {
        // A file that may not be read is the file's fault, as is a folder without a model; one that is not there is not.
        FormatError::Io { error, .. } if error.kind() == io::ErrorKind::PermissionDenied => Code::BadModel,
        FormatError::Io { error, .. } if error.kind() == io::ErrorKind::OutOfMemory => Code::OutOfMemory,
        FormatError::Io { .. } => Code::Io,
        _ => Code::BadModel,
    }
}

fn of_model(error: &ModelError) -> Code {
    match error {
        ModelError::ContextOutOfRange { .. } => Code::Usage,
        ModelError::InvalidProgram { .. } | ModelError::Index(_) => Code::Internal,
        _ => Code::BadModel,
    }
}

fn of_text(error: &TextError) -> Code {
    match error {
        TextError::Io { .. } => Code::Io,
        TextError::InvalidOption { .. }
        | TextError::TextTooLong { .. }
        | TextError::NoTokenForByte { .. }
        | TextError::TokenOutOfRange { .. } => Code::Usage,
        TextError::LogitCount { .. } => Code::Internal,
        // What is left is said of the tokenizer, the template or the logits that the model brought.
        _ => Code::BadModel,
    }
}

fn of_backend(error: &BackendError) -> Code {
    match error {
        BackendError::Unavailable { .. }
        | BackendError::DeviceLost { .. }
        | BackendError::Unsupported { .. } => Code::Unavailable,
        BackendError::OutOfMemory { .. } => Code::OutOfMemory,
        BackendError::SourceIo { .. } => Code::Io,
        BackendError::SourceChanged { .. }
        | BackendError::NonFiniteWeight { .. }
        | BackendError::NonFinite { .. } => Code::BadModel,
        BackendError::InvalidArgument { .. }
        | BackendError::TokenOutOfRange { .. }
        | BackendError::ContextExceeded { .. } => Code::Usage,
        BackendError::Cancelled => Code::Cancelled,
        // What the host reports as a bug of a plugin is the plugin's.
        BackendError::Internal { backend, .. } if backend.starts_with("plugin:") => Code::PluginRejected,
        _ => Code::Internal,
    }
}

/// What the user can do about it.
fn hint_of(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|cause| {
        if let Some(error) = cause.downcast_ref::<LoadError>() {
            return match error {
                LoadError::Backend(error) => hint_of_backend(error),
                LoadError::Format(error) => hint_of_format(error),
                LoadError::Model(error) => hint_of_model(error),
                LoadError::DoesNotFit { .. } => Some(
                    "`hoist plan` shows what takes how much; a smaller --context takes less for keys and values, --import maps \
                     weights instead of copying them"
                        .into(),
                ),
                _ => None,
            };
        }
        cause
            .downcast_ref::<BackendError>()
            .and_then(hint_of_backend)
            .or_else(|| cause.downcast_ref::<FormatError>().and_then(hint_of_format))
            .or_else(|| cause.downcast_ref::<ModelError>().and_then(hint_of_model))
    })
}

fn hint_of_backend(error: &BackendError) -> Option<String> {
    match error {
        BackendError::Unavailable { hint, .. } => hint.clone(),
        BackendError::SourceChanged { .. } => Some("load it again when nothing writes to it".into()),
        _ => None,
    }
}

fn hint_of_format(error: &FormatError) -> Option<String> {
    match error {
        FormatError::WrongMagic { .. } => {
            Some("Hoist reads GGUF, SafeTensors and APR files, and Hugging Face folders".into())
        }
        FormatError::FolderWithoutModel { .. } => {
            Some("a folder needs a config.json and its .safetensors files".into())
        }
        _ => None,
    }
}

fn hint_of_model(error: &ModelError) -> Option<String> {
    match error {
        ModelError::MissingConfig { .. } => Some("give the folder that holds config.json".into()),
        ModelError::NotATransformer { .. } => Some("`hoist inspect` lists its tensors".into()),
        ModelError::ContextOutOfRange { limit, .. } => Some(format!("--context takes up to {limit}")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn io_error(kind: io::ErrorKind) -> FormatError {
        FormatError::Io {
            path: "model.gguf".into(),
            error: kind.into(),
        }
    }

    #[test]
    fn every_group_of_errors_has_its_code() {
        let cases: Vec<(anyhow::Error, Code)> = vec![
            (io_error(io::ErrorKind::NotFound).into(), Code::Io),
            (io_error(io::ErrorKind::PermissionDenied).into(), Code::BadModel),
            (io_error(io::ErrorKind::OutOfMemory).into(), Code::OutOfMemory),
            (
                LoadError::from(io_error(io::ErrorKind::NotFound)).into(),
                Code::Io,
            ),
            (BackendError::Cancelled.into(), Code::Cancelled),
            (LoadError::from(BackendError::Cancelled).into(), Code::Cancelled),
            (
                BackendError::OutOfMemory {
                    device: "cpu".into(),
                    what: "weights".into(),
                    needed: 2,
                    available: 1,
                }
                .into(),
                Code::OutOfMemory,
            ),
            (BackendError::internal("cpu", "x").into(), Code::Internal),
            (Usage("x".into()).into(), Code::Usage),
            (io::Error::from(io::ErrorKind::StorageFull).into(), Code::Io),
            (anyhow::anyhow!("x"), Code::Internal),
        ];
        for (error, code) in cases {
            assert_eq!(code_of(&error), code, "{error}");
            assert_eq!(code_of(&error.context("while loading")), code);
        }
    }

    #[test]
    fn a_reader_that_went_away_is_no_error() {
        let error = anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe)).context("writing");
        assert_eq!(report(&error), Code::Ok);
    }
}
