//! Where the time of a step goes.

use std::time::Duration;

/// A part of a step, as the device ran it.
#[derive(Clone, Debug, PartialEq)]
pub struct PhaseTime {
    /// What ran: an operation, or several that ran as one; the same in every layer.
    pub name: String,
    /// The layer, or `None` outside of layers.
    pub layer: Option<u32>,
    /// Time on the device.
    pub time: Duration,
    /// Canonical bytes of the weights that it read.
    pub weight_bytes: u64,
}
