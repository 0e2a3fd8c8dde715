//! Profiles: lists of what must pass, in files.

use crate::mutation::{Rule as Mutated, holds};
use crate::pattern;

/// What a profile demands of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// It passes.
    Must,
    /// It passes, or is declared unsupported, or is skipped for a reason that is named.
    May,
    /// It is run and shown; its outcome changes no verdict unless the backend crashes or hangs.
    Report,
}

/// A list of rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Name in claims and reports.
    pub name: String,
    /// What the file says of itself: its first lines of comment.
    pub about: String,
    rules: Vec<(Rule, String)>,
}

/// A line of a profile that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("profile `{profile}`, line {line}: expected {expected}, found `{found}`")]
pub struct BadProfile {
    /// The profile.
    pub profile: String,
    /// Line, from 1.
    pub line: usize,
    /// What should stand there.
    pub expected: &'static str,
    /// What stands there.
    pub found: String,
}

const BUILT_IN: [(&str, &str); 3] = [
    ("residency", include_str!("../profiles/residency.txt")),
    ("decode", include_str!("../profiles/decode.txt")),
    ("full", include_str!("../profiles/full.txt")),
];

impl Profile {
    /// Names of the profiles that are part of the suite.
    pub fn names() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// A profile that is part of the suite; `None` if there is none of that name.
    ///
    /// # Errors
    /// [`BadProfile`]
    pub fn built_in(name: &str) -> Result<Option<Self>, BadProfile> {
        BUILT_IN
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(name, text)| Self::parse(name, text))
            .transpose()
    }

    /// Reads a profile: lines of a rule and a pattern, and comments after `#`.
    ///
    /// # Errors
    /// [`BadProfile`]
    pub fn parse(name: &str, text: &str) -> Result<Self, BadProfile> {
        let about: Vec<&str> = text
            .lines()
            .map_while(|line| line.strip_prefix('#'))
            .map(str::trim)
            .take_while(|line| !line.is_empty())
            .collect();
        let mut rules = Vec::new();
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let bad = |expected| BadProfile {
                profile: name.to_owned(),
                line: i + 1,
                expected,
                found: line.to_owned(),
            };
            let (rule, pattern) = line
                .split_once(char::is_whitespace)
                .ok_or_else(|| bad("a rule and a pattern"))?;
            let rule = match rule {
                "must" => Rule::Must,
                "may" => Rule::May,
                "report" => Rule::Report,
                _ => return Err(bad("`must`, `may` or `report`")),
            };
            rules.push((rule, pattern.trim().to_owned()));
        }
        if rules.is_empty() {
            return Err(BadProfile {
                profile: name.to_owned(),
                line: 1,
                expected: "at least one rule",
                found: String::new(),
            });
        }
        Ok(Self {
            name: name.to_owned(),
            about: about.join(" "),
            rules,
        })
    }

    /// The rule for a case: the last line that matches. `None`: the case is not part of this profile.
    pub fn rule(&self, id: &str) -> Option<Rule> {
        self.rules
            .iter()
            .rev()
            .find(|(_, p)| pattern::matches(p, id))
            .map(|(rule, _)| *rule)
    }

    /// Patterns that match none of these ids: such a line guards nothing.
    pub fn stale<'a>(&'a self, ids: &'a [String]) -> impl Iterator<Item = &'a str> {
        self.rules
            .iter()
            .map(|(_, p)| p.as_str())
            .filter(|_| holds(Mutated::StaleProfileFails))
            .filter(move |p| !ids.iter().any(|id| pattern::matches(p, id)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_matching_line_counts() {
        let profile = Profile::parse("p", "# About.\n# More.\n#\n# Not that.\nmust a\nmay a::b # no\n");
        assert_eq!(
            profile.unwrap().rule("a::b"),
            Some(Rule::Must),
            "`a::b # no` is a pattern of its own"
        );
        let profile = Profile::parse("p", "# About.\n# More.\n#\n# Not that.\nmust a\nmay a::b\n").unwrap();
        assert_eq!(profile.about, "About. More.");
        assert_eq!(profile.rule("a::b::c"), Some(Rule::May));
        assert_eq!(profile.rule("a::c"), Some(Rule::Must));
        assert_eq!(profile.rule("b"), None);
    }

    #[test]
    fn what_is_no_profile_is_refused() {
        for (text, line) in [
            ("", 1),
            ("must", 1),
            ("must a\nshould b", 2),
            ("# only a comment", 1),
        ] {
            assert_eq!(Profile::parse("p", text).unwrap_err().line, line, "{text}");
        }
    }

    #[test]
    fn profiles_of_the_suite_read_and_name_cases_that_exist() {
        let ids: Vec<String> = crate::suites::all().iter().map(crate::Case::id).collect();
        for name in Profile::names() {
            let profile = Profile::built_in(name).unwrap().unwrap();
            let stale: Vec<_> = profile.stale(&ids).collect();
            assert!(stale.is_empty(), "profile {name}: {stale:?}");
        }
        let full = Profile::built_in("full").unwrap().unwrap();
        for id in &ids {
            assert!(full.rule(id).is_some(), "{id} is not in the full profile");
        }
    }
}
