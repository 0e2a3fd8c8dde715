//! What kernels take: twins of the structs in `kernels/decode.cu`, `kernels/matmul.cu` and `kernels/prefill*.cu*`.

/// One token of a batch.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Row {
    pub(super) token: u32,
    pub(super) sequence: u32,
    pub(super) position: u32,
    pub(super) wanted: u32,
}

/// Bytes of a quantised segment of an activation vector.
pub(super) const SEGMENT_BYTES: u64 = 304;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Embed {
    pub(super) weight: u64,
    pub(super) out: u64,
    pub(super) rows: u64,
    pub(super) row_bytes: u64,
    pub(super) cols: u32,
    pub(super) by_position: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Norm {
    pub(super) x: u64,
    pub(super) weight: u64,
    pub(super) bias: u64,
    pub(super) y: u64,
    pub(super) n: u32,
    pub(super) eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Quantise {
    pub(super) x: u64,
    pub(super) out: u64,
    pub(super) fault: u64,
    pub(super) step: u32,
    pub(super) cols: u32,
    pub(super) segments: u32,
    pub(super) vectors: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct MatMul {
    pub(super) weight: u64,
    pub(super) exponents: u64,
    pub(super) x: u64,
    pub(super) bias: u64,
    pub(super) y: u64,
    pub(super) experts: u64,
    pub(super) fault: u64,
    pub(super) row_bytes: u64,
    pub(super) matrix_bytes: u64,
    pub(super) step: u32,
    pub(super) rows: u32,
    pub(super) cols: u32,
    pub(super) tokens: u32,
    pub(super) choices: u32,
    pub(super) shared: u32,
}

/// Of `kernels/prefill.cu`: where a quantised vector goes; 0 where a form is not wanted. Forms in the order of their tiles.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tiles {
    pub(super) tiles: [u64; 3],
    pub(super) vector_exponents: [u64; 3],
}

/// Of `kernels/prefill.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Integers {
    pub(super) out: u64,
    pub(super) tiles: Tiles,
    pub(super) fault: u64,
    pub(super) step: u32,
    pub(super) cols: u32,
    pub(super) segments: u32,
    pub(super) tokens: u32,
}

/// Of `kernels/prefill.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Normed {
    pub(super) x: u64,
    pub(super) plus: u64,
    pub(super) sum: u64,
    pub(super) weight: u64,
    pub(super) to: Integers,
    pub(super) eps: f32,
}

/// Of `kernels/prefill.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Gated {
    pub(super) gate: u64,
    pub(super) up: u64,
    pub(super) to: Integers,
}

/// Of `kernels/prefill.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Merged {
    pub(super) attention: Attention,
    pub(super) to: Integers,
}

/// Of `kernels/prefill.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Turned {
    pub(super) query: Rope,
    pub(super) key: Rope,
    pub(super) store: Store,
}

/// Of `kernels/prefill.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Pack {
    pub(super) x: u64,
    pub(super) tiles: Tiles,
    pub(super) segments: u32,
    pub(super) tokens: u32,
}

/// Of `kernels/prefill.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiled {
    pub(super) weight: u64,
    pub(super) exponents: u64,
    pub(super) x: u64,
    pub(super) vector_exponents: u64,
    pub(super) bias: u64,
    pub(super) y: u64,
    pub(super) fault: u64,
    pub(super) row_bytes: u64,
    pub(super) step: u32,
    pub(super) rows: u32,
    pub(super) segments: u32,
    pub(super) tokens: u32,
}

/// `Parted` of `kernels/prefill_k.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Parted {
    pub(super) own: u32,
    pub(super) number: u32,
    pub(super) sums: u64,
    pub(super) handed: u64,
}

/// Of `kernels/prefill_parted.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct PartedTiled {
    pub(super) product: Tiled,
    pub(super) parted: Parted,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct FloatMatMul {
    pub(super) weight: u64,
    pub(super) x: u64,
    pub(super) bias: u64,
    pub(super) y: u64,
    pub(super) experts: u64,
    pub(super) matrix_elements: u64,
    pub(super) rows: u32,
    pub(super) cols: u32,
    pub(super) tokens: u32,
    pub(super) choices: u32,
    pub(super) shared: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Rope {
    pub(super) value: u64,
    pub(super) table: u64,
    pub(super) rows: u64,
    pub(super) width: u32,
    pub(super) head_dim: u32,
    pub(super) n_rot: u32,
    pub(super) half_split: u32,
}

/// One layer's keys and values.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct CacheLayer {
    pub(super) base: u64,
    pub(super) kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) padded: u32,
    pub(super) positions: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Store {
    pub(super) cache: CacheLayer,
    pub(super) key: u64,
    pub(super) value: u64,
    pub(super) rows: u64,
    pub(super) fault: u64,
    pub(super) step: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Attention {
    pub(super) cache: CacheLayer,
    pub(super) query: u64,
    pub(super) out: u64,
    pub(super) rows: u64,
    pub(super) sums: u64,
    pub(super) partial: u64,
    pub(super) first_token: u32,
    pub(super) heads: u32,
    pub(super) splits: u32,
    /// 0: none.
    pub(super) window: u32,
    pub(super) scale: f32,
    pub(super) cap: f32,
    pub(super) capped: u32,
    pub(super) tokens: u32,
    pub(super) staged: u32,
    pub(super) unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Elements {
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) out: u64,
    pub(super) n: u64,
    pub(super) factor: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Router {
    pub(super) logits: u64,
    pub(super) experts: u64,
    pub(super) weights: u64,
    pub(super) n: u32,
    pub(super) k: u32,
    pub(super) normalise: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct WeightedSum {
    pub(super) x: u64,
    pub(super) experts: u64,
    pub(super) weights: u64,
    pub(super) out: u64,
    pub(super) k: u32,
    pub(super) n: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Gather {
    pub(super) value: u64,
    pub(super) kept: u64,
    pub(super) token_bytes: u64,
    pub(super) count: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct ArgMax {
    pub(super) logits: u64,
    pub(super) parts: u64,
    pub(super) out: u64,
    pub(super) fault: u64,
    pub(super) step: u32,
    pub(super) vocab: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_kernels() {
        // The kernels assert the same numbers.
        assert_eq!(size_of::<Row>(), 16);
        assert_eq!(size_of::<Embed>(), 40);
        assert_eq!(size_of::<Norm>(), 40);
        assert_eq!(size_of::<Quantise>(), 40);
        assert_eq!(size_of::<MatMul>(), 96);
        assert_eq!(size_of::<Tiles>(), 48);
        assert_eq!(size_of::<Integers>(), 80);
        assert_eq!(size_of::<Normed>(), 120);
        assert_eq!(size_of::<Gated>(), 96);
        assert_eq!(size_of::<Merged>(), 184);
        assert_eq!(size_of::<Turned>(), 144);
        assert_eq!(size_of::<Pack>(), 64);
        assert_eq!(size_of::<Tiled>(), 80);
        assert_eq!(size_of::<PartedTiled>(), 104);
        assert_eq!(size_of::<FloatMatMul>(), 72);
        assert_eq!(size_of::<Rope>(), 40);
        assert_eq!(size_of::<CacheLayer>(), 24);
        assert_eq!(size_of::<Store>(), 64);
        assert_eq!(size_of::<Attention>(), 104);
        assert_eq!(size_of::<Elements>(), 40);
        assert_eq!(size_of::<Router>(), 40);
        assert_eq!(size_of::<WeightedSum>(), 40);
        assert_eq!(size_of::<Gather>(), 32);
        assert_eq!(size_of::<ArgMax>(), 40);
    }
}
