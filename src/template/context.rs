//! The variables that a chat template sees, in the shape that `transformers` gives them.

use serde_json::{Map, Value, json};

use super::RenderOptions;
use crate::chat::{Message, Role, Tool};
use crate::tokenizer::Tokenizer;

/// A message for the template; its role may be one that `chat` does not know.
#[derive(Clone, Debug)]
pub(super) struct Turn {
    pub(super) role: &'static str,
    pub(super) message: Message,
}

/// The role as templates name it.
pub(super) fn role_name(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    }
}

pub(super) fn messages(turns: &[Turn]) -> Value {
    turns.iter().map(message).collect()
}

fn message(turn: &Turn) -> Value {
    let Message { content, tool_calls, tool_call_id, tool_name, .. } = &turn.message;
    let mut fields = Map::new();
    fields.insert("role".to_owned(), turn.role.into());
    fields.insert("content".to_owned(), content.as_str().into());
    // Templates ask whether the key is there, not only whether it is empty.
    if !tool_calls.is_empty() {
        let call = |call: &crate::chat::ToolCall| {
            json!({"type": "function", "id": call.id,
                   "function": {"name": call.name, "arguments": call.arguments}})
        };
        fields.insert("tool_calls".to_owned(), tool_calls.iter().map(call).collect());
    }
    if let Some(id) = tool_call_id {
        fields.insert("tool_call_id".to_owned(), id.as_str().into());
    }
    if let Some(name) = tool_name {
        fields.insert("name".to_owned(), name.as_str().into());
    }
    Value::Object(fields)
}

/// The tools, or null without any: templates ask for `none`.
pub(super) fn tools(tools: &[Tool]) -> Value {
    if tools.is_empty() {
        return Value::Null;
    }
    tools.iter().map(|tool| json!({"type": "function", "function": function(tool)})).collect()
}

/// A tool's description as OpenAI writes it.
pub(super) fn function(tool: &Tool) -> Value {
    let mut fields = Map::new();
    fields.insert("name".to_owned(), tool.name.as_str().into());
    if let Some(description) = &tool.description {
        fields.insert("description".to_owned(), description.as_str().into());
    }
    let no_parameters = || json!({"type": "object", "properties": {}});
    let parameters = tool.parameters.clone().unwrap_or_else(no_parameters);
    fields.insert("parameters".to_owned(), parameters);
    Value::Object(fields)
}

/// All variables; the standard ones win over the request's own.
pub(super) fn all(
    tokenizer: &Tokenizer,
    messages: Value,
    tools: Value,
    variables: Value,
    options: &RenderOptions,
) -> Map<String, Value> {
    let Value::Object(mut all) = variables else { unreachable!("made from a map") };
    let text = |token: Option<_>| token.map_or(String::new(), |id| tokenizer.text_of(id).into());
    all.insert("messages".to_owned(), messages);
    all.insert("tools".to_owned(), tools);
    all.insert("add_generation_prompt".to_owned(), options.add_generation_prompt.into());
    all.insert("bos_token".to_owned(), text(tokenizer.bos()).into());
    all.insert("eos_token".to_owned(), text(tokenizer.eos()).into());
    all
}
