use std::fs::{Permissions, set_permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hoist_core::formats::Encoding;
use hoist_tests::files::{ModelFiles, RawApr, TinyLlama, hostile};

use crate::support::{Ran, hoist, on_disk, run};

fn load(path: &Path) -> Ran {
    let started = Instant::now();
    let ran: Ran = hoist().arg("load").arg(path).output().expect("hoist runs").into();
    assert!(started.elapsed() < Duration::from_secs(1), "{}", path.display());
    ran
}

/// Demands a code, one line of error that says all of these, and nothing else.
pub(crate) fn refused(ran: &Ran, code: i32, says: &[&str]) {
    assert_eq!(ran.code, Some(code), "{}", ran.stderr);
    assert_eq!(ran.stdout, "");
    let lines: Vec<_> = ran.stderr.lines().collect();
    assert!(lines[0].starts_with("error: "), "{}", ran.stderr);
    assert!(
        lines[1..].iter().all(|line| line.starts_with("hint: ")),
        "{}",
        ran.stderr
    );
    for word in says {
        assert!(lines[0].contains(word), "`{word}` is not in {}", lines[0]);
    }
}

#[test]
fn files_that_are_no_models_are_code_3() {
    for (name, bytes, says) in [
        ("empty.gguf", &b""[..], &["empty"][..]),
        ("wrong.gguf", b"PK\x03\x04 this is a zip file", &["GGUF", "found"]),
        ("wrong.apr", b"GIF89a and then some", &["APR"]),
        (
            "wrong.safetensors",
            b"\x7fELF\x02\x01\x01\0\0\0\0\0",
            &["expected", "found"],
        ),
    ] {
        let (_folder, path) = on_disk(&ModelFiles::single(name, bytes.to_vec()));
        refused(&load(&path), 3, says);
    }
    let folder = tempfile::tempdir().unwrap();
    refused(&load(folder.path()), 3, &["holds no model", "expected"]);
    refused(&load(Path::new("/dev/null")), 3, &["regular file"]);
}

#[test]
fn every_hostile_file_is_code_3_and_its_control_is_not() {
    let corpus = hostile();
    assert!(corpus.len() > 50);
    for case in corpus {
        let (_folder, path) = on_disk(&case.model);
        let ran = load(&path);
        assert_eq!(ran.code, Some(3), "{}: {}", case.name, ran.stderr);
        assert_eq!(ran.stdout, "");
        assert!(ran.stderr.starts_with("error: "), "{}", ran.stderr);
    }
}

#[test]
fn a_file_that_is_not_there_is_code_7() {
    refused(
        &load(Path::new("/nowhere/model.gguf")),
        7,
        &["/nowhere/model.gguf"],
    );
}

#[test]
fn a_file_that_may_not_be_read_is_code_3() {
    let model = ModelFiles::single("model.gguf", TinyLlama::small().gguf(Encoding::F32));
    let (folder, path) = on_disk(&model);
    set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    // A copy of the program, which a user with fewer rights can run wherever this one was built.
    let program = folder.path().join("hoist");
    std::fs::copy(env!("CARGO_BIN_EXE_hoist"), &program).unwrap();
    let load = || -> Ran {
        let mut command = Command::new(&program);
        if rustix::process::geteuid().is_root() {
            command.uid(65534).gid(65534);
        }
        command
            .arg("load")
            .arg(&path)
            .stdin(Stdio::null())
            .output()
            .expect("hoist runs")
            .into()
    };
    set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    assert_eq!(load().code, Some(0));
    set_permissions(&path, Permissions::from_mode(0o000)).unwrap();
    refused(&load(), 3, &["model.gguf", "ermission denied"]);
}

#[test]
fn a_file_without_a_transformer_loads_nothing_and_says_so() {
    let mut tensors = TinyLlama::small().tensors();
    for (i, tensor) in tensors.iter_mut().enumerate() {
        tensor.hf_name = format!("conv{i}.kernel");
    }
    let bytes = TinyLlama::safetensors_of(&tensors, Encoding::F32);
    let (_folder, path) = on_disk(&ModelFiles::single("resnet.safetensors", bytes));
    refused(&load(&path), 3, &["holds no transformer", "conv0.kernel"]);
    // It can still be looked at.
    let ran: Ran = hoist().arg("inspect").arg(&path).output().unwrap().into();
    assert_eq!(ran.code, Some(0));
    assert!(ran.stdout.contains("conv3.kernel") && ran.stderr.contains("holds no transformer"));
}

#[test]
fn an_architecture_that_is_not_known_lists_those_that_are() {
    let bytes = TinyLlama::small().gguf(Encoding::F32);
    // The same length, so that nothing else of the file moves.
    let at = bytes.windows(5).position(|w| w == b"llama").unwrap();
    let mut other = bytes.clone();
    other[at..at + 5].copy_from_slice(b"mamba");
    let (_folder, path) = on_disk(&ModelFiles::single("model.gguf", other));
    refused(
        &load(&path),
        3,
        &["`mamba` is unknown", "llama", "qwen3moe", "gpt2"],
    );
    let (_folder, path) = on_disk(&ModelFiles::single("model.gguf", bytes));
    assert_eq!(load(&path).code, Some(0));
}

#[test]
fn a_backend_or_device_that_is_not_there_is_code_4() {
    let model = ModelFiles::single("model.gguf", TinyLlama::small().gguf(Encoding::F32));
    let (_folder, path) = on_disk(&model);
    for (backend, says) in [("tpu", "no such backend"), ("cpu:1", "no such device")] {
        let ran: Ran = hoist()
            .args(["load", "--backend", backend])
            .arg(&path)
            .output()
            .unwrap()
            .into();
        refused(&ran, 4, &[says]);
        assert!(ran.stderr.contains("\nhint: "), "{}", ran.stderr);
    }
}

#[test]
fn what_does_not_fit_is_refused_with_numbers() {
    let model = ModelFiles::single("model.gguf", TinyLlama::wide().gguf(Encoding::F32));
    let (_folder, path) = on_disk(&model);
    let path = path.to_str().unwrap();
    let fits = |memory: &str| run(&["load", "--memory", memory, path]).code;
    assert_eq!(fits("1GiB"), Some(0));
    refused(
        &run(&["load", "--memory", "100KiB", path]),
        5,
        &["does not fit", "102400 are available", "missing"],
    );
    // Asking whether it fits is a question, and the answer is no.
    let ran = run(&["plan", "--memory", "100KiB", path]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stdout.contains("does not fit"), "{}", ran.stdout);
}

#[test]
fn a_context_that_no_program_has_is_a_usage_error() {
    let model = ModelFiles::single("model.gguf", TinyLlama::small().gguf(Encoding::F32));
    let (_folder, path) = on_disk(&model);
    refused(
        &run(&["load", "--context", "4294967295", path.to_str().unwrap()]),
        2,
        &["4294967295"],
    );
    refused(
        &run(&["load", "--trace-layers", "0-1", path.to_str().unwrap()]),
        2,
        &["0-0"],
    );
}

#[test]
fn what_decompresses_to_more_than_there_is_memory_is_code_5() {
    let inspect = |zeros: u32| -> Ran {
        let (_folder, path) = on_disk(&ModelFiles::single("model.apr", RawApr::lz4_of_zeros(zeros)));
        let limited = "ulimit -v 1048576 && exec \"$0\" inspect \"$1\"";
        let mut command = Command::new("sh");
        command
            .args(["-c", limited, env!("CARGO_BIN_EXE_hoist")])
            .arg(&path);
        command.stdin(Stdio::null()).output().expect("sh runs").into()
    };
    refused(&inspect(2 << 30), 5, &["model.apr", "bytes of memory"]);
    // The control is decompressed, and then its checksum is wrong.
    refused(&inspect(1 << 20), 3, &["model.apr", "CRC"]);
}
