//! The model `fusion` through the door: whole, streamed, in Ollama's dialect, and what is refused by name.

use std::sync::Arc;

use scoutd::chat::{Backend, ModelName, Scope};
use scoutd::fusion::{
    Calibration, Fusion, FusionParts, Member, MemberKind, Roster, ScoreKind, Settings, Tier, Vitals,
};
use scoutd::metrics::Metrics;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::doubles::{Scripted, refuses, says};
use crate::http::Server;

struct Fixed(Vec<Member>);

impl Roster for Fixed {
    fn members(&self) -> Vec<Member> {
        self.0.clone()
    }
}

/// A server whose only model is a pool of these; the runtime lives as long as the pool is asked.
fn pool(backends: Vec<Scripted>) -> (Server, Runtime) {
    let members = backends.into_iter().enumerate().map(|(index, backend)| Member {
        id: format!("pi-{index}/scout").into(),
        kind: MemberKind::Scoutd,
        scope: Scope::Lan,
        model: ModelName::new("scout"),
        digest: Some(format!("{index}").into()),
        parameters: None,
        tier: Some(Tier::Small),
        score: ScoreKind::None,
        max_in_flight: None,
        vitals: Vitals::default(),
        backend: Arc::new(backend) as Arc<dyn Backend>,
    });
    let runtime = Runtime::new().expect("threads start");
    let fusion = Fusion::new(FusionParts {
        settings: Settings::default(),
        roster: Arc::new(Fixed(members.collect())),
        calibration: Calibration::default(),
        metrics: Arc::new(Metrics::new()),
        runtime: runtime.handle().clone(),
    });
    (Server::start(fusion), runtime)
}

fn three() -> (Server, Runtime) {
    pool(vec![says(&["o", "n"]), says(&["On."]), says(&["off"])])
}

fn body(more: Value) -> String {
    let mut body = json!({
        "model": "fusion", "messages": [{"role": "user", "content": "Is it on?"}], "temperature": 0,
    });
    let fields = body.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("an object").clone());
    body.to_string()
}

#[test]
fn one_answer_comes_back_with_a_report() {
    let (server, _runtime) = three();
    let answer = server.post("/v1/chat/completions", &body(json!({}))).json();
    let text = answer["choices"][0]["message"]["content"].as_str().expect("text");
    assert!(["on", "On."].contains(&text), "{answer}");
    let report = &answer["fusion"];
    assert_eq!((&report["mode_used"], &report["degraded"]), (&json!("vote"), &json!(false)));
    assert_eq!(report["votes"]["on"], 2);
    assert!(report["receipt"].as_str().is_some_and(|receipt| receipt.len() == 7 + 64));
    let listed = server.get("/v1/models").json();
    assert_eq!(listed["data"][0]["id"], "fusion");
    let silent = body(json!({"fusion": {"include": "none"}}));
    let silent = server.post("/v1/chat/completions", &silent).json();
    assert_eq!(silent.get("fusion"), None);
}

#[test]
fn a_stream_tells_progress_in_comments_or_named_events() {
    let (server, _runtime) = three();
    let comments = server.post("/v1/chat/completions", &body(json!({"stream": true})));
    assert!(comments.text().contains(": fusion {\"type\":\"member_done\""), "{}", comments.text());
    assert!(!comments.text().contains("event:"), "{}", comments.text());
    let last = comments.events().pop().expect("chunks");
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert_eq!(last["fusion"]["quorum"]["needed"], 2);
    let named = body(json!({"stream": true, "fusion": {"events": true}}));
    let named = server.post("/v1/chat/completions", &named);
    assert!(named.text().contains("event: fusion\ndata: {\"type\":\"quorum\""), "{}", named.text());
}

#[test]
fn ollamas_last_line_has_the_report() {
    let (server, _runtime) = three();
    let asked =
        json!({"model": "fusion:latest", "options": {"fusion": {"n": 3}, "temperature": 0}});
    let lines = server.post("/api/chat", &body(asked)).lines();
    let last = lines.last().expect("lines");
    assert_eq!((&last["done"], &last["fusion"]["mode_used"]), (&json!(true), &json!("vote")));
    assert!(lines.iter().all(|line| line["model"] == "fusion:latest"));
}

#[test]
fn refusals_name_the_key_and_failures_the_members() {
    let (server, _runtime) = three();
    for (asked, status, names) in [
        (json!({"fusion": {"jugde": "x"}}), 400, "fusion.jugde"),
        (json!({"fusion": {"n": 99}}), 400, "fusion.n"),
        (json!({"fusion": {"members": ["attic"]}}), 400, "attic"),
        (json!({"fusion": {"judge": {"model": "gpt"}}}), 400, "gpt"),
        (json!({"model": "fusion:attic"}), 404, "fusion:attic"),
    ] {
        let response = server.post("/v1/chat/completions", &body(asked));
        assert_eq!(response.status, status, "{}", response.text());
        assert!(response.text().contains(names), "{}", response.text());
    }
    let deep = ["X-Scoutd-Fusion-Depth: 1"];
    let asked = server.request("POST", "/v1/chat/completions", &deep, &body(json!({})));
    assert_eq!(asked.status, 400, "{}", asked.text());

    let busy =
        || refuses(scoutd::chat::ChatError::QueueFull { retry_after: std::time::Duration::ZERO });
    let (server, _runtime) = pool(vec![busy(), busy()]);
    let failed = server.post("/v1/chat/completions", &body(json!({})));
    assert_eq!((failed.status, failed.header("retry-after")), (503, Some("2")));
    assert!(failed.text().contains("pi-0/scout: busy, pi-1/scout: busy"), "{}", failed.text());
}
