//! Any bytes as a body of Ollama's dialect: an error that says something, or work; and the same bytes as a
//! model's answer, which must come out as whole lines.

#![no_main]

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use libfuzzer_sys::fuzz_target;
use scoutd::chat::{
    ChatError, ChatEvent, ChatRequest, Completion, FinishReason, Message, Origin, RequestId, Role,
    Timings, Usage,
};
use scoutd::wire::ollama::{ChatBody, GenerateBody, LineWriter, Shape, Work, model_name};
use scoutd::wire::{Caller, KeepAlive, StreamWriter};

fuzz_target!(|bytes: &[u8]| {
    let caller = Caller {
        id: RequestId::random(),
        origin: Origin::Terminal,
        client: Arc::from("fuzz"),
        deadline: Instant::now(),
    };
    check(ChatBody::parse(bytes).and_then(|body| body.into_work(&caller)));
    check(GenerateBody::parse(bytes).and_then(|body| body.into_work(&caller)));
    if let Err(error) = model_name(bytes) {
        check_message(&error);
    }
    let text = String::from_utf8_lossy(bytes);
    let _ = KeepAlive::parse(&text);
    answer(&text, &caller);
});

fn check(work: Result<Work, ChatError>) {
    match work {
        Ok(Work::Answer { parts, .. }) => {
            let _ = ChatRequest::try_from(*parts);
        }
        Ok(Work::Load | Work::Unload) => {}
        Err(error) => check_message(&error),
    }
}

fn check_message(error: &ChatError) {
    let message = error.public_message();
    assert!(!message.is_empty() && message.len() < 1000, "{message}");
}

/// The answer's text stands in a line, and the conversation in the context that the next request sends back.
fn answer(text: &str, caller: &Caller) {
    let turns = vec![Message::text(Role::User, text)];
    let mut writer = LineWriter::new("m".to_owned(), Shape::Generate(Some(turns)), false);
    let mut out = Vec::new();
    let done = Completion {
        finish: FinishReason::Stop,
        usage: Usage::default(),
        timings: Timings::default(),
        fusion: None,
    };
    let said = ChatEvent::Delta { text: text.to_owned(), logprobs: Vec::new() };
    for event in [said, ChatEvent::Done(done)] {
        writer.event(0, event, SystemTime::UNIX_EPOCH, &mut out);
    }
    let out = String::from_utf8(out).expect("JSON is UTF-8");
    assert!(!out.contains(['\u{85}', '\u{2028}', '\u{2029}']));
    let lines: Vec<serde_json::Value> =
        out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["response"], text);
    let next = serde_json::json!({ "prompt": "next", "context": lines[1]["context"] });
    let body = GenerateBody::parse(next.to_string().as_bytes()).expect("our own context");
    match body.into_work(caller).expect("our own context") {
        Work::Answer { turns: Some(turns), .. } => {
            assert_eq!(turns.len(), 3);
            assert!(turns[..2].iter().all(|turn| turn.content == text));
        }
        other => panic!("{other:?}"),
    }
}
