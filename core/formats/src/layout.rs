//! Checks that all formats share: what a tensor's shape asks for, and where tensors lie.

use std::collections::HashSet;

use hoist_backend::Encoding;

use crate::{Error, Result, TensorInfo};

/// Dimensions a SafeTensors or APR tensor may have; GGUF has its own limit of 4.
pub(crate) const MAX_DIMS: usize = 8;

/// What a [`TensorInfo`] with its name costs in memory, with the sets that checks build.
pub(crate) fn tensor_cost(name_len: u64) -> u64 {
    let set_entry = 40;
    size_of::<TensorInfo>() as u64 + crate::header::string_cost(name_len) + 8 * MAX_DIMS as u64 + set_entry
}

/// Bytes that `shape` asks for.
pub(crate) fn tensor_bytes(file: &str, name: &str, encoding: Encoding, shape: &[u64]) -> Result<u64> {
    if shape.contains(&0) {
        return Err(Error::ZeroDimension {
            file: file.into(),
            name: name.into(),
            shape: shape.into(),
        });
    }
    let cols = shape.last().copied().unwrap_or(1);
    let block = encoding.block_weights();
    if cols % block != 0 {
        return Err(Error::PartialBlock {
            file: file.into(),
            name: name.into(),
            encoding,
            block,
            cols,
        });
    }
    shape
        .iter()
        .try_fold(1u64, |n, &d| n.checked_mul(d))
        .and_then(|n| (n / block).checked_mul(encoding.block_bytes()))
        // One scale in front of the whole tensor, whatever its rank.
        .and_then(|n| n.checked_add(encoding.matrix_prefix_bytes()))
        .ok_or_else(|| Error::ShapeOverflow {
            file: file.into(),
            name: name.into(),
            encoding,
            shape: shape.into(),
        })
}

/// Whether tensors may leave bytes between them to nobody.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gaps {
    Allowed,
    Refused {
        /// Where the first tensor must start.
        data_start: u64,
    },
}

/// Checks that the tensors of one file lie within it, that their padding does too, and that they share no byte.
pub(crate) fn check_extents(
    file: &str,
    file_len: u64,
    padding: u64,
    gaps: Gaps,
    tensors: &[TensorInfo],
) -> Result<()> {
    for tensor in tensors {
        let padded_end = tensor
            .offset
            .checked_add(tensor.nbytes)
            .and_then(|end| end.checked_next_multiple_of(padding))
            .unwrap_or(u64::MAX);
        if padded_end > file_len {
            return Err(Error::TensorOutOfBounds {
                file: file.into(),
                name: tensor.name.clone(),
                start: tensor.offset,
                end: padded_end,
                file_len,
            });
        }
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|t| t.offset);
    let mut last: Option<(&TensorInfo, u64)> = None;
    for tensor in order {
        if let Some((before, end)) = last
            && tensor.offset < end
        {
            return Err(Error::Overlap {
                file: file.into(),
                first: before.name.clone(),
                second: tensor.name.clone(),
                end,
                start: tensor.offset,
            });
        }
        if let Gaps::Refused { data_start } = gaps {
            let start = last.map_or(data_start, |(_, end)| end);
            if tensor.offset != start {
                return Err(Error::Gap {
                    file: file.into(),
                    name: tensor.name.clone(),
                    start,
                    end: tensor.offset,
                });
            }
        }
        last = Some((tensor, tensor.offset + tensor.nbytes));
    }
    Ok(())
}

/// Checks that no name is there twice.
pub(crate) fn check_unique(file: &str, tensors: &[TensorInfo]) -> Result<()> {
    let mut seen = HashSet::with_capacity(tensors.len());
    match tensors.iter().find(|t| !seen.insert(t.name.as_str())) {
        None => Ok(()),
        Some(t) => Err(Error::DuplicateTensor {
            file: file.into(),
            name: t.name.clone(),
        }),
    }
}
