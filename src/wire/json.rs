//! The one JSON reader and the one JSON writer of the doors.

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::error::Category;
use serde_json::ser::{Formatter, Serializer};

use crate::chat::ChatError;

/// How deep objects and lists of a request may nest.
pub const DEPTH_MAX: usize = 64;

/// Reads a request body.
///
/// # Errors
/// `Invalid`, naming the field and what it should be; never the value of a text field, which may be a prompt.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ChatError> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(malformed("missing request body"));
    }
    if depth(body) > DEPTH_MAX {
        return Err(malformed(format!("request body nests deeper than {DEPTH_MAX}")));
    }
    let mut reader = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        explain(&path, error.inner())
    })?;
    reader.end().map_err(|error| explain(".", &error))?;
    Ok(value)
}

/// Serializes as one line: U+0085, U+2028 and U+2029 are escaped, because clients split NDJSON with functions
/// that take them for line ends (Python's `str.splitlines`).
pub fn write(value: &impl Serialize) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    write_to(&mut out, value);
    out
}

/// As [`write`], appending.
pub(super) fn write_to(out: &mut Vec<u8>, value: &impl Serialize) {
    let mut serializer = Serializer::with_formatter(out, OneLine);
    value.serialize(&mut serializer).expect("values of strings, numbers and lists serialize");
}

/// An `Invalid` that concerns the body as a whole.
pub(super) fn malformed(message: impl Into<String>) -> ChatError {
    ChatError::Invalid { message: message.into(), param: None }
}

struct OneLine;

impl Formatter for OneLine {
    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut rest = fragment;
        while let Some(at) = rest.find(['\u{85}', '\u{2028}', '\u{2029}']) {
            let (before, from) = rest.split_at(at);
            let line_end = from.chars().next().expect("find returned a character's position");
            writer.write_all(before.as_bytes())?;
            write!(writer, "\\u{:04x}", u32::from(line_end))?;
            rest = &from[line_end.len_utf8()..];
        }
        writer.write_all(rest.as_bytes())
    }
}

/// The deepest nesting in `json`, which need not be valid.
fn depth(json: &[u8]) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0usize, 0, false, false);
    for &byte in json {
        if in_string {
            (in_string, escaped) = (escaped || byte != b'"', !escaped && byte == b'\\');
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' | b'[' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// Says what is wrong in the words of the API. serde quotes the offending value; a text is left out of it,
/// since it may be a prompt and as long as the body.
fn explain(path: &str, error: &serde_json::Error) -> ChatError {
    let full = error.to_string();
    if matches!(error.classify(), Category::Syntax | Category::Eof | Category::Io)
        && !full.starts_with("number out of range")
    {
        return malformed(format!("request body is not valid JSON: {full}"));
    }
    let text = match full.rfind(" at line ") {
        Some(at) => &full[..at],
        None => &full,
    };
    let root = path == "." || path == "?";
    let subject = if root { "request body" } else { path };
    let message = if let Some(wrong) =
        text.strip_prefix("invalid type: ").or_else(|| text.strip_prefix("invalid value: "))
        && let Some((found, expected)) = wrong.rsplit_once(", expected ")
    {
        format!("{subject} must be {}, not {}", expected_words(expected), found_words(found))
    } else if text == "number out of range" {
        format!("{subject}: number out of range")
    } else if let Some(field) = text.strip_prefix("missing field ") {
        format!("{subject}: field {} is missing", field.replace('`', "\""))
    } else {
        format!("{subject}: {}", clip(&text.replace('`', "\"")))
    };
    ChatError::Invalid { message, param: (!root).then(|| path.to_owned()) }
}

fn expected_words(expected: &str) -> &str {
    match expected {
        "a sequence" => "a list",
        "a map" => "an object",
        _ if expected.starts_with("struct ") => "an object",
        other => other,
    }
}

fn found_words(found: &str) -> String {
    match found {
        "map" => "an object".to_owned(),
        "sequence" => "a list".to_owned(),
        "null" => "null".to_owned(),
        _ => match found.split_once(' ').map(|(kind, value)| (kind, value.trim_matches('`'))) {
            Some(("string", _)) => "a text".to_owned(),
            Some(("boolean", value)) => clip(value),
            Some((_, value)) => {
                format!("the number {}", clip(value.trim_start_matches("point `")))
            }
            None => clip(found),
        },
    }
}

fn clip(text: &str) -> String {
    const LONGEST: usize = 120;
    match text.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_ends_of_other_alphabets_are_escaped() {
        let text = "a\u{85}b\u{2028}\u{2029}c\nü";
        let written = String::from_utf8(write(&text)).expect("JSON is UTF-8");
        assert_eq!(written, r#""a\u0085b\u2028\u2029c\nü""#);
        assert_eq!(serde_json::from_str::<String>(&written).expect("valid"), text);
    }

    #[test]
    fn no_character_breaks_a_line() {
        let all: String = ('\0'..=char::MAX).collect();
        let written = String::from_utf8(write(&serde_json::json!({ all.as_str(): &all })))
            .expect("JSON is UTF-8");
        let ends = |c: char| c < ' ' || matches!(c, '\u{85}' | '\u{2028}' | '\u{2029}');
        assert!(!written.contains(ends));
        let back: serde_json::Value = serde_json::from_str(&written).expect("valid");
        assert_eq!(back[&all], serde_json::Value::String(all));
    }

    #[test]
    fn depth_counts_outside_texts() {
        let cases = [
            ("{}", 1),
            ("[[],[[]]]", 3),
            (r#"{"a":"[[[["}"#, 1),
            (r#"{"a":"\"[[[\\"}"#, 1),
            (r#"["\\",[]]"#, 2),
            ("]]]]", 0),
            ("", 0),
        ];
        for (json, expected) in cases {
            assert_eq!(depth(json.as_bytes()), expected, "{json}");
        }
    }

    #[test]
    fn a_deep_body_is_refused_before_it_is_parsed() {
        let fits = format!("{}{}", "[".repeat(DEPTH_MAX), "]".repeat(DEPTH_MAX));
        assert!(parse::<serde_json::Value>(fits.as_bytes()).is_ok());
        let deep = "[".repeat(1 << 20);
        let error = parse::<serde_json::Value>(deep.as_bytes()).expect_err("too deep");
        assert_eq!(error.to_string(), "request body nests deeper than 64");
    }
}
