//! Prints what a model's headers say: `cargo run --release -p hoist-formats --example list -- MODEL`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: list MODEL");
        return ExitCode::from(2);
    };
    let start = Instant::now();
    let manifest = match hoist_formats::open(Path::new(&path)) {
        Ok(manifest) => manifest,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(3);
        }
    };
    let elapsed = start.elapsed();
    for t in &manifest.tensors {
        println!(
            "{} {} {:?} shard {} {}+{}",
            t.name, t.encoding, t.shape, t.shard, t.offset, t.nbytes
        );
    }
    eprintln!(
        "{}: {} tensors in {} files, {:.1} ms",
        manifest.format,
        manifest.tensors.len(),
        manifest.shards.len(),
        elapsed.as_secs_f64() * 1e3
    );
    ExitCode::SUCCESS
}
