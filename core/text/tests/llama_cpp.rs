//! The same token ids as llama.cpp, over the texts of `scripts/text/compare_tokenizers.py`, for each real model that is on
//! this machine: in `$HOIST_MODELS` or `~/.cache/hoist/models`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

use std::io::Write;
use std::path::PathBuf;

use hoist_text::{DecodeOptions, EncodeOptions, Tokenizer};
use serde_json::Value;

/// The model's path. Where models are promised (`CI` is set) a missing one is a failure.
fn model(file: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("HOIST_MODELS").map_or_else(
        || {
            let home = std::env::var_os("HOME").unwrap_or_default();
            PathBuf::from(home).join(".cache/hoist/models")
        },
        PathBuf::from,
    );
    let path = folder.join(file);
    if path.exists() {
        return Some(path);
    }
    assert!(
        std::env::var_os("CI").is_none(),
        "`{}` is missing",
        path.display()
    );
    // Not `eprintln!`, which the harness hides for tests that pass.
    let _ = writeln!(std::io::stderr(), "skipped: `{}` is missing", path.display());
    None
}

fn tokenizer(file: &str) -> Option<Tokenizer> {
    let manifest = hoist_formats::open(&model(file)?).unwrap();
    Some(Tokenizer::from_manifest(&manifest).unwrap())
}

fn check(file: &str, golden: &str) {
    let Some(tokenizer) = tokenizer(file) else {
        return;
    };
    let golden: Value = serde_json::from_str(golden).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 250, "{} cases", cases.len());
    let mut wrong = Vec::new();
    for case in cases {
        let text = case[0].as_str().unwrap();
        let options = EncodeOptions {
            add_special: true,
            parse_special: case[1].as_bool().unwrap(),
        };
        let expected: Vec<u32> = case[2]
            .as_array()
            .unwrap()
            .iter()
            .map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
            .collect();
        let found = tokenizer.encode(text, options).unwrap();
        if found != expected {
            wrong.push(format!(
                "{text:?} {options:?}\n  expected {expected:?}\n  found    {found:?}"
            ));
        }
        // Both tokenizers are lossless. Markers appear by name; bos is left off before the comparison.
        let bos = tokenizer.special_ids().bos;
        let body = match found.split_first() {
            Some((&first, rest)) if Some(first) == bos && expected.len() == found.len() => {
                if tokenizer.encode("", options).unwrap().is_empty() {
                    &found[..]
                } else {
                    rest
                }
            }
            _ => &found[..],
        };
        let back = tokenizer.decode(body, DecodeOptions::default()).unwrap();
        // A space token and `▁` in the text are the same to SentencePiece.
        if back != text && back != text.replace('▁', " ") {
            wrong.push(format!("{text:?} decodes to {back:?}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {} cases differ:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}

#[test]
fn smollm2_gives_llama_cpps_tokens() {
    check(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        include_str!("data/smollm2.json"),
    );
}

#[test]
fn gemma3_gives_llama_cpps_tokens() {
    check("gemma-3-270m-q4_k_m.gguf", include_str!("data/gemma3.json"));
}

#[test]
fn smollm2_names_its_special_tokens() {
    let Some(tokenizer) = tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf") else {
        return;
    };
    let ids = tokenizer.special_ids();
    assert_eq!((ids.bos, ids.eos, ids.eot), (Some(1), Some(2), Some(2)));
    assert_eq!(tokenizer.bos_text(), Some("<|im_start|>"));
    assert_eq!(tokenizer.eos_text(), Some("<|im_end|>"));
    assert!(tokenizer.is_end_of_generation(0) && tokenizer.is_end_of_generation(2));
    assert!(!tokenizer.is_end_of_generation(1));
    assert_eq!(tokenizer.vocabulary_size(), 49152);
}

#[test]
fn gemma3_names_its_special_tokens() {
    let Some(tokenizer) = tokenizer("gemma-3-270m-q4_k_m.gguf") else {
        return;
    };
    let ids = tokenizer.special_ids();
    assert_eq!((ids.bos, ids.eos), (Some(2), Some(1)));
    assert_eq!(
        tokenizer.token_to_piece(ids.eot.unwrap()).unwrap(),
        b"<end_of_turn>"
    );
    assert!(tokenizer.is_end_of_generation(1) && tokenizer.is_end_of_generation(ids.eot.unwrap()));
}
