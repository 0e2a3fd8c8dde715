use hoist_backend::Encoding;
use serde_json::{Map, Value, json};

use super::{Layout, Tensor, place};
use crate::{Error, Result};

/// Builds a SafeTensors file: tensors in the order they are given, without holes.
#[derive(Clone, Debug, Default)]
pub struct SafeTensorsBuilder {
    metadata: Map<String, Value>,
    tensors: Vec<Tensor>,
}

impl SafeTensorsBuilder {
    /// A file without tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a text to `__metadata__`, such as `format` = `pt`, or replaces the one of that key.
    #[must_use]
    pub fn meta(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(key.into(), Value::String(value.into()));
        self
    }

    /// Adds a tensor; `shape` has the slowest dimension first.
    #[must_use]
    pub fn tensor(mut self, name: impl Into<String>, encoding: Encoding, shape: impl Into<Vec<u64>>) -> Self {
        self.tensors.push(Tensor {
            name: name.into(),
            encoding,
            shape: shape.into(),
        });
        self
    }

    /// The header and the place of every tensor.
    ///
    /// # Errors
    /// [`Error::CannotWrite`] for an encoding that SafeTensors does not have; the shape errors of reading.
    pub fn layout(&self) -> Result<Layout> {
        /// The header is padded so that data starts at a multiple of it.
        const ALIGNMENT: usize = 8;
        let (relative, _) = place(&self.tensors, 0, 1)?;
        let mut object = Map::new();
        if !self.metadata.is_empty() {
            object.insert("__metadata__".into(), Value::Object(self.metadata.clone()));
        }
        for slot in &relative {
            let dtype = dtype_of(slot.encoding).ok_or_else(|| Error::CannotWrite {
                what: format!("the encoding of tensor `{}`", slot.name),
                expected: "one that SafeTensors has".into(),
                found: slot.encoding.to_string(),
            })?;
            let end = slot.offset + slot.nbytes;
            object.insert(
                slot.name.clone(),
                json!({"dtype": dtype, "shape": slot.shape, "data_offsets": [slot.offset, end]}),
            );
        }
        let mut text = Value::Object(object).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(ALIGNMENT), b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        let (slots, file_len) = place(&self.tensors, header.len() as u64, 1)?;
        Ok(Layout {
            header,
            slots,
            file_len,
        })
    }
}

fn dtype_of(encoding: Encoding) -> Option<&'static str> {
    Some(match encoding {
        Encoding::F32 => "F32",
        Encoding::F16 => "F16",
        Encoding::BF16 => "BF16",
        Encoding::F64 => "F64",
        Encoding::I8 => "I8",
        Encoding::I16 => "I16",
        Encoding::I32 => "I32",
        Encoding::I64 => "I64",
        Encoding::U8 => "U8",
        Encoding::U16 => "U16",
        Encoding::U32 => "U32",
        Encoding::U64 => "U64",
        Encoding::Bool => "BOOL",
        _ => return None,
    })
}
