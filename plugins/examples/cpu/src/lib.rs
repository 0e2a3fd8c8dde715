//! The CPU reference as a plugin: the same backend, through the interface that vendors use.

hoist_plugin_sdk::export_backend! {
    provider: hoist_cpu::CpuProvider,
    name: "cpu",
    vendor: "Hoist",
    decodes: true,
}
