//! Every architecture against Hugging Face `transformers`: tiny random models and the logits it computes for them.
//!
//! The models and logits are made by `scripts/architectures/`; the forward pass here is the program, interpreted in f64, so
//! what is checked is the reading of names, shapes and hyper-parameters, RoPE tables and the order of operations.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers stop at the first surprise"
)]

mod support;

use std::path::{Path, PathBuf};

use hoist_backend::Role;
use hoist_formats::Manifest;
use hoist_model::{ResolvedModel, build_program, dump, resolve};
use support::Interpreter;

/// Largest difference from the golden logits, as a share of the row's largest logit.
const TOLERANCE: f64 = 2e-5;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/architectures")
}

struct Golden {
    tokens: Vec<u32>,
    vocab: usize,
    logits: Vec<f32>,
}

fn golden(case: &str) -> Golden {
    let folder = data().join(case);
    let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let tokens: Vec<u32> = json["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t.as_u64().unwrap() as u32)
        .collect();
    let vocab = json["vocab"].as_u64().unwrap() as usize;
    let logits = support::floats(&std::fs::read(folder.join("logits.f32")).unwrap());
    assert!(tokens.len() >= 32);
    assert_eq!(logits.len(), tokens.len() * vocab);
    Golden {
        tokens,
        vocab,
        logits,
    }
}

fn open(path: &Path) -> (Manifest, ResolvedModel) {
    let manifest = hoist_formats::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let model = resolve(&manifest).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    (manifest, model)
}

/// The largest difference over all positions, as a share of the row's largest logit.
fn difference(manifest: &Manifest, model: &ResolvedModel, golden: &Golden) -> f64 {
    let context = golden.tokens.len() as u32;
    let program = build_program(model, context).unwrap();
    assert!(support::has_no_quantised_value(&program));
    let mut interpreter = Interpreter::new(manifest, model, &program);
    let mut worst = 0f64;
    for (position, token) in golden.tokens.iter().enumerate() {
        let found = interpreter.step(*token, position);
        let expected = &golden.logits[position * golden.vocab..][..golden.vocab];
        let largest = expected.iter().fold(0f64, |m, x| m.max(f64::from(x.abs())));
        for (found, expected) in found.iter().zip(expected) {
            worst = worst.max((found - f64::from(*expected)).abs() / largest);
        }
    }
    worst
}

/// Checks one file against a case's logits, and its program against the committed one.
fn check(case: &str, path: &Path, snapshot: &str) {
    let (manifest, model) = open(path);
    assert!(model.unclaimed.is_empty(), "{case}: {:?}", model.unclaimed);
    let worst = difference(&manifest, &model, &golden(case));
    println!("{}: {worst:.2e}", path.display());
    assert!(
        worst <= TOLERANCE,
        "{}: logits differ by {worst:e} of the largest",
        path.display()
    );
    insta::assert_snapshot!(snapshot, dump(&build_program(&model, 40).unwrap()));
}

/// A dump without what may differ between formats: RoPE style, and digests of tables whose factors a format stores in f32.
fn without_rope(dump: &str) -> Vec<String> {
    dump.lines()
        .filter(|line| !line.starts_with("  rope"))
        .map(|line| line.replace("interleaved", "half-split"))
        .collect()
}

/// Rows of each head from halves to adjacent pairs: what converters do to llama's q and k.
fn interleaved(rows: &[Vec<u8>], heads: usize) -> Vec<u8> {
    let head_dim = rows.len() / heads;
    (0..rows.len())
        .flat_map(|row| {
            let (head, i) = (row / head_dim, row % head_dim);
            rows[head * head_dim + i / 2 + i % 2 * (head_dim / 2)].clone()
        })
        .collect()
}

/// Checks a case under GGUF's names: the same logits, the same operations and, role by role, the same canonical bytes.
fn check_gguf(case: &str) {
    let path = data().join(format!("{case}.gguf"));
    let (manifest, model) = open(&path);
    assert!(model.unclaimed.is_empty(), "{case}: {:?}", model.unclaimed);
    let worst = difference(&manifest, &model, &golden(case));
    println!("{}: {worst:.2e}", path.display());
    assert!(
        worst <= TOLERANCE,
        "{case}: logits differ by {worst:e} of the largest"
    );

    let (other_manifest, other) = open(&data().join(case));
    assert_eq!(
        without_rope(&dump(&build_program(&model, 40).unwrap())),
        without_rope(&dump(&build_program(&other, 40).unwrap())),
        "{case}"
    );
    assert_eq!(model.weights.len(), other.weights.len());
    let llama = model.architecture == "llama";
    for (weight, other) in model.weights.iter().zip(&other.weights) {
        assert_eq!((weight.layer, weight.role), (other.layer, other.role));
        let mut expected = support::canonical(&other_manifest, other);
        let heads = match weight.role {
            Role::AttnQ | Role::AttnQBias => model.hyper.heads,
            Role::AttnK | Role::AttnKBias => model.hyper.kv_heads,
            _ => 0,
        };
        if llama && heads > 0 {
            // A bias is a column of one-element rows.
            let row_bytes = if weight.shape.rows == 1 {
                4
            } else {
                weight.shape.cols as usize * 4
            };
            let rows: Vec<Vec<u8>> = expected.chunks(row_bytes).map(<[u8]>::to_vec).collect();
            expected = interleaved(&rows, heads as usize);
        }
        assert!(
            support::canonical(&manifest, weight) == expected,
            "{case}: {} of layer {:?}",
            weight.role,
            weight.layer
        );
    }
}

macro_rules! gguf_cases {
    ($($name:ident $case:literal;)*) => {$(
        #[test]
        fn $name() {
            check_gguf($case);
        }
    )*};
}

gguf_cases! {
    gguf_llama_has_permuted_heads "llama";
    gguf_llama_with_rope_freqs "llama-tied-llama3";
    gguf_llama_with_linear_rope_and_biases "llama-linear-bias";
    gguf_llama_with_yarn "llama-yarn";
    gguf_mistral_is_a_llama "mistral";
    gguf_qwen2 "qwen2";
    gguf_qwen2_with_a_sliding_pattern "qwen2-sliding";
    gguf_qwen3 "qwen3";
    gguf_qwen3moe_has_stacked_experts "qwen3moe";
    gguf_qwen3moe_without_normalised_weights "qwen3moe-raw";
    gguf_gemma2_has_folded_norms "gemma2";
    gguf_gemma3_has_folded_norms "gemma3";
    gguf_phi3_has_fused_weights "phi3";
    gguf_phi3_with_short_factors "phi3-longrope-short";
    gguf_phi3_with_long_factors "phi3-longrope-long";
    gguf_gpt2_has_transposed_matrices "gpt2";
}

macro_rules! cases {
    ($($name:ident $case:literal;)*) => {$(
        #[test]
        fn $name() {
            check($case, &data().join($case), concat!($case, ".hugging_face"));
        }
    )*};
}

cases! {
    llama "llama";
    llama_with_tied_output_and_llama3_rope "llama-tied-llama3";
    llama_with_linear_rope_and_biases "llama-linear-bias";
    llama_with_yarn "llama-yarn";
    mistral_with_a_sliding_window "mistral";
    qwen2_with_biases_and_tied_output "qwen2";
    qwen2_sliding_in_its_upper_layers "qwen2-sliding";
    qwen3_with_head_norms "qwen3";
    qwen3_with_yarn "qwen3-yarn";
    qwen3moe "qwen3moe";
    qwen3moe_with_routing_ties "qwen3moe-ties";
    qwen3moe_without_normalised_weights "qwen3moe-raw";
    gemma2_with_soft_caps_and_a_sliding_window "gemma2";
    gemma2_with_its_own_query_scale_and_no_attention_cap "gemma2-scalar";
    gemma3_with_local_layers "gemma3";
    gemma3_with_linear_rope_on_global_layers "gemma3-linear";
    phi3_with_fused_weights_and_a_sliding_window "phi3";
    phi3_with_short_long_rope_on_part_of_a_head "phi3-longrope-short";
    phi3_with_long_long_rope "phi3-longrope-long";
    gpt2 "gpt2";
}
