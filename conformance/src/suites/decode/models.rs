//! Whole tiny models of every architecture, as the program would load them: written with random weights, opened, resolved,
//! and made a program of.

use hoist_backend::{Encoding, IndexEntry, OpenOptions, Slot, ValueChange, WeightClass};
use hoist_model::{ResolvedModel, ResolvedWeight};
use hoist_synth::{Container, Mix, ModelShape, Options};

use super::some_tokens;
use crate::fixture::Weight;
use crate::oracle::f16_to_f32;
use crate::suites::ops::session::{Feed, run};
use crate::suites::ops::sketch::Sketch;
use crate::{Case, Context, Failure, Need, Verdict};

/// Shapes that `hoist-synth` has for each architecture.
const MODELS: &[&str] = &[
    "tiny-llama",
    "tiny-mistral",
    "tiny-qwen2",
    "tiny-qwen3",
    "tiny-qwen3moe",
    "tiny-gemma2",
    "tiny-gemma3",
    "tiny-phi3",
    "tiny-gpt2",
];

const MIXES: &[&str] = &["q4_k_m", "q8_0", "f16"];

/// Positions.
const CONTEXT: u32 = 16;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for model in MODELS {
        for mix in MIXES {
            let architecture = model.trim_start_matches("tiny-");
            cases.push(
                Case::new("decode", "model", "logits", move |cx| decode(cx, model, mix))
                    .with("architecture", architecture)
                    .with("mix", mix)
                    .needs(Need::Decode)
                    .limit_s(90),
            );
        }
    }
    cases
}

fn own(what: impl std::fmt::Display) -> Failure {
    Failure::new("a model of the suite", "", "one that can be made", what)
}

fn decode(cx: &mut Context<'_>, model: &str, mix: &str) -> Verdict {
    let sketch = sketch(model, mix, cx.random.bits())?;
    for weight in &sketch.weights {
        let vector = matches!(weight.class, WeightClass::Gamma | WeightClass::Bias);
        if !vector {
            cx.check(Need::Computed(weight.encoding))?;
        }
    }
    for op in &sketch.program.ops {
        cx.check(Need::Op(op.kind.name()))?;
    }
    // A prompt in two chunks beside a second sequence, and single tokens.
    let mut feed = |sequence: u32, n: usize| Feed::logits(sequence, &some_tokens(cx, &sketch, n));
    let batches = [
        vec![feed(0, 5)],
        vec![feed(1, 2), feed(0, 4)],
        vec![feed(0, 1)],
        vec![feed(0, 1), feed(1, 1)],
    ];
    let what = format!("{model} in {mix}");
    run(cx, &what, &sketch, &batches, &OpenOptions::default())
}

/// A model of random weights with its program.
fn sketch(model: &str, mix: &str, seed: u64) -> Result<Sketch, Failure> {
    let published = hoist_synth::shape(model).ok_or_else(|| own(format!("no shape `{model}`")))?;
    let shape = ModelShape {
        // The least that a byte-level vocabulary has.
        vocab: 259,
        n_ff: if published.n_ff > 512 { 512 } else { 256 },
        // Shorter than what is decoded, so that it matters.
        window: published.window.map(|_| 5),
        ..*published
    };
    let mix = Mix::from_name(mix).ok_or_else(|| own(format!("no mix `{mix}`")))?;
    let folder = tempfile::tempdir().map_err(own)?;
    let path = folder.path().join("model.gguf");
    let options = Options {
        shape: &shape,
        mix,
        container: Container::Gguf,
        seed,
    };
    hoist_synth::write(options, &path, &|_, _| {}).map_err(own)?;
    let manifest = hoist_formats::open(&path).map_err(own)?;
    let resolved = hoist_model::resolve(&manifest).map_err(own)?;
    let program = hoist_model::build_program(&resolved, CONTEXT).map_err(own)?;
    let file = std::fs::read(&path).map_err(own)?;
    let weights = resolved
        .weights
        .iter()
        .map(|w| weight(w, &file))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Sketch::of(program, weights, other_entries(&resolved)))
}

/// Entries of the index that are no weight of their own.
fn other_entries(model: &ResolvedModel) -> Vec<IndexEntry> {
    let own = |e: &&IndexEntry| !matches!(e.slot, Slot::Present(_));
    model.index.entries.iter().filter(own).copied().collect()
}

fn weight(w: &ResolvedWeight, file: &[u8]) -> Result<Weight, Failure> {
    let mut bytes = Vec::new();
    for view in &w.views {
        for row in 0..view.rows {
            for col in 0..view.cols {
                let at = (view.offset + row * view.row_stride + col * view.col_stride) as usize;
                let unit = file
                    .get(at..at + view.unit as usize)
                    .ok_or_else(|| own(format!("a view of `{}` past the end", w.name)))?;
                bytes.extend_from_slice(unit);
            }
        }
    }
    let (from, add) = match w.change {
        ValueChange::Keep => (None, 0.0),
        ValueChange::Widen { from } => (Some(from), 0.0),
        ValueChange::WidenAddOne { from } => (Some(from), 1.0),
    };
    let canonical = match from {
        None => bytes,
        Some(from) => {
            let size = from.block_bytes() as usize;
            bytes
                .chunks_exact(size)
                .map(|b| match from {
                    Encoding::F16 => f16_to_f32(u16::from_le_bytes([b[0], b[1]])),
                    Encoding::BF16 => f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16),
                    _ => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
                })
                .flat_map(|v| if add == 0.0 { v } else { v + add }.to_le_bytes())
                .collect()
        }
    };
    Ok(Weight {
        class: w.class,
        ..Weight::matrix(w.layer, w.role, w.encoding, w.shape, canonical)
    })
}
