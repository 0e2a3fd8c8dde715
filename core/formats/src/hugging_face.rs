//! Hugging Face folders, and SafeTensors shards with their index.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Component, Path, PathBuf};

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};

use crate::gguf::SplitName;
use crate::header::{Budget, string_cost};
use crate::json::{self, Context};
use crate::layout::check_unique;
use crate::safetensors;
use crate::{Error, Format, Manifest, Metadata, Result, Shard};

/// Longest `config.json` that is read; real ones have a few kilobytes.
const MAX_CONFIG: u64 = 4 << 20;

/// Longest index that is read. One of 91,000 tensors has 9 MB.
const MAX_INDEX: u64 = 16 << 20;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Opens a folder with `config.json` and SafeTensors weights: one file, or shards with an index.
pub(crate) fn open_folder(folder: &Path) -> Result<Manifest> {
    let missing = |expected| Error::FolderWithoutModel {
        folder: folder.display().to_string(),
        expected,
    };
    if !folder.join("config.json").is_file() {
        return Err(missing("`config.json`"));
    }
    // In this order, as the `transformers` library looks for them.
    let single = folder.join(SINGLE);
    let index = folder.join(INDEX);
    let mut manifest = if single.is_file() {
        let shard = Shard::open(&single)?;
        crate::detect::not_empty(&shard)?;
        safetensors::open(&single, shard)?
    } else if index.is_file() {
        let shard = Shard::open(&index)?;
        open_index(&index, &shard)?
    } else {
        return Err(missing("`model.safetensors` or `model.safetensors.index.json`"));
    };
    manifest.path = folder.to_owned();
    Ok(manifest)
}

/// The `config.json` of a folder.
pub(crate) fn read_config(folder: &Path, budget: &mut Budget) -> Result<Map<String, Value>> {
    let shard = Shard::open(&folder.join("config.json"))?;
    let file = shard.name();
    crate::detect::not_empty(&shard)?;
    json::parse_object(
        &shard.read_all(MAX_CONFIG, "config.json")?,
        &file,
        "config.json",
        budget,
    )
}

/// Opens the shards that an index names, which lie in the index's folder.
pub(crate) fn open_index(path: &Path, index: &Shard) -> Result<Manifest> {
    let mut budget = Budget::new();
    let file = index.name();
    let bytes = index.read_all(MAX_INDEX, "the index of shards")?;
    budget.charge(bytes.len() as u64, &file, "the index of shards")?;
    let context = Context::new(&file, "the index of shards", &mut budget);
    let WeightMap {
        shards: names,
        tensors,
    } = json::parse(&bytes, context, |context, json| {
        json.deserialize_map(IndexVisitor(context))
    })?;
    budget.release(bytes.len() as u64);
    drop(bytes);

    let folder = path.parent().unwrap_or(Path::new(""));
    check_shard_names(&file, &names)?;
    let mut shards = Vec::new();
    let mut all = Vec::new();
    for (number, name) in (0u32..).zip(&names) {
        let shard_path = folder.join(name);
        let shard = Shard::open(&shard_path).map_err(|e| missing_shard(e, &file, &shard_path))?;
        crate::detect::not_empty(&shard)?;
        let found = safetensors::read(&shard, number, &mut budget)?;
        for tensor in &found {
            match tensors.get(&tensor.name) {
                Some(&expected) if expected != number => {
                    return Err(Error::ShardMismatch {
                        file: file.clone(),
                        what: format!("the shard of tensor `{}`", tensor.name),
                        expected: names[expected as usize].clone(),
                        found: name.clone(),
                    });
                }
                _ => {}
            }
        }
        all.extend(found);
        shards.push(shard);
    }
    check_unique(&file, &all)?;
    let there: HashSet<&str> = all.iter().map(|t| t.name.as_str()).collect();
    if let Some((name, &shard)) = tensors.iter().find(|(name, _)| !there.contains(name.as_str())) {
        return Err(Error::ShardMismatch {
            file: file.clone(),
            what: format!("tensor `{name}`"),
            expected: format!("in shard {}", names[shard as usize]),
            found: "nowhere".into(),
        });
    }
    let (config, folder) = if folder.join("config.json").is_file() {
        (read_config(folder, &mut budget)?, Some(folder.to_owned()))
    } else {
        (Map::new(), None)
    };
    Ok(Manifest {
        path: path.to_owned(),
        format: Format::SafeTensors,
        metadata: Metadata::HuggingFace(config),
        tensors: all,
        shards,
        folder,
    })
}

/// A shard that is not there is a fault of the model, not of the machine.
pub(crate) fn missing_shard(error: Error, file: &str, shard: &Path) -> Error {
    match error {
        Error::Io { error, .. } if error.kind() == std::io::ErrorKind::NotFound => Error::MissingShard {
            file: file.into(),
            shard: shard.display().to_string(),
        },
        other => other,
    }
}

/// Checks that a shard's name, which the model chose, stays in the model's folder.
pub(crate) fn check_file_name(file: &str, name: &str) -> Result<()> {
    let mut parts = Path::new(name).components();
    if matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name) {
        return Ok(());
    }
    Err(Error::ShardMismatch {
        file: file.into(),
        what: "the name of a shard".into(),
        expected: "a file name without a path".into(),
        found: format!("{name:?}"),
    })
}

/// Where shards are numbered (`model-00001-of-00003.safetensors`), all numbers must be there.
fn check_shard_names(file: &str, names: &[String]) -> Result<()> {
    let mut sets: BTreeMap<u64, HashSet<u64>> = BTreeMap::new();
    for name in names {
        check_file_name(file, name)?;
        if let Some(split) = SplitName::parse(&PathBuf::from(name)) {
            sets.entry(split.count).or_default().insert(split.number);
        }
    }
    for (count, numbers) in sets {
        if numbers.len() as u64 != count || names.len() as u64 != count {
            return Err(Error::ShardMismatch {
                file: file.into(),
                what: "the number of shards".into(),
                expected: format!("{count}, as their names say"),
                found: names.len().to_string(),
            });
        }
    }
    Ok(())
}

/// Which shard each tensor is in; shards in the order of their names.
struct WeightMap {
    shards: Vec<String>,
    tensors: HashMap<String, u32>,
}

struct IndexVisitor<'c, 'a>(&'c Context<'a>);

impl<'de> Visitor<'de> for IndexVisitor<'_, '_> {
    type Value = WeightMap;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object with a `weight_map`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<String>()? {
            if key != "weight_map" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if found.is_some() {
                return Err(self.0.fail(Error::DuplicateKey {
                    file: self.0.file.into(),
                    key,
                }));
            }
            found = Some(map.next_value_seed(WeightMapSeed(self.0))?);
        }
        found.ok_or_else(|| serde::de::Error::missing_field("weight_map"))
    }
}

struct WeightMapSeed<'c, 'a>(&'c Context<'a>);

impl<'de> DeserializeSeed<'de> for WeightMapSeed<'_, '_> {
    type Value = WeightMap;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<WeightMap, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMapSeed<'_, '_> {
    type Value = WeightMap;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object from tensor names to file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
        let mut numbers: BTreeMap<String, u32> = BTreeMap::new();
        let mut tensors: HashMap<String, u32> = HashMap::new();
        while let Some((name, shard)) = map.next_entry::<String, String>()? {
            // A place in a table that has just doubled.
            self.0.charge(string_cost(name.len() as u64) + 2 * 40)?;
            let number = match numbers.get(&shard) {
                Some(&number) => number,
                None => {
                    self.0.charge(2 * string_cost(shard.len() as u64) + 64)?;
                    let number = u32::try_from(numbers.len()).map_err(serde::de::Error::custom)?;
                    numbers.insert(shard, number);
                    number
                }
            };
            if tensors.insert(name.clone(), number).is_some() {
                return Err(self.0.fail(Error::DuplicateTensor {
                    file: self.0.file.into(),
                    name,
                }));
            }
        }
        // Numbered by first mention so far, by name from here on.
        let mut order = vec![0; numbers.len()];
        for (rank, &first_mention) in (0u32..).zip(numbers.values()) {
            order[first_mention as usize] = rank;
        }
        for number in tensors.values_mut() {
            *number = order[*number as usize];
        }
        Ok(WeightMap {
            shards: numbers.into_keys().collect(),
            tensors,
        })
    }
}
