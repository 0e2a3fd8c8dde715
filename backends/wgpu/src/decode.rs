//! Runs compiled programs: one submission for each set of tokens that run together.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hoist_backend::{Error, Outputs, Result, TokenBatch, TokenRow, Want, admit};
use wgpu::{CommandBuffer, CommandEncoder, ComputePass, MapMode};

use crate::device::Gpu;
use crate::program::{Ahead, Compiled, Groups, Launch, spread};
use crate::residency::read_mapped;
use crate::shaders::{SPLIT, THREADS};
use crate::workspace::{Workspace, list_words};

/// Bytes of the status in what is read back.
const STATUS_BYTES: u64 = 16;

/// What the sizes of launches depend on.
struct Extent<'a> {
    tokens: u32,
    most_groups: u32,
    windows: &'a [Option<u32>],
    /// Most splits that a token sees in each of the windows.
    splits: &'a [u32],
}

/// Splits of attention that a token sees.
fn splits(position: u32, window: Option<u32>) -> u32 {
    let split = SPLIT as u32;
    let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
    position / split - first / split + 1
}

impl Extent<'_> {
    fn most_splits(&self, window: Option<u32>) -> u32 {
        let mut known = self.windows.iter().zip(self.splits);
        known.find(|(w, _)| **w == window).map_or(1, |(_, n)| *n)
    }

    fn dispatch(&self, pass: &mut ComputePass<'_>, launch: &Launch) {
        let n = self.tokens;
        let (x, y, z) = match launch.groups {
            Groups::Tokens(x, y) => (x, y, n),
            Groups::Spread(groups, tile) => {
                let (x, y) = spread(groups, self.most_groups);
                (x, y, if n == 1 { 1 } else { n.div_ceil(tile) })
            }
            Groups::Choices(groups, k) => {
                let (x, y) = spread(groups, self.most_groups);
                (x, y, n * k)
            }
            Groups::Elements(width) => {
                let (x, y) = spread((width * u64::from(n)).div_ceil(THREADS), self.most_groups);
                (x, y, 1)
            }
            Groups::Attention(heads, window) => (self.most_splits(window), heads, n),
            Groups::Merge(_, window) if self.most_splits(window) == 1 => return,
            Groups::Merge(heads, _) => (1, heads, n),
            Groups::Once(x) => (x, 1, 1),
        };
        let pipeline = match &launch.several {
            Some(several) if n > 1 => several,
            _ => &launch.pipeline,
        };
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, &launch.bindings, &[]);
        pass.dispatch_workgroups(x, y, z);
    }
}

/// Appends a list of rows, as `common.wgsl` reads it; where it stands.
fn list_rows<'r>(
    words: &mut Vec<u32>,
    rows: impl Iterator<Item = (usize, &'r TokenRow)>,
) -> (u32, Range<u64>) {
    let start = words.len();
    words.extend([0; 4]);
    let mut n = 0;
    for (source, row) in rows {
        words.extend([row.token, row.sequence, row.position, source as u32]);
        n += 1;
    }
    words[start] = n;
    (n, 4 * start as u64..4 * words.len() as u64)
}

/// Tokens that run together.
struct Chunk<'r> {
    rows: &'r [TokenRow],
    tokens: u32,
    /// Those of the tail.
    kept: u32,
    /// Where the lists of both stand, in bytes.
    list: Range<u64>,
    kept_list: Range<u64>,
    /// Whether it is the first of its batch.
    first: bool,
}

impl<'r> Chunk<'r> {
    fn new(words: &mut Vec<u32>, rows: &'r [TokenRow], first: bool) -> Self {
        let (tokens, list) = list_rows(words, rows.iter().enumerate());
        let wanted = rows.iter().enumerate().filter(|(_, r)| r.want != Want::Nothing);
        let (kept, kept_list) = list_rows(words, wanted);
        Self {
            rows,
            tokens,
            kept,
            list,
            kept_list,
            first,
        }
    }

    /// Of a chunk that is one token with a result: what it wants.
    fn single(&self) -> Option<Want> {
        match self.rows {
            [row] if self.first && self.kept == 1 => Some(row.want),
            _ => None,
        }
    }

    /// Most splits that a token sees, for each window.
    fn splits(&self, windows: &[Option<u32>]) -> Vec<u32> {
        let most = |w: &Option<u32>| self.rows.iter().map(|r| splits(r.position, *w)).max();
        windows.iter().map(|w| most(w).unwrap_or(1)).collect()
    }
}

/// Runs a batch. Lengths change only when all has succeeded; what lies in the cache beyond them is scratch.
pub(crate) fn forward(
    gpu: &Gpu,
    program: &mut Compiled,
    work: &mut Workspace,
    batch: &TokenBatch<'_>,
    out: &mut Outputs<'_>,
) -> Result<()> {
    let capacity = work.dims.capacity;
    admit(
        batch,
        out,
        program.vocab,
        &capacity,
        &work.lengths,
        &mut work.rows,
    )?;
    let rows = std::mem::take(&mut work.rows);
    let result = run(gpu, program, work, &rows, out);
    work.rows = rows;
    result?;
    for run in batch.runs {
        work.lengths[run.sequence.0 as usize] += run.tokens.len() as u32;
    }
    Ok(())
}

fn run(
    gpu: &Gpu,
    program: &mut Compiled,
    work: &mut Workspace,
    rows: &[TokenRow],
    out: &mut Outputs<'_>,
) -> Result<()> {
    let mut wanted = Wanted {
        arg_max: &mut *out.argmax,
        logits: &mut *out.logits,
    };
    let mut words = std::mem::take(&mut work.words);
    words.clear();
    let chunks: Vec<Chunk<'_>> = (0..)
        .zip(rows.chunks(program.tokens))
        .map(|(i, rows)| Chunk::new(&mut words, rows, i == 0))
        .collect();
    let sent = send_lists(gpu, work, &words);
    work.words = words;
    sent?;
    let last = chunks.len() - 1;
    for (i, chunk) in chunks.iter().enumerate() {
        let splits = chunk.splits(&program.windows);
        let ready = program.ahead.take();
        let ready = ready.filter(|a| chunk.single() == Some(a.want) && a.splits == splits);
        let commands = match ready {
            Some(ahead) => ahead.commands,
            None => record(gpu, program, work, chunk, &splits),
        };
        gpu.queue.submit([commands]);
        if i == last {
            take_lists(work);
            // While the device works: the step that follows this one, if it is alike.
            if let Some(want) = chunk.single() {
                program.ahead = record_ahead(gpu, program, work, chunk, want);
            }
        } else if chunk.kept == 0 {
            continue;
        }
        results(gpu, program, work, chunk, &mut wanted)?;
    }
    gpu.check("a step", 0)
}

/// Hands the lists of rows to the device.
fn send_lists(gpu: &Gpu, work: &Workspace, words: &[u32]) -> Result<()> {
    if !work.lists_mapped.swap(false, Ordering::Acquire) {
        // A step before this one failed.
        take_lists(work);
        gpu.wait("lists of rows")?;
        if !work.lists_mapped.swap(false, Ordering::Acquire) {
            return Err(Error::internal(crate::NAME, "lists of rows cannot be mapped"));
        }
    }
    let mut view = work
        .lists
        .get_mapped_range_mut(..4 * words.len() as u64)
        .map_err(|e| Error::internal(crate::NAME, format!("mapping: {e}")))?;
    view.copy_from_slice(bytemuck::cast_slice(words));
    drop(view);
    work.lists.unmap();
    Ok(())
}

/// Asks for the lists back, once what was submitted has read them.
fn take_lists(work: &Workspace) {
    let mapped = Arc::clone(&work.lists_mapped);
    work.lists.map_async(MapMode::Write, .., move |result| {
        mapped.store(result.is_ok(), Ordering::Release);
    });
}

/// Records all commands of a chunk, up to its results.
fn record(
    gpu: &Gpu,
    program: &Compiled,
    work: &Workspace,
    chunk: &Chunk<'_>,
    splits: &[u32],
) -> CommandBuffer {
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    for (list, to) in [(&chunk.list, 0), (&chunk.kept_list, work.tail_at)] {
        encoder.copy_buffer_to_buffer(&work.lists, list.start, &work.batch, to, list.end - list.start);
    }
    if chunk.first {
        encoder.copy_buffer_to_buffer(&work.clean, 0, &work.status, 0, STATUS_BYTES);
    }
    let mut pass = encoder.begin_compute_pass(&Default::default());
    let mut extent = Extent {
        tokens: chunk.tokens,
        most_groups: gpu.most_groups,
        windows: &program.windows,
        splits,
    };
    for launch in &program.body {
        extent.dispatch(&mut pass, launch);
    }
    if chunk.kept > 0 {
        extent.tokens = chunk.kept;
        if chunk.kept < chunk.tokens {
            for launch in &program.gather {
                extent.dispatch(&mut pass, launch);
            }
        }
        for launch in &program.tail {
            // Attention in a tail sees no more splits than the whole batch does.
            extent.dispatch(&mut pass, launch);
        }
    }
    drop(pass);
    encoder.copy_buffer_to_buffer(&work.status, 0, &work.results, 0, STATUS_BYTES);
    if chunk.kept > 0 {
        let from = 4 * work.places.arg_max;
        let ids_bytes = 4 * u64::from(chunk.kept);
        encoder.copy_buffer_to_buffer(&work.work, from, &work.results, STATUS_BYTES, ids_bytes);
    }
    let first = work.places.logits_rows as usize;
    copy_logits(program, work, chunk, &mut encoder, logit_rows(chunk).take(first));
    encoder.finish()
}

/// The commands of the step after a chunk of one token, if its sequence goes on.
fn record_ahead(
    gpu: &Gpu,
    program: &Compiled,
    work: &Workspace,
    chunk: &Chunk<'_>,
    want: Want,
) -> Option<Ahead> {
    let row = chunk.rows.first()?;
    let position = row.position.checked_add(1)?;
    if position >= work.dims.capacity.max_context {
        return None;
    }
    let next = [TokenRow { position, ..*row }];
    let words = 4 * list_words(1) as u64;
    let chunk = Chunk {
        rows: &next,
        tokens: 1,
        kept: 1,
        list: 0..words,
        kept_list: words..2 * words,
        first: true,
    };
    let splits = chunk.splits(&program.windows);
    let commands = record(gpu, program, work, &chunk, &splits);
    Some(Ahead {
        want,
        splits,
        commands,
    })
}

/// Rows of the tail whose logits are wanted.
fn logit_rows<'c>(chunk: &'c Chunk<'_>) -> impl Iterator<Item = u64> + 'c {
    let wants = chunk.rows.iter().map(|r| r.want).filter(|w| *w != Want::Nothing);
    (0u64..)
        .zip(wants)
        .filter(|(_, want)| *want == Want::Logits)
        .map(|(row, _)| row)
}

/// Copies rows of logits to what is read back, behind the status and the ids.
fn copy_logits(
    program: &Compiled,
    work: &Workspace,
    chunk: &Chunk<'_>,
    encoder: &mut CommandEncoder,
    rows: impl Iterator<Item = u64>,
) {
    let row_bytes = 4 * u64::from(program.vocab);
    let logits = 4 * work.places.values[program.logits];
    let mut to = STATUS_BYTES + 4 * u64::from(chunk.kept);
    for row in rows {
        encoder.copy_buffer_to_buffer(&work.work, logits + row * row_bytes, &work.results, to, row_bytes);
        to += row_bytes;
    }
}

/// Places for results that have not come yet.
struct Wanted<'a> {
    arg_max: &'a mut [u32],
    logits: &'a mut [f32],
}

/// Copies to the host what the tail's tokens want; the chunk has been submitted.
fn results(
    gpu: &Gpu,
    program: &Compiled,
    work: &Workspace,
    chunk: &Chunk<'_>,
    wanted: &mut Wanted<'_>,
) -> Result<()> {
    let start = STATUS_BYTES + 4 * u64::from(chunk.kept);
    let rows: Vec<u64> = logit_rows(chunk).collect();
    // As many rows of logits at a time as the buffer of results holds; the first ones have been copied there.
    let mut groups = rows.chunks(work.places.logits_rows as usize);
    let mut group = groups.next().unwrap_or_default();
    let mut first = true;
    loop {
        let len = start + group.len() as u64 * 4 * u64::from(program.vocab);
        let mut met = u32::MAX;
        read_mapped(gpu, &work.results, len, |bytes| {
            let (head, values) = bytes.split_at(start as usize);
            if first {
                met = head.first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
                let ids = head[STATUS_BYTES as usize..].as_chunks::<4>().0;
                let wants = chunk.rows.iter().map(|r| r.want).filter(|w| *w != Want::Nothing);
                for (id, _) in ids.iter().zip(wants).filter(|(_, w)| *w == Want::ArgMax) {
                    if let Some((place, rest)) = std::mem::take(&mut wanted.arg_max).split_first_mut() {
                        *place = u32::from_le_bytes(*id);
                        wanted.arg_max = rest;
                    }
                }
            }
            let n = group.len() * program.vocab as usize;
            if let Some((now, later)) = std::mem::take(&mut wanted.logits).split_at_mut_checked(n) {
                for (to, from) in now.iter_mut().zip(values.as_chunks::<4>().0) {
                    *to = f32::from_le_bytes(*from);
                }
                wanted.logits = later;
            }
        })?;
        if met != u32::MAX {
            let (op, layer) = program
                .steps
                .get(met as usize)
                .copied()
                .ok_or_else(|| Error::internal(crate::NAME, format!("no step {met}")))?;
            return Err(Error::NonFinite { op, layer });
        }
        first = false;
        let Some(next) = groups.next() else {
            return Ok(());
        };
        group = next;
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        copy_logits(program, work, chunk, &mut encoder, group.iter().copied());
        gpu.queue.submit([encoder.finish()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_sees_the_splits_of_its_window() {
        assert_eq!(splits(0, None), 1);
        assert_eq!(splits(255, None), 1);
        assert_eq!(splits(256, None), 2);
        assert_eq!(splits(300, Some(10)), 1);
        assert_eq!(splits(260, Some(10)), 2);
        assert_eq!(splits(5, Some(4096)), 1);
    }
}
