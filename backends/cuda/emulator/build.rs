//! Compiles backends/cuda/kernels/*.cu as C++ and links them with the emulated driver, three times: as `libcuda.so.1`, as one
//! that lacks a symbol, and as one that looks for races of shared memory. Without a C++ compiler nothing is built, and the
//! crate says so.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::{env, fs};

/// What the second library hides.
const HIDDEN: &str = "cuGraphUpload";

const FLAGS: &[&str] = &[
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-U_FORTIFY_SOURCE",
    "-pthread",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
];

/// For the library that looks for races: a call at every access of a kernel, and what those calls go to. The sanitizer's
/// own runtime is not linked.
const RACES: &str = "-DHOIST_RACES";
const CALLS: &str = "-fsanitize=thread";

/// A source, and whether it is for the library that looks for races.
type Unit = (PathBuf, bool);

fn main() {
    println!("cargo::rerun-if-env-changed=CXX");
    println!("cargo::rustc-check-cfg=cfg(emulator)");
    let Some(here) = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from) else {
        return;
    };
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else {
        return;
    };
    let kernels = here.join("../kernels");
    for watched in ["include", "src/cpp", "tests/kernels", "../kernels"] {
        println!("cargo::rerun-if-changed={}", here.join(watched).display());
    }
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        println!("cargo::warning=the emulated CUDA device is built on Linux only");
        return;
    }
    if Command::new(compiler()).arg("--version").output().is_err() {
        println!(
            "cargo::warning=no C++ compiler `{}`: the emulated CUDA device is not built",
            compiler()
        );
        return;
    }
    match build(&here, &kernels, &out) {
        Ok(()) => {
            println!("cargo::rustc-cfg=emulator");
            println!("cargo::rustc-env=HOIST_EMULATOR_FOLDER={}", out.display());
        }
        Err(why) => {
            for line in why.lines() {
                println!("cargo::error={line}");
            }
            std::process::exit(1);
        }
    }
}

/// The compiler that `CXX` names, or the system's.
fn compiler() -> String {
    env::var("CXX").unwrap_or_else(|_| "c++".into())
}

fn run(command: &mut Command) -> Result<String, String> {
    let done = command
        .output()
        .map_err(|e| format!("{}: {e}", command.get_program().to_string_lossy()))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&done.stderr);
    Err(format!(
        "{} failed:\n{}",
        command.get_program().to_string_lossy(),
        text.lines().take(30).collect::<Vec<_>>().join("\n")
    ))
}

/// Fused multiply-adds as one instruction, where this machine has it: the same bits, faster.
fn machine_flags() -> &'static [&'static str] {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| info.split_whitespace().any(|word| word == flag);
    if cfg!(target_arch = "x86_64") && has("fma") {
        &["-mfma"]
    } else {
        &[]
    }
}

/// Name and bound on threads of each kernel of a preprocessed file.
fn kernels_in(text: &str) -> Vec<(String, String)> {
    text.split("__global__")
        .skip(1)
        .filter_map(|rest| {
            let rest = rest.trim_start().strip_prefix("void")?.trim_start();
            let (bound, rest) = match rest.strip_prefix("__launch_bounds__") {
                Some(bounds) => {
                    let (bounds, rest) = bounds.trim_start().strip_prefix('(')?.split_once(')')?;
                    (bounds.split(',').next()?.trim(), rest.trim_start())
                }
                None => ("0", rest),
            };
            let name = rest.split_once('(')?.0.trim();
            Some((name.to_owned(), bound.to_owned()))
        })
        .collect()
}

fn build(here: &Path, kernels: &Path, out: &Path) -> Result<(), String> {
    let include = here.join("include");
    let mut sources: Vec<PathBuf> = Vec::new();
    let mut files: Vec<PathBuf> = fs::read_dir(kernels)
        .map_err(|e| e.to_string())?
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "cu"))
        .collect();
    files.push(here.join("tests/kernels/faulty.cu"));
    files.sort();
    for file in &files {
        let stem = file
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let text = run(Command::new(compiler())
            .args(["-std=c++17", "-E", "-P", "-x", "c++", "-DHOIST_LIST_KERNELS"])
            .arg(format!("-I{}", include.display()))
            .arg(format!("-I{}", kernels.display()))
            .arg(file))?;
        let found = kernels_in(&text);
        if found.is_empty() {
            return Err(format!("{stem}.cu has no kernel that could be found"));
        }
        let mut wrapper = format!(
            "#include \"{}\"\n#include \"machine.h\"\nnamespace hoist {{}}\nusing namespace hoist;\nnamespace {{\n",
            file.display()
        );
        for (name, bound) in &found {
            wrapper += &format!(
                "const emulator::Registration register_{name}(\"{stem}.cu\", \"{name}\", &{name}, {bound});\n"
            );
        }
        wrapper += "}\n";
        let path = out.join(format!("kernels_{stem}.cpp"));
        fs::write(&path, wrapper).map_err(|e| e.to_string())?;
        sources.push(path);
    }
    let own: Vec<PathBuf> = ["driver", "machine", "memory", "races"]
        .iter()
        .map(|name| here.join(format!("src/cpp/{name}.cpp")))
        .collect();
    let is_own = |source: &Path| own.iter().any(|s| s == source);
    let compile = |(source, races): Unit| -> Result<(PathBuf, bool), String> {
        let name = source.file_stem().unwrap_or_default().to_string_lossy();
        let object = out.join(format!("{name}{}.o", if races { "_races" } else { "" }));
        let mut command = Command::new(compiler());
        command.args(FLAGS).args(machine_flags());
        if races {
            command.arg(RACES);
            if !is_own(&source) {
                command.arg(CALLS);
            }
        }
        run(command
            .arg(format!("-I{}", include.display()))
            .arg(format!("-I{}", here.join("src/cpp").display()))
            .arg(format!("-I{}", kernels.display()))
            .arg("-c")
            .arg("-o")
            .arg(&object)
            .arg(&source))?;
        Ok((object, races))
    };
    // The largest first, by as many threads as cargo gives.
    let is_large = |source: &PathBuf| source.ends_with("kernels_matmul.cpp");
    sources.sort_by_key(|source| !is_large(source));
    let units = |races: bool| {
        sources
            .iter()
            .chain(&own)
            .map(move |source| (source.clone(), races))
    };
    let queue = Mutex::new(units(true).chain(units(false)).collect::<VecDeque<Unit>>());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let work = || -> Result<Vec<(PathBuf, bool)>, String> { std::iter::from_fn(next).map(compile).collect() };
    let jobs = env::var("NUM_JOBS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(1usize);
    let mut objects: Vec<(PathBuf, bool)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.clamp(1, 8)).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_fold(Vec::new(), |mut all, worker| {
            all.extend(worker.join().map_err(|_| "a compilation panicked".to_owned())??);
            Ok::<_, String>(all)
        })
    })?;
    objects.sort();
    let link = |folder: &Path, hide: Option<&str>, looks_for_races: bool| -> Result<(), String> {
        fs::create_dir_all(folder).map_err(|e| e.to_string())?;
        let script = folder.join("exported");
        let hidden = hide.map_or_else(String::new, |h| format!("{h};"));
        // A symbol that is named is local in spite of the pattern.
        fs::write(
            &script,
            format!("{{ global: cu[A-Z]*; hoist_emulated_*; local: {hidden} *; }};\n"),
        )
        .map_err(|e| e.to_string())?;
        let library = folder.join("libcuda.so.1");
        run(Command::new(compiler())
            .args(["-shared", "-pthread", "-Wl,-soname,libcuda.so.1", "-Wl,-z,defs"])
            .arg(format!("-Wl,--version-script={}", script.display()))
            .arg("-o")
            .arg(&library)
            .args(
                objects
                    .iter()
                    .filter(|(_, races)| *races == looks_for_races)
                    .map(|(object, _)| object),
            ))?;
        let plain = folder.join("libcuda.so");
        let _ = fs::remove_file(&plain);
        std::os::unix::fs::symlink("libcuda.so.1", plain).map_err(|e| e.to_string())
    };
    link(&out.join("driver"), None, false)?;
    link(&out.join("driver-incomplete"), Some(HIDDEN), false)?;
    link(&out.join("driver-races"), None, true)
}
