//! Every field of a request: what each spelling becomes, and what each wrong value is answered.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use super::{ChatBody, GenerateBody, Work};
use crate::chat::{ChatError, ChatRequestParts, Input, Origin, OutputFormat, RequestId, Role};
use crate::wire::Caller;

fn caller() -> Caller {
    Caller {
        id: RequestId::parse("id").expect("valid"),
        origin: Origin::Terminal,
        client: Arc::from("me"),
        deadline: Instant::now(),
    }
}

fn chat(more: &str) -> Result<ChatRequestParts, ChatError> {
    let comma = if more.is_empty() { "" } else { "," };
    let body = format!(r#"{{"messages":[{{"role":"user","content":"x"}}]{comma}{more}}}"#);
    match ChatBody::parse(body.as_bytes())?.into_work(&caller())? {
        Work::Answer { parts, .. } => Ok(*parts),
        other => panic!("{more}: {other:?}"),
    }
}

#[test]
fn null_is_absent_everywhere() {
    let fields = [
        "model",
        "tools",
        "stream",
        "format",
        "options",
        "keep_alive",
        "think",
        "truncate",
        "logprobs",
        "top_logprobs",
    ];
    let all: Vec<String> = fields.iter().map(|field| format!("\"{field}\":null")).collect();
    let parts = chat(&all.join(",")).expect("valid");
    assert_eq!((parts.sampling.temperature, parts.sampling.top_k), (0.8, 40));
    assert_eq!((parts.format, parts.truncate), (OutputFormat::Text, true));
    let options = [
        "num_ctx",
        "num_predict",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repeat_penalty",
        "repeat_last_n",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "stop",
    ];
    let all: Vec<String> = options.iter().map(|field| format!("\"{field}\":null")).collect();
    assert!(chat(&format!("\"options\":{{{}}}", all.join(","))).is_ok());
}

#[test]
fn values_in_every_spelling() {
    type Get = fn(&ChatRequestParts) -> Value;
    let cases: &[(&str, Get, Value)] = &[
        (r#""options":{"num_ctx":8192.0}"#, |p| json!(p.context_tokens), json!(8192)),
        (r#""options":{"num_predict":-1}"#, |p| json!(p.max_tokens), json!(null)),
        (r#""options":{"num_predict":-2.0}"#, |p| json!(p.max_tokens), json!(null)),
        (r#""options":{"num_predict":0}"#, |p| json!(p.max_tokens), json!(null)),
        (r#""options":{"num_predict":128.0}"#, |p| json!(p.max_tokens), json!(128)),
        (r#""options":{"seed":42.0}"#, |p| json!(p.sampling.seed), json!(42)),
        (r#""options":{"seed":-1}"#, |p| json!(p.sampling.seed), json!(null)),
        (r#""options":{"stop":"x"}"#, |p| json!(p.stop), json!(["x"])),
        (r#""options":{"top_k":0}"#, |p| json!(p.sampling.top_k), json!(0)),
        (r#""think":true"#, |p| json!(p.template_args), json!({"enable_thinking": true})),
        (r#""think":false"#, |p| json!(p.template_args), json!({"enable_thinking": false})),
        (
            r#""think":"low""#,
            |p| json!(p.template_args),
            json!({"enable_thinking": true, "reasoning_effort": "low"}),
        ),
        (r#""logprobs":true"#, |p| json!(p.logprobs), json!(0)),
        (r#""top_logprobs":5"#, |p| json!(p.logprobs), json!(null)),
        (r#""format":"""#, |p| json!(p.format == OutputFormat::Text), json!(true)),
        (r#""format":"json""#, |p| json!(p.format == OutputFormat::JsonObject), json!(true)),
        (r#""tools":[]"#, |p| json!(p.tools.len()), json!(0)),
        (r#""keep_alive":-1.0"#, |p| json!(p.truncate), json!(true)),
    ];
    for (fields, get, expected) in cases {
        let parts = chat(fields).unwrap_or_else(|error| panic!("{fields}: {error}"));
        assert_eq!(get(&parts), *expected, "{fields}");
    }
}

#[test]
fn every_wrong_value_has_its_words() {
    let cases = [
        (r#""options":[]"#, "options must be an object, not a list"),
        (r#""options":{"num_ctx":-1}"#, "options.num_ctx must not be -1"),
        (r#""options":{"num_ctx":1e300}"#, "options.num_ctx: number out of range"),
        (r#""options":{"num_predict":5000000000}"#, "options.num_predict must not be 5000000000"),
        (r#""options":{"temperature":"x"}"#, "options.temperature must be a number, not a text"),
        (r#""options":{"stop":[1]}"#, "options.stop[0] must be a string, not the number 1"),
        (
            r#""keep_alive":"5 minutes""#,
            "keep_alive: must be a number of seconds or a duration as \"5m\"",
        ),
        (
            r#""keep_alive":{}"#,
            "keep_alive must be a number of seconds or a duration as \"5m\", not an object",
        ),
        (r#""stream":"false""#, "stream must be a boolean, not a text"),
        (r#""format":["json"]"#, "format must be \"json\" or a JSON schema"),
        (r#""top_logprobs":-1"#, "top_logprobs must be between 0 and 20"),
        (r#""tools":[{"type":"function"}]"#, "tools[0].function is missing"),
        (r#""think":1"#, "think: must be true, false, \"low\", \"medium\", \"high\" or \"max\""),
    ];
    for (fields, message) in cases {
        assert_eq!(chat(fields).expect_err(fields).to_string(), message, "{fields}");
    }
    let images = br#"{"messages":[{"role":"user","content":"x","images":["aGk="]}]}"#;
    let error = ChatBody::parse(images).and_then(|body| body.into_work(&caller()));
    assert!(matches!(error, Err(ChatError::NotSupported(_))), "{error:?}");
}

#[test]
fn empty_images_and_foreign_fields_do_no_harm() {
    let body = br#"{"messages":[{"role":"Tool","content":"x","images":[],"error":true,"thinking":"hm"},
        {"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{\"a\":1}","index":3}}]}]}"#;
    let work = ChatBody::parse(body).and_then(|body| body.into_work(&caller()));
    let Ok(Work::Answer { parts, .. }) = work else { panic!("{work:?}") };
    let Input::Messages(messages) = parts.input else { panic!("a conversation") };
    assert_eq!(messages[0].role, Role::Tool);
    assert_eq!(Value::Object(messages[1].tool_calls[0].arguments.clone()), json!({"a": 1}));
}

#[test]
fn a_new_system_prompt_replaces_the_old_one() {
    let turns = |body: &Value| {
        let body = GenerateBody::parse(body.to_string().as_bytes()).expect("right types");
        match body.into_work(&caller()).expect("valid") {
            Work::Answer { turns: Some(turns), .. } => turns,
            other => panic!("{other:?}"),
        }
    };
    let first = turns(&json!({"prompt": "a", "system": "old"}));
    let context = super::context::pack(&first);
    let second = turns(&json!({"prompt": "b", "system": "new", "context": context}));
    let said: Vec<_> = second.iter().map(|turn| turn.content.as_str()).collect();
    assert_eq!(said, ["new", "a", "b"]);
}
