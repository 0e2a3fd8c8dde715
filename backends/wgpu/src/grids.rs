//! Code books of the IQ encodings, as the kernels read them: words of four i8.
//!
//! They are read from the one description there is, `hoist-quant`'s, through blocks that name every entry once.

use hoist_backend::{Encoding, Error, Result};
use hoist_quant::{SegmentView, read_segment};

/// A code book.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grid {
    Iq2Xxs,
    Iq2Xs,
    Iq2S,
    Iq3Xxs,
    Iq3S,
    Iq1,
}

impl Grid {
    const ALL: [Self; 6] = [
        Self::Iq2Xxs,
        Self::Iq2Xs,
        Self::Iq2S,
        Self::Iq3Xxs,
        Self::Iq3S,
        Self::Iq1,
    ];

    /// Entries, and words of each.
    const fn size(self) -> (usize, usize) {
        match self {
            Self::Iq2Xxs => (256, 2),
            Self::Iq2Xs => (512, 2),
            Self::Iq2S => (1024, 2),
            Self::Iq3Xxs => (256, 1),
            Self::Iq3S => (512, 1),
            Self::Iq1 => (2048, 2),
        }
    }

    /// Its first word among those of all code books.
    pub(crate) fn offset(self) -> usize {
        let before = Self::ALL.iter().take_while(|g| **g != self);
        before.map(|g| g.size().0 * g.size().1).sum()
    }

    /// A block that names entries `first ..`, without signs.
    fn block(self, first: usize) -> (Encoding, Vec<u8>) {
        let low = |i: usize| (first + i) as u8;
        let high = |i: usize| (first + i) >> 8;
        match self {
            Self::Iq2Xxs => {
                let mut b = vec![0; 66];
                for i in 0..32 {
                    b[2 + 8 * (i / 4) + i % 4] = low(i);
                }
                (Encoding::IQ2_XXS, b)
            }
            Self::Iq2Xs => {
                let mut b = vec![0; 74];
                for i in 0..32 {
                    b[2 + 2 * i] = low(i);
                    b[3 + 2 * i] = high(i) as u8;
                }
                (Encoding::IQ2_XS, b)
            }
            Self::Iq2S => {
                let mut b = vec![0; 82];
                for i in 0..32 {
                    b[2 + i] = low(i);
                    b[66 + i / 4] |= (high(i) << (2 * (i % 4))) as u8;
                }
                (Encoding::IQ2_S, b)
            }
            Self::Iq3Xxs => {
                let mut b = vec![0; 98];
                for i in 0..64 {
                    b[2 + i] = low(i);
                }
                (Encoding::IQ3_XXS, b)
            }
            Self::Iq3S => {
                let mut b = vec![0; 110];
                for i in 0..64 {
                    b[2 + i] = low(i);
                    b[66 + i / 8] |= (high(i) << (i % 8)) as u8;
                }
                (Encoding::IQ3_S, b)
            }
            Self::Iq1 => {
                let mut b = vec![0; 50];
                for i in 0..32 {
                    b[2 + i] = low(i);
                    let at = 34 + 2 * (i / 4);
                    let bits = (high(i) << (3 * (i % 4))) as u16;
                    let word = u16::from_le_bytes([b[at], b[at + 1]]) | bits;
                    b[at..at + 2].copy_from_slice(&word.to_le_bytes());
                }
                (Encoding::IQ1_S, b)
            }
        }
    }
}

/// All code books, one after the other.
pub(crate) fn words() -> Result<Vec<u32>> {
    let mut words = Vec::new();
    let mut view = SegmentView::default();
    for grid in Grid::ALL {
        let (entries, each) = grid.size();
        let mut first = 0;
        while first < entries {
            let (encoding, block) = grid.block(first);
            read_segment(encoding, &block, 0, &mut view).map_err(|e| Error::internal(crate::NAME, e))?;
            let levels = view.weights.map(|w| match grid {
                // Codes are 8 · level + 1.
                Grid::Iq1 => w - 1,
                _ => w,
            });
            let packed = levels
                .as_chunks::<4>()
                .0
                .iter()
                .map(|four| u32::from_le_bytes(four.map(|w| w as u8)));
            words.extend(packed);
            first += 64 / each;
        }
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_books_lie_where_they_are_said_to() {
        let words = words().unwrap();
        let last = Grid::Iq1;
        assert_eq!(words.len(), last.offset() + last.size().0 * last.size().1);
        // Levels of IQ3_S are odd, 1 to 15; those of IQ1 are −8, 0 or 8.
        let bytes = |from: usize, n: usize| words[from..from + n].iter().flat_map(|w| w.to_le_bytes());
        assert!(bytes(Grid::Iq3S.offset(), 512).all(|b| b % 2 == 1 && b < 16));
        assert!(bytes(Grid::Iq1.offset(), 4096).all(|b| [0, 8, 0xf8].contains(&b)));
    }
}
