//! What both dialects share about turns, tools and calls.

use std::collections::VecDeque;

use serde_json::{Map, Value};

use super::schema;
use crate::chat::{ChatError, Message, ModelName, Role, Tool, ToolCall};

/// A role as clients write it, in any case.
pub(super) fn role(field: &str, text: Option<&str>) -> Result<Role, ChatError> {
    match text.unwrap_or("").to_ascii_lowercase().as_str() {
        "system" | "developer" => Ok(Role::System),
        "user" => Ok(Role::User),
        "assistant" => Ok(Role::Assistant),
        "tool" | "function" => Ok(Role::Tool),
        _ => Err(ChatError::invalid(
            field,
            format!("{field} must be \"system\", \"user\", \"assistant\" or \"tool\""),
        )),
    }
}

/// A model's name as it stands in a request; absent is the default model.
pub(super) fn model(name: Option<String>) -> Result<ModelName, ChatError> {
    let name = ModelName::new(name.as_deref().unwrap_or(""));
    check_model_name(&name)?;
    Ok(name)
}

/// Whether `name` could be a model's, or is empty, which means the default one.
///
/// # Errors
/// `Invalid`, without repeating the name.
pub fn check_model_name(name: &ModelName) -> Result<(), ChatError> {
    if name.as_str().is_empty() || is_model_name(name.as_str()) {
        return Ok(());
    }
    let message = "model must be a name of at most 128 letters, digits and . _ : / -";
    Err(ChatError::invalid("model", message))
}

fn is_model_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    bytes.len() <= 128
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"._:/-".contains(b))
        && !name.contains("..")
}

/// A tool offered, with a bearable schema.
pub(super) fn tool(
    field: &str,
    name: Option<String>,
    description: Option<String>,
    parameters: Option<Value>,
) -> Result<Tool, ChatError> {
    let Some(name) = name else {
        let field = format!("{field}.function.name");
        return Err(ChatError::invalid(&field, format!("{field} is missing")));
    };
    let parameters = match parameters {
        None | Some(Value::Null) => None,
        Some(value) => Some(schema::checked(&format!("{field}.function.parameters"), value)?),
    };
    Ok(Tool { name, description, parameters })
}

/// The arguments of a call in a conversation's history: an object, or the text of one.
pub(super) fn arguments(field: &str, value: Value) -> Result<Map<String, Value>, ChatError> {
    let value = match value {
        Value::String(text) if text.trim().is_empty() => Value::Null,
        Value::String(text) => serde_json::from_str(&text).unwrap_or(Value::Bool(false)),
        other => other,
    };
    match value {
        Value::Object(arguments) => Ok(arguments),
        Value::Null => Ok(Map::new()),
        _ => Err(ChatError::invalid(field, format!("{field} must be a JSON object"))),
    }
}

/// Gives calls without an id one, and tells each tool result which call it answers: by id where the client
/// names it, else in order, which is all that Home Assistant sends.
pub(super) fn pair_tool_results(messages: &mut [Message]) {
    let mut open: VecDeque<ToolCall> = VecDeque::new();
    let mut calls_made = 0;
    for message in messages {
        match message.role {
            Role::Assistant => {
                open.clear();
                for call in &mut message.tool_calls {
                    if call.id.is_empty() {
                        call.id = format!("call_{calls_made}");
                    }
                    calls_made += 1;
                    open.push_back(call.clone());
                }
            }
            Role::Tool => pair(message, &mut open),
            Role::System | Role::User => {}
        }
    }
}

fn pair(result: &mut Message, open: &mut VecDeque<ToolCall>) {
    let at = match (&result.tool_call_id, &result.tool_name) {
        (Some(id), _) => open.iter().position(|call| call.id == *id),
        (None, Some(name)) => open.iter().position(|call| call.name == *name),
        (None, None) => (!open.is_empty()).then_some(0),
    };
    if let Some(call) = at.and_then(|at| open.remove(at)) {
        result.tool_call_id.get_or_insert(call.id);
        result.tool_name.get_or_insert(call.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_models() {
        for good in ["scout", "scout:latest", "hf.co/a/B-1_q4.gguf", "0"] {
            assert!(is_model_name(good), "{good}");
        }
        for bad in ["", "../x", "/etc/passwd", "a..b", "a b", "ü", "a\0", "-a", &"a".repeat(129)] {
            assert!(!is_model_name(bad), "{bad}");
        }
    }

    #[test]
    fn results_without_ids_are_paired_in_order() {
        let call = |name: &str| ToolCall {
            id: String::new(),
            name: name.to_owned(),
            arguments: Map::new(),
        };
        let mut assistant = Message::text(Role::Assistant, "");
        assistant.tool_calls = vec![call("first"), call("second")];
        let mut messages = vec![
            Message::text(Role::User, "go"),
            assistant,
            Message::text(Role::Tool, "1"),
            Message::text(Role::Tool, "2"),
            Message::text(Role::Tool, "nobody called this"),
        ];
        pair_tool_results(&mut messages);
        let paired: Vec<_> = messages[2..]
            .iter()
            .map(|m| (m.tool_call_id.as_deref(), m.tool_name.as_deref()))
            .collect();
        assert_eq!(
            paired,
            [(Some("call_0"), Some("first")), (Some("call_1"), Some("second")), (None, None)]
        );
    }

    #[test]
    fn arguments_are_objects_or_their_text() {
        for (value, expected) in [
            (Value::from("{\"a\":1}"), "{\"a\":1}"),
            (serde_json::json!({"a": 1}), "{\"a\":1}"),
            (Value::from(""), "{}"),
            (Value::Null, "{}"),
        ] {
            let arguments = arguments("x", value).expect("valid");
            assert_eq!(Value::Object(arguments).to_string(), expected);
        }
        for bad in [Value::from("[1]"), Value::from("{"), serde_json::json!([1])] {
            let error = arguments("x", bad).expect_err("not an object").to_string();
            assert_eq!(error, "x must be a JSON object");
        }
    }
}
