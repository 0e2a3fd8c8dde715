//! Panels × tokens: the product of a segment of some groups of rows with several tokens.

use super::activations::Segment;
use super::codec::{Acc, Panelled};
use super::lanes::{Lanes, Sums};
use super::multiply::{Below, PANELS};
use super::panel::Panel;

/// Tokens that a step takes together.
const STEP: usize = 4;

/// Dots of a step, times the activations' part of their scales, which wait for the weights' part.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Dots([u8; 16 * STEP * PANELS * 64]);

impl Dots {
    pub(super) const ZERO: Self = Self([0; 16 * STEP * PANELS * 64]);

    #[inline(always)]
    fn get<L: Lanes>(&self, l: L, i: usize) -> L::V {
        let n = 4 * L::ROWS;
        l.load(&self.0[n * i..n * (i + 1)])
    }

    #[inline(always)]
    fn set<L: Lanes>(&mut self, l: L, i: usize, v: L::V) {
        let n = 4 * L::ROWS;
        l.store(v, &mut self.0[n * i..n * (i + 1)]);
    }
}

/// Adds the products of `N` panels' segment `segment` with all tokens to their sums.
#[inline(always)]
pub(super) fn add_products<L: Lanes, P: Panelled, const N: usize>(
    l: L,
    panels: &[Panel; PANELS],
    below: &[Below<L::V>; PANELS],
    blocks: usize,
    (x, segment): (&[Segment], usize),
    dots: &mut Dots,
    sums: &mut [[Sums; PANELS]],
) {
    let segments = x.len() / sums.len();
    let token = |t: usize| &x[t * segments + segment];
    let (steps, rest) = sums.as_chunks_mut::<STEP>();
    let done = STEP * steps.len();
    for (step, sums) in steps.iter_mut().enumerate() {
        let t = STEP * step;
        let x = [token(t), token(t + 1), token(t + 2), token(t + 3)];
        add_step::<L, P, N, STEP>(l, panels, below, blocks, x, dots, sums);
    }
    for (t, sums) in rest.as_chunks_mut::<1>().0.iter_mut().enumerate() {
        add_step::<L, P, N, 1>(l, panels, below, blocks, [token(done + t)], dots, sums);
    }
}

#[inline(always)]
fn add_step<L: Lanes, P: Panelled, const N: usize, const T: usize>(
    l: L,
    panels: &[Panel; PANELS],
    below: &[Below<L::V>; PANELS],
    blocks: usize,
    x: [&Segment; T],
    dots: &mut Dots,
    sums: &mut [[Sums; PANELS]; T],
) {
    if P::FORM.sub_scales {
        super_blocks::<L, P, N, T>(l, panels, below, blocks, x, sums);
    } else {
        scaled_blocks::<L, P, N, T>(l, panels, below, blocks, x, dots, sums);
    }
}

/// Blocks or half blocks, each with a scale `c` of up to 20 bits, whose products are 64-bit.
#[inline(always)]
fn scaled_blocks<L: Lanes, P: Panelled, const N: usize, const T: usize>(
    l: L,
    panels: &[Panel; PANELS],
    below: &[Below<L::V>; PANELS],
    blocks: usize,
    x: [&Segment; T],
    dots: &mut Dots,
    sums: &mut [[Sums; PANELS]; T],
) {
    let form = P::FORM;
    let per_block = if form.halves { 2 } else { 1 };
    for block in 0..blocks {
        for half in 0..per_block {
            let part = per_block * block + half;
            let acc = dot_part::<L, P, N, T>(l, panels, part, &x);
            for t in 0..T {
                let um = x[t].um_twice[block];
                let sum = if form.halves {
                    x[t].mus_half[part]
                } else {
                    x[t].mus[block]
                };
                for (n, acc) in acc.iter().enumerate() {
                    let dot = if form.dots == 0 {
                        l.dot_signed_end(acc[t].0, um, sum)
                    } else {
                        form.end(l, acc[t], l.factor(um))
                    };
                    dots.set(l, (part * T + t) * N + n, dot);
                }
            }
        }
    }
    for n in 0..N {
        for t in 0..T {
            let (mut i, mut j) = (l.zero_wide(), l.zero_wide());
            for part in 0..per_block * blocks {
                let sum = if form.halves {
                    x[t].mus_half[part]
                } else {
                    x[t].mus[part]
                };
                let mut dot = dots.get(l, (part * T + t) * N + n);
                if form.zero != 0 {
                    dot = l.sub(dot, l.splat((form.zero * sum) as u32));
                }
                i = l.mul_add_parted(i, dot, panels[n].wide_scales(l, part));
                if form.mins {
                    j = l.mul_add_splat(j, sum, panels[n].wide_mins(l, part));
                }
            }
            let acc = l.load_wide(&sums[t][n]);
            let acc = below[n].shifted(l, acc, i, form.mins.then_some(j), x[t]);
            l.store_wide(acc, &mut sums[t][n]);
        }
    }
}

/// Blocks or half blocks with small sub-scales under one scale: their sum fits 32 bits.
#[inline(always)]
fn super_blocks<L: Lanes, P: Panelled, const N: usize, const T: usize>(
    l: L,
    panels: &[Panel; PANELS],
    below: &[Below<L::V>; PANELS],
    blocks: usize,
    x: [&Segment; T],
    sums: &mut [[Sums; PANELS]; T],
) {
    let form = P::FORM;
    let per_block = if form.halves { 2 } else { 1 };
    let mut dots = [[l.splat(0); T]; N];
    for block in 0..blocks {
        for half in 0..per_block {
            let part = per_block * block + half;
            let acc = dot_part::<L, P, N, T>(l, panels, part, &x);
            for n in 0..N {
                let sub_scale = panels[n].scales(l, part);
                for t in 0..T {
                    let u = x[t].u_twice[block];
                    let dot = if form.dots == 0 {
                        l.dot_signed_scaled(acc[n][t].0, sub_scale, u, x[t].us(form.halves, part))
                    } else {
                        form.end(l, acc[n][t], l.times(sub_scale, u))
                    };
                    dots[n][t] = l.add(dots[n][t], dot);
                }
            }
        }
    }
    for n in 0..N {
        let m = panels[n].super_scales(l, 0);
        let m_min = panels[n].super_scales(l, 1);
        for t in 0..T {
            let mut dot = dots[n][t];
            if form.zero != 0 {
                let mut zeros = l.splat(0);
                for block in 0..blocks {
                    zeros = l.add(
                        zeros,
                        l.madd16(panels[n].pairs(l, block), l.splat(x[t].us_halves[block])),
                    );
                }
                dot = l.sub(dot, form.times_zero(l, zeros));
            }
            let m_a = l.splat(x[t].m as u32);
            let i = l.mul_add_wide(l.zero_wide(), dot, l.madd16(m, m_a));
            let j = form.mins.then(|| {
                let mut min_dot = l.splat(0);
                if form.halves {
                    for block in 0..blocks {
                        let mins = panels[n].mins(l, block);
                        min_dot = l.add(min_dot, l.madd16(mins, l.splat(x[t].us_halves[block])));
                    }
                } else {
                    for p in 0..blocks / 2 {
                        let u_mins = l.mul16(panels[n].mins(l, p), l.splat(x[t].u_pair[p]));
                        min_dot = l.add(min_dot, l.madd16(u_mins, l.splat(x[t].s_pair[p])));
                    }
                }
                l.mul_add_wide(l.zero_wide(), min_dot, l.madd16(m_min, m_a))
            });
            let acc = l.load_wide(&sums[t][n]);
            l.store_wide(below[n].shifted(l, acc, i, j, x[t]), &mut sums[t][n]);
        }
    }
}

/// Dots of a block or half block.
#[inline(always)]
fn dot_part<L: Lanes, P: Panelled, const N: usize, const T: usize>(
    l: L,
    panels: &[Panel; PANELS],
    part: usize,
    x: &[&Segment; T],
) -> [[Acc<L::V>; T]; N] {
    let form = P::FORM;
    let quads = form.quads();
    let mut acc = [[(l.splat(0), l.splat(0)); T]; N];
    for quad in quads * part..quads * (part + 1) {
        if form.dots == 0 {
            let mut w = [l.prepare_signed(panels[0].weights(l, quad)); N];
            for n in 1..N {
                w[n] = l.prepare_signed(panels[n].weights(l, quad));
            }
            for t in 0..T {
                for n in 0..N {
                    acc[n][t].0 = l.dot_signed(acc[n][t].0, w[n], x[t].q[quad]);
                }
            }
        } else {
            let second = form.splits::<L>() && quad - quads * part >= quads / 2;
            let mut w = [panels[0].weights(l, quad); N];
            for n in 1..N {
                w[n] = panels[n].weights(l, quad);
            }
            for t in 0..T {
                for n in 0..N {
                    let acc = &mut acc[n][t];
                    if second {
                        acc.1 = l.dot(acc.1, w[n], x[t].q[quad]);
                    } else {
                        acc.0 = l.dot(acc.0, w[n], x[t].q[quad]);
                    }
                }
            }
        }
    }
    acc
}
