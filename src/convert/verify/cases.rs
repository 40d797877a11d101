//! What both models read and are asked: a text in windows, requests with their expected answers, prompts. All of
//! it in tokens, made once with the file's own tokenizer and template, so that both read the same.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Deserialize;

use super::calls::Said;
use super::{Options, VerifyError};
use crate::chat::{Message, Role, Tool};
use crate::gguf::Gguf;
use crate::template::{ChatTemplate, RenderOptions};
use crate::tokenizer::{Specials, Tokenizer};
use crate::units::TokenId;

/// Tokens of the reference's answer to a prompt, at most.
pub(super) const PROMPT_ANSWER_TOKENS: usize = 32;

/// An answer to a request may have at least so many tokens.
const ANSWER_TOKENS_MIN: usize = 96;

/// Everything that is read and asked.
pub(super) struct Cases {
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) windows: Vec<Vec<TokenId>>,
    window: usize,
    pub(super) requests: Vec<Request>,
    pub(super) prompts: Vec<Prompt>,
    /// Tools of requests that offer none: the names that expected answers call.
    known_tools: Vec<Tool>,
}

/// A request in its conversation, with the expected answer.
pub(super) struct Request {
    pub(super) prompt: Vec<TokenId>,
    /// The expected answer and the token that ends it; never empty.
    pub(super) expected: Vec<TokenId>,
    pub(super) said: Said,
    /// The user's last words, and the expected answer.
    pub(super) words: String,
    pub(super) answer: String,
    tools: Vec<Tool>,
}

/// Words of a user.
pub(super) struct Prompt {
    pub(super) text: String,
    pub(super) tokens: Vec<TokenId>,
}

impl Request {
    /// An answer may be so long: a wrong one needs no end, but room to be valid.
    pub(super) fn answer_tokens_max(&self) -> usize {
        (2 * self.expected.len()).max(ANSWER_TOKENS_MIN)
    }

    /// Tokens that are read for it, without the answer.
    pub(super) fn tokens(&self) -> u64 {
        (self.prompt.len() + self.expected.len()) as u64
    }
}

impl Cases {
    /// Reads the files, or takes the built-in requests and prompts.
    pub(super) fn load(options: &Options, gguf: &Gguf) -> Result<Cases, VerifyError> {
        let file = &options.file;
        let tokenizer = Tokenizer::from_gguf(gguf.metadata())
            .map_err(|error| VerifyError::Tokenizer { file: file.clone(), error })?;
        let tokenizer = Arc::new(tokenizer);
        let template = ChatTemplate::from_gguf(gguf.metadata(), Arc::clone(&tokenizer))
            .map_err(|error| VerifyError::Template { file: file.clone(), error })?;
        let writer = Writer { file, tokenizer: &tokenizer, template: &template };

        let (source, lines) = text_of(options.requests.as_deref(), HOME)?;
        let mut asked = parse_requests(&source, &lines)?;
        asked.truncate(options.limit.unwrap_or(usize::MAX));
        let known_tools = known_tools(&asked);
        let requests = asked.into_iter().map(|asked| writer.request(asked, &known_tools));
        let requests = requests.collect::<Result<_, _>>()?;
        let (_, lines) = text_of(options.prompts.as_deref(), PROMPTS)?;
        let prompts = lines.lines().filter(|line| !line.trim().is_empty());
        let prompts = prompts.map(|line| writer.prompt(line)).collect::<Result<_, _>>()?;
        let windows = match &options.text {
            Some(path) => writer.windows(path, options.window)?,
            None => Vec::new(),
        };
        let window = options.window;
        Ok(Cases { windows, window, requests, prompts, known_tools, tokenizer })
    }

    /// The first token of a window whose prediction counts: those before it are context. The convention of
    /// llama.cpp: of a window of 512 the last 255 count.
    pub(super) fn window_first_scored(&self) -> usize {
        self.window / 2 + 1
    }

    pub(super) fn stops(&self) -> &[TokenId] {
        self.tokenizer.stop_tokens()
    }

    pub(super) fn tools_of(&self, request: &Request) -> Vec<Tool> {
        if request.tools.is_empty() { self.known_tools.clone() } else { request.tools.clone() }
    }

    /// The longest sequence that is read or written.
    pub(super) fn longest(&self) -> usize {
        let requests = self.requests.iter().map(|request| {
            request.prompt.len() + request.answer_tokens_max().max(request.expected.len())
        });
        let prompts = self.prompts.iter().map(|prompt| prompt.tokens.len() + PROMPT_ANSWER_TOKENS);
        let windows = self.windows.iter().map(Vec::len);
        requests.chain(prompts).chain(windows).max().unwrap_or(0)
    }

    /// Tokens that are read at least; what the models write comes on top.
    pub(super) fn tokens(&self) -> u64 {
        let windows: usize = self.windows.iter().map(Vec::len).sum();
        let prompts: usize = self.prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        (windows + prompts) as u64 + self.requests.iter().map(Request::tokens).sum::<u64>()
    }

    /// Positions that are compared, at most.
    pub(super) fn positions(&self) -> u64 {
        let window = self.window.saturating_sub(self.window_first_scored());
        let answers: usize = self.requests.iter().map(|request| request.expected.len()).sum();
        let prompts = self.prompts.len() * PROMPT_ANSWER_TOKENS;
        (window * self.windows.len() + answers + prompts) as u64
    }
}

/// Words to tokens.
struct Writer<'a> {
    file: &'a Path,
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
}

impl Writer<'_> {
    fn request(&self, asked: AskedFor, known_tools: &[Tool]) -> Result<Request, VerifyError> {
        let prompt = self.render(&asked.messages, &asked.tools)?;
        let mut expected = self.encode(&asked.answer)?;
        expected.extend(self.tokenizer.eos().or(self.tokenizer.stop_tokens().first().copied()));
        let tools = if asked.tools.is_empty() { known_tools } else { &asked.tools };
        let said = Said::parse(&asked.answer, tools);
        let said_last = asked.messages.iter().rev().find(|message| message.role == Role::User);
        let words = said_last.map(|message| message.content.clone()).unwrap_or_default();
        Ok(Request { prompt, expected, said, words, answer: asked.answer, tools: asked.tools })
    }

    fn prompt(&self, text: &str) -> Result<Prompt, VerifyError> {
        let tokens = self.render(&[Message::text(Role::User, text)], &[])?;
        Ok(Prompt { text: text.to_owned(), tokens })
    }

    /// Windows of `window` tokens from the beginning on; what fills no window is left out. Each begins with
    /// the token that begins texts, in the place of its first, where the model has one.
    fn windows(&self, path: &Path, window: usize) -> Result<Vec<Vec<TokenId>>, VerifyError> {
        let text = fs::read(path).map_err(VerifyError::io(path))?;
        let text = String::from_utf8_lossy(&text);
        let bos = self.tokenizer.bos().filter(|_| self.tokenizer.adds_bos());
        let mut tokens: Vec<TokenId> = bos.into_iter().collect();
        tokens.extend(self.encode(text.strip_suffix('\n').unwrap_or(&text))?);
        if tokens.len() < window {
            let (path, tokens) = (path.to_path_buf(), tokens.len());
            return Err(VerifyError::TextTooShort { path, tokens, window });
        }
        let mut windows: Vec<Vec<TokenId>> =
            tokens.chunks_exact(window).map(<[TokenId]>::to_vec).collect();
        if let Some(bos) = bos {
            windows.iter_mut().for_each(|window| window[0] = bos);
        }
        Ok(windows)
    }

    fn render(&self, messages: &[Message], tools: &[Tool]) -> Result<Vec<TokenId>, VerifyError> {
        // Always the same day, where a template tells it.
        let now = Timestamp::UNIX_EPOCH.to_zoned_datetime(TimeZone::UTC);
        let prompt = self
            .template
            .render(messages, tools, &RenderOptions::at(now))
            .map_err(|error| VerifyError::Template { file: self.file.to_path_buf(), error })?;
        let tokens = prompt.tokens(self.tokenizer);
        tokens.map_err(|error| VerifyError::Tokenizer { file: self.file.to_path_buf(), error })
    }

    fn encode(&self, text: &str) -> Result<Vec<TokenId>, VerifyError> {
        let tokens = self.tokenizer.encode(text, Specials::Text);
        tokens.map_err(|error| VerifyError::Tokenizer { file: self.file.to_path_buf(), error })
    }
}

/// A request as it stands in a file.
#[derive(Debug)]
struct AskedFor {
    messages: Vec<Message>,
    tools: Vec<Tool>,
    answer: String,
}

/// A line: a conversation of several requests, as the corpus of scout-nano writes them, or one request in the
/// words of a chat API.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    #[serde(default)]
    system: String,
    #[serde(default)]
    turns: Vec<Turn>,
    #[serde(default)]
    messages: Vec<Spoken>,
    #[serde(default)]
    tools: Vec<Offered>,
    answer: Option<String>,
}

#[derive(Deserialize)]
struct Turn {
    user: String,
    answer: String,
    /// What the call gave, and what is said about it.
    #[serde(default)]
    result: String,
    #[serde(default)]
    reply: String,
}

#[derive(Deserialize)]
struct Spoken {
    role: Role,
    content: String,
}

/// A tool, bare or as chat APIs wrap it.
#[derive(Deserialize)]
struct Offered {
    function: Option<Function>,
    #[serde(flatten)]
    bare: Option<Function>,
}

#[derive(Deserialize)]
struct Function {
    name: String,
    description: Option<String>,
    parameters: Option<serde_json::Value>,
}

fn parse_requests(source: &Path, lines: &str) -> Result<Vec<AskedFor>, VerifyError> {
    let mut asked = Vec::new();
    for (index, text) in lines.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
        let wrong = |reason: String| VerifyError::Line {
            path: source.to_path_buf(),
            line: index + 1,
            reason,
        };
        let line: Line = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
        line.requests(&mut asked).map_err(wrong)?;
    }
    Ok(asked)
}

impl Line {
    fn requests(self, asked: &mut Vec<AskedFor>) -> Result<(), String> {
        let tools = self.tools.into_iter().map(|offered| {
            let function = offered.function.or(offered.bare).ok_or("a tool without a name")?;
            let Function { name, description, parameters } = function;
            Ok::<_, String>(Tool { name, description, parameters })
        });
        let tools: Vec<Tool> = tools.collect::<Result<_, _>>()?;
        let mut messages = Vec::new();
        if !self.system.is_empty() {
            messages.push(Message::text(Role::System, self.system));
        }
        match (self.turns.is_empty(), self.answer) {
            (true, Some(answer)) if !self.messages.is_empty() => {
                messages
                    .extend(self.messages.into_iter().map(|m| Message::text(m.role, m.content)));
                asked.push(AskedFor { messages, tools, answer });
                return Ok(());
            }
            (false, None) if self.messages.is_empty() => {}
            _ => return Err("needs either `turns`, or `messages` and `answer`".to_owned()),
        }
        for turn in self.turns {
            messages.push(Message::text(Role::User, turn.user));
            for (answer, result) in [(turn.answer, turn.result), (turn.reply, String::new())] {
                if answer.is_empty() {
                    continue;
                }
                let (messages_now, tools) = (messages.clone(), tools.clone());
                asked.push(AskedFor { messages: messages_now, tools, answer: answer.clone() });
                messages.push(Message::text(Role::Assistant, answer));
                if !result.is_empty() {
                    messages.push(Message::text(Role::Tool, result));
                }
            }
        }
        Ok(())
    }
}

/// The tools that expected answers call: what an answer must name to be a call at all.
fn known_tools(asked: &[AskedFor]) -> Vec<Tool> {
    let mut tools: Vec<Tool> = Vec::new();
    for answer in asked.iter().map(|asked| &asked.answer) {
        for line in answer.lines() {
            let Ok(value) = serde_json::from_str::<serde_json::Value>(line) else { continue };
            let Some(name) = value["name"].as_str() else { continue };
            if !tools.iter().any(|tool| tool.name == name) {
                tools.push(Tool { name: name.to_owned(), description: None, parameters: None });
            }
        }
    }
    tools
}

/// The file's text with its name, or the built-in one.
fn text_of(path: Option<&Path>, built_in: &str) -> Result<(PathBuf, String), VerifyError> {
    match path {
        Some(path) => {
            let text = fs::read_to_string(path).map_err(VerifyError::io(path))?;
            Ok((path.to_path_buf(), text))
        }
        None => Ok((PathBuf::from("built-in requests"), built_in.to_owned())),
    }
}

/// Requests to a made-up home in phrasings that scout-nano was not trained on, made by
/// `models/recipe/home_requests.py`.
const HOME: &str = include_str!("home.jsonl");

const PROMPTS: &str = include_str!("prompts.txt");

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(lines: &str) -> Result<Vec<AskedFor>, String> {
        parse_requests(Path::new("r.jsonl"), lines).map_err(|error| error.to_string())
    }

    #[test]
    fn a_conversation_is_a_request_for_each_answer() {
        let line = r#"{"system":"S","turns":[{"user":"a","answer":"{\"name\":\"f\",\"parameters\":{}}",
            "result":"{\"success\":true}","reply":"done"},{"user":"b","answer":"x"}]}"#;
        let asked = parse(&line.replace('\n', " ")).unwrap();
        let roles = |at: usize| {
            asked[at].messages.iter().map(|m| format!("{:?}", m.role)).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(asked.len(), 3);
        assert_eq!(roles(0), "System User");
        assert_eq!(roles(1), "System User Assistant Tool");
        assert_eq!(roles(2), "System User Assistant Tool Assistant User");
        assert_eq!(known_tools(&asked).len(), 1);
    }

    #[test]
    fn a_request_may_offer_tools() {
        let line = r#"{"messages":[{"role":"user","content":"a"}],"tools":[{"type":"function","function":{"name":"f","description":"d","parameters":{}}},{"name":"g"}],"answer":"x"}"#;
        let asked = parse(line).unwrap();
        let names: Vec<&str> = asked[0].tools.iter().map(|tool| tool.name.as_str()).collect();
        assert_eq!(names, ["f", "g"]);
    }

    #[test]
    fn bad_lines_are_named() {
        let good = r#"{"turns":[{"user":"a","answer":"x"}]}"#;
        for bad in [
            "{",
            r#"{"system":"S"}"#,
            r#"{"messages":[{"role":"user","content":"a"}]}"#,
            r#"{"what":1}"#,
        ] {
            let error = parse(&format!("{good}\n\n{bad}\n")).unwrap_err();
            assert!(error.starts_with("r.jsonl line 3: "), "{error}");
        }
    }

    #[test]
    fn the_built_in_requests_are_good() {
        let asked = parse(HOME).unwrap();
        let tools = known_tools(&asked);
        let calls = asked.iter().filter(|a| !Said::parse(&a.answer, &tools).calls.is_empty());
        assert!(calls.count() >= 200, "enough that one request is no point");
    }
}
