//! Turns of a conversation, and tools.

use serde::{Deserialize, Serialize};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions (OpenAI's `developer` as well).
    System,
    /// The person or program asking.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

/// One turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// The text; empty where the turn only calls tools.
    pub content: String,
    /// Calls the assistant made in this turn.
    pub tool_calls: Vec<ToolCall>,
    /// For a tool's result: the call it answers, where the client says so.
    pub tool_call_id: Option<String>,
    /// For a tool's result: the tool's name, where the client says so.
    pub tool_name: Option<String>,
}

impl Message {
    /// A turn of plain text.
    pub fn text(role: Role, content: impl Into<String>) -> Message {
        Message {
            role,
            content: content.into(),
            tool_calls: Vec::new(),
            tool_call_id: None,
            tool_name: None,
        }
    }
}

/// A function the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// The function's name.
    pub name: String,
    /// What it does, for the model.
    pub description: Option<String>,
    /// JSON schema of its arguments, keys in the client's order; absent means no arguments.
    pub parameters: Option<serde_json::Value>,
}

/// A call the model made.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// Unique within its reply.
    pub id: String,
    /// The tool's name.
    pub name: String,
    /// Always an object; keys in the order the model wrote them.
    pub arguments: serde_json::Map<String, serde_json::Value>,
}

/// Which tools the model may or must call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// The model decides.
    #[default]
    Auto,
    /// No calls: tools are not shown to the model.
    None,
    /// At least one call.
    Required,
    /// A call of this function.
    Function(String),
}
