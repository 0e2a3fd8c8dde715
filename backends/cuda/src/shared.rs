//! What the backends of a process share: for each device one living context with its kernels, and at most one set of a load's
//! equipment.
//!
//! A context takes a third of a second to make and a ring of page-locked memory half as long, so that both stay when the last
//! backend goes, until [`release_unused`] or the end of the process. Nothing is released at that end: statics are never
//! dropped, and the driver may be gone by then.
//!
//! A process has one primary context on a device. One that is lost is forgotten here by the first call that says so, and given
//! up with the last backend that holds it; until then the driver has no other, and opening the device says that it is lost.
//! Nothing better can be relied on: for the errors that lose a context the driver promises no further work to the process at
//! all (cuda.h, at CUDA_ERROR_ILLEGAL_ADDRESS and LAUNCH_FAILED: it "must be terminated and relaunched"), which a context
//! beside the primary one, by `cuCtxCreate`, does not change. `cuDevicePrimaryCtxReset` destroys the context under whoever
//! holds it, the streams of other backends and of other libraries of the process included. A process that must survive a loss
//! keeps the backend in another one, as `--isolate` does for plugins.
//!
//! No lock of this module is held across a driver call, but for the one that keeps two threads from making one context.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hoist_backend::{Error, Result};

use crate::driver::{self, Context, Device};
use crate::load::{Equipment, Shape};
use crate::modules::Modules;
use crate::residency::Books;

/// By ordinal; only devices that exist have a place.
static PLACES: Mutex<BTreeMap<u32, Arc<Place>>> = Mutex::new(BTreeMap::new());

/// A device of this machine, opened or not.
#[derive(Debug, Default)]
struct Place {
    /// Held while a context is made or given up, so that two threads that open a device share what the first one makes.
    opening: Mutex<()>,
    device: Mutex<Option<Arc<SharedDevice>>>,
}

/// A context, and what all who use it share.
#[derive(Debug)]
pub(crate) struct SharedDevice {
    /// What the next load uses, if it asks for the same.
    kept: Mutex<Option<Equipment>>,
    /// What the next model's books are kept in.
    books: Mutex<Option<Books>>,
    /// Set once a call has said that the context is lost.
    lost: AtomicBool,
    // Handles last: they must outlive what is made of them.
    pub(crate) modules: Modules,
    pub(crate) context: Arc<Context>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn place(ordinal: u32) -> Result<Arc<Place>> {
    if let Some(place) = lock(&PLACES).get(&ordinal) {
        return Ok(Arc::clone(place));
    }
    driver::probe()?;
    // Whether there is such a device.
    Device::new(ordinal)?;
    Ok(Arc::clone(lock(&PLACES).entry(ordinal).or_default()))
}

/// A device that was opened.
#[derive(Debug)]
pub(crate) struct Acquired {
    pub(crate) device: Arc<SharedDevice>,
    /// Whether its context was made for this.
    pub(crate) fresh: bool,
}

impl SharedDevice {
    /// The living context of a device, or a new one. `before` is called before one is made, whose time it can use.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without a driver, such a device, or one that runs the embedded kernels;
    /// [`Error::DeviceLost`] while a backend holds the device's lost context.
    pub(crate) fn acquire(ordinal: u32, before: impl FnOnce()) -> Result<Acquired> {
        let place = place(ordinal)?;
        let _opening = lock(&place.opening);
        let known = lock(&place.device).clone();
        if let Some(device) = known {
            match device.context.check() {
                Ok(()) => return Ok(Acquired { device, fresh: false }),
                // It lives, and there is no memory to say so.
                Err(error @ Error::OutOfMemory { .. }) => return Err(error),
                // Lost, or destroyed by others of this process; a fresh one tells.
                Err(_) => forget(device.context.id()),
            }
        }
        before();
        let context = Context::open(ordinal)?;
        // The driver hands out a lost context as long as somebody holds it.
        context.check()?;
        let device = Arc::new(Self {
            kept: Mutex::new(None),
            books: Mutex::new(None),
            lost: AtomicBool::new(false),
            modules: Modules::new(&context),
            context,
        });
        *lock(&place.device) = Some(Arc::clone(&device));
        Ok(Acquired { device, fresh: true })
    }

    /// Memory for a model's books, touched or not.
    pub(crate) fn take_books(&self) -> Books {
        lock(&self.books).take().unwrap_or_default()
    }

    /// Keeps a model's books, of which nothing counts any more.
    pub(crate) fn keep_books(&self, books: Books) {
        let _replaced = lock(&self.books).replace(books);
    }

    /// What was kept for a load of that shape. What was kept for another one is given back: there is to be one set.
    pub(crate) fn take_equipment(&self, shape: Shape) -> Option<Equipment> {
        let kept = lock(&self.kept).take();
        kept.filter(|equipment| equipment.suits(shape))
    }

    /// Keeps what a load does not need any more, in place of what was kept before. No copy may be in flight.
    pub(crate) fn keep_equipment(&self, equipment: Equipment) {
        if self.lost.load(Ordering::Relaxed) || !equipment.is_healthy() {
            return;
        }
        // What it replaces is dropped after the lock.
        let _replaced = lock(&self.kept).replace(equipment);
    }
}

/// Takes note that the context of the device with that id is lost: the next one to open it gets another.
pub(crate) fn forget(id: &str) {
    let places: Vec<Arc<Place>> = lock(&PLACES).values().cloned().collect();
    for place in places {
        let mut device = lock(&place.device);
        if device.as_ref().is_none_or(|d| d.context.id() != id) {
            continue;
        }
        let forgotten = device.take();
        drop(device);
        if let Some(device) = forgotten {
            device.lost.store(true, Ordering::Relaxed);
        }
    }
}

/// Gives back what this process keeps of CUDA devices and nothing uses: contexts without a backend, and host memory that
/// loads pass through. Backends that are opened later find everything again, at the cost of a first one.
///
/// Returns the number of contexts that were given back.
pub fn release_unused() -> usize {
    let places: Vec<Arc<Place>> = lock(&PLACES).values().cloned().collect();
    let mut released = 0;
    for place in places {
        let _opening = lock(&place.opening);
        let mut kept = lock(&place.device);
        match kept.take() {
            None => {}
            // The only reference: nobody opens the device meanwhile.
            Some(device) if Arc::strong_count(&device) == 1 => {
                drop(kept);
                drop(device);
                released += 1;
            }
            Some(device) => {
                *kept = Some(Arc::clone(&device));
                drop(kept);
                let _unused = (lock(&device.kept).take(), lock(&device.books).take());
            }
        }
    }
    released
}
