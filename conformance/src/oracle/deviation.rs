//! Deliberate deviations from the contract, so that tests can show that the golden vectors would notice each of them.
//!
//! They can be chosen in test builds only: elsewhere `by_contract!(right, Name => wrong)` is `right`.

#[cfg(test)]
pub(crate) use active::{Deviation, with_deviation};

#[cfg(not(test))]
macro_rules! by_contract {
    ($right:expr $(, $name:ident => $wrong:expr)+ $(,)?) => {
        // The others are compiled, so that both builds have the same types, and never run.
        $(if false { $wrong } else)+ { $right }
    };
}

#[cfg(test)]
macro_rules! by_contract {
    ($right:expr $(, $name:ident => $wrong:expr)+ $(,)?) => {
        match $crate::oracle::deviation::active::deviation() {
            $(Some($crate::oracle::deviation::Deviation::$name) => $wrong,)+
            _ => $right,
        }
    };
}

pub(super) use by_contract;

#[cfg(test)]
pub(in crate::oracle) mod active {
    use std::cell::Cell;

    macro_rules! deviations {
        ($($(#[doc = $doc:literal])* $name:ident,)*) => {
            /// One way to get the contract wrong.
            #[derive(Clone, Copy, Debug, PartialEq, Eq)]
            pub(crate) enum Deviation {
                $($(#[doc = $doc])* $name,)*
            }

            impl Deviation {
                pub(crate) const ALL: &[Deviation] = &[$(Deviation::$name,)*];
            }
        };
    }

    deviations! {
        // ---- conversions ----
        TiesAwayFromZero,
        UnderflowFlushed,
        ShiftTruncates,
        // ---- §1.1 ----
        /// `d0` loses its low bits instead of being rounded up.
        SegmentScaleNotRoundedUp,
        /// `d0 = A · (1 / 2032)`.
        SegmentScaleByReciprocal,
        MaximumWithoutSign,
        /// Zero segments at `d0 ≤ 2^-126`.
        ZeroSegmentAtTheBound,
        ZeroSegmentHasExponentZero,
        /// `u = ceil(a · (1 / (127 · d)))` in f32. (With one division it is the same function.)
        MultiplierByReciprocal,
        MultiplierBelowInsteadOfAtMost,
        QuantByDivision,
        QuantTiesAway,
        LargestActivationExponentOfFirstSegment,
        // ---- §1.2 ----
        SubnormalScalesNormalised,
        SubnormalScalesOneExponentLow,
        AlignedWithSevenBits,
        AlignmentIgnoresZeroScales,
        AlignmentShiftWraps,
        AlignedMinsNotFloored,
        LargestWeightExponentIgnoresMins,
        LargestWeightExponentOfFirstSegment,
        AprScaleAfterBias,
        // ---- §1.3 ----
        TermShiftWraps,
        TermShiftPastClampIsZero,
        MinsSubtractedBeforeTheShift,
        MinsWithoutMultiplier,
        RoundedOnceAtTheEnd,
        BiasBeforeRounding,
        // ---- §1.4 ----
        EmbedLosesNegativeZero,
        // ---- §2, §3 ----
        DotInThirtyTwoLanes,
        DotInOneAccumulator,
        DotWithoutFma,
        DotFoldsNeighbours,
        SumInSixtyFourLanes,
        SquaresWithoutFma,
        // ---- §4 ----
        RmsGammaFirst,
        RmsEpsilonOutside,
        RmsMeanByReciprocal,
        LayerNormWithoutFma,
        LayerNormOnePass,
        RopeWithoutFma,
        RopeOtherStyle,
        RopeFusesTheOtherProduct,
        KvNotRounded,
        KvSubnormalsFlushed,
        ScoreWithoutFma,
        QueryScaledFirst,
        SoftCapBeforeScale,
        WindowOneWider,
        WindowOneNarrower,
        SplitsOf128,
        SplitsFromTheWindow,
        SplitsNotMerged,
        SplitSumInOneAccumulator,
        MergeWithoutFma,
        MergeDescending,
        AttentionDividesBySum,
        KvHeadsInterleaved,
        SiluByReciprocal,
        GeluWithoutFma,
        SoftCapByReciprocal,
        RouterTiesToTheHighest,
        RouterSoftmaxOverChosen,
        RouterNormalisesAscending,
        WeightedSumInSlotOrder,
        WeightedSumFromZero,
        ArgMaxTakesTheLast,
        // ---- §5 ----
        ExpWithoutClamp,
        ExpScaledOnce,
        ExpReducedOnce,
        ExpByNearestInteger,
        ExpHornerWithoutFma,
        TanhThresholdAtHalf,
        TanhWithoutSign,
        TanhHornerWithoutFma,
    }

    thread_local! {
        static ACTIVE: Cell<Option<Deviation>> = const { Cell::new(None) };
    }

    pub(in crate::oracle) fn deviation() -> Option<Deviation> {
        ACTIVE.get()
    }

    /// Runs `f` with the oracle deviating on this thread.
    pub(crate) fn with_deviation<T>(deviation: Deviation, f: impl FnOnce() -> T) -> T {
        struct Restore;
        impl Drop for Restore {
            fn drop(&mut self) {
                ACTIVE.set(None);
            }
        }
        ACTIVE.set(Some(deviation));
        let _restore = Restore;
        f()
    }
}
