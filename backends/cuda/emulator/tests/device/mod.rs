//! A context on the emulated device, for tests of the emulator itself.
#![allow(dead_code, reason = "no test uses all of it")]

use std::ffi::{CString, c_char, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hoist_cuda_emulator::Emulator;

const KERNELS: &[&str] = &[
    "waits_for_nobody",
    "writes_at",
    "reverses",
    "arrives_too_often",
    "lanes_part",
    "copies_in_bulk",
    "copies_words",
    "grid_meets",
    "multiplies",
    "widens",
    "narrows",
    "hands_over",
    "neighbours",
    "refills",
    "counts",
];

pub(crate) const SUCCESS: i32 = 0;
pub(crate) const ILLEGAL_ADDRESS: i32 = 700;
pub(crate) const LAUNCH_TIMEOUT: i32 = 702;
pub(crate) const LAUNCH_FAILED: i32 = 719;

#[repr(C)]
struct Attribute {
    id: u32,
    pad: u32,
    value: [u64; 8],
}

#[repr(C)]
struct Config {
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: *mut c_void,
    attributes: *const Attribute,
    count: u32,
}

/// A context on the emulated device; one at a time.
pub(crate) struct Device {
    pub(crate) emulator: &'static Emulator,
    module: *mut c_void,
    _alone: MutexGuard<'static, ()>,
}

/// Calls a function of the driver and yields its code.
macro_rules! call {
    ($device:expr, $name:ident($($type:ty = $argument:expr),* $(,)?)) => {{
        type Function = unsafe extern "C" fn($($type),*) -> i32;
        // SAFETY: the driver's function of that type.
        let function = unsafe { $device.emulator.function::<Function>(stringify!($name)) };
        // SAFETY: pointers are to live values of the caller.
        unsafe { function($($argument),*) }
    }};
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = call!(self, cuModuleUnload(*mut c_void = self.module));
        let _ = call!(self, cuDevicePrimaryCtxRelease_v2(i32 = 0));
    }
}

impl Device {
    /// `None`, said aloud, where there is no emulator; a failure where CI is set.
    pub(crate) fn new(emulator: Option<&'static Emulator>, settings: &str) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(emulator) = emulator else {
            assert!(std::env::var_os("CI").is_none(), "no C++ compiler");
            eprintln!("skipped: no C++ compiler");
            return None;
        };
        emulator.configure(settings);
        let mut device = Device {
            emulator,
            module: std::ptr::null_mut(),
            _alone: alone,
        };
        let mut context = std::ptr::null_mut();
        assert_eq!(call!(device, cuInit(u32 = 0)), SUCCESS);
        assert_eq!(
            call!(device, cuDevicePrimaryCtxRetain(*mut *mut c_void = &raw mut context, i32 = 0)),
            SUCCESS
        );
        assert_eq!(call!(device, cuCtxSetCurrent(*mut c_void = context)), SUCCESS);
        let entries: String = KERNELS.iter().map(|k| format!(".entry {k}(\n")).collect();
        let image = CString::new(format!(".version 9.0\n.target sm_80\n{entries}")).unwrap();
        let mut module = std::ptr::null_mut();
        assert_eq!(
            call!(device, cuModuleLoadData(*mut *mut c_void = &raw mut module, *const c_char = image.as_ptr())),
            SUCCESS
        );
        device.module = module;
        Some(device)
    }

    pub(crate) fn memory<T: Copy>(&self, content: &[T]) -> u64 {
        let mut at = 0u64;
        let bytes = size_of_val(content);
        assert_eq!(
            call!(self, cuMemAlloc_v2(*mut u64 = &raw mut at, usize = bytes)),
            SUCCESS
        );
        let code = call!(self, cuMemcpyHtoDAsync_v2(
            u64 = at, *const c_void = content.as_ptr().cast(), usize = bytes, *mut c_void = std::ptr::null_mut()));
        assert_eq!(code, SUCCESS);
        at
    }

    pub(crate) fn read<T: Copy + Default>(&self, at: u64, n: usize) -> Vec<T> {
        let mut out = vec![T::default(); n];
        let code = call!(self, cuMemcpyDtoHAsync_v2(
            *mut c_void = out.as_mut_ptr().cast(), u64 = at, usize = n * size_of::<T>(), *mut c_void = std::ptr::null_mut()));
        assert_eq!(code, SUCCESS, "{}", self.emulator.report().fault);
        out
    }

    /// Runs a kernel to its end and yields what waiting for it returned.
    pub(crate) fn run(
        &self,
        kernel: &str,
        (grid, block): (u32, u32),
        shared: u32,
        cooperative: bool,
        arguments: &[u64],
    ) -> i32 {
        let name = CString::new(kernel).unwrap();
        let mut function = std::ptr::null_mut();
        let code = call!(self, cuModuleGetFunction(
            *mut *mut c_void = &raw mut function, *mut c_void = self.module, *const c_char = name.as_ptr()));
        assert_eq!(code, SUCCESS, "{kernel}");
        let attribute = Attribute {
            id: 2,
            pad: 0,
            value: [u64::from(cooperative), 0, 0, 0, 0, 0, 0, 0],
        };
        let config = Config {
            grid: [grid, 1, 1],
            block: [block, 1, 1],
            shared,
            stream: std::ptr::null_mut(),
            attributes: &raw const attribute,
            count: 1,
        };
        let mut addresses: Vec<*const u64> = arguments.iter().map(std::ptr::from_ref).collect();
        let code = call!(self, cuLaunchKernelEx(
            *const Config = &raw const config, *mut c_void = function,
            *mut *const u64 = addresses.as_mut_ptr(), *mut c_void = std::ptr::null_mut()));
        assert_eq!(code, SUCCESS, "{kernel}");
        call!(self, cuStreamSynchronize(*mut c_void = std::ptr::null_mut()))
    }
}
