//! What is uploaded is what is resident, whatever the way it came and the layout it has.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use hoist_backend::*;
use hoist_cpu::{CpuBackend, CpuProvider, FloatView};
use proptest::prelude::*;
use support::{Weight, *};

const KINDS: [(Encoding, Shape); 8] = [
    (
        Encoding::F32,
        Shape {
            matrices: 1,
            rows: 37,
            cols: 65,
        },
    ),
    (
        Encoding::F16,
        Shape {
            matrices: 3,
            rows: 8,
            cols: 31,
        },
    ),
    (
        Encoding::BF16,
        Shape {
            matrices: 1,
            rows: 5,
            cols: 128,
        },
    ),
    (
        Encoding::Q4_1,
        Shape {
            matrices: 1,
            rows: 70,
            cols: 96,
        },
    ),
    (
        Encoding::Q4_K,
        Shape {
            matrices: 1,
            rows: 300,
            cols: 4096,
        },
    ),
    (
        Encoding::Q6_K,
        Shape {
            matrices: 4,
            rows: 9,
            cols: 256,
        },
    ),
    (
        Encoding::APR_Q8,
        Shape {
            matrices: 3,
            rows: 7,
            cols: 32,
        },
    ),
    (
        Encoding::Q8_0,
        Shape {
            matrices: 1,
            rows: 1,
            cols: 131_072,
        },
    ),
];

fn weights() -> Vec<Weight> {
    let mut random = Random(1);
    let mut all: Vec<Weight> = KINDS
        .iter()
        .zip(Role::all())
        .map(|((encoding, shape), role)| Weight::matrix(Some(0), role, *encoding, *shape, &mut random))
        .collect();
    let values: Vec<f32> = (0..77).map(|_| random.unit()).collect();
    all.push(Weight::vector(
        None,
        Role::OutputNorm,
        WeightClass::Gamma,
        &values,
    ));
    all.push(Weight::vector(None, Role::OutputBias, WeightClass::Bias, &values));
    all
}

fn transposed(mut weights: Vec<Weight>) -> Vec<Weight> {
    for w in weights.iter_mut().filter(|w| w.class == WeightClass::Float) {
        w.layout = FloatLayout::InOut;
    }
    weights
}

fn assert_resident(backend: &mut CpuBackend, model: &Model) {
    for (w, plan) in model.weights.iter().zip(&model.plan.weights) {
        let mut out = vec![0; w.bytes.len()];
        backend.read_back(plan.id, 0, &mut out).unwrap();
        assert!(out == w.bytes, "{}", plan.name);
        let digest = backend.digest(plan.id).unwrap().unwrap();
        assert_eq!(digest, *blake3::hash(&w.bytes).as_bytes(), "{}", plan.name);
    }
}

fn push(backend: &mut CpuBackend, class: WeightClass, chunk: Chunk<'_>) -> Result<()> {
    match class {
        WeightClass::Quantized => backend.upload_quantized(chunk),
        WeightClass::Float | WeightClass::Bias => backend.upload_f32(chunk),
        WeightClass::Gamma => backend.upload_gamma(chunk),
    }
}

#[test]
fn a_pulled_load_is_the_plan_byte_for_byte() {
    for (layout, weights) in [("out-in", weights()), ("in-out", transposed(weights()))] {
        for threads in [1, 2, 7] {
            let model = Model::new(weights.clone(), 0);
            let mut backend = load(
                &model,
                &OpenOptions {
                    threads: Some(threads),
                    ..Default::default()
                },
            );
            assert_resident(&mut backend, &model);
            let memory = backend.memory().unwrap().devices.remove(0);
            assert_eq!(
                memory.resident.weights(),
                model.plan.resident.weights(),
                "{layout}"
            );
            assert_eq!(memory.mapped, 0);
        }
    }
}

#[test]
fn an_import_maps_what_is_aligned_and_copies_the_rest() {
    let options = OpenOptions {
        import: true,
        ..Default::default()
    };
    for (misalign, mappable) in [(0, true), (1, true), (2, true), (0, false)] {
        let mut model = Model::new(weights(), misalign);
        model.mappable = mappable;
        let mut backend = CpuBackend::open(&options).unwrap();
        backend.begin_load(&model.plan).unwrap();
        backend.load_from(&model.plan, &model, &Unwatched).unwrap();
        let receipt = backend.finish_load().unwrap();
        let expected: u64 = model
            .weights
            .iter()
            .filter(|w| {
                mappable
                    && (w.class == WeightClass::Quantized
                        || misalign.is_multiple_of(w.encoding.block_bytes()))
            })
            .map(|w| w.bytes.len() as u64)
            .sum();
        assert_eq!(
            receipt.mapped, expected,
            "misaligned by {misalign}, mappable: {mappable}"
        );
        assert_eq!(backend.memory().unwrap().devices[0].mapped, expected);
        assert_eq!(backend.memory().unwrap().devices[0].resident, receipt.resident);
        assert_resident(&mut backend, &model);
    }
}

#[test]
fn an_import_of_everything_owns_only_row_constants() {
    let model = Model::new(weights(), 0);
    let budget = model.plan.nbytes / 4;
    let owned = OpenOptions {
        memory_budget: Some(budget),
        ..Default::default()
    };
    let mut backend = CpuBackend::open(&owned).unwrap();
    match backend.begin_load(&model.plan).unwrap_err() {
        Error::OutOfMemory {
            needed, available, ..
        } => {
            assert_eq!((needed, available), (model.plan.resident.weights(), budget));
        }
        other => panic!("{other}"),
    }
    // The refusal left it empty.
    assert!(matches!(
        backend.finish_load(),
        Err(Error::BadState {
            state: State::Empty,
            ..
        })
    ));
    load(
        &model,
        &OpenOptions {
            import: true,
            ..owned.clone()
        },
    );
    // What cannot be mapped after all is refused with numbers too.
    let mut unmappable = Model::new(weights(), 0);
    unmappable.mappable = false;
    let mut backend = CpuBackend::open(&OpenOptions {
        import: true,
        ..owned
    })
    .unwrap();
    backend.begin_load(&unmappable.plan).unwrap();
    let error = backend
        .load_from(&unmappable.plan, &unmappable, &Unwatched)
        .unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    backend.abort_load().unwrap();
}

#[test]
fn a_model_beyond_the_machine_is_refused_before_anything_is_touched() {
    let mut model = Model::new(weights(), 0);
    let w = &mut model.plan.weights[0];
    w.shape = Shape::matrix(1 << 40, 65);
    w.nbytes = w.encoding.nbytes(w.shape).unwrap();
    let mut backend = CpuBackend::open(&OpenOptions::default()).unwrap();
    assert!(matches!(
        backend.begin_load(&model.plan),
        Err(Error::OutOfMemory { .. })
    ));
}

#[test]
fn a_plan_that_contradicts_itself_is_refused() {
    type Break = fn(&mut WeightPlan);
    let breaks: [(&str, Break); 6] = [
        ("id", |w| w.id = WeightId(5)),
        ("bytes", |w| w.nbytes -= 4),
        ("shape", |w| w.shape.rows = 0),
        ("class", |w| w.class = WeightClass::Quantized),
        ("encoding", |w| w.encoding = Encoding::Q8_K),
        ("layout", |w| {
            w.layout = FloatLayout::InOut;
            w.class = WeightClass::Bias;
        }),
    ];
    for (what, change) in breaks {
        let mut model = Model::new(weights(), 0);
        change(&mut model.plan.weights[0]);
        let mut backend = CpuBackend::open(&OpenOptions::default()).unwrap();
        assert!(backend.begin_load(&model.plan).is_err(), "{what}");
        let whole = Model::new(weights(), 0);
        backend.begin_load(&whole.plan).unwrap();
    }
}

#[test]
fn a_cancelled_load_stops_soon_and_leaves_nothing() {
    let mut random = Random(3);
    let big = Weight::matrix(
        None,
        Role::TokenEmbd,
        Encoding::F32,
        Shape::matrix(4096, 4096),
        &mut random,
    );
    let model = Model::new(vec![big], 0);
    let watch = Watch {
        cancel_after: Some(1 << 20),
        ..Default::default()
    };
    let mut backend = CpuBackend::open(&OpenOptions {
        threads: Some(2),
        ..Default::default()
    })
    .unwrap();
    backend.begin_load(&model.plan).unwrap();
    assert!(matches!(
        backend.load_from(&model.plan, &model, &watch),
        Err(Error::Cancelled)
    ));
    let read = watch.done.into_inner();
    assert!(read <= 4 << 20, "{read} bytes were read");
    assert!(matches!(backend.finish_load(), Err(Error::Incomplete { .. })));
    backend.abort_load().unwrap();
    assert_eq!(backend.memory().unwrap().devices[0].resident.total(), 0);
    backend.begin_load(&model.plan).unwrap();
    backend.load_from(&model.plan, &model, &Unwatched).unwrap();
    backend.finish_load().unwrap();
    assert_resident(&mut backend, &model);
}

#[test]
fn a_file_that_ends_early_is_named() {
    let model = Model::new(weights(), 0);
    let path = &model.files[0].path;
    let short = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    short.set_len(model.files[0].len - 100).unwrap();
    let mut backend = CpuBackend::open(&OpenOptions::default()).unwrap();
    backend.begin_load(&model.plan).unwrap();
    match backend.load_from(&model.plan, &model, &Unwatched).unwrap_err() {
        Error::SourceIo { file, error, .. } => {
            assert_eq!(file, path.display().to_string());
            assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
        }
        other => panic!("{other}"),
    }
    let mut importing = CpuBackend::open(&OpenOptions {
        import: true,
        ..Default::default()
    })
    .unwrap();
    importing.begin_load(&model.plan).unwrap();
    assert!(importing.load_from(&model.plan, &model, &Unwatched).is_err());
}

#[test]
fn a_non_finite_value_is_found_wherever_it_is_and_however_it_comes() {
    let clean = weights();
    for (i, w) in clean.iter().enumerate() {
        let mut bad = clean.clone();
        let block = w.encoding.block_bytes() as usize;
        let (at, reported) = match w.encoding {
            Encoding::APR_Q8 => {
                let at = w.bytes.len() / 3;
                (at..at + 4, at)
            }
            e if e.is_float() => {
                let at = w.bytes.len() - block;
                (at..at + block, at)
            }
            Encoding::Q6_K => {
                let at = w.bytes.len() - 2;
                (at..at + 2, at)
            }
            _ => {
                let at = w.bytes.len() - block;
                (at..at + 2, at)
            }
        };
        bad[i].bytes[at].fill(0xFF);
        let model = Model::new(bad, 0);
        for import in [false, true] {
            let mut backend = CpuBackend::open(&OpenOptions {
                import,
                ..Default::default()
            })
            .unwrap();
            backend.begin_load(&model.plan).unwrap();
            let result = backend
                .load_from(&model.plan, &model, &Unwatched)
                .and_then(|()| backend.finish_load());
            match result.unwrap_err() {
                Error::NonFiniteWeight { weight, offset } => {
                    assert_eq!(
                        (weight.as_str(), offset),
                        (model.plan.weights[i].name.as_str(), reported as u64)
                    );
                }
                other => panic!("{}: {other}", w.encoding),
            }
            backend.abort_load().unwrap();
        }
        // Pushed, the chunk that holds it is refused; others are taken.
        let mut backend = CpuBackend::open(&OpenOptions::default()).unwrap();
        backend.begin_load(&model.plan).unwrap();
        let result = model.plan.weights.iter().try_for_each(|p| {
            push(
                &mut backend,
                p.class,
                Chunk {
                    weight: p.id,
                    offset: 0,
                    bytes: &model.weights[p.id.index()].bytes,
                },
            )
        });
        let result = result.and_then(|()| backend.finish_load());
        assert!(
            matches!(result, Err(Error::NonFiniteWeight { .. })),
            "{}",
            w.encoding
        );
    }
}

#[test]
fn chunks_that_do_not_fit_are_refused_and_the_load_can_go_on() {
    let model = Model::new(weights(), 0);
    let mut backend = CpuBackend::open(&OpenOptions::default()).unwrap();
    let chunk = |offset, bytes| Chunk {
        weight: WeightId(3),
        offset,
        bytes,
    };
    let bytes = &model.weights[3].bytes;
    assert!(matches!(
        backend.upload_quantized(chunk(0, bytes)),
        Err(Error::BadState { .. })
    ));
    backend.begin_load(&model.plan).unwrap();
    assert!(matches!(
        backend.upload_f32(chunk(0, bytes)),
        Err(Error::InvalidArgument { .. })
    ));
    for (offset, part) in [
        (10, &bytes[..40]),
        (0, &bytes[..41]),
        (0, &bytes[..0]),
        (20, &bytes[..]),
        (u64::MAX - 19, &bytes[..40]),
    ] {
        assert!(
            matches!(
                backend.upload_quantized(chunk(offset, part)),
                Err(Error::InvalidChunk { .. })
            ),
            "{offset}"
        );
    }
    let unknown = Chunk {
        weight: WeightId(99),
        offset: 0,
        bytes,
    };
    assert!(matches!(
        backend.upload_quantized(unknown),
        Err(Error::UnknownWeight { .. })
    ));
    backend.upload_quantized(chunk(0, &bytes[..400])).unwrap();
    assert!(matches!(
        backend.upload_quantized(chunk(380, &bytes[380..])),
        Err(Error::InvalidChunk { .. })
    ));
    match backend.finish_load().unwrap_err() {
        Error::Incomplete { start, nbytes, .. } => {
            assert_eq!((start, nbytes), (0, model.plan.weights[0].nbytes));
        }
        other => panic!("{other}"),
    }
    // A pull would overlap what was pushed.
    assert!(matches!(
        backend.load_from(&model.plan, &model, &Unwatched),
        Err(Error::InvalidChunk { .. })
    ));
    backend.upload_quantized(chunk(400, &bytes[400..])).unwrap();
    for p in model.plan.weights.iter().filter(|p| p.id != WeightId(3)) {
        let bytes = &model.weights[p.id.index()].bytes;
        push(
            &mut backend,
            p.class,
            Chunk {
                weight: p.id,
                offset: 0,
                bytes,
            },
        )
        .unwrap();
    }
    backend.finish_load().unwrap();
    assert_resident(&mut backend, &model);
}

#[test]
fn calls_out_of_order_are_refused_and_change_nothing() {
    let model = Model::new(weights(), 0);
    let mut backend = CpuBackend::open(&OpenOptions::default()).unwrap();
    let bad = |r: Result<()>, state| match r.unwrap_err() {
        Error::BadState { state: s, .. } => assert_eq!(s, state),
        other => panic!("{other}"),
    };
    let mut out = [0; 4];
    bad(backend.read_back(WeightId(0), 0, &mut out), State::Empty);
    bad(backend.digest(WeightId(0)).map(drop), State::Empty);
    bad(backend.finish_load().map(drop), State::Empty);
    bad(backend.abort_load(), State::Empty);
    bad(backend.build_index(&model.layout()).map(drop), State::Empty);
    backend.begin_load(&model.plan).unwrap();
    bad(backend.begin_load(&model.plan), State::Loading);
    bad(backend.read_back(WeightId(0), 0, &mut out), State::Loading);
    assert!(backend.float_view(WeightId(0)).is_none());
    backend.load_from(&model.plan, &model, &Unwatched).unwrap();
    backend.finish_load().unwrap();
    bad(backend.load_from(&model.plan, &model, &Unwatched), State::Loaded);
    bad(backend.abort_load(), State::Loaded);
    backend.build_index(&model.layout()).unwrap();
    bad(backend.build_index(&model.layout()).map(drop), State::Indexed);
    assert_resident(&mut backend, &model);
    backend.unload().unwrap();
    backend.unload().unwrap();
    assert_eq!(backend.memory().unwrap().devices[0].resident.total(), 0);
    backend.begin_load(&model.plan).unwrap();
}

#[test]
fn read_back_outside_a_weight_is_refused() {
    let model = Model::new(weights(), 0);
    let mut backend = load(&model, &OpenOptions::default());
    let n = model.plan.weights[3].nbytes;
    let mut out = vec![0; 40];
    backend.read_back(WeightId(3), n - 40, &mut out).unwrap();
    for offset in [n - 20, n, 10, u64::MAX] {
        assert!(matches!(
            backend.read_back(WeightId(3), offset, &mut out),
            Err(Error::InvalidArgument { .. })
        ));
    }
    assert!(matches!(
        backend.read_back(WeightId(99), 0, &mut out),
        Err(Error::UnknownWeight { .. })
    ));
}

#[test]
fn float_views_show_values_in_either_layout() {
    for weights in [weights(), transposed(weights())] {
        let model = Model::new(weights, 0);
        let backend = load(&model, &OpenOptions::default());
        let FloatView::F32(view) = backend.float_view(WeightId(0)).unwrap() else {
            panic!("not f32")
        };
        assert_eq!(view.dim(), (1, 37, 65));
        let at = (11 * 65 + 64) * 4;
        let expected = f32::from_le_bytes(model.weights[0].bytes[at..at + 4].try_into().unwrap());
        assert_eq!(view[(0, 11, 64)], expected);
        let FloatView::F16(view) = backend.float_view(WeightId(1)).unwrap() else {
            panic!("not f16")
        };
        let at = (2 * 8 * 31 + 7 * 31 + 3) * 2;
        let expected = half::f16::from_le_bytes(model.weights[1].bytes[at..at + 2].try_into().unwrap());
        assert_eq!(view[(2, 7, 3)], expected);
        assert!(matches!(
            backend.float_view(WeightId(2)),
            Some(FloatView::BF16(_))
        ));
        assert!(backend.float_view(WeightId(3)).is_none());
    }
}

#[test]
fn the_provider_opens_its_one_device() {
    let devices = CpuProvider.devices().unwrap();
    assert_eq!(devices.len(), 1);
    let backend = CpuProvider.open(0, &OpenOptions::default()).unwrap();
    assert_eq!(backend.info().device, "cpu");
    assert_eq!(backend.info().memory.devices.len(), 1);
    assert!(CpuProvider.open(1, &OpenOptions::default()).is_err());
    assert!(
        CpuProvider
            .open(
                0,
                &OpenOptions {
                    threads: Some(0),
                    ..Default::default()
                }
            )
            .is_err()
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_chunking_in_any_order_round_trips(seed in any::<u64>(), transpose in any::<bool>()) {
        let mut random = Random(seed);
        let weights = if transpose { transposed(weights()) } else { weights() };
        let model = Model::new(weights, 0);
        let mut chunks = Vec::new();
        for p in &model.plan.weights {
            let blocks = (p.nbytes / p.granule()) as usize;
            let mut at = 0;
            while at < blocks {
                let n = 1 + random.below((blocks - at).min(blocks / 3 + 1));
                chunks.push((p, at as u64 * p.granule(), n as u64 * p.granule()));
                at += n;
            }
        }
        for i in (1..chunks.len()).rev() {
            chunks.swap(i, random.below(i + 1));
        }
        let mut backend = CpuBackend::open(&OpenOptions::default()).unwrap();
        backend.begin_load(&model.plan).unwrap();
        for (p, offset, len) in chunks {
            let bytes = &model.weights[p.id.index()].bytes[offset as usize..(offset + len) as usize];
            push(&mut backend, p.class, Chunk { weight: p.id, offset, bytes }).unwrap();
        }
        backend.finish_load().unwrap();
        assert_resident(&mut backend, &model);
        // Read back in another chunking.
        for p in &model.plan.weights {
            let blocks = (p.nbytes / p.granule()) as usize;
            let start = random.below(blocks);
            let n = 1 + random.below(blocks - start);
            let range = start * p.granule() as usize..(start + n) * p.granule() as usize;
            let mut out = vec![0; range.len()];
            backend.read_back(p.id, range.start as u64, &mut out).unwrap();
            prop_assert!(out == model.weights[p.id.index()].bytes[range]);
        }
    }
}
