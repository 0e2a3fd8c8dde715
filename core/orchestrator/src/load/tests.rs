use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use hoist_backend::{
    Capacity, Error as ContractError, KvDtype, Mapping, SourceFile, State, Unwatched, WeightId,
};

use super::*;
use crate::FileSource;
use crate::fake::{self, Backend, Fault};

const WEIGHTS: &[(&str, WeightClass, u64)] = &[
    ("embedding", WeightClass::Quantized, 3_000_000),
    ("norm", WeightClass::Gamma, 64),
    ("bias", WeightClass::Bias, 32),
    ("q", WeightClass::Quantized, 700_001),
    ("f", WeightClass::Float, 9_000),
];

fn plan() -> LoadPlan {
    fake::plan(WEIGHTS)
}

fn source(plan: &LoadPlan) -> FileSource {
    let bytes = (0..plan.source_bytes).map(|i| (i * 31 + i / 251) as u8).collect();
    FileSource::new(&fake::manifest_in_memory(bytes), plan).unwrap()
}

fn dims() -> WorkspaceDims {
    WorkspaceDims {
        capacity: Capacity {
            max_context: 8,
            max_sequences: 1,
            max_batch_tokens: 8,
            kv: KvDtype::F16,
        },
        kv: vec![],
        values: vec![],
        table_bytes: 0,
        vocab: 1,
    }
}

fn run(backend: &mut Backend, source: &dyn WeightSource, watch: &dyn LoadWatch) -> Result<LoadReport> {
    let (plan, dims) = (plan(), dims());
    let options = LoadOptions {
        verify: true,
        workspace: Some(&dims),
        watch,
    };
    load(backend, &fake::index_of(&plan), &plan, source, &options)
}

#[test]
fn a_load_makes_everything_resident_and_reports_it() {
    for digests in [false, true] {
        let mut backend = Backend::new();
        backend.digests = digests;
        let report = run(&mut backend, &source(&plan()), &Unwatched).unwrap();
        assert_eq!(backend.state(), State::Ready);
        assert_eq!(
            report.counts,
            WeightCounts {
                quantized: 2,
                float: 1,
                gamma: 1,
                bias: 1
            }
        );
        let verified = report.verified.unwrap();
        assert_eq!((verified.weights, verified.bytes), (5, plan().nbytes));
        assert_eq!(verified.mismatches, [""; 0]);
        assert_eq!(verified.on_device, if digests { 5 } else { 0 });
        assert!(report.workspace.is_some());
        assert!(report.timing.total >= report.timing.upload + report.timing.verify);
    }
}

#[test]
fn a_corrupted_weight_is_named_and_nothing_stays() {
    for digests in [false, true] {
        let mut backend = Backend::with(Fault::Corrupt(WeightId(3)));
        backend.digests = digests;
        let error = run(&mut backend, &source(&plan()), &Unwatched).unwrap_err();
        assert_eq!(
            error.to_string(),
            "1 of 5 weights differ from the file after the upload: `q`"
        );
        assert_eq!((backend.state(), backend.resident()), (State::Empty, 0));
    }
}

#[test]
fn every_failure_of_a_backend_leaves_it_empty() {
    for fault in [
        Fault::Upload(WeightId(0)),
        Fault::Upload(WeightId(4)),
        Fault::Swallow(WeightId(1)),
        Fault::Index,
        Fault::IndexReceipt,
        Fault::WeightReceipt,
        Fault::ReadBack,
        Fault::Workspace,
    ] {
        let mut backend = Backend::with(fault);
        let error = run(&mut backend, &source(&plan()), &Unwatched).unwrap_err();
        assert_eq!(
            (backend.state(), backend.resident()),
            (State::Empty, 0),
            "{fault:?}"
        );
        match (fault, &error) {
            (Fault::Swallow(_), Error::Backend(ContractError::Incomplete { weight, .. })) => {
                assert_eq!(weight, "norm");
            }
            (Fault::IndexReceipt | Fault::WeightReceipt, Error::Receipt { .. }) => {}
            (_, Error::Backend(ContractError::DeviceLost { reason, .. })) => {
                assert_eq!(*reason, format!("{fault:?}"));
            }
            _ => panic!("{fault:?}: {error}"),
        }
        // The same backend, cured, takes the same model.
        backend.faults.clear();
        run(&mut backend, &source(&plan()), &Unwatched).unwrap();
    }
}

#[test]
fn failing_to_give_back_is_told_with_the_cause() {
    let mut backend = Backend::with(Fault::IndexReceipt);
    backend.faults.push(Fault::Unload);
    let error = run(&mut backend, &source(&plan()), &Unwatched).unwrap_err();
    let said = error.to_string();
    let (cause, cleanup) = said
        .split_once("; then giving back what was resident failed: ")
        .unwrap();
    assert!(cause.starts_with("backend `fake` made "), "{said}");
    assert_eq!(cleanup, "fake was lost: Unload");
}

#[test]
fn a_device_that_is_lost_is_named_once() {
    let mut backend = Backend::with(Fault::Index);
    backend.faults.push(Fault::Unload);
    let error = run(&mut backend, &source(&plan()), &Unwatched).unwrap_err();
    assert_eq!(error.to_string(), "fake was lost: Index");
}

#[test]
fn a_backend_that_is_not_empty_keeps_what_it_has() {
    let mut backend = Backend::new();
    run(&mut backend, &source(&plan()), &Unwatched).unwrap();
    let resident = backend.resident();
    let error = run(&mut backend, &source(&plan()), &Unwatched).unwrap_err();
    assert!(matches!(error, Error::Backend(ContractError::BadState { .. })));
    assert_eq!((backend.state(), backend.resident()), (State::Ready, resident));
}

/// Cancels at the n-th question.
struct CancelAt(AtomicU64);

impl LoadWatch for CancelAt {
    fn progress(&self, _: Progress) {}

    fn cancelled(&self) -> bool {
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                Some(n.saturating_sub(1))
            })
            .is_ok_and(|before| before == 0)
    }
}

#[test]
fn cancelling_at_any_point_leaves_nothing() {
    let source = source(&plan());
    let mut questions = 0;
    loop {
        let mut backend = Backend::new();
        match run(&mut backend, &source, &CancelAt(AtomicU64::new(questions))) {
            Ok(_) => break,
            Err(Error::Backend(ContractError::Cancelled)) => {
                assert_eq!(
                    (backend.state(), backend.resident()),
                    (State::Empty, 0),
                    "{questions}"
                );
            }
            Err(other) => panic!("{other}"),
        }
        questions += 1;
        assert!(questions < 1000);
    }
    assert!(questions > 10, "only {questions} places to cancel at");
}

/// Sees the phases in order, and that no phase goes past its total.
#[derive(Default)]
struct Phases(Mutex<Vec<Phase>>);

impl LoadWatch for Phases {
    fn progress(&self, progress: Progress) {
        assert!(progress.done <= progress.total, "{progress:?}");
        let mut phases = self.0.lock().unwrap();
        if phases.last() != Some(&progress.phase) {
            phases.push(progress.phase);
        }
    }

    fn cancelled(&self) -> bool {
        false
    }
}

#[test]
fn phases_are_seen_in_their_order() {
    let watch = Phases::default();
    run(&mut Backend::new(), &source(&plan()), &watch).unwrap();
    assert_eq!(
        watch.0.into_inner().unwrap(),
        [Phase::Upload, Phase::Index, Phase::Verify, Phase::Workspace]
    );
}

/// A source that fails or changes from the n-th call on.
struct Failing {
    inner: FileSource,
    reads_left: AtomicU64,
    checks_left: AtomicU64,
}

impl Failing {
    fn new(reads: u64, checks: u64) -> Self {
        Self {
            inner: source(&plan()),
            reads_left: AtomicU64::new(reads),
            checks_left: AtomicU64::new(checks),
        }
    }
}

fn spend(left: &AtomicU64) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
        .is_ok()
}

impl WeightSource for Failing {
    fn read_at(&self, weight: WeightId, offset: u64, out: &mut [u8]) -> hoist_backend::Result<()> {
        if spend(&self.reads_left) {
            return self.inner.read_at(weight, offset, out);
        }
        Err(ContractError::SourceIo {
            file: "memory".into(),
            offset,
            len: out.len() as u64,
            error: std::io::ErrorKind::UnexpectedEof.into(),
        })
    }

    fn files(&self) -> &[SourceFile] {
        self.inner.files()
    }

    fn share(&self, file: u32) -> Option<Arc<dyn Mapping>> {
        self.inner.share(file)
    }

    fn check_unchanged(&self) -> hoist_backend::Result<()> {
        if spend(&self.checks_left) {
            return Ok(());
        }
        Err(ContractError::SourceChanged {
            file: "memory".into(),
            what: "its length",
            expected: "1".into(),
            found: "0".into(),
        })
    }
}

#[test]
fn a_source_that_fails_or_changes_at_any_point_leaves_nothing() {
    let mut failures = 0;
    for reads in 0.. {
        let mut backend = Backend::new();
        match run(&mut backend, &Failing::new(reads, 9), &Unwatched) {
            Ok(_) => break,
            Err(Error::Backend(ContractError::SourceIo { .. })) => failures += 1,
            Err(other) => panic!("{other}"),
        }
        assert_eq!((backend.state(), backend.resident()), (State::Empty, 0));
    }
    assert!(failures > 10, "{failures}");
    for checks in 0..3 {
        let mut backend = Backend::new();
        let error = run(&mut backend, &Failing::new(u64::MAX, checks), &Unwatched).unwrap_err();
        assert!(matches!(
            error,
            Error::Backend(ContractError::SourceChanged { .. })
        ));
        assert_eq!((backend.state(), backend.resident()), (State::Empty, 0));
    }
    run(&mut Backend::new(), &Failing::new(u64::MAX, 3), &Unwatched).unwrap();
}
