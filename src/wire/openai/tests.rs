//! Every field of a request: what each spelling becomes, and what each wrong value is answered.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use super::{ChatBody, CompletionBody, Echo};
use crate::chat::{
    ChatError, ChatRequest, ChatRequestParts, Input, Message, Origin, OutputFormat, RequestId,
    Role, SamplingParams, ToolChoice,
};
use crate::units::TokenId;
use crate::wire::Caller;

fn caller() -> Caller {
    Caller {
        id: RequestId::parse("id").expect("valid"),
        origin: Origin::Terminal,
        client: Arc::from("me"),
        deadline: Instant::now(),
    }
}

/// A chat whose fields are `more`, read and checked.
fn chat(more: &str) -> Result<ChatRequestParts, ChatError> {
    let comma = if more.is_empty() { "" } else { "," };
    let body = format!(r#"{{"messages":[{{"role":"user","content":"x"}}]{comma}{more}}}"#);
    let parts = ChatBody::parse(body.as_bytes())?.into_parts(&caller())?;
    ChatRequest::try_from(parts).map(ChatRequest::into_parts)
}

fn check_refused(cases: &[(&str, &str, Option<&str>)]) {
    for (fields, message, param) in cases {
        match chat(fields) {
            Err(ChatError::Invalid { message: got, param: at }) => {
                assert_eq!((got.as_str(), at.as_deref()), (*message, *param), "{fields}");
            }
            other => panic!("{fields}: {other:?}"),
        }
    }
}

#[test]
fn an_empty_request_has_openais_defaults() {
    let parts = chat("").expect("valid");
    assert_eq!(parts.sampling, SamplingParams::default());
    assert_eq!(parts.model.as_str(), "");
    assert_eq!((parts.max_tokens, parts.logprobs, parts.echo), (None, None, false));
    assert_eq!((parts.context_tokens, parts.truncate), (None, false));
    assert_eq!((parts.tool_choice, parts.format), (ToolChoice::Auto, OutputFormat::Text));
    assert_eq!((parts.id.as_str(), &*parts.client), ("id", "me"));
}

#[test]
fn null_is_absent_everywhere() {
    let fields = [
        "model",
        "tools",
        "tool_choice",
        "response_format",
        "reasoning_effort",
        "chat_template_kwargs",
        "logprobs",
        "top_logprobs",
        "max_tokens",
        "max_completion_tokens",
        "n",
        "stream",
        "stream_options",
        "stop",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repeat_penalty",
        "repeat_last_n",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "logit_bias",
        "user",
        "parallel_tool_calls",
    ];
    let all: Vec<String> = fields.iter().map(|field| format!("\"{field}\":null")).collect();
    let parts = chat(&all.join(",")).expect("valid");
    assert_eq!(parts.sampling, SamplingParams::default());
    assert_eq!(parts.tool_choice, ToolChoice::Auto);
}

#[test]
fn numbers_in_every_spelling() {
    type Get = fn(&ChatRequestParts) -> Value;
    let cases: &[(&str, Get, Value)] = &[
        (r#""max_tokens":5"#, |p| json!(p.max_tokens), json!(5)),
        (r#""max_tokens":5.9"#, |p| json!(p.max_tokens), json!(5)),
        (r#""max_tokens":-1"#, |p| json!(p.max_tokens), json!(null)),
        (r#""max_tokens":5,"max_completion_tokens":7"#, |p| json!(p.max_tokens), json!(7)),
        (r#""max_completion_tokens":1e2"#, |p| json!(p.max_tokens), json!(100)),
        (r#""seed":0"#, |p| json!(p.sampling.seed), json!(0)),
        (r#""seed":-1"#, |p| json!(p.sampling.seed), json!(null)),
        (r#""seed":-2"#, |p| json!(p.sampling.seed), json!(u64::MAX - 1)),
        (r#""seed":18446744073709551615"#, |p| json!(p.sampling.seed), json!(u64::MAX)),
        (r#""temperature":0"#, |p| json!(p.sampling.temperature), json!(0.0)),
        (r#""temperature":0.5"#, |p| json!(p.sampling.temperature), json!(0.5)),
        (r#""top_p":1"#, |p| json!(p.sampling.top_p), json!(1.0)),
        (r#""top_k":40.0"#, |p| json!(p.sampling.top_k), json!(40)),
        (r#""min_p":0.25"#, |p| json!(p.sampling.min_p), json!(0.25)),
        (r#""repeat_last_n":-1"#, |p| json!(p.sampling.repeat_last_n), json!(-1)),
        (r#""presence_penalty":-2"#, |p| json!(p.sampling.presence_penalty), json!(-2.0)),
        (r#""logprobs":true"#, |p| json!(p.logprobs), json!(0)),
        (r#""logprobs":true,"top_logprobs":20.0"#, |p| json!(p.logprobs), json!(20)),
        (r#""logprobs":false,"top_logprobs":0"#, |p| json!(p.logprobs), json!(null)),
        (r#""stop":"a""#, |p| json!(p.stop), json!(["a"])),
        (r#""stop":["a","","b"]"#, |p| json!(p.stop), json!(["a", "b"])),
    ];
    for (fields, get, expected) in cases {
        let parts = chat(fields).unwrap_or_else(|error| panic!("{fields}: {error}"));
        assert_eq!(get(&parts), *expected, "{fields}");
    }
}

#[test]
fn every_wrong_value_has_its_words() {
    check_refused(&[
        (r#""model":5"#, "model must be a string, not the number 5", Some("model")),
        (
            r#""model":"a b""#,
            "model must be a name of at most 128 letters, digits and . _ : / -",
            Some("model"),
        ),
        (r#""max_tokens":"5""#, "max_tokens must be an integer, not a text", Some("max_tokens")),
        (r#""max_tokens":-2"#, "max_tokens must not be -2", Some("max_tokens")),
        (r#""max_tokens":4294967296"#, "max_tokens must not be 4294967296", Some("max_tokens")),
        (
            r#""max_completion_tokens":[]"#,
            "max_completion_tokens must be an integer, not a list",
            Some("max_completion_tokens"),
        ),
        (r#""temperature":"hot""#, "temperature must be a number, not a text", Some("temperature")),
        (r#""temperature":1e39"#, "temperature: number out of range", Some("temperature")),
        (
            r#""temperature":101"#,
            "temperature must be between 0 and 100, not 101",
            Some("temperature"),
        ),
        (r#""top_p":1.5"#, "top_p must be between 0 and 1, not 1.5", Some("top_p")),
        (r#""top_k":-1"#, "top_k must not be -1", Some("top_k")),
        (r#""min_p":true"#, "min_p must be a number, not true", Some("min_p")),
        (r#""seed":1e19"#, "seed: number out of range", Some("seed")),
        (
            r#""stop":5"#,
            "stop must be a string or a list of strings, not the number 5",
            Some("stop"),
        ),
        (r#""stop":[5]"#, "stop[0] must be a string, not the number 5", Some("stop[0]")),
        (r#""stream":1"#, "stream must be a boolean, not the number 1", Some("stream")),
        (
            r#""stream_options":true"#,
            "stream_options must be an object, not true",
            Some("stream_options"),
        ),
        (r#""top_logprobs":1"#, "top_logprobs needs logprobs to be true", Some("top_logprobs")),
        (
            r#""logprobs":true,"top_logprobs":-1"#,
            "top_logprobs must be between 0 and 20",
            Some("top_logprobs"),
        ),
        (
            r#""logit_bias":{"1":200}"#,
            "logit_bias must be between -100 and 100, not 200",
            Some("logit_bias"),
        ),
        (r#""tools":{}"#, "tools must be a list, not an object", Some("tools")),
        (
            r#""tools":[{"function":{"name":"f","parameters":[]}}]"#,
            "tools[0].function.parameters must be an object",
            Some("tools[0].function.parameters"),
        ),
        (
            r#""tool_choice":"f""#,
            "tool_choice must be \"none\", \"auto\", \"required\" or one function",
            Some("tool_choice"),
        ),
        (
            r#""tool_choice":{"function":{"name":"f"}}"#,
            "tool_choice names \"f\", which is not among the tools",
            Some("tool_choice"),
        ),
        (
            r#""chat_template_kwargs":[1]"#,
            "chat_template_kwargs must be an object",
            Some("chat_template_kwargs"),
        ),
        (
            r#""reasoning_effort":"as much as you possibly can""#,
            "reasoning_effort must be a word",
            Some("reasoning_effort"),
        ),
        (r#""messages":[]"#, "request body: duplicate field \"messages\"", None),
    ]);
    let body = ChatBody::parse(br#"{"n":5}"#).expect("right types");
    assert_eq!(body.choices().expect_err("too many").to_string(), "n must be between 1 and 4");
}

#[test]
fn contents_in_every_form() {
    let read = |content: &str| {
        let body = format!(r#"{{"messages":[{{"role":"USER"{content}}}]}}"#);
        let parts = ChatBody::parse(body.as_bytes())?.into_parts(&caller())?;
        match parts.input {
            Input::Messages(mut messages) => Ok(messages.remove(0).content),
            other => panic!("{other:?}"),
        }
    };
    let cases = [
        ("", Ok("")),
        (r#","content":null"#, Ok("")),
        (r#","content":"a\u2028""#, Ok("a\u{2028}")),
        (r#","content":[]"#, Ok("")),
        (r#","content":[{"type":"text","text":"a"},{"text":"b"}]"#, Ok("a\nb")),
        (
            r#","content":[{"type":"text","text":"a"},{"type":"input_audio","input_audio":{}}]"#,
            Err("messages[0].content: parts of type \"input_audio\" are not supported, only text"),
        ),
        (
            r#","content":5"#,
            Err("messages[0].content must be a string or a list of parts, not the number 5"),
        ),
        (r#","content":[5]"#, Err("messages[0].content[0] must be an object, not the number 5")),
    ];
    for (content, expected) in cases {
        let got = read(content).map_err(|error: ChatError| error.to_string());
        assert_eq!(got, expected.map(str::to_owned).map_err(str::to_owned), "{content}");
    }
}

#[test]
fn the_shorthand_of_mqtt() {
    let mut body = ChatBody::parse(br#"{"stream":true,"n":2}"#).expect("valid");
    assert!(!body.has_messages() && body.stream());
    body.push_user("Hi".to_owned());
    assert!(body.has_messages());
    let parts = body.into_parts(&caller()).expect("valid");
    assert_eq!(parts.input, Input::Messages(vec![Message::text(Role::User, "Hi")]));
}

#[test]
fn prompts_in_every_form() {
    let read = |prompt: &str| -> Result<Vec<Input>, ChatError> {
        let body = format!(r#"{{"prompt":{prompt}}}"#);
        let requests = CompletionBody::parse(body.as_bytes())?.into_requests(&caller())?;
        Ok(requests.into_iter().map(|(parts, _)| parts.input).collect())
    };
    let text = |text: &str| Input::Text(text.to_owned());
    let tokens = |ids: &[u32]| Input::Tokens(ids.iter().map(|&id| TokenId(id)).collect());
    let cases = [
        (r#""a""#, vec![text("a")]),
        (r#"["a","b"]"#, vec![text("a"), text("b")]),
        ("[1,2.0,3]", vec![tokens(&[1, 2, 3])]),
        ("[1.0]", vec![tokens(&[1])]),
        ("[[1],[2,3]]", vec![tokens(&[1]), tokens(&[2, 3])]),
    ];
    for (prompt, expected) in cases {
        assert_eq!(read(prompt).expect(prompt), expected, "{prompt}");
    }
    for prompt in [
        "5",
        "{}",
        "[{}]",
        "[-1]",
        "[1,-1]",
        "[4294967296]",
        "[1,\"a\"]",
        "[[1],2]",
        "[[1],[[2]]]",
        "[null]",
        "true",
    ] {
        let error = read(prompt).expect_err(prompt).to_string();
        assert!(error.starts_with("prompt"), "{prompt}: {error}");
    }
}

#[test]
fn completions_ask_for_what_their_echo_needs() {
    let read = |fields: &str| {
        let body = format!("{{{fields}}}");
        let requests = CompletionBody::parse(body.as_bytes())
            .and_then(|body| body.into_requests(&caller()))
            .unwrap_or_else(|error| panic!("{fields}: {error}"));
        let (parts, echo) = requests.into_iter().next().expect("one");
        (parts.logprobs, parts.echo, echo)
    };
    let text = || Echo::Text("a".to_owned());
    assert_eq!(read(r#""prompt":"a""#), (None, false, Echo::No));
    assert_eq!(read(r#""prompt":"a","echo":true"#), (None, false, text()));
    assert_eq!(read(r#""prompt":"a","echo":true,"logprobs":0"#), (Some(0), true, text()));
    assert_eq!(read(r#""prompt":[1],"echo":true"#), (Some(0), true, Echo::Tokens));
    assert_eq!(read(r#""prompt":[1],"logprobs":5"#), (Some(5), false, Echo::No));
}
