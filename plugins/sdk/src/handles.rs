//! Handles: numbers that say what they are, and that go stale.

use std::sync::{Arc, PoisonError, RwLock};

use hoist_plugin_abi::{Handle, Status};

/// What a handle stands for. In its top byte, so that a handle of one kind is never taken for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Device = 1,
    Load = 2,
    Model = 3,
}

/// A decoded handle: kind (8 bits), generation (32), index of the device (24).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) generation: u32,
    pub(crate) index: u32,
}

const MAX_INDEX: u32 = (1 << 24) - 1;

pub(crate) fn encode(kind: Kind, parts: Parts) -> Handle {
    (kind as u64) << 56 | u64::from(parts.generation) << 24 | u64::from(parts.index & MAX_INDEX)
}

pub(crate) fn decode(handle: Handle, kind: Kind) -> Result<Parts, Status> {
    if handle >> 56 != kind as u64 {
        return Err(Status::BAD_HANDLE);
    }
    Ok(Parts {
        generation: (handle >> 24 & 0xFFFF_FFFF) as u32,
        index: (handle & u64::from(MAX_INDEX)) as u32,
    })
}

/// Open devices. A slot is used again with a new generation, so that old handles stay stale.
pub(crate) struct Table<T> {
    slots: RwLock<Vec<(u32, Option<Arc<T>>)>>,
}

impl<T> Table<T> {
    pub(crate) const fn new() -> Self {
        Self {
            slots: RwLock::new(Vec::new()),
        }
    }

    pub(crate) fn insert(&self, make: impl FnOnce(Parts) -> T) -> Result<Parts, Status> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let index = match slots.iter().position(|(_, slot)| slot.is_none()) {
            Some(index) => index,
            None if slots.len() >= MAX_INDEX as usize => return Err(Status::OUT_OF_HOST_MEMORY),
            None => {
                slots.push((0, None));
                slots.len() - 1
            }
        };
        let (generation, slot) = &mut slots[index];
        *generation = generation.wrapping_add(1);
        let parts = Parts {
            generation: *generation,
            index: index as u32,
        };
        *slot = Some(Arc::new(make(parts)));
        Ok(parts)
    }

    pub(crate) fn find(&self, parts: Parts) -> Result<Arc<T>, Status> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        match slots.get(parts.index as usize) {
            Some((generation, Some(item))) if *generation == parts.generation => Ok(item.clone()),
            _ => Err(Status::BAD_HANDLE),
        }
    }

    /// The item of that index if its generation ends in these 16 bits: how handles of loads and models name their device.
    pub(crate) fn find_by_low_generation(&self, index: u32, low: u32) -> Result<Arc<T>, Status> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        match slots.get(index as usize) {
            Some((generation, Some(item))) if *generation & 0xFFFF == low => Ok(item.clone()),
            _ => Err(Status::BAD_HANDLE),
        }
    }

    pub(crate) fn remove(&self, parts: Parts) -> Result<Arc<T>, Status> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        match slots.get_mut(parts.index as usize) {
            Some((generation, slot)) if *generation == parts.generation => {
                slot.take().ok_or(Status::BAD_HANDLE)
            }
            _ => Err(Status::BAD_HANDLE),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.slots
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .all(|(_, slot)| slot.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_is_only_what_it_was_made_for() {
        let table = Table::new();
        let parts = table.insert(|_| 7).unwrap();
        let handle = encode(Kind::Device, parts);
        assert_eq!(decode(handle, Kind::Device), Ok(parts));
        assert_eq!(decode(handle, Kind::Load), Err(Status::BAD_HANDLE));
        assert_eq!(decode(0, Kind::Device), Err(Status::BAD_HANDLE));
        assert_eq!(*table.find(parts).unwrap(), 7);
        table.remove(parts).unwrap();
        assert_eq!(table.find(parts).unwrap_err(), Status::BAD_HANDLE);
        let again = table.insert(|_| 8).unwrap();
        assert_eq!(again.index, parts.index);
        assert_eq!(table.find(parts).unwrap_err(), Status::BAD_HANDLE);
        assert_eq!(table.remove(parts).unwrap_err(), Status::BAD_HANDLE);
        assert!(!table.is_empty());
    }
}
