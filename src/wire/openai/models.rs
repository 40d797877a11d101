//! Listings and llama-server's small endpoints.

use serde_json::{Value, json};

use super::super::json::write;
use crate::chat::ModelCard;

/// `/v1/models`.
pub fn models(cards: &[ModelCard]) -> Vec<u8> {
    let data: Vec<Value> = cards.iter().map(entry).collect();
    write(&json!({ "object": "list", "data": data }))
}

/// `/v1/models/{id}`.
pub fn model(card: &ModelCard) -> Vec<u8> {
    write(&entry(card))
}

/// `/health` of a server that can answer.
pub fn health() -> Vec<u8> {
    write(&json!({ "status": "ok" }))
}

/// `/health` of one that cannot yet; `code` is the status it goes with.
pub fn loading(code: u16) -> Vec<u8> {
    let error = json!({ "code": code, "message": "Loading model", "type": "unavailable_error" });
    write(&json!({ "error": error }))
}

/// `/readyz`: why not, if not.
pub fn ready(reasons: &[&str]) -> Vec<u8> {
    let status = if reasons.is_empty() { "ready" } else { "not ready" };
    write(&json!({ "status": status, "reasons": reasons }))
}

/// `/props`. The path is only a name: where files lie is nobody's business.
pub fn props(card: &ModelCard, slots: u16, version: &str) -> Vec<u8> {
    write(&json!({
        "default_generation_settings": { "n_ctx": card.context_tokens, "params": {} },
        "total_slots": slots,
        "model_path": card.name.as_str(),
        "chat_template": card.template,
        "modalities": { "vision": false },
        "build_info": format!("scoutd {version}"),
        "is_sleeping": false,
    }))
}

fn entry(card: &ModelCard) -> Value {
    json!({
        "id": card.name.as_str(),
        "object": "model",
        "created": card.modified_unix_s,
        "owned_by": "scoutd",
        "meta": {
            "n_ctx": card.context_tokens,
            "n_ctx_train": card.trained_context_tokens,
            "n_embd": card.embedding_len,
            "n_params": card.parameters,
            "n_vocab": card.vocabulary_len,
            "size": card.file_bytes,
        },
    })
}
