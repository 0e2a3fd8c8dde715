//! What the emulated device must find in kernels that are wrong, and must not find in the same kernels put right.
#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

#[macro_use]
mod device;

use std::collections::BTreeSet;
use std::ffi::{CStr, c_char, c_void};

use device::{Device, ILLEGAL_ADDRESS, LAUNCH_FAILED, LAUNCH_TIMEOUT, SUCCESS};
use hoist_cuda_emulator::Emulator;

fn device(settings: &str) -> Option<Device> {
    Device::new(hoist_cuda_emulator::load(), settings)
}

fn emulator() -> &'static Emulator {
    hoist_cuda_emulator::load().expect("an emulator")
}

#[test]
fn a_deadlock_is_reported_with_the_places_where_threads_wait() {
    let Some(device) = device("seed=3") else { return };
    let at = device.memory(&[0u32]);
    assert_eq!(
        device.run("waits_for_nobody", (1, 64), 0, false, &[at]),
        LAUNCH_TIMEOUT
    );
    let fault = emulator().report().fault;
    for part in [
        "`waits_for_nobody`",
        "deadlock",
        "64 threads",
        "1 in barrier_wait at faulty.cu:",
        "63 in meet_block",
    ] {
        assert!(fault.contains(part), "{fault}");
    }
}

#[test]
fn an_access_past_an_allocation_or_after_its_end_is_illegal() {
    let Some(device) = device("") else { return };
    let at = device.memory(&[0u32; 128]);
    assert_eq!(device.run("writes_at", (1, 128), 0, false, &[at, 0]), SUCCESS);
    assert_eq!(
        device.run("writes_at", (1, 1), 0, false, &[at, 128]),
        ILLEGAL_ADDRESS
    );
    let fault = emulator().report().fault;
    assert!(
        fault.contains("`writes_at`") && fault.contains("thread 0"),
        "{fault}"
    );
    // Every later call says so, too.
    let (mut free, mut total) = (0usize, 0usize);
    let code = call!(device, cuMemGetInfo_v2(*mut usize = &raw mut free, *mut usize = &raw mut total));
    assert_eq!(code, ILLEGAL_ADDRESS);
    drop(device);
    let Some(device) = self::device("") else { return };
    let at = device.memory(&[0u32; 128]);
    assert_eq!(call!(device, cuMemFree_v2(u64 = at)), SUCCESS);
    assert_eq!(
        device.run("writes_at", (1, 1), 0, false, &[at, 0]),
        ILLEGAL_ADDRESS
    );
}

#[test]
fn a_copy_that_leaves_its_allocation_is_illegal() {
    let Some(device) = device("") else { return };
    let at = device.memory(&[0u8; 100]);
    let mut out = [0u8; 101];
    let mut copy = |n: usize| {
        call!(device, cuMemcpyDtoHAsync_v2(
            *mut c_void = out.as_mut_ptr().cast(), u64 = at, usize = n, *mut c_void = std::ptr::null_mut()))
    };
    assert_eq!((copy(100), copy(101)), (SUCCESS, ILLEGAL_ADDRESS));
}

#[test]
fn a_missing_barrier_shows_in_the_result_under_some_seed() {
    for meets in [1u64, 0] {
        let mut found = BTreeSet::new();
        for seed in 0..12 {
            let Some(device) = device(&format!("seed={seed}")) else {
                return;
            };
            let words: Vec<u32> = (0..256).collect();
            let at = device.memory(&words);
            assert_eq!(device.run("reverses", (1, 256), 0, false, &[at, meets]), SUCCESS);
            found.insert(device.read::<u32>(at, 256));
        }
        let right: Vec<u32> = (0..256).rev().collect();
        assert_eq!(
            found == BTreeSet::from([right]),
            meets == 1,
            "{} results",
            found.len()
        );
    }
}

#[test]
fn copies_that_are_not_waited_for_arrive_late_under_some_seed() {
    for (kernel, block, shared, n) in [
        ("copies_in_bulk", 64, 1024, 1024),
        ("copies_words", 128, 1024, 256),
    ] {
        for waits in [1u64, 0] {
            let words: Vec<u32> = (0..n).map(|i| i * 77 + 1).collect();
            let mut right = 0;
            for seed in 0..12 {
                let Some(device) = device(&format!("seed={seed}")) else {
                    return;
                };
                let (from, to) = (device.memory(&words), device.memory(&vec![0u32; n as usize]));
                let code = device.run(kernel, (1, block), shared, false, &[from, to, waits]);
                assert_eq!(code, SUCCESS, "{}", emulator().report().fault);
                right += usize::from(device.read::<u32>(to, n as usize) == words);
            }
            assert_eq!(right == 12, waits == 1, "{kernel}: {right} of 12 are right");
        }
    }
}

#[test]
fn misuse_of_barriers_and_warps_fails_the_launch() {
    for (kernel, threads, word) in [
        ("arrives_too_often", 32, "more of them than the barrier counts"),
        ("lanes_part", 32, "another lane of its warp"),
        ("lanes_part", 8, "not whole"),
    ] {
        let Some(device) = device("seed=1") else { return };
        let at = device.memory(&[0u32; 64]);
        assert_eq!(device.run(kernel, (1, threads), 0, false, &[at]), LAUNCH_FAILED);
        let fault = emulator().report().fault;
        assert!(fault.contains(word) && fault.contains(kernel), "{fault}");
    }
}

#[test]
fn blocks_of_a_cooperative_grid_run_at_once_and_only_as_many_as_fit() {
    let Some(device) = device("multiprocessors=3") else {
        return;
    };
    let (arrived, word) = (device.memory(&[0u32]), device.memory(&[1u32]));
    assert_eq!(
        device.run("grid_meets", (3, 64), 0, true, &[arrived, word, 10]),
        SUCCESS
    );
    let expected = (0..10u32).fold(1u32, |x, i| x.wrapping_mul(3).wrapping_add(i % 3));
    assert_eq!(device.read::<u32>(word, 1), [expected]);
    drop(device);
    // Not as a cooperative one: the first block waits for others that have not begun.
    let Some(device) = self::device("") else { return };
    let (arrived, word) = (device.memory(&[0u32]), device.memory(&[1u32]));
    assert_eq!(
        device.run("grid_meets", (2, 64), 0, false, &[arrived, word, 1]),
        LAUNCH_TIMEOUT
    );
}

#[test]
fn matrix_instructions_multiply_as_their_layout_says() {
    let Some(device) = device("seed=9") else { return };
    let byte = |i: u32| (i.wrapping_mul(2654435761) >> 24) as i8;
    let a: Vec<i8> = (0..512).map(byte).collect();
    let b: Vec<i8> = (1000..1256).map(byte).collect();
    let (pa, pb, pd) = (device.memory(&a), device.memory(&b), device.memory(&[0i32; 128]));
    assert_eq!(
        device.run("multiplies", (1, 32), 0, false, &[pa, pb, pd]),
        SUCCESS
    );
    let expected: Vec<i32> = (0..128)
        .map(|i| {
            (0..32)
                .map(|k| i32::from(a[i / 8 * 32 + k]) * i32::from(b[k * 8 + i % 8]))
                .sum()
        })
        .collect();
    assert_eq!(device.read::<i32>(pd, 128), expected);
}

#[test]
fn half_floats_convert_as_ieee_says() {
    let Some(device) = device("") else { return };
    let (wide, back) = (
        device.memory(&vec![0f32; 1 << 16]),
        device.memory(&vec![0u32; 1 << 16]),
    );
    assert_eq!(device.run("widens", (256, 256), 0, false, &[wide, back]), SUCCESS);
    let (wide, back) = (
        device.read::<f32>(wide, 1 << 16),
        device.read::<u32>(back, 1 << 16),
    );
    for i in 0..1u32 << 16 {
        let (sign, exponent, fraction) = (i >> 15, i >> 10 & 31, i & 0x3ff);
        let expected = match exponent {
            0 => f64::from(fraction) * 2f64.powi(-24),
            31 if fraction == 0 => f64::INFINITY,
            31 => f64::NAN,
            _ => f64::from(fraction | 0x400) * 2f64.powi(exponent as i32 - 25),
        } * if sign == 1 { -1.0 } else { 1.0 };
        let found = f64::from(wide[i as usize]);
        assert!(
            found == expected || found.is_nan() && expected.is_nan(),
            "{i:#x}: {found}"
        );
        assert!(
            back[i as usize] == i || expected.is_nan() && back[i as usize] == 0x7fff,
            "{i:#x}"
        );
    }
    // Between neighbours: to the nearer one, and to the even one from the middle.
    let halves: Vec<f32> = (0..0x7bffu32)
        .flat_map(|i| {
            let (low, high) = (wide[i as usize], wide[i as usize + 1]);
            let middle = low + (high - low) / 2.0;
            [
                middle,
                f32::from_bits(middle.to_bits() - 1),
                f32::from_bits(middle.to_bits() + 1),
            ]
        })
        .chain([65519.0, 65520.0, 1e9])
        .collect();
    let n = halves.len() / 96 * 96;
    let (input, out) = (device.memory(&halves[..n]), device.memory(&vec![0u32; n]));
    assert_eq!(
        device.run("narrows", ((n / 96) as u32, 96), 0, false, &[input, out]),
        SUCCESS
    );
    for (i, found) in device
        .read::<u32>(out, n)
        .into_iter()
        .enumerate()
        .take(3 * 0x7bff)
    {
        let low = i as u32 / 3;
        let expected = [low + (low & 1), low, low + 1][i % 3];
        assert_eq!(found, expected, "{}", halves[i]);
    }
}

#[test]
fn planned_failures_come_when_they_were_asked_for_and_are_counted() {
    let Some(device) = device("fail=cuMemAlloc_v2:2:2") else {
        return;
    };
    let mut at = 0u64;
    let mut codes = Vec::new();
    for _ in 0..3 {
        codes.push(call!(device, cuMemAlloc_v2(*mut u64 = &raw mut at, usize = 64)));
    }
    assert_eq!(codes, [0, 2, 0]);
    let report = emulator().report();
    assert_eq!(
        (report.count("calls.cuMemAlloc_v2"), report.count("allocations")),
        (3, 2)
    );
    let mut text = std::ptr::null();
    assert_eq!(
        call!(device, cuGetErrorString(i32 = 2, *mut *const c_char = &raw mut text)),
        SUCCESS
    );
    // SAFETY: the driver gave a static string.
    assert_eq!(unsafe { CStr::from_ptr(text) }, c"out of memory");
}
