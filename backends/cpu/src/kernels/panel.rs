//! A segment of a group of rows, decoded: what several tokens share.

use super::lanes::Lanes;

/// Bytes of the widest vector.
const VECTOR: usize = 64;

/// Vectors of one segment and group. Which are used, and how, a codec says ([`super::codec::Form`]).
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Panel {
    /// Four weights of each row.
    weights: [[u8; VECTOR]; 64],
    /// `c` of a block or half block, or its sub-scale.
    scales: [[u8; VECTOR]; 16],
    /// `k` of a block or half block, or the sub-mins of two blocks.
    mins: [[u8; VECTOR]; 16],
    /// Signed sub-scales of two half blocks.
    pairs: [[u8; VECTOR]; 8],
    /// `m` of a super-block's scale and of its min's.
    super_scales: [[u8; VECTOR]; 2],
}

macro_rules! vectors {
    ($($field:ident $set:ident)*) => {$(
        #[inline(always)]
        pub(super) fn $field<L: Lanes>(&self, lanes: L, i: usize) -> L::V {
            lanes.load(&self.$field[i][..4 * L::ROWS])
        }

        #[inline(always)]
        pub(super) fn $set<L: Lanes>(&mut self, lanes: L, i: usize, v: L::V) {
            lanes.store(v, &mut self.$field[i][..4 * L::ROWS]);
        }
    )*};
}

impl Panel {
    pub(super) const ZERO: Self = Self {
        weights: [[0; VECTOR]; 64],
        scales: [[0; VECTOR]; 16],
        mins: [[0; VECTOR]; 16],
        pairs: [[0; VECTOR]; 8],
        super_scales: [[0; VECTOR]; 2],
    };

    vectors! {
        weights set_weights
        scales set_scales
        mins set_mins
        pairs set_pairs
        super_scales set_super_scales
    }

    /// Writes a row of plain integers: weights, then `c` and `k` of half blocks.
    pub(super) fn set_row<L: Lanes>(&mut self, row: usize, view: &hoist_quant::SegmentView) {
        debug_assert!(row < L::ROWS);
        let place = 4 * row..4 * row + 4;
        for (quad, out) in view.weights.as_chunks::<4>().0.iter().zip(&mut self.weights) {
            out[place.clone()].copy_from_slice(&quad.map(|w| w as u8));
        }
        for (c, out) in view.c.iter().zip(&mut self.scales) {
            out[place.clone()].copy_from_slice(&c.to_le_bytes());
        }
        for (k, out) in view.k.iter().zip(&mut self.mins) {
            out[place.clone()].copy_from_slice(&k.to_le_bytes());
        }
    }
}
