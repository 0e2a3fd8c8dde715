//! Which files may be loaded: absolute path or lockfile, nothing that others can write, and the bytes that were judged.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// A file that passed the rules of its place, held open so that what was hashed is what is loaded.
#[derive(Debug)]
pub struct Candidate {
    /// Where it is.
    pub path: PathBuf,
    /// The open file.
    pub file: File,
    /// SHA-256 of its bytes, in lower-case hexadecimal.
    pub sha256: String,
}

impl Candidate {
    /// Opens and hashes a file.
    ///
    /// # Errors
    /// [`Error::NotAbsolute`], [`Error::Io`], [`Error::WorldWritable`], [`Error::NotALibrary`] for a folder.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_absolute() {
            return Err(Error::NotAbsolute {
                path: path.to_owned(),
            });
        }
        let io = |error| Error::Io {
            path: path.to_owned(),
            error,
        };
        let file = File::open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(Error::NotALibrary {
                path: path.to_owned(),
                reason: "it is not a regular file".into(),
            });
        }
        refuse_world_writable(path, "the file", metadata.mode(), false)?;
        let real = std::fs::canonicalize(path).map_err(io)?;
        for (depth, folder) in real.ancestors().skip(1).enumerate() {
            let mode = std::fs::metadata(folder).map_err(io)?.mode();
            refuse_world_writable(
                path,
                &format!("the folder `{}`", folder.display()),
                mode,
                depth > 0,
            )?;
        }
        let sha256 = hash(&file).map_err(io)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            sha256,
        })
    }

    /// Demands that the bytes are still the ones that were judged.
    ///
    /// # Errors
    /// [`Error::Changed`], [`Error::Io`].
    pub fn check_unchanged(&self) -> Result<()> {
        let found = hash(&self.file).map_err(|error| Error::Io {
            path: self.path.clone(),
            error,
        })?;
        if found == self.sha256 {
            return Ok(());
        }
        Err(Error::Changed {
            path: self.path.clone(),
            expected: self.sha256.clone(),
            found,
        })
    }
}

/// A folder further up may be sticky, as `/tmp` is: others cannot rename what is ours in it.
fn refuse_world_writable(path: &Path, what: &str, mode: u32, sticky_is_safe: bool) -> Result<()> {
    const EVERYONE_WRITES: u32 = 0o002;
    const STICKY: u32 = 0o1000;
    if mode & EVERYONE_WRITES == 0 || (sticky_is_safe && mode & STICKY != 0) {
        return Ok(());
    }
    Err(Error::WorldWritable {
        path: path.to_owned(),
        what: what.to_owned(),
        mode: mode & 0o7777,
    })
}

fn hash(file: &File) -> std::io::Result<String> {
    use std::os::unix::fs::FileExt;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut offset = 0;
    loop {
        let n = file.read_at(&mut buffer, offset)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
        offset += n as u64;
    }
    Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// One trusted plugin.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trusted {
    /// Absolute path.
    pub path: PathBuf,
    /// SHA-256 of the file, in lower-case hexadecimal.
    pub sha256: String,
    /// The minor that was agreed when it was trusted.
    pub minor: u32,
}

/// Plugins that the user has trusted, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lockfile {
    /// Version of this file's layout: 1.
    pub version: u32,
    /// By the name in the plugin's header.
    pub plugins: BTreeMap<String, Trusted>,
}

/// A lockfile larger than this is no lockfile.
const MAX_LOCKFILE: u64 = 1 << 20;

impl Lockfile {
    /// Reads a lockfile; one that does not exist is empty.
    ///
    /// # Errors
    /// [`Error::Lockfile`]
    pub fn read(path: &Path) -> Result<Self> {
        let fail = |reason: String| Error::Lockfile {
            path: path.to_owned(),
            reason,
        };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self {
                    version: 1,
                    ..Self::default()
                });
            }
            Err(e) => return Err(fail(e.to_string())),
        };
        let mut text = String::new();
        file.take(MAX_LOCKFILE + 1)
            .read_to_string(&mut text)
            .map_err(|e| fail(e.to_string()))?;
        if text.len() as u64 > MAX_LOCKFILE {
            return Err(fail(format!("it is larger than {MAX_LOCKFILE} bytes")));
        }
        let lockfile: Self = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
        if lockfile.version != 1 {
            return Err(fail(format!(
                "version {} is unknown; this host reads 1",
                lockfile.version
            )));
        }
        Ok(lockfile)
    }

    /// Writes it, by way of a new file beside it.
    ///
    /// # Errors
    /// [`Error::Lockfile`]
    pub fn write(&self, path: &Path) -> Result<()> {
        let fail = |reason: String| Error::Lockfile {
            path: path.to_owned(),
            reason,
        };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|e| fail(e.to_string()))?;
        }
        let text = serde_json::to_string_pretty(self).map_err(|e| fail(e.to_string()))?;
        let new = path.with_extension("new");
        std::fs::write(&new, text).map_err(|e| fail(e.to_string()))?;
        std::fs::rename(&new, path).map_err(|e| fail(e.to_string()))
    }

    /// The trusted plugin of that name, opened, with the hash it was trusted by.
    ///
    /// # Errors
    /// [`Error::UnknownName`], [`Error::NotTrusted`], and those of [`Candidate::open`].
    pub fn open(&self, name: &str, lockfile: &Path) -> Result<Candidate> {
        let trusted = self.plugins.get(name).ok_or_else(|| Error::UnknownName {
            name: name.to_owned(),
            lockfile: lockfile.to_owned(),
        })?;
        let candidate = Candidate::open(&trusted.path)?;
        if candidate.sha256 != trusted.sha256 {
            return Err(Error::NotTrusted {
                path: candidate.path,
                expected: trusted.sha256.clone(),
                found: candidate.sha256,
            });
        }
        Ok(candidate)
    }
}
