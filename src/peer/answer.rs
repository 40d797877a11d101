//! An answer as it comes in: text, calls, counts, and whether it is one at all.

use std::time::{Duration, Instant};

use super::config::Kind;
use super::health::Rates;
use crate::chat::{
    ChatRequestParts, Completion, Fault, FaultReason, FinishReason, ModelName, Timings, ToolCall,
    Usage,
};
use crate::wire::upstream::{CallPiece, Piece, read_ollama_piece, read_openai_piece};

/// Bytes of an answer's text, and of its calls' arguments.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// Puts an answer together and judges it.
pub(super) struct Answer<'a> {
    kind: Kind,
    model: &'a str,
    takes_calls: bool,
    start: Instant,
    first: Option<Instant>,
    last: Instant,
    pieces: u32,
    text_bytes: usize,
    blank: bool,
    reasoned: bool,
    frames: u32,
    calls: Vec<CallPiece>,
    finish: Option<FinishReason>,
    complete: bool,
    usage: Option<Usage>,
    prefill: Option<Duration>,
    decode: Option<Duration>,
}

impl<'a> Answer<'a> {
    pub(super) fn new(
        kind: Kind,
        model: &'a str,
        parts: &ChatRequestParts,
        start: Instant,
    ) -> Answer<'a> {
        Answer {
            kind,
            model,
            takes_calls: !parts.tools.is_empty(),
            start,
            first: None,
            last: start,
            pieces: 0,
            text_bytes: 0,
            blank: true,
            reasoned: false,
            frames: 0,
            calls: Vec::new(),
            finish: None,
            complete: false,
            usage: None,
            prefill: None,
            decode: None,
        }
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether the member has begun to say something.
    pub(super) fn has_begun(&self) -> bool {
        self.first.is_some()
    }

    /// Whether any frame came.
    pub(super) fn has_frames(&self) -> bool {
        self.frames > 0
    }

    /// Whether nothing more comes.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Takes a frame; the text in it, if there is any.
    pub(super) fn take(&mut self, frame: &[u8]) -> Result<Option<String>, Fault> {
        let read = match self.kind {
            Kind::Ollama => read_ollama_piece(frame),
            _ => read_openai_piece(frame),
        };
        let piece = read.ok_or(Fault::new(FaultReason::BadJson))?;
        self.frames = self.frames.saturating_add(1);
        if let Some(error) = &piece.error {
            return Err(error_in_answer(&error.code));
        }
        self.check_model(&piece)?;
        self.note(&piece);
        let mut grown = piece.text.len();
        for call in piece.calls {
            grown += call.arguments.len() + 64;
            self.take_call(call);
        }
        self.text_bytes += grown;
        if self.text_bytes > ANSWER_BYTES_MAX {
            return Err(Fault::new(FaultReason::TooLarge));
        }
        self.blank &= piece.text.chars().all(char::is_whitespace);
        Ok((!piece.text.is_empty()).then_some(piece.text))
    }

    fn check_model(&self, piece: &Piece) -> Result<(), Fault> {
        let faithful = matches!(self.kind, Kind::Scoutd | Kind::Ollama);
        match &piece.model {
            Some(model)
                if faithful && !ModelName::new(model).matches(&ModelName::new(self.model)) =>
            {
                Err(Fault::new(FaultReason::WrongModel))
            }
            _ => Ok(()),
        }
    }

    fn note(&mut self, piece: &Piece) {
        let substance = !piece.text.is_empty() || piece.reasoned || !piece.calls.is_empty();
        if substance {
            self.last = Instant::now();
            self.first.get_or_insert(self.last);
            self.pieces = self.pieces.saturating_add(1);
        }
        self.reasoned |= piece.reasoned;
        self.finish = piece.finish.or(self.finish);
        self.usage = piece.usage.or(self.usage);
        self.prefill = piece.prefill.or(self.prefill);
        self.decode = piece.decode.or(self.decode);
        self.complete |= piece.last;
    }

    fn take_call(&mut self, piece: CallPiece) {
        match self.calls.iter_mut().find(|call| call.index == piece.index) {
            // Ollama sends whole calls, and numbers none of them.
            Some(_) if self.kind == Kind::Ollama => {
                let index = self.calls.len();
                self.calls.push(CallPiece { index, ..piece });
            }
            Some(call) => {
                call.arguments.push_str(&piece.arguments);
                call.id = call.id.take().or(piece.id);
                call.name = call.name.take().or(piece.name);
            }
            None => self.calls.push(piece),
        }
    }

    /// The end of the bytes: the whole answer, or why it is none.
    pub(super) fn finish(&mut self) -> Result<(Completion, Vec<ToolCall>), Fault> {
        if self.frames == 0 {
            return Err(Fault::new(FaultReason::NoText));
        }
        // Neither a reason nor the end mark: the connection ended in the middle.
        let Some(finish) = self.finish.or(self.complete.then_some(FinishReason::Stop)) else {
            return Err(Fault::new(FaultReason::Reset));
        };
        let calls = self.whole_calls()?;
        if self.blank && calls.is_empty() {
            return Err(Fault::new(self.why_empty()));
        }
        let finish = if calls.is_empty() { finish } else { FinishReason::ToolCalls };
        Ok((self.completion(finish), calls))
    }

    /// The deadline passed: what came is the answer, if anything came.
    pub(super) fn cut_by_deadline(&mut self) -> Result<(Completion, Vec<ToolCall>), Fault> {
        if self.blank {
            return Err(Fault::new(FaultReason::Deadline));
        }
        Ok((self.completion(FinishReason::Deadline), Vec::new()))
    }

    fn why_empty(&self) -> FaultReason {
        if !self.calls.is_empty() {
            FaultReason::ToolOnly
        } else if self.text_bytes > 0 {
            FaultReason::Whitespace
        } else if self.reasoned {
            FaultReason::ReasoningOnly
        } else {
            FaultReason::NoText
        }
    }

    /// Calls are handed on only where tools were offered; arguments are always an object.
    fn whole_calls(&self) -> Result<Vec<ToolCall>, Fault> {
        if !self.takes_calls {
            return Ok(Vec::new());
        }
        let call = |(at, piece): (usize, &CallPiece)| {
            let arguments = match piece.arguments.trim() {
                "" => serde_json::Map::new(),
                text => serde_json::from_str(text).ok()?,
            };
            let id = piece.id.clone().filter(|id| !id.is_empty() && id.len() <= 128);
            Some(ToolCall {
                id: id.unwrap_or_else(|| format!("call_{at}")),
                name: piece.name.clone().filter(|name| !name.is_empty())?,
                arguments,
            })
        };
        let whole: Option<Vec<_>> = self.calls.iter().enumerate().map(call).collect();
        whole.ok_or(Fault::new(FaultReason::BadJson))
    }

    fn completion(&self, finish: FinishReason) -> Completion {
        let first = self.first.unwrap_or(self.last).duration_since(self.start);
        let prefill = self.prefill.unwrap_or(first).min(first);
        Completion {
            finish,
            // Zeros say that the member did not tell; whoever counts estimates, and says so.
            usage: self.usage.unwrap_or_default(),
            timings: Timings {
                queue: first.saturating_sub(prefill),
                prefill,
                decode: self.last.saturating_duration_since(self.start).saturating_sub(first),
            },
            fusion: None,
        }
    }

    /// Adds what this answer tells about the member's speed. `prompt` is our own estimate of its tokens.
    pub(super) fn measure(&self, rates: &mut Rates, prompt: u32, max_tokens: u32) {
        let Some(first) = self.first else { return };
        let first_s = first.duration_since(self.start).as_secs_f64();
        let read = match self.usage {
            Some(usage) if usage.prompt_tokens > 0 => {
                usage.prompt_tokens.saturating_sub(usage.cached_tokens)
            }
            _ => prompt,
        };
        let prefill_s = self.prefill.map_or(first_s, |told| told.as_secs_f64()).min(first_s);
        // A handful of tokens measures the network.
        if read >= 8 && prefill_s > 1e-4 {
            rates.prefill.add(f64::from(read) / prefill_s);
        }
        if self.prefill.is_some() {
            rates.queue_s.add(first_s - prefill_s);
        }
        let told = self.usage.map(|usage| usage.completion_tokens).filter(|tokens| *tokens > 0);
        let tokens = told.unwrap_or(self.pieces).min(max_tokens);
        let decode_s = match self.decode {
            Some(told) => told.as_secs_f64(),
            None => self.last.duration_since(first).as_secs_f64(),
        };
        if tokens >= 4 && decode_s > 1e-4 {
            rates.decode.add(f64::from(tokens - 1) / decode_s);
        }
    }
}

/// An error object where an answer was promised.
fn error_in_answer(code: &str) -> Fault {
    match code {
        "no_headroom" => Fault::new(FaultReason::NoHeadroom),
        "queue_full" | "rate_limit_error" | "unavailable_error" | "draining" => {
            Fault::new(FaultReason::Busy)
        }
        "deadline" => Fault::new(FaultReason::Deadline),
        _ => Fault::explained(FaultReason::Http5xx(500), "an error inside a 200"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::{Input, Message, Origin, Role, Tool};

    fn parts() -> ChatRequestParts {
        let input = Input::Messages(vec![Message::text(Role::User, "hello")]);
        ChatRequestParts::new(Origin::Terminal, "test", input, Instant::now())
    }

    type Finished = Result<(Completion, Vec<ToolCall>), FaultReason>;

    fn read(kind: Kind, parts: &ChatRequestParts, frames: &[&str]) -> (String, Finished) {
        let mut answer = Answer::new(kind, "m", parts, Instant::now());
        let mut text = String::new();
        for frame in frames {
            match answer.take(frame.as_bytes()) {
                Ok(piece) => text.extend(piece),
                Err(fault) => return (text, Err(fault.reason)),
            }
        }
        (text, answer.finish().map_err(|fault| fault.reason))
    }

    fn chunk(delta: &str, finish: &str) -> String {
        format!(r#"{{"model":"m","choices":[{{"delta":{delta},"finish_reason":{finish}}}]}}"#)
    }

    #[test]
    fn a_whole_answer() {
        let frames = [
            chunk(r#"{"content":"turn "}"#, "null"),
            chunk(r#"{"content":"it on"}"#, "\"length\""),
            r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3}}"#.to_owned(),
            "[DONE]".to_owned(),
        ];
        let frames: Vec<&str> = frames.iter().map(String::as_str).collect();
        let (text, finished) = read(Kind::OpenAi, &parts(), &frames);
        let (completion, calls) = finished.expect("an answer");
        assert_eq!((text.as_str(), completion.finish), ("turn it on", FinishReason::Length));
        assert_eq!((completion.usage.completion_tokens, calls.len()), (3, 0));
    }

    #[test]
    fn answers_that_are_none() {
        let stop = chunk("{}", "\"stop\"");
        let wrong = r#"{"model":"other","choices":[{"delta":{"content":"x"}}]}"#;
        let huge = chunk(&format!(r#"{{"content":"{}"}}"#, "x".repeat(600_000)), "null");
        let cases: [(&[&str], FaultReason); 11] = [
            (&[], FaultReason::NoText),
            (&["[DONE]"], FaultReason::NoText),
            (&[&stop], FaultReason::NoText),
            (&[&chunk(r#"{"content":" \n"}"#, "\"stop\"")], FaultReason::Whitespace),
            (&[&chunk(r#"{"reasoning_content":"hm"}"#, "\"stop\"")], FaultReason::ReasoningOnly),
            (
                &[&chunk(
                    r#"{"tool_calls":[{"function":{"name":"f","arguments":"{}"}}]}"#,
                    "\"stop\"",
                )],
                FaultReason::ToolOnly,
            ),
            (&[&chunk(r#"{"content":"half"}"#, "null")], FaultReason::Reset),
            (&["{\"choices\":"], FaultReason::BadJson),
            (&[wrong], FaultReason::WrongModel),
            (&[r#"{"error":{"code":"no_headroom"}}"#], FaultReason::NoHeadroom),
            (&[&huge, &huge], FaultReason::TooLarge),
        ];
        for (frames, reason) in cases {
            assert_eq!(read(Kind::Scoutd, &parts(), frames).1.err(), Some(reason));
        }
        let (_, other) = read(Kind::OpenAi, &parts(), &[wrong, &stop]);
        assert!(other.is_ok(), "OpenAI's servers call models as they like");
    }

    #[test]
    fn calls_are_put_together_where_tools_were_offered() {
        let mut parts = parts();
        parts.tools = vec![Tool { name: "f".to_owned(), description: None, parameters: None }];
        let frames = [
            chunk(
                r#"{"tool_calls":[{"index":0,"id":"a","function":{"name":"f","arguments":""}}]}"#,
                "null",
            ),
            chunk(r#"{"tool_calls":[{"index":0,"function":{"arguments":"{\"x\""}}]}"#, "null"),
            chunk(
                r#"{"tool_calls":[{"index":0,"function":{"arguments":":1}"}}]}"#,
                "\"tool_calls\"",
            ),
        ];
        let frames: Vec<&str> = frames.iter().map(String::as_str).collect();
        let (_, finished) = read(Kind::OpenAi, &parts, &frames);
        let (completion, calls) = finished.expect("a call");
        assert_eq!(completion.finish, FinishReason::ToolCalls);
        assert_eq!((calls[0].id.as_str(), calls[0].arguments["x"].as_i64()), ("a", Some(1)));
        let broken =
            chunk(r#"{"tool_calls":[{"function":{"name":"f","arguments":"{"}}]}"#, "\"stop\"");
        assert_eq!(read(Kind::OpenAi, &parts, &[&broken]).1.err(), Some(FaultReason::BadJson));
        let line = r#"{"model":"m","message":{"content":"","tool_calls":[{"function":{"name":"f","arguments":{"x":1}}}]},"done":false}"#;
        let done =
            r#"{"model":"m:latest","message":{"content":""},"done":true,"done_reason":"stop"}"#;
        let (_, finished) = read(Kind::Ollama, &parts, &[line, line, done]);
        assert_eq!(finished.expect("calls").1.len(), 2);
    }

    #[test]
    fn what_came_by_the_deadline_is_an_answer() {
        let parts = parts();
        let mut answer = Answer::new(Kind::OpenAi, "m", &parts, Instant::now());
        assert_eq!(
            answer.cut_by_deadline().map_err(|f| f.reason).err(),
            Some(FaultReason::Deadline)
        );
        answer.take(chunk(r#"{"content":"half"}"#, "null").as_bytes()).expect("a piece");
        let (completion, _) = answer.cut_by_deadline().expect("half an answer");
        assert_eq!(completion.finish, FinishReason::Deadline);
    }
}
