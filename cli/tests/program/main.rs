//! The program as a user meets it: what it prints, how it exits, what it leaves.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on has failed"
)]

mod bad_input;
mod formats;
mod help;
mod interrupted;
mod load;
mod op;
mod options;
mod output;
mod prompts;
mod support;
