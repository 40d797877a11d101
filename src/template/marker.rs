//! Keeping a client's text apart from a template's markup.
//!
//! A template makes one string of both. So before rendering, a noncharacter is put inside every text of a
//! client that reads like a control token, after its first character: `<|eot|>` becomes `<` + marker +
//! `|eot|>`. Rendered, it is no control token any more; without its markers it is the client's text again.
//! The beginning of a control token at the end of a text is marked too, since a template may join texts.
//!
//! What this does not cover is a template that changes texts itself in such a way that markup appears
//! (`lower` on `<|EOT|>`); none of the published ones does.

use serde_json::Value;

use super::TemplateError;
use crate::tokenizer::Tokenizer;

/// A noncharacter that stands nowhere in a conversation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Marker(char);

impl Marker {
    /// A marker that neither the template nor the values hold.
    pub(super) fn new(source: &str, values: [&Value; 3]) -> Result<Marker, TemplateError> {
        let mut used = [false; CANDIDATES.len()];
        note(source, &mut used);
        values.into_iter().for_each(|value| each_text(value, &mut |text| note(text, &mut used)));
        let free = used.iter().position(|used| !used).ok_or(TemplateError::Unmarkable)?;
        Ok(Marker(CANDIDATES[free]))
    }

    /// Marks all texts of a value, keys of objects included.
    pub(super) fn mark(self, tokenizer: &Tokenizer, value: &mut Value) {
        match value {
            Value::String(text) => self.mark_text(tokenizer, text),
            Value::Array(values) => values.iter_mut().for_each(|value| self.mark(tokenizer, value)),
            Value::Object(fields) => {
                let entries = std::mem::take(fields).into_iter().map(|(mut key, mut value)| {
                    self.mark_text(tokenizer, &mut key);
                    self.mark(tokenizer, &mut value);
                    (key, value)
                });
                *fields = entries.collect();
            }
            Value::Bool(_) | Value::Null | Value::Number(_) => {}
        }
    }

    fn mark_text(self, tokenizer: &Tokenizer, text: &mut String) {
        let starts: Vec<usize> = text
            .char_indices()
            .filter(|(at, _)| tokenizer.may_begin_control(&text[*at..]))
            .map(|(at, first)| at + first.len_utf8())
            .collect();
        if starts.is_empty() {
            return;
        }
        let mut marked = String::with_capacity(text.len() + starts.len() * self.0.len_utf8());
        let mut from = 0;
        for start in starts {
            marked.push_str(&text[from..start]);
            marked.push(self.0);
            from = start;
        }
        marked.push_str(&text[from..]);
        *text = marked;
    }

    /// The text without markers.
    pub(super) fn strip(self, text: &str) -> String {
        text.replace(self.0, "")
    }
}

/// Whether a character may be a marker; such a one passes through `tojson` unescaped.
pub(super) fn is_candidate(char: char) -> bool {
    CANDIDATES.contains(&char)
}

fn note(text: &str, used: &mut [bool; CANDIDATES.len()]) {
    // All candidates begin with this byte, which is rare.
    if !text.as_bytes().contains(&0xEF) {
        return;
    }
    for char in text.chars() {
        if let Some(at) = CANDIDATES.iter().position(|candidate| *candidate == char) {
            used[at] = true;
        }
    }
}

fn each_text(value: &Value, each: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => each(text),
        Value::Array(values) => values.iter().for_each(|value| each_text(value, each)),
        Value::Object(fields) => fields.iter().for_each(|(key, value)| {
            each(key);
            each_text(value, each);
        }),
        Value::Bool(_) | Value::Null | Value::Number(_) => {}
    }
}

/// The noncharacters of the Arabic block: never assigned, never in real text.
const CANDIDATES: [char; 32] = {
    let mut candidates = ['\u{FDD0}'; 32];
    let mut at = 0;
    while at < candidates.len() {
        // `char::from_u32` is an option; the range has no surrogates.
        candidates[at] = match char::from_u32(0xFDD0 + at as u32) {
            Some(char) => char,
            None => panic!("U+FDD0..=U+FDEF are scalar values"),
        };
        at += 1;
    }
    candidates
};
