//! Shared libraries that tests open.

use std::env::current_exe;
use std::io::{Error, Result};
use std::path::PathBuf;

/// The library of a development dependency: cargo has built it, and lays it beside the program of the test.
///
/// # Errors
/// If it is not there.
pub fn cargo_built(package: &str) -> Result<PathBuf> {
    let path = current_exe()?.with_file_name(format!("lib{}.so", package.replace('-', "_")));
    if path.is_file() {
        return Ok(path);
    }
    Err(Error::other(format!("there is no `{}`", path.display())))
}
