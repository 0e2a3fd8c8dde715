//! What is written can be read, is the same everywhere, and holds what the shape says.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends with the first error"
)]

use hoist_backend::Encoding;
use hoist_synth::{Container, Mix, ModelShape, Options, SHAPES, Summary, shape, write};

fn make(shape: &ModelShape, mix: Mix, container: Container, seed: u64) -> (tempfile::TempDir, Summary) {
    let folder = tempfile::tempdir().unwrap();
    let out = match container {
        Container::Gguf => folder.path().join("model.gguf"),
        Container::SafeTensors => folder.path().join("model"),
    };
    let summary = write(
        Options {
            shape,
            mix,
            container,
            seed,
        },
        &out,
        &|_, _| {},
    )
    .unwrap();
    (folder, summary)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn the_same_options_give_the_same_bytes_and_another_seed_gives_others() {
    let tiny = shape("tiny-llama").unwrap();
    let (_a, first) = make(tiny, Mix::Q4KM, Container::Gguf, 1);
    let (_b, second) = make(tiny, Mix::Q4KM, Container::Gguf, 1);
    let (_c, other) = make(tiny, Mix::Q4KM, Container::Gguf, 2);
    assert_eq!(first.blake3, second.blake3);
    assert_ne!(first.blake3, other.blake3);
    // The same on every machine: this is what one machine wrote.
    assert_eq!(
        hex(&first.blake3),
        include_str!("tiny-llama-q4_k_m-seed1.blake3").trim()
    );
}

#[test]
fn the_printed_digest_is_the_files() {
    let (_folder, summary) = make(shape("tiny-gemma3").unwrap(), Mix::Q4KM, Container::Gguf, 7);
    let bytes = std::fs::read(&summary.path).unwrap();
    assert_eq!(bytes.len() as u64, summary.bytes);
    assert_eq!(*blake3::hash(&bytes).as_bytes(), summary.blake3);
}

#[test]
fn every_tiny_shape_opens_in_both_formats() {
    for s in SHAPES.iter().filter(|s| s.name.starts_with("tiny-")) {
        for (mix, container) in [
            (Mix::Q4KM, Container::Gguf),
            (Mix::All(Encoding::F32), Container::SafeTensors),
        ] {
            let (folder, summary) = make(s, mix, container, 1);
            let path = match container {
                Container::Gguf => summary.path.clone(),
                Container::SafeTensors => folder.path().join("model"),
            };
            let manifest = hoist_formats::open(&path).unwrap_or_else(|e| panic!("{}: {e}", s.name));
            assert_eq!(manifest.tensors.len(), summary.tensors, "{}", s.name);
        }
    }
}

#[test]
fn every_encoding_is_written_in_whole_blocks() {
    let tiny = shape("tiny-llama").unwrap();
    for encoding in Encoding::all().filter(|e| Mix::from_name(e.name()).is_some()) {
        let (_folder, summary) = make(tiny, Mix::All(encoding), Container::Gguf, 3);
        let manifest = hoist_formats::open(&summary.path).unwrap();
        let q = manifest.tensor("blk.0.attn_q.weight").unwrap();
        assert_eq!(q.encoding, encoding);
        assert_eq!(q.shape, [256, 256]);
    }
}

#[test]
fn a_real_shape_has_its_published_size() {
    // SmolLM2-135M has 134,515,008 parameters, all in matrices but 61 norms of 576.
    let smol = shape("smollm2-135m").unwrap();
    let (_folder, summary) = make(smol, Mix::All(Encoding::F16), Container::SafeTensors, 1);
    let weights = 2 * 134_515_008;
    assert!(
        summary.bytes > weights && summary.bytes < weights + 65_536 + 61 * 576 * 2,
        "{}",
        summary.bytes
    );
}
