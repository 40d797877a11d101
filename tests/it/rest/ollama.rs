//! `/api/*`: lines, objects, tools, loading, listings.

use std::sync::PoisonError;

use scoutd::chat::{ChatEvent, FinishReason, Input, OutputFormat, Role};
use serde_json::{Value, json};

use super::check_golden;
use crate::doubles::{Scripted, call, done, says, token};
use crate::http::Server;

fn chat(more: Value) -> String {
    let mut body = json!({"model": "scout", "messages": [{"role": "user", "content": "Hi"}]});
    let fields = body.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("an object").clone());
    body.to_string()
}

#[test]
fn a_stream_of_lines() {
    let server = Server::start(says(&["Hel", "lo\u{2028}\u{85}\u{2029}"]));
    let response = server.post("/api/chat", &chat(json!({})));
    assert_eq!(response.status, 200);
    assert_eq!(response.header("content-type"), Some("application/x-ndjson"));
    assert!(!response.text().contains(['\u{2028}', '\u{2029}', '\u{85}']));
    check_golden("ollama-chat.ndjson", response.text());
    let whole = server.post("/api/chat", &chat(json!({"stream": false})));
    assert_eq!(whole.header("content-type"), Some("application/json"));
    check_golden("ollama-chat.json", whole.text());
}

#[test]
fn tool_calls_are_whole_and_arguments_objects() {
    let backend = Scripted::new(|_| {
        vec![
            Ok(call("call_1", "HassTurnOn", r#"{"name":"lamp","domain":["light"]}"#)),
            Ok(call("call_2", "GetTime", "{}")),
            Ok(done(FinishReason::ToolCalls)),
        ]
    });
    let server = Server::start(backend);
    let asked = json!({"tools": [{"type": "function", "function": {"name": "HassTurnOn",
        "parameters": {"type": "object", "properties": {"name": {}, "domain": {"type": ["array"]}}}}}]});
    check_golden("ollama-tools.ndjson", server.post("/api/chat", &chat(asked)).text());
    let whole = server.post("/api/chat", &chat(json!({"stream": false}))).json();
    assert_eq!(whole["message"]["tool_calls"][1]["function"]["index"], 1);
    assert_eq!(whole["message"]["tool_calls"][1]["function"]["arguments"], json!({}));
}

#[test]
fn options_and_their_defaults() {
    let backend = says(&["ok"]);
    let seen = backend.seen();
    let server = Server::start(backend);
    server.post("/api/chat", &chat(json!({})));
    let asked = json!({
        "options": {"num_ctx": 8192.0, "num_predict": 20, "temperature": 0, "top_k": 5, "top_p": 1,
            "min_p": 0.1, "repeat_penalty": 1.1, "repeat_last_n": -1, "seed": -1, "stop": ["a", "b"],
            "num_gpu": 99, "main_gpu": 0, "num_thread": 4, "unheard_of": {}},
        "format": {"type": "object", "properties": {"b": {}, "a": {}}}, "think": "high",
        "truncate": false, "logprobs": true, "top_logprobs": 3, "keep_alive": "-1.0s",
    });
    server.post("/api/chat", &chat(asked));
    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    let (plain, full) = (&seen[0], &seen[1]);
    let sampling = &plain.sampling;
    assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (0.8, 40, 0.9));
    assert_eq!((sampling.repeat_penalty, sampling.repeat_last_n), (1.0, 64));
    assert_eq!((plain.max_tokens, plain.context_tokens, plain.truncate), (None, None, true));
    assert_eq!(plain.logprobs, None);
    let sampling = &full.sampling;
    assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (0.0, 5, 1.0));
    assert_eq!((sampling.min_p, sampling.repeat_last_n, sampling.seed), (0.1, -1, None));
    assert_eq!(
        (full.max_tokens, full.context_tokens, full.truncate),
        (Some(20), Some(8192), false)
    );
    assert_eq!((full.logprobs, full.stop.len()), (Some(3), 2));
    let OutputFormat::JsonSchema { schema, strict: false } = &full.format else {
        panic!("a schema")
    };
    assert_eq!(schema["properties"].to_string(), r#"{"b":{},"a":{}}"#, "the client's order");
    assert_eq!(full.template_args["reasoning_effort"], "high");
}

#[test]
fn generate_carries_its_context() {
    let backend = says(&["Four", "."]);
    let seen = backend.seen();
    let server = Server::start(backend);
    let first = server.post(
        "/api/generate",
        &json!({"model": "SCOUT:latest", "system": "Count.", "prompt": "2+2?"}).to_string(),
    );
    let lines = first.lines();
    assert_eq!(lines[0]["response"], "Four");
    assert_eq!(lines[0]["model"], "SCOUT:latest", "as the client called it");
    let last = lines.last().expect("lines");
    let again = json!({"prompt": "And 3+3?", "context": last["context"], "stream": false});
    let second = server.post("/api/generate", &again.to_string()).json();
    assert_eq!(second["response"], "Four.");
    assert!(second["context"].as_array().map(Vec::len) > last["context"].as_array().map(Vec::len));
    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    let Input::Messages(messages) = &seen[1].input else { panic!("a conversation") };
    let said: Vec<_> = messages.iter().map(|m| (m.role, m.content.as_str())).collect();
    assert_eq!(
        said,
        [
            (Role::System, "Count."),
            (Role::User, "2+2?"),
            (Role::Assistant, "Four."),
            (Role::User, "And 3+3?"),
        ]
    );
}

#[test]
fn raw_prompts_are_texts() {
    let backend = says(&["ok"]);
    let seen = backend.seen();
    let server = Server::start(backend);
    let asked = json!({"prompt": "Once", "raw": true, "stream": false, "logprobs": true});
    let answer = server.post("/api/generate", &asked.to_string()).json();
    assert_eq!(answer["context"], Value::Null);
    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    assert_eq!(seen[0].input, Input::Text("Once".to_owned()));
}

#[test]
fn log_probabilities_per_line() {
    let backend = Scripted::new(|_| {
        let logprobs = vec![token(1, b"H", Some(-0.25))];
        vec![Ok(ChatEvent::Delta { text: "H".to_owned(), logprobs }), Ok(done(FinishReason::Stop))]
    });
    let server = Server::start(backend);
    let asked = chat(json!({"logprobs": true, "top_logprobs": 2}));
    check_golden("ollama-logprobs.ndjson", server.post("/api/chat", &asked).text());
}

#[test]
fn loading_and_unloading() {
    let server = Server::start(says(&["never"]));
    for (path, body, reason) in [
        ("/api/chat", r#"{"model":"scout","messages":[]}"#, "load"),
        ("/api/chat", r#"{"model":"scout"}"#, "load"),
        ("/api/generate", r#"{"model":"scout","prompt":""}"#, "load"),
        ("/api/generate", r#"{"model":"scout","prompt":"","keep_alive":0}"#, "unload"),
        ("/api/generate", r#"{"model":"scout","keep_alive":"0"}"#, "unload"),
        ("/api/chat", r#"{"model":"scout","messages":[],"keep_alive":-1.0}"#, "load"),
    ] {
        let response = server.post(path, body);
        let answer = response.json();
        assert_eq!(
            (&answer["done"], &answer["done_reason"]),
            (&json!(true), &json!(reason)),
            "{body}"
        );
        assert_eq!(response.header("content-type"), Some("application/json"));
    }
    assert_eq!(server.post("/api/generate", r#"{"model":"other"}"#).status, 404);
}

#[test]
fn listings() {
    let server = Server::start(says(&[]));
    check_golden("ollama-tags.json", server.get("/api/tags").text());
    check_golden("ollama-ps.json", server.get("/api/ps").text());
    check_golden("ollama-version.json", server.get("/api/version").text());
    for field in ["model", "name"] {
        let body = json!({ field: "scout:latest", "verbose": true }).to_string();
        check_golden("ollama-show.json", server.post("/api/show", &body).text());
    }
    assert_eq!(server.post("/api/show", r#"{"model":"other"}"#).status, 404);
    for path in ["/", "/api/version", "/api/tags"] {
        let head = server.request("HEAD", path, &[], "");
        assert_eq!((head.status, head.body.len()), (200, 0), "{path}");
    }
    assert_eq!(server.get("/").text(), "Ollama is running");
}

#[test]
fn an_error_in_the_middle_is_the_last_line() {
    let backend = Scripted::new(|_| {
        vec![
            Ok(crate::doubles::delta("so far")),
            Err(scoutd::chat::ChatError::Upstream(scoutd::chat::Fault::new(
                scoutd::chat::FaultReason::Reset,
            ))),
        ]
    });
    let server = Server::start(backend);
    let response = server.post("/api/chat", &chat(json!({})));
    let lines = response.lines();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[1], json!({"error": "upstream failed: reset"}));
}
