//! JSON from untrusted files, with two rules that serde_json's own `Value` lacks: memory is budgeted while it is parsed,
//! and no key is silently there twice.

use std::cell::RefCell;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::header::{Budget, string_cost};
use crate::{Error, Result};

/// An error that serde's own cannot carry, kept aside while parsing is unwound.
pub(crate) struct Context<'a> {
    pub(crate) file: &'a str,
    pub(crate) what: &'static str,
    state: RefCell<State<'a>>,
}

struct State<'a> {
    budget: &'a mut Budget,
    fault: Option<Error>,
}

impl<'a> Context<'a> {
    pub(crate) fn new(file: &'a str, what: &'static str, budget: &'a mut Budget) -> Self {
        Self {
            file,
            what,
            state: RefCell::new(State { budget, fault: None }),
        }
    }

    /// Ends parsing with `fault`.
    pub(crate) fn fail<E: serde::de::Error>(&self, fault: Error) -> E {
        let error = E::custom(&fault);
        self.state.borrow_mut().fault = Some(fault);
        error
    }

    pub(crate) fn charge<E: serde::de::Error>(&self, bytes: u64) -> Result<(), E> {
        let charged = self.state.borrow_mut().budget.charge(bytes, self.file, self.what);
        charged.map_err(|fault| self.fail(fault))
    }

    /// The error of a parse that ended with `error`.
    fn error(self, error: &serde_json::Error) -> Error {
        self.state.into_inner().fault.unwrap_or_else(|| Error::Json {
            file: self.file.into(),
            what: self.what,
            reason: error.to_string(),
        })
    }
}

/// Deserializer of text that is in memory.
pub(crate) type Json<'de> = serde_json::Deserializer<serde_json::de::StrRead<'de>>;

/// Parses all of `bytes`: `run` reports to the context and nothing but white space follows what it consumes.
pub(crate) fn parse<'de, 'a, T>(
    bytes: &'de [u8],
    context: Context<'a>,
    run: impl FnOnce(&Context<'a>, &mut Json<'de>) -> serde_json::Result<T>,
) -> Result<T> {
    let text = std::str::from_utf8(bytes).map_err(|e| Error::NotUtf8 {
        file: context.file.into(),
        what: context.what.into(),
        at: e.valid_up_to() as u64,
    })?;
    let mut json = serde_json::Deserializer::from_str(text);
    let result = run(&context, &mut json).and_then(|value| json.end().map(|()| value));
    result.map_err(|error| context.error(&error))
}

/// Parses an object.
pub(crate) fn parse_object(
    bytes: &[u8],
    file: &str,
    what: &'static str,
    budget: &mut Budget,
) -> Result<Map<String, Value>> {
    let context = Context::new(file, what, budget);
    parse(bytes, context, |context, json| {
        json.deserialize_map(ObjectVisitor(context))
    })
}

/// What a value costs in a vector that has just doubled.
const VALUE_COST: u64 = 2 * size_of::<Value>() as u64;

/// What an entry of a map costs, its key's heap block aside: hash, key and value, in a vector that has just doubled, and
/// a place in the index.
const ENTRY_COST: u64 = 2 * (8 + size_of::<(String, Value)>() as u64) + 16;

struct ValueSeed<'c, 'a>(&'c Context<'a>);

impl<'de> DeserializeSeed<'de> for ValueSeed<'_, '_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ValueSeed<'_, '_> {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_str<E: serde::de::Error>(self, v: &str) -> Result<Value, E> {
        self.0.charge(string_cost(v.len() as u64))?;
        Ok(v.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut out = Vec::new();
        while let Some(value) = seq.next_element_seed(ValueSeed(self.0))? {
            self.0.charge(VALUE_COST)?;
            out.push(value);
        }
        Ok(Value::Array(out))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Value, A::Error> {
        ObjectVisitor(self.0).visit_map(map).map(Value::Object)
    }
}

struct ObjectVisitor<'c, 'a>(&'c Context<'a>);

impl<'de> Visitor<'de> for ObjectVisitor<'_, '_> {
    type Value = Map<String, Value>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut out = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            self.0.charge(ENTRY_COST + string_cost(key.len() as u64))?;
            let value = map.next_value_seed(ValueSeed(self.0))?;
            match out.entry(key) {
                serde_json::map::Entry::Vacant(slot) => {
                    slot.insert(value);
                }
                // Some writers of APR files write a key as `null` and again with its value: no contradiction.
                serde_json::map::Entry::Occupied(mut slot) => {
                    if slot.get().is_null() {
                        slot.insert(value);
                    } else if !value.is_null() && *slot.get() != value {
                        return Err(self.0.fail(Error::DuplicateKey {
                            file: self.0.file.into(),
                            key: slot.key().clone(),
                        }));
                    }
                }
            }
        }
        Ok(out)
    }
}

/// Whether the object in `bytes` has `key`, without making anything of it.
pub(crate) fn has_key(bytes: &[u8], file: &str, what: &'static str, key: &str) -> Result<bool> {
    struct Keys<'k>(&'k str);
    impl<'de> Visitor<'de> for Keys<'_> {
        type Value = bool;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a JSON object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
            let mut found = false;
            while let Some(key) = map.next_key::<String>()? {
                found |= key == self.0;
                map.next_value::<serde::de::IgnoredAny>()?;
            }
            Ok(found)
        }
    }
    let mut budget = Budget::new();
    let context = Context::new(file, what, &mut budget);
    parse(bytes, context, |_, json| json.deserialize_map(Keys(key)))
}
