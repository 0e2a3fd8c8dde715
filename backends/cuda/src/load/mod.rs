//! Pulls a plan onto the device: reader threads fill slots of a small pinned ring, and each copies its own on.
//!
//! ```text
//! file ──pread──▶ slot (two a thread) ──its stream──▶ arena                   (large runs)
//!                                     └─▶ staging     ──kernel──▶ arena          (small tensors, changed values)
//! weights that are whole ──second stream──▶ row exponents, checks
//! ```
//!
//! A thread reads into one slot while the other one's copy is under way; events tell when a slot is free and its bytes
//! have arrived. The calling thread counts what is whole, starts what follows on a second stream, and watches: for
//! progress, cancellation and reads that stand still. Reader threads borrow nothing, so that one that hangs in a read from
//! a dead disk does not hang the caller.
//!
//! Ring and streams outlive a load: the process keeps them for the next one, unless a thread still holds them. Memory of the
//! device does not, so that plans find all of it.

mod input;
mod ring;
mod schedule;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hoist_backend::{
    Error, FloatLayout, LoadPlan, LoadWatch, Phase, Progress, Result, WeightId, WeightSource,
};

use self::input::{Input, Path};
pub(crate) use self::input::{cached_bytes, open_direct};
use self::ring::{Ring, SLOTS};
use self::schedule::{CHUNK_BYTES, Chunk, Desk, MAX_PIECES, PAGE, STEP_BYTES, Schedule, TABLE_BYTES};
use crate::driver::{Context, DeviceBuffer, Event, Stream};
use crate::layout::{Finisher, Mover, finish_bytes, transposing_pieces};
use crate::modules::Modules;
use crate::residency::{Books, Residency, Resident};
use crate::tables::Piece;

/// Most reader threads: with two slots of 4 MiB each they keep the link busy while half of them read.
const MAX_THREADS: usize = 16;
/// Fewest, where the caller names no number: reads that go past the page cache want to be many at a time.
const MIN_THREADS: usize = 8;
/// Bytes that become whole before what follows is started.
const FINISH_BYTES: u64 = 64 << 20;
/// Weights, likewise.
const FINISH_WEIGHTS: usize = 4096;
/// How often the calling thread looks around.
const TICK: Duration = Duration::from_millis(2);
/// A read that stands still for so long is given up.
const STALL: Duration = Duration::from_secs(60);
/// A pause that the report mentions.
const PAUSE: Duration = Duration::from_secs(1);
/// Bytes of a thread's staging on the device.
const STAGING_BYTES: u64 = (PAGE + CHUNK_BYTES + PAGE + TABLE_BYTES).next_multiple_of(256);

/// What decides how large a load's equipment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    lanes: usize,
    /// The driver is made to refuse page locking past these bytes; for tests.
    pin_limit: Option<usize>,
}

impl Shape {
    /// Lanes for `threads` readers, or for a number of its own, and one for the calling thread: it reads what only the
    /// source can.
    pub(crate) fn new(threads: Option<u32>, pin_limit: Option<usize>) -> Self {
        let readers = threads.map_or_else(default_threads, |n| (n as usize).min(MAX_THREADS));
        Self {
            lanes: readers + 1,
            pin_limit,
        }
    }
}

/// What a load needs and a plan does not decide: made ahead of the first one, while headers are read, and kept for the
/// next one.
#[derive(Debug)]
pub(crate) struct Equipment {
    shape: Shape,
    ring: Arc<Ring>,
    lanes: Vec<Lane>,
    finishing: Stream,
    desk: Desk,
    /// How long it took to make; `None` if it was kept from a load before.
    took: Option<Duration>,
    context: Arc<Context>,
}

/// A thread's own stream, and an event for each of its slots.
#[derive(Debug)]
struct Lane {
    stream: Stream,
    events: [Event; SLOTS],
}

/// Reader threads where the caller names none.
fn default_threads() -> usize {
    std::thread::available_parallelism()
        .map_or(1, usize::from)
        .clamp(MIN_THREADS, MAX_THREADS)
}

/// Memory of the host for a load that is to come, touched while the context is made.
#[derive(Debug)]
pub(crate) struct Preparation(Option<JoinHandle<(Prepared, Books)>>);

/// What came of it, as far as a load is concerned.
#[derive(Debug, Default)]
pub(crate) struct Prepared {
    ring: Option<Ring>,
    desk: Desk,
}

impl Preparation {
    /// Starts.
    pub(crate) fn start(shape: Shape) -> Self {
        // Without a thread the ring is made when it is needed.
        let thread = std::thread::Builder::new()
            .name("hoist-ring".into())
            .spawn(move || {
                let prepared = Prepared {
                    // What goes wrong here goes wrong again when it is needed, and says so.
                    ring: Ring::new(shape.lanes, shape.pin_limit).ok(),
                    desk: Desk::touched(),
                };
                (prepared, Books::touched())
            });
        Self(thread.ok())
    }

    /// What came of it.
    pub(crate) fn wait(self) -> (Prepared, Books) {
        let thread = self.0.and_then(|thread| thread.join().ok());
        thread.unwrap_or_default()
    }
}

impl Equipment {
    /// What a load needs, from what was prepared for that shape or anew.
    pub(crate) fn new(
        context: &Arc<Context>,
        modules: &Modules,
        prepared: Prepared,
        shape: Shape,
    ) -> Result<Self> {
        let started = Instant::now();
        context.bind()?;
        let ring = match prepared.ring {
            Some(ring) => ring,
            None => Ring::new(shape.lanes, shape.pin_limit)?,
        };
        let ring = Arc::new(ring);
        let lanes = (0..ring.lanes())
            .map(|_| {
                Ok(Lane {
                    stream: Stream::new(context)?,
                    events: [Event::new(context)?, Event::new(context)?],
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let finishing = Stream::new(context)?;
        // Code is given to the driver now rather than in the middle of the load.
        Mover::new(modules)?;
        modules.function("residency", "finish_weights")?;
        Ok(Self {
            shape,
            ring,
            lanes,
            finishing,
            desk: prepared.desk,
            took: Some(started.elapsed()),
            context: Arc::clone(context),
        })
    }

    /// Whether it is what a load of that shape needs.
    pub(crate) fn suits(&self, shape: Shape) -> bool {
        self.shape == shape && self.is_healthy()
    }

    /// Whether it is as good as a new one. A lane that the driver refused to lock may be locked by another attempt.
    pub(crate) fn is_healthy(&self) -> bool {
        !self.ring.was_refused()
    }

    /// Waits for everything that was sent.
    fn settle(&self) -> Result<()> {
        self.context.bind()?;
        self.lanes.iter().try_for_each(|lane| lane.stream.synchronize())?;
        self.finishing.synchronize()
    }

    /// What can be kept, once everything that was sent has arrived: nothing while a thread still holds it, such as one that
    /// hangs in a read.
    fn idle(this: Arc<Self>) -> Option<Self> {
        let mut equipment = Arc::into_inner(this)?;
        equipment.took = None;
        Some(equipment)
    }
}

impl Drop for Equipment {
    fn drop(&mut self) {
        // Streams and events go with a current context, on whatever thread this is.
        let _ = self.context.bind();
    }
}

/// Locks the lanes of a ring by a thread, ahead of the readers that have not come to lock their own. Whoever joins it knows
/// that it is done with the context.
fn lock_ahead(ring: &Arc<Ring>, context: &Arc<Context>) -> Option<JoinHandle<()>> {
    if ring.locked_bytes() == ring.nbytes() {
        return None;
    }
    let (ring, context) = (Arc::clone(ring), Arc::clone(context));
    // Without a thread each reader locks its lane.
    std::thread::Builder::new()
        .name("hoist-lock".into())
        .spawn(move || {
            if context.bind().is_ok() {
                (0..ring.lanes()).for_each(|lane| {
                    ring.lock(&context, lane);
                });
            }
        })
        .ok()
}

/// What the threads of a load share; it borrows nothing.
struct Shared {
    context: Arc<Context>,
    inputs: Vec<Option<Input>>,
    schedule: Schedule,
    residents: Arc<Vec<Resident>>,
    next: AtomicUsize,
    stop: AtomicBool,
    error: Mutex<Option<Error>>,
    /// Source bytes read, by [`Path`].
    read: [AtomicU64; 3],
    mover: Mover,
    /// For so many threads staging, and tables behind it.
    memory: Arc<DeviceBuffer>,
    staged_threads: usize,
    /// A lane for each reader, and the last one for the calling thread.
    equipment: Arc<Equipment>,
    /// Kept until the last thread has ended, so that none writes to memory that was given back.
    _arena: Arc<DeviceBuffer>,
    /// The chunk that each thread has in hand, plus one.
    in_hand: Vec<AtomicUsize>,
}

enum Message {
    /// The chunk of that number is in place.
    Arrived(usize),
    /// A thread has ended.
    Ended,
}

impl Shared {
    fn fail(&self, error: Error) {
        self.stop.store(true, Ordering::Relaxed);
        let mut first = self.error.lock().unwrap_or_else(|e| e.into_inner());
        first.get_or_insert(error);
    }

    /// Why the load failed.
    fn take_error(&self) -> Error {
        let error = self.error.lock().unwrap_or_else(|e| e.into_inner()).take();
        error.unwrap_or_else(|| Error::internal(crate::NAME, "a load that failed without a reason"))
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The lane of that number; every thread has a number below the lanes.
    fn lane(&self, number: usize) -> Result<&Lane> {
        let lane = self.equipment.lanes.get(number);
        lane.ok_or_else(|| Error::internal(crate::NAME, "a reader without a lane"))
    }

    /// Starts a chunk on its way from a slot.
    fn send(&self, lane: &Lane, number: usize, slot: &mut [u8], chunk: &Chunk) -> Result<()> {
        let (head, len) = ((chunk.start % PAGE) as usize, chunk.nbytes() as usize);
        if chunk.is_staged() {
            return self.stage(lane, number, slot, head, len, |table| {
                self.schedule.pieces(chunk, &self.residents, table)
            });
        }
        for part in self.schedule.parts(chunk) {
            let from = head + part.from as usize;
            let bytes = &slot[from..from + part.nbytes as usize];
            let to = self.residents[part.weight as usize].ptr + part.at;
            // SAFETY: the schedule keeps destinations within the arena and apart; the slot is not touched before its
            // event has passed.
            unsafe { lane.stream.copy_htod(to, bytes)? };
        }
        Ok(())
    }

    /// Starts `len` bytes of a slot, which begin `head` into it, on their way by the thread's staging. `fill` writes a table
    /// of the pieces that they are moved by, which goes with them.
    fn stage(
        &self,
        lane: &Lane,
        number: usize,
        slot: &mut [u8],
        head: usize,
        len: usize,
        fill: impl FnOnce(&mut [Piece]) -> Result<usize>,
    ) -> Result<()> {
        let table_at = (head + len).next_multiple_of(64);
        let room = slot.get_mut(table_at..table_at + TABLE_BYTES as usize);
        let (Some(room), true) = (room, number < self.staged_threads) else {
            return Err(Error::internal(crate::NAME, "a staged chunk that does not fit"));
        };
        let table: &mut [Piece] = bytemuck::cast_slice_mut(room);
        let count = fill(table)?;
        let launch = self.mover.launch_of(&table[..count])?;
        let at = self.memory.ptr() + number as u64 * STAGING_BYTES;
        let first = head / 16 * 16;
        let bytes = &slot[first..table_at + count * size_of::<Piece>()];
        // SAFETY: the staging is this thread's, and its stream orders this copy after the kernel that read it last; the slot
        // is not touched before its event has passed.
        unsafe { lane.stream.copy_htod(at + first as u64, bytes)? };
        // SAFETY: the pieces' sources are within the chunk; the schedule keeps destinations within the arena and apart.
        unsafe {
            self.mover
                .launch(&lane.stream, launch, at + table_at as u64, at + head as u64)
        }
    }

    /// What a reader thread does.
    fn read_chunks(&self, number: usize, sender: &Sender<Message>) -> Result<()> {
        self.context.bind()?;
        let (lane, ring) = (self.lane(number)?, &self.equipment.ring);
        // The chunk whose copy each slot holds.
        let mut held: [Option<usize>; SLOTS] = [None; SLOTS];
        for turn in 0.. {
            let side = turn % SLOTS;
            if let Some(before) = held[side].take() {
                lane.events[side].synchronize()?;
                // Nobody listens any more once the load has failed.
                let _ = sender.send(Message::Arrived(before));
            }
            if self.stopped() {
                break;
            }
            let next = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(chunk) = self.schedule.chunks.get(next) else {
                break;
            };
            self.in_hand[number].store(next + 1, Ordering::Relaxed);
            // SAFETY: the slot is this thread's, and the copy from it has passed.
            let slot = unsafe { ring.slot(number, side) };
            let input = self
                .inputs
                .get(chunk.file as usize)
                .and_then(Option::as_ref)
                .ok_or_else(|| Error::internal(crate::NAME, "a chunk of a file that cannot be read"))?;
            let path = input.read(chunk.start, chunk.end, slot)?;
            self.in_hand[number].store(0, Ordering::Relaxed);
            self.read[path as usize].fetch_add(chunk.nbytes(), Ordering::Relaxed);
            if self.stopped() {
                break;
            }
            // Its page locking is waited for only now: the bytes are there.
            let locked = ring.lock(&self.context, number);
            self.send(lane, number, slot, chunk)?;
            lane.events[side].record(&lane.stream)?;
            held[side] = Some(next);
            if !locked && ring.locked_bytes() > 0 {
                // Page-locked memory is short: leave the rest to those who have some.
                break;
            }
        }
        // In the order they were sent.
        let mut left: Vec<(usize, usize)> = held
            .iter()
            .enumerate()
            .filter_map(|(side, h)| Some(((*h)?, side)))
            .collect();
        left.sort_unstable();
        for (chunk, side) in left {
            lane.events[side].synchronize()?;
            let _ = sender.send(Message::Arrived(chunk));
        }
        Ok(())
    }
}

/// Says that a thread has ended, however it did.
struct Farewell(Sender<Message>);

impl Drop for Farewell {
    fn drop(&mut self) {
        let _ = self.0.send(Message::Ended);
    }
}

/// The load, as the calling thread sees it.
struct Load<'a> {
    shared: Arc<Shared>,
    plan: &'a LoadPlan,
    residency: &'a Residency,
    watch: &'a dyn LoadWatch,
    finisher: Finisher,
    /// Canonical bytes of each weight that have not arrived.
    missing: Vec<u64>,
    /// Canonical bytes that have arrived.
    arrived: u64,
    /// Each weight's place in the order of arrival.
    ranks: Vec<u32>,
    /// Ranks of weights that are whole and wait for what follows.
    waiting: Vec<u32>,
    waiting_bytes: u64,
    /// When bytes last arrived or were read, and how many had been.
    last: (Instant, u64),
    longest_pause: Duration,
}

impl Load<'_> {
    /// Takes note of a message.
    fn note(&mut self, message: &Message) -> Result<()> {
        let Message::Arrived(number) = message else {
            return Ok(());
        };
        let shared = Arc::clone(&self.shared);
        let chunk = shared.schedule.chunks.get(*number);
        let chunk = chunk.ok_or_else(|| Error::internal(crate::NAME, "a chunk that nobody planned"))?;
        shared
            .schedule
            .arrivals(chunk)
            .try_for_each(|(weight, nbytes)| self.arrive(weight, nbytes))
    }

    /// Counts canonical bytes of a weight that have arrived; starts what follows once enough is whole.
    fn arrive(&mut self, weight: u32, nbytes: u64) -> Result<()> {
        let missing = &mut self.missing[weight as usize];
        *missing = missing
            .checked_sub(nbytes)
            .ok_or_else(|| Error::internal(crate::NAME, "bytes of a weight that is whole"))?;
        self.arrived += nbytes;
        if *missing > 0 {
            return Ok(());
        }
        self.waiting.push(self.ranks[weight as usize]);
        self.waiting_bytes += self.residency.weights[weight as usize].nbytes;
        if self.waiting_bytes >= FINISH_BYTES || self.waiting.len() >= FINISH_WEIGHTS {
            self.finish_waiting()?;
        }
        Ok(())
    }

    fn finish_waiting(&mut self) -> Result<()> {
        let finishing = &self.shared.equipment.finishing;
        self.finisher.launch(finishing, &mut self.waiting)?;
        self.waiting.clear();
        self.waiting_bytes = 0;
        Ok(())
    }

    /// Reports progress; looks for a cancel and for reads that stand still.
    fn look_around(&mut self) -> Result<()> {
        let arrived = self.arrived;
        self.watch.progress(Progress {
            phase: Phase::Upload,
            weight: None,
            done: arrived.min(self.plan.nbytes),
            total: self.plan.nbytes,
        });
        if self.watch.cancelled() {
            return Err(Error::Cancelled);
        }
        let read: u64 = self.shared.read.iter().map(|n| n.load(Ordering::Relaxed)).sum();
        let now = Instant::now();
        if read + arrived != self.last.1 {
            self.last = (now, read + arrived);
            return Ok(());
        }
        let pause = now - self.last.0;
        self.longest_pause = self.longest_pause.max(pause);
        if pause < STALL {
            return Ok(());
        }
        let stuck = self
            .shared
            .in_hand
            .iter()
            .filter_map(|h| {
                self.shared
                    .schedule
                    .chunks
                    .get(h.load(Ordering::Relaxed).wrapping_sub(1))
            })
            .min_by_key(|chunk| (chunk.file, chunk.start));
        let (file, offset, len) = match stuck {
            Some(chunk) => (
                self.shared.inputs[chunk.file as usize]
                    .as_ref()
                    .map_or_else(String::new, Input::path),
                chunk.start,
                chunk.nbytes(),
            ),
            None => {
                return Err(Error::DeviceLost {
                    device: self.shared.context.id().into(),
                    reason: format!("no copy to it has ended for {} s", STALL.as_secs()),
                });
            }
        };
        Err(Error::SourceIo {
            file,
            offset,
            len,
            error: std::io::Error::new(
                std::io::ErrorKind::TimedOut,
                format!("no byte has come for {} s", STALL.as_secs()),
            ),
        })
    }

    /// Listens until all `threads` have ended.
    fn listen(&mut self, receiver: &Receiver<Message>, mut threads: usize) -> Result<()> {
        let mut looked = Instant::now();
        while threads > 0 {
            match receiver.recv_timeout(TICK) {
                Ok(Message::Ended) => threads -= 1,
                Ok(message) => self.note(&message)?,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            if looked.elapsed() >= TICK {
                looked = Instant::now();
                self.look_around()?;
            }
        }
        Ok(())
    }

    /// Finishes what is left once all has arrived, and demands that it has, and that all of it are numbers.
    fn finish(&mut self) -> Result<()> {
        self.finish_waiting()?;
        if let Some(short) = self.missing.iter().position(|missing| *missing != 0) {
            return Err(Error::internal(
                crate::NAME,
                format!("`{}` is not whole after the load", self.residency.names.at(short)),
            ));
        }
        self.finisher
            .check(&self.shared.equipment.finishing, self.residency)
    }

    /// Reads what only the source can, on this thread.
    fn read_through_source(
        &mut self,
        weights: &[WeightId],
        source: &dyn WeightSource,
        number: usize,
    ) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let (lane, ring) = (shared.lane(number)?, &shared.equipment.ring);
        for id in weights {
            let weight = self.residency.weight(*id)?;
            let plan = self.plan.weight(*id)?;
            // Whole elements and blocks; few enough matrices for the table.
            let granule = plan.granule();
            let mut step = (STEP_BYTES / granule).max(1) * granule;
            if weight.layout == FloatLayout::InOut {
                step = step.min((MAX_PIECES as u64 / 3 - 2) * weight.matrix_bytes());
            }
            ring.lock(&shared.context, number);
            let mut offset = 0;
            while offset < plan.nbytes {
                if shared.stopped() {
                    return Ok(());
                }
                let len = step.min(plan.nbytes - offset);
                // SAFETY: the slot is this thread's, and the copy from it has passed: the stream is waited for below.
                let slot = unsafe { ring.slot(number, 0) };
                source.read_at(*id, offset, &mut slot[..len as usize])?;
                shared.read[Path::Cache as usize].fetch_add(len, Ordering::Relaxed);
                if weight.layout == FloatLayout::InOut {
                    shared.stage(lane, number, slot, 0, len as usize, |table| {
                        let pieces = transposing_pieces(weight, offset, len, 0);
                        let room = table.get_mut(..pieces.len());
                        room.ok_or_else(schedule::too_many_pieces)?
                            .copy_from_slice(&pieces);
                        Ok(pieces.len())
                    })?;
                } else {
                    let bytes = &slot[..len as usize];
                    // SAFETY: the range is within the weight; the stream is waited for below.
                    unsafe { lane.stream.copy_htod(weight.ptr + offset, bytes)? };
                }
                lane.stream.synchronize()?;
                self.arrive(id.0, len)?;
                offset += len;
                self.look_around()?;
            }
        }
        Ok(())
    }
}

/// How a load went, as (name, value).
pub(crate) type Notes = Vec<(String, String)>;

/// What a load works on.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    pub(crate) context: &'a Arc<Context>,
    pub(crate) modules: &'a Modules,
    pub(crate) residency: &'a Residency,
    pub(crate) plan: &'a LoadPlan,
    pub(crate) source: &'a dyn WeightSource,
    pub(crate) watch: &'a dyn LoadWatch,
}

/// What a load leaves behind; nothing of it is in use by the device.
pub(crate) struct Remains {
    shared: Option<Arc<Shared>>,
    finisher: Option<Finisher>,
    locking: Option<JoinHandle<()>>,
    equipment: Arc<Equipment>,
}

impl Remains {
    /// Gives everything back but what the next load can use. That takes a moment, most of it for memory of the device.
    pub(crate) fn settle(self) -> Option<Equipment> {
        let Self {
            shared,
            finisher,
            locking,
            equipment,
        } = self;
        drop(finisher);
        let desk = shared
            .and_then(Arc::into_inner)
            .map(|shared| shared.schedule.into_desk());
        // A panic there has been printed, and left nothing to do here.
        let _ = locking.map(JoinHandle::join);
        let mut equipment = Equipment::idle(equipment)?;
        equipment.desk = desk.unwrap_or_default();
        Some(equipment)
    }
}

/// Reads every weight of the plan to its place, and finishes it. There are no remains where the device was lost.
///
/// # Errors
/// [`Error::SourceIo`], [`Error::OutOfMemory`], [`Error::NonFiniteWeight`], [`Error::Cancelled`], [`Error::DeviceLost`].
pub(crate) fn run(job: Job<'_>, mut equipment: Equipment) -> (Result<Notes>, Option<Remains>) {
    let desk = std::mem::take(&mut equipment.desk);
    let mut remains = Remains {
        shared: None,
        finisher: None,
        locking: None,
        equipment: Arc::new(equipment),
    };
    let loaded = load(job, desk, &mut remains);
    if loaded.is_err()
        // What is in flight must have ended before memory is given back, and before a slot is used again.
        && let Err(lost) = remains.equipment.settle()
    {
        drop(remains.settle());
        return (Err(lost), None);
    }
    (loaded, Some(remains))
}

/// The whole of it, but for waiting for what is in flight after an error.
fn load(job: Job<'_>, desk: Desk, remains: &mut Remains) -> Result<Notes> {
    let Job {
        context,
        modules,
        residency,
        plan,
        source,
        watch,
    } = job;
    // A small load is over before anybody looks around.
    if watch.cancelled() {
        return Err(Error::Cancelled);
    }
    let started = Instant::now();
    let equipment = Arc::clone(&remains.equipment);
    let mut schedule = schedule::schedule(plan, &residency.weights, source.files(), desk)?;
    let inputs: Vec<Option<Input>> = source
        .files()
        .iter()
        .enumerate()
        .map(|(i, file)| Input::new(source, i as u32, file))
        .collect();
    // A file that can be read in no other way than through the source.
    let readable = |chunk: &Chunk| inputs.get(chunk.file as usize).is_some_and(Option::is_some);
    if !schedule.chunks.iter().all(readable) {
        schedule.chunks.clear();
        schedule.through_source = (0..).map(WeightId).take(plan.weights.len()).collect();
    }
    let staged = schedule.chunks.iter().filter(|c| c.is_staged()).count();
    let transposed = residency.weights.iter().any(|w| w.layout == FloatLayout::InOut);
    let lanes = equipment.lanes.len();
    // The last lane is the calling thread's.
    let readers = lanes.saturating_sub(1);
    let staged_threads = if transposed && !schedule.through_source.is_empty() {
        lanes
    } else if staged > 0 {
        readers.min(schedule.chunks.len())
    } else {
        0
    };
    // One allocation, before the driver is busy locking memory.
    let staging = staged_threads as u64 * STAGING_BYTES;
    let memory = DeviceBuffer::new(
        context,
        "staging of small tensors and tables of a load",
        staging + finish_bytes(&residency.weights),
    )?;
    let memory = Arc::new(memory);
    let counts = (
        schedule.chunks.len() - staged,
        staged,
        schedule.through_source.len(),
    );
    let direct_possible = inputs.iter().flatten().any(Input::is_direct);
    let prepared = started.elapsed();

    let shared = Arc::new(Shared {
        context: Arc::clone(context),
        inputs,
        schedule,
        residents: Arc::clone(&residency.weights),
        next: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
        error: Mutex::new(None),
        read: Default::default(),
        mover: Mover::new(modules)?,
        memory: Arc::clone(&memory),
        staged_threads,
        equipment: Arc::clone(&equipment),
        _arena: Arc::clone(&residency.arena),
        in_hand: (0..lanes).map(|_| AtomicUsize::new(0)).collect(),
    });
    remains.shared = Some(Arc::clone(&shared));
    let (sender, receiver) = channel();
    // Only now: locking takes milliseconds, the driver does one thing at a time, and allocations would wait for it.
    remains.locking = lock_ahead(&equipment.ring, context);
    let threads = start_readers(&shared, readers, &sender);
    // While they read: what there is to do for each weight.
    let order = shared.schedule.order(residency.weights.len());
    let mut ranks = vec![0; order.len()];
    for (rank, weight) in order.iter().enumerate() {
        ranks[*weight as usize] = rank as u32;
    }
    let (finishing, tables) = (&equipment.finishing, memory.ptr() + staging);
    let finisher = match Finisher::new(modules, finishing, residency, &order, memory, tables) {
        Ok(finisher) => finisher,
        Err(error) => {
            shared.fail(error);
            join(threads, &shared);
            return Err(shared.take_error());
        }
    };
    let mut load = Load {
        shared: Arc::clone(&shared),
        plan,
        residency,
        watch,
        finisher,
        missing: residency.weights.iter().map(|w| w.nbytes).collect(),
        arrived: 0,
        ranks,
        waiting: Vec::new(),
        waiting_bytes: 0,
        last: (Instant::now(), 0),
        longest_pause: Duration::ZERO,
    };
    let outcome = if threads.is_empty() && !shared.schedule.chunks.is_empty() {
        // A system without threads: this one does it all, in the place of the first.
        let read = shared.read_chunks(0, &sender);
        drain(&mut load, &receiver).and(read)
    } else {
        Ok(())
    }
    .and_then(|()| load.read_through_source(&shared.schedule.through_source, source, readers))
    .and_then(|()| load.listen(&receiver, threads.len()))
    .and_then(|()| drain(&mut load, &receiver));
    if let Err(error) = outcome {
        shared.fail(error);
    }
    join(threads, &shared);
    let read = Instant::now();
    let finished = if shared.stopped() {
        Err(shared.take_error())
    } else {
        load.finish()
    };
    let Load {
        finisher,
        longest_pause,
        ..
    } = load;
    remains.finisher = Some(finisher);
    finished?;
    watch.progress(Progress {
        phase: Phase::Upload,
        weight: None,
        done: plan.nbytes,
        total: plan.nbytes,
    });
    let way = |path: Path| shared.read[path as usize].load(Ordering::Relaxed);
    let ms = |d: Duration| format!("{:.1} ms", d.as_secs_f64() * 1e3);
    let (ring, locked) = (equipment.ring.nbytes(), equipment.ring.locked_bytes());
    let mut notes = vec![
        ("reader threads".to_string(), readers.to_string()),
        (
            "ring".into(),
            match locked {
                0 => format!("{ring} bytes, pageable: the driver refused to lock memory"),
                n if n < ring => format!("{ring} bytes, {n} of them page-locked: the driver locked no more"),
                n => format!("{n} bytes, page-locked, in huge pages"),
            },
        ),
        (
            "bytes through the page cache".into(),
            way(Path::Cache).to_string(),
        ),
        ("bytes past the page cache".into(), way(Path::Direct).to_string()),
        ("bytes from memory".into(), way(Path::Memory).to_string()),
        (
            "direct reads".into(),
            if direct_possible {
                "possible"
            } else {
                "not possible"
            }
            .into(),
        ),
        ("chunks copied to their places".into(), counts.0.to_string()),
        ("chunks staged on the device".into(), counts.1.to_string()),
        ("weights read through the source".into(), counts.2.to_string()),
        (
            "ring and streams ready after".into(),
            equipment
                .took
                .map_or_else(|| "0 ms: kept from a load before".into(), ms),
        ),
        ("schedule".into(), ms(prepared)),
        ("reading and copying".into(), ms(read - started - prepared)),
        ("checks after the last byte".into(), ms(read.elapsed())),
    ];
    if longest_pause >= PAUSE {
        notes.push(("longest pause of the source".into(), ms(longest_pause)));
    }
    Ok(notes)
}

/// Takes what is already there.
fn drain(load: &mut Load<'_>, receiver: &Receiver<Message>) -> Result<()> {
    while let Ok(message) = receiver.try_recv() {
        load.note(&message)?;
    }
    Ok(())
}

/// Starts a thread for each of `readers` lanes; one that cannot be started is one fewer.
fn start_readers(shared: &Arc<Shared>, readers: usize, sender: &Sender<Message>) -> Vec<JoinHandle<()>> {
    (0..readers.min(shared.schedule.chunks.len()))
        .filter_map(|number| {
            let (shared, sender) = (Arc::clone(shared), sender.clone());
            std::thread::Builder::new()
                .name("hoist-load".into())
                .spawn(move || {
                    let farewell = Farewell(sender);
                    if let Err(error) = shared.read_chunks(number, &farewell.0) {
                        shared.fail(error);
                    }
                })
                .ok()
        })
        .collect()
}

/// Waits for the readers, but not for one that stands still in a read after the load has failed.
fn join(threads: Vec<JoinHandle<()>>, shared: &Shared) {
    const PATIENCE: Duration = Duration::from_secs(2);
    let started = Instant::now();
    for thread in threads {
        while shared.stopped() && !thread.is_finished() && started.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        if shared.stopped() && !thread.is_finished() {
            // It holds all that it uses, and sends nothing once it finds that the load has stopped.
            continue;
        }
        if thread.join().is_err() {
            shared.fail(Error::internal(crate::NAME, "a reader thread panicked"));
        }
    }
}
