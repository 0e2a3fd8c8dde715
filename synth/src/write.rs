use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;

use hoist_backend::Encoding;
use hoist_formats::write::{Layout, SafeTensorsBuilder};
use tempfile::NamedTempFile;

use crate::blocks::{self, Spread};
use crate::rng::Rng;
use crate::shape::{Arch, ModelShape};
use crate::tensors::{Part, Tensor, gguf_name, hugging_face_name, tensors};
use crate::{Mix, metadata};

/// What kind of file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// One GGUF file.
    Gguf,
    /// A Hugging Face folder: `config.json` and `model.safetensors`. F32, F16 and BF16 only.
    SafeTensors,
}

/// What to write.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Dimensions.
    pub shape: &'a ModelShape,
    /// Encodings.
    pub mix: Mix,
    /// Kind of file.
    pub container: Container,
    /// Seed of the weights.
    pub seed: u64,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The file with the weights.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// Tensors in it.
    pub tensors: usize,
    /// BLAKE3 of the whole file.
    pub blake3: [u8; 32],
}

/// Why nothing was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant's message names its fields")]
pub enum Error {
    /// SafeTensors has no quantised encodings.
    #[error("a SafeTensors file cannot hold {mix}; use f32, f16 or bf16")]
    NotInSafeTensors { mix: String },
    /// The layout is refused by its format.
    #[error(transparent)]
    Format(#[from] hoist_formats::Error),
    /// Writing failed.
    #[error("cannot write `{path}`: {error}")]
    Io { path: PathBuf, error: std::io::Error },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

/// A tensor with a place in the file.
struct Placed {
    offset: u64,
    nbytes: u64,
    encoding: Encoding,
    spread: Spread,
}

/// A run of whole blocks of one tensor, made with a generator of its own.
struct Chunk {
    tensor: usize,
    number: u64,
    offset: u64,
    len: usize,
}

/// Writes a model; `progress` is told bytes done and bytes in all.
///
/// # Errors
/// [`Error::NotInSafeTensors`], [`Error::Format`], [`Error::Io`].
pub fn write(options: Options<'_>, out: &Path, progress: &dyn Fn(u64, u64)) -> Result<Summary, Error> {
    write_unless(options, out, progress, &|| false)
}

/// As [`write`], unless `cancelled` says that it is to stop. What is not written whole is not there: files get their names
/// last, and what had them before stays until then.
///
/// # Errors
/// Those of [`write`], and [`Error::Cancelled`].
pub fn write_unless(
    options: Options<'_>,
    out: &Path,
    progress: &dyn Fn(u64, u64),
    cancelled: &dyn Fn() -> bool,
) -> Result<Summary, Error> {
    let Options {
        shape,
        mix,
        container,
        seed,
    } = options;
    let list = tensors(shape);
    let (layout, spreads, path, config) = match container {
        Container::Gguf => {
            let mut builder = metadata::gguf(shape, seed);
            let mut spreads = Vec::new();
            for t in &list {
                builder = builder.tensor(gguf_name(t), mix.encoding(shape, t), dimensions(t));
                spreads.push(t.spread(shape, false));
            }
            (builder.layout()?, spreads, out.to_owned(), None)
        }
        Container::SafeTensors => {
            let (layout, spreads, dtype) = safe_tensors(shape, mix, &list)?;
            std::fs::create_dir_all(out).map_err(|error| Error::Io {
                path: out.to_owned(),
                error,
            })?;
            let text = format!("{:#}\n", metadata::config(shape, dtype));
            let config = NewFile::begin(out.join("config.json"))?;
            config.write_at(text.as_bytes(), 0)?;
            (layout, spreads, out.join("model.safetensors"), Some(config))
        }
    };
    // Slots are in the order in which the tensors were given.
    let placed = layout.slots.iter().zip(spreads).map(|(slot, spread)| Placed {
        offset: slot.offset,
        nbytes: slot.nbytes,
        encoding: slot.encoding,
        spread,
    });
    let placed: Vec<Placed> = placed.collect();
    let file = NewFile::begin(path.clone())?;
    let blake3 = fill(&file, &layout, &placed, seed, progress, cancelled)?;
    config.map_or(Ok(()), NewFile::keep)?;
    file.keep()?;
    Ok(Summary {
        path,
        bytes: layout.file_len,
        tensors: placed.len(),
        blake3,
    })
}

fn dimensions(t: &Tensor) -> Vec<u64> {
    let (m, r, c) = (u64::from(t.matrices), u64::from(t.rows), u64::from(t.cols));
    if t.is_vector() {
        vec![c]
    } else if t.matrices > 1 {
        vec![m, r, c]
    } else {
        vec![r, c]
    }
}

fn safe_tensors(
    shape: &ModelShape,
    mix: Mix,
    list: &[Tensor],
) -> Result<(Layout, Vec<Spread>, &'static str), Error> {
    let (encoding, dtype) = match mix {
        Mix::All(Encoding::F32) => (Encoding::F32, "float32"),
        Mix::All(Encoding::F16) => (Encoding::F16, "float16"),
        Mix::All(Encoding::BF16) => (Encoding::BF16, "bfloat16"),
        Mix::All(other) => {
            return Err(Error::NotInSafeTensors {
                mix: other.to_string(),
            });
        }
        Mix::Q4KM => return Err(Error::NotInSafeTensors { mix: "q4_k_m".into() }),
    };
    let mut builder = SafeTensorsBuilder::new().meta("format", "pt");
    let mut spreads = Vec::new();
    for t in list {
        // GPT-2's Conv1D matrices are `[in, out]`.
        let transposed = shape.arch == Arch::Gpt2
            && matches!(
                t.part,
                Part::AttnQkv | Part::AttnOutput | Part::FfnUp | Part::FfnDown
            );
        let mut dims = dimensions(&Tensor {
            matrices: 1,
            ..t.clone()
        });
        if transposed {
            dims.reverse();
        }
        for expert in 0..t.matrices {
            builder = builder.tensor(hugging_face_name(shape.arch, t, expert), encoding, dims.clone());
            spreads.push(t.spread(shape, true));
        }
    }
    Ok((builder.layout()?, spreads, dtype))
}

/// Bytes of a chunk, about: what fits a core's cache.
const CHUNK_BYTES: u64 = 1 << 20;

fn chunks(placed: &[Placed]) -> Vec<Chunk> {
    let mut list = Vec::new();
    for (tensor, p) in placed.iter().enumerate() {
        let block = p.encoding.block_bytes();
        let step = CHUNK_BYTES / block * block;
        let (mut done, mut number) = (0, 0);
        while done < p.nbytes {
            let len = step.min(p.nbytes - done);
            list.push(Chunk {
                tensor,
                number,
                offset: p.offset + done,
                len: len as usize,
            });
            done += len;
            number += 1;
        }
    }
    list
}

/// A file that gets its name last.
struct NewFile {
    path: PathBuf,
    file: NamedTempFile,
    /// Where it will be: a link stays a link.
    place: PathBuf,
}

impl NewFile {
    fn begin(path: PathBuf) -> Result<Self, Error> {
        let begin = || -> std::io::Result<(NamedTempFile, PathBuf)> {
            let place = match std::fs::metadata(&path) {
                Ok(found) if !found.is_file() => {
                    return Err(std::io::Error::other("what is there is no regular file"));
                }
                Ok(_) => std::fs::canonicalize(&path)?,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => std::path::absolute(&path)?,
                Err(error) => return Err(error),
            };
            // What any new file gets, less what the user's mask takes away.
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
            let mut builder = tempfile::Builder::new();
            builder.prefix(".hoist-").permissions(permissions);
            let file = builder.tempfile_in(place.parent().unwrap_or(Path::new("/")))?;
            Ok((file, place))
        };
        match begin() {
            Ok((file, place)) => Ok(Self { path, file, place }),
            Err(error) => Err(Error::Io { path, error }),
        }
    }

    fn error(&self, error: std::io::Error) -> Error {
        Error::Io {
            path: self.path.clone(),
            error,
        }
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), Error> {
        let written = self.file.as_file().write_all_at(bytes, offset);
        written.map_err(|error| self.error(error))
    }

    fn keep(self) -> Result<(), Error> {
        let Self { path, file, place } = self;
        match file.persist(place) {
            Ok(_) => Ok(()),
            Err(failed) => Err(Error::Io {
                path,
                error: failed.error,
            }),
        }
    }
}

/// Threads make and write chunks where they belong, while this one hashes them in order.
fn fill(
    new: &NewFile,
    layout: &Layout,
    placed: &[Placed],
    seed: u64,
    progress: &dyn Fn(u64, u64),
    cancelled: &dyn Fn() -> bool,
) -> Result<[u8; 32], Error> {
    let io = |error| new.error(error);
    let file = new.file.as_file();
    file.set_len(layout.file_len).map_err(io)?;
    new.write_at(&layout.header, 0)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&layout.header);
    let chunks = chunks(placed);
    let next = AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut end = layout.header.len() as u64;
    std::thread::scope(|scope| {
        // Chunks that are made and not hashed yet: bounded, so that memory is.
        let (made, ready) = sync_channel::<(usize, std::io::Result<Vec<u8>>)>(4 * workers);
        for _ in 0..workers {
            let (made, chunks, next) = (made.clone(), &chunks, &next);
            scope.spawn(move || {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(chunk) = chunks.get(i) else { return };
                    let p = &placed[chunk.tensor];
                    let mut bytes = vec![0; chunk.len];
                    let mut rng = Rng::new(seed, chunk.tensor as u64, chunk.number);
                    blocks::fill(p.encoding, p.spread, &mut rng, &mut bytes);
                    let written = file.write_all_at(&bytes, chunk.offset).map(|()| bytes);
                    // The receiver is gone only after an error, which ends the work.
                    if made.send((i, written)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(made);
        let mut early = BTreeMap::new();
        for (i, chunk) in chunks.iter().enumerate() {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            let bytes = loop {
                if let Some(bytes) = early.remove(&i) {
                    break bytes;
                }
                match ready.recv() {
                    Ok((n, bytes)) => early.insert(n, bytes),
                    Err(_) => {
                        return Err(io(std::io::Error::other(
                            "a thread that makes weights ended early",
                        )));
                    }
                };
            };
            let bytes = bytes.map_err(io)?;
            pad(&mut hasher, chunk.offset - end);
            hasher.update(&bytes);
            end = chunk.offset + bytes.len() as u64;
            progress(end, layout.file_len);
        }
        Ok(())
    })?;
    pad(&mut hasher, layout.file_len - end);
    Ok(*hasher.finalize().as_bytes())
}

/// Hashes the zeros between tensors.
fn pad(hasher: &mut blake3::Hasher, len: u64) {
    for _ in 0..len {
        hasher.update(&[0]);
    }
}
