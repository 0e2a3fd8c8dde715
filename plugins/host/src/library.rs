//! A loaded library: its table of functions, checked, and the one way to call it.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::mem::offset_of;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use hoist_plugin_abi as abi;
use hoist_plugin_abi::{ErrorRecord, Host, OPEN_SYMBOL, Plugin, Status};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::float_mode::FloatMode;
use crate::header::{Header, shown, text};
use crate::isolate::{Isolation, Worker};
use crate::policy::Candidate;
use crate::{Error, Result, parting};

/// A plugin whose code is in this process. Its library is never unloaded: its threads, its handlers at exit and the
/// addresses it gave away could outlive it. `shutdown` is called when the last user is gone; opening it again starts anew.
pub(crate) struct Loaded {
    pub(crate) path: PathBuf,
    pub(crate) header: Header,
    pub(crate) sha256: String,
    pub(crate) minor: u32,
    pub(crate) table: Plugin,
    /// The process it is in, if that is not this one; the table then speaks to it.
    worker: Option<Worker>,
    /// The plugin keeps a pointer to it until `shutdown` returns.
    _host: Option<Box<Host>>,
}

// SAFETY: the table holds addresses of code that is never unloaded, and the host block is only read; which calls may
// overlap is upheld by `PluginBackend`, which is used by one thread at a time.
unsafe impl Send for Loaded {}
// SAFETY: as above; functions called through a shared `Loaded` are those marked `[any]`.
unsafe impl Sync for Loaded {}

/// Plugins that are open in this process, by the hash of their bytes: a library has one state, however often it is opened.
static OPEN: Mutex<Vec<(String, Weak<Loaded>)>> = Mutex::new(Vec::new());

impl Loaded {
    /// Loads a judged file and opens it.
    pub(crate) fn open(candidate: &Candidate, header: Header, minor: u32) -> Result<Arc<Self>> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, loaded)| loaded.strong_count() > 0);
        if let Some(loaded) = open
            .iter()
            .find(|(hash, _)| *hash == candidate.sha256)
            .and_then(|(_, l)| l.upgrade())
        {
            return Ok(loaded);
        }
        let loaded = Arc::new(Self::load(candidate, header, minor)?);
        open.push((candidate.sha256.clone(), Arc::downgrade(&loaded)));
        Ok(loaded)
    }

    fn load(candidate: &Candidate, header: Header, minor: u32) -> Result<Self> {
        let path = &candidate.path;
        let refuse = |reason: String| Error::Load {
            path: path.clone(),
            reason,
        };
        let identity = candidate
            .file
            .metadata()
            .map(|m| (m.dev(), m.ino()))
            .map_err(|e| refuse(e.to_string()))?;
        check_never_another(identity, &candidate.sha256).map_err(refuse)?;
        let by_descriptor = unique_path(candidate.file.as_raw_fd(), &candidate.sha256);
        let library = {
            let _mode = FloatMode::save();
            // SAFETY: runs the constructors of a library that the policy admitted and the probe survived; what they do
            // is what the caller trusts by opening a plugin at all.
            unsafe { Library::open(Some(&by_descriptor), RTLD_NOW | RTLD_LOCAL) }
                .map_err(|e| refuse(describe(&e, &by_descriptor, path)))?
        };
        remember(identity, &candidate.sha256);
        candidate.check_unchanged()?;
        // SAFETY: the header, whose rules this library declares to follow, says that this name is an `OpenV1`.
        let entry = unsafe { library.get::<abi::OpenV1>(OPEN_SYMBOL.as_bytes()) }
            .map(|symbol| *symbol)
            .map_err(|e| refuse(describe(&e, &by_descriptor, path)));
        std::mem::forget(library);
        let entry = entry?;
        let host = Box::new(Host {
            struct_size: size_of::<Host>() as u32,
            minor,
            context: std::ptr::null_mut(),
            log: Some(log),
        });
        let mut table: *const Plugin = std::ptr::null();
        let mut record = ErrorRecord::new();
        let status = {
            let _mode = FloatMode::save();
            // SAFETY: all four arguments are valid for the call, and `host` stays in place until `shutdown`.
            unsafe { entry(&*host, minor, &mut table, &mut record) }
        };
        if status != Status::OK {
            return Err(Error::Open {
                path: path.clone(),
                reason: explain(status, &record),
            });
        }
        let table = copy_table(path, table)?;
        check_table(path, &table)?;
        Ok(Self {
            path: path.clone(),
            header,
            sha256: candidate.sha256.clone(),
            minor,
            table,
            worker: None,
            _host: Some(host),
        })
    }

    /// Loads a judged file in a process of its own.
    pub(crate) fn isolate(
        candidate: &Candidate,
        header: Header,
        minor: u32,
        isolation: &Isolation,
    ) -> Result<Arc<Self>> {
        let worker = Worker::start(candidate, isolation)?;
        let table = worker.table();
        check_table(&candidate.path, &table)?;
        Ok(Arc::new(Self {
            path: candidate.path.clone(),
            header,
            sha256: candidate.sha256.clone(),
            minor,
            table,
            worker: Some(worker),
            _host: None,
        }))
    }

    /// Calls a function of the table with an error record, and puts the floating-point mode back.
    pub(crate) fn call(
        &self,
        f: impl FnOnce(&mut ErrorRecord) -> Status,
    ) -> std::result::Result<(), Failure> {
        let mut record = ErrorRecord::new();
        let status = match &self.worker {
            Some(worker) => worker.enter(|| f(&mut record)),
            None => {
                let _mode = FloatMode::save();
                f(&mut record)
            }
        };
        if status == Status::OK {
            Ok(())
        } else {
            Err(Failure {
                status,
                record: Box::new(record),
            })
        }
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        let Some(shutdown) = self.table.shutdown else {
            return;
        };
        // SAFETY: no device is open any more: every user of one holds this in an `Arc`.
        if let Err(failure) = self.call(|record| unsafe { shutdown(record) }) {
            parting::record(&self.path, "shutdown", failure.explain());
        }
    }
}

/// A call that failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: Status,
    pub(crate) record: Box<ErrorRecord>,
}

impl Failure {
    pub(crate) fn explain(&self) -> String {
        explain(self.status, &self.record)
    }
}

fn explain(status: Status, record: &ErrorRecord) -> String {
    let name = match status.name() {
        Some(name) => name.to_owned(),
        None => format!("undocumented status {}", status.0),
    };
    let message = match text(&record.message) {
        Some(message) if message.is_empty() => return with_native(name, record),
        Some(message) => message,
        None => "(its message is no UTF-8 ended by a NUL)".to_owned(),
    };
    with_native(format!("{name}: {message}"), record)
}

fn with_native(text: String, record: &ErrorRecord) -> String {
    if record.native_code == 0 {
        text
    } else {
        format!("{text} (native code {})", record.native_code)
    }
}

/// A path to the very file that was hashed, whatever stands at its own path by now, that names no other file for as long as
/// the process lives. The dynamic linker takes a path that it has seen for the library it loaded then, and numbers of
/// descriptors come again; so the hash is in the path, in slashes: the system takes `.//` for `./`, and the linker does not.
fn unique_path(descriptor: RawFd, sha256: &str) -> String {
    let hash = sha256
        .bytes()
        .take(32)
        .flat_map(|digit| (0..4).map(move |bit| if digit >> bit & 1 == 1 { ".//" } else { "./" }));
    let mut path = String::from("/proc/self/fd/");
    path.extend(hash);
    path.push_str(&descriptor.to_string());
    path
}

/// Files whose libraries are in this process, by device and inode: mapped for ever, so that no inode comes again.
static MAPPED: Mutex<BTreeMap<(u64, u64), String>> = Mutex::new(BTreeMap::new());

/// Refuses a file that was overwritten since this process loaded it: the linker would hand out the old library.
fn check_never_another(identity: (u64, u64), sha256: &str) -> std::result::Result<(), String> {
    let mapped = MAPPED.lock().unwrap_or_else(PoisonError::into_inner);
    match mapped.get(&identity) {
        Some(first) if first != sha256 => Err(format!(
            "this process has loaded an earlier content of the same file, with SHA-256 {first}; start it again"
        )),
        _ => Ok(()),
    }
}

fn remember(identity: (u64, u64), sha256: &str) {
    let mut mapped = MAPPED.lock().unwrap_or_else(PoisonError::into_inner);
    mapped.insert(identity, sha256.to_owned());
}

fn describe(error: &libloading::Error, by_descriptor: &str, path: &Path) -> String {
    let reason = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    reason.replace(by_descriptor, &path.display().to_string())
}

fn copy_table(path: &Path, table: *const Plugin) -> Result<Plugin> {
    let bad = |reason: String| Error::BadTable {
        path: path.to_owned(),
        reason,
    };
    if table.is_null() {
        return Err(bad("its entry returned OK and no table".into()));
    }
    if !table.is_aligned() {
        return Err(bad(format!("its address {table:p} is not aligned")));
    }
    // SAFETY: a non-null, aligned table that the plugin vouches for begins with its `struct_size`.
    let struct_size = unsafe { table.cast::<u32>().read() };
    let least = offset_of!(Plugin, build_index);
    let size = struct_size as usize;
    if size < least {
        return Err(bad(format!(
            "struct_size is {size}, the residency profile alone has {least} bytes"
        )));
    }
    let mut own = std::mem::MaybeUninit::<Plugin>::zeroed();
    // SAFETY: copies at most what the plugin says it wrote, into a table of ours that holds as much.
    unsafe {
        std::ptr::copy_nonoverlapping(
            table.cast::<u8>(),
            own.as_mut_ptr().cast::<u8>(),
            size.min(size_of::<Plugin>()),
        );
    }
    // SAFETY: zeros and addresses are both valid for `Option<fn>` and integers, which is all the table holds.
    Ok(unsafe { own.assume_init() })
}

fn check_table(path: &Path, t: &Plugin) -> Result<()> {
    let required = [
        ("device_count", t.device_count.is_some()),
        ("device_info", t.device_info.is_some()),
        ("device_open", t.device_open.is_some()),
        ("caps", t.caps.is_some()),
        ("memory_info", t.memory_info.is_some()),
        ("plan_check", t.plan_check.is_some()),
        ("load_begin", t.load_begin.is_some()),
        ("upload", t.upload.is_some()),
        ("load_commit", t.load_commit.is_some()),
        ("load_abort", t.load_abort.is_some()),
        ("readback", t.readback.is_some()),
        ("model_destroy", t.model_destroy.is_some()),
        ("device_close", t.device_close.is_some()),
        ("shutdown", t.shutdown.is_some()),
    ];
    if let Some((name, _)) = required.iter().find(|(_, there)| !there) {
        return Err(Error::BadTable {
            path: path.to_owned(),
            reason: format!("its required entry `{name}` is NULL"),
        });
    }
    let decode = [
        ("prepare", t.prepare.is_some()),
        ("forward", t.forward.is_some()),
        ("truncate", t.truncate.is_some()),
    ];
    let present = decode.iter().filter(|(_, there)| *there).count();
    if present != 0 && present != decode.len() {
        let missing = decode
            .iter()
            .find(|(_, there)| !there)
            .map_or("", |(name, _)| name);
        return Err(Error::BadTable {
            path: path.to_owned(),
            reason: format!("it decodes and its entry `{missing}` is NULL"),
        });
    }
    if present != 0 && t.workspace_create.is_none() {
        return Err(Error::BadTable {
            path: path.to_owned(),
            reason: "it decodes and its entry `workspace_create` is NULL".into(),
        });
    }
    Ok(())
}

/// Longest message of a plugin that is passed on.
const MAX_MESSAGE: u64 = 4096;

/// The host's log: messages go to `tracing`, with what is not UTF-8 replaced and what would steer a terminal spelled out.
unsafe extern "C" fn log(_context: *mut c_void, level: u32, message: *const u8, len: u64) {
    if message.is_null() {
        return;
    }
    // SAFETY: the plugin vouches for `len` readable bytes; at most `MAX_MESSAGE` of them are read.
    let bytes = unsafe { std::slice::from_raw_parts(message, len.min(MAX_MESSAGE) as usize) };
    let message = shown(&String::from_utf8_lossy(bytes));
    match level {
        abi::LOG_ERROR => tracing::error!(target: "hoist_plugin", "{message}"),
        abi::LOG_WARN => tracing::warn!(target: "hoist_plugin", "{message}"),
        abi::LOG_INFO => tracing::info!(target: "hoist_plugin", "{message}"),
        _ => tracing::debug!(target: "hoist_plugin", "{message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_by_descriptor_is_the_files_and_differs_for_other_bytes() {
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let (a, b) = ("0".repeat(64), format!("1{}", "0".repeat(63)));
        let paths = [
            unique_path(file.as_raw_fd(), &a),
            unique_path(file.as_raw_fd(), &b),
        ];
        assert_ne!(paths[0], paths[1]);
        let own = file.metadata().unwrap();
        for path in paths {
            let found = std::fs::metadata(path).unwrap();
            assert_eq!((found.dev(), found.ino()), (own.dev(), own.ino()));
        }
    }

    #[test]
    fn a_file_that_was_overwritten_is_not_taken_for_what_it_was() {
        let identity = (u64::MAX, u64::MAX);
        assert_eq!(check_never_another(identity, "a"), Ok(()));
        remember(identity, "a");
        assert_eq!(check_never_another(identity, "a"), Ok(()));
        assert!(check_never_another(identity, "b").is_err());
    }
}
