//! Attention (§4), for a few queries that read the same keys and values.
//!
//! Keys lie in blocks of sixteen positions, transposed: `[position / 16][element][position mod 16]`, so that sixteen
//! scores are sixteen lanes and each is one serial sum over elements, as the contract writes it. Values lie as
//! `[position][element]`: there the lanes are elements, and each is a serial sum over positions.

use crate::ops::element::{Element, LANES};
use crate::ops::elementary::{exp, soft_cap};
use crate::ops::reduce::sum64;
use crate::simd::Kernel;

/// Positions that share a maximum; counted from position 0.
pub(crate) const SPLIT: usize = 256;

/// Most queries of a tile.
pub(crate) const TILE: usize = 4;

/// Contexts are rounded up to a multiple of this, so that whole blocks can be read.
pub(crate) const POSITIONS: usize = 64;

/// One query head of one token.
pub(crate) struct Query<'a> {
    /// `[head_dim]`
    pub(crate) q: &'a [f32],
    /// First visible position.
    pub(crate) first: usize,
    /// Last visible position: the token's own.
    pub(crate) last: usize,
    /// `[head_dim]`
    pub(crate) out: &'a mut [f32],
}

/// Memory of one thread.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// Scores, then weights, of a split.
    scores: Box<[[f32; SPLIT]; TILE]>,
    /// Maximum and sum of weights, `[split][query]`.
    sums: Vec<[(f32, f32); TILE]>,
    /// Weighted values, `[split][query][head_dim]`.
    values: Vec<f32>,
}

impl Scratch {
    /// Bytes for contexts of that many positions and heads of that many elements.
    pub(crate) fn bytes(context: u64, head_dim: u64) -> Option<u64> {
        let splits = context.div_ceil(SPLIT as u64).checked_add(1)?;
        let split = head_dim
            .checked_mul(4)?
            .checked_add(8)?
            .checked_mul(TILE as u64)?;
        splits.checked_mul(split)?.checked_add((SPLIT * TILE * 4) as u64)
    }

    pub(crate) fn new(context: usize, head_dim: usize) -> Self {
        let splits = context.div_ceil(SPLIT) + 1;
        Self {
            scores: Box::new([[0.0; SPLIT]; TILE]),
            sums: vec![[(0.0, 0.0); TILE]; splits],
            values: vec![0.0; splits * TILE * head_dim],
        }
    }
}

/// Attention of a tile of queries over one sequence's keys and values of one head.
pub(crate) struct Attention<'a, 'q, E> {
    pub(crate) keys: &'a [E],
    pub(crate) values: &'a [E],
    pub(crate) head_dim: usize,
    pub(crate) scale: f32,
    pub(crate) soft_cap: Option<f32>,
    /// 1 … [`TILE`] of them.
    pub(crate) queries: &'a mut [Query<'q>],
    pub(crate) scratch: &'a mut Scratch,
}

/// Scores of `16 · B` positions for `N` queries: lanes are positions, elements ascend.
#[inline(always)]
fn scores<E: Element, const N: usize, const B: usize, const F16C: bool>(
    blocks: &[E],
    head_dim: usize,
    q: [&[f32]; N],
) -> [[[f32; LANES]; B]; N] {
    let mut acc = [[[0.0f32; LANES]; B]; N];
    let keys: [&[[E; LANES]]; B] = std::array::from_fn(|b| {
        blocks[b * head_dim * LANES..(b + 1) * head_dim * LANES]
            .as_chunks()
            .0
    });
    let q = q.map(|q| &q[..head_dim]);
    let keys = keys.map(|k| &k[..head_dim]);
    for i in 0..head_dim {
        for b in 0..B {
            let k = E::widen_lanes::<F16C>(&keys[b][i]);
            for n in 0..N {
                for l in 0..LANES {
                    acc[n][b][l] = q[n][i].mul_add(k[l], acc[n][b][l]);
                }
            }
        }
    }
    acc
}

/// `Σ_p w_p · v_p` of `16 · C` elements from `at` on, positions ascending.
#[inline(always)]
fn weigh<E: Element, const N: usize, const C: usize, const F16C: bool>(
    values: &[E],
    head_dim: usize,
    at: usize,
    w: [&[f32]; N],
) -> [[[f32; LANES]; C]; N] {
    let mut acc = [[[0.0f32; LANES]; C]; N];
    for (p, v) in values.chunks_exact(head_dim).enumerate() {
        let v = v[at..at + C * LANES].as_chunks::<LANES>().0;
        for c in 0..C {
            let v = E::widen_lanes::<F16C>(&v[c]);
            for n in 0..N {
                for l in 0..LANES {
                    acc[n][c][l] = w[n][p].mul_add(v[l], acc[n][c][l]);
                }
            }
        }
    }
    acc
}

impl<E: Element> Attention<'_, '_, E> {
    /// `N` queries; `B` blocks of keys and `C` runs of values at once, so that enough sums are under way.
    #[inline(always)]
    fn tile<const N: usize, const B: usize, const F16C: bool>(self) {
        let head_dim = self.head_dim;
        let Scratch {
            scores: score_rows,
            sums,
            values: partial,
        } = self.scratch;
        let first = self.queries.iter().map(|q| q.first).min().unwrap_or(0);
        let last = self.queries.iter().map(|q| q.last).max().unwrap_or(0);
        let first_split = first / SPLIT;
        for split in first_split..=last / SPLIT {
            let base = split * SPLIT;
            // Positions of this split that some query sees, counted from its start.
            let (low, high) = (first.max(base) - base, last.min(base + SPLIT - 1) - base);
            let q: [&[f32]; N] = std::array::from_fn(|n| self.queries[n].q);
            let mut block = low / LANES / B * B;
            while block * LANES <= high {
                let from = (base / LANES + block) * head_dim * LANES;
                let found =
                    scores::<E, N, B, F16C>(&self.keys[from..from + B * head_dim * LANES], head_dim, q);
                for (row, found) in score_rows.iter_mut().zip(&found) {
                    row[block * LANES..(block + B) * LANES].copy_from_slice(found.as_flattened());
                }
                block += B;
            }
            for n in 0..N {
                let query = &self.queries[n];
                let row = &mut score_rows[n];
                if query.first >= base + SPLIT || query.last < base {
                    row.fill(0.0);
                    continue;
                }
                let visible = query.first.max(base) - base..query.last.min(base + SPLIT - 1) - base + 1;
                row[..visible.start].fill(0.0);
                row[visible.end..].fill(0.0);
                let s = &mut row[visible];
                for s in s.iter_mut() {
                    *s *= self.scale;
                }
                if let Some(cap) = self.soft_cap {
                    for s in s.iter_mut() {
                        *s = soft_cap(*s, cap);
                    }
                }
                let m = maximum(s);
                for s in s.iter_mut() {
                    *s = exp(*s - m);
                }
                sums[split - first_split][n] = (m, sum64(row));
            }
            let w: [&[f32]; N] = std::array::from_fn(|n| &score_rows[n][low..=high]);
            let values = &self.values[(base + low) * head_dim..(base + high + 1) * head_dim];
            let out = &mut partial[(split - first_split) * N * head_dim..][..N * head_dim];
            let mut at = 0;
            while at + B * LANES <= head_dim {
                let o = weigh::<E, N, B, F16C>(values, head_dim, at, w);
                for n in 0..N {
                    out[n * head_dim + at..][..B * LANES].copy_from_slice(o[n].as_flattened());
                }
                at += B * LANES;
            }
            while at + LANES <= head_dim {
                let o = weigh::<E, N, 1, F16C>(values, head_dim, at, w);
                for n in 0..N {
                    out[n * head_dim + at..][..LANES].copy_from_slice(&o[n][0]);
                }
                at += LANES;
            }
            while at < head_dim {
                for n in 0..N {
                    let column = values.chunks_exact(head_dim).map(|v| v[at].widen());
                    out[n * head_dim + at] = w[n].iter().zip(column).fold(0.0, |o, (w, v)| w.mul_add(v, o));
                }
                at += 1;
            }
        }
        for n in 0..N {
            let query = &mut self.queries[n];
            let splits = query.first / SPLIT - first_split..query.last / SPLIT - first_split + 1;
            let m = sums[splits.clone()]
                .iter()
                .fold(f32::NEG_INFINITY, |m, s| m.max(s[n].0));
            let mut sum = 0.0f32;
            query.out.fill(0.0);
            for split in splits {
                let (split_m, l) = sums[split][n];
                let f = exp(split_m - m);
                sum = l.mul_add(f, sum);
                let o = &partial[(split * N + n) * head_dim..][..head_dim];
                for (out, o) in query.out.iter_mut().zip(o) {
                    *out = o.mul_add(f, *out);
                }
            }
            let r = 1.0 / sum;
            for out in query.out.iter_mut() {
                *out *= r;
            }
        }
    }
}

/// The largest; a maximum needs no order.
#[inline(always)]
fn maximum(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut max = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (m, x) in max.iter_mut().zip(chunk) {
            *m = if *x > *m { *x } else { *m };
        }
    }
    max.iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |m, x| if *x > m { *x } else { m })
}

impl<E: Element> Kernel for Attention<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<const F16C: bool>(self) {
        match self.queries.len() {
            1 => self.tile::<1, 4, F16C>(),
            2 => self.tile::<2, 2, F16C>(),
            3 => self.tile::<3, 1, F16C>(),
            _ => self.tile::<4, 1, F16C>(),
        }
    }
}
