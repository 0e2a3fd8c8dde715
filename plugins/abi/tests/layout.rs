//! Size, alignment and offset of every field, as committed in `layout.txt`: seen by Rust, by C11 and by C++17.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use hoist_plugin_abi::*;

const COMMITTED: &str = include_str!("layout.txt");

macro_rules! layouts {
    ($($t:ident $c:ident { $($f:ident),* $(,)? }),* $(,)?) => {
        /// One line a struct, and one a field: C name, offset, size.
        fn layout() -> String {
            let mut text = String::new();
            $(
                writeln!(text, "{} size {} align {}", stringify!($c), size_of::<$t>(), align_of::<$t>()).unwrap();
                let mut end = 0;
                $(
                    let (offset, size) = (std::mem::offset_of!($t, $f), field_size(|t: &$t| &raw const t.$f));
                    assert_eq!(offset, end, "implicit padding, or a field that is not listed, before {}::{}",
                        stringify!($t), stringify!($f));
                    end = offset + size;
                    writeln!(text, "    {} offset {offset} size {size}", c_name(stringify!($f))).unwrap();
                )*
                assert_eq!(end, size_of::<$t>(), "padding at the end of {}", stringify!($t));
            )*
            text
        }
    };
}

fn field_size<T, F>(_: fn(&T) -> *const F) -> usize {
    size_of::<F>()
}

/// What a word is in C that C++ has taken.
fn c_name(field: &str) -> &str {
    if field == "class" { "class_" } else { field }
}

layouts! {
    ErrorRecord hoist_error {struct_size, code, native_code, flags, tensor, byte_offset, needed, available, message},
    HeaderV1 hoist_plugin_header_v1 {magic, header_size, abi_major, abi_minor_min, abi_minor_max, flags, pointer_width, target, name, vendor, version, build_id, reserved},
    Host hoist_host {struct_size, minor, context, log},
    Tensor hoist_tensor {struct_size, id, layer, role, class, encoding, layout, granule, matrices, rows, cols, nbytes, resident_bytes, name, name_len},
    PlanV hoist_plan {struct_size, layers, tensors, tensor_count, tensor_size, nbytes, resident_bytes},
    Refusal hoist_refusal {tensor, code, reason},
    PlanReport hoist_plan_report {struct_size, reserved, bytes, refusals, refusal_capacity, refusal_count},
    Chunk hoist_chunk {struct_size, tensor, offset, data, len, semantics, reserved},
    LoadReceipt hoist_load_receipt {struct_size, tensors, bytes, imported},
    LoadCallbacks hoist_load_callbacks {struct_size, reserved, context, read_at, progress},
    IndexEntry hoist_index_entry {layer, role, slot, tensor},
    IndexLayout hoist_index_layout {struct_size, layers, entries, entry_count},
    IndexReceipt hoist_index_receipt {struct_size, layers, entries, reserved, bytes},
    Capacity hoist_capacity {max_context, max_sequences, max_batch_tokens, kv_dtype},
    KvSpec hoist_kv_spec {kv_heads, head_dim},
    ValueSpec hoist_value_spec {kind, width, vectors, reserved},
    WorkspaceDims hoist_workspace_dims {struct_size, vocab, capacity, kv, kv_count, values, value_count, table_bytes},
    WorkspaceBytes hoist_workspace_bytes {struct_size, reserved, kv, workspace},
    WeightRef hoist_weight_ref {layer, role},
    Op hoist_op {struct_size, op, layer, reserved, inputs, outputs, weights, integers, floats},
    Table hoist_table {rows, cols, data},
    Program hoist_program {struct_size, vocab, max_context, logits, kv, kv_count, values, value_count, ops, op_count, op_size, tail, tables, table_count},
    Run hoist_run {sequence, token_count, tokens, want},
    Batch hoist_batch {struct_size, reserved, runs, run_count},
    Outputs hoist_outputs {struct_size, reserved, argmax, argmax_count, logits, logits_count},
    DeviceInfo hoist_device_info {struct_size, ordinal, id, name, total_memory},
    OpenOptions hoist_open_options {struct_size, flags, memory_budget, threads, reserved},
    Caps hoist_caps {struct_size, numerics, stored, computed, ops, float_layout, max_batch_tokens, max_sequences, max_context, max_weight_bytes, weight_alignment, quantized_row_bytes, quantized_segment_bytes, index_entry_bytes, max_row_bytes},
    DeviceMemory hoist_device_memory {struct_size, reserved, total, free, budget, resident, imported},
    Plugin hoist_plugin {struct_size, reserved, device_count, device_info, device_open, caps, memory_info, plan_check, load_begin, upload, load_commit, load_abort, readback, model_destroy, device_close, shutdown, build_index, workspace_bytes, workspace_create, prepare, forward, truncate, load_from, digest, cancel, stats}
}

#[test]
fn the_layout_is_the_committed_one_and_has_no_padding() {
    assert_eq!(
        layout(),
        COMMITTED,
        "the interface changed: old plugins would misread it"
    );
}

/// A translation unit that asserts every line of the committed layout.
fn assertions(assert: &str, align: &str) -> String {
    let mut source =
        "#include <stddef.h>\n#include \"hoist_plugin.h\"\n#include \"hoist_plugin.h\"\n".to_owned();
    let mut current = "";
    for line in COMMITTED.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            [name, "size", size, "align", of] => {
                current = name;
                writeln!(source, "{assert}(sizeof({name}) == {size}, \"size of {name}\");").unwrap();
                writeln!(
                    source,
                    "{assert}({align}({name}) == {of}, \"alignment of {name}\");"
                )
                .unwrap();
            }
            [field, "offset", offset, "size", size] => {
                writeln!(
                    source,
                    "{assert}(offsetof({current}, {field}) == {offset}, \"offset of {current}.{field}\");"
                )
                .unwrap();
                writeln!(
                    source,
                    "{assert}(sizeof((({current} *)0)->{field}) == {size}, \"size of {current}.{field}\");"
                )
                .unwrap();
            }
            _ => panic!("a line of layout.txt is neither a struct nor a field: {line}"),
        }
    }
    source
}

fn include() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../include")
}

/// Compiles a file with all warnings as errors; tells visibly if there is no compiler, which is a failure in CI.
fn compiles(compiler: &str, standard: &str, file: &str, source: &str) {
    if Command::new(compiler).arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "no {compiler} in CI");
        eprintln!("SKIPPED: no {compiler} on this machine");
        return;
    }
    let folder = std::env::temp_dir().join(format!("hoist-layout-{}-{compiler}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join(file);
    std::fs::write(&path, source).unwrap();
    let output = Command::new(compiler)
        .args([
            standard,
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-fsyntax-only",
            "-I",
        ])
        .arg(include())
        .arg(&path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(output.status.success(), "{compiler} {standard}: {said}");
}

#[test]
fn the_header_is_c11_of_the_committed_layout() {
    compiles(
        "cc",
        "-std=c11",
        "layout.c",
        &assertions("_Static_assert", "_Alignof"),
    );
}

#[test]
fn the_header_is_cpp17_of_the_committed_layout() {
    compiles(
        "c++",
        "-std=c++17",
        "layout.cpp",
        &assertions("static_assert", "alignof"),
    );
}

#[test]
fn the_helpers_are_c11() {
    let source = "#include \"hoist_plugin_helpers.h\"\nHOIST_PLUGIN(\"n\", \"v\", \"1\", \"t\");\n";
    compiles("cc", "-std=c11", "helpers.c", source);
}

#[test]
fn the_agreed_minor_is_the_newest_that_both_know() {
    const NEWEST: u32 = 6;
    let ranges = || (0..=NEWEST).flat_map(|min| (0..=NEWEST).map(move |max| (min, max)));
    for host in ranges() {
        for plugin in ranges() {
            let common =
                |minor: &u32| (host.0..=host.1).contains(minor) && (plugin.0..=plugin.1).contains(minor);
            let newest = (0..=NEWEST).filter(common).max();
            assert_eq!(
                negotiate(host, plugin),
                newest,
                "host {host:?}, plugin {plugin:?}"
            );
            assert_eq!(negotiate(host, plugin), negotiate(plugin, host));
        }
    }
}
