//! Canonical bytes from the files of a manifest.

mod mapping;
mod read;
mod view;

use std::sync::{Arc, OnceLock};

use hoist_backend::{
    Encoding, Error, FileIdentity, LoadPlan, Mapping, Result, SourceFile, ValueChange, WeightId, WeightSource,
};
use hoist_formats::Manifest;

use self::read::Bytes;
use self::view::Views;

/// Reads the weights of a plan from the files of its manifest, by position and never through a mapping, so that a file
/// that shrinks is an error and not a signal.
pub struct FileSource {
    files: Vec<SourceFile>,
    bytes: Vec<Bytes>,
    mappings: Vec<OnceLock<Option<Arc<dyn Mapping>>>>,
    weights: Vec<SourceWeight>,
}

struct SourceWeight {
    nbytes: u64,
    change: ValueChange,
    views: Views,
}

impl FileSource {
    /// A source of the plan's weights.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a view reaches past its file, or a file is neither open nor in memory.
    pub fn new(manifest: &Manifest, plan: &LoadPlan) -> Result<Self> {
        let bytes = manifest
            .shards
            .iter()
            .map(|shard| {
                let name = || shard.source.path.display().to_string();
                match (&shard.memory, &shard.source.file) {
                    (Some(memory), _) if memory.len() as u64 == shard.source.len => {
                        Ok(Bytes::Memory(Arc::clone(memory)))
                    }
                    (Some(memory), _) => Err(Error::invalid(
                        format!("length of `{}` in memory", name()),
                        shard.source.len,
                        memory.len(),
                    )),
                    (None, Some(file)) => Ok(Bytes::File(Arc::clone(file))),
                    (None, None) => Err(Error::invalid(
                        format!("bytes of `{}`", name()),
                        "an open file or memory",
                        "neither",
                    )),
                }
            })
            .collect::<Result<Vec<_>>>()?;
        let files: Vec<_> = manifest.shards.iter().map(|s| s.source.clone()).collect();
        let weights = plan
            .weights
            .iter()
            .map(|weight| {
                Ok(SourceWeight {
                    nbytes: weight.nbytes,
                    change: weight.change,
                    views: Views::new(&weight.name, &weight.views, &files)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            mappings: files.iter().map(|_| OnceLock::new()).collect(),
            files,
            bytes,
            weights,
        })
    }

    fn weight(&self, id: WeightId) -> Result<&SourceWeight> {
        self.weights.get(id.index()).ok_or(Error::UnknownWeight {
            weight: id,
            weights: self.weights.len(),
        })
    }

    /// Fills `out` with source bytes of `weight` from `offset` on: views and strides applied, values not changed yet.
    ///
    /// # Errors
    /// As [`WeightSource::read_at`].
    pub fn read_unchanged_at(&self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        let w = self.weight(weight)?;
        check_range(offset, out.len(), w.views.nbytes())?;
        self.read_views(w, offset, out)
    }

    fn read_views(&self, weight: &SourceWeight, offset: u64, out: &mut [u8]) -> Result<()> {
        weight.views.read(offset, out, |file, at, buffer| {
            let file = file as usize;
            self.bytes[file].read_exact_at(&self.files[file], at, buffer)
        })
    }

    /// Canonical f32 bytes from source values of `from`, any range.
    fn read_widened(
        &self,
        weight: &SourceWeight,
        from: Encoding,
        add: Option<f32>,
        offset: u64,
        out: &mut [u8],
    ) -> Result<()> {
        const VALUES: usize = 2048;
        let width = match from {
            Encoding::F16 | Encoding::BF16 => 2,
            _ => 4,
        };
        let mut source = [0u8; VALUES * 4];
        let (mut offset, mut out) = (offset, out);
        while !out.is_empty() {
            // A range may start or end within a value.
            let skip = (offset % 4) as usize;
            let values = (skip + out.len()).div_ceil(4).min(VALUES);
            let source = &mut source[..values * width];
            self.read_views(weight, offset / 4 * width as u64, source)?;
            let len = (values * 4 - skip).min(out.len());
            let (now, rest) = out.split_at_mut(len);
            let mut canonical = source
                .chunks_exact(width)
                .map(|value| widen(from, value))
                .map(|value| add.map_or(value, |add| value + add))
                .flat_map(f32::to_le_bytes)
                .skip(skip);
            now.iter_mut()
                .zip(&mut canonical)
                .for_each(|(out, byte)| *out = byte);
            offset += len as u64;
            out = rest;
        }
        Ok(())
    }
}

/// The f32 that a little-endian source value stands for, exactly.
fn widen(from: Encoding, value: &[u8]) -> f32 {
    match *value {
        [a, b] if from == Encoding::BF16 => f32::from_bits(u32::from(u16::from_le_bytes([a, b])) << 16),
        [a, b] => half::f16::from_le_bytes([a, b]).to_f32(),
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
        _ => unreachable!("a value has two or four bytes"),
    }
}

fn check_range(offset: u64, len: usize, nbytes: u64) -> Result<()> {
    match offset.checked_add(len as u64) {
        Some(end) if end <= nbytes => Ok(()),
        _ => Err(Error::invalid(
            "range of a weight",
            format!("within its {nbytes} bytes"),
            format!("{len} bytes at {offset}"),
        )),
    }
}

impl WeightSource for FileSource {
    fn read_at(&self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        let w = self.weight(weight)?;
        check_range(offset, out.len(), w.nbytes)?;
        match w.change {
            ValueChange::Keep => self.read_views(w, offset, out),
            ValueChange::Widen { from } => self.read_widened(w, from, None, offset, out),
            ValueChange::WidenAddOne { from } => self.read_widened(w, from, Some(1.0), offset, out),
        }
    }

    fn files(&self) -> &[SourceFile] {
        &self.files
    }

    fn share(&self, file: u32) -> Option<Arc<dyn Mapping>> {
        let file = file as usize;
        self.mappings
            .get(file)?
            .get_or_init(|| match &self.bytes[file] {
                Bytes::Memory(memory) => Some(mapping::of_memory(Arc::clone(memory))),
                Bytes::File(open) => mapping::of_file(open, self.files[file].len),
            })
            .clone()
    }

    fn check_unchanged(&self) -> Result<()> {
        for source in &self.files {
            let (Some(file), Some(identity)) = (&source.file, &source.identity) else {
                continue;
            };
            let changed = |what, expected: String, found: String| Error::SourceChanged {
                file: source.path.display().to_string(),
                what,
                expected,
                found,
            };
            let path_now = || format!("`{}` on disk", source.path.display());
            for (seen, is_path) in [(file.metadata(), false), (std::fs::metadata(&source.path), true)] {
                let now = match seen {
                    Ok(metadata) => read::identity(&metadata),
                    Err(error) => return Err(changed("its path", path_now(), error.to_string())),
                };
                if is_path && (now.device, now.inode) != (identity.device, identity.inode) {
                    let place = |i: &FileIdentity| format!("inode {} of device {}", i.inode, i.device);
                    return Err(changed("its inode", place(identity), place(&now)));
                }
                if now.len != identity.len {
                    return Err(changed(
                        "its length",
                        identity.len.to_string(),
                        now.len.to_string(),
                    ));
                }
                if now.modified_ns != identity.modified_ns {
                    return Err(changed(
                        "its modification time",
                        format!("{} ns", identity.modified_ns),
                        format!("{} ns", now.modified_ns),
                    ));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
