//! Readers and writers against the Python packages `gguf` and `safetensors`, which share no code with them.
#![allow(clippy::unwrap_used, reason = "a test ends with the first error")]

use std::process::Command;

use hoist_formats::write::{GgufBuilder, Layout, SafeTensorsBuilder};
use hoist_formats::{Encoding, MetaValue, Metadata, open};

fn write(layout: &Layout, path: &std::path::Path) {
    let file = std::fs::File::create(path).unwrap();
    layout
        .write(file, |slot, out| out.write_all(&vec![1; slot.nbytes as usize]))
        .unwrap();
}

#[test]
#[ignore = "needs python3 with gguf, safetensors and numpy"]
fn python_reads_what_is_written_and_the_other_way_round() {
    let folder = std::env::temp_dir().join(format!("hoist-interop-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let gguf = folder.join("ours.gguf");
    let mut builder = GgufBuilder::new("llama")
        .alignment(128)
        .meta("k.u8", 1u8)
        .meta("k.i8", -1i8)
        .meta("k.u16", 2u16)
        .meta("k.i16", -2i16)
        .meta("k.u32", 3u32)
        .meta("k.i32", -3i32)
        .meta("k.u64", u64::MAX)
        .meta("k.i64", i64::MIN)
        .meta("k.f32", 0.5f32)
        .meta("k.f64", 0.1f64)
        .meta("k.bool", true)
        .meta("k.string", "grüße")
        .meta("k.strings", vec!["a".to_owned(), String::new()])
        .meta("k.bools", vec![true, false])
        .meta("k.doubles", vec![0.25f64]);
    // `gguf` states 40 bytes for Q8_1 where ggml has 36, and does not know Q1_0 and Q2_0.
    let unknown = [Encoding::Q8_1, Encoding::Q1_0, Encoding::Q2_0];
    for encoding in Encoding::all().filter(|e| e.ggml_id().is_some() && !unknown.contains(e)) {
        builder = builder.tensor(encoding.name(), encoding, [3, 2 * encoding.block_weights()]);
    }
    write(&builder.layout().unwrap(), &gguf);

    let safetensors = folder.join("ours.safetensors");
    let builder = SafeTensorsBuilder::new()
        .meta("format", "pt")
        .tensor("a", Encoding::F32, [2, 3])
        .tensor("b", Encoding::BF16, [5])
        .tensor("c", Encoding::F16, [1, 2, 3]);
    write(&builder.layout().unwrap(), &safetensors);

    let list = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop.py");
    let program = std::env::current_exe().unwrap();
    let examples = program.parent().unwrap().parent().unwrap().join("examples/list");
    let status = Command::new("python3")
        .arg(list)
        .arg(examples)
        .args([&folder, &gguf, &safetensors])
        .status()
        .unwrap();
    assert!(status.success());

    let python = open(&folder.join("python.gguf")).unwrap();
    let m = &python.metadata;
    assert_eq!(m.get_u32("k.u8").unwrap(), Some(255));
    assert_eq!(m.get_u64("k.u64").unwrap(), Some(u64::MAX));
    assert_eq!(m.get_f32("k.f32").unwrap(), Some(0.5));
    assert_eq!(m.get_f32("k.f64").unwrap(), Some(0.1));
    assert_eq!(m.get_bool("k.bool").unwrap(), Some(true));
    assert_eq!(m.get_str("k.string").unwrap(), Some("grüße"));
    assert_eq!(m.get_strs("k.strings").unwrap(), Some(vec!["a", "", "ß"]));
    assert_eq!(m.get_i64s("k.ints").unwrap(), Some(vec![1, -2, 3]));
    assert_eq!(m.get_f32s("k.floats").unwrap(), Some(vec![0.5, -1.5]));
    assert_eq!(m.get_bools("k.bools").unwrap(), Some(vec![true, false]));
    assert!(m.get_u32("k.i8").is_err(), "-128 is no u32");
    assert!(m.get_str("k.f32").is_err());
    let Metadata::Gguf(map) = m else {
        panic!("GGUF metadata")
    };
    assert_eq!(map["k.i64"], MetaValue::I64(i64::MIN));
    std::fs::remove_dir_all(&folder).unwrap();
}
