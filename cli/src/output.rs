//! Files that a command writes: whole, or not at all.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use tempfile::NamedTempFile;

/// A file to be written. Until it is kept, what was at its path before stays there.
#[derive(Debug)]
pub(crate) struct Output {
    path: PathBuf,
    to: To,
}

#[derive(Debug)]
enum To {
    /// A new file beside the one that it replaces.
    Beside(io::BufWriter<NamedTempFile>, PathBuf),
    /// A pipe or device, which cannot be replaced.
    Direct(io::BufWriter<File>),
}

impl Output {
    /// Makes sure that `path` can be written, and changes nothing there yet.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let to = open(path).with_context(|| format!("creating `{}`", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            to,
        })
    }

    /// Refuses a path that cannot be written, and leaves everything as it is: for commands that may be ended by a signal
    /// before they have anything to write.
    pub(crate) fn check(path: &Path) -> Result<()> {
        // Opening a pipe would wait for its reader and then leave it.
        let special = std::fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir());
        if special {
            return Ok(());
        }
        Self::create(path).map(drop)
    }

    /// Puts what was written at the path.
    pub(crate) fn keep(mut self) -> Result<()> {
        self.flush()
            .and_then(|()| match self.to {
                To::Direct(_) => Ok(()),
                To::Beside(file, place) => {
                    let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
                    file.persist(place).map(drop).map_err(|e| e.error)
                }
            })
            .with_context(|| format!("writing `{}`", self.path.display()))
    }

    /// Writes all of a file at once.
    pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
        let mut file = Self::create(path)?;
        file.append(bytes)?;
        file.keep()
    }

    /// Appends bytes.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let written = match &mut self.to {
            To::Beside(file, _) => file.write_all(bytes),
            To::Direct(file) => file.write_all(bytes),
        };
        written.with_context(|| format!("writing `{}`", self.path.display()))
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.to {
            To::Beside(file, _) => file.flush(),
            To::Direct(file) => file.flush(),
        }
    }
}

fn open(path: &Path) -> io::Result<To> {
    let found = match std::fs::metadata(path) {
        Ok(found) => Some(found),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    // `/dev/stdout` may be a file too, and is to stay the one that it is.
    let special = path.starts_with("/dev") || path.starts_with("/proc");
    if special || found.as_ref().is_some_and(|f| !f.is_file()) {
        let file = File::options().write(true).create(!special).open(path)?;
        return Ok(To::Direct(io::BufWriter::new(file)));
    }
    // A link stays a link: what it points to is replaced.
    let place = match found {
        Some(_) => std::fs::canonicalize(path)?,
        None => std::path::absolute(path)?,
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".hoist-");
    match found {
        Some(found) => {
            // Refuses what the user may not write, which replacing would not.
            File::options().write(true).open(&place)?;
            builder.permissions(found.permissions());
        }
        None => {
            builder.permissions(fresh());
        }
    }
    let folder = place.parent().unwrap_or(Path::new("/"));
    let file = builder.tempfile_in(folder)?;
    Ok(To::Beside(io::BufWriter::new(file), place))
}

/// What any new file gets, less what the user's mask takes away.
fn fresh() -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o666)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_when_it_is_kept_and_not_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        std::fs::write(&path, "before").unwrap();
        let mut output = Output::create(&path).unwrap();
        output.append(b"half").unwrap();
        drop(output);
        assert_eq!(std::fs::read(&path).unwrap(), b"before");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        Output::write_whole(&path, b"after").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"after");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_link_stays_a_link_and_a_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        std::fs::write(&file, "before").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        Output::write_whole(&link, b"after").unwrap();
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(std::fs::read(&file).unwrap(), b"after");
        assert!(Output::create(folder.path()).is_err());
        assert!(Output::create(&folder.path().join("no/such")).is_err());
    }
}
