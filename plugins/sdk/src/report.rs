//! Errors of the contract as statuses and records.

use hoist_backend::{Error, LoadPlan};
use hoist_plugin_abi::{ErrorRecord, NO_OFFSET, NO_TENSOR, Status};

/// What a call of the interface failed with.
#[derive(Debug)]
pub(crate) struct Problem {
    pub(crate) status: Status,
    pub(crate) message: String,
    pub(crate) tensor: u32,
    pub(crate) byte_offset: u64,
    pub(crate) native_code: i64,
    pub(crate) needed: u64,
    pub(crate) available: u64,
}

impl Problem {
    pub(crate) fn new(status: Status, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            tensor: NO_TENSOR,
            byte_offset: NO_OFFSET,
            native_code: 0,
            needed: 0,
            available: 0,
        }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Status::INVALID_ARGUMENT, message)
    }

    /// An error of the backend; `plan` finds the tensor of a name.
    pub(crate) fn of(error: &Error, plan: Option<&LoadPlan>) -> Self {
        let tensor = |name: &str| {
            plan.and_then(|p| p.weights.iter().find(|w| w.name == name))
                .map_or(NO_TENSOR, |w| w.id.0)
        };
        let mut problem = Self::new(status(error), error.to_string());
        match error {
            Error::OutOfMemory {
                needed, available, ..
            } => {
                (problem.needed, problem.available) = (*needed, *available);
            }
            Error::NonFiniteWeight { weight, offset } => {
                (problem.tensor, problem.byte_offset) = (tensor(weight), *offset);
            }
            Error::Incomplete { weight, start, .. } | Error::InvalidChunk { weight, start, .. } => {
                (problem.tensor, problem.byte_offset) = (tensor(weight), *start);
            }
            // The operation's number, and above it its layer plus one.
            Error::NonFinite { op, layer } => {
                problem.native_code = i64::from(op.id()) | layer.map_or(0, |l| (i64::from(l) + 1) << 32);
            }
            _ => {}
        }
        problem
    }

    /// Fills the caller's record, as far as it is there.
    ///
    /// # Safety
    /// `record` is NULL, or valid for the bytes its `struct_size` says.
    pub(crate) unsafe fn write(&self, record: *mut ErrorRecord) {
        if record.is_null() || !record.is_aligned() {
            return;
        }
        // SAFETY: a record begins with its size.
        let size = unsafe { record.cast::<u32>().read() } as usize;
        let mut own = ErrorRecord {
            struct_size: size as u32,
            code: self.status.0,
            native_code: self.native_code,
            flags: 0,
            tensor: self.tensor,
            byte_offset: self.byte_offset,
            needed: self.needed,
            available: self.available,
            message: [0; 256],
        };
        let mut end = self.message.len().min(own.message.len() - 1);
        while !self.message.is_char_boundary(end) {
            end -= 1;
        }
        own.message[..end].copy_from_slice(&self.message.as_bytes()[..end]);
        // SAFETY: writes no more than the caller's size, from a record of ours that holds as much.
        unsafe {
            std::ptr::copy_nonoverlapping(
                (&raw const own).cast::<u8>(),
                record.cast::<u8>(),
                size.min(size_of::<ErrorRecord>()),
            );
        }
    }
}

fn status(error: &Error) -> Status {
    match error {
        Error::Unavailable { .. } => Status::UNSUPPORTED,
        Error::OutOfMemory { .. } => Status::OUT_OF_DEVICE_MEMORY,
        Error::DeviceLost { .. } => Status::DEVICE_LOST,
        Error::SourceIo { .. } | Error::SourceChanged { .. } => Status::IO,
        Error::NonFiniteWeight { .. } | Error::NonFinite { .. } => Status::NON_FINITE,
        Error::BadState { .. } => Status::BAD_STATE,
        Error::InvalidArgument { .. }
        | Error::InvalidChunk { .. }
        | Error::Incomplete { .. }
        | Error::UnknownWeight { .. } => Status::INVALID_ARGUMENT,
        Error::TokenOutOfRange { .. } => Status::TOKEN_OUT_OF_RANGE,
        Error::ContextExceeded { .. } => Status::CONTEXT_EXCEEDED,
        Error::Cancelled => Status::CANCELLED,
        Error::Unsupported { .. } => Status::UNSUPPORTED,
        _ => Status::INTERNAL,
    }
}
