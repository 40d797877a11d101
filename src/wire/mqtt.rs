//! Payloads of the MQTT door: the envelope around an OpenAI chat body, answers, telemetry.
//!
//! Every answer is one JSON object with a `type`: `accepted`, `chunk` or `final`.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::fusion;
use crate::chat::{ChatError, Completion, FinishReason, ModelCard, Priority, RequestId, ToolCall};

/// What pairs an answer with its request, as far as the payload could be read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pairing {
    /// The client's id as it was written, to be echoed: text or a whole number.
    pub id: Option<Value>,
    /// Where the client wants the answer.
    pub reply_to: Option<String>,
    /// Echoed as it came.
    pub transaction: Option<Value>,
}

impl Pairing {
    /// The id as a request's name.
    pub fn request_id(&self) -> Option<RequestId> {
        match self.id.as_ref()? {
            Value::String(text) => RequestId::parse(text),
            Value::Number(number) if !number.is_f64() => RequestId::parse(&number.to_string()),
            _ => None,
        }
    }
}

/// A chat request out of its envelope.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatCommand {
    /// Chunks before the final.
    pub stream: bool,
    /// How long the client wants to wait, counted from receipt.
    pub deadline: Option<Duration>,
    /// Who goes first.
    pub priority: Priority,
    /// The OpenAI chat body.
    pub body: Vec<u8>,
}

/// Reads a chat request. The pairing is what could be read even if the request as a whole is refused, so that the
/// refusal finds its way.
pub fn read_chat(payload: &[u8]) -> (Pairing, Result<ChatCommand, ChatError>) {
    let mut fields = match read_object(payload) {
        Ok(fields) => fields,
        Err(error) => return (Pairing::default(), Err(error)),
    };
    let (pairing, paired) = take_pairing(&mut fields);
    (pairing, paired.and_then(|()| chat_command(fields)))
}

/// Reads a request that says nothing beyond its pairing (`models`, `status`); an empty payload is one too.
pub fn read_plain(payload: &[u8]) -> (Pairing, Result<(), ChatError>) {
    if payload.is_empty() {
        return (Pairing::default(), Ok(()));
    }
    match read_object(payload) {
        Ok(mut fields) => take_pairing(&mut fields),
        Err(error) => (Pairing::default(), Err(error)),
    }
}

/// Reads a cancel request: `id` names the request to cancel.
pub fn read_cancel(payload: &[u8]) -> (Pairing, Result<RequestId, ChatError>) {
    let (pairing, read) = read_plain(payload);
    let id = read.and_then(|()| {
        let missing = || ChatError::invalid("id", "id must name the request to cancel");
        pairing.request_id().ok_or_else(missing)
    });
    (pairing, id)
}

/// The chat body of a plain question.
pub fn question_body(text: &str, model: Option<&str>, ask: &AskSettings) -> Vec<u8> {
    let mut body = Map::new();
    if let Some(model) = model {
        body.insert("model".into(), model.into());
    }
    body.insert("messages".into(), json!([{"role": "user", "content": text}]));
    if let Some(max_tokens) = ask.max_tokens {
        body.insert("max_tokens".into(), max_tokens.into());
    }
    if let Some(temperature) = ask.temperature {
        body.insert("temperature".into(), temperature.into());
    }
    Value::Object(body).to_string().into_bytes()
}

/// How plain questions are answered; settable over MQTT.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AskSettings {
    /// At most so many tokens; `None` leaves it to the engine.
    pub max_tokens: Option<u32>,
    /// `None` leaves it to the model's default.
    pub temperature: Option<f32>,
}

fn read_object(payload: &[u8]) -> Result<Map<String, Value>, ChatError> {
    let value: Value = serde_json::from_slice(payload).map_err(|error| ChatError::Invalid {
        message: format!("payload is not JSON: {error}"),
        param: None,
    })?;
    match value {
        Value::Object(fields) => Ok(fields),
        other => Err(ChatError::Invalid {
            message: format!("payload must be a JSON object, not {}", kind(&other)),
            param: None,
        }),
    }
}

/// Takes the pairing's fields out, and says what is wrong with the first bad one.
fn take_pairing(fields: &mut Map<String, Value>) -> (Pairing, Result<(), ChatError>) {
    let mut pairing = Pairing { transaction: fields.remove("transaction"), ..Pairing::default() };
    let mut checked = Ok(());
    match fields.remove("reply_to") {
        None | Some(Value::Null) => {}
        Some(Value::String(topic)) => pairing.reply_to = Some(topic),
        Some(other) => checked = Err(wrong_type("reply_to", "a topic", &other)),
    }
    match fields.remove("id") {
        None | Some(Value::Null) => {}
        Some(id) => {
            let named = Pairing { id: Some(id.clone()), ..Pairing::default() }.request_id();
            if named.is_none() {
                checked = checked.and(Err(ChatError::invalid("id", ID_RULE)));
            }
            if named.is_some() || id.to_string().len() <= ID_ECHO_BYTES_MAX {
                pairing.id = Some(id);
            }
        }
    }
    let echo = pairing.transaction.as_ref().map_or(0, |value| value.to_string().len());
    if echo > TRANSACTION_BYTES_MAX {
        pairing.transaction = None;
        let message = format!("transaction has {echo} bytes, more than {TRANSACTION_BYTES_MAX}");
        checked = checked.and(Err(ChatError::invalid("transaction", message)));
    }
    (pairing, checked)
}

fn chat_command(mut fields: Map<String, Value>) -> Result<ChatCommand, ChatError> {
    let stream = match fields.remove("stream") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(stream)) => stream,
        Some(other) => return Err(wrong_type("stream", "true or false", &other)),
    };
    let deadline = fields.remove("deadline_ms").map(|value| deadline(&value)).transpose()?;
    let priority = fields.remove("priority").map(|value| priority(&value)).transpose()?;
    expand_prompt(&mut fields)?;
    // An option of streams; we send usage with every final.
    fields.remove("stream_options");
    Ok(ChatCommand {
        stream,
        deadline: deadline.flatten(),
        priority: priority.unwrap_or_default(),
        body: Value::Object(fields).to_string().into_bytes(),
    })
}

/// `prompt` is a shorthand for one message of the user.
fn expand_prompt(fields: &mut Map<String, Value>) -> Result<(), ChatError> {
    let Some(prompt) = fields.remove("prompt") else { return Ok(()) };
    let Value::String(text) = prompt else {
        return Err(wrong_type("prompt", "text", &prompt));
    };
    if fields.contains_key("messages") {
        return Err(ChatError::invalid("prompt", "prompt and messages exclude each other"));
    }
    if text.is_empty() {
        return Err(ChatError::invalid("prompt", "prompt must not be empty"));
    }
    fields.insert("messages".into(), json!([{"role": "user", "content": text}]));
    Ok(())
}

fn deadline(value: &Value) -> Result<Option<Duration>, ChatError> {
    if value.is_null() {
        return Ok(None);
    }
    // Home Assistant's templates write 60000.0 as easily as 60000.
    let ms = value.as_f64().filter(|ms| ms.is_finite() && *ms >= 1.0 && *ms <= DEADLINE_MS_MAX);
    let wrong =
        || ChatError::invalid("deadline_ms", "deadline_ms must be a number from 1 to 86400000");
    ms.map(|ms| Some(Duration::from_millis(ms as u64))).ok_or_else(wrong)
}

fn priority(value: &Value) -> Result<Priority, ChatError> {
    match value.as_str() {
        Some("low") => Ok(Priority::Low),
        Some("normal") => Ok(Priority::Normal),
        Some("high") => Ok(Priority::High),
        _ if value.is_null() => Ok(Priority::Normal),
        _ => {
            Err(ChatError::invalid("priority", "priority must be \"low\", \"normal\" or \"high\""))
        }
    }
}

fn wrong_type(field: &str, expected: &str, found: &Value) -> ChatError {
    ChatError::invalid(field, format!("{field} must be {expected}, not {}", kind(found)))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Names the parts every answer repeats.
#[derive(Clone, Debug, PartialEq)]
pub struct Echo {
    /// The id to echo.
    pub id: Value,
    /// The transaction to echo.
    pub transaction: Option<Value>,
}

#[derive(Serialize)]
struct Envelope<'a, T> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: &'a Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    transaction: Option<&'a Value>,
    #[serde(flatten)]
    rest: T,
}

#[derive(Serialize)]
struct Accepted {
    position: u32,
    predicted_ttft_ms: Option<u64>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    seq: u32,
    delta: &'a str,
}

#[derive(Serialize)]
struct FinalBody<T> {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunks: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    param: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    truncated: bool,
    data: T,
}

#[derive(Serialize)]
struct AnswerData<'a> {
    text: &'a str,
    tool_calls: Vec<Value>,
    finish_reason: &'static str,
    model: &'a str,
    usage: Value,
    timings: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    fusion: Option<Value>,
}

/// A whole answer, or as much of one as there is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// All text.
    pub text: String,
    /// All tool calls.
    pub tool_calls: Vec<ToolCall>,
    /// The model that answered.
    pub model: String,
    /// Chunks sent before; `None` if none were asked for.
    pub chunks: Option<u32>,
}

/// The request waits or runs.
pub fn accepted(echo: &Echo, position: u32, predicted_first_token: Option<Duration>) -> Vec<u8> {
    write(echo, "accepted", Accepted { position, predicted_ttft_ms: predicted_first_token.map(ms) })
}

/// A piece of text.
pub fn chunk(echo: &Echo, seq: u32, delta: &str) -> Vec<u8> {
    write(echo, "chunk", Chunk { seq, delta })
}

/// The end of an answer that went well. `truncated` leaves the text out: the packet would be too large.
pub fn final_answer(
    echo: &Echo,
    answer: &Answer,
    completion: &Completion,
    truncated: bool,
) -> Vec<u8> {
    let data = AnswerData {
        text: if truncated { "" } else { &answer.text },
        tool_calls: if truncated { Vec::new() } else { tool_calls(&answer.tool_calls) },
        finish_reason: finish_reason(completion.finish),
        model: &answer.model,
        usage: usage(completion),
        timings: timings(completion),
        fusion: completion.fusion.as_deref().and_then(fusion::report),
    };
    write(echo, "final", FinalBody { truncated, chunks: answer.chunks, ..ok_body(data) })
}

/// The end of a request that failed; `answer` holds what had been said until then.
pub fn final_error(echo: &Echo, error: &ChatError, answer: &Answer) -> Vec<u8> {
    let mut data = Map::new();
    if !answer.text.is_empty() {
        data.insert("text".into(), answer.text.as_str().into());
    }
    let param = match error {
        ChatError::Invalid { param, .. } => param.clone(),
        _ => None,
    };
    let body = FinalBody {
        status: "error",
        chunks: answer.chunks,
        code: Some(error.code()),
        error: Some(error.public_message()),
        param,
        retry_after_ms: error.retry_after().map(ms),
        truncated: false,
        data,
    };
    write(echo, "final", body)
}

/// What became of a cancel request: `cancelled`, `finished` or `unknown`.
pub fn final_cancel(echo: &Echo, result: &str) -> Vec<u8> {
    write(echo, "final", ok_body(json!({"result": result})))
}

/// The answer to `models`.
pub fn final_models(echo: &Echo, models: &[ModelCard]) -> Vec<u8> {
    write(echo, "final", ok_body(self::models(models)))
}

/// The answer to `status`: `state` as it is published.
pub fn final_status(echo: &Echo, state: &Map<String, Value>) -> Vec<u8> {
    write(echo, "final", ok_body(state))
}

fn ok_body<T>(data: T) -> FinalBody<T> {
    FinalBody {
        status: "ok",
        chunks: None,
        code: None,
        error: None,
        param: None,
        retry_after_ms: None,
        truncated: false,
        data,
    }
}

/// The models with what clients may know about them, the default one first.
pub fn models(models: &[ModelCard]) -> Value {
    let cards: Vec<Value> = models
        .iter()
        .enumerate()
        .map(|(i, card)| {
            json!({
                "name": card.name.as_str(),
                "default": i == 0,
                "loaded": true,
                "architecture": card.architecture,
                "parameters": card.parameters,
                "quantization": card.quantization,
                "file_bytes": card.file_bytes,
                "digest": card.digest,
                "context_tokens": card.context_tokens,
                "trained_context_tokens": card.trained_context_tokens,
            })
        })
        .collect();
    json!({ "models": cards })
}

/// What is published on `last` after a plain question: a summary short enough for a state, and the whole.
pub fn last(id: &str, answer: &Answer, outcome: Result<&Completion, &ChatError>) -> Vec<u8> {
    let value = match outcome {
        Ok(completion) => json!({
            "id": id,
            "status": "ok",
            "summary": summary(&answer.text),
            "text": answer.text,
            "model": answer.model,
            "finish_reason": finish_reason(completion.finish),
            "usage": usage(completion),
            "timings": timings(completion),
        }),
        Err(error) => json!({
            "id": id,
            "status": "error",
            "summary": summary(&error.public_message()),
            "text": answer.text,
            "code": error.code(),
            "error": error.public_message(),
            "retry_after_ms": error.retry_after().map(ms),
        }),
    };
    value.to_string().into_bytes()
}

/// A request's end, for automations: `done`, `error`, `refused` or `cancelled`.
pub fn completion_event(event_type: &str, id: &str, reason: &str) -> Vec<u8> {
    json!({"event_type": event_type, "id": id, "reason": reason}).to_string().into_bytes()
}

/// The first 250 characters on one line: Home Assistant's states end at 255.
fn summary(text: &str) -> String {
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
        if line.chars().count() > SUMMARY_CHARS_MAX {
            break;
        }
    }
    if line.chars().count() <= SUMMARY_CHARS_MAX {
        return line;
    }
    let mut cut: String = line.chars().take(SUMMARY_CHARS_MAX - 1).collect();
    cut.push('…');
    cut
}

/// The word for why an answer ended.
pub fn finish_reason(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::Deadline => "deadline",
        FinishReason::Length => "length",
        FinishReason::Stop => "stop",
        FinishReason::ToolCalls => "tool_calls",
    }
}

fn tool_calls(calls: &[ToolCall]) -> Vec<Value> {
    // OpenAI's shape, so that a client can send them back in its next request as they are.
    let call = |call: &ToolCall| {
        let arguments = Value::Object(call.arguments.clone()).to_string();
        let function = json!({"name": call.name, "arguments": arguments});
        json!({"id": call.id, "type": "function", "function": function})
    };
    calls.iter().map(call).collect()
}

fn usage(completion: &Completion) -> Value {
    let usage = completion.usage;
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens.saturating_add(usage.completion_tokens),
    })
}

fn timings(completion: &Completion) -> Value {
    let timings = completion.timings;
    let decode_s = timings.decode.as_secs_f64();
    let steps = completion.usage.completion_tokens.saturating_sub(1);
    let speed = (decode_s > 0.0 && steps > 0).then(|| f64::from(steps) / decode_s);
    json!({
        "queue_ms": ms(timings.queue),
        "prefill_ms": ms(timings.prefill),
        "decode_ms": ms(timings.decode),
        "decode_tokens_per_s": speed.map(|speed| (speed * 100.0).round() / 100.0),
    })
}

fn write<T: Serialize>(echo: &Echo, kind: &'static str, rest: T) -> Vec<u8> {
    let envelope = Envelope { kind, id: &echo.id, transaction: echo.transaction.as_ref(), rest };
    serde_json::to_vec(&envelope).expect("these shapes have text keys only")
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The earliest of the message's own expiry, the client's wish and the default.
pub fn earliest_deadline(
    received: Instant,
    expiry: Option<Duration>,
    wish: Option<Duration>,
    default: Duration,
) -> Instant {
    received + expiry.into_iter().chain(wish).fold(default, Duration::min)
}

const ID_RULE: &str = "id must be 1 to 64 of `A-Z a-z 0-9 . _ -`, or a whole number";
const ID_ECHO_BYTES_MAX: usize = 256;
const TRANSACTION_BYTES_MAX: usize = 1024;
const DEADLINE_MS_MAX: f64 = 86_400_000.0;
const SUMMARY_CHARS_MAX: usize = 250;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::{Timings, Usage};

    fn command(payload: &str) -> Result<ChatCommand, String> {
        read_chat(payload.as_bytes()).1.map_err(|error| error.to_string())
    }

    fn body(payload: &str) -> Value {
        let command = command(payload).expect("the payload is valid");
        serde_json::from_slice(&command.body).expect("a body is JSON")
    }

    fn echo() -> Echo {
        Echo { id: "a1".into(), transaction: None }
    }

    fn parsed(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes).expect("answers are JSON")
    }

    #[test]
    fn the_envelope_is_taken_off_the_body() {
        let payload = r#"{"id":"a1","transaction":[1],"reply_to":"t","deadline_ms":60000.0,
            "priority":"high","stream":true,"prompt":"Hello","max_tokens":5}"#;
        let (pairing, command) = read_chat(payload.as_bytes());
        let command = command.expect("the payload is valid");
        assert_eq!(pairing.id, Some("a1".into()));
        assert_eq!(pairing.transaction, Some(json!([1])));
        assert_eq!(pairing.reply_to.as_deref(), Some("t"));
        assert_eq!(command.deadline, Some(Duration::from_secs(60)));
        assert_eq!(command.priority, Priority::High);
        assert!(command.stream);
        let expected = json!({"max_tokens": 5, "messages": [{"role": "user", "content": "Hello"}]});
        assert_eq!(parsed(&command.body), expected);
    }

    #[test]
    fn a_chat_body_passes_as_it_is() {
        let payload = r#"{"model":"m","messages":[{"role":"user","content":"x"}],"top_p":0.5}"#;
        let expected = json!({
            "model": "m", "messages": [{"role": "user", "content": "x"}], "top_p": 0.5
        });
        assert_eq!(body(payload), expected);
    }

    #[test]
    fn refusals_name_the_field() {
        let cases = [
            ("nope", "payload is not JSON: expected ident at line 1 column 2"),
            ("[1]", "payload must be a JSON object, not an array"),
            ("\"x\"", "payload must be a JSON object, not text"),
            (r#"{"id":"a b"}"#, ID_RULE),
            (r#"{"id":1.5}"#, ID_RULE),
            (r#"{"id":[]}"#, ID_RULE),
            (r#"{"reply_to":7}"#, "reply_to must be a topic, not a number"),
            (r#"{"stream":"yes"}"#, "stream must be true or false, not text"),
            (r#"{"deadline_ms":0}"#, "deadline_ms must be a number from 1 to 86400000"),
            (r#"{"deadline_ms":"1"}"#, "deadline_ms must be a number from 1 to 86400000"),
            (r#"{"deadline_ms":1e300}"#, "deadline_ms must be a number from 1 to 86400000"),
            (r#"{"priority":"urgent"}"#, "priority must be \"low\", \"normal\" or \"high\""),
            (r#"{"prompt":[]}"#, "prompt must be text, not an array"),
            (r#"{"prompt":""}"#, "prompt must not be empty"),
            (r#"{"prompt":"x","messages":[]}"#, "prompt and messages exclude each other"),
        ];
        for (payload, expected) in cases {
            assert_eq!(command(payload).expect_err(payload), expected, "{payload}");
        }
    }

    #[test]
    fn a_refused_request_can_still_be_paired() {
        let (pairing, command) = read_chat(br#"{"id":7,"reply_to":"r","stream":1}"#);
        assert!(command.is_err());
        assert_eq!(pairing.id, Some(json!(7)));
        assert_eq!(pairing.request_id().map(|id| id.to_string()), Some("7".to_owned()));
        assert_eq!(pairing.reply_to.as_deref(), Some("r"));
        let long = format!(r#"{{"id":"{}"}}"#, "x".repeat(1000));
        assert_eq!(read_chat(long.as_bytes()).0.id, None);
        let large = format!(r#"{{"transaction":"{}"}}"#, "x".repeat(2000));
        let (pairing, refused) = read_chat(large.as_bytes());
        assert_eq!(pairing.transaction, None);
        assert!(refused.is_err());
    }

    #[test]
    fn nesting_beyond_reason_is_refused() {
        let deep = format!("{}{}", r#"{"a":"#.repeat(10_000), "}".repeat(10_000));
        assert!(command(&deep).expect_err("too deep").starts_with("payload is not JSON"));
    }

    #[test]
    fn cancel_needs_an_id() {
        assert_eq!(read_cancel(br#"{"id":"a1"}"#).1.map(|id| id.to_string()), Ok("a1".to_owned()));
        assert!(read_cancel(b"{}").1.is_err());
        assert!(read_cancel(b"").1.is_err());
        assert!(read_plain(b"").1.is_ok());
    }

    #[test]
    fn answers_have_the_documented_shape() {
        let accepted = accepted(&echo(), 2, Some(Duration::from_millis(4200)));
        let expected = r#"{"type":"accepted","id":"a1","position":2,"predicted_ttft_ms":4200}"#;
        assert_eq!(String::from_utf8_lossy(&accepted), expected);
        let chunk = chunk(&echo(), 0, "Yes");
        let expected = r#"{"type":"chunk","id":"a1","seq":0,"delta":"Yes"}"#;
        assert_eq!(String::from_utf8_lossy(&chunk), expected);
        let error = ChatError::QueueFull { retry_after: Duration::from_secs(8) };
        let refused = final_error(&echo(), &error, &Answer::default());
        let expected = concat!(
            r#"{"type":"final","id":"a1","status":"error","code":"queue_full","#,
            r#""error":"queue full","retry_after_ms":8000,"data":{}}"#
        );
        assert_eq!(String::from_utf8_lossy(&refused), expected);
    }

    #[test]
    fn a_final_is_whole() {
        let completion = Completion {
            finish: FinishReason::Stop,
            usage: Usage { prompt_tokens: 9, cached_tokens: 4, completion_tokens: 3 },
            timings: Timings {
                queue: Duration::from_millis(1),
                prefill: Duration::from_millis(20),
                decode: Duration::from_millis(100),
            },
            fusion: None,
        };
        let call = ToolCall {
            id: "call_0".into(),
            name: "light".into(),
            arguments: Map::from_iter([("on".to_owned(), Value::Bool(true))]),
        };
        let answer = Answer {
            text: "Yes".into(),
            tool_calls: vec![call],
            model: "nano".into(),
            chunks: Some(1),
        };
        let echo = Echo { id: json!(7), transaction: Some(json!({"t": 1})) };
        let expected = json!({
            "type": "final", "id": 7, "transaction": {"t": 1}, "status": "ok", "chunks": 1,
            "data": {
                "text": "Yes",
                "tool_calls": [{"id": "call_0", "type": "function",
                    "function": {"name": "light", "arguments": "{\"on\":true}"}}],
                "finish_reason": "stop", "model": "nano",
                "usage": {"prompt_tokens": 9, "cached_tokens": 4, "completion_tokens": 3,
                    "total_tokens": 12},
                "timings": {"queue_ms": 1, "prefill_ms": 20, "decode_ms": 100,
                    "decode_tokens_per_s": 20.0},
            },
        });
        assert_eq!(parsed(&final_answer(&echo, &answer, &completion, false)), expected);
        let truncated = parsed(&final_answer(&echo, &answer, &completion, true));
        assert_eq!(truncated["truncated"], json!(true));
        assert_eq!(truncated["data"]["text"], json!(""));
    }

    #[test]
    fn internal_errors_tell_nothing() {
        let error = ChatError::Internal("secret path".into());
        let text =
            String::from_utf8_lossy(&final_error(&echo(), &error, &Answer::default())).into_owned();
        assert!(!text.contains("secret"), "{text}");
    }

    #[test]
    fn summaries_fit_a_state() {
        assert_eq!(summary("one\n two "), "one two");
        let long = summary(&"ä ".repeat(4000));
        assert!(long.chars().count() <= 255 && long.ends_with('…'), "{long}");
        assert!(summary(&"x".repeat(9000)).chars().count() <= 255);
    }

    #[test]
    fn the_earliest_deadline_counts() {
        let now = Instant::now();
        let s = Duration::from_secs;
        assert_eq!(earliest_deadline(now, None, None, s(300)), now + s(300));
        assert_eq!(earliest_deadline(now, Some(s(9)), Some(s(10)), s(300)), now + s(9));
        assert_eq!(earliest_deadline(now, Some(s(900)), Some(s(10)), s(300)), now + s(10));
    }
}
