//! Builds plans and sources without a model file.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hoist_backend::*;

/// A generator of repeatable numbers (splitmix64).
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform in −1 … 1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// Random canonical bytes of a weight: small floats, or blocks with ordinary scales.
pub(crate) fn random_bytes(random: &mut Random, encoding: Encoding, shape: Shape) -> Vec<u8> {
    let n = encoding.nbytes(shape).unwrap() as usize;
    match encoding {
        Encoding::F32 => (0..n / 4)
            .flat_map(|_| (random.unit() * 0.2).to_le_bytes())
            .collect(),
        Encoding::F16 => (0..n / 2)
            .flat_map(|_| half::f16::from_f32(random.unit() * 0.2).to_le_bytes())
            .collect(),
        Encoding::BF16 => (0..n / 2)
            .flat_map(|_| half::bf16::from_f32(random.unit() * 0.2).to_le_bytes())
            .collect(),
        _ => {
            let mut bytes: Vec<u8> = (0..n).map(|_| random.next() as u8).collect();
            // Weights of about 0.1, whatever the sub-scales do.
            let reach = match encoding {
                Encoding::Q4_K | Encoding::Q5_K | Encoding::Q3_K => 400.0,
                Encoding::Q6_K => 2000.0,
                Encoding::Q8_0 => 100.0,
                _ => 10.0,
            };
            let d = (0.2 + 0.1 * random.unit()) / reach;
            let scale = half::f16::from_f32(d).to_le_bytes();
            // Centred.
            let min = half::f16::from_f32(-7.5 * d).to_le_bytes();
            let block = encoding.block_bytes() as usize;
            for b in bytes.chunks_exact_mut(block) {
                // Where each of these encodings has its f16 scales.
                match encoding {
                    Encoding::Q4_0 | Encoding::Q8_0 => {
                        b[..2].copy_from_slice(&scale);
                    }
                    Encoding::Q4_1 => {
                        b[..2].copy_from_slice(&scale);
                        b[2..4].copy_from_slice(&min);
                    }
                    Encoding::Q4_K | Encoding::Q5_K => {
                        b[..2].copy_from_slice(&scale);
                        b[2..4].copy_from_slice(&scale);
                    }
                    Encoding::Q6_K => b[208..].copy_from_slice(&scale),
                    Encoding::Q3_K => b[108..].copy_from_slice(&scale),
                    Encoding::APR_Q8 => {}
                    other => panic!("no random blocks of {other}"),
                }
            }
            if encoding == Encoding::APR_Q8 {
                let matrix = n / shape.matrices as usize;
                for m in bytes.chunks_exact_mut(matrix) {
                    m[..4].copy_from_slice(&0.002f32.to_le_bytes());
                }
            }
            bytes
        }
    }
}

/// A weight to be.
#[derive(Clone, Debug)]
pub(crate) struct Weight {
    pub(crate) layer: Option<u32>,
    pub(crate) role: Role,
    pub(crate) class: WeightClass,
    pub(crate) encoding: Encoding,
    pub(crate) shape: Shape,
    pub(crate) layout: FloatLayout,
    pub(crate) bytes: Vec<u8>,
}

impl Weight {
    pub(crate) fn matrix(
        layer: Option<u32>,
        role: Role,
        encoding: Encoding,
        shape: Shape,
        random: &mut Random,
    ) -> Self {
        Self {
            layer,
            role,
            class: WeightClass::of_matrix(encoding),
            encoding,
            shape,
            layout: FloatLayout::OutIn,
            bytes: random_bytes(random, encoding, shape),
        }
    }

    pub(crate) fn vector(layer: Option<u32>, role: Role, class: WeightClass, values: &[f32]) -> Self {
        Self {
            layer,
            role,
            class,
            encoding: Encoding::F32,
            shape: Shape::vector(values.len() as u64),
            layout: FloatLayout::OutIn,
            bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }
}

/// A model in a temporary file.
pub(crate) struct Model {
    pub(crate) weights: Vec<Weight>,
    pub(crate) plan: LoadPlan,
    pub(crate) files: Vec<SourceFile>,
    pub(crate) dir: tempfile::TempDir,
    /// Whether `share` maps files.
    pub(crate) mappable: bool,
}

fn align(n: u64) -> u64 {
    n.next_multiple_of(64)
}

impl Model {
    /// Writes the weights one after the other, each `misalign` bytes past a multiple of 64.
    pub(crate) fn new(weights: Vec<Weight>, misalign: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path: PathBuf = dir.path().join("model");
        let mut file = std::fs::File::create(&path).unwrap();
        let mut at = 0u64;
        let mut plans = Vec::new();
        let mut resident = MemoryByClass::default();
        for (i, w) in weights.iter().enumerate() {
            let start = align(at) + misalign;
            file.write_all(&vec![0xFF; (start - at) as usize]).unwrap();
            file.write_all(&w.bytes).unwrap();
            at = start + w.bytes.len() as u64;
            let side = if w.class == WeightClass::Quantized {
                // Two bytes a row, and two more for each of its segments.
                w.shape.matrices * w.shape.rows * (2 + 2 * w.shape.cols.div_ceil(256))
            } else {
                0
            };
            let resident_bytes = align(w.bytes.len() as u64 + side);
            *resident.class_mut(w.class) += resident_bytes;
            plans.push(WeightPlan {
                id: WeightId(i as u32),
                name: format!("{}.{}", w.layer.map_or(-1, i64::from), w.role),
                layer: w.layer,
                role: w.role,
                class: w.class,
                encoding: w.encoding,
                shape: w.shape,
                nbytes: w.bytes.len() as u64,
                views: vec![SourceView::contiguous(0, start, w.bytes.len() as u64)],
                change: ValueChange::Keep,
                layout: w.layout,
                resident_bytes,
            });
        }
        drop(file);
        let nbytes = weights.iter().map(|w| w.bytes.len() as u64).sum();
        let layers = weights.iter().filter_map(|w| w.layer).max().map_or(0, |l| l + 1);
        let file = Arc::new(std::fs::File::open(&path).unwrap());
        Self {
            weights,
            plan: LoadPlan {
                architecture: "test".into(),
                layers,
                weights: plans,
                resident,
                nbytes,
                source_bytes: nbytes,
            },
            files: vec![SourceFile {
                path,
                len: at,
                file: Some(file),
                identity: None,
            }],
            dir,
            mappable: true,
        }
    }

    pub(crate) fn layout(&self) -> IndexLayout {
        IndexLayout {
            layers: self.plan.layers,
            entries: self
                .plan
                .weights
                .iter()
                .map(|w| IndexEntry {
                    layer: w.layer,
                    role: w.role,
                    slot: Slot::Present(w.id),
                })
                .collect(),
        }
    }
}

struct Bytes(Vec<u8>, usize);

impl Mapping for Bytes {
    fn bytes(&self) -> &[u8] {
        &self.0[self.1..]
    }
}

impl WeightSource for Model {
    fn read_at(&self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        let bytes = &self.weights[weight.index()].bytes;
        let offset = offset as usize;
        out.copy_from_slice(&bytes[offset..offset + out.len()]);
        Ok(())
    }

    fn files(&self) -> &[SourceFile] {
        &self.files
    }

    fn share(&self, file: u32) -> Option<Arc<dyn Mapping>> {
        let file = &self.files[file as usize];
        if !self.mappable {
            return None;
        }
        // A copy at an address that is a multiple of 64, as a mapping's is.
        let mut bytes = vec![0; file.len as usize + 64];
        let shift = bytes.as_ptr().align_offset(64);
        file.file
            .as_ref()?
            .read_exact_at(&mut bytes[shift..shift + file.len as usize], 0)
            .ok()?;
        bytes.truncate(shift + file.len as usize);
        Some(Arc::new(Bytes(bytes, shift)))
    }

    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }
}

/// Counts bytes and cancels when asked.
#[derive(Default)]
pub(crate) struct Watch {
    pub(crate) cancel_after: Option<u64>,
    pub(crate) done: AtomicU64,
    pub(crate) cancelled: AtomicBool,
}

impl LoadWatch for Watch {
    fn progress(&self, progress: Progress) {
        self.done.fetch_max(progress.done, Ordering::Relaxed);
        if self.cancel_after.is_some_and(|n| progress.done >= n) {
            self.cancelled.store(true, Ordering::Relaxed);
        }
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// Loads and indexes a model.
pub(crate) fn load(model: &Model, options: &OpenOptions) -> hoist_cpu::CpuBackend {
    let mut backend = hoist_cpu::CpuBackend::open(options).unwrap();
    backend.begin_load(&model.plan).unwrap();
    backend.load_from(&model.plan, model, &Unwatched).unwrap();
    backend.finish_load().unwrap();
    backend.build_index(&model.layout()).unwrap();
    backend
}
