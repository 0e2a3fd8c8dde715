use std::cmp::Ordering;
use std::collections::VecDeque;

use crate::philox::uniform;
use crate::{Error, Result};

/// Largest window in which repeated tokens are looked for.
pub const MAX_REPETITION_WINDOW: usize = 1 << 20;

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Divides the logits: above 1 evens chances out, below 1 sharpens them. 0 takes the most likely token always.
    pub temperature: f64,
    /// Only the so many most likely tokens are drawn from; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability are drawn from; 1 for all.
    pub top_p: f64,
    /// Only tokens at least this share as likely as the most likely one are drawn from; 0 for all.
    pub min_p: f64,
    /// Divides positive logits of recent tokens and multiplies negative ones; 1 for no penalty.
    pub repetition_penalty: f64,
    /// How many tokens count as recent.
    pub repetition_window: usize,
    /// Key of the random numbers.
    pub seed: u64,
}

impl Default for SamplerOptions {
    /// Greedy: temperature 0 and no penalty.
    fn default() -> Self {
        SamplerOptions {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repetition_window: 64,
            seed: 0,
        }
    }
}

/// Chooses tokens from logits, the same ones on every machine.
///
/// The steps, in this order: repetition penalty, top-k, top-p over what is left, min-p, temperature, draw. All arithmetic is
/// in f64 with a portable `exp`, sums have a fixed order, equal logits are ordered by token id, and the random number of a
/// position depends on nothing but seed and position.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    recent: VecDeque<u32>,
    /// Logits after the penalty.
    logits: Vec<f64>,
    /// Which tokens of `logits` the penalty has touched.
    penalised: Vec<bool>,
    /// Token ids that may be drawn.
    candidates: Vec<u32>,
    /// Their weights.
    weights: Vec<f64>,
}

impl Sampler {
    /// A sampler with nothing recent.
    ///
    /// # Errors
    /// [`Error::InvalidOption`].
    pub fn new(options: SamplerOptions) -> Result<Sampler> {
        let check = |ok: bool, name, expected, found: String| match ok {
            true => Ok(()),
            false => Err(Error::InvalidOption {
                name,
                expected,
                found,
            }),
        };
        let o = &options;
        check(
            o.temperature.is_finite() && o.temperature >= 0.0,
            "temperature",
            "0 or more, and finite",
            o.temperature.to_string(),
        )?;
        check(
            o.top_p > 0.0 && o.top_p <= 1.0,
            "top_p",
            "above 0 and at most 1",
            o.top_p.to_string(),
        )?;
        check(
            (0.0..=1.0).contains(&o.min_p),
            "min_p",
            "between 0 and 1",
            o.min_p.to_string(),
        )?;
        check(
            o.repetition_penalty.is_finite() && (1e-6..=1e6).contains(&o.repetition_penalty),
            "repetition_penalty",
            "between 1e-6 and 1e6",
            o.repetition_penalty.to_string(),
        )?;
        check(
            o.repetition_window <= MAX_REPETITION_WINDOW,
            "repetition_window",
            "at most 1048576",
            o.repetition_window.to_string(),
        )?;
        Ok(Sampler {
            recent: VecDeque::with_capacity(options.repetition_window),
            options,
            logits: Vec::new(),
            penalised: Vec::new(),
            candidates: Vec::new(),
            weights: Vec::new(),
        })
    }

    /// Allocates for logits of that many tokens. Without it the first [`Sampler::sample`] does; later ones never allocate.
    pub fn reserve(&mut self, vocabulary: usize) {
        self.logits.resize(vocabulary, 0.0);
        self.penalised.resize(vocabulary, false);
        self.candidates.clear();
        self.candidates.reserve(vocabulary);
        self.weights.clear();
        self.weights.reserve(vocabulary);
    }

    /// The options it was made with.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// Counts a token as recent: each one of the prompt, and each one that was chosen.
    pub fn accept(&mut self, token: u32) {
        if self.options.repetition_window == 0 {
            return;
        }
        if self.recent.len() == self.options.repetition_window {
            self.recent.pop_front();
        }
        self.recent.push_back(token);
    }

    /// Forgets all recent tokens.
    pub fn reset(&mut self) {
        self.recent.clear();
    }

    /// Chooses the token at `position` of its sequence. It is not recent until it is [accepted](Sampler::accept).
    ///
    /// # Errors
    /// [`Error::NonFiniteLogit`], [`Error::LogitCount`] for no logits.
    pub fn sample(&mut self, logits: &[f32], position: u64) -> Result<u32> {
        let best = arg_max(logits)?;
        let penalty = self.options.repetition_penalty != 1.0 && !self.recent.is_empty();
        if self.options.temperature == 0.0 && !penalty {
            return Ok(best);
        }
        if self.logits.len() != logits.len() {
            self.reserve(logits.len());
        }
        for (to, &from) in self.logits.iter_mut().zip(logits) {
            *to = f64::from(from);
        }
        if penalty {
            self.penalise();
        }
        if self.options.temperature == 0.0 {
            return Ok(first_greatest(&self.logits));
        }
        self.select();
        Ok(self.draw(position))
    }

    fn penalise(&mut self) {
        let penalty = self.options.repetition_penalty;
        for &token in &self.recent {
            let at = token as usize;
            // A token outside the vocabulary has no logit; a token counts once.
            if at < self.logits.len() && !self.penalised[at] {
                self.penalised[at] = true;
                let logit = &mut self.logits[at];
                *logit = match *logit > 0.0 {
                    true => *logit / penalty,
                    false => *logit * penalty,
                };
            }
        }
        for &token in &self.recent {
            if let Some(mark) = self.penalised.get_mut(token as usize) {
                *mark = false;
            }
        }
    }

    /// Leaves in `candidates` the tokens that may be drawn.
    fn select(&mut self) {
        let logits = &self.logits;
        let (top_k, top_p) = (self.options.top_k, self.options.top_p);
        // A strict total order, so that sorting has one result only: greater first, then lower id.
        let order = |&a: &u32, &b: &u32| {
            logits[b as usize]
                .partial_cmp(&logits[a as usize])
                .unwrap_or(Ordering::Equal)
                .then(a.cmp(&b))
        };
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend(0..logits.len() as u32);
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, order);
            candidates.truncate(top_k);
            candidates.sort_unstable_by(order);
        }
        let greatest = logits[first_greatest(logits) as usize];
        let weight = |token: u32| libm::exp(logits[token as usize] - greatest);
        if top_p < 1.0 {
            let total: f64 = candidates.iter().map(|&t| weight(t)).sum();
            let (mut kept, mut sorted, mut mass) = (0, 0, 0.0);
            while kept < candidates.len() && mass < top_p * total {
                // Sorts no further than the mass reaches.
                if kept == sorted {
                    let rest = &mut candidates[sorted..];
                    let more = rest.len().min(sorted.max(64));
                    if more < rest.len() {
                        rest.select_nth_unstable_by(more - 1, order);
                    }
                    rest[..more].sort_unstable_by(order);
                    sorted += more;
                }
                mass += weight(candidates[kept]);
                kept += 1;
            }
            candidates.truncate(kept.max(1));
        }
        if self.options.min_p > 0.0 {
            let least = self.options.min_p;
            candidates.retain(|&t| weight(t) >= least);
        }
    }

    fn draw(&mut self, position: u64) -> u32 {
        let logits = &self.logits;
        let greatest = logits[first_greatest(logits) as usize];
        let temperature = self.options.temperature;
        self.weights.clear();
        let mut total = 0.0;
        for &token in &self.candidates {
            let weight = libm::exp((logits[token as usize] - greatest) / temperature);
            self.weights.push(weight);
            total += weight;
        }
        let mark = uniform(self.options.seed, position) * total;
        let mut mass = 0.0;
        let mut last = first_greatest(logits);
        for (&token, &weight) in self.candidates.iter().zip(&self.weights) {
            if weight > 0.0 {
                last = token;
            }
            mass += weight;
            if mass > mark {
                return token;
            }
        }
        // Rounding can leave the sum at the mark.
        last
    }
}

/// The token with the greatest logit; of equals, the one with the lowest id.
///
/// # Errors
/// [`Error::NonFiniteLogit`] names the first NaN or infinity, [`Error::LogitCount`] means that there are none.
pub fn arg_max(logits: &[f32]) -> Result<u32> {
    if logits.is_empty() || u32::try_from(logits.len()).is_err() {
        return Err(Error::LogitCount {
            expected: 1,
            found: logits.len(),
        });
    }
    let mut best = (0u32, f32::NEG_INFINITY);
    for (token, &value) in (0u32..).zip(logits) {
        if !value.is_finite() {
            return Err(Error::NonFiniteLogit { token, value });
        }
        if value > best.1 {
            best = (token, value);
        }
    }
    Ok(best.0)
}

fn first_greatest(values: &[f64]) -> u32 {
    let mut best = (0u32, f64::NEG_INFINITY);
    for (token, &value) in (0u32..).zip(values) {
        if value > best.1 {
            best = (token, value);
        }
    }
    best.0
}
