//! Requests as real Home Assistant sends them (2026.2.3 and 2026.11.0), replayed.

use scoutd::chat::{Input, OutputFormat, Role};
use serde_json::Value;

use crate::doubles::says;
use crate::http::Server;

const RECORDED: &str = include_str!("../../golden/home-assistant/ollama.jsonl");

#[test]
fn every_recorded_request_is_answered() {
    let backend = says(&["The lamp ", "is on."]);
    let seen = backend.seen();
    let server = Server::start(backend);
    for line in RECORDED.lines() {
        let recorded: Value = serde_json::from_str(line).expect("a recorded request");
        let text = |field: &str| recorded[field].as_str().expect("a text");
        let headers: Vec<String> = recorded["h"]
            .as_object()
            .expect("headers")
            .iter()
            .filter(|(name, _)| *name != "Content-Length")
            .map(|(name, value)| format!("{name}: {}", value.as_str().expect("a text")))
            .collect();
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        let body = recorded.get("b").map(Value::to_string).unwrap_or_default();
        if let Some(sent) = recorded["h"].get("Content-Length") {
            assert_eq!(sent.as_str(), Some(body.len().to_string().as_str()), "byte for byte");
        }
        let response = server.request(text("m"), text("p"), &headers, &body);
        assert_eq!(response.status, 200, "{}", response.text());
        if text("p") == "/api/chat" {
            let lines = response.lines();
            assert!(lines.iter().all(|line| line["created_at"].is_string()));
            assert!(lines.iter().all(|line| line["message"]["content"].is_string()));
            assert_eq!(lines.last().map(|line| &line["done"]), Some(&Value::Bool(true)));
        } else {
            assert_eq!(response.json()["models"][0]["model"], "scout:latest");
        }
    }
    let seen = seen.lock().expect("no panic");
    let tools: Vec<usize> = seen.iter().map(|parts| parts.tools.len()).collect();
    assert_eq!(tools, [9, 9, 0, 11, 11]);
    for parts in seen.iter() {
        assert_eq!(parts.context_tokens, Some(8192));
    }
    assert!(matches!(seen[2].format, OutputFormat::JsonSchema { .. }));
    for parts in [&seen[1], &seen[4]] {
        let Input::Messages(messages) = &parts.input else { panic!("a conversation") };
        let result = messages.iter().find(|message| message.role == Role::Tool).expect("a result");
        assert!(result.tool_name.is_some() && result.tool_call_id.is_some(), "paired by order");
    }
}
