//! What the library that looks for races of shared memory must find, and must not.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[macro_use]
mod device;

use device::{Device, LAUNCH_FAILED, SUCCESS};

/// Runs a kernel with each `how`, under several seeds; those that are named race, in accesses of those kinds, and no others do.
fn races(
    kernel: &str,
    threads: u32,
    shared: u32,
    input: bool,
    hows: std::ops::Range<u64>,
    wrong: &[(u64, &[&str])],
) {
    for how in hows {
        for seed in 0..4 {
            let Some(device) = Device::new(hoist_cuda_emulator::load_races(), &format!("seed={seed}")) else {
                return;
            };
            let words: Vec<u32> = (0..256).collect();
            let (from, out) = (device.memory(&words), device.memory(&[0u32; 256]));
            let arguments = [from, out, how];
            let code = device.run(
                kernel,
                (1, threads),
                shared,
                false,
                &arguments[usize::from(!input)..],
            );
            let fault = device.emulator.report().fault;
            let Some((_, parts)) = wrong.iter().find(|(w, _)| *w == how) else {
                assert_eq!(code, SUCCESS, "{kernel}({how}), seed {seed}: {fault}");
                continue;
            };
            assert_eq!(code, LAUNCH_FAILED, "{kernel}({how}), seed {seed}");
            for part in parts
                .iter()
                .chain(&["races of shared memory", kernel, "faulty.cu"])
            {
                assert!(
                    fault.contains(part),
                    "{kernel}({how}), seed {seed}: no `{part}` in: {fault}"
                );
            }
        }
    }
}

#[test]
fn what_one_warp_hands_to_another_needs_an_order() {
    let both = &["write of thread", "read of thread"][..];
    races("hands_over", 64, 0, false, 0..6, &[(0, both), (5, both)]);
}

#[test]
fn a_shuffle_is_no_order_and_a_meeting_of_the_warp_is_one() {
    races(
        "neighbours",
        32,
        0,
        false,
        0..3,
        &[(0, &["write"]), (2, &["write", "read"])],
    );
}

#[test]
fn copies_need_an_order_before_them_and_behind_them() {
    let wrong: [(u64, &[&str]); 3] = [
        (1, &["read of thread", "copy o"]),
        (2, &["copy on its way", "read of thread"]),
        (3, &["copy on its way", "read of thread"]),
    ];
    races("refills", 32, 256, true, 0..4, &wrong);
}

#[test]
fn atomics_do_not_race_with_each_other_but_with_what_reads_them() {
    races(
        "counts",
        64,
        0,
        false,
        0..2,
        &[(0, &["atomic of thread", "read of thread 0"])],
    );
}

#[test]
fn a_barrier_that_is_missing_is_found_under_every_seed() {
    for seed in 0..8 {
        let Some(device) = Device::new(hoist_cuda_emulator::load_races(), &format!("seed={seed}")) else {
            return;
        };
        let at = device.memory(&(0..256).collect::<Vec<u32>>());
        for (meets, expected) in [(1, SUCCESS), (0, LAUNCH_FAILED)] {
            assert_eq!(
                device.run("reverses", (1, 256), 0, false, &[at, meets]),
                expected,
                "{seed}"
            );
        }
    }
}
