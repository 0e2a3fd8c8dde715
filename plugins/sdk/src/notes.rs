//! A receipt's notes as the text of `stats`: a flat JSON object of strings.

use hoist_plugin_abi::STATS_MAX_BYTES;

/// The notes as JSON; of a name that comes twice, the last. Those that no longer fit are left out.
pub(crate) fn json(notes: &[(String, String)]) -> String {
    let mut text = String::from("{");
    for (i, (name, value)) in notes.iter().enumerate() {
        if notes[i + 1..].iter().any(|(later, _)| later == name) {
            continue;
        }
        let before = text.len();
        if before > 1 {
            text.push(',');
        }
        quote(name, &mut text);
        text.push(':');
        quote(value, &mut text);
        // Room for the brace that closes.
        if text.len() as u64 + 1 > STATS_MAX_BYTES {
            text.truncate(before);
        }
    }
    text.push('}');
    text
}

/// A string as RFC 8259, section 7, has it.
fn quote(string: &str, out: &mut String) {
    out.push('"');
    for c in string.chars() {
        match c {
            '"' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            '\0'..='\x1F' => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            _ => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(notes: &[(&str, &str)]) -> String {
        let notes: Vec<_> = notes
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        json(&notes)
    }

    #[test]
    fn names_and_values_are_quoted() {
        assert_eq!(of(&[]), "{}");
        assert_eq!(of(&[("threads", "2")]), r#"{"threads":"2"}"#);
        assert_eq!(
            of(&[("a\"b", "c\\d\ne\u{1}"), ("ü", "")]),
            r#"{"a\"b":"c\\d\u000ae\u0001","ü":""}"#
        );
        assert_eq!(of(&[("a", "1"), ("b", "2"), ("a", "3")]), r#"{"b":"2","a":"3"}"#);
    }

    #[test]
    fn what_is_too_long_is_left_out() {
        let long = "x".repeat(STATS_MAX_BYTES as usize);
        assert_eq!(
            of(&[("a", "1"), ("b", &long), ("c", "3")]),
            r#"{"a":"1","c":"3"}"#
        );
    }
}
