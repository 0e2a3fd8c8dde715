//! Operations of many tokens that one kernel does together, where nobody else reads what lies between them: a norm or a gated
//! activation, and its integers. The bits are those of the operations one by one.

use hoist_backend::{ActivationKind, ResolvedProgram, Result, Step, StepKind};

use super::workspace::Workspace;
use crate::modules::{Function, Modules};

/// Operations from one on that a kernel does together.
#[derive(Debug)]
pub(super) struct Fused {
    pub(super) function: Function,
    pub(super) kind: Kind,
    /// The last operation, which quantises into `out`.
    pub(super) last: usize,
    pub(super) cols: u32,
    pub(super) out: usize,
}

/// What is quantised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    /// An RmsNorm.
    Normed { input: usize, weight: usize, eps: f32 },
    /// An activation of one value times another.
    Gated { gate: usize, up: usize },
}

/// Whether an operation reads a value.
fn reads(kind: &StepKind, value: usize) -> bool {
    let read = |values: &[usize]| values.contains(&value);
    match *kind {
        StepKind::Embed { .. } | StepKind::EmbedPosition { .. } => false,
        StepKind::RmsNorm { input, .. }
        | StepKind::LayerNorm { input, .. }
        | StepKind::Quantise { input, .. }
        | StepKind::MatMul { input, .. }
        | StepKind::Activation { input, .. }
        | StepKind::Scale { input, .. }
        | StepKind::SoftCap { input, .. } => read(&[input]),
        StepKind::Rope { value, .. } => read(&[value]),
        StepKind::StoreKv { key, value, .. } => read(&[key, value]),
        StepKind::Attention { query, .. } => read(&[query]),
        StepKind::Mul { a, b, .. } | StepKind::Add { a, b, .. } => read(&[a, b]),
        StepKind::RouterTopK { logits, .. } => read(&[logits]),
        StepKind::ExpertMatMul { input, experts, .. } => read(&[input, experts]),
        StepKind::WeightedSum {
            input,
            experts,
            weights,
            ..
        } => read(&[input, experts, weights]),
    }
}

/// Whether an operation writes all of a value.
fn writes(kind: &StepKind, value: usize) -> bool {
    match *kind {
        StepKind::Embed { out, .. }
        | StepKind::EmbedPosition { out, .. }
        | StepKind::RmsNorm { out, .. }
        | StepKind::LayerNorm { out, .. }
        | StepKind::Quantise { out, .. }
        | StepKind::MatMul { out, .. }
        | StepKind::Attention { out, .. }
        | StepKind::Activation { out, .. }
        | StepKind::Mul { out, .. }
        | StepKind::Add { out, .. }
        | StepKind::Scale { out, .. }
        | StepKind::SoftCap { out, .. }
        | StepKind::ExpertMatMul { out, .. }
        | StepKind::WeightedSum { out, .. } => out == value,
        StepKind::RouterTopK { experts, weights, .. } => experts == value || weights == value,
        // In place, or in the cache.
        StepKind::Rope { .. } | StepKind::StoreKv { .. } => false,
    }
}

/// Whether a value is of no use to these operations.
fn unused(value: usize, after: &[Step]) -> bool {
    for step in after {
        if reads(&step.kind, value) {
            return false;
        }
        if writes(&step.kind, value) {
            return true;
        }
    }
    true
}

/// The operations that begin with the first of these and are quantised by the last that is counted: what, how many, columns
/// and the integers' value.
fn matches(steps: &[Step], width: impl Fn(usize) -> u32) -> Option<(Kind, usize, u32, usize)> {
    let kind = |at: usize| steps.get(at).map(|s| &s.kind);
    let whole = |value: usize, cols: usize| width(value) as usize == cols;
    match (kind(0)?, kind(1)?, kind(2)) {
        (
            &StepKind::RmsNorm {
                input,
                weight,
                eps,
                out: normed,
            },
            &StepKind::Quantise {
                input: quantised,
                cols,
                out,
            },
            _,
        ) if quantised == normed && whole(normed, cols) && unused(normed, &steps[2..]) => {
            // In place, the norm's input is what nobody may read.
            Some((Kind::Normed { input, weight, eps }, 2, cols as u32, out))
        }
        (
            &StepKind::Activation {
                input: gate,
                out: activated,
                ..
            },
            &StepKind::Mul { a, b, out: product },
            Some(&StepKind::Quantise {
                input: quantised,
                cols,
                out,
            }),
        ) if quantised == product && whole(product, cols) && (a == activated) != (b == activated) => {
            let up = if a == activated { b } else { a };
            let free = |value: usize| unused(value, &steps[3..]);
            // The kernel reads the gate as it was before the activation, and leaves it so.
            (free(activated) && free(product)).then_some((Kind::Gated { gate, up }, 3, cols as u32, out))
        }
        _ => None,
    }
}

/// For each operation, what begins there. `norm_cols` yields the length of a norm's weight.
pub(super) fn find(
    modules: &Modules,
    resolved: &ResolvedProgram,
    work: &Workspace,
    norm_cols: impl Fn(usize) -> Result<u64>,
) -> Result<Vec<Option<Fused>>> {
    let steps = &resolved.steps;
    let mut found = Vec::with_capacity(steps.len());
    for at in 0..steps.len() {
        let Some((kind, count, cols, out)) = matches(&steps[at..], |value| work.values[value].width) else {
            found.push(None);
            continue;
        };
        let last = at + count - 1;
        let apart = at < resolved.tail && last >= resolved.tail;
        let kernel = match kind {
            // Norms of heads have shorter weights.
            Kind::Normed { weight, .. } if norm_cols(weight)? != u64::from(cols) => None,
            Kind::Normed { .. } => Some("rms_norm_quantise"),
            Kind::Gated { .. } => match steps[at].kind {
                StepKind::Activation {
                    kind: ActivationKind::GeluTanh,
                    ..
                } => Some("gelu_tanh_quantise"),
                _ => Some("silu_quantise"),
            },
        };
        found.push(match kernel {
            Some(kernel) if !apart => Some(Fused {
                function: modules.function("prefill", kernel)?,
                kind,
                last,
                cols,
                out,
            }),
            _ => None,
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::params::{Elements, Gated, Norm, Normed, Quantise};
    use super::*;
    use crate::driver::{Context, DeviceBuffer, Stream};
    use crate::modules::{Launch, arguments};
    use hoist_backend::OpName;

    fn step(kind: StepKind) -> Step {
        Step {
            layer: None,
            op: OpName::Mul,
            kind,
        }
    }

    fn gated(after: Vec<StepKind>) -> Option<(Kind, usize, u32, usize)> {
        let first = [
            StepKind::Activation {
                input: 0,
                kind: ActivationKind::Silu,
                out: 0,
            },
            StepKind::Mul { a: 0, b: 1, out: 0 },
            StepKind::Quantise {
                input: 0,
                cols: 512,
                out: 2,
            },
        ];
        let steps: Vec<Step> = first.into_iter().chain(after).map(step).collect();
        matches(&steps, |_| 512)
    }

    #[test]
    fn a_gated_activation_that_nobody_else_reads_goes_straight_to_integers() {
        let found = Some((Kind::Gated { gate: 0, up: 1 }, 3, 512, 2));
        assert_eq!(gated(vec![]), found);
        let overwritten = StepKind::Scale {
            input: 1,
            factor: 1.0,
            out: 0,
        };
        let read = StepKind::Add { a: 3, b: 0, out: 3 };
        assert_eq!(gated(vec![overwritten, read.clone()]), found);
        assert_eq!(gated(vec![read]), None);
    }

    #[test]
    fn a_norm_that_a_router_reads_too_is_written() {
        let norm = StepKind::RmsNorm {
            input: 0,
            weight: 0,
            eps: 0.0,
            out: 1,
        };
        let quantise = |cols| StepKind::Quantise {
            input: 1,
            cols,
            out: 2,
        };
        let router = StepKind::MatMul {
            input: 1,
            weight: 1,
            bias: None,
            out: 3,
        };
        let find = |kinds: &[&StepKind]| {
            let steps: Vec<Step> = kinds.iter().map(|k| step((*k).clone())).collect();
            matches(&steps, |_| 256).map(|found| found.0)
        };
        let normed = Kind::Normed {
            input: 0,
            weight: 0,
            eps: 0.0,
        };
        assert_eq!(find(&[&norm, &quantise(256)]), Some(normed));
        assert_eq!(find(&[&norm, &quantise(256), &router]), None);
        // Several vectors of one value.
        assert_eq!(find(&[&norm, &quantise(128)]), None);
    }

    #[test]
    fn integers_are_those_of_the_operations_one_by_one() {
        // On the emulated device, where it could be built.
        if hoist_cuda_emulator::load().is_none() {
            eprintln!("no C++ compiler, so that there is no emulated device to quantise on");
            return;
        }
        let context = Context::open(0).unwrap();
        let modules = Modules::new(&context);
        let stream = Stream::new(&context).unwrap();
        let uploaded = |values: &[f32]| {
            let bytes: &[u8] = bytemuck::cast_slice(values);
            let to = DeviceBuffer::new(&context, "a test", bytes.len() as u64).unwrap();
            // SAFETY: the buffer is as long as the bytes, which stay until the stream has been waited for.
            unsafe { stream.copy_htod(to.ptr(), bytes) }.unwrap();
            stream.synchronize().unwrap();
            to
        };
        // The second has a last segment of half the length.
        for (cols, vectors) in [(512u32, 9u32), (1152, 3)] {
            let n = cols * vectors;
            let wave = |step: f32| -> Vec<f32> { (0..n).map(|i| (i as f32 * step).sin() * 5.0).collect() };
            let (a, b) = (uploaded(&wave(0.37)), uploaded(&wave(1.91)));
            let (c, fault) = (uploaded(&wave(0.0)), uploaded(&[-1.0]));
            let segments = cols.div_ceil(256);
            let nbytes = u64::from(segments * vectors) * super::super::params::SEGMENT_BYTES;
            let run =
                |file: &str, kernel: &'static str, blocks: u32, threads: u32, arguments: &mut [*mut _]| {
                    let function = modules.function(file, kernel).unwrap();
                    // SAFETY: the arguments are the struct that the kernel takes, whose buffers are as long as it says.
                    unsafe { function.launch(&stream, Launch::linear(blocks, threads), arguments) }.unwrap();
                };
            let downloaded = |from: &DeviceBuffer| {
                let mut bytes = vec![0u8; nbytes as usize];
                // SAFETY: as long as the buffer; waited for below.
                unsafe { stream.copy_dtoh(&mut bytes, from.ptr()) }.unwrap();
                stream.synchronize().unwrap();
                bytes
            };
            let warps = (segments * vectors).div_ceil(4);
            let [one, all] = [(); 2].map(|()| DeviceBuffer::new(&context, "integers", nbytes).unwrap());
            let quantise = Quantise {
                x: c.ptr(),
                out: one.ptr(),
                fault: fault.ptr(),
                step: 0,
                cols,
                segments,
                vectors,
            };
            let norm = Norm {
                x: a.ptr(),
                weight: b.ptr(),
                bias: 0,
                y: c.ptr(),
                n: cols,
                eps: 1e-5,
            };
            let normed = Normed {
                x: a.ptr(),
                weight: b.ptr(),
                out: all.ptr(),
                fault: fault.ptr(),
                step: 0,
                cols,
                segments,
                eps: 1e-5,
            };
            run("decode", "rms_norm", vectors, 256, &mut arguments![norm]);
            run("decode", "quantise", warps, 128, &mut arguments![quantise]);
            run(
                "prefill",
                "rms_norm_quantise",
                vectors,
                256,
                &mut arguments![normed],
            );
            let expected = downloaded(&one);
            assert!(expected == downloaded(&all) && expected.iter().any(|b| *b != 0));
            for (activation, gated) in [
                ("elements_silu", "silu_quantise"),
                ("elements_gelu_tanh", "gelu_tanh_quantise"),
            ] {
                let elements = |a: u64, b: u64| Elements {
                    a,
                    b,
                    out: c.ptr(),
                    n: n.into(),
                    factor: 0.0,
                };
                let (activate, multiply) = (elements(a.ptr(), 0), elements(c.ptr(), b.ptr()));
                let params = Gated {
                    gate: a.ptr(),
                    up: b.ptr(),
                    out: all.ptr(),
                    fault: fault.ptr(),
                    step: 0,
                    cols,
                    segments,
                    vectors,
                };
                run("decode", activation, 4, 256, &mut arguments![activate]);
                run("decode", "elements_mul", 4, 256, &mut arguments![multiply]);
                run("decode", "quantise", warps, 128, &mut arguments![quantise]);
                run("prefill", gated, warps, 128, &mut arguments![params]);
                assert!(downloaded(&one) == downloaded(&all), "{gated}");
            }
        }
    }
}
