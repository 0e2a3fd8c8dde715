//! `hoist bench load --backend cuda`: loads beside what the link and the source can do at most.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;
use hoist_core::backend::{OpenOptions, Unwatched, WeightBackend};
use hoist_core::orchestrator::{FileSource, LoadOptions, OpenedModel, load, plan_for};
use hoist_cuda::measure;
use serde_json::{Value, json};

use super::bench_load::Spread;
use crate::args::{DeviceArgs, ModelArg};
use crate::backends::{self, Selected};
use crate::exit::{Code, Usage};
use crate::models;
use crate::report::table::{self, Align};
use crate::report::{self, print_json, print_text, units};
use crate::watch::interrupted;

/// Bytes of the file that are read to know the source's own rate.
const READ_LIMIT: u64 = 8 << 30;
/// Threads that read them.
const READ_THREADS: usize = 16;

/// What was asked for.
pub(crate) struct CudaBench<'a> {
    pub(crate) model: &'a ModelArg,
    pub(crate) device: &'a DeviceArgs,
    pub(crate) runs: u32,
    pub(crate) cold: bool,
}

/// One round.
struct Round {
    /// Opening the device: its context.
    open: Duration,
    /// From then until every weight is resident and accounted for.
    first: Duration,
    /// The same once more on the same backend.
    again: Option<Duration>,
    /// Hashing every weight on the device.
    digest: Duration,
    /// Most host memory during the first load beyond what the process had with a context.
    host_bytes: u64,
    /// Device memory that is gone after the first load, beyond what it made resident.
    device_bytes: u64,
    notes: Vec<(String, String)>,
    backend: Value,
    nbytes: u64,
    weights: usize,
}

impl CudaBench<'_> {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        let selected = backends::select(self.device)?;
        let opened = models::open(self.model)?;
        let paths: Vec<PathBuf> = opened
            .manifest
            .shards
            .iter()
            .filter(|s| s.source.file.is_some())
            .map(|s| s.source.path.clone())
            .collect();
        if self.cold && paths.is_empty() {
            return Err(Usage("--cold: the model is no file".into()).into());
        }
        let ordinal = selected.ordinal();
        let link = measure::link(ordinal)?.gb_s();
        let source = match paths.first() {
            Some(path) if self.cold => {
                forget(&paths)?;
                Some(measure::read(path, true, READ_THREADS, READ_LIMIT)?.gb_s())
            }
            Some(path) => {
                // Once to bring it into the page cache, once to measure.
                measure::read(path, false, READ_THREADS, u64::MAX)?;
                Some(measure::read(path, false, READ_THREADS, READ_LIMIT)?.gb_s())
            }
            None => None,
        };
        let mut rounds = Vec::new();
        let mut still_cached = 0;
        for _ in 0..self.runs {
            if interrupted() {
                return Err(hoist_core::backend::Error::Cancelled.into());
            }
            if self.cold {
                still_cached = forget(&paths)?.max(still_cached);
            }
            rounds.push(self.round(&selected)?);
        }
        let Some(last) = rounds.last() else {
            return Ok(Code::Ok);
        };
        let bytes = last.nbytes;
        let of = |times: &[Duration]| Spread::of(times, bytes);
        let first = of(&rounds.iter().map(|r| r.first).collect::<Vec<_>>());
        let again: Vec<_> = rounds.iter().filter_map(|r| r.again).collect();
        let again = (!again.is_empty()).then(|| of(&again));
        let digest = of(&rounds.iter().map(|r| r.digest).collect::<Vec<_>>());
        let mut opens: Vec<_> = rounds.iter().map(|r| r.open).collect();
        opens.sort_unstable();
        let open = opens[opens.len() / 2];
        // The link carries every byte; a cold source is slower than it.
        let ceiling = if self.cold { source.unwrap_or(link) } else { link };
        let digest_share = first.median() / digest.median();
        if json {
            print_json(&json!({
                "schema": "hoist.bench.load.cuda/1",
                "model": report::model::json(&opened.manifest, &opened.model),
                "backend": last.backend,
                "bytes": bytes,
                "weights": last.weights,
                "runs": self.runs,
                "cache": if self.cold { "cold" } else { "warm" },
                "still_cached_bytes": still_cached,
                "open_ms": units::ms(open),
                "load": first.json(),
                "load_again": again.as_ref().map(Spread::json),
                "host_bytes_beyond_context": rounds.iter().map(|r| r.host_bytes).max(),
                "device_bytes_beyond_weights": rounds.iter().map(|r| r.device_bytes).max(),
                "digest": digest.json(),
                "digest_share_of_load": units::rounded(digest_share, 4),
                "ceilings": {
                    "link_gb_s": units::rounded(link, 2),
                    "page_cache_gb_s": source.filter(|_| !self.cold).map(|r| units::rounded(r, 2)),
                    "direct_read_gb_s": source.filter(|_| self.cold).map(|r| units::rounded(r, 3)),
                },
                "share_of_ceiling": units::rounded(first.median() / ceiling, 4),
                "notes": last.notes.iter().map(|(k, v)| json!([k, v])).collect::<Vec<_>>(),
            }))?;
            return Ok(Code::Ok);
        }
        let rate = |r: f64| format!("{r:.2}");
        let spread =
            |name: &str, s: &Spread| vec![name.to_owned(), rate(s.median()), rate(s.min()), rate(s.max())];
        let one = |name: &str, r: f64| vec![name.to_owned(), rate(r), String::new(), String::new()];
        let mut rows = vec![spread("load, from the context on", &first)];
        rows.extend(again.as_ref().map(|s| spread("load again, same process", s)));
        rows.push(one("link: page-locked memory to the device", link));
        rows.extend(source.map(|r| {
            let name = if self.cold {
                "source, past the page cache"
            } else {
                "source, through the page cache"
            };
            one(name, r)
        }));
        rows.push(spread("digest on the device", &digest));
        let table = table::render(
            &[
                ("GB/s", Align::Left),
                ("median", Align::Right),
                ("min", Align::Right),
                ("max", Align::Right),
            ],
            rows,
        );
        let notes: Vec<_> = last.notes.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        print_text(&format!(
            "{} in {} weights, {} runs, {}\n\n{table}\nload: {:.1} % of the {}; digest: {:.1} % of a load\n\n{}",
            units::bytes(bytes),
            last.weights,
            self.runs,
            if self.cold {
                "page cache dropped before each"
            } else {
                "page cache warm"
            },
            100.0 * first.median() / ceiling,
            if self.cold { "source" } else { "link" },
            100.0 * digest_share,
            table::facts(notes),
        ))?;
        Ok(Code::Ok)
    }

    /// A load on a backend of its own, once more on the same one, and a digest of all that is resident.
    fn round(&self, selected: &Selected) -> Result<Round> {
        let opened = models::open(self.model)?;
        // As in a process that has not used the device yet.
        hoist_cuda::release_unused();
        let started = Instant::now();
        let options: OpenOptions = self.device.open_options();
        let mut backend = selected.open(&options)?;
        let open = started.elapsed();
        let free = |backend: &dyn WeightBackend| -> Result<(u64, u64)> {
            let memory = backend.memory()?.devices;
            Ok(memory.first().map_or((0, 0), |d| (d.free, d.resident.weights())))
        };
        let (free_before, _) = free(backend.as_ref())?;
        let most = MostMemory::watch();
        let (first, nbytes, weights, notes) = one_load(backend.as_mut(), &opened)?;
        let host_bytes = most.stop();
        let (free_after, resident) = free(backend.as_ref())?;
        let device_bytes = (free_before - free_after.min(free_before)).saturating_sub(resident);
        let started = Instant::now();
        for weight in 0..weights {
            backend.digest(hoist_core::backend::WeightId(u32::try_from(weight)?))?;
        }
        let digest = started.elapsed();
        let json = report::plan::backend_json(backend.info());
        backend.unload()?;
        let again = if self.cold {
            None
        } else {
            Some(one_load(backend.as_mut(), &opened)?.0)
        };
        backend.unload()?;
        Ok(Round {
            open,
            first,
            again,
            digest,
            host_bytes,
            device_bytes,
            notes,
            backend: json,
            nbytes,
            weights,
        })
    }
}

/// Looks at this process's own memory, page cache not counted, until it is stopped.
struct MostMemory {
    before: u64,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl MostMemory {
    fn watch() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let watch = move || {
            let mut most = 0;
            while !stopped.load(Ordering::Relaxed) {
                most = most.max(anonymous_bytes());
                std::thread::sleep(Duration::from_millis(2));
            }
            most
        };
        Self {
            before: anonymous_bytes(),
            stop,
            thread: std::thread::Builder::new().spawn(watch).ok(),
        }
    }

    fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let most = self.thread.take().and_then(|t| t.join().ok()).unwrap_or(0);
        most.saturating_sub(self.before)
    }
}

/// `RssAnon` of this process, as Linux counts it: page-locked memory is part of it.
fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    let kib = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

type Loaded = (Duration, u64, usize, Vec<(String, String)>);

/// Time from a ready context until everything is resident, bytes, weights, and what the backend says of it.
fn one_load(backend: &mut dyn WeightBackend, opened: &OpenedModel) -> Result<Loaded> {
    let started = Instant::now();
    let plan = plan_for(backend, &opened.model, None)?;
    let source = FileSource::new(&opened.manifest, &plan)?;
    let options = LoadOptions {
        verify: false,
        workspace: None,
        watch: &Unwatched,
    };
    let report = load(backend, &opened.model.index, &plan, &source, &options)?;
    Ok((
        started.elapsed(),
        plan.nbytes,
        plan.weights.len(),
        report.receipt.notes,
    ))
}

/// Drops the files' pages from the page cache; how many bytes stayed.
fn forget(paths: &[PathBuf]) -> Result<u64> {
    let mut left = 0;
    for path in paths {
        left += measure::forget_pages(path)?;
    }
    Ok(left)
}
