use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use hoist_tests::files::ModelFiles;
use serde_json::Value;
use tempfile::TempDir;

/// The program, with its environment set to what output depends on.
pub(crate) fn hoist() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hoist"));
    command
        .env("COLUMNS", "100")
        .env_remove("CLICOLOR_FORCE")
        .stdin(Stdio::null());
    command
}

/// What a run printed and how it exited.
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
        }
    }
}

/// Runs the program with these arguments.
pub(crate) fn run(arguments: &[&str]) -> Ran {
    hoist().args(arguments).output().expect("hoist runs").into()
}

/// Runs the program on a file, and demands success and JSON of that schema.
pub(crate) fn json(schema: &str, arguments: &[&str], file: &Path) -> Value {
    let output = hoist()
        .args(arguments)
        .arg("--json")
        .arg(file)
        .output()
        .expect("hoist runs");
    let ran = Ran::from(output);
    assert_eq!(
        ran.code,
        Some(0),
        "{arguments:?} {}: {}",
        file.display(),
        ran.stderr
    );
    let value: Value = serde_json::from_str(&ran.stdout).expect("stdout is one JSON object");
    assert_eq!(value["schema"], schema);
    value
}

/// A model on disk, for as long as the folder is held.
pub(crate) fn on_disk(files: &ModelFiles) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = files.write_to(folder.path()).expect("the files can be written");
    (folder, path)
}
