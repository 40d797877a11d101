//! Every key of the object, what each wrong one is answered, and the words of other APIs.

use serde_json::{Value, json};

use super::*;
use crate::chat::{
    AnswerForm, ChatError, ChatEvent, ChatRequestParts, Completion, FaultReason, FinishReason,
    FusionMode, FusionProgress, FusionReport, FusionRequest, FusionTiming, Include, JudgeChoice,
    JudgeMethod, JudgeReport, MemberReport, MemberState, MemberUsage, MergeStyle, ModeUsed,
    NoQuorum, Origin, QuorumReport, RequestId, Scope, Timings, Usage,
};
use crate::wire::{Caller, StreamWriter, mqtt, ollama, openai};

fn refusal(object: Value) -> (String, Option<String>) {
    match own(object.clone()) {
        Err(ChatError::Invalid { message, param }) => (message, param),
        other => panic!("{object}: {other:?}"),
    }
}

#[test]
fn every_key_is_read() {
    let asked = own(json!({
        "mode": "debate", "style": "generative", "rounds": 2, "members": ["pi-a/x", "pi-b/*"],
        "n": 3.0, "samples": 2, "quorum": 2, "deadline_ms": 60000, "grace_ms": 0,
        "on_no_quorum": "local", "answer": {"type": "choice", "choices": ["on", "off"]},
        "judge": {"model": "local", "method": "pairwise", "swap": false},
        "include": "answers", "analysis": true, "events": true, "seed": 7,
    }));
    let expected = FusionRequest {
        mode: FusionMode::Debate,
        style: MergeStyle::Generative,
        rounds: 2,
        members: vec!["pi-a/x".to_owned(), "pi-b/*".to_owned()],
        n: Some(3),
        samples: 2,
        quorum: Some(2),
        deadline: Some(std::time::Duration::from_secs(60)),
        grace: Some(std::time::Duration::ZERO),
        on_no_quorum: NoQuorum::Local,
        answer: AnswerForm::Choice(vec!["on".to_owned(), "off".to_owned()]),
        judge: JudgeChoice {
            model: "local".to_owned(),
            method: JudgeMethod::Pairwise,
            swap: false,
        },
        include: Include::Answers,
        analysis: true,
        events: true,
        seed: Some(7),
        ignored: Vec::new(),
    };
    assert_eq!(asked.expect("valid").map(|asked| asked.options), Some(expected));
    let empty = own(json!({"mode": null, "judge": {}})).expect("valid").expect("an object");
    assert_eq!(empty.options, FusionRequest::default());
    assert_eq!(own(Value::Null), Ok(None));
}

#[test]
fn unknown_and_wrong_keys_are_refused_by_name() {
    for (object, message) in [
        (json!({"modus": "auto"}), "fusion.modus is not known"),
        (json!({"judge": {"name": "x"}}), "fusion.judge.name is not known"),
        (json!({"answer": {"kind": "x"}}), "fusion.answer.kind is not known"),
        (json!([]), "fusion must be an object"),
        (json!({"n": 2.5}), "fusion.n must be a small whole number"),
        (json!({"n": -1}), "fusion.n must be a small whole number"),
        (json!({"n": 300}), "fusion.n must be a small whole number"),
        (json!({"deadline_ms": 0}), "fusion.deadline_ms must be from 1 to 86400000"),
        (json!({"events": 1}), "fusion.events must be true or false"),
        (json!({"members": ["a", 1]}), "fusion.members must be a list of at most 64 texts"),
        (
            json!({"mode": "best"}),
            "fusion.mode must be one of \"auto\", \"best_of\", \"merge\", \"debate\"",
        ),
        (
            json!({"answer": {"type": "number", "pattern": "x"}}),
            "fusion.answer.pattern goes with type \"regex\"",
        ),
    ] {
        let (got, param) = refusal(object);
        assert_eq!(got, message);
        assert_eq!(param.as_deref(), message.split(' ').next());
    }
}

#[test]
fn openrouters_parameters_become_ours() {
    let asked = openrouter(
        "plugins[0]",
        json!({
            "id": "fusion", "analysis_models": ["a", "b"], "model": "c",
            "max_completion_tokens": 99, "temperature": 0.5, "preset": "attic",
            "max_tool_calls": 3, "reasoning": {},
        }),
    )
    .expect("valid");
    assert_eq!(asked.model.as_deref(), Some("fusion:attic"));
    assert_eq!((asked.options.n, asked.options.members.len()), (Some(2), 2));
    assert_eq!(asked.options.judge.model, "c");
    assert_eq!((asked.max_tokens, asked.temperature), (Some(99), Some(0.5)));
    assert_eq!(asked.options.ignored, ["max_tool_calls", "reasoning"]);
    let error = openrouter("plugins[0]", json!({"judge": 1})).expect_err("unknown").to_string();
    assert_eq!(error, "plugins[0].judge is not known");
    let plain = openrouter("tools[0].parameters", Value::Null).expect("valid");
    assert_eq!(plain.model.as_deref(), Some("fusion"));
}

#[test]
fn options_need_a_fusion() {
    for name in ["fusion", "Fusion:attic", "fusion:latest", "openrouter/fusion"] {
        assert!(check_model(name).is_ok(), "{name}");
    }
    for name in ["", "nano", "fusionist", "x/fusion"] {
        assert!(check_model(name).is_err(), "{name}");
    }
}

fn caller() -> Caller {
    Caller {
        id: RequestId::parse("id").expect("valid"),
        origin: Origin::Terminal,
        client: "me".into(),
        deadline: std::time::Instant::now(),
    }
}

fn chat(more: &str) -> Result<ChatRequestParts, ChatError> {
    let body = format!(r#"{{"messages":[{{"role":"user","content":"x"}}],{more}}}"#);
    openai::ChatBody::parse(body.as_bytes())?.into_parts(&caller())
}

#[test]
fn three_shapes_ask_for_a_fusion() {
    for (body, model) in [
        (r#""model":"fusion","fusion":{"n":2}"#, "fusion"),
        (
            r#""model":"any","plugins":[{"id":"web"},{"id":"fusion","analysis_models":["a","b"]}]"#,
            "fusion",
        ),
        (
            r#""model":"any","tools":[{"type":"openrouter:fusion","parameters":{"preset":"attic","analysis_models":["a","b"]}}]"#,
            "fusion:attic",
        ),
    ] {
        let parts = chat(body).expect("valid");
        let fusion = parts.fusion.expect("it asks for one");
        assert_eq!((parts.model.as_str(), fusion.n, parts.tools.len()), (model, Some(2), 0));
    }
    let plain = chat(r#""model":"openrouter/fusion","plugins":[{"id":"web"}]"#).expect("valid");
    assert!(plain.fusion.is_none());
    for (body, names) in [
        (r#""model":"fusion","fusion":{},"plugins":[{"id":"fusion"}]"#, "exclude"),
        (r#""model":"nano","fusion":{}"#, "fusion needs model"),
        (r#""model":"fusion","fusion":{"jugde":{}}"#, "fusion.jugde is not known"),
        (
            r#""tools":[{"type":"openrouter:fusion"},{"function":{"name":"f"}}]"#,
            "must be the only tool",
        ),
    ] {
        let error = chat(body).expect_err(body).to_string();
        assert!(error.contains(names), "{body}: {error}");
    }
}

#[test]
fn ollamas_clients_ask_in_options_too() {
    for body in [
        r#"{"model":"fusion","messages":[{"role":"user","content":"x"}],"fusion":{"n":2}}"#,
        r#"{"model":"fusion","messages":[{"role":"user","content":"x"}],"options":{"fusion":{"n":2}}}"#,
    ] {
        let work = ollama::ChatBody::parse(body.as_bytes()).expect("JSON").into_work(&caller());
        let ollama::Work::Answer { parts, .. } = work.expect("valid") else { panic!("{body}") };
        assert_eq!(parts.fusion.expect("it asks for one").n, Some(2));
    }
}

fn told(include: Include) -> Completion {
    let fusion = FusionReport {
        id: "fx_1".to_owned(),
        mode_requested: FusionMode::Auto,
        mode_used: ModeUsed::BestOf,
        mode_reason: None,
        winner: Some("pi-b/x".to_owned()),
        degraded: false,
        quorum: QuorumReport { needed: 2, usable: 3, asked: 3 },
        members: vec![MemberReport {
            id: "pi-a/x".to_owned(),
            scope: Scope::Lan,
            state: MemberState::Http5xx,
            reason: Some(FaultReason::Http5xx(502)),
            elapsed: std::time::Duration::from_millis(1830),
            tokens: 41,
            tokens_estimated: true,
            score: Some(-0.2104),
            weight: 1.4,
            text: None,
        }],
        votes: vec![("on".to_owned(), 2), ("off".to_owned(), 1)],
        sentences: Vec::new(),
        dissent: Vec::new(),
        analysis: None,
        judge: Some(JudgeReport {
            model: Some("local/x".to_owned()),
            method: JudgeMethod::Logprob,
            prompt: "fj-1",
            swapped: false,
            overlaps_panel: true,
            reason: None,
        }),
        timing: FusionTiming {
            slowest_used: std::time::Duration::from_millis(1830),
            total: std::time::Duration::from_millis(1892),
        },
        usage_by_member: vec![MemberUsage {
            id: "pi-a/x".to_owned(),
            usage: Usage { prompt_tokens: 5, cached_tokens: 0, completion_tokens: 41 },
            estimated: true,
        }],
        ignored: Vec::new(),
        receipt: "sha256:00".to_owned(),
        include,
    };
    Completion {
        finish: FinishReason::Stop,
        usage: Usage::default(),
        timings: Timings::default(),
        fusion: Some(std::sync::Arc::new(fusion)),
    }
}

fn object() -> Value {
    json!({
        "id": "fx_1", "mode_requested": "auto", "mode_used": "best_of", "mode_reason": null,
        "winner": "pi-b/x", "degraded": false, "quorum": {"needed": 2, "usable": 3, "asked": 3},
        "members": [{
            "id": "pi-a/x", "scope": "lan", "state": "http_5xx", "reason": "http_502", "ms": 1830,
            "tokens": 41, "tokens_estimated": true, "score": -0.21, "weight": 1.4,
        }],
        "votes": {"on": 2, "off": 1}, "sentences": [], "dissent": [],
        "judge": {
            "model": "local/x", "method": "logprob", "prompt": "fj-1", "swapped": false,
            "overlaps_panel": true, "reason": null,
        },
        "timing": {"slowest_used_ms": 1830, "total_ms": 1892, "overhead_ratio": 1.034},
        "usage_by_member": {
            "pi-a/x": {"prompt_tokens": 5, "completion_tokens": 41, "estimated": true},
        },
        "ignored": [], "receipt": "sha256:00",
    })
}

#[test]
fn streams_tell_progress_as_comments_and_end_with_the_report() {
    for (events, begins) in [(false, ": fusion {"), (true, "event: fusion\ndata: {")] {
        let head = openai::Head { id: "x".to_owned(), created: 0, model: "fusion".to_owned() };
        let mut writer = openai::ChatWriter::new(head, 1, false, false).with_events(events);
        let mut out = Vec::new();
        let mut write = |event, out: &mut Vec<u8>| {
            writer.event(0, event, std::time::SystemTime::UNIX_EPOCH, out);
        };
        let quorum = FusionProgress::Quorum { usable: 2, needed: 2 };
        write(ChatEvent::Progress(quorum), &mut out);
        let text = String::from_utf8(std::mem::take(&mut out)).expect("UTF-8");
        let expected = format!("{begins}\"type\":\"quorum\",\"usable\":2,\"needed\":2}}\n\n");
        assert_eq!(text, expected);
        write(ChatEvent::Done(told(Include::Summary)), &mut out);
        let text = String::from_utf8(out).expect("UTF-8");
        let chunk: Value = serde_json::from_str(text.trim_start_matches("data: ")).expect("JSON");
        assert_eq!(chunk["choices"][0]["finish_reason"], "stop");
        assert_eq!(chunk["fusion"], object());
    }
}

#[test]
fn every_door_ends_with_the_same_report() {
    let done = || ChatEvent::Done(told(Include::Summary));
    let mut writer = ollama::LineWriter::new("fusion".to_owned(), ollama::Shape::Chat, false);
    let mut out = Vec::new();
    let progress = ChatEvent::Progress(FusionProgress::Degraded { reason: "no_quorum" });
    writer.event(0, progress, std::time::SystemTime::UNIX_EPOCH, &mut out);
    assert!(out.is_empty(), "a line is always a valid chunk");
    writer.event(0, done(), std::time::SystemTime::UNIX_EPOCH, &mut out);
    let line: Value = serde_json::from_slice(&out).expect("JSON");
    assert_eq!((&line["done"], &line["fusion"]), (&json!(true), &object()));
    let echo = mqtt::Echo { id: json!(1), transaction: None };
    let answer = mqtt::Answer::default();
    let last = mqtt::final_answer(&echo, &answer, &told(Include::Summary), false);
    let last: Value = serde_json::from_slice(&last).expect("JSON");
    assert_eq!(last["data"]["fusion"], object());
    let silent = mqtt::final_answer(&echo, &answer, &told(Include::None), false);
    let silent: Value = serde_json::from_slice(&silent).expect("JSON");
    assert_eq!(silent["data"].get("fusion"), None);
}
