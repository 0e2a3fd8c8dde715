//! Saves and restores the floating-point mode around foreign code: a library that was linked with fast-math sets
//! flush-to-zero for the whole thread when it is loaded.

/// The mode of this thread, restored when dropped.
pub(crate) struct FloatMode {
    #[cfg(target_arch = "x86_64")]
    mxcsr: u32,
    #[cfg(target_arch = "x86_64")]
    x87: u16,
    #[cfg(target_arch = "aarch64")]
    fpcr: u64,
}

impl FloatMode {
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn save() -> Self {
        let (mut mxcsr, mut x87) = (0u32, 0u16);
        // SAFETY: both instructions store a control word to the local it is given, and nothing else.
        unsafe {
            std::arch::asm!("stmxcsr [{m}]", "fnstcw [{x}]", m = in(reg) &mut mxcsr, x = in(reg) &mut x87, options(nostack, preserves_flags));
        }
        Self { mxcsr, x87 }
    }

    #[cfg(target_arch = "aarch64")]
    pub(crate) fn save() -> Self {
        let fpcr: u64;
        // SAFETY: reads a control register.
        unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) fpcr, options(nomem, nostack, preserves_flags)) };
        Self { fpcr }
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub(crate) fn save() -> Self {
        Self {}
    }
}

impl Drop for FloatMode {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: both instructions load control words that this thread had before, without exception flags set.
        unsafe {
            let mxcsr = self.mxcsr & !0x3F;
            std::arch::asm!("ldmxcsr [{m}]", "fldcw [{x}]", m = in(reg) &mxcsr, x = in(reg) &self.x87, options(nostack, readonly, preserves_flags));
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: writes a control register with a value it had before.
        unsafe {
            std::arch::asm!("msr fpcr, {}", in(reg) self.fpcr, options(nomem, nostack, preserves_flags));
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn flush_to_zero_does_not_survive_a_call() {
        let tiny = std::hint::black_box(f32::MIN_POSITIVE);
        {
            let _saved = FloatMode::save();
            let flushing = 0x9FC0u32;
            // SAFETY: sets flush-to-zero and denormals-are-zero; the guard undoes it.
            unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &flushing, options(nostack, readonly)) };
            assert_eq!(std::hint::black_box(tiny) / std::hint::black_box(2.0), 0.0);
        }
        assert!(std::hint::black_box(tiny) / std::hint::black_box(2.0) > 0.0);
    }
}
