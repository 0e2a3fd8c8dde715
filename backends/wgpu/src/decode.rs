//! Runs compiled programs: one submission for each set of tokens that run together.

use hoist_backend::{Error, Outputs, Result, TokenBatch, Want};
use wgpu::{CommandEncoder, ComputePass};

use crate::device::Gpu;
use crate::program::{Compiled, Groups, Launch, spread};
use crate::residency::read_mapped;
use crate::shaders::{SPLIT, THREADS};
use crate::workspace::{Row, Workspace};

/// Bytes of the status in what is read back.
const STATUS_BYTES: u64 = 16;

/// Checks a batch against the contract and lists its tokens.
fn admit(work: &mut Workspace, vocab: u32, batch: &TokenBatch<'_>, out: &Outputs<'_>) -> Result<()> {
    let Workspace {
        dims,
        rows,
        lengths,
        seen,
        ..
    } = work;
    let capacity = dims.capacity;
    if batch.runs.is_empty() {
        return Err(Error::invalid("runs of a batch", "at least 1", 0));
    }
    // Counted in u64 before anything is listed: runs may share their tokens' memory.
    let counts = batch.runs.iter().map(|r| r.tokens.len() as u64);
    let tokens = counts.fold(0, u64::saturating_add);
    if tokens > u64::from(capacity.max_batch_tokens) {
        return Err(Error::invalid(
            "tokens of a batch",
            format!("at most {}", capacity.max_batch_tokens),
            tokens,
        ));
    }
    seen.fill(false);
    rows.clear();
    for run in batch.runs {
        let sequence = run.sequence.0;
        let Some(seen) = seen.get_mut(sequence as usize) else {
            return Err(Error::invalid(
                "sequence",
                format!("below {}", capacity.max_sequences),
                sequence,
            ));
        };
        if std::mem::replace(seen, true) {
            return Err(Error::invalid(
                format!("runs of sequence {sequence}"),
                "one",
                "two",
            ));
        }
        if run.tokens.is_empty() {
            return Err(Error::invalid(
                format!("tokens for sequence {sequence}"),
                "at least 1",
                0,
            ));
        }
        if run.want.len() != run.tokens.len() {
            return Err(Error::invalid(
                format!("wants of sequence {sequence}"),
                format!("one for each of {} tokens", run.tokens.len()),
                run.want.len(),
            ));
        }
        let length = lengths[sequence as usize];
        let adding = run.tokens.len() as u32;
        if adding > capacity.max_context - length {
            return Err(Error::ContextExceeded {
                sequence,
                length,
                adding,
                capacity: capacity.max_context,
            });
        }
        for (position, (token, want)) in (length..).zip(run.tokens.iter().zip(run.want)) {
            if *token >= vocab {
                return Err(Error::TokenOutOfRange { token: *token, vocab });
            }
            rows.push(Row {
                token: *token,
                sequence,
                position,
                want: *want,
            });
        }
    }
    let arg_max = batch.wanting(Want::ArgMax);
    if out.argmax.len() != arg_max {
        return Err(Error::invalid(
            "places for arg-max ids",
            arg_max,
            out.argmax.len(),
        ));
    }
    let logits = batch.wanting(Want::Logits).checked_mul(vocab as usize);
    if logits != Some(out.logits.len()) {
        return Err(Error::invalid(
            "places for logits",
            format!("{logits:?}"),
            out.logits.len(),
        ));
    }
    Ok(())
}

/// What the sizes of launches depend on.
struct Extent {
    tokens: u32,
    most_groups: u32,
}

/// Splits of attention that a token sees.
fn splits(position: u32, window: Option<u32>) -> u32 {
    let split = SPLIT as u32;
    let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
    position / split - first / split + 1
}

impl Extent {
    fn dispatch(&self, pass: &mut ComputePass<'_>, launch: &Launch, rows: &[Row]) {
        let n = self.tokens;
        let most_splits = |window| rows.iter().map(|r| splits(r.position, window)).max().unwrap_or(1);
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
            Groups::Attention(heads, window) => (most_splits(window), heads, n),
            Groups::Merge(_, window) if most_splits(window) == 1 => return,
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

/// Writes a list of rows, as `common.wgsl` reads it.
fn list_rows<'r>(list: &mut [u32], rows: impl Iterator<Item = (usize, &'r Row)>) -> u32 {
    let mut n = 0;
    for (source, row) in rows {
        let at = 4 + 4 * n as usize;
        list[at..at + 4].copy_from_slice(&[row.token, row.sequence, row.position, source as u32]);
        n += 1;
    }
    list[0] = n;
    n
}

/// Runs a batch. Lengths change only when all has succeeded; what lies in the cache beyond them is scratch.
pub(crate) fn forward(
    gpu: &Gpu,
    program: &Compiled,
    work: &mut Workspace,
    batch: &TokenBatch<'_>,
    out: &mut Outputs<'_>,
) -> Result<()> {
    admit(work, program.vocab, batch, out)?;
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
    program: &Compiled,
    work: &mut Workspace,
    rows: &[Row],
    out: &mut Outputs<'_>,
) -> Result<()> {
    let mut wanted = Wanted {
        arg_max: &mut *out.argmax,
        logits: &mut *out.logits,
    };
    let last = rows.len().div_ceil(program.tokens);
    for (i, rows) in rows.chunks(program.tokens).enumerate() {
        let tail_words = (work.tail_at / 4) as usize;
        let (body_list, tail_list) = work.list.split_at_mut(tail_words);
        let tokens = list_rows(body_list, rows.iter().enumerate());
        let kept = rows.iter().enumerate().filter(|(_, r)| r.want != Want::Nothing);
        let kept = list_rows(tail_list, kept);
        gpu.queue
            .write_buffer(&work.batch, 0, bytemuck::cast_slice(&work.list));
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        if i == 0 {
            encoder.copy_buffer_to_buffer(&work.clean, 0, &work.status, 0, STATUS_BYTES);
        }
        record(gpu, program, &mut encoder, rows, tokens, kept);
        if kept == 0 && i + 1 < last {
            gpu.queue.submit([encoder.finish()]);
            continue;
        }
        results(gpu, program, work, encoder, rows, kept, &mut wanted)?;
    }
    gpu.check("a step", 0)
}

fn record(gpu: &Gpu, program: &Compiled, encoder: &mut CommandEncoder, rows: &[Row], tokens: u32, kept: u32) {
    let mut pass = encoder.begin_compute_pass(&Default::default());
    let mut extent = Extent {
        tokens,
        most_groups: gpu.most_groups,
    };
    for launch in &program.body {
        extent.dispatch(&mut pass, launch, rows);
    }
    if kept == 0 {
        return;
    }
    extent.tokens = kept;
    if kept < tokens {
        for launch in &program.gather {
            extent.dispatch(&mut pass, launch, rows);
        }
    }
    for launch in &program.tail {
        // Attention in a tail sees no more splits than the whole batch does.
        extent.dispatch(&mut pass, launch, rows);
    }
}

/// Places for results that have not come yet.
struct Wanted<'a> {
    arg_max: &'a mut [u32],
    logits: &'a mut [f32],
}

/// Submits, and copies to the host what the tail's tokens want.
fn results(
    gpu: &Gpu,
    program: &Compiled,
    work: &Workspace,
    mut encoder: CommandEncoder,
    rows: &[Row],
    kept: u32,
    wanted: &mut Wanted<'_>,
) -> Result<()> {
    let places = &work.places;
    let ids_bytes = 4 * u64::from(kept);
    let row_bytes = 4 * u64::from(program.vocab);
    let logits = 4 * places.values[program.logits];
    let copy_status = |encoder: &mut CommandEncoder| {
        encoder.copy_buffer_to_buffer(&work.status, 0, &work.results, 0, STATUS_BYTES);
        if kept > 0 {
            let from = 4 * places.arg_max;
            encoder.copy_buffer_to_buffer(&work.work, from, &work.results, STATUS_BYTES, ids_bytes);
        }
    };
    copy_status(&mut encoder);
    // Rows of logits, as many at a time as the buffer of results holds.
    let kept_rows: Vec<Want> = rows
        .iter()
        .map(|r| r.want)
        .filter(|w| *w != Want::Nothing)
        .collect();
    let logit_rows: Vec<u64> = (0u64..)
        .zip(&kept_rows)
        .filter(|(_, want)| **want == Want::Logits)
        .map(|(row, _)| row)
        .collect();
    let mut chunks = logit_rows.chunks(places.logits_rows as usize);
    let mut encoder = Some(encoder);
    let mut first = true;
    loop {
        let chunk = chunks.next();
        if chunk.is_none() && !first {
            return Ok(());
        }
        let chunk = chunk.unwrap_or_default();
        let mut commands = encoder
            .take()
            .unwrap_or_else(|| gpu.device.create_command_encoder(&Default::default()));
        let start = STATUS_BYTES + ids_bytes;
        for (i, row) in (0u64..).zip(chunk) {
            let to = start + i * row_bytes;
            commands.copy_buffer_to_buffer(
                &work.work,
                logits + row * row_bytes,
                &work.results,
                to,
                row_bytes,
            );
        }
        gpu.queue.submit([commands.finish()]);
        let len = start + chunk.len() as u64 * row_bytes;
        let mut met = u32::MAX;
        read_mapped(gpu, &work.results, len, |bytes| {
            let (head, values) = bytes.split_at(start as usize);
            if first {
                met = head.first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
                let ids = head[STATUS_BYTES as usize..].as_chunks::<4>().0;
                for (id, _) in ids.iter().zip(&kept_rows).filter(|(_, w)| **w == Want::ArgMax) {
                    if let Some((place, rest)) = std::mem::take(&mut wanted.arg_max).split_first_mut() {
                        *place = u32::from_le_bytes(*id);
                        wanted.arg_max = rest;
                    }
                }
            }
            let n = chunk.len() * program.vocab as usize;
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
