//! A model's output back to text and tool calls, while it streams.
//!
//! Models write calls in several shapes, whatever their template asked for (`calls.rs`). Text is passed on at
//! once; only what may begin a call is held back, until it is one (then nothing of it is shown) or cannot be
//! one any more (then it is text). How the output is cut into pieces does not matter: each decision depends
//! only on the text up to the point where it falls.
//!
//! Blanks before the first call and between calls belong to no text and are dropped.

mod calls;
mod literal;

#[cfg(test)]
mod tests;

use std::collections::HashSet;

use calls::RawCall;
use literal::Stop;

use crate::chat::{Tool, ToolCall};

/// A part of a reply.
#[derive(Clone, Debug, PartialEq)]
pub enum Parsed {
    /// Text to show.
    Text(String),
    /// A whole call of an offered tool.
    Call(ToolCall),
}

/// Parts text and calls in one reply.
#[derive(Clone, Debug)]
pub struct OutputParser {
    names: HashSet<String>,
    id_prefix: String,
    /// Text that is not decided yet.
    held: String,
    /// How much was held when the candidate was last tried in vain.
    tried: usize,
    /// Separators that are dropped if a call follows, and text if text follows.
    separators: String,
    place: Place,
    calls: usize,
}

/// What the text before the present point was.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    /// Nothing but blanks.
    Start,
    /// A call, or markup around one.
    AfterCall,
    /// Text.
    Text,
    /// JSON that is no call: what looks like one inside of it is part of the text.
    Json(JsonText),
}

/// Where inside of JSON text.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct JsonText {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
    after_newline: bool,
}

impl OutputParser {
    /// A parser for a reply to a request that offered these tools. Without tools all is text.
    pub fn new(tools: &[Tool]) -> OutputParser {
        OutputParser {
            names: tools.iter().map(|tool| tool.name.clone()).collect(),
            id_prefix: "call_".to_owned(),
            held: String::new(),
            tried: 0,
            separators: String::new(),
            place: Place::Start,
            calls: 0,
        }
    }

    /// Calls get the ids `prefix` + number, so that they differ from those of other replies.
    #[must_use]
    pub fn with_id_prefix(mut self, prefix: impl Into<String>) -> OutputParser {
        self.id_prefix = prefix.into();
        self
    }

    /// Takes more of the reply.
    pub fn push(&mut self, text: &str) -> Vec<Parsed> {
        let mut out = Vec::new();
        if self.names.is_empty() {
            put_text(&mut out, text);
            return out;
        }
        let closes = text.contains(['}', ']', '>']);
        self.held.push_str(text);
        if closes || self.held.len() <= EAGER_BYTES || self.held.len() > self.tried + self.tried / 8
        {
            self.decide(false, &mut out);
            self.tried = self.held.len();
        }
        out
    }

    /// Takes a control token of the reply, by its text. It ends a call that is not complete. Such tokens are
    /// markup around calls (`<|python_start|>`) and never shown.
    pub fn push_control(&mut self, _token: &str) -> Vec<Parsed> {
        let mut out = Vec::new();
        if self.names.is_empty() {
            return out;
        }
        self.decide(true, &mut out);
        self.tried = 0;
        if self.place != Place::Start {
            self.place = Place::AfterCall;
        }
        out
    }

    /// Ends the reply. A call whose closing tag is missing is one; anything else incomplete is text.
    pub fn finish(&mut self) -> Vec<Parsed> {
        let mut out = Vec::new();
        self.decide(true, &mut out);
        if self.calls == 0 {
            put_text(&mut out, &self.separators);
        }
        self.separators.clear();
        out
    }

    /// Whether text is held back.
    pub fn is_holding(&self) -> bool {
        !self.held.is_empty() || !self.separators.is_empty()
    }

    /// Decides about the held text, as far as that is possible, or all of it if nothing more comes.
    fn decide(&mut self, is_final: bool, out: &mut Vec<Parsed>) {
        let held = std::mem::take(&mut self.held);
        let mut rest = held.as_str();
        while let Some(first) = rest.chars().next() {
            let used = match self.place {
                Place::Json(json) => self.pass_json(json, rest, out),
                _ if self.is_separator(first) => {
                    self.separators.push(first);
                    first.len_utf8()
                }
                _ if !matches!(first, '{' | '[' | '<') => {
                    let length = rest.find(['{', '[', '<']).unwrap_or(rest.len());
                    self.put_text(&rest[..length], out);
                    length
                }
                _ => match calls::parse(rest, &self.names, is_final) {
                    Ok((found, used)) => {
                        self.put_calls(found, out);
                        used
                    }
                    Err(Stop::Incomplete) if !is_final && rest.len() <= CALL_BYTES_MAX => break,
                    Err(_) => {
                        self.put_text(&rest[..1], out);
                        self.place = JsonText::at(rest).map_or(Place::Text, Place::Json);
                        1
                    }
                },
            };
            rest = &rest[used..];
        }
        self.held = rest.to_owned();
    }

    fn is_separator(&self, char: char) -> bool {
        match self.place {
            Place::Start => char.is_whitespace(),
            Place::AfterCall => char.is_whitespace() || matches!(char, ',' | ';'),
            Place::Text | Place::Json(_) => false,
        }
    }

    /// Passes JSON text on up to its end; gives the number of bytes.
    fn pass_json(&mut self, mut json: JsonText, text: &str, out: &mut Vec<Parsed>) -> usize {
        let end = text.char_indices().find(|(_, char)| json.ends_with(*char));
        let length = end.map_or(text.len(), |(at, char)| at + char.len_utf8());
        put_text(out, &text[..length]);
        self.place = if end.is_some() { Place::Text } else { Place::Json(json) };
        length
    }

    fn put_text(&mut self, text: &str, out: &mut Vec<Parsed>) {
        put_text(out, &std::mem::take(&mut self.separators));
        put_text(out, text);
        self.place = Place::Text;
    }

    fn put_calls(&mut self, found: Vec<RawCall>, out: &mut Vec<Parsed>) {
        self.separators.clear();
        self.place = Place::AfterCall;
        for RawCall { name, arguments } in found {
            let id = format!("{}{}", self.id_prefix, self.calls);
            self.calls += 1;
            out.push(Parsed::Call(ToolCall { id, name, arguments }));
        }
    }
}

impl JsonText {
    /// The state after the bracket that `text` begins with, if it looks like JSON.
    fn at(text: &str) -> Option<JsonText> {
        let next = text.get(1..)?.trim_start().chars().next()?;
        let is_json = match text.as_bytes()[0] {
            b'{' => next == '"',
            b'[' => matches!(next, '{' | '[' | '"'),
            _ => false,
        };
        let start =
            JsonText { depth: 1, in_string: false, is_escaped: false, after_newline: false };
        is_json.then_some(start)
    }

    /// Goes past a character; says whether the JSON ends with it: by its last bracket, or because it is none
    /// after all (a line break in a string, an empty line).
    fn ends_with(&mut self, char: char) -> bool {
        if self.in_string {
            match char {
                _ if std::mem::take(&mut self.is_escaped) => {}
                '\\' => self.is_escaped = true,
                '"' => self.in_string = false,
                '\n' => return true,
                _ => {}
            }
            return false;
        }
        let after_newline = self.after_newline;
        self.after_newline = char == '\n' || (after_newline && char.is_whitespace());
        match char {
            '\n' => return after_newline,
            '"' => self.in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' => self.depth -= 1,
            _ => {}
        }
        self.depth == 0
    }
}

/// Appends text, to the text before it if there is one.
fn put_text(out: &mut Vec<Parsed>, text: &str) {
    if text.is_empty() {
        return;
    }
    match out.last_mut() {
        Some(Parsed::Text(before)) => before.push_str(text),
        _ => out.push(Parsed::Text(text.to_owned())),
    }
}

/// Up to here a candidate is tried again with every piece of text; then with each that closes something, and
/// whenever it has grown by an eighth.
const EAGER_BYTES: usize = 512;
/// A longer call is text: what is held back is bounded.
const CALL_BYTES_MAX: usize = 64 << 10;
