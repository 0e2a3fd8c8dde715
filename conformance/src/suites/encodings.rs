//! Cases of the `encodings` suite: what each encoding's bytes mean, and whether what is claimed works.

use hoist_backend::{Encoding, EncodingSet, Error, OpKind, OpName, OpenOptions, Role, Shape, WorkspaceDims};

use super::ops::session::{Answer, Feed, Session, capacity, open, run};
use super::ops::sketch::Sketch;
use crate::golden::{self, Case as Golden};
use crate::judge::Bounds;
use crate::operands::Scales;
use crate::{Case, Context, Expect, Failure, Need, Stop, Verdict};

/// The cases.
pub fn cases() -> Vec<Case> {
    let each = |group: &'static str, name: &'static str, f: fn(&mut Context<'_>, Encoding) -> Verdict| {
        EncodingSet::weights()
            .iter()
            .map(move |encoding| {
                Case::new("encodings", group, name, move |cx| f(cx, encoding)).with("encoding", encoding)
            })
            .collect::<Vec<_>>()
    };
    let computes = |case: Case| {
        let encoding = case.parameter("encoding").and_then(Encoding::from_name);
        let case = case.needs(Need::Decode).needs(Need::Op(OpName::Embed));
        match encoding {
            Some(encoding) => case.needs(Need::Computed(encoding)),
            None => case,
        }
    };
    let multiplies = |case: Case| {
        computes(case)
            .needs(Need::Computed(Encoding::F32))
            .needs(Need::Op(OpName::MatMul))
            .needs(Need::Op(OpName::Quantise))
    };
    let golden = goldens();
    let has = |case: &Case, embeds: bool| {
        golden.iter().any(|(encoding, embed, _)| {
            Some(encoding.as_str()) == case.parameter("encoding") && *embed == embeds
        })
    };
    let rows = each("dequantise", "rows", dequantised).into_iter().map(computes);
    let golden_rows = each("golden", "rows", golden_rows)
        .into_iter()
        .filter(|c| has(c, true))
        .map(|c| computes(c).unseeded());
    let golden_products = each("golden", "products", golden_products)
        .into_iter()
        .filter(|c| has(c, false))
        .map(|c| multiplies(c).unseeded().limit_s(60));
    let claims = each("claims", "stored", stored);
    let computed = each("claims", "computed", computed)
        .into_iter()
        .map(|c| c.needs(Need::Decode));
    rows.chain(golden_rows)
        .chain(golden_products)
        .chain(claims)
        .chain(computed)
        .collect()
}

/// Goldens of Embed and MatMul, by encoding.
fn goldens() -> Vec<(String, bool, Golden)> {
    let all = golden::all().unwrap_or_default();
    all.into_iter()
        .filter_map(|g| match &g.case {
            Golden::Embed { encoding, .. } => Some((encoding.to_lowercase(), true, g.case.clone())),
            Golden::MatMul { encoding, .. } => Some((encoding.to_lowercase(), false, g.case.clone())),
            _ => None,
        })
        .collect()
}

/// Embedding rows of random blocks against the oracle.
fn dequantised(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    for scales in [Scales::Ordinary, Scales::Spread, Scales::Subnormal] {
        let block = encoding.block_weights().max(32);
        let width = (block * (1 + cx.random.below(320 / block))) as u32;
        let mut sketch = Sketch::new(width, 64);
        let shape = Shape::matrix(width.into(), width.into());
        let weight = sketch.matrix(&mut cx.random, Role::TokenEmbd, encoding, shape, scales)?;
        let out = sketch.f32(width);
        sketch.op(OpKind::Embed { weight, out });
        let sketch = sketch.finish(out);
        let tokens: Vec<u32> = (0..40).map(|_| cx.random.below(width.into()) as u32).collect();
        let what = format!("rows of {encoding} [{width}, {width}], {scales:?} scales");
        let batches = [vec![Feed::logits(0, &tokens)]];
        run(cx, &what, &sketch, &batches, &OpenOptions::default())?;
    }
    Ok(())
}

/// One step on a fresh backend.
fn one_step(cx: &Context<'_>, sketch: &Sketch, token: u32) -> Result<hoist_backend::Result<Answer>, Stop> {
    let capacity = capacity(cx.info(), sketch, 1, 1)?;
    let mut session = Session::open(cx, sketch, capacity, &OpenOptions::default())?;
    Ok(session.forward(&[Feed::logits(0, &[token])])?)
}

/// Bounds of values that f32 represents: a few units in the last place.
fn judge_values(cx: &mut Context<'_>, what: &str, expected: &[f32], found: &[f32], units: f64) -> Verdict {
    let element: Vec<f64> = expected
        .iter()
        .map(|v| f64::from(v.abs()) * units * f64::from(f32::EPSILON) + f64::from(f32::MIN_POSITIVE))
        .collect();
    let bounds = Bounds {
        element: &element,
        row: 1.0,
        nmse: super::ops::bounds::nmse(expected, &element),
    };
    Ok(cx.judge(what, expected, found, expected.len(), &bounds)?)
}

/// Embedding rows of committed vectors.
fn golden_rows(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    for (name, embeds, golden) in goldens() {
        let Golden::Embed {
            cols,
            weights,
            y,
            every,
            ..
        } = golden
        else {
            continue;
        };
        if name != encoding.name() || !embeds {
            continue;
        }
        // The vocabulary is as wide as the row, so there are as many rows.
        let width = cols as u32;
        let mut sketch = Sketch::new(width, 8);
        let bytes = if encoding.matrix_prefix_bytes() > 0 {
            let prefix = encoding.matrix_prefix_bytes() as usize;
            [&weights[..prefix], &weights[prefix..].repeat(cols)].concat()
        } else {
            weights.repeat(cols)
        };
        let shape = Shape::matrix(width.into(), width.into());
        let weight = sketch.matrix_of(Role::TokenEmbd, encoding, shape, bytes);
        let out = sketch.f32(width);
        sketch.op(OpKind::Embed { weight, out });
        let sketch = sketch.finish(out);
        let token = cx.random.below(width.into()) as u32;
        let what = format!("golden row of {encoding}");
        let answer = one_step(cx, &sketch, token)?.succeeds(what.as_str())?;
        let found: Vec<f32> = answer.logits.into_iter().step_by(every).collect();
        judge_values(cx, &what, &y, &found, 4.0)?;
    }
    Ok(())
}

/// Products of committed vectors. A *bounded* backend is judged by the oracle's bounds instead, in `ops`.
fn golden_products(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    for (name, embeds, golden) in goldens() {
        let Golden::MatMul {
            rows,
            cols,
            weights,
            x,
            bias,
            y,
            ..
        } = golden
        else {
            continue;
        };
        if name != encoding.name() || embeds {
            continue;
        }
        let mut sketch = Sketch::new(rows as u32, 8);
        let input = sketch.input_of(cols as u32, &x.repeat(rows));
        let shape = Shape::matrix(rows as u64, cols as u64);
        let weight = sketch.matrix_of(Role::FfnDown, encoding, shape, weights.to_vec());
        let bias = bias.map(|b| sketch.vector(Role::FfnDownBias, hoist_backend::WeightClass::Bias, &b));
        let input = sketch.operand(input, encoding, 1);
        let out = sketch.f32(rows as u32);
        sketch.op(OpKind::MatMul {
            input,
            weight,
            bias,
            out,
        });
        let identity: Vec<f32> = (0..rows * rows)
            .map(|i| if i % (rows + 1) == 0 { 1.0 } else { 0.0 })
            .collect();
        let what = format!("golden product of {encoding} [{rows}, {cols}]");
        let exact = cx.info().numerics == hoist_backend::NumericsClass::Exact;
        match y {
            Some(y) if exact => {
                let sketch = sketch.finish(out);
                let answer = one_step(cx, &sketch, 0)?.succeeds(what.as_str())?;
                judge_values(cx, &what, &y, &answer.logits, 0.0)?;
            }
            // An overflow is reported at the latest by Logits.
            None if cx.info().ops.contains(OpName::Logits) => {
                let weight = sketch.f32_matrix(Role::Output, rows as u32, &identity);
                let logits = sketch.f32(rows as u32);
                sketch.op(OpKind::Logits {
                    input: out,
                    weight,
                    bias: None,
                    out: logits,
                });
                let sketch = sketch.finish(logits);
                one_step(cx, &sketch, 0)?
                    .map(|a| a.logits)
                    .fails(what, "NonFinite", |e| matches!(e, Error::NonFinite { .. }))?;
            }
            _ => {
                let sketch = sketch.finish(out);
                let batches = [vec![Feed::logits(0, &[0])]];
                run(cx, &what, &sketch, &batches, &OpenOptions::default())?;
            }
        }
    }
    Ok(())
}

/// A small matrix of that encoding as an embedding.
fn small(cx: &mut Context<'_>, encoding: Encoding) -> Result<Sketch, Failure> {
    let width = encoding.block_weights().max(32) as u32;
    let mut sketch = Sketch::new(width, 8);
    let shape = Shape::matrix(width.into(), width.into());
    let weight = sketch.matrix(&mut cx.random, Role::TokenEmbd, encoding, shape, Scales::Ordinary)?;
    let out = sketch.f32(width);
    sketch.op(OpKind::Embed { weight, out });
    Ok(sketch.finish(out))
}

/// An encoding that is claimed can be held; one that is not is refused as unsupported, before anything is resident.
fn stored(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    let claimed = cx.info().stored.contains(encoding);
    let sketch = small(cx, encoding)?;
    let model = sketch.model(cx)?;
    let mut backend = cx.open()?;
    if claimed {
        model.load(backend.as_mut())?;
        return Ok(model.check_read_back(backend.as_mut())?);
    }
    match backend.begin_load(&model.plan) {
        Err(Error::Unsupported { .. }) => Err(Stop::Unsupported(format!("it does not hold {encoding}"))),
        Err(e) => Err(Failure::new(
            format!("begin_load of {encoding}, which is not claimed"),
            "",
            "Unsupported",
            e,
        )
        .into()),
        Ok(()) => {
            let works = model.upload_all(backend.as_mut()).is_ok()
                && backend.finish_load().is_ok()
                && model.check_read_back(backend.as_mut()).is_ok();
            Err(Failure::new(
                format!("{encoding}, which is not claimed"),
                "",
                "Unsupported from begin_load",
                if works {
                    "it works"
                } else {
                    "begin_load accepts it"
                },
            )
            .into())
        }
    }
}

/// An encoding that is claimed as computed can be multiplied with and embedded from; one that is only held is refused by
/// `prepare`.
fn computed(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    if !cx.info().stored.contains(encoding) {
        return Err(Stop::Unsupported(format!("it does not hold {encoding}")));
    }
    let claimed = cx.info().computed.contains(encoding);
    let mut sketch = small(cx, encoding)?;
    let multiplies = [OpName::Quantise, OpName::MatMul];
    if multiplies.iter().all(|op| cx.info().ops.contains(*op)) {
        let (width, x) = (sketch.program.vocab, sketch.program.logits);
        let shape = Shape::matrix(width.into(), width.into());
        let weight = sketch.matrix(&mut cx.random, Role::FfnDown, encoding, shape, Scales::Ordinary)?;
        let input = sketch.operand(x, encoding, 1);
        let out = sketch.f32(width);
        sketch.op(OpKind::MatMul {
            input,
            weight,
            bias: None,
            out,
        });
        sketch = sketch.finish(out);
    }
    if claimed {
        let batches = [vec![Feed::logits(0, &[0, 1, 2])]];
        let what = format!("{encoding}, which is claimed");
        return run(cx, &what, &sketch, &batches, &OpenOptions::default());
    }
    let capacity = capacity(cx.info(), &sketch, 1, 1)?;
    let mut backend = open(cx, &OpenOptions::default())?;
    let model = sketch.model(cx)?;
    model.load(backend.as_mut())?;
    backend.build_index(&model.index).succeeds("build_index")?;
    backend
        .init_workspace(&WorkspaceDims::new(&sketch.program, capacity)?)
        .succeeds("init_workspace")?;
    let decode = backend
        .as_decode()
        .ok_or_else(|| Failure::new("as_decode", "", "a decoder", "none"))?;
    decode.prepare(&sketch.program).fails(
        format!("prepare with {encoding}, which is not claimed as computed"),
        "Unsupported",
        |e| matches!(e, Error::Unsupported { .. }),
    )?;
    Err(Stop::Unsupported(format!("it does not compute with {encoding}")))
}
