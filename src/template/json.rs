//! `tojson` as `transformers` defines it: Python's `json.dumps(value, ensure_ascii=False)`.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::marker;

/// The filter. Indentation is capped: 10⁹ blanks a line are no rendering.
pub(super) fn tojson(state: &State<'_, '_>, value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<u32> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let mut writer = Writer {
        out: String::new(),
        indent: indent.map(|width| width.min(INDENT_MAX) as usize),
        item_separator: if indent.is_some() { "," } else { ", " }.to_owned(),
        key_separator: ": ".to_owned(),
        is_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorts_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    if let Some([item, key]) = separators.as_deref() {
        (writer.item_separator, writer.key_separator) = (item.clone(), key.clone());
    }
    writer.value(state, &value, 0)?;
    Ok(Value::from_safe_string(writer.out))
}

struct Writer {
    out: String,
    indent: Option<usize>,
    item_separator: String,
    key_separator: String,
    is_ascii: bool,
    sorts_keys: bool,
}

impl Writer {
    fn value(&mut self, state: &State<'_, '_>, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(Error::new(ErrorKind::BadSerialization, "nested too deep for JSON"));
        }
        let before = self.out.len();
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.list(state, value, depth)?,
            ValueKind::Map => self.map(state, value, depth)?,
            kind => {
                let message = format!("{kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::BadSerialization, message));
            }
        }
        if value.kind() != ValueKind::Map && value.kind() != ValueKind::Seq {
            state.consume_fuel(1 + (self.out.len() - before) as u64 / 64)?;
        }
        Ok(())
    }

    fn list(&mut self, state: &State<'_, '_>, value: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut is_empty = true;
        for item in value.try_iter()? {
            self.separate(&mut is_empty, depth + 1);
            self.value(state, &item, depth + 1)?;
        }
        self.close(is_empty, depth, ']');
        Ok(())
    }

    fn map(&mut self, state: &State<'_, '_>, value: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('{');
        let mut is_empty = true;
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.sorts_keys {
            keys.sort_by_key(ToString::to_string);
        }
        for key in keys {
            self.separate(&mut is_empty, depth + 1);
            match key.as_str() {
                Some(text) => self.text(text),
                None => self.text(&key.to_string()),
            }
            self.out.push_str(&self.key_separator);
            self.value(state, &value.get_item(&key)?, depth + 1)?;
        }
        self.close(is_empty, depth, '}');
        Ok(())
    }

    fn separate(&mut self, is_first: &mut bool, depth: usize) {
        if !std::mem::take(is_first) {
            self.out.push_str(&self.item_separator);
        }
        self.new_line(depth);
    }

    fn close(&mut self, is_empty: bool, depth: usize, bracket: char) {
        if !is_empty {
            self.new_line(depth);
        }
        self.out.push(bracket);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(width) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', width * depth));
        }
    }

    fn number(&mut self, value: &Value) {
        match f64::try_from(value.clone()) {
            Ok(float) if !value.is_integer() => self.out.push_str(&python_float(float)),
            _ => self.out.push_str(&value.to_string()),
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for char in text.chars() {
            match char {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{C}' => self.out.push_str("\\f"),
                '\0'..='\u{1F}' => self.escape(char),
                // A marker must stay one, or the text that it guards would be open.
                _ if self.is_ascii && !char.is_ascii() && !marker::is_candidate(char) => {
                    self.escape(char);
                }
                _ => self.out.push(char),
            }
        }
        self.out.push('"');
    }

    fn escape(&mut self, char: char) {
        for unit in char.encode_utf16(&mut [0; 2]) {
            self.out.push_str(&format!("\\u{unit:04x}"));
        }
    }
}

/// A float as Python writes it.
fn python_float(float: f64) -> String {
    let size = float.abs();
    if float.is_nan() {
        "NaN".to_owned()
    } else if float.is_infinite() {
        if float > 0.0 { "Infinity" } else { "-Infinity" }.to_owned()
    } else if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{float:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let sign = if exponent.starts_with('-') { '-' } else { '+' };
        format!("{digits}e{sign}{:0>2}", exponent.trim_start_matches('-'))
    } else {
        format!("{float:?}")
    }
}

const INDENT_MAX: u32 = 16;
/// Deeper than any request is let in.
const DEPTH_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use super::python_float;

    #[test]
    fn floats_as_in_python() {
        let cases =
            [(1.0, "1.0"), (0.1, "0.1"), (1e16, "1e+16"), (1.5e-7, "1.5e-07"), (-0.0, "-0.0")];
        for (float, text) in cases {
            assert_eq!(python_float(float), text);
        }
    }
}
