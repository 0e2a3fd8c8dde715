//! §4: routing, the weighted sum of experts, and arg-max.

use hoist_backend::{Error, Result};

use super::deviation::by_contract;
use super::elementary::exp;
use super::float::sum256;
use super::same_length;

/// The operation RouterTopK, of one token: the chosen experts in descending order of probability, and their weights.
///
/// # Errors
/// [`Error::InvalidArgument`] unless `1 ≤ k ≤ logits`.
pub fn router_top_k(logits: &[f32], k: usize, normalise: bool) -> Result<(Vec<u32>, Vec<f32>)> {
    if k == 0 || k > logits.len() {
        return Err(Error::invalid(
            "chosen experts",
            format!("1 to {}", logits.len()),
            k,
        ));
    }
    let largest = logits.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    let e: Vec<f32> = logits.iter().map(|x| exp(x - largest)).collect();
    let sum = sum256(&e);
    let p: Vec<f32> = e.iter().map(|e| e / sum).collect();

    let mut order: Vec<usize> = (0..p.len()).collect();
    by_contract!((), RouterTiesToTheHighest => order.reverse());
    order.sort_by(|a, b| p[*b].total_cmp(&p[*a])); // stable: ties keep the lowest number first
    order.truncate(k);
    let mut weights: Vec<f32> = order.iter().map(|i| p[*i]).collect();
    if normalise {
        let total = by_contract!(
            weights.iter().fold(0.0, |t, w| t + w),
            RouterNormalisesAscending => weights.iter().rev().fold(0.0, |t, w| t + w)
        );
        weights.iter_mut().for_each(|w| *w /= total);
    }
    by_contract!((), RouterSoftmaxOverChosen => if normalise {
        let chosen: Vec<f32> = order.iter().map(|i| e[*i]).collect();
        let total = sum256(&chosen);
        weights = chosen.iter().map(|e| e / total).collect();
    });
    let experts = order.iter().map(|i| *i as u32).collect();
    Ok((experts, weights))
}

/// The operation WeightedSum, of one token. `inputs`: a vector for each chosen expert.
///
/// # Errors
/// [`Error::InvalidArgument`] for unequal lengths or no expert.
pub fn weighted_sum(inputs: &[&[f32]], experts: &[u32], weights: &[f32]) -> Result<Vec<f32>> {
    same_length("weights of chosen experts", experts.len(), weights.len())?;
    same_length("vectors of chosen experts", experts.len(), inputs.len())?;
    let mut slots: Vec<usize> = (0..experts.len()).collect();
    by_contract!(
        slots.sort_by_key(|s| experts[*s]),
        WeightedSumInSlotOrder => ()
    );
    let Some((first, rest)) = slots.split_first() else {
        return Err(Error::invalid("chosen experts", "at least 1", 0));
    };
    let width = inputs[*first].len();
    for input in inputs {
        same_length("vector of a chosen expert", width, input.len())?;
    }
    Ok((0..width)
        .map(|i| {
            let start = weights[*first] * inputs[*first][i];
            let start = by_contract!(start, WeightedSumFromZero => start + 0.0);
            rest.iter()
                .fold(start, |acc, s| weights[*s].mul_add(inputs[*s][i], acc))
        })
        .collect())
}

/// The number of the largest logit; the lowest of equal ones.
pub fn arg_max(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if by_contract!(*x > logits[best], ArgMaxTakesTheLast => *x >= logits[best]) {
            best = i;
        }
    }
    best as u32
}
