use std::path::PathBuf;

/// Result of finding, judging and opening a plugin.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a plugin was refused. Each names the rule and the plugin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant's message names its fields")]
pub enum Error {
    // ---- where it is ----
    /// A relative path: plugins are never searched for.
    #[error("plugin path `{path}` is not absolute; plugins are never searched for")]
    NotAbsolute { path: PathBuf },
    /// The file cannot be opened or read.
    #[error("cannot read plugin `{path}`: {error}")]
    Io { path: PathBuf, error: std::io::Error },
    /// Anyone could replace what would run.
    #[error("plugin `{path}` is refused: {what} can be written by everyone (mode {mode:o})")]
    WorldWritable { path: PathBuf, what: String, mode: u32 },
    /// The lockfile names another file.
    #[error(
        "plugin `{path}` is not the one that was trusted: SHA-256 is {found}, the lockfile says {expected}"
    )]
    NotTrusted {
        path: PathBuf,
        expected: String,
        found: String,
    },
    /// The lockfile has no such name.
    #[error("no plugin called `{name}` in the lockfile `{lockfile}`")]
    UnknownName { name: String, lockfile: PathBuf },
    /// The lockfile cannot be used.
    #[error("lockfile `{path}`: {reason}")]
    Lockfile { path: PathBuf, reason: String },
    /// The bytes changed between judging and loading.
    #[error("plugin `{path}` changed while it was being opened: SHA-256 was {expected} and is {found}")]
    Changed {
        path: PathBuf,
        expected: String,
        found: String,
    },

    // ---- what it says of itself ----
    /// Not a shared library.
    #[error("`{path}` is not a shared library: {reason}")]
    NotALibrary { path: PathBuf, reason: String },
    /// A library for another machine.
    #[error("plugin `{path}` is for {found}, this machine is {expected}")]
    WrongMachine {
        path: PathBuf,
        expected: String,
        found: String,
    },
    /// No header.
    #[error("`{path}` exports no `HOIST_PLUGIN_HEADER_V1`: it is no Hoist plugin")]
    NoHeader { path: PathBuf },
    /// A header that breaks its own rules.
    #[error("plugin `{path}` has a bad header: {field} should be {expected} and is {found}")]
    BadHeader {
        path: PathBuf,
        field: &'static str,
        expected: String,
        found: String,
    },
    /// Majors differ.
    #[error("plugin `{path}` speaks major {found} of the interface, this host speaks {expected}")]
    Major {
        path: PathBuf,
        expected: u32,
        found: u32,
    },
    /// Minors do not overlap.
    #[error("plugin `{path}` speaks minors {}..={} of the interface, this host {}..={}: no minor is in both", plugin.0, plugin.1, host.0, host.1)]
    Minor {
        path: PathBuf,
        host: (u32, u32),
        plugin: (u32, u32),
    },

    // ---- what it does ----
    /// The probe in a child process did not end well.
    #[error("plugin `{path}` failed its probe: {reason}")]
    Probe { path: PathBuf, reason: String },
    /// Its worker process did not come up.
    #[error("plugin `{path}` failed in its worker process: {reason}")]
    Worker { path: PathBuf, reason: String },
    /// The dynamic linker refused it.
    #[error("plugin `{path}` cannot be loaded: {reason}")]
    Load { path: PathBuf, reason: String },
    /// Its entry failed.
    #[error("plugin `{path}` refused to open: {reason}")]
    Open { path: PathBuf, reason: String },
    /// It handed over a table that cannot be used.
    #[error("plugin `{path}` handed over a bad table: {reason}")]
    BadTable { path: PathBuf, reason: String },
    /// It failed to give back what it held.
    #[error("plugin `{path}` failed to give back what it held: `{call}`: {reason}")]
    GivingBack {
        path: PathBuf,
        call: &'static str,
        reason: String,
    },
}
