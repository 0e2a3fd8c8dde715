//! What a synthetic model says of itself, as each format says it.

use hoist_formats::write::GgufBuilder;
use hoist_formats::{MetaArray, MetaValue};

use crate::shape::{Arch, ModelShape};

/// Soft caps of gemma2: constants of the published models.
const GEMMA2_ATTENTION_CAP: f32 = 50.0;
const GEMMA2_FINAL_CAP: f32 = 30.0;

/// The metadata of a GGUF file, under llama.cpp's keys.
pub(crate) fn gguf(s: &ModelShape, seed: u64) -> GgufBuilder {
    let arch = s.arch.gguf();
    let key = |name: &str| format!("{arch}.{name}");
    let mut b = GgufBuilder::new(arch)
        .meta(
            "general.name",
            MetaValue::String(format!("synthetic {} (seed {seed})", s.name)),
        )
        .meta("general.quantization_version", MetaValue::U32(2))
        .meta(key("block_count"), MetaValue::U32(s.layers))
        .meta(key("context_length"), MetaValue::U32(s.context))
        .meta(key("embedding_length"), MetaValue::U32(s.hidden))
        .meta(key("feed_forward_length"), MetaValue::U32(s.n_ff))
        .meta(key("attention.head_count"), MetaValue::U32(s.heads))
        .meta(key("vocab_size"), MetaValue::U32(s.vocab));
    if s.arch == Arch::Gpt2 {
        b = b.meta(key("attention.layer_norm_epsilon"), MetaValue::F32(s.eps));
    } else {
        b = b
            .meta(key("attention.head_count_kv"), MetaValue::U32(s.kv_heads))
            .meta(key("attention.key_length"), MetaValue::U32(s.head_dim))
            .meta(key("attention.value_length"), MetaValue::U32(s.head_dim))
            .meta(key("attention.layer_norm_rms_epsilon"), MetaValue::F32(s.eps))
            .meta(key("rope.freq_base"), MetaValue::F32(s.rope_base))
            .meta(key("rope.dimension_count"), MetaValue::U32(s.head_dim));
    }
    if let Some(window) = s.window {
        b = b.meta(key("attention.sliding_window"), MetaValue::U32(window));
    }
    if s.arch == Arch::Gemma2 {
        b = b
            .meta(
                key("attn_logit_softcapping"),
                MetaValue::F32(GEMMA2_ATTENTION_CAP),
            )
            .meta(key("final_logit_softcapping"), MetaValue::F32(GEMMA2_FINAL_CAP));
    }
    if let Some(e) = s.experts {
        b = b
            .meta(key("expert_count"), MetaValue::U32(e.count))
            .meta(key("expert_used_count"), MetaValue::U32(e.used))
            .meta(key("expert_feed_forward_length"), MetaValue::U32(e.n_ff));
    }
    vocabulary(b, s.vocab)
}

/// A byte-level BPE vocabulary of the right size, so that any reader can make and print tokens: 256 bytes, one merge, a
/// beginning and an end, and placeholders.
fn vocabulary(b: GgufBuilder, vocab: u32) -> GgufBuilder {
    let mut tokens: Vec<String> = (0..=255u8).map(|byte| byte_symbol(byte).to_string()).collect();
    tokens.extend([
        "\u{120}t".to_owned(),
        "<|begin|>".to_owned(),
        "<|end|>".to_owned(),
    ]);
    tokens.extend((tokens.len() as u32..vocab).map(|id| format!("<|{id}|>")));
    // 1: normal, 3: control.
    let types = (0..tokens.len())
        .map(|id| if id <= 256 { 1 } else { 3 })
        .collect();
    b.meta("tokenizer.ggml.model", MetaValue::String("gpt2".into()))
        .meta("tokenizer.ggml.pre", MetaValue::String("gpt-2".into()))
        .meta(
            "tokenizer.ggml.tokens",
            MetaValue::Array(MetaArray::String(tokens)),
        )
        .meta(
            "tokenizer.ggml.token_type",
            MetaValue::Array(MetaArray::I32(types)),
        )
        .meta(
            "tokenizer.ggml.merges",
            MetaValue::Array(MetaArray::String(vec!["\u{120} t".to_owned()])),
        )
        .meta("tokenizer.ggml.bos_token_id", MetaValue::U32(257))
        .meta("tokenizer.ggml.eos_token_id", MetaValue::U32(258))
        .meta("tokenizer.ggml.add_bos_token", MetaValue::Bool(false))
}

/// GPT-2's printable stand-in for a byte: itself if it is a printable Latin-1 character, else the next free one from
/// U+0100 on.
fn byte_symbol(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(256 + before).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// `config.json`.
pub(crate) fn config(s: &ModelShape, dtype: &str) -> serde_json::Value {
    use serde_json::json;
    let (model_type, class) = s.arch.hugging_face();
    let mut c = serde_json::Map::new();
    let mut put = |key: &str, value: serde_json::Value| {
        c.insert(key.to_owned(), value);
    };
    put("model_type", json!(model_type));
    put("architectures", json!([class]));
    put("dtype", json!(dtype));
    put("vocab_size", json!(s.vocab));
    put("tie_word_embeddings", json!(s.tied));
    if s.arch == Arch::Gpt2 {
        put("n_embd", json!(s.hidden));
        put("n_layer", json!(s.layers));
        put("n_head", json!(s.heads));
        put("n_positions", json!(s.context));
        put("n_inner", json!(s.n_ff));
        put("activation_function", json!("gelu_new"));
        put("layer_norm_epsilon", json!(s.eps));
        return c.into();
    }
    put("hidden_size", json!(s.hidden));
    put("num_hidden_layers", json!(s.layers));
    put("num_attention_heads", json!(s.heads));
    put("num_key_value_heads", json!(s.kv_heads));
    put("head_dim", json!(s.head_dim));
    put("intermediate_size", json!(s.n_ff));
    put("max_position_embeddings", json!(s.context));
    put("rms_norm_eps", json!(s.eps));
    put("rope_theta", json!(s.rope_base));
    let gemma = matches!(s.arch, Arch::Gemma2 | Arch::Gemma3);
    put(
        if gemma { "hidden_activation" } else { "hidden_act" },
        json!(if gemma { "gelu_pytorch_tanh" } else { "silu" }),
    );
    if gemma {
        put("query_pre_attn_scalar", json!(s.head_dim));
        put("sliding_window", json!(s.window));
    }
    match s.arch {
        Arch::Gemma2 => {
            put("attn_logit_softcapping", json!(GEMMA2_ATTENTION_CAP));
            put("final_logit_softcapping", json!(GEMMA2_FINAL_CAP));
        }
        Arch::Gemma3 => {
            put("rope_local_base_freq", json!(10_000.0));
            put("sliding_window_pattern", json!(6));
        }
        Arch::Phi3 => put("pad_token_id", json!(0)),
        Arch::Mistral => put("sliding_window", json!(s.window)),
        _ => {}
    }
    if let Some(e) = s.experts {
        put("num_experts", json!(e.count));
        put("num_experts_per_tok", json!(e.used));
        put("moe_intermediate_size", json!(e.n_ff));
        put("norm_topk_prob", json!(true));
    }
    c.into()
}
