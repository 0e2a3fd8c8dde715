//! §2 and §3: sums of f32 in their written order.

use super::deviation::by_contract;

/// `N` accumulators from +0, element `i` to accumulator `i mod N` in ascending order, then folded in halves.
fn in_lanes(lanes: usize, count: usize, step: impl Fn(f32, usize) -> f32) -> f32 {
    let mut acc = vec![0.0f32; lanes];
    for i in 0..count {
        acc[i % lanes] = step(acc[i % lanes], i);
    }
    fold(acc)
}

fn fold(mut acc: Vec<f32>) -> f32 {
    let halves = || std::iter::successors(Some(acc.len() / 2), |h| Some(h / 2)).take_while(|h| *h > 0);
    let halves: Vec<usize> = by_contract!(
        halves().collect(),
        DotFoldsNeighbours => return fold_neighbours(acc)
    );
    for h in halves {
        for l in 0..h {
            acc[l] += acc[l + h];
        }
    }
    acc[0]
}

/// A deviation: lane `2l` and `2l + 1` first.
fn fold_neighbours(mut acc: Vec<f32>) -> f32 {
    while acc.len() > 1 {
        acc = acc.chunks(2).map(|pair| pair[0] + pair[1]).collect();
    }
    acc[0]
}

/// §2: the dot product in 64 accumulators.
pub fn dot64(w: &[f32], x: &[f32]) -> f32 {
    let step = |acc, i: usize| {
        by_contract!(
            f32::mul_add(w[i], x[i], acc),
            DotWithoutFma => w[i] * x[i] + acc,
        )
    };
    by_contract!(
        in_lanes(64, w.len(), step),
        DotInOneAccumulator => in_lanes(1, w.len(), step),
        DotInThirtyTwoLanes => {
            let mut acc = vec![0.0; 32];
            for i in 0..w.len() {
                acc[i / 8 % 32] = step(acc[i / 8 % 32], i);
            }
            fold(acc)
        },
    )
}

/// dot64's order over weights of attention: `acc = acc + x_i`.
pub(super) fn sum64(x: &[f32]) -> f32 {
    in_lanes(64, x.len(), |acc, i| acc + x[i])
}

/// §3: the sum in 256 accumulators.
pub fn sum256(x: &[f32]) -> f32 {
    let lanes = by_contract!(256, SumInSixtyFourLanes => 64);
    in_lanes(lanes, x.len(), |acc, i| acc + x[i])
}

/// §3: the sum of squares in 256 accumulators.
pub fn sum256_of_squares(x: &[f32]) -> f32 {
    let lanes = by_contract!(256, SumInSixtyFourLanes => 64);
    in_lanes(lanes, x.len(), |acc, i| {
        by_contract!(
            f32::mul_add(x[i], x[i], acc),
            SquaresWithoutFma => x[i] * x[i] + acc,
        )
    })
}
