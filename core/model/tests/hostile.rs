//! Manifests with anything in them: an answer or an error, never a panic, and never more memory than the manifest's own.
#![expect(clippy::unwrap_used, reason = "a test's helpers stop at the first surprise")]

use std::path::Path;

use hoist_backend::Encoding;
use hoist_formats::{Manifest, MetaValue, Metadata};
use hoist_model::{build_program, resolve, validate_program};
use proptest::prelude::*;
use serde_json::json;

const CASES: &[&str] = &[
    "llama.gguf",
    "llama-yarn.gguf",
    "qwen2-sliding.gguf",
    "qwen3moe.gguf",
    "gemma3.gguf",
    "phi3-longrope-long.gguf",
    "gpt2.gguf",
    "llama-tied-llama3",
    "qwen3-yarn",
    "qwen3moe",
    "gemma3-linear",
    "phi3-longrope-short",
    "gpt2",
];

fn open(name: &str) -> Manifest {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/architectures");
    hoist_formats::open(&data.join(name)).unwrap()
}

/// Numbers where arithmetic goes wrong, and ordinary ones.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0u64),
        Just(1),
        Just(u64::from(u32::MAX)),
        Just(1 << 31),
        Just(u64::MAX),
        Just(i64::MAX as u64),
        0u64..300,
        any::<u64>(),
    ]
}

#[derive(Clone, Debug)]
enum Damage {
    /// Another number in the metadata.
    Number { at: usize, value: u64 },
    /// Another floating-point number there.
    Float { at: usize, value: f64 },
    /// A key gone.
    Remove { at: usize },
    /// One dimension of a tensor.
    Dimension { tensor: usize, at: usize, value: u64 },
    /// A tensor's place.
    Place { tensor: usize, offset: u64, nbytes: u64 },
    /// A tensor's encoding, without its size.
    Encoding { tensor: usize, encoding: usize },
    /// A tensor under another's name.
    Rename { tensor: usize, to: usize },
    /// A tensor gone.
    Lose { tensor: usize },
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>().prop_map(|i| i.index(1 << 16));
    let float = prop_oneof![
        Just(0.0),
        Just(-1.0),
        Just(f64::NAN),
        Just(f64::INFINITY),
        Just(1e-300),
        Just(1e300),
        any::<f64>()
    ];
    prop_oneof![
        4 => (at.clone(), number()).prop_map(|(at, value)| Damage::Number { at, value }),
        2 => (at.clone(), float).prop_map(|(at, value)| Damage::Float { at, value }),
        1 => at.clone().prop_map(|at| Damage::Remove { at }),
        2 => (at.clone(), 0usize..3, number())
            .prop_map(|(tensor, at, value)| Damage::Dimension { tensor, at, value }),
        1 => (at.clone(), number(), number())
            .prop_map(|(tensor, offset, nbytes)| Damage::Place { tensor, offset, nbytes }),
        1 => (at.clone(), at.clone()).prop_map(|(tensor, encoding)| Damage::Encoding { tensor, encoding }),
        1 => (at.clone(), at.clone()).prop_map(|(tensor, to)| Damage::Rename { tensor, to }),
        1 => at.prop_map(|tensor| Damage::Lose { tensor }),
    ]
}

/// Replaces or removes the `at`th value of the metadata.
fn set(manifest: &mut Manifest, at: usize, gguf: Option<MetaValue>, json: Option<serde_json::Value>) {
    match &mut manifest.metadata {
        Metadata::Gguf(map) => {
            let Some(key) = map.keys().nth(at % map.len().max(1)).cloned() else {
                return;
            };
            match gguf {
                Some(value) => map.insert(key, value),
                None => map.remove(&key),
            };
        }
        Metadata::HuggingFace(map) | Metadata::Apr(map) => {
            let Some(key) = map.keys().nth(at % map.len().max(1)).cloned() else {
                return;
            };
            match json {
                Some(value) => map.insert(key, value),
                None => map.remove(&key),
            };
        }
    }
}

fn apply(manifest: &mut Manifest, damage: &Damage) {
    let n = manifest.tensors.len().max(1);
    match *damage {
        Damage::Number { at, value } => {
            set(manifest, at, Some(MetaValue::U64(value)), Some(json!(value)));
        }
        Damage::Float { at, value } => {
            set(
                manifest,
                at,
                Some(MetaValue::F32(value as f32)),
                Some(json!(value)),
            );
        }
        Damage::Remove { at } => set(manifest, at, None, None),
        Damage::Dimension { tensor, at, value } => {
            if let Some(t) = manifest.tensors.get_mut(tensor % n) {
                match t.shape.get_mut(at) {
                    Some(dimension) => *dimension = value,
                    None => t.shape.push(value),
                }
            }
        }
        Damage::Place {
            tensor,
            offset,
            nbytes,
        } => {
            if let Some(t) = manifest.tensors.get_mut(tensor % n) {
                (t.offset, t.nbytes) = (offset, nbytes);
            }
        }
        Damage::Encoding { tensor, encoding } => {
            let all = Encoding::all();
            let encoding = all.clone().nth(encoding % all.len());
            if let Some((t, encoding)) = manifest.tensors.get_mut(tensor % n).zip(encoding) {
                t.encoding = encoding;
            }
        }
        Damage::Rename { tensor, to } => {
            let Some(name) = manifest.tensors.get(to % n).map(|t| t.name.clone()) else {
                return;
            };
            if let Some(t) = manifest.tensors.get_mut(tensor % n) {
                t.name = name;
            }
        }
        Damage::Lose { tensor } => {
            if tensor % n < manifest.tensors.len() {
                manifest.tensors.remove(tensor % n);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_manifest_is_refused_or_gives_a_valid_program(
        case in 0..CASES.len(),
        damages in prop::collection::vec(damage(), 1..3),
    ) {
        let mut manifest = open(CASES[case]);
        for damage in &damages {
            apply(&mut manifest, damage);
        }
        if let Ok(model) = resolve(&manifest) {
            // A program may still be refused, such as for a context that its positions do not reach.
            if let Ok(program) = build_program(&model, 16) {
                validate_program(&program, &model).unwrap();
            }
            for weight in &model.weights {
                let source = weight.change.source_encoding().unwrap_or(weight.encoding);
                let bytes: u64 = weight.views.iter().map(|v| v.nbytes()).sum();
                prop_assert_eq!(bytes, source.nbytes(weight.shape).unwrap());
            }
        }
    }
}
