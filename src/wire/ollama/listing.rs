//! `/api/tags`, `/api/ps`, `/api/show`, `/api/version`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::json::{parse, write};
use super::super::lenient::Object;
use super::super::message;
use super::super::time::rfc3339;
use crate::chat::{ChatError, ModelCard, ModelName};

/// The API's version that we speak; clients take it apart as three integers.
const VERSION: &str = "0.33.0";

/// How far "for ever" lies ahead, as Ollama writes it.
const FOR_EVER: Duration = Duration::from_secs(292 * 365 * 24 * 3600);

#[derive(Deserialize)]
struct ShowBody {
    model: Option<String>,
    name: Option<String>,
}

/// The model that a body of `/api/show` names.
///
/// # Errors
/// `Invalid`, naming the field.
pub fn model_name(body: &[u8]) -> Result<ModelName, ChatError> {
    let Object(body): Object<ShowBody> = parse(body)?;
    message::model(body.model.filter(|name| !name.is_empty()).or(body.name))
}

/// `/api/version`.
pub fn version() -> Vec<u8> {
    write(&json!({ "version": VERSION }))
}

/// `/api/tags`: what is served, then what else is installed. The latter can do nothing until it is served, and its
/// capabilities say so.
pub fn tags(served: &[ModelCard], installed: &[ModelCard]) -> Vec<u8> {
    let resting = installed.iter().map(|card| {
        let mut entry = entry(card);
        entry.insert("capabilities".to_owned(), json!([]));
        entry
    });
    let models: Vec<Value> = served.iter().map(entry).chain(resting).map(Value::Object).collect();
    write(&json!({ "models": models }))
}

/// `/api/ps`: what is loaded, which here stays so.
pub fn ps(cards: &[ModelCard], now: SystemTime) -> Vec<u8> {
    let models: Vec<Value> = cards
        .iter()
        .map(|card| {
            let mut entry = entry(card);
            entry.insert("expires_at".to_owned(), rfc3339(now + FOR_EVER).into());
            entry.insert("size_vram".to_owned(), 0.into());
            entry.insert("context_length".to_owned(), card.context_tokens.into());
            Value::Object(entry)
        })
        .collect();
    write(&json!({ "models": models }))
}

/// `/api/show`.
pub fn show(card: &ModelCard) -> Vec<u8> {
    let architecture = card.architecture.as_str();
    let mut info = Map::new();
    info.insert("general.architecture".to_owned(), architecture.into());
    info.insert("general.parameter_count".to_owned(), card.parameters.into());
    info.insert(format!("{architecture}.context_length"), card.trained_context_tokens.into());
    info.insert(format!("{architecture}.embedding_length"), card.embedding_len.into());
    info.insert(format!("{architecture}.vocab_size"), card.vocabulary_len.into());
    write(&json!({
        "license": "",
        "modelfile": format!("FROM {}\n", card.name),
        "parameters": "",
        "template": card.template,
        "details": details(card),
        "model_info": info,
        "modified_at": modified(card),
        "capabilities": capabilities(),
    }))
}

fn entry(card: &ModelCard) -> Map<String, Value> {
    let name = full_name(&card.name);
    let mut entry = Map::new();
    entry.insert("name".to_owned(), name.as_str().into());
    entry.insert("model".to_owned(), name.into());
    entry.insert("modified_at".to_owned(), modified(card).into());
    entry.insert("size".to_owned(), card.file_bytes.into());
    entry.insert("digest".to_owned(), card.digest.as_str().into());
    entry.insert("details".to_owned(), details(card));
    entry.insert("capabilities".to_owned(), capabilities());
    entry
}

/// Ollama's names always carry a tag.
fn full_name(name: &ModelName) -> String {
    match name.as_str().rsplit('/').next() {
        Some(last) if last.contains(':') => name.to_string(),
        _ => format!("{name}:latest"),
    }
}

fn details(card: &ModelCard) -> Value {
    json!({
        "parent_model": "",
        "format": "gguf",
        "family": card.architecture,
        "families": [card.architecture],
        "parameter_size": parameter_size(card.parameters),
        "quantization_level": card.quantization,
    })
}

/// Every model can be given tools: where a template has no place for them, they stand in the system turn.
fn capabilities() -> Value {
    json!(["completion", "tools"])
}

fn modified(card: &ModelCard) -> String {
    rfc3339(UNIX_EPOCH + Duration::from_secs(card.modified_unix_s.min(i32::MAX as u64)))
}

fn parameter_size(parameters: u64) -> String {
    let value = parameters as f64;
    match parameters {
        0..1_000 => parameters.to_string(),
        1_000..1_000_000 => format!("{:.1}K", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}M", value / 1e6),
        _ => format!("{:.1}B", value / 1e9),
    }
}
