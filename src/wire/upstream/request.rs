//! A validated request as the body of another server's chat endpoint.
//!
//! The strictest server sets the form: contents are always strings, stops always lists, and a field that says
//! nothing beyond its default is left out.

use serde_json::{Map, Value, json};

use super::super::json::write;
use crate::chat::{
    ChatError, ChatRequestParts, Input, Message, OutputFormat, Role, SamplingParams, ToolChoice,
};

/// What the other server understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// OpenAI's fields, and no usage with a stream: distributed-llama's server.
    Bare,
    /// Ollama's `/api/chat`; the context to ask for, always the same, because another one reloads the model.
    Ollama {
        /// `num_ctx`; `None` leaves it to the server.
        context_tokens: Option<u32>,
    },
    /// OpenAI's `/v1/chat/completions`.
    OpenAi,
    /// As OpenAI's, with the fields that scoutd and llama-server add.
    Scoutd,
}

/// The body that asks `model` for a streamed answer of at most `max_tokens`.
///
/// # Errors
/// `NotSupported` if the request is not a conversation.
pub fn chat_body(
    parts: &ChatRequestParts,
    model: &str,
    max_tokens: u32,
    dialect: Dialect,
) -> Result<Vec<u8>, ChatError> {
    let Input::Messages(messages) = &parts.input else {
        let message = "other machines are asked for chat answers only";
        return Err(ChatError::NotSupported(message.to_owned()));
    };
    let body = match dialect {
        Dialect::Ollama { context_tokens } => {
            ollama(parts, messages, model, max_tokens, context_tokens)
        }
        _ => openai(parts, messages, model, max_tokens, dialect),
    };
    Ok(write(&body))
}

/// The body that asks an OpenAI server for the likeliest first tokens of an answer.
pub fn label_body(messages: &[Message], model: &str, top: u8) -> Vec<u8> {
    let mut body = Map::new();
    body.insert("model".to_owned(), model.into());
    body.insert("messages".to_owned(), turns(messages, false));
    body.insert("max_tokens".to_owned(), 1.into());
    body.insert("temperature".to_owned(), 0.into());
    body.insert("logprobs".to_owned(), true.into());
    body.insert("top_logprobs".to_owned(), top.into());
    body.insert("stream".to_owned(), false.into());
    write(&body)
}

fn openai(
    parts: &ChatRequestParts,
    messages: &[Message],
    model: &str,
    max_tokens: u32,
    dialect: Dialect,
) -> Map<String, Value> {
    let mut body = Map::new();
    let mut put = |name: &str, value: Value| {
        body.insert(name.to_owned(), value);
    };
    put("model", model.into());
    put("messages", turns(messages, false));
    put("stream", true.into());
    if dialect != Dialect::Bare {
        put("stream_options", json!({ "include_usage": true }));
    }
    put("max_tokens", max_tokens.into());
    let plain = SamplingParams::default();
    let sampling = &parts.sampling;
    put("temperature", number(sampling.temperature));
    if sampling.top_p != plain.top_p {
        put("top_p", number(sampling.top_p));
    }
    if let Some(seed) = sampling.seed {
        // Servers read a signed number of 64 bits.
        put("seed", (seed & i64::MAX as u64).into());
    }
    if !parts.stop.is_empty() {
        put("stop", parts.stop.clone().into());
    }
    if dialect == Dialect::Bare {
        return body;
    }
    for (name, value) in [
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
    ] {
        if value != 0.0 {
            put(name, number(value));
        }
    }
    match &parts.format {
        OutputFormat::Text => {}
        OutputFormat::JsonObject => put("response_format", json!({ "type": "json_object" })),
        OutputFormat::JsonSchema { schema, strict } => {
            let named = json!({ "name": "answer", "strict": strict, "schema": schema });
            put("response_format", json!({ "type": "json_schema", "json_schema": named }));
        }
    }
    if !parts.tools.is_empty() {
        put("tools", tools(parts));
        put("tool_choice", tool_choice(&parts.tool_choice));
    }
    if dialect == Dialect::Scoutd {
        own_fields(parts, &plain, &mut put);
    }
    body
}

/// What scoutd and llama-server take beyond OpenAI's fields.
fn own_fields(parts: &ChatRequestParts, plain: &SamplingParams, put: &mut impl FnMut(&str, Value)) {
    let sampling = &parts.sampling;
    if sampling.top_k != plain.top_k {
        put("top_k", sampling.top_k.into());
    }
    if sampling.min_p != plain.min_p {
        put("min_p", number(sampling.min_p));
    }
    if sampling.repeat_penalty != plain.repeat_penalty {
        put("repeat_penalty", number(sampling.repeat_penalty));
        put("repeat_last_n", sampling.repeat_last_n.into());
    }
    if !parts.template_args.is_empty() {
        put("chat_template_kwargs", parts.template_args.clone().into());
    }
}

fn ollama(
    parts: &ChatRequestParts,
    messages: &[Message],
    model: &str,
    max_tokens: u32,
    context_tokens: Option<u32>,
) -> Map<String, Value> {
    let sampling = &parts.sampling;
    // Ollama's defaults filter; what the client did not ask for is switched off by name.
    let mut options = json!({
        "num_predict": max_tokens,
        "temperature": number(sampling.temperature),
        "top_k": sampling.top_k,
        "top_p": number(sampling.top_p),
        "min_p": number(sampling.min_p),
        "repeat_penalty": number(sampling.repeat_penalty),
        "repeat_last_n": sampling.repeat_last_n,
        "presence_penalty": number(sampling.presence_penalty),
        "frequency_penalty": number(sampling.frequency_penalty),
    });
    if let Some(seed) = sampling.seed {
        options["seed"] = (seed & i64::from(i32::MAX) as u64).into();
    }
    if let Some(tokens) = context_tokens {
        options["num_ctx"] = tokens.into();
    }
    if !parts.stop.is_empty() {
        options["stop"] = parts.stop.clone().into();
    }
    let mut body = Map::new();
    body.insert("model".to_owned(), model.into());
    body.insert("messages".to_owned(), turns(messages, true));
    body.insert("stream".to_owned(), true.into());
    body.insert("options".to_owned(), options);
    match &parts.format {
        OutputFormat::Text => {}
        OutputFormat::JsonObject => {
            body.insert("format".to_owned(), "json".into());
        }
        OutputFormat::JsonSchema { schema, .. } => {
            body.insert("format".to_owned(), schema.clone());
        }
    }
    if !parts.tools.is_empty() && parts.tool_choice != ToolChoice::None {
        body.insert("tools".to_owned(), tools(parts));
    }
    body
}

/// The conversation. OpenAI writes a call's arguments as text, Ollama as an object.
fn turns(messages: &[Message], arguments_as_objects: bool) -> Value {
    let turn = |message: &Message| {
        let mut turn = json!({ "role": role(message.role), "content": message.content });
        if !message.tool_calls.is_empty() {
            let calls: Vec<Value> = message
                .tool_calls
                .iter()
                .map(|call| {
                    let arguments = Value::Object(call.arguments.clone());
                    let arguments = match arguments_as_objects {
                        true => arguments,
                        false => arguments.to_string().into(),
                    };
                    let function = json!({ "name": call.name, "arguments": arguments });
                    json!({ "id": call.id, "type": "function", "function": function })
                })
                .collect();
            turn["tool_calls"] = calls.into();
        }
        if let Some(id) = &message.tool_call_id {
            turn["tool_call_id"] = id.as_str().into();
        }
        if let (true, Some(name)) = (arguments_as_objects, &message.tool_name) {
            turn["tool_name"] = name.as_str().into();
        }
        turn
    };
    messages.iter().map(turn).collect::<Vec<_>>().into()
}

pub(super) fn role(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    }
}

fn tools(parts: &ChatRequestParts) -> Value {
    let tool = |tool: &crate::chat::Tool| {
        let mut function = json!({ "name": tool.name });
        if let Some(description) = &tool.description {
            function["description"] = description.as_str().into();
        }
        let none = || json!({ "type": "object", "properties": {} });
        function["parameters"] = tool.parameters.clone().unwrap_or_else(none);
        json!({ "type": "function", "function": function })
    };
    parts.tools.iter().map(tool).collect::<Vec<_>>().into()
}

fn tool_choice(choice: &ToolChoice) -> Value {
    match choice {
        ToolChoice::Auto => "auto".into(),
        ToolChoice::None => "none".into(),
        ToolChoice::Required => "required".into(),
        ToolChoice::Function(name) => json!({ "type": "function", "function": { "name": name } }),
    }
}

/// The shortest decimal of an F32: 0.7, not 0.699999988079071.
fn number(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::chat::{Origin, Tool, ToolCall};

    fn parts() -> ChatRequestParts {
        let input = Input::Messages(vec![
            Message::text(Role::System, "be brief"),
            Message::text(Role::User, "hello"),
        ]);
        ChatRequestParts::new(Origin::Terminal, "test", input, Instant::now())
    }

    fn body(parts: &ChatRequestParts, dialect: Dialect) -> Value {
        let body = chat_body(parts, "m", 64, dialect).expect("a conversation");
        serde_json::from_slice(&body).expect("JSON")
    }

    #[test]
    fn plain_requests() {
        let turns = json!([
            { "role": "system", "content": "be brief" }, { "role": "user", "content": "hello" },
        ]);
        let expected = json!({
            "model": "m", "messages": turns, "stream": true,
            "stream_options": { "include_usage": true }, "max_tokens": 64, "temperature": 1.0,
        });
        assert_eq!(body(&parts(), Dialect::OpenAi), expected);
        assert_eq!(body(&parts(), Dialect::Scoutd), expected);
        let mut bare = expected;
        bare.as_object_mut().expect("an object").shift_remove("stream_options");
        assert_eq!(body(&parts(), Dialect::Bare), bare);
        let ollama = body(&parts(), Dialect::Ollama { context_tokens: Some(4096) });
        assert_eq!(ollama["messages"], turns);
        assert_eq!(
            (&ollama["options"]["num_ctx"], &ollama["options"]["top_k"]),
            (&json!(4096), &json!(0))
        );
    }

    #[test]
    fn sampling_stops_and_forms() {
        let mut parts = parts();
        parts.sampling.temperature = 0.7;
        parts.sampling.top_k = 40;
        parts.sampling.seed = Some(u64::MAX);
        parts.stop = vec!["\n".to_owned()];
        parts.format = OutputFormat::JsonObject;
        let scoutd = body(&parts, Dialect::Scoutd);
        assert_eq!(scoutd["temperature"], json!(0.7));
        assert_eq!(scoutd["seed"], json!(i64::MAX));
        assert_eq!(scoutd["stop"], json!(["\n"]));
        assert_eq!(scoutd["top_k"], json!(40));
        assert_eq!(scoutd["response_format"]["type"], "json_object");
        let openai = body(&parts, Dialect::OpenAi);
        assert_eq!(openai.get("top_k"), None);
        let bare = body(&parts, Dialect::Bare);
        assert_eq!((bare.get("response_format"), &bare["stop"]), (None, &json!(["\n"])));
        assert_eq!(body(&parts, Dialect::Ollama { context_tokens: None })["format"], "json");
    }

    #[test]
    fn tools_and_calls() {
        let mut parts = parts();
        let mut assistant = Message::text(Role::Assistant, "");
        let arguments = json!({ "a": 1 }).as_object().expect("an object").clone();
        assistant.tool_calls =
            vec![ToolCall { id: "c1".to_owned(), name: "f".to_owned(), arguments }];
        let mut result = Message::text(Role::Tool, "done");
        result.tool_call_id = Some("c1".to_owned());
        let Input::Messages(messages) = &mut parts.input else { unreachable!("a conversation") };
        messages.extend([assistant, result]);
        parts.tools = vec![Tool { name: "f".to_owned(), description: None, parameters: None }];
        let openai = body(&parts, Dialect::OpenAi);
        assert_eq!(openai["messages"][2]["content"], "");
        assert_eq!(openai["messages"][2]["tool_calls"][0]["function"]["arguments"], "{\"a\":1}");
        assert_eq!(openai["messages"][3]["tool_call_id"], "c1");
        assert_eq!(openai["tools"][0]["function"]["name"], "f");
        assert_eq!(openai["tool_choice"], "auto");
        let ollama = body(&parts, Dialect::Ollama { context_tokens: None });
        let arguments = &ollama["messages"][2]["tool_calls"][0]["function"]["arguments"];
        assert_eq!(arguments, &json!({ "a": 1 }));
    }

    #[test]
    fn only_conversations() {
        let input = Input::Text("hello".to_owned());
        let parts = ChatRequestParts::new(Origin::Terminal, "test", input, Instant::now());
        assert!(chat_body(&parts, "m", 1, Dialect::OpenAi).is_err());
    }
}
