//! Looking a weight up takes the same time however many layers there are, and allocates nothing.
//!
//! `cargo test --release -p hoist-orchestrator --test index_lookup -- --nocapture` prints the times.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::time::Instant;

use hoist_backend::{IndexEntry, IndexLayout, Role, Slot, WeightId, WeightIndex};

struct Counting;

thread_local! {
    /// Of this thread: the harness has threads of its own.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator as it came; counting does not touch memory that it gives.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the promises of `alloc`, which are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the promises of `dealloc`, and `at` came from `System.alloc`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Every role of every layer, each a weight of its own.
fn index(layers: u32) -> WeightIndex {
    let roles: Vec<_> = Role::all().collect();
    let entries: Vec<_> = (0..layers)
        .flat_map(|layer| roles.iter().map(move |role| (Some(layer), *role)))
        .zip(0u32..)
        .map(|((layer, role), id)| IndexEntry {
            layer,
            role,
            slot: Slot::Present(WeightId(id)),
        })
        .collect();
    let weights = entries.len();
    WeightIndex::new(&IndexLayout { layers, entries }, weights).unwrap()
}

/// Layers and roles in an order that no cache foresees.
fn questions(layers: u32) -> Vec<(Option<u32>, Role)> {
    let roles: Vec<_> = Role::all().collect();
    let mut state = 1u64;
    (0..1 << 14)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let layer = (state >> 33) as u32 % layers;
            let role = roles[(state >> 20) as usize % roles.len()];
            (Some(layer), role)
        })
        .collect()
}

/// Nanoseconds of a look-up.
fn time(index: &WeightIndex, questions: &[(Option<u32>, Role)]) -> f64 {
    const ROUNDS: u32 = 8;
    let started = Instant::now();
    for _ in 0..ROUNDS {
        for &(layer, role) in questions {
            black_box(black_box(index).lookup(layer, role));
        }
    }
    started.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS) / questions.len() as f64
}

#[test]
fn a_look_up_costs_the_same_in_any_model_and_allocates_nothing() {
    let layers = [1, 30, 1000];
    let indexes = layers.map(index);
    let questions = layers.map(questions);
    for (index, questions) in indexes.iter().zip(&questions) {
        for &(layer, role) in questions {
            let id = layer.unwrap() * Role::COUNT as u32 + role.index() as u32;
            assert_eq!(index.lookup(layer, role), Some(WeightId(id)));
        }
    }

    // Interleaved, and the best of many, so that whatever else the machine does falls on all alike.
    let mut best = [f64::INFINITY; 3];
    let before = ALLOCATIONS.get();
    for _ in 0..50 {
        for (best, (index, questions)) in best.iter_mut().zip(indexes.iter().zip(&questions)) {
            *best = best.min(time(index, questions));
        }
    }
    assert_eq!(ALLOCATIONS.get(), before, "a look-up allocated");

    println!("a look-up with {layers:?} layers: {best:.2?} ns");
    // A table of 1000 layers leaves the first-level cache, which may cost some nanoseconds and no more; a search or a
    // hash would show here.
    assert!(best[2] < best[0] * 2.0 + 5.0, "{best:?} ns");
    assert!(best.iter().all(|ns| *ns < 25.0), "{best:?} ns");
}
