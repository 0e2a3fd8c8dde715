//! Patterns over case ids.

/// Whether `pattern` matches an id: `*` stands for anything; without one, the id itself, or all ids that go on after it
/// with `::` or `[`.
pub fn matches(pattern: &str, id: &str) -> bool {
    if !pattern.contains('*') {
        return id
            .strip_prefix(pattern)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with("::") || rest.starts_with('['));
    }
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| id.strip_prefix(first)) else {
        return false;
    };
    let mut parts = parts.peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn a_star_stands_for_anything_and_a_prefix_ends_at_a_boundary() {
        let id = "residency::roundtrip::matrix[encoding=q8_0]";
        for yes in [
            "*",
            "residency",
            "residency::roundtrip",
            "residency::roundtrip::matrix",
            id,
            "*q8_0]",
            "residency::*",
            "*::matrix[*",
            "res*trip*q8*",
        ] {
            assert!(matches(yes, id), "{yes}");
        }
        for no in [
            "",
            "res",
            "residency::round",
            "roundtrip",
            "residency::*q4_0]",
            "*matrix",
            "*z*",
        ] {
            assert!(!matches(no, id), "{no}");
        }
    }
}
