use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use hoist_core::backend::{LoadPlan, Mapping, Unwatched, WeightSource};
use hoist_core::orchestrator::{FileSource, LoadOptions, OpenedModel, load, plan_for};
use memmap2::{Advice, MmapMut};
use serde_json::{Value, json};

use super::bench_load_cuda::CudaBench;
use crate::args::{DeviceArgs, ModelArg};
use crate::backends::{self, Selected};
use crate::exit::{Code, Usage};
use crate::models;
use crate::report::table::{self, Align};
use crate::report::{self, print_json, print_text, units};
use crate::watch::{catch_interrupts, interrupted};

/// Bytes that a thread of the plain copy takes at a time.
const PIECE: usize = 1 << 20;

/// Bytes a second of loads, beside a plain parallel copy of the same bytes.
///
/// Both start with nothing allocated and end with every byte in memory of their own; the copy does nothing else, a load
/// also checks, indexes and accounts for every byte. They take turns, after one unmeasured round that brings the file
/// into the page cache.
#[derive(Args, Debug)]
pub(crate) struct BenchLoad {
    #[command(flatten)]
    model: ModelArg,

    #[command(flatten)]
    device: DeviceArgs,

    /// Measured rounds
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(5..=1000))]
    runs: u32,

    /// Drop the file from the page cache before each load (cuda; there the link and the disk are measured beside)
    #[arg(long)]
    cold: bool,
}

impl BenchLoad {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        catch_interrupts()?;
        if self.device.backend.split(':').next() == Some(hoist_cuda::NAME) {
            let bench = CudaBench {
                model: &self.model,
                device: &self.device,
                runs: self.runs,
                cold: self.cold,
            };
            return bench.run(json);
        }
        if self.cold {
            return Err(Usage("--cold is measured with --backend cuda".into()).into());
        }
        let device = backends::select(&self.device)?;
        let threads = match self.device.threads {
            Some(threads) => threads as usize,
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        let (mut uploads, mut loads, mut copies, mut warm_copies) = (vec![], vec![], vec![], vec![]);
        let mut last = None;
        for round in 0..=self.runs {
            if interrupted() {
                return Err(hoist_core::backend::Error::Cancelled.into());
            }
            let opened = models::open(&self.model)?;
            let run = self.one(&device, opened)?;
            let Some(copied) = plain_copy(&run.source, &run.plan, threads) else {
                return Err(Usage("the file cannot be mapped to compare with".into()).into());
            };
            if round > 0 {
                uploads.push(run.upload);
                loads.push(run.load);
                copies.push(copied.fresh);
                warm_copies.push(copied.warm);
            }
            last = Some(run);
        }
        let Some(run) = last else {
            return Ok(Code::Ok);
        };
        let bytes = run.plan.nbytes;
        let rates = Rates {
            load: Spread::of(&loads, bytes),
            upload: Spread::of(&uploads, bytes),
            memcpy: Spread::of(&copies, bytes),
            warm_memcpy: Spread::of(&warm_copies, bytes),
        };
        if json {
            print_json(&json!({
                "schema": "hoist.bench.load/1",
                "model": report::model::json(&run.opened.0, &run.opened.1),
                "backend": run.backend,
                "bytes": bytes,
                "weights": run.plan.weights.len(),
                "runs": self.runs,
                "threads": threads,
                "load": rates.load.json(),
                "upload": rates.upload.json(),
                "memcpy": rates.memcpy.json(),
                "memcpy_warm": rates.warm_memcpy.json(),
                "share": units::rounded(rates.upload.median / rates.memcpy.median, 4),
                "share_of_warm": units::rounded(rates.upload.median / rates.warm_memcpy.median, 4),
            }))?;
        } else {
            let row = |name: &str, s: &Spread| {
                let rate = |r: f64| format!("{r:.2}");
                vec![name.to_owned(), rate(s.median), rate(s.min), rate(s.max)]
            };
            let table = table::render(
                &[
                    ("GB/s", Align::Left),
                    ("median", Align::Right),
                    ("min", Align::Right),
                    ("max", Align::Right),
                ],
                [
                    row("load, from opening the file", &rates.load),
                    row("upload alone", &rates.upload),
                    row("plain copy to fresh memory", &rates.memcpy),
                    row("plain copy to touched memory", &rates.warm_memcpy),
                ],
            );
            print_text(&format!(
                "{} in {} weights, {} runs, {threads} threads\n\n{table}\nupload: {:.0} % of the plain copy to fresh memory\n",
                units::bytes(bytes),
                run.plan.weights.len(),
                self.runs,
                100.0 * rates.upload.median / rates.memcpy.median,
            ))?;
        }
        Ok(Code::Ok)
    }

    /// One load on a fresh backend, given back afterwards.
    fn one(&self, device: &Selected, opened: OpenedModel) -> Result<Run> {
        let mut backend = device.open(&self.device.open_options())?;
        let started = Instant::now();
        let plan = plan_for(backend.as_ref(), &opened.model, None)?;
        let source = FileSource::new(&opened.manifest, &plan)?;
        let options = LoadOptions {
            verify: false,
            workspace: None,
            watch: &Unwatched,
        };
        let report = load(backend.as_mut(), &opened.model.index, &plan, &source, &options)?;
        let load = opened.open + started.elapsed();
        let json = report::plan::backend_json(backend.info());
        backend.unload()?;
        Ok(Run {
            upload: report.timing.upload,
            load,
            backend: json,
            opened: (opened.manifest, opened.model),
            plan,
            source,
        })
    }
}

struct Run {
    upload: Duration,
    load: Duration,
    backend: Value,
    opened: (hoist_core::formats::Manifest, hoist_core::model::ResolvedModel),
    plan: LoadPlan,
    source: FileSource,
}

struct Rates {
    load: Spread,
    upload: Spread,
    memcpy: Spread,
    warm_memcpy: Spread,
}

/// Median, least and most of a rate, in 10^9 bytes a second.
pub(crate) struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    pub(crate) fn of(times: &[Duration], bytes: u64) -> Self {
        let mut rates: Vec<_> = times
            .iter()
            .map(|t| bytes as f64 / t.as_secs_f64().max(1e-9) / 1e9)
            .collect();
        rates.sort_by(f64::total_cmp);
        let at = |i: usize| rates.get(i).copied().unwrap_or(f64::NAN);
        let middle = rates.len() / 2;
        let median = if rates.len() % 2 == 1 {
            at(middle)
        } else {
            (at(middle.wrapping_sub(1)) + at(middle)) / 2.0
        };
        Self {
            median,
            min: at(0),
            max: at(rates.len().wrapping_sub(1)),
        }
    }

    pub(crate) fn median(&self) -> f64 {
        self.median
    }

    pub(crate) fn min(&self) -> f64 {
        self.min
    }

    pub(crate) fn max(&self) -> f64 {
        self.max
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "gb_s": {
                "median": units::rounded(self.median, 3),
                "min": units::rounded(self.min, 3),
                "max": units::rounded(self.max, 3),
            },
        })
    }
}

struct Copied {
    /// To memory that the copy is the first to touch, as a load does.
    fresh: Duration,
    /// The same again, to the same memory.
    warm: Duration,
}

/// Copies as many bytes as the plan reads, from mappings of its files, with `threads` threads; `None` if a file cannot be
/// mapped.
fn plain_copy(source: &FileSource, plan: &LoadPlan, threads: usize) -> Option<Copied> {
    let mappings: Vec<Arc<dyn Mapping>> = (0..source.files().len())
        .map(|file| source.share(u32::try_from(file).ok()?))
        .collect::<Option<_>>()?;
    let pieces: Vec<(usize, Range<usize>)> = plan
        .weights
        .iter()
        .flat_map(|w| &w.views)
        .flat_map(|view| {
            let file = view.file as usize;
            let start = usize::try_from(view.offset).unwrap_or(usize::MAX);
            let len = usize::try_from(view.nbytes()).unwrap_or(usize::MAX);
            let limit = mappings.get(file).map_or(0, |m| m.bytes().len());
            let end = start.saturating_add(len).min(limit);
            (start..end)
                .step_by(PIECE)
                .map(move |at| (file, at..end.min(at + PIECE)))
        })
        .collect();
    let total = pieces.iter().map(|(_, range)| range.len()).sum();

    let started = Instant::now();
    let mut copy = MmapMut::map_anon(total).ok()?;
    // As large pages as a load takes for its arena; only an advice.
    let _ = copy.advise(Advice::HugePage);
    copy_all(&mappings, &pieces, &mut copy, threads);
    let fresh = started.elapsed();
    let started = Instant::now();
    copy_all(&mappings, &pieces, &mut copy, threads);
    let warm = started.elapsed();
    std::hint::black_box(&copy);
    Some(Copied { fresh, warm })
}

fn copy_all(
    mappings: &[Arc<dyn Mapping>],
    pieces: &[(usize, Range<usize>)],
    copy: &mut [u8],
    threads: usize,
) {
    let mut rest = copy;
    let mut work = Vec::with_capacity(pieces.len());
    for (file, range) in pieces {
        let (to, after) = rest.split_at_mut(range.len());
        rest = after;
        work.push(std::sync::Mutex::new((
            &mappings[*file].bytes()[range.clone()],
            to,
        )));
    }
    let next = AtomicUsize::new(0);
    let run = || {
        while let Some(piece) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut piece = piece.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let (from, to) = &mut *piece;
            to.copy_from_slice(from);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(run);
        }
        run();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_even_and_odd_numbers_of_runs() {
        let ms = |ns: &[u64]| ns.iter().map(|n| Duration::from_millis(*n)).collect::<Vec<_>>();
        let s = Spread::of(&ms(&[100, 400, 200]), 1_000_000_000);
        assert_eq!((s.median, s.min, s.max), (5.0, 2.5, 10.0));
        assert_eq!(Spread::of(&ms(&[100, 200, 200, 400]), 1_000_000_000).median, 5.0);
    }
}
