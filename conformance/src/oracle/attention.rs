//! §4: Rope, StoreKv and Attention.

use hoist_backend::{Error, KvDtype, KvSpec, OpName, Result, RopeStyle};

use super::arithmetic::{f16_to_f32, f32_to_f16};
use super::deviation::by_contract;
use super::elementary::{capped, exp};
use super::float::sum64;
use super::{finite, same_length};

/// The operation Rope, of all heads of one token. `table`: cos and sin of each pair at the token's position, `[n_rot]`.
///
/// # Errors
/// [`Error::InvalidArgument`] for an odd or too large `n_rot`, or lengths that do not fit.
pub fn rope(value: &[f32], table: &[f32], style: RopeStyle, heads: usize, n_rot: usize) -> Result<Vec<f32>> {
    same_length("rope table row", n_rot, table.len())?;
    if heads == 0
        || !value.len().is_multiple_of(heads)
        || !n_rot.is_multiple_of(2)
        || n_rot > value.len() / heads
    {
        return Err(Error::invalid(
            "rope",
            "heads that divide the vector and an even n_rot within a head",
            format!("{} elements, {heads} heads, n_rot {n_rot}", value.len()),
        ));
    }
    let interleaved = style == RopeStyle::Interleaved;
    let interleaved = by_contract!(interleaved, RopeOtherStyle => !interleaved);
    let mut out = value.to_vec();
    for head in out.chunks_mut(value.len() / heads) {
        for j in 0..n_rot / 2 {
            let (first, second) = if interleaved {
                (2 * j, 2 * j + 1)
            } else {
                (j, j + n_rot / 2)
            };
            let (x0, x1) = (head[first], head[second]);
            let (c, s) = (table[2 * j], table[2 * j + 1]);
            head[first] = by_contract!(
                x0.mul_add(c, -(x1 * s)),
                RopeWithoutFma => x0 * c - x1 * s,
                RopeFusesTheOtherProduct => (-x1).mul_add(s, x0 * c),
            );
            head[second] = by_contract!(
                x0.mul_add(s, x1 * c),
                RopeWithoutFma => x0 * s + x1 * c,
                RopeFusesTheOtherProduct => x1.mul_add(c, x0 * s),
            );
        }
    }
    Ok(out)
}

/// Keys and values of one layer of one sequence, as they are stored.
#[derive(Clone, Debug)]
pub struct KvCache {
    spec: KvSpec,
    dtype: KvDtype,
    /// `[position][kv_heads * head_dim]`
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl KvCache {
    /// An empty cache.
    pub fn new(spec: KvSpec, dtype: KvDtype) -> Self {
        Self {
            spec,
            dtype,
            keys: Vec::new(),
            values: Vec::new(),
        }
    }

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there are no positions.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Cuts the cache back to `len` positions.
    pub fn truncate(&mut self, len: usize) {
        self.keys.truncate(len);
        self.values.truncate(len);
    }

    /// The operation StoreKv: appends one position. `key`, `value`: `[kv_heads * head_dim]`.
    ///
    /// # Errors
    /// [`Error::NonFinite`] also for a magnitude that would round to infinity; [`Error::InvalidArgument`] for other
    /// lengths. Nothing is stored then.
    pub fn store(&mut self, key: &[f32], value: &[f32]) -> Result<()> {
        let width = self.spec.kv_heads as usize * self.spec.head_dim as usize;
        same_length("key", width, key.len())?;
        same_length("value", width, value.len())?;
        let (key, value) = (self.rounded(key)?, self.rounded(value)?);
        self.keys.push(key);
        self.values.push(value);
        Ok(())
    }

    /// What the cache holds of a vector.
    fn rounded(&self, x: &[f32]) -> Result<Vec<f32>> {
        let stored = match by_contract!(self.dtype, KvNotRounded => KvDtype::F32) {
            KvDtype::F16 => x
                .iter()
                .map(|x| f32_to_f16(*x).map_or(f32::NAN, f16_to_f32))
                .collect(),
            KvDtype::F32 => x.to_vec(),
        };
        finite(OpName::StoreKv, stored)
    }

    /// Stored key and value of one position, `[kv_heads * head_dim]` each.
    pub fn at(&self, position: usize) -> Option<(&[f32], &[f32])> {
        Some((self.keys.get(position)?, self.values.get(position)?))
    }
}

/// What Attention needs to know beside its operands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Only so many positions are visible, the token's own included.
    pub window: Option<u32>,
    /// `s = cap · tanh(s / cap)` after scaling.
    pub soft_cap: Option<f32>,
}

/// Positions of a split.
const SPLIT: usize = 256;

/// The operation Attention, of one token at the last position of the cache. `query`: `[heads * head_dim]`.
///
/// # Errors
/// [`Error::InvalidArgument`] for an empty cache, a window of 0, or heads that do not fit.
pub fn attention(spec: &AttentionSpec, query: &[f32], cache: &KvCache) -> Result<Vec<f32>> {
    let head_dim = cache.spec.head_dim as usize;
    let kv_heads = cache.spec.kv_heads as usize;
    same_length("query", spec.heads * head_dim, query.len())?;
    if cache.is_empty() || spec.window == Some(0) || kv_heads == 0 || !spec.heads.is_multiple_of(kv_heads) {
        return Err(Error::invalid(
            "attention",
            "a position, a window of at least 1 and heads that kv_heads divide",
            format!("{} positions, {spec:?}, {kv_heads} kv_heads", cache.len()),
        ));
    }
    let t = cache.len() - 1;
    // Visible: p ≤ t and p > t − W.
    let window = spec.window.map_or(usize::MAX, |w| w as usize);
    let window = by_contract!(
        window,
        WindowOneWider => window.saturating_add(1),
        WindowOneNarrower => (window - 1).max(1)
    );
    let first = (t + 1).saturating_sub(window);

    let mut out = Vec::with_capacity(query.len());
    for h in 0..spec.heads {
        let h_kv = by_contract!(h / (spec.heads / kv_heads), KvHeadsInterleaved => h % kv_heads);
        let of_head = |row: &'_ [f32]| row[h_kv * head_dim..][..head_dim].to_vec();
        let q = &query[h * head_dim..][..head_dim];
        let keys: Vec<_> = cache.keys[first..].iter().map(|k| of_head(k)).collect();
        let values: Vec<_> = cache.values[first..].iter().map(|v| of_head(v)).collect();
        let scores: Vec<f32> = keys.iter().map(|k| score(spec, q, k)).collect();
        out.extend(attend(first, &scores, &values, head_dim));
    }
    Ok(out)
}

/// Step 1: the score of one position.
fn score(spec: &AttentionSpec, q: &[f32], k: &[f32]) -> f32 {
    let dot = |q: &[f32]| {
        q.iter().zip(k).fold(
            0.0,
            |acc, (q, k)| by_contract!(f32::mul_add(*q, *k, acc), ScoreWithoutFma => q * k + acc),
        )
    };
    let s = by_contract!(
        dot(q) * spec.scale,
        QueryScaledFirst => dot(&q.iter().map(|q| q * spec.scale).collect::<Vec<_>>()),
        SoftCapBeforeScale => spec.soft_cap.map_or(dot(q), |cap| capped(dot(q), cap)) * spec.scale,
    );
    match spec.soft_cap {
        Some(cap) => by_contract!(capped(s, cap), SoftCapBeforeScale => s),
        None => s,
    }
}

/// What step 2 leaves of one split.
struct Split {
    m: f32,
    l: f32,
    o: Vec<f32>,
}

/// Steps 2 and 3, over the visible positions `first..first + scores.len()`.
fn attend(first: usize, scores: &[f32], values: &[Vec<f32>], head_dim: usize) -> Vec<f32> {
    let width = by_contract!(SPLIT, SplitsOf128 => 128, SplitsNotMerged => usize::MAX);
    let origin = by_contract!(0, SplitsFromTheWindow => first);
    let split_of = |i: usize| (first + i - origin) / width;

    let mut splits = Vec::new();
    let mut at = 0;
    while at < scores.len() {
        let end = (at..scores.len())
            .find(|i| split_of(*i) != split_of(at))
            .unwrap_or(scores.len());
        // The place of the first visible position within its split; the places before it hold +0.
        let place = first + at - origin - split_of(at) * width;
        splits.push(one_split(place, &scores[at..end], &values[at..end], head_dim));
        at = end;
    }
    merge(splits, head_dim)
}

fn one_split(place: usize, scores: &[f32], values: &[Vec<f32>], head_dim: usize) -> Split {
    let m = scores.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
    let w: Vec<f32> = scores.iter().map(|s| exp(s - m)).collect();
    let mut places = vec![0.0; place];
    places.extend(&w);
    let l = by_contract!(
        sum64(&places),
        SplitSumInOneAccumulator => w.iter().fold(0.0, |l, w| l + w)
    );
    let o = (0..head_dim)
        .map(|i| {
            w.iter()
                .zip(values)
                .fold(0.0, |o, (w, v)| f32::mul_add(*w, v[i], o))
        })
        .collect();
    Split { m, l, o }
}

fn merge(mut splits: Vec<Split>, head_dim: usize) -> Vec<f32> {
    by_contract!((), MergeDescending => splits.reverse());
    let largest = splits.iter().fold(f32::NEG_INFINITY, |m, s| m.max(s.m));
    let mut l = 0.0f32;
    let mut o = vec![0.0f32; head_dim];
    let step =
        |part: f32, f: f32, sum: f32| by_contract!(part.mul_add(f, sum), MergeWithoutFma => part * f + sum);
    for split in &splits {
        let f = exp(split.m - largest);
        l = step(split.l, f, l);
        for (o, part) in o.iter_mut().zip(&split.o) {
            *o = step(*part, f, *o);
        }
    }
    let r = 1.0 / l;
    o.iter()
        .map(|o| by_contract!(o * r, AttentionDividesBySum => o / l))
        .collect()
}
