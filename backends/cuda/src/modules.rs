//! The embedded kernels.
//!
//! Each `kernels/NAME.cu` is embedded twice: as machine code for compute capability 9.0 with its own instructions
//! (sm_90a), so that nothing is compiled when a program starts on an H100 or H200, and as PTX for everything from 8.0 on.
//! `scripts/kernels.py` makes both; its `--check` compares them with the sources.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex};

use cudarc::driver::sys;
use hoist_backend::{Error, Result};

use crate::driver::{Context, Stream, call, check};

/// A `.cu` file's code.
#[derive(Clone, Copy)]
pub(crate) struct Embedded {
    /// The file's name without `.cu`.
    pub(crate) name: &'static str,
    /// For compute capability 9.0.
    cubin: &'static [u8],
    /// For every other capability; ends with a zero byte, as the driver wants it.
    ptx: &'static str,
}

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        &[$(Embedded {
            name: $name,
            cubin: include_bytes!(concat!("../kernels/built/", $name, ".cubin")),
            ptx: concat!(include_str!(concat!("../kernels/built/", $name, ".ptx")), "\0"),
        }),*]
    };
}

/// Every `.cu` file.
pub(crate) const EMBEDDED: &[Embedded] = embedded![
    "residency",
    "blake3",
    "decode",
    "matmul",
    "prefill",
    "prefill_blocks",
    "prefill_k",
    "prefill_parted",
    "step",
];

/// Kernels of one context; a file is given to the driver when one of its kernels is first asked for.
#[derive(Debug)]
pub(crate) struct Modules {
    context: Arc<Context>,
    loaded: Mutex<Loaded>,
}

/// What the driver has been asked for.
#[derive(Debug, Default)]
struct Loaded {
    /// By file.
    modules: HashMap<&'static str, sys::CUmodule>,
    /// By file and kernel.
    kernels: HashMap<(&'static str, &'static str), Function>,
}

// SAFETY: module handles may be used from any thread; the driver synchronises.
unsafe impl Send for Modules {}
// SAFETY: as above.
unsafe impl Sync for Modules {}

impl Modules {
    /// Nothing loaded yet.
    pub(crate) fn new(context: &Arc<Context>) -> Self {
        Self {
            context: Arc::clone(context),
            loaded: Mutex::default(),
        }
    }

    /// Whether machine code is used rather than PTX.
    pub(crate) fn uses_machine_code(&self) -> bool {
        self.context.device.capability == (9, 0)
    }

    /// A kernel of `FILE.cu`.
    ///
    /// # Errors
    /// [`Error::Internal`] if there is no such kernel, or the driver refuses the code.
    pub(crate) fn function(&self, file: &str, kernel: &'static str) -> Result<Function> {
        let embedded = EMBEDDED
            .iter()
            .find(|e| e.name == file)
            .ok_or_else(|| Error::internal(crate::NAME, format!("no kernel file `{file}`")))?;
        // Held until it is known: two who ask at once are not to load a file twice.
        let mut loaded = self.loaded.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(known) = loaded.kernels.get(&(embedded.name, kernel)) {
            return Ok(known.clone());
        }
        let module = match loaded.modules.get(embedded.name) {
            Some(module) => *module,
            None => {
                let module = self.load(embedded)?;
                loaded.modules.insert(embedded.name, module);
                module
            }
        };
        let name = CString::new(kernel).map_err(|e| Error::internal(crate::NAME, e))?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the out pointer is valid, the module is loaded and the name ends with a zero.
        let code = unsafe { sys::cuModuleGetFunction(&mut raw, module, name.as_ptr()) };
        check("cuModuleGetFunction", code).map_err(|e| match e.on(self.context.id()) {
            Error::Internal { backend, what } => Error::Internal {
                backend,
                what: format!("kernel `{kernel}` of `{file}`: {what}"),
            },
            other => other,
        })?;
        let function = Function {
            raw,
            kernel,
            allowed_shared: Arc::default(),
            context: Arc::clone(&self.context),
        };
        loaded.kernels.insert((embedded.name, kernel), function.clone());
        Ok(function)
    }

    fn load(&self, embedded: &Embedded) -> Result<sys::CUmodule> {
        let image: *const c_void = if self.uses_machine_code() {
            embedded.cubin.as_ptr().cast()
        } else {
            embedded.ptx.as_ptr().cast()
        };
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is a whole cubin, which knows its own length, or text that ends with a zero.
        call!(self.context.id(), cuModuleLoadData(&mut module, image))?;
        Ok(module)
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        let _ = self.context.bind();
        let loaded = self.loaded.get_mut().unwrap_or_else(|e| e.into_inner());
        for (_, module) in loaded.modules.drain() {
            // SAFETY: loaded once, unloaded once. Every `Function` is held by what holds the modules.
            let _ = unsafe { sys::cuModuleUnload(module) };
        }
    }
}

/// A kernel. It must not outlive the [`Modules`] it came from.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    raw: sys::CUfunction,
    kernel: &'static str,
    /// What the driver was told by [`Function::allow_shared`]: of the kernel, so that all who use it share it.
    allowed_shared: Arc<Mutex<u32>>,
    context: Arc<Context>,
}

// SAFETY: a function handle may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    /// Blocks.
    pub(crate) grid: (u32, u32, u32),
    /// Threads of a block.
    pub(crate) block: (u32, u32, u32),
    /// Dynamic shared memory in bytes; above 48 KiB after [`Function::allow_shared`].
    pub(crate) shared: u32,
    /// All blocks are resident at once and may wait for each other.
    pub(crate) cooperative: bool,
    /// May start while the kernel before it ends: it waits with `griddepcontrol.wait` (capability 9.0).
    pub(crate) programmatic: bool,
}

impl Launch {
    /// A one-dimensional launch.
    pub(crate) fn linear(blocks: u32, threads: u32) -> Self {
        Self {
            grid: (blocks, 1, 1),
            block: (threads, 1, 1),
            shared: 0,
            cooperative: false,
            programmatic: false,
        }
    }
}

/// The addresses of a kernel's arguments: `arguments![a, b]`, for [`Function::launch`].
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => {
        [$((&raw const $argument).cast_mut().cast::<::std::ffi::c_void>()),*]
    };
}
pub(crate) use arguments;

impl Function {
    /// Lets the kernel use that many bytes of dynamic shared memory. It is never told fewer than before: another backend
    /// launches the same kernel with what it asked for.
    pub(crate) fn allow_shared(&self, bytes: u32) -> Result<()> {
        let mut allowed = self.allowed_shared.lock().unwrap_or_else(|e| e.into_inner());
        if bytes <= *allowed {
            return Ok(());
        }
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let value =
            i32::try_from(bytes).map_err(|_| Error::internal(crate::NAME, "shared memory past 2 GiB"))?;
        // SAFETY: the handle is held.
        call!(self.context.id(), cuFuncSetAttribute(self.raw, attribute, value))?;
        *allowed = bytes;
        Ok(())
    }

    /// Blocks of that many threads and bytes of dynamic shared memory that one multiprocessor holds at a time.
    pub(crate) fn blocks_per_multiprocessor(&self, threads: u32, shared: u32) -> Result<u32> {
        let mut blocks = 0;
        // SAFETY: the out pointer is valid and the handle is held.
        call!(
            self.context.id(),
            cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut blocks,
                self.raw,
                threads as i32,
                shared as usize
            )
        )?;
        Ok(u32::try_from(blocks).unwrap_or(0))
    }

    /// Launches the kernel. A grid without blocks launches nothing.
    ///
    /// # Safety
    /// `arguments` are the addresses of values of the types that the kernel takes, as many as it takes; every address
    /// among those values is device memory as large as the kernel uses, and nothing else touches it meanwhile except as
    /// the kernel expects.
    pub(crate) unsafe fn launch(
        &self,
        stream: &Stream,
        launch: Launch,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        if launch.grid.0 == 0 || launch.grid.1 == 0 || launch.grid.2 == 0 {
            return Ok(());
        }
        let attribute = |id, on: bool| {
            let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
            // Both attributes are one int at the start of the union.
            value.cooperative = i32::from(on);
            sys::CUlaunchAttribute {
                id,
                pad: [0; 4],
                value,
            }
        };
        let mut attributes = [
            attribute(
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE,
                launch.cooperative,
            ),
            attribute(
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                launch.programmatic,
            ),
        ];
        // The second is left out where it is not asked for: older devices refuse it.
        let count = if launch.programmatic { 2 } else { 1 };
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid.0,
            gridDimY: launch.grid.1,
            gridDimZ: launch.grid.2,
            blockDimX: launch.block.0,
            blockDimY: launch.block.1,
            blockDimZ: launch.block.2,
            sharedMemBytes: launch.shared,
            hStream: stream.raw(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count,
        };
        // SAFETY: the configuration and its attributes live until the call returns, which has copied them and the
        // arguments; the caller upholds the rest.
        let code =
            unsafe { sys::cuLaunchKernelEx(&config, self.raw, arguments.as_mut_ptr(), std::ptr::null_mut()) };
        check("cuLaunchKernelEx", code).map_err(|e| match e.on(self.context.id()) {
            Error::Internal { backend, what } => Error::Internal {
                backend,
                what: format!("kernel `{}`: {what}", self.kernel),
            },
            other => other,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_is_embedded_and_is_what_it_says() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/built");
        let mut built: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .filter_map(|e| {
                Some(
                    e.unwrap()
                        .file_name()
                        .to_str()?
                        .strip_suffix(".cubin")?
                        .to_owned(),
                )
            })
            .collect();
        built.sort();
        let mut embedded: Vec<&str> = EMBEDDED.iter().map(|e| e.name).collect();
        embedded.sort_unstable();
        assert_eq!(built, embedded);
        for e in EMBEDDED {
            assert_eq!(&e.cubin[..4], b"\x7fELF", "{}", e.name);
            assert!(e.ptx.contains(".version ") && e.ptx.ends_with('\0'), "{}", e.name);
        }
    }
}
