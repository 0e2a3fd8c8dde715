//! APR models of several files, by the JSON manifest that names them (`ShardManifest` of the `apr-format` crate).

use std::collections::HashSet;
use std::path::Path;

use apr_format::v2::ShardManifest;
use serde_json::Value;

use crate::header::{Budget, string_cost};
use crate::hugging_face::{check_file_name, missing_shard};
use crate::layout::check_unique;
use crate::{Error, Format, Manifest, Metadata, Result, Shard, apr, json};

/// Longest manifest that is read. One of 36,000 tensors has 5 MB.
const MAX_MANIFEST: u64 = 16 << 20;

const WHAT: &str = "the manifest of shards";

/// Opens the shards that a manifest names, which lie in the manifest's folder.
pub(crate) fn open(path: &Path, manifest: &Shard) -> Result<Manifest> {
    let file = manifest.name();
    let mut budget = Budget::new();
    let bytes = manifest.read_all(MAX_MANIFEST, WHAT)?;
    budget.charge(bytes.len() as u64, &file, WHAT)?;
    let object = json::parse_object(&bytes, &file, WHAT, &mut budget)?;
    drop(bytes);
    let mut manifest: ShardManifest =
        serde_json::from_value(Value::Object(object)).map_err(|e| Error::Json {
            file: file.clone(),
            what: WHAT,
            reason: e.to_string(),
        })?;
    let mismatch = |of: &str, what: String, expected: String, found: String| Error::ShardMismatch {
        file: of.into(),
        what,
        expected,
        found,
    };
    if manifest.version != "2.0" {
        return Err(Error::UnsupportedVersion {
            file,
            format: "APR shard manifest",
            expected: "2.0",
            found: manifest.version,
        });
    }
    if manifest.shards.len() != manifest.shard_count {
        return Err(mismatch(
            &file,
            "the number of shards, `shard_count`".into(),
            manifest.shard_count.to_string(),
            manifest.shards.len().to_string(),
        ));
    }
    manifest.shards.sort_by_key(|s| s.index);
    let mut names = HashSet::new();
    let mut shards = Vec::new();
    let mut tensors = Vec::new();
    // The model's own metadata stands in the first shard.
    let mut metadata = None;
    for (number, info) in (0u32..).zip(&manifest.shards) {
        if info.index != number as usize {
            return Err(mismatch(
                &file,
                format!("the index of shard `{}`", info.filename),
                number.to_string(),
                info.index.to_string(),
            ));
        }
        check_file_name(&file, &info.filename)?;
        if !names.insert(info.filename.as_str()) {
            return Err(mismatch(
                &file,
                format!("shard {number}"),
                "a file of its own".into(),
                info.filename.clone(),
            ));
        }
        let shard_path = path.with_file_name(&info.filename);
        let shard = Shard::open(&shard_path).map_err(|e| missing_shard(e, &file, &shard_path))?;
        let shard_file = shard.name();
        crate::detect::expect_magic(&shard, apr::MAGIC, "the magic `APR\\0`")?;
        if shard.source.len != info.size {
            return Err(mismatch(
                &shard_file,
                "its size in bytes".into(),
                info.size.to_string(),
                shard.source.len.to_string(),
            ));
        }
        let read = apr::read(shard, number, &mut budget)?;
        let place = (u64::from(number), manifest.shard_count as u64);
        if let Some(found) = apr::place_in_set(&read.metadata)
            && found != place
        {
            let show = |(index, count): (u64, u64)| format!("shard {index} of {count}");
            return Err(mismatch(
                &shard_file,
                "its metadata".into(),
                show(place),
                show(found),
            ));
        }
        let cost = info
            .tensors
            .iter()
            .map(|t| string_cost(t.len() as u64) + 40)
            .sum();
        budget.charge(cost, &file, WHAT)?;
        let listed: HashSet<&str> = info.tensors.iter().map(String::as_str).collect();
        if let Some(unlisted) = read.tensors.iter().find(|t| !listed.contains(t.name.as_str())) {
            return Err(mismatch(
                &shard_file,
                "its tensors".into(),
                "those that the manifest lists".into(),
                format!("`{}` too", unlisted.name),
            ));
        }
        if listed.len() != read.tensors.len() || listed.len() != info.tensors.len() {
            return Err(mismatch(
                &shard_file,
                "its number of tensors".into(),
                info.tensors.len().to_string(),
                read.tensors.len().to_string(),
            ));
        }
        if let Some(t) = read
            .tensors
            .iter()
            .find(|t| manifest.shard_for_tensor(&t.name) != Some(number as usize))
        {
            return Err(mismatch(
                &file,
                format!("the shard of tensor `{}` in `weight_map`", t.name),
                number.to_string(),
                manifest
                    .shard_for_tensor(&t.name)
                    .map_or_else(|| "none".into(), |s| s.to_string()),
            ));
        }
        budget.release(cost);
        metadata.get_or_insert(read.metadata);
        tensors.extend(read.tensors);
        shards.push(read.shard);
    }
    for (what, expected) in [
        ("tensors in all shards, `tensor_count`", manifest.tensor_count),
        ("tensors in all shards, `weight_map`", manifest.weight_map.len()),
    ] {
        if expected != tensors.len() {
            return Err(mismatch(
                &file,
                what.into(),
                expected.to_string(),
                tensors.len().to_string(),
            ));
        }
    }
    check_unique(&file, &tensors)?;
    let Some(metadata) = metadata else {
        return Err(mismatch(
            &file,
            "the number of shards, `shards`".into(),
            "at least 1".into(),
            "0".into(),
        ));
    };
    Ok(Manifest {
        path: path.to_owned(),
        format: Format::Apr,
        metadata: Metadata::Apr(metadata),
        tensors,
        shards,
        folder: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opens a manifest of that JSON, alone in a folder.
    fn open_json(name: &str, manifest: &Value) -> Error {
        let folder = std::env::temp_dir().join(format!("hoist-apr-shards-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("model.shards.json");
        std::fs::write(&path, manifest.to_string()).unwrap();
        let error = open(&path, &Shard::open(&path).unwrap()).unwrap_err();
        std::fs::remove_dir_all(&folder).unwrap();
        error
    }

    #[test]
    fn a_manifest_of_no_shards_is_refused_and_not_a_model_without_metadata() {
        let mut manifest = serde_json::json!({
            "version": "2.0", "shard_count": 0, "total_size": 0, "tensor_count": 0, "shards": [], "weight_map": {},
        });
        let error = open_json("none", &manifest);
        assert!(matches!(error, Error::ShardMismatch { .. }), "{error}");
        assert!(error.to_string().contains("at least 1"), "{error}");
        // The control names a shard, and is refused for that shard's absence.
        manifest["shard_count"] = 1.into();
        manifest["shards"] =
            serde_json::json!([{ "filename": "a.apr", "index": 0, "size": 64, "tensors": [] }]);
        let error = open_json("one", &manifest);
        assert!(matches!(error, Error::MissingShard { .. }), "{error}");
    }
}
