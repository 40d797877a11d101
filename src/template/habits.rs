//! What a template can express, found by trying it on small conversations, and how a conversation is
//! written for one that cannot express all of it.
//!
//! - A template that ignores tools (ChatML of SmolLM2): the tools stand as JSON in the system turn.
//! - One that ignores calls: earlier calls stand as text in the assistant's turn, in the shape in which the
//!   model is asked to write them (`OutputParser` reads it back).
//! - One that writes the role as it comes, of a model of the Llama family: results of tools have the role
//!   `ipython`, which these models were trained on. One that refuses results: they come as the user's words.
//! - One that refuses a system turn: its text stands before the user's first words.

use std::borrow::Cow;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Map, json};

use super::context::{self, Turn, role_name};
use super::{ChatTemplate, RenderOptions};
use crate::chat::{Message, Role, Tool, ToolCall};

/// What a template can express. The default says that it can express everything.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Habits {
    pub(super) lists_tools: bool,
    writes_calls: bool,
    writes_system: bool,
    result_role: &'static str,
    call_shape: CallShape,
}

impl Default for Habits {
    fn default() -> Habits {
        Habits {
            lists_tools: true,
            writes_calls: true,
            writes_system: true,
            result_role: "tool",
            call_shape: CallShape::Parameters,
        }
    }
}

/// The shape in which a model is asked to call tools.
#[derive(Clone, Copy, Debug, PartialEq)]
enum CallShape {
    /// `{"name":…,"parameters":{…}}`, as the Llama family.
    Parameters,
    /// `<tool_call>{"name":…,"arguments":…}</tool_call>`, as models with ChatML.
    Tagged,
}

/// Tries a template.
pub(super) fn find(template: &ChatTemplate) -> Habits {
    let user = || Message::text(Role::User, "hello");
    let call = || {
        let mut message = Message::text(Role::Assistant, "");
        let (id, name) = ("123456789".to_owned(), PROBE.to_owned());
        message.tool_calls.push(ToolCall { id, name, arguments: Map::new() });
        message
    };
    let result = || Message {
        tool_call_id: Some("123456789".to_owned()),
        tool_name: Some("f".to_owned()),
        ..Message::text(Role::Tool, PROBE)
    };
    let tool_of = |name: &str| Tool {
        name: name.to_owned(),
        description: Some("d".to_owned()),
        parameters: Some(json!({"type": "object", "properties": {}})),
    };
    let shows = |messages: &[Message], tools: &[Tool]| {
        render(template, messages, tools).is_some_and(|text| text.contains(PROBE))
    };
    let system = [Message::text(Role::System, PROBE), user()];
    // Some templates write a call only once it is answered, or only beside tools.
    let mut answered = result();
    answered.content = "done".to_owned();
    let mut called = call();
    called.tool_calls[0].name = "f".to_owned();
    Habits {
        lists_tools: shows(&[user()], &[tool_of(PROBE)]),
        writes_calls: shows(&[user(), call()], &[])
            || shows(&[user(), call(), answered], &[])
            || shows(&[user(), call()], &[tool_of("f")]),
        writes_system: shows(&system, &[]),
        result_role: result_role(template, &[user(), called, result()]),
        call_shape: if template.tokenizer().control("<|im_start|>").is_some() {
            CallShape::Tagged
        } else {
            CallShape::Parameters
        },
    }
}

fn result_role(template: &ChatTemplate, messages: &[Message]) -> &'static str {
    let Some(text) = render(template, messages, &[]).filter(|text| text.contains(PROBE)) else {
        return "user";
    };
    let as_it_comes = ["<|header_start|>tool<", "<|start_header_id|>tool<"];
    if as_it_comes.iter().any(|role| text.contains(role)) { "ipython" } else { "tool" }
}

fn render(template: &ChatTemplate, messages: &[Message], tools: &[Tool]) -> Option<String> {
    let now = Timestamp::UNIX_EPOCH.to_zoned_datetime(TimeZone::UTC);
    let prompt = template.render(messages, tools, &RenderOptions::at(now)).ok()?;
    Some(prompt.text())
}

impl Habits {
    /// The conversation as the template can express it.
    pub(super) fn adapt<'t>(
        &self,
        messages: &[Message],
        tools: &'t [Tool],
    ) -> (Vec<Turn>, Cow<'t, [Tool]>) {
        let mut turns: Vec<Turn> = messages.iter().map(|message| self.turn(message)).collect();
        let mut tools = Cow::Borrowed(tools);
        if !self.lists_tools && !tools.is_empty() {
            self.list_tools(&mut turns, &tools);
            tools = Cow::Borrowed(&[]);
        }
        if !self.writes_system {
            fold_system(&mut turns);
        }
        (turns, tools)
    }

    fn turn(&self, message: &Message) -> Turn {
        let mut message = message.clone();
        if !self.writes_calls {
            for call in std::mem::take(&mut message.tool_calls) {
                if !message.content.is_empty() {
                    message.content.push('\n');
                }
                message.content.push_str(&self.call_text(&call));
            }
        }
        let role = match message.role {
            Role::Tool => self.result_role,
            role => role_name(role),
        };
        Turn { role, message }
    }

    fn call_text(&self, call: &ToolCall) -> String {
        let (name, arguments) = (&call.name, &call.arguments);
        match self.call_shape {
            CallShape::Parameters => json!({"name": name, "parameters": arguments}).to_string(),
            CallShape::Tagged => {
                let call = json!({"name": name, "arguments": arguments});
                format!("<tool_call>{call}</tool_call>")
            }
        }
    }

    fn list_tools(&self, turns: &mut Vec<Turn>, tools: &[Tool]) {
        let shape = match self.call_shape {
            CallShape::Parameters => r#"{"name":…,"parameters":{…}}"#,
            CallShape::Tagged => r#"<tool_call>{"name":…,"arguments":…}</tool_call>"#,
        };
        let tools: serde_json::Value = tools.iter().map(context::function).collect();
        let listed = format!(
            "You may call these functions: {tools}. To call one, answer only with {shape}."
        );
        match turns.first_mut() {
            Some(first) if first.message.role == Role::System => {
                if !first.message.content.is_empty() {
                    first.message.content.push_str("\n\n");
                }
                first.message.content.push_str(&listed);
            }
            _ => {
                let message = Message::text(Role::System, listed);
                turns.insert(0, Turn { role: role_name(Role::System), message });
            }
        }
    }
}

/// Puts the texts of system turns before the next words of the user.
fn fold_system(turns: &mut Vec<Turn>) {
    let mut held = String::new();
    let mut folded: Vec<Turn> = Vec::with_capacity(turns.len());
    for mut turn in turns.drain(..) {
        if turn.message.role == Role::System {
            held.push_str(&turn.message.content);
            held.push_str("\n\n");
            continue;
        }
        if turn.message.role == Role::User && !held.is_empty() {
            turn.message.content.insert_str(0, &std::mem::take(&mut held));
        }
        folded.push(turn);
    }
    if !held.is_empty() {
        let message = Message::text(Role::User, held.trim_end());
        folded.push(Turn { role: role_name(Role::User), message });
    }
    *turns = folded;
}

/// A word that no template writes by itself.
const PROBE: &str = "zq7probe";
