//! A backend that is ready to decode, and what the oracle says it should yield.

use std::collections::HashMap;

use hoist_backend::{
    BackendInfo, Capacity, DecodeBackend, Error, KvDtype, NumericsClass, OpenOptions, Outputs, Result, Run,
    SequenceId, TokenBatch, Want, WeightBackend, WorkspaceDims,
};

use super::bounds::Bounding;
use super::sketch::Sketch;
use crate::guard::{Writable, WritableF32};
use crate::judge::{self, Bounds};
use crate::oracle::{self, Interpreter};
use crate::{Context, Expect, Failure, Stop, Verdict};

/// Tokens for one sequence of a batch, with what each wants.
#[derive(Clone, Debug)]
pub(crate) struct Feed {
    pub(crate) sequence: u32,
    pub(crate) tokens: Vec<u32>,
    pub(crate) want: Vec<Want>,
}

impl Feed {
    /// Tokens that all want logits.
    pub(crate) fn logits(sequence: u32, tokens: &[u32]) -> Self {
        Self {
            sequence,
            tokens: tokens.to_vec(),
            want: vec![Want::Logits; tokens.len()],
        }
    }
}

/// What a step yielded, in the order of runs and tokens.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) logits: Vec<f32>,
    pub(crate) argmax: Vec<u32>,
}

/// A capacity for a program, within the backend's limits.
///
/// # Errors
/// [`Stop::Unsupported`] for what is beyond them.
pub(crate) fn capacity(
    info: &BackendInfo,
    sketch: &Sketch,
    sequences: u32,
    batch: u32,
) -> std::result::Result<Capacity, Stop> {
    let context = sketch.program.max_context;
    for (what, limit, wanted) in [
        ("positions", info.limits.max_context, context),
        ("sequences", info.limits.max_sequences, sequences),
        ("tokens of a batch", info.limits.max_batch_tokens, batch),
    ] {
        if limit.is_some_and(|limit| wanted > limit) {
            return Err(Stop::Unsupported(format!("{wanted} {what} are beyond its limit")));
        }
    }
    Ok(Capacity {
        max_context: context,
        max_sequences: sequences,
        max_batch_tokens: batch,
        kv: KvDtype::F16,
    })
}

/// Opens with options that a backend may refuse.
///
/// # Errors
/// [`Stop::Unsupported`] if it refuses an option; a failure if it does not open.
pub(crate) fn open(
    cx: &Context<'_>,
    options: &OpenOptions,
) -> std::result::Result<Box<dyn WeightBackend>, Stop> {
    match cx.target().open(options) {
        Ok(backend) => Ok(backend),
        Err(Error::Unsupported { what, .. }) if *options != OpenOptions::default() => {
            Err(Stop::Unsupported(format!("it does not take an option: {what}")))
        }
        Err(e) => Err(Failure::new("opening the device", format!("{options:?}"), "success", e).into()),
    }
}

/// A backend with a sketch's model resident and its program prepared.
pub(crate) struct Session {
    pub(crate) backend: Box<dyn WeightBackend>,
    vocab: usize,
}

impl Session {
    /// Opens a backend, loads and prepares.
    ///
    /// # Errors
    /// The first call that fails.
    pub(crate) fn open(
        cx: &Context<'_>,
        sketch: &Sketch,
        capacity: Capacity,
        options: &OpenOptions,
    ) -> std::result::Result<Self, Stop> {
        Self::on(cx, open(cx, options)?, sketch, capacity)
    }

    /// Loads and prepares on a backend that is empty.
    ///
    /// # Errors
    /// The first call that fails.
    pub(crate) fn on(
        cx: &Context<'_>,
        mut backend: Box<dyn WeightBackend>,
        sketch: &Sketch,
        capacity: Capacity,
    ) -> std::result::Result<Self, Stop> {
        let model = sketch.model(cx)?;
        model.load(backend.as_mut())?;
        backend.build_index(&model.index).succeeds("build_index")?;
        let dims = WorkspaceDims::new(&sketch.program, capacity)?;
        backend.init_workspace(&dims).succeeds("init_workspace")?;
        let mut session = Self {
            backend,
            vocab: sketch.program.vocab as usize,
        };
        session.decode()?.prepare(&sketch.program).succeeds("prepare")?;
        Ok(session)
    }

    /// The decoding side.
    ///
    /// # Errors
    /// If it has none, although it declares operations.
    pub(crate) fn decode(&mut self) -> std::result::Result<&mut dyn DecodeBackend, Failure> {
        self.backend
            .as_decode()
            .ok_or_else(|| Failure::new("as_decode", "", "a decoder, as operations are declared", "none"))
    }

    /// One step, with guarded outputs.
    ///
    /// # Errors
    /// If something was written outside of the outputs.
    pub(crate) fn forward(&mut self, feeds: &[Feed]) -> std::result::Result<Result<Answer>, Failure> {
        let runs: Vec<Run<'_>> = feeds
            .iter()
            .map(|f| Run {
                sequence: SequenceId(f.sequence),
                tokens: &f.tokens,
                want: &f.want,
            })
            .collect();
        let batch = TokenBatch { runs: &runs };
        let mut logits = WritableF32::new(batch.wanting(Want::Logits) * self.vocab)?;
        let mut argmax = Writable::new(batch.wanting(Want::ArgMax) * 4)?;
        argmax.fill(0xFF);
        let result = {
            let mut out = Outputs {
                argmax: bytemuck::cast_slice_mut(&mut argmax),
                logits: &mut logits,
            };
            self.decode()?.forward(&batch, &mut out)
        };
        logits.check("forward: bytes before the logits")?;
        argmax.check("forward: bytes before the arg-maxima")?;
        Ok(result.map(|()| Answer {
            logits: logits.to_vec(),
            argmax: bytemuck::cast_slice(&argmax).to_vec(),
        }))
    }

    /// Demands lengths of sequences.
    ///
    /// # Errors
    /// The first that differs.
    pub(crate) fn check_lengths(&mut self, when: &str, lengths: &[(u32, u32)]) -> Result<(), Failure> {
        for (sequence, expected) in lengths {
            let found = self
                .decode()?
                .sequence_length(SequenceId(*sequence))
                .succeeds("sequence_length")?;
            judge::equal(&format!("length of sequence {sequence} {when}"), *expected, found)?;
        }
        Ok(())
    }
}

/// What a token's logits should be, and how far a *bounded* backend may be off; `None`: anything will do, since a choice
/// inside (of experts) is as close as the bounds.
type Expected = Option<(Vec<f32>, Vec<f64>)>;

enum Engine<'a> {
    Exact(Interpreter<'a>),
    Bounded(Box<Bounding<'a>>),
}

/// The oracle for a sketch. Tokens of programs without memory are computed once.
pub(crate) struct Oracle<'a> {
    engine: Engine<'a>,
    /// For programs without memory: what each token yields.
    known: Option<HashMap<u32, std::result::Result<Expected, ()>>>,
    lengths: HashMap<u32, u32>,
    vocab: usize,
}

impl<'a> Oracle<'a> {
    /// For the class that the backend under test declares.
    pub(crate) fn new(cx: &Context<'_>, sketch: &'a Sketch) -> Self {
        Self::of(cx.info().numerics, sketch)
    }

    pub(crate) fn of(class: NumericsClass, sketch: &'a Sketch) -> Self {
        let program = &sketch.program;
        Self {
            engine: match class {
                NumericsClass::Exact => Engine::Exact(Interpreter::new(program, sketch, KvDtype::F16)),
                NumericsClass::Bounded => Engine::Bounded(Box::new(Bounding::new(program, sketch))),
            },
            known: sketch.is_stateless().then(HashMap::new),
            lengths: HashMap::new(),
            vocab: program.vocab as usize,
        }
    }

    pub(crate) fn length(&self, sequence: u32) -> u32 {
        self.lengths.get(&sequence).copied().unwrap_or(0)
    }

    /// Cuts a sequence.
    ///
    /// # Errors
    /// A failure of the suite itself.
    pub(crate) fn truncate(&mut self, sequence: u32, length: u32) -> Result<(), Failure> {
        self.lengths.insert(sequence, length);
        if self.known.is_some() {
            return Ok(());
        }
        match &mut self.engine {
            Engine::Exact(i) => i.truncate(SequenceId(sequence), length),
            Engine::Bounded(i) => i.truncate(SequenceId(sequence), length),
        }
        .map_err(|e| Failure::new("the oracle", "truncate", "success", e))
    }

    /// Whether a token at the start of a sequence yields finite results.
    ///
    /// # Errors
    /// A failure of the suite itself.
    pub(crate) fn is_finite(&mut self, token: u32) -> Result<bool, Failure> {
        let finite = self.step(0, token)?.is_ok();
        self.truncate(0, 0)?;
        Ok(finite)
    }

    /// `Err(())` inside stands for NonFinite.
    fn step(
        &mut self,
        sequence: u32,
        token: u32,
    ) -> std::result::Result<std::result::Result<Expected, ()>, Failure> {
        if let Some(known) = self.known.as_ref().and_then(|k| k.get(&token)) {
            let known = known.clone();
            *self.lengths.entry(sequence).or_default() += 1;
            return Ok(known);
        }
        let id = SequenceId(sequence);
        if self.known.is_some() {
            // Its own account of lengths is of no use here, and must not run out.
            match &mut self.engine {
                Engine::Exact(i) => i.truncate(id, 0),
                Engine::Bounded(i) => i.truncate(id, 0),
            }
            .map_err(|e| Failure::new("the oracle", "truncate", "success", e))?;
        }
        let found = match &mut self.engine {
            Engine::Exact(i) => i
                .step(id, token, true)
                .map(|y| y.map(|y| (y, Vec::new())).or(Some((Vec::new(), Vec::new())))),
            Engine::Bounded(i) => i.step(id, token),
        };
        let found = match found {
            Ok(y) => Ok(y),
            Err(Error::NonFinite { .. }) => Err(()),
            Err(e) => return Err(Failure::new("the oracle", "", "a program that it can run", e)),
        };
        if let Some(known) = &mut self.known {
            known.insert(token, found.clone());
        }
        *self.lengths.entry(sequence).or_default() += 1;
        Ok(found)
    }
}

/// Feeds a batch to the backend and to the oracle, and judges everything that was asked for.
///
/// # Errors
/// What is wrong.
pub(crate) fn compare(
    cx: &mut Context<'_>,
    what: &str,
    session: &mut Session,
    oracle: &mut Oracle<'_>,
    feeds: &[Feed],
) -> Verdict {
    let found = session.forward(feeds)?;
    judge_step(cx, what, session, oracle, feeds, found)
}

/// What [`compare`] does once the backend has answered.
///
/// # Errors
/// What is wrong.
pub(crate) fn judge_step(
    cx: &mut Context<'_>,
    what: &str,
    session: &mut Session,
    oracle: &mut Oracle<'_>,
    feeds: &[Feed],
    found: Result<Answer>,
) -> Verdict {
    let before: Vec<(u32, u32)> = feeds
        .iter()
        .map(|f| (f.sequence, oracle.length(f.sequence)))
        .collect();
    let mut expected = Vec::new();
    let mut finite = true;
    for (sequence, token) in feeds
        .iter()
        .flat_map(|f| f.tokens.iter().map(move |t| (f.sequence, *t)))
    {
        match oracle.step(sequence, token)? {
            Ok(y) => expected.push(y),
            Err(()) => {
                finite = false;
                break;
            }
        }
    }
    let exact = cx.info().numerics == NumericsClass::Exact;
    match (finite, found) {
        (true, Ok(answer)) => {
            judge_answer(cx, what, oracle.vocab, feeds, &expected, &answer)?;
            let after: Vec<_> = before.iter().map(|(s, _)| (*s, oracle.length(*s))).collect();
            session.check_lengths("after a step", &after)?;
            Ok(())
        }
        (false, Err(Error::NonFinite { .. })) => {
            for (sequence, length) in &before {
                oracle.truncate(*sequence, *length)?;
            }
            Ok(session.check_lengths("after an error", &before)?)
        }
        // What overflows by a hair's breadth need not overflow for a bounded backend.
        (false, Ok(_)) if !exact => {
            for (sequence, length) in &before {
                oracle.truncate(*sequence, *length)?;
                session
                    .decode()?
                    .truncate(SequenceId(*sequence), *length)
                    .succeeds("truncate")?;
            }
            Ok(())
        }
        (true, Err(e)) => Err(Failure::new(what, describe(feeds), "results", e).into()),
        (false, Err(e)) => Err(Failure::new(what, describe(feeds), "NonFinite", e).into()),
        (false, Ok(_)) => Err(Failure::new(what, describe(feeds), "NonFinite", "results").into()),
    }
}

fn describe(feeds: &[Feed]) -> String {
    let runs: Vec<String> = feeds
        .iter()
        .map(|f| format!("{} tokens of sequence {}", f.tokens.len(), f.sequence))
        .collect();
    runs.join(", ")
}

fn judge_answer(
    cx: &mut Context<'_>,
    what: &str,
    vocab: usize,
    feeds: &[Feed],
    expected: &[Expected],
    answer: &Answer,
) -> Verdict {
    let wants: Vec<Want> = feeds.iter().flat_map(|f| f.want.iter().copied()).collect();
    let (mut logits, mut bounds, mut found) = (Vec::new(), Vec::new(), Vec::new());
    let mut rows = answer.logits.chunks(vocab);
    let mut best = answer.argmax.iter();
    for (place, (want, expected)) in wants.iter().zip(expected).enumerate() {
        let row = (*want == Want::Logits).then(|| rows.next()).flatten();
        let id = (*want == Want::ArgMax).then(|| best.next()).flatten();
        let Some((y, bound)) = expected else { continue };
        if let Some(row) = row {
            logits.extend_from_slice(y);
            bounds.extend_from_slice(bound);
            found.extend_from_slice(row);
        }
        if let Some(id) = id {
            judge_argmax(what, place, y, bound, *id)?;
        }
    }
    let bounds = Bounds {
        element: &bounds,
        row: super::bounds::ROW,
        nmse: super::bounds::nmse(&logits, &bounds),
    };
    Ok(cx.judge(what, &logits, &found, vocab, &bounds)?)
}

fn judge_argmax(what: &str, place: usize, y: &[f32], bound: &[f64], found: u32) -> Result<(), Failure> {
    let expected = oracle::arg_max(y);
    let at = found as usize;
    // For an exact backend there are no bounds.
    let close = at < bound.len()
        && f64::from(y[expected as usize]) - f64::from(y[at]) <= bound[expected as usize] + bound[at];
    if found == expected || close {
        return Ok(());
    }
    Err(Failure::new(
        what,
        format!("arg-max of token {place} of the batch"),
        expected,
        found,
    ))
}

/// A sketch on a fresh backend, one batch after the other, against the oracle.
///
/// # Errors
/// What is wrong.
pub(crate) fn run(
    cx: &mut Context<'_>,
    what: &str,
    sketch: &Sketch,
    batches: &[Vec<Feed>],
    options: &OpenOptions,
) -> Verdict {
    let most = |f: fn(&Vec<Feed>) -> usize| batches.iter().map(f).max().unwrap_or(1).max(1) as u32;
    let tokens = most(|b| b.iter().map(|f| f.tokens.len()).sum());
    let sequences = most(|b| b.iter().map(|f| f.sequence as usize + 1).max().unwrap_or(1));
    let capacity = capacity(cx.info(), sketch, sequences, tokens)?;
    let mut session = Session::open(cx, sketch, capacity, options)?;
    let mut oracle = Oracle::new(cx, sketch);
    for feeds in batches {
        compare(cx, what, &mut session, &mut oracle, feeds)?;
    }
    Ok(())
}
