//! minijinja as `transformers` sets Jinja up, and under limits.

use std::io;

use jiff::ZonedDateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};
use regex::{Captures, Regex};
use serde_json::Map;

use super::{TemplateError, json};

/// An environment that holds the template.
pub(super) fn new(source: &str) -> Result<Environment<'static>, TemplateError> {
    if source.len() > SOURCE_BYTES_MAX {
        let bytes = source.len();
        return Err(TemplateError::Syntax(format!("{bytes} bytes exceed {SOURCE_BYTES_MAX}")));
    }
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| TemplateError::Syntax(error.to_string()))?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_recursion_limit(RECURSION_MAX);
    // An error would hold a copy of all variables.
    environment.set_debug(false);
    // It indents a value of depth n by n, for as many lines.
    environment.remove_filter("pprint");
    environment.add_filter("tojson", json::tojson);
    // In Python `none` is not iterable; templates ask before they take a length.
    environment.add_test("iterable", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Iterable | ValueKind::Map | ValueKind::Seq | ValueKind::String
        )
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
    });
    environment
        .add_template_owned(NAME, without_generation_tags(source))
        .map_err(|error| TemplateError::Syntax(describe(&error)))?;
    Ok(environment)
}

/// `{% generation %}` of `transformers` marks what the assistant said, for training, and writes nothing. It is
/// no Jinja: `if true` takes its place.
fn without_generation_tags(source: &str) -> String {
    let tag = Regex::new(r"(\{%-?\s*)(end)?generation(\s*-?%\})").expect("a constant");
    let replace = |found: &Captures<'_>| {
        let word = if found.get(2).is_some() { "endif" } else { "if true" };
        format!("{}{word}{}", &found[1], &found[3])
    };
    tag.replace_all(source, replace).into_owned()
}

/// Renders the template with these variables.
///
/// A loop can nest a value as deep as its fuel lasts, and the engine walks and drops values by recursion. So
/// rendering has a thread of its own whose stack suffices for the fuel: a hostile template ends, not the daemon.
/// The stack is address space; only what is used becomes memory.
pub(super) fn render(
    environment: &Environment<'static>,
    variables: Map<String, serde_json::Value>,
    now: &ZonedDateTime,
) -> Result<String, TemplateError> {
    let fuel = fuel(&variables);
    // A copy costs microseconds; the clock and the fuel belong to this rendering alone.
    let mut environment = environment.clone();
    environment.set_fuel(Some(fuel));
    let now = now.clone();
    environment.add_function("strftime_now", move |format: String| -> Result<String, Error> {
        jiff::fmt::strtime::format(&format, &now)
            .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
    });
    let stack_bytes = STACK_BYTES + fuel as usize * STACK_BYTES_PER_FUEL;
    let thread = std::thread::Builder::new().name("template".to_owned()).stack_size(stack_bytes);
    let thread = thread
        .spawn(move || render_here(environment, variables))
        .map_err(|error| TemplateError::Render(format!("no thread for it: {error}")))?;
    thread.join().unwrap_or_else(|_| Err(TemplateError::Render("the engine panicked".to_owned())))
}

fn render_here(
    environment: Environment<'static>,
    variables: Map<String, serde_json::Value>,
) -> Result<String, TemplateError> {
    let template = environment.get_template(NAME).map_err(|error| failure(&error))?;
    let mut out = Capped { bytes: Vec::new() };
    template
        .render_captured_to(Value::from(Serde(variables)), &mut out)
        .map_err(|error| failure(&error))?;
    String::from_utf8(out.bytes).map_err(|_| TemplateError::Render("not UTF-8".to_owned()))
}

/// Fuel for what a template does at all, and for each message, tool and byte that it must handle.
fn fuel(variables: &Map<String, serde_json::Value>) -> u64 {
    let sizes = variables.values().map(size);
    let (pieces, bytes) = sizes.fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
    (FUEL + FUEL_PER_PIECE * pieces + bytes / BYTES_PER_FUEL).min(FUEL_MAX)
}

/// A message of `raise_exception` on its way through the engine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// Output that ends at a limit.
struct Capped {
    bytes: Vec<u8>,
}

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > OUTPUT_BYTES_MAX {
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn failure(error: &Error) -> TemplateError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(Raised(message)) = error.downcast_ref() {
            return TemplateError::Refused(message.chars().take(MESSAGE_CHARS_MAX).collect());
        }
        let out_of_fuel =
            error.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::OutOfFuel);
        let too_large = error
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::FileTooLarge);
        if out_of_fuel || too_large {
            return TemplateError::TooCostly;
        }
        source = error.source();
    }
    TemplateError::Render(describe(error))
}

/// The engine's message, on one line and of bounded length.
fn describe(error: &Error) -> String {
    let line = error.line().map_or(String::new(), |line| format!(" in line {line}"));
    let detail = error.detail().map_or(String::new(), |detail| format!(": {detail}"));
    let message = format!("{}{detail}{line}", error.kind());
    message.chars().take(MESSAGE_CHARS_MAX).collect()
}

/// How many values, and how many bytes of text, the variables hold.
fn size(value: &serde_json::Value) -> (u64, u64) {
    let add = |(a, b): (u64, u64), (c, d): (u64, u64)| (a + c, b + d);
    match value {
        serde_json::Value::String(text) => (1, text.len() as u64),
        serde_json::Value::Array(values) => values.iter().map(size).fold((1, 0), add),
        serde_json::Value::Object(fields) => fields
            .iter()
            .map(|(key, value)| add((0, key.len() as u64), size(value)))
            .fold((1, 0), add),
        _ => (1, 8),
    }
}

const NAME: &str = "chat_template";
/// Ten times the longest published template.
const SOURCE_BYTES_MAX: usize = 256 << 10;
const OUTPUT_BYTES_MAX: usize = 16 << 20;
const MESSAGE_CHARS_MAX: usize = 500;
/// Stops loops, doubling, `*`, `join` and `replace` within about 40 ms and 20 MB (measured on x86-64).
const FUEL: u64 = 200_000;
const FUEL_PER_PIECE: u64 = 100;
const BYTES_PER_FUEL: u64 = 8;
const FUEL_MAX: u64 = 1_500_000;
const STACK_BYTES: usize = 4 << 20;
/// One step of nesting costs five units of fuel or more, and less than 800 bytes of stack to walk (measured on
/// x86-64, 20,000 deep, in lists and maps, printed, compared, sorted); without optimization several times that.
const STACK_BYTES_PER_FUEL: usize = if cfg!(debug_assertions) { 4096 } else { 512 };
const RECURSION_MAX: usize = 100;
