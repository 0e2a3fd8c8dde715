//! The model that a command works on.

use anyhow::Result;
use hoist_core::formats::{self, Manifest};
use hoist_core::orchestrator::OpenedModel;

use crate::args::ModelArg;

/// Stands for the path of the model that is part of the program.
pub(crate) const EMBEDDED: &str = "embedded:tiny-kjv";

/// Opens the file that was given, or the embedded model.
pub(crate) fn open(model: &ModelArg) -> Result<OpenedModel> {
    match &model.file {
        Some(path) => Ok(OpenedModel::open(path)?),
        None => Ok(OpenedModel::from_bytes(EMBEDDED, EMBEDDED_MODEL.into())?),
    }
}

/// As [`open`], and asks nothing of what the tensors mean.
pub(crate) fn manifest(model: &ModelArg) -> Result<Manifest> {
    match &model.file {
        Some(path) => Ok(formats::open(path)?),
        None => Ok(formats::open_bytes(EMBEDDED, EMBEDDED_MODEL.into())?),
    }
}

/// A small llama trained on the King James Bible; `assets/README.md` states source, licence and loss.
const EMBEDDED_MODEL: &[u8] = include_bytes!("../assets/tiny-kjv.gguf");
