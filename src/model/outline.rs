//! What running a model takes, from its header alone.

use super::shape::{self, Shape};
use super::{KvType, ModelError, ModelSpec};
use crate::gguf::Gguf;
use crate::residency::{ExpertLayer, Needs};
use crate::units::Bytes;

/// A model's costs before it is opened, or before it exists.
#[derive(Clone, Debug, PartialEq)]
pub struct Outline {
    /// Shape and sizes.
    pub spec: ModelSpec,
    /// Weights that one token is multiplied with: all but the table of embeddings, and of the routed experts only
    /// those that are used.
    pub active_parameters: u64,
    /// The weights' part of what it needs.
    weights: Needs,
}

/// A tensor as an outline sees it.
pub(super) struct Part<'a> {
    pub(super) name: &'a str,
    pub(super) values: u64,
    pub(super) bytes: u64,
}

impl Outline {
    /// Of a file, whose header alone is looked at.
    ///
    /// # Errors
    /// As [`super::open`].
    pub fn from_gguf(gguf: &Gguf, kv_type: KvType) -> Result<Outline, ModelError> {
        let shape = Shape::from_gguf(gguf)?;
        let parts = gguf.tensors().iter().map(|tensor| Part {
            name: &tensor.name,
            values: tensor.values(),
            bytes: tensor.bytes,
        });
        Ok(Outline::new(&shape, kv_type, parts))
    }

    /// Of tensors that have the names the shape calls for.
    pub(super) fn new<'a>(
        shape: &Shape,
        kv_type: KvType,
        parts: impl Iterator<Item = Part<'a>>,
    ) -> Outline {
        let counts = shape.layers.iter().map(|layer| layer.feed_forward.experts());
        let mut layers: Vec<ExpertLayer> =
            counts.map(|count| ExpertLayer { count, bytes: Bytes(0) }).collect();
        let mut weights = Needs { experts_used: EXPERTS_USED, ..Needs::default() };
        let mut active_parameters = 0;
        for Part { name, values, bytes } in parts {
            let used = u64::from(EXPERTS_USED);
            match role(name, shape.tied) {
                Role::Experts(layer) => {
                    if let Some(layer) = layers.get_mut(layer).filter(|layer| layer.count > 0) {
                        let count = u64::from(layer.count);
                        layer.bytes.0 += bytes / count;
                        active_parameters += values / count * used.min(count);
                    }
                }
                Role::Table => weights.table.0 += bytes,
                Role::Shared => {
                    weights.shared.0 += bytes;
                    weights.dense.0 += bytes;
                    active_parameters += values;
                }
                Role::Dense => {
                    weights.dense.0 += bytes;
                    active_parameters += values;
                }
            }
        }
        weights.expert_layers = layers.into_iter().filter(|layer| layer.count > 0).collect();
        Outline { spec: shape.spec(kv_type), active_parameters, weights }
    }

    /// What it needs for `context` tokens of one sequence, and passes of at most `pass_tokens` tokens.
    pub fn needs(&self, context: u32, pass_tokens: usize) -> Needs {
        let scratch = self.spec.scratch_token_bytes.saturating_mul(pass_tokens as u64);
        Needs {
            kv: Bytes(self.spec.kv_bytes(context)),
            scratch: Bytes(scratch),
            ..self.weights.clone()
        }
    }
}

/// What becomes of a tensor.
enum Role {
    /// One of the three matrices of the routed experts of a layer.
    Experts(usize),
    /// Read by rows.
    Table,
    Shared,
    Dense,
}

fn role(name: &str, tied: bool) -> Role {
    if name == shape::TOKEN_EMBD && !tied {
        return Role::Table;
    }
    let part = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let Some((layer, part)) = part else { return Role::Dense };
    match (layer.parse(), part) {
        (Ok(layer), part) if part.ends_with("_exps.weight") => Role::Experts(layer),
        (_, part) if part.ends_with("_shexp.weight") => Role::Shared,
        _ => Role::Dense,
    }
}

/// Top-1 routing is what is computed here.
const EXPERTS_USED: u32 = 1;
