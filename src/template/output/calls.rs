//! The shapes of tool calls that models write:
//!
//! | Shape | Example |
//! |---|---|
//! | Python list | `[get_weather(city="Brno"), light_on(level=0.5, room='hall')]` |
//! | JSON | `{"name": "f", "parameters": {…}}`, also with `arguments`, `"type": "function"`, `"function": {…}`, in a list |
//! | tag | `<function=f>{"n": 10}</function>` |
//! | tagged JSON | `<tool_call>{"name": "f", "arguments": {…}}</tool_call>` |
//!
//! `<|python_start|>` and the like around them are control tokens and never part of the text.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::literal::{Cursor, Stop};

/// A call as it was written; its name is one of those offered.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RawCall {
    pub(super) name: String,
    pub(super) arguments: Map<String, Value>,
}

/// The calls that `text` begins with, and how many bytes they take. `is_final` says that no more text comes:
/// then a missing closing tag does not matter.
pub(super) fn parse(
    text: &str,
    names: &HashSet<String>,
    is_final: bool,
) -> Result<(Vec<RawCall>, usize), Stop> {
    let mut reader = Reader { cursor: Cursor::new(text), names, is_final };
    let calls = match reader.cursor.peek()? {
        '{' => vec![reader.json_call()?],
        '[' => reader.list()?,
        '<' => reader.tagged()?,
        _ => return Err(Stop::Invalid),
    };
    Ok((calls, reader.cursor.position()))
}

struct Reader<'t> {
    cursor: Cursor<'t>,
    names: &'t HashSet<String>,
    is_final: bool,
}

impl Reader<'_> {
    /// A list of calls, all in Python's form or all in JSON.
    fn list(&mut self) -> Result<Vec<RawCall>, Stop> {
        self.cursor.expect('[')?;
        let mut calls = Vec::new();
        loop {
            self.cursor.skip_blanks();
            if !calls.is_empty() && self.cursor.eat(']')? {
                return Ok(calls);
            }
            let call = match self.cursor.peek()? {
                '{' => self.json_call()?,
                _ => self.python_call()?,
            };
            calls.push(call);
            self.cursor.skip_blanks();
            if !self.cursor.eat(',')? && self.cursor.peek()? != ']' {
                return Err(Stop::Invalid);
            }
        }
    }

    /// `name(key=value, …)`.
    fn python_call(&mut self) -> Result<RawCall, Stop> {
        let written = self.cursor.rest();
        let name = match self.cursor.word(is_name_part) {
            Ok(name) => name.to_owned(),
            // Text that no offered name begins with need not be held back.
            Err(_) if self.names.iter().any(|name| name.starts_with(written)) => {
                return Err(Stop::Incomplete);
            }
            Err(_) => return Err(Stop::Invalid),
        };
        self.check_name(&name)?;
        self.cursor.expect('(')?;
        let mut arguments = Map::new();
        loop {
            self.cursor.skip_blanks();
            if self.cursor.eat(')')? {
                return Ok(RawCall { name, arguments });
            }
            let key = self.cursor.word(is_name_part)?.to_owned();
            if key.is_empty() {
                return Err(Stop::Invalid);
            }
            self.cursor.skip_blanks();
            self.cursor.expect('=')?;
            let value = self.cursor.value(0)?;
            arguments.insert(key, value);
            self.cursor.skip_blanks();
            if !self.cursor.eat(',')? && self.cursor.peek()? != ')' {
                return Err(Stop::Invalid);
            }
        }
    }

    /// An object that describes a call, and nothing else. Given up at the first key or name that says that it
    /// is another object.
    fn json_call(&mut self) -> Result<RawCall, Stop> {
        self.cursor.expect('{')?;
        let (mut name, mut arguments) = (None, None);
        loop {
            self.cursor.skip_blanks();
            if self.cursor.eat('}')? {
                let name = name.ok_or(Stop::Invalid)?;
                return Ok(RawCall { name, arguments: arguments.unwrap_or_default() });
            }
            let key = self.key()?;
            self.cursor.skip_blanks();
            self.cursor.expect(':')?;
            self.cursor.skip_blanks();
            match key.as_str() {
                "function" if self.cursor.peek()? == '{' => {
                    let call = self.json_call()?;
                    (name, arguments) = (Some(call.name), Some(call.arguments));
                }
                "function" | "name" => {
                    let written = self.cursor.string()?;
                    self.check_name(&written)?;
                    name = Some(written);
                }
                "arguments" | "parameters" => {
                    let value = self.cursor.value(0)?;
                    arguments = Some(object(value).ok_or(Stop::Invalid)?);
                }
                "type" if self.cursor.string()? == "function" => {}
                "id" => {
                    self.cursor.string()?;
                }
                _ => return Err(Stop::Invalid),
            }
            self.cursor.skip_blanks();
            if !self.cursor.eat(',')? && self.cursor.peek()? != '}' {
                return Err(Stop::Invalid);
            }
        }
    }

    /// A key of a call. A text that begins like none of them need not be held back.
    fn key(&mut self) -> Result<String, Stop> {
        let written = self.cursor.rest();
        self.cursor.string().map_err(|stop| {
            let begun = written.get(1..).unwrap_or_default();
            if KEYS.iter().any(|key| key.starts_with(begun)) { stop } else { Stop::Invalid }
        })
    }

    fn tagged(&mut self) -> Result<Vec<RawCall>, Stop> {
        let mut function = self.cursor.clone();
        match function.expect_word("<function=") {
            Ok(()) => {
                self.cursor = function;
                return Ok(vec![self.function_tag()?]);
            }
            Err(Stop::Incomplete) => return Err(Stop::Incomplete),
            Err(Stop::Invalid) => {}
        }
        self.cursor.expect_word("<tool_call>")?;
        self.cursor.skip_blanks();
        let mut calls = Vec::new();
        if self.cursor.peek()? == '[' {
            calls = self.list()?;
        }
        // Several objects in one pair of tags occur.
        loop {
            if calls.is_empty() || self.next_is('{') {
                calls.push(self.json_call()?);
            } else {
                self.closing("</tool_call>")?;
                return Ok(calls);
            }
        }
    }

    /// `name>{…}</function>`.
    fn function_tag(&mut self) -> Result<RawCall, Stop> {
        let name = self.cursor.word(|char| char != '>')?.to_owned();
        self.check_name(&name)?;
        self.cursor.expect('>')?;
        self.cursor.skip_blanks();
        let arguments = self.cursor.object(0)?;
        self.closing("</function>")?;
        Ok(RawCall { name, arguments })
    }

    /// Whether `char` comes next, after blanks. The cursor passes the blanks only if it does.
    fn next_is(&mut self, char: char) -> bool {
        let mut cursor = self.cursor.clone();
        cursor.skip_blanks();
        let is_next = cursor.peek() == Ok(char);
        if is_next {
            self.cursor = cursor;
        }
        is_next
    }

    /// Goes past a closing tag, or past nothing where another text follows: some models leave it out.
    fn closing(&mut self, tag: &str) -> Result<(), Stop> {
        let mut cursor = self.cursor.clone();
        cursor.skip_blanks();
        match cursor.expect_word(tag) {
            Ok(()) => self.cursor = cursor,
            Err(Stop::Incomplete) if !self.is_final => return Err(Stop::Incomplete),
            Err(_) => {}
        }
        Ok(())
    }

    fn check_name(&self, name: &str) -> Result<(), Stop> {
        if self.names.contains(name) { Ok(()) } else { Err(Stop::Invalid) }
    }
}

/// Arguments: an object, a text that holds one, or null for none.
fn object(value: Value) -> Option<Map<String, Value>> {
    match value {
        Value::Null => Some(Map::new()),
        Value::Object(fields) => Some(fields),
        Value::String(text) => serde_json::from_str(&text).ok(),
        _ => None,
    }
}

fn is_name_part(char: char) -> bool {
    char.is_alphanumeric() || matches!(char, '_' | '.' | '-' | ':' | '/')
}

const KEYS: [&str; 6] = ["arguments", "function", "id", "name", "parameters", "type"];
