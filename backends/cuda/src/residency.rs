//! Where each weight lies on the device: the layout of the arena, and the table of what lies in it.

use std::sync::Arc;

use hoist_backend::{
    Encoding, Error, FloatLayout, LoadPlan, MemoryByClass, Result, Shape, Sizing, UploadLedger, ValueChange,
    WeightClass, WeightId, WeightPlan, check_read_back,
};

use crate::driver::{Context, DeviceBuffer};

/// Every weight starts at a multiple of this: the widest bulk copy's alignment, and the driver's own.
pub(crate) const ALIGNMENT: u64 = 256;
/// Bytes of a row exponent, an i16.
pub(crate) const EXPONENT_BYTES: u64 = 2;
/// Bytes of an entry of the device's index: [`crate::backend::IndexRow`].
pub(crate) const INDEX_ENTRY_BYTES: u64 = 64;

/// How a plan computes exact sizes for this backend.
pub(crate) const SIZING: Sizing = Sizing {
    weight_alignment: ALIGNMENT,
    quantized_row_bytes: EXPONENT_BYTES,
    quantized_segment_bytes: 0,
    index_entry_bytes: INDEX_ENTRY_BYTES,
};

/// One weight; its name stands in [`Residency`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Resident {
    pub(crate) class: WeightClass,
    pub(crate) encoding: Encoding,
    pub(crate) shape: Shape,
    pub(crate) layout: FloatLayout,
    /// Device address; a multiple of [`ALIGNMENT`].
    pub(crate) ptr: u64,
    /// Canonical bytes, which are as many as lie there.
    pub(crate) nbytes: u64,
    /// Device address of `E_w` of each row of all matrices, i16; 0 unless it is quantised.
    pub(crate) exponents: u64,
}

impl Resident {
    /// Canonical bytes of a row; without the prefix of its matrix.
    pub(crate) fn row_bytes(&self) -> u64 {
        self.shape.cols / self.encoding.block_weights() * self.encoding.block_bytes()
    }

    /// Canonical bytes of one matrix, prefix included.
    pub(crate) fn matrix_bytes(&self) -> u64 {
        self.nbytes / self.shape.matrices
    }

    /// Rows of all matrices.
    pub(crate) fn rows(&self) -> u64 {
        self.shape.matrices * self.shape.rows
    }

    /// Demands a range of canonical bytes that is within the weight and splits no block.
    pub(crate) fn check_range(&self, name: &str, offset: u64, len: u64) -> Result<()> {
        check_read_back(name, self.nbytes, self.encoding.block_bytes(), offset, len)
    }
}

/// The names of all weights, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Names {
    text: String,
    ends: Vec<usize>,
}

impl Names {
    fn fill(&mut self, plan: &LoadPlan) {
        self.text.clear();
        self.text.reserve(plan.weights.iter().map(|w| w.name.len()).sum());
        self.ends.clear();
        self.ends.extend(plan.weights.iter().map(|weight| {
            self.text.push_str(&weight.name);
            self.text.len()
        }));
    }

    /// The name of the weight at a place; empty if there is none.
    pub(crate) fn at(&self, place: usize) -> &str {
        let Some(end) = self.ends.get(place) else {
            return "";
        };
        let start = place.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.text[start..*end]
    }
}

/// Weights for which memory is touched ahead.
pub(crate) const TOUCHED_WEIGHTS: usize = 32 << 10;
/// Weights whose names are worth a thread.
const MANY_WEIGHTS: usize = 4096;
/// Bytes of a name there.
const TOUCHED_NAME_BYTES: usize = 48;

/// Memory of the host for what is known of each weight. Touching it for the first time is most of what tens of thousands of
/// weights cost before anything is read, so that it is touched while the context is made, and kept from load to load.
#[derive(Debug, Default)]
pub(crate) struct Books {
    weights: Vec<Resident>,
    names: Names,
}

impl Books {
    /// Memory that has been touched.
    pub(crate) fn touched() -> Self {
        let nothing = Resident {
            class: WeightClass::Float,
            encoding: Encoding::F32,
            shape: Shape::vector(0),
            layout: FloatLayout::OutIn,
            ptr: 0,
            nbytes: 0,
            exponents: 0,
        };
        let mut books = Self {
            weights: vec![nothing; TOUCHED_WEIGHTS],
            names: Names {
                text: " ".repeat(TOUCHED_WEIGHTS * TOUCHED_NAME_BYTES),
                ends: vec![1; TOUCHED_WEIGHTS],
            },
        };
        books.weights.clear();
        books
    }
}

/// All weights of a model, and the memory they lie in.
#[derive(Debug)]
pub(crate) struct Residency {
    /// Shared with reader threads, which make their tables of it.
    pub(crate) weights: Arc<Vec<Resident>>,
    pub(crate) names: Names,
    /// Shared with reader threads, so that none writes to memory that was given back.
    pub(crate) arena: Arc<DeviceBuffer>,
    /// Bytes by class, padding included.
    pub(crate) by_class: MemoryByClass,
}

/// Checks what this backend relies on; the caller has validated the model.
fn check(plan: &WeightPlan, place: usize) -> Result<()> {
    plan.check(crate::NAME, place)?;
    let name = &plan.name;
    let widened = plan.change != ValueChange::Keep;
    if widened && plan.encoding != Encoding::F32 {
        return Err(Error::invalid(
            format!("encoding of `{name}`, whose values are widened"),
            Encoding::F32,
            plan.encoding,
        ));
    }
    if plan.layout == FloatLayout::InOut && plan.class != WeightClass::Float {
        return Err(Error::invalid(
            format!("layout of `{name}`, a {:?} weight", plan.class),
            "[out, in]",
            "[in, out]",
        ));
    }
    Ok(())
}

/// Bytes that a weight takes, as [`SIZING`] tells the planner; `None` past 2^64.
fn resident_bytes(plan: &WeightPlan) -> Option<u64> {
    let exponents = if plan.class == WeightClass::Quantized {
        plan.shape
            .matrices
            .checked_mul(plan.shape.rows)?
            .checked_mul(EXPONENT_BYTES)?
    } else {
        0
    };
    plan.nbytes
        .checked_add(exponents)?
        .checked_next_multiple_of(ALIGNMENT)
}

/// Puts the weights of a plan at offsets of an arena into an empty list; their bytes by class, and the arena's.
fn lay_out(plan: &LoadPlan, weights: &mut Vec<Resident>) -> Result<(MemoryByClass, u64)> {
    let mut end = 0u64;
    let mut by_class = MemoryByClass::default();
    weights.reserve(plan.weights.len());
    for (place, weight) in plan.weights.iter().enumerate() {
        check(weight, place)?;
        let too_large = || {
            Error::invalid(
                format!("size of `{}`", weight.name),
                "an arena below 2^64 bytes",
                weight.nbytes,
            )
        };
        let bytes = resident_bytes(weight).ok_or_else(too_large)?;
        let start = end;
        end = start.checked_add(bytes).ok_or_else(too_large)?;
        *by_class.class_mut(weight.class) += bytes;
        let exponents = if weight.class == WeightClass::Quantized {
            // At the very end of the weight's place, which ends at a multiple of the alignment.
            end - weight.shape.matrices * weight.shape.rows * EXPONENT_BYTES
        } else {
            0
        };
        weights.push(Resident {
            class: weight.class,
            encoding: weight.encoding,
            shape: weight.shape,
            layout: weight.layout,
            ptr: start,
            nbytes: weight.nbytes,
            exponents,
        });
    }
    Ok((by_class, end))
}

impl Residency {
    /// Takes an arena for a plan, after `admit` has agreed to its size; keeps books in memory that is there.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`], [`Error::Unsupported`] for weights it cannot hold; [`Error::OutOfMemory`].
    pub(crate) fn new(
        context: &Arc<Context>,
        plan: &LoadPlan,
        books: Books,
        admit: impl FnOnce(u64) -> Result<()>,
    ) -> Result<Self> {
        let Books {
            mut weights,
            mut names,
        } = books;
        weights.clear();
        names.ends.clear();
        let (by_class, arena) = std::thread::scope(|scope| {
            if plan.weights.len() >= MANY_WEIGHTS {
                // Beside what follows, which takes longer than to start a thread. One that cannot be started is made up for.
                let _ = std::thread::Builder::new().spawn_scoped(scope, || names.fill(plan));
            }
            let (by_class, nbytes) = lay_out(plan, &mut weights)?;
            admit(nbytes)?;
            DeviceBuffer::new(context, "the arena of weights", nbytes).map(|arena| (by_class, arena))
        })?;
        if names.ends.len() != plan.weights.len() {
            names.fill(plan);
        }
        for weight in &mut weights {
            weight.ptr += arena.ptr();
            if weight.class == WeightClass::Quantized {
                weight.exponents += arena.ptr();
            }
        }
        Ok(Self {
            weights: Arc::new(weights),
            names,
            arena: Arc::new(arena),
            by_class,
        })
    }

    /// Gives the arena back; the books' memory, unless a thread still reads them.
    pub(crate) fn into_books(self) -> Option<Books> {
        Some(Books {
            weights: Arc::into_inner(self.weights)?,
            names: self.names,
        })
    }

    /// The weight of that id.
    pub(crate) fn weight(&self, id: WeightId) -> Result<&Resident> {
        self.weights.get(id.index()).ok_or(Error::UnknownWeight {
            weight: id,
            weights: self.weights.len(),
        })
    }

    /// An empty ledger for its weights.
    pub(crate) fn ledger(&self) -> UploadLedger {
        let weights = self.weights.iter().enumerate();
        UploadLedger::of(weights.map(|(place, w)| (self.names.at(place), w.class, w.encoding, w.nbytes)))
    }

    /// Demands that `plan` is the one that was laid out.
    pub(crate) fn check_is(&self, plan: &LoadPlan) -> Result<()> {
        let same = plan.weights.len() == self.weights.len()
            && plan
                .weights
                .iter()
                .zip(self.weights.iter())
                .enumerate()
                .all(|(i, (p, w))| {
                    p.id.index() == i
                        && p.encoding == w.encoding
                        && p.shape == w.shape
                        && p.class == w.class
                        && p.layout == w.layout
                        && p.nbytes == w.nbytes
                });
        if same {
            Ok(())
        } else {
            Err(Error::invalid(
                "plan of load_from",
                "the plan that begin_load saw",
                "another",
            ))
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use hoist_backend::{Role, SourceView};

    use super::*;

    /// A weight whose bytes are one run of a file.
    pub(crate) fn planned(id: u32, encoding: Encoding, shape: Shape, offset: u64) -> WeightPlan {
        let nbytes = encoding.nbytes(shape).unwrap();
        let mut plan = WeightPlan {
            id: WeightId(id),
            name: format!("w{id}"),
            layer: None,
            role: Role::TokenEmbd,
            class: WeightClass::of_matrix(encoding),
            encoding,
            shape,
            nbytes,
            views: vec![SourceView::contiguous(0, offset, nbytes)],
            change: ValueChange::Keep,
            layout: FloatLayout::OutIn,
            resident_bytes: 0,
        };
        plan.resident_bytes = resident_bytes(&plan).unwrap();
        plan
    }

    /// A plan of those weights.
    pub(crate) fn plan_of(weights: Vec<WeightPlan>) -> LoadPlan {
        let nbytes = weights.iter().map(|w| w.nbytes).sum();
        LoadPlan {
            architecture: "test".into(),
            layers: 1,
            weights,
            resident: MemoryByClass::default(),
            nbytes,
            source_bytes: nbytes,
        }
    }

    #[test]
    fn weights_are_aligned_disjoint_and_sized_as_planned() {
        let plan = plan_of(vec![
            planned(0, Encoding::Q4_K, Shape::matrix(7, 512), 0),
            planned(
                1,
                Encoding::MXFP4,
                Shape {
                    matrices: 3,
                    rows: 5,
                    cols: 32,
                },
                0,
            ),
            planned(2, Encoding::APR_Q8, Shape::matrix(3, 32), 0),
            planned(3, Encoding::BF16, Shape::matrix(3, 5), 0),
        ]);
        let mut weights = Vec::new();
        let (by_class, end) = lay_out(&plan, &mut weights).unwrap();
        assert_eq!(end, plan.weights.iter().map(|w| w.resident_bytes).sum::<u64>());
        assert_eq!(by_class.weights(), end);
        let mut at = 0;
        for (weight, planned) in weights.iter().zip(&plan.weights) {
            assert_eq!(weight.ptr, at);
            at += planned.resident_bytes;
            if weight.class == WeightClass::Quantized {
                assert!(weight.exponents >= weight.ptr + weight.nbytes);
                assert_eq!(weight.exponents + weight.rows() * EXPONENT_BYTES, at);
                assert_eq!(weight.exponents % EXPONENT_BYTES, 0);
            }
        }
    }

    #[test]
    fn every_weight_keeps_its_name() {
        let mut weights: Vec<_> = (0..4)
            .map(|id| planned(id, Encoding::F32, Shape::vector(1), 0))
            .collect();
        weights[1].name = "größer".into();
        weights[2].name = String::new();
        let mut names = Books::touched().names;
        names.fill(&plan_of(weights.clone()));
        for (place, weight) in weights.iter().enumerate() {
            assert_eq!(names.at(place), weight.name);
        }
        assert_eq!(names.at(4), "");
    }

    #[test]
    fn plans_that_contradict_themselves_are_refused() {
        let good = planned(0, Encoding::F32, Shape::vector(8), 0);
        let fits = |weight| lay_out(&plan_of(vec![weight]), &mut Vec::new()).is_ok();
        assert!(fits(good.clone()));
        let mut wrong = vec![good.clone(); 5];
        wrong[0].nbytes = 31;
        wrong[1].id = WeightId(1);
        wrong[2].class = WeightClass::Quantized;
        wrong[3].encoding = Encoding::Q8_K;
        wrong[4].shape.cols = 0;
        for weight in wrong {
            assert!(!fits(weight.clone()), "{weight:?}");
        }
    }

    #[test]
    fn ranges_that_split_a_block_or_end_late_are_refused() {
        let plan = plan_of(vec![planned(0, Encoding::Q8_0, Shape::matrix(2, 64), 0)]);
        let mut weights = Vec::new();
        lay_out(&plan, &mut weights).unwrap();
        weights[0].check_range("w", 34, 68).unwrap();
        for (offset, len) in [(1, 33), (0, 33), (34, 34 * 4), (u64::MAX, 2)] {
            assert!(
                weights[0].check_range("w", offset, len).is_err(),
                "{offset} {len}"
            );
        }
    }
}
