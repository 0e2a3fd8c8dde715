//! Loads on a CUDA device beside the definition of canonical bytes: every encoding, view and transform, and what happens
//! when a load goes wrong.
//!
//! They run on the emulated device. With `HOIST_CUDA_TESTS=device` they run on the machine's own, with larger files. Where
//! there is none, every test is shown as ignored, and fails where the variable CI is set.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "a panic is a failed test")]

use std::fs::File;
use std::io::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use hoist_backend::{
    Chunk, Encoding, EncodingSet, Error, FileIdentity, FloatLayout, LoadPlan, LoadWatch, Mapping,
    MemoryByClass, OpenOptions, Progress, Provider, Result, Role, Shape, SourceFile, SourceView, Unwatched,
    ValueChange, WeightBackend, WeightClass, WeightId, WeightPlan, WeightSource,
};
use hoist_cuda::{CudaBackend, CudaProvider};
use libtest_mimic::{Arguments, Failed, Trial};

type Outcome = Result<(), Failed>;
type Test = (&'static str, fn() -> Outcome);

fn main() {
    let mut arguments = Arguments::from_args();
    // One at a time: they look at the device's free memory.
    arguments.test_threads = Some(1);
    if !on_a_gpu() && hoist_cuda_emulator::load().is_none() {
        eprintln!("no C++ compiler, so that there is no emulated device");
    }
    let missing = CudaProvider.devices().err();
    if let Some(error) = &missing {
        eprintln!("no CUDA device: {error}");
    }
    let in_ci = std::env::var_os("CI").is_some_and(|v| !v.is_empty() && v != "false");
    let tests: &[Test] = &[
        ("every_encoding_and_view_reads_back_as_defined", everything),
        ("pushed_uploads_are_the_same_in_any_order", pushed),
        ("a_nan_is_found_where_it_is", not_finite),
        ("a_plan_that_does_not_fit_reads_nothing", too_large),
        ("a_budget_is_kept", budget),
        ("memory_that_another_takes_midway_is_an_error", taken_midway),
        ("a_file_cut_short_is_an_error", cut_short),
        ("a_cancel_at_any_point_leaves_nothing", cancelled),
        ("short_page_locked_memory_is_reported_and_harmless", pinned_short),
        ("two_loads_at_once_on_one_device", two_at_once),
        ("pushed_uploads_need_no_ring", pushed_alone),
        ("a_ring_that_a_thread_still_holds_is_not_used_again", held),
        ("a_hundred_loads_leave_what_they_found", hundred),
        ("a_cold_file_goes_past_the_page_cache", cold),
        ("a_source_in_memory_or_without_files_loads_too", no_files),
        ("small_tensors_need_no_driver_call_each", small_ones),
    ];
    let trials = tests
        .iter()
        .map(|(name, test)| Trial::test(*name, *test).with_ignored_flag(missing.is_some() && !in_ci))
        .collect();
    // So that the context is not made anew by each test.
    let _held = missing.is_none().then(cuda);
    libtest_mimic::run(&arguments, trials).exit();
}

/// Whether the machine's own device is asked for.
fn on_a_gpu() -> bool {
    std::env::var_os("HOIST_CUDA_TESTS").is_some_and(|v| v == "device")
}

/// Of two numbers, the one for this device: an emulated one is slow.
fn sized<T>(gpu: T, emulated: T) -> T {
    if on_a_gpu() { gpu } else { emulated }
}

// ---- a source that computes canonical bytes from their definition ----

struct Source {
    files: Vec<SourceFile>,
    plan: LoadPlan,
    /// Bytes of each file; the files on disk may be cut.
    bytes: Vec<Arc<[u8]>>,
    reads: AtomicU64,
    shares: bool,
    /// What is shared instead of the bytes themselves.
    mapping: Option<Arc<dyn Mapping>>,
    _folder: Option<tempfile::TempDir>,
}

struct Whole(Arc<[u8]>);

impl Mapping for Whole {
    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Source {
    fn canonical(&self, weight: &WeightPlan) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(weight.nbytes as usize);
        for v in &weight.views {
            let file = &self.bytes[v.file as usize];
            for r in 0..v.rows {
                for c in 0..v.cols {
                    let at = (v.offset + r * v.row_stride + c * v.col_stride) as usize;
                    bytes.extend_from_slice(&file[at..at + v.unit as usize]);
                }
            }
        }
        let widen = |from: Encoding, add: f32| {
            bytes
                .chunks_exact(from.block_bytes() as usize)
                .map(|b| match from {
                    Encoding::F16 => half::f16::from_le_bytes([b[0], b[1]]).to_f32(),
                    Encoding::BF16 => half::bf16::from_le_bytes([b[0], b[1]]).to_f32(),
                    _ => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
                })
                .map(|x| if add == 0.0 { x } else { x + add })
                .flat_map(f32::to_le_bytes)
                .collect()
        };
        match weight.change {
            ValueChange::Keep => bytes,
            ValueChange::Widen { from } => widen(from, 0.0),
            ValueChange::WidenAddOne { from } => widen(from, 1.0),
        }
    }
}

impl WeightSource for Source {
    fn read_at(&self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let canonical = self.canonical(self.plan.weight(weight)?);
        out.copy_from_slice(&canonical[offset as usize..offset as usize + out.len()]);
        Ok(())
    }

    fn files(&self) -> &[SourceFile] {
        &self.files
    }

    fn share(&self, file: u32) -> Option<Arc<dyn Mapping>> {
        if let Some(mapping) = &self.mapping {
            return Some(Arc::clone(mapping));
        }
        self.shares
            .then(|| Arc::new(Whole(Arc::clone(&self.bytes[file as usize]))) as Arc<dyn Mapping>)
    }

    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }
}

/// Random bytes whose scales and values of that encoding are numbers.
fn finite(encoding: Encoding, shape: Shape, state: &mut u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..encoding.nbytes(shape).unwrap())
        .map(|_| {
            *state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (*state >> 56) as u8
        })
        .collect();
    if encoding == Encoding::APR_Q8 {
        // One scale in front of each matrix.
        let matrix = bytes.len() / shape.matrices as usize;
        bytes.iter_mut().skip(3).step_by(matrix).for_each(|b| *b &= 0x3f);
        return bytes;
    }
    let block = encoding.block_bytes() as usize;
    let mut at = 0;
    while let Err(hoist_quant::Error::NonFinite { offset, .. }) =
        hoist_quant::check_finite(encoding, &bytes[at..])
    {
        at += offset as usize;
        let end = (at + 8).min(bytes.len()).min((at / block + 1) * block);
        bytes[at..end].iter_mut().for_each(|b| *b &= 0x3f);
        at = at / block * block;
    }
    bytes
}

struct Builder {
    weights: Vec<WeightPlan>,
    files: Vec<Vec<u8>>,
    state: u64,
}

impl Builder {
    fn new(files: usize) -> Self {
        Self {
            weights: Vec::new(),
            files: vec![vec![0x11; 37]; files],
            state: 42,
        }
    }

    fn plan(&mut self, encoding: Encoding, shape: Shape, views: Vec<SourceView>) -> &mut WeightPlan {
        let id = self.weights.len() as u32;
        let nbytes = encoding.nbytes(shape).unwrap();
        let class = WeightClass::of_matrix(encoding);
        let beside = if class == WeightClass::Quantized {
            shape.matrices * shape.rows * 2
        } else {
            0
        };
        self.weights.push(WeightPlan {
            id: WeightId(id),
            name: format!("w{id}.{encoding}"),
            layer: None,
            role: Role::TokenEmbd,
            class,
            encoding,
            shape,
            nbytes,
            views,
            change: ValueChange::Keep,
            layout: FloatLayout::OutIn,
            resident_bytes: (nbytes + beside).next_multiple_of(256),
        });
        self.weights.last_mut().unwrap()
    }

    /// Appends bytes to a file; where they start.
    fn append(&mut self, file: usize, bytes: &[u8]) -> u64 {
        let at = self.files[file].len() as u64;
        self.files[file].extend_from_slice(bytes);
        at
    }

    /// A weight whose bytes are one run.
    fn add(&mut self, file: usize, encoding: Encoding, shape: Shape) -> &mut WeightPlan {
        let mut state = self.state;
        let bytes = finite(encoding, shape, &mut state);
        self.state = state;
        let at = self.append(file, &bytes);
        self.plan(
            encoding,
            shape,
            vec![SourceView::contiguous(file as u32, at, bytes.len() as u64)],
        )
    }

    /// A norm vector, stored in `from`.
    fn add_gamma(&mut self, file: usize, from: Encoding, n: u64, one: bool) {
        let mut state = self.state;
        let bytes = finite(from, Shape::vector(n), &mut state);
        self.state = state;
        let at = self.append(file, &bytes);
        let views = vec![SourceView::contiguous(file as u32, at, bytes.len() as u64)];
        let weight = self.plan(Encoding::F32, Shape::vector(n), views);
        weight.class = WeightClass::Gamma;
        weight.change = if one {
            ValueChange::WidenAddOne { from }
        } else {
            ValueChange::Widen { from }
        };
    }

    fn build(self, on_disk: bool) -> Source {
        let nbytes = self.weights.iter().map(|w| w.nbytes).sum();
        let plan = LoadPlan {
            architecture: "test".into(),
            layers: 1,
            weights: self.weights,
            resident: MemoryByClass::default(),
            nbytes,
            source_bytes: nbytes,
        };
        let folder = on_disk.then(|| tempfile::tempdir().unwrap());
        let mut files = Vec::new();
        for (i, bytes) in self.files.iter().enumerate() {
            let path = folder
                .as_ref()
                .map_or_else(|| "memory".into(), |f| f.path().join(format!("{i}")));
            let file = on_disk.then(|| {
                let mut file = File::create(&path).unwrap();
                file.write_all(bytes).unwrap();
                file.sync_all().unwrap();
                Arc::new(File::options().read(true).write(true).open(&path).unwrap())
            });
            files.push(SourceFile {
                path,
                len: bytes.len() as u64,
                file,
                identity: None::<FileIdentity>,
            });
        }
        Source {
            files,
            plan,
            bytes: self.files.into_iter().map(Into::into).collect(),
            reads: AtomicU64::new(0),
            shares: true,
            mapping: None,
            _folder: folder,
        }
    }
}

/// Weights of every encoding, shape and kind of view.
fn all_kinds(on_disk: bool) -> Source {
    let mut b = Builder::new(2);
    for encoding in EncodingSet::weights().iter() {
        let cols = encoding.block_weights().max(32);
        for (file, shape) in [
            Shape {
                matrices: 3,
                rows: 5,
                cols: 2 * cols,
            },
            Shape::matrix(sized(701, 71), 8 * cols),
            Shape::matrix(1, cols),
        ]
        .into_iter()
        .enumerate()
        {
            b.add(file % 2, encoding, shape);
            b.append(0, &[0xaa; 3][..encoding.index() % 4 % 3]);
        }
    }
    // More than one chunk, and an odd number of bytes.
    b.add(1, Encoding::BF16, Shape::matrix(3001, 2501));
    b.add(0, Encoding::Q4_K, Shape::matrix(4000, 4096));
    for n in [1, 7, 300, 4096] {
        for from in [Encoding::F32, Encoding::F16, Encoding::BF16] {
            b.add_gamma(0, from, n, n % 2 == 0);
        }
    }
    for (matrices, rows, cols) in [(1, 40, 33), (3, 17, 64), (1, 2100, 1900)] {
        for encoding in [Encoding::F32, Encoding::F16, Encoding::BF16] {
            b.add(1, encoding, Shape { matrices, rows, cols }).layout = FloatLayout::InOut;
        }
    }
    // Three column ranges of one [in, out] matrix, read as [out, in]; and rows that are not neighbours.
    for (encoding, layout) in [
        (Encoding::F32, FloatLayout::OutIn),
        (Encoding::BF16, FloatLayout::InOut),
        (Encoding::F16, FloatLayout::OutIn),
    ] {
        let (rows, cols, e) = (sized(768, 96), 1030, encoding.block_bytes());
        let mut state = b.state;
        let bytes = finite(encoding, Shape::matrix(cols, 3 * rows), &mut state);
        b.state = state;
        let at = b.append(0, &bytes);
        for part in 0..3 {
            let view = SourceView {
                file: 0,
                offset: at + part * rows * e,
                rows,
                cols,
                unit: e,
                row_stride: e,
                col_stride: 3 * rows * e,
            };
            b.plan(encoding, Shape::matrix(rows, cols), vec![view]).layout = layout;
        }
        for (first, unit) in [(0, 400 * e), (1, 7 * e)] {
            let view = SourceView {
                file: 0,
                offset: at + first * unit,
                rows: 60,
                cols: 1,
                unit,
                row_stride: 2 * unit,
                col_stride: unit,
            };
            b.plan(encoding, Shape::matrix(60, unit / e), vec![view]);
        }
    }
    // Many small tensors in the order of names, not of the plan.
    for i in 0..sized(2000, 500) {
        b.add(
            1,
            if i % 3 == 0 { Encoding::BF16 } else { Encoding::F32 },
            Shape::vector(100 + i % 50),
        );
    }
    b.build(on_disk)
}

fn cuda() -> CudaBackend {
    CudaBackend::open(0, &OpenOptions::default()).expect("a device")
}

fn free(backend: &CudaBackend) -> u64 {
    backend.memory().expect("memory").devices[0].free
}

fn load(backend: &mut dyn WeightBackend, source: &Source) -> Result<Vec<(String, String)>> {
    backend.begin_load(&source.plan)?;
    let loaded = backend
        .load_from(&source.plan, source, &Unwatched)
        .and_then(|()| backend.finish_load());
    match loaded {
        Ok(receipt) => Ok(receipt.notes),
        Err(error) => {
            backend.abort_load()?;
            Err(error)
        }
    }
}

/// Demands that what is resident is what the source holds, on the device's word and by reading back.
fn check_all(backend: &mut CudaBackend, source: &Source) -> Outcome {
    for weight in &source.plan.weights {
        let expected = source.canonical(weight);
        let mut found = vec![0xa5; expected.len()];
        backend.read_back(weight.id, 0, &mut found)?;
        if found != expected {
            let at = found.iter().zip(&expected).position(|(a, b)| a != b);
            return Err(format!("`{}` {} differs at {at:?}", weight.name, weight.shape).into());
        }
        if backend.digest(weight.id)? != Some(*blake3::hash(&expected).as_bytes()) {
            return Err(format!("digest of `{}` {}", weight.name, weight.shape).into());
        }
        if weight.class == WeightClass::Quantized {
            let row = weight.encoding.row_bytes(weight.shape.cols)? as usize;
            let prefix = weight.encoding.matrix_prefix_bytes() as usize;
            let matrix = expected.len() / weight.shape.matrices as usize;
            let rows: Vec<i16> = expected
                .chunks_exact(matrix)
                .flat_map(|m| m[prefix..].chunks_exact(row))
                .map(|r| hoist_quant::row_exponent(weight.encoding, r).unwrap())
                .collect();
            if backend.row_exponents(weight.id)? != rows {
                return Err(format!("row exponents of `{}` {}", weight.name, weight.shape).into());
            }
        }
    }
    Ok(())
}

fn everything() -> Outcome {
    let source = all_kinds(true);
    let mut backend = cuda();
    let notes = load(&mut backend, &source)?;
    println!("{notes:?}");
    check_all(&mut backend, &source)?;
    // Pieces of a weight read back alone.
    for weight in &source.plan.weights {
        let block = weight.encoding.block_bytes();
        let blocks = weight.nbytes / block;
        let (offset, len) = (blocks / 3 * block, (blocks - blocks / 3).div_ceil(2) * block);
        let mut part = vec![0xa5; len as usize];
        backend.read_back(weight.id, offset, &mut part)?;
        if part != source.canonical(weight)[offset as usize..][..len as usize] {
            return Err(format!("part of `{}`", weight.name).into());
        }
        if block > 1 && backend.read_back(weight.id, 1, &mut [0; 1]).is_ok() {
            return Err("a range that splits a block was read back".into());
        }
    }
    backend.unload()?;
    Ok(())
}

fn pushed() -> Outcome {
    let source = all_kinds(true);
    let mut backend = cuda();
    push(&mut backend, &source)?;
    check_all(&mut backend, &source)
}

/// Loads by uploads, from the last byte to the first.
fn push(backend: &mut CudaBackend, source: &Source) -> Result<()> {
    backend.begin_load(&source.plan)?;
    for weight in source.plan.weights.iter().rev() {
        let canonical = source.canonical(weight);
        let granule = weight.granule() as usize;
        let step = (canonical.len() / 3 / granule).max(1) * granule;
        let mut starts: Vec<_> = (0..canonical.len()).step_by(step).collect();
        starts.reverse();
        for at in starts {
            let chunk = Chunk {
                weight: weight.id,
                offset: at as u64,
                bytes: &canonical[at..canonical.len().min(at + step)],
            };
            match weight.class {
                WeightClass::Quantized => backend.upload_quantized(chunk)?,
                WeightClass::Gamma => backend.upload_gamma(chunk)?,
                WeightClass::Float | WeightClass::Bias => backend.upload_f32(chunk)?,
            }
        }
    }
    backend.finish_load().map(|_| ())
}

/// A count of the emulated device's report; `None` on a GPU.
fn counted(name: &str) -> Option<u64> {
    let emulator = (!on_a_gpu()).then(hoist_cuda_emulator::load)??;
    Some(emulator.report().count(name))
}

fn pushed_alone() -> Outcome {
    let mut b = Builder::new(1);
    b.add(0, Encoding::Q4_K, Shape::matrix(100, 512));
    b.add(0, Encoding::F32, Shape::matrix(70, 30)).layout = FloatLayout::InOut;
    let source = b.build(false);
    // As no backend before it had, so that nothing that was kept suits it.
    let options = OpenOptions {
        threads: Some(5),
        ..OpenOptions::default()
    };
    let locked = counted("calls.cuMemHostRegister_v2");
    let mut backend = CudaBackend::open(0, &options)?;
    push(&mut backend, &source)?;
    check_all(&mut backend, &source)?;
    drop(backend);
    assert_eq!(counted("calls.cuMemHostRegister_v2"), locked);
    // The control: a load that pulls has a ring.
    let mut backend = CudaBackend::open(0, &options)?;
    load(&mut backend, &source)?;
    check_all(&mut backend, &source)?;
    drop(backend);
    if let (Some(now), Some(before)) = (counted("calls.cuMemHostRegister_v2"), locked) {
        assert_eq!(now, before + 6, "a lane for each of five readers, and one more");
    }
    Ok(())
}

/// Memory whose readers wait until they are let go; the first look, at its length, does not.
struct Stuck {
    bytes: Arc<[u8]>,
    looks: AtomicU64,
    gone: Mutex<bool>,
    changed: Condvar,
}

impl Mapping for Stuck {
    fn bytes(&self) -> &[u8] {
        if self.looks.fetch_add(1, Ordering::Relaxed) > 0 {
            let gone = self.gone.lock().unwrap();
            drop(self.changed.wait_while(gone, |gone| !*gone).unwrap());
        }
        &self.bytes
    }
}

/// Cancels once something is so.
struct When<F: Fn() -> bool + Sync>(F);

impl<F: Fn() -> bool + Sync> LoadWatch for When<F> {
    fn progress(&self, _: Progress) {}

    fn cancelled(&self) -> bool {
        (self.0)()
    }
}

fn held() -> Outcome {
    let mut b = Builder::new(1);
    for _ in 0..3 {
        b.add(0, Encoding::BF16, Shape::matrix(2048, 2048));
    }
    let mut source = b.build(false);
    let stuck = Arc::new(Stuck {
        bytes: Arc::clone(&source.bytes[0]),
        looks: AtomicU64::new(0),
        gone: Mutex::new(false),
        changed: Condvar::new(),
    });
    source.mapping = Some(stuck.clone());
    let other = large(48);
    let mut backend = cuda();
    load(&mut backend, &other)?;
    backend.unload()?;
    let rings = counted("registered");
    backend.begin_load(&source.plan)?;
    let reading = When(|| stuck.looks.load(Ordering::Relaxed) >= 3);
    match backend.load_from(&source.plan, &source, &reading) {
        Err(Error::Cancelled) => {}
        other => return Err(format!("{other:?}").into()),
    }
    backend.abort_load()?;
    // Its threads wait with slots in their hands: this load has others.
    load(&mut backend, &other)?;
    check_all(&mut backend, &other)?;
    if let (Some(now), Some(before)) = (counted("registered"), rings) {
        assert_eq!(now, 2 * before, "lanes, where {before} were before");
    }
    *stuck.gone.lock().unwrap() = true;
    stuck.changed.notify_all();
    // What they read goes nowhere, and what they held goes with them.
    for _ in 0..2000 {
        if counted("registered") == rings && Arc::strong_count(&stuck) == 2 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(counted("registered"), rings);
    check_all(&mut backend, &other)?;
    backend.unload()?;
    source.mapping = None;
    load(&mut backend, &source)?;
    check_all(&mut backend, &source)
}

fn not_finite() -> Outcome {
    let mut backend = cuda();
    for encoding in EncodingSet::weights().iter() {
        let cols = encoding.block_weights().max(32) * 3;
        let shape = Shape {
            matrices: 2,
            rows: 300,
            cols,
        };
        let mut b = Builder::new(1);
        b.add(0, Encoding::F32, Shape::vector(33));
        let view = b.add(0, encoding, shape).views[0];
        // The last place of each that can hold one, if any can.
        let blocks = view.unit / encoding.block_bytes();
        let range = view.offset as usize..(view.offset + view.unit) as usize;
        let before = b.files[0][range.clone()].to_vec();
        let mut expected = None;
        for block in [blocks - 1, blocks / 2] {
            let at = range.start + (block * encoding.block_bytes()) as usize;
            b.files[0][at..at + encoding.block_bytes() as usize].fill(0xff);
            match hoist_quant::check_finite_weight(encoding, shape, &b.files[0][range.clone()]) {
                Err(hoist_quant::Error::NonFinite { offset, .. }) => expected = Some(offset),
                _ => b.files[0][range.clone()].copy_from_slice(&before),
            }
        }
        let result = load(&mut backend, &b.build(true));
        match (result, expected) {
            (Err(Error::NonFiniteWeight { weight, offset }), Some(expected))
                if weight.starts_with("w1") && offset == expected => {}
            (Ok(_), None) => backend.unload()?,
            (other, expected) => {
                return Err(format!("{encoding}: {other:?} where {expected:?} was expected").into());
            }
        }
    }
    Ok(())
}

/// A few large weights, so that a load takes some time.
fn large(mebibytes: u64) -> Source {
    let mut b = Builder::new(1);
    let piece: Vec<u8> = (0..1u32 << 20)
        .map(|i| (i.wrapping_mul(2654435761) >> 24) as u8 & 0x3f)
        .collect();
    for _ in 0..mebibytes / 16 {
        let mut at = 0;
        for i in 0..16 {
            let start = b.append(0, &piece);
            if i == 0 {
                at = start;
            }
        }
        b.plan(
            Encoding::BF16,
            Shape::matrix(2048, 4096),
            vec![SourceView::contiguous(0, at, 16 << 20)],
        );
        b.add(0, Encoding::F32, Shape::vector(2048));
    }
    b.build(true)
}

fn too_large() -> Outcome {
    let mut b = Builder::new(1);
    b.plan(
        Encoding::BF16,
        Shape::matrix(1 << 20, 1 << 20),
        vec![SourceView::contiguous(0, 0, 2 << 40)],
    );
    let source = b.build(true);
    let mut backend = cuda();
    let before = free(&backend);
    match backend.begin_load(&source.plan) {
        Err(Error::OutOfMemory {
            needed, available, ..
        }) if needed > available && available > 0 => {}
        other => return Err(format!("{other:?}").into()),
    }
    assert_eq!(source.reads.load(Ordering::Relaxed), 0);
    assert_eq!(free(&backend), before);
    // It is empty, and takes what fits.
    load(&mut backend, &large(32))?;
    Ok(())
}

fn budget() -> Outcome {
    let source = large(64);
    let options = OpenOptions {
        memory_budget: Some(32 << 20),
        ..OpenOptions::default()
    };
    let mut backend = CudaBackend::open(0, &options)?;
    match backend.begin_load(&source.plan) {
        Err(Error::OutOfMemory { available, .. }) if available == 32 << 20 => {}
        other => return Err(format!("{other:?}").into()),
    }
    load(&mut backend, &large(16))?;
    Ok(())
}

fn taken_midway() -> Outcome {
    let source = all_kinds(true);
    let mut backend = cuda();
    backend.begin_load(&source.plan)?;
    // Another user of the device takes all that is left, to the last pieces.
    let mut others = Vec::new();
    let mut nbytes = free(&backend);
    while nbytes >= 16 << 20 {
        let Ok(mut other) = CudaBackend::open(0, &OpenOptions::default()) else {
            break;
        };
        let mut b = Builder::new(1);
        b.plan(
            Encoding::F32,
            Shape::vector(nbytes / 4),
            vec![SourceView::contiguous(0, 0, nbytes)],
        );
        match other.begin_load(&b.build(false).plan) {
            Ok(()) => others.push(other),
            Err(_) => nbytes /= 2,
        }
    }
    match backend.load_from(&source.plan, &source, &Unwatched) {
        Err(Error::OutOfMemory { .. }) => {}
        other => return Err(format!("{other:?}").into()),
    }
    backend.abort_load()?;
    drop(others);
    load(&mut backend, &source)?;
    check_all(&mut backend, &source)
}

/// Does something when a load has come so far.
struct At<F: Fn() + Sync> {
    bytes: u64,
    done: AtomicU64,
    act: F,
    cancel: bool,
}

impl<F: Fn() + Sync> LoadWatch for At<F> {
    fn progress(&self, progress: Progress) {
        if progress.done >= self.bytes && self.done.swap(1, Ordering::Relaxed) == 0 {
            (self.act)();
        }
    }

    fn cancelled(&self) -> bool {
        self.cancel && self.done.load(Ordering::Relaxed) == 1
    }
}

fn cut_short() -> Outcome {
    for cut in sized([0u64, 64 << 20, 700 << 20], [0, 16 << 20, 170 << 20]) {
        let source = large(sized(1024, 256));
        let small = large(32);
        let mut backend = cuda();
        load(&mut backend, &small)?;
        backend.unload()?;
        let before = free(&backend);
        backend.begin_load(&source.plan)?;
        let file = source.files[0].file.clone().unwrap();
        // Cut before the load comes there.
        let watch = At {
            bytes: cut / 2,
            done: AtomicU64::new(0),
            act: || file.set_len(cut).unwrap(),
            cancel: false,
        };
        if cut == 0 {
            file.set_len(cut)?;
        }
        match backend.load_from(&source.plan, &source, &watch) {
            Err(Error::SourceIo { .. }) => {}
            Ok(()) if cut > 0 => println!("the load was ahead of the cut at {cut}"),
            other => return Err(format!("{other:?}").into()),
        }
        backend.abort_load()?;
        assert_eq!(free(&backend), before, "memory after a cut at {cut}");
        load(&mut backend, &small)?;
        check_all(&mut backend, &small)?;
    }
    Ok(())
}

fn cancelled() -> Outcome {
    let source = large(sized(768, 192));
    let mut backend = cuda();
    load(&mut backend, &source)?;
    backend.unload()?;
    let before = free(&backend);
    let mut cancels = 0;
    for i in 0..10 {
        backend.begin_load(&source.plan)?;
        let watch = At {
            bytes: source.plan.nbytes / 11 * ((i * 7) % 10),
            done: AtomicU64::new(0),
            act: || {},
            cancel: true,
        };
        match backend.load_from(&source.plan, &source, &watch) {
            Err(Error::Cancelled) => cancels += 1,
            Ok(()) => println!("load {i} ended before it saw the cancel"),
            other => return Err(format!("{other:?}").into()),
        }
        backend.abort_load()?;
        assert_eq!(free(&backend), before, "memory after cancel {i}");
    }
    assert!(cancels >= 5, "only {cancels} of 10 loads were cancelled");
    load(&mut backend, &source)?;
    check_all(&mut backend, &source)
}

fn pinned_short() -> Outcome {
    let source = all_kinds(true);
    for (limit, word) in [(40 << 20, "no more"), (0, "pageable")] {
        let mut backend = cuda();
        backend.limit_pinned_memory(limit);
        let notes = load(&mut backend, &source)?;
        let ring = notes.iter().find(|(k, _)| k == "ring").map(|(_, v)| v.clone());
        if !ring.as_ref().is_some_and(|r| r.contains(word)) {
            return Err(format!("with {limit} bytes: {ring:?}").into());
        }
        check_all(&mut backend, &source)?;
    }
    Ok(())
}

fn two_at_once() -> Outcome {
    let source = large(sized(256, 96));
    std::thread::scope(|scope| {
        let loads: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut backend = cuda();
                    load(&mut backend, &source).map_err(Failed::from)?;
                    check_all(&mut backend, &source)
                })
            })
            .collect();
        loads.into_iter().try_for_each(|l| l.join().expect("a load"))
    })
}

fn hundred() -> Outcome {
    let source = large(sized(64, 32));
    let small = if on_a_gpu() { all_kinds(true) } else { large(16) };
    let mut backend = cuda();
    load(&mut backend, &small)?;
    backend.unload()?;
    let before = free(&backend);
    let rss = resident_kib();
    for i in 0..100 {
        load(&mut backend, if i % 2 == 0 { &source } else { &small })?;
        backend.unload()?;
        assert_eq!(free(&backend), before, "free memory after load {i}");
    }
    let grown = resident_kib().saturating_sub(rss);
    println!("host memory grew by {grown} KiB");
    assert!(grown < 64 << 10, "host memory grew by {grown} KiB");
    Ok(())
}

/// Anonymous memory of this process.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
}

fn cold() -> Outcome {
    let source = large(256);
    let path = &source.files[0].path;
    let left = hoist_cuda::measure::forget_pages(path)?;
    let mut backend = cuda();
    let notes = load(&mut backend, &source)?;
    let note = |name: &str| notes.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone());
    if note("direct reads").as_deref() == Some("possible") && left == 0 {
        let past: u64 = note("bytes past the page cache").unwrap().parse()?;
        assert!(past > 200 << 20, "{notes:?}");
    } else {
        println!(
            "not shown: {left} bytes stayed cached, direct reads {:?}",
            note("direct reads")
        );
    }
    check_all(&mut backend, &source)
}

fn no_files() -> Outcome {
    for shares in [true, false] {
        let mut source = all_kinds(false);
        source.shares = shares;
        let mut backend = cuda();
        load(&mut backend, &source)?;
        assert_eq!(source.reads.load(Ordering::Relaxed) > 100, !shares);
        check_all(&mut backend, &source)?;
    }
    Ok(())
}

/// Driver calls of a kind that loading a source takes, up to its end; and its chunks.
fn calls_of_a_load(backend: &mut CudaBackend, source: &Source, calls: &[&str]) -> Result<(Vec<u64>, u64)> {
    let count = || -> Vec<u64> {
        let counted = |call: &&str| counted(&format!("calls.{call}")).unwrap_or(0);
        calls.iter().map(counted).collect()
    };
    let before = count();
    let notes = load(backend, source)?;
    let used = count()
        .iter()
        .zip(before)
        .map(|(now, before)| now - before)
        .collect();
    let chunks = notes.iter().filter(|(name, _)| name.starts_with("chunks "));
    let chunks = chunks.filter_map(|(_, n)| n.parse::<u64>().ok()).sum();
    Ok((used, chunks))
}

fn small_ones() -> Outcome {
    const CALLS: &[&str] = &[
        "cuMemAlloc_v2",
        "cuMemcpyHtoDAsync_v2",
        "cuEventRecord",
        "cuLaunchKernelEx",
    ];
    const BYTES: u64 = 40 << 20;
    let of = |count: u64| {
        let mut b = Builder::new(1);
        for i in 0..count {
            // Every ninth changes its values on the way, as a norm vector of bf16 does.
            if i % 9 == 4 {
                b.add_gamma(0, Encoding::BF16, BYTES / count / 2, false);
            } else {
                b.add(0, Encoding::BF16, Shape::vector(BYTES / count / 2));
            }
        }
        b.build(true)
    };
    let (many, few) = (of(20_000), of(300));
    let mut backend = cuda();
    // So that there is a ring.
    load(&mut backend, &few)?;
    backend.unload()?;
    let (of_few, chunks_of_few) = calls_of_a_load(&mut backend, &few, CALLS)?;
    check_all(&mut backend, &few)?;
    backend.unload()?;
    let (of_many, chunks) = calls_of_a_load(&mut backend, &many, CALLS)?;
    println!("{CALLS:?}: {of_many:?} for {chunks} chunks, {of_few:?} for {chunks_of_few}");
    assert!(
        chunks <= chunks_of_few + chunks_of_few / 4,
        "{chunks} chunks, {chunks_of_few} of few"
    );
    if counted("calls.cuMemAlloc_v2").is_none() {
        return check_all(&mut backend, &many);
    }
    // The arena, and staging with all tables; a copy and an event a chunk, and the tables; a launch that moves a chunk's
    // pieces and at most one that checks them, and those that the last weights wait for.
    let most = [2, chunks + 1, chunks, 2 * chunks + 1];
    for ((call, used), most) in CALLS.iter().zip(of_many).zip(most) {
        assert!(used > 0 && used <= most, "{used} times {call}, of {most}");
    }
    check_all(&mut backend, &many)
}
