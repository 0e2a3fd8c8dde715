//! Writes the hostile corpus and the seeds of fuzzing as files:
//! `cargo run --release -p hoist-tests --example write_corpus -- hostile DIR` or `… -- seeds fuzz/corpus`.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use hoist_formats::Encoding;
use hoist_tests::files::{AprStorage, RawApr, RawGguf, RawSafeTensors, TinyLlama, hostile};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let written = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["hostile", to] => write_hostile(Path::new(to)),
        ["seeds", to] => write_seeds(Path::new(to)),
        _ => {
            eprintln!("usage: write_corpus hostile|seeds DIR");
            return ExitCode::from(2);
        }
    };
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(7)
        }
    }
}

/// One folder for each case: `DIR/format/property/`.
fn write_hostile(to: &Path) -> io::Result<()> {
    for case in hostile() {
        let folder = to.join(case.name);
        std::fs::create_dir_all(&folder)?;
        let path = case.model.write_to(&folder)?;
        println!("{}\t{}", path.display(), case.error);
    }
    Ok(())
}

/// One folder for each target: valid models, and the hostile ones of a single small file.
fn write_seeds(to: &Path) -> io::Result<()> {
    let small = TinyLlama {
        hidden: 32,
        heads: 1,
        ffn: 32,
        vocab: 4,
        ..TinyLlama::small()
    };
    let seeds = [
        ("gguf", "raw", RawGguf::valid().bytes()),
        ("gguf", "tiny", small.gguf(Encoding::Q8_0)),
        ("safetensors", "raw", RawSafeTensors::valid().bytes()),
        ("safetensors", "tiny", small.safetensors(Encoding::F16)),
        ("apr", "raw", RawApr::valid().bytes()),
        ("apr", "tiny", small.apr(AprStorage::AprQ4)),
        ("apr", "tiny_q8", small.apr(AprStorage::AprQ8)),
        ("apr", "lz4_flag", small.apr_lz4_flag(AprStorage::AprQ4)),
        ("apr", "lz4_block", small.apr_lz4_block(AprStorage::AprQ4)),
    ];
    for (target, name, bytes) in seeds {
        std::fs::create_dir_all(to.join(target))?;
        std::fs::write(to.join(target).join(name), bytes)?;
    }
    for case in hostile() {
        const LONGEST: usize = 16 << 10;
        if let Some((target, name)) = case.name.split_once('/')
            && let [(_, bytes)] = case.model.files.as_slice()
            && bytes.len() <= LONGEST
            && to.join(target).is_dir()
        {
            std::fs::write(to.join(target).join(name), bytes)?;
        }
    }
    Ok(())
}
