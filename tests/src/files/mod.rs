//! Model files made by code: a tiny model in every format, and files that are wrong in exactly one thing.
#![expect(
    clippy::expect_used,
    reason = "builders for tests: a model that cannot be built is a failed test"
)]

mod hostile;
mod raw;
mod tiny;

pub use hostile::{Hostile, hostile};
pub use raw::{RawApr, RawAprEntry, RawGguf, RawGgufTensor, RawSafeTensors};
pub use tiny::{AprStorage, TinyLlama, TinyTensor, encode, random_blocks};

use std::io;
use std::path::{Path, PathBuf};

/// A model as files, not yet on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFiles {
    /// File names and contents.
    pub files: Vec<(String, Vec<u8>)>,
    /// The file to open, or an empty name for the folder itself.
    pub open: String,
}

impl ModelFiles {
    /// A model of one file.
    pub fn single(name: &str, bytes: Vec<u8>) -> Self {
        Self {
            files: vec![(name.into(), bytes)],
            open: name.into(),
        }
    }

    /// Writes the files into `folder` and returns the path to open.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write_to(&self, folder: &Path) -> io::Result<PathBuf> {
        for (name, bytes) in &self.files {
            std::fs::write(folder.join(name), bytes)?;
        }
        Ok(if self.open.is_empty() {
            folder.to_owned()
        } else {
            folder.join(&self.open)
        })
    }
}
