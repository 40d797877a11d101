//! `/v1/completions`: plain continuation, and scoring of given texts.

use std::fmt;
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Unexpected, Visitor};
use serde_json::{Map, Value, json};

use super::super::answer::{Caller, StreamWriter, finite};
use super::super::json::{parse, write, write_to};
use super::super::lenient::{
    Float, Int, LogitBias, Object, Presence, Texts, ranged, read_list, wrong_type,
};
use super::super::message;
use super::answer::{Head, SSE_HEARTBEAT, SSE_TYPE, finish, sse, timings, usage};
use super::chat::{Sampling, StreamOptions, choices, max_tokens, sampling, stops};
use super::{ErrorBody, PROMPTS_MAX};
use crate::chat::{
    ChatError, ChatEvent, ChatRequestParts, Completion, Input, Limits, ModelName, Reply,
    TokenLogprob, Usage,
};
use crate::units::TokenId;

/// OpenAI's default of `max_tokens` here.
const MAX_TOKENS_DEFAULT: u32 = 16;

/// The most alternatives per token here.
const LOGPROBS_MAX: u8 = 5;

/// A request for completions as the client wrote it.
#[derive(Debug, Deserialize)]
pub struct CompletionBody {
    model: Option<String>,
    prompt: Option<Prompts>,
    suffix: Option<Presence>,
    echo: Option<bool>,
    logprobs: Option<Int>,
    max_tokens: Option<Int>,
    n: Option<Int>,
    best_of: Option<Int>,
    stream: Option<bool>,
    stream_options: Option<Object<StreamOptions>>,
    stop: Option<Texts<{ Limits::STOPS_MAX }>>,
    temperature: Option<Float>,
    top_p: Option<Float>,
    top_k: Option<Int>,
    min_p: Option<Float>,
    repeat_penalty: Option<Float>,
    repeat_last_n: Option<Int>,
    presence_penalty: Option<Float>,
    frequency_penalty: Option<Float>,
    seed: Option<Int>,
    logit_bias: Option<LogitBias>,
}

/// One or many prompts, as text or as tokens.
#[derive(Debug, PartialEq)]
enum Prompts {
    Texts(Vec<String>),
    Tokens(Vec<Vec<TokenId>>),
}

/// What of the prompt an answer repeats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Echo {
    /// Nothing.
    No,
    /// This text.
    Text(String),
    /// The text of the tokens, which the engine tells.
    Tokens,
}

impl CompletionBody {
    /// Reads a body.
    ///
    /// # Errors
    /// `Invalid`, naming the field.
    pub fn parse(body: &[u8]) -> Result<CompletionBody, ChatError> {
        parse(body).map(|Object(body)| body)
    }

    /// Whether the answer is to come piece by piece.
    pub fn stream(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Whether a stream ends with the token counts.
    pub fn include_usage(&self) -> bool {
        self.stream_options
            .as_ref()
            .and_then(|Object(options)| options.include_usage)
            .unwrap_or(false)
    }

    /// Whether log-probabilities are wanted.
    pub fn logprobs(&self) -> bool {
        self.logprobs.is_some()
    }

    /// The model's name, not yet checked.
    pub fn model(&self) -> ModelName {
        ModelName::new(self.model.as_deref().unwrap_or(""))
    }

    /// One request per choice, in the order of their indices, and what each repeats of its prompt.
    ///
    /// # Errors
    /// `Invalid` naming the field, or `NotSupported`.
    pub fn into_requests(
        self,
        caller: &Caller,
    ) -> Result<Vec<(ChatRequestParts, Echo)>, ChatError> {
        let n = self.checked_choices()?;
        let echo = self.echo.unwrap_or(false);
        let logprobs = self.logprobs_wanted()?;
        let max_tokens = match self.max_tokens {
            None => Some(MAX_TOKENS_DEFAULT),
            given => max_tokens(("max_tokens", given), ("max_tokens", None))?,
        };
        let sampling = sampling(Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
            logit_bias: self.logit_bias,
        })?;
        let stop = stops(self.stop);
        let model = message::model(self.model)?;
        let inputs = self.prompt.unwrap_or(Prompts::Texts(Vec::new())).into_inputs();
        if inputs.is_empty() {
            return Err(ChatError::invalid("prompt", "prompt must not be empty"));
        }
        let mut requests = Vec::with_capacity(inputs.len() * n);
        for (input, repeated) in inputs {
            for choice in 0..n {
                let mut parts = caller.parts(input.clone());
                parts.model = model.clone();
                parts.stop = stop.clone();
                parts.max_tokens = max_tokens;
                parts.sampling = sampling.clone();
                parts.sampling.seed = sampling.seed.map(|seed| seed.wrapping_add(choice as u64));
                let from_tokens = repeated == Echo::Tokens;
                parts.logprobs = logprobs.or((echo && from_tokens).then_some(0));
                parts.echo = echo && parts.logprobs.is_some();
                requests.push((parts, if echo { repeated.clone() } else { Echo::No }));
            }
        }
        Ok(requests)
    }

    fn checked_choices(&self) -> Result<usize, ChatError> {
        if self.suffix == Some(Presence::Something) {
            return Err(ChatError::NotSupported("suffix is not supported".to_owned()));
        }
        let n = choices(self.n)?;
        match self.best_of {
            None => Ok(n),
            Some(Int(best)) if best == n as i128 => Ok(n),
            Some(_) => Err(ChatError::NotSupported("best_of is not supported".to_owned())),
        }
    }

    fn logprobs_wanted(&self) -> Result<Option<u8>, ChatError> {
        let message = || {
            let message = format!("logprobs must be between 0 and {LOGPROBS_MAX}");
            ChatError::invalid("logprobs", message)
        };
        match ranged::<u8>("logprobs", self.logprobs).map_err(|_| message())? {
            Some(count) if count > LOGPROBS_MAX => Err(message()),
            count => Ok(count),
        }
    }
}

impl Prompts {
    fn into_inputs(self) -> Vec<(Input, Echo)> {
        match self {
            Prompts::Texts(texts) => texts
                .into_iter()
                .map(|text| (Input::Text(text.clone()), Echo::Text(text)))
                .collect(),
            Prompts::Tokens(lists) => {
                lists.into_iter().map(|tokens| (Input::Tokens(tokens), Echo::Tokens)).collect()
            }
        }
    }
}

/// Token ids, refused unless they are whole numbers from 0.
#[derive(Debug)]
struct Id(TokenId);

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Id, D::Error> {
        let Int(value) = Int::deserialize(deserializer)?;
        match u32::try_from(value) {
            Ok(id) => Ok(Id(TokenId(id))),
            Err(_) => Err(D::Error::custom("token ids must be between 0 and 4294967295")),
        }
    }
}

/// An entry of a list of prompts: all of one kind, which the first one decides.
enum Entry {
    Text(String),
    Id(TokenId),
    Ids(Vec<TokenId>),
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entry, D::Error> {
        struct EntryVisitor;
        impl<'de> Visitor<'de> for EntryVisitor {
            type Value = Entry;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Entry, E> {
                Ok(Entry::Text(text.to_owned()))
            }
            fn visit_u64<E: Error>(self, value: u64) -> Result<Entry, E> {
                let id = u32::try_from(value)
                    .map_err(|_| wrong_type(Unexpected::Unsigned(value), "a token id"))?;
                Ok(Entry::Id(TokenId(id)))
            }
            fn visit_f64<E: Error>(self, value: f64) -> Result<Entry, E> {
                if value >= 0.0 && value < f64::from(u32::MAX) {
                    return Ok(Entry::Id(TokenId(value as u32)));
                }
                Err(wrong_type(Unexpected::Float(value), "a token id"))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Entry, A::Error> {
                let mut ids = Vec::new();
                while let Some(Id(id)) = seq.next_element()? {
                    ids.push(id);
                }
                Ok(Entry::Ids(ids))
            }
        }
        deserializer.deserialize_any(EntryVisitor)
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Prompts, D::Error> {
        struct PromptsVisitor;
        impl<'de> Visitor<'de> for PromptsVisitor {
            type Value = Prompts;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, strings, token ids or lists of token ids")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Prompts, E> {
                Ok(Prompts::Texts(vec![text.to_owned()]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompts, A::Error> {
                match seq.next_element::<Entry>()? {
                    None => Ok(Prompts::Texts(Vec::new())),
                    Some(Entry::Text(first)) => {
                        Ok(Prompts::Texts(read_list(vec![first], &mut seq, PROMPTS_MAX)?))
                    }
                    Some(Entry::Id(first)) => {
                        let mut ids = vec![first];
                        while let Some(Id(id)) = seq.next_element()? {
                            ids.push(id);
                        }
                        Ok(Prompts::Tokens(vec![ids]))
                    }
                    Some(Entry::Ids(first)) => Ok(Prompts::Tokens(id_lists(first, &mut seq)?)),
                }
            }
        }
        deserializer.deserialize_any(PromptsVisitor)
    }
}

fn id_lists<'de, A: SeqAccess<'de>>(
    first: Vec<TokenId>,
    seq: &mut A,
) -> Result<Vec<Vec<TokenId>>, A::Error> {
    let entries = read_list(vec![Entry::Ids(first)], seq, PROMPTS_MAX)?;
    let ids = entries.into_iter().map(|entry| match entry {
        Entry::Ids(ids) => Ok(ids),
        _ => Err(A::Error::custom("prompts of one request must be of one kind")),
    });
    ids.collect()
}

/// The answer to a request that does not stream; `replies` in the order of the choices.
pub fn completion_reply(
    head: &Head,
    replies: &[Reply],
    echoes: &[Echo],
    logprobs: bool,
) -> Vec<u8> {
    let choices: Vec<Value> = replies
        .iter()
        .zip(echoes)
        .enumerate()
        .map(|(index, (reply, echo))| {
            let mut text = echoed_text(echo, &reply.prompt);
            text.push_str(&reply.text);
            let scored = logprobs.then(|| {
                let mut table = LogprobTable::default();
                if *echo != Echo::No {
                    table.add_all(&reply.prompt);
                }
                table.add_all(&reply.logprobs);
                table.finish()
            });
            json!({
                "text": text,
                "index": index,
                "logprobs": scored,
                "finish_reason": finish(reply.completion.finish),
            })
        })
        .collect();
    let mut answer = head.object("text_completion");
    answer.insert("choices".to_owned(), choices.into());
    answer.insert("usage".to_owned(), usage(summed(replies)));
    if let [reply] = replies {
        answer.insert("timings".to_owned(), timings(&reply.completion));
    }
    write(&answer)
}

/// The sum over all choices.
pub(super) fn summed(replies: &[Reply]) -> Usage {
    replies.iter().fold(Usage::default(), |sum, reply| add_usage(sum, reply.completion.usage))
}

pub(super) fn add_usage(sum: Usage, more: Usage) -> Usage {
    Usage {
        prompt_tokens: sum.prompt_tokens.saturating_add(more.prompt_tokens),
        cached_tokens: sum.cached_tokens.saturating_add(more.cached_tokens),
        completion_tokens: sum.completion_tokens.saturating_add(more.completion_tokens),
    }
}

/// Writes completions as server-sent events.
pub struct CompletionWriter {
    head: Head,
    include_usage: bool,
    logprobs: bool,
    choices: Vec<Choice>,
    usage: Usage,
}

struct Choice {
    echo: Echo,
    begun: bool,
    text_offset: usize,
}

impl CompletionWriter {
    /// A writer for one choice per entry of `echoes`.
    pub fn new(head: Head, echoes: Vec<Echo>, logprobs: bool, include_usage: bool) -> Self {
        let choices =
            echoes.into_iter().map(|echo| Choice { echo, begun: false, text_offset: 0 }).collect();
        CompletionWriter { head, include_usage, logprobs, choices, usage: Usage::default() }
    }

    fn chunk(&self, index: usize, piece: Piece, out: &mut Vec<u8>) {
        let mut chunk = self.head.object("text_completion");
        let choice = json!({
            "text": piece.text,
            "index": index,
            "logprobs": piece.logprobs,
            "finish_reason": piece.done.map(|done| finish(done.finish)),
        });
        chunk.insert("choices".to_owned(), Value::Array(vec![choice]));
        if self.include_usage {
            chunk.insert("usage".to_owned(), Value::Null);
        }
        if let Some(done) = piece.done {
            chunk.insert("timings".to_owned(), timings(done));
        }
        sse(out, &chunk);
    }

    /// Repeats a text prompt before anything else, as one piece.
    fn begin(&mut self, index: usize, out: &mut Vec<u8>) {
        let choice = &mut self.choices[index];
        if std::mem::replace(&mut choice.begun, true) {
            return;
        }
        if let Echo::Text(text) = &choice.echo
            && !self.logprobs
            && !text.is_empty()
        {
            let text = text.clone();
            choice.text_offset += text.chars().count();
            self.chunk(index, Piece { text, ..Piece::default() }, out);
        }
    }

    fn scored(&mut self, index: usize, tokens: &[TokenLogprob]) -> Option<Value> {
        if !self.logprobs {
            return None;
        }
        let mut table =
            LogprobTable { offset: self.choices[index].text_offset, ..LogprobTable::default() };
        table.add_all(tokens);
        self.choices[index].text_offset = table.offset;
        Some(table.finish())
    }
}

#[derive(Default)]
struct Piece<'a> {
    text: String,
    logprobs: Option<Value>,
    done: Option<&'a Completion>,
}

impl StreamWriter for CompletionWriter {
    fn event(&mut self, index: usize, event: ChatEvent, _now: SystemTime, out: &mut Vec<u8>) {
        match event {
            ChatEvent::Accepted { .. } | ChatEvent::Progress(_) | ChatEvent::ToolCall(_) => {}
            ChatEvent::Prompt(tokens) => {
                if self.choices[index].echo == Echo::No {
                    return;
                }
                self.choices[index].begun = true;
                let text = echoed_text(&self.choices[index].echo, &tokens);
                let logprobs = self.scored(index, &tokens);
                self.chunk(index, Piece { text, logprobs, done: None }, out);
            }
            ChatEvent::Delta { text, logprobs } => {
                self.begin(index, out);
                let logprobs = self.scored(index, &logprobs);
                self.chunk(index, Piece { text, logprobs, done: None }, out);
            }
            ChatEvent::Done(completion) => {
                self.begin(index, out);
                self.usage = add_usage(self.usage, completion.usage);
                self.chunk(index, Piece { done: Some(&completion), ..Piece::default() }, out);
            }
        }
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        if self.include_usage {
            let mut chunk = self.head.object("text_completion");
            chunk.insert("choices".to_owned(), Value::Array(Vec::new()));
            chunk.insert("usage".to_owned(), usage(self.usage));
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

/// The text a prompt is repeated as. Token prompts are decoded whole, so that characters cut in two by
/// tokens come out right.
fn echoed_text(echo: &Echo, prompt: &[TokenLogprob]) -> String {
    match echo {
        Echo::No => String::new(),
        Echo::Text(text) => text.clone(),
        Echo::Tokens => {
            let bytes: Vec<u8> =
                prompt.iter().flat_map(|token| token.bytes.iter().copied()).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        }
    }
}

/// The columns of the older API's `logprobs`.
#[derive(Default)]
struct LogprobTable {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
    /// Characters before the next token.
    offset: usize,
}

impl LogprobTable {
    fn add_all(&mut self, tokens: &[TokenLogprob]) {
        for token in tokens {
            self.add(token);
        }
    }

    fn add(&mut self, token: &TokenLogprob) {
        let text = piece_text(&token.bytes);
        self.text_offset.push(self.offset);
        self.offset += String::from_utf8_lossy(&token.bytes).chars().count();
        self.token_logprobs.push(token.logprob.map(finite));
        self.top_logprobs.push(token.logprob.map(|logprob| {
            let mut top = Map::new();
            for alternative in &token.top {
                // Two tokens may have one text: the likelier stays.
                top.entry(piece_text(&alternative.bytes))
                    .or_insert_with(|| finite(alternative.logprob).into());
            }
            // Clients ask whether the chosen token is the likeliest by comparing floats.
            top.insert(text.clone(), finite(logprob).into());
            top
        }));
        self.tokens.push(text);
    }

    fn finish(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }
}

/// A token's text, or its bytes spelled out as OpenAI does.
fn piece_text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |mut text, byte| {
            text.push_str(&format!("\\x{byte:02x}"));
            text
        }),
    }
}
