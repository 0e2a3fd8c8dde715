//! Parameters that are read on the host and never become resident.

use std::os::unix::fs::FileExt;

use hoist_backend::Encoding;
use hoist_formats::{Manifest, TensorInfo};

use crate::names::{self, Part};
use crate::{Architecture, Error, Result};

/// Most values of a host parameter: far above any head's size.
const MAX_VALUES: u64 = 1 << 16;

/// RoPE factors that GGUF files store as tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct HostTables {
    /// `rope_freqs.weight`
    pub(crate) rope_freqs: Option<Vec<f32>>,
    /// `rope_factors_short.weight`
    pub(crate) short: Option<Vec<f32>>,
    /// `rope_factors_long.weight`
    pub(crate) long: Option<Vec<f32>>,
}

/// Reads every host parameter of a manifest; also returns their names.
///
/// # Errors
/// [`Error::HostParameter`] if one cannot be read, or only one of the long-rope pair is there.
pub(crate) fn read(architecture: Architecture, manifest: &Manifest) -> Result<(HostTables, Vec<String>)> {
    let mut tables = HostTables::default();
    let mut claimed = Vec::new();
    for tensor in &manifest.tensors {
        let Some(meaning) = names::parse(architecture, &tensor.name) else {
            continue;
        };
        let slot = match meaning.part {
            Part::RopeFreqs => &mut tables.rope_freqs,
            Part::RopeFactorsShort => &mut tables.short,
            Part::RopeFactorsLong => &mut tables.long,
            _ => continue,
        };
        *slot = Some(values(manifest, tensor)?);
        claimed.push(tensor.name.clone());
    }
    let lone = match (&tables.short, &tables.long) {
        (Some(_), None) => Some(("rope_factors_long.weight", "rope_factors_short.weight")),
        (None, Some(_)) => Some(("rope_factors_short.weight", "rope_factors_long.weight")),
        _ => None,
    };
    if let Some((missing, present)) = lone {
        return Err(Error::HostParameter {
            tensor: missing.into(),
            reason: format!("it is not there, but `{present}` is"),
        });
    }
    Ok((tables, claimed))
}

/// The values of an F32 vector.
fn values(manifest: &Manifest, tensor: &TensorInfo) -> Result<Vec<f32>> {
    let fail = |reason: String| Error::HostParameter {
        tensor: tensor.name.clone(),
        reason,
    };
    if tensor.encoding != Encoding::F32 {
        return Err(fail(format!("it is {}, expected f32", tensor.encoding)));
    }
    let &[count] = tensor.shape.as_slice() else {
        return Err(fail(format!(
            "it has shape {:?}, expected a vector",
            tensor.shape
        )));
    };
    if count > MAX_VALUES || tensor.nbytes != count * 4 {
        return Err(fail(format!(
            "it has {count} values in {} bytes, expected at most {MAX_VALUES} of 4 bytes",
            tensor.nbytes
        )));
    }
    let shard = manifest
        .shards
        .get(tensor.shard as usize)
        .ok_or_else(|| fail(format!("the model has no file {}", tensor.shard)))?;
    let mut bytes = vec![0; tensor.nbytes as usize];
    if let Some(memory) = &shard.memory {
        let range = usize::try_from(tensor.offset)
            .ok()
            .and_then(|start| Some(start..start.checked_add(bytes.len())?))
            .and_then(|range| memory.get(range))
            .ok_or_else(|| fail("its bytes lie outside the file".into()))?;
        bytes.copy_from_slice(range);
    } else if let Some(file) = &shard.source.file {
        file.read_exact_at(&mut bytes, tensor.offset)
            .map_err(|e| fail(e.to_string()))?;
    } else {
        return Err(fail("its file is not open".into()));
    }
    Ok(bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect())
}
