//! Architecture `llama4`: Scout, Maverick and models of their kind, text only.
//!
//! What no key says is supplied here: every fourth layer has no rotation, no norm of queries and keys and
//! no chunks, but a temperature; the others see their chunk alone. `llama4.attention.sliding_window`, here
//! the chunk length, and the private keys `scoutd.attn_floor_scale` and `scoutd.attn_scale` may say otherwise.

use super::ModelError;
use super::shape::{DIMENSION_MAX, FeedForward, Keys, Layer, Shape, Temperature};
use crate::gguf::Gguf;

pub(super) fn shape(gguf: &Gguf) -> Result<Shape, ModelError> {
    let keys = Keys::new(gguf, "llama4");
    let experts = keys.count("expert_count", EXPERTS_MAX)?;
    let used = keys.count("expert_used_count", DIMENSION_MAX)?;
    if used != 1 {
        let key = keys.key("expert_used_count");
        return Err(ModelError::Unsupported { key, value: used.to_string() });
    }
    keys.refuse("expert_shared_count", &["1"])?;
    keys.refuse("expert_weights_scale", &["0", "1"])?;
    keys.refuse("expert_gating_func", &["2"])?;
    keys.refuse("attention.scale", &["0"])?;
    // MobileLLM-Pro says zero, and means neither chunks nor temperature.
    let window = keys.key("attention.sliding_window");
    let chunk = match keys.metadata.u32_opt(&window)? {
        Some(0) => return Err(ModelError::Unsupported { key: window, value: "0".to_owned() }),
        Some(chunk) => chunk as usize,
        None => CHUNK_DEFAULT,
    };
    let step = keys.count("interleave_moe_layer_step", DIMENSION_MAX)?;
    let expert_width = keys.count("expert_feed_forward_length", DIMENSION_MAX)?;
    let layer_count = keys.layer_count()?;
    let dense_width = match step {
        1 => None,
        _ => Some(keys.count("feed_forward_length", DIMENSION_MAX)?),
    };
    let experts = FeedForward::Experts { experts, width: expert_width };
    let layers = layers(layer_count, experts, step, dense_width);
    let temperature = Temperature {
        floor: keys.positive("scoutd.attn_floor_scale")?.unwrap_or(FLOOR_DEFAULT),
        scale: keys.positive("scoutd.attn_scale")?.unwrap_or(SCALE_DEFAULT),
    };
    let shape = keys.shape(gguf, layers, None)?;
    Ok(Shape { chunk: Some(chunk), temperature: Some(temperature), ..shape })
}

/// The layers: one in `step` has `experts`, the others are dense and of `dense_width`.
pub(super) fn layers(
    count: usize,
    experts: FeedForward,
    step: usize,
    dense_width: Option<usize>,
) -> Vec<Layer> {
    // Maverick has no norm of queries and keys; its number of experts is what tells it.
    let qk_norm =
        !matches!(experts, FeedForward::Experts { experts, .. } if experts == MAVERICK_EXPERTS);
    let layers = (1..=count).map(|number| {
        let rope = !number.is_multiple_of(NO_ROPE_EVERY);
        let feed_forward = match dense_width {
            Some(width) if !number.is_multiple_of(step) => FeedForward::Dense { width },
            _ => experts,
        };
        Layer { rope, local: rope, qk_norm: rope && qk_norm, temperature: !rope, feed_forward }
    });
    layers.collect()
}

pub(super) const CHUNK_DEFAULT: usize = 8192;
const FLOOR_DEFAULT: f32 = 8192.0;
const SCALE_DEFAULT: f32 = 0.1;
const NO_ROPE_EVERY: usize = 4;
const MAVERICK_EXPERTS: usize = 128;
/// Experts are numbered by `u16`.
const EXPERTS_MAX: usize = 65_536;
