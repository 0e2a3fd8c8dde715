//! Typed access to metadata.

use serde_json::Value;

use crate::{Error, MetaArray, MetaValue, Metadata, Result};

impl MetaValue {
    /// The value, if it is an integer of any width that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            MetaValue::U8(v) => Some(v.into()),
            MetaValue::U16(v) => Some(v.into()),
            MetaValue::U32(v) => Some(v.into()),
            MetaValue::U64(v) => Some(v),
            MetaValue::I8(v) => v.try_into().ok(),
            MetaValue::I16(v) => v.try_into().ok(),
            MetaValue::I32(v) => v.try_into().ok(),
            MetaValue::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// Type and value (for arrays: type and length), as error messages show them.
    pub fn describe(&self) -> String {
        match self {
            MetaValue::U8(v) => format!("u8 {v}"),
            MetaValue::I8(v) => format!("i8 {v}"),
            MetaValue::U16(v) => format!("u16 {v}"),
            MetaValue::I16(v) => format!("i16 {v}"),
            MetaValue::U32(v) => format!("u32 {v}"),
            MetaValue::I32(v) => format!("i32 {v}"),
            MetaValue::U64(v) => format!("u64 {v}"),
            MetaValue::I64(v) => format!("i64 {v}"),
            MetaValue::F32(v) => format!("f32 {v}"),
            MetaValue::F64(v) => format!("f64 {v}"),
            MetaValue::Bool(v) => format!("bool {v}"),
            MetaValue::String(v) => format!("string {:?}", shorten(v)),
            MetaValue::Array(a) => format!("{} array of {}", a.element_type(), a.len()),
        }
    }
}

impl MetaArray {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            MetaArray::U8(v) => v.len(),
            MetaArray::I8(v) => v.len(),
            MetaArray::U16(v) => v.len(),
            MetaArray::I16(v) => v.len(),
            MetaArray::U32(v) => v.len(),
            MetaArray::I32(v) => v.len(),
            MetaArray::U64(v) => v.len(),
            MetaArray::I64(v) => v.len(),
            MetaArray::F32(v) => v.len(),
            MetaArray::F64(v) => v.len(),
            MetaArray::Bool(v) => v.len(),
            MetaArray::String(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Name of the element type.
    pub fn element_type(&self) -> &'static str {
        match self {
            MetaArray::U8(_) => "u8",
            MetaArray::I8(_) => "i8",
            MetaArray::U16(_) => "u16",
            MetaArray::I16(_) => "i16",
            MetaArray::U32(_) => "u32",
            MetaArray::I32(_) => "i32",
            MetaArray::U64(_) => "u64",
            MetaArray::I64(_) => "i64",
            MetaArray::F32(_) => "f32",
            MetaArray::F64(_) => "f64",
            MetaArray::Bool(_) => "bool",
            MetaArray::String(_) => "string",
        }
    }

    /// The elements as `i64`, if they are integers that fit.
    pub fn to_i64s(&self) -> Option<Vec<i64>> {
        fn widen<T: Copy + TryInto<i64>>(v: &[T]) -> Option<Vec<i64>> {
            v.iter().map(|&x| x.try_into().ok()).collect()
        }
        match self {
            MetaArray::U8(v) => widen(v),
            MetaArray::I8(v) => widen(v),
            MetaArray::U16(v) => widen(v),
            MetaArray::I16(v) => widen(v),
            MetaArray::U32(v) => widen(v),
            MetaArray::I32(v) => widen(v),
            MetaArray::U64(v) => widen(v),
            MetaArray::I64(v) => Some(v.clone()),
            _ => None,
        }
    }
}

macro_rules! from {
    ($($type:ty => $variant:ident),*) => {$(
        impl From<$type> for MetaValue {
            fn from(v: $type) -> Self {
                MetaValue::$variant(v)
            }
        }

        impl From<Vec<$type>> for MetaValue {
            fn from(v: Vec<$type>) -> Self {
                MetaValue::Array(MetaArray::$variant(v))
            }
        }
    )*};
}

from! {
    u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64,
    f32 => F32, f64 => F64, bool => Bool, String => String
}

impl From<&str> for MetaValue {
    fn from(v: &str) -> Self {
        MetaValue::String(v.into())
    }
}

/// A value of either kind of metadata.
enum Found<'a> {
    Gguf(&'a MetaValue),
    Json(&'a Value),
}

impl Found<'_> {
    fn describe(&self) -> String {
        match self {
            Found::Gguf(v) => v.describe(),
            Found::Json(Value::Null) => "null".into(),
            Found::Json(Value::Bool(v)) => format!("bool {v}"),
            Found::Json(Value::Number(v)) => format!("number {v}"),
            Found::Json(Value::String(v)) => format!("string {:?}", shorten(v)),
            Found::Json(Value::Array(v)) => format!("array of {}", v.len()),
            Found::Json(Value::Object(v)) => format!("object of {}", v.len()),
        }
    }
}

/// The start of a text that may be long.
fn shorten(s: &str) -> String {
    const LONGEST: usize = 60;
    match s.char_indices().nth(LONGEST) {
        None => s.into(),
        Some((end, _)) => format!("{}…", &s[..end]),
    }
}

/// Typed access by key, the same for all formats. GGUF keys are flat (`llama.block_count`); JSON keys are those of the
/// top-level object, where `null` counts as absent. An integer of any width and sign that fits is an integer; an integer
/// is not a float in GGUF but is one in JSON, where `1` and `1.0` are one number.
impl Metadata {
    fn find(&self, key: &str) -> Option<Found<'_>> {
        match self {
            Metadata::Gguf(map) => map.get(key).map(Found::Gguf),
            Metadata::HuggingFace(map) | Metadata::Apr(map) => {
                map.get(key).filter(|v| !v.is_null()).map(Found::Json)
            }
        }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&Found<'a>) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(found) = self.find(key) else {
            return Ok(None);
        };
        match convert(&found) {
            Some(value) => Ok(Some(value)),
            None => Err(Error::WrongMetaType {
                key: key.into(),
                expected,
                found: found.describe(),
            }),
        }
    }

    /// Whether the key is there.
    pub fn contains(&self, key: &str) -> bool {
        self.find(key).is_some()
    }

    /// An integer below 2^64.
    ///
    /// # Errors
    /// [`Error::WrongMetaType`] if it is of another type or does not fit.
    pub fn get_u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "an integer from 0 to 2^64 - 1", |found| match found {
            Found::Gguf(v) => v.as_u64(),
            Found::Json(v) => v.as_u64(),
        })
    }

    /// An integer below 2^32.
    ///
    /// # Errors
    /// As [`Metadata::get_u64`].
    pub fn get_u32(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "an integer from 0 to 2^32 - 1", |found| {
            match found {
                Found::Gguf(v) => v.as_u64(),
                Found::Json(v) => v.as_u64(),
            }
            .and_then(|v| v.try_into().ok())
        })
    }

    /// A number, as f32 (f64 rounds to the nearest).
    ///
    /// # Errors
    /// [`Error::WrongMetaType`] if it is of another type.
    pub fn get_f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a floating-point number", |found| match found {
            Found::Gguf(MetaValue::F32(v)) => Some(*v),
            Found::Gguf(MetaValue::F64(v)) => Some(*v as f32),
            Found::Gguf(_) => None,
            Found::Json(v) => v.as_f64().map(|v| v as f32),
        })
    }

    /// A boolean.
    ///
    /// # Errors
    /// [`Error::WrongMetaType`] if it is of another type.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |found| match found {
            Found::Gguf(MetaValue::Bool(v)) => Some(*v),
            Found::Gguf(_) => None,
            Found::Json(v) => v.as_bool(),
        })
    }

    /// A string.
    ///
    /// # Errors
    /// [`Error::WrongMetaType`] if it is of another type.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |found| match *found {
            Found::Gguf(MetaValue::String(v)) => Some(v.as_str()),
            Found::Gguf(_) => None,
            Found::Json(v) => v.as_str(),
        })
    }

    /// An array of strings.
    ///
    /// # Errors
    /// [`Error::WrongMetaType`] if it is of another type.
    pub fn get_strs(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.typed(key, "an array of strings", |found| match *found {
            Found::Gguf(MetaValue::Array(MetaArray::String(v))) => {
                Some(v.iter().map(String::as_str).collect())
            }
            Found::Gguf(_) => None,
            Found::Json(v) => v.as_array()?.iter().map(Value::as_str).collect(),
        })
    }

    /// An array of integers that fit in 64 bits with sign.
    ///
    /// # Errors
    /// [`Error::WrongMetaType`] if it is of another type or one does not fit.
    pub fn get_i64s(&self, key: &str) -> Result<Option<Vec<i64>>> {
        self.typed(key, "an array of integers", |found| match *found {
            Found::Gguf(MetaValue::Array(v)) => v.to_i64s(),
            Found::Gguf(_) => None,
            Found::Json(v) => v.as_array()?.iter().map(Value::as_i64).collect(),
        })
    }

    /// An array of numbers, as f32.
    ///
    /// # Errors
    /// [`Error::WrongMetaType`] if it is of another type.
    pub fn get_f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.typed(key, "an array of floating-point numbers", |found| match *found {
            Found::Gguf(MetaValue::Array(MetaArray::F32(v))) => Some(v.clone()),
            Found::Gguf(MetaValue::Array(MetaArray::F64(v))) => Some(v.iter().map(|&v| v as f32).collect()),
            Found::Gguf(_) => None,
            Found::Json(v) => v
                .as_array()?
                .iter()
                .map(|v| v.as_f64().map(|v| v as f32))
                .collect(),
        })
    }

    /// An array of booleans.
    ///
    /// # Errors
    /// [`Error::WrongMetaType`] if it is of another type.
    pub fn get_bools(&self, key: &str) -> Result<Option<Vec<bool>>> {
        self.typed(key, "an array of bools", |found| match *found {
            Found::Gguf(MetaValue::Array(MetaArray::Bool(v))) => Some(v.clone()),
            Found::Gguf(_) => None,
            Found::Json(v) => v.as_array()?.iter().map(Value::as_bool).collect(),
        })
    }

    /// [`Metadata::get_u64`] of a key that must be there.
    ///
    /// # Errors
    /// [`Error::MissingKey`], [`Error::WrongMetaType`].
    pub fn require_u64(&self, key: &str) -> Result<u64> {
        self.get_u64(key)?.ok_or_else(|| missing(key, "an integer"))
    }

    /// [`Metadata::get_u32`] of a key that must be there.
    ///
    /// # Errors
    /// [`Error::MissingKey`], [`Error::WrongMetaType`].
    pub fn require_u32(&self, key: &str) -> Result<u32> {
        self.get_u32(key)?.ok_or_else(|| missing(key, "an integer"))
    }

    /// [`Metadata::get_f32`] of a key that must be there.
    ///
    /// # Errors
    /// [`Error::MissingKey`], [`Error::WrongMetaType`].
    pub fn require_f32(&self, key: &str) -> Result<f32> {
        self.get_f32(key)?
            .ok_or_else(|| missing(key, "a floating-point number"))
    }

    /// [`Metadata::get_str`] of a key that must be there.
    ///
    /// # Errors
    /// [`Error::MissingKey`], [`Error::WrongMetaType`].
    pub fn require_str(&self, key: &str) -> Result<&str> {
        self.get_str(key)?.ok_or_else(|| missing(key, "a string"))
    }
}

fn missing(key: &str, expected: &'static str) -> Error {
    Error::MissingKey {
        key: key.into(),
        expected,
    }
}
