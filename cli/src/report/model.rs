//! What is told of a model in every report.

use hoist_core::formats::{Format, Manifest};
use hoist_core::model::ResolvedModel;
use hoist_core::orchestrator::OpenedModel;
use serde_json::{Value, json};

use crate::say::visible;

/// `model` of every JSON report.
pub(crate) fn json(manifest: &Manifest, model: &ResolvedModel) -> Value {
    let mut value = file_json(manifest);
    value["architecture"] = model.architecture.into();
    value["layers"] = model.layers.into();
    value
}

/// What is known of a file without its roles.
pub(crate) fn file_json(manifest: &Manifest) -> Value {
    let mut value = json!({
        "path": manifest.path.display().to_string(),
        "format": manifest.format.to_string(),
    });
    if let Format::Gguf { version } = manifest.format {
        value["format_version"] = version.into();
    }
    value["files"] = manifest.shards.len().into();
    value["file_bytes"] = manifest
        .shards
        .iter()
        .map(|s| s.source.len)
        .fold(0, u64::saturating_add)
        .into();
    value
}

/// A model's path, on one line.
pub(crate) fn path(manifest: &Manifest) -> String {
    visible(&manifest.path.display().to_string()).into_owned()
}

/// The line that names a model.
pub(crate) fn line(opened: &OpenedModel) -> String {
    line_of(&opened.manifest, &opened.model)
}

/// As [`line`].
pub(crate) fn line_of(manifest: &Manifest, model: &ResolvedModel) -> String {
    format!(
        "{}  ({}, {}, {} layers)",
        path(manifest),
        manifest.format,
        model.architecture,
        model.layers
    )
}
