//! Any bytes as a body of the OpenAI dialect: an error that says something, or a request that its own check
//! takes or refuses; and the same bytes as a model's answer, which must come out whole.

#![no_main]

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use libfuzzer_sys::fuzz_target;
use scoutd::chat::{
    ChatError, ChatEvent, ChatRequest, Completion, FinishReason, Input, Limits, Origin, RequestId,
    Timings, ToolCall, Usage,
};
use scoutd::wire::openai::{ChatBody, ChatWriter, CompletionBody, Head, PROMPTS_MAX};
use scoutd::wire::{Caller, StreamWriter};

fuzz_target!(|bytes: &[u8]| {
    let caller = Caller {
        id: RequestId::random(),
        origin: Origin::Terminal,
        client: Arc::from("fuzz"),
        deadline: Instant::now(),
    };
    match ChatBody::parse(bytes).and_then(|body| body.into_parts(&caller)) {
        Ok(parts) => {
            let Input::Messages(messages) = &parts.input else { panic!("a conversation") };
            assert!(messages.len() <= Limits::MESSAGES_MAX);
            let _ = ChatRequest::try_from(parts);
        }
        Err(error) => check_message(&error),
    }
    match CompletionBody::parse(bytes).and_then(|body| body.into_requests(&caller)) {
        Ok(requests) => {
            assert!((1..=4 * PROMPTS_MAX).contains(&requests.len()));
            for (parts, _) in requests {
                let _ = ChatRequest::try_from(parts);
            }
        }
        Err(error) => check_message(&error),
    }
    answer(&String::from_utf8_lossy(bytes));
});

fn check_message(error: &ChatError) {
    let message = error.public_message();
    assert!(!message.is_empty() && message.len() < 1000, "{message}");
}

fn answer(text: &str) {
    let head = Head { id: "x".to_owned(), created: 0, model: "m".to_owned() };
    let mut writer = ChatWriter::new(head, 1, false, true);
    let mut out = Vec::new();
    let arguments = [(text.to_owned(), text.into())].into_iter().collect();
    let call = ToolCall { id: text.to_owned(), name: text.to_owned(), arguments };
    let done = Completion {
        finish: FinishReason::Stop,
        usage: Usage::default(),
        timings: Timings::default(),
        fusion: None,
    };
    for event in [
        ChatEvent::Delta { text: text.to_owned(), logprobs: Vec::new() },
        ChatEvent::ToolCall(call),
        ChatEvent::Done(done),
    ] {
        writer.event(0, event, SystemTime::UNIX_EPOCH, &mut out);
    }
    writer.end(&mut out);
    let out = String::from_utf8(out).expect("JSON is UTF-8");
    assert!(!out.contains(['\u{85}', '\u{2028}', '\u{2029}']));
    let events: Vec<&str> = out.split_terminator("\n\n").collect();
    assert_eq!(events.len(), 5);
    let json = |at: usize| -> serde_json::Value {
        serde_json::from_str(events[at].strip_prefix("data: ").expect("data")).expect("JSON")
    };
    assert_eq!(json(0)["choices"][0]["delta"]["content"], text);
    let call = &json(1)["choices"][0]["delta"]["tool_calls"][0]["function"];
    let arguments: serde_json::Value =
        serde_json::from_str(call["arguments"].as_str().expect("a text")).expect("JSON");
    assert_eq!(arguments[text], text);
}
