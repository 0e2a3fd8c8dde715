//! What `resolve` accepts, and what it says of what it does not. Each refused manifest differs in one thing from one that is
//! accepted.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers stop at the first surprise"
)]

use std::path::Path;

use hoist_backend::{Encoding, OpKind, OpName, Role, RopeStyle, Slot, ValueChange, ValueKind, WeightClass};
use hoist_formats::{Format, Manifest, MetaArray, MetaValue, Metadata, TensorInfo};
use hoist_model::{
    Error, Lineage, ResolvedModel, ResolvedWeight, RopeScaling, build_program, dump, resolve,
    validate_program,
};
use serde_json::{Value, json};

fn open(name: &str) -> Manifest {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/architectures");
    hoist_formats::open(&data.join(name)).unwrap()
}

fn tensor<'a>(manifest: &'a mut Manifest, name: &str) -> &'a mut TensorInfo {
    manifest.tensors.iter_mut().find(|t| t.name == name).unwrap()
}

fn config(manifest: &mut Manifest) -> &mut serde_json::Map<String, Value> {
    match &mut manifest.metadata {
        Metadata::HuggingFace(map) | Metadata::Apr(map) => map,
        Metadata::Gguf(_) => panic!("a GGUF file has no config.json"),
    }
}

fn keys(manifest: &mut Manifest) -> &mut std::collections::BTreeMap<String, MetaValue> {
    match &mut manifest.metadata {
        Metadata::Gguf(map) => map,
        _ => panic!("not a GGUF file"),
    }
}

fn weight(model: &ResolvedModel, layer: Option<u32>, role: Role) -> &ResolvedWeight {
    model
        .weights
        .iter()
        .find(|w| (w.layer, w.role) == (layer, role))
        .unwrap()
}

fn slot(model: &ResolvedModel, layer: Option<u32>, role: Role) -> Option<Slot> {
    let entries = &model.index.entries;
    entries
        .iter()
        .find(|e| (e.layer, e.role) == (layer, role))
        .map(|e| e.slot)
}

/// Stores a tensor otherwise, its bytes cut to what that takes.
fn store(tensor: &mut TensorInfo, encoding: Encoding) {
    let cols = *tensor.shape.last().unwrap();
    let rows: u64 = tensor.shape.iter().rev().skip(1).product();
    tensor.encoding = encoding;
    tensor.nbytes = encoding.row_bytes(cols).unwrap() * rows + encoding.matrix_prefix_bytes();
}

/// Stores all matrices quantised.
fn quantise(manifest: &mut Manifest, encoding: Encoding) {
    for tensor in &mut manifest.tensors {
        if tensor.shape.len() >= 2 {
            store(tensor, encoding);
        }
    }
}

fn message(manifest: &Manifest) -> String {
    resolve(manifest).unwrap_err().to_string()
}

// ---- what a file is ----

#[test]
fn a_file_without_transformer_names_is_none() {
    let mut manifest = open("llama");
    for (i, tensor) in manifest.tensors.iter_mut().enumerate() {
        tensor.name = format!("conv{i}.weight");
    }
    let error = resolve(&manifest).unwrap_err();
    assert!(matches!(error, Error::NotATransformer { .. }), "{error}");
    assert!(error.to_string().contains("`conv0.weight`"), "{error}");
    manifest.tensors.clear();
    assert!(matches!(
        resolve(&manifest),
        Err(Error::NotATransformer { tensors: 0, .. })
    ));
}

#[test]
fn an_unknown_architecture_is_named_beside_the_known_ones() {
    let mut manifest = open("llama.gguf");
    *keys(&mut manifest).get_mut("general.architecture").unwrap() = MetaValue::String("falcon".into());
    insta::assert_snapshot!(message(&manifest), @"architecture `falcon` is unknown; known are llama, qwen2, qwen3, qwen3moe, gemma2, gemma3, phi3, gpt2");
    let mut manifest = open("llama");
    config(&mut manifest).insert("model_type".into(), json!("mamba"));
    config(&mut manifest).remove("architectures");
    insta::assert_snapshot!(message(&manifest), @"architecture `mamba` is unknown; known are llama, mistral, qwen2, qwen3, qwen3_moe, gemma2, gemma3_text, gemma3, phi3, gpt2");
}

#[test]
fn a_bare_safetensors_file_needs_its_config() {
    let mut manifest = open("llama");
    config(&mut manifest).clear();
    assert!(matches!(resolve(&manifest), Err(Error::MissingConfig { .. })));
}

// ---- tensors ----

#[test]
fn a_missing_role_names_what_was_tried() {
    let mut manifest = open("llama");
    manifest
        .tensors
        .retain(|t| t.name != "model.layers.1.self_attn.q_proj.weight");
    insta::assert_snapshot!(message(&manifest), @"llama requires attn_q of layer 1, and the file has none of `model.layers.1.self_attn.q_proj.weight`, `layers.1.self_attn.q_proj.weight`, `model.layers.1.self_attn.qkv_proj.weight`, `layers.1.self_attn.qkv_proj.weight`, `blk.1.attn_q.weight`, `blk.1.attn_qkv.weight`");
}

#[test]
fn a_wrong_shape_names_both_shapes() {
    let mut manifest = open("llama");
    tensor(&mut manifest, "model.layers.0.mlp.down_proj.weight").shape = vec![64, 32];
    insta::assert_snapshot!(message(&manifest), @"tensor `model.layers.0.mlp.down_proj.weight` (ffn_down of layer 0) must have shape [32, 64], found [64, 32]");
}

#[test]
fn a_quantised_norm_or_bias_is_refused() {
    let mut manifest = open("llama.gguf");
    store(tensor(&mut manifest, "blk.0.attn_norm.weight"), Encoding::Q8_0);
    insta::assert_snapshot!(message(&manifest), @"tensor `blk.0.attn_norm.weight` (attn_norm of layer 0) is q8_0, expected f32, f16 or bf16");
    let mut manifest = open("qwen2.gguf");
    store(tensor(&mut manifest, "blk.1.attn_q.bias"), Encoding::Q8_0);
    assert!(matches!(resolve(&manifest), Err(Error::WrongEncoding { .. })));
}

#[test]
fn formats_of_activations_and_integers_are_no_weights() {
    for encoding in [Encoding::Q8_1, Encoding::I8, Encoding::F64] {
        let mut manifest = open("llama.gguf");
        store(tensor(&mut manifest, "blk.0.attn_q.weight"), encoding);
        let error = resolve(&manifest).unwrap_err();
        assert!(matches!(error, Error::WrongEncoding { .. }), "{error}");
    }
}

#[test]
fn a_role_given_twice_is_refused() {
    let mut manifest = open("llama");
    let mut again = tensor(&mut manifest, "model.layers.0.self_attn.q_proj.weight").clone();
    again.name = "layers.0.self_attn.q_proj.weight".into();
    manifest.tensors.push(again.clone());
    assert!(matches!(resolve(&manifest), Err(Error::AmbiguousRole { .. })));
    again.name = "layers.0.self_attn.qkv_proj.weight".into();
    *manifest.tensors.last_mut().unwrap() = again;
    let error = message(&manifest);
    assert!(error.contains("given twice"), "{error}");
}

#[test]
fn a_size_that_contradicts_its_shape_is_refused() {
    let mut manifest = open("llama");
    tensor(&mut manifest, "model.layers.0.mlp.down_proj.weight").nbytes -= 4;
    assert!(matches!(resolve(&manifest), Err(Error::WrongSize { .. })));
}

#[test]
fn an_offset_at_the_end_of_the_address_space_is_refused() {
    let mut manifest = open("llama");
    tensor(&mut manifest, "model.layers.0.mlp.down_proj.weight").offset = u64::MAX - 3;
    assert!(matches!(resolve(&manifest), Err(Error::TooLarge { .. })));
}

#[test]
fn leftovers_are_listed_by_what_is_known_of_them() {
    let mut manifest = open("llama-tied-llama3");
    let mut extra = tensor(&mut manifest, "model.embed_tokens.weight").clone();
    for name in [
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision.patch.weight",
        "model.layers.7.self_attn.q_proj.weight",
    ] {
        extra.name = name.into();
        manifest.tensors.push(extra.clone());
    }
    let model = resolve(&manifest).unwrap();
    assert_eq!(
        model.unclaimed,
        ["vision.patch.weight", "model.layers.7.self_attn.q_proj.weight"]
    );
    assert_eq!(
        model.redundant,
        ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"]
    );
    assert!(matches!(slot(&model, None, Role::Output), Some(Slot::Tied(_))));
    let model = resolve(&open("llama-tied-llama3.gguf")).unwrap();
    assert_eq!(model.host_tensors, ["rope_freqs.weight"]);
    assert!(model.unclaimed.is_empty());
}

#[test]
fn an_untied_configuration_needs_its_output_matrix() {
    let mut manifest = open("llama");
    manifest.tensors.retain(|t| t.name != "lm_head.weight");
    assert!(matches!(
        resolve(&manifest),
        Err(Error::MissingRole {
            role: Role::Output,
            ..
        })
    ));
    // Without a word on it, as in GGUF, the embedding stands in.
    config(&mut manifest).remove("tie_word_embeddings");
    assert!(matches!(
        slot(&resolve(&manifest).unwrap(), None, Role::Output),
        Some(Slot::Tied(_))
    ));
}

#[test]
fn biases_are_required_optional_or_unknown_as_the_configuration_says() {
    let name = "model.layers.1.self_attn.o_proj.bias";
    let mut manifest = open("llama-linear-bias");
    let model = resolve(&manifest).unwrap();
    let bias = weight(&model, Some(1), Role::AttnOutputBias);
    assert_eq!((bias.class, bias.encoding), (WeightClass::Bias, Encoding::F32));
    config(&mut manifest).insert("attention_bias".into(), json!(false));
    let model = resolve(&manifest).unwrap();
    assert_eq!(slot(&model, Some(1), Role::AttnOutputBias), None);
    assert!(model.unclaimed.contains(&name.to_owned()));
    config(&mut manifest).remove("attention_bias");
    manifest.tensors.retain(|t| t.name != name);
    let model = resolve(&manifest).unwrap();
    assert_eq!(slot(&model, Some(1), Role::AttnOutputBias), Some(Slot::Absent));
    config(&mut manifest).insert("attention_bias".into(), json!(true));
    assert!(matches!(resolve(&manifest), Err(Error::MissingRole { .. })));
}

#[test]
fn half_precision_norms_widen_and_matrices_stay() {
    let mut manifest = open("llama");
    for tensor in &mut manifest.tensors {
        store(tensor, Encoding::BF16);
    }
    let model = resolve(&manifest).unwrap();
    let norm = weight(&model, Some(0), Role::AttnNorm);
    let from = Encoding::BF16;
    assert_eq!(
        (norm.encoding, norm.change),
        (Encoding::F32, ValueChange::Widen { from })
    );
    let q = weight(&model, Some(0), Role::AttnQ);
    assert_eq!((q.encoding, q.change), (from, ValueChange::Keep));
    assert!(q.matmul_only && !weight(&model, None, Role::TokenEmbd).matmul_only);
}

#[test]
fn gemma_norms_get_their_one_from_hugging_face_only() {
    let from = Encoding::F32;
    for name in ["gemma2", "gemma3"] {
        let model = resolve(&open(name)).unwrap();
        assert_eq!(model.lineage, Lineage::HuggingFace);
        let converted = resolve(&open(&format!("{name}.gguf"))).unwrap();
        for w in model.weights.iter().filter(|w| w.class == WeightClass::Gamma) {
            assert_eq!(w.change, ValueChange::WidenAddOne { from }, "{}", w.name);
        }
        for w in converted.weights.iter().filter(|w| w.class == WeightClass::Gamma) {
            assert_eq!(w.change, ValueChange::Keep, "{}", w.name);
        }
    }
}

// ---- views ----

#[test]
fn fused_rows_are_byte_ranges_in_any_encoding() {
    for encoding in [Encoding::F32, Encoding::BF16, Encoding::Q8_0, Encoding::APR_Q8] {
        let mut manifest = open("phi3.gguf");
        quantise(&mut manifest, encoding);
        let fused = tensor(&mut manifest, "blk.0.attn_qkv.weight").clone();
        let model = resolve(&manifest).unwrap();
        let prefix = encoding.matrix_prefix_bytes();
        let row = encoding.row_bytes(32).unwrap();
        // 4 query heads and 2 key/value heads of 8.
        for (role, first, rows) in [(Role::AttnQ, 0, 32), (Role::AttnK, 32, 16), (Role::AttnV, 48, 16)] {
            let found = weight(&model, Some(0), role);
            let runs: Vec<_> = found.views.iter().map(|v| v.as_contiguous().unwrap()).collect();
            let range = (fused.offset + prefix + first * row, rows * row);
            let expected = if prefix == 0 {
                vec![range]
            } else {
                // The tensor's one scale stands in front of every matrix cut from it.
                vec![(fused.offset, prefix), range]
            };
            assert_eq!(runs, expected, "{encoding} {role}");
            let bytes: u64 = found.views.iter().map(|v| v.nbytes()).sum();
            assert_eq!(bytes, encoding.nbytes(found.shape).unwrap());
        }
    }
}

#[test]
fn every_weight_s_views_yield_its_canonical_bytes() {
    for name in [
        "llama",
        "qwen3moe",
        "gemma3",
        "phi3",
        "gpt2",
        "qwen3moe.gguf",
        "gpt2.gguf",
    ] {
        for encoding in [Encoding::F32, Encoding::F16, Encoding::Q8_0, Encoding::APR_Q8] {
            // Conv1D matrices cannot be quantised: their columns are not blocks.
            if name == "gpt2" && encoding.is_quantized() {
                continue;
            }
            let mut manifest = open(name);
            quantise(&mut manifest, encoding);
            let model = resolve(&manifest).unwrap_or_else(|e| panic!("{name} {encoding}: {e}"));
            for w in &model.weights {
                let source = w.change.source_encoding().unwrap_or(w.encoding);
                let bytes: u64 = w.views.iter().map(|v| v.nbytes()).sum();
                assert_eq!(
                    bytes,
                    source.nbytes(w.shape).unwrap(),
                    "{name} {encoding} {}",
                    w.name
                );
            }
        }
    }
}

#[test]
fn conv1d_columns_are_rows() {
    let mut manifest = open("gpt2");
    let fused = tensor(&mut manifest, "transformer.h.0.attn.c_attn.weight").clone();
    let model = resolve(&manifest).unwrap();
    let k = weight(&model, Some(0), Role::AttnK);
    let [view] = k.views.as_slice() else { panic!() };
    // [in 32, out 96], of which columns 32..64 are k.
    assert_eq!(view.offset, fused.offset + 32 * 4);
    assert_eq!((view.rows, view.cols, view.unit), (32, 32, 4));
    assert_eq!((view.row_stride, view.col_stride), (4, 96 * 4));
    store(
        tensor(&mut manifest, "transformer.h.0.attn.c_attn.weight"),
        Encoding::Q8_0,
    );
    assert!(matches!(resolve(&manifest), Err(Error::WrongEncoding { .. })));
}

#[test]
fn rows_that_split_a_block_are_refused() {
    for encoding in [Encoding::APR_Q4, Encoding::Q4_K] {
        let mut manifest = open("gemma2.gguf");
        let q = tensor(&mut manifest, "blk.0.attn_q.weight");
        q.encoding = encoding;
        if encoding == Encoding::APR_Q4 {
            // 32 columns are a block: the control.
            store(q, encoding);
            assert!(resolve(&manifest).is_ok());
            let q = tensor(&mut manifest, "blk.0.attn_q.weight");
            q.shape = vec![128, 16];
            assert!(matches!(resolve(&manifest), Err(Error::WrongShape { .. })));
        } else {
            assert!(matches!(resolve(&manifest), Err(Error::Layout { .. })));
        }
    }
}

#[test]
fn experts_must_share_an_encoding_and_be_all_there() {
    let name = "model.layers.1.mlp.experts.3.up_proj.weight";
    let mut manifest = open("qwen3moe");
    store(tensor(&mut manifest, name), Encoding::F16);
    insta::assert_snapshot!(message(&manifest), @"tensor `model.layers.1.mlp.experts.3.up_proj.weight` (ffn_up_exps of layer 1) is f16, expected f32, as the others of this role");
    manifest.tensors.retain(|t| t.name != name);
    let error = message(&manifest);
    assert!(
        error.contains("`model.layers.1.mlp.experts.3.up_proj.weight`"),
        "{error}"
    );
    config(&mut manifest).insert("num_local_experts".into(), json!(4_000_000_000u32));
    assert!(resolve(&manifest).is_err());
}

// ---- hyper-parameters ----

#[test]
fn missing_and_mistyped_keys_are_named() {
    let mut manifest = open("llama.gguf");
    let taken = keys(&mut manifest).remove("llama.embedding_length").unwrap();
    insta::assert_snapshot!(message(&manifest), @"GGUF metadata lacks `llama.embedding_length`");
    keys(&mut manifest).insert("llama.embedding_length".into(), MetaValue::String("32".into()));
    insta::assert_snapshot!(message(&manifest), @"`llama.embedding_length` in GGUF metadata must be an unsigned number, found a string");
    keys(&mut manifest).insert("llama.embedding_length".into(), MetaValue::I64(-1));
    assert!(matches!(resolve(&manifest), Err(Error::BadValue { .. })));
    keys(&mut manifest).insert("llama.embedding_length".into(), taken);
    assert!(resolve(&manifest).is_ok());

    let mut manifest = open("llama");
    config(&mut manifest).remove("num_attention_heads");
    insta::assert_snapshot!(message(&manifest), @"config.json lacks `num_attention_heads` (nor has it `num_heads`, `n_heads`, `n_head`)");
    config(&mut manifest).insert("num_attention_heads".into(), json!(4.5));
    assert!(matches!(resolve(&manifest), Err(Error::WrongType { .. })));
}

#[test]
fn numbers_that_contradict_each_other_are_refused() {
    for (key, value) in [
        ("llama.block_count", MetaValue::U32(0)),
        ("llama.block_count", MetaValue::U32(u32::MAX)),
        ("llama.attention.head_count", MetaValue::U32(0)),
        ("llama.attention.head_count_kv", MetaValue::U32(3)),
        ("llama.attention.head_count_kv", MetaValue::U32(0)),
        ("llama.attention.key_length", MetaValue::U32(u32::MAX)),
        ("llama.rope.dimension_count", MetaValue::U32(15)),
        ("llama.rope.dimension_count", MetaValue::U32(18)),
        ("llama.rope.freq_base", MetaValue::F32(f32::NAN)),
        ("llama.rope.freq_base", MetaValue::F32(0.0)),
        ("llama.rope.scaling.factor", MetaValue::F32(-2.0)),
        (
            "llama.attention.layer_norm_rms_epsilon",
            MetaValue::F32(f32::INFINITY),
        ),
        ("llama.vocab_size", MetaValue::U32(127)),
        (
            "llama.attention.head_count",
            MetaValue::Array(MetaArray::U32(vec![4, 2])),
        ),
        (
            "tokenizer.ggml.tokens",
            MetaValue::Array(MetaArray::String(vec!["a".into()])),
        ),
    ] {
        let mut manifest = open("llama.gguf");
        keys(&mut manifest).insert(key.into(), value.clone());
        assert!(resolve(&manifest).is_err(), "{key} {value:?}");
    }
    let mut manifest = open("llama.gguf");
    keys(&mut manifest).insert(
        "llama.attention.head_count".into(),
        MetaValue::Array(MetaArray::I32(vec![4, 4])),
    );
    assert!(resolve(&manifest).is_ok());
}

#[test]
fn what_would_change_the_forward_pass_is_refused_by_name() {
    for (case, key, value, says) in [
        ("llama", "hidden_act", json!("gelu"), "the activation `gelu`"),
        (
            "llama",
            "rope_parameters",
            json!({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
            "`dynamic`",
        ),
        (
            "llama",
            "quantization_config",
            json!({"quant_method": "awq"}),
            "`quantization_config`",
        ),
        ("qwen3moe", "mlp_only_layers", json!([0]), "`mlp_only_layers`"),
        (
            "qwen3moe",
            "decoder_sparse_step",
            json!(2),
            "`decoder_sparse_step`",
        ),
        (
            "gpt2",
            "scale_attn_by_inverse_layer_idx",
            json!(true),
            "`scale_attn_by_inverse_layer_idx`",
        ),
        (
            "qwen2",
            "layer_types",
            json!(["full_attention", "linear_attention"]),
            "`linear_attention`",
        ),
    ] {
        let mut manifest = open(case);
        assert!(resolve(&manifest).is_ok());
        config(&mut manifest).insert(key.into(), value);
        let error = resolve(&manifest).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[test]
fn older_configurations_mean_the_same_as_newer_ones() {
    // transformers 4 wrote rope_theta and rope_scaling at the top level.
    for (case, old) in [
        ("llama", json!({"rope_theta": 10000.0})),
        (
            "llama-yarn",
            json!({"rope_theta": 10000.0, "rope_scaling": {"type": "yarn", "factor": 4.0,
                "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}}),
        ),
        (
            "gemma3-linear",
            json!({"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 6}),
        ),
        (
            "qwen2-sliding",
            json!({"rope_theta": 10000.0, "use_sliding_window": true, "max_window_layers": 1}),
        ),
    ] {
        let mut manifest = open(case);
        let newer = resolve(&manifest).unwrap();
        let map = config(&mut manifest);
        for key in ["rope_parameters", "layer_types", "_sliding_window_pattern"] {
            map.remove(key);
        }
        map.extend(old.as_object().unwrap().clone());
        let older = resolve(&manifest).unwrap();
        assert_eq!(older.hyper, newer.hyper, "{case}");
    }
}

#[test]
fn defaults_are_reported() {
    let mut manifest = open("qwen2.gguf");
    keys(&mut manifest).remove("qwen2.rope.freq_base");
    keys(&mut manifest).remove("qwen2.rope.dimension_count");
    let model = resolve(&manifest).unwrap();
    for pair in [
        ("qwen2.attention.key_length", "8"),
        ("qwen2.rope.freq_base", "10000"),
        ("qwen2.rope.dimension_count", "8"),
    ] {
        assert!(
            model.defaults_used.contains(&(pair.0.into(), pair.1.into())),
            "{pair:?} {:?}",
            model.defaults_used
        );
    }
}

#[test]
fn apr_metadata_goes_by_its_own_names() {
    let mut manifest = open("llama");
    manifest.format = Format::Apr;
    manifest.folder = None;
    let map = json!({
        "model_type": "transformer_lm", "architecture": "llama", "hidden_dim": 32, "n_layers": 2, "n_heads": 4,
        "num_kv_heads": 2, "head_dim": 16, "n_vocab": 128, "ffn_dim": 64, "n_ctx": 256, "norm_eps": 1e-5,
        "rope_theta": 10000.0, "rope_type": 2,
    });
    manifest.metadata = Metadata::Apr(map.as_object().unwrap().clone());
    let apr = resolve(&manifest).unwrap();
    let hf = resolve(&open("llama")).unwrap();
    assert_eq!(apr.weights, hf.weights);
    assert_eq!(apr.hyper.ropes, hf.hyper.ropes);
    config(&mut manifest).insert("rope_type".into(), json!(0));
    assert_eq!(
        resolve(&manifest).unwrap().hyper.ropes[0].style,
        RopeStyle::Interleaved
    );
    config(&mut manifest).insert("rope_type".into(), json!(1));
    assert!(matches!(resolve(&manifest), Err(Error::BadValue { .. })));
}

#[test]
fn a_host_parameter_must_be_a_vector_of_the_right_length() {
    let mut manifest = open("llama-tied-llama3.gguf");
    let t = tensor(&mut manifest, "rope_freqs.weight");
    (t.shape, t.nbytes) = (vec![4], 16);
    assert!(matches!(resolve(&manifest), Err(Error::BadValue { .. })));
    let t = tensor(&mut manifest, "rope_freqs.weight");
    (t.shape, t.nbytes) = (vec![1 << 40], 1 << 42);
    assert!(matches!(resolve(&manifest), Err(Error::HostParameter { .. })));
    let mut manifest = open("phi3-longrope-long.gguf");
    manifest.tensors.retain(|t| t.name != "rope_factors_short.weight");
    assert!(matches!(resolve(&manifest), Err(Error::HostParameter { .. })));
}

// ---- programs ----

#[test]
fn quantised_weights_share_one_quantised_input() {
    for (name, snapshot) in [
        ("llama.gguf", "llama"),
        ("qwen2.gguf", "qwen2"),
        ("qwen3.gguf", "qwen3"),
        ("qwen3moe.gguf", "qwen3moe"),
        ("gemma2.gguf", "gemma2"),
        ("gemma3.gguf", "gemma3"),
        ("phi3.gguf", "phi3"),
        ("gpt2.gguf", "gpt2"),
    ] {
        let mut manifest = open(name);
        quantise(&mut manifest, Encoding::Q8_0);
        let model = resolve(&manifest).unwrap();
        let program = build_program(&model, 64).unwrap();
        insta::assert_snapshot!(format!("quantised.{snapshot}"), dump(&program));
    }
}

#[test]
fn float_weights_among_quantised_ones_read_the_value_itself() {
    let mut manifest = open("llama.gguf");
    quantise(&mut manifest, Encoding::Q8_0);
    store(tensor(&mut manifest, "blk.0.attn_v.weight"), Encoding::F16);
    let model = resolve(&manifest).unwrap();
    let program = build_program(&model, 64).unwrap();
    let input = |role| {
        program.ops.iter().find_map(|op| match op.kind {
            OpKind::MatMul { input, weight, .. } if weight.layer == Some(0) && weight.role == role => {
                program.value(input)
            }
            _ => None,
        })
    };
    let kind = |role| input(role).unwrap().kind;
    assert_eq!(kind(Role::AttnQ), ValueKind::Quantized { vectors: 1 });
    assert_eq!(input(Role::AttnQ), input(Role::AttnK));
    assert_eq!(kind(Role::AttnV), ValueKind::F32);
}

#[test]
fn chosen_experts_are_quantised_one_vector_each() {
    let mut manifest = open("qwen3moe.gguf");
    quantise(&mut manifest, Encoding::Q8_0);
    let program = build_program(&resolve(&manifest).unwrap(), 64).unwrap();
    let inner = program
        .values
        .iter()
        .find(|v| v.name == "inner.quantised")
        .unwrap();
    assert_eq!(
        (inner.kind, inner.width),
        (ValueKind::Quantized { vectors: 2 }, 64)
    );
}

#[test]
fn a_context_out_of_range_is_refused() {
    let llama = resolve(&open("llama.gguf")).unwrap();
    for context in [0, (1 << 20) + 1, u32::MAX] {
        assert!(matches!(
            build_program(&llama, context),
            Err(Error::ContextOutOfRange { .. })
        ));
    }
    assert!(build_program(&llama, 1 << 20).is_ok());
    let gpt2 = resolve(&open("gpt2")).unwrap();
    assert!(build_program(&gpt2, 64).is_ok());
    insta::assert_snapshot!(build_program(&gpt2, 65).unwrap_err(), @"a context of 65 positions is out of range: gpt2 here takes 1 to 64");
}

#[test]
fn long_rope_factors_follow_the_context() {
    let model = resolve(&open("phi3-longrope-long")).unwrap();
    assert!(matches!(
        model.hyper.ropes[0].scaling,
        RopeScaling::LongRope { original: 16, .. }
    ));
    let short = build_program(&model, 16).unwrap();
    let long = build_program(&model, 17).unwrap();
    assert_ne!(short.tables[0].data[8..16], long.tables[0].data[8..16]);
}

#[test]
fn a_program_with_one_thing_wrong_is_invalid() {
    let mut manifest = open("qwen3moe.gguf");
    quantise(&mut manifest, Encoding::Q8_0);
    let model = resolve(&manifest).unwrap();
    let good = build_program(&model, 64).unwrap();
    validate_program(&good, &model).unwrap();
    // Every operation is needed: without it, a value is read before it is written, or a weight is never read. The second
    // layer writes the values of the first again, and these two write values that are written before, so they are left out.
    let overwrites = [OpName::Rope, OpName::Add];
    for (at, op) in good.ops.iter().enumerate() {
        if op.layer == Some(1) || overwrites.contains(&op.kind.name()) {
            continue;
        }
        let mut program = good.clone();
        program.ops.remove(at);
        program.tail -= usize::from(at < good.tail);
        let found = validate_program(&program, &model);
        assert!(
            matches!(found, Err(Error::InvalidProgram { .. })),
            "operation {at}: {op:?}"
        );
    }
    let mut program = good.clone();
    program.tail += 1;
    assert!(validate_program(&program, &model).is_err());
    let mut program = good.clone();
    program.values[0].width += 1;
    assert!(validate_program(&program, &model).is_err());
    let mut program = good.clone();
    program.tables[0].rows = 63;
    assert!(validate_program(&program, &model).is_err());
    let mut program = good;
    program.kv.pop();
    assert!(validate_program(&program, &model).is_err());
}
