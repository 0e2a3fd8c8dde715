//! Opens a shared library as a Hoist backend.
//!
//! The life of a plugin: [`Candidate::open`] judges the place and hashes the bytes; [`Header::read`] reads what it says of
//! itself without running it; a [`Probe`] runs it once in a child process with a time limit; [`open`] loads the very bytes
//! that were judged, with `RTLD_NOW | RTLD_LOCAL`, never unloads them, and hands out a [`hoist_backend::Provider`].
//!
//! # What this protects from, and what not
//!
//! A plugin runs in the process, with its rights. The rules here keep a wrong, stale or broken library from being loaded by
//! accident, and turn what it returns into checked values: statuses outside the list, strings that do not end, numbers out
//! of range and NULL entries become typed errors. They cannot contain a library that means harm, or one that writes
//! where it should not. [`open_isolated`] keeps it in a process of its own: a crash, a hang or a stray write there is a
//! [`hoist_backend::Error::DeviceLost`] here. It has that process's rights all the same: this is no sandbox.

mod backend;
mod convert;
mod error;
mod float_mode;
mod header;
mod isolate;
mod library;
mod parting;
mod policy;
mod probe;
mod provider;

pub use error::{Error, Result};
pub use header::Header;
pub use isolate::{Isolation, serve};
pub use parting::take_parting_errors;
pub use policy::{Candidate, Lockfile, Trusted};
pub use probe::{Probe, probe_line};
pub use provider::{PluginProvider, open, open_isolated, probe_here};
