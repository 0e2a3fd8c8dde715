//! An emulated CUDA device for tests: the driver's calls and the kernels' sources as a shared library of the host.
//!
//! README.md beside this crate says what it proves and what it does not. A test either starts a child process with
//! [`folder`] in front of `LD_LIBRARY_PATH`, or calls [`load`] before anything looks for the driver.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::path::PathBuf;
use std::sync::OnceLock;

/// The call that the library in [`incomplete_folder`] lacks.
pub const MISSING_SYMBOL: &str = "cuGraphUpload";

/// The folder of `libcuda.so.1`, to be put in front of `LD_LIBRARY_PATH`; `None` where it could not be built.
#[must_use]
pub fn folder() -> Option<PathBuf> {
    built().map(|folder| folder.join("driver"))
}

/// The folder of a `libcuda.so.1` that lacks [`MISSING_SYMBOL`].
#[must_use]
pub fn incomplete_folder() -> Option<PathBuf> {
    built().map(|folder| folder.join("driver-incomplete"))
}

/// The folder of a `libcuda.so.1` that looks for races of shared memory: slower, and a launch in which it finds one fails.
#[must_use]
pub fn races_folder() -> Option<PathBuf> {
    built().map(|folder| folder.join("driver-races"))
}

fn built() -> Option<PathBuf> {
    #[cfg(emulator)]
    return Some(PathBuf::from(env!("HOIST_EMULATOR_FOLDER")));
    #[cfg(not(emulator))]
    None
}

/// The emulated driver of this process.
#[derive(Debug)]
pub struct Emulator {
    library: libloading::Library,
}

/// What is alive on the device, what was called, and what went wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// `allocations`, `streams`, `calls.cuMemAlloc_v2` and so on.
    pub counts: BTreeMap<String, u64>,
    /// What the device was lost by; empty if it was not.
    pub fault: String,
}

impl Report {
    /// A count; 0 if there is none of that name.
    #[must_use]
    pub fn count(&self, name: &str) -> u64 {
        self.counts.get(name).copied().unwrap_or(0)
    }

    /// What the text of `hoist_emulated_report`, or of the file that `HOIST_EMULATED_REPORT` names, says.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut report = Self::default();
        for line in text.lines() {
            match line.split_once('=') {
                Some(("report", fault)) => report.fault = fault.into(),
                Some((key, value)) => {
                    if let Ok(n) = value.parse() {
                        report.counts.insert(key.into(), n);
                    }
                }
                None => {}
            }
        }
        report
    }
}

/// Loads the emulated driver, so that whoever looks for `libcuda.so.1` later finds it, whatever is installed. Repeated calls
/// yield the same. `None` where it could not be built.
///
/// # Panics
/// If it was built and cannot be loaded.
#[must_use]
pub fn load() -> Option<&'static Emulator> {
    static LOADED: OnceLock<Option<Emulator>> = OnceLock::new();
    LOADED.get_or_init(|| open(folder()?)).as_ref()
}

/// The same, of the library in [`races_folder`]. A process loads one of the two.
///
/// # Panics
/// If it was built and cannot be loaded.
#[must_use]
pub fn load_races() -> Option<&'static Emulator> {
    static LOADED: OnceLock<Option<Emulator>> = OnceLock::new();
    LOADED.get_or_init(|| open(races_folder()?)).as_ref()
}

#[expect(
    clippy::panic,
    reason = "only tests come here, and a broken library must fail them"
)]
fn open(folder: PathBuf) -> Option<Emulator> {
    let path = folder.join("libcuda.so.1");
    // SAFETY: its initialisers only register kernels.
    match unsafe { libloading::Library::new(&path) } {
        Ok(library) => Some(Emulator { library }),
        Err(error) => panic!("{}: {error}", path.display()),
    }
}

impl Emulator {
    /// Replaces the settings, as in `HOIST_EMULATED_CUDA`; counts of calls and launches begin anew.
    ///
    /// # Panics
    /// If they are none.
    #[expect(
        clippy::panic,
        reason = "only tests come here, and a wrong setting must fail them"
    )]
    pub fn configure(&self, settings: &str) {
        type Configure = unsafe extern "C" fn(*const std::ffi::c_char) -> i32;
        let Ok(text) = CString::new(settings) else {
            panic!("a setting with a zero byte")
        };
        // SAFETY: the library's own function of that type.
        let Ok(configure) = (unsafe { self.library.get::<Configure>(b"hoist_emulated_configure\0") }) else {
            panic!("the emulated driver is not whole")
        };
        // SAFETY: the text ends with a zero.
        let code = unsafe { configure(text.as_ptr()) };
        assert!(code == 0, "`{settings}` are no settings");
    }

    /// Forgets everything that is alive, and every fault: after a release that was made to fail. Nothing may be under way.
    ///
    /// # Panics
    /// If the library is not whole.
    #[expect(clippy::panic, reason = "only tests come here")]
    pub fn reset(&self) {
        type Reset = unsafe extern "C" fn() -> i32;
        // SAFETY: the library's own function of that type.
        let Ok(reset) = (unsafe { self.library.get::<Reset>(b"hoist_emulated_reset\0") }) else {
            panic!("the emulated driver is not whole")
        };
        // SAFETY: takes nothing; the caller has nothing under way.
        let _ = unsafe { reset() };
    }

    /// What is alive now, and what has happened since the last [`Emulator::configure`].
    ///
    /// # Panics
    /// If the library is not whole.
    #[expect(clippy::panic, reason = "only tests come here")]
    #[must_use]
    pub fn report(&self) -> Report {
        type Write = unsafe extern "C" fn(*mut std::ffi::c_char, usize) -> usize;
        // SAFETY: the library's own function of that type.
        let Ok(write) = (unsafe { self.library.get::<Write>(b"hoist_emulated_report\0") }) else {
            panic!("the emulated driver is not whole")
        };
        let mut buffer = vec![0u8; 64 << 10];
        // SAFETY: the buffer has the length that is given.
        let _ = unsafe { write(buffer.as_mut_ptr().cast(), buffer.len()) };
        let text: Vec<u8> = buffer.into_iter().take_while(|b| *b != 0).collect();
        Report::parse(&String::from_utf8_lossy(&text))
    }

    /// A call of the driver, as a function of type `F`.
    ///
    /// # Panics
    /// If there is none of that name.
    ///
    /// # Safety
    /// `F` is the type of that function.
    #[expect(clippy::panic, reason = "only tests come here")]
    pub unsafe fn function<F: Copy>(&self, symbol: &str) -> F {
        // SAFETY: the caller vouches for the type.
        match unsafe { self.library.get::<F>(symbol.as_bytes()) } {
            Ok(function) => *function,
            Err(error) => panic!("{error}"),
        }
    }

    /// Whether the driver has a call of that name.
    #[must_use]
    pub fn has(&self, symbol: &str) -> bool {
        // SAFETY: the symbol is only looked up.
        unsafe { self.library.get::<*const std::ffi::c_void>(symbol.as_bytes()) }.is_ok()
    }
}
