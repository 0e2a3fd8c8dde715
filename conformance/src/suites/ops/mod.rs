//! Cases of the `ops` suite: every operation of a decode program, on random operands, against the oracle.
//!
//! Operands come in as rows of f32 embeddings, one for each token or position; the result of the operation is what the
//! program calls its logits, so that nothing stands between it and the judge.

use hoist_backend::{
    ActivationKind, Encoding, EncodingSet, KvSpec, NumericsClass, OpKind, OpName, OpenOptions, Role,
    RopeStyle, Shape, TableId, ValueId, ValueKind, WeightClass,
};

use crate::fixture::Weight;
use crate::judge;
use crate::operands::{self, Magnitudes, Random, Scales};
use crate::{Case, Context, Failure, Need, Verdict};

pub(crate) mod bounds;
pub(crate) mod session;
pub(crate) mod sketch;

use session::{Feed, Oracle, Session, capacity, compare, run};
use sketch::{Sketch, rope_table};

/// The cases.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for encoding in EncodingSet::weights().iter() {
        let needs = |case: Case| {
            case.with("encoding", encoding)
                .needs(Need::Computed(encoding))
                .needs(Need::Op(OpName::MatMul))
                .needs(Need::Op(OpName::Quantise))
        };
        let product = move |cx: &mut Context<'_>| products(cx, encoding);
        cases.push(needs(case("matmul", "product", &[], product)).limit_s(60));
    }
    for encoding in EncodingSet::weights().iter() {
        let batch = move |cx: &mut Context<'_>| batches(cx, encoding);
        let ops = [OpName::MatMul, OpName::Quantise];
        cases.push(
            case("batches", "sizes", &ops, batch)
                .with("encoding", encoding)
                .needs(Need::Computed(encoding))
                .limit_s(60),
        );
    }
    for encoding in EncodingSet::weights().iter() {
        let experts = move |cx: &mut Context<'_>| expert_products(cx, encoding);
        let ops = [
            OpName::RouterTopK,
            OpName::ExpertMatMul,
            OpName::WeightedSum,
            OpName::Quantise,
        ];
        cases.push(
            case("expert_matmul", "product", &ops, experts)
                .with("encoding", encoding)
                .needs(Need::Computed(encoding))
                .limit_s(60),
        );
    }
    for encoding in [Encoding::Q4_K, Encoding::Q8_0, Encoding::F16] {
        let long = move |cx: &mut Context<'_>| long_rows(cx, encoding);
        cases.push(
            case("long_rows", "product", &[OpName::MatMul, OpName::Quantise], long)
                .with("encoding", encoding)
                .needs(Need::Computed(encoding))
                .limit_s(60),
        );
    }
    for encoding in [Encoding::F32, Encoding::F16, Encoding::BF16, Encoding::Q8_0] {
        let rows = move |cx: &mut Context<'_>| position_rows(cx, encoding);
        cases.push(
            case("embed_position", "rows", &[OpName::EmbedPosition], rows)
                .with("encoding", encoding)
                .needs(Need::Computed(encoding)),
        );
    }
    cases.extend(elementwise());
    cases.extend(attention_cases());
    cases.push(case(
        "logits",
        "tied",
        &[OpName::Logits, OpName::Quantise],
        tied_logits,
    ));
    cases.push(case(
        "quantise",
        "extremes",
        &[OpName::MatMul, OpName::Quantise],
        extremes,
    ));
    let mixture = [OpName::RouterTopK, OpName::ExpertMatMul, OpName::WeightedSum];
    cases.push(case("router", "ties", &mixture, |cx| router(cx, true)));
    cases.push(case("router", "random", &mixture, |cx| router(cx, false)));
    let overflow = [OpName::Mul, OpName::EmbedPosition, OpName::Logits];
    cases.push(case("non_finite", "is_refused", &overflow, non_finite));
    let query = [OpName::MatMul, OpName::StoreKv, OpName::Attention];
    cases.push(case("non_finite", "a_query_under_a_cap", &query, infinite_query));
    cases.push(case(
        "non_finite",
        "a_value_under_a_cap",
        &[OpName::MatMul, OpName::SoftCap],
        infinite_value,
    ));
    let minus = [OpName::MatMul, mixture[0], mixture[1], mixture[2]];
    cases.push(case("non_finite", "an_expert_that_is_shut", &minus, shut_expert));
    cases
}

/// A case of this suite: operands are f32 embeddings.
fn case(
    group: &'static str,
    name: &'static str,
    ops: &[OpName],
    run: impl Fn(&mut Context<'_>) -> Verdict + Send + Sync + 'static,
) -> Case {
    let case = Case::new("ops", group, name, run)
        .needs(Need::Decode)
        .needs(Need::Computed(Encoding::F32))
        .needs(Need::Op(OpName::Embed));
    ops.iter().fold(case, |case, op| case.needs(Need::Op(*op)))
}

/// Columns of a matrix: a multiple of the block, and of 32 where activations are quantised.
fn unit(encoding: Encoding) -> u64 {
    if encoding.is_quantized() {
        encoding.block_weights().max(32)
    } else {
        1
    }
}

/// All tokens of the vocabulary in one batch, and then some of them one by one.
fn tokens(sketch: &Sketch, random: &mut Random) -> Vec<Vec<Feed>> {
    let vocab = sketch.program.vocab;
    let all: Vec<u32> = (0..vocab.min(32)).collect();
    let mut batches = vec![vec![Feed::logits(0, &all)]];
    for _ in 0..3 {
        batches.push(vec![Feed::logits(0, &[random.below(vocab.into()) as u32])]);
    }
    batches
}

/// Enough positions for [`tokens`].
const CONTEXT: u32 = 64;

fn go(cx: &mut Context<'_>, what: &str, sketch: &Sketch) -> Verdict {
    let batches = tokens(sketch, &mut cx.random);
    run(cx, what, sketch, &batches, &OpenOptions::default())
}

/// `rows × cols` of that encoding, times random vectors.
fn product_sketch(
    cx: &mut Context<'_>,
    encoding: Encoding,
    (rows, cols): (u32, u32),
    scales: Scales,
    magnitudes: Magnitudes,
) -> Result<Sketch, Failure> {
    let random = &mut cx.random;
    let mut sketch = Sketch::new(rows, CONTEXT);
    let x = sketch.input(random, cols, magnitudes);
    let shape = Shape::matrix(rows.into(), cols.into());
    let weight = sketch.matrix(random, Role::FfnDown, encoding, shape, scales)?;
    let bias =
        (random.below(2) == 0).then(|| sketch.bells(random, Role::FfnDownBias, WeightClass::Bias, rows));
    let input = sketch.operand(x, encoding, 1);
    let out = sketch.f32(rows);
    sketch.op(OpKind::MatMul {
        input,
        weight,
        bias,
        out,
    });
    Ok(sketch.finish(out))
}

fn products(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    let unit = unit(encoding);
    for round in 0..5 {
        let scales = [
            Scales::Ordinary,
            Scales::Ordinary,
            Scales::Spread,
            Scales::Subnormal,
            Scales::Ordinary,
        ][round];
        let magnitudes = cx.random.choose(Magnitudes::ALL);
        // One row of one block; an odd number of rows that end in a partial segment; anything.
        let (rows, cols) = match round {
            0 => (1, unit),
            1 => {
                let blocks = 1 + cx.random.below(800 / unit + 1);
                let cols = unit * blocks;
                let partial = if cols.is_multiple_of(256) && unit < 256 {
                    cols + unit
                } else {
                    cols
                };
                (2 * cx.random.below(12) + 3, partial)
            }
            _ => (
                1 + cx.random.below(40),
                unit * (1 + cx.random.below(800 / unit + 1)),
            ),
        };
        let what = format!("{encoding} [{rows}, {cols}], {scales:?} scales, {magnitudes:?} activations");
        let sketch = product_sketch(cx, encoding, (rows as u32, cols as u32), scales, magnitudes)?;
        go(cx, &what, &sketch)?;
    }
    Ok(())
}

/// Every class of batch size, of one model: results must not depend on the batch a token is in.
fn batches(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    let unit = unit(encoding);
    let cols = unit * (288u64.div_ceil(unit));
    let mut sketch = product_sketch(
        cx,
        encoding,
        (33, cols as u32),
        Scales::Ordinary,
        Magnitudes::Outliers,
    )?;
    sketch.program.max_context = 256;
    let sizes = [1usize, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65];
    let capacity = capacity(cx.info(), &sketch, 1, 65)?;
    let mut session = Session::open(cx, &sketch, capacity, &OpenOptions::default())?;
    let mut oracle = Oracle::new(cx, &sketch);
    for size in sizes {
        let batch: Vec<u32> = (0..size).map(|_| cx.random.below(33) as u32).collect();
        let what = format!("{encoding} [33, {cols}] in a batch of {size}");
        compare(cx, &what, &mut session, &mut oracle, &[Feed::logits(0, &batch)])?;
        session.decode()?.truncate(hoist_backend::SequenceId(0), 0)?;
        oracle.truncate(0, 0)?;
    }
    Ok(())
}

/// Sums of many segments: what a wrong carry or a 32-bit sum needs to show.
fn long_rows(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    for magnitudes in [Magnitudes::Ordinary, Magnitudes::Revealing] {
        let cols = 256 * (48 + cx.random.below(32)) as u32;
        let sketch = product_sketch(cx, encoding, (3, cols), Scales::Ordinary, magnitudes)?;
        go(
            cx,
            &format!("{encoding} [3, {cols}], {magnitudes:?} activations"),
            &sketch,
        )?;
    }
    Ok(())
}

fn position_rows(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    let random = &mut cx.random;
    let width = 32 * (1 + random.below(9)) as u32;
    let mut sketch = Sketch::new(width, CONTEXT);
    let shape = Shape::matrix(CONTEXT.into(), width.into());
    let weight = sketch.matrix(random, Role::PositionEmbd, encoding, shape, Scales::Ordinary)?;
    // Tokens go somewhere, though they do not matter here.
    sketch.input(random, 32, Magnitudes::Ordinary);
    let out = sketch.f32(width);
    sketch.op(OpKind::EmbedPosition { weight, out });
    let sketch = sketch.finish(out);
    go(cx, &format!("{encoding} rows of positions"), &sketch)
}

/// Routed experts of that encoding: gate and down, so that inputs are shared and are not.
fn expert_products(cx: &mut Context<'_>, encoding: Encoding) -> Verdict {
    let random = &mut cx.random;
    let unit = unit(encoding).max(32) as u32;
    let (n, k) = (3 + random.below(5) as u32, 1 + random.below(3) as u32);
    let (hidden, n_ff) = (
        unit * (1 + random.below(2) as u32),
        unit * (1 + random.below(2) as u32),
    );
    let vocab = hidden;
    let mut sketch = Sketch::new(vocab, CONTEXT);
    let x = sketch.input(random, hidden, Magnitudes::Ordinary);
    // The router's own product is of f32.
    let rows: Vec<f32> = (0..n * hidden).map(|_| random.bell() * 0.1).collect();
    let router = sketch.f32_matrix(Role::Router, n, &rows);
    let logits = sketch.f32(n);
    sketch.op(OpKind::MatMul {
        input: x,
        weight: router,
        bias: None,
        out: logits,
    });
    let (experts, weights) = (sketch.value(k, ValueKind::Experts), sketch.f32(k));
    sketch.op(OpKind::RouterTopK {
        logits,
        k,
        normalise: true,
        experts,
        weights,
    });
    let up = sketch.experts(random, encoding, (x, experts), Role::FfnUpExps, (n, n_ff), true)?;
    let down = sketch.experts(
        random,
        encoding,
        (up, experts),
        Role::FfnDownExps,
        (n, hidden),
        false,
    )?;
    let out = sketch.f32(hidden);
    sketch.op(OpKind::WeightedSum {
        input: down,
        experts,
        weights,
        out,
    });
    let sketch = sketch.finish(out);
    go(
        cx,
        &format!("{n} {encoding} experts of [{n_ff}, {hidden}], {k} chosen"),
        &sketch,
    )
}

/// A router whose choice shows in which rows are summed. `ties`: many experts are equally probable.
fn router(cx: &mut Context<'_>, ties: bool) -> Verdict {
    for normalise in [false, true] {
        let random = &mut cx.random;
        let n = random.choose([2, 5, 8, 33, 128]) as u32;
        let k = 1 + random.below(u64::from(n.min(8))) as u32;
        let width = 24;
        let mut sketch = Sketch::new(width, CONTEXT);
        let rows: Vec<f32> = (0..width * n)
            .map(|_| {
                if ties {
                    random.below(3) as f32
                } else {
                    random.bell() * 4.0
                }
            })
            .collect();
        let logits = sketch.input_of(n, &rows);
        let x = sketch.position_input(random, 40, Magnitudes::Ordinary);
        let (experts, weights) = (sketch.value(k, ValueKind::Experts), sketch.f32(k));
        sketch.op(OpKind::RouterTopK {
            logits,
            k,
            normalise,
            experts,
            weights,
        });
        let chosen = sketch.experts(
            random,
            Encoding::F32,
            (x, experts),
            Role::FfnUpExps,
            (n, width),
            true,
        )?;
        let out = sketch.f32(width);
        sketch.op(OpKind::WeightedSum {
            input: chosen,
            experts,
            weights,
            out,
        });
        let sketch = sketch.finish(out);
        go(cx, &format!("{k} of {n} experts, normalise {normalise}"), &sketch)?;
    }
    Ok(())
}

/// Values at which functions change their branch, overflow inside, or lose everything.
const SPECIAL: &[f32] = &[
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    f32::MIN_POSITIVE,
    -1e-20,
    1e-4,
    -1e-3,
    0.3,
    -0.624_999_94,
    0.625,
    -0.75,
    1.0,
    -1.0,
    3.0,
    -5.5,
    9.01,
    -17.0,
    44.0,
    -44.5,
    87.3,
    -88.7,
    89.0,
    -103.9,
    104.1,
    -200.0,
    6.5e4,
    -1e10,
    1e20,
    -1e28,
];

/// A sketch of one operation on rows of special and of random values, with an operand from the position.
fn on_values(
    cx: &mut Context<'_>,
    width: u32,
    special: bool,
    op: impl FnOnce(&mut Sketch, &mut Random, ValueId, ValueId) -> ValueId,
) -> Sketch {
    let random = &mut cx.random;
    let mut sketch = Sketch::new(width, CONTEXT);
    let magnitudes = random.choose(Magnitudes::ALL);
    let rows: Vec<f32> = (0..width)
        .flat_map(|row| {
            let mut values = operands::vector(random, width as usize, magnitudes);
            if special && row % 2 == 0 {
                for value in &mut values {
                    *value = SPECIAL[random.below(SPECIAL.len() as u64) as usize];
                }
            }
            values
        })
        .collect();
    let a = sketch.input_of(width, &rows);
    let b = sketch.position_input(random, width, Magnitudes::Ordinary);
    let out = op(&mut sketch, random, a, b);
    sketch.finish(out)
}

/// Widths around the 64 lanes and 256 places of the contract's sums.
fn some_width(random: &mut Random) -> u32 {
    match random.below(3) {
        0 => random.choose([1, 2, 31, 32, 63, 64, 65]),
        1 => random.choose([255, 256, 257, 511, 513]),
        _ => 1 + random.below(600) as u32,
    }
}

type Build = fn(&mut Sketch, &mut Random, ValueId, ValueId) -> ValueId;

fn elementwise() -> Vec<Case> {
    let builds: &[(&'static str, &'static str, OpName, bool, Build)] = &[
        ("rms_norm", "vector", OpName::RmsNorm, false, |s, r, a, _| {
            rms_norm(s, r, a, 1)
        }),
        ("rms_norm", "heads", OpName::RmsNorm, false, |s, r, a, _| {
            let width = s.program.vocab;
            let rows = [8, 5, 3, 2, 1].into_iter().find(|n| width.is_multiple_of(*n));
            rms_norm(s, r, a, rows.unwrap_or(1))
        }),
        ("layer_norm", "vector", OpName::LayerNorm, false, |s, r, a, _| {
            let width = s.program.vocab;
            let weight = s.bells(r, Role::AttnNorm, WeightClass::Gamma, width);
            let bias = s.bells(r, Role::AttnNormBias, WeightClass::Bias, width);
            let out = s.f32(width);
            s.op(OpKind::LayerNorm {
                input: a,
                weight,
                bias,
                eps: r.choose([1e-5, 1e-6]),
                out,
            });
            out
        }),
        ("activation", "silu", OpName::Activation, true, |s, _, a, _| {
            activation(s, a, ActivationKind::Silu)
        }),
        (
            "activation",
            "gelu_tanh",
            OpName::Activation,
            true,
            |s, _, a, _| activation(s, a, ActivationKind::GeluTanh),
        ),
        ("mul", "values", OpName::Mul, true, |s, _, a, b| {
            let out = s.f32(s.program.vocab);
            s.op(OpKind::Mul { a, b, out });
            out
        }),
        ("add", "values", OpName::Add, true, |s, r, a, b| {
            // The sum may be written over either operand.
            let fresh = s.f32(s.program.vocab);
            let out = r.choose([a, b, fresh]);
            s.op(OpKind::Add { a, b, out });
            out
        }),
        ("scale", "values", OpName::Scale, true, |s, r, a, _| {
            let out = s.f32(s.program.vocab);
            s.op(OpKind::Scale {
                input: a,
                factor: r.choose([0.0, -1.0, 5.3, 1e-30, 0.088_388_35]),
                out,
            });
            out
        }),
        ("soft_cap", "values", OpName::SoftCap, true, |s, r, a, _| {
            let out = s.f32(s.program.vocab);
            s.op(OpKind::SoftCap {
                input: a,
                cap: r.choose([30.0, 50.0, 3.7, 0.5]),
                out,
            });
            out
        }),
    ];
    let mut cases: Vec<Case> = builds
        .iter()
        .map(|(group, name, op, special, build)| {
            case(group, name, &[*op, OpName::EmbedPosition], move |cx| {
                for _ in 0..4 {
                    let width = some_width(&mut cx.random);
                    let sketch = on_values(cx, width, *special, build);
                    go(cx, &format!("{op} of {width} values"), &sketch)?;
                }
                Ok(())
            })
        })
        .collect();
    for (name, style) in [
        ("interleaved", RopeStyle::Interleaved),
        ("half_split", RopeStyle::HalfSplit),
    ] {
        cases.push(case("rope", name, &[OpName::Rope], move |cx| rope(cx, style)));
    }
    // Cases of a group stand together.
    cases.sort_by_key(|case| {
        builds
            .iter()
            .position(|b| b.0 == case.group)
            .unwrap_or(usize::MAX)
    });
    cases
}

fn rms_norm(sketch: &mut Sketch, random: &mut Random, input: ValueId, rows: u32) -> ValueId {
    let width = sketch.program.vocab;
    let weight = sketch.bells(random, Role::AttnNorm, WeightClass::Gamma, width / rows);
    let out = sketch.f32(width);
    sketch.op(OpKind::RmsNorm {
        input,
        weight,
        eps: random.choose([1e-5, 1e-6]),
        rows,
        out,
    });
    out
}

fn activation(sketch: &mut Sketch, input: ValueId, kind: ActivationKind) -> ValueId {
    let out = sketch.f32(sketch.program.vocab);
    sketch.op(OpKind::Activation { input, kind, out });
    out
}

fn rope(cx: &mut Context<'_>, style: RopeStyle) -> Verdict {
    for _ in 0..3 {
        let random = &mut cx.random;
        let heads = 1 + random.below(5) as u32;
        let head_dim = random.choose([2, 8, 20, 64, 96]) as u32;
        let n_rot = 2 * (1 + random.below(u64::from(head_dim / 2)) as u32);
        let width = heads * head_dim;
        let mut sketch = Sketch::new(width, CONTEXT);
        sketch.program.tables.push(rope_table(CONTEXT, n_rot));
        let value = sketch.input(random, width, Magnitudes::Ordinary);
        sketch.op(OpKind::Rope {
            value,
            table: TableId(0),
            style,
            heads,
            n_rot,
        });
        let sketch = sketch.finish(value);
        go(
            cx,
            &format!("{heads} heads of {head_dim}, {n_rot} turned"),
            &sketch,
        )?;
    }
    Ok(())
}

/// Attention alone: queries, keys and values are products of the token's row with f32 matrices.
fn attention_sketch(
    random: &mut Random,
    context: u32,
    window: Option<u32>,
    soft_cap: Option<f32>,
    magnitudes: Magnitudes,
) -> Sketch {
    let head_dim = random.choose([4, 8, 20, 32, 64]) as u32;
    let kv_heads = 1 + random.below(3) as u32;
    let heads = kv_heads * (1 + random.below(3) as u32);
    let mut sketch = Sketch::new(heads * head_dim, context);
    sketch.program.kv.push(KvSpec { kv_heads, head_dim });
    let width = 24;
    let x = sketch.input(random, width, magnitudes);
    sketch.in_layer(Some(0));
    let mut project = |sketch: &mut Sketch, role: Role, heads: u32| {
        let rows = heads * head_dim;
        let values: Vec<f32> = (0..rows * width).map(|_| random.bell() * 0.3).collect();
        let weight = sketch.f32_matrix(role, rows, &values);
        let out = sketch.f32(rows);
        sketch.op(OpKind::MatMul {
            input: x,
            weight,
            bias: None,
            out,
        });
        out
    };
    let query = project(&mut sketch, Role::AttnQ, heads);
    let key = project(&mut sketch, Role::AttnK, kv_heads);
    let value = project(&mut sketch, Role::AttnV, kv_heads);
    sketch.op(OpKind::StoreKv { key, value });
    let out = sketch.f32(heads * head_dim);
    sketch.op(OpKind::Attention {
        query,
        heads,
        scale: 0.29,
        window,
        soft_cap,
        out,
    });
    sketch.in_layer(None);
    sketch.finish(out)
}

fn attention_cases() -> Vec<Case> {
    let ops = [OpName::MatMul, OpName::StoreKv, OpName::Attention];
    let attention = |name: &'static str, context: u32, windows: &'static [Option<u32>], cap: Option<f32>| {
        case("attention", name, &ops, move |cx| {
            for window in windows {
                let sketch = attention_sketch(&mut cx.random, context, *window, cap, Magnitudes::Ordinary);
                let vocab = u64::from(sketch.program.vocab);
                let ids: Vec<u32> = (0..context).map(|_| cx.random.below(vocab) as u32).collect();
                let prompt = ids.len() - 3;
                let cut = 1 + cx.random.below(prompt as u64 - 1) as usize;
                let mut batches = vec![
                    vec![Feed::logits(0, &ids[..cut])],
                    vec![Feed::logits(0, &ids[cut..prompt])],
                ];
                batches.extend(ids[prompt..].iter().map(|t| vec![Feed::logits(0, &[*t])]));
                let what = format!("attention over {context} positions, window {window:?}, cap {cap:?}");
                run(cx, &what, &sketch, &batches, &OpenOptions::default())?;
            }
            Ok(())
        })
    };
    vec![
        attention("short", 12, &[None, None], None).limit_s(60),
        attention("splits", 530, &[None], None).limit_s(60),
        attention("window", 300, &[Some(1), Some(3), Some(257)], None).limit_s(60),
        attention("soft_cap", 40, &[None, Some(5)], Some(1.5)).limit_s(60),
        case("store_kv", "rounds_to_f16", &ops, |cx| {
            // With one position, what comes out is the value that was stored.
            for magnitudes in [Magnitudes::Outliers, Magnitudes::Tiny] {
                let sketch = attention_sketch(&mut cx.random, CONTEXT, Some(1), None, magnitudes);
                go(cx, &format!("values as stored, {magnitudes:?}"), &sketch)?;
            }
            Ok(())
        }),
        case("store_kv", "overflow_is_refused", &ops, store_overflow),
    ]
}

/// A magnitude that f16 does not have: NonFinite, and the sequence goes on as if nothing had been.
fn store_overflow(cx: &mut Context<'_>) -> Verdict {
    let mut sketch = attention_sketch(&mut cx.random, CONTEXT, None, None, Magnitudes::Ordinary);
    // The last token's row is 10^7 times as large.
    let embedding = &mut sketch.weights[0];
    let row = embedding.canonical.len() / embedding.shape.rows as usize;
    let last = embedding.canonical.len() - row;
    for value in embedding.canonical[last..].chunks_exact_mut(4) {
        let v = f32::from_le_bytes([value[0], value[1], value[2], value[3]]);
        value.copy_from_slice(&(v * 1e7).to_le_bytes());
    }
    let bad = sketch.program.vocab - 1;
    let batches = [vec![0, 1, 2], vec![1, bad], vec![2, 0], vec![bad], vec![1]];
    let batches: Vec<Vec<Feed>> = batches.iter().map(|b| vec![Feed::logits(0, b)]).collect();
    run(
        cx,
        "values beyond f16",
        &sketch,
        &batches,
        &OpenOptions::default(),
    )
}

/// An output matrix that is the embedding.
fn tied_logits(cx: &mut Context<'_>) -> Verdict {
    let encodings: Vec<Encoding> = cx.info().computed.iter().collect();
    for _ in 0..4 {
        let random = &mut cx.random;
        let encoding = encodings[random.below(encodings.len() as u64) as usize];
        let width = (unit(encoding) * (32 / unit(encoding).min(32)) * (1 + random.below(2))) as u32;
        let vocab = 3 + random.below(60) as u32;
        let mut sketch = Sketch::new(vocab, CONTEXT);
        let shape = Shape::matrix(vocab.into(), width.into());
        let embedding = sketch.matrix(random, Role::TokenEmbd, encoding, shape, Scales::Ordinary)?;
        let x = sketch.f32(width);
        sketch.op(OpKind::Embed {
            weight: embedding,
            out: x,
        });
        let input = sketch.operand(x, encoding, 1);
        let weight = sketch.tie(Role::Output, embedding);
        let bias = sketch.bells(random, Role::OutputBias, WeightClass::Bias, vocab);
        let out = sketch.f32(vocab);
        sketch.op(OpKind::Logits {
            input,
            weight,
            bias: Some(bias),
            out,
        });
        let sketch = sketch.finish(out);
        go(cx, &format!("tied {encoding} [{vocab}, {width}]"), &sketch)?;
    }
    Ok(())
}

/// Activations at the edges of quantisation: ties, whole steps, zero segments and their neighbours, one spike.
fn extremes(cx: &mut Context<'_>) -> Verdict {
    let encodings: Vec<Encoding> = cx.info().computed.iter().filter(|e| e.is_quantized()).collect();
    if encodings.is_empty() {
        return Err(crate::Stop::Unsupported(
            "it computes with no quantised encoding".into(),
        ));
    }
    for _ in 0..3 {
        let random = &mut cx.random;
        let encoding = encodings[random.below(encodings.len() as u64) as usize];
        let cols = unit(encoding) * (1 + 512 / unit(encoding));
        let (rows, cols) = (32u32, cols as u32);
        let mut values = Vec::new();
        for row in 0..rows {
            let d = crate::oracle::times_power_of_two(1.0, random.below(40) as i32 - 20);
            for i in 0..cols {
                let steps = random.below(8128) as f32 * 0.5 - 2032.0;
                values.push(match row % 8 {
                    0 => 0.0,
                    1 if i == cols / 2 => 1e6,
                    1 => 0.0,
                    2 => 2032.0 * d,
                    // Halves of a step of a block with the largest scale.
                    3 if i % 32 == 0 => 2032.0 * d,
                    3 | 4 => steps * d,
                    5 => f32::MIN_POSITIVE * 2031.9,
                    6 => f32::MIN_POSITIVE * 2032.0 * (1.0 + random.unit().abs()),
                    _ => random.bell() * d,
                });
            }
        }
        let mut sketch = Sketch::new(rows, CONTEXT);
        let x = sketch.input_of(cols, &values);
        let shape = Shape::matrix(rows.into(), cols.into());
        let weight = sketch.matrix(random, Role::FfnDown, encoding, shape, Scales::Ordinary)?;
        let input = sketch.operand(x, encoding, 1);
        let out = sketch.f32(rows);
        sketch.op(OpKind::MatMul {
            input,
            weight,
            bias: None,
            out,
        });
        let sketch = sketch.finish(out);
        go(cx, &format!("{encoding} [{rows}, {cols}] of edges"), &sketch)?;
    }
    Ok(())
}

/// A product that overflows is refused as a whole, lengths stay, and the next step is right.
fn non_finite(cx: &mut Context<'_>) -> Verdict {
    let random = &mut cx.random;
    let width = 24u32;
    let mut sketch = Sketch::new(width, CONTEXT);
    let rows: Vec<f32> = (0..width)
        .flat_map(|row| {
            let factor = if row == width - 1 { 3e38 } else { 1.0 };
            operands::vector(random, width as usize, Magnitudes::Ordinary)
                .into_iter()
                .map(move |v| (v * 0.2).clamp(-1.0, 1.0) * factor)
        })
        .collect();
    let mut rows = rows;
    // Whatever is drawn, one product of the last row overflows at every position.
    if let Some(first) = rows.len().checked_sub(width as usize) {
        rows[first] = 3e38;
    }
    let a = sketch.input_of(width, &rows);
    let positions: Vec<f32> = (0..CONTEXT * width).map(|_| 4.0 + random.bell().abs()).collect();
    let weight = sketch.f32_matrix(Role::PositionEmbd, CONTEXT, &positions);
    let b = sketch.f32(width);
    sketch.op(OpKind::EmbedPosition { weight, out: b });
    let product = sketch.f32(width);
    sketch.op(OpKind::Mul { a, b, out: product });
    let identity: Vec<f32> = (0..width * width)
        .map(|i| if i % (width + 1) == 0 { 1.0 } else { 0.0 })
        .collect();
    let weight = sketch.f32_matrix(Role::Output, width, &identity);
    let out = sketch.f32(width);
    sketch.op(OpKind::Logits {
        input: product,
        weight,
        bias: None,
        out,
    });
    let sketch = sketch.finish(out);
    let bad = width - 1;
    let batches = [
        vec![0, 1],
        vec![bad],
        vec![2, bad, 3],
        vec![4],
        vec![bad],
        vec![5, 6],
    ];
    let batches: Vec<Vec<Feed>> = batches.iter().map(|b| vec![Feed::logits(0, b)]).collect();
    let mut overflows = Oracle::new(cx, &sketch);
    // Without an overflow the case would ask nothing.
    let asks = !overflows.is_finite(bad)?;
    if !asks {
        return Err(Failure::new("the suite's own operands", "", "an overflow", "none").into());
    }
    run(
        cx,
        "products that overflow",
        &sketch,
        &batches,
        &OpenOptions::default(),
    )
}

/// Tokens of which the last one meets an infinity on its way, which is bounded or not, and the one before a NaN, alone and
/// between others, against the oracle. If the oracle sees these two otherwise, the operands ask nothing.
fn met_or_not(cx: &mut Context<'_>, what: &str, sketch: &Sketch, bounded: bool) -> Verdict {
    let (infinite, nan) = (sketch.program.vocab - 1, sketch.program.vocab - 2);
    let mut oracle = Oracle::of(NumericsClass::Exact, sketch);
    for (token, expected) in [(infinite, bounded), (nan, false), (0, true)] {
        let found = oracle.is_finite(token)?;
        judge::equal(
            &format!("{what}: whether token {token} is finite"),
            expected,
            found,
        )?;
    }
    let batches = [
        vec![0, 1],
        vec![infinite],
        vec![2, infinite, 0],
        vec![nan],
        vec![1, nan],
        vec![infinite, 2],
    ];
    let batches: Vec<Vec<Feed>> = batches.iter().map(|b| vec![Feed::logits(0, b)]).collect();
    run(cx, what, sketch, &batches, &OpenOptions::default())
}

/// Gives the last two columns of an embedding to the last two tokens: 0 and 4 for the last, 4 and 4 for the one before.
fn overflow_last_tokens(embedding: &mut Weight) {
    let (rows, cols) = (embedding.shape.rows, embedding.shape.cols);
    for row in 0..rows {
        set(embedding, row, cols - 2, if row + 2 == rows { 4.0 } else { 0.0 });
        set(embedding, row, cols - 1, if row + 2 >= rows { 4.0 } else { 0.0 });
    }
}

/// Such columns in a row of a matrix: an infinity for the last token, and two whose sum is a NaN for the one before.
fn overflow_row(matrix: &mut Weight, row: u64, factor: f32) {
    let cols = matrix.shape.cols;
    set(matrix, row, cols - 2, -factor);
    set(matrix, row, cols - 1, factor);
}

/// Replaces an element of a matrix of f32.
fn set(matrix: &mut Weight, row: u64, col: u64, value: f32) {
    let at = 4 * (row * matrix.shape.cols + col) as usize;
    matrix.canonical[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// An element of a query that overflowed: the scores are infinite, which a cap bounds and nothing else does.
fn infinite_query(cx: &mut Context<'_>) -> Verdict {
    for cap in [Some(1.5), None] {
        let mut sketch = attention_sketch(&mut cx.random, CONTEXT, None, cap, Magnitudes::Ordinary);
        let head_dim = u64::from(sketch.program.kv[0].head_dim);
        for matrix in &mut sketch.weights {
            if matrix.role == Role::TokenEmbd {
                overflow_last_tokens(matrix);
                continue;
            }
            for row in 0..matrix.shape.rows {
                let overflows = matrix.role == Role::AttnQ && row.is_multiple_of(head_dim);
                overflow_row(matrix, row, if overflows { 3e38 } else { 0.0 });
            }
        }
        let what = format!("a query that overflows under a cap of {cap:?}");
        met_or_not(cx, &what, &sketch, cap.is_some())?;
    }
    Ok(())
}

/// A sketch with a product of `n` elements whose first one overflows to an infinity of that sign for the last token, and is a
/// NaN for the one before.
fn overflowing(random: &mut Random, n: u32, sign: f32) -> (Sketch, ValueId) {
    let width = 24u32;
    let mut sketch = Sketch::new(width, CONTEXT);
    let x = sketch.input(random, width, Magnitudes::Ordinary);
    let values: Vec<f32> = (0..n * width).map(|_| random.bell() * 0.3).collect();
    let weight = sketch.f32_matrix(Role::FfnGate, n, &values);
    let [embedding, matrix] = sketch.weights.as_mut_slice() else {
        return (sketch, x);
    };
    overflow_last_tokens(embedding);
    for row in 0..u64::from(n) {
        overflow_row(matrix, row, if row == 0 { sign * 3e38 } else { 0.0 });
    }
    let out = sketch.f32(n);
    sketch.op(OpKind::MatMul {
        input: x,
        weight,
        bias: None,
        out,
    });
    (sketch, out)
}

/// A product that overflowed, as the operand of SoftCap, which bounds it, or as a logit.
fn infinite_value(cx: &mut Context<'_>) -> Verdict {
    for capped in [true, false] {
        let sign = cx.random.choose([1.0, -1.0]);
        let (mut sketch, input) = overflowing(&mut cx.random, 24, sign);
        let mut out = input;
        if capped {
            out = sketch.f32(24);
            sketch.op(OpKind::SoftCap { input, cap: 1.5, out });
        }
        let sketch = sketch.finish(out);
        met_or_not(
            cx,
            &format!("a value that overflows, capped {capped}"),
            &sketch,
            capped,
        )?;
    }
    Ok(())
}

/// An expert whose logit overflowed: below all others, it is as improbable as one can be; above them, nothing is a number.
fn shut_expert(cx: &mut Context<'_>) -> Verdict {
    for (sign, normalise) in [(-1.0, false), (-1.0, true), (1.0, true)] {
        let random = &mut cx.random;
        let (n, width) = (5, 24);
        let k = random.choose([2, 5]);
        let (mut sketch, logits) = overflowing(random, n, sign);
        let x = sketch.position_input(random, 40, Magnitudes::Ordinary);
        let (experts, weights) = (sketch.value(k, ValueKind::Experts), sketch.f32(k));
        sketch.op(OpKind::RouterTopK {
            logits,
            k,
            normalise,
            experts,
            weights,
        });
        let of = (x, experts);
        let input = sketch.experts(random, Encoding::F32, of, Role::FfnUpExps, (n, width), true)?;
        let out = sketch.f32(width);
        sketch.op(OpKind::WeightedSum {
            input,
            experts,
            weights,
            out,
        });
        let sketch = sketch.finish(out);
        let what = format!("{k} of {n} experts, one at {}", sign * f32::INFINITY);
        met_or_not(cx, &what, &sketch, sign < 0.0)?;
    }
    Ok(())
}
