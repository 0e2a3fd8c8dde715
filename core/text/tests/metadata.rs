//! Tokenizers from small vocabularies made here: hostile metadata, round trips, and folders with a `tokenizer.json`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

use std::collections::BTreeMap;

use hoist_formats::{MetaArray, MetaValue};
use hoist_text::{DecodeOptions, EncodeOptions, Error, TokenKind, Tokenizer};
use proptest::prelude::*;

type Map = BTreeMap<String, MetaValue>;

const PLAIN: EncodeOptions = EncodeOptions {
    add_special: false,
    parse_special: false,
};
const FULL: EncodeOptions = EncodeOptions {
    add_special: true,
    parse_special: true,
};

fn set(map: &mut Map, key: &str, value: MetaValue) {
    map.insert(format!("tokenizer.ggml.{key}"), value);
}

fn strings(items: impl IntoIterator<Item = impl Into<String>>) -> MetaValue {
    MetaValue::Array(MetaArray::String(items.into_iter().map(Into::into).collect()))
}

/// GPT-2's character for each byte, computed as GPT-2 does.
fn alphabet() -> Vec<String> {
    let mut next = 0x100;
    (0..256u32)
        .map(|b| {
            let c = match b {
                0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => b,
                _ => {
                    next += 1;
                    next - 1
                }
            };
            char::from_u32(c).unwrap().to_string()
        })
        .collect()
}

/// 256 bytes, two merges, an end marker and a user-defined word.
fn byte_pairs() -> Map {
    let mut tokens = alphabet();
    tokens.extend(["th", "the", "<|endoftext|>", "[[x]]"].map(String::from));
    let mut types = vec![1; 258];
    types.extend([3, 4]);
    let mut map = Map::new();
    set(&mut map, "model", MetaValue::String("gpt2".into()));
    set(&mut map, "pre", MetaValue::String("gpt-2".into()));
    set(&mut map, "tokens", strings(tokens));
    set(&mut map, "token_type", MetaValue::Array(MetaArray::I32(types)));
    set(&mut map, "merges", strings(["t h", "th e"]));
    set(&mut map, "bos_token_id", MetaValue::U32(258));
    set(&mut map, "eos_token_id", MetaValue::U32(258));
    map
}

/// 256 byte tokens and a few pieces.
fn sentencepiece() -> Map {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    tokens.extend(["▁", "a", "b", "▁a", "ab", "▁ab"].map(String::from));
    let mut types = vec![2, 3, 3];
    types.extend([6; 256]);
    types.extend([1; 6]);
    let mut scores = vec![0.0; 259];
    scores.extend([-9.0, -8.0, -7.0, -2.0, -1.0, -3.0]);
    let mut map = Map::new();
    set(&mut map, "model", MetaValue::String("llama".into()));
    set(&mut map, "tokens", strings(tokens));
    set(&mut map, "token_type", MetaValue::Array(MetaArray::I32(types)));
    set(&mut map, "scores", MetaValue::Array(MetaArray::F32(scores)));
    set(&mut map, "bos_token_id", MetaValue::U32(1));
    set(&mut map, "eos_token_id", MetaValue::U32(2));
    map
}

fn refused(map: &Map) -> Error {
    Tokenizer::from_gguf(map).unwrap_err()
}

#[test]
fn byte_pairs_merge_and_markers_are_parsed_only_when_asked() {
    let t = Tokenizer::from_gguf(&byte_pairs()).unwrap();
    assert_eq!(t.encode("the", PLAIN).unwrap(), [257]);
    assert_eq!(t.encode("a[[x]]", PLAIN).unwrap(), [97, 259]);
    assert_eq!(t.encode("<|endoftext|>", PLAIN).unwrap().len(), 13);
    assert_eq!(t.encode("<|endoftext|>th", FULL).unwrap(), [258, 256]);
    assert_eq!(t.token_kind(258).unwrap(), TokenKind::Control);
    assert!(t.is_end_of_generation(258));
    let hidden = DecodeOptions { skip_special: true };
    assert_eq!(t.decode(&[258, 257, 258], hidden).unwrap(), "the");
    assert_eq!(
        t.decode(&[258], DecodeOptions::default()).unwrap(),
        "<|endoftext|>"
    );
}

#[test]
fn sentencepiece_adds_and_removes_its_space() {
    let t = Tokenizer::from_gguf(&sentencepiece()).unwrap();
    // bos, then `▁ab`; after `</s>` the space is added again.
    assert_eq!(t.encode("ab</s>a", FULL).unwrap(), [1, 264, 2, 262]);
    assert_eq!(t.decode(&[264], DecodeOptions::default()).unwrap(), "ab");
    assert_eq!(t.decode(&[264, 262], DecodeOptions::default()).unwrap(), "ab a");
    // A continuation keeps it.
    let mut text = String::new();
    t.decode_stream(DecodeOptions::default())
        .push(264, &mut text)
        .unwrap();
    assert_eq!(text, " ab");
    let mut plain = sentencepiece();
    set(&mut plain, "add_space_prefix", MetaValue::Bool(false));
    let t = Tokenizer::from_gguf(&plain).unwrap();
    assert_eq!(t.encode("ab", PLAIN).unwrap(), [263]);
    assert_eq!(t.decode(&[264], DecodeOptions::default()).unwrap(), " ab");
}

#[test]
fn flags_say_what_is_added() {
    let mut map = byte_pairs();
    assert_eq!(
        Tokenizer::from_gguf(&map).unwrap().encode("a", FULL).unwrap(),
        [97]
    );
    set(&mut map, "add_bos_token", MetaValue::Bool(true));
    set(&mut map, "add_eos_token", MetaValue::Bool(true));
    let t = Tokenizer::from_gguf(&map).unwrap();
    assert_eq!(t.encode("a", FULL).unwrap(), [258, 97, 258]);
    assert_eq!(t.encode("a", PLAIN).unwrap(), [97]);
    map.remove("tokenizer.ggml.bos_token_id");
    assert!(matches!(
        refused(&map),
        Error::NoTokenToAdd {
            flag: "add_bos_token",
            ..
        }
    ));
    // Converters write the greatest number for a token that does not exist.
    set(&mut map, "bos_token_id", MetaValue::U32(u32::MAX));
    assert!(matches!(refused(&map), Error::NoTokenToAdd { .. }));
}

#[test]
fn every_key_of_a_wrong_type_is_named() {
    for base in [byte_pairs(), sentencepiece()] {
        Tokenizer::from_gguf(&base).unwrap();
        for key in base.keys() {
            for wrong in [
                MetaValue::F64(1.0),
                MetaValue::Array(MetaArray::U8(vec![1])),
                MetaValue::Array(MetaArray::Bool(vec![])),
            ] {
                let mut map = base.clone();
                map.insert(key.clone(), wrong);
                match refused(&map) {
                    Error::WrongType { key: named, .. } => assert_eq!(named, key),
                    other => panic!("{key}: {other}"),
                }
            }
        }
    }
}

#[test]
fn every_required_key_is_missed_by_name() {
    let required = |base: Map, keys: &[&str]| {
        for key in keys {
            let mut map = base.clone();
            map.remove(&format!("tokenizer.ggml.{key}")).unwrap();
            match refused(&map) {
                Error::MissingKey { key: named } => assert!(named.ends_with(key)),
                other => panic!("{key}: {other}"),
            }
        }
    };
    required(byte_pairs(), &["model", "tokens", "merges"]);
    required(sentencepiece(), &["model", "tokens", "scores"]);
}

#[test]
fn inconsistent_vocabularies_are_refused() {
    let with = |base: Map, key: &str, value: MetaValue| {
        let mut map = base;
        set(&mut map, key, value);
        refused(&map)
    };
    let none = strings(Vec::<String>::new());
    assert!(matches!(
        with(byte_pairs(), "tokens", none),
        Error::VocabularySize { found: 0, .. }
    ));
    let few = MetaValue::Array(MetaArray::I32(vec![1; 259]));
    assert!(matches!(
        with(byte_pairs(), "token_type", few),
        Error::WrongLength {
            expected: 260,
            found: 259,
            ..
        }
    ));
    let strange = MetaValue::Array(MetaArray::I32(vec![-7; 260]));
    assert!(matches!(
        with(byte_pairs(), "token_type", strange),
        Error::UnknownTokenType { token: 0, found: -7 }
    ));
    let short = MetaValue::Array(MetaArray::F32(vec![0.0; 3]));
    assert!(matches!(
        with(sentencepiece(), "scores", short),
        Error::WrongLength {
            expected: 265,
            found: 3,
            ..
        }
    ));
    let nan = MetaValue::Array(MetaArray::F32(vec![f32::NAN; 265]));
    assert!(matches!(
        with(sentencepiece(), "scores", nan),
        Error::BadScore { token: 0 }
    ));
    for (key, id) in [
        ("bos_token_id", MetaValue::U32(260)),
        ("eos_token_id", MetaValue::U64(u64::MAX)),
        ("padding_token_id", MetaValue::U32(1 << 31)),
    ] {
        assert!(matches!(
            with(byte_pairs(), key, id),
            Error::SpecialOutOfRange { vocab: 260, .. }
        ));
    }
    for merge in ["th", " ", "", "é", "t zz", "zz t", "h t"] {
        assert!(
            matches!(
                with(byte_pairs(), "merges", strings(["t h", merge])),
                Error::BadMerge { index: 1, .. }
            ),
            "{merge:?}"
        );
    }
    assert!(matches!(
        with(byte_pairs(), "model", MetaValue::String("bert".into())),
        Error::UnknownModel { .. }
    ));
    let message = with(byte_pairs(), "pre", MetaValue::String("x".repeat(1 << 20))).to_string();
    assert!(message.len() < 2000 && message.contains("gpt-2"), "{message}");
}

#[test]
fn bytes_without_a_token_are_an_error_and_not_lost() {
    let mut map = byte_pairs();
    let mut tokens = alphabet();
    tokens[usize::from(b'q')] = "missing".into();
    tokens.extend(["th", "the", "<|endoftext|>", "[[x]]"].map(String::from));
    set(&mut map, "tokens", strings(tokens));
    let t = Tokenizer::from_gguf(&map).unwrap();
    assert!(t.encode("abc", PLAIN).is_ok());
    assert!(matches!(
        t.encode("aqc", PLAIN),
        Err(Error::NoTokenForByte { byte: b'q' })
    ));
}

#[test]
fn tokenizers_templates_and_samplers_cross_threads() {
    fn crosses<T: Send + Sync>() {}
    crosses::<Tokenizer>();
    crosses::<hoist_text::ChatTemplate>();
    crosses::<hoist_text::Sampler>();
}

#[test]
fn tokens_out_of_range_are_refused() {
    let t = Tokenizer::from_gguf(&byte_pairs()).unwrap();
    for token in [260, u32::MAX] {
        let vocab_260 = |e: Error| matches!(e, Error::TokenOutOfRange { vocab: 260, .. });
        assert!(vocab_260(t.token_to_piece(token).unwrap_err()));
        assert!(vocab_260(
            t.decode(&[97, token], DecodeOptions::default()).unwrap_err()
        ));
    }
}

#[test]
fn long_runs_take_linear_time() {
    // Quadratic algorithms would take minutes.
    let began = std::time::Instant::now();
    for map in [byte_pairs(), sentencepiece()] {
        let t = Tokenizer::from_gguf(&map).unwrap();
        for unit in [" ", "\n", "a", "ab", "<|", "[["] {
            let text = unit.repeat(100_000);
            let tokens = t.encode(&text, FULL).unwrap();
            let back = t.decode(&tokens, DecodeOptions { skip_special: true }).unwrap();
            assert_eq!(back, text, "{unit:?}");
        }
    }
    assert!(began.elapsed().as_secs() < 60);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_text_comes_back(text in "\\PC*|[\\x00-\\xff]{0,40}|[ab▁ \\n<>s/|the]{0,60}") {
        for map in [byte_pairs(), sentencepiece()] {
            let t = Tokenizer::from_gguf(&map).unwrap();
            let tokens = t.encode(&text, PLAIN).unwrap();
            let back = t.decode(&tokens, DecodeOptions::default()).unwrap();
            // To SentencePiece `▁` is a space.
            prop_assert!(back == text || back == text.replace('▁', " "), "{:?} {:?}", text, back);
        }
    }

    #[test]
    fn arbitrary_metadata_never_panics(
        tokens in proptest::collection::vec("[a-c▁ ]{0,3}|<0x[0-9A-F]{2}>|Ġ|<\\|im_end\\|>", 0..30),
        types in proptest::collection::vec(-1i32..8, 0..30),
        scores in proptest::collection::vec(proptest::num::f32::ANY, 0..30),
        merges in proptest::collection::vec("[a-c ]{0,5}", 0..5),
        model in prop_oneof![Just("gpt2"), Just("llama")],
        bos in 0u32..40,
        text in "[a-d ▁é<|im_end>]{0,30}",
    ) {
        let mut map = Map::new();
        set(&mut map, "model", MetaValue::String(model.into()));
        let n = tokens.len();
        set(&mut map, "tokens", strings(tokens));
        if types.len() % 2 == 0 {
            let types = types.iter().copied().cycle().take(if types.is_empty() { 0 } else { n }).collect();
            set(&mut map, "token_type", MetaValue::Array(MetaArray::I32(types)));
        }
        let scores = scores.iter().copied().cycle().take(if scores.is_empty() { 0 } else { n }).collect();
        set(&mut map, "scores", MetaValue::Array(MetaArray::F32(scores)));
        set(&mut map, "merges", strings(merges));
        set(&mut map, "bos_token_id", MetaValue::U32(bos));
        if let Ok(t) = Tokenizer::from_gguf(&map)
            && let Ok(tokens) = t.encode(&text, FULL)
        {
            t.decode(&tokens, DecodeOptions::default()).unwrap();
        }
    }
}

mod folder {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// A byte-level `tokenizer.json` with the vocabulary of [`byte_pairs`].
    fn tokenizer_json() -> serde_json::Value {
        let mut vocab: serde_json::Map<String, serde_json::Value> = alphabet()
            .into_iter()
            .zip(0u32..)
            .map(|(c, id)| (c, id.into()))
            .collect();
        vocab.insert("th".into(), 256.into());
        vocab.insert("the".into(), 257.into());
        serde_json::json!({
            "version": "1.0",
            "added_tokens": [{
                "id": 258, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            }],
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "vocab": vocab, "merges": ["t h", "th e"],
            },
        })
    }

    fn write(folder: &Path, name: &str, value: &serde_json::Value) {
        fs::write(folder.join(name), value.to_string()).unwrap();
    }

    #[test]
    fn a_folder_gives_the_same_tokens_as_gguf() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "tokenizer.json", &tokenizer_json());
        write(
            folder.path(),
            "tokenizer_config.json",
            &serde_json::json!({"eos_token": {"content": "<|endoftext|>"}}),
        );
        write(
            folder.path(),
            "generation_config.json",
            &serde_json::json!({"eos_token_id": [258, 10]}),
        );
        let ours = Tokenizer::from_folder(folder.path()).unwrap();
        let gguf = Tokenizer::from_gguf(&byte_pairs()).unwrap();
        for text in ["", "the then", " the\n\n  é😀 <|endoftext|>x", "It's 42."] {
            for options in [PLAIN, FULL] {
                let tokens = ours.encode(text, options).unwrap();
                assert_eq!(
                    tokens,
                    gguf.encode(text, options).unwrap(),
                    "{text:?} {options:?}"
                );
                assert_eq!(ours.decode(&tokens, DecodeOptions::default()).unwrap(), text);
            }
        }
        let ids = ours.special_ids();
        assert_eq!(ids.eos, Some(258));
        assert!(ours.is_end_of_generation(258) && ours.is_end_of_generation(10));
        assert_eq!(ours.vocabulary_size(), 259);
    }

    #[test]
    fn broken_folders_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        assert!(matches!(
            Tokenizer::from_folder(path),
            Err(Error::NoTokenizer { .. })
        ));
        fs::write(path.join("tokenizer.json"), "{").unwrap();
        assert!(matches!(
            Tokenizer::from_folder(path),
            Err(Error::Malformed { .. })
        ));
        let mut sparse = tokenizer_json();
        sparse["model"]["vocab"]["x1"] = u32::MAX.into();
        write(path, "tokenizer.json", &sparse);
        assert!(matches!(
            Tokenizer::from_folder(path),
            Err(Error::VocabularySize { .. })
        ));
        let mut decoder = tokenizer_json();
        decoder["decoder"] =
            serde_json::json!({"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": true});
        write(path, "tokenizer.json", &decoder);
        assert!(matches!(
            Tokenizer::from_folder(path),
            Err(Error::Unsupported { .. })
        ));
        let mut merges = tokenizer_json();
        merges["model"]["merges"] = serde_json::json!(["q zz"]);
        write(path, "tokenizer.json", &merges);
        assert!(matches!(
            Tokenizer::from_folder(path),
            Err(Error::Malformed { .. })
        ));
        // The control: the file they were made from.
        write(path, "tokenizer.json", &tokenizer_json());
        Tokenizer::from_folder(path).unwrap();
        write(
            path,
            "generation_config.json",
            &serde_json::json!({"eos_token_id": 259}),
        );
        assert!(matches!(
            Tokenizer::from_folder(path),
            Err(Error::SpecialOutOfRange { .. })
        ));
    }
}

#[test]
fn the_embedded_models_tokens_are_bytes() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../cli/assets/tiny-kjv.gguf");
    let manifest = hoist_formats::open(path.as_ref()).unwrap();
    let t = Tokenizer::from_manifest(&manifest).unwrap();
    assert_eq!(t.vocabulary_size(), 257);
    // The same as llama.cpp: bos, the bytes, the marker.
    let ids = t.encode("In é<|endoftext|>", FULL).unwrap();
    assert_eq!(ids, [256, 73, 110, 32, 195, 169, 256]);
    assert!(t.is_end_of_generation(256));
}
