//! BLAKE3 where the bytes are.
//!
//! One launch hashes many weights: a block of threads reduces 256 KiB to one node of its weight's tree, and the host merges
//! the nodes. Whoever asks for one weight's digest most often asks for the next one's after it, so that those are hashed
//! along; each result is given once, and hashed anew when it is asked for again.

use std::collections::HashMap;
use std::sync::Arc;

use blake3::hazmat::{Mode, merge_subtrees_non_root, merge_subtrees_root};
use hoist_backend::{Error, FloatLayout, Result, WeightId};

use crate::driver::{Context, DeviceBuffer, Stream};
use crate::layout::Mover;
use crate::modules::{Function, Launch, Modules, arguments};
use crate::residency::{Residency, Resident};
use crate::tables::{CHUNK_BYTES, SUBTREE_BYTES, Subtree};

/// Bytes that are hashed along with a weight that was asked for.
const AHEAD_BYTES: u64 = 2 << 30;
/// Bytes of canonical bytes made at a time of a weight that lies otherwise.
const SCRATCH_BYTES: u64 = 16 << 20;
/// Room behind them for the table that makes them: at most three rectangles a matrix.
const SCRATCH_TABLE_BYTES: u64 = 4 << 20;

type Digest = [u8; 32];

/// Hashes weights on the device.
#[derive(Debug)]
pub(crate) struct Hasher {
    hash_subtrees: Function,
    /// Digests that nobody has asked for yet.
    ahead: HashMap<WeightId, Digest>,
}

/// Merges the nodes of a tree's level, left to right, until one is left: the root. There are two at least.
fn merge(mut level: Vec<Digest>) -> Option<Digest> {
    while level.len() > 2 {
        level = level
            .chunks(2)
            .map(|pair| match pair {
                [left, right] => merge_subtrees_non_root(left, right, Mode::Hash),
                [odd] => *odd,
                _ => [0; 32],
            })
            .collect();
    }
    match level.as_slice() {
        [left, right] => Some(*merge_subtrees_root(left, right, Mode::Hash).as_bytes()),
        _ => None,
    }
}

/// The subtrees of `len` bytes at a device address, `offset` into an input of `total`.
fn subtrees(ptr: u64, offset: u64, len: u64, total: u64) -> impl Iterator<Item = Subtree> {
    (0..len.div_ceil(SUBTREE_BYTES).max(1)).map(move |i| {
        let at = i * SUBTREE_BYTES;
        Subtree {
            ptr: ptr + at,
            counter: (offset + at) / CHUNK_BYTES,
            nbytes: SUBTREE_BYTES.min(len - at) as u32,
            whole: u32::from(total <= SUBTREE_BYTES),
        }
    })
}

impl Hasher {
    pub(crate) fn new(modules: &Modules) -> Result<Self> {
        Ok(Self {
            hash_subtrees: modules.function("blake3", "hash_subtrees")?,
            ahead: HashMap::new(),
        })
    }

    /// Forgets what was hashed ahead.
    pub(crate) fn forget(&mut self) {
        self.ahead.clear();
    }

    /// The digest of a weight's canonical bytes.
    pub(crate) fn digest(
        &mut self,
        context: &Arc<Context>,
        stream: &Stream,
        mover: &Mover,
        residency: &Residency,
        id: WeightId,
    ) -> Result<Digest> {
        let asked = residency.weight(id)?;
        if let Some(digest) = self.ahead.remove(&id) {
            return Ok(digest);
        }
        if asked.layout != FloatLayout::OutIn {
            return self.digest_gathered(context, stream, mover, asked);
        }
        // This one, and those after it that lie as they are hashed.
        let mut bytes = 0;
        let mut batch: Vec<(WeightId, usize)> = Vec::new();
        let mut table = Vec::new();
        for (i, weight) in residency.weights.iter().enumerate().skip(id.index()) {
            if i > id.index() && (bytes + weight.nbytes > AHEAD_BYTES || weight.layout != FloatLayout::OutIn)
            {
                break;
            }
            bytes += weight.nbytes;
            let before = table.len();
            table.extend(subtrees(weight.ptr, 0, weight.nbytes, weight.nbytes));
            batch.push((WeightId(i as u32), table.len() - before));
        }
        let nodes = self.nodes(context, stream, &table)?;
        let mut nodes = nodes.into_iter();
        for (weight, count) in batch {
            let level: Vec<_> = nodes.by_ref().take(count).collect();
            let digest = root(level)?;
            self.ahead.insert(weight, digest);
        }
        self.ahead
            .remove(&id)
            .ok_or_else(|| Error::internal(crate::NAME, "a digest that was not computed"))
    }

    /// Of a weight whose canonical bytes have to be made first, piece by piece.
    fn digest_gathered(
        &self,
        context: &Arc<Context>,
        stream: &Stream,
        mover: &Mover,
        weight: &Resident,
    ) -> Result<Digest> {
        let scratch = DeviceBuffer::new(
            context,
            "scratch for a digest",
            SCRATCH_BYTES + SCRATCH_TABLE_BYTES,
        )?;
        let mut level = Vec::new();
        let mut offset = 0;
        while offset < weight.nbytes {
            let len = SCRATCH_BYTES.min(weight.nbytes - offset);
            let at = mover.canonical(stream, weight, offset, len, &scratch)?;
            let table: Vec<_> = subtrees(at, offset, len, weight.nbytes).collect();
            level.extend(self.nodes(context, stream, &table)?);
            offset += len;
        }
        root(level)
    }

    /// The top nodes of subtrees.
    fn nodes(&self, context: &Arc<Context>, stream: &Stream, table: &[Subtree]) -> Result<Vec<Digest>> {
        let bytes: &[u8] = bytemuck::cast_slice(table);
        let input = DeviceBuffer::new(context, "a table for digests", bytes.len() as u64)?;
        let output = DeviceBuffer::new(context, "digests", table.len() as u64 * 32)?;
        let blocks = u32::try_from(table.len())
            .map_err(|_| Error::internal(crate::NAME, "more than 2^32 parts to hash"))?;
        let mut nodes = vec![[0u8; 32]; table.len()];
        let (from, to) = (input.ptr(), output.ptr());
        // SAFETY: pageable memory, and the buffer is new.
        unsafe { stream.copy_htod(from, bytes)? };
        // SAFETY: the kernel takes these two addresses, tables as long as its grid; the subtrees are resident.
        unsafe {
            self.hash_subtrees
                .launch(stream, Launch::linear(blocks, 256), &mut arguments![from, to])?
        };
        // SAFETY: the vector outlives the synchronisation that follows.
        unsafe { stream.copy_dtoh(nodes.as_flattened_mut(), to)? };
        stream.synchronize()?;
        Ok(nodes)
    }
}

fn root(level: Vec<Digest>) -> Result<Digest> {
    match level.as_slice() {
        [root] => Ok(*root),
        _ => merge(level).ok_or_else(|| Error::internal(crate::NAME, "a digest without nodes")),
    }
}

#[cfg(test)]
mod tests {
    use blake3::hazmat::HasherExt as _;

    use super::*;

    #[test]
    fn subtrees_of_the_host_merge_to_the_hash_of_the_whole() {
        let bytes: Vec<u8> = (0..5 * SUBTREE_BYTES as usize + 777)
            .map(|i| (i * 31 >> 3) as u8)
            .collect();
        for len in [
            SUBTREE_BYTES as usize + 1,
            2 * SUBTREE_BYTES as usize,
            3 * SUBTREE_BYTES as usize,
            bytes.len(),
        ] {
            let input = &bytes[..len];
            let level: Vec<Digest> = subtrees(0, 0, len as u64, len as u64)
                .map(|s| {
                    assert_eq!(s.whole, 0);
                    let part = &input[s.ptr as usize..s.ptr as usize + s.nbytes as usize];
                    blake3::Hasher::new()
                        .set_input_offset(s.counter * CHUNK_BYTES)
                        .update(part)
                        .finalize_non_root()
                })
                .collect();
            assert_eq!(root(level).unwrap(), *blake3::hash(input).as_bytes(), "{len}");
        }
    }

    #[test]
    fn a_small_input_is_one_whole_subtree() {
        for len in [1, 1024, SUBTREE_BYTES] {
            let found: Vec<_> = subtrees(4096, 0, len, len).collect();
            assert_eq!(
                found,
                [Subtree {
                    ptr: 4096,
                    counter: 0,
                    nbytes: len as u32,
                    whole: 1
                }]
            );
        }
    }
}
