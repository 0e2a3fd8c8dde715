//! Real files: what is in them, and that nothing in them is left over.
//!
//! They are found in `$HOIST_MODELS` or `~/.cache/hoist/models`; a file that is not there is a visible skip, except in CI.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::PathBuf;

use hoist_backend::{OpName, Role, RopeStyle, Slot, WeightClass};
use hoist_model::{ResolvedModel, RopeScaling, build_program, resolve, validate_program};

fn model(name: &str) -> Option<ResolvedModel> {
    let folder = std::env::var_os("HOIST_MODELS").map_or_else(
        || {
            let home = std::env::var_os("HOME").unwrap_or_default();
            PathBuf::from(home).join(".cache/hoist/models")
        },
        PathBuf::from,
    );
    let path = folder.join(name);
    if !path.exists() {
        assert!(
            std::env::var_os("CI").is_none(),
            "{} is missing, and CI must have it",
            path.display()
        );
        eprintln!("SKIPPED: {} is not there", path.display());
        return None;
    }
    Some(resolve(&hoist_formats::open(&path).unwrap()).unwrap())
}

fn count(model: &ResolvedModel, class: WeightClass) -> usize {
    model.weights.iter().filter(|w| w.class == class).count()
}

fn slot(model: &ResolvedModel, layer: Option<u32>, role: Role) -> Slot {
    let entry = model
        .index
        .entries
        .iter()
        .find(|e| (e.layer, e.role) == (layer, role));
    entry.unwrap().slot
}

#[test]
fn smollm2_has_211_quantised_and_61_norm_weights() {
    let Some(model) = model("SmolLM2-135M-Instruct.Q4_1.gguf") else {
        return;
    };
    assert_eq!((model.architecture, model.layers), ("llama", 30));
    assert_eq!(count(&model, WeightClass::Quantized), 211);
    assert_eq!(count(&model, WeightClass::Gamma), 61);
    assert_eq!(model.weights.len(), 272);
    assert!(matches!(slot(&model, None, Role::Output), Slot::Tied(_)));
    assert_eq!(slot(&model, Some(29), Role::AttnQBias), Slot::Absent);
    assert!(model.unclaimed.is_empty(), "{:?}", model.unclaimed);
    let h = &model.hyper;
    assert_eq!((h.hidden, h.heads, h.kv_heads, h.head_dim), (576, 9, 3, 64));
    assert_eq!((h.vocab, h.context_length, h.ffn), (49152, 8192, 1536));
    assert_eq!(h.ropes[0].style, RopeStyle::Interleaved);
    assert_eq!(h.ropes[0].base, 100_000.0);
    assert_eq!(h.attention_scale, 0.125);
    assert_eq!(
        model.defaults_used,
        [("llama.attention.key_length".to_owned(), "64".to_owned())]
    );
}

#[test]
fn gemma3_270m_slides_in_all_but_every_sixth_layer() {
    let Some(model) = model("gemma-3-270m-q4_k_m.gguf") else {
        return;
    };
    assert_eq!((model.architecture, model.layers), ("gemma3", 18));
    assert_eq!(count(&model, WeightClass::Gamma), 18 * 6 + 1);
    assert_eq!(count(&model, WeightClass::Quantized), 18 * 7 + 1);
    assert_eq!(model.weights.len(), 236);
    assert!(model.unclaimed.is_empty(), "{:?}", model.unclaimed);
    let h = &model.hyper;
    assert_eq!((h.hidden, h.heads, h.kv_heads, h.head_dim), (640, 4, 1, 256));
    assert_eq!(h.embedding_scale, Some(640f32.sqrt()));
    assert_eq!(h.attention_scale, 1.0 / 16.0);
    for (layer, attention) in h.attention.iter().enumerate() {
        let full = layer % 6 == 5;
        assert_eq!(attention.window, (!full).then_some(512), "layer {layer}");
        assert_eq!(attention.rope, Some(usize::from(!full)), "layer {layer}");
    }
    assert_eq!((h.ropes[0].base, h.ropes[1].base), (1_000_000.0, 10_000.0));
    assert_eq!(h.ropes[0].scaling, RopeScaling::None);
    assert_eq!(h.final_soft_cap, None);
}

#[test]
fn programs_of_real_files_are_valid_and_share_their_quantised_inputs() {
    for (file, per_layer) in [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", 4),
        ("gemma-3-270m-q4_k_m.gguf", 4),
    ] {
        let Some(model) = model(file) else { continue };
        let program = build_program(&model, 4096).unwrap();
        validate_program(&program, &model).unwrap();
        let quantise = |op: &&hoist_backend::Op| op.kind.name() == OpName::Quantise;
        for layer in 0..model.layers {
            let count = program
                .ops
                .iter()
                .filter(|op| op.layer == Some(layer))
                .filter(quantise)
                .count();
            assert_eq!(count, per_layer, "{file} layer {layer}");
        }
        assert_eq!(program.vocab, model.hyper.vocab);
        assert!(matches!(
            program.ops[program.tail - 1].kind,
            hoist_backend::OpKind::StoreKv { .. }
        ));
    }
}
