//! The same model in every format.

use std::collections::BTreeMap;

use hoist_core::backend::{OpenOptions, Role, Unwatched};
use hoist_core::formats::Encoding;
use hoist_core::orchestrator::{SessionOptions, open};
use hoist_cpu::CpuProvider;
use hoist_tests::files::{AprStorage, ModelFiles, TinyLlama};

use crate::support::{json, on_disk};

/// Canonical bytes as they are resident, by (layer, role).
fn resident(files: &ModelFiles) -> BTreeMap<(Option<u32>, Role), Vec<u8>> {
    let (_folder, path) = on_disk(files);
    let options = SessionOptions {
        decode: None,
        verify: true,
        import: false,
        watch: &Unwatched,
    };
    let mut loaded = open(&path, &CpuProvider, 0, &OpenOptions::default(), &options).unwrap();
    let mut weights = BTreeMap::new();
    for weight in &loaded.plan.weights {
        let mut bytes = vec![0; weight.nbytes as usize];
        loaded.backend.read_back(weight.id, 0, &mut bytes).unwrap();
        assert!(weights.insert((weight.layer, weight.role), bytes).is_none());
    }
    weights
}

/// Rows of each of `heads` heads with their two halves interleaved, which is what GGUF converters do to llama's q and k.
fn interleaved(bytes: &[u8], heads: usize, cols_bytes: usize) -> Vec<u8> {
    let rows: Vec<_> = bytes.chunks(cols_bytes).collect();
    let head = rows.len() / heads;
    (0..rows.len())
        .flat_map(|row| {
            let (of, pair, half) = (row / head, row % head / 2, row % 2);
            rows[of * head + half * head / 2 + pair].iter().copied()
        })
        .collect()
}

#[test]
fn a_model_has_the_same_canonical_bytes_in_every_format() {
    for (encoding, storage) in [(Encoding::F32, AprStorage::F32), (Encoding::F16, AprStorage::F16)] {
        let tiny = TinyLlama::wide();
        let mut reference = resident(&tiny.hugging_face(Encoding::F32));
        if encoding == Encoding::F16 {
            // Values of the builder are exact in f16. Vectors are f32 in canonical bytes whatever the file holds.
            for ((_, role), bytes) in &mut reference {
                if !matches!(role, Role::AttnNorm | Role::FfnNorm | Role::OutputNorm) {
                    *bytes = bytes
                        .chunks_exact(4)
                        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                        .flat_map(|v| half::f16::from_f32(v).to_le_bytes())
                        .collect();
                }
            }
        }
        assert_eq!(reference.len(), 1 + 9 * 2 + 1);
        let same = [
            ("folder", tiny.hugging_face(encoding)),
            ("sharded folder", tiny.hugging_face_sharded(encoding)),
            ("apr", ModelFiles::single("tiny.apr", tiny.apr(storage))),
            (
                "apr, flagged",
                ModelFiles::single("tiny.apr", tiny.apr_lz4_flag(storage)),
            ),
            (
                "apr, compressed",
                ModelFiles::single("tiny.apr", tiny.apr_lz4_block(storage)),
            ),
            ("apr shards", tiny.apr_sharded(storage, 3)),
        ];
        for (name, files) in same {
            assert_eq!(resident(&files), reference, "{name} {encoding}");
        }

        let cols = tiny.hidden as usize * encoding.block_bytes() as usize;
        let mut permuted = reference.clone();
        for ((_, role), bytes) in &mut permuted {
            let heads = match role {
                Role::AttnQ => tiny.heads,
                Role::AttnK => tiny.kv_heads,
                _ => continue,
            };
            let interleaved = interleaved(bytes, heads as usize, cols);
            assert_ne!(
                interleaved, *bytes,
                "a permutation that moves nothing shows nothing"
            );
            *bytes = interleaved;
        }
        let gguf = [
            ("gguf", ModelFiles::single("tiny.gguf", tiny.gguf(encoding))),
            ("split gguf", tiny.gguf_split(encoding, 3)),
        ];
        for (name, files) in gguf {
            assert_eq!(resident(&files), permuted, "{name} {encoding}");
        }
    }
}

#[test]
fn every_encoding_of_every_format_loads_and_verifies() {
    let tiny = TinyLlama::wide();
    let mut models = vec![("folder, bf16".to_owned(), tiny.hugging_face(Encoding::BF16))];
    for storage in [
        AprStorage::F32,
        AprStorage::F16,
        AprStorage::Q4K,
        AprStorage::Q6K,
        AprStorage::AprQ4,
        AprStorage::AprQ8,
    ] {
        models.push((
            format!("apr, {storage:?}"),
            ModelFiles::single("m.apr", tiny.apr(storage)),
        ));
    }
    for encoding in [
        Encoding::F32,
        Encoding::F16,
        Encoding::BF16,
        Encoding::Q8_0,
        Encoding::Q4_0,
        Encoding::Q4_1,
        Encoding::Q4_K,
        Encoding::Q6_K,
    ] {
        models.push((
            format!("gguf, {encoding}"),
            ModelFiles::single("m.gguf", tiny.gguf(encoding)),
        ));
        models.push((format!("split gguf, {encoding}"), tiny.gguf_split(encoding, 2)));
    }
    for (name, files) in models {
        let (_folder, path) = on_disk(&files);
        for arguments in [
            &["load", "--verify"][..],
            &["load", "--verify", "--import"],
            &["load", "--verify", "--float-layout", "in-out", "--threads", "3"],
        ] {
            let report = json("hoist.load/1", arguments, &path);
            let counts = |key: &str| report["weights"][key].as_u64().unwrap();
            assert_eq!(counts("quantized") + counts("float"), 1 + 7 * 2, "{name}");
            assert_eq!((counts("gamma"), counts("bias")), (2 * 2 + 1, 0), "{name}");
            assert_eq!(report["verified"]["weights"], 1 + 9 * 2 + 1, "{name}");
            assert_eq!(report["verified"]["mismatches"], 0, "{name}");
            assert_eq!(
                report["index"]["entries"],
                1 + 9 * 2 + 1 + 1,
                "{name}: the output is tied"
            );
            assert_eq!(report["unclaimed"], serde_json::json!([]), "{name}");
        }
    }
}
