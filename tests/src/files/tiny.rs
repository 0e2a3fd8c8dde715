use std::collections::BTreeMap;
use std::path::Path;

use apr_format::v2::{AprV2Metadata, AprV2Writer, ShardInfo, ShardManifest, TensorDType};
use hoist_formats::write::{GgufBuilder, SafeTensorsBuilder};
use hoist_formats::{Encoding, MetaValue};
use serde_json::json;

use super::ModelFiles;

/// Shape and seed of a model of llama's architecture, small enough for tests that open it thousands of times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TinyLlama {
    /// Tokens.
    pub vocab: u64,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Width of the feed-forward network.
    pub ffn: u64,
    /// Layers.
    pub layers: u64,
    /// Seed of the weights.
    pub seed: u64,
}

/// A tensor of [`TinyLlama`], under its names in each format.
#[derive(Clone, Debug, PartialEq)]
pub struct TinyTensor {
    /// Name in Hugging Face and APR files.
    pub hf_name: String,
    /// Name in GGUF files.
    pub gguf_name: String,
    /// Row-major, slowest dimension first.
    pub shape: Vec<u64>,
    /// Values, in Hugging Face's order.
    pub values: Vec<f32>,
    /// Heads whose rows GGUF converters permute: those of q and k projections, otherwise 0.
    pub permuted_heads: u64,
}

/// How [`TinyLlama::apr`] stores matrices; norm vectors are F32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AprStorage {
    /// F32
    F32,
    /// F16
    F16,
    /// Q4_K blocks of random content
    Q4K,
    /// Q6_K blocks of random content
    Q6K,
    /// APR's own 4-bit blocks
    AprQ4,
    /// APR's own 8-bit values with one scale
    AprQ8,
}

/// A generator that is the same on every machine: SplitMix64 (Steele, Lea and Flood, 2014).
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A multiple of 2^-7 in [-1, 1): exact in f16 and bf16 too.
    fn value(&mut self) -> f32 {
        (self.next() >> 56) as f32 / 128.0 - 1.0
    }
}

impl TinyLlama {
    /// About 11,000 weights in one layer; rows of 32 and 64.
    pub fn small() -> Self {
        Self {
            vocab: 16,
            hidden: 32,
            heads: 2,
            kv_heads: 1,
            ffn: 64,
            layers: 1,
            seed: 1,
        }
    }

    /// Rows of 256 and 512, for encodings with super-blocks; two layers.
    pub fn wide() -> Self {
        Self {
            vocab: 32,
            hidden: 256,
            heads: 4,
            kv_heads: 2,
            ffn: 512,
            layers: 2,
            seed: 2,
        }
    }

    /// Width of a head.
    pub fn head_dim(&self) -> u64 {
        self.hidden / self.heads
    }

    /// All tensors; the output matrix is tied to the embedding.
    pub fn tensors(&self) -> Vec<TinyTensor> {
        let mut random = SplitMix(self.seed);
        let mut out = Vec::new();
        let mut add = |hf: String, gguf: String, shape: &[u64], permuted_heads: u64| {
            let n = shape.iter().product::<u64>();
            out.push(TinyTensor {
                hf_name: hf,
                gguf_name: gguf,
                shape: shape.to_vec(),
                values: (0..n).map(|_| random.value()).collect(),
                permuted_heads,
            });
        };
        let (h, f, kv) = (self.hidden, self.ffn, self.kv_heads * self.head_dim());
        add(
            "model.embed_tokens.weight".into(),
            "token_embd.weight".into(),
            &[self.vocab, h],
            0,
        );
        for l in 0..self.layers {
            let parts: [(&str, &str, &[u64], u64); 9] = [
                ("input_layernorm", "attn_norm", &[h], 0),
                ("self_attn.q_proj", "attn_q", &[h, h], self.heads),
                ("self_attn.k_proj", "attn_k", &[kv, h], self.kv_heads),
                ("self_attn.v_proj", "attn_v", &[kv, h], 0),
                ("self_attn.o_proj", "attn_output", &[h, h], 0),
                ("post_attention_layernorm", "ffn_norm", &[h], 0),
                ("mlp.gate_proj", "ffn_gate", &[f, h], 0),
                ("mlp.up_proj", "ffn_up", &[f, h], 0),
                ("mlp.down_proj", "ffn_down", &[h, f], 0),
            ];
            for (hf, gguf, shape, permuted) in parts {
                add(
                    format!("model.layers.{l}.{hf}.weight"),
                    format!("blk.{l}.{gguf}.weight"),
                    shape,
                    permuted,
                );
            }
        }
        add("model.norm.weight".into(), "output_norm.weight".into(), &[h], 0);
        out
    }

    /// A GGUF builder with all metadata and tensors; matrices are stored as `encoding`, vectors as F32.
    pub fn gguf_builder(&self, encoding: Encoding) -> GgufBuilder {
        let count = |v: u64| MetaValue::U32(v.try_into().unwrap_or(u32::MAX));
        let tokens: Vec<String> = (0..self.vocab).map(|t| format!("<{t}>")).collect();
        let mut builder = GgufBuilder::new("llama")
            .meta("general.name", "tiny")
            .meta("llama.block_count", count(self.layers))
            .meta("llama.context_length", 64u32)
            .meta("llama.embedding_length", count(self.hidden))
            .meta("llama.feed_forward_length", count(self.ffn))
            .meta("llama.attention.head_count", count(self.heads))
            .meta("llama.attention.head_count_kv", count(self.kv_heads))
            .meta("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
            .meta("llama.rope.freq_base", 10_000f32)
            .meta("llama.rope.dimension_count", count(self.head_dim()))
            .meta("llama.vocab_size", count(self.vocab))
            .meta("tokenizer.ggml.model", "llama")
            .meta("tokenizer.ggml.scores", vec![0f32; tokens.len()])
            .meta("tokenizer.ggml.token_type", vec![1i32; tokens.len()])
            .meta("tokenizer.ggml.tokens", tokens)
            .meta("tokenizer.ggml.bos_token_id", 1u32)
            .meta("tokenizer.ggml.eos_token_id", 2u32)
            .meta("tokenizer.ggml.add_bos_token", true);
        for tensor in self.tensors() {
            let encoding = tensor.stored_as(encoding);
            builder = builder.tensor(tensor.gguf_name, encoding, tensor.shape);
        }
        builder
    }

    /// Bytes of a tensor in a GGUF file of [`TinyLlama::gguf_builder`].
    pub fn gguf_bytes(&self, tensor: &TinyTensor, encoding: Encoding) -> Vec<u8> {
        encode(tensor.stored_as(encoding), &tensor.gguf_values(), self.seed)
    }

    /// A whole GGUF file.
    pub fn gguf(&self, encoding: Encoding) -> Vec<u8> {
        self.fill(
            &self.gguf_builder(encoding).layout().expect("a valid model"),
            encoding,
        )
    }

    fn fill(&self, layout: &hoist_formats::write::Layout, encoding: Encoding) -> Vec<u8> {
        let tensors: BTreeMap<String, TinyTensor> = self
            .tensors()
            .into_iter()
            .map(|t| (t.gguf_name.clone(), t))
            .collect();
        layout
            .write(Vec::new(), |slot, out| {
                out.write_all(&self.gguf_bytes(&tensors[&slot.name], encoding))
            })
            .expect("a valid model")
    }

    /// The model split into `count` GGUF files `tiny-0000N-of-….gguf`; the first is to be opened.
    pub fn gguf_split(&self, encoding: Encoding, count: u16) -> ModelFiles {
        let files: Vec<(String, Vec<u8>)> = self
            .gguf_builder(encoding)
            .split(Path::new("tiny"), count)
            .expect("a valid model")
            .into_iter()
            .map(|(path, layout)| (path.display().to_string(), self.fill(&layout, encoding)))
            .collect();
        ModelFiles {
            open: files[0].0.clone(),
            files,
        }
    }

    /// A SafeTensors file of these tensors, all stored as F32, F16 or BF16.
    pub fn safetensors_of(tensors: &[TinyTensor], encoding: Encoding) -> Vec<u8> {
        let mut builder = SafeTensorsBuilder::new().meta("format", "pt");
        for tensor in tensors {
            builder = builder.tensor(tensor.hf_name.clone(), encoding, tensor.shape.clone());
        }
        let mut tensors = tensors.iter();
        builder
            .layout()
            .and_then(|layout| {
                layout.write(Vec::new(), |_, out| {
                    let tensor = tensors.next().expect("as many as slots");
                    out.write_all(&encode(encoding, &tensor.values, 0))
                })
            })
            .expect("a valid model")
    }

    /// A whole SafeTensors file.
    pub fn safetensors(&self, encoding: Encoding) -> Vec<u8> {
        Self::safetensors_of(&self.tensors(), encoding)
    }

    /// The `config.json` of a Hugging Face folder.
    pub fn config_json(&self) -> Vec<u8> {
        let config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": true,
            "vocab_size": self.vocab,
            "torch_dtype": "float32",
        });
        config.to_string().into_bytes()
    }

    /// A Hugging Face folder with one file of weights.
    pub fn hugging_face(&self, encoding: Encoding) -> ModelFiles {
        ModelFiles {
            files: vec![
                ("config.json".into(), self.config_json()),
                ("model.safetensors".into(), self.safetensors(encoding)),
            ],
            open: String::new(),
        }
    }

    /// A Hugging Face folder with two shards and their index.
    pub fn hugging_face_sharded(&self, encoding: Encoding) -> ModelFiles {
        let tensors = self.tensors();
        let half = tensors.len() / 2;
        let mut files = vec![("config.json".into(), self.config_json())];
        let mut weight_map = serde_json::Map::new();
        for (part, name) in [
            (&tensors[..half], "model-00001-of-00002.safetensors"),
            (&tensors[half..], "model-00002-of-00002.safetensors"),
        ] {
            files.push((name.into(), Self::safetensors_of(part, encoding)));
            for tensor in part {
                weight_map.insert(tensor.hf_name.clone(), name.into());
            }
        }
        let index = json!({"metadata": {"total_size": 0}, "weight_map": weight_map});
        files.push((
            "model.safetensors.index.json".into(),
            index.to_string().into_bytes(),
        ));
        ModelFiles {
            files,
            open: String::new(),
        }
    }

    fn apr_metadata(&self) -> AprV2Metadata {
        let size = |v: u64| Some(v as usize);
        AprV2Metadata {
            architecture: Some("llama".into()),
            hidden_size: size(self.hidden),
            num_layers: size(self.layers),
            num_heads: size(self.heads),
            num_kv_heads: size(self.kv_heads),
            vocab_size: size(self.vocab),
            intermediate_size: size(self.ffn),
            max_position_embeddings: Some(64),
            rope_theta: Some(10_000.0),
            rms_norm_eps: Some(1e-5),
            ..AprV2Metadata::new("llama")
        }
    }

    fn apr_writer(&self, storage: AprStorage, tensors: &[TinyTensor]) -> AprV2Writer {
        let mut writer = AprV2Writer::new(self.apr_metadata());
        for tensor in tensors {
            let (name, values) = (tensor.hf_name.as_str(), tensor.values.as_slice());
            let shape: Vec<usize> = tensor.shape.iter().map(|&d| d as usize).collect();
            let blocks = |encoding: Encoding| encode(encoding, values, self.seed);
            if tensor.shape.len() == 1 {
                writer.add_f32_tensor(name, shape, values);
                continue;
            }
            match storage {
                AprStorage::F32 => writer.add_f32_tensor(name, shape, values),
                AprStorage::F16 => writer.add_f16_tensor(name, shape, values),
                AprStorage::Q4K => writer.add_q4k_raw_tensor(name, shape, blocks(Encoding::Q4_K)),
                AprStorage::Q6K => writer.add_q6k_raw_tensor(name, shape, blocks(Encoding::Q6_K)),
                AprStorage::AprQ4 => writer.add_q4_tensor(name, shape, values),
                AprStorage::AprQ8 => writer.add_q8_tensor(name, shape, values),
            }
        }
        writer
    }

    /// A whole APR file, as the `apr-format` crate writes it.
    pub fn apr(&self, storage: AprStorage) -> Vec<u8> {
        self.apr_writer(storage, &self.tensors())
            .write()
            .expect("a valid model")
    }

    /// An APR file with the LZ4 flag over raw data, as the `apr-format` crate writes it.
    pub fn apr_lz4_flag(&self, storage: AprStorage) -> Vec<u8> {
        let mut writer = self.apr_writer(storage, &self.tensors());
        writer.with_lz4_compression();
        writer.write().expect("a valid model")
    }

    /// An APR file whose bytes after the header are one LZ4 block with its size in front, as realizar wrote them.
    pub fn apr_lz4_block(&self, storage: AprStorage) -> Vec<u8> {
        let raw = self.apr_lz4_flag(storage);
        let mut out = raw[..64].to_vec();
        out.extend(lz4_flex::compress_prepend_size(&raw[64..]));
        out
    }

    /// APR shards with their manifest, which is to be opened.
    pub fn apr_sharded(&self, storage: AprStorage, count: usize) -> ModelFiles {
        let tensors = self.tensors();
        let mut manifest = ShardManifest::new(count);
        let mut files = Vec::new();
        for (index, part) in tensors.chunks(tensors.len().div_ceil(count)).enumerate() {
            let mut writer = self.apr_writer(storage, part);
            writer.with_sharding(count, index);
            let bytes = writer.write().expect("a valid model");
            let filename = format!("tiny-{index:05}-of-{count:05}.apr");
            manifest.add_shard(ShardInfo {
                filename: filename.clone(),
                index,
                size: bytes.len() as u64,
                tensors: part.iter().map(|t| t.hf_name.clone()).collect(),
            });
            files.push((filename, bytes));
        }
        let open = "tiny.shards.json".to_owned();
        files.push((
            open.clone(),
            manifest.to_json().expect("a valid manifest").into_bytes(),
        ));
        ModelFiles { files, open }
    }
}

impl TinyTensor {
    /// Matrices as asked for, vectors as F32.
    fn stored_as(&self, encoding: Encoding) -> Encoding {
        if self.shape.len() == 1 {
            Encoding::F32
        } else {
            encoding
        }
    }

    /// Values in the order of GGUF files, whose converters interleave the two halves of each q and k head.
    pub fn gguf_values(&self) -> Vec<f32> {
        if self.permuted_heads == 0 {
            return self.values.clone();
        }
        let cols = self.shape[1] as usize;
        let head = (self.shape[0] / self.permuted_heads) as usize;
        let rows: Vec<&[f32]> = self.values.chunks(cols).collect();
        rows.chunks(head)
            .flat_map(|rows| (0..head).flat_map(move |i| rows[i / 2 + (i % 2) * head / 2]))
            .copied()
            .collect()
    }
}

/// Values as bytes of an encoding. F32, F16, BF16 and Q8_0 hold the values (rounded to nearest even); other encodings get
/// [`random_blocks`].
pub fn encode(encoding: Encoding, values: &[f32], seed: u64) -> Vec<u8> {
    match encoding {
        Encoding::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Encoding::F16 => values
            .iter()
            .flat_map(|&v| half::f16::from_f32(v).to_le_bytes())
            .collect(),
        Encoding::BF16 => values
            .iter()
            .flat_map(|&v| half::bf16::from_f32(v).to_le_bytes())
            .collect(),
        Encoding::Q8_0 => values
            .chunks(32)
            .flat_map(|block| {
                let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
                let scale = half::f16::from_f32(largest / 127.0);
                let inverse = if largest == 0.0 { 0.0 } else { 1.0 / scale.to_f32() };
                let quants = block.iter().map(move |v| (v * inverse).round() as i8 as u8);
                scale.to_le_bytes().into_iter().chain(quants)
            })
            .collect(),
        _ => {
            let blocks = values.len() as u64 / encoding.block_weights();
            random_blocks(encoding, blocks, seed ^ values.len() as u64)
        }
    }
}

/// Blocks of random content whose scales are finite and small, for Q4_0, Q4_1, Q4_K and Q6_K; other encodings get random
/// bytes throughout.
pub fn random_blocks(encoding: Encoding, blocks: u64, seed: u64) -> Vec<u8> {
    let block = encoding.block_bytes() as usize;
    let mut random = SplitMix(seed);
    let mut out: Vec<u8> = (0..blocks as usize * block)
        .map(|_| random.next() as u8)
        .collect();
    let scales: &[usize] = match encoding {
        Encoding::Q4_0 => &[0],
        Encoding::Q4_1 | Encoding::Q4_K => &[0, 2],
        Encoding::Q6_K => &[208],
        _ => &[],
    };
    for block in out.chunks_mut(block) {
        for &at in scales {
            let scale = half::f16::from_f32(random.value() / 256.0);
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    out
}

/// Kept in step with `apr-format`, whose ids the builders above rely on.
const _: () = assert!(TensorDType::AprQ4 as u8 == 128 && TensorDType::AprQ8 as u8 == 129);
