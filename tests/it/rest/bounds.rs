//! Sizes, times and numbers that clients may not exceed.

use std::io::Write;

use scoutd::chat::Input;
use scoutd::rest::Config;
use serde_json::json;

use crate::doubles::{Scripted, delta, done, says};
use crate::http::Server;

fn counting() -> Scripted {
    Scripted::new(|parts| {
        let len = match &parts.input {
            Input::Messages(messages) => messages.iter().map(|m| m.content.len()).sum(),
            Input::Text(text) => text.len(),
            Input::Tokens(tokens) => tokens.len(),
        };
        vec![Ok(delta(&len.to_string())), Ok(done(scoutd::chat::FinishReason::Stop))]
    })
}

#[test]
fn ten_megabytes_arrive_and_seventeen_do_not() {
    let server = Server::start(counting());
    let ask = |len: usize| {
        let text = "x".repeat(len);
        let body = json!({"stream": false, "messages": [{"role": "user", "content": text}]});
        server.post("/api/chat", &body.to_string())
    };
    let ten = ask(10_000_000);
    assert_eq!((ten.status, ten.json()["message"]["content"].as_str()), (200, Some("10000000")));
    let seventeen = ask(17_000_000);
    assert_eq!(seventeen.status, 413);
    assert!(seventeen.json()["error"].as_str().is_some_and(|text| text.contains("16777216 bytes")));
    assert_eq!(ask(10).status, 200);
}

#[test]
fn chunked_bodies_are_bounded_too() {
    let mut config = Config::default();
    config.limits.body_bytes = 1 << 20;
    let server = Server::start_with(counting(), config, "");
    let ask = |chunks: usize| {
        let mut client = server.connect();
        client.raw(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n");
        client.raw(b"b\r\n{\"prompt\":\"\r\n");
        let chunk = format!("{:x}\r\n{}\r\n", 100_000, "x".repeat(100_000));
        for _ in 0..chunks {
            client.raw(chunk.as_bytes());
        }
        client.raw(b"2\r\n\"}\r\n0\r\n\r\n");
        client.response("POST")
    };
    assert_eq!(ask(9).json()["choices"][0]["text"], "900000");
    assert_eq!(ask(12).status, 413);
}

#[test]
fn all_bodies_together_are_bounded() {
    let mut config = Config::default();
    config.limits.bodies_bytes = 3 << 20;
    let server = Server::start_with(counting(), config, "");
    let head = |len: usize| {
        format!("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len}\r\n\r\n")
    };
    let text = format!("{{\"prompt\":\"{}\"}}", "x".repeat(6 << 20));
    let mut client = server.connect();
    client.raw(head(text.len()).as_bytes());
    // The server may answer and close before it has read everything.
    let _ = client.stream.get_mut().write_all(text.as_bytes());
    let response = client.response("POST");
    assert_eq!((response.status, response.header("retry-after")), (503, Some("1")));
    let small = json!({"prompt": "x".repeat(1 << 20)}).to_string();
    for _ in 0..8 {
        assert_eq!(server.post("/v1/completions", &small).status, 200, "shares are given back");
    }
}

#[test]
fn a_body_that_does_not_arrive() {
    let mut config = Config::default();
    config.limits.body_timeout_ms = 100;
    let server = Server::start_with(counting(), config, "");
    let mut client = server.connect();
    client.raw(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{\"mess");
    let response = client.response("POST");
    assert_eq!(response.status, 408);
    assert_eq!(response.json()["error"], "the request body did not arrive in time");
    assert!(client.is_closed());
}

#[test]
fn a_head_that_does_not_arrive() {
    let mut config = Config::default();
    config.limits.header_timeout_ms = 100;
    let server = Server::start_with(counting(), config, "");
    let mut client = server.connect();
    client.raw(b"GET /api/tags HTTP/1.1\r\nHost: loc");
    assert_eq!(client.head().status, 408);
}

#[test]
fn heads_are_bounded() {
    let server = Server::start(says(&[]));
    let header = |len: usize| format!("X-Long: {}", "x".repeat(len));
    assert_eq!(server.request("GET", "/api/tags", &[&header(15_000)], "").status, 200);
    let long = server.request("GET", "/api/tags", &[&header(17_000)], "");
    assert_eq!(long.status, 431);
    assert!(long.json()["error"].as_str().is_some_and(|text| text.contains("16384 bytes")));
    let path = format!("/api/tags?{}", "x".repeat(17_000));
    assert_eq!(server.get(&path).status, 431);
    let mut client = server.connect();
    let huge = format!("GET / HTTP/1.1\r\nHost: localhost\r\n{}\r\n\r\n", header(1 << 20));
    let _ = client.stream.get_mut().write_all(huge.as_bytes());
    assert_eq!(client.head().status, 431);
    assert_eq!(server.get("/api/tags").status, 200);
}

#[test]
fn connections_of_one_client_are_bounded() {
    let mut config = Config::default();
    config.limits.connections_per_client = 3;
    let server = Server::start_with(says(&[]), config, "");
    let mut clients: Vec<_> = (0..3)
        .map(|_| {
            let mut client = server.connect();
            client.send("GET", "/healthz", &[], b"");
            assert_eq!(client.response("GET").status, 200);
            client
        })
        .collect();
    let mut fourth = server.connect();
    assert!(fourth.is_closed());
    clients[0].send("GET", "/healthz", &[], b"");
    assert_eq!(clients[0].response("GET").status, 200, "the others stay");
}

#[test]
fn lists_are_bounded_before_they_are_stored() {
    let server = Server::start(says(&["never"]));
    let many = |item: &str, count: usize| vec![item; count].join(",");
    let cases = [
        (
            format!(r#"{{"messages":[{}]}}"#, many(r#"{"role":"user","content":"x"}"#, 100_000)),
            "messages: more than 4096 entries",
        ),
        (format!(r#"{{"tools":[{}]}}"#, many("{}", 257)), "tools: more than 256 entries"),
        (format!(r#"{{"stop":[{}]}}"#, many(r#""x""#, 17)), "stop: more than 16 entries"),
        (format!(r#"{{"x":{}{}}}"#, "[".repeat(64), "]".repeat(64)), "nests deeper than 64"),
    ];
    for (body, expected) in cases {
        let response = server.post("/v1/chat/completions", &body);
        assert_eq!(response.status, 400, "{expected}");
        assert!(response.text().contains(expected), "{}", response.text());
    }
    let prompts = format!(r#"{{"prompt":[{}]}}"#, many(r#""x""#, 129));
    let response = server.post("/v1/completions", &prompts);
    assert_eq!(response.status, 400);
    assert!(response.text().contains("prompt: more than 128 entries"), "{}", response.text());
    let schema = format!(
        r#"{{"messages":[{{"role":"user","content":"x"}}],"format":{{"x":"{}"}}}}"#,
        "y".repeat(70_000)
    );
    let response = server.post("/api/chat", &schema);
    assert!(response.text().contains("format has more than 65536 bytes"), "{}", response.text());
}

#[test]
fn compressed_bodies_are_refused() {
    let server = Server::start(says(&[]));
    let response = server.request("POST", "/api/chat", &["Content-Encoding: gzip"], "\u{1f}");
    assert_eq!(response.status, 415);
}

#[test]
fn deadlines_are_read_from_a_header() {
    let backend = says(&["ok"]);
    let seen = backend.seen();
    let server = Server::start(backend);
    let body = r#"{"messages":[{"role":"user","content":"x"}]}"#;
    let ask = |header: &str| server.request("POST", "/v1/chat/completions", &[header], body).status;
    let before = std::time::Instant::now();
    assert_eq!(ask("X-Scoutd-Deadline-Ms: 250000"), 200);
    assert_eq!(ask("X-Scoutd-Deadline-Ms: soon"), 400);
    assert_eq!(ask("X-Scoutd-Deadline-Ms: 99999999999999"), 200);
    let seen = seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let asked = seen[0].deadline - before;
    assert!((250.0..300.0).contains(&asked.as_secs_f64()), "{asked:?}");
    assert!(seen[1].deadline - before <= scoutd::chat::Limits::DEADLINE_MAX + asked);
}
