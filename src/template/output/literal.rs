//! Literals as models write them: JSON's and Python's, mixed.

use serde_json::{Map, Number, Value};

/// Why a text is not what was looked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Stop {
    /// It may become that with more text.
    Incomplete,
    /// It is something else, whatever follows.
    Invalid,
}

/// A place in a text that may go on.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Cursor<'t> {
    pub(super) fn new(text: &'t str) -> Cursor<'t> {
        Cursor { text, at: 0 }
    }

    /// Bytes before the cursor.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    pub(super) fn peek(&self) -> Result<char, Stop> {
        self.text[self.at..].chars().next().ok_or(Stop::Incomplete)
    }

    fn next(&mut self) -> Result<char, Stop> {
        let char = self.peek()?;
        self.at += char.len_utf8();
        Ok(char)
    }

    /// Goes past `char` if it is next.
    pub(super) fn eat(&mut self, char: char) -> Result<bool, Stop> {
        let is_next = self.peek()? == char;
        if is_next {
            self.at += char.len_utf8();
        }
        Ok(is_next)
    }

    pub(super) fn expect(&mut self, char: char) -> Result<(), Stop> {
        if self.eat(char)? { Ok(()) } else { Err(Stop::Invalid) }
    }

    /// Goes past all of `word`, which must be next.
    pub(super) fn expect_word(&mut self, word: &str) -> Result<(), Stop> {
        word.chars().try_for_each(|char| self.expect(char))
    }

    pub(super) fn skip_blanks(&mut self) {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
    }

    /// The characters up to the first that `is_part` refuses, which must have come.
    pub(super) fn word(&mut self, is_part: impl Fn(char) -> bool) -> Result<&'t str, Stop> {
        let rest = &self.text[self.at..];
        let length = rest.find(|char| !is_part(char)).ok_or(Stop::Incomplete)?;
        self.at += length;
        Ok(&rest[..length])
    }

    /// The rest of the text.
    pub(super) fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    /// Any value; blanks before it are skipped.
    pub(super) fn value(&mut self, depth: usize) -> Result<Value, Stop> {
        if depth > DEPTH_MAX {
            return Err(Stop::Invalid);
        }
        self.skip_blanks();
        match self.peek()? {
            '{' => Ok(Value::Object(self.object(depth)?)),
            '[' => self.list('[', ']', depth),
            '(' => self.list('(', ')', depth),
            '"' | '\'' => Ok(Value::String(self.string()?)),
            '0'..='9' | '-' | '+' | '.' => self.number(),
            _ => self.keyword(),
        }
    }

    /// An object; its keys stay in order.
    pub(super) fn object(&mut self, depth: usize) -> Result<Map<String, Value>, Stop> {
        self.expect('{')?;
        let mut fields = Map::new();
        loop {
            self.skip_blanks();
            if self.eat('}')? {
                return Ok(fields);
            }
            let key = self.string()?;
            self.skip_blanks();
            self.expect(':')?;
            let value = self.value(depth + 1)?;
            fields.insert(key, value);
            self.skip_blanks();
            if !self.eat(',')? && self.peek()? != '}' {
                return Err(Stop::Invalid);
            }
        }
    }

    fn list(&mut self, open: char, close: char, depth: usize) -> Result<Value, Stop> {
        self.expect(open)?;
        let mut values = Vec::new();
        loop {
            self.skip_blanks();
            if self.eat(close)? {
                return Ok(Value::Array(values));
            }
            values.push(self.value(depth + 1)?);
            self.skip_blanks();
            if !self.eat(',')? && self.peek()? != close {
                return Err(Stop::Invalid);
            }
        }
    }

    /// A string in either kind of quotes. Line breaks inside are taken as they are: models write them.
    pub(super) fn string(&mut self) -> Result<String, Stop> {
        let quote = self.next()?;
        if !matches!(quote, '"' | '\'') {
            return Err(Stop::Invalid);
        }
        let mut string = String::new();
        loop {
            match self.next()? {
                '\\' => self.escape(&mut string)?,
                char if char == quote => return Ok(string),
                char => string.push(char),
            }
        }
    }

    fn escape(&mut self, string: &mut String) -> Result<(), Stop> {
        let char = match self.next()? {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'b' => '\u{8}',
            'f' => '\u{C}',
            '\n' => return Ok(()),
            char @ ('"' | '\'' | '\\' | '/') => char,
            'x' => self.code(2)?,
            'U' => self.code(8)?,
            'u' => self.utf16()?,
            other => {
                // As Python: a backslash before anything else is one.
                string.push('\\');
                other
            }
        };
        string.push(char);
        Ok(())
    }

    /// `\uXXXX`, or two of them for one character; half a pair becomes U+FFFD.
    fn utf16(&mut self) -> Result<char, Stop> {
        let first = self.hex(4)?;
        if !(0xD800..0xDC00).contains(&first) {
            return Ok(char::from_u32(first).unwrap_or(char::REPLACEMENT_CHARACTER));
        }
        let before = self.at;
        if self.eat('\\')? && self.eat('u')? {
            let second = self.hex(4)?;
            if (0xDC00..0xE000).contains(&second) {
                let code = 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
                return Ok(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
            }
        }
        self.at = before;
        Ok(char::REPLACEMENT_CHARACTER)
    }

    fn code(&mut self, digits: usize) -> Result<char, Stop> {
        Ok(char::from_u32(self.hex(digits)?).unwrap_or(char::REPLACEMENT_CHARACTER))
    }

    fn hex(&mut self, digits: usize) -> Result<u32, Stop> {
        let mut code = 0u32;
        for _ in 0..digits {
            let digit = self.next()?.to_digit(16).ok_or(Stop::Invalid)?;
            code = code.wrapping_mul(16).wrapping_add(digit);
        }
        Ok(code)
    }

    fn number(&mut self) -> Result<Value, Stop> {
        let is_part =
            |char: char| char.is_ascii_digit() || matches!(char, '+' | '-' | '.' | 'e' | 'E' | '_');
        let digits = self.word(is_part)?.replace('_', "");
        if let Ok(integer) = digits.parse::<i64>() {
            return Ok(integer.into());
        }
        if let Ok(integer) = digits.parse::<u64>() {
            return Ok(integer.into());
        }
        let float: f64 = digits.parse().map_err(|_| Stop::Invalid)?;
        Number::from_f64(float).map(Value::Number).ok_or(Stop::Invalid)
    }

    fn keyword(&mut self) -> Result<Value, Stop> {
        let known = [
            ("true", Value::Bool(true)),
            ("True", Value::Bool(true)),
            ("false", Value::Bool(false)),
            ("False", Value::Bool(false)),
            ("null", Value::Null),
            ("None", Value::Null),
        ];
        let mut stop = Stop::Invalid;
        for (word, value) in known {
            let mut cursor = self.clone();
            match cursor.expect_word(word) {
                Ok(()) if !cursor.rest().starts_with(|char: char| char.is_alphanumeric()) => {
                    *self = cursor;
                    return Ok(value);
                }
                Ok(()) | Err(Stop::Invalid) => {}
                Err(Stop::Incomplete) => stop = Stop::Incomplete,
            }
        }
        Err(stop)
    }
}

/// Deeper than any arguments that a tool takes.
const DEPTH_MAX: usize = 64;
