//! Plugins that crash, hang or end the process, in each function: in a process of their own they take nothing with them.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::{built, cargo_built, hoist, load, processes_of};

#[test]
fn a_missing_function_is_refused_by_name() {
    let Some(built) = built() else { return };
    let plugin = built.path("libfaulty.so");
    for entry in REQUIRED {
        let (code, said) = load(&format!("null:{entry}"), &plugin, &["--isolate"]);
        assert_eq!(code, Some(6), "{entry}: {said}");
        assert!(said.contains(&format!("`{entry}` is NULL")), "{said}");
    }
}

const REQUIRED: &[&str] = &[
    "device_count",
    "device_info",
    "device_open",
    "caps",
    "memory_info",
    "plan_check",
    "load_begin",
    "upload",
    "load_commit",
    "load_abort",
    "readback",
    "model_destroy",
    "device_close",
    "shutdown",
];

/// Functions of the decode profile, and the optional ones, that a program of one thread of steps calls.
const DECODING: &[&str] = &[
    "build_index",
    "workspace_bytes",
    "workspace_create",
    "prepare",
    "forward",
    "truncate",
];

/// Ways to misbehave that a process of its own keeps in.
const KINDS: &[&str] = &["abort", "segfault", "overflow", "exit", "hang"];

/// Runs each fault on each entry, several at a time, and judges what the program made of it.
fn each_fault(entries: &[&str], library: &Path, run: impl Fn(&str, &[&str]) -> (Option<i32>, String) + Sync) {
    let started = Instant::now();
    let cases: Vec<(String, &str)> = KINDS
        .iter()
        .flat_map(|kind| {
            entries
                .iter()
                .map(move |entry| (format!("{kind}:{entry}"), *entry))
        })
        .collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some((fault, entry)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let limit = if fault.starts_with("hang") { "2" } else { "60" };
                    let (code, said) = run(fault, &["--isolate", "--isolate-limit", limit]);
                    if *entry == "load_abort" {
                        // Only a load that fails is aborted.
                        assert_eq!(code, Some(0), "{fault}: {said}");
                        continue;
                    }
                    // Giving back fails after the work is done; the plugin is rejected all the same.
                    let gives_back = matches!(*entry, "model_destroy" | "device_close" | "shutdown");
                    assert!(
                        matches!(code, Some(4 | 6)) && (!gives_back || code == Some(6)),
                        "{fault}: {code:?} {said}"
                    );
                    assert!(said.contains(&format!("`{entry}`")), "{fault}: {said}");
                    assert!(
                        said.contains("the process that loaded it") || said.contains("its worker process"),
                        "{fault}: {said}"
                    );
                    assert!(said.contains("faulty"), "{fault}: {said}");
                }
            });
        }
    });
    eprintln!("{} faults in {:?}", cases.len(), started.elapsed());
    // What was ended is gone, not only unreachable.
    let deadline = Instant::now() + Duration::from_secs(10);
    while !processes_of(library).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(processes_of(library), [""; 0]);
}

#[test]
fn crashes_and_hangs_stay_in_the_worker_process() {
    let Some(built) = built() else { return };
    // A copy, so that its processes are told from those of other tests.
    let plugin = built.path("libfaulty_crashing.so");
    std::fs::copy(built.path("libfaulty.so"), &plugin).expect("copied");
    each_fault(REQUIRED, &plugin, |fault, more| load(fault, &plugin, more));
}

#[test]
fn crashes_and_hangs_of_decoding_stay_in_the_worker_process() {
    let folder = tempfile::tempdir().expect("a folder");
    let plugin = folder.path().join("libfaulty_decoding.so");
    std::fs::copy(cargo_built("hoist-plugin-faulty"), &plugin).expect("copied");
    let backend = format!("plugin:{}", plugin.display());
    each_fault(DECODING, &plugin, |fault, more| {
        let mut arguments = vec!["bench", "decode", "-p", "2", "-n", "2", "--runs", "2"];
        arguments.extend(["--threads", "1", "--backend", backend.as_str()]);
        arguments.extend(more);
        let output = hoist(fault, &arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    });
    // The control: without a fault the same command works.
    let output = hoist(
        "",
        &[
            "bench",
            "decode",
            "-p",
            "2",
            "-n",
            "2",
            "--runs",
            "2",
            "--backend",
            &backend,
            "--isolate",
        ],
    );
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_constructor_that_hangs_is_ended_and_refused() {
    let Some(built) = built() else { return };
    let plugin = built.path("libfaulty_hanging.so");
    std::fs::copy(built.path("libfaulty.so"), &plugin).expect("copied");
    let started = Instant::now();
    for limits in [
        &["--probe-limit", "2"][..],
        &["--isolate", "--isolate-limit", "2"],
    ] {
        let (code, said) = load("constructor-hang", &plugin, limits);
        assert_eq!(code, Some(6), "{said}");
        assert!(said.contains("within 2000 ms"), "{said}");
        assert!(said.contains(&plugin.display().to_string()), "{said}");
        // The control differs in the fault only.
        assert_eq!(load("", &plugin, limits).0, Some(0));
    }
    assert!(
        started.elapsed() < Duration::from_secs(25),
        "nothing waited for long"
    );
    assert_eq!(processes_of(&plugin), [""; 0]);
}

/// A probe whose library left a process behind that holds its output: the library is refused, and not waited for.
#[test]
fn what_a_constructor_leaves_behind_is_not_waited_for() {
    let Some(built) = built() else { return };
    let plugin = built.path("libfaulty_forking.so");
    std::fs::copy(built.path("libfaulty.so"), &plugin).expect("copied");
    let started = Instant::now();
    let (code, said) = load("constructor-fork", &plugin, &["--probe-limit", "3"]);
    assert_eq!(code, Some(6), "{said}");
    assert!(
        said.contains("left a process behind that kept its output open for 3000 ms"),
        "{said}"
    );
    assert!(started.elapsed() < Duration::from_secs(20), "it was waited for");
    assert_eq!(load("", &plugin, &["--probe-limit", "3"]).0, Some(0));
}
