//! What clients get instead of an answer.

use std::time::Duration;

use scoutd::chat::{ChatError, ModelName};
use scoutd::units::Bytes;
use serde_json::{Value, json};

use crate::doubles::{Scripted, refuses, says};
use crate::http::Server;

const OPENAI: &str =
    r#"{"model":"scout","stream":true,"messages":[{"role":"user","content":"x"}]}"#;

#[test]
fn a_backends_refusal_sets_status_and_body() {
    let after = Duration::from_secs(7);
    let cases = [
        (
            ChatError::NoHeadroom {
                needed: Bytes(3 << 20),
                free: Bytes(1 << 20),
                retry_after: after,
            },
            (503, "unavailable_error", json!("no_headroom")),
            (503, "no headroom: needs 3.0 MiB, 1.0 MiB can be promised"),
            Some("7"),
        ),
        (
            ChatError::QueueFull { retry_after: after },
            (429, "rate_limit_error", json!("queue_full")),
            (503, "server busy, please try again.  maximum pending requests exceeded"),
            Some("7"),
        ),
        (
            ChatError::ContextTooLong { prompt: 9000, context: 2048 },
            (400, "exceed_context_size_error", json!("context_length_exceeded")),
            (400, "prompt of 9000 tokens exceeds the context of 2048"),
            None,
        ),
        (
            ChatError::DeadlineUnmeetable { needs: after },
            (503, "unavailable_error", json!("deadline")),
            (503, "deadline cannot be met: the answer needs about 7.0s"),
            None,
        ),
        (
            ChatError::NotSupported("this model has no tools".to_owned()),
            (501, "not_supported_error", json!("not_supported")),
            (400, "this model has no tools"),
            None,
        ),
        (
            ChatError::UnknownModel(ModelName::new("y")),
            (404, "not_found_error", json!("model_not_found")),
            (404, "model \"y\" not found, try pulling it first"),
            None,
        ),
        (
            ChatError::Internal("a path".to_owned()),
            (500, "server_error", json!("internal")),
            (500, "internal error"),
            None,
        ),
    ];
    for (error, (status, kind, code), (ollama_status, text), retry) in cases {
        let server = Server::start(refuses(error.clone()));
        let response = server.post("/v1/chat/completions", OPENAI);
        assert_eq!(response.status, status, "{error}");
        let body = response.json();
        assert_eq!((&body["error"]["type"], &body["error"]["code"]), (&json!(kind), &code));
        for response in [&response, &server.post("/api/chat", OPENAI)] {
            assert_eq!(response.header("retry-after"), retry, "{error}");
            let should_retry = response.header("x-should-retry");
            assert_eq!(should_retry, retry.is_none().then_some("false"), "{error}");
        }
        let response = server.post("/api/chat", OPENAI);
        assert_eq!((response.status, response.json()), (ollama_status, json!({ "error": text })));
        assert_eq!(server.refused(error.code()), 0, "the engine counts its own");
    }
}

#[test]
fn context_refusals_carry_their_numbers() {
    let server = Server::start(refuses(ChatError::ContextTooLong { prompt: 9, context: 8 }));
    let error = &server.post("/v1/chat/completions", OPENAI).json()["error"];
    assert_eq!((&error["n_prompt_tokens"], &error["n_ctx"]), (&json!(9), &json!(8)));
}

#[test]
fn bad_requests_name_the_field() {
    let server = Server::start(says(&["never"]));
    let chat = |more: &str| format!(r#"{{"messages":[{{"role":"user","content":"x"}}]{more}}}"#);
    let cases = [
        ("/v1/chat/completions", "{".to_owned(), "not valid JSON"),
        ("/v1/chat/completions", String::new(), "missing request body"),
        ("/v1/chat/completions", "null".to_owned(), "request body"),
        ("/v1/chat/completions", "{}".to_owned(), "messages must not be empty"),
        ("/v1/chat/completions", r#"{"messages":[]}"#.to_owned(), "messages must not be empty"),
        ("/v1/chat/completions", r#"{"messages":"x"}"#.to_owned(), "messages must be a list"),
        ("/v1/chat/completions", r#"{"messages":[{"role":"x"}]}"#.to_owned(), "messages[0].role"),
        (
            "/v1/chat/completions",
            r#"{"messages":[{"content":"x"}]}"#.to_owned(),
            "messages[0].role",
        ),
        ("/v1/chat/completions", chat(r#","n":1000000"#), "n must be between 1 and 4"),
        ("/v1/chat/completions", chat(r#","n":0"#), "n must be between 1 and 4"),
        ("/v1/chat/completions", chat(r#","max_tokens":-2"#), "max_tokens"),
        ("/v1/chat/completions", chat(r#","max_tokens":0"#), "max_tokens must be at least 1"),
        ("/v1/chat/completions", chat(r#","temperature":-1"#), "temperature must be between"),
        (
            "/v1/chat/completions",
            chat(r#","temperature":1e308"#),
            "temperature: number out of range",
        ),
        ("/v1/chat/completions", chat(r#","temperature":NaN"#), "not valid JSON"),
        ("/v1/chat/completions", chat(r#","top_logprobs":2"#), "top_logprobs needs logprobs"),
        ("/v1/chat/completions", chat(r#","logprobs":true,"top_logprobs":21"#), "between 0 and 20"),
        (
            "/v1/chat/completions",
            chat(r#","stream":"yes""#),
            "stream must be a boolean, not a text",
        ),
        ("/v1/chat/completions", chat(r#","tool_choice":"required""#), "there are no tools"),
        ("/v1/chat/completions", chat(r#","tool_choice":5"#), "tool_choice must be"),
        ("/v1/chat/completions", chat(r#","tools":[{}]"#), "tools[0].function is missing"),
        ("/v1/chat/completions", chat(r#","tools":[{"function":{}}]"#), "tools[0].function.name"),
        ("/v1/chat/completions", chat(r#","logit_bias":{"x":1}"#), "logit_bias"),
        ("/v1/chat/completions", chat(r#","model":"../../etc/passwd""#), "model must be a name"),
        (
            "/v1/chat/completions",
            chat(r#","response_format":{"type":"xml"}"#),
            "response_format.type",
        ),
        ("/v1/completions", "{}".to_owned(), "prompt must not be empty"),
        ("/v1/completions", r#"{"prompt":""}"#.to_owned(), "prompt must not be empty"),
        ("/v1/completions", r#"{"prompt":[]}"#.to_owned(), "prompt must not be empty"),
        ("/v1/completions", r#"{"prompt":[-1]}"#.to_owned(), "prompt"),
        ("/v1/completions", r#"{"prompt":["a",1]}"#.to_owned(), "prompt[1] must be a string"),
        (
            "/v1/completions",
            r#"{"prompt":"a","logprobs":6}"#.to_owned(),
            "logprobs must be between 0 and 5",
        ),
        ("/api/chat", "[]".to_owned(), "request body"),
        ("/api/chat", chat(r#","options":{"num_ctx":-5}"#), "options.num_ctx must not be -5"),
        (
            "/api/chat",
            chat(r#","options":{"num_ctx":1e308}"#),
            "options.num_ctx: number out of range",
        ),
        ("/api/chat", chat(r#","options":{"num_ctx":"8k"}"#), "options.num_ctx must be an integer"),
        ("/api/chat", chat(r#","keep_alive":"soon""#), "keep_alive: must be a number of seconds"),
        ("/api/chat", chat(r#","format":"xml""#), "format must be \"json\" or a JSON schema"),
        ("/api/chat", chat(r#","think":"hard""#), "think: must be true, false"),
        ("/api/chat", chat(r#","top_logprobs":21"#), "top_logprobs must be between 0 and 20"),
        ("/api/generate", r#"{"prompt":"x","raw":true,"system":"y"}"#.to_owned(), "raw mode"),
        ("/api/generate", r#"{"prompt":"x","context":[1,2]}"#.to_owned(), "context was not made"),
        (
            "/api/generate",
            r#"{"prompt":"x","template":"y"}"#.to_owned(),
            "template: this server does not",
        ),
        ("/api/generate", r#"{"prompt":"x","images":["aGk="]}"#.to_owned(), "images"),
    ];
    for (path, body, expected) in &cases {
        let response = server.post(path, body);
        assert_eq!(response.status, 400, "{path} {body}: {}", response.text());
        let error = &response.json()["error"];
        let message = error.as_str().or(error["message"].as_str()).expect("a message");
        assert!(message.contains(expected), "{path} {body}: {message}");
        assert_eq!(error.is_string(), path.starts_with("/api/"), "{path}");
    }
    let counted = server.refused("invalid") + server.refused("not_supported");
    assert_eq!(counted, cases.len() as u64);
    let parts = r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://10.0.0.1/"}}]}]}"#;
    assert_eq!(server.post("/v1/chat/completions", parts).status, 501);
    assert_eq!(server.post("/v1/completions", r#"{"prompt":"a","suffix":"b"}"#).status, 501);
}

#[test]
fn errors_do_not_repeat_prompts() {
    let server = Server::start(says(&[]));
    for body in [
        r#"{"messages":"my secret prompt"}"#,
        r#"{"messages":[{"role":"my secret prompt","content":"my secret prompt"}]}"#,
        r#"{"messages":[{"role":"user","content":{"my secret prompt":1}}]}"#,
        r#"{"model":"my secret prompt","messages":[]}"#,
    ] {
        for path in ["/v1/chat/completions", "/api/chat"] {
            let response = server.post(path, body);
            assert_eq!(response.status, 400, "{body}");
            assert!(!response.text().contains("secret"), "{}", response.text());
        }
    }
}

#[test]
fn unknown_paths_and_methods() {
    let server = Server::start(says(&[]));
    let missing = server.get("/v1/nothing");
    assert_eq!(
        (missing.status, missing.json()["error"]["type"].as_str()),
        (404, Some("not_found_error"))
    );
    assert!(server.get("/api/nothing").json()["error"].is_string());
    for (method, path, allow) in [
        ("GET", "/v1/chat/completions", "POST"),
        ("POST", "/api/tags", "GET, HEAD"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("GET", "/api/delete", "DELETE"),
    ] {
        let response = server.request(method, path, &[], "");
        assert_eq!((response.status, response.header("allow")), (405, Some(allow)), "{path}");
    }
    for path in ["/v1/embeddings", "/api/embed", "/api/pull", "/api/copy", "/api/push"] {
        let response = server.post(path, "{}");
        assert_eq!(response.status, 501, "{path}");
        assert_eq!(response.header("x-should-retry"), Some("false"));
    }
    assert_eq!(server.request("DELETE", "/api/delete", &[], r#"{"model":"scout"}"#).status, 501);
}

#[test]
fn health_says_whether_requests_can_be_answered() {
    let server = Server::start(says(&["ok"]));
    assert_eq!(server.get("/health").json(), json!({"status": "ok"}));
    assert_eq!(server.get("/readyz").status, 200);
    server.readiness.set_no_headroom(true);
    let unready = server.get("/readyz");
    assert_eq!((unready.status, unready.json()["reasons"].clone()), (503, json!(["no headroom"])));
    assert_eq!(server.get("/healthz").status, 200);
    let metrics = server.get("/metrics");
    assert!(metrics.text().contains("# TYPE scoutd_requests_waiting gauge"));
    assert!(metrics.header("content-type").is_some_and(|kind| kind.contains("version=0.0.4")));
}

#[test]
fn a_panic_is_one_clients_problem() {
    let backend = Scripted::new(|parts| {
        assert!(parts.seed_is_even(), "an odd seed");
        vec![
            Ok(crate::doubles::delta("fine")),
            Ok(crate::doubles::done(scoutd::chat::FinishReason::Stop)),
        ]
    });
    let server = Server::start(backend);
    let ask = |seed: u32| {
        let body = json!({"seed": seed, "messages": [{"role": "user", "content": "x"}]});
        server.post("/v1/chat/completions", &body.to_string())
    };
    for _ in 0..4 {
        let response = ask(1);
        assert_eq!(response.status, 500);
        assert_eq!(response.json()["error"]["message"], Value::from("internal error"));
        assert_eq!(ask(2).status, 200);
    }
}

trait SeedIsEven {
    fn seed_is_even(&self) -> bool;
}

impl SeedIsEven for scoutd::chat::ChatRequestParts {
    fn seed_is_even(&self) -> bool {
        self.sampling.seed.is_some_and(|seed| seed % 2 == 0)
    }
}
