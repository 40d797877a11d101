//! `/v1/*`: shapes, streams, tools, log-probabilities, scoring.

use std::sync::PoisonError;

use scoutd::chat::{ChatEvent, FinishReason, Input, OutputFormat, Role, ToolChoice};
use scoutd::units::TokenId;
use serde_json::{Value, json};

use super::check_golden;
use crate::doubles::{Scripted, call, delta, done, says, token};
use crate::http::Server;

const CHAT: &str = "/v1/chat/completions";
const ID: &[&str] = &["X-Request-Id: golden"];

fn body(more: Value) -> String {
    let mut body = json!({"model": "scout", "messages": [{"role": "user", "content": "Hi"}]});
    let fields = body.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("an object").clone());
    body.to_string()
}

#[test]
fn a_whole_answer() {
    let server = Server::start(says(&["Hel", "lo"]));
    for path in [CHAT, "/chat/completions", "/v1/chat/completions/"] {
        let response = server.request("POST", path, ID, &body(json!({})));
        assert_eq!(response.status, 200);
        assert_eq!(response.header("content-type"), Some("application/json"));
        assert_eq!(response.header("x-request-id"), Some("golden"));
        check_golden("openai-chat.json", response.text());
    }
}

#[test]
fn a_streamed_answer() {
    let server = Server::start(says(&["Hel", "lo\u{2028}\u{85}"]));
    let asked = body(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let response = server.request("POST", CHAT, ID, &asked);
    assert_eq!(response.status, 200);
    for (name, value) in [
        ("content-type", "text/event-stream"),
        ("cache-control", "no-cache"),
        ("x-accel-buffering", "no"),
        ("x-request-id", "golden"),
    ] {
        assert_eq!(response.header(name), Some(value));
    }
    assert_eq!(response.header("content-encoding"), None);
    check_golden("openai-chat-stream.txt", response.text());
}

#[test]
fn any_content_type_and_lenient_fields() {
    let backend = says(&["ok"]);
    let seen = backend.seen();
    let server = Server::start(backend);
    let asked = body(json!({
        "max_tokens": 30.9, "seed": 7.0, "temperature": 0, "top_p": null, "stop": "END",
        "n": null, "user": "me", "unknown": {"x": [1]}, "logit_bias": {"5": -100, "6": 1.5},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true,
            "schema": {"type": "object"}}},
        "chat_template_kwargs": {"enable_thinking": false}, "reasoning_effort": "low",
    }));
    for content_type in ["application/x-www-form-urlencoded", "text/plain", "nonsense"] {
        let header = format!("Content-Type: {content_type}");
        assert_eq!(server.request("POST", CHAT, &[&header], &asked).status, 200);
    }
    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    let parts = &seen[0];
    assert_eq!(parts.max_tokens, Some(30));
    assert_eq!(parts.sampling.seed, Some(7));
    assert_eq!(parts.sampling.temperature, 0.0);
    assert_eq!(parts.sampling.top_p, 1.0);
    assert_eq!(parts.stop, ["END"]);
    assert_eq!(parts.sampling.logit_bias, [(TokenId(5), -100.0), (TokenId(6), 1.5)]);
    assert_eq!(
        parts.format,
        OutputFormat::JsonSchema { schema: json!({"type": "object"}), strict: true }
    );
    assert_eq!(
        Value::Object(parts.template_args.clone()),
        json!({"enable_thinking": false, "reasoning_effort": "low"})
    );
}

#[test]
fn tools_in_both_directions() {
    let backend = Scripted::new(|_| {
        vec![
            Ok(delta("Let me see.")),
            Ok(call("call_a", "light", r#"{"z":1,"a":"on\u2028"}"#)),
            Ok(call("call_b", "time", "{}")),
            Ok(done(FinishReason::ToolCalls)),
        ]
    });
    let seen = backend.seen();
    let server = Server::start(backend);
    let asked = |stream: bool| {
        json!({
            "stream": stream,
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]},
                {"role": "user", "content": "lamp"},
                {"role": "assistant", "content": null, "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "light", "arguments": "{\"z\":0,\"a\":1}"}}]},
                {"role": "tool", "tool_call_id": "c1", "content": "done"},
            ],
            "tools": [{"type": "function", "function": {"name": "light", "description": "d",
                "parameters": {"type": "object", "properties": {"z": {}, "a": {}}}}},
                {"type": "function", "function": {"name": "time"}}],
            "tool_choice": {"type": "function", "function": {"name": "light"}},
        })
        .to_string()
    };
    let whole = server.request("POST", CHAT, ID, &asked(false));
    check_golden("openai-tools.json", whole.text());
    let stream = server.request("POST", CHAT, ID, &asked(true));
    check_golden("openai-tools-stream.txt", stream.text());

    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    let parts = &seen[0];
    let Input::Messages(messages) = &parts.input else { panic!("a conversation") };
    assert_eq!((messages[0].role, messages[0].content.as_str()), (Role::System, "Be\nbrief"));
    let keys: Vec<_> = messages[2].tool_calls[0].arguments.keys().map(String::as_str).collect();
    assert_eq!(keys, ["z", "a"], "the client's order");
    assert_eq!(messages[3].tool_name.as_deref(), Some("light"));
    assert_eq!(parts.tool_choice, ToolChoice::Function("light".to_owned()));
    assert_eq!(parts.tools.len(), 2);
    assert_eq!(parts.tools[1].parameters, None);
}

#[test]
fn log_probabilities() {
    let backend = Scripted::new(|parts| {
        assert_eq!(parts.logprobs, Some(2));
        let tokens = vec![token(1, b"H", Some(-0.25)), token(2, b"\xc3", Some(f32::NEG_INFINITY))];
        vec![
            Ok(ChatEvent::Delta { text: "H".to_owned(), logprobs: tokens }),
            Ok(done(FinishReason::Length)),
        ]
    });
    let server = Server::start(backend);
    let whole =
        server.request("POST", CHAT, ID, &body(json!({"logprobs": true, "top_logprobs": 2})));
    check_golden("openai-logprobs.json", whole.text());
    let stream =
        server.post(CHAT, &body(json!({"logprobs": true, "top_logprobs": 2, "stream": true})));
    let events = stream.events();
    assert_eq!(
        events[0]["choices"][0]["logprobs"],
        whole.json()["choices"][0]["logprobs"],
        "streams carry the same"
    );
}

#[test]
fn several_choices_have_their_own_seeds() {
    let backend = Scripted::new(|parts| {
        let text = format!("seed {:?}", parts.sampling.seed);
        vec![Ok(delta(&text)), Ok(done(FinishReason::Stop))]
    });
    let server = Server::start(backend);
    let whole = server.post(CHAT, &body(json!({"n": 3, "seed": 40}))).json();
    for index in 0..3 {
        let choice = &whole["choices"][index];
        assert_eq!(choice["index"], index);
        assert_eq!(choice["message"]["content"], format!("seed Some({})", 40 + index));
    }
    assert_eq!(whole["usage"]["prompt_tokens"], 12);
    assert_eq!(whole["usage"]["completion_tokens"], 9);
    let stream = server.post(CHAT, &body(json!({"n": 3, "seed": 40, "stream": true}))).events();
    let mut texts = [const { String::new() }; 3];
    for event in &stream {
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().expect("an index") as usize;
        texts[index].push_str(choice["delta"]["content"].as_str().unwrap_or(""));
    }
    assert_eq!(texts, ["seed Some(40)", "seed Some(41)", "seed Some(42)"]);
}

#[test]
fn an_error_in_the_middle_of_a_stream() {
    let backend = Scripted::new(|_| {
        vec![Ok(delta("so far")), Err(scoutd::chat::ChatError::Internal("a secret".to_owned()))]
    });
    let server = Server::start(backend);
    let response = server.post(CHAT, &body(json!({"stream": true})));
    assert_eq!(response.status, 200);
    let last = response.text().trim_end().rsplit("\n\n").next().expect("an event");
    let error: Value =
        serde_json::from_str(last.strip_prefix("data: ").expect("data")).expect("JSON");
    assert_eq!(error["error"]["message"], "internal error");
    assert!(!response.text().contains("[DONE]") && !response.text().contains("secret"));
}

fn scoring(
    parts: &scoutd::chat::ChatRequestParts,
) -> Vec<Result<ChatEvent, scoutd::chat::ChatError>> {
    let mut events = Vec::new();
    if parts.echo {
        events.push(Ok(ChatEvent::Prompt(vec![
            token(1, "Gr".as_bytes(), None),
            token(2, b"\xc3", Some(-1.5)),
            token(3, b"\xbc", Some(-0.5)),
        ])));
    }
    if parts.max_tokens != Some(0) {
        let logprobs =
            if parts.logprobs.is_some() { vec![token(4, b"n", Some(-0.125))] } else { vec![] };
        events.push(Ok(ChatEvent::Delta { text: "n".to_owned(), logprobs }));
    }
    events.push(Ok(done(FinishReason::Length)));
    events
}

#[test]
fn scoring_a_prompt_of_tokens() {
    let backend = Scripted::new(scoring);
    let seen = backend.seen();
    let server = Server::start(backend);
    let asked = json!({"model": "scout", "prompt": [[1, 2, 3.0]], "echo": true, "logprobs": 1,
                       "max_tokens": 1, "temperature": 0, "seed": 1234});
    let response = server.request("POST", "/v1/completions", ID, &asked.to_string());
    check_golden("openai-scoring.json", response.text());
    let only = json!({"prompt": [1, 2, 3], "echo": true, "logprobs": 1, "max_tokens": 0});
    let response = server.post("/completions", &only.to_string()).json();
    assert_eq!(response["choices"][0]["logprobs"]["tokens"].as_array().map(Vec::len), Some(3));
    assert_eq!(response["choices"][0]["text"], "Grü");
    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    for (parts, max_tokens) in seen.iter().zip([1, 0]) {
        assert_eq!(parts.input, Input::Tokens(vec![TokenId(1), TokenId(2), TokenId(3)]));
        assert_eq!((parts.logprobs, parts.echo), (Some(1), true));
        assert_eq!(parts.max_tokens, Some(max_tokens));
    }
}

#[test]
fn echo_without_log_probabilities() {
    let server = Server::start(Scripted::new(scoring));
    for (prompt, text) in [(json!("Hi"), "Hin"), (json!([1, 2, 3]), "Grün")] {
        let asked = json!({"prompt": prompt, "echo": true}).to_string();
        let whole = server.post("/v1/completions", &asked).json();
        assert_eq!(whole["choices"][0]["text"], text);
        assert_eq!(whole["choices"][0]["logprobs"], Value::Null);
        let asked = json!({"prompt": prompt, "echo": true, "stream": true}).to_string();
        let events = server.post("/v1/completions", &asked).events();
        let streamed: String =
            events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
        assert_eq!(streamed, text);
    }
}

#[test]
fn many_prompts_keep_their_order() {
    let backend = Scripted::new(|parts| {
        let Input::Text(prompt) = &parts.input else { panic!("a text") };
        assert_eq!(parts.max_tokens, Some(16), "the dialect's default");
        vec![Ok(delta(&format!("<{prompt}>"))), Ok(done(FinishReason::Stop))]
    });
    let server = Server::start(backend);
    let prompts: Vec<String> = (0..40).map(|index| format!("p{index}")).collect();
    let asked = json!({"prompt": prompts, "n": 2}).to_string();
    let whole = server.post("/v1/completions", &asked).json();
    let choices = whole["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 80);
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], index);
        assert_eq!(choice["text"], format!("<p{}>", index / 2));
    }
    assert_eq!(whole["usage"]["prompt_tokens"], 80 * 12);
}

#[test]
fn listings() {
    let server = Server::start(says(&[]));
    check_golden("openai-models.json", server.get("/v1/models").text());
    let one = server.get("/v1/models/SCOUT%3Alatest");
    assert_eq!(one.json(), server.get("/models").json()["data"][0]);
    assert_eq!(server.get("/v1/models/other").status, 404);
    check_golden("props.json", server.get("/props").text());
}
