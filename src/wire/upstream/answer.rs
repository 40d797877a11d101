//! Pieces of other servers' answers.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::super::lenient::{Float, Int, List, Object, Raw};
use crate::chat::{FinishReason, Usage};

/// What one event, line or whole answer said.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// The model that says so.
    pub model: Option<String>,
    /// Text of the answer.
    pub text: String,
    /// There was text of reasoning, which is no part of the answer.
    pub reasoned: bool,
    /// Beginnings and continuations of tool calls.
    pub calls: Vec<CallPiece>,
    /// The end, and why.
    pub finish: Option<FinishReason>,
    /// Token counts, where the server tells them.
    pub usage: Option<Usage>,
    /// Time for the prompt, where the server tells it.
    pub prefill: Option<Duration>,
    /// Time for the answer's tokens, where the server tells it.
    pub decode: Option<Duration>,
    /// The server failed after it had begun.
    pub error: Option<UpstreamError>,
    /// Nothing comes after this.
    pub last: bool,
}

/// A part of a tool call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CallPiece {
    /// Which call, from 0.
    pub index: usize,
    /// Its id, once.
    pub id: Option<String>,
    /// Its name, once.
    pub name: Option<String>,
    /// More of the text of its arguments.
    pub arguments: String,
}

/// An error object inside an answer that began well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamError {
    /// Its code or type, if it has one.
    pub code: String,
}

/// The data of an event, or a whole answer, of OpenAI's dialect; `None` if it is not what that promises.
pub fn read_openai_piece(data: &[u8]) -> Option<Piece> {
    if data.trim_ascii() == b"[DONE]" {
        return Some(Piece { last: true, ..Piece::default() });
    }
    let Object(body) = serde_json::from_slice::<Object<OpenAiBody>>(data).ok()?;
    if body.choices.is_none() && body.error.is_none() && body.usage.is_none() {
        return None;
    }
    let mut piece = Piece {
        model: body.model,
        usage: body.usage.map(|Object(usage)| usage.counts()),
        error: body.error.map(|raw| openai_error(&raw)),
        ..Piece::default()
    };
    if let Some(Object(timings)) = body.timings {
        piece.prefill = timings.prompt_ms.and_then(milliseconds);
        piece.decode = timings.predicted_ms.and_then(milliseconds);
    }
    let choice = body.choices.and_then(|List(choices)| choices.into_iter().next());
    if let Some(Object(choice)) = choice {
        let Object(delta) = choice.delta.or(choice.message).unwrap_or(Object(Delta::default()));
        piece.text = delta.content.unwrap_or_default();
        piece.reasoned = [delta.reasoning_content, delta.reasoning]
            .iter()
            .any(|raw| raw.as_ref().is_some_and(says_something));
        let List(calls) = delta.tool_calls.unwrap_or(List(Vec::new()));
        piece.calls = calls
            .into_iter()
            .enumerate()
            .map(|(at, Object(call))| call.piece(at))
            .collect::<Option<_>>()?;
        // distributed-llama writes an empty reason into every piece but the last.
        piece.finish = choice.finish_reason.filter(|reason| !reason.is_empty()).map(|r| finish(&r));
    }
    Some(piece)
}

/// A line of Ollama's `/api/chat`, or the whole answer; `None` if it is not what that promises.
pub fn read_ollama_piece(line: &[u8]) -> Option<Piece> {
    let Object(body) = serde_json::from_slice::<Object<OllamaBody>>(line).ok()?;
    if body.message.is_none() && body.done.is_none() && body.error.is_none() {
        return None;
    }
    let mut piece = Piece {
        model: body.model,
        error: body.error.map(|_| UpstreamError { code: String::new() }),
        ..Piece::default()
    };
    if let Some(Object(message)) = body.message {
        piece.text = message.content.unwrap_or_default();
        piece.reasoned = message.thinking.is_some_and(|text| !text.is_empty());
        let List(calls) = message.tool_calls.unwrap_or(List(Vec::new()));
        piece.calls = calls
            .into_iter()
            .enumerate()
            .map(|(at, Object(call))| call.piece(at))
            .collect::<Option<_>>()?;
    }
    if body.done == Some(true) {
        piece.last = true;
        piece.finish = Some(finish(body.done_reason.as_deref().unwrap_or("stop")));
        let count = |int: Option<Int>| int.and_then(|Int(n)| u32::try_from(n).ok());
        if let Some(completion_tokens) = count(body.eval_count) {
            piece.usage = Some(Usage {
                prompt_tokens: count(body.prompt_eval_count).unwrap_or(0),
                cached_tokens: count(body.prompt_cached_count).unwrap_or(0),
                completion_tokens,
            });
        }
        let nanoseconds = |int: Option<Int>| int.and_then(|Int(ns)| u64::try_from(ns).ok());
        piece.prefill = nanoseconds(body.prompt_eval_duration).map(Duration::from_nanos);
        piece.decode = nanoseconds(body.eval_duration).map(Duration::from_nanos);
    }
    Some(piece)
}

/// Models that Ollama lists and runs somewhere else: named `…-cloud`, or with a remote host.
pub fn read_ollama_models(body: &[u8]) -> Option<Vec<(String, bool)>> {
    #[derive(Deserialize)]
    struct Listing {
        models: Option<List<Object<Entry>, 1024>>,
    }
    #[derive(Deserialize)]
    struct Entry {
        name: Option<String>,
        model: Option<String>,
        remote_host: Option<String>,
    }
    let Object(listing) = serde_json::from_slice::<Object<Listing>>(body).ok()?;
    let List(entries) = listing.models?;
    let read = |Object(entry): Object<Entry>| {
        let name = entry.name.or(entry.model)?;
        let remote = entry.remote_host.is_some_and(|host| !host.is_empty());
        Some((name, remote))
    };
    Some(entries.into_iter().filter_map(read).collect())
}

/// The likeliest first tokens of an OpenAI answer with their log-probabilities, and the prompt's tokens.
pub fn read_top_logprobs(body: &[u8]) -> Option<(Vec<(String, f64)>, u32)> {
    #[derive(Deserialize)]
    struct Whole {
        choices: Option<List<Object<Choice>, 4>>,
        usage: Option<Object<UsageBody>>,
    }
    #[derive(Deserialize)]
    struct Choice {
        logprobs: Option<Object<Logprobs>>,
    }
    #[derive(Deserialize)]
    struct Logprobs {
        content: Option<List<Object<Token>, 64>>,
    }
    #[derive(Deserialize)]
    struct Token {
        top_logprobs: Option<List<Object<Alternative>, 64>>,
    }
    #[derive(Deserialize)]
    struct Alternative {
        token: Option<String>,
        logprob: Option<Float>,
    }
    let Object(whole) = serde_json::from_slice::<Object<Whole>>(body).ok()?;
    let List(choices) = whole.choices?;
    let Object(choice) = choices.into_iter().next()?;
    let List(tokens) = choice.logprobs?.0.content?;
    let Object(first) = tokens.into_iter().next()?;
    let List(top) = first.top_logprobs?;
    let read = |Object(alternative): Object<Alternative>| {
        Some((alternative.token?, f64::from(alternative.logprob?.0)))
    };
    let prompt = whole.usage.map_or(0, |Object(usage)| usage.counts().prompt_tokens);
    Some((top.into_iter().filter_map(read).collect(), prompt))
}

#[derive(Deserialize)]
struct OpenAiBody {
    model: Option<String>,
    choices: Option<List<Object<ChoiceBody>, 16>>,
    usage: Option<Object<UsageBody>>,
    timings: Option<Object<TimingsBody>>,
    error: Option<Raw>,
}

#[derive(Deserialize)]
struct ChoiceBody {
    delta: Option<Object<Delta>>,
    message: Option<Object<Delta>>,
    finish_reason: Option<String>,
}

#[derive(Default, Deserialize)]
struct Delta {
    content: Option<String>,
    reasoning_content: Option<Raw>,
    reasoning: Option<Raw>,
    tool_calls: Option<List<Object<CallBody>, 64>>,
}

#[derive(Deserialize)]
struct CallBody {
    index: Option<Int>,
    id: Option<String>,
    function: Option<Object<FunctionBody>>,
}

#[derive(Deserialize)]
struct FunctionBody {
    name: Option<String>,
    arguments: Option<Raw>,
}

#[derive(Deserialize)]
struct UsageBody {
    prompt_tokens: Option<Int>,
    completion_tokens: Option<Int>,
    prompt_tokens_details: Option<Object<UsageDetails>>,
}

#[derive(Deserialize)]
struct UsageDetails {
    cached_tokens: Option<Int>,
}

#[derive(Deserialize)]
struct TimingsBody {
    prompt_ms: Option<Float>,
    predicted_ms: Option<Float>,
}

#[derive(Deserialize)]
struct OllamaBody {
    model: Option<String>,
    message: Option<Object<OllamaMessage>>,
    done: Option<bool>,
    done_reason: Option<String>,
    prompt_eval_count: Option<Int>,
    prompt_cached_count: Option<Int>,
    prompt_eval_duration: Option<Int>,
    eval_count: Option<Int>,
    eval_duration: Option<Int>,
    error: Option<Raw>,
}

#[derive(Deserialize)]
struct OllamaMessage {
    content: Option<String>,
    thinking: Option<String>,
    tool_calls: Option<List<Object<CallBody>, 64>>,
}

impl UsageBody {
    fn counts(self) -> Usage {
        let count = |int: Option<Int>| int.and_then(|Int(n)| u32::try_from(n).ok()).unwrap_or(0);
        let cached = self.prompt_tokens_details.and_then(|Object(details)| details.cached_tokens);
        Usage {
            prompt_tokens: count(self.prompt_tokens),
            cached_tokens: count(cached),
            completion_tokens: count(self.completion_tokens),
        }
    }
}

impl CallBody {
    /// `at` is its place in the list, for servers that number no calls.
    fn piece(self, at: usize) -> Option<CallPiece> {
        let index = match self.index {
            Some(Int(index)) => usize::try_from(index).ok().filter(|index| *index < 64)?,
            None => at,
        };
        let Object(function) =
            self.function.unwrap_or(Object(FunctionBody { name: None, arguments: None }));
        let arguments =
            match function.arguments.map(|raw| raw.value("arguments")).transpose().ok()? {
                None | Some(Value::Null) => String::new(),
                Some(Value::String(text)) => text,
                Some(object) => object.to_string(),
            };
        Some(CallPiece { index, id: self.id, name: function.name, arguments })
    }
}

fn openai_error(raw: &Raw) -> UpstreamError {
    let value = raw.value("error").unwrap_or(Value::Null);
    let word = |key: &str| value.get(key).and_then(Value::as_str);
    let code = word("code").or(word("type")).unwrap_or("");
    UpstreamError { code: code.chars().take(64).collect() }
}

fn says_something(raw: &Raw) -> bool {
    raw.value("reasoning")
        .is_ok_and(|value| !matches!(value.as_str(), Some("")) && !value.is_null())
}

fn finish(reason: &str) -> FinishReason {
    match reason {
        "length" | "max_tokens" | "limit" => FinishReason::Length,
        "tool_calls" | "function_call" => FinishReason::ToolCalls,
        _ => FinishReason::Stop,
    }
}

fn milliseconds(Float(ms): Float) -> Option<Duration> {
    Duration::try_from_secs_f32(ms / 1e3).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn openai(text: &str) -> Option<Piece> {
        read_openai_piece(text.as_bytes())
    }

    fn ollama(text: &str) -> Option<Piece> {
        read_ollama_piece(text.as_bytes())
    }

    #[test]
    fn chunks_of_real_servers() {
        let piece = openai(
            r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":"Hi"},"logprobs":null,"finish_reason":null}],"usage":null}"#,
        )
        .expect("scoutd's");
        assert_eq!((piece.text.as_str(), piece.model.as_deref()), ("Hi", Some("m")));
        assert_eq!((piece.finish, piece.usage), (None, None));
        let dllama = r#"{"choices":[{"delta":{"content":"x"},"finish_reason":"","index":0}],"created":1,"model":"Distributed Model"}"#;
        assert_eq!(openai(dllama).expect("dllama's").finish, None);
        let usage = r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2.0,"prompt_tokens_details":{"cached_tokens":3}},"timings":{"prompt_ms":12.5,"predicted_ms":40}}"#;
        let piece = openai(usage).expect("llama-server's");
        let counts = Usage { prompt_tokens: 7, cached_tokens: 3, completion_tokens: 2 };
        assert_eq!(
            (piece.usage, piece.prefill),
            (Some(counts), Some(Duration::from_micros(12_500)))
        );
        assert!(openai("[DONE]").expect("the end").last);
        let whole = r#"{"choices":[{"message":{"content":"all"},"finish_reason":"length"}]}"#;
        let piece = openai(whole).expect("unstreamed");
        assert_eq!((piece.text.as_str(), piece.finish), ("all", Some(FinishReason::Length)));
    }

    #[test]
    fn reasoning_and_errors() {
        for (delta, reasoned) in [
            (r#"{"reasoning_content":"hm"}"#, true),
            (r#"{"reasoning":"hm","content":null}"#, true),
            (r#"{"reasoning_content":"","content":""}"#, false),
            (r#"{"reasoning_content":null}"#, false),
        ] {
            let piece = openai(&format!("{{\"choices\":[{{\"delta\":{delta}}}]}}"));
            assert_eq!(piece.expect("valid").reasoned, reasoned, "{delta}");
        }
        let error = |text: &str| openai(text).and_then(|piece| piece.error).map(|e| e.code);
        assert_eq!(
            error(r#"{"error":{"code":"no_headroom","message":"x"}}"#).as_deref(),
            Some("no_headroom")
        );
        assert_eq!(
            error(r#"{"error":{"type":"server_error","code":500}}"#).as_deref(),
            Some("server_error")
        );
        assert_eq!(error(r#"{"error":"boom"}"#).as_deref(), Some(""));
        assert!(ollama(r#"{"error":"boom"}"#).expect("an error").error.is_some());
    }

    #[test]
    fn lines_of_ollama() {
        let piece = ollama(
            r#"{"model":"m","created_at":"t","message":{"role":"assistant","content":"a"},"done":false}"#,
        );
        assert_eq!(piece.expect("a piece").text, "a");
        let done = r#"{"model":"m","message":{"content":""},"done":true,"done_reason":"stop","prompt_eval_count":5,"eval_count":9,"prompt_eval_duration":1000000,"eval_duration":2000000}"#;
        let piece = ollama(done).expect("the end");
        assert!(piece.last && piece.finish == Some(FinishReason::Stop));
        assert_eq!(piece.usage.map(|usage| usage.completion_tokens), Some(9));
        assert_eq!(piece.decode, Some(Duration::from_millis(2)));
        let call = r#"{"message":{"content":"","tool_calls":[{"function":{"name":"f","arguments":{"a":1}}}]},"done":false}"#;
        let calls = ollama(call).expect("a call").calls;
        assert_eq!(
            (calls[0].name.as_deref(), calls[0].arguments.as_str()),
            (Some("f"), "{\"a\":1}")
        );
    }

    #[test]
    fn what_is_not_promised_is_not_read() {
        for bad in [
            "",
            "hello",
            "[]",
            "{}",
            "{\"choices\":5}",
            "<html>",
            "{\"choices\":[[]]}",
            "{\"id\":\"x\"}",
        ] {
            assert_eq!(openai(bad), None, "{bad}");
        }
        for bad in ["", "null", "{}", "{\"message\":\"x\"}", "{\"done\":\"yes\"}"] {
            assert_eq!(ollama(bad), None, "{bad}");
        }
        let many = format!("{{\"choices\":[{}]}}", "{},".repeat(1000) + "{}");
        assert_eq!(openai(&many), None, "a list without end");
    }

    #[test]
    fn first_tokens() {
        let body = r#"{"choices":[{"logprobs":{"content":[{"token":"Yes","logprob":-0.1,"top_logprobs":[{"token":"Yes","logprob":-0.1},{"token":" No","logprob":-2.5}]}]}}],"usage":{"prompt_tokens":30}}"#;
        let (top, prompt) = read_top_logprobs(body.as_bytes()).expect("logprobs");
        assert_eq!(prompt, 30);
        assert_eq!((top[1].0.as_str(), top.len()), (" No", 2));
        assert_eq!(read_top_logprobs(br#"{"choices":[{"logprobs":null}]}"#), None);
    }

    #[test]
    fn models_that_run_elsewhere() {
        let body = br#"{"models":[{"name":"a:latest","size":1},{"name":"b","remote_host":"https://x"},{"model":"c","remote_host":""}]}"#;
        let models = read_ollama_models(body).expect("a listing");
        let expected = [("a:latest", false), ("b", true), ("c", false)];
        assert_eq!(models, expected.map(|(name, remote)| (name.to_owned(), remote)));
    }
}
