use hoist_backend::{Error, Result, SourceFile, SourceView};

/// Most columns of a strided view that are read before they are scattered: enough to write a cache line at a time for
/// two-byte values.
const TILE_COLUMNS: u64 = 32;
/// Most bytes of one column that a tile reads.
const TILE_COLUMN_BYTES: u64 = 32 << 10;

/// The views of one weight, checked against their files, so that no sum or product below can overflow.
pub(super) struct Views {
    views: Vec<SourceView>,
    /// Where each view starts in their concatenation, and its end.
    starts: Vec<u64>,
}

impl Views {
    pub(super) fn new(weight: &str, views: &[SourceView], files: &[SourceFile]) -> Result<Self> {
        let mut starts = Vec::with_capacity(views.len() + 1);
        let mut start = 0u64;
        for view in views {
            starts.push(start);
            let file = files.get(view.file as usize).ok_or_else(|| {
                Error::invalid(
                    format!("file of a view of `{weight}`"),
                    format!("below {}", files.len()),
                    view.file,
                )
            })?;
            let end = end(view).filter(|end| *end <= file.len);
            let (Some(_), Some(next)) = (end, nbytes(view).and_then(|n| start.checked_add(n))) else {
                return Err(Error::invalid(
                    format!("a view of `{weight}`"),
                    format!("within the {} bytes of `{}`", file.len, file.path.display()),
                    format!("{view:?}"),
                ));
            };
            start = next;
        }
        starts.push(start);
        Ok(Self {
            views: views.to_vec(),
            starts,
        })
    }

    /// Bytes of all views.
    pub(super) fn nbytes(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Fills `out` from `offset` of the concatenation on; the caller has checked the range. `read` fills a buffer from an
    /// offset of a file.
    pub(super) fn read(
        &self,
        mut offset: u64,
        mut out: &mut [u8],
        read: impl Fn(u32, u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        // Views of no bytes share their start with the next one: the last view that starts at or before the offset is
        // the one that holds it.
        let mut next = self.starts.partition_point(|start| *start <= offset) - 1;
        while !out.is_empty() {
            let view = &self.views[next];
            let within = offset - self.starts[next];
            let left = self.starts[next + 1] - offset;
            let len = clamp(left, out.len());
            let (now, rest) = out.split_at_mut(len);
            read_view(view, within, now, &|at, buffer| read(view.file, at, buffer))?;
            offset += len as u64;
            out = rest;
            next += 1;
        }
        Ok(())
    }
}

fn nbytes(view: &SourceView) -> Option<u64> {
    view.rows.checked_mul(view.cols)?.checked_mul(view.unit)
}

/// One past the last byte that a view reads.
fn end(view: &SourceView) -> Option<u64> {
    if nbytes(view)? == 0 {
        return Some(view.offset);
    }
    let last_row = (view.rows - 1).checked_mul(view.row_stride)?;
    let last_col = (view.cols - 1).checked_mul(view.col_stride)?;
    view.offset
        .checked_add(last_row)?
        .checked_add(last_col)?
        .checked_add(view.unit)
}

/// The smaller of the two, which is a length in memory.
fn clamp(left: u64, len: usize) -> usize {
    usize::try_from(left).map_or(len, |left| left.min(len))
}

type Read<'a> = &'a dyn Fn(u64, &mut [u8]) -> Result<()>;

fn read_view(view: &SourceView, offset: u64, out: &mut [u8], read: Read<'_>) -> Result<()> {
    if let Some((start, _)) = view.as_contiguous() {
        return read(start + offset, out);
    }
    // Units that follow each other along a row are read as one.
    let view = if view.cols == 1 || view.col_stride == view.unit {
        SourceView {
            cols: 1,
            unit: view.cols * view.unit,
            col_stride: view.cols * view.unit,
            ..*view
        }
    } else {
        *view
    };
    let row_bytes = view.cols * view.unit;
    // Whole rows of a transposed view go tile by tile, all else unit by unit.
    let transposed = view.row_stride == view.unit && view.cols > 1 && matches!(view.unit, 1 | 2 | 4 | 8);
    if !transposed {
        return read_units(&view, offset, out, read);
    }
    let head = clamp((row_bytes - offset % row_bytes) % row_bytes, out.len());
    let (head, out) = out.split_at_mut(head);
    read_units(&view, offset, head, read)?;
    let first_row = (offset + head.len() as u64) / row_bytes;
    let rows = out.len() as u64 / row_bytes;
    let (body, tail) = out.split_at_mut((rows * row_bytes) as usize);
    read_transposed(&view, first_row, rows, body, read)?;
    read_units(&view, (first_row + rows) * row_bytes, tail, read)
}

/// Reads a range of a strided view, each unit where it stands.
fn read_units(view: &SourceView, mut offset: u64, mut out: &mut [u8], read: Read<'_>) -> Result<()> {
    while !out.is_empty() {
        let (unit, within) = (offset / view.unit, offset % view.unit);
        let (row, col) = (unit / view.cols, unit % view.cols);
        let len = clamp(view.unit - within, out.len());
        let (now, rest) = out.split_at_mut(len);
        read(
            view.offset + row * view.row_stride + col * view.col_stride + within,
            now,
        )?;
        offset += len as u64;
        out = rest;
    }
    Ok(())
}

/// Reads whole rows of a view whose units follow each other along columns: `[in, out]` in the file, `[out, in]` wanted.
fn read_transposed(
    view: &SourceView,
    first_row: u64,
    rows: u64,
    out: &mut [u8],
    read: Read<'_>,
) -> Result<()> {
    let tile_rows = (TILE_COLUMN_BYTES / view.unit).min(rows);
    let tile_cols = TILE_COLUMNS.min(view.cols);
    let mut tile = vec![0u8; (tile_rows * tile_cols * view.unit) as usize];
    let row_bytes = (view.cols * view.unit) as usize;
    let mut row = 0;
    while row < rows {
        let height = tile_rows.min(rows - row);
        let out = &mut out[row as usize * row_bytes..][..height as usize * row_bytes];
        let mut col = 0;
        while col < view.cols {
            let width = tile_cols.min(view.cols - col);
            let column_bytes = (height * view.unit) as usize;
            for c in 0..width {
                let start = view.offset + (first_row + row) * view.row_stride + (col + c) * view.col_stride;
                read(start, &mut tile[c as usize * column_bytes..][..column_bytes])?;
            }
            let tile = &tile[..width as usize * column_bytes];
            let at = (col * view.unit) as usize;
            match view.unit {
                1 => scatter::<1>(tile, column_bytes, out, row_bytes, at),
                2 => scatter::<2>(tile, column_bytes, out, row_bytes, at),
                4 => scatter::<4>(tile, column_bytes, out, row_bytes, at),
                _ => scatter::<8>(tile, column_bytes, out, row_bytes, at),
            }
            col += width;
        }
        row += height;
    }
    Ok(())
}

/// Writes the columns of a tile, `column_bytes` each, beside each other into rows of `row_bytes`, from byte `at` of each
/// row on.
fn scatter<const UNIT: usize>(tile: &[u8], column_bytes: usize, out: &mut [u8], row_bytes: usize, at: usize) {
    for (r, row) in out.chunks_exact_mut(row_bytes).enumerate() {
        let columns = tile.chunks_exact(column_bytes);
        for (to, column) in row[at..].chunks_exact_mut(UNIT).zip(columns) {
            to.copy_from_slice(&column[r * UNIT..][..UNIT]);
        }
    }
}
