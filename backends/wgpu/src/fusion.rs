//! Which steps of a program run as one launch. What is fused gives the same bits: values in between are only kept from
//! memory, and only where nothing else reads them.

use std::ops::Range;

use hoist_backend::{ResolvedProgram, Step, StepKind};

/// Most matrices of one launch.
pub(crate) const MOST_PARTS: usize = 6;

/// Steps, by their places, that run together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fused {
    /// A step as it is.
    Alone(usize),
    /// RmsNorm, whose result is added to something.
    NormAdd { norm: usize, add: usize },
    /// RmsNorm, and Quantise of its result.
    NormQuantise { norm: usize, quantise: usize },
    /// Products of one input.
    Products(Range<usize>),
    /// A product that is added to something.
    ProductAdd { product: usize, add: usize },
    /// An activation and the multiplication by what it gates.
    Gate { activation: usize, mul: usize },
    /// The same, and Quantise of its result.
    GateQuantise {
        activation: usize,
        mul: usize,
        quantise: usize,
    },
    /// Rope of queries and of keys, and StoreKv.
    RopeStoreKv { query: usize, store: usize },
}

/// What a step reads and writes.
fn operands(kind: &StepKind) -> (Vec<usize>, Vec<usize>) {
    match *kind {
        StepKind::Embed { out, .. } | StepKind::EmbedPosition { out, .. } => (vec![], vec![out]),
        StepKind::RmsNorm { input, out, .. }
        | StepKind::LayerNorm { input, out, .. }
        | StepKind::Quantise { input, out, .. }
        | StepKind::MatMul { input, out, .. }
        | StepKind::Activation { input, out, .. }
        | StepKind::Scale { input, out, .. }
        | StepKind::SoftCap { input, out, .. } => (vec![input], vec![out]),
        StepKind::Rope { value, .. } => (vec![value], vec![value]),
        StepKind::StoreKv { key, value, .. } => (vec![key, value], vec![]),
        StepKind::Attention { query, out, .. } => (vec![query], vec![out]),
        StepKind::Mul { a, b, out } | StepKind::Add { a, b, out } => (vec![a, b], vec![out]),
        StepKind::RouterTopK {
            logits,
            experts,
            weights,
            ..
        } => (vec![logits], vec![experts, weights]),
        StepKind::ExpertMatMul {
            input, experts, out, ..
        } => (vec![input, experts], vec![out]),
        StepKind::WeightedSum {
            input,
            experts,
            weights,
            out,
        } => (vec![input, experts, weights], vec![out]),
    }
}

struct Fuser<'a> {
    program: &'a ResolvedProgram,
    /// Where the part of the program in hand ends.
    end: usize,
}

impl Fuser<'_> {
    fn step(&self, at: usize) -> Option<&StepKind> {
        self.program.steps[..self.end].get(at).map(|s| &s.kind)
    }

    /// Whether nothing reads `value` after step `last`, as it is then.
    fn ends_with(&self, last: usize, value: usize) -> bool {
        // A step's own output may be the value: it is another one from then on.
        let overwritten = |step: &Step| operands(&step.kind).1.contains(&value);
        if self.program.steps.get(last).is_some_and(overwritten) {
            return true;
        }
        if value == self.program.logits {
            return false;
        }
        for step in self.program.steps.iter().skip(last + 1) {
            let (reads, writes) = operands(&step.kind);
            if reads.contains(&value) {
                return false;
            }
            if writes.contains(&value) {
                return true;
            }
        }
        true
    }

    /// Of an addition at `at` of `value` and something else, which nothing reads later: the other one.
    fn added(&self, at: usize, value: usize) -> Option<usize> {
        match self.step(at) {
            Some(StepKind::Add { a, b, .. }) if a != b && (*a == value || *b == value) => {
                let other = if *a == value { *b } else { *a };
                self.ends_with(at, value).then_some(other)
            }
            _ => None,
        }
    }

    fn quantised(&self, at: usize, value: usize) -> bool {
        matches!(self.step(at), Some(StepKind::Quantise { input, .. }) if *input == value)
    }

    /// What starts at `at`.
    fn next(&self, at: usize) -> Fused {
        let steps = &self.program.steps;
        match steps[at].kind {
            StepKind::RmsNorm { input, out, .. } => {
                if let Some(StepKind::Add { out: sum, .. }) = self.step(at + 1)
                    && self.added(at + 1, out).is_some()
                    // Other threads still read the input.
                    && *sum != input
                {
                    return Fused::NormAdd {
                        norm: at,
                        add: at + 1,
                    };
                }
                if self.quantised(at + 1, out) {
                    return Fused::NormQuantise {
                        norm: at,
                        quantise: at + 1,
                    };
                }
                Fused::Alone(at)
            }
            StepKind::MatMul { input, out, .. } => {
                if let Some(StepKind::Add { out: sum, .. }) = self.step(at + 1)
                    && self.added(at + 1, out).is_some()
                    && *sum != input
                {
                    return Fused::ProductAdd {
                        product: at,
                        add: at + 1,
                    };
                }
                let mut outs = vec![out];
                while let Some(StepKind::MatMul { input: x, out, .. }) = self.step(at + outs.len())
                    && *x == input
                    && !outs.contains(out)
                    && outs.len() < MOST_PARTS
                {
                    outs.push(*out);
                }
                Fused::Products(at..at + outs.len())
            }
            StepKind::Activation { input, out, .. } => {
                let Some(&StepKind::Mul { a, b, out: product }) = self.step(at + 1) else {
                    return Fused::Alone(at);
                };
                let gates = (a == out) != (b == out) && product != input && self.ends_with(at + 1, out);
                if !gates {
                    return Fused::Alone(at);
                }
                let (activation, mul) = (at, at + 1);
                if self.quantised(at + 2, product) && self.ends_with(at + 2, product) {
                    return Fused::GateQuantise {
                        activation,
                        mul,
                        quantise: at + 2,
                    };
                }
                Fused::Gate { activation, mul }
            }
            StepKind::Rope {
                value: query,
                table,
                style,
                head_dim,
                n_rot,
            } => {
                let Some(StepKind::Rope {
                    value: turned,
                    table: t,
                    style: s,
                    head_dim: d,
                    n_rot: n,
                }) = self.step(at + 1)
                else {
                    return Fused::Alone(at);
                };
                let Some(StepKind::StoreKv { key, value, .. }) = self.step(at + 2) else {
                    return Fused::Alone(at);
                };
                let alike = (table, style, head_dim, n_rot) == (*t, *s, *d, *n) && n_rot > 0;
                let distinct = query != *key && query != *value && key != value;
                if alike && distinct && key == turned && self.ends_with(at + 2, *key) {
                    return Fused::RopeStoreKv {
                        query: at,
                        store: at + 2,
                    };
                }
                Fused::Alone(at)
            }
            _ => Fused::Alone(at),
        }
    }
}

impl Fused {
    /// How many steps it is.
    fn len(&self) -> usize {
        match self {
            Fused::Alone(_) => 1,
            Fused::NormAdd { .. }
            | Fused::NormQuantise { .. }
            | Fused::ProductAdd { .. }
            | Fused::Gate { .. } => 2,
            Fused::Products(range) => range.len(),
            Fused::GateQuantise { .. } | Fused::RopeStoreKv { .. } => 3,
        }
    }
}

/// What runs for the steps of a part of a program, in order.
pub(crate) fn fuse(program: &ResolvedProgram, part: Range<usize>) -> Vec<Fused> {
    let fuser = Fuser {
        program,
        end: part.end,
    };
    let mut fused = Vec::new();
    let mut at = part.start;
    while at < part.end {
        let next = fuser.next(at);
        at += next.len();
        fused.push(next);
    }
    fused
}

#[cfg(test)]
mod tests {
    use super::*;
    use hoist_backend::{ActivationKind, OpName};

    fn program(kinds: Vec<StepKind>, tail: usize) -> ResolvedProgram {
        let steps = kinds.into_iter().map(|kind| Step {
            layer: Some(0),
            op: OpName::Add,
            kind,
        });
        ResolvedProgram {
            steps: steps.collect(),
            tail,
            carried: vec![],
            vocab: 32,
            logits: 9,
            multiplied: vec![],
        }
    }

    fn norm(input: usize, out: usize) -> StepKind {
        StepKind::RmsNorm {
            input,
            weight: 0,
            eps: 1e-5,
            out,
        }
    }

    fn quantise(input: usize, out: usize) -> StepKind {
        StepKind::Quantise { input, cols: 32, out }
    }

    fn product(input: usize, out: usize) -> StepKind {
        StepKind::MatMul {
            input,
            weight: 0,
            bias: None,
            out,
        }
    }

    fn add(a: usize, b: usize, out: usize) -> StepKind {
        StepKind::Add { a, b, out }
    }

    fn fused(kinds: Vec<StepKind>) -> Vec<Fused> {
        let n = kinds.len();
        fuse(&program(kinds, n), 0..n)
    }

    #[test]
    fn products_of_one_input_run_together() {
        let all = fused(vec![
            norm(0, 1),
            quantise(1, 2),
            product(2, 3),
            product(2, 4),
            product(3, 5),
        ]);
        assert_eq!(
            all,
            [
                Fused::NormQuantise { norm: 0, quantise: 1 },
                Fused::Products(2..4),
                Fused::Products(4..5)
            ]
        );
        // A result that is written twice is written in order.
        assert_eq!(
            fused(vec![product(2, 3), product(2, 3)]),
            [Fused::Products(0..1), Fused::Products(1..2)]
        );
    }

    #[test]
    fn a_sum_is_fused_only_if_nothing_else_reads_the_summand() {
        let one = Fused::ProductAdd { product: 0, add: 1 };
        assert_eq!(fused(vec![product(2, 3), add(0, 3, 0)])[0], one);
        assert_eq!(fused(vec![product(2, 3), add(3, 0, 3), norm(3, 4)])[0], one);
        let read_again = fused(vec![product(2, 3), add(0, 3, 0), norm(3, 4)]);
        assert_eq!(read_again.len(), 3);
        assert_eq!(fused(vec![product(2, 3), add(3, 3, 0)]).len(), 2);
        // Logits are read by whoever asked.
        assert_eq!(fused(vec![product(2, 9), add(0, 9, 0)]).len(), 2);
        // Other workgroups still read the input.
        assert_eq!(fused(vec![product(2, 3), add(0, 3, 2)]).len(), 2);
        assert_eq!(fused(vec![norm(2, 3), add(0, 3, 2)]).len(), 2);
    }

    #[test]
    fn a_gate_is_fused_only_if_nothing_else_reads_what_is_between() {
        let gate = |out, product| {
            vec![
                StepKind::Activation {
                    input: 0,
                    kind: ActivationKind::Silu,
                    out,
                },
                StepKind::Mul {
                    a: out,
                    b: 1,
                    out: product,
                },
            ]
        };
        let with = |rest: Vec<StepKind>| fused(gate(2, 3).into_iter().chain(rest).collect());
        assert_eq!(
            with(vec![]),
            [Fused::Gate {
                activation: 0,
                mul: 1
            }]
        );
        assert_eq!(
            with(vec![quantise(3, 4)]),
            [Fused::GateQuantise {
                activation: 0,
                mul: 1,
                quantise: 2
            }]
        );
        let product_is_read = with(vec![quantise(3, 4), norm(3, 5)]);
        assert_eq!(
            product_is_read[0],
            Fused::Gate {
                activation: 0,
                mul: 1
            }
        );
        let activation_is_read = with(vec![norm(2, 5)]);
        assert_eq!(activation_is_read.len(), 3);
    }

    #[test]
    fn nothing_is_fused_across_the_tail() {
        let kinds = vec![product(2, 3), add(0, 3, 0)];
        let program = program(kinds, 1);
        let parts = program.parts().map(|part| fuse(&program, part));
        assert_eq!(parts, [vec![Fused::Products(0..1)], vec![Fused::Alone(1)]]);
    }
}
