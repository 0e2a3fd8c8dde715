//! The conformance suite, judged: every fault that `plugins/examples/faulty` can have is caught by the case that
//! `conformance/faults/table.txt` names, and by no other unless it is listed there.
#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "a test's helpers stop at the first surprise"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hoist_conformance::pattern::matches;
use serde_json::Value;
use tempfile::TempDir;

const TABLE: &str = include_str!("../../conformance/faults/table.txt");

/// Runs at a time: faults that hang only wait.
const AT_ONCE: usize = 4;

/// The seed of every run; another one may be given by the variable `HOIST_SEED`.
const SEED: &str = "7";

/// A row of the table, for one fault.
#[derive(Debug)]
struct Row {
    fault: String,
    caught: Caught,
    also: Vec<String>,
    asked: Vec<String>,
}

#[derive(Debug)]
enum Caught {
    /// The library is refused, with these words.
    Refused(String),
    /// A case of that pattern goes wrong.
    By(String),
}

fn rows() -> Vec<Row> {
    let mut names: Vec<(&str, Vec<String>)> = Vec::new();
    let mut rows = Vec::new();
    for line in TABLE.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some((name, patterns)) = line.split_once('=').filter(|_| line.starts_with('$')) {
            names.push((name.trim(), split(patterns, &[])));
            continue;
        }
        let columns: Vec<&str> = line.split('|').map(str::trim).collect();
        let [faults, caught, also, asked] = columns[..] else {
            panic!("a row has four columns: {line}");
        };
        let default = || split("$default", &names);
        let asked = match asked.strip_prefix("only:") {
            Some(only) => split(only, &names),
            None => default().into_iter().chain(split(asked, &names)).collect(),
        };
        for fault in expand(faults) {
            let caught = match caught.strip_prefix("refused:") {
                Some(words) => Caught::Refused(words.trim().to_owned()),
                None => Caught::By(caught.to_owned()),
            };
            rows.push(Row {
                fault,
                caught,
                also: split(also, &names),
                asked: asked.clone(),
            });
        }
    }
    rows
}

/// Patterns between semicolons, names replaced by what they stand for.
fn split(text: &str, names: &[(&str, Vec<String>)]) -> Vec<String> {
    let parts = text.split(';').map(str::trim).filter(|p| !p.is_empty());
    parts
        .flat_map(|part| match names.iter().find(|(name, _)| *name == part) {
            Some((_, patterns)) => patterns.clone(),
            None => vec![part.to_owned()],
        })
        .collect()
}

/// `{a,b}:c` is `a:c` and `b:c`.
fn expand(faults: &str) -> Vec<String> {
    match faults.strip_prefix('{').and_then(|rest| rest.split_once('}')) {
        Some((kinds, entry)) => kinds.split(',').map(|kind| format!("{kind}{entry}")).collect(),
        None => vec![faults.to_owned()],
    }
}

/// The library that cargo has built for the development dependency, beside this program.
fn library() -> PathBuf {
    let path = std::env::current_exe()
        .expect("this program")
        .with_file_name("libhoist_plugin_faulty.so");
    assert!(path.is_file(), "no `{}`", path.display());
    path
}

fn conform(library: &Path, fault: &str, class: Option<&str>, report: &Path, asked: &[String]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hoist"));
    command
        .arg("conform")
        .arg(library)
        .args(["--jobs", "1", "--seed"])
        .arg(std::env::var("HOIST_SEED").unwrap_or_else(|_| SEED.into()))
        .arg("--json-file")
        .arg(report)
        .env("HOIST_FAULT", fault)
        .env("HOIST_FAULT_FILE", library)
        .env_remove("HOIST_FAULT_CLASS")
        .stdin(Stdio::null());
    if let Some(class) = class {
        command.env("HOIST_FAULT_CLASS", class);
    }
    if fault.starts_with("hang:") || fault == "constructor-hang" {
        command.args(["--limit", "2"]);
    }
    for pattern in asked {
        command.arg("--filter").arg(pattern);
    }
    command.output().expect("hoist runs")
}

/// Ids of the cases that were asked, and of those that went wrong.
fn outcomes(report: &Path) -> Option<(Vec<String>, Vec<String>)> {
    let text = std::fs::read(report).ok()?;
    let report: Value = serde_json::from_slice(&text).expect("a report is JSON");
    let (mut asked, mut wrong) = (Vec::new(), Vec::new());
    for case in report["cases"].as_array().expect("cases") {
        let id = case["id"].as_str().expect("an id").to_owned();
        if matches!(
            case["outcome"].as_str(),
            Some("fail" | "timeout" | "crash" | "no_result")
        ) {
            wrong.push(id.clone());
        }
        asked.push(id);
    }
    Some((asked, wrong))
}

/// What is not as the table says; `None` if all is.
fn judge(row: &Row, folder: &Path) -> Option<String> {
    let report = folder.join(format!("{}.json", row.fault.replace([':', '/'], "-")));
    let library = patched(&row.fault, folder);
    let mut asked = row.asked.clone();
    if let Caught::By(id) = &row.caught {
        asked.push(id.clone());
    }
    let output = conform(&library, &row.fault, None, &report, &asked);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let code = output.status.code();
    match &row.caught {
        Caught::Refused(words) if code == Some(6) && said.contains(words.as_str()) => None,
        Caught::Refused(words) => Some(format!("exit {code:?}, expected 6 and `{words}`: {said}")),
        Caught::By(_) if code != Some(1) => Some(format!("exit {code:?}, expected 1: {said}")),
        Caught::By(id) => {
            let Some((_, wrong)) = outcomes(&report) else {
                return Some(format!("no report: {said}"));
            };
            if !wrong.iter().any(|w| matches(id, w)) {
                return Some(format!("`{id}` did not catch it; what went wrong: {wrong:?}"));
            }
            let listed = |w: &String| row.also.iter().any(|pattern| matches(pattern, w));
            let others: Vec<_> = wrong.iter().filter(|w| !matches(id, w) && !listed(w)).collect();
            (!others.is_empty()).then(|| format!("went wrong too, and is not listed: {others:?}"))
        }
    }
}

/// The library with the fault of a file that its id names, or the library itself.
fn patched(fault: &str, folder: &Path) -> PathBuf {
    let good = library();
    if !fault.starts_with("file-")
        && !fault.starts_with("header-")
        && !fault.starts_with("symbol-")
        && fault != "replaces-itself"
    {
        return good;
    }
    let mut bytes = std::fs::read(good).expect("the library");
    let find = |bytes: &[u8], what: &[u8]| -> Vec<usize> {
        let found: Vec<usize> = bytes
            .windows(what.len())
            .enumerate()
            .filter(|(_, w)| *w == what)
            .map(|(at, _)| at)
            .collect();
        assert!(!found.is_empty(), "{}", String::from_utf8_lossy(what));
        found
    };
    // The header's own bytes: a magic that a size follows.
    let header = find(&bytes, b"HOIST PLUGIN V1\n")
        .into_iter()
        .find(|at| bytes[at + 16..at + 20] == 512u32.to_le_bytes());
    let header = header.expect("a header");
    let mut put = |at: usize, new: &[u8]| bytes[at..at + new.len()].copy_from_slice(new);
    match fault {
        "file-truncated" => bytes.truncate(bytes.len() / 3),
        // `e_machine` of the ELF header: AArch64.
        "file-machine" => put(18, &183u16.to_le_bytes()),
        "header-missing" => {
            for at in find(&bytes.clone(), b"\0HOIST_PLUGIN_HEADER_V1\0") {
                bytes[at + 1] = b'T';
            }
        }
        "header-magic" => put(header, b"TSIOH"),
        "header-size" => put(header + 16, &511u32.to_le_bytes()),
        "header-major" => put(header + 20, &9u32.to_le_bytes()),
        "header-range-empty" => put(header + 24, &[3, 0, 0, 0, 2, 0, 0, 0]),
        "header-too-new" => put(header + 24, &[9, 0, 0, 0, 9, 0, 0, 0]),
        "header-pointer-width" => put(header + 36, &32u32.to_le_bytes()),
        // Flags, pointer width, target and name stand before the vendor.
        "header-unterminated" => put(header + 40 + 64 + 64, &[b'x'; 64]),
        "symbol-unresolved" => {
            for at in find(&bytes.clone(), b"\0getcwd\0") {
                bytes[at + 1] = b'j';
            }
        }
        _ => {}
    }
    let path = folder.join(format!("lib_{fault}.so"));
    std::fs::write(&path, bytes).expect("a patched copy");
    path
}

fn only_where_it_can_be() -> bool {
    cfg!(all(target_os = "linux", target_arch = "x86_64"))
}

#[test]
fn every_fault_is_caught_by_its_case_and_by_no_other() {
    if !only_where_it_can_be() {
        return;
    }
    let wanted = std::env::var("HOIST_FAULTS").unwrap_or_else(|_| "*".into());
    let rows: Vec<Row> = rows()
        .into_iter()
        .filter(|row| wanted == "*" || row.fault.contains(&wanted))
        .collect();
    let folder = TempDir::new().expect("a folder");
    let started = Instant::now();
    let (next, problems) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(row) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // A machine that is busy may be slower than a limit; a fault that is missed is missed twice.
                    if let Some(problem) = judge(row, folder.path()).and_then(|_| judge(row, folder.path())) {
                        problems
                            .lock()
                            .expect("no panic")
                            .push(format!("{}: {problem}", row.fault));
                    }
                }
            });
        }
    });
    let problems = problems.into_inner().expect("no panic");
    eprintln!("{} faults in {:?}", rows.len(), started.elapsed());
    assert!(
        problems.is_empty(),
        "{} of {} faults:\n{}",
        problems.len(),
        rows.len(),
        problems.join("\n")
    );
    // What hung is gone, too.
    let library = library();
    let deadline = Instant::now() + Duration::from_secs(5);
    while processes_of(&library) > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(processes_of(&library), 0, "processes that are left");
}

/// Processes that have the library mapped.
fn processes_of(library: &Path) -> usize {
    let library = library.display().to_string();
    let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
    entries
        .filter(|entry| {
            std::fs::read_to_string(entry.path().join("maps")).is_ok_and(|maps| maps.contains(&library))
        })
        .count()
}

/// The control of all of the above: without a fault, nothing goes wrong, whatever class is declared.
#[test]
fn without_a_fault_nothing_goes_wrong() {
    if !only_where_it_can_be() {
        return;
    }
    let folder = TempDir::new().expect("a folder");
    let mut asked: Vec<String> = rows().into_iter().flat_map(|row| row.asked).collect();
    asked.sort();
    asked.dedup();
    // Gigabytes, and seconds.
    asked.retain(|pattern| !pattern.starts_with("residency::offsets"));
    for class in [None, Some("bounded")] {
        let report = folder.path().join("report.json");
        let output = conform(&library(), "", class, &report, &asked);
        let said = String::from_utf8_lossy(&output.stderr);
        let (ids, wrong) = outcomes(&report).unwrap_or_else(|| panic!("no report: {said}"));
        assert_eq!(wrong, [""; 0], "{class:?}");
        assert!(ids.len() > 100, "{}", ids.len());
        assert_eq!(output.status.code(), Some(0), "{class:?}: {said}");
    }
}

/// Faults of arithmetic that a *bounded* backend must not have either, and one that it may. Single operations tell them apart:
/// over a whole model of random weights, what roundings may add up to hides more.
#[test]
fn bounds_catch_what_is_no_rounding() {
    if !only_where_it_can_be() {
        return;
    }
    let folder = TempDir::new().expect("a folder");
    for (fault, case, caught) in [
        ("wrong-row", "ops::matmul::product[encoding=q6_k]", true),
        ("wrong-lane", "ops::matmul::product[encoding=f32]", true),
        ("wrong-last-block", "ops::matmul::product[encoding=q8_0]", true),
        ("wrong-batch", "ops::batches::sizes[encoding=q8_0]", true),
        ("bias-omitted", "ops::logits::tied", true),
        ("stale-workspace", "ops::attention::short", true),
        ("fixed-inputs", "ops::add::values", true),
        (
            "index-layer",
            "index::look_up::each_weight_is_found_in_its_place",
            true,
        ),
        ("claims-exact", "ops::matmul::product[encoding=q8_0]", false),
        (
            "claims-exact",
            "decode::model::logits[architecture=llama,mix=q8_0]",
            false,
        ),
    ] {
        let report = folder.path().join("report.json");
        let _ = std::fs::remove_file(&report);
        let output = conform(&library(), fault, Some("bounded"), &report, &[case.to_owned()]);
        let said = String::from_utf8_lossy(&output.stderr);
        let (ids, wrong) = outcomes(&report).unwrap_or_else(|| panic!("no report: {said}"));
        assert_eq!(ids, [case], "{fault}");
        assert_eq!(!wrong.is_empty(), caught, "{fault}, {case}: {wrong:?}");
    }
}

/// The table says something of every fault that the plugin documents.
#[test]
fn the_table_and_the_plugin_name_the_same_faults() {
    let source = include_str!("../../plugins/examples/faulty/src/lib.rs");
    let documented: Vec<&str> = source
        .lines()
        .filter_map(|line| line.strip_prefix("//! | `"))
        .flat_map(|line| line.split('|').next().unwrap_or_default().split(','))
        .map(|id| id.trim().trim_matches('`').trim())
        .filter(|id| !id.is_empty())
        .collect();
    assert!(documented.len() > 60, "{documented:?}");
    let rows = rows();
    let families = rows
        .iter()
        .map(|row| row.fault.split(':').next().unwrap_or_default());
    let families: std::collections::BTreeSet<&str> = families.collect();
    for id in &documented {
        assert!(families.contains(id), "`{id}` is documented and has no row");
    }
    for family in &families {
        let of_file = ["file-", "header-", "symbol-"]
            .iter()
            .any(|p| family.starts_with(p));
        assert!(
            of_file || documented.contains(family),
            "`{family}` has a row and is not documented"
        );
    }
    let mut faults: Vec<&str> = rows.iter().map(|row| row.fault.as_str()).collect();
    faults.sort_unstable();
    let all = faults.len();
    faults.dedup();
    assert_eq!(faults.len(), all, "a fault has two rows");
}
