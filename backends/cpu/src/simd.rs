//! One body, several instruction sets.
//!
//! The operations of the contract other than the quantised product are written once, as loops over fixed numbers of
//! lanes with every float operation explicit. [`Level::run`] compiles such a [`Kernel`] for each instruction set; the
//! compiler may not reorder float operations, so that all give the same bits.

/// An instruction set that this machine has: there is no other way to come by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Level(LevelKind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LevelKind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// Code for any processor.
    pub(crate) const PORTABLE: Self = Self(LevelKind::Portable);

    /// All that this machine has, portable first.
    pub(crate) fn available() -> impl Iterator<Item = Self> {
        [Some(Self::PORTABLE), Self::avx2(), Self::avx512()]
            .into_iter()
            .flatten()
    }

    /// The fastest one.
    pub(crate) fn detect() -> Self {
        Self::available().last().unwrap_or(Self::PORTABLE)
    }

    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn avx2() -> Option<Self> {
        use std::arch::is_x86_feature_detected as has;
        (has!("avx2") && has!("fma") && has!("f16c")).then_some(Self(LevelKind::Avx2))
    }

    /// The subsets of AVX-512 that every server processor with any has.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn avx512() -> Option<Self> {
        use std::arch::is_x86_feature_detected as has;
        let has = has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
        Self::avx2().filter(|_| has).map(|_| Self(LevelKind::Avx512))
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn avx2() -> Option<Self> {
        None
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn avx512() -> Option<Self> {
        None
    }
}

/// A loop to be compiled for each instruction set.
pub(crate) trait Kernel {
    /// What it yields.
    type Output;

    /// Runs it; must be `#[inline(always)]`, so that it takes on the features of its caller. `F16C`: whether these include
    /// the conversion of f16.
    fn run<const F16C: bool>(self) -> Self::Output;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<true>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<true>()
}

impl Level {
    /// Runs `kernel` compiled for this instruction set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            LevelKind::Portable => kernel.run::<false>(),
            // SAFETY: a `Level` of this kind exists only where these features were detected.
            #[cfg(target_arch = "x86_64")]
            LevelKind::Avx2 => unsafe { avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            LevelKind::Avx512 => unsafe { avx512(kernel) },
        }
    }
}
