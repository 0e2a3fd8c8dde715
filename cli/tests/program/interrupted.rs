//! Loads that are stopped, or whose file changes, half-way.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use hoist_core::formats::write::GgufBuilder;
use hoist_core::formats::{Encoding, MetaValue};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::support::{Ran, hoist, json};

/// A model of zeros, of which the file system stores only the header, and whose load takes a while.
fn large_model(mib: u64) -> (TempDir, PathBuf) {
    let (hidden, vocab) = (1024u64, mib * 512);
    let mut builder = GgufBuilder::new("llama")
        .meta("llama.block_count", 1u32)
        .meta("llama.context_length", 64u32)
        .meta("llama.embedding_length", 1024u32)
        .meta("llama.feed_forward_length", 64u32)
        .meta("llama.attention.head_count", 8u32)
        .meta("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .meta("llama.vocab_size", MetaValue::U32(vocab as u32));
    builder = builder.tensor("token_embd.weight", Encoding::F16, [vocab, hidden]);
    for (name, shape) in [
        ("attn_norm", &[hidden][..]),
        ("attn_q", &[hidden, hidden]),
        ("attn_k", &[hidden, hidden]),
        ("attn_v", &[hidden, hidden]),
        ("attn_output", &[hidden, hidden]),
        ("ffn_norm", &[hidden]),
        ("ffn_gate", &[64, hidden]),
        ("ffn_up", &[64, hidden]),
        ("ffn_down", &[hidden, 64]),
    ] {
        builder = builder.tensor(format!("blk.0.{name}.weight"), Encoding::F32, shape);
    }
    let layout = builder
        .tensor("output_norm.weight", Encoding::F32, [hidden])
        .layout()
        .unwrap();

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("zeros.gguf");
    let mut file = File::create(&path).unwrap();
    file.write_all(&layout.header).unwrap();
    file.set_len(layout.file_len).unwrap();
    (folder, path)
}

fn start(path: &Path) -> Child {
    hoist()
        .args(["load", "--verify"])
        .arg(path)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("hoist runs")
}

/// Waits until the program holds that much memory: then it is in the middle of a load.
fn wait_until_resident(child: &mut Child, bytes: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(
            child.try_wait().unwrap().is_none(),
            "the load ended before it could be disturbed"
        );
        assert!(Instant::now() < deadline, "the load never got anywhere");
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let resident = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        let kib = resident.and_then(|r| r.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        if kib.is_some_and(|kib| kib * 1024 >= bytes) {
            return;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn end(child: Child) -> Ran {
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        output.status.signal(),
        None,
        "ended by a signal instead of by itself"
    );
    output.into()
}

#[test]
fn an_interrupted_load_ends_by_itself_with_code_130() {
    let (_folder, path) = large_model(512);
    for signal in [Signal::INT, Signal::TERM] {
        let mut child = start(&path);
        wait_until_resident(&mut child, 64 << 20);
        kill_process(Pid::from_child(&child), signal).unwrap();
        let ran = end(child);
        assert_eq!(ran.code, Some(130), "{}", ran.stderr);
        assert_eq!(
            (ran.stdout.as_str(), ran.stderr.as_str()),
            ("", "error: cancelled\n")
        );
    }
}

#[test]
fn a_file_that_shrinks_during_the_load_is_noticed() {
    let (_folder, path) = large_model(512);
    let mut child = start(&path);
    wait_until_resident(&mut child, 64 << 20);
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let ran = end(child);
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    assert_eq!(ran.stdout, "");
    assert!(
        ran.stderr
            .contains("changed while it was being loaded: its length was"),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_file_that_is_written_to_during_the_load_is_noticed() {
    let (_folder, path) = large_model(512);
    let mut child = start(&path);
    wait_until_resident(&mut child, 64 << 20);
    let file = File::options().write(true).open(&path).unwrap();
    file.set_modified(std::time::SystemTime::now() + Duration::from_secs(1))
        .unwrap();
    let ran = end(child);
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    assert!(ran.stderr.contains("its modification time was"), "{}", ran.stderr);
}

#[test]
fn a_load_needs_no_more_memory_than_what_is_resident_and_64_mib() {
    let (_folder, path) = large_model(256);
    let report = json("hoist.load/1", &["load", "--verify"], &path);
    let resident = report["resident"]["total"].as_u64().unwrap();
    let peak = report["peak_rss_bytes"].as_u64().unwrap();
    assert!(resident > 256 << 20);
    assert!(peak > 256 << 20, "{peak} cannot be the peak");
    assert!(peak <= resident + (64 << 20), "peak {peak}, resident {resident}");
}
