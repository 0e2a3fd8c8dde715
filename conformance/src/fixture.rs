//! Models made for cases: a plan, an index, the canonical bytes, and a source that gives them.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hoist_backend::{
    BackendInfo, Chunk, Encoding, Error, FileIdentity, FloatLayout, IndexEntry, IndexLayout, LoadPlan,
    Mapping, MemoryByClass, Result, Role, Shape, Slot, SourceFile, SourceView, ValueChange, WeightBackend,
    WeightClass, WeightId, WeightPlan, WeightSource,
};

use crate::guard::{ReadOnly, Writable};
use crate::mutation::{Rule, holds};
use crate::{Expect, Failure, judge, oracle};

/// Weights in a segment of a quantised row, of which a backend may keep something: `docs/numerics.md` §1.
const SEGMENT_WEIGHTS: u64 = 256;

/// A weight as a case wants it.
#[derive(Clone, Debug)]
pub struct Weight {
    /// Layer, or `None` for weights of the whole model.
    pub layer: Option<u32>,
    /// What it is for.
    pub role: Role,
    /// Memory class.
    pub class: WeightClass,
    /// Encoding of the canonical bytes.
    pub encoding: Encoding,
    /// Canonical shape.
    pub shape: Shape,
    /// Canonical bytes.
    pub canonical: Vec<u8>,
    /// Where they come from.
    pub origin: Origin,
}

/// How a weight's canonical bytes stand in the source.
#[derive(Clone, Debug)]
pub enum Origin {
    /// As they are.
    Same,
    /// As `bytes` of a file, of which `views` (offsets relative to `bytes`) give source values, which `change` makes
    /// canonical.
    Changed {
        /// Bytes of the file.
        bytes: Vec<u8>,
        /// Views of them.
        views: Vec<SourceView>,
        /// What becomes of the values.
        change: ValueChange,
    },
}

impl Weight {
    /// A matrix of that encoding.
    pub fn matrix(
        layer: Option<u32>,
        role: Role,
        encoding: Encoding,
        shape: Shape,
        canonical: Vec<u8>,
    ) -> Self {
        Self {
            layer,
            role,
            class: WeightClass::of_matrix(encoding),
            encoding,
            shape,
            canonical,
            origin: Origin::Same,
        }
    }

    /// A norm vector or bias of those values.
    pub fn vector(layer: Option<u32>, role: Role, class: WeightClass, values: &[f32]) -> Self {
        Self {
            layer,
            role,
            class,
            encoding: Encoding::F32,
            shape: Shape::vector(values.len() as u64),
            canonical: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            origin: Origin::Same,
        }
    }

    /// A norm vector or bias that stands in the source as `from`: widened, and one added if `add_one`.
    ///
    /// # Errors
    /// If `from` is no float encoding.
    pub fn widened(
        layer: Option<u32>,
        role: Role,
        class: WeightClass,
        from: Encoding,
        source: Vec<u8>,
        add_one: bool,
    ) -> Result<Self> {
        let values = widen(from, &source)?;
        let values: Vec<f32> = values
            .into_iter()
            .map(|v| if add_one { v + 1.0 } else { v })
            .collect();
        let change = if add_one {
            ValueChange::WidenAddOne { from }
        } else {
            ValueChange::Widen { from }
        };
        Ok(Self {
            origin: Origin::Changed {
                views: vec![SourceView::contiguous(0, 0, source.len() as u64)],
                bytes: source,
                change,
            },
            ..Self::vector(layer, role, class, &values)
        })
    }
}

/// f32 values of float bytes, exactly.
fn widen(from: Encoding, bytes: &[u8]) -> Result<Vec<f32>> {
    let two = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match from {
        Encoding::F32 => Ok(bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect()),
        Encoding::F16 => Ok(two().map(oracle::f16_to_f32).collect()),
        Encoding::BF16 => Ok(two().map(|h| f32::from_bits(u32::from(h) << 16)).collect()),
        other => Err(Error::invalid("source encoding of a vector", "a float", other)),
    }
}

/// A whole model.
#[derive(Clone, Debug)]
pub struct Model {
    /// The plan for the backend that the model was built for.
    pub plan: LoadPlan,
    /// One entry for each weight, and those that were added.
    pub index: IndexLayout,
    /// Canonical bytes of each weight.
    pub canonical: Vec<Vec<u8>>,
    /// The file that the plan's views speak of.
    pub file: Vec<u8>,
}

impl Model {
    /// Plans weights for a backend, as the orchestrator would. `more`: index entries beyond one for each weight.
    ///
    /// # Errors
    /// For sizes past 2^64, and shapes that the encoding does not allow.
    pub fn new(info: &BackendInfo, layers: u32, weights: Vec<Weight>, more: Vec<IndexEntry>) -> Result<Self> {
        let overflow = || Error::invalid("a model of the suite", "sizes below 2^64", "more");
        let mut resident = MemoryByClass::default();
        let mut entries = Vec::new();
        let (mut plans, mut canonical, mut file) = (Vec::new(), Vec::new(), Vec::new());
        let mut source_bytes = 0;
        for (weight, id) in weights.into_iter().zip(0..) {
            let id = WeightId(id);
            let nbytes = weight.encoding.nbytes(weight.shape)?;
            if nbytes != weight.canonical.len() as u64 {
                return Err(Error::invalid(
                    "canonical bytes of a weight",
                    nbytes,
                    weight.canonical.len(),
                ));
            }
            // Float values are aligned in files, so that they can be used in place.
            file.resize(file.len().next_multiple_of(64), 0xEE);
            let at = file.len() as u64;
            let (views, change) = match &weight.origin {
                Origin::Same => {
                    file.extend_from_slice(&weight.canonical);
                    (vec![SourceView::contiguous(0, at, nbytes)], ValueChange::Keep)
                }
                Origin::Changed { bytes, views, change } => {
                    file.extend_from_slice(bytes);
                    let views = views
                        .iter()
                        .map(|v| SourceView {
                            offset: v.offset + at,
                            ..*v
                        })
                        .collect();
                    (views, *change)
                }
            };
            source_bytes += views.iter().map(SourceView::nbytes).sum::<u64>();
            let embeds = matches!(weight.role, Role::TokenEmbd | Role::PositionEmbd);
            let resident_bytes = resident_bytes(info, &weight).ok_or_else(overflow)?;
            let class = resident.class_mut(weight.class);
            *class = class.checked_add(resident_bytes).ok_or_else(overflow)?;
            entries.push(IndexEntry {
                layer: weight.layer,
                role: weight.role,
                slot: Slot::Present(id),
            });
            plans.push(WeightPlan {
                id,
                name: match weight.layer {
                    Some(layer) => format!("blk.{layer}.{}", weight.role),
                    None => weight.role.to_string(),
                },
                layer: weight.layer,
                role: weight.role,
                class: weight.class,
                encoding: weight.encoding,
                shape: weight.shape,
                nbytes,
                views,
                change,
                layout: if weight.class == WeightClass::Float && !embeds {
                    info.float_layout
                } else {
                    FloatLayout::OutIn
                },
                resident_bytes,
            });
            canonical.push(weight.canonical);
        }
        entries.extend(more);
        let index = IndexLayout { layers, entries };
        resident.index = (u64::from(layers) + 1)
            .checked_mul(Role::COUNT as u64)
            .and_then(|n| n.checked_mul(info.sizing.index_entry_bytes))
            .ok_or_else(overflow)?;
        Ok(Self {
            plan: LoadPlan {
                architecture: "conformance".into(),
                layers,
                nbytes: plans.iter().map(|w| w.nbytes).sum(),
                source_bytes,
                weights: plans,
                resident,
            },
            index,
            canonical,
            file,
        })
    }

    /// A source that gives the model from memory.
    ///
    /// # Errors
    /// A failure of the suite itself, if there is no memory.
    pub fn source(&self) -> std::result::Result<Source, Failure> {
        Source::new(self, None)
    }

    /// A source that gives the model from a file on disk.
    ///
    /// # Errors
    /// A failure of the suite itself, if the file cannot be written.
    pub fn file_source(&self) -> std::result::Result<Source, Failure> {
        let fail = |e: std::io::Error| Failure::new("a temporary file of the suite", "", "room for it", e);
        let mut file = tempfile::NamedTempFile::new().map_err(fail)?;
        file.write_all(&self.file).map_err(fail)?;
        file.flush().map_err(fail)?;
        Source::new(self, Some(file))
    }

    /// Uploads one chunk from a guarded buffer that is taken away when the call returns.
    ///
    /// # Errors
    /// What the backend returns.
    pub fn upload(
        &self,
        backend: &mut dyn WeightBackend,
        weight: usize,
        offset: usize,
        len: usize,
    ) -> std::result::Result<Result<()>, Failure> {
        let bytes = ReadOnly::new(&self.canonical[weight][offset..offset + len])?;
        let plan = &self.plan.weights[weight];
        let result = upload_bytes(backend, plan.class, plan.id, offset as u64, &bytes);
        // A pointer that was kept finds other bytes.
        drop(bytes.scribble());
        Ok(result)
    }

    /// Uploads everything, each weight as one chunk.
    ///
    /// # Errors
    /// The first upload that fails.
    pub fn upload_all(&self, backend: &mut dyn WeightBackend) -> std::result::Result<(), Failure> {
        for (i, plan) in self.plan.weights.iter().enumerate() {
            self.upload(backend, i, 0, self.canonical[i].len())?
                .succeeds(format!("upload of `{}`", plan.name))?;
        }
        Ok(())
    }

    /// `begin_load`, everything uploaded, `finish_load`.
    ///
    /// # Errors
    /// The first call that fails, and a receipt that is wrong.
    pub fn load(&self, backend: &mut dyn WeightBackend) -> std::result::Result<(), Failure> {
        backend.begin_load(&self.plan).succeeds("begin_load")?;
        self.upload_all(backend)?;
        let receipt = backend.finish_load().succeeds("finish_load")?;
        judge::equal(
            "weights that finish_load vouches for",
            self.plan.weights.len(),
            receipt.weights as usize,
        )
    }

    /// Demands that `read_back` gives the canonical bytes of every weight.
    ///
    /// # Errors
    /// The first byte that differs.
    pub fn check_read_back(&self, backend: &mut dyn WeightBackend) -> std::result::Result<(), Failure> {
        for (plan, canonical) in self.plan.weights.iter().zip(&self.canonical) {
            let what = format!("read_back of `{}` ({} {})", plan.name, plan.encoding, plan.shape);
            let mut out = Writable::new(canonical.len())?;
            backend.read_back(plan.id, 0, &mut out).succeeds(what.as_str())?;
            out.check(&what)?;
            judge::bytes(&what, canonical, &out)?;
            let digest = backend.digest(plan.id).succeeds("digest")?;
            if let Some(digest) = digest.filter(|_| holds(Rule::DigestIsCompared)) {
                let expected = *blake3::hash(canonical).as_bytes();
                judge::bytes(
                    &format!("digest of `{}` ({})", plan.name, plan.encoding),
                    &expected,
                    &digest,
                )?;
            }
        }
        Ok(())
    }
}

/// Calls the upload for a class.
///
/// # Errors
/// What the backend returns.
pub fn upload_bytes(
    backend: &mut dyn WeightBackend,
    class: WeightClass,
    weight: WeightId,
    offset: u64,
    bytes: &[u8],
) -> Result<()> {
    let chunk = Chunk {
        weight,
        offset,
        bytes,
    };
    match class {
        WeightClass::Quantized => backend.upload_quantized(chunk),
        WeightClass::Float | WeightClass::Bias => backend.upload_f32(chunk),
        WeightClass::Gamma => backend.upload_gamma(chunk),
    }
}

/// Bytes on the device, by the backend's own [`hoist_backend::Sizing`].
fn resident_bytes(info: &BackendInfo, weight: &Weight) -> Option<u64> {
    let sizing = &info.sizing;
    let beside = if weight.class == WeightClass::Quantized {
        let segments = weight.shape.cols.div_ceil(SEGMENT_WEIGHTS);
        let row = segments
            .checked_mul(sizing.quantized_segment_bytes)?
            .checked_add(sizing.quantized_row_bytes)?;
        weight
            .shape
            .matrices
            .checked_mul(weight.shape.rows)?
            .checked_mul(row)?
    } else {
        0
    };
    (weight.canonical.len() as u64)
        .checked_add(beside)?
        .checked_next_multiple_of(sizing.weight_alignment.max(1))
}

/// A model's source. Counts its calls, and fails one of them on request.
pub struct Source {
    canonical: Vec<Vec<u8>>,
    files: Vec<SourceFile>,
    mapping: Arc<ReadOnly>,
    /// Deleted when dropped.
    on_disk: Option<tempfile::NamedTempFile>,
    /// Calls of `read_at` so far.
    pub reads: AtomicU64,
    /// The call of `read_at`, counted from 0, from which on it fails; and any call for the files' bytes after it was
    /// set is refused, so that the backend has to call.
    pub fail_from: Option<u64>,
}

impl Source {
    fn new(model: &Model, on_disk: Option<tempfile::NamedTempFile>) -> std::result::Result<Self, Failure> {
        let fail = |e: std::io::Error| Failure::new("a temporary file of the suite", "", "to be opened", e);
        let len = model.file.len() as u64;
        let file = match &on_disk {
            None => SourceFile {
                path: PathBuf::from("memory"),
                len,
                file: None,
                identity: None,
            },
            Some(on_disk) => {
                use std::os::unix::fs::MetadataExt;
                let file = File::open(on_disk.path()).map_err(fail)?;
                let data = file.metadata().map_err(fail)?;
                SourceFile {
                    path: on_disk.path().to_owned(),
                    len,
                    identity: Some(FileIdentity {
                        device: data.dev(),
                        inode: data.ino(),
                        len: data.len(),
                        modified_ns: i128::from(data.mtime()) * 1_000_000_000 + i128::from(data.mtime_nsec()),
                    }),
                    file: Some(Arc::new(file)),
                }
            }
        };
        Ok(Self {
            canonical: model.canonical.clone(),
            files: vec![file],
            mapping: Arc::new(ReadOnly::new(&model.file)?),
            on_disk,
            reads: AtomicU64::new(0),
            fail_from: None,
        })
    }

    /// Makes calls of `read_at` fail from the `n`-th on, and offers no other way to the bytes.
    #[must_use]
    pub fn failing_from(mut self, n: u64) -> Self {
        self.fail_from = Some(n);
        for file in &mut self.files {
            file.file = None;
        }
        self
    }
}

impl Source {
    /// Cuts the file on disk, after its plan was made.
    ///
    /// # Errors
    /// A failure of the suite itself.
    pub fn cut_by(self, bytes: u64) -> std::result::Result<Self, Failure> {
        if let Some(on_disk) = &self.on_disk {
            let len = self.files.first().map_or(0, |f| f.len);
            on_disk
                .as_file()
                .set_len(len.saturating_sub(bytes))
                .map_err(|e| Failure::new("a temporary file of the suite", "", "to be cut", e))?;
        }
        Ok(self)
    }
}

impl WeightSource for Source {
    fn read_at(&self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        let call = self.reads.fetch_add(1, Ordering::Relaxed);
        if self.fail_from.is_some_and(|n| call >= n) {
            return Err(Error::SourceIo {
                file: "memory".into(),
                offset,
                len: out.len() as u64,
                error: std::io::Error::other("this read fails on purpose"),
            });
        }
        let bytes = self.canonical.get(weight.index()).ok_or(Error::UnknownWeight {
            weight,
            weights: self.canonical.len(),
        })?;
        let range = usize::try_from(offset)
            .ok()
            .and_then(|start| bytes.get(start..start.checked_add(out.len())?));
        let range = range.ok_or_else(|| {
            Error::invalid(
                "range to read",
                format!("one within {}", bytes.len()),
                format!("{offset} + {}", out.len()),
            )
        })?;
        out.copy_from_slice(range);
        Ok(())
    }

    fn files(&self) -> &[SourceFile] {
        &self.files
    }

    fn share(&self, file: u32) -> Option<Arc<dyn Mapping>> {
        (file == 0 && self.fail_from.is_none()).then(|| self.mapping.clone() as Arc<dyn Mapping>)
    }

    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }
}
