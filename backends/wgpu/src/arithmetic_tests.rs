//! The integer f32 arithmetic of the kernels on a device, against the processor's.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::Write;

use hoist_backend::Error;
use wgpu::BufferUsages;

use crate::device::Gpu;
use crate::pipelines::Bindings;
use crate::residency::read_mapped;
use crate::shaders;

const KERNEL: &str = "
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let at = 4u * id.x;
    let a = work[at];
    let b = work[at + 1u];
    let c = work[at + 2u];
    var y = 0u;
    switch param(0u) {
        case 0u: { y = f_add(a, b); }
        case 1u: { y = f_mul(a, b); }
        case 2u: { y = f_fma(a, b, c); }
        case 3u: { y = f_div(a, b); }
        case 4u: { y = f_sqrt(a); }
        case 5u: { y = f_exp(a); }
        case 6u: { y = f_tanh(a); }
        case 7u: { y = f32_to_f16(a); }
        case 8u: { y = f16_to_f32(a & 0xffffu); }
        case 9u: { y = f_finish(vec2<u32>(a, bitcast<u32>(bitcast<i32>(b) >> 1u)), bitcast<i32>(c % 301u) - 150); }
        default: { y = f_from_int(bitcast<i32>(a) >> 8u); }
    }
    work[at + 3u] = y;
}
";

/// The first adapter. Without one the test is skipped, and says so; where CI is set that is a failure.
pub(crate) fn gpu() -> Option<Gpu> {
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(Error::Unavailable { reason, .. }) => {
            assert!(
                std::env::var_os("CI").is_none_or(|v| v.is_empty() || v == "false"),
                "no adapter: {reason}"
            );
            // Past the capture of output, so that it is seen.
            let _ = writeln!(std::io::stderr(), "SKIPPED: no adapter: {reason}");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Triples that go through every case: ordinary numbers, subnormals, near cancellations, ties, specials.
fn operands(n: usize) -> Vec<[u32; 4]> {
    let mut state = 7;
    let mut next = || splitmix(&mut state) as u32;
    let specials = [
        0,
        0x8000_0000,
        1,
        0x8000_0001,
        0x007f_ffff,
        0x0080_0000,
        0x3f80_0000,
        0xbf80_0000,
        0x3f7f_ffff,
        0x7f7f_ffff,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0x477f_efff,
        0x477f_f000,
        0x3300_0000,
        0x3300_0001,
    ];
    (0..n)
        .map(|i| {
            let (a, b, c) = (next(), next(), next());
            let near = |x: u32, r: u32| x & 0x80ff_ffff | (118 + r % 20) << 23;
            match i % 8 {
                0 => [a, b, c, 0],
                1 => [near(a, b), near(b, c), near(c, a), 0],
                // c close to −a·b.
                2 => {
                    let (x, y) = (near(a, 1), near(b, 2));
                    let product = f32::from_bits(x) * f32::from_bits(y);
                    [x, y, (-product).to_bits().wrapping_add(c % 5).wrapping_sub(2), 0]
                }
                // a close to −b.
                3 => [a, (a ^ 0x8000_0000).wrapping_add(b % 9).wrapping_sub(4), c, 0],
                // Few bits: ties.
                4 => [
                    near(a, b) & 0xffff_f000,
                    near(b, c) & 0xfff0_0000,
                    near(c, a) & 0xffff_ff00,
                    0,
                ],
                5 => [a & 0x80ff_ffff, b & 0xc0ff_ffff, c & 0x80ff_ffff, 0],
                6 => [
                    specials[a as usize % specials.len()],
                    specials[b as usize % specials.len()],
                    specials[c as usize % specials.len()],
                    0,
                ],
                // What exp and tanh are asked for.
                _ => [near(a, b), specials[b as usize % specials.len()], near(c, a), 0],
            }
        })
        .collect()
}

fn exp(x: f32) -> f32 {
    let f = f32::from_bits;
    let x = if -104.0 > x { -104.0 } else { x };
    let x = if f(0x42b1_7217) < x { f(0x42b1_7217) } else { x };
    let rounded = x.mul_add(f(0x3fb8_aa3b), 12_582_912.0);
    let n = rounded - 12_582_912.0;
    let r = n.mul_add(f(0x3102_e308), n.mul_add(f(0xbf31_7218), x));
    let terms = [0x3ab5_11a9, 0x3c09_1d36, 0x3d2a_ac7a, 0x3e2a_aa48, 0x3eff_fffe].map(f);
    let p = terms[1..].iter().fold(terms[0], |p, t| p.mul_add(r, *t));
    let y = (r * r).mul_add(p, r) + 1.0;
    let n = n as i32;
    let power = |n: i32| f(((n + 127) as u32) << 23);
    (y * power(n >> 1)) * power(n - (n >> 1))
}

fn tanh(x: f32) -> f32 {
    let f = f32::from_bits;
    let a = x.abs();
    let t = if a < 0.625 {
        let z = a * a;
        let terms = [0xbbb7_0d0c, 0x3ca8_380f, 0xbd5b_fd48, 0x3e08_829e, 0xbeaa_aa95].map(f);
        let q = terms[1..].iter().fold(terms[0], |q, t| q.mul_add(z, *t));
        (a * z).mul_add(q, a)
    } else {
        1.0 - 2.0 / (exp(a + a) + 1.0)
    };
    t.copysign(x)
}

fn expected(op: u32, [a, b, c, _]: [u32; 4]) -> u32 {
    let [x, y, z] = [a, b, c].map(f32::from_bits);
    let result = match op {
        0 => x + y,
        1 => x * y,
        2 => x.mul_add(y, z),
        3 => x / y,
        4 => x.sqrt(),
        5 => exp(x),
        6 => tanh(x),
        7 => {
            let h = half::f16::from_f32(x);
            return if h.is_finite() {
                h.to_bits().into()
            } else {
                u32::MAX
            };
        }
        8 => half::f16::from_bits(a as u16).to_f32(),
        9 => {
            let high = (b as i32) >> 1;
            let acc = (i64::from(high) << 32) | i64::from(a);
            let exponent = (c % 301) as i32 - 150;
            let power = f64::from_bits(((1023 + exponent) as u64) << 52);
            (f64::from(acc as f32) * power) as f32
        }
        _ => ((a as i32) >> 8) as f32,
    };
    result.to_bits()
}

#[test]
fn integer_arithmetic_is_ieee_754s() {
    let Some(gpu) = gpu() else { return };
    let pipelines = &gpu.pipelines;
    let source = format!("{}\n{KERNEL}", shaders::arithmetic());
    let pipeline = pipelines.compile(&gpu, source, "main").unwrap();
    let operands = operands(1 << 16);
    let nbytes = 16 * operands.len() as u64;
    let storage = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
    let work = gpu.buffer("operands", nbytes, storage).unwrap();
    let spare: Vec<_> = (0..6)
        .map(|_| gpu.buffer("spare", 256, storage).unwrap())
        .collect();
    let reader = gpu
        .buffer("reader", nbytes, BufferUsages::MAP_READ | BufferUsages::COPY_DST)
        .unwrap();
    let parameters = gpu
        .buffer("parameters", 256, BufferUsages::UNIFORM | BufferUsages::COPY_DST)
        .unwrap();
    for op in 0..11u32 {
        gpu.queue.write_buffer(&work, 0, bytemuck::cast_slice(&operands));
        gpu.queue.write_buffer(&parameters, 0, &op.to_le_bytes());
        let bindings = pipelines
            .bind(
                &gpu,
                &Bindings {
                    parameters: (&parameters, 0),
                    batch: (&spare[0], 0, 256),
                    work: &work,
                    weights: &spare[1],
                    second: &spare[2],
                    tables: &spare[3],
                    cache: &spare[4],
                    status: &spare[5],
                },
            )
            .unwrap();
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &bindings, &[]);
        pass.dispatch_workgroups(operands.len() as u32 / 64, 1, 1);
        drop(pass);
        encoder.copy_buffer_to_buffer(&work, 0, &reader, 0, nbytes);
        gpu.queue.submit([encoder.finish()]);
        let mut found = Vec::new();
        read_mapped(&gpu, &reader, nbytes, |bytes| {
            found.extend(bytes.as_chunks::<16>().0.iter().map(|r| {
                let [.., a, b, c, d] = *r;
                u32::from_le_bytes([a, b, c, d])
            }));
        })
        .unwrap();
        for (operands, found) in operands.iter().zip(found) {
            let expected = expected(op, *operands);
            let both_nan = f32::from_bits(expected).is_nan() && f32::from_bits(found).is_nan();
            // A NaN's f16 is refused, like an infinity's.
            assert!(
                expected == found || (both_nan && op != 7),
                "op {op} of {operands:08x?}: expected {expected:#010x}, found {found:#010x}"
            );
        }
    }
}
