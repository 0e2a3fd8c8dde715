//! Tells the crate the target triple, which plugin headers carry.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // Cargo sets it for every build script.
    if let Ok(target) = std::env::var("TARGET") {
        println!("cargo::rustc-env=HOIST_TARGET={target}");
    }
}
