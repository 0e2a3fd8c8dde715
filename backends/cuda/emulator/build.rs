//! Compiles backends/cuda/kernels/*.cu as C++ and links them with the emulated driver, twice: as `libcuda.so.1`, and as one
//! that lacks a symbol. Without a C++ compiler nothing is built, and the crate says so.

use std::path::{Path, PathBuf};
use std::process::Command;
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
    for name in ["machine", "memory", "driver"] {
        sources.push(here.join(format!("src/cpp/{name}.cpp")));
    }
    let compile = |source: &PathBuf| -> Result<PathBuf, String> {
        let object = out
            .join(source.file_name().unwrap_or_default())
            .with_extension("o");
        run(Command::new(compiler())
            .args(FLAGS)
            .args(machine_flags())
            .arg(format!("-I{}", include.display()))
            .arg(format!("-I{}", here.join("src/cpp").display()))
            .arg(format!("-I{}", kernels.display()))
            .arg("-c")
            .arg("-o")
            .arg(&object)
            .arg(source))?;
        Ok(object)
    };
    // The largest first, two at a time.
    let (half, rest): (Vec<_>, Vec<_>) = sources.iter().partition(|s| s.ends_with("kernels_matmul.cpp"));
    let objects: Vec<PathBuf> = std::thread::scope(|scope| {
        let one = scope.spawn(|| half.into_iter().map(compile).collect::<Result<Vec<_>, _>>());
        let other = rest.into_iter().map(compile).collect::<Result<Vec<_>, _>>()?;
        let mut all = one.join().map_err(|_| "a compilation panicked".to_owned())??;
        all.extend(other);
        Ok::<_, String>(all)
    })?;
    let link = |folder: &Path, hide: Option<&str>| -> Result<(), String> {
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
            .args(&objects))?;
        let plain = folder.join("libcuda.so");
        let _ = fs::remove_file(&plain);
        std::os::unix::fs::symlink("libcuda.so.1", plain).map_err(|e| e.to_string())
    };
    link(&out.join("driver"), None)?;
    link(&out.join("driver-incomplete"), Some(HIDDEN))
}
