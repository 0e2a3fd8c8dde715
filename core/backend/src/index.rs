use crate::{Error, Result, Role, WeightId};

/// What stands at a (layer, role) of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// A weight of its own.
    Present(WeightId),
    /// A weight that stands at another entry too, such as an output matrix tied to the token embedding.
    Tied(WeightId),
    /// Optional for this architecture, and not in this file. A *required* weight that is missing has no slot: such a
    /// file gets no plan.
    Absent,
}

impl Slot {
    /// The weight, if there is one.
    pub fn weight(self) -> Option<WeightId> {
        match self {
            Slot::Present(id) | Slot::Tied(id) => Some(id),
            Slot::Absent => None,
        }
    }
}

/// One entry of an [`IndexLayout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// Layer, or `None` for weights of the whole model.
    pub layer: Option<u32>,
    /// Role.
    pub role: Role,
    /// What stands there.
    pub slot: Slot,
}

/// The table to build: every (layer, role) that the architecture knows, once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexLayout {
    /// Number of layers.
    pub layers: u32,
    /// Entries; each (layer, role) at most once.
    pub entries: Vec<IndexEntry>,
}

impl IndexLayout {
    /// Entries that hold a weight, tied ones included.
    pub fn present(&self) -> usize {
        self.entries.iter().filter(|e| e.slot.weight().is_some()).count()
    }
}

/// What a backend built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IndexReceipt {
    /// Number of layers.
    pub layers: u32,
    /// Entries that hold a weight.
    pub entries: u32,
    /// Bytes of the table on the device.
    pub bytes: u64,
}

/// The host's table over (layer, role): a dense array, so that a look-up is one multiplication and one load.
#[derive(Clone, Debug)]
pub struct WeightIndex {
    layers: u32,
    entries: u32,
    /// Row 0: the whole model; row `1 + l`: layer `l`. `None`: not in the layout.
    slots: Box<[[Option<Slot>; Role::COUNT]]>,
}

impl WeightIndex {
    /// Builds and validates the table.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a layer out of range, an entry given twice, or a weight the plan does not have.
    pub fn new(layout: &IndexLayout, weights: usize) -> Result<Self> {
        // A layout has at least one entry a layer, so the table is bounded by what is already in memory.
        if layout.layers as usize > layout.entries.len() {
            return Err(Error::invalid(
                "index layers",
                format!("at most {} entries", layout.entries.len()),
                layout.layers,
            ));
        }
        let mut slots = vec![[None; Role::COUNT]; layout.layers as usize + 1].into_boxed_slice();
        for entry in &layout.entries {
            if let Some(layer) = entry.layer.filter(|l| *l >= layout.layers) {
                return Err(Error::invalid(
                    format!("layer of {}", entry.role),
                    format!("below {}", layout.layers),
                    layer,
                ));
            }
            if let Some(weight) = entry.slot.weight().filter(|w| w.index() >= weights) {
                return Err(Error::UnknownWeight { weight, weights });
            }
            let slot = &mut slots[Self::row(entry.layer)][entry.role.index()];
            if slot.is_some() {
                return Err(Error::invalid(
                    format!("index entry {} of layer {:?}", entry.role, entry.layer),
                    "one",
                    "two",
                ));
            }
            *slot = Some(entry.slot);
        }
        let entries = u32::try_from(layout.present())
            .map_err(|_| Error::invalid("index entries", "below 2^32", layout.present()))?;
        Ok(Self {
            layers: layout.layers,
            entries,
            slots,
        })
    }

    fn row(layer: Option<u32>) -> usize {
        layer.map_or(0, |l| l as usize + 1)
    }

    /// What stands at (layer, role); `None` if the layout has no such entry.
    pub fn slot(&self, layer: Option<u32>, role: Role) -> Option<Slot> {
        self.slots.get(Self::row(layer))?[role.index()]
    }

    /// The weight at (layer, role), if there is one.
    pub fn lookup(&self, layer: Option<u32>, role: Role) -> Option<WeightId> {
        self.slot(layer, role)?.weight()
    }

    /// Number of layers.
    pub fn layers(&self) -> u32 {
        self.layers
    }

    /// Entries that hold a weight, tied ones included.
    pub fn entries(&self) -> u32 {
        self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(layer: Option<u32>, role: Role, slot: Slot) -> IndexEntry {
        IndexEntry { layer, role, slot }
    }

    fn layout() -> IndexLayout {
        IndexLayout {
            layers: 1,
            entries: vec![
                entry(None, Role::TokenEmbd, Slot::Present(WeightId(0))),
                entry(None, Role::Output, Slot::Tied(WeightId(0))),
                entry(Some(0), Role::AttnQ, Slot::Present(WeightId(1))),
                entry(Some(0), Role::AttnQBias, Slot::Absent),
            ],
        }
    }

    #[test]
    fn absent_and_unknown_are_told_apart() {
        let index = WeightIndex::new(&layout(), 2).unwrap();
        assert_eq!(index.slot(Some(0), Role::AttnQBias), Some(Slot::Absent));
        assert_eq!(index.slot(Some(0), Role::FfnUp), None);
        assert_eq!(index.slot(Some(1), Role::AttnQ), None);
        assert_eq!(index.slot(Some(u32::MAX), Role::AttnQ), None);
        assert_eq!(index.lookup(None, Role::Output), Some(WeightId(0)));
        assert_eq!((index.layers(), index.entries()), (1, 3));
    }

    #[test]
    fn an_entry_given_twice_or_out_of_range_is_refused() {
        let mut twice = layout();
        twice.entries.push(twice.entries[0]);
        assert!(WeightIndex::new(&twice, 2).is_err());
        assert!(WeightIndex::new(&layout(), 1).is_err());
        let mut outside = layout();
        outside.entries[2].layer = Some(1);
        assert!(WeightIndex::new(&outside, 2).is_err());
        assert!(WeightIndex::new(&layout(), 2).is_ok());
    }
}
