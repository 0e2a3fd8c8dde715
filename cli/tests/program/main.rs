//! The program as a user meets it: what it prints, how it exits, what it leaves.

mod bad_input;
mod formats;
mod help;
mod interrupted;
mod load;
mod support;
