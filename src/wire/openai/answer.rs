//! Answers of `/v1/chat/completions`, whole and as server-sent events.

use std::time::{Duration, SystemTime};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::super::answer::{StreamWriter, finite, ms};
use super::super::fusion;
use super::super::json::{write, write_to};
use super::ErrorBody;
use super::completion::{add_usage, summed};
use crate::chat::{
    Alternative, ChatError, ChatEvent, Completion, FinishReason, FusionProgress, Reply,
    TokenLogprob, ToolCall, Usage,
};

/// A comment that keeps proxies from closing a silent stream, and how often it comes.
pub(super) const SSE_HEARTBEAT: (&[u8], Duration) = (b": ping\n\n", Duration::from_secs(10));

/// The media type of server-sent events.
pub(super) const SSE_TYPE: &str = "text/event-stream";

/// What every object of one answer repeats.
#[derive(Clone, Debug)]
pub struct Head {
    /// As `chatcmpl-…`.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The model, as the client called it.
    pub model: String,
}

impl Head {
    pub(super) fn object(&self, kind: &str) -> Map<String, Value> {
        let mut object = Map::new();
        object.insert("id".to_owned(), self.id.as_str().into());
        object.insert("object".to_owned(), kind.into());
        object.insert("created".to_owned(), self.created.into());
        object.insert("model".to_owned(), self.model.as_str().into());
        object
    }
}

/// The answer to a request that does not stream; `replies` in the order of the choices.
pub fn chat_reply(head: &Head, replies: &[Reply], logprobs: bool) -> Vec<u8> {
    let choices: Vec<Value> = replies
        .iter()
        .enumerate()
        .map(|(index, reply)| {
            let content = match reply.text.as_str() {
                "" if !reply.tool_calls.is_empty() => Value::Null,
                text => text.into(),
            };
            let mut message = json!({ "role": "assistant", "content": content });
            if !reply.tool_calls.is_empty() {
                let calls: Vec<Value> = reply.tool_calls.iter().map(tool_call).collect();
                message["tool_calls"] = calls.into();
            }
            json!({
                "index": index,
                "message": message,
                "logprobs": logprobs.then(|| token_list(&reply.logprobs)),
                "finish_reason": finish(reply.completion.finish),
            })
        })
        .collect();
    let mut answer = head.object("chat.completion");
    answer.insert("choices".to_owned(), choices.into());
    answer.insert("usage".to_owned(), usage(summed_once(replies)));
    if let [reply] = replies {
        answer.insert("timings".to_owned(), timings(&reply.completion));
        insert_fusion(&mut answer, &reply.completion);
    }
    write(&answer)
}

/// Where the answer came from, if it is a fusion of several and the client wants to know.
fn insert_fusion(object: &mut Map<String, Value>, completion: &Completion) {
    if let Some(report) = completion.fusion.as_deref().and_then(fusion::report) {
        object.insert("fusion".to_owned(), report);
    }
}

/// Choices of one chat share their prompt, which is counted once.
fn summed_once(replies: &[Reply]) -> Usage {
    let sum = summed(replies);
    match replies.first() {
        Some(first) => Usage {
            prompt_tokens: first.completion.usage.prompt_tokens,
            cached_tokens: first.completion.usage.cached_tokens,
            ..sum
        },
        None => sum,
    }
}

/// Writes a chat answer as server-sent events.
pub struct ChatWriter {
    head: Head,
    include_usage: bool,
    logprobs: bool,
    events: bool,
    choices: Vec<Choice>,
    usage: Usage,
    prompt: Option<Usage>,
}

#[derive(Clone, Default)]
struct Choice {
    role_sent: bool,
    calls: usize,
}

impl ChatWriter {
    /// A writer for `choices` interleaved answers.
    pub fn new(head: Head, choices: usize, logprobs: bool, include_usage: bool) -> ChatWriter {
        ChatWriter {
            head,
            include_usage,
            logprobs,
            events: false,
            choices: vec![Choice::default(); choices],
            usage: Usage::default(),
            prompt: None,
        }
    }

    /// With `events`, the progress of a fusion comes as named events instead of comments.
    pub fn with_events(mut self, events: bool) -> ChatWriter {
        self.events = events;
        self
    }

    /// Clients that know nothing of fusions skip comments; many stumble over named events.
    fn progress(&self, progress: &FusionProgress, out: &mut Vec<u8>) {
        out.extend_from_slice(if self.events { b"event: fusion\ndata: " } else { b": fusion " });
        write_to(out, &fusion::progress(progress));
        out.extend_from_slice(b"\n\n");
    }

    fn chunk(
        &mut self,
        index: usize,
        mut delta: Map<String, Value>,
        rest: Rest,
        out: &mut Vec<u8>,
    ) {
        if !std::mem::replace(&mut self.choices[index].role_sent, true) {
            let said = delta.shift_remove("content").unwrap_or(Value::Null);
            delta.shift_insert(0, "role".to_owned(), "assistant".into());
            delta.shift_insert(1, "content".to_owned(), said);
        }
        let mut chunk = self.head.object("chat.completion.chunk");
        let choice = json!({
            "index": index,
            "delta": delta,
            "logprobs": rest.logprobs,
            "finish_reason": rest.done.map(|done| finish(done.finish)),
        });
        chunk.insert("choices".to_owned(), Value::Array(vec![choice]));
        if self.include_usage {
            chunk.insert("usage".to_owned(), Value::Null);
        }
        if let Some(done) = rest.done {
            chunk.insert("timings".to_owned(), timings(done));
            insert_fusion(&mut chunk, done);
        }
        sse(out, &chunk);
    }
}

#[derive(Default)]
struct Rest<'a> {
    logprobs: Option<Value>,
    done: Option<&'a Completion>,
}

impl StreamWriter for ChatWriter {
    fn event(&mut self, index: usize, event: ChatEvent, _now: SystemTime, out: &mut Vec<u8>) {
        let mut delta = Map::new();
        let mut rest = Rest::default();
        match &event {
            ChatEvent::Accepted { .. } | ChatEvent::Prompt(_) => return,
            ChatEvent::Progress(progress) => return self.progress(progress, out),
            ChatEvent::Delta { text, logprobs } => {
                delta.insert("content".to_owned(), text.as_str().into());
                rest.logprobs = self.logprobs.then(|| token_list(logprobs));
            }
            ChatEvent::ToolCall(call) => {
                let mut call = tool_call(call);
                call["index"] = self.choices[index].calls.into();
                self.choices[index].calls += 1;
                delta.insert("tool_calls".to_owned(), Value::Array(vec![call]));
            }
            ChatEvent::Done(completion) => {
                self.usage = add_usage(self.usage, completion.usage);
                self.prompt.get_or_insert(completion.usage);
                rest.done = Some(completion);
            }
        }
        self.chunk(index, delta, rest, out);
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        if self.include_usage {
            let prompt = self.prompt.unwrap_or_default();
            let total = Usage { completion_tokens: self.usage.completion_tokens, ..prompt };
            let mut chunk = self.head.object("chat.completion.chunk");
            chunk.insert("choices".to_owned(), Value::Array(Vec::new()));
            chunk.insert("usage".to_owned(), usage(total));
            sse(out, &chunk);
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn error(&mut self, error: &ChatError, out: &mut Vec<u8>) {
        out.extend_from_slice(b"data: ");
        write_to(out, &ErrorBody::from(error).json());
        out.extend_from_slice(b"\n\n");
    }

    fn heartbeat(&mut self, _now: SystemTime, out: &mut Vec<u8>) {
        out.extend_from_slice(SSE_HEARTBEAT.0);
    }

    fn heartbeat_period(&self) -> Duration {
        SSE_HEARTBEAT.1
    }

    fn content_type(&self) -> &'static str {
        SSE_TYPE
    }
}

/// Appends one event.
pub(super) fn sse(out: &mut Vec<u8>, value: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    write_to(out, value);
    out.extend_from_slice(b"\n\n");
}

/// The word for why an answer ended. A deadline looks like any other limit here.
pub(super) fn finish(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Deadline | FinishReason::Length => "length",
        FinishReason::Stop => "stop",
        FinishReason::ToolCalls => "tool_calls",
    }
}

/// Token counts.
pub fn usage(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens.saturating_add(usage.completion_tokens),
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
    })
}

/// llama-server's `timings`; `prompt_n` counts what was really evaluated.
pub fn timings(completion: &Completion) -> Value {
    let Completion { usage, timings, .. } = completion;
    let prompt_n = usage.prompt_tokens.saturating_sub(usage.cached_tokens);
    let (prompt_ms, predicted_ms) = (ms(timings.prefill), ms(timings.decode));
    let per_token = |ms: f64, n: u32| if n == 0 { 0.0 } else { ms / f64::from(n) };
    let per_second = |ms: f64, n: u32| if ms > 0.0 { f64::from(n) * 1e3 / ms } else { 0.0 };
    json!({
        "cache_n": usage.cached_tokens,
        "prompt_n": prompt_n,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": per_token(prompt_ms, prompt_n),
        "prompt_per_second": per_second(prompt_ms, prompt_n),
        "predicted_n": usage.completion_tokens,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": per_token(predicted_ms, usage.completion_tokens),
        "predicted_per_second": per_second(predicted_ms, usage.completion_tokens),
    })
}

/// A call; arguments are a text, never an empty one.
fn tool_call(call: &ToolCall) -> Value {
    let arguments = String::from_utf8(write(&call.arguments)).expect("JSON is UTF-8");
    json!({
        "id": call.id,
        "type": "function",
        "function": { "name": call.name, "arguments": arguments },
    })
}

fn token_list(tokens: &[TokenLogprob]) -> Value {
    let content: Vec<Value> = tokens.iter().map(token_logprob).collect();
    json!({ "content": content })
}

/// A token with its alternatives, as both dialects write it.
pub(in crate::wire) fn token_logprob(token: &TokenLogprob) -> Value {
    let top: Vec<Value> = token
        .top
        .iter()
        .map(|Alternative { bytes, logprob, .. }| {
            json!({ "token": lossy(bytes), "logprob": finite(*logprob), "bytes": bytes })
        })
        .collect();
    json!({
        "token": lossy(&token.bytes),
        "logprob": token.logprob.map(finite),
        "bytes": token.bytes,
        "top_logprobs": top,
    })
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
