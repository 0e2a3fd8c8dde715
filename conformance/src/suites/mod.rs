//! Every case of the suite.

use crate::Case;

pub mod decode;
pub mod determinism;
pub mod device;
pub mod encodings;
pub mod faults;
pub mod hygiene;
pub mod index;
pub mod interface;
pub mod lifecycle;
pub mod ops;
pub mod performance;
pub mod residency;
pub mod resources;
mod support;
pub mod workspace;

/// A suite: its name, and what makes its cases.
type Suite = (&'static str, fn() -> Vec<Case>);

/// Every suite, in the order of reports.
pub const SUITES: &[Suite] = &[
    ("interface", interface::cases),
    ("device", device::cases),
    ("residency", residency::cases),
    ("encodings", encodings::cases),
    ("index", index::cases),
    ("workspace", workspace::cases),
    ("ops", ops::cases),
    ("decode", decode::cases),
    ("determinism", determinism::cases),
    ("lifecycle", lifecycle::cases),
    ("faults", faults::cases),
    ("resources", resources::cases),
    ("hygiene", hygiene::cases),
    ("performance", performance::cases),
];

/// Every case, in a fixed order; cases of a group stand together.
pub fn all() -> Vec<Case> {
    SUITES.iter().flat_map(|(_, cases)| cases()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn ids_are_unique_and_groups_stand_together() {
        let cases = all();
        let ids: BTreeSet<String> = cases.iter().map(Case::id).collect();
        assert_eq!(ids.len(), cases.len());
        let mut groups: Vec<String> = cases.iter().map(Case::group_id).collect();
        groups.dedup();
        let unique: BTreeSet<&String> = groups.iter().collect();
        assert_eq!(unique.len(), groups.len());
    }

    #[test]
    fn a_suite_has_cases_of_its_own_name_only() {
        for (name, cases) in SUITES {
            for case in cases() {
                assert_eq!(case.suite, *name, "{case}");
            }
        }
    }
}
