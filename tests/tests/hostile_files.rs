//! Every hostile model is refused for the right reason, quickly and in little memory, and its control is not.
#![expect(clippy::expect_used, reason = "a panic is a failed test")]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hoist_formats::{Encoding, Manifest, open, open_bytes};
use hoist_tests::files::{
    AprStorage, Hostile, ModelFiles, RawApr, RawGguf, RawSafeTensors, TinyLlama, hostile,
};
use libtest_mimic::{Arguments, Failed, Trial};

type Outcome = Result<(), Failed>;

/// Names a model that the program opens instead of running tests, for tests that need a process of their own.
const OPEN: &str = "HOIST_TEST_OPEN";

/// Longest time a refusal may take: of the processor, since the machine may have other work.
const LONGEST: Duration = Duration::from_secs(1);

/// Most memory a process that refuses a file may ever have had.
const MOST_MEMORY_KIB: u64 = 64 << 10;

fn main() {
    if let Some(path) = std::env::var_os(OPEN) {
        return open_and_show(Path::new(&path));
    }
    let mut trials: Vec<Trial> = hostile()
        .into_iter()
        .map(|case| Trial::test(case.name, move || refused(&case)))
        .collect();
    trials.extend(truncations());
    trials.extend(findings());
    trials.extend(memory());
    trials.push(Trial::test(
        "valid/any_shard_opens_the_whole_split_model",
        any_shard,
    ));
    trials.push(Trial::test(
        "valid/both_lz4_layouts_hold_the_same_tensors",
        both_lz4_layouts,
    ));
    trials.push(Trial::test(
        "valid/apr_tensors_are_those_of_its_own_reader",
        apr_reader,
    ));
    trials.push(Trial::test("an_empty_folder", || {
        let folder = tempfile::tempdir()?;
        expect(open(folder.path()), "FolderWithoutModel", &["config.json"])
    }));
    trials.push(Trial::test("a_path_that_is_not_there", || {
        let path = "/nowhere/model.gguf";
        expect(open(Path::new(path)), "Io", &[path, "No such file"])
    }));
    trials.push(Trial::test("a_device", || {
        expect(
            open(Path::new("/dev/zero")),
            "NotAFile",
            &["/dev/zero", "a device"],
        )
    }));
    trials.push(Trial::test("a_pipe_without_a_writer", a_pipe));
    trials.push(Trial::test("a_file_without_permission", no_permission));
    trials.push(Trial::test("corpus_is_documented", corpus_is_documented));
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn expect(result: hoist_formats::Result<Manifest>, error: &str, says: &[&str]) -> Outcome {
    let found = match result {
        Ok(manifest) => return Err(format!("opened, with {} tensors", manifest.tensors.len()).into()),
        Err(found) => found,
    };
    let debug = format!("{found:?}");
    let variant = debug.split([' ', '{', '(']).next().unwrap_or_default();
    if variant != error {
        return Err(format!("expected {error}, found {variant}: {found}").into());
    }
    let message = found.to_string();
    match says.iter().find(|s| !message.contains(**s)) {
        None => Ok(()),
        Some(missing) => Err(format!("`{missing}` is not in the message: {message}").into()),
    }
}

fn refused(case: &Hostile) -> Outcome {
    let (bad, good) = (tempfile::tempdir()?, tempfile::tempdir()?);
    open(&case.control.write_to(good.path())?).map_err(|e| format!("the control is refused: {e}"))?;
    if case.model == case.control {
        return Err("the model is its control".into());
    }
    let path = case.model.write_to(bad.path())?;
    expect(open(&path), case.error, case.says)?;
    if let [(name, bytes)] = case.model.files.as_slice() {
        expect(open_bytes(name, bytes.as_slice().into()), case.error, case.says)?;
    }
    refused_within_bounds(&path)
}

/// Opens a model in a process of its own, which must refuse it.
fn refused_within_bounds(path: &Path) -> Outcome {
    let out = Command::new(std::env::current_exe()?).env(OPEN, path).output()?;
    let text = String::from_utf8_lossy(&out.stdout);
    let lines: Vec<&str> = text.lines().collect();
    let [verdict, peak, took] = lines[..] else {
        return Err(format!("{}: {text}{}", out.status, String::from_utf8_lossy(&out.stderr)).into());
    };
    if verdict == "opened" {
        return Err("opened".into());
    }
    let peak: u64 = peak.parse()?;
    if peak > MOST_MEMORY_KIB {
        return Err(format!("took {peak} KiB of memory: {verdict}").into());
    }
    let took = Duration::from_nanos(took.parse()?);
    if took > LONGEST {
        return Err(format!("took {took:?}: {verdict}").into());
    }
    Ok(())
}

/// Prints the verdict on a model, the most memory this process has had, in KiB, and its time on a processor, in ns.
fn open_and_show(path: &Path) {
    match open(path) {
        Ok(_) => println!("opened"),
        Err(error) => println!("{error:?}"),
    }
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.split_whitespace().next())
        .expect("Linux");
    println!("{peak}");
    let schedule = std::fs::read_to_string("/proc/self/schedstat").expect("Linux");
    println!("{}", schedule.split(' ').next().expect("Linux"));
}

/// One trial for each file of a few small models: every length that it can be cut to is refused, except those given.
fn truncations() -> Vec<Trial> {
    let small = TinyLlama::small();
    let apr_names = |model: &ModelFiles| model.files.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
    let mut trials = Vec::new();
    let mut add = |name: &str, model: &ModelFiles, file: &str, footer: usize| {
        let (model, file) = (model.clone(), file.to_owned());
        trials.push(Trial::test(format!("every_truncation/{name}"), move || {
            every_truncation(&model, &file, footer)
        }));
    };
    for (name, bytes, footer) in [
        ("gguf_v3", small.gguf(Encoding::F16), 0),
        ("gguf_q8_0", small.gguf(Encoding::Q8_0), 0),
        ("gguf_without_tensors", gguf_without_tensors(), 0),
        ("safetensors", small.safetensors(Encoding::F16), 0),
        ("apr_f16", small.apr(AprStorage::F16), 4),
        ("apr_q8", small.apr(AprStorage::AprQ8), 4),
        ("apr_lz4_flag", small.apr_lz4_flag(AprStorage::AprQ4), 4),
        ("apr_lz4_block", small.apr_lz4_block(AprStorage::AprQ4), 0),
        ("raw_gguf", RawGguf::valid().bytes(), 0),
        ("raw_safetensors", RawSafeTensors::valid().bytes(), 0),
        ("raw_apr", RawApr::valid().bytes(), 4),
    ] {
        let file = format!("model.{}", name.split('_').next().unwrap_or_default());
        add(name, &ModelFiles::single(&file, bytes), &file, footer);
    }
    let split = small.gguf_split(Encoding::Q8_0, 2);
    for (i, file) in apr_names(&split).iter().enumerate() {
        add(&format!("gguf_split_{i}"), &split, file, 0);
    }
    let folder = small.hugging_face_sharded(Encoding::F16);
    for file in apr_names(&folder) {
        add(&format!("hugging_face/{file}"), &folder, &file, 0);
    }
    // The manifest gives the length of a shard, so not even its footer may be missing.
    let shards = small.apr_sharded(AprStorage::AprQ8, 2);
    for file in apr_names(&shards) {
        add(&format!("apr_shards/{file}"), &shards, &file, 0);
    }
    trials
}

fn gguf_without_tensors() -> Vec<u8> {
    let mut file = RawGguf::valid();
    file.tensors.clear();
    file.data.clear();
    file.alignment = 1;
    file.bytes()
}

fn every_truncation(model: &ModelFiles, file: &str, footer: usize) -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = model.write_to(folder.path())?;
    open(&path).map_err(|e| format!("the whole model is refused: {e}"))?;
    let cut = std::fs::File::options()
        .write(true)
        .open(folder.path().join(file))?;
    let bytes = &model
        .files
        .iter()
        .find(|(n, _)| n == file)
        .ok_or("no such file")?
        .1;
    for len in (0..bytes.len()).rev() {
        cut.set_len(len as u64)?;
        let allowed = footer > 0 && len + footer == bytes.len();
        let from_disk = open(&path).is_ok();
        let from_memory = match model.files.len() {
            1 => open_bytes(file, Arc::from(&bytes[..len])).is_ok(),
            _ => from_disk,
        };
        if from_disk != allowed || from_memory != allowed {
            return Err(format!("cut to {len} of {} bytes: opened", bytes.len()).into());
        }
    }
    Ok(())
}

/// Files that fuzzing has found: they must not panic, and none of them is a model.
fn findings() -> Vec<Trial> {
    let mut trials = Vec::new();
    for format in ["gguf", "safetensors", "apr"] {
        let folder = corpus().join(format);
        let Ok(entries) = std::fs::read_dir(&folder) else {
            continue;
        };
        for path in entries.filter_map(|e| Some(e.ok()?.path())) {
            let name = path.file_name().map(OsStr::to_string_lossy).unwrap_or_default();
            trials.push(Trial::test(
                format!("finding/{format}/{name}"),
                move || match open(&path) {
                    Err(_) => refused_within_bounds(&path),
                    Ok(_) => Err("opened".into()),
                },
            ));
        }
    }
    trials
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

/// Files whose every part is small and whose sum is not: what they cost in memory is far more than their length.
fn memory() -> Vec<Trial> {
    let repeat = |head: &str, each: &dyn Fn(usize) -> String, tail: &str, len: usize| {
        let mut out = head.to_owned();
        for i in 0.. {
            let each = each(i);
            if out.len() + each.len() + tail.len() > len {
                break;
            }
            out += &each;
        }
        out + tail
    };
    let safetensors = |header: String| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.into_bytes());
        bytes
    };
    let header = 8 << 20;
    let mut cases = vec![
        (
            "many_tensors.safetensors",
            safetensors(repeat(
                "{",
                &|i| {
                    format!(
                        r#""{i}":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}},"#,
                        4 * i,
                        4 * i + 4
                    )
                },
                r#""z":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                header,
            )),
        ),
        (
            "many_texts.safetensors",
            safetensors(repeat(
                r#"{"__metadata__":{"#,
                &|i| format!(r#""{i}":"","#),
                r#""z":""}}"#,
                header,
            )),
        ),
        (
            "many_dimensions.safetensors",
            safetensors(repeat(
                r#"{"a":{"dtype":"F32","data_offsets":[0,4],"shape":["#,
                &|_| "1,".into(),
                "1]}}",
                header,
            )),
        ),
        (
            "many_tensors.index.json",
            repeat(
                r#"{"weight_map":{"#,
                &|i| format!(r#""{i}":"a","#),
                r#""z":"a"}}"#,
                16 << 20,
            )
            .into_bytes(),
        ),
        (
            "many_shards.index.json",
            repeat(
                r#"{"weight_map":{"#,
                &|i| format!(r#""{i}":"{i}","#),
                r#""z":"a"}}"#,
                16 << 20,
            )
            .into_bytes(),
        ),
        (
            "many_tensors.shards.json",
            repeat(
                r#"{"shards":[{"tensors":["#,
                &|_| r#""","#.into(),
                r#"""]}]}"#,
                16 << 20,
            )
            .into_bytes(),
        ),
        (
            "nested.index.json",
            repeat(r#"{"weight_map":"#, &|_| "[".into(), "", 16 << 20).into_bytes(),
        ),
    ];
    let mut apr = RawApr::valid();
    apr.metadata = repeat(r#"{"a":["#, &|_| "1,".into(), "1]}", 15 << 20).into_bytes();
    cases.push(("numbers.apr", apr.bytes()));
    apr.metadata = repeat("{", &|i| format!(r#""{i:x}":0,"#), r#""z":0}"#, 15 << 20).into_bytes();
    cases.push(("keys.apr", apr.bytes()));
    let strings = |count: u64, string: &[u8]| {
        let elements = RawGguf::string(string).repeat(count as usize);
        RawGguf::valid()
            .with("k", 9, RawGguf::array(8, count, &elements))
            .bytes()
    };
    cases.push(("empty_strings.gguf", strings(8 << 20, b"")));
    cases.push(("short_strings.gguf", strings(4 << 20, b"s")));
    cases.push((
        "numbers.gguf",
        RawGguf::valid()
            .with("k", 9, RawGguf::array(0, 64 << 20, &vec![0; 64 << 20]))
            .bytes(),
    ));
    let mut pairs = RawGguf::valid();
    pairs
        .pairs
        .extend((0..1_000_000u32).map(|i| (i.to_le_bytes().map(|b| b & 0x7f).to_vec(), 0, vec![0])));
    cases.push(("pairs.gguf", pairs.bytes()));
    let mut tensors = RawGguf::valid();
    let tensor = tensors.tensors[0].clone();
    tensors.tensors.extend((0..400_000u32).map(|i| {
        let mut tensor = tensor.clone();
        tensor.name = i.to_string().into_bytes();
        tensor
    }));
    cases.push(("tensors.gguf", tensors.bytes()));
    cases
        .into_iter()
        .map(|(name, bytes)| {
            Trial::test(format!("memory/{name}"), move || {
                let folder = tempfile::tempdir()?;
                refused_within_bounds(&ModelFiles::single(name, bytes.clone()).write_to(folder.path())?)
            })
        })
        .collect()
}

fn a_pipe() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.gguf");
    if !Command::new("mkfifo").arg(&path).status()?.success() {
        return Err("mkfifo failed".into());
    }
    let start = Instant::now();
    expect(open(&path), "NotAFile", &["a pipe"])?;
    if start.elapsed() > LONGEST {
        return Err("it blocked".into());
    }
    Ok(())
}

/// Opens an unreadable file, as nobody if this is root, whom permissions do not stop.
fn no_permission() -> Outcome {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    const NOBODY: u32 = 65534;
    let folder = tempfile::tempdir()?;
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755))?;
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, RawGguf::valid().bytes())?;
    // The test's own program may lie where nobody cannot read it.
    let program = folder.path().join("program");
    std::fs::copy(std::env::current_exe()?, &program)?;
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755))?;
    let verdict = |mode: u32| -> Result<String, Failed> {
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode))?;
        let mut command = Command::new(&program);
        command.env(OPEN, &path);
        if std::fs::metadata("/proc/self")?.uid() == 0 {
            command.uid(NOBODY).gid(NOBODY);
        }
        Ok(String::from_utf8(command.output()?.stdout)?)
    };
    let control = verdict(0o444)?;
    if !control.starts_with("opened") {
        return Err(format!("the readable file is refused: {control}").into());
    }
    let found = verdict(0o000)?;
    if !found.starts_with("Io") || !found.contains("PermissionDenied") {
        return Err(format!("expected a denied permission, found {found}").into());
    }
    Ok(())
}

/// The corpus's README lists exactly the cases that there are.
fn corpus_is_documented() -> Outcome {
    let readme = std::fs::read_to_string(corpus().join("README.md"))?;
    let listed: BTreeSet<&str> = readme
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(name, _)| name))
        .collect();
    let cases = hostile();
    let there: BTreeSet<&str> = cases.iter().map(|case| case.name).collect();
    if there.len() != cases.len() {
        return Err("two cases have one name".into());
    }
    let missing: Vec<_> = there.difference(&listed).collect();
    let stale: Vec<_> = listed.difference(&there).collect();
    if !missing.is_empty() || !stale.is_empty() {
        return Err(format!("README.md lacks {missing:?} and lists {stale:?}").into());
    }
    Ok(())
}

/// Name, encoding, shape and bytes of a tensor.
type Content = (String, Encoding, Vec<u64>, Vec<u8>);

/// Contents of all tensors, by name.
fn contents(manifest: &Manifest) -> Result<Vec<Content>, Failed> {
    let mut out = Vec::new();
    for t in &manifest.tensors {
        let bytes = manifest.read_tensor(t, u64::MAX)?;
        out.push((t.name.clone(), t.encoding, t.shape.clone(), bytes));
    }
    out.sort();
    Ok(out)
}

fn any_shard() -> Outcome {
    let small = TinyLlama::small();
    let whole = open_bytes("model.gguf", small.gguf(Encoding::Q8_0).into())?;
    let split = small.gguf_split(Encoding::Q8_0, 3);
    let folder = tempfile::tempdir()?;
    split.write_to(folder.path())?;
    for (file, _) in &split.files {
        let manifest = open(&folder.path().join(file))?;
        if contents(&manifest)? != contents(&whole)? || manifest.shards.len() != 3 {
            return Err(format!("{file} opens something else").into());
        }
        if manifest.metadata.require_u32("llama.block_count")? != 1 {
            return Err(format!("{file} opens without the first file's metadata").into());
        }
    }
    Ok(())
}

fn both_lz4_layouts() -> Outcome {
    let small = TinyLlama::small();
    for storage in [AprStorage::F32, AprStorage::AprQ4] {
        let raw = open_bytes("raw.apr", small.apr(storage).into())?;
        let flag = open_bytes("flag.apr", small.apr_lz4_flag(storage).into())?;
        let folder = tempfile::tempdir()?;
        let path = ModelFiles::single("block.apr", small.apr_lz4_block(storage)).write_to(folder.path())?;
        let block = open(&path)?;
        if block.shards[0].memory.is_none() {
            return Err("the block is not in memory".into());
        }
        for manifest in [flag, block] {
            if contents(&manifest)? != contents(&raw)? {
                return Err(format!("{} holds something else", manifest.path.display()).into());
            }
        }
    }
    Ok(())
}

fn apr_reader() -> Outcome {
    let storages = [
        (AprStorage::F32, Encoding::F32),
        (AprStorage::F16, Encoding::F16),
        (AprStorage::Q4K, Encoding::Q4_K),
        (AprStorage::Q6K, Encoding::Q6_K),
        (AprStorage::AprQ4, Encoding::APR_Q4),
        (AprStorage::AprQ8, Encoding::APR_Q8),
    ];
    for (storage, encoding) in storages {
        let bytes = TinyLlama::wide().apr(storage);
        let theirs = apr_format::v2::AprV2Reader::from_bytes(&bytes)?;
        let ours = open_bytes("model.apr", bytes.as_slice().into())?;
        for (name, found, shape, bytes) in contents(&ours)? {
            let expected = if shape.len() == 1 { Encoding::F32 } else { encoding };
            if found != expected || theirs.get_tensor_data(&name) != Some(&bytes) {
                return Err(format!("`{name}` as {storage:?} differs").into());
            }
        }
        if ours.tensors.len() != theirs.tensor_names().len() || ours.verify_checksums()? != 1 {
            return Err(format!("{storage:?} differs").into());
        }
    }
    Ok(())
}
