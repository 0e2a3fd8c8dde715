//! Compiled kernels.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard};

use hoist_backend::{Error, Result};
use wgpu::{
    BindGroup, BindGroupDescriptor, BindGroupEntry, BindGroupLayout, BindGroupLayoutDescriptor,
    BindGroupLayoutEntry, BindingResource, BindingType, Buffer, BufferBinding, BufferBindingType, BufferSize,
    ComputePipeline, ComputePipelineDescriptor, Device, PipelineCompilationOptions, PipelineLayout,
    PipelineLayoutDescriptor, ShaderModuleDescriptor, ShaderRuntimeChecks, ShaderSource, ShaderStages,
};

use crate::device::Gpu;
use crate::shaders::Kernel;

/// Bytes of a kernel's parameters.
pub(crate) const PARAMETER_BYTES: u64 = 256;

/// What a kernel binds; `common.wgsl` says the same.
#[derive(Clone, Debug)]
pub(crate) struct Bindings<'a> {
    pub(crate) parameters: (&'a Buffer, u64),
    /// The list of rows, from some byte on.
    pub(crate) batch: (&'a Buffer, u64, u64),
    pub(crate) work: &'a Buffer,
    pub(crate) weights: &'a Buffer,
    pub(crate) second: &'a Buffer,
    pub(crate) tables: &'a Buffer,
    pub(crate) cache: &'a Buffer,
    pub(crate) status: &'a Buffer,
}

/// Pipelines of a device, for every backend that has it open.
#[derive(Debug)]
pub(crate) struct Pipelines {
    bind_group: BindGroupLayout,
    layout: PipelineLayout,
    made: Mutex<HashMap<Kernel, ComputePipeline>>,
}

impl Pipelines {
    pub(crate) fn new(device: &Device) -> Self {
        let storage = |read_only| BufferBindingType::Storage { read_only };
        let types = [
            BufferBindingType::Uniform,
            storage(true),
            storage(false),
            storage(true),
            storage(true),
            storage(true),
            storage(false),
            storage(false),
        ];
        let entries: Vec<_> = (0u32..)
            .zip(types)
            .map(|(binding, ty)| BindGroupLayoutEntry {
                binding,
                visibility: ShaderStages::COMPUTE,
                ty: BindingType::Buffer {
                    ty,
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let bind_group = device.create_bind_group_layout(&BindGroupLayoutDescriptor {
            label: Some("kernels"),
            entries: &entries,
        });
        let layout = device.create_pipeline_layout(&PipelineLayoutDescriptor {
            label: Some("kernels"),
            bind_group_layouts: &[Some(&bind_group)],
            immediate_size: 0,
        });
        Self {
            bind_group,
            layout,
            made: Mutex::default(),
        }
    }

    fn made(&self) -> MutexGuard<'_, HashMap<Kernel, ComputePipeline>> {
        self.made.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Compiles those of some kernels that have not been, on all processors.
    pub(crate) fn prepare(&self, gpu: &Gpu, kernels: HashSet<Kernel>) -> Result<()> {
        let missing: Vec<Kernel> = {
            let made = self.made();
            kernels.into_iter().filter(|k| !made.contains_key(k)).collect()
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let queue = Mutex::new(missing.iter());
        let failed = Mutex::new(None);
        let work = || {
            loop {
                let next = queue.lock().unwrap_or_else(|e| e.into_inner()).next();
                let Some(kernel) = next else { return };
                if let Err(error) = self.kernel(gpu, *kernel) {
                    failed
                        .lock()
                        .unwrap_or_else(|e| e.into_inner())
                        .get_or_insert(error);
                    return;
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads.min(missing.len()) {
                // A thread that cannot be started is one fewer.
                let _ = std::thread::Builder::new()
                    .name("hoist-compile".into())
                    .spawn_scoped(scope, work);
            }
            work();
        });
        failed
            .into_inner()
            .unwrap_or_else(|e| e.into_inner())
            .map_or(Ok(()), Err)
    }

    /// The pipeline of a kernel, compiled when it is first asked for.
    pub(crate) fn kernel(&self, gpu: &Gpu, kernel: Kernel) -> Result<ComputePipeline> {
        if let Some(made) = self.made().get(&kernel) {
            return Ok(made.clone());
        }
        let source = kernel
            .source()
            .ok_or_else(|| Error::internal(crate::NAME, format!("no kernel {kernel:?}")))?;
        let pipeline = self.compile(gpu, source, kernel.entry())?;
        Ok(self.made().entry(kernel).or_insert(pipeline).clone())
    }

    /// Compiles a module of ours.
    pub(crate) fn compile(&self, gpu: &Gpu, source: String, entry: &'static str) -> Result<ComputePipeline> {
        let mut checks = ShaderRuntimeChecks::checked();
        // Kernels are ours: each of their loops ends, and no divisor of theirs is zero.
        checks.force_loop_bounding = false;
        checks.int_div_checks = false;
        let descriptor = ShaderModuleDescriptor {
            label: Some(entry),
            source: ShaderSource::Wgsl(source.into()),
        };
        // SAFETY: no kernel loops without end: every loop counts towards a bound, and halves or doubles what it counts
        // in. Divisors are literals or sizes that the compiler of programs has found to be positive. Accesses stay checked.
        let module = unsafe { gpu.device.create_shader_module_trusted(descriptor, checks) };
        let pipeline = gpu.device.create_compute_pipeline(&ComputePipelineDescriptor {
            label: Some(entry),
            layout: Some(&self.layout),
            module: &module,
            entry_point: Some(entry),
            compilation_options: PipelineCompilationOptions {
                // Every kernel writes workgroup memory before it reads it.
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        gpu.check(entry, 0)?;
        Ok(pipeline)
    }

    pub(crate) fn bind(&self, gpu: &Gpu, to: &Bindings<'_>) -> Result<BindGroup> {
        let part =
            |(buffer, offset): (&'_ Buffer, u64), size: u64| (buffer.clone(), offset, BufferSize::new(size));
        let whole = |buffer: &Buffer| (buffer.clone(), 0, None);
        let bound = [
            part(to.parameters, PARAMETER_BYTES),
            part((to.batch.0, to.batch.1), to.batch.2),
            whole(to.work),
            whole(to.weights),
            whole(to.second),
            whole(to.tables),
            whole(to.cache),
            whole(to.status),
        ];
        let entries: Vec<_> = (0u32..)
            .zip(&bound)
            .map(|(binding, (buffer, offset, size))| BindGroupEntry {
                binding,
                resource: BindingResource::Buffer(BufferBinding {
                    buffer,
                    offset: *offset,
                    size: *size,
                }),
            })
            .collect();
        let group = gpu.device.create_bind_group(&BindGroupDescriptor {
            label: None,
            layout: &self.bind_group,
            entries: &entries,
        });
        gpu.check("bindings", 0)?;
        Ok(group)
    }
}
