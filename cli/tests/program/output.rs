//! What is written where: messages, data, files.

use std::fs::{File, read, read_dir};
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use hoist_core::formats::Encoding;
use hoist_tests::files::{ModelFiles, TinyLlama};
use rustix::process::{Pid, Signal, kill_process};

use crate::bad_input::refused;
use crate::support::{Ran, hoist, json, on_disk, run};

fn full() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

/// A pipe whose reader is gone.
fn unread() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

#[test]
fn a_message_that_nobody_can_read_changes_no_exit_code() {
    for (arguments, code) in [
        (&["load", "/nowhere/model.gguf"][..], 7),
        (&["load", "--backend", "tpu"], 4),
        (&["load", "--context", "0"], 2),
        (&["generate", "-p", "x", "-n", "600"], 0),
    ] {
        for stderr in [full().into(), unread()] {
            let status = hoist()
                .args(arguments)
                .stdout(Stdio::null())
                .stderr(stderr)
                .status()
                .unwrap();
            assert_eq!(status.code(), Some(code), "{arguments:?}");
        }
    }
}

#[test]
fn data_that_cannot_be_written_is_code_7_and_a_reader_that_left_is_none() {
    for arguments in [
        &["--help"][..],
        &["--version"],
        &["load", "--help"],
        &["inspect"],
        &["plan", "--json"],
        &["completions", "bash"],
        &["generate", "-p", "x", "-n", "1"],
    ] {
        let ran = hoist().args(arguments).stdout(full()).output().unwrap();
        refused(&ran.into(), 7, &["writing to standard output", "No space left"]);
        let ran: Ran = hoist().args(arguments).stdout(unread()).output().unwrap().into();
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{arguments:?}");
    }
}

/// Whether a terminal that shows it does nothing but show it.
fn is_inert(text: &str) -> bool {
    !text
        .chars()
        .any(|c| (c.is_control() && c != '\n') || ('\u{202a}'..='\u{202e}').contains(&c))
}

#[test]
fn names_and_metadata_cannot_drive_a_terminal() {
    const NAME: &str = "blk.0.\u{1b}[31m\u{202e}\u{9b}1m\n\rerror: x";
    let mut tensors = TinyLlama::small().tensors();
    let mut extra = tensors[0].clone();
    extra.hf_name = NAME.into();
    tensors.push(extra);
    let mut model = TinyLlama::small().hugging_face(Encoding::F32);
    for (name, bytes) in &mut model.files {
        if name.ends_with(".safetensors") {
            *bytes = TinyLlama::safetensors_of(&tensors, Encoding::F32);
        } else if name == "config.json" {
            let config = String::from_utf8(bytes.clone()).unwrap();
            let evil = r#"{"\u001b]0;title\u0007": "\u001b[2J\u202e", "#;
            *bytes = config.replacen('{', evil, 1).into_bytes();
        }
    }
    let (_folder, path) = on_disk(&model);
    for arguments in [&["inspect"][..], &["plan", "--weights"], &["load"]] {
        let ran: Ran = hoist().args(arguments).arg(&path).output().unwrap().into();
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        assert!(is_inert(&ran.stdout), "{:?}", ran.stdout);
        assert!(is_inert(&ran.stderr), "{:?}", ran.stderr);
        assert!(!ran.stdout.contains("\nerror: x"), "{:?}", ran.stdout);
    }
    // Data is exact.
    let report = json("hoist.inspect/1", &["inspect"], &path);
    let names = report["tensors"].as_array().unwrap();
    assert!(names.iter().any(|tensor| tensor["name"] == NAME));
}

#[test]
fn paths_cannot_drive_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let evil = std::ffi::OsStr::from_bytes(b"x\x1b[31m\nhint: y\xff.gguf");
    let path = folder.path().join(evil);
    let inspect = |path: &Path| -> Ran { hoist().arg("inspect").arg(path).output().unwrap().into() };
    let missing = inspect(&path);
    refused(&missing, 7, &["x\\u{1b}[31m\\nhint: y\u{fffd}.gguf"]);
    assert!(is_inert(&missing.stderr));
    std::fs::write(&path, b"GGUF").unwrap();
    let short = inspect(&path);
    refused(&short, 3, &["x\\u{1b}[31m\\nhint: y"]);
    assert!(is_inert(&short.stderr));
    std::fs::write(&path, TinyLlama::small().gguf(Encoding::F32)).unwrap();
    let shown = inspect(&path);
    assert_eq!(shown.code, Some(0));
    assert!(is_inert(&shown.stdout) && !shown.stdout.contains("\nhint: y"));
}

#[test]
fn a_plugin_at_a_path_that_is_no_unicode_is_told_of_in_json() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(std::ffi::OsStr::from_bytes(b"lib\xff.so"));
    std::fs::copy(
        hoist_tests::libraries::cargo_built("hoist-plugin-rust-minimal").unwrap(),
        &path,
    )
    .unwrap();
    let report = json("hoist.plugin.inspect/1", &["plugin", "inspect"], &path);
    assert!(report["path"].as_str().unwrap().ends_with("lib\u{fffd}.so"));
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_dump_is_whole_or_what_was_there_before_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dump");
    let dump = path.to_str().unwrap();
    std::fs::write(&path, "before").unwrap();
    // The first chunk is computed, the second one holds a token that the model has not.
    let fails = ["logits", "--tokens", "1,2,99999", "--chunk", "2", "--dump", dump];
    assert_eq!(run(&fails).code, Some(2));
    assert_eq!(read(&path).unwrap(), b"before");
    assert_eq!(run(&["logits", "--tokens", "1,2", "--dump", dump]).code, Some(0));
    assert_eq!(read(&path).unwrap().len(), 2 * 257 * 4);
    assert_eq!(names_in(folder.path()), ["dump"]);
    for (path, says) in [
        ("/dev/full", "No space left"),
        ("/nowhere/x", "No such file"),
        ("/tmp", "directory"),
    ] {
        let ran = run(&["logits", "--tokens", "1,2", "--dump", path]);
        refused(&ran, 7, &[path, says]);
    }
}

#[test]
fn a_report_that_cannot_be_written_is_refused_before_the_backend_is_judged() {
    let started = Instant::now();
    for option in ["--json-file", "--junit", "--html"] {
        let ran = run(&["conform", "cpu", "--seed", "1", option, "/nowhere/report"]);
        refused(&ran, 7, &["creating `/nowhere/report`"]);
    }
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn an_interrupted_judgement_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = hoist()
        .args(["conform", "cpu", "--json-file"])
        .arg(folder.path().join("report.json"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The seed is told once the paths have been looked at.
    let mut told = [0; 4];
    child.stderr.as_mut().unwrap().read_exact(&mut told).unwrap();
    assert_eq!(&told, b"seed");
    // Not INT, which a child ignores where the tests are a shell's background job.
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    child.wait().unwrap();
    assert_eq!(names_in(folder.path()), [""; 0]);
}

#[test]
fn a_synthetic_model_is_whole_or_what_was_there_before_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, "before").unwrap();
    let child = hoist()
        .args(["synth", "llama-3.1-8b"])
        .arg(&path)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    // It is at work once its file has blocks; the file alone is only a length.
    let blocks = || {
        use std::os::unix::fs::MetadataExt as _;
        let entries = read_dir(folder.path()).unwrap();
        entries
            .map(|e| e.unwrap().metadata().map_or(0, |m| m.blocks()))
            .max()
            .unwrap_or(0)
    };
    while blocks() < 10_000 {
        assert!(Instant::now() < deadline, "nothing was ever written");
        std::thread::sleep(Duration::from_millis(1));
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    refused(&child.wait_with_output().unwrap().into(), 130, &["cancelled"]);
    assert_eq!(read(&path).unwrap(), b"before");
    assert_eq!(names_in(folder.path()), ["model.gguf"]);

    let ran = run(&["synth", "tiny-llama", folder.path().to_str().unwrap()]);
    refused(&ran, 7, &["no regular file"]);
    let whole = run(&["synth", "tiny-llama", path.to_str().unwrap()]);
    assert_eq!(whole.code, Some(0), "{}", whole.stderr);
    assert_eq!(run(&["load", "--verify", path.to_str().unwrap()]).code, Some(0));
    assert_eq!(names_in(folder.path()), ["model.gguf"]);
}

#[test]
fn a_model_that_cannot_be_opened_makes_no_dump() {
    let (folder, path) = on_disk(&ModelFiles::single("model.gguf", b"GGUF".to_vec()));
    let dump = folder.path().join("dump");
    let arguments = [
        "logits",
        "--tokens",
        "1",
        "--dump",
        dump.to_str().unwrap(),
        path.to_str().unwrap(),
    ];
    assert_eq!(run(&arguments).code, Some(3));
    assert_eq!(names_in(folder.path()), ["model.gguf"]);
}

#[test]
fn a_name_of_millions_of_characters_widens_no_table_and_no_message() {
    let name = "x".repeat(4 << 20);
    let mut model = TinyLlama::small()
        .gguf_builder(Encoding::F32)
        .meta(name.clone(), 1u32);
    for i in 0..1000 {
        model = model.meta(format!("hoist.test.{i}"), 1u32);
    }
    let bytes = |builder: hoist_core::formats::write::GgufBuilder| {
        let layout = builder.layout().unwrap();
        let mut bytes = layout.header.clone();
        bytes.resize(layout.file_len as usize, 0);
        bytes
    };
    let (_folder, path) = on_disk(&ModelFiles::single("model.gguf", bytes(model)));
    let started = Instant::now();
    let ran: Ran = hoist().arg("inspect").arg(&path).output().unwrap().into();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.len() < 1 << 20, "{} bytes", ran.stdout.len());
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "{:?}",
        started.elapsed()
    );
    let metadata = json("hoist.inspect/1", &["inspect"], &path);
    assert_eq!(metadata["metadata"][&name], 1);

    let model = TinyLlama::small().gguf_builder(Encoding::F32);
    let model = model.tensor(name, Encoding::F32, [1u64 << 40]);
    let mut long = bytes_of_header(model);
    long.resize(long.len() + (1 << 20), 0);
    let (_folder, path) = on_disk(&ModelFiles::single("model.gguf", long));
    let ran: Ran = hoist().arg("inspect").arg(&path).output().unwrap().into();
    refused(&ran, 3, &["model.gguf", "xxx…xxx", "the file has"]);
    assert!(ran.stderr.len() < 8192, "{} bytes", ran.stderr.len());
}

fn bytes_of_header(builder: hoist_core::formats::write::GgufBuilder) -> Vec<u8> {
    builder.layout().unwrap().header
}
