//! BLAKE3 where the bytes are.
//!
//! Two launches hash many weights: a block of threads reduces 256 KiB to one node of its weight's tree, then another one
//! 256 such nodes to one; the host merges what is left, a node for each 64 MiB. Whoever asks for one weight's digest most often asks for the next one's after it, so that those are hashed
//! along; each result is given once, and hashed anew when it is asked for again.

use std::collections::HashMap;
use std::sync::Arc;

use blake3::hazmat::{Mode, merge_subtrees_non_root, merge_subtrees_root};
use hoist_backend::{Error, FloatLayout, Result, WeightId};

use crate::driver::{Context, DeviceBuffer, Stream};
use crate::layout::Mover;
use crate::modules::{Function, Launch, Modules, arguments};
use crate::residency::{Residency, Resident};
use crate::tables::{CHUNK_BYTES, GROUP_NODES, Group, SUBTREE_BYTES, Subtree};

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
    merge_nodes: Function,
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
            merge_nodes: modules.function("blake3", "merge_nodes")?,
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
        let (mut table, mut grouped) = (Vec::new(), Vec::new());
        for (i, weight) in residency.weights.iter().enumerate().skip(id.index()) {
            if i > id.index() && (bytes + weight.nbytes > AHEAD_BYTES || weight.layout != FloatLayout::OutIn)
            {
                break;
            }
            bytes += weight.nbytes;
            let before = table.len();
            table.extend(subtrees(weight.ptr, 0, weight.nbytes, weight.nbytes));
            let count = table.len() - before;
            let first = grouped.len();
            grouped.extend(groups(before, count, true));
            batch.push((WeightId(i as u32), grouped.len() - first));
        }
        let nodes = self.nodes(context, stream, &table, &grouped)?;
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
            let whole = weight.nbytes <= SCRATCH_BYTES;
            let grouped: Vec<_> = groups(0, table.len(), whole).collect();
            level.extend(self.nodes(context, stream, &table, &grouped)?);
            offset += len;
        }
        root(level)
    }

    /// The nodes that groups of subtrees make.
    fn nodes(
        &self,
        context: &Arc<Context>,
        stream: &Stream,
        table: &[Subtree],
        grouped: &[Group],
    ) -> Result<Vec<Digest>> {
        let (subtrees, groups): (&[u8], &[u8]) = (bytemuck::cast_slice(table), bytemuck::cast_slice(grouped));
        let sizes = [subtrees.len(), groups.len(), table.len() * 32, grouped.len() * 32];
        let total: usize = sizes.iter().map(|n| n.next_multiple_of(256)).sum();
        let buffer = DeviceBuffer::new(context, "tables for digests", total as u64)?;
        let mut at = buffer.ptr();
        let [from, between, low, high] = sizes.map(|n| {
            let here = at;
            at += n.next_multiple_of(256) as u64;
            here
        });
        let too_many = |_| Error::internal(crate::NAME, "more than 2^32 parts to hash");
        let blocks = u32::try_from(table.len()).map_err(too_many)?;
        let merges = u32::try_from(grouped.len()).map_err(too_many)?;
        let mut nodes = vec![[0u8; 32]; grouped.len()];
        // SAFETY: pageable memory, and the buffer is new.
        unsafe { stream.copy_htod(from, subtrees)? };
        // SAFETY: as above.
        unsafe { stream.copy_htod(between, groups)? };
        // SAFETY: the kernel takes these two addresses, tables as long as its grid; the subtrees are resident.
        unsafe {
            self.hash_subtrees
                .launch(stream, Launch::linear(blocks, 256), &mut arguments![from, low])?;
        }
        // SAFETY: the kernel takes these three addresses; groups name nodes of the table before.
        unsafe {
            self.merge_nodes.launch(
                stream,
                Launch::linear(merges, 256),
                &mut arguments![between, low, high],
            )?;
        }
        // SAFETY: the vector outlives the synchronisation that follows.
        unsafe { stream.copy_dtoh(nodes.as_flattened_mut(), high)? };
        stream.synchronize()?;
        Ok(nodes)
    }
}

/// Groups of `count` nodes from `first` on; `all`: they are the whole tree's.
fn groups(first: usize, count: usize, all: bool) -> impl Iterator<Item = Group> {
    (0..count.div_ceil(GROUP_NODES)).map(move |i| Group {
        first: (first + i * GROUP_NODES) as u32,
        count: GROUP_NODES.min(count - i * GROUP_NODES) as u32,
        whole: u32::from(all && count <= GROUP_NODES),
        pad: 0,
    })
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
            .map(|i| ((i * 31) >> 3) as u8)
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
    fn groups_cover_every_node_once_and_only_a_whole_tree_has_a_root() {
        let found: Vec<_> = groups(5, 600, true)
            .map(|g| (g.first, g.count, g.whole))
            .collect();
        assert_eq!(found, [(5, 256, 0), (261, 256, 0), (517, 88, 0)]);
        let whole = |count, all| groups(0, count, all).map(|g| g.whole).collect::<Vec<_>>();
        assert_eq!(
            (whole(256, true), whole(256, false), whole(1, true)),
            (vec![1], vec![0], vec![1])
        );
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
