//! Golden vectors, from the Python reference of the numerics contract.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Arguments of `cargo xtask goldens`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Write elsewhere and compare with what is committed, instead of replacing it.
    #[arg(long)]
    check: bool,
    /// The Python to use.
    #[arg(long, default_value = "python3")]
    python: String,
}

/// Regenerates `conformance/golden/*.json`, or checks that it would change nothing.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let root = crate::root()?;
    let committed = root.join("conformance/golden");
    if !arguments.check {
        return generate(root, &arguments.python, &committed);
    }
    let fresh = std::env::temp_dir().join(format!("hoist-goldens-{}", std::process::id()));
    std::fs::create_dir(&fresh).with_context(|| format!("creating `{}`", fresh.display()))?;
    let result = generate(root, &arguments.python, &fresh).and_then(|()| compare(&committed, &fresh));
    std::fs::remove_dir_all(&fresh).with_context(|| format!("removing `{}`", fresh.display()))?;
    result
}

fn generate(root: &Path, python: &str, folder: &Path) -> Result<()> {
    let script = root.join("scripts/oracle/goldens.py");
    let status = Command::new(python)
        .arg(&script)
        .arg(folder)
        .status()
        .with_context(|| format!("running `{python} {}`", script.display()))?;
    ensure!(
        status.success(),
        "`{python} {}` failed ({status}); it needs numpy and gguf 0.19.0: `{python} -m pip install gguf==0.19.0`",
        script.display()
    );
    Ok(())
}

/// Demands the same JSON files with the same bytes in both folders.
fn compare(committed: &Path, fresh: &Path) -> Result<()> {
    let (old, new) = (json_files(committed)?, json_files(fresh)?);
    ensure!(old == new, "golden files are {old:?} and would be {new:?}");
    for name in &new {
        let read = |folder: &Path| {
            let path = folder.join(name);
            std::fs::read(&path).with_context(|| format!("reading `{}`", path.display()))
        };
        ensure!(
            read(committed)? == read(fresh)?,
            "`conformance/golden/{name}` is not what `cargo xtask goldens` writes"
        );
    }
    println!("{} golden files are up to date", new.len());
    Ok(())
}

fn json_files(folder: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("listing `{}`", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".json") {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
