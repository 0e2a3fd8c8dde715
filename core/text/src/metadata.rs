//! Typed look-ups in a GGUF file's metadata. A key of the wrong type is an error, never taken for an absent one.

use std::collections::BTreeMap;

use hoist_formats::{MetaArray, MetaValue};

use crate::{Error, Result};

pub(crate) type Gguf = BTreeMap<String, MetaValue>;

pub(crate) fn string<'m>(map: &'m Gguf, key: &'static str) -> Result<Option<&'m str>> {
    match map.get(key) {
        None => Ok(None),
        Some(MetaValue::String(s)) => Ok(Some(s)),
        Some(other) => Err(wrong(key, "a string", other)),
    }
}

pub(crate) fn flag(map: &Gguf, key: &'static str) -> Result<Option<bool>> {
    match map.get(key) {
        None => Ok(None),
        Some(MetaValue::Bool(b)) => Ok(Some(*b)),
        Some(other) => Err(wrong(key, "a boolean", other)),
    }
}

/// A token's id: any integer type, checked against the vocabulary.
pub(crate) fn token(map: &Gguf, key: &'static str, vocab: u32) -> Result<Option<u32>> {
    let Some(value) = map.get(key) else {
        return Ok(None);
    };
    let id = match *value {
        MetaValue::U8(v) => Ok(u64::from(v)),
        MetaValue::U16(v) => Ok(u64::from(v)),
        MetaValue::U32(v) => Ok(u64::from(v)),
        MetaValue::U64(v) => Ok(v),
        MetaValue::I8(v) => u64::try_from(v),
        MetaValue::I16(v) => u64::try_from(v),
        MetaValue::I32(v) => u64::try_from(v),
        MetaValue::I64(v) => u64::try_from(v),
        _ => return Err(wrong(key, "an integer", value)),
    };
    // Converters write -1 (or its unsigned image) for a special token that the model does not have.
    let Ok(id) = id else { return Ok(None) };
    if id == u64::from(u32::MAX) {
        return Ok(None);
    }
    match u32::try_from(id) {
        Ok(id) if id < vocab => Ok(Some(id)),
        _ => Err(Error::SpecialOutOfRange { key, id, vocab }),
    }
}

pub(crate) fn strings<'m>(map: &'m Gguf, key: &'static str) -> Result<Option<&'m [String]>> {
    match map.get(key) {
        None => Ok(None),
        Some(MetaValue::Array(MetaArray::String(v))) => Ok(Some(v)),
        Some(other) => Err(wrong(key, "an array of strings", other)),
    }
}

pub(crate) fn floats<'m>(map: &'m Gguf, key: &'static str) -> Result<Option<&'m [f32]>> {
    match map.get(key) {
        None => Ok(None),
        Some(MetaValue::Array(MetaArray::F32(v))) => Ok(Some(v)),
        Some(other) => Err(wrong(key, "an array of 32-bit floats", other)),
    }
}

/// Token types: 32-bit integers, of either sign in the files that exist.
pub(crate) fn integers(map: &Gguf, key: &'static str) -> Result<Option<Vec<i64>>> {
    match map.get(key) {
        None => Ok(None),
        Some(MetaValue::Array(MetaArray::I32(v))) => Ok(Some(v.iter().map(|&x| i64::from(x)).collect())),
        Some(MetaValue::Array(MetaArray::U32(v))) => Ok(Some(v.iter().map(|&x| i64::from(x)).collect())),
        Some(other) => Err(wrong(key, "an array of 32-bit integers", other)),
    }
}

fn wrong(key: &'static str, expected: &'static str, found: &MetaValue) -> Error {
    let found = match found {
        MetaValue::U8(_)
        | MetaValue::I8(_)
        | MetaValue::U16(_)
        | MetaValue::I16(_)
        | MetaValue::U32(_)
        | MetaValue::I32(_)
        | MetaValue::U64(_)
        | MetaValue::I64(_) => "an integer",
        MetaValue::F32(_) | MetaValue::F64(_) => "a float",
        MetaValue::Bool(_) => "a boolean",
        MetaValue::String(_) => "a string",
        MetaValue::Array(array) => match array {
            MetaArray::String(_) => "an array of strings",
            MetaArray::F32(_) | MetaArray::F64(_) => "an array of floats",
            MetaArray::Bool(_) => "an array of booleans",
            _ => "an array of integers",
        },
    };
    Error::WrongType { key, expected, found }
}
