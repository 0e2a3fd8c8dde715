//! `hoist conform` as a user meets it: what conforms, what does not and how that is told, what is refused.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use hoist_tests::libraries::cargo_built;
use serde_json::Value;
use tempfile::TempDir;

fn hoist(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hoist"))
        .env_remove("HOIST_FAULT")
        .stdin(Stdio::null())
        .args(arguments)
        .output()
        .expect("hoist runs")
}

/// Exit code, stdout and stderr.
fn conform(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = hoist(&[&["conform"], arguments].concat());
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

fn folder() -> &'static TempDir {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| tempfile::tempdir().expect("a folder"))
}

fn write(name: &str, text: &str) -> String {
    let path = folder().path().join(name);
    std::fs::write(&path, text).expect("a file");
    path.display().to_string()
}

/// The minimal backend in C; `None`, told, without a compiler, which is a failure in CI.
fn c_minimal() -> Option<&'static str> {
    static LIBRARY: OnceLock<Option<String>> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| {
        let library = folder().path().join("libc_minimal.so");
        compile("plugins/examples/c-minimal/minimal.c", &library).then(|| library.display().to_string())
    });
    library.as_deref()
}

fn compile(source: &str, library: &Path) -> bool {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("cli has a folder above it");
    let status = Command::new("cc")
        .args(["-std=c11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"])
        .arg("-I")
        .arg(root.join("include"))
        .arg(root.join(source))
        .arg("-o")
        .arg(library)
        .status();
    match status {
        Ok(status) => {
            assert!(status.success(), "{source} compiles");
            true
        }
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "no C compiler in CI");
            eprintln!("SKIPPED: no C compiler on this machine: {error}");
            false
        }
    }
}

/// What takes gigabytes of memory is left to whoever asks for it.
const WITHOUT_GIGABYTES: [&str; 2] = ["--filter", "!residency::offsets"];

#[test]
fn the_cpu_conforms() {
    let arguments = [&["cpu", "--filter", "!performance"][..], &WITHOUT_GIGABYTES].concat();
    let (code, stdout, stderr) = conform(&arguments);
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    assert!(stdout.contains("cpu: conforms to full"), "{stdout}");
    assert!(stderr.contains("seed "), "the seed is printed: {stderr}");
}

#[test]
fn the_minimal_backends_conform_to_residency() {
    let rust = cargo_built("hoist-plugin-rust-minimal")
        .expect("the library of a plugin")
        .display()
        .to_string();
    for library in c_minimal().into_iter().chain([rust.as_str()]) {
        let arguments = [&[library, "--profile", "residency"][..], &WITHOUT_GIGABYTES].concat();
        let (code, stdout, stderr) = conform(&arguments);
        assert_eq!(code, Some(0), "{stdout}{stderr}");
        assert!(stdout.contains("conforms to residency"), "{stdout}");
    }
}

#[test]
fn many_seeds_raise_no_alarm() {
    let (code, stdout, stderr) = conform(&[
        "cpu",
        "--profile",
        "residency",
        "--in-process",
        "--seeds",
        "5",
        "--seed",
        "100",
    ]);
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    assert!(stdout.contains("5 seeds from 100"), "{stdout}");
}

#[test]
fn an_empty_selection_fails() {
    for filters in [
        &["--filter", "no_such_suite"][..],
        &["--filter", "ops", "--profile", "residency"],
    ] {
        let (code, stdout, stderr) = conform(&[&["cpu"], filters].concat());
        assert_eq!(code, Some(1), "{stdout}{stderr}");
        assert!(stderr.contains("nothing is selected"), "{stderr}");
    }
}

#[test]
fn selected_and_nothing_executed_fails() {
    // A built-in backend has no interface in C.
    let (code, stdout, _) = conform(&["cpu", "--filter", "interface"]);
    assert_eq!(code, Some(1), "{stdout}");
    assert!(stdout.contains("nothing was executed"), "{stdout}");
}

#[test]
fn expectations_are_held_to() {
    let case = "device::open::a_budget_is_shown";
    let run = |text: &str| {
        let file = write("expectations.txt", text);
        conform(&["cpu", "--filter", "device::open", "--expect", &file])
    };
    let (code, stdout, _) = run("# nothing is expected to fail\n");
    assert_eq!(code, Some(0), "{stdout}");
    let (code, stdout, _) = run(&format!("fail {case} because of a bug\n"));
    assert_eq!(code, Some(1), "{stdout}");
    assert!(stdout.contains(&format!("unexpected pass: {case}")), "{stdout}");
    let (code, stdout, _) = run("fail device::open::gone because of a bug\n");
    assert_eq!(code, Some(1), "{stdout}");
    assert!(stdout.contains("stale expectation"), "{stdout}");
    let (code, _, stderr) = run("fail everything\n");
    assert_eq!(code, Some(2), "{stderr}");
}

#[test]
fn a_lost_capability_fails() {
    let Some(library) = c_minimal() else { return };
    let (code, stdout, _) = conform(&[library, "--profile", "decode", "--filter", "workspace"]);
    assert_eq!(code, Some(1), "{stdout}");
    assert!(stdout.contains("lost capability: workspace::"), "{stdout}");
}

#[test]
fn a_profile_of_ones_own_is_held_to() {
    let file = write("profile.txt", "# Mine.\nmust device\n");
    let (code, stdout, _) = conform(&["cpu", "--profile", &file]);
    assert_eq!(code, Some(0), "{stdout}");
    let file = write("stale.txt", "must device\nmust no_such_suite\n");
    let (code, stdout, _) = conform(&["cpu", "--profile", &file]);
    assert_eq!(code, Some(1), "{stdout}");
    assert!(stdout.contains("stale profile"), "{stdout}");
    let (code, _, stderr) = conform(&["cpu", "--profile", "perfect"]);
    assert_eq!(code, Some(2), "{stderr}");
}

#[test]
fn what_is_no_plugin_is_refused() {
    let library = folder().path().join("libnothing.so");
    let source = folder().path().join("nothing.c");
    std::fs::write(&source, "int nothing;\n").expect("a file");
    if !compile(&source.display().to_string(), &library) {
        return;
    }
    let (code, stdout, stderr) = conform(&[&library.display().to_string()]);
    assert_eq!(code, Some(6), "{stdout}{stderr}");
    assert!(stderr.contains("HOIST_PLUGIN_HEADER_V1"), "{stderr}");
    let (code, _, stderr) = conform(&["no_such_backend"]);
    assert_eq!(code, Some(4), "{stderr}");
}

#[test]
fn a_failure_is_told_in_every_report_and_can_be_asked_again() {
    let Some(library) = c_minimal() else { return };
    // A profile that demands what this backend does not do.
    let profile = write("demanding.txt", "must workspace::size\nmust device\n");
    let file = |name: &str| folder().path().join(name).display().to_string();
    let (json, junit, html) = (file("report.json"), file("report.xml"), file("report.html"));
    let (code, stdout, _) = conform(&[
        library,
        "--profile",
        &profile,
        "--seed",
        "7",
        "--json-file",
        &json,
        "--junit",
        &junit,
        "--html",
        &html,
    ]);
    assert_eq!(code, Some(1), "{stdout}");
    let read = |path: &str| std::fs::read_to_string(path).expect("a report");
    let report: Value = serde_json::from_str(&read(&json)).expect("JSON");
    assert_eq!(report["schema"], "hoist.conform/1");
    assert_eq!(report["conforms"], false);
    assert_eq!(report["seed"], 7);
    assert_eq!(report["plugin"]["name"], "c-minimal");
    assert!(
        report["suite_hash"]
            .as_str()
            .is_some_and(|h| h.starts_with("blake3:"))
    );
    let cases = report["cases"].as_array().expect("cases");
    let lost = cases
        .iter()
        .find(|c| c["outcome"] == "unsupported")
        .expect("a case that is unsupported");
    let replay = lost["replay"].as_str().expect("a command");
    assert!(stdout.contains(replay), "{replay} in {stdout}");

    let page = read(&html);
    assert!(page.contains("does not conform"), "the verdict is there");
    assert!(
        !page.contains("http:") && !page.contains("https:"),
        "nothing is fetched"
    );
    assert!(
        !page.contains("<script") && !page.contains("src="),
        "no script, no picture"
    );
    assert!(page.contains("name=\"viewport\""));
    let id = lost["id"].as_str().expect("an id");
    assert!(page.contains(id) && read(&junit).contains(id));
    assert!(page.find(id) < page.find("Every case"), "failures come first");

    let again: Vec<&str> = replay
        .strip_prefix("hoist conform ")
        .expect("a command of this program")
        .split(' ')
        .collect();
    let (code, stdout, _) = conform(&again);
    assert_eq!(code, Some(1), "{stdout}");
    assert!(stdout.contains(id), "{stdout}");
}

#[test]
fn the_list_is_stable_and_asks_nothing() {
    let (code, stdout, stderr) = conform(&["cpu", "--list"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.is_empty(), "{stderr}");
    let ids: Vec<&str> = stdout.lines().collect();
    assert!(ids.len() > 500, "{}", ids.len());
    assert!(ids.contains(&"residency::roundtrip::matrices[encoding=q8_0]"));
    let (_, again, _) = conform(&["cpu", "--list", "--seed", "99"]);
    assert_eq!(stdout, again);
}
