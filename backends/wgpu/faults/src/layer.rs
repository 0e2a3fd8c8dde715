//! The layer: how it stands between the loader and the driver, and the calls it answers itself.

use std::ffi::{CStr, c_char, c_void};
use std::sync::OnceLock;

use ash::vk;

use crate::faults::{self, Faults};

/// The version of the interface between loader and layers that has the call below.
const INTERFACE: u32 = 2;

/// `VkNegotiateLayerInterface` of `vk_layer.h`.
#[repr(C)]
pub(crate) struct NegotiateLayerInterface {
    s_type: u32,
    next: *mut c_void,
    version: u32,
    instance_proc_addr: Option<vk::PFN_vkGetInstanceProcAddr>,
    device_proc_addr: Option<vk::PFN_vkGetDeviceProcAddr>,
    physical_device_proc_addr: vk::PFN_vkVoidFunction,
}

/// `VkLayerInstanceLink` and, with another second function, `VkLayerDeviceLink`.
#[repr(C)]
struct Link {
    next: *mut Link,
    instance_proc_addr: vk::PFN_vkGetInstanceProcAddr,
    other_proc_addr: vk::PFN_vkVoidFunction,
}

/// `VkLayerInstanceCreateInfo` and `VkLayerDeviceCreateInfo`, as far as they say who comes next.
#[repr(C)]
struct LayerCreateInfo {
    s_type: vk::StructureType,
    next: *const c_void,
    function: u32,
    link: *mut Link,
}

/// `VK_LAYER_LINK_INFO`
const LINK_INFO: u32 = 0;

/// Functions of whoever comes next.
static NEXT_INSTANCE: OnceLock<vk::PFN_vkGetInstanceProcAddr> = OnceLock::new();
static NEXT_DEVICE: OnceLock<vk::PFN_vkGetDeviceProcAddr> = OnceLock::new();
static ALLOCATE_MEMORY: OnceLock<vk::PFN_vkAllocateMemory> = OnceLock::new();
static QUEUE_SUBMIT: OnceLock<vk::PFN_vkQueueSubmit> = OnceLock::new();
static WAIT_FOR_FENCES: OnceLock<vk::PFN_vkWaitForFences> = OnceLock::new();
static WAIT_SEMAPHORES: OnceLock<vk::PFN_vkWaitSemaphores> = OnceLock::new();
static SEMAPHORE_COUNTER: OnceLock<vk::PFN_vkGetSemaphoreCounterValue> = OnceLock::new();
static PROPERTIES: OnceLock<vk::PFN_vkGetPhysicalDeviceProperties> = OnceLock::new();
static PROPERTIES_2: OnceLock<vk::PFN_vkGetPhysicalDeviceProperties2> = OnceLock::new();

/// Tells the loader where the layer's functions are.
///
/// # Safety
/// `interface` is null or the loader's structure.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "system" fn vkNegotiateLoaderLayerInterfaceVersion(
    interface: *mut NegotiateLayerInterface,
) -> vk::Result {
    // SAFETY: the loader's, and nobody else's during the call.
    let Some(interface) = (unsafe { interface.as_mut() }) else {
        return vk::Result::ERROR_INITIALIZATION_FAILED;
    };
    if interface.version < INTERFACE || Faults::of_process().is_none() {
        return vk::Result::ERROR_INITIALIZATION_FAILED;
    }
    interface.version = INTERFACE;
    interface.instance_proc_addr = Some(instance_proc_addr);
    interface.device_proc_addr = Some(device_proc_addr);
    interface.physical_device_proc_addr = None;
    vk::Result::SUCCESS
}

/// Finds who comes next among a chain of structures, and moves the link on, for them to find who follows.
///
/// # Safety
/// `chain` is the `pNext` of a create info that the loader made.
unsafe fn take_link(chain: *const c_void, s_type: vk::StructureType) -> Option<&'static Link> {
    let mut at = chain.cast_mut().cast::<LayerCreateInfo>();
    loop {
        // SAFETY: every structure of a chain starts with its type and the next one; those of this type are the loader's,
        // and so made to be written.
        let info = unsafe { at.as_mut() }?;
        if info.s_type == s_type && info.function == LINK_INFO {
            // SAFETY: the loader keeps links for the length of the call; what is copied from them lives on.
            let link = unsafe { info.link.as_ref() }?;
            info.link = link.next;
            return Some(link);
        }
        at = info.next.cast_mut().cast();
    }
}

unsafe extern "system" fn create_instance(
    info: *const vk::InstanceCreateInfo<'_>,
    allocator: *const vk::AllocationCallbacks<'_>,
    instance: *mut vk::Instance,
) -> vk::Result {
    // SAFETY: the loader passes a valid structure.
    let chain = unsafe { (*info).p_next };
    // SAFETY: the loader made the chain.
    let link = unsafe { take_link(chain, vk::StructureType::LOADER_INSTANCE_CREATE_INFO) };
    let Some(link) = link else {
        return vk::Result::ERROR_INITIALIZATION_FAILED;
    };
    let next = *NEXT_INSTANCE.get_or_init(|| link.instance_proc_addr);
    // SAFETY: a name that ends with zero.
    let create = unsafe { next(vk::Instance::null(), c"vkCreateInstance".as_ptr()) };
    let Some(create) = create else {
        return vk::Result::ERROR_INITIALIZATION_FAILED;
    };
    // SAFETY: it has that type by its name.
    let create =
        unsafe { std::mem::transmute::<unsafe extern "system" fn(), vk::PFN_vkCreateInstance>(create) };
    // SAFETY: the caller's arguments, handed on.
    unsafe { create(info, allocator, instance) }
}

unsafe extern "system" fn create_device(
    adapter: vk::PhysicalDevice,
    info: *const vk::DeviceCreateInfo<'_>,
    allocator: *const vk::AllocationCallbacks<'_>,
    device: *mut vk::Device,
) -> vk::Result {
    // SAFETY: the loader passes a valid structure.
    let chain = unsafe { (*info).p_next };
    // SAFETY: the loader made the chain.
    let link = unsafe { take_link(chain, vk::StructureType::LOADER_DEVICE_CREATE_INFO) };
    let Some((link, of_device)) = link.and_then(|link| Some((link, link.other_proc_addr?))) else {
        return vk::Result::ERROR_INITIALIZATION_FAILED;
    };
    // SAFETY: in a link of devices the second function is this one.
    let of_device =
        unsafe { std::mem::transmute::<unsafe extern "system" fn(), vk::PFN_vkGetDeviceProcAddr>(of_device) };
    NEXT_DEVICE.get_or_init(|| of_device);
    // SAFETY: a name that ends with zero.
    let create = unsafe { (link.instance_proc_addr)(vk::Instance::null(), c"vkCreateDevice".as_ptr()) };
    let Some(create) = create else {
        return vk::Result::ERROR_INITIALIZATION_FAILED;
    };
    // SAFETY: it has that type by its name.
    let create =
        unsafe { std::mem::transmute::<unsafe extern "system" fn(), vk::PFN_vkCreateDevice>(create) };
    // SAFETY: the caller's arguments, handed on.
    unsafe { create(adapter, info, allocator, device) }
}

/// Takes from an adapter's limits what a test asked for.
fn shrink(limits: &mut vk::PhysicalDeviceLimits) {
    let Some(faults) = Faults::of_process() else {
        return;
    };
    if let Some(most) = faults.storage_buffers {
        let has = &mut limits.max_per_stage_descriptor_storage_buffers;
        *has = most.min(*has);
    }
    if let Some(most) = faults.storage_range {
        limits.max_storage_buffer_range = most.min(limits.max_storage_buffer_range);
    }
}

unsafe extern "system" fn properties(adapter: vk::PhysicalDevice, out: *mut vk::PhysicalDeviceProperties) {
    let Some(next) = PROPERTIES.get() else { return };
    // SAFETY: the caller's arguments, handed on.
    unsafe { next(adapter, out) };
    // SAFETY: the caller's structure, just filled.
    shrink(unsafe { &mut (*out).limits });
}

unsafe extern "system" fn properties_2(
    adapter: vk::PhysicalDevice,
    out: *mut vk::PhysicalDeviceProperties2<'_>,
) {
    let Some(next) = PROPERTIES_2.get() else { return };
    // SAFETY: the caller's arguments, handed on.
    unsafe { next(adapter, out) };
    // SAFETY: the caller's structure, just filled.
    shrink(unsafe { &mut (*out).properties.limits });
}

unsafe extern "system" fn allocate_memory(
    device: vk::Device,
    info: *const vk::MemoryAllocateInfo<'_>,
    allocator: *const vk::AllocationCallbacks<'_>,
    memory: *mut vk::DeviceMemory,
) -> vk::Result {
    match ALLOCATE_MEMORY.get() {
        Some(next) if !Faults::of_process().is_some_and(Faults::refuses_allocation) => {
            // SAFETY: the caller's arguments, handed on.
            unsafe { next(device, info, allocator, memory) }
        }
        _ => vk::Result::ERROR_OUT_OF_DEVICE_MEMORY,
    }
}

unsafe extern "system" fn queue_submit(
    queue: vk::Queue,
    count: u32,
    submits: *const vk::SubmitInfo<'_>,
    fence: vk::Fence,
) -> vk::Result {
    match QUEUE_SUBMIT.get() {
        Some(next) if !Faults::of_process().is_some_and(Faults::loses_device) => {
            // SAFETY: the caller's arguments, handed on.
            unsafe { next(queue, count, submits, fence) }
        }
        _ => vk::Result::ERROR_DEVICE_LOST,
    }
}

unsafe extern "system" fn wait_for_fences(
    device: vk::Device,
    count: u32,
    fences: *const vk::Fence,
    all: vk::Bool32,
    timeout: u64,
) -> vk::Result {
    match WAIT_FOR_FENCES.get() {
        // SAFETY: the caller's arguments, handed on.
        Some(next) if !faults::is_lost() => unsafe { next(device, count, fences, all, timeout) },
        _ => vk::Result::ERROR_DEVICE_LOST,
    }
}

unsafe extern "system" fn wait_semaphores(
    device: vk::Device,
    info: *const vk::SemaphoreWaitInfo<'_>,
    timeout: u64,
) -> vk::Result {
    match WAIT_SEMAPHORES.get() {
        // SAFETY: the caller's arguments, handed on.
        Some(next) if !faults::is_lost() => unsafe { next(device, info, timeout) },
        _ => vk::Result::ERROR_DEVICE_LOST,
    }
}

unsafe extern "system" fn semaphore_counter(
    device: vk::Device,
    semaphore: vk::Semaphore,
    value: *mut u64,
) -> vk::Result {
    match SEMAPHORE_COUNTER.get() {
        // SAFETY: the caller's arguments, handed on.
        Some(next) if !faults::is_lost() => unsafe { next(device, semaphore, value) },
        _ => vk::Result::ERROR_DEVICE_LOST,
    }
}

/// Keeps the next layer's function of a name and gives ours in its place; nothing if the next one has none.
macro_rules! ours {
    ($next:expr, $keep:ident, $ours:ident, $kind:ty) => {{
        let next: unsafe extern "system" fn() = $next?;
        // SAFETY: it has that type by its name.
        $keep.get_or_init(|| unsafe { std::mem::transmute::<unsafe extern "system" fn(), $kind>(next) });
        here!($ours, $kind)
    }};
}

/// One of our functions, as the loader takes it.
macro_rules! here {
    ($ours:ident, $kind:ty) => {{
        let ours: $kind = $ours;
        // SAFETY: whoever calls it does so by its own type.
        Some(unsafe { std::mem::transmute::<$kind, unsafe extern "system" fn()>(ours) })
    }};
}

unsafe extern "system" fn instance_proc_addr(
    instance: vk::Instance,
    name: *const c_char,
) -> vk::PFN_vkVoidFunction {
    // SAFETY: the loader passes a name that ends with zero.
    let known = unsafe { CStr::from_ptr(name) };
    if known == c"vkGetInstanceProcAddr" {
        return here!(instance_proc_addr, vk::PFN_vkGetInstanceProcAddr);
    }
    if known == c"vkCreateInstance" {
        return here!(create_instance, vk::PFN_vkCreateInstance);
    }
    if known == c"vkCreateDevice" {
        return here!(create_device, vk::PFN_vkCreateDevice);
    }
    if known == c"vkGetDeviceProcAddr" {
        return here!(device_proc_addr, vk::PFN_vkGetDeviceProcAddr);
    }
    // SAFETY: the caller's arguments, handed on.
    let next = unsafe { NEXT_INSTANCE.get()?(instance, name) };
    match known.to_bytes() {
        b"vkGetPhysicalDeviceProperties" => {
            ours!(
                next,
                PROPERTIES,
                properties,
                vk::PFN_vkGetPhysicalDeviceProperties
            )
        }
        b"vkGetPhysicalDeviceProperties2" | b"vkGetPhysicalDeviceProperties2KHR" => {
            ours!(
                next,
                PROPERTIES_2,
                properties_2,
                vk::PFN_vkGetPhysicalDeviceProperties2
            )
        }
        _ => next,
    }
}

unsafe extern "system" fn device_proc_addr(
    device: vk::Device,
    name: *const c_char,
) -> vk::PFN_vkVoidFunction {
    // SAFETY: the loader passes a name that ends with zero.
    let known = unsafe { CStr::from_ptr(name) };
    if known == c"vkGetDeviceProcAddr" {
        return here!(device_proc_addr, vk::PFN_vkGetDeviceProcAddr);
    }
    // SAFETY: the caller's arguments, handed on.
    let next = unsafe { NEXT_DEVICE.get()?(device, name) };
    match known.to_bytes() {
        b"vkAllocateMemory" => ours!(next, ALLOCATE_MEMORY, allocate_memory, vk::PFN_vkAllocateMemory),
        b"vkQueueSubmit" => ours!(next, QUEUE_SUBMIT, queue_submit, vk::PFN_vkQueueSubmit),
        b"vkWaitForFences" => ours!(next, WAIT_FOR_FENCES, wait_for_fences, vk::PFN_vkWaitForFences),
        b"vkWaitSemaphores" | b"vkWaitSemaphoresKHR" => {
            ours!(next, WAIT_SEMAPHORES, wait_semaphores, vk::PFN_vkWaitSemaphores)
        }
        b"vkGetSemaphoreCounterValue" | b"vkGetSemaphoreCounterValueKHR" => ours!(
            next,
            SEMAPHORE_COUNTER,
            semaphore_counter,
            vk::PFN_vkGetSemaphoreCounterValue
        ),
        _ => next,
    }
}
