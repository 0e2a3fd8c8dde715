//! What was uploaded is what is resident, and what is read back.

use std::sync::Arc;

use hoist_backend::{
    Encoding, Error, FloatLayout, LoadPlan, Mapping, MemoryByClass, OpenOptions, Role, Shape, SourceFile,
    SourceView, Unwatched, ValueChange, WeightBackend, WeightClass, WeightId, WeightSource,
};

use super::support::{encodings, layers, matrix, mixed_model, model_of, vector};
use crate::fixture::{Model, Origin, Weight, upload_bytes};
use crate::guard::{ReadOnly, Writable};
use crate::mutation::{Rule, holds};
use crate::operands::{self, Random, Scales};
use crate::{Case, Context, Expect, Failure, Need, Stop, Verdict, audit, judge};

/// The cases.
pub fn cases() -> Vec<Case> {
    let each = |group, name, run: fn(&mut Context<'_>, Encoding) -> Verdict| {
        encodings().map(move |encoding| {
            Case::new("residency", group, name, move |cx| run(cx, encoding))
                .with("encoding", encoding)
                .needs(Need::Stored(encoding))
        })
    };
    let case = |group, name, run: fn(&mut Context<'_>) -> Verdict| Case::new("residency", group, name, run);
    let claims = encodings().map(|encoding| {
        Case::new("residency", "claims", "holds_what_it_claims", move |cx| {
            claim(cx, encoding)
        })
        .with("encoding", encoding)
    });
    let mut cases: Vec<Case> = claims.collect();
    cases.extend(each("roundtrip", "matrices", roundtrip));
    cases.extend(each("chunks", "any_order", chunks_in_any_order));
    cases.extend(each("chunks", "one_block_at_a_time", one_block_at_a_time));
    cases.extend(each("ranges", "any_range_reads_back", any_range));
    cases.extend(each("load_from", "from_memory", load_from_memory));
    cases.extend(each("load_from", "from_file", load_from_file));
    cases.extend(each("import", "from_mapping", import));
    cases.extend([
        case("vectors", "norms_and_biases", norms_and_biases),
        case("vectors", "any_finite_bits", any_finite_bits),
        case("values", "widened", widened),
        case("values", "strided_views", strided_views),
        case(
            "layouts",
            "float_matrices_are_given_back_as_they_came",
            float_layouts,
        ),
        case("many", "every_weight_in_its_place", many_weights),
        case("many", "a_plan_of_one_byte_weights", tiny_weights),
        case("again", "another_model_of_the_same_plan", same_plan_other_bytes),
        case("buffers", "are_not_used_after_the_call", buffers_are_retired),
        case("threads", "calls_from_changing_threads", changing_threads),
        case("refusals", "bad_chunks", bad_chunks),
        case("refusals", "wrong_upload", wrong_upload),
        case("refusals", "bad_ranges", bad_ranges),
        case("refusals", "values_that_are_not_finite", not_finite).needs(Need::Decode),
        case("finish", "a_missing_block_is_named", missing_block),
        case("memory", "is_accounted_by_class", accounted),
        case("offsets", "above_4_gib", |cx| above_4_gib(cx, true))
            .with("how", "imported")
            .unseeded()
            .limit_s(60),
        case("offsets", "above_4_gib", |cx| above_4_gib(cx, false))
            .with("how", "copied")
            .unseeded()
            .needs(Need::Process)
            .limit_s(120),
    ]);
    cases
}

fn claim(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    let model = model_of(cx, encoding)?;
    let mut backend = cx.open()?;
    if cx.info().stored.contains(encoding) {
        model.load(&mut *backend)?;
        return Ok(model.check_read_back(&mut *backend)?);
    }
    match backend.begin_load(&model.plan) {
        Err(Error::Unsupported { .. }) => Err(Stop::Unsupported(format!("it does not hold {encoding}"))),
        Err(other) => Err(Failure::new(
            format!("begin_load of {encoding}, which it does not claim"),
            "",
            "Unsupported",
            other,
        )
        .into()),
        Ok(()) if !holds(Rule::UnclaimedIsAFailure) => Ok(()),
        Ok(()) => {
            let works = model.upload_all(&mut *backend).is_ok()
                && backend.finish_load().is_ok()
                && model.check_read_back(&mut *backend).is_ok();
            let found = if works {
                "it works"
            } else {
                "it was accepted, and does not work"
            };
            Err(Failure::new(
                format!("{encoding}, which it does not claim"),
                "",
                "Unsupported by begin_load, or a claim",
                found,
            )
            .into())
        }
    }
}

fn roundtrip(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    let model = model_of(cx, encoding)?;
    let mut backend = cx.open()?;
    model.load(&mut *backend)?;
    model.check_read_back(&mut *backend)?;
    // Indexed, it still holds the same.
    backend.build_index(&model.index).succeeds("build_index")?;
    Ok(model.check_read_back(&mut *backend)?)
}

/// Cuts a weight's bytes at random multiples of its block.
fn cuts(random: &mut Random, nbytes: usize, granule: usize, most: usize) -> Vec<(usize, usize)> {
    let blocks = nbytes / granule;
    let mut cuts = Vec::new();
    let mut at = 0;
    while at < blocks {
        let step = 1 + random.below(blocks.min(most) as u64) as usize;
        let end = (at + step).min(blocks);
        cuts.push((at * granule, (end - at) * granule));
        at = end;
    }
    cuts
}

fn shuffle<T>(random: &mut Random, list: &mut [T]) {
    for i in (1..list.len()).rev() {
        list.swap(i, random.below(i as u64 + 1) as usize);
    }
}

fn chunks_in_any_order(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    let model = model_of(cx, encoding)?;
    let mut chunks = Vec::new();
    for (i, plan) in model.plan.weights.iter().enumerate() {
        let granule = plan.granule() as usize;
        let blocks = model.canonical[i].len() / granule;
        let pieces = cuts(
            &mut cx.random,
            model.canonical[i].len(),
            granule,
            blocks.div_ceil(6),
        );
        chunks.extend(pieces.into_iter().map(|(offset, len)| (i, offset, len)));
    }
    shuffle(&mut cx.random, &mut chunks);
    let mut backend = cx.open()?;
    backend.begin_load(&model.plan).succeeds("begin_load")?;
    for (weight, offset, len) in chunks {
        model
            .upload(&mut *backend, weight, offset, len)?
            .succeeds(format!("upload of {len} bytes at {offset} of weight {weight}"))?;
    }
    backend.finish_load().succeeds("finish_load")?;
    Ok(model.check_read_back(&mut *backend)?)
}

fn one_block_at_a_time(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    let random = &mut cx.random;
    let shape = Shape {
        matrices: 1 + random.below(2),
        rows: 2 * random.below(2) + 1,
        cols: encoding.block_weights() * (1 + random.below(6)),
    };
    let weight = matrix(random, 0, encoding, shape, Scales::Spread)?;
    let model = Model::new(cx.info(), 1, vec![weight], Vec::new())?;
    let granule = model.plan.weights[0].granule() as usize;
    let mut backend = cx.open()?;
    backend.begin_load(&model.plan).succeeds("begin_load")?;
    let mut at: Vec<usize> = (0..model.canonical[0].len()).step_by(granule).collect();
    if cx.random.below(2) == 0 {
        at.reverse();
    }
    for offset in at {
        model
            .upload(&mut *backend, 0, offset, granule)?
            .succeeds(format!("upload of one block at {offset}"))?;
    }
    backend.finish_load().succeeds("finish_load")?;
    Ok(model.check_read_back(&mut *backend)?)
}

fn any_range(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    let model = model_of(cx, encoding)?;
    let mut backend = cx.open()?;
    model.load(&mut *backend)?;
    for (plan, canonical) in model.plan.weights.iter().zip(&model.canonical) {
        let granule = plan.granule() as usize;
        let blocks = (canonical.len() / granule) as u64;
        for _ in 0..4 {
            let start = cx.random.below(blocks) as usize;
            let len = 1 + cx.random.below(blocks - start as u64) as usize;
            let (offset, len) = (start * granule, len * granule);
            let what = format!(
                "read_back of {len} bytes at {offset} of `{}` ({encoding} {})",
                plan.name, plan.shape
            );
            let mut out = Writable::new(len)?;
            backend
                .read_back(plan.id, offset as u64, &mut out)
                .succeeds(what.as_str())?;
            out.check(&what)?;
            judge::bytes(&what, &canonical[offset..offset + len], &out)?;
        }
    }
    Ok(())
}

fn pull(model: &Model, backend: &mut dyn WeightBackend, source: &dyn WeightSource) -> Result<(), Failure> {
    backend.begin_load(&model.plan).succeeds("begin_load")?;
    backend
        .load_from(&model.plan, source, &Unwatched)
        .succeeds("load_from")?;
    let receipt = backend.finish_load().succeeds("finish_load")?;
    judge::equal(
        "weights of the receipt",
        model.plan.weights.len(),
        receipt.weights as usize,
    )?;
    model.check_read_back(backend)
}

fn load_from_memory(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    let model = model_of(cx, encoding)?;
    let mut backend = cx.open()?;
    Ok(pull(&model, &mut *backend, &model.source()?)?)
}

fn load_from_file(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    let model = model_of(cx, encoding)?;
    let mut backend = cx.open()?;
    Ok(pull(&model, &mut *backend, &model.file_source()?)?)
}

/// Opens for import; unsupported if the backend refuses that.
fn open_to_import(cx: &Context<'_>, budget: Option<u64>) -> Result<Box<dyn WeightBackend>, Stop> {
    let options = OpenOptions {
        import: true,
        memory_budget: budget,
        ..OpenOptions::default()
    };
    match cx.target().open(&options) {
        Ok(backend) => Ok(backend),
        Err(Error::Unsupported { .. }) => Err(Stop::Unsupported("it does not import mappings".into())),
        Err(other) => Err(Failure::new("opening for import", "", "success or Unsupported", other).into()),
    }
}

fn import(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    let model = model_of(cx, encoding)?;
    let mut backend = open_to_import(cx, None)?;
    // The mapping is read-only: a backend that repacks in place ends the process.
    pull(&model, &mut *backend, &model.source()?)?;
    backend.build_index(&model.index).succeeds("build_index")?;
    model.check_read_back(&mut *backend)?;
    Ok(backend.unload().succeeds("unload")?)
}

fn norms_and_biases(cx: &mut Context<'_>) -> Verdict {
    let random = &mut cx.random;
    let mut weights = Vec::new();
    for (layer, n) in [1, 2, 3, 31, 32, 33, 255, 256, 257, 4096].into_iter().enumerate() {
        let layer = Some(layer as u32);
        weights.push(vector(random, layer, Role::AttnNorm, WeightClass::Gamma, n));
        weights.push(vector(random, layer, Role::AttnQBias, WeightClass::Bias, n));
    }
    let model = Model::new(cx.info(), 10, weights, Vec::new())?;
    let mut backend = cx.open()?;
    model.load(&mut *backend)?;
    Ok(model.check_read_back(&mut *backend)?)
}

/// Zeros of both signs, subnormals and the largest values stay as they are.
fn any_finite_bits(cx: &mut Context<'_>) -> Verdict {
    let random = &mut cx.random;
    let special = [
        0x0000_0000,
        0x8000_0000,
        1,
        0x8000_0001,
        0x007F_FFFF,
        0x0080_0000,
        0x7F7F_FFFF,
        0xFF7F_FFFF,
        0x3F80_0000,
    ];
    let values: Vec<f32> = (0..200)
        .map(|i| match special.get(i) {
            Some(bits) => f32::from_bits(*bits),
            None => loop {
                let value = f32::from_bits(random.bits() as u32);
                if value.is_finite() {
                    break value;
                }
            },
        })
        .collect();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut weights = vec![
        Weight::vector(Some(0), Role::AttnNorm, WeightClass::Gamma, &values),
        Weight::vector(Some(0), Role::AttnQBias, WeightClass::Bias, &values),
    ];
    if cx.info().stored.contains(Encoding::F32) {
        weights.push(Weight::matrix(
            Some(0),
            Role::AttnQ,
            Encoding::F32,
            Shape::matrix(8, 25),
            bytes,
        ));
    }
    let model = Model::new(cx.info(), 1, weights, Vec::new())?;
    let mut backend = cx.open()?;
    model.load(&mut *backend)?;
    Ok(model.check_read_back(&mut *backend)?)
}

/// Norm vectors and biases that stand in the source in each float encoding, with and without one added.
fn widened(cx: &mut Context<'_>) -> Verdict {
    let mut weights = Vec::new();
    let mut layer = 0;
    for from in [Encoding::F32, Encoding::F16, Encoding::BF16] {
        for add_one in [false, true] {
            for (role, class) in [
                (Role::AttnNorm, WeightClass::Gamma),
                (Role::AttnQBias, WeightClass::Bias),
            ] {
                let n = 1 + cx.random.below(600);
                let source = operands::weight(&mut cx.random, from, Shape::vector(n), Scales::Ordinary)?;
                weights.push(Weight::widened(Some(layer), role, class, from, source, add_one)?);
            }
            layer += 1;
        }
    }
    let model = Model::new(cx.info(), layer, weights, Vec::new())?;
    for source in [model.source()?, model.file_source()?] {
        let mut backend = cx.open()?;
        pull(&model, &mut *backend, &source)?;
    }
    // Pushed, the canonical bytes are what counts.
    let mut backend = cx.open()?;
    model.load(&mut *backend)?;
    Ok(model.check_read_back(&mut *backend)?)
}

/// A fused tensor whose rows are split among weights, and a `[in, out]` tensor read as `[out, in]`.
fn strided_views(cx: &mut Context<'_>) -> Verdict {
    let info = cx.info();
    let random = &mut cx.random;
    let mut weights = Vec::new();
    for (layer, encoding) in info.stored.iter().enumerate() {
        let layer = Some(layer as u32);
        let (rows, cols) = (
            2 + random.below(4),
            encoding.block_weights() * (1 + random.below(2)),
        );
        let row = encoding.row_bytes(cols)?;
        if encoding.matrix_prefix_bytes() != 0 {
            continue;
        }
        // Rows of two weights interleaved: this one is every second row.
        let fused = operands::weight(random, encoding, Shape::matrix(2 * rows, cols), Scales::Ordinary)?;
        let canonical: Vec<u8> = fused
            .chunks_exact(row as usize)
            .skip(1)
            .step_by(2)
            .flatten()
            .copied()
            .collect();
        let mut weight = Weight::matrix(layer, Role::AttnQ, encoding, Shape::matrix(rows, cols), canonical);
        weight.origin = Origin::Changed {
            bytes: fused,
            views: vec![SourceView {
                file: 0,
                offset: row,
                rows,
                cols: 1,
                unit: row,
                row_stride: 2 * row,
                col_stride: row,
            }],
            change: ValueChange::Keep,
        };
        weights.push(weight);
        if encoding.is_float() {
            let unit = encoding.block_bytes();
            let (outputs, inputs) = (3 + random.below(4), 5 + random.below(4));
            let source =
                operands::weight(random, encoding, Shape::matrix(inputs, outputs), Scales::Ordinary)?;
            let mut canonical = Vec::new();
            for out in 0..outputs {
                for input in 0..inputs {
                    let at = ((input * outputs + out) * unit) as usize;
                    canonical.extend_from_slice(&source[at..at + unit as usize]);
                }
            }
            let mut weight = Weight::matrix(
                layer,
                Role::AttnK,
                encoding,
                Shape::matrix(outputs, inputs),
                canonical,
            );
            weight.origin = Origin::Changed {
                bytes: source,
                views: vec![SourceView {
                    file: 0,
                    offset: 0,
                    rows: outputs,
                    cols: inputs,
                    unit,
                    row_stride: unit,
                    col_stride: outputs * unit,
                }],
                change: ValueChange::Keep,
            };
            weights.push(weight);
        }
    }
    let layers = info.stored.iter().count() as u32;
    let model = Model::new(info, layers, weights, Vec::new())?;
    for source in [model.source()?, model.file_source()?] {
        let mut backend = cx.open()?;
        pull(&model, &mut *backend, &source)?;
    }
    Ok(())
}

fn float_layouts(cx: &mut Context<'_>) -> Verdict {
    for layout in [FloatLayout::OutIn, FloatLayout::InOut] {
        let opened = cx.target().open(&OpenOptions {
            float_layout: Some(layout),
            ..OpenOptions::default()
        });
        let mut backend = match opened {
            Ok(backend) => backend,
            Err(Error::Unsupported { .. }) if layout != cx.info().float_layout => continue,
            Err(other) => {
                return Err(Failure::new(format!("opening with {layout:?}"), "", "success", other).into());
            }
        };
        let info = backend.info().clone();
        let mut weights = Vec::new();
        for (place, encoding) in info.stored.iter().filter(|e| e.is_float()).enumerate() {
            let random = &mut cx.random;
            let shape = Shape::matrix(2 * random.below(9) + 1, 1 + random.below(70));
            weights.push(matrix(random, 2 * place, encoding, shape, Scales::Ordinary)?);
            let stack = Shape { matrices: 3, ..shape };
            weights.push(matrix(random, 2 * place + 1, encoding, stack, Scales::Ordinary)?);
        }
        if weights.is_empty() {
            return Err(Stop::Unsupported("it holds no float matrix".into()));
        }
        let model = Model::new(&info, layers(6), weights, Vec::new())?;
        model.load(&mut *backend)?;
        model.check_read_back(&mut *backend)?;
        backend.unload().succeeds("unload")?;
        pull(&model, &mut *backend, &model.file_source()?)?;
    }
    Ok(())
}

fn many_weights(cx: &mut Context<'_>) -> Verdict {
    let places = 150 + cx.random.below(100) as usize;
    let model = mixed_model(cx, places)?;
    let mut order: Vec<usize> = (0..model.plan.weights.len()).collect();
    shuffle(&mut cx.random, &mut order);
    let mut backend = cx.open()?;
    backend.begin_load(&model.plan).succeeds("begin_load")?;
    for weight in order {
        model
            .upload(&mut *backend, weight, 0, model.canonical[weight].len())?
            .succeeds("upload")?;
    }
    backend.finish_load().succeeds("finish_load")?;
    backend.build_index(&model.index).succeeds("build_index")?;
    Ok(model.check_read_back(&mut *backend)?)
}

/// Weights of one value each, which lie as close to each other as alignment lets them.
fn tiny_weights(cx: &mut Context<'_>) -> Verdict {
    let mut weights = Vec::new();
    for layer in 0..60 {
        weights.push(vector(
            &mut cx.random,
            Some(layer),
            Role::AttnNorm,
            WeightClass::Gamma,
            1,
        ));
        weights.push(vector(
            &mut cx.random,
            Some(layer),
            Role::AttnQBias,
            WeightClass::Bias,
            1,
        ));
    }
    let model = Model::new(cx.info(), 60, weights, Vec::new())?;
    let mut backend = cx.open()?;
    model.load(&mut *backend)?;
    Ok(model.check_read_back(&mut *backend)?)
}

fn same_plan_other_bytes(cx: &mut Context<'_>) -> Verdict {
    let first = mixed_model(cx, 6)?;
    let mut second = first.clone();
    for bytes in &mut second.canonical {
        // Whole blocks change places or stay: what is finite stays finite.
        let granule = bytes.len().max(1);
        bytes.rotate_left(granule / 2);
    }
    for (plan, bytes) in second.plan.weights.iter().zip(&mut second.canonical) {
        let fresh = operands::weight(&mut cx.random, plan.encoding, plan.shape, Scales::Ordinary)?;
        bytes.copy_from_slice(&fresh);
    }
    let mut backend = cx.open()?;
    for model in [&first, &second, &first] {
        model.load(&mut *backend)?;
        model.check_read_back(&mut *backend)?;
        backend.unload().succeeds("unload")?;
    }
    Ok(())
}

/// The addresses of every chunk cannot be touched any more when the upload has returned.
fn buffers_are_retired(cx: &mut Context<'_>) -> Verdict {
    let model = mixed_model(cx, 12)?;
    let mut backend = cx.open()?;
    backend.begin_load(&model.plan).succeeds("begin_load")?;
    let mut retired = Vec::new();
    for (plan, canonical) in model.plan.weights.iter().zip(&model.canonical) {
        let bytes = ReadOnly::new(canonical)?;
        upload_bytes(&mut *backend, plan.class, plan.id, 0, &bytes).succeeds("upload")?;
        retired.push(bytes.retire()?);
    }
    backend.finish_load().succeeds("finish_load")?;
    backend.build_index(&model.index).succeeds("build_index")?;
    model.check_read_back(&mut *backend)?;
    backend.unload().succeeds("unload")?;
    drop(retired);
    Ok(())
}

fn changing_threads(cx: &mut Context<'_>) -> Verdict {
    let model = mixed_model(cx, 8)?;
    let mut backend = cx.open()?;
    let on_another = |work: &mut (dyn FnMut() -> Result<(), Failure> + Send)| {
        std::thread::scope(|scope| match scope.spawn(work).join() {
            Ok(result) => result,
            Err(_) => Err(Failure::new(
                "a call from another thread",
                "",
                "no panic",
                "a panic",
            )),
        })
    };
    on_another(&mut || backend.begin_load(&model.plan).succeeds("begin_load"))?;
    for (i, bytes) in model.canonical.iter().enumerate() {
        on_another(&mut || model.upload(&mut *backend, i, 0, bytes.len())?.succeeds("upload"))?;
    }
    on_another(&mut || backend.finish_load().map(|_| ()).succeeds("finish_load"))?;
    on_another(&mut || model.check_read_back(&mut *backend))?;
    on_another(&mut || {
        backend
            .build_index(&model.index)
            .map(|_| ())
            .succeeds("build_index")
    })?;
    model.check_read_back(&mut *backend)?;
    Ok(on_another(&mut || backend.unload().succeeds("unload"))?)
}

/// One weight of each class, of three blocks or more.
fn one_of_each_class(cx: &mut Context<'_>) -> Result<Model, Stop> {
    let info = cx.info();
    let random = &mut cx.random;
    let mut weights = vec![
        vector(random, Some(0), Role::AttnNorm, WeightClass::Gamma, 6),
        vector(random, Some(0), Role::AttnQBias, WeightClass::Bias, 5),
    ];
    for (place, quantized) in [(0, true), (1, false)] {
        let encoding = info
            .stored
            .iter()
            .find(|e| e.is_quantized() == quantized && e.matrix_prefix_bytes() == 0);
        if let Some(encoding) = encoding {
            let shape = Shape::matrix(3, 2 * encoding.block_weights());
            weights.push(matrix(random, place, encoding, shape, Scales::Ordinary)?);
        }
    }
    Ok(Model::new(info, 1, weights, Vec::new())?)
}

fn bad_chunks(cx: &mut Context<'_>) -> Verdict {
    let model = one_of_each_class(cx)?;
    for (i, plan) in model.plan.weights.iter().enumerate() {
        let mut backend = cx.open()?;
        backend.begin_load(&model.plan).succeeds("begin_load")?;
        let (nbytes, granule) = (plan.nbytes, plan.granule());
        model
            .upload(&mut *backend, i, granule as usize, granule as usize)?
            .succeeds("upload of the second block")?;
        let long = vec![0u8; (nbytes + granule) as usize];
        let bad = [
            ("that arrived already", granule, granule),
            ("that covers one that arrived", 0, nbytes),
            ("that ends inside one that arrived", 0, 2 * granule),
            ("that is empty", 0, 0),
            ("that starts at the end", nbytes, granule),
            ("that ends past the end", nbytes - granule, 2 * granule),
            ("that begins at 2^64", u64::MAX - granule + 1, granule),
            ("that starts inside a block", 1, granule),
            ("that ends inside a block", 2 * granule, granule - 1),
        ];
        for (which, offset, len) in bad {
            let bytes = ReadOnly::new(&long[..len as usize])?;
            let what = format!("upload of a chunk of `{}` {which}", plan.name);
            upload_bytes(&mut *backend, plan.class, plan.id, offset, &bytes).fails(
                what,
                "InvalidChunk or InvalidArgument",
                |e| matches!(e, Error::InvalidChunk { .. } | Error::InvalidArgument { .. }),
            )?;
        }
        // None of them left a trace.
        for (other, canonical) in model.canonical.iter().enumerate() {
            if other != i {
                model
                    .upload(&mut *backend, other, 0, canonical.len())?
                    .succeeds("upload")?;
            }
        }
        backend
            .finish_load()
            .map(|_| ())
            .fails("finish_load with two gaps", "Incomplete", |e| {
                matches!(e, Error::Incomplete { .. })
            })?;
        model
            .upload(&mut *backend, i, 0, granule as usize)?
            .succeeds("upload of the first block")?;
        let rest = 2 * granule as usize;
        model
            .upload(&mut *backend, i, rest, nbytes as usize - rest)?
            .succeeds("upload of the rest")?;
        backend.finish_load().succeeds("finish_load")?;
        model.check_read_back(&mut *backend)?;
    }
    Ok(())
}

fn wrong_upload(cx: &mut Context<'_>) -> Verdict {
    let model = one_of_each_class(cx)?;
    let mut backend = cx.open()?;
    backend.begin_load(&model.plan).succeeds("begin_load")?;
    let classes = [WeightClass::Quantized, WeightClass::Float, WeightClass::Gamma];
    for (plan, canonical) in model.plan.weights.iter().zip(&model.canonical) {
        let bytes = ReadOnly::new(canonical)?;
        for class in classes {
            let same = class == plan.class || (class, plan.class) == (WeightClass::Float, WeightClass::Bias);
            if !same {
                let what = format!(
                    "upload of `{}`, which is {:?}, as {class:?}",
                    plan.name, plan.class
                );
                upload_bytes(&mut *backend, class, plan.id, 0, &bytes).fails(
                    what,
                    "InvalidArgument",
                    |e| matches!(e, Error::InvalidArgument { .. }),
                )?;
            }
            for id in [model.plan.weights.len() as u32, u32::MAX] {
                upload_bytes(&mut *backend, class, WeightId(id), 0, &bytes).fails(
                    format!("upload of weight {id}"),
                    "UnknownWeight",
                    |e| matches!(e, Error::UnknownWeight { .. }),
                )?;
            }
        }
    }
    model.upload_all(&mut *backend)?;
    backend.finish_load().succeeds("finish_load")?;
    Ok(model.check_read_back(&mut *backend)?)
}

fn bad_ranges(cx: &mut Context<'_>) -> Verdict {
    let model = one_of_each_class(cx)?;
    let mut backend = cx.open()?;
    model.load(&mut *backend)?;
    for plan in &model.plan.weights {
        let (nbytes, granule) = (plan.nbytes, plan.granule());
        for (which, offset, len) in [
            ("past the end", nbytes - granule, 2 * granule),
            ("that starts at the end", nbytes, granule),
            ("that starts at 2^64", u64::MAX - granule + 1, granule),
            ("that starts inside a block", 1, granule),
            ("that ends inside a block", 0, granule + 1),
        ] {
            let mut out = Writable::new(len as usize)?;
            let what = format!("read_back of a range of `{}` {which}", plan.name);
            backend
                .read_back(plan.id, offset, &mut out)
                .fails(what.as_str(), "InvalidArgument", |e| {
                    matches!(e, Error::InvalidArgument { .. })
                })?;
            out.check(&what)?;
        }
    }
    let unknown = WeightId(model.plan.weights.len() as u32);
    let is_unknown = |e: &Error| matches!(e, Error::UnknownWeight { .. });
    backend.read_back(unknown, 0, &mut [0; 4]).fails(
        "read_back of a weight that is not there",
        "UnknownWeight",
        is_unknown,
    )?;
    backend.digest(unknown).map(|_| ()).fails(
        "digest of a weight that is not there",
        "UnknownWeight",
        is_unknown,
    )?;
    Ok(model.check_read_back(&mut *backend)?)
}

/// A NaN or infinity in a weight is refused when it arrives, or at the latest by `finish_load`; the contract's
/// finite-values rule rests on it. A backend that only holds weights need not look into them.
fn not_finite(cx: &mut Context<'_>) -> Verdict {
    let info = cx.info();
    let f16 = |bits: u16| bits.to_le_bytes();
    let f32 = |value: f32| value.to_le_bytes();
    let mut tried = 0;
    for encoding in info.stored.iter() {
        let (at, poison): (usize, Vec<u8>) = match encoding {
            Encoding::F32 => (4, f32(f32::NAN).into()),
            Encoding::F16 => (2, f16(0x7C00).into()),
            Encoding::BF16 => (2, f16(0x7F80).into()),
            Encoding::Q4_0 | Encoding::Q5_0 | Encoding::Q8_0 | Encoding::IQ4_NL => (0, f16(0x7E00).into()),
            Encoding::Q4_1 | Encoding::Q5_1 | Encoding::Q4_K | Encoding::Q5_K => (2, f16(0xFC00).into()),
            Encoding::Q6_K => (208, f16(0x7C00).into()),
            _ => continue,
        };
        tried += 1;
        let shape = Shape::matrix(1 + cx.random.below(3), 4 * encoding.block_weights());
        let mut weight = matrix(&mut cx.random, 0, encoding, shape, Scales::Ordinary)?;
        // In the last block of the last row, where a check may have ended.
        let last = weight.canonical.len() - encoding.block_bytes().max(8) as usize;
        let last = if encoding.is_float() {
            last
        } else {
            weight.canonical.len() - encoding.block_bytes() as usize
        };
        weight.canonical[last + at..last + at + poison.len()].copy_from_slice(&poison);
        expect_not_finite(cx, encoding.name(), weight)?;
    }
    for (class, role) in [
        (WeightClass::Gamma, Role::AttnNorm),
        (WeightClass::Bias, Role::AttnQBias),
    ] {
        let mut values = vec![1.0; 300];
        values[299] = f32::NEG_INFINITY;
        expect_not_finite(cx, role.name(), Weight::vector(Some(0), role, class, &values))?;
        tried += 1;
    }
    cx.measure("weights tried", f64::from(tried), "");
    Ok(())
}

fn expect_not_finite(cx: &mut Context<'_>, what: &str, weight: Weight) -> Verdict {
    let model = Model::new(cx.info(), 1, vec![weight], Vec::new())?;
    let is_it = |e: &Error| matches!(e, Error::NonFiniteWeight { .. });
    let what = format!("a load of {what} with a NaN or infinity");
    let mut backend = cx.open()?;
    backend.begin_load(&model.plan).succeeds("begin_load")?;
    let pushed = match model.upload(&mut *backend, 0, 0, model.canonical[0].len())? {
        Ok(()) => backend.finish_load().map(|_| ()),
        refused => refused,
    };
    pushed.fails(format!("{what}, pushed"), "NonFiniteWeight", is_it)?;
    let mut backend = cx.open()?;
    backend.begin_load(&model.plan).succeeds("begin_load")?;
    let pulled = match backend.load_from(&model.plan, &model.source()?, &Unwatched) {
        Ok(()) => backend.finish_load().map(|_| ()),
        refused => refused,
    };
    pulled.fails(format!("{what}, pulled"), "NonFiniteWeight", is_it)?;
    Ok(())
}

fn missing_block(cx: &mut Context<'_>) -> Verdict {
    let model = one_of_each_class(cx)?;
    for (i, missing) in model.plan.weights.iter().enumerate() {
        let granule = missing.granule() as usize;
        let blocks = model.canonical[i].len() / granule;
        for block in [0, 1 + cx.random.below(blocks as u64 - 2) as usize, blocks - 1] {
            let mut backend = cx.open()?;
            backend.begin_load(&model.plan).succeeds("begin_load")?;
            let gap = block * granule..(block + 1) * granule;
            for (j, canonical) in model.canonical.iter().enumerate() {
                if i != j {
                    model
                        .upload(&mut *backend, j, 0, canonical.len())?
                        .succeeds("upload")?;
                    continue;
                }
                for (offset, end) in [(0, gap.start), (gap.end, canonical.len())] {
                    if offset < end {
                        model
                            .upload(&mut *backend, i, offset, end - offset)?
                            .succeeds("upload")?;
                    }
                }
            }
            let error = backend.finish_load().map(|_| ()).fails(
                format!("finish_load without block {block} of `{}`", missing.name),
                "Incomplete",
                |e| matches!(e, Error::Incomplete { .. }),
            )?;
            if let Error::Incomplete { weight, start, .. } = error {
                judge::equal(
                    "weight that is incomplete",
                    missing.name.as_str(),
                    weight.as_str(),
                )?;
                judge::equal("first byte that is missing", gap.start as u64, start)?;
            }
            model
                .upload(&mut *backend, i, gap.start, granule)?
                .succeeds("upload of what was missing")?;
            backend.finish_load().succeeds("finish_load, after all")?;
            model.check_read_back(&mut *backend)?;
        }
    }
    Ok(())
}

fn accounted(cx: &mut Context<'_>) -> Verdict {
    let model = mixed_model(cx, 20)?;
    let mut backend = cx.open()?;
    let resident = |backend: &dyn WeightBackend| -> Result<(MemoryByClass, u64), Failure> {
        let devices = backend.memory().succeeds("memory")?.devices;
        let mut sum = MemoryByClass::default();
        for d in &devices {
            sum.quantized += d.resident.quantized;
            sum.float += d.resident.float;
            sum.gamma += d.resident.gamma;
            sum.bias += d.resident.bias;
            sum.index += d.resident.index;
            sum.kv += d.resident.kv;
            sum.workspace += d.resident.workspace;
        }
        Ok((sum, devices.iter().map(|d| d.mapped).sum()))
    };
    backend.begin_load(&model.plan).succeeds("begin_load")?;
    model.upload_all(&mut *backend)?;
    let receipt = backend.finish_load().succeeds("finish_load")?;
    judge::equal("mapped bytes of a load that was pushed", 0, receipt.mapped)?;
    let planned = MemoryByClass {
        index: 0,
        ..model.plan.resident
    };
    let weights = |m: &MemoryByClass| [m.quantized, m.float, m.gamma, m.bias];
    judge::equal(
        "owned bytes of the receipt (quantised, float, gamma, bias), as its sizes plan them",
        weights(&planned),
        weights(&receipt.resident),
    )?;
    let (loaded, mapped) = resident(&*backend)?;
    judge::equal(
        "resident bytes of the memory",
        weights(&planned),
        weights(&loaded),
    )?;
    judge::equal(
        "keys, values and workspace before there are any",
        0,
        loaded.kv + loaded.workspace,
    )?;
    judge::equal("mapped bytes", 0, mapped)?;
    let index = backend.build_index(&model.index).succeeds("build_index")?;
    let (indexed, _) = resident(&*backend)?;
    judge::equal(
        "index bytes of the memory, as the receipt says",
        index.bytes,
        indexed.index,
    )?;
    judge::equal(
        "weights' bytes once indexed",
        weights(&planned),
        weights(&indexed),
    )?;
    backend.unload().succeeds("unload")?;
    let (empty, _) = resident(&*backend)?;
    Ok(judge::equal(
        "resident bytes after unload",
        MemoryByClass::default(),
        empty,
    )?)
}

/// A weight of more than 2^32 bytes whose bytes can be told apart by where they stand. The file is sparse: zeros but for
/// a few pages.
struct Large {
    plan: LoadPlan,
    files: Vec<SourceFile>,
    mapping: Arc<Sparse>,
}

struct Sparse {
    len: u64,
    marks: Vec<(u64, Vec<u8>)>,
    on_disk: Option<ReadOnlyFile>,
}

/// A file mapped by the kernel, read-only.
struct ReadOnlyFile {
    _file: tempfile::NamedTempFile,
    map: crate::guard::FileMap,
}

impl Mapping for Sparse {
    fn bytes(&self) -> &[u8] {
        self.on_disk.as_ref().map_or(&[], |f| &f.map)
    }
}

impl Sparse {
    fn fill(&self, offset: u64, out: &mut [u8]) {
        out.fill(0);
        for (at, mark) in &self.marks {
            let (start, end) = (
                (*at).max(offset),
                (at + mark.len() as u64).min(offset + out.len() as u64),
            );
            if start < end {
                out[(start - offset) as usize..(end - offset) as usize]
                    .copy_from_slice(&mark[(start - at) as usize..(end - at) as usize]);
            }
        }
    }
}

impl WeightSource for Large {
    fn read_at(&self, weight: WeightId, offset: u64, out: &mut [u8]) -> hoist_backend::Result<()> {
        let end = offset.checked_add(out.len() as u64);
        if weight.0 != 0 || end.is_none_or(|end| end > self.mapping.len) {
            return Err(Error::invalid("range to read", self.mapping.len, offset));
        }
        self.mapping.fill(offset, out);
        Ok(())
    }

    fn files(&self) -> &[SourceFile] {
        &self.files
    }

    fn share(&self, file: u32) -> Option<Arc<dyn Mapping>> {
        (file == 0 && self.mapping.on_disk.is_some()).then(|| self.mapping.clone() as Arc<dyn Mapping>)
    }

    fn check_unchanged(&self) -> hoist_backend::Result<()> {
        Ok(())
    }
}

/// Bytes beyond 2^32 that the weight has.
const BEYOND: u64 = 8 << 20;

fn above_4_gib(cx: &mut Context<'_>, imported: bool) -> Verdict {
    let encoding = [Encoding::F16, Encoding::BF16, Encoding::F32]
        .into_iter()
        .find(|e| cx.info().stored.contains(*e))
        .ok_or_else(|| Stop::Unsupported("it holds no float matrix".into()))?;
    let len = (1u64 << 32) + BEYOND;
    if cx.info().limits.max_weight_bytes.is_some_and(|limit| limit < len) {
        return Err(Stop::Unsupported(
            "its limit for one weight is below 4 GiB".into(),
        ));
    }
    // The copy, what is kept beside it, and room for others.
    let needed = if imported { 1 << 30 } else { 2 * len };
    if audit::available_bytes()? < needed {
        return Err(Stop::Skip(format!("{needed} bytes of memory are not available")));
    }
    let large = Large::new(cx, encoding, len, imported)?;
    let mut backend = if imported {
        open_to_import(cx, Some(1 << 30))?
    } else {
        cx.open()?
    };
    match backend.begin_load(&large.plan) {
        Ok(()) => {}
        Err(Error::OutOfMemory { .. }) if imported => {
            return Err(Stop::Unsupported("it copies what could be imported".into()));
        }
        Err(Error::OutOfMemory { .. }) => {
            return Err(Stop::Skip("the device has less than 4 GiB to give".into()));
        }
        Err(other) => return Err(Failure::new("begin_load of more than 4 GiB", "", "success", other).into()),
    }
    if imported {
        match backend.load_from(&large.plan, &large, &Unwatched) {
            Err(Error::OutOfMemory { .. }) => {
                return Err(Stop::Unsupported("it copies what could be imported".into()));
            }
            other => other.succeeds("load_from")?,
        }
    } else {
        let mut buffer = vec![0; 64 << 20];
        for offset in (0..len).step_by(buffer.len()) {
            let bytes = &mut buffer[..(len - offset).min(64 << 20) as usize];
            large.mapping.fill(offset, bytes);
            upload_bytes(&mut *backend, WeightClass::Float, WeightId(0), offset, bytes)
                .succeeds(format!("upload at {offset}"))?;
        }
    }
    backend.finish_load().succeeds("finish_load")?;
    let mut marks: Vec<u64> = large.mapping.marks.iter().map(|(at, _)| *at).collect();
    // And where a truncated offset would have put them.
    marks.extend([8192, (1 << 31) + 8192, (1 << 32) + (4 << 20)]);
    for at in marks {
        let mut expected = vec![0; 4096];
        large.mapping.fill(at, &mut expected);
        let mut out = Writable::new(4096)?;
        let what = format!("read_back at {at}");
        backend
            .read_back(WeightId(0), at, &mut out)
            .succeeds(what.as_str())?;
        judge::bytes(&what, &expected, &out)?;
    }
    Ok(backend.unload().succeeds("unload")?)
}

impl Large {
    fn new(cx: &mut Context<'_>, encoding: Encoding, len: u64, on_disk: bool) -> Result<Self, Stop> {
        let cols = 4096;
        let shape = Shape::matrix(len / (cols * encoding.block_bytes()), cols);
        let mut marks = Vec::new();
        for at in [0, 1 << 31, (1 << 32) - 4096, 1 << 32, len - 4096] {
            let shape = Shape::vector(4096 / encoding.block_bytes());
            marks.push((
                at,
                operands::weight(&mut cx.random, encoding, shape, Scales::Ordinary)?,
            ));
        }
        let fail = |e: std::io::Error| Stop::Skip(format!("no sparse file can be made: {e}"));
        let on_disk = if on_disk {
            use std::os::unix::fs::FileExt;
            let file = tempfile::NamedTempFile::new().map_err(fail)?;
            file.as_file().set_len(len).map_err(fail)?;
            for (at, bytes) in &marks {
                file.as_file().write_all_at(bytes, *at).map_err(fail)?;
            }
            let map = crate::guard::FileMap::new(file.as_file(), len).map_err(fail)?;
            Some(ReadOnlyFile { _file: file, map })
        } else {
            None
        };
        // A plan is made of a weight without its bytes, then given the size it stands for.
        let one_row = Weight::matrix(
            Some(0),
            Role::AttnQ,
            encoding,
            Shape::matrix(1, cols),
            vec![0; encoding.row_bytes(cols)? as usize],
        );
        let mut info = cx.info().clone();
        info.float_layout = FloatLayout::OutIn;
        let mut plan = Model::new(&info, 1, vec![one_row], Vec::new())?.plan;
        let weight = &mut plan.weights[0];
        weight.shape = shape;
        weight.nbytes = len;
        weight.views = vec![SourceView::contiguous(0, 0, len)];
        weight.resident_bytes = len.next_multiple_of(info.sizing.weight_alignment.max(1));
        plan.resident.float = weight.resident_bytes;
        (plan.nbytes, plan.source_bytes) = (len, len);
        Ok(Self {
            plan,
            files: vec![SourceFile {
                path: "sparse".into(),
                len,
                file: None,
                identity: None,
            }],
            mapping: Arc::new(Sparse { len, marks, on_disk }),
        })
    }
}
