use crate::{Encoding, Error, LoadPlan, Result, WeightClass, WeightId};

/// Accounts for every byte of a load: which ranges of which weights have arrived.
///
/// Chunks may come in any order and any size that is a multiple of the weight's block. A ledger keeps how far each weight
/// has come without a gap, and one sorted list of ranges behind that; neighbours merge, so that in-order uploads, and
/// weights that come whole, take no memory beyond the ledger's own.
#[derive(Clone, Debug)]
pub struct UploadLedger {
    weights: Vec<Account>,
    /// The names of all weights, one after the other: a few allocations, however many weights there are.
    names: String,
}

#[derive(Clone, Debug)]
struct Account {
    /// Where its name ends among the names; it starts where the one before ends.
    name_end: usize,
    nbytes: u64,
    granule: u64,
    prefix: u64,
    class: WeightClass,
    /// Bytes from its start on that have arrived.
    done: u64,
    /// What has arrived behind them: sorted, disjoint, not touching.
    ahead: Vec<(u64, u64)>,
}

impl UploadLedger {
    /// An empty ledger for a plan.
    pub fn new(plan: &LoadPlan) -> Self {
        Self::of(
            plan.weights
                .iter()
                .map(|w| (w.name.as_str(), w.class, w.encoding, w.nbytes)),
        )
    }

    /// An empty ledger for weights of those names, classes, encodings and canonical bytes, for a backend that has its plan no
    /// more.
    pub fn of<'a>(weights: impl IntoIterator<Item = (&'a str, WeightClass, Encoding, u64)>) -> Self {
        let mut names = String::new();
        let weights = weights
            .into_iter()
            .map(|(name, class, encoding, nbytes)| {
                names.push_str(name);
                Account {
                    name_end: names.len(),
                    nbytes,
                    granule: encoding.block_bytes(),
                    // A prefixed encoding has one-byte blocks, so that its prefix needs no alignment of its own.
                    prefix: encoding.matrix_prefix_bytes(),
                    class,
                    done: 0,
                    ahead: Vec::new(),
                }
            })
            .collect();
        Self { weights, names }
    }

    /// Records that bytes `offset..offset + len` of a weight arrive through the upload for `classes`.
    ///
    /// # Errors
    /// [`Error::UnknownWeight`]; [`Error::InvalidArgument`] if the weight is of another class; [`Error::InvalidChunk`] if
    /// the range is empty, out of range, splits a block or overlaps what has arrived. Then nothing is recorded.
    pub fn record(&mut self, weight: WeightId, offset: u64, len: u64, classes: &[WeightClass]) -> Result<()> {
        let count = self.weights.len();
        let account = self.weights.get_mut(weight.index()).ok_or(Error::UnknownWeight {
            weight,
            weights: count,
        })?;
        if !classes.contains(&account.class) {
            let class = account.class;
            return Err(Error::invalid(
                format!("class of weight `{}` for this upload", self.name(weight.index())),
                format!("one of {classes:?}"),
                format!("{class:?}"),
            ));
        }
        account.record(offset, len).map_err(|reason| Error::InvalidChunk {
            weight: self.name(weight.index()).into(),
            start: offset,
            end: offset.saturating_add(len),
            reason,
        })
    }

    /// Demands that everything has arrived.
    ///
    /// # Errors
    /// [`Error::Incomplete`] with the first range of the first weight that is missing.
    pub fn check_complete(&self) -> Result<()> {
        let missing = |(place, account): (usize, &Account)| Some((place, account.missing()?));
        match self.weights.iter().enumerate().find_map(missing) {
            None => Ok(()),
            Some((place, (start, end))) => Err(Error::Incomplete {
                weight: self.name(place).into(),
                start,
                end,
                nbytes: self.weights[place].nbytes,
            }),
        }
    }

    fn name(&self, place: usize) -> &str {
        let start = place
            .checked_sub(1)
            .map_or(0, |before| self.weights[before].name_end);
        &self.names[start..self.weights[place].name_end]
    }
}

impl Account {
    /// Records a range, or says why it is refused.
    fn record(&mut self, start: u64, len: u64) -> Result<(), String> {
        let end = start.checked_add(len).ok_or("it ends past 2^64")?;
        if len == 0 {
            return Err("it is empty".into());
        }
        if end > self.nbytes {
            return Err(format!("the weight has {} bytes", self.nbytes));
        }
        debug_assert!(self.prefix == 0 || self.granule == 1);
        if !start.is_multiple_of(self.granule) || !end.is_multiple_of(self.granule) {
            return Err(format!("it splits a block of {} bytes", self.granule));
        }
        let twice = |s, e| Err(format!("bytes {s}..{e} have arrived already"));
        if start < self.done {
            return twice(0, self.done);
        }
        let next = self.ahead.partition_point(|&(s, _)| s < start);
        if let Some(&(s, e)) = self.ahead.get(next).filter(|&&(s, _)| s < end) {
            return twice(s, e);
        }
        let before = next.checked_sub(1).map(|i| self.ahead[i]);
        if let Some((s, e)) = before.filter(|&(_, e)| e > start) {
            return twice(s, e);
        }
        let joins_next = self.ahead.get(next).is_some_and(|&(s, _)| s == end);
        if start == self.done {
            // Nothing lies before it, so that what follows is the first.
            self.done = if joins_next {
                self.ahead.remove(next).1
            } else {
                end
            };
            return Ok(());
        }
        match (before.is_some_and(|(_, e)| e == start), joins_next) {
            (true, true) => {
                self.ahead[next - 1].1 = self.ahead[next].1;
                self.ahead.remove(next);
            }
            (true, false) => self.ahead[next - 1].1 = end,
            (false, true) => self.ahead[next].0 = start,
            (false, false) => self.ahead.insert(next, (start, end)),
        }
        Ok(())
    }

    /// The first range that has not arrived.
    fn missing(&self) -> Option<(u64, u64)> {
        (self.done < self.nbytes).then(|| (self.done, self.ahead.first().map_or(self.nbytes, |(s, _)| *s)))
    }
}

/// Classes that `upload_quantized` takes.
pub(crate) const QUANTIZED: &[WeightClass] = &[WeightClass::Quantized];
/// Classes that `upload_f32` takes.
pub(crate) const FLOAT: &[WeightClass] = &[WeightClass::Float, WeightClass::Bias];
/// Classes that `upload_gamma` takes.
pub(crate) const GAMMA: &[WeightClass] = &[WeightClass::Gamma];

impl UploadLedger {
    /// Records a chunk of `upload_quantized`. Errors as [`UploadLedger::record`].
    pub fn record_quantized(&mut self, weight: WeightId, offset: u64, len: u64) -> Result<()> {
        self.record(weight, offset, len, QUANTIZED)
    }

    /// Records a chunk of `upload_f32`. Errors as [`UploadLedger::record`].
    pub fn record_f32(&mut self, weight: WeightId, offset: u64, len: u64) -> Result<()> {
        self.record(weight, offset, len, FLOAT)
    }

    /// Records a chunk of `upload_gamma`. Errors as [`UploadLedger::record`].
    pub fn record_gamma(&mut self, weight: WeightId, offset: u64, len: u64) -> Result<()> {
        self.record(weight, offset, len, GAMMA)
    }
}

impl WeightClass {
    /// The class of a weight of that encoding in a matrix, a norm vector or a bias.
    pub fn of_matrix(encoding: Encoding) -> Self {
        if encoding.is_quantized() {
            WeightClass::Quantized
        } else {
            WeightClass::Float
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FloatLayout, MemoryByClass, Role, Shape, ValueChange, WeightPlan};

    fn account(nbytes: u64, granule: u64) -> Account {
        Account {
            name_end: 0,
            nbytes,
            granule,
            prefix: 0,
            class: WeightClass::Quantized,
            done: 0,
            ahead: vec![],
        }
    }

    #[test]
    fn any_order_of_chunks_completes() {
        // All orders of four chunks.
        let chunks = [(0, 18), (18, 36), (54, 18), (72, 18)];
        for order in 0..24usize {
            let mut left = chunks.to_vec();
            let mut a = account(90, 18);
            let mut o = order;
            for n in (1..=4).rev() {
                assert!(a.missing().is_some());
                let (start, len) = left.remove(o % n);
                o /= n;
                a.record(start, len).unwrap();
            }
            assert_eq!((a.missing(), a.done, a.ahead.len()), (None, 90, 0));
        }
    }

    #[test]
    fn overlap_misalignment_and_excess_are_refused_and_change_nothing() {
        let mut a = account(90, 18);
        a.record(18, 36).unwrap();
        let before = (a.done, a.ahead.clone());
        for (start, len) in [
            (18, 18),
            (36, 36),
            (0, 36),
            (0, 90),
            (5, 18),
            (0, 5),
            (72, 36),
            (90, 18),
            (0, 0),
            (u64::MAX, 2),
        ] {
            assert!(a.record(start, len).is_err(), "{start} + {len}");
            assert_eq!((a.done, a.ahead.clone()), before);
        }
        a.record(0, 18).unwrap();
        for (start, len) in [(0, 18), (36, 18), (0, 90)] {
            assert!(a.record(start, len).is_err(), "{start} + {len}");
        }
    }

    #[test]
    fn the_first_missing_range_is_named() {
        let mut a = account(90, 18);
        a.record(0, 18).unwrap();
        a.record(54, 18).unwrap();
        assert_eq!(a.missing(), Some((18, 54)));
    }

    #[test]
    fn messages_name_the_weight_they_are_about() {
        let weight = |id, name: &str| WeightPlan {
            id: WeightId(id),
            name: name.into(),
            layer: None,
            role: Role::TokenEmbd,
            class: WeightClass::Float,
            encoding: Encoding::F32,
            shape: Shape::vector(4),
            nbytes: 16,
            views: vec![],
            change: ValueChange::Keep,
            layout: FloatLayout::OutIn,
            resident_bytes: 0,
        };
        let plan = LoadPlan {
            architecture: "test".into(),
            layers: 0,
            weights: vec![weight(0, "one"), weight(1, ""), weight(2, "drei")],
            resident: MemoryByClass::default(),
            nbytes: 48,
            source_bytes: 48,
        };
        let mut ledger = UploadLedger::new(&plan);
        for (id, name) in [(0, "one"), (1, ""), (2, "drei")] {
            assert!(
                matches!(ledger.check_complete(), Err(Error::Incomplete { weight, .. }) if weight == name)
            );
            let past = ledger.record_f32(WeightId(id), 8, 12);
            assert!(
                matches!(past, Err(Error::InvalidChunk { weight, start: 8, end: 20, .. }) if weight == name)
            );
            ledger.record_f32(WeightId(id), 0, 16).unwrap();
        }
        ledger.check_complete().unwrap();
        assert!(ledger.record_f32(WeightId(3), 0, 16).is_err());
    }
}
