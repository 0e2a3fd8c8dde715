//! Plugins as a user meets them: what loads, what is refused and how, and that the program outlives what they do.
#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod cost;
mod faults;
mod panics;
mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::support::{built, cargo_built, compile, hoist, load, root};

#[test]
fn the_least_backends_in_c_and_rust_load_and_verify() {
    let rust = cargo_built("hoist-plugin-rust-minimal");
    let c = built().map(|built| built.path("libc_minimal.so"));
    for plugin in c.iter().chain([&rust]) {
        for isolate in [&[][..], &["--isolate"]] {
            let backend = format!("plugin:{}", plugin.display());
            let mut arguments = vec!["load", "--verify", "--json", "--backend", &backend];
            arguments.extend(isolate);
            let output = hoist("", &arguments);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(0), "{said}");
            let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
            assert_eq!(report["workspace"], Value::Null, "it only holds weights");
            assert_eq!(report["verified"]["mismatches"], 0);
            let output = hoist("", &["generate", "-p", "a", "-n", "1", "--backend", &backend]);
            assert_eq!(output.status.code(), Some(4), "it cannot decode");
        }
    }
}

#[test]
fn the_source_of_the_backend_in_c_has_at_most_200_lines() {
    let source =
        std::fs::read_to_string(root().join("plugins/examples/c-minimal/minimal.c")).expect("it is there");
    assert!(source.lines().count() <= 200, "{} lines", source.lines().count());
    assert!(source.lines().all(|line| line.len() <= 120));
}

#[test]
fn the_exported_reference_gives_the_bits_of_the_built_in_one() {
    let plugin = format!("plugin:{}", cargo_built("hoist-plugin-cpu").display());
    let folder = tempfile::tempdir().expect("a folder");
    let smollm2 = std::env::var_os("HOME")
        .map(|home| PathBuf::from(home).join(".cache/hoist/models/SmolLM2-135M-Instruct.Q4_1.gguf"))
        .filter(|path| path.exists());
    if smollm2.is_none() {
        assert!(std::env::var_os("CI").is_none(), "no SmolLM2 in CI");
        eprintln!(
            "SKIPPED: no SmolLM2-135M-Instruct.Q4_1.gguf in ~/.cache/hoist/models; the built-in model only"
        );
    }
    let models = [None, smollm2.as_deref().and_then(Path::to_str)];
    for model in models.iter().take(1 + usize::from(smollm2.is_some())) {
        let logits = |backend: &[&str], name: &str| {
            let dump = folder.path().join(name);
            let path = dump.to_str().expect("UTF-8").to_owned();
            let mut arguments = vec!["logits"];
            arguments.extend(*model);
            arguments.extend(["--tokens", "1,5,9,2,7,3", "--dump", path.as_str(), "--backend"]);
            arguments.extend(backend);
            let output = hoist("", &arguments);
            assert_eq!(
                output.status.code(),
                Some(0),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
            std::fs::read(dump).expect("the dump")
        };
        let built_in = logits(&["cpu"], "built-in");
        assert!(!built_in.is_empty());
        assert!(built_in == logits(&[&plugin], "plugin"), "{model:?}");
        assert!(
            built_in == logits(&[&plugin, "--isolate"], "isolated"),
            "{model:?}"
        );
        // The SDK copies weights, and says so.
        let output = hoist("", &["load", "--import", "--backend", &plugin]);
        assert_eq!(output.status.code(), Some(4));
        if let Some((built, model)) = built().zip(*model) {
            let (code, said) = load("", &built.path("libc_minimal.so"), &["--isolate", model]);
            assert_eq!(code, Some(0), "{said}");
            // It copies too.
            let (code, said) = load("", &built.path("libc_minimal.so"), &["--import", model]);
            assert_eq!(code, Some(4), "{said}");
        }
    }
}

#[test]
fn inspecting_runs_no_code() {
    let Some(built) = built() else { return };
    let plugin = built.path("libfaulty.so");
    let path = plugin.to_str().expect("UTF-8");
    let output = hoist("constructor-abort", &["plugin", "inspect", "--json", path]);
    assert_eq!(output.status.code(), Some(0));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["schema"], "hoist.plugin.inspect/1");
    assert_eq!(report["header"]["name"], "faulty");
    assert_eq!(report["sha256"].as_str().map(str::len), Some(64));
    // The same library does abort when it is loaded.
    assert_eq!(load("constructor-abort", &plugin, &[]).0, Some(6));
}

/// Files that are refused before any of their code runs: (what, how it is made, a word of the message).
#[test]
fn files_that_are_no_plugins_are_refused_by_name_and_rule() {
    let Some(built) = built() else { return };
    let good = std::fs::read(built.path("libc_minimal.so")).expect("it was built");
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        path
    };
    let patched = |name: &str, offset: usize, bytes: &[u8]| {
        let mut copy = good.clone();
        copy[offset..offset + bytes.len()].copy_from_slice(bytes);
        file(name, &copy)
    };
    let header = good
        .windows(16)
        .position(|w| w == b"HOIST PLUGIN V1\n")
        .expect("the header");
    let compiled = |name: &str, define: &str| {
        let path = folder.path().join(name);
        compile("faulty/faulty.c", &path, &[define]);
        path
    };
    let world_writable = file("world_writable.so", &good);
    set_mode(&world_writable, 0o666);
    let open_folder = folder.path().join("open");
    std::fs::create_dir(&open_folder).expect("a folder");
    let in_open_folder = open_folder.join("library.so");
    std::fs::write(&in_open_folder, &good).expect("written");
    set_mode(&open_folder, 0o777);
    let cases = [
        (folder.path().join("missing.so"), "cannot read"),
        (folder.path().to_owned(), "not a regular file"),
        (file("text.so", b"this is no library\n"), "not a shared library"),
        (file("empty.so", b""), "not a shared library"),
        (file("truncated.so", &good[..good.len() / 3]), ""),
        // e_machine of the ELF header: AArch64.
        (patched("machine.so", 18, &183u16.to_le_bytes()), "is for aarch64"),
        (patched("magic.so", header, b"TSIOH"), "magic"),
        (
            patched("size.so", header + 16, &511u32.to_le_bytes()),
            "header_size",
        ),
        (
            patched("width.so", header + 36, &32u32.to_le_bytes()),
            "pointer_width",
        ),
        (compiled("no_header.so", "-DNO_HEADER"), "HOIST_PLUGIN_HEADER_V1"),
        (compiled("major.so", "-DMAJOR=9"), "major 9"),
        (
            compiled("range.so", "-DRANGE_EMPTY"),
            "abi_minor_min..=abi_minor_max",
        ),
        (
            patched("newer.so", header + 24, &[9, 0, 0, 0, 9, 0, 0, 0]),
            "minors 9..=9",
        ),
        (compiled("unterminated.so", "-DHEADER_UNTERMINATED"), "vendor"),
        (
            compiled("unresolved.so", "-DFAULT_UNRESOLVED"),
            "hoist_function_that_nobody_has",
        ),
        (world_writable, "written by everyone"),
        (in_open_folder, "written by everyone"),
    ];
    for (path, rule) in &cases {
        for isolate in [&[][..], &["--isolate"]] {
            let (code, said) = load("", path, isolate);
            assert_eq!(code, Some(6), "{}: {said}", path.display());
            assert!(said.contains(rule), "{}: {said}", path.display());
            assert!(said.contains(&path.display().to_string()), "{said}");
        }
    }
    // The control: what the patched copies were made of is accepted.
    assert_eq!(load("", &file("good.so", &good), &[]).0, Some(0));
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("a new mode");
}

#[test]
fn a_library_that_breaks_a_rule_is_refused_by_name_and_rule() {
    let Some(built) = built() else { return };
    let plugin = built.path("libfaulty.so");
    let cases = [
        ("constructor-abort", 6, "abort"),
        ("constructor-exit", 6, ""),
        ("open-null", 6, "OK and no table"),
        ("open-status", 6, "undocumented status -999"),
        ("size-zero", 6, "struct_size is 0"),
        ("size-short", 6, "struct_size is 64"),
        ("abort:open", 6, ""),
        ("devices-none", 4, "no device"),
        ("devices-huge", 6, "4294967295 devices"),
        ("strings", 6, "the name of device 0"),
        ("caps-numerics", 6, "numerics class is 7"),
        ("caps-alignment", 6, "alignment is 3"),
        ("caps-operations", 6, "claims operations"),
        ("status:caps", 6, "undocumented status -999"),
        ("status:load_begin", 6, "undocumented status -999"),
        ("status:upload", 6, "undocumented status -999"),
        ("message:load_begin", 6, "no UTF-8 ended by a NUL"),
        ("terminal:load_begin", 6, r"\u{1b}[2J\r\nerror: none\u{7}"),
        ("terminal:caps", 6, r"\u{1b}[2J\r\nerror: none\u{7}"),
        ("lost:upload", 4, "the device fell off"),
        ("zero:device_open", 6, "invalid handle 0"),
        ("zero:load_begin", 6, "invalid handle 0"),
        ("zero:load_commit", 6, "invalid handle 0"),
        ("receipt-tensors", 6, "vouches for"),
        ("drops-last", 1, ""),
        ("readback-wrong", 1, ""),
        // What the rules survive: the host copies no more of a huge table than it knows, and puts the mode back.
        ("size-huge", 0, ""),
        ("constructor-flush", 0, ""),
        ("flush:upload", 0, ""),
    ];
    for (fault, expected, rule) in cases {
        for isolate in [&[][..], &["--isolate"]] {
            let (code, said) = load(fault, &plugin, isolate);
            assert_eq!(code, Some(expected), "{fault} {isolate:?}: {said}");
            assert!(said.contains(rule), "{fault} {isolate:?}: {said}");
            let steers = |c: char| c.is_control() && c != '\n';
            assert!(!said.contains(steers), "{fault} {isolate:?}: {said:?}");
            assert!(
                expected == 0 || expected == 1 || said.contains("faulty"),
                "{fault}: {said}"
            );
        }
    }
}

/// The model of the program has rows of 1024 bytes at most, its norm vectors: a limit of as many changes nothing, and neither does a lower one that
/// a plugin of the first minor cannot say.
#[test]
fn a_plan_refuses_a_row_above_a_plugins_limit() {
    let Some(built) = built() else { return };
    for (name, defines, agreed, refused) in [
        ("none", &[][..], 2, false),
        ("fits", &["-DMAX_ROW_BYTES=LONGEST"], 2, false),
        ("short", &["-DMAX_ROW_BYTES=(LONGEST-1)"], 2, true),
        ("old", &["-DMAX_ROW_BYTES=(LONGEST-1)", "-DMINOR_1"], 1, false),
    ] {
        let library = built.path(&format!("libfaulty-rows-{name}.so"));
        compile(
            "faulty/faulty.c",
            &library,
            &[defines, &["-DLONGEST=1024"]].concat(),
        );
        let path = library.display().to_string();
        let output = hoist("", &["plugin", "inspect", "--json", &path]);
        let inspected: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(inspected["agreed_minor"], agreed, "{name}");
        let backend = format!("plugin:{path}");
        for isolate in [&[][..], &["--isolate"]] {
            for command in [&["plan"][..], &["load", "--verify"]] {
                let arguments = [command, &["--backend", &backend], isolate].concat();
                let output = hoist("", &arguments);
                let said = String::from_utf8_lossy(&output.stderr);
                assert_eq!(
                    output.status.code(),
                    Some(if refused { 4 } else { 0 }),
                    "{name} {arguments:?}: {said}"
                );
                assert_eq!(said.contains("a row of weight `"), refused, "{name}: {said}");
                assert_eq!(said.contains("1023"), refused, "{name}: {said}");
            }
        }
    }
}

#[test]
fn words_of_a_plugin_do_not_steer_the_terminal() {
    let Some(built) = built() else { return };
    let backend = format!("plugin:{}", built.path("libfaulty.so").display());
    let output = hoist("strings-terminal", &["load", "--backend", &backend]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains(r"\u{1b}[2Ja\nb"), "{said}");
    assert!(!said.contains('\u{1b}'), "{said:?}");
}

#[test]
fn a_trusted_plugin_is_found_by_name_until_it_changes() {
    let Some(built) = built() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let plugin = folder.path().join("libtrusted.so");
    std::fs::copy(built.path("libc_minimal.so"), &plugin).expect("copied");
    let settings = folder.path().join("settings");
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_hoist"))
            .env("XDG_CONFIG_HOME", &settings)
            .current_dir(folder.path())
            .args(arguments)
            .output()
            .expect("hoist runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let by_name = ["load", "--verify", "--backend", "plugin:c-minimal"];
    let (code, _, said) = run(&by_name);
    assert_eq!(code, Some(6), "{said}");
    assert!(said.contains("no plugin called `c-minimal`"), "{said}");
    // A relative path is relative to where the user is, once.
    assert_eq!(run(&["plugin", "trust", "./libtrusted.so"]).0, Some(0));
    assert!(settings.join("hoist/plugins.lock.json").is_file());
    assert_eq!(run(&by_name).0, Some(0));
    let (_, listed, _) = run(&["plugin", "list", "--json"]);
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    assert_eq!(listed["plugins"][0]["name"], "c-minimal");
    assert_eq!(listed["plugins"][0]["refused"], Value::Null);
    let mut bytes = std::fs::read(&plugin).expect("read");
    bytes.push(0);
    std::fs::write(&plugin, bytes).expect("written");
    let (code, _, said) = run(&by_name);
    assert_eq!(code, Some(6), "{said}");
    assert!(said.contains("is not the one that was trusted"), "{said}");
    let (code, _, said) = run(&["load", "--backend", "plugin:../c-minimal#x"]);
    assert_eq!(code, Some(2), "{said}");
}
