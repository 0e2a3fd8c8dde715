//! The `hoist` program.
fn main() {}
