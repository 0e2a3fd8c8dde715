//! Adapters, and an open device whose errors are values.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use hoist_backend::{DeviceInfo, Error, Result};
use wgpu::{
    Adapter, Buffer, BufferDescriptor, BufferUsages, Device, DeviceType, ErrorFilter, Instance, Limits, Queue,
};

use crate::grids;
use crate::panics;
use crate::pipelines::Pipelines;

/// Storage buffers that one kernel binds.
const STORAGE_BUFFERS: u32 = 7;
/// Threads of the largest workgroup.
const INVOCATIONS: u32 = 256;
/// Bytes of workgroup memory of the kernel that uses most.
const WORKGROUP_BYTES: u32 = 16 << 10;

/// The one instance of this process: what drivers load, they load once.
fn instance() -> &'static Instance {
    static INSTANCE: OnceLock<Instance> = OnceLock::new();
    INSTANCE.get_or_init(|| {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
        Instance::new(descriptor)
    })
}

/// What an adapter of such limits lacks that the kernels need.
fn lacks(limits: &Limits) -> Option<String> {
    let needs = [
        (
            "storage buffers a kernel",
            limits.max_storage_buffers_per_shader_stage,
            STORAGE_BUFFERS,
        ),
        (
            "threads a workgroup",
            limits.max_compute_invocations_per_workgroup,
            INVOCATIONS,
        ),
        (
            "bytes of workgroup memory",
            limits.max_compute_workgroup_storage_size,
            WORKGROUP_BYTES,
        ),
    ];
    needs
        .into_iter()
        .find(|(_, has, needed)| has < needed)
        .map(|(what, has, needed)| format!("it has {has} {what}, and {needed} are needed"))
}

fn rank(adapter: &Adapter) -> u8 {
    match adapter.get_info().device_type {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    }
}

/// Every adapter that the kernels can run on, GPUs first.
///
/// # Errors
/// [`Error::Unavailable`] if there is none, with what the others lack.
pub(crate) fn adapters() -> Result<Vec<Adapter>> {
    let found = pollster::block_on(instance().enumerate_adapters(wgpu::Backends::all()));
    let found = found.into_iter().map(|adapter| {
        let (name, limits) = (adapter.get_info().name, adapter.limits());
        (adapter, name, limits)
    });
    let mut adapters = sufficient(found)?;
    adapters.sort_by_key(rank);
    Ok(adapters)
}

/// Those of some adapters that the kernels can run on.
fn sufficient<A>(found: impl IntoIterator<Item = (A, String, Limits)>) -> Result<Vec<A>> {
    let mut lacking = Vec::new();
    let mut adapters = Vec::new();
    for (adapter, name, limits) in found {
        match lacks(&limits) {
            None => adapters.push(adapter),
            Some(what) => lacking.push(format!("`{name}` does not suffice: {what}")),
        }
    }
    if !adapters.is_empty() {
        return Ok(adapters);
    }
    let reason = if lacking.is_empty() {
        "no Vulkan, Metal or DX12 adapter was found".into()
    } else {
        lacking.join("; ")
    };
    Err(Error::Unavailable {
        backend: crate::NAME.into(),
        reason,
        hint: Some(
            "install the GPU's Vulkan driver and libvulkan1; mesa-vulkan-drivers brings one that runs on the CPU"
                .into(),
        ),
    })
}

/// The id on the command line of adapter `ordinal`.
pub(crate) fn id(ordinal: u32) -> String {
    format!("{}:{ordinal}", crate::NAME)
}

/// Memory of an adapter in bytes: all, and what is free now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdapterMemory {
    pub(crate) total: u64,
    /// `None` if the driver does not say.
    pub(crate) free: Option<u64>,
}

/// Asks Vulkan for its device-local heaps.
#[cfg(not(target_vendor = "apple"))]
fn vulkan_memory(adapter: &Adapter) -> Option<AdapterMemory> {
    use ash::vk;
    // SAFETY: the handle is only asked about properties, and not kept.
    let hal = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let raw = hal.raw_physical_device();
    let instance = hal.shared_instance().raw_instance();
    // SAFETY: the physical device belongs to this instance, and both live as long as `hal`.
    let properties = unsafe { instance.get_physical_device_properties(raw) };
    // SAFETY: as above.
    let extensions = unsafe { instance.enumerate_device_extension_properties(raw) }.unwrap_or_default();
    let knows_budget = properties.api_version >= vk::API_VERSION_1_1
        && extensions
            .iter()
            .any(|e| e.extension_name_as_c_str() == Ok(ash::ext::memory_budget::NAME));
    let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
    let heaps = if knows_budget {
        let mut memory = vk::PhysicalDeviceMemoryProperties2::default().push_next(&mut budget);
        // SAFETY: as above; the chain holds a structure whose extension the device has.
        unsafe { instance.get_physical_device_memory_properties2(raw, &mut memory) };
        memory.memory_properties
    } else {
        // SAFETY: as above.
        unsafe { instance.get_physical_device_memory_properties(raw) }
    };
    let mut total = 0u64;
    let mut free = 0u64;
    for (i, heap) in heaps
        .memory_heaps
        .iter()
        .enumerate()
        .take(heaps.memory_heap_count as usize)
    {
        if heap.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL) {
            total = total.saturating_add(heap.size);
            let room = budget.heap_budget[i].saturating_sub(budget.heap_usage[i]);
            free = free.saturating_add(room.min(heap.size));
        }
    }
    Some(AdapterMemory {
        total,
        free: knows_budget.then_some(free),
    })
}

#[cfg(target_vendor = "apple")]
fn vulkan_memory(_: &Adapter) -> Option<AdapterMemory> {
    None
}

/// What is known of an adapter's memory; where no one says, its largest buffer stands for all of it.
pub(crate) fn memory(adapter: &Adapter) -> AdapterMemory {
    vulkan_memory(adapter).unwrap_or(AdapterMemory {
        total: adapter.limits().max_buffer_size,
        free: None,
    })
}

pub(crate) fn describe(ordinal: u32, adapter: &Adapter) -> DeviceInfo {
    let info = adapter.get_info();
    let limits = adapter.limits();
    let mut details = vec![
        ("api".to_string(), info.backend.to_str().to_string()),
        ("type".to_string(), format!("{:?}", info.device_type)),
    ];
    let driver = format!("{} {}", info.driver, info.driver_info);
    if !driver.trim().is_empty() {
        details.push(("driver".into(), driver.trim().into()));
    }
    details.push((
        "binding limit".into(),
        limits.max_storage_buffer_binding_size.to_string(),
    ));
    DeviceInfo {
        ordinal,
        id: id(ordinal),
        name: info.name,
        total_memory: memory(adapter).total,
        details,
    }
}

/// What went wrong outside of a call that could have said so.
#[derive(Debug)]
enum Failure {
    Lost(String),
    OutOfMemory(String),
    Other(String),
}

type Failures = Arc<Mutex<Option<Failure>>>;

fn lock(failures: &Failures) -> MutexGuard<'_, Option<Failure>> {
    failures.lock().unwrap_or_else(|e| e.into_inner())
}

/// An open device. Backends of one process share it, and with it what was compiled for it.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) adapter: Adapter,
    pub(crate) device: Device,
    pub(crate) queue: Queue,
    pub(crate) id: String,
    /// Most bytes that a kernel may see of one buffer; a multiple of 4096.
    pub(crate) binding_limit: u64,
    /// Workgroups of one dimension.
    pub(crate) most_groups: u32,
    /// Whether the adapter is a processor, which runs a workgroup's threads one after the other.
    pub(crate) is_cpu: bool,
    pub(crate) pipelines: Pipelines,
    grids: OnceLock<Buffer>,
    failures: Failures,
}

/// Devices that are open, by ordinal. They stay open: pipelines take longer to compile than anything else here.
fn open_devices() -> MutexGuard<'static, Vec<Arc<Gpu>>> {
    static OPEN: Mutex<Vec<Arc<Gpu>>> = Mutex::new(Vec::new());
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// The device of adapter `ordinal`: the one that is open already, unless it was lost.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without such an adapter, or if it cannot be opened.
    pub(crate) fn shared(ordinal: u32) -> Result<Arc<Self>> {
        let mut open = open_devices();
        open.retain(|gpu| !gpu.is_lost());
        let id = id(ordinal);
        if let Some(gpu) = open.iter().find(|gpu| gpu.id == id) {
            return Ok(Arc::clone(gpu));
        }
        let gpu = Arc::new(Self::open(ordinal)?);
        open.push(Arc::clone(&gpu));
        Ok(gpu)
    }

    /// A device of its own.
    pub(crate) fn open(ordinal: u32) -> Result<Self> {
        panics::hush();
        let adapters = adapters()?;
        let count = adapters.len();
        let adapter = adapters
            .into_iter()
            .nth(ordinal as usize)
            .ok_or_else(|| Error::Unavailable {
                backend: crate::NAME.into(),
                reason: format!("there is no adapter {ordinal}"),
                hint: Some(format!(
                    "there are {count}, from {} on; `hoist devices` lists them",
                    id(0)
                )),
            })?;
        let limits = adapter.limits();
        let request = adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("hoist"),
            required_features: wgpu::Features::empty(),
            required_limits: limits.clone(),
            experimental_features: wgpu::ExperimentalFeatures::disabled(),
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            trace: wgpu::Trace::Off,
        });
        let (device, queue) = pollster::block_on(request).map_err(|e| Error::Unavailable {
            backend: crate::NAME.into(),
            reason: format!("`{}` could not be opened: {e}", adapter.get_info().name),
            hint: None,
        })?;
        let failures = Failures::default();
        let lost = Arc::clone(&failures);
        device.set_device_lost_callback(move |_, message| *lock(&lost) = Some(Failure::Lost(message)));
        let uncaptured = Arc::clone(&failures);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            let failure = match error {
                wgpu::Error::OutOfMemory { source } => Failure::OutOfMemory(source.to_string()),
                wgpu::Error::Validation { description, .. } => Failure::Other(description),
                wgpu::Error::Internal { description, .. } => Failure::Other(description),
            };
            // The first one is the cause; the loss of the device outweighs all.
            lock(&uncaptured).get_or_insert(failure);
        }));
        let pipelines = Pipelines::new(&device);
        // Bindings are counted in words of 32 bits, and byte addresses are u32.
        let binding_limit = limits
            .max_storage_buffer_binding_size
            .min(limits.max_buffer_size)
            .min(u64::from(u32::MAX))
            / 4096
            * 4096;
        Ok(Self {
            is_cpu: adapter.get_info().device_type == DeviceType::Cpu,
            adapter,
            device,
            queue,
            id: id(ordinal),
            binding_limit,
            most_groups: limits.max_compute_workgroups_per_dimension,
            pipelines,
            grids: OnceLock::new(),
            failures,
        })
    }

    /// Code books, as kernels read them.
    pub(crate) fn grids(&self) -> Result<&Buffer> {
        if let Some(grids) = self.grids.get() {
            return Ok(grids);
        }
        let words = grids::words()?;
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST;
        let buffer = self.buffer("code books", 4 * words.len() as u64, usage)?;
        self.queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&words));
        Ok(self.grids.get_or_init(|| buffer))
    }

    fn is_lost(&self) -> bool {
        matches!(*lock(&self.failures), Some(Failure::Lost(_)))
    }

    /// Reports what went wrong since the last time; a lost device stays lost.
    pub(crate) fn check(&self, what: &str, needed: u64) -> Result<()> {
        let mut failure = lock(&self.failures);
        match failure.take() {
            None => Ok(()),
            Some(Failure::Lost(reason)) => {
                let error = self.lost(&reason);
                *failure = Some(Failure::Lost(reason));
                Err(error)
            }
            Some(Failure::OutOfMemory(reason)) => Err(self.out_of_memory(what, &reason, needed)),
            Some(Failure::Other(reason)) => Err(Error::internal(crate::NAME, format!("{what}: {reason}"))),
        }
    }

    /// As [`Gpu::check`], after a look at the device: that it is lost is told to nobody before.
    pub(crate) fn look(&self, what: &str, needed: u64) -> Result<()> {
        let polled = self.poll(wgpu::PollType::Poll);
        self.check(what, needed)?;
        polled
    }

    /// Runs callbacks of what is done, or of everything, when it is done. What went wrong meanwhile is said by
    /// [`Gpu::check`].
    pub(crate) fn poll(&self, until: wgpu::PollType) -> Result<()> {
        if self.is_lost() {
            return Ok(());
        }
        // wgpu panics where the driver says that the device is lost; it holds nothing then, and has called back.
        match panics::caught(|| self.device.poll(until)) {
            Ok(polled) => polled.map(|_| ()).map_err(|e| self.lost(&e.to_string())),
            Err(panic) => {
                let mut failure = lock(&self.failures);
                if !matches!(*failure, Some(Failure::Lost(_))) {
                    *failure = Some(Failure::Lost(panic));
                }
                Ok(())
            }
        }
    }

    pub(crate) fn lost(&self, reason: &str) -> Error {
        Error::DeviceLost {
            device: self.id.clone(),
            reason: if reason.is_empty() {
                "the driver gave no reason".into()
            } else {
                reason.into()
            },
        }
    }

    pub(crate) fn buffer(&self, what: &str, bytes: u64, usage: BufferUsages) -> Result<Buffer> {
        self.buffer_of(what, bytes, usage, false)
    }

    /// Mapped from the start, to be written.
    pub(crate) fn mapped_buffer(&self, what: &str, bytes: u64) -> Result<Buffer> {
        self.buffer_of(
            what,
            bytes,
            BufferUsages::MAP_WRITE | BufferUsages::COPY_SRC,
            true,
        )
    }

    fn buffer_of(&self, what: &str, bytes: u64, usage: BufferUsages, mapped: bool) -> Result<Buffer> {
        // What one backend cannot have is not told to another that shares the device.
        let scope = self.device.push_error_scope(ErrorFilter::OutOfMemory);
        let buffer = self.device.create_buffer(&BufferDescriptor {
            label: Some(what),
            // No API has empty buffers, and kernels read vectors of four words.
            size: bytes.max(16).checked_next_multiple_of(16).unwrap_or(u64::MAX),
            usage,
            mapped_at_creation: mapped,
        });
        if let Some(error) = pollster::block_on(scope.pop()) {
            // A lost device cannot allocate either.
            self.check(what, bytes)?;
            return Err(self.out_of_memory(what, &error.to_string(), bytes));
        }
        self.look(what, bytes)?;
        Ok(buffer)
    }

    fn out_of_memory(&self, what: &str, reason: &str, needed: u64) -> Error {
        Error::OutOfMemory {
            device: self.id.clone(),
            what: format!("{what} ({reason})"),
            needed,
            available: memory(&self.adapter).free.unwrap_or(0),
        }
    }

    /// Waits until everything that was submitted is done.
    pub(crate) fn wait(&self, what: &str) -> Result<()> {
        let polled = self.poll(wgpu::PollType::wait_indefinitely());
        self.check(what, 0)?;
        polled
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arithmetic_tests::gpu;

    #[test]
    fn a_device_that_is_lost_stays_lost_and_is_named() {
        let Some(gpu) = gpu() else { return };
        assert!(gpu.check("nothing", 0).is_ok());
        gpu.device.destroy();
        for _ in 0..2 {
            let error = gpu.buffer("anything", 64, BufferUsages::COPY_DST).map(|_| ());
            match error {
                Err(Error::DeviceLost { device, reason }) => {
                    assert_eq!(device, gpu.id);
                    assert!(!reason.is_empty());
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn an_open_device_is_shared_until_it_is_lost() {
        if gpu().is_none() {
            return;
        }
        let first = Gpu::shared(0).unwrap();
        assert!(Arc::ptr_eq(&first, &Gpu::shared(0).unwrap()));
        *lock(&first.failures) = Some(Failure::Lost("as a test asked".into()));
        let second = Gpu::shared(0).unwrap();
        assert!(!Arc::ptr_eq(&first, &second));
        assert!(second.check("nothing", 0).is_ok());
    }

    #[test]
    fn adapters_that_lack_something_are_unavailable_and_it_is_named() {
        let enough = Limits {
            max_storage_buffers_per_shader_stage: STORAGE_BUFFERS,
            max_compute_invocations_per_workgroup: INVOCATIONS,
            max_compute_workgroup_storage_size: WORKGROUP_BYTES,
            ..Limits::default()
        };
        let few = Limits {
            max_storage_buffers_per_shader_stage: STORAGE_BUFFERS - 1,
            ..enough.clone()
        };
        let found = |limits: &[&Limits]| {
            let adapters = (0..).zip(limits);
            sufficient(adapters.map(|(i, limits)| (i, format!("adapter {i}"), (*limits).clone())))
        };
        assert_eq!(found(&[&few, &enough]).unwrap(), [1]);
        for (limits, said) in [
            (&[][..], "was found"),
            (&[&few], "`adapter 0` does not suffice: it has 6 storage buffers"),
        ] {
            match found(limits) {
                Err(Error::Unavailable {
                    reason,
                    hint: Some(_),
                    ..
                }) => assert!(reason.contains(said), "{reason}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_mistake_of_ours_is_an_internal_error_once() {
        let Some(gpu) = gpu() else { return };
        // No buffer can be mapped for reading and used as storage.
        let usage = BufferUsages::MAP_READ | BufferUsages::STORAGE;
        let error = gpu.buffer("a mistake", 64, usage).map(|_| ());
        assert!(matches!(error, Err(Error::Internal { .. })), "{error:?}");
        assert!(gpu.check("nothing", 0).is_ok());
    }

    #[test]
    fn an_allocation_beyond_the_device_is_refused() {
        let Some(gpu) = gpu() else { return };
        let error = gpu
            .buffer("too much", u64::MAX / 4, BufferUsages::STORAGE)
            .map(|_| ());
        assert!(error.is_err(), "{error:?}");
        assert!(gpu.check("nothing", 0).is_ok());
    }
}
