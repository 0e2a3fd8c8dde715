//! The order of calls: every call in every state.

use hoist_backend::{
    Error, OpenOptions, Outputs, Run, SequenceId, State, TokenBatch, Unwatched, WeightBackend,
};

use super::support::{Small, decoder, mixed_model};
use crate::fixture::Model;
use crate::guard::Writable;
use crate::{Case, Context, Expect, Failure, Need, Stop, Verdict};

/// Calls that have a place in the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    BeginLoad,
    Upload,
    LoadFrom,
    FinishLoad,
    AbortLoad,
    BuildIndex,
    Digest,
    ReadBack,
    InitWorkspace,
    Prepare,
    Forward,
    Truncate,
    Unload,
}

const CALLS: [(Call, &str); 13] = [
    (Call::BeginLoad, "begin_load"),
    (Call::Upload, "upload"),
    (Call::LoadFrom, "load_from"),
    (Call::FinishLoad, "finish_load"),
    (Call::AbortLoad, "abort_load"),
    (Call::BuildIndex, "build_index"),
    (Call::Digest, "digest"),
    (Call::ReadBack, "read_back"),
    (Call::InitWorkspace, "init_workspace"),
    (Call::Prepare, "prepare"),
    (Call::Forward, "forward"),
    (Call::Truncate, "truncate"),
    (Call::Unload, "unload"),
];

impl Call {
    fn is_decoding(self) -> bool {
        matches!(
            self,
            Call::InitWorkspace | Call::Prepare | Call::Forward | Call::Truncate
        )
    }

    fn is_legal(self, state: State) -> bool {
        match self {
            Call::BeginLoad => state == State::Empty,
            Call::Upload | Call::LoadFrom | Call::FinishLoad | Call::AbortLoad => state == State::Loading,
            Call::BuildIndex => state == State::Loaded,
            Call::Digest | Call::ReadBack => state >= State::Loaded,
            Call::InitWorkspace => state == State::Indexed,
            Call::Prepare => state >= State::Ready,
            Call::Forward | Call::Truncate => state == State::Prepared,
            Call::Unload => true,
        }
    }
}

const STATES: [State; 6] = [
    State::Empty,
    State::Loading,
    State::Loaded,
    State::Indexed,
    State::Ready,
    State::Prepared,
];

/// The cases.
pub fn cases() -> Vec<Case> {
    let mut holding = Vec::new();
    let mut decoding = Vec::new();
    for state in STATES {
        for (call, name) in CALLS {
            let decodes = state >= State::Ready || call.is_decoding();
            let group = if decodes { "decode" } else { "hold" };
            let case = Case::new("lifecycle", group, "pair", move |cx| {
                pair(cx, state, call, decodes)
            })
            .with("state", state)
            .with("call", name)
            .unseeded();
            if decodes {
                decoding.push(case.needs(Need::Decode));
            } else {
                holding.push(case);
            }
        }
    }
    let case = |name, run: fn(&mut Context<'_>) -> Verdict| Case::new("lifecycle", "again", name, run);
    holding
        .into_iter()
        .chain(decoding)
        .chain([
            case("after_abort", after_abort),
            case("after_unload", after_unload),
            case("after_a_refused_plan", after_a_refused_plan),
            case("unload_twice", unload_twice),
            case("unload_in_each_state", unload_in_each_state),
        ])
        .collect()
}

/// A model for a pair: one that decodes if it has to, otherwise any.
enum Subject {
    Holds(Box<Model>),
    Decodes(Box<Small>),
}

impl Subject {
    fn model(&self) -> &Model {
        match self {
            Subject::Holds(model) => model,
            Subject::Decodes(small) => &small.model,
        }
    }

    fn small(&self) -> Result<&Small, Stop> {
        match self {
            Subject::Decodes(small) => Ok(small),
            Subject::Holds(_) => Err(Stop::Skip("the case made no model that decodes".into())),
        }
    }

    /// Brings an empty backend to a state. Loading stops short of the last weight.
    fn reach(&self, backend: &mut dyn WeightBackend, state: State) -> Result<(), Stop> {
        let model = self.model();
        if state == State::Loading {
            backend.begin_load(&model.plan).succeeds("begin_load")?;
        }
        if state >= State::Loaded {
            model.load(backend)?;
        }
        if state >= State::Indexed {
            backend.build_index(&model.index).succeeds("build_index")?;
        }
        if state >= State::Ready {
            backend
                .init_workspace(&self.small()?.dims()?)
                .succeeds("init_workspace")?;
        }
        if state >= State::Prepared {
            decoder(backend)?
                .prepare(&self.small()?.program)
                .succeeds("prepare")?;
        }
        Ok(())
    }

    fn call(&self, backend: &mut dyn WeightBackend, call: Call) -> Result<hoist_backend::Result<()>, Stop> {
        let model = self.model();
        let first = &model.plan.weights[0];
        Ok(match call {
            Call::BeginLoad => backend.begin_load(&model.plan),
            Call::Upload => model.upload(backend, 0, 0, model.canonical[0].len())?,
            Call::LoadFrom => backend.load_from(&model.plan, &model.source()?, &Unwatched),
            Call::FinishLoad => backend.finish_load().map(|_| ()),
            Call::AbortLoad => backend.abort_load(),
            Call::BuildIndex => backend.build_index(&model.index).map(|_| ()),
            Call::Digest => backend.digest(first.id).map(|_| ()),
            Call::ReadBack => {
                let mut out = Writable::new(model.canonical[0].len())?;
                let result = backend.read_back(first.id, 0, &mut out);
                if result.is_err() && !out.is_untouched() {
                    return Err(Failure::new(
                        "output of a refused read_back",
                        "",
                        "left alone",
                        "written to",
                    )
                    .into());
                }
                result
            }
            Call::InitWorkspace => backend.init_workspace(&self.small()?.dims()?).map(|_| ()),
            Call::Prepare => decoder(backend)?.prepare(&self.small()?.program),
            Call::Forward => forward_one(self.small()?, backend)?,
            Call::Truncate => decoder(backend)?.truncate(SequenceId(0), 0),
            Call::Unload => backend.unload(),
        })
    }
}

fn forward_one(small: &Small, backend: &mut dyn WeightBackend) -> Result<hoist_backend::Result<()>, Stop> {
    let mut logits = crate::guard::WritableF32::new(small.program.vocab as usize)?;
    let batch = TokenBatch {
        runs: &[Run {
            sequence: SequenceId(0),
            tokens: &[1],
            want: &[hoist_backend::Want::Logits],
        }],
    };
    let mut outputs = Outputs {
        argmax: &mut [],
        logits: &mut logits,
    };
    let result = decoder(backend)?.forward(&batch, &mut outputs);
    logits.check("logits of forward")?;
    Ok(result)
}

fn pair(cx: &mut Context<'_>, state: State, call: Call, decodes: bool) -> Verdict {
    let subject = if decodes {
        Subject::Decodes(Box::new(Small::new(cx, Small::capacity(8, 2, 4))?))
    } else {
        Subject::Holds(Box::new(mixed_model(cx, 2)?))
    };
    let mut backend = cx.open()?;
    subject.reach(&mut *backend, state)?;
    let what = format!("{call:?} of a backend that is {state}");
    let result = subject.call(&mut *backend, call)?;
    if call.is_legal(state) {
        // Nothing has been uploaded yet, so that finishing is refused for another reason.
        if (state, call) == (State::Loading, Call::FinishLoad) {
            result.fails(what, "Incomplete", |e| matches!(e, Error::Incomplete { .. }))?;
            subject.model().upload_all(&mut *backend)?;
            backend.finish_load().succeeds("finish_load, after all")?;
            return Ok(subject.model().check_read_back(&mut *backend)?);
        }
        result.succeeds(what)?;
        return Ok(backend.unload().succeeds("unload")?);
    }
    result.fails(what, "BadState", |e| matches!(e, Error::BadState { .. }))?;
    // Nothing changed: what was possible before still is.
    let next = match state {
        State::Empty => Call::BeginLoad,
        State::Loading => {
            subject.model().upload_all(&mut *backend)?;
            Call::FinishLoad
        }
        State::Loaded => Call::BuildIndex,
        State::Indexed if decodes => Call::InitWorkspace,
        State::Indexed => Call::ReadBack,
        State::Ready => Call::Prepare,
        State::Prepared => Call::Forward,
    };
    subject
        .call(&mut *backend, next)?
        .succeeds(format!("{next:?} after a call out of order"))?;
    if state >= State::Loaded {
        subject.model().check_read_back(&mut *backend)?;
    }
    Ok(backend.unload().succeeds("unload")?)
}

fn after_abort(cx: &mut Context<'_>) -> Verdict {
    let (first, second) = (mixed_model(cx, 5)?, mixed_model(cx, 3)?);
    let mut backend = cx.open()?;
    for whole in [false, true] {
        backend.begin_load(&first.plan).succeeds("begin_load")?;
        if whole {
            first.upload_all(&mut *backend)?;
        } else {
            first
                .upload(&mut *backend, 0, 0, first.canonical[0].len())?
                .succeeds("upload")?;
        }
        backend.abort_load().succeeds("abort_load")?;
        expect_empty(&*backend)?;
    }
    second.load(&mut *backend)?;
    Ok(second.check_read_back(&mut *backend)?)
}

fn after_unload(cx: &mut Context<'_>) -> Verdict {
    let mut backend = cx.open()?;
    for _ in 0..3 {
        let model = mixed_model(cx, 4)?;
        model.load(&mut *backend)?;
        model.check_read_back(&mut *backend)?;
        backend.unload().succeeds("unload")?;
        expect_empty(&*backend)?;
    }
    Ok(())
}

fn after_a_refused_plan(cx: &mut Context<'_>) -> Verdict {
    let model = mixed_model(cx, 3)?;
    let mut backend = cx.open_with(&OpenOptions {
        memory_budget: Some(model.plan.resident.weights() - 1),
        ..OpenOptions::default()
    })?;
    for _ in 0..2 {
        backend
            .begin_load(&model.plan)
            .fails("begin_load past the budget", "OutOfMemory", |e| {
                matches!(e, Error::OutOfMemory { .. })
            })?;
        expect_empty(&*backend)?;
        backend
            .finish_load()
            .map(|_| ())
            .fails("finish_load after a refused plan", "BadState", |e| {
                matches!(e, Error::BadState { .. })
            })?;
    }
    Ok(())
}

fn unload_twice(cx: &mut Context<'_>) -> Verdict {
    let model = mixed_model(cx, 3)?;
    let mut backend = cx.open()?;
    model.load(&mut *backend)?;
    for _ in 0..3 {
        backend.unload().succeeds("unload")?;
    }
    model.load(&mut *backend)?;
    Ok(model.check_read_back(&mut *backend)?)
}

fn unload_in_each_state(cx: &mut Context<'_>) -> Verdict {
    let decodes = cx.check(Need::Decode).is_ok();
    let subject = match decodes.then(|| Small::new(cx, Small::capacity(8, 2, 4))) {
        Some(Ok(small)) => Subject::Decodes(Box::new(small)),
        Some(Err(Stop::Unsupported(_))) | None => Subject::Holds(Box::new(mixed_model(cx, 3)?)),
        Some(Err(other)) => return Err(other),
    };
    let last = if matches!(subject, Subject::Decodes(_)) {
        State::Prepared
    } else {
        State::Indexed
    };
    let mut backend = cx.open()?;
    for state in STATES.into_iter().filter(|s| *s <= last) {
        subject.reach(&mut *backend, state)?;
        backend
            .unload()
            .succeeds(format!("unload of a backend that is {state}"))?;
        expect_empty(&*backend)?;
    }
    // And each state once more by dropping.
    for state in STATES.into_iter().filter(|s| *s <= last) {
        let mut backend = cx.open()?;
        subject.reach(&mut *backend, state)?;
    }
    subject.reach(&mut *backend, last)?;
    Ok(subject.model().check_read_back(&mut *backend)?)
}

/// Demands that a backend says it holds nothing.
fn expect_empty(backend: &dyn WeightBackend) -> Result<(), Failure> {
    for device in backend.memory().succeeds("memory")?.devices {
        crate::judge::equal("resident bytes of an empty backend", 0, device.resident.total())?;
        crate::judge::equal("mapped bytes of an empty backend", 0, device.mapped)?;
    }
    Ok(())
}
