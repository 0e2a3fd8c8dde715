use crate::{Encoding, Error, LoadPlan, Result, WeightClass, WeightId, WeightPlan};

/// Accounts for every byte of a load: which ranges of which weights have arrived.
///
/// Chunks may come in any order and any size that is a multiple of the weight's block. A ledger keeps one sorted list of
/// ranges per weight; neighbours merge, so that in-order uploads keep one range.
#[derive(Clone, Debug)]
pub struct UploadLedger {
    weights: Vec<Account>,
}

#[derive(Clone, Debug)]
struct Account {
    name: String,
    nbytes: u64,
    granule: u64,
    prefix: u64,
    class: WeightClass,
    /// Sorted, disjoint, not touching.
    arrived: Vec<(u64, u64)>,
}

impl UploadLedger {
    /// An empty ledger for a plan.
    pub fn new(plan: &LoadPlan) -> Self {
        Self {
            weights: plan.weights.iter().map(Account::new).collect(),
        }
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
            return Err(Error::invalid(
                format!("class of weight `{}` for this upload", account.name),
                format!("one of {classes:?}"),
                format!("{:?}", account.class),
            ));
        }
        account.record(offset, len)
    }

    /// Demands that everything has arrived.
    ///
    /// # Errors
    /// [`Error::Incomplete`] with the first range of the first weight that is missing.
    pub fn check_complete(&self) -> Result<()> {
        self.weights.iter().try_for_each(Account::check_complete)
    }
}

impl Account {
    fn new(weight: &WeightPlan) -> Self {
        Self {
            name: weight.name.clone(),
            nbytes: weight.nbytes,
            granule: weight.granule(),
            // A prefixed encoding has one-byte blocks, so that its prefix needs no alignment of its own.
            prefix: weight.encoding.matrix_prefix_bytes(),
            class: weight.class,
            arrived: Vec::new(),
        }
    }

    fn refuse(&self, start: u64, end: u64, reason: impl Into<String>) -> Error {
        Error::InvalidChunk {
            weight: self.name.clone(),
            start,
            end,
            reason: reason.into(),
        }
    }

    fn record(&mut self, start: u64, len: u64) -> Result<()> {
        let end = start
            .checked_add(len)
            .ok_or_else(|| self.refuse(start, u64::MAX, "it ends past 2^64"))?;
        if len == 0 {
            return Err(self.refuse(start, end, "it is empty"));
        }
        if end > self.nbytes {
            return Err(self.refuse(start, end, format!("the weight has {} bytes", self.nbytes)));
        }
        debug_assert!(self.prefix == 0 || self.granule == 1);
        if !start.is_multiple_of(self.granule) || !end.is_multiple_of(self.granule) {
            return Err(self.refuse(start, end, format!("it splits a block of {} bytes", self.granule)));
        }
        let next = self.arrived.partition_point(|&(s, _)| s < start);
        if let Some(&(s, e)) = self.arrived.get(next).filter(|&&(s, _)| s < end) {
            return Err(self.refuse(start, end, format!("bytes {s}..{e} have arrived already")));
        }
        let before = next.checked_sub(1).map(|i| self.arrived[i]);
        if let Some((s, e)) = before.filter(|&(_, e)| e > start) {
            return Err(self.refuse(start, end, format!("bytes {s}..{e} have arrived already")));
        }
        let joins_before = before.is_some_and(|(_, e)| e == start);
        let joins_next = self.arrived.get(next).is_some_and(|&(s, _)| s == end);
        match (joins_before, joins_next) {
            (true, true) => {
                self.arrived[next - 1].1 = self.arrived[next].1;
                self.arrived.remove(next);
            }
            (true, false) => self.arrived[next - 1].1 = end,
            (false, true) => self.arrived[next].0 = start,
            (false, false) => self.arrived.insert(next, (start, end)),
        }
        Ok(())
    }

    fn check_complete(&self) -> Result<()> {
        let (start, end) = match self.arrived.as_slice() {
            _ if self.nbytes == 0 => return Ok(()),
            [] => (0, self.nbytes),
            [(0, e), ..] if *e == self.nbytes => return Ok(()),
            [(0, e), (next, _), ..] => (*e, *next),
            [(0, e)] => (*e, self.nbytes),
            [(s, _), ..] => (0, *s),
        };
        Err(Error::Incomplete {
            weight: self.name.clone(),
            start,
            end,
            nbytes: self.nbytes,
        })
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

    fn account(nbytes: u64, granule: u64) -> Account {
        Account {
            name: "w".into(),
            nbytes,
            granule,
            prefix: 0,
            class: WeightClass::Quantized,
            arrived: vec![],
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
                assert!(a.check_complete().is_err());
                let (start, len) = left.remove(o % n);
                o /= n;
                a.record(start, len).unwrap();
            }
            a.check_complete().unwrap();
            assert_eq!(a.arrived, [(0, 90)]);
        }
    }

    #[test]
    fn overlap_misalignment_and_excess_are_refused_and_change_nothing() {
        let mut a = account(90, 18);
        a.record(18, 36).unwrap();
        let before = a.arrived.clone();
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
            assert_eq!(a.arrived, before);
        }
        a.record(0, 18).unwrap();
    }

    #[test]
    fn the_first_missing_range_is_named() {
        let mut a = account(90, 18);
        a.record(0, 18).unwrap();
        a.record(54, 18).unwrap();
        match a.check_complete().unwrap_err() {
            Error::Incomplete {
                start, end, nbytes, ..
            } => assert_eq!((start, end, nbytes), (18, 54, 90)),
            other => panic!("{other}"),
        }
    }
}
