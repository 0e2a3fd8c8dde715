//! Metadata of any format, in JSON and for people.

use hoist_core::formats::{MetaArray, MetaValue, Metadata};
use serde_json::{Value, json};

/// Longer arrays are abbreviated, unless all was asked for: vocabularies have hundreds of thousands of entries.
const ARRAY_SHOWN: usize = 16;
/// Longer texts are cut in tables.
const TEXT_SHOWN: usize = 60;

/// Metadata as a JSON object; arrays of more than 16 entries as their type, length and first entries unless `full`.
pub(crate) fn json(metadata: &Metadata, full: bool) -> Value {
    match metadata {
        Metadata::Gguf(pairs) => pairs
            .iter()
            .map(|(key, value)| (key.clone(), meta_json(value, full)))
            .collect(),
        Metadata::HuggingFace(object) | Metadata::Apr(object) => object
            .iter()
            .map(|(key, value)| (key.clone(), if full { value.clone() } else { abbreviated(value) }))
            .collect(),
    }
}

/// Metadata as rows of key and value, cut to a line each.
pub(crate) fn rows(metadata: &Metadata) -> Vec<(String, String)> {
    let Value::Object(object) = json(metadata, false) else {
        return vec![];
    };
    object
        .into_iter()
        .map(|(key, value)| (key, one_line(&value)))
        .collect()
}

fn one_line(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Object(object) if object.contains_key("length") && object.contains_key("first") => {
            let first: Vec<_> = object["first"]
                .as_array()
                .into_iter()
                .flatten()
                .map(one_line)
                .collect();
            format!("{} entries: {} …", object["length"], first.join(", "))
        }
        other => other.to_string(),
    };
    let mut line: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(TEXT_SHOWN)
        .collect();
    if text.chars().nth(TEXT_SHOWN).is_some() {
        line.push('…');
    }
    line
}

fn abbreviated(value: &Value) -> Value {
    match value {
        Value::Array(entries) if entries.len() > ARRAY_SHOWN => {
            json!({ "length": entries.len(), "first": entries[..ARRAY_SHOWN] })
        }
        Value::Object(object) => object
            .iter()
            .map(|(key, value)| (key.clone(), abbreviated(value)))
            .collect(),
        other => other.clone(),
    }
}

fn meta_json(value: &MetaValue, full: bool) -> Value {
    match value {
        MetaValue::U8(v) => json!(v),
        MetaValue::I8(v) => json!(v),
        MetaValue::U16(v) => json!(v),
        MetaValue::I16(v) => json!(v),
        MetaValue::U32(v) => json!(v),
        MetaValue::I32(v) => json!(v),
        MetaValue::U64(v) => json!(v),
        MetaValue::I64(v) => json!(v),
        MetaValue::F32(v) => number(f64::from(*v), v.to_string()),
        MetaValue::F64(v) => number(*v, v.to_string()),
        MetaValue::Bool(v) => json!(v),
        MetaValue::String(v) => json!(v),
        MetaValue::Array(array) => array_json(array, full),
    }
}

/// A float as the shortest decimal that is that f32 or f64; JSON has no NaN or infinity, which become text.
fn number(value: f64, shortest: String) -> Value {
    if value.is_finite() {
        shortest.parse::<f64>().map_or(Value::Null, |v| json!(v))
    } else {
        json!(shortest)
    }
}

fn array_json(array: &MetaArray, full: bool) -> Value {
    fn entries<T>(all: &[T], full: bool, json: impl Fn(&T) -> Value) -> Value {
        if full || all.len() <= ARRAY_SHOWN {
            return all.iter().map(json).collect();
        }
        let first: Value = all[..ARRAY_SHOWN].iter().map(json).collect();
        json!({ "length": all.len(), "first": first })
    }
    match array {
        MetaArray::U8(a) => entries(a, full, |v| json!(v)),
        MetaArray::I8(a) => entries(a, full, |v| json!(v)),
        MetaArray::U16(a) => entries(a, full, |v| json!(v)),
        MetaArray::I16(a) => entries(a, full, |v| json!(v)),
        MetaArray::U32(a) => entries(a, full, |v| json!(v)),
        MetaArray::I32(a) => entries(a, full, |v| json!(v)),
        MetaArray::U64(a) => entries(a, full, |v| json!(v)),
        MetaArray::I64(a) => entries(a, full, |v| json!(v)),
        MetaArray::F32(a) => entries(a, full, |v| number(f64::from(*v), v.to_string())),
        MetaArray::F64(a) => entries(a, full, |v| number(*v, v.to_string())),
        MetaArray::Bool(a) => entries(a, full, |v| json!(v)),
        MetaArray::String(a) => entries(a, full, |v| json!(v)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_arrays_are_abbreviated_unless_all_is_asked_for() {
        let pairs = [(
            "tokens".to_owned(),
            MetaValue::Array(MetaArray::U32((0..20).collect())),
        )];
        let metadata = Metadata::Gguf(pairs.into_iter().collect());
        assert_eq!(json(&metadata, false)["tokens"]["length"], 20);
        assert_eq!(json(&metadata, true)["tokens"].as_array().unwrap().len(), 20);
        assert!(rows(&metadata)[0].1.starts_with("20 entries: 0, 1, 2"));
    }

    #[test]
    fn floats_print_as_they_were_written_and_never_break_json() {
        assert_eq!(meta_json(&MetaValue::F32(1e-5), false), json!(1e-5));
        assert_eq!(meta_json(&MetaValue::F32(0.1), false).to_string(), "0.1");
        assert_eq!(meta_json(&MetaValue::F32(f32::NAN), false), json!("NaN"));
    }

    #[test]
    fn a_value_is_one_line_of_a_table() {
        let long = "x\n".repeat(100);
        let line = one_line(&json!(long));
        assert_eq!(line.lines().count(), 1);
        assert!(line.ends_with('…'));
    }
}
