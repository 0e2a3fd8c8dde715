//! The CUDA driver as typed values.
//!
//! cudarc resolves each symbol when it is first called and panics if it is not there. [`probe`] therefore looks for the
//! library and for every symbol of [`SYMBOLS`] first; a test demands that the crate calls no other.
//!
//! A context is current to a thread, not to a value: every thread calls [`Context::bind`] before anything else here.

use std::ffi::{CStr, c_void};
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};
use hoist_backend::{Error, Result};

/// The driver that runs the embedded kernels: CUDA 13.0, whose PTX version they are written in.
pub(crate) const MIN_DRIVER_CUDA: (i32, i32) = (13, 0);
/// The first driver release that supports it.
const MIN_DRIVER_RELEASE: &str = "580";
/// The oldest compute capability that the embedded PTX runs on.
pub(crate) const MIN_CAPABILITY: (i32, i32) = (8, 0);

/// Every driver call that this crate makes.
pub(crate) const SYMBOLS: &[&str] = &[
    "cuCtxGetStreamPriorityRange",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetPCIBusId",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxSetFlags_v2",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphUpload",
    "cuInit",
    "cuLaunchKernelEx",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD32Async",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuStreamBeginCapture_v2",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamQuery",
    "cuStreamSynchronize",
];

/// A driver call that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DriverError {
    /// The call.
    pub(crate) call: &'static str,
    /// What it returned.
    pub(crate) code: CUresult,
}

impl DriverError {
    /// Whether memory, of the device or of the host, ran short.
    pub(crate) fn is_out_of_memory(self) -> bool {
        self.code == CUresult::CUDA_ERROR_OUT_OF_MEMORY
    }

    /// Whether every later call on the context fails too.
    fn is_sticky(self) -> bool {
        matches!(
            self.code,
            CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
                | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
                | CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
                | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
                | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
                | CUresult::CUDA_ERROR_ASSERT
                | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
                | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
                | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
                | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
                | CUresult::CUDA_ERROR_INVALID_PC
                | CUresult::CUDA_ERROR_LAUNCH_FAILED
                | CUresult::CUDA_ERROR_EXTERNAL_DEVICE
                | CUresult::CUDA_ERROR_DEINITIALIZED
                | CUresult::CUDA_ERROR_UNKNOWN
        )
    }

    /// As the contract groups errors; `device` is its id. A device that is lost by it is not shared with others any more.
    pub(crate) fn on(self, device: &str) -> Error {
        if self.is_sticky() {
            crate::shared::forget(device);
            return Error::DeviceLost {
                device: device.into(),
                reason: self.to_string(),
            };
        }
        if self.is_out_of_memory() {
            return Error::OutOfMemory {
                device: device.into(),
                what: self.call.into(),
                needed: DRIVER_PIECE_BYTES,
                available: free_bytes(),
            };
        }
        Error::internal(crate::NAME, self)
    }
}

/// Memory that the driver takes at a time for its own objects, such as streams; only for messages.
const DRIVER_PIECE_BYTES: u64 = 2 << 20;

/// Free bytes of the device whose context is current; 0 if none is.
fn free_bytes() -> u64 {
    let (mut free, mut total) = (0usize, 0usize);
    // SAFETY: both out pointers are valid.
    match unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) } {
        CUresult::CUDA_SUCCESS => free as u64,
        _ => 0,
    }
}

impl std::fmt::Display for DriverError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = std::ptr::null();
        // SAFETY: the out pointer is valid; the driver is loaded, or there would be no code.
        let known = unsafe { sys::cuGetErrorString(self.code, &mut text) };
        write!(f, "{} returned {:?}", self.call, self.code)?;
        if known == CUresult::CUDA_SUCCESS && !text.is_null() {
            // SAFETY: the driver gave a static string that ends with a zero.
            let text = unsafe { CStr::from_ptr(text) };
            write!(f, " ({})", text.to_string_lossy())?;
        }
        Ok(())
    }
}

/// Turns what a driver call returned into a result.
pub(crate) fn check(call: &'static str, code: CUresult) -> Result<(), DriverError> {
    match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(DriverError { call, code }),
    }
}

/// Calls a driver function and maps its error: `call!(device_id, function(arguments))`.
///
/// Expands to an `unsafe` block of that one call: the caller writes the `SAFETY` comment above it.
macro_rules! call {
    ($device:expr, $function:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: the caller's, above the call.
        let code = unsafe { ::cudarc::driver::sys::$function($($argument),*) };
        $crate::driver::check(stringify!($function), code).map_err(|e| e.on($device))
    }};
}
pub(crate) use call;

/// What the probe found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Driver {
    /// The CUDA version it supports.
    pub(crate) cuda: (i32, i32),
}

fn unavailable(reason: impl Into<String>, hint: impl Into<String>) -> Error {
    Error::Unavailable {
        backend: crate::NAME.into(),
        reason: reason.into(),
        hint: Some(hint.into()),
    }
}

/// Looks for the driver, its symbols and its version, once a process, and initialises it.
///
/// # Errors
/// [`Error::Unavailable`] with what is missing and what to do about it.
pub(crate) fn probe() -> Result<Driver> {
    static FOUND: OnceLock<Result<Driver, (String, String)>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        probe_once().map_err(|e| match e {
            Error::Unavailable { reason, hint, .. } => (reason, hint.unwrap_or_default()),
            other => (other.to_string(), String::new()),
        })
    });
    match found {
        Ok(driver) => Ok(*driver),
        Err((reason, hint)) => Err(unavailable(reason.as_str(), hint.as_str())),
    }
}

fn probe_once() -> Result<Driver> {
    // SAFETY: libcuda's initialisers are the vendor's; loading it is what this backend is asked for.
    if !unsafe { sys::is_culib_present() } {
        return Err(unavailable(
            "the CUDA driver (libcuda) is not installed",
            format!(
                "install NVIDIA driver {MIN_DRIVER_RELEASE} or later; in a container, start it with the GPU passed through"
            ),
        ));
    }
    // SAFETY: it is present, so this loads it and does not panic.
    let library = unsafe { sys::culib() };
    for name in SYMBOLS {
        // SAFETY: the symbol is only looked up, never called through this type.
        if unsafe { library.get::<*const c_void>(name.as_bytes()) }.is_err() {
            return Err(unavailable(
                format!("the CUDA driver has no `{name}`"),
                format!("install NVIDIA driver {MIN_DRIVER_RELEASE} or later"),
            ));
        }
    }
    let mut version = 0;
    // SAFETY: the out pointer is valid.
    call!("cuda", cuDriverGetVersion(&mut version))?;
    let cuda = (version / 1000, version % 1000 / 10);
    if cuda < MIN_DRIVER_CUDA {
        return Err(unavailable(
            format!(
                "the driver supports CUDA {}.{} and {}.{} is needed",
                cuda.0, cuda.1, MIN_DRIVER_CUDA.0, MIN_DRIVER_CUDA.1
            ),
            format!("install NVIDIA driver {MIN_DRIVER_RELEASE} or later"),
        ));
    }
    // SAFETY: takes no pointers.
    let code = unsafe { sys::cuInit(0) };
    check("cuInit", code).map_err(|e| {
        let hint = match e.code {
            CUresult::CUDA_ERROR_NO_DEVICE => {
                "nvidia-smi lists the devices; CUDA_VISIBLE_DEVICES can hide them"
            }
            _ => "nvidia-smi tells whether the driver works",
        };
        unavailable(e.to_string(), hint)
    })?;
    Ok(Driver { cuda })
}

/// Number of devices; the driver must be probed.
pub(crate) fn device_count() -> Result<u32> {
    let mut count = 0;
    // SAFETY: the out pointer is valid.
    call!("cuda", cuDeviceGetCount(&mut count))?;
    Ok(u32::try_from(count).unwrap_or(0))
}

/// A device's handle and what does not change.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    /// Id such as `cuda:0`.
    pub(crate) id: String,
    /// Product name.
    pub(crate) name: String,
    /// Memory in bytes.
    pub(crate) total_memory: u64,
    /// Compute capability.
    pub(crate) capability: (i32, i32),
    /// Multiprocessors.
    pub(crate) multiprocessors: u32,
    /// Most bytes of shared memory that a block can opt in to.
    pub(crate) shared_memory_optin: u32,
    /// PCI address, such as `0000:3b:00.0`.
    pub(crate) pci: String,
    raw: sys::CUdevice,
}

impl Device {
    /// Asks the driver about a device.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if there is no such device.
    pub(crate) fn new(ordinal: u32) -> Result<Self> {
        let id = format!("{}:{ordinal}", crate::NAME);
        let count = device_count()?;
        if ordinal >= count {
            return Err(unavailable(
                format!("there is no device `{id}`"),
                format!("this machine has {count} CUDA device(s)"),
            ));
        }
        let mut raw = 0;
        // SAFETY: the out pointer is valid; the ordinal is below the count.
        call!(&id, cuDeviceGet(&mut raw, ordinal as i32))?;
        let mut name = [0 as std::ffi::c_char; 256];
        // SAFETY: the buffer has the length that is given.
        call!(&id, cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, raw))?;
        let mut pci = [0 as std::ffi::c_char; 32];
        // SAFETY: the buffer has the length that is given.
        call!(&id, cuDeviceGetPCIBusId(pci.as_mut_ptr(), pci.len() as i32, raw))?;
        let mut total = 0usize;
        // SAFETY: the out pointer is valid.
        call!(&id, cuDeviceTotalMem_v2(&mut total, raw))?;
        let attribute = |attribute: CUdevice_attribute| -> Result<i32> {
            let mut value = 0;
            // SAFETY: the out pointer is valid.
            call!(&id, cuDeviceGetAttribute(&mut value, attribute, raw))?;
            Ok(value)
        };
        let capability = (
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let count = |a| -> Result<u32> { Ok(u32::try_from(attribute(a)?).unwrap_or(0)) };
        Ok(Self {
            name: text(&name),
            total_memory: total as u64,
            capability,
            multiprocessors: count(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_memory_optin: count(
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?,
            pci: text(&pci),
            raw,
            id,
        })
    }
}

fn text(buffer: &[std::ffi::c_char]) -> String {
    let bytes: Vec<u8> = buffer.iter().map(|c| *c as u8).take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The primary context of a device, held until this is dropped.
#[derive(Debug)]
pub(crate) struct Context {
    /// The device.
    pub(crate) device: Device,
    raw: sys::CUcontext,
}

// SAFETY: a context handle may be used from any thread; the driver synchronises.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context and makes it current to this thread.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without a driver, such a device, or a device that runs the embedded kernels.
    pub(crate) fn open(ordinal: u32) -> Result<Arc<Self>> {
        probe()?;
        let device = Device::new(ordinal)?;
        if device.capability < MIN_CAPABILITY {
            return Err(unavailable(
                format!(
                    "{} ({}) has compute capability {}.{} and the kernels need {}.{}",
                    device.id,
                    device.name,
                    device.capability.0,
                    device.capability.1,
                    MIN_CAPABILITY.0,
                    MIN_CAPABILITY.1
                ),
                "an Ampere (A100, RTX 30) or later device runs them",
            ));
        }
        let mut raw = std::ptr::null_mut();
        // SAFETY: the out pointer is valid and the device handle came from the driver.
        let code = unsafe { sys::cuDevicePrimaryCtxRetain(&mut raw, device.raw) };
        check("cuDevicePrimaryCtxRetain", code).map_err(|e| {
            if e.is_out_of_memory() {
                Error::OutOfMemory {
                    device: device.id.clone(),
                    what: "the context".into(),
                    needed: CONTEXT_BYTES,
                    available: 0,
                }
            } else {
                unavailable(
                    format!("{}: {e}", device.id),
                    "nvidia-smi tells whether the device works and who uses it",
                )
            }
        })?;
        let context = Self { device, raw };
        context.bind()?;
        Ok(Arc::new(context))
    }

    /// Its device's id.
    pub(crate) fn id(&self) -> &str {
        &self.device.id
    }

    /// Makes the context current to this thread.
    pub(crate) fn bind(&self) -> Result<()> {
        // SAFETY: the handle is held by this value.
        call!(self.id(), cuCtxSetCurrent(self.raw))
    }

    /// Free and total bytes of the device now.
    pub(crate) fn memory(&self) -> Result<(u64, u64)> {
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: both out pointers are valid.
        call!(self.id(), cuMemGetInfo_v2(&mut free, &mut total))?;
        Ok((free as u64, total as u64))
    }

    /// Makes the context current to this thread, and demands that it has not been lost.
    ///
    /// # Errors
    /// [`Error::DeviceLost`]
    pub(crate) fn check(&self) -> Result<()> {
        self.bind()?;
        // A call that is cheap, waits for nobody, and returns what the context was lost by.
        self.memory().map(|_| ())
    }

    /// Waits for everything on the device.
    pub(crate) fn synchronize(&self) -> Result<()> {
        // SAFETY: takes no pointers.
        call!(self.id(), cuCtxSynchronize())
    }
}

/// About what a context takes on the device; only for messages.
const CONTEXT_BYTES: u64 = 512 << 20;

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, released once; nothing to do about a failure.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device.raw) };
    }
}

/// A stream that does not wait for the default one.
#[derive(Debug)]
pub(crate) struct Stream {
    raw: sys::CUstream,
    context: Arc<Context>,
}

// SAFETY: a stream handle may be used from any thread; the driver synchronises.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream of default priority.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        Self::with_priority(context, 0)
    }

    /// A stream of that priority; lower numbers come first.
    pub(crate) fn with_priority(context: &Arc<Context>, priority: i32) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the out pointer is valid.
        call!(
            context.id(),
            cuStreamCreateWithPriority(&mut raw, flags, priority)
        )?;
        Ok(Self {
            raw,
            context: Arc::clone(context),
        })
    }

    /// The driver's handle.
    pub(crate) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Its context.
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Waits on the host for everything on this stream.
    pub(crate) fn synchronize(&self) -> Result<()> {
        // SAFETY: the handle is held.
        call!(self.context.id(), cuStreamSynchronize(self.raw))
    }

    /// Copies from the host.
    ///
    /// # Safety
    /// `bytes` must stay valid and unchanged until the stream has passed this copy, unless it is pageable memory, and
    /// `to..to + bytes.len()` must be device memory that nothing else touches meanwhile.
    pub(crate) unsafe fn copy_htod(&self, to: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let from = bytes.as_ptr().cast();
        // SAFETY: the caller upholds both ranges.
        call!(
            self.context.id(),
            cuMemcpyHtoDAsync_v2(to, from, bytes.len(), self.raw)
        )
    }

    /// Copies to the host.
    ///
    /// # Safety
    /// As [`Stream::copy_htod`], with `bytes` written instead of read.
    pub(crate) unsafe fn copy_dtoh(&self, bytes: &mut [u8], from: u64) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let to = bytes.as_mut_ptr().cast();
        // SAFETY: the caller upholds both ranges.
        call!(
            self.context.id(),
            cuMemcpyDtoHAsync_v2(to, from, bytes.len(), self.raw)
        )
    }

    /// Fills device memory with a byte.
    ///
    /// # Safety
    /// The range must be device memory that nothing else touches meanwhile.
    pub(crate) unsafe fn fill(&self, at: u64, byte: u8, nbytes: usize) -> Result<()> {
        if nbytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller upholds the range.
        call!(self.context.id(), cuMemsetD8Async(at, byte, nbytes, self.raw))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once; work in flight goes on, nothing to do about a failure.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
    }
}

/// A point on a stream.
#[derive(Debug)]
pub(crate) struct Event {
    raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: an event handle may be used from any thread; the driver synchronises.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event without a time; waiting for it does not spin.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32
            | sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
        Self::with_flags(context, flags)
    }

    /// An event that [`Event::elapsed_ms`] can read.
    pub(crate) fn timed(context: &Arc<Context>) -> Result<Self> {
        Self::with_flags(context, sys::CUevent_flags::CU_EVENT_DEFAULT as u32)
    }

    fn with_flags(context: &Arc<Context>, flags: u32) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the out pointer is valid.
        call!(context.id(), cuEventCreate(&mut raw, flags))?;
        Ok(Self {
            raw,
            context: Arc::clone(context),
        })
    }

    /// Marks where `stream` is now.
    pub(crate) fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both handles are held.
        call!(self.context.id(), cuEventRecord(self.raw, stream.raw))
    }

    /// Waits on the host until the stream has passed it; at once if it was never recorded.
    pub(crate) fn synchronize(&self) -> Result<()> {
        // SAFETY: the handle is held.
        call!(self.context.id(), cuEventSynchronize(self.raw))
    }

    /// Milliseconds since `start`; both must be timed and passed.
    pub(crate) fn elapsed_ms(&self, start: &Event) -> Result<f32> {
        let mut ms = 0.0;
        // SAFETY: the out pointer is valid and both handles are held.
        call!(
            self.context.id(),
            cuEventElapsedTime_v2(&mut ms, start.raw, self.raw)
        )?;
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once; nothing to do about a failure.
        let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}

/// Device memory, freed when this is dropped. At least 256-byte aligned, as the driver promises.
#[derive(Debug)]
pub(crate) struct DeviceBuffer {
    ptr: u64,
    nbytes: u64,
    context: Arc<Context>,
}

impl DeviceBuffer {
    /// Takes memory; its content is undefined. 0 bytes take none and have the address 0.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with numbers, naming `what`.
    pub(crate) fn new(context: &Arc<Context>, what: &str, nbytes: u64) -> Result<Self> {
        let refuse = |available| Error::OutOfMemory {
            device: context.id().into(),
            what: what.into(),
            needed: nbytes,
            available,
        };
        let mut ptr = 0;
        if nbytes > 0 {
            let len = usize::try_from(nbytes).map_err(|_| refuse(context.device.total_memory))?;
            // SAFETY: the out pointer is valid.
            let code = unsafe { sys::cuMemAlloc_v2(&mut ptr, len) };
            check("cuMemAlloc", code).map_err(|e| {
                if e.is_out_of_memory() {
                    refuse(context.memory().map_or(0, |(free, _)| free))
                } else {
                    e.on(context.id())
                }
            })?;
        }
        Ok(Self {
            ptr,
            nbytes,
            context: Arc::clone(context),
        })
    }

    /// The device's address.
    pub(crate) fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Bytes.
    pub(crate) fn nbytes(&self) -> u64 {
        self.nbytes
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.ptr != 0 {
            // An arena may be dropped by a thread that has not used the context yet; freeing waits for the device.
            let _ = self.context.bind();
            // SAFETY: allocated once, freed once; nothing to do about a failure.
            let _ = unsafe { sys::cuMemFree_v2(self.ptr) };
        }
    }
}

/// Page-locked host memory that reads as fast as any other, freed when this is dropped.
#[derive(Debug)]
pub(crate) struct PinnedBuffer {
    ptr: *mut u8,
    len: usize,
    context: Arc<Context>,
}

// SAFETY: plain memory, owned by this value.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared references only read.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// Takes zeroed memory of `len` bytes.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with numbers, naming `what`.
    pub(crate) fn new(context: &Arc<Context>, what: &str, len: usize) -> Result<Self> {
        let mut ptr = std::ptr::null_mut();
        // SAFETY: the out pointer is valid. No flags: in particular not write-combined, which is slow to read.
        let code = unsafe { sys::cuMemHostAlloc(&mut ptr, len.max(1), 0) };
        check("cuMemHostAlloc", code).map_err(|e| {
            if e.is_out_of_memory() {
                Error::OutOfMemory {
                    device: "the host".into(),
                    what: format!("page-locked memory for {what}"),
                    needed: len as u64,
                    available: 0,
                }
            } else {
                e.on(context.id())
            }
        })?;
        // SAFETY: the driver gave that many bytes.
        unsafe { std::ptr::write_bytes(ptr.cast::<u8>(), 0, len) };
        Ok(Self {
            ptr: ptr.cast(),
            len,
            context: Arc::clone(context),
        })
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: initialised memory of that length, owned by this value.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }

    /// The bytes, to write.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }

    /// The address, for copies that outlive a borrow.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: allocated once, freed once; nothing to do about a failure.
        let _ = unsafe { sys::cuMemFreeHost(self.ptr.cast()) };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    fn calls_in(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                calls_in(&path, found);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            for (at, _) in text.match_indices("cu") {
                let before = text[..at].chars().next_back();
                let called = before == Some(':') || before == Some(' ');
                let name: String = text[at..]
                    .chars()
                    .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
                    .collect();
                let is_function = name.as_bytes().get(2).is_some_and(u8::is_ascii_uppercase)
                    && text[at + name.len()..].starts_with('(');
                if called && is_function {
                    found.insert(name);
                }
            }
        }
    }

    #[test]
    fn every_driver_call_of_this_crate_is_probed_for() {
        let mut called = BTreeSet::new();
        calls_in(
            Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")),
            &mut called,
        );
        let probed: BTreeSet<String> = SYMBOLS.iter().map(|s| (*s).to_owned()).collect();
        let missing: Vec<_> = called.difference(&probed).collect();
        assert!(
            missing.is_empty(),
            "calls that the probe does not look for: {missing:?}"
        );
        assert!(
            called.contains("cuMemAlloc_v2") && called.contains("cuLaunchKernelEx"),
            "{called:?}"
        );
    }

    #[test]
    fn errors_go_to_those_who_must_act() {
        let of = |code| DriverError { call: "cuX", code };
        assert!(of(CUresult::CUDA_ERROR_OUT_OF_MEMORY).is_out_of_memory());
        assert!(of(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS).is_sticky());
        assert!(!of(CUresult::CUDA_ERROR_INVALID_VALUE).is_sticky());
    }

    #[test]
    fn without_a_driver_the_probe_says_what_to_install() {
        match probe() {
            Ok(driver) => assert!(driver.cuda >= MIN_DRIVER_CUDA),
            Err(Error::Unavailable { backend, hint, .. }) => {
                assert_eq!(backend, "cuda");
                assert!(hint.is_some_and(|h| !h.is_empty()));
            }
            Err(other) => panic!("{other}"),
        }
    }
}
