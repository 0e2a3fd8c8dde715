use crate::{Architecture, HyperParameters, Lineage};
use hoist_backend::{Encoding, IndexLayout, Role, Shape, SourceView, ValueChange, WeightClass};

/// A weight with its meaning: what a plan needs, before any backend is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct ResolvedWeight {
    /// The name in reports: the source tensor's, or the first one's for weights made of several.
    pub name: String,
    /// All source tensors it is made of.
    pub sources: Vec<String>,
    /// Layer, or `None` for weights of the whole model.
    pub layer: Option<u32>,
    /// What it is for.
    pub role: Role,
    /// Memory class.
    pub class: WeightClass,
    /// Encoding of its canonical bytes.
    pub encoding: Encoding,
    /// Canonical shape.
    pub shape: Shape,
    /// Where its source bytes are.
    pub views: Vec<SourceView>,
    /// How source values become canonical values.
    pub change: ValueChange,
    /// Whether it is only ever multiplied with, so that a backend may ask for it transposed; false for embeddings and
    /// for output matrices tied to one.
    pub matmul_only: bool,
}

/// A model whose every required weight has been found and checked.
#[derive(Clone, Debug)]
pub struct ResolvedModel {
    /// Architecture name, such as `llama`.
    pub architecture: &'static str,
    /// Number of layers.
    pub layers: u32,
    /// Weights, in the order they are to be loaded; [`hoist_backend::WeightId`]s number them.
    pub weights: Vec<ResolvedWeight>,
    /// The table over them.
    pub index: IndexLayout,
    /// Tensors that no role claims.
    pub unclaimed: Vec<String>,
    /// Tensors that are known and read on the host instead of being resident, such as `rope_freqs.weight`.
    pub host_tensors: Vec<String>,
    /// Tensors that are known and not needed, such as an output matrix beside a configuration that ties it.
    pub redundant: Vec<String>,
    /// Which architecture's forward pass it has.
    pub kind: Architecture,
    /// Whose conventions its values follow.
    pub lineage: Lineage,
    /// The numbers of its forward pass.
    pub hyper: HyperParameters,
    /// Hyper-parameters that the file lacks and whose default its format defines, as (key, value).
    pub defaults_used: Vec<(String, String)>,
}
