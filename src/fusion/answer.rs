//! What counts as an answer, and what counts as the same one.

use std::sync::Arc;

use regex::Regex;
use serde_json::Value;
use sha2::{Digest, Sha256};
use unicode_normalization::UnicodeNormalization;

use super::decimal;
use crate::chat::{AnswerForm, ChatError, FaultReason, OutputFormat};

/// The form an answer must have, ready to be looked for.
#[derive(Clone, Debug)]
pub enum Form {
    /// One of these; each beside what it is compared as.
    Choice(Arc<[(String, String)]>),
    /// A JSON value; with `true`, an object.
    Json(bool),
    /// A number.
    Number,
    /// A pattern's first group.
    Regex(Regex),
    /// Any text.
    Text,
}

/// A usable answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usable {
    /// What a client may read: no reasoning, no control text.
    pub text: String,
    /// What it is compared as.
    pub key: String,
    /// Words of that.
    pub words: usize,
}

impl Form {
    /// The form that a request asks for; a response format is one too.
    ///
    /// # Errors
    /// `Invalid` for a pattern that is none.
    pub fn new(asked: &AnswerForm, format: &OutputFormat) -> Result<Form, ChatError> {
        Ok(match (asked, format) {
            (AnswerForm::Choice(choices), _) => {
                Form::Choice(choices.iter().map(|text| (text.clone(), plain(text))).collect())
            }
            (AnswerForm::Json, OutputFormat::Text) => Form::Json(false),
            (AnswerForm::Number, _) => Form::Number,
            (AnswerForm::Regex(pattern), _) => Form::Regex(AnswerForm::compiled(pattern)?),
            (AnswerForm::Text, OutputFormat::Text) => Form::Text,
            (AnswerForm::Json | AnswerForm::Text, _) => Form::Json(true),
        })
    }

    /// Whether answers of this form are few enough to be counted.
    pub fn is_closed(&self) -> bool {
        !matches!(self, Form::Text)
    }

    /// The word under which strength is kept, and the receipt's.
    pub fn kind(&self) -> &'static str {
        match self {
            Form::Choice(_) => "choice",
            Form::Json(_) => "json",
            Form::Number => "number",
            Form::Regex(_) => "regex",
            Form::Text => "text",
        }
    }

    /// How many wrong answers there are, if that is known.
    pub fn wrong_answers(&self) -> Option<f64> {
        match self {
            Form::Choice(choices) => Some(choices.len().saturating_sub(1) as f64),
            _ => None,
        }
    }

    /// Takes what a member said for an answer.
    ///
    /// # Errors
    /// Why it is none.
    pub fn usable(&self, said: &str, calls: usize) -> Result<Usable, FaultReason> {
        let (text, reasoned) = visible(said);
        let text = text.trim();
        if text.is_empty() {
            return Err(match (said.is_empty(), reasoned) {
                _ if calls > 0 => FaultReason::ToolOnly,
                (true, _) => FaultReason::NoText,
                (false, true) => FaultReason::ReasoningOnly,
                (false, false) => FaultReason::Whitespace,
            });
        }
        let key = self.key(text).ok_or(FaultReason::InvalidFormat)?;
        Ok(Usable { text: text.to_owned(), words: words(&key), key })
    }

    fn key(&self, text: &str) -> Option<String> {
        match self {
            Form::Choice(choices) => choice(choices, text),
            Form::Json(object) => json(text, *object),
            Form::Number => decimal::last_in(&folded(text)),
            Form::Regex(pattern) => {
                let last = pattern.captures_iter(text).last()?;
                let group = last.get(1).or_else(|| last.get(0))?;
                Some(plain(group.as_str())).filter(|key| !key.is_empty())
            }
            Form::Text => {
                let key = plain(text);
                // Nothing but punctuation is compared as it is.
                Some(if key.is_empty() { folded(text) } else { key })
            }
        }
    }
}

/// A text as texts are compared: compatible characters unified, case and outer punctuation off, blanks single, a
/// number in its shortest form.
pub(super) fn plain(text: &str) -> String {
    let folded = folded(text);
    let bare = folded.trim_matches(|c: char| c.is_whitespace() || is_outer_punctuation(c));
    match decimal::exact(folded.trim().trim_end_matches(['.', '!', '?'])) {
        Some(number) => number,
        None => decimal::exact(bare).unwrap_or_else(|| bare.to_owned()),
    }
}

fn words(key: &str) -> usize {
    key.split_whitespace().count()
}

/// SHA-256 as 64 hexadecimal digits.
pub(super) fn sha256(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let digest = Sha256::digest(bytes);
    let mut text = String::with_capacity(64);
    for byte in digest.iter() {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// JSON with sorted keys, no blanks and numbers in their shortest form: equal values have equal texts.
pub(super) fn canonical(value: &Value, out: &mut String) {
    match value {
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().collect();
            fields.sort_by_key(|(name, _)| *name);
            out.push('{');
            for (index, (name, value)) in fields.into_iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                out.push_str(&Value::from(name.as_str()).to_string());
                out.push(':');
                canonical(value, out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                canonical(item, out);
            }
            out.push(']');
        }
        Value::Number(number) => {
            let text = number.to_string();
            out.push_str(&decimal::exact(&text).unwrap_or(text));
        }
        other => out.push_str(&other.to_string()),
    }
}

/// What is left of a text without reasoning and control text, and whether there was reasoning.
pub(super) fn visible(text: &str) -> (String, bool) {
    let mut rest = text.to_owned();
    let mut reasoned = false;
    for (open, close) in REASONING {
        // A template may have opened the tag in the prompt.
        if let Some(end) = rest.find(close)
            && rest.find(open).is_none_or(|start| start > end)
        {
            rest.drain(..end + close.len());
            reasoned = true;
        }
        while let Some(start) = rest.find(open) {
            let end = rest[start..].find(close).map_or(rest.len(), |at| start + at + close.len());
            rest.drain(start..end);
            reasoned = true;
        }
    }
    (without_control(&rest), reasoned)
}

const REASONING: [(&str, &str); 4] = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
];

/// Takes out `<|…|>` and the sentence marks of SentencePiece, which servers sometimes let through.
fn without_control(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('<') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let mark = ["<s>", "</s>"].into_iter().find(|mark| rest.starts_with(mark)).map(str::len);
        let token = || {
            let inner = rest.strip_prefix("<|")?;
            let end = inner.find("|>").filter(|end| *end <= 40)?;
            let name = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
            inner[..end].chars().all(name).then_some(end + 4)
        };
        match mark.or_else(token) {
            Some(len) => rest = &rest[len..],
            None => {
                out.push('<');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// Compatible characters unified, lower case, blanks single.
fn folded(text: &str) -> String {
    let unified: String = text.nfkc().flat_map(char::to_lowercase).collect();
    unified.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn is_outer_punctuation(c: char) -> bool {
    c.is_ascii_punctuation() || "“”„‘’«»…。、！？".contains(c)
}

/// The choice that the text is, or the only one that it names.
fn choice(choices: &[(String, String)], text: &str) -> Option<String> {
    let key = plain(text);
    if let Some((_, same)) = choices.iter().find(|(_, other)| *other == key) {
        return Some(same.clone());
    }
    let whole = folded(text);
    let mut named = choices.iter().filter(|(_, choice)| has_words(&whole, choice));
    match (named.next(), named.next()) {
        (Some((_, only)), None) => Some(only.clone()),
        _ => None,
    }
}

/// Whether `words` stand in `text` between what is no part of a word.
fn has_words(text: &str, words: &str) -> bool {
    !words.is_empty()
        && text.match_indices(words).any(|(at, _)| {
            let before = text[..at].chars().next_back();
            let after = text[at + words.len()..].chars().next();
            let joins = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
            !joins(before) && !joins(after)
        })
}

/// A JSON value that is the whole text, or stands in its code block.
fn json(text: &str, object: bool) -> Option<String> {
    let fenced = text.find("```").map(|at| &text[at + 3..]).map(|inner| {
        let inner = inner.strip_prefix("json").unwrap_or(inner);
        inner.find("```").map_or(inner, |end| &inner[..end])
    });
    let parse = |text: &str| serde_json::from_str::<Value>(text.trim()).ok();
    let value = parse(text).or_else(|| fenced.and_then(parse))?;
    if object && !value.is_object() {
        return None;
    }
    let mut out = String::new();
    canonical(&value, &mut out);
    Some(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn form(asked: AnswerForm) -> Form {
        Form::new(&asked, &OutputFormat::Text).expect("valid")
    }

    fn key(asked: AnswerForm, said: &str) -> Result<String, FaultReason> {
        form(asked).usable(said, 0).map(|usable| usable.key)
    }

    #[test]
    fn equal_answers_have_equal_keys() {
        let text = |said: &str| key(AnswerForm::Text, said).expect("usable");
        for (a, b) in [
            ("Yes.", " yes "),
            ("“On”", "on"),
            ("ﬁne", "fine"),
            ("42", "42.0"),
            ("1,234", "1234"),
            ("It  is\n on.", "it is on"),
            ("<think>no</think>Paris", "paris!"),
            ("Paris<|eot_id|></s>", "Paris"),
            ("half the reasoning</think>Paris", "Paris"),
        ] {
            assert_eq!(text(a), text(b), "{a} and {b}");
        }
        for (a, b) in [("on", "off"), ("-1", "1"), ("1.5", "15"), ("a b", "ab")] {
            assert_ne!(text(a), text(b), "{a} and {b}");
        }
    }

    #[test]
    fn numbers_are_found_and_exact() {
        for (said, expected) in [
            ("The answer is 42.", "42"),
            ("2 + 2 = 4", "4"),
            ("-007.50", "-7.5"),
            ("1e3", "1000"),
            ("about 3,000,000 people", "3000000"),
            ("21,5 °C", "21.5"),
            ("−4", "-4"),
            ("0.1", "0.1"),
            ("12345678901234567890.1", "12345678901234567890.1"),
        ] {
            assert_eq!(key(AnswerForm::Number, said).as_deref(), Ok(expected), "{said}");
        }
        assert_eq!(key(AnswerForm::Number, "none"), Err(FaultReason::InvalidFormat));
    }

    #[test]
    fn a_choice_is_named_once_or_invalid() {
        let form = || AnswerForm::Choice(vec!["On".to_owned(), "Off".to_owned()]);
        assert_eq!(key(form(), "ON!").as_deref(), Ok("on"));
        assert_eq!(key(form(), "The lamp is off.").as_deref(), Ok("off"));
        for said in ["on or off?", "maybe", "onward"] {
            assert_eq!(key(form(), said), Err(FaultReason::InvalidFormat), "{said}");
        }
    }

    #[test]
    fn json_is_compared_by_value() {
        let a = key(AnswerForm::Json, r#"{"b": 1.0, "a": [true, null]}"#);
        let b = key(AnswerForm::Json, "Here:\n```json\n{\"a\":[true,null],\"b\":1}\n```\n");
        assert_eq!(a.as_deref(), Ok(r#"{"a":[true,null],"b":1}"#));
        assert_eq!(a, b);
        assert_eq!(key(AnswerForm::Json, "no"), Err(FaultReason::InvalidFormat));
        let object = Form::new(&AnswerForm::Text, &OutputFormat::JsonObject).expect("valid");
        assert_eq!(object.usable("[1]", 0), Err(FaultReason::InvalidFormat));
    }

    #[test]
    fn the_last_match_of_a_pattern_counts() {
        let pattern = || AnswerForm::Regex(r"(?i)answer:\s*(\w+)".to_owned());
        assert_eq!(key(pattern(), "Answer: A, no, answer: B.").as_deref(), Ok("b"));
        assert_eq!(key(pattern(), "B"), Err(FaultReason::InvalidFormat));
    }

    #[test]
    fn what_is_no_answer_says_why() {
        for (said, calls, expected) in [
            ("", 0, FaultReason::NoText),
            (" \n\u{a0}", 0, FaultReason::Whitespace),
            ("<think>hm", 0, FaultReason::ReasoningOnly),
            ("<think>hm</think> ", 0, FaultReason::ReasoningOnly),
            ("", 1, FaultReason::ToolOnly),
        ] {
            assert_eq!(form(AnswerForm::Text).usable(said, calls), Err(expected), "{said}");
        }
    }

    #[test]
    fn canonical_json_sorts_and_shortens() {
        let mut out = String::new();
        canonical(&json!({"b": [1.50, "x\"y"], "a": {"z": 0.0}}), &mut out);
        assert_eq!(out, r#"{"a":{"z":0},"b":[1.5,"x\"y"]}"#);
        let digest = sha256(b"abc");
        assert!(digest.starts_with("ba7816bf") && digest.len() == 64, "{digest}");
    }
}
