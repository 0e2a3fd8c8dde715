//! How results are printed: JSON with stable keys, or tables.

pub(crate) mod load;
pub(crate) mod metadata;
pub(crate) mod model;
pub(crate) mod plan;
pub(crate) mod profile;
pub(crate) mod table;
pub(crate) mod units;

use std::io::{IsTerminal as _, Write as _};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::say::{visible_lines, visible_prose};

/// Prints one JSON object.
pub(crate) fn print_json(value: &Value) -> Result<()> {
    // Not straight to the writer: serde_json hides what kind of error writing ended with.
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print_data(&text)
}

/// Prints text for people: what a terminal would act on is spelt out.
pub(crate) fn print_text(text: &str) -> Result<()> {
    print_data(&visible_lines(text))
}

/// Prints what a model has written: as it is, but to a terminal, which a model must not drive.
pub(crate) fn print_prose(text: &str) -> Result<()> {
    if std::io::stdout().is_terminal() {
        return print_data(&visible_prose(text));
    }
    print_data(text)
}

/// Prints text for programs, as it is.
pub(crate) fn print_data(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .context("writing to standard output")
}
