//! Rules of the suite that tests switch off one at a time, to show that something would notice.
//!
//! Elsewhere than in test builds every rule holds: [`holds`] is `true`.

#[cfg(test)]
mod holder;
#[cfg(test)]
mod witnesses;

macro_rules! rules {
    ($($(#[doc = $doc:literal])* $name:ident,)*) => {
        /// A rule of the suite.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Rule {
            $($(#[doc = $doc])* $name,)*
        }

        #[cfg(test)]
        impl Rule {
            pub(crate) const ALL: &[Rule] = &[$(Rule::$name,)*];
        }
    };
}

rules! {
    // ---- judging ----
    /// Bytes are compared.
    BytesAreEqual,
    /// As many bytes are demanded as are expected.
    BytesAreAsMany,
    /// f32 results are compared by their bits.
    BitsAreEqual,
    /// No element is further off than its bound.
    WorstElement,
    /// No row is further off than its bound.
    WorstRow,
    /// The normalised mean square error is bounded.
    MeanSquare,
    /// The arg-max is the same, unless the two are as close as their bounds.
    ArgMax,
    /// A value that is not finite is wrong, whatever the bound.
    BoundedIsFinite,
    /// Values that can be shown are compared.
    ValuesAreEqual,
    /// A call that must fail fails.
    CallFails,
    /// It fails with the error that the contract names.
    ErrorIsTheRightOne,
    // ---- buffers ----
    /// What stands in front of an output stays.
    FrontOfOutput,
    /// An upload's bytes change when it has returned.
    BytesChangeAfterUpload,
    /// The digest is compared, where there is one.
    DigestIsCompared,
    // ---- resources ----
    /// What is left behind is looked for.
    NothingAdded,
    /// Growth over cycles is a leak.
    GrowthIsALeak,
    // ---- outcomes ----
    /// A panic is a failure.
    PanicIsAFailure,
    /// An encoding that works and is not claimed is a failure.
    UnclaimedIsAFailure,
    /// A pass that was expected to fail is a failure.
    UnexpectedPassFails,
    /// An expectation of no case is a failure.
    StaleExpectationFails,
    /// A line of a profile that matches no case is a failure.
    StaleProfileFails,
    /// A case that must pass and is unsupported is a failure.
    LostCapabilityFails,
    /// A case that must pass and is skipped is a failure.
    SkippedMustFails,
    /// Nothing executed is a failure.
    NothingExecutedFails,
    /// A crash of a case that is only reported is a failure.
    CrashOfReportedFails,
    // ---- running ----
    /// A line without the nonce is nobody's.
    NonceIsChecked,
    /// A process that ends with 0 in the middle of a case gave no result.
    ExitZeroIsNoResult,
    /// A process that fails after its last case fails that case.
    EndIsWatched,
}

/// Whether a rule holds.
#[cfg(not(test))]
pub(crate) const fn holds(_: Rule) -> bool {
    true
}

#[cfg(test)]
pub(crate) use active::{holds, without};

#[cfg(test)]
mod active {
    use std::cell::Cell;

    use super::Rule;

    thread_local! {
        static OFF: Cell<Option<Rule>> = const { Cell::new(None) };
    }

    pub(crate) fn holds(rule: Rule) -> bool {
        OFF.get() != Some(rule)
    }

    /// Runs `f` with a rule switched off on this thread.
    pub(crate) fn without<T>(rule: Rule, f: impl FnOnce() -> T) -> T {
        struct Restore;
        impl Drop for Restore {
            fn drop(&mut self) {
                OFF.set(None);
            }
        }
        OFF.set(Some(rule));
        let _restore = Restore;
        f()
    }
}
