//! What the tests share: libraries, and ways to run the program.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use tempfile::TempDir;

/// The library of a plugin that is a development dependency.
pub(crate) fn cargo_built(package: &str) -> PathBuf {
    hoist_tests::libraries::cargo_built(package).expect("the library of a plugin")
}

/// The repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("cli has a folder above it")
}

/// Whether a C compiler is there; if not, that is told, and is a failure in CI.
pub(crate) fn has_cc() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    *THERE.get_or_init(|| {
        let there = Command::new("cc")
            .arg("--version")
            .output()
            .is_ok_and(|o| o.status.success());
        if !there {
            assert!(std::env::var_os("CI").is_none(), "no C compiler in CI");
            eprintln!("SKIPPED: no C compiler on this machine");
        }
        there
    })
}

/// Compiles a plugin in C by the one line that its first comment gives.
pub(crate) fn compile(source: &str, library: &Path, defines: &[&str]) {
    let output = Command::new("cc")
        .current_dir(
            root()
                .join("plugins/examples")
                .join(source)
                .parent()
                .expect("a folder"),
        )
        .args([
            "-std=c11",
            "-O2",
            "-Wall",
            "-Wextra",
            "-fPIC",
            "-shared",
            "-fvisibility=hidden",
            "-I../../../include",
        ])
        .args(defines)
        .arg(Path::new(source).file_name().expect("a file"))
        .arg("-o")
        .arg(library)
        .output()
        .expect("cc runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A folder that lives as long as the tests, with the plugins in C.
pub(crate) struct Built {
    folder: TempDir,
}

impl Built {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

pub(crate) fn built() -> Option<&'static Built> {
    static BUILT: OnceLock<Built> = OnceLock::new();
    has_cc().then(|| {
        BUILT.get_or_init(|| {
            let built = Built {
                folder: tempfile::tempdir().expect("a folder"),
            };
            compile(
                "c-minimal/minimal.c",
                &built.path("libc_minimal.so"),
                &["-Wpedantic", "-Werror"],
            );
            compile("faulty/faulty.c", &built.path("libfaulty.so"), &[]);
            built
        })
    })
}

/// Runs the program with a fault of the faulty plugins, `panic=ENTRY` for the panicking one, or none.
pub(crate) fn hoist(fault: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hoist"));
    command
        .env_remove("HOIST_FAULT")
        .env_remove("HOIST_PANIC")
        .stdin(Stdio::null());
    match fault.strip_prefix("panic=") {
        Some(entry) => command.env("HOIST_PANIC", entry),
        None if fault.is_empty() => &mut command,
        None => command.env("HOIST_FAULT", fault),
    };
    command.args(arguments).output().expect("hoist runs")
}

/// Loads and verifies the model of the program through a plugin; exit code and what was said.
pub(crate) fn load(fault: &str, plugin: &Path, more: &[&str]) -> (Option<i32>, String) {
    let backend = format!("plugin:{}", plugin.display());
    let mut arguments = vec!["load", "--verify", "--backend", backend.as_str()];
    arguments.extend(more);
    let output = hoist(fault, &arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), said)
}

/// Processes whose command line names that library.
pub(crate) fn processes_of(library: &Path) -> Vec<String> {
    let name = library.display().to_string();
    std::fs::read_dir("/proc")
        .expect("/proc")
        .flatten()
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("cmdline")).ok())
        .filter(|line| line.contains(&name))
        .collect()
}
