//! Writes a model: `synth SHAPE MIX OUT`.
#![allow(
    missing_docs,
    clippy::expect_used,
    clippy::panic,
    reason = "an example that ends with the first error"
)]

use hoist_synth::{Container, Mix, Options, shape, write};

fn main() {
    let mut args = std::env::args().skip(1);
    let mut next = |what: &str| {
        args.next()
            .unwrap_or_else(|| panic!("usage: synth SHAPE MIX OUT (no {what})"))
    };
    let (name, mix, out) = (next("SHAPE"), next("MIX"), next("OUT"));
    let shape = shape(&name).expect("a known shape");
    let mix = Mix::from_name(&mix).expect("a known encoding");
    let started = std::time::Instant::now();
    let options = Options {
        shape,
        mix,
        container: Container::Gguf,
        seed: 1,
    };
    let summary = write(options, std::path::Path::new(&out), &|_, _| {}).expect("a writable path");
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "{} bytes in {seconds:.2} s: {:.2} GB/s",
        summary.bytes,
        summary.bytes as f64 / seconds / 1e9
    );
}
