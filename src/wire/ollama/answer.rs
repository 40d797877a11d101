//! Answers of `/api/chat` and `/api/generate`: one JSON object per line, or one object.

use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};

use super::super::answer::StreamWriter;
use super::super::fusion;
use super::super::json::{write, write_to};
use super::super::openai::token_logprob;
use super::super::time::rfc3339;
use super::context;
use crate::chat::{
    ChatError, ChatEvent, Completion, FinishReason, Message, Reply, Role, TokenLogprob, ToolCall,
};

/// A silent stream makes HTTP clients give up; an empty piece means nothing to Ollama's clients.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// What surrounds the text.
#[derive(Clone, Debug)]
pub enum Shape {
    /// `/api/chat`: a `message`.
    Chat,
    /// `/api/generate`: a `response`, and at the end the conversation as `context` unless it was raw.
    Generate(Option<Vec<Message>>),
}

/// Writes an answer line by line.
pub struct LineWriter {
    model: String,
    shape: Shape,
    logprobs: bool,
    calls: usize,
    /// The answer so far, where `context` needs it.
    text: String,
}

impl LineWriter {
    /// `model` as the client called it.
    pub fn new(model: String, shape: Shape, logprobs: bool) -> LineWriter {
        LineWriter { model, shape, logprobs, calls: 0, text: String::new() }
    }

    fn line(&self, piece: Piece<'_>, now: SystemTime) -> Map<String, Value> {
        let mut line = Map::new();
        line.insert("model".to_owned(), self.model.as_str().into());
        line.insert("created_at".to_owned(), rfc3339(now).into());
        match self.shape {
            Shape::Chat => {
                let mut message = json!({ "role": "assistant", "content": piece.text });
                if !piece.calls.is_empty() {
                    message["tool_calls"] = piece.calls.into();
                }
                line.insert("message".to_owned(), message);
            }
            Shape::Generate(_) => {
                line.insert("response".to_owned(), piece.text.into());
            }
        }
        line.insert("done".to_owned(), piece.done.is_some().into());
        if self.logprobs && !piece.logprobs.is_empty() {
            let list: Vec<Value> = piece.logprobs.iter().map(token_logprob).collect();
            line.insert("logprobs".to_owned(), list.into());
        }
        if let Some(done) = piece.done {
            self.finish(&mut line, done);
        }
        line
    }

    fn finish(&self, line: &mut Map<String, Value>, done: &Completion) {
        line.insert("done_reason".to_owned(), done_reason(done.finish).into());
        if let Shape::Generate(Some(turns)) = &self.shape {
            let mut turns = turns.clone();
            turns.push(Message::text(Role::Assistant, self.text.as_str()));
            line.insert("context".to_owned(), context::pack(&turns).into());
        }
        let timings = done.timings;
        let total = timings.queue + timings.prefill + timings.decode;
        for (name, duration) in [
            ("total_duration", total),
            ("load_duration", Duration::ZERO),
            ("prompt_eval_duration", timings.prefill),
            ("eval_duration", timings.decode),
        ] {
            let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
            line.insert(name.to_owned(), ns.into());
        }
        line.insert("prompt_eval_count".to_owned(), done.usage.prompt_tokens.into());
        line.insert("prompt_cached_count".to_owned(), done.usage.cached_tokens.into());
        line.insert("eval_count".to_owned(), done.usage.completion_tokens.into());
        if let Some(report) = done.fusion.as_deref().and_then(fusion::report) {
            line.insert("fusion".to_owned(), report);
        }
    }

    fn call(&mut self, call: &ToolCall) -> Value {
        let index = self.calls;
        self.calls += 1;
        let function = json!({ "index": index, "name": call.name, "arguments": call.arguments });
        json!({ "id": call.id, "function": function })
    }
}

#[derive(Default)]
struct Piece<'a> {
    text: &'a str,
    calls: Vec<Value>,
    logprobs: &'a [TokenLogprob],
    done: Option<&'a Completion>,
}

impl StreamWriter for LineWriter {
    fn event(&mut self, _index: usize, event: ChatEvent, now: SystemTime, out: &mut Vec<u8>) {
        let line = match &event {
            ChatEvent::Accepted { .. } | ChatEvent::Progress(_) | ChatEvent::Prompt(_) => return,
            ChatEvent::Delta { text, logprobs } => {
                if matches!(self.shape, Shape::Generate(Some(_))) {
                    self.text.push_str(text);
                }
                self.line(Piece { text, logprobs, ..Piece::default() }, now)
            }
            ChatEvent::ToolCall(call) => {
                let calls = vec![self.call(call)];
                self.line(Piece { calls, ..Piece::default() }, now)
            }
            ChatEvent::Done(done) => self.line(Piece { done: Some(done), ..Piece::default() }, now),
        };
        write_to(out, &line);
        out.push(b'\n');
    }

    fn end(&mut self, _out: &mut Vec<u8>) {}

    fn error(&mut self, error: &ChatError, out: &mut Vec<u8>) {
        out.extend_from_slice(&error_line(&error_text(error)));
    }

    fn heartbeat(&mut self, now: SystemTime, out: &mut Vec<u8>) {
        write_to(out, &self.line(Piece::default(), now));
        out.push(b'\n');
    }

    fn heartbeat_period(&self) -> Duration {
        HEARTBEAT
    }

    fn content_type(&self) -> &'static str {
        "application/x-ndjson"
    }
}

/// The whole answer as one object.
pub fn reply(mut writer: LineWriter, reply: &Reply, now: SystemTime) -> Vec<u8> {
    writer.text.push_str(&reply.text);
    let calls = reply.tool_calls.iter().map(|call| writer.call(call)).collect();
    let piece = Piece {
        text: &reply.text,
        calls,
        logprobs: &reply.logprobs,
        done: Some(&reply.completion),
    };
    write(&writer.line(piece, now))
}

/// The answer to a request that only loads or unloads.
pub fn loaded(writer: &LineWriter, unload: bool, now: SystemTime) -> Vec<u8> {
    let mut line = writer.line(Piece::default(), now);
    line.insert("done".to_owned(), true.into());
    line.insert("done_reason".to_owned(), if unload { "unload" } else { "load" }.into());
    write(&line)
}

/// `{"error": "…"}` and a line end.
pub fn error_line(text: &str) -> Vec<u8> {
    let mut line = write(&json!({ "error": text }));
    line.push(b'\n');
    line
}

/// An error in the words that Ollama's clients know.
pub fn error_text(error: &ChatError) -> String {
    match error {
        ChatError::UnknownModel(name) => {
            format!("model \"{name}\" not found, try pulling it first")
        }
        ChatError::QueueFull { .. } => {
            "server busy, please try again.  maximum pending requests exceeded".to_owned()
        }
        other => other.public_message(),
    }
}

fn done_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Deadline | FinishReason::Length => "length",
        FinishReason::Stop | FinishReason::ToolCalls => "stop",
    }
}
