use std::collections::{BTreeMap, BTreeSet};

use hoist_backend::{
    Encoding, IndexEntry, IndexLayout, Role, Shape, Slot, ValueChange, WeightClass, WeightId,
};
use hoist_formats::{Format, Manifest, MetaValue, Metadata, TensorInfo};

use crate::hyper::{gguf, json};
use crate::names::{self, Convention, Part};
use crate::requirements::{self, Kind, Need, Requirement};
use crate::views::{Cutter, dims, is_matrix_encoding};
use crate::{Architecture, Error, HyperParameters, Lineage, ResolvedModel, ResolvedWeight, Result, host};

/// Finds out what every tensor of a model is for, and checks that nothing is missing and every shape is right.
///
/// Reads no weight; RoPE factors that a GGUF file stores as tensors are read here.
///
/// # Errors
/// [`Error::NotATransformer`] if no name is known; [`Error::UnknownArchitecture`], [`Error::MissingConfig`]; for
/// hyper-parameters [`Error::MissingKey`], [`Error::WrongType`], [`Error::BadValue`], [`Error::Unsupported`]; for tensors
/// [`Error::MissingRole`], [`Error::AmbiguousRole`], [`Error::WrongShape`], [`Error::WrongEncoding`], [`Error::Layout`],
/// [`Error::WrongSize`], [`Error::HostParameter`].
pub fn resolve(manifest: &Manifest) -> Result<ResolvedModel> {
    if !manifest.tensors.iter().any(|t| names::is_transformer(&t.name)) {
        return Err(Error::NotATransformer {
            path: manifest.path.display().to_string(),
            tensors: manifest.tensors.len(),
            example: manifest.tensors.first().map(|t| t.name.clone()),
        });
    }
    let architecture = architecture(manifest)?;
    let lineage = lineage(manifest);
    let (host_tables, host_tensors) = host::read(architecture, manifest)?;
    let claims = Claims::new(architecture, manifest)?;

    let facts = gguf::Facts {
        tensors: manifest.tensors.len(),
        embedding_rows: claims
            .find(None, Part::One(Role::TokenEmbd))
            .and_then(|t| t.tensor.shape.first().copied()),
        host: host_tables,
    };
    let mut defaults_used = Vec::new();
    let hyper = match &manifest.metadata {
        Metadata::Gguf(map) => gguf::read(architecture, lineage, map, &facts, &mut defaults_used)?,
        Metadata::HuggingFace(map) => json::read(
            architecture,
            lineage,
            json::Source::HuggingFace,
            map,
            &facts,
            &mut defaults_used,
        )?,
        Metadata::Apr(map) => json::read(
            architecture,
            lineage,
            json::Source::Apr,
            map,
            &facts,
            &mut defaults_used,
        )?,
    };

    let mut resolver = Resolver {
        architecture,
        lineage,
        hyper: &hyper,
        claims,
        used: BTreeSet::new(),
        weights: Vec::new(),
        entries: Vec::new(),
        conv1d: true,
    };
    // The embeddings first, then the layers, then what follows them: the order of use.
    let of_model = requirements::of_model(architecture, &hyper);
    let (first, last): (Vec<_>, Vec<_>) = of_model.into_iter().partition(|r| r.kind == Kind::Embedding);
    for requirement in &first {
        resolver.place(None, requirement)?;
    }
    let of_layer = requirements::of_layer(architecture, &hyper);
    for layer in 0..hyper.layers {
        resolver.orient(layer, manifest.format);
        for requirement in &of_layer {
            resolver.place(Some(layer), requirement)?;
        }
    }
    for requirement in &last {
        resolver.place(None, requirement)?;
    }

    let Resolver {
        claims,
        used,
        weights,
        entries,
        ..
    } = resolver;
    let mut redundant: Vec<String> = claims.redundant;
    let known: BTreeSet<&str> = redundant
        .iter()
        .chain(&host_tensors)
        .map(String::as_str)
        .collect();
    let left: Vec<&TensorInfo> = manifest
        .tensors
        .iter()
        .filter(|t| !used.contains(t.name.as_str()) && !known.contains(t.name.as_str()))
        .collect();
    let mut unclaimed = Vec::new();
    for tensor in left {
        let is_tied_output = names::parse(architecture, &tensor.name)
            .is_some_and(|m| m.layer.is_none() && m.part == Part::One(Role::Output));
        if is_tied_output && hyper.tied_output == Some(true) {
            redundant.push(tensor.name.clone());
        } else {
            unclaimed.push(tensor.name.clone());
        }
    }
    Ok(ResolvedModel {
        architecture: architecture.name(),
        layers: hyper.layers,
        weights,
        index: IndexLayout {
            layers: hyper.layers,
            entries,
        },
        unclaimed,
        host_tensors,
        redundant,
        kind: architecture,
        lineage,
        hyper,
        defaults_used,
    })
}

fn architecture(manifest: &Manifest) -> Result<Architecture> {
    let unknown = |found: &str| Error::UnknownArchitecture {
        found: found.chars().take(80).collect(),
        known: Architecture::known(manifest.format),
    };
    match &manifest.metadata {
        Metadata::Gguf(map) => match map.get("general.architecture") {
            Some(MetaValue::String(name)) => Architecture::from_gguf(name).ok_or_else(|| unknown(name)),
            Some(_) => Err(Error::WrongType {
                place: "GGUF metadata",
                key: "general.architecture".into(),
                expected: "a string",
                found: "another type".into(),
            }),
            None => Err(Error::MissingKey {
                place: "GGUF metadata",
                key: "general.architecture".into(),
                tried: Vec::new(),
            }),
        },
        Metadata::HuggingFace(map) if map.is_empty() => Err(Error::MissingConfig {
            path: manifest.path.display().to_string(),
            tensors: manifest.tensors.len(),
        }),
        Metadata::HuggingFace(map) => {
            let names = json::architecture_names(map, json::Source::HuggingFace)?;
            names
                .iter()
                .find_map(|name| Architecture::from_hugging_face(name))
                .ok_or_else(|| unknown(names.first().map_or("", String::as_str)))
        }
        Metadata::Apr(map) => {
            let names = json::architecture_names(map, json::Source::Apr)?;
            names
                .iter()
                .find_map(|name| Architecture::from_any(name))
                .ok_or_else(|| unknown(names.first().map_or("", String::as_str)))
        }
    }
}

/// GGUF files follow converters' conventions, and so do names of their style in any other format.
fn lineage(manifest: &Manifest) -> Lineage {
    let from_gguf = match &manifest.metadata {
        Metadata::Gguf(_) => true,
        Metadata::Apr(map) => match map.get("original_format").and_then(|v| v.as_str()) {
            Some(format) => format.eq_ignore_ascii_case("gguf"),
            None => gguf_names(manifest),
        },
        Metadata::HuggingFace(_) => gguf_names(manifest),
    };
    if from_gguf {
        Lineage::Gguf
    } else {
        Lineage::HuggingFace
    }
}

fn gguf_names(manifest: &Manifest) -> bool {
    manifest.tensors.iter().any(|t| t.name.starts_with("blk."))
}

/// A tensor, and whose convention its name follows.
#[derive(Clone, Copy)]
struct Claim<'a> {
    tensor: &'a TensorInfo,
    convention: Convention,
}

/// All tensors by what their names mean.
struct Claims<'a> {
    by_part: BTreeMap<(Option<u32>, Part), Claim<'a>>,
    redundant: Vec<String>,
}

impl<'a> Claims<'a> {
    fn new(architecture: Architecture, manifest: &'a Manifest) -> Result<Self> {
        let mut by_part = BTreeMap::new();
        let mut redundant = Vec::new();
        for tensor in &manifest.tensors {
            let Some(meaning) = names::parse(architecture, &tensor.name) else {
                continue;
            };
            if meaning.part == Part::Redundant {
                redundant.push(tensor.name.clone());
                continue;
            }
            let claim = Claim {
                tensor,
                convention: meaning.convention,
            };
            if let Some(first) = by_part.insert((meaning.layer, meaning.part), claim) {
                return Err(Error::AmbiguousRole {
                    role: label(meaning.part),
                    layer: meaning.layer,
                    first: first.tensor.name.clone(),
                    second: tensor.name.clone(),
                });
            }
        }
        Ok(Self { by_part, redundant })
    }

    fn find(&self, layer: Option<u32>, part: Part) -> Option<Claim<'a>> {
        self.by_part.get(&(layer, part)).copied()
    }
}

/// What an error calls a part.
fn label(part: Part) -> String {
    match part {
        Part::One(role) => role.name().into(),
        Part::Qkv => "fused attn_q, attn_k, attn_v".into(),
        Part::QkvBias => "fused attn_q_bias, attn_k_bias, attn_v_bias".into(),
        Part::GateUp => "fused ffn_gate, ffn_up".into(),
        Part::Expert(role, expert) => format!("{role} of expert {expert}"),
        Part::ExpertsGateUp => "fused ffn_gate_exps, ffn_up_exps".into(),
        Part::RopeFreqs => "rope_freqs".into(),
        Part::RopeFactorsLong => "rope_factors_long".into(),
        Part::RopeFactorsShort => "rope_factors_short".into(),
        Part::Redundant => "redundant".into(),
    }
}

/// A role's values: where they are.
struct Found<'a> {
    sources: Vec<&'a TensorInfo>,
    views: Vec<hoist_backend::SourceView>,
    encoding: Encoding,
}

struct Resolver<'a> {
    architecture: Architecture,
    lineage: Lineage,
    hyper: &'a HyperParameters,
    claims: Claims<'a>,
    used: BTreeSet<&'a str>,
    weights: Vec<ResolvedWeight>,
    entries: Vec<IndexEntry>,
    /// Whether matrices of this layer with gpt2's names are `[in, out]`.
    conv1d: bool,
}

impl<'a> Resolver<'a> {
    /// gpt2's matrices are Conv1D, `[in, out]`, in Hugging Face files. APR stores `[out, in]`, but its importers copy some
    /// tensors as they are: the fused matrix, which is never square, tells.
    fn orient(&mut self, layer: u32, format: Format) {
        let fused_is_out_in = self
            .claims
            .find(Some(layer), Part::Qkv)
            .and_then(|c| c.tensor.shape.first().copied())
            .is_some_and(|rows| rows != u64::from(self.hyper.hidden));
        self.conv1d = !(format == Format::Apr && fused_is_out_in);
    }

    /// Finds one role and gives it its weight and its place in the index.
    fn place(&mut self, layer: Option<u32>, requirement: &Requirement) -> Result<()> {
        let role = requirement.role;
        let ties = role == Role::Output && self.hyper.tied_output == Some(true);
        let found = if ties {
            None
        } else {
            self.find(layer, requirement)?
        };
        let slot = match (found, requirement.need) {
            (Some(found), _) => Slot::Present(self.add(layer, requirement, found)?),
            (None, Need::Optional) => Slot::Absent,
            // The embedding has been placed first.
            (None, Need::OrTied) => Slot::Tied(WeightId(0)),
            (None, Need::Required) => {
                return Err(Error::MissingRole {
                    role,
                    layer,
                    architecture: self.architecture.name(),
                    tried: names::candidates(self.architecture, layer, role),
                });
            }
        };
        self.entries.push(IndexEntry { layer, role, slot });
        Ok(())
    }

    fn add(&mut self, layer: Option<u32>, requirement: &Requirement, found: Found<'a>) -> Result<WeightId> {
        let Requirement {
            role, kind, shape, ..
        } = *requirement;
        let vector = matches!(kind, Kind::Norm | Kind::Bias);
        for tensor in &found.sources {
            let allowed = if vector {
                tensor.encoding.is_float()
            } else {
                is_matrix_encoding(tensor.encoding)
            };
            if !allowed || tensor.encoding != found.encoding {
                return Err(Error::WrongEncoding {
                    tensor: tensor.name.clone(),
                    role: role.name().into(),
                    layer,
                    expected: if !allowed && vector {
                        "f32, f16 or bf16".into()
                    } else if !allowed {
                        "a float encoding or a weight quantisation".into()
                    } else {
                        format!("{}, as the others of this role", found.encoding)
                    },
                    found: tensor.encoding,
                });
            }
        }
        let from = found.encoding;
        let adds_one =
            kind == Kind::Norm && self.architecture.is_gemma() && self.lineage == Lineage::HuggingFace;
        let (encoding, change) = match (vector, adds_one) {
            (false, _) => (from, ValueChange::Keep),
            (true, true) => (Encoding::F32, ValueChange::WidenAddOne { from }),
            (true, false) if from == Encoding::F32 => (Encoding::F32, ValueChange::Keep),
            (true, false) => (Encoding::F32, ValueChange::Widen { from }),
        };
        let class = match kind {
            Kind::Norm => WeightClass::Gamma,
            Kind::Bias => WeightClass::Bias,
            Kind::Embedding | Kind::Matrix if from.is_quantized() => WeightClass::Quantized,
            Kind::Embedding | Kind::Matrix => WeightClass::Float,
        };
        let id = u32::try_from(self.weights.len()).map_err(|_| Error::TooLarge {
            what: "number of weights".into(),
            found: self.weights.len() as u64,
            limit: u32::MAX.into(),
        })?;
        self.used.extend(found.sources.iter().map(|t| t.name.as_str()));
        self.weights.push(ResolvedWeight {
            name: found.sources.first().map(|t| t.name.clone()).unwrap_or_default(),
            sources: found.sources.iter().map(|t| t.name.clone()).collect(),
            layer,
            role,
            class,
            encoding,
            shape,
            views: found.views,
            change,
            matmul_only: kind == Kind::Matrix,
        });
        Ok(WeightId(id))
    }

    /// Looks for a role under its own name, in fused tensors and in tensors of single experts.
    fn find(&self, layer: Option<u32>, requirement: &Requirement) -> Result<Option<Found<'a>>> {
        let own = self.claims.find(layer, Part::One(requirement.role));
        let fused = self.fused(layer, requirement.role);
        let experts = self.claims.find(layer, Part::Expert(requirement.role, 0));
        let ways: Vec<&TensorInfo> = [own, fused.as_ref().map(|f| f.0), experts]
            .into_iter()
            .flatten()
            .map(|c| c.tensor)
            .collect();
        if let [first, second, ..] = ways.as_slice() {
            return Err(Error::AmbiguousRole {
                role: requirement.role.name().into(),
                layer,
                first: first.name.clone(),
                second: second.name.clone(),
            });
        }
        if let Some(claim) = own {
            self.whole(layer, requirement, claim).map(Some)
        } else if let Some((claim, first, total)) = fused {
            self.part(layer, requirement, claim, first, total).map(Some)
        } else if experts.is_some() {
            self.stack(layer, requirement).map(Some)
        } else {
            Ok(None)
        }
    }

    /// The fused tensor that holds a role, its first row there, and the rows of all.
    fn fused(&self, layer: Option<u32>, role: Role) -> Option<(Claim<'a>, u64, u64)> {
        let (q, kv, ffn) = (
            self.hyper.q_width(),
            self.hyper.kv_width(),
            u64::from(self.hyper.ffn),
        );
        let (part, first, total) = match role {
            Role::AttnQ => (Part::Qkv, 0, q + 2 * kv),
            Role::AttnK => (Part::Qkv, q, q + 2 * kv),
            Role::AttnV => (Part::Qkv, q + kv, q + 2 * kv),
            Role::AttnQBias => (Part::QkvBias, 0, q + 2 * kv),
            Role::AttnKBias => (Part::QkvBias, q, q + 2 * kv),
            Role::AttnVBias => (Part::QkvBias, q + kv, q + 2 * kv),
            Role::FfnGate => (Part::GateUp, 0, 2 * ffn),
            Role::FfnUp => (Part::GateUp, ffn, 2 * ffn),
            Role::FfnGateExps => (Part::ExpertsGateUp, 0, 2 * ffn),
            Role::FfnUpExps => (Part::ExpertsGateUp, ffn, 2 * ffn),
            _ => return None,
        };
        self.claims.find(layer, part).map(|claim| (claim, first, total))
    }

    /// Whether a tensor is a Conv1D matrix, stored `[in, out]`.
    fn is_conv1d(&self, layer: Option<u32>, requirement: &Requirement, claim: Claim<'_>) -> bool {
        claim.convention == Convention::Gpt2
            && layer.is_some()
            && requirement.kind == Kind::Matrix
            && self.conv1d
    }

    /// A tensor that is all of a role.
    fn whole(&self, layer: Option<u32>, requirement: &Requirement, claim: Claim<'a>) -> Result<Found<'a>> {
        let shape = requirement.shape;
        if self.is_conv1d(layer, requirement, claim) {
            return self.columns(layer, requirement, claim, 0, shape.rows);
        }
        let tensor = claim.tensor;
        if matches!(requirement.kind, Kind::Norm | Kind::Bias) {
            self.expect_float(layer, requirement, tensor)?;
        }
        self.expect_shape(layer, requirement, tensor, shape)?;
        let mut views = Vec::new();
        Cutter::new(tensor, shape)?.all(&mut views);
        Ok(Found {
            sources: vec![tensor],
            views,
            encoding: tensor.encoding,
        })
    }

    /// The rows of a fused tensor that are a role.
    fn part(
        &self,
        layer: Option<u32>,
        requirement: &Requirement,
        claim: Claim<'a>,
        first: u64,
        total: u64,
    ) -> Result<Found<'a>> {
        if self.is_conv1d(layer, requirement, claim) {
            return self.columns(layer, requirement, claim, first, total);
        }
        let tensor = claim.tensor;
        let shape = requirement.shape;
        let mut views = Vec::new();
        if requirement.kind == Kind::Bias {
            let whole = Shape::vector(total);
            self.expect_shape(layer, requirement, tensor, whole)?;
            self.expect_float(layer, requirement, tensor)?;
            // As a column of one-element rows, so that a range of it is a range of rows.
            Cutter::new(tensor, Shape::matrix(total, 1))?.rows(0, first, shape.cols, &mut views);
        } else {
            let whole = Shape { rows: total, ..shape };
            self.expect_shape(layer, requirement, tensor, whole)?;
            let cutter = Cutter::new(tensor, whole)?;
            for matrix in 0..shape.matrices {
                cutter.rows(matrix, first, shape.rows, &mut views);
            }
        }
        Ok(Found {
            sources: vec![tensor],
            views,
            encoding: tensor.encoding,
        })
    }

    /// The columns of a Conv1D tensor that are a role, transposed.
    fn columns(
        &self,
        layer: Option<u32>,
        requirement: &Requirement,
        claim: Claim<'a>,
        first: u64,
        total: u64,
    ) -> Result<Found<'a>> {
        let tensor = claim.tensor;
        let shape = requirement.shape;
        let stored = Shape::matrix(shape.cols, total); // [in, out]
        self.expect_shape(layer, requirement, tensor, stored)?;
        self.expect_float(layer, requirement, tensor)?;
        let mut views = Vec::new();
        Cutter::new(tensor, stored)?.columns_transposed(first, shape.rows, &mut views);
        Ok(Found {
            sources: vec![tensor],
            views,
            encoding: tensor.encoding,
        })
    }

    /// One matrix for each expert, each its own tensor.
    fn stack(&self, layer: Option<u32>, requirement: &Requirement) -> Result<Found<'a>> {
        let role = requirement.role;
        let shape = requirement.shape;
        let one = Shape { matrices: 1, ..shape };
        let mut found = Found {
            sources: Vec::new(),
            views: Vec::new(),
            encoding: Encoding::F32,
        };
        // Stops at the first expert that the file lacks, so a false count costs nothing.
        for expert in 0..shape.matrices {
            let claim = u32::try_from(expert)
                .ok()
                .and_then(|expert| self.claims.find(layer, Part::Expert(role, expert)))
                .ok_or_else(|| Error::MissingRole {
                    role,
                    layer,
                    architecture: self.architecture.name(),
                    tried: names::candidates(self.architecture, layer, role)
                        .into_iter()
                        .map(|name| name.replace(".E.", &format!(".{expert}.")))
                        .collect(),
                })?;
            let tensor = claim.tensor;
            self.expect_shape(layer, requirement, tensor, one)?;
            Cutter::new(tensor, one)?.all(&mut found.views);
            if expert == 0 {
                found.encoding = tensor.encoding;
            }
            found.sources.push(tensor);
        }
        Ok(found)
    }

    fn expect_float(&self, layer: Option<u32>, requirement: &Requirement, tensor: &TensorInfo) -> Result<()> {
        if tensor.encoding.is_float() {
            return Ok(());
        }
        Err(Error::WrongEncoding {
            tensor: tensor.name.clone(),
            role: requirement.role.name().into(),
            layer,
            expected: "f32, f16 or bf16".into(),
            found: tensor.encoding,
        })
    }

    fn expect_shape(
        &self,
        layer: Option<u32>,
        requirement: &Requirement,
        tensor: &TensorInfo,
        shape: Shape,
    ) -> Result<()> {
        let vector = matches!(requirement.kind, Kind::Norm | Kind::Bias);
        let stacked = matches!(
            requirement.role,
            Role::FfnGateExps | Role::FfnUpExps | Role::FfnDownExps
        );
        let all = [shape.matrices, shape.rows, shape.cols];
        let expected = if vector {
            &all[2..]
        } else if stacked && shape.matrices != 1 {
            &all[..]
        } else {
            &all[1..]
        };
        // A stack of one expert may be a matrix or a stack.
        if tensor.shape == expected || (stacked && tensor.shape == all) {
            return Ok(());
        }
        Err(Error::WrongShape {
            tensor: tensor.name.clone(),
            role: requirement.role.name().into(),
            layer,
            expected: dims(expected),
            found: dims(&tensor.shape),
        })
    }
}
