//! A segment of a group of rows, decoded: what several tokens share.

use super::lanes::{Lanes, Wide};

/// Bytes of the widest vector.
const VECTOR: usize = 64;

/// Vectors of one segment and group, one after the other. Which are used, and how, a codec says
/// ([`super::codec::Form`]).
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Panel {
    /// Four weights of each row.
    weights: [u8; 64 * VECTOR],
    /// `c` of a block or half block, or its sub-scale; of a `c`, once more with odd rows in even places.
    scales: [u8; 32 * VECTOR],
    /// `k` of a block or half block, or the sub-mins of two blocks; of a `k`, once more as of a `c`.
    mins: [u8; 32 * VECTOR],
    /// Signed sub-scales of two half blocks.
    pairs: [u8; 8 * VECTOR],
    /// `m` of a super-block's scale and of its min's.
    super_scales: [u8; 2 * VECTOR],
}

macro_rules! vectors {
    ($($field:ident $set:ident)*) => {$(
        #[inline(always)]
        pub(super) fn $field<L: Lanes>(&self, lanes: L, i: usize) -> L::V {
            let n = 4 * L::ROWS;
            lanes.load(&self.$field[n * i..n * (i + 1)])
        }

        #[inline(always)]
        pub(super) fn $set<L: Lanes>(&mut self, lanes: L, i: usize, v: L::V) {
            let n = 4 * L::ROWS;
            lanes.store(v, &mut self.$field[n * i..n * (i + 1)]);
        }
    )*};
}

impl Panel {
    pub(super) const ZERO: Self = Self {
        weights: [0; 64 * VECTOR],
        scales: [0; 32 * VECTOR],
        mins: [0; 32 * VECTOR],
        pairs: [0; 8 * VECTOR],
        super_scales: [0; 2 * VECTOR],
    };

    vectors! {
        weights set_weights
        scales set_scales
        mins set_mins
        pairs set_pairs
        super_scales set_super_scales
    }

    /// `c` of a block or half block.
    #[inline(always)]
    pub(super) fn wide_scales<L: Lanes>(&self, lanes: L, i: usize) -> Wide<L::V> {
        Wide {
            even: self.scales(lanes, 2 * i),
            odd: self.scales(lanes, 2 * i + 1),
        }
    }

    #[inline(always)]
    pub(super) fn set_wide_scales<L: Lanes>(&mut self, lanes: L, i: usize, v: L::V) {
        self.set_scales(lanes, 2 * i, v);
        self.set_scales(lanes, 2 * i + 1, lanes.odd(v));
    }

    /// `k` of a block or half block.
    #[inline(always)]
    pub(super) fn wide_mins<L: Lanes>(&self, lanes: L, i: usize) -> Wide<L::V> {
        Wide {
            even: self.mins(lanes, 2 * i),
            odd: self.mins(lanes, 2 * i + 1),
        }
    }

    #[inline(always)]
    pub(super) fn set_wide_mins<L: Lanes>(&mut self, lanes: L, i: usize, v: L::V) {
        self.set_mins(lanes, 2 * i, v);
        self.set_mins(lanes, 2 * i + 1, lanes.odd(v));
    }

    /// Writes a row of plain integers: weights, then `c` and `k` of half blocks.
    pub(super) fn set_row<L: Lanes>(&mut self, row: usize, view: &hoist_quant::SegmentView) {
        debug_assert!(row < L::ROWS);
        let weights = self.weights.as_chunks_mut::<4>().0;
        for (quad, out) in view
            .weights
            .as_chunks::<4>()
            .0
            .iter()
            .zip(weights[row..].iter_mut().step_by(L::ROWS))
        {
            *out = quad.map(|w| w as u8);
        }
        let put = |values: &[i32; 16], out: &mut [u8]| {
            let words = out.as_chunks_mut::<4>().0;
            for (value, pair) in values.iter().zip(words.chunks_exact_mut(2 * L::ROWS)) {
                pair[row] = value.to_le_bytes();
                // Only even places of the second vector are read.
                pair[L::ROWS + row / 2 * 2] = if row % 2 == 1 {
                    pair[row]
                } else {
                    pair[L::ROWS + row / 2 * 2]
                };
            }
        };
        put(&view.c, &mut self.scales);
        put(&view.k, &mut self.mins);
    }
}
