//! Attention: of single tokens, `attention_f16` and `attention_f32` in `kernels/decode.cu`; of many tokens that follow each
//! other, `attention_rows_*` in `kernels/prefill.cu`. The bits are the same, since every sum has the one order of the contract.

use hoist_backend::{KvDtype, Result, TokenRow};

use super::params::CacheLayer;
use super::prefill::FEWEST_TOKENS;
use super::workspace::SPLIT;
use crate::driver::Device;
use crate::modules::{Function, Launch, Modules};

/// Query heads of tokens that a block of attention takes at once, and the widest heads.
const QUERY_ROWS: u32 = 64;
const MOST_ELEMENTS: u32 = 128;

/// Query heads of one key/value head that a block of attention of single tokens takes at once, as in `kernels/decode.cu`.
const HEADS: u32 = 4;
/// Shared memory that a block has without asking.
const PLAIN_SHARED: u32 = 48 << 10;
/// The most elements of a head: its queries and the weights of a split are in shared memory in any case.
pub(super) const WIDEST_HEAD: u32 = (PLAIN_SHARED / 4 - HEADS * SPLIT - 8 * HEADS) / HEADS / 8 * 8;

/// Attention of single tokens, a block for each split.
#[derive(Clone, Copy, Debug)]
pub(super) struct AttentionSplits {
    shared: u32,
    /// Whether there is shared memory for the values of a split.
    pub(super) staged: bool,
}

impl AttentionSplits {
    /// Of a cache whose heads are at most [`WIDEST_HEAD`].
    pub(super) fn new(function: &Function, device: &Device, cache: &CacheLayer, kv: KvDtype) -> Result<Self> {
        // Queries, weights, the maxima of eight warps; then values.
        let least = (HEADS * cache.padded + HEADS * SPLIT + 8 * HEADS) * 4;
        let values = u64::from(SPLIT) * u64::from(cache.padded) * kv.bytes();
        let with_values = u32::try_from(values).ok().and_then(|n| n.checked_add(least));
        match with_values.filter(|n| *n <= device.shared_memory_optin) {
            Some(shared) => {
                function.allow_shared(shared)?;
                Ok(Self { shared, staged: true })
            }
            None => Ok(Self {
                shared: least,
                staged: false,
            }),
        }
    }

    /// The launch for so many tokens.
    pub(super) fn launch(&self, splits: u32, cache: &CacheLayer, heads: u32, tokens: u32) -> Launch {
        let groups = (heads / cache.kv_heads).div_ceil(HEADS);
        Launch {
            grid: (splits, cache.kv_heads * groups, tokens),
            shared: self.shared,
            ..Launch::linear(1, SPLIT)
        }
    }
}

/// Attention that reads keys and values once for many tokens: `attention_rows_*` in `kernels/prefill.cu`.
#[derive(Debug)]
pub(super) struct AttentionRows {
    function: Function,
    shared: u32,
    /// Tokens of a block.
    tile: u32,
}

impl AttentionRows {
    /// `None` where heads do not fit the kernel, or the device has not the shared memory.
    pub(super) fn new(
        modules: &Modules,
        device: &Device,
        cache: &CacheLayer,
        heads: u32,
        kv: KvDtype,
    ) -> Result<Option<Self>> {
        let group = heads.checked_div(cache.kv_heads).unwrap_or(0);
        let width = if cache.padded <= 64 { 64 } else { MOST_ELEMENTS };
        // Queries and weights of all rows, and two stages of keys or values.
        let shared = (width * QUERY_ROWS + QUERY_ROWS * SPLIT + 2 * 2048) * 4;
        if cache.head_dim != cache.padded
            || cache.padded > MOST_ELEMENTS
            || !(1..=QUERY_ROWS).contains(&group)
            || device.shared_memory_optin < shared
        {
            return Ok(None);
        }
        let function = modules.function(
            "prefill",
            match (kv, width) {
                (KvDtype::F16, 64) => "attention_rows_f16_64",
                (KvDtype::F16, _) => "attention_rows_f16_128",
                (KvDtype::F32, 64) => "attention_rows_f32_64",
                (KvDtype::F32, _) => "attention_rows_f32_128",
            },
        )?;
        function.allow_shared(shared)?;
        Ok(Some(Self {
            function,
            shared,
            tile: QUERY_ROWS / group,
        }))
    }

    /// Whether a batch of so many tokens in so many runs fills its blocks: a block takes tokens that follow each other.
    pub(super) fn suits(&self, tokens: u32, runs: u32) -> bool {
        tokens >= FEWEST_TOKENS && tokens / runs.max(1) >= self.tile.min(FEWEST_TOKENS)
    }

    /// Of so many tokens those that fill blocks; all of them if they fill none.
    pub(super) fn whole_tiles(&self, tokens: u32) -> u32 {
        whole_tiles(tokens, self.tile)
    }

    /// The launch for so many tokens.
    pub(super) fn launch(&self, splits: u32, kv_heads: u32, tokens: u32) -> (&Function, Launch) {
        let launch = Launch {
            grid: (splits, kv_heads, tokens.div_ceil(self.tile)),
            shared: self.shared,
            ..Launch::linear(1, 256)
        };
        (&self.function, launch)
    }
}

fn whole_tiles(tokens: u32, tile: u32) -> u32 {
    match tokens / tile * tile {
        0 => tokens,
        whole => whole,
    }
}

/// Runs of tokens that follow each other in one sequence.
pub(super) fn runs(batch: &[TokenRow]) -> u32 {
    let follows = |a: &TokenRow, b: &TokenRow| {
        a.sequence == b.sequence && a.position.checked_add(1) == Some(b.position)
    };
    let breaks = batch
        .iter()
        .zip(batch.iter().skip(1))
        .filter(|(a, b)| !follows(a, b));
    // At most one for each token of a batch, whose number is a u32.
    breaks.count() as u32 + 1
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::params::{Attention, Row};
    use super::*;
    use crate::driver::{Context, DeviceBuffer, Stream};
    use crate::modules::arguments;

    #[test]
    fn runs_end_where_a_sequence_or_a_position_jumps() {
        let row = |sequence, position| TokenRow {
            token: 0,
            sequence,
            position,
            want: hoist_backend::Want::Nothing,
        };
        assert_eq!(runs(&[row(0, 5)]), 1);
        assert_eq!(runs(&[row(0, 5), row(0, 6), row(0, 7)]), 1);
        assert_eq!(runs(&[row(0, 5), row(1, 6), row(1, 8), row(1, 9)]), 3);
    }

    /// Numbers that look random: xorshift64*.
    struct Random(u64);

    impl Random {
        /// From −1 to 1.
        fn float(&mut self) -> f32 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40;
            high as f32 / (1 << 23) as f32 - 1.0
        }
    }

    struct Case {
        head_dim: u32,
        heads: u32,
        kv_heads: u32,
        kv: KvDtype,
        window: u32,
        cap: f32,
        /// Sequence, first position and tokens of each run.
        runs: Vec<(u32, u32, u32)>,
    }

    /// Tokens one by one, their values from memory or in shared memory; or together.
    #[derive(Clone, Copy, PartialEq)]
    enum Way {
        Direct,
        Staged,
        AtOnce,
    }

    /// Merged outputs of one of the kernels.
    fn attended(
        context: &Arc<Context>,
        modules: &Modules,
        stream: &Stream,
        case: &Case,
        way: Way,
    ) -> Vec<u32> {
        let Case {
            head_dim,
            heads,
            kv_heads,
            kv,
            ..
        } = *case;
        let f16 = kv == KvDtype::F16;
        let mut random = Random(0x1234_5678_9abc_def1 + u64::from(head_dim));
        let rows: Vec<Row> = case
            .runs
            .iter()
            .flat_map(|(sequence, first, tokens)| {
                (0..*tokens).map(move |i| Row {
                    token: 0,
                    sequence: *sequence,
                    position: first + i,
                    wanted: 0,
                })
            })
            .collect();
        let tokens = rows.len() as u32;
        let last = rows.iter().map(|r| r.position).max().unwrap();
        let splits = last / SPLIT + 1;
        let positions = (last + 1).next_multiple_of(64);
        let stored = 2 * kv_heads * 2 * head_dim * positions;
        let cache: Vec<u8> = (0..stored)
            .flat_map(|_| {
                let x = random.float() * 4.0;
                if f16 {
                    half::f16::from_f32(x).to_bits().to_le_bytes().to_vec()
                } else {
                    x.to_le_bytes().to_vec()
                }
            })
            .collect();
        let query: Vec<f32> = (0..tokens * heads * head_dim).map(|_| random.float()).collect();
        let buffer = |what, nbytes: usize| DeviceBuffer::new(context, what, nbytes as u64).unwrap();
        let uploaded = |bytes: &[u8]| {
            let to = buffer("a test", bytes.len());
            // SAFETY: the buffer is as long as the bytes, which stay until the stream has been waited for.
            unsafe { stream.copy_htod(to.ptr(), bytes) }.unwrap();
            stream.synchronize().unwrap();
            to
        };
        let (cache, query, rows) = (
            uploaded(&cache),
            uploaded(bytemuck::cast_slice(&query)),
            uploaded(bytemuck::cast_slice(&rows)),
        );
        let outputs = (tokens * heads * head_dim) as usize;
        let out = buffer("outputs", outputs * 4);
        let sums = buffer("sums", (tokens * heads * splits) as usize * 8);
        let partial = buffer("partial sums", outputs * splits as usize * 4);
        let layer = CacheLayer {
            base: cache.ptr(),
            kv_heads,
            head_dim,
            padded: head_dim,
            positions,
        };
        let params = Attention {
            cache: layer,
            query: query.ptr(),
            out: out.ptr(),
            rows: rows.ptr(),
            sums: sums.ptr(),
            partial: partial.ptr(),
            first_token: 0,
            heads,
            splits,
            window: case.window,
            scale: 0.25,
            cap: case.cap,
            capped: u32::from(case.cap > 0.0),
            tokens,
            staged: (way == Way::Staged).into(),
            unused: 0,
        };
        let run = |function: &Function, launch: Launch| {
            // SAFETY: the kernels take that struct, whose buffers are as long as it says.
            unsafe { function.launch(stream, launch, &mut arguments![params]) }.unwrap();
        };
        let device = &context.device;
        if way == Way::AtOnce {
            let rows = AttentionRows::new(modules, device, &layer, heads, kv)
                .unwrap()
                .unwrap();
            let (function, launch) = rows.launch(splits, kv_heads, tokens);
            run(function, launch);
        } else {
            let kernel = if f16 { "attention_f16" } else { "attention_f32" };
            let function = modules.function("decode", kernel).unwrap();
            let splits_alone = AttentionSplits::new(&function, device, &layer, kv).unwrap();
            assert!(splits_alone.staged);
            run(&function, splits_alone.launch(splits, &layer, heads, tokens));
        }
        let launch = Launch {
            grid: (heads.div_ceil(4), tokens, 1),
            ..Launch::linear(1, 128)
        };
        run(&modules.function("decode", "attention_merge").unwrap(), launch);
        let mut found = vec![0u32; outputs];
        // SAFETY: as long as the buffer; waited for below.
        unsafe { stream.copy_dtoh(bytemuck::cast_slice_mut(&mut found), out.ptr()) }.unwrap();
        stream.synchronize().unwrap();
        found
    }

    #[test]
    fn parts_of_a_batch_are_whole_blocks_where_they_can_be() {
        for (tokens, whole) in [
            (1, 1),
            (15, 15),
            (16, 16),
            (31, 16),
            (512, 512),
            (u32::MAX, u32::MAX - 15),
        ] {
            assert_eq!(whole_tiles(tokens, 16), whole);
        }
    }

    #[test]
    fn many_tokens_attend_as_each_does_alone() {
        // On the emulated device, where it could be built.
        if hoist_cuda_emulator::load().is_none() {
            eprintln!("no C++ compiler, so that there is no emulated device to attend on");
            return;
        }
        let context = Context::open(0).unwrap();
        let modules = Modules::new(&context);
        let stream = Stream::new(&context).unwrap();
        let case = |head_dim, heads, kv_heads, kv, runs: &[(u32, u32, u32)]| Case {
            head_dim,
            heads,
            kv_heads,
            kv,
            window: 0,
            cap: 0.0,
            runs: runs.to_vec(),
        };
        let cases = [
            // A whole prompt, in two splits; later tokens only; several sequences that share blocks.
            case(64, 4, 1, KvDtype::F16, &[(0, 0, 270)]),
            case(128, 4, 2, KvDtype::F16, &[(1, 500, 37)]),
            case(64, 7, 1, KvDtype::F32, &[(0, 3, 9), (1, 250, 20), (0, 12, 1)]),
            case(8, 2, 2, KvDtype::F16, &[(0, 0, 65)]),
            Case {
                window: 20,
                cap: 3.0,
                ..case(96, 6, 2, KvDtype::F32, &[(0, 240, 40), (1, 0, 8)])
            },
            Case {
                window: 300,
                ..case(128, 3, 1, KvDtype::F16, &[(0, 590, 30)])
            },
        ];
        for (number, case) in cases.iter().enumerate() {
            let one = attended(&context, &modules, &stream, case, Way::Direct);
            for way in [Way::Staged, Way::AtOnce] {
                let all = attended(&context, &modules, &stream, case, way);
                let wrong = one.iter().zip(&all).position(|(a, b)| a != b);
                assert_eq!(wrong, None, "case {number}");
            }
            assert!(one.iter().any(|x| *x != 0));
        }
    }
}
