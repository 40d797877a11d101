//! Architecture `llama`: Llama 2 and 3.x, and the many models that share their file layout.

use super::ModelError;
use super::shape::{DIMENSION_MAX, FeedForward, Keys, Layer, Shape};
use crate::gguf::Gguf;

/// RoPE in every layer, plain causal attention, dense feed-forward.
pub(super) fn shape(gguf: &Gguf) -> Result<Shape, ModelError> {
    let keys = Keys::new(gguf, "llama");
    // Mixtral shares this architecture's name, but routes by softmax over several experts.
    keys.refuse("expert_count", &["0"])?;
    keys.refuse("expert_used_count", &["0"])?;
    keys.refuse("attention.causal", &["true"])?;
    keys.refuse("attention.scale", &["0"])?;
    keys.refuse("attention.clamp_kqv", &["0"])?;
    keys.refuse("attention.sliding_window", &["0"])?;
    keys.refuse("attn_logit_softcapping", &["0"])?;
    keys.refuse("final_logit_softcapping", &["0"])?;
    keys.refuse("logit_scale", &["0", "1"])?;
    keys.refuse("residual_scale", &["0", "1"])?;
    keys.refuse("embedding_scale", &["0", "1"])?;
    keys.refuse("use_parallel_residual", &["false"])?;
    let width = keys.count("feed_forward_length", DIMENSION_MAX)?;
    keys.shape(gguf, vec![layer(width); keys.layer_count()?], Some(THETA_DEFAULT))
}

/// Any layer; they are all alike.
pub(super) fn layer(width: usize) -> Layer {
    Layer {
        rope: true,
        local: false,
        qk_norm: false,
        temperature: false,
        feed_forward: FeedForward::Dense { width },
    }
}

/// Llama 2's files lack the key.
const THETA_DEFAULT: f32 = 10_000.0;
