//! For each rule something that goes wrong, and is noticed exactly as long as the rule holds.

use std::time::Duration;

use hoist_backend::{Error, OpenOptions};

use super::holder::{Fault, HolderTarget};
use super::{Rule, without};
use crate::expectation::{self, Expectation};
use crate::judge::{self, Bounds};
use crate::profile::Profile;
use crate::report::{CaseReport, Report};
use crate::runner::{Options, tests as running};
use crate::{Case, Expect, Failure, Outcome, Target, audit, pattern, suites, worker};

/// Asks the cases that match, of a backend with a fault; whether anything went wrong.
fn caught(fault: Fault, cases: &str) -> bool {
    let target = HolderTarget(fault);
    let info = target.open(&OpenOptions::default()).unwrap().info().clone();
    let selected: Vec<Case> = suites::all()
        .into_iter()
        .filter(|case| pattern::matches(cases, &case.id()))
        .collect();
    assert!(!selected.is_empty(), "{cases}");
    selected
        .iter()
        .any(|case| worker::ask(case, &target, &info, 1, true).0.went_wrong())
}

fn bounds(element: &[f64]) -> Bounds<'_> {
    Bounds {
        element,
        row: 0.6,
        nmse: 1e-4,
    }
}

fn options(profile: &str, expectations: Vec<Expectation>) -> Options {
    Options {
        profile: Profile::parse("p", profile).unwrap(),
        filters: Vec::new(),
        expectations,
        seed: 1,
        jobs: 1,
        limit: None,
    }
}

/// Whether a report of one case that passes and one of that outcome speaks against the backend.
fn report_fails(rule: &str, outcome: Outcome) -> bool {
    let options = options(&format!("must device\n{rule} index"), Vec::new());
    let case = |id: &str, outcome: Outcome| CaseReport {
        id: id.into(),
        suite: "index".into(),
        group: "build".into(),
        parameters: Default::default(),
        rule: options.profile.rule(id).unwrap(),
        outcome,
        seed: 1,
        measurements: Vec::new(),
        micros: 0,
        replay: String::new(),
    };
    let cases = vec![case("device::a::b", Outcome::Pass), case("index::a::b", outcome)];
    !Report::judge(&options, "t", None, cases, 1, Duration::ZERO).conforms
}

/// Whether what goes wrong is noticed. Each rule has a witness of its own.
fn noticed(rule: Rule) -> bool {
    let reason = || "r".to_owned();
    match rule {
        Rule::BytesAreEqual => caught(Fault::FlipsABit, "residency::roundtrip::matrices[encoding=q4_k]"),
        Rule::BytesAreAsMany => judge::bytes("x", &[1, 2], &[1]).is_err(),
        Rule::BitsAreEqual => judge::exact("x", &[0.0], &[-0.0]).is_err(),
        // Each of the four passes the other three.
        Rule::WorstElement => {
            let mut found = [1.0; 64];
            found[5] = 1.06;
            let mut element = [0.05; 64];
            element[6] = 0.1;
            judge::bounded("x", &[1.0; 64], &found, 64, &bounds(&element)).is_err()
        }
        Rule::WorstRow => {
            let found = [1.009f32; 8];
            judge::bounded("x", &[1.0; 8], &found, 8, &bounds(&[0.01; 8])).is_err()
        }
        Rule::MeanSquare => {
            let found: Vec<f32> = (0..8).map(|i| if i % 2 == 0 { 1.05 } else { 1.0 }).collect();
            judge::bounded("x", &[1.0; 8], &found, 8, &bounds(&[0.1; 8])).is_err()
        }
        // Two elements within their bounds change places, though the gap is wider than both are off by chance.
        Rule::ArgMax => {
            let bounds = Bounds {
                element: &[0.12, 0.12],
                row: 1.0,
                nmse: 1.0,
            };
            let close = judge::bounded("x", &[1.0, 0.9], &[0.94, 0.95], 2, &bounds);
            assert!(close.is_ok(), "{close:?}");
            judge::bounded("x", &[1.0, 0.8], &[0.89, 0.9], 2, &bounds).is_err()
        }
        Rule::BoundedIsFinite => judge::bounded(
            "x",
            &[1.0],
            &[f32::INFINITY],
            1,
            &Bounds {
                element: &[f64::INFINITY],
                row: f64::INFINITY,
                nmse: f64::INFINITY,
            },
        )
        .is_err(),
        Rule::ValuesAreEqual => caught(Fault::MiscountsIndex, "index::build::every_entry_is_counted"),
        Rule::CallFails => Ok::<(), Error>(()).fails("x", "an error", |_| true).is_err(),
        Rule::ErrorIsTheRightOne => caught(Fault::WrongError, "residency::refusals::bad_chunks"),
        Rule::FrontOfOutput => caught(
            Fault::WritesInFront,
            "residency::roundtrip::matrices[encoding=q4_0]",
        ),
        Rule::BytesChangeAfterUpload => kept_pointer_is_seen(),
        Rule::DigestIsCompared => caught(Fault::WrongDigest, "residency::roundtrip::matrices[encoding=f16]"),
        Rule::NothingAdded => {
            let before = Default::default();
            let now = || Ok([(7, "left".to_owned())].into_iter().collect());
            audit::expect_none_added("x", &before, now).is_err()
        }
        Rule::GrowthIsALeak => suites::resources::check_growth(65536.0).is_err(),
        Rule::PanicIsAFailure => caught(Fault::Panics, "residency::roundtrip::matrices[encoding=f32]"),
        Rule::UnclaimedIsAFailure => caught(
            Fault::ClaimsLess,
            "residency::claims::holds_what_it_claims[encoding=q5_1]",
        ),
        Rule::UnexpectedPassFails => {
            let known = expectation::parse("fail a because x").unwrap();
            expectation::apply(&known, "a", Outcome::Pass).is_failure()
        }
        Rule::StaleExpectationFails => {
            let known = expectation::parse("fail no::such because x").unwrap();
            !Report::judge(
                &options("must device", known),
                "t",
                None,
                passing(),
                1,
                Duration::ZERO,
            )
            .conforms
        }
        Rule::StaleProfileFails => {
            let options = options("must device\nmay no::such", Vec::new());
            !Report::judge(&options, "t", None, passing(), 1, Duration::ZERO).conforms
        }
        Rule::LostCapabilityFails => report_fails("must", Outcome::Unsupported { reason: reason() }),
        Rule::SkippedMustFails => report_fails("must", Outcome::Skip { reason: reason() }),
        Rule::NothingExecutedFails => {
            let options = options("may device", Vec::new());
            let mut cases = passing();
            cases[0].rule = crate::profile::Rule::May;
            cases[0].outcome = Outcome::Skip { reason: reason() };
            !Report::judge(&options, "t", None, cases, 1, Duration::ZERO).conforms
        }
        Rule::CrashOfReportedFails => report_fails("report", Outcome::Crash { how: reason() }),
        Rule::NonceIsChecked => {
            let all = [
                "n=guessed;",
                running::BEGIN_A,
                running::END_A,
                running::BEGIN_B,
                running::END_B,
                running::DONE,
            ];
            running::outcomes_of(&all.concat())
                .iter()
                .any(Outcome::is_failure)
        }
        Rule::ExitZeroIsNoResult => {
            let script = [running::BEGIN_A, "exit 0"].concat();
            running::outcomes_of(&script)[0].is_failure()
        }
        Rule::EndIsWatched => {
            let all = [
                running::BEGIN_A,
                running::END_A,
                running::BEGIN_B,
                running::END_B,
                running::DONE,
                "kill -SEGV $$",
            ];
            running::outcomes_of(&all.concat())
                .iter()
                .any(Outcome::is_failure)
        }
    }
}

fn passing() -> Vec<CaseReport> {
    vec![CaseReport {
        id: "device::a::b".into(),
        suite: "device".into(),
        group: "a".into(),
        parameters: Default::default(),
        rule: crate::profile::Rule::Must,
        outcome: Outcome::Pass,
        seed: 1,
        measurements: Vec::new(),
        micros: 0,
        replay: String::new(),
    }]
}

/// A pointer that was kept leads to other bytes: what `scribble` is for. The buffer stays alive, so that reading it is no
/// crash but a wrong byte.
fn kept_pointer_is_seen() -> bool {
    let bytes = crate::guard::ReadOnly::new(&[1, 2, 3]).unwrap();
    let kept = bytes.to_vec();
    let after = bytes.scribble();
    judge::bytes("x", &kept, &after).is_err()
}

#[test]
fn every_rule_is_needed() {
    for rule in Rule::ALL {
        assert!(
            noticed(*rule),
            "{rule:?} holds, and what goes wrong is not noticed"
        );
        assert!(
            !without(*rule, || noticed(*rule)),
            "{rule:?} is switched off, and nobody misses it"
        );
    }
}

#[test]
fn a_right_backend_raises_no_alarm() {
    let target = HolderTarget(Fault::None);
    let info = target.open(&OpenOptions::default()).unwrap().info().clone();
    for case in suites::all() {
        // Audits of the whole process would see what other tests do beside this one.
        let audits = ["resources", "hygiene", "performance"].contains(&case.suite);
        if audits || case.id().contains("offsets") || case.id().contains("place::") {
            continue;
        }
        for seed in [1, 2] {
            let (outcome, _) = worker::ask(&case, &target, &info, seed, true);
            assert!(!outcome.went_wrong(), "{case}, seed {seed}: {}", outcome.detail());
        }
    }
}

#[test]
fn each_fault_is_caught_by_the_case_that_is_there_for_it() {
    for (fault, case) in [
        (Fault::FlipsABit, "residency::ranges"),
        (Fault::IgnoresOffsets, "residency::chunks::any_order"),
        (Fault::WritesInFront, "residency::ranges"),
        (Fault::WrongDigest, "residency::many"),
        (Fault::MemoryLies, "residency::memory"),
        (Fault::TakesOverlaps, "residency::refusals::bad_chunks"),
        (Fault::FinishesEarly, "residency::finish"),
        (Fault::WrongError, "residency::refusals::bad_chunks"),
        (Fault::AnyOrder, "lifecycle::hold"),
        (Fault::IgnoresBudget, "faults::memory"),
        (Fault::IgnoresCancel, "faults::cancel::before_the_first_byte"),
        (Fault::MiscountsIndex, "index::build"),
        (Fault::Panics, "residency::again"),
        (Fault::ClaimsLess, "residency::claims"),
        (Fault::ClaimsMore, "residency::claims"),
        (Fault::SaysYes, "residency::roundtrip"),
        (Fault::SaysNo, "device::open"),
        (Fault::LeavesADescriptor, "resources::open"),
        (Fault::LeavesAThread, "resources::open"),
        (Fault::Leaks, "resources::load"),
    ] {
        assert!(caught(fault, case), "{fault:?} is not caught by {case}");
    }
    let none = [
        "residency::ranges",
        "lifecycle::hold",
        "faults::memory",
        "index::build",
        "device::open",
    ];
    for case in none {
        assert!(!caught(Fault::None, case), "the control fails {case}");
    }
}

/// What a case says when it fails names what, where, expected and found.
#[test]
fn failures_say_where_and_what() {
    let target = HolderTarget(Fault::FlipsABit);
    let info = target.open(&OpenOptions::default()).unwrap().info().clone();
    let cases = suites::all();
    let case = cases
        .iter()
        .find(|c| c.id() == "residency::roundtrip::matrices[encoding=q8_0]")
        .unwrap();
    let (outcome, _) = worker::ask(case, &target, &info, 1, true);
    let Outcome::Fail {
        failure:
            Failure {
                what,
                at,
                expected,
                found,
            },
    } = outcome
    else {
        panic!("{outcome:?}");
    };
    assert!(what.contains("read_back") && what.contains("q8_0"), "{what}");
    assert!(at.contains("byte 33 of 34"), "{at}");
    assert!(expected.starts_with("0x") && found.starts_with("0x") && expected != found);
}

#[test]
fn the_page_of_mutations_is_complete() {
    let page = include_str!("../../MUTATIONS.md");
    for rule in Rule::ALL {
        assert!(page.contains(&format!("| `{rule:?}` |")), "{rule:?} is missing");
    }
    let rows = page.lines().filter(|line| line.starts_with("| `")).count();
    assert_eq!(rows, Rule::ALL.len());
}
