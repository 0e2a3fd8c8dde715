use crate::WeightClass;

/// Bytes by what they hold. Padding counts with what it pads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryByClass {
    /// Quantised matrices and what is kept beside them (row exponents, repacking).
    pub quantized: u64,
    /// F32, F16 and BF16 matrices.
    pub float: u64,
    /// Norm vectors.
    pub gamma: u64,
    /// Biases.
    pub bias: u64,
    /// The indexed table.
    pub index: u64,
    /// Keys and values of all sequences.
    pub kv: u64,
    /// Activations, tables and scratch.
    pub workspace: u64,
}

impl MemoryByClass {
    /// Bytes of all classes.
    ///
    /// Saturates: sums of sizes that each passed a budget check cannot overflow, but reports must not panic.
    pub fn total(&self) -> u64 {
        [
            self.quantized,
            self.float,
            self.gamma,
            self.bias,
            self.index,
            self.kv,
            self.workspace,
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }

    /// Bytes of the four weight classes.
    pub fn weights(&self) -> u64 {
        [self.quantized, self.float, self.gamma, self.bias]
            .into_iter()
            .fold(0, u64::saturating_add)
    }

    /// The counter of a weight class.
    pub fn class_mut(&mut self, class: WeightClass) -> &mut u64 {
        match class {
            WeightClass::Quantized => &mut self.quantized,
            WeightClass::Float => &mut self.float,
            WeightClass::Gamma => &mut self.gamma,
            WeightClass::Bias => &mut self.bias,
        }
    }
}

/// Memory of one device, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// The device's name, such as `cuda:0`.
    pub device: String,
    /// All memory of the device.
    pub total: u64,
    /// What is free now.
    pub free: u64,
    /// What this backend may use, if limited by [`crate::OpenOptions::memory_budget`].
    pub budget: Option<u64>,
    /// What this backend owns, by class.
    pub resident: MemoryByClass,
    /// Weight bytes that are mapped from files rather than owned; not in `resident`.
    pub mapped: u64,
}

/// Memory of every device of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// One entry a device, in rank order; never empty.
    pub devices: Vec<DeviceMemory>,
}
