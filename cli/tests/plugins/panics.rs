//! A Rust plugin whose author's code panics in each function: the SDK turns it into a status, the host into a typed error.

use hoist_core::backend::{
    Error as BackendError, OpenOptions, Outputs, Provider, Run, SequenceId, TokenBatch, Unwatched, Want,
    WeightBackend, WorkspaceDims,
};
use hoist_core::orchestrator::{
    DecodeOptions, Error as LoadError, FileSource, LoadOptions, OpenedModel, load, plan_for,
};
use hoist_plugin_host::{Candidate, PluginProvider, Probe};

use crate::support::{cargo_built, hoist, root};

/// Every function of the interface that reaches the author's code, and the commands that call it.
const ENTRIES: &[(&str, &[&str])] = &[
    ("open", LOAD),
    ("device_count", LOAD),
    ("device_info", LOAD),
    ("device_open", LOAD),
    ("caps", LOAD),
    ("memory_info", LOAD),
    ("plan_check", LOAD),
    ("load_begin", LOAD),
    ("upload", LOAD),
    ("load_from", LOAD),
    ("load_commit", LOAD),
    ("load_abort", LOAD),
    ("digest", LOAD),
    ("readback", LOAD),
    ("build_index", LOAD),
    ("workspace_bytes", LOAD),
    ("workspace_create", LOAD),
    ("prepare", DECODE),
    ("forward", DECODE),
    ("truncate", DECODE),
    ("model_destroy", LOAD),
    ("device_close", LOAD),
    ("shutdown", LOAD),
];

const LOAD: &[&str] = &["load", "--verify"];
const DECODE: &[&str] = &["bench", "decode", "-p", "2", "-n", "2", "--runs", "2"];

#[test]
fn a_panic_in_any_function_is_an_error_of_the_program_and_not_its_end() {
    let library = cargo_built("hoist-plugin-panicking");
    let backend = format!("plugin:{}", library.display());
    for isolate in [&[][..], &["--isolate"]] {
        for (entry, command) in ENTRIES {
            // Bytes are pulled by a plugin in this process, and pushed to one in its own.
            if *entry == if isolate.is_empty() { "upload" } else { "load_from" } {
                continue;
            }
            let mut arguments = command.to_vec();
            arguments.extend(["--backend", backend.as_str()]);
            arguments.extend(isolate);
            let output = hoist(&format!("panic={entry}"), &arguments);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                matches!(output.status.code(), Some(4 | 6)),
                "{entry} {isolate:?}: {:?} {said}",
                output.status
            );
            assert!(said.contains("PANIC"), "{entry} {isolate:?}: {said}");
            assert!(
                said.contains(&format!("the author's `{entry}` gives up (")) && said.contains("src/lib.rs:"),
                "what it said, and where: {entry} {isolate:?}: {said}"
            );
            assert!(
                said.contains("panicking"),
                "the plugin: {entry} {isolate:?}: {said}"
            );
            assert!(
                *entry == "open" || said.contains(&format!("`{entry}`")),
                "the function: {entry} {isolate:?}: {said}"
            );
            assert!(
                !said.contains("thread '"),
                "nothing of the plugin's on stderr: {entry} {isolate:?}: {said}"
            );
        }
        // The control.
        for command in [LOAD, DECODE] {
            let mut arguments = command.to_vec();
            arguments.extend(["--backend", backend.as_str()]);
            arguments.extend(isolate);
            let output = hoist("", &arguments);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(0), "{isolate:?}: {said}");
        }
    }
}

/// The whole life of a backend, as the orchestrator drives it.
fn drive(backend: &mut dyn WeightBackend) -> Result<(), LoadError> {
    let opened = OpenedModel::open(&root().join("cli/assets/tiny-kjv.gguf"))?;
    let capacity = opened.capacity(&DecodeOptions {
        context: Some(8),
        ..DecodeOptions::default()
    });
    let program = opened.program(capacity)?;
    let plan = plan_for(backend, &opened.model, Some((&program, capacity)))?;
    let source = FileSource::new(&opened.manifest, &plan)?;
    let dims = WorkspaceDims::new(&program, capacity)?;
    let options = LoadOptions {
        verify: true,
        workspace: Some(&dims),
        watch: &Unwatched,
    };
    let report = load(backend, &opened.model.index, &plan, &source, &options)?;
    assert!(
        report
            .receipt
            .notes
            .iter()
            .any(|(name, _)| name == "instructions"),
        "the notes of the author's receipt cross the interface: {:?}",
        report.receipt.notes
    );
    let decoder = backend.as_decode().expect("it decodes");
    decoder.prepare(&program)?;
    let mut argmax = [0];
    let runs = [Run {
        sequence: SequenceId(0),
        tokens: &[1],
        want: &[Want::ArgMax],
    }];
    let mut out = Outputs {
        argmax: &mut argmax,
        logits: &mut [],
    };
    decoder.forward(&TokenBatch { runs: &runs }, &mut out)?;
    decoder.truncate(SequenceId(0), 0)?;
    Ok(backend.unload()?)
}

/// The error of the backend in an error of the orchestrator.
fn cause(error: LoadError) -> BackendError {
    match error {
        LoadError::Backend(error) => error,
        LoadError::Plan(hoist_core::orchestrator::PlanError::Contract(error)) => error,
        LoadError::NotGivenBack { cleanup, .. } => cleanup,
        other => panic!("not an error of the backend: {other}"),
    }
}

#[test]
fn a_panic_poisons_the_device_and_nothing_else() {
    let library = cargo_built("hoist-plugin-panicking");
    let candidate = Candidate::open(&library).expect("a plugin");
    let provider: PluginProvider = hoist_plugin_host::open(&candidate, &Probe::Skip).expect("a plugin");
    // SAFETY: the library is open already; opening it again runs nothing.
    let again = unsafe { libloading::Library::new(&library) }.expect("the same library");
    // SAFETY: the plugin exports a function of that name and type.
    let panic_in =
        *unsafe { again.get::<unsafe extern "C" fn(*const u8, u64)>(b"hoist_panic_in") }.expect("a function");
    // SAFETY: passes a string and its length.
    let choose = |entry: &str| unsafe { panic_in(entry.as_ptr(), entry.len() as u64) };
    let open = || provider.open(0, &OpenOptions::default());
    for (entry, _) in ENTRIES {
        match *entry {
            // These are not calls on an open device, or not made in this process.
            "open" | "device_count" | "device_info" | "device_open" | "upload" | "device_close"
            | "shutdown" => {
                continue;
            }
            "caps" | "memory_info" => {
                choose(entry);
                let Err(error) = open() else {
                    panic!("{entry}: it can be opened");
                };
                assert!(
                    matches!(error, BackendError::DeviceLost { .. }),
                    "{entry}: {error}"
                );
            }
            _ => {
                choose(entry);
                let mut backend = open().unwrap_or_else(|e| panic!("{entry}: {e}"));
                let Err(error) = drive(backend.as_mut()) else {
                    panic!("`{entry}` does not panic");
                };
                let error = cause(error);
                let BackendError::DeviceLost { reason, .. } = &error else {
                    panic!("{entry}: {error}");
                };
                assert!(
                    reason.contains(&format!("`{entry}` of plugin:panicking: PANIC")),
                    "{entry}: {reason}"
                );
                // Nothing panics any more, and the device stays lost, for the first reason.
                choose("");
                let later = backend.memory().expect_err("it is poisoned");
                assert_eq!(later.to_string(), error.to_string(), "{entry}");
                let later = cause(drive(backend.as_mut()).expect_err("it is poisoned"));
                assert!(
                    matches!(later, BackendError::DeviceLost { .. }),
                    "{entry}: {later}"
                );
            }
        }
        // Other devices of the same library are as they were.
        choose("");
        let mut backend = open().expect("a device");
        drive(backend.as_mut()).unwrap_or_else(|e| panic!("after {entry}: {e}"));
    }
    // What is dropped cannot return an error: it is told apart.
    for entry in ["model_destroy", "device_close"] {
        choose("");
        let backend = open().expect("a device");
        let mut backend = backend;
        if entry == "model_destroy" {
            load_only(backend.as_mut());
        }
        choose(entry);
        drop(backend);
        let told = hoist_plugin_host::take_parting_errors();
        assert_eq!(told.len(), 1, "{entry}: {told:?}");
        let told = told[0].to_string();
        assert!(
            told.contains(&format!("`{entry}`: PANIC")) && told.contains("panicking"),
            "{told}"
        );
    }
    choose("");
}

/// Leaves a model on the backend.
fn load_only(backend: &mut dyn WeightBackend) {
    let opened = OpenedModel::open(&root().join("cli/assets/tiny-kjv.gguf")).expect("a model");
    let plan = plan_for(backend, &opened.model, None).expect("a plan");
    let source = FileSource::new(&opened.manifest, &plan).expect("a source");
    let options = LoadOptions {
        verify: false,
        workspace: None,
        watch: &Unwatched,
    };
    load(backend, &opened.model.index, &plan, &source, &options).expect("it loads");
}
