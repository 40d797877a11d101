//! Answers that must have a form: JSON objects, JSON of a schema, calls of offered tools.
//!
//! A grammar says before each token which tokens may come, as a mask for the sampler. The tables behind all
//! grammars (a tree of the vocabulary's bytes) are built when the first one is asked for, and are promised in
//! the ledger like every other large piece; so is the state of each grammar.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use llguidance::api::TopLevelGrammar;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{
    ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie,
};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::chat::{ChatError, ChatRequestParts, OutputFormat, Tool, ToolChoice};
use crate::memory::{Ledger, Permit, Purpose, Shortfall};
use crate::tokenizer::Tokenizer;
use crate::units::{Bytes, TokenId};

/// The longest schema, as JSON text.
const SCHEMA_BYTES_MAX: usize = 64 * 1024;

/// The deepest schema; each level of it is a level of recursion in the compiler.
const SCHEMA_DEPTH_MAX: usize = 32;

/// Measured on Llama 3's vocabulary: 61 MB for 128 000 tokens, slices included.
const TABLE_BYTES_PER_TOKEN: u64 = 480;

/// States of one grammar's lexer, of 1 to 2 KB each.
const LEXER_STATES_MAX: usize = 8000;

/// What one grammar may grow to: its lexer and a compiled schema.
const GRAMMAR_BYTES: Bytes = Bytes(16 << 20);

/// Blanks between the parts of JSON: enough for any indentation, but not for ever.
const BLANKS: &str = r"[\x20\x0A\x0D\x09]{1,24}";

/// Makes grammars for one vocabulary.
pub(super) struct Grammars {
    ledger: Arc<Ledger>,
    tables: Mutex<Option<Tables>>,
}

/// Built once, kept until the engine ends.
struct Tables {
    factory: Arc<ParserFactory>,
    _permit: Permit,
}

/// The form of one answer, as far as it has been written.
pub(super) struct Grammar {
    matcher: Matcher,
    _permit: Permit,
}

impl Grammars {
    pub(super) fn new(ledger: Arc<Ledger>) -> Grammars {
        Grammars { ledger, tables: Mutex::new(None) }
    }

    /// The grammar a request asks for; none if any text will do.
    ///
    /// # Errors
    /// `Invalid` for a schema that cannot be enforced, `NoHeadroom` if the tables or the grammar do not fit.
    pub(super) fn of(
        &self,
        parts: &ChatRequestParts,
        tools: &[Tool],
        tokenizer: &Tokenizer,
    ) -> Result<Option<Grammar>, ChatError> {
        let Some((param, grammar)) = wanted(parts, tools)? else { return Ok(None) };
        let factory = self.factory(tokenizer)?;
        let permit = self
            .ledger
            .try_reserve(Purpose::Scratch, "grammar", GRAMMAR_BYTES)
            .map_err(no_headroom)?;
        let mut matcher = Matcher::new(factory.create_parser(grammar));
        match matcher.get_error() {
            Some(error) => {
                Err(ChatError::invalid(param, format!("{param}: {}", first_line(&error))))
            }
            // What the compiler cannot express it says when the first mask is asked for at the latest.
            None => match matcher.compute_mask() {
                Ok(_) => Ok(Some(Grammar { matcher, _permit: permit })),
                Err(error) => {
                    let error = error.to_string();
                    Err(ChatError::invalid(param, format!("{param}: {}", first_line(&error))))
                }
            },
        }
    }

    fn factory(&self, tokenizer: &Tokenizer) -> Result<Arc<ParserFactory>, ChatError> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tables) = &*tables {
            return Ok(Arc::clone(&tables.factory));
        }
        let bytes = Bytes(tokenizer.vocab_len() as u64 * TABLE_BYTES_PER_TOKEN);
        let permit = self
            .ledger
            .try_reserve(Purpose::Scratch, "grammar tables", bytes)
            .map_err(no_headroom)?;
        let factory = Arc::new(build_factory(tokenizer)?);
        permit.set_touched(permit.bytes());
        *tables = Some(Tables { factory: Arc::clone(&factory), _permit: permit });
        Ok(factory)
    }
}

impl Grammar {
    /// Which tokens may come next, one bit each; stop tokens where the answer may end.
    ///
    /// # Errors
    /// If the grammar cannot go on, with the reason for the log.
    pub(super) fn allowed(&mut self) -> Result<SimpleVob, String> {
        self.matcher.compute_mask_or_eos().map_err(|error| error.to_string())
    }

    /// Takes in a token; whether the answer is complete with it and nothing else may come.
    ///
    /// # Errors
    /// If the token was not allowed, with the reason for the log.
    pub(super) fn push(&mut self, token: TokenId) -> Result<bool, String> {
        self.matcher.consume_token(token.0).map_err(|error| error.to_string())?;
        Ok(self.matcher.is_stopped())
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

/// What a request asks for, and the field that a complaint names.
fn wanted(
    parts: &ChatRequestParts,
    tools: &[Tool],
) -> Result<Option<(&'static str, TopLevelGrammar)>, ChatError> {
    let (format, strict) = match &parts.format {
        OutputFormat::Text => (None, false),
        OutputFormat::JsonObject => (Some(json!({ "type": "object" })), false),
        OutputFormat::JsonSchema { schema, strict } => {
            check_schema("response_format", schema)?;
            (Some(schema.clone()), *strict)
        }
    };
    let (callable, other): (Vec<&Tool>, _) = match &parts.tool_choice {
        ToolChoice::Function(name) => {
            (tools.iter().filter(|tool| tool.name == *name).collect(), None)
        }
        ToolChoice::Required => (tools.iter().collect(), None),
        // A model that may choose is not forced, except away from texts of another form.
        ToolChoice::Auto if format.is_some() => (tools.iter().collect(), format.as_ref()),
        ToolChoice::Auto | ToolChoice::None => (Vec::new(), format.as_ref()),
    };
    if callable.is_empty() {
        let grammar =
            other.map(|schema| TopLevelGrammar::from_json_schema(enforced(schema, strict)));
        return Ok(grammar.map(|grammar| ("response_format", grammar)));
    }
    let schema = enforced(&calls(&callable, other)?, false);
    Ok(Some(("tools", TopLevelGrammar::from_json_schema(schema))))
}

/// The schema of one call of these tools, in the form that every model's calls are understood in, or of
/// `other`, if that may stand there too.
fn calls(tools: &[&Tool], other: Option<&Value>) -> Result<Value, ChatError> {
    let mut parts = serde_json::Map::new();
    let mut choices = Vec::new();
    for tool in tools {
        let none = json!({ "type": "object", "properties": {}, "additionalProperties": false });
        let parameters = tool.parameters.as_ref().unwrap_or(&none);
        check_schema("tools", parameters)?;
        let arguments = add_part(&mut parts, &an_object(parameters));
        choices.push(json!({
            "type": "object",
            "properties": { "name": { "const": tool.name }, "parameters": arguments },
            "required": ["name", "parameters"],
            "additionalProperties": false,
        }));
    }
    if let Some(other) = other {
        choices.push(add_part(&mut parts, other));
    }
    Ok(json!({ "anyOf": choices, "$defs": parts }))
}

/// Puts a schema among the parts of a larger one and returns the reference to it. Its own references, which
/// began at its root, then begin at its new place.
fn add_part(parts: &mut serde_json::Map<String, Value>, schema: &Value) -> Value {
    let key = format!("part{}", parts.len());
    let place = format!("#/$defs/{key}");
    let mut schema = schema.clone();
    move_references(&mut schema, &place);
    parts.insert(key, schema);
    json!({ "$ref": place })
}

fn move_references(value: &mut Value, place: &str) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| move_references(item, place)),
        Value::Object(keys) => {
            for (key, value) in keys {
                match value {
                    Value::String(target) if key == "$ref" && target.starts_with('#') => {
                        target.replace_range(..1, place);
                    }
                    value => move_references(value, place),
                }
            }
        }
        _ => {}
    }
}

/// Arguments are always an object, whatever the tool's schema leaves open.
fn an_object(schema: &Value) -> Value {
    match schema {
        Value::Object(keys) if !keys.contains_key("type") => {
            let mut keys = keys.clone();
            keys.insert("type".to_owned(), Value::from("object"));
            Value::Object(keys)
        }
        other => other.clone(),
    }
}

/// The schema with our own options of the compiler; a client's are dropped. Unless it is strict, what cannot be
/// expressed is ignored.
fn enforced(schema: &Value, strict: bool) -> Value {
    let mut schema = schema.clone();
    if let Value::Object(keys) = &mut schema {
        let options = json!({ "lenient": !strict, "whitespace_pattern": BLANKS });
        keys.insert("x-guidance".to_owned(), options);
    }
    schema
}

fn check_schema(param: &str, schema: &Value) -> Result<(), ChatError> {
    if !matches!(schema, Value::Object(_) | Value::Bool(_)) {
        return Err(ChatError::invalid(param, format!("{param}: a schema must be an object")));
    }
    if depth(schema) > SCHEMA_DEPTH_MAX {
        let message = format!("{param}: a schema must not be deeper than {SCHEMA_DEPTH_MAX}");
        return Err(ChatError::invalid(param, message));
    }
    let bytes = schema.to_string().len();
    if bytes > SCHEMA_BYTES_MAX {
        let message =
            format!("{param}: a schema must have at most {SCHEMA_BYTES_MAX} bytes, not {bytes}");
        return Err(ChatError::invalid(param, message));
    }
    Ok(())
}

/// Levels of nesting; the doors bound it to 128 when they parse.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(keys) => 1 + keys.values().map(depth).max().unwrap_or(0),
        _ => 1,
    }
}

fn build_factory(tokenizer: &Tokenizer) -> Result<ParserFactory, ChatError> {
    let internal = |error: &dyn fmt::Display| ChatError::Internal(format!("grammar: {error}"));
    let vocab_len = u32::try_from(tokenizer.vocab_len()).map_err(|error| internal(&error))?;
    let stops: Vec<u32> = tokenizer.stop_tokens().iter().map(|token| token.0).collect();
    let Some(first) = stops.first() else {
        let message = "this model has no token that ends an answer: its form cannot be enforced";
        return Err(ChatError::NotSupported(message.to_owned()));
    };
    let words: Vec<Vec<u8>> = (0..vocab_len).map(|token| word(tokenizer, TokenId(token))).collect();
    let trie = TokTrie::from(&TokRxInfo::new(vocab_len, *first), &words).with_eos_tokens(&stops);
    let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let mut factory = ParserFactory::new(
        &environment,
        InferenceCapabilities::default(),
        &SlicedBiasComputer::general_slices(),
    )
    .map_err(|error| internal(&error))?;
    factory.quiet();
    let limits = factory.limits_mut();
    limits.max_lexer_states = LEXER_STATES_MAX;
    limits.verbose_errors = false;
    Ok(factory)
}

/// A token's bytes; a control token is marked by a byte that no text has.
fn word(tokenizer: &Tokenizer, token: TokenId) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(token);
    match tokenizer.is_control(token) {
        true => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
        false => bytes.to_vec(),
    }
}

/// Grammars come back when the requests end that use them, which is soon.
fn no_headroom(shortfall: Shortfall) -> ChatError {
    let Shortfall { needed, free } = shortfall;
    ChatError::NoHeadroom { needed, free, retry_after: Duration::from_secs(5) }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::chat::{Input, Origin};
    use crate::engine::testing::{END, byte_tokenizer};

    fn parts() -> ChatRequestParts {
        let input = Input::Text("x".to_owned());
        ChatRequestParts::new(Origin::Terminal, "client", input, Instant::now())
    }

    fn tool(name: &str, parameters: Option<Value>) -> Tool {
        Tool { name: name.to_owned(), description: None, parameters }
    }

    /// Whether `text` is a whole answer of the request's form.
    fn accepts(parts: &ChatRequestParts, text: &str) -> bool {
        let grammars = Grammars::new(Ledger::new(Bytes(1 << 30)));
        let tokenizer = byte_tokenizer();
        let grammar = grammars.of(parts, &parts.tools, &tokenizer).expect("it can be enforced");
        let mut grammar = grammar.expect("a form is asked for");
        for byte in text.bytes() {
            let allowed = grammar.allowed().expect("no error is pending");
            if !allowed.is_allowed(byte.into()) || grammar.push(TokenId(byte.into())).is_err() {
                return false;
            }
        }
        grammar.allowed().is_ok_and(|allowed| allowed.is_allowed(END.0))
    }

    fn refusal(parts: &ChatRequestParts) -> ChatError {
        let grammars = Grammars::new(Ledger::new(Bytes(1 << 30)));
        grammars.of(parts, &parts.tools, &byte_tokenizer()).expect_err("it cannot be enforced")
    }

    #[test]
    fn any_json_object() {
        let parts = ChatRequestParts { format: OutputFormat::JsonObject, ..parts() };
        for text in ["{}", r#"{"a": [1, "b", null], "c": {}}"#, "{\n  \"a\": 1\n}"] {
            assert!(accepts(&parts, text), "{text}");
        }
        for text in ["", "[]", "{", "1", "{a: 1}", "{}x", "Sure: {}"] {
            assert!(!accepts(&parts, text), "{text}");
        }
    }

    #[test]
    fn json_of_a_schema() {
        let schema = json!({
            "type": "object",
            "properties": {
                "room": { "enum": ["hall", "kitchen"] },
                "level": { "type": "integer", "minimum": 0, "maximum": 100 },
                "next": { "$ref": "#/$defs/step" },
            },
            "required": ["room", "level"],
            "additionalProperties": false,
            "$defs": { "step": { "type": "string", "maxLength": 3 } },
        });
        let format = OutputFormat::JsonSchema { schema, strict: true };
        let parts = ChatRequestParts { format, ..parts() };
        for text in
            [r#"{"room": "hall", "level": 7}"#, r#"{"room":"kitchen","level":100,"next":"abc"}"#]
        {
            assert!(accepts(&parts, text), "{text}");
        }
        for text in [
            r#"{"room": "cellar", "level": 7}"#,
            r#"{"room": "hall", "level": 101}"#,
            r#"{"room": "hall"}"#,
            r#"{"room": "hall", "level": 7, "more": 1}"#,
            r#"{"room": "hall", "level": 7, "next": "abcd"}"#,
        ] {
            assert!(!accepts(&parts, text), "{text}");
        }
    }

    #[test]
    fn a_forced_call_names_an_offered_tool() {
        let light = json!({
            "properties": { "on": { "$ref": "#/$defs/flag" } },
            "required": ["on"],
            "additionalProperties": false,
            "$defs": { "flag": { "type": "boolean" } },
        });
        let tools = vec![tool("light.\"turn\"", Some(light)), tool("wait", None)];
        let mut parts = ChatRequestParts { tools, ..parts() };
        let light = r#"{"name": "light.\"turn\"", "parameters": {"on": true}}"#;
        let wait = r#"{"name":"wait","parameters":{}}"#;
        parts.tool_choice = ToolChoice::Required;
        assert!(accepts(&parts, light) && accepts(&parts, wait));
        for text in [
            r#"{"name": "other", "parameters": {}}"#,
            r#"{"name": "wait", "parameters": {"x": 1}}"#,
            r#"{"name": "light.\"turn\"", "parameters": {}}"#,
            r#"{"name": "light.\"turn\"", "parameters": {"on": 1}}"#,
            "hello",
        ] {
            assert!(!accepts(&parts, text), "{text}");
        }
        parts.tool_choice = ToolChoice::Function("wait".to_owned());
        assert!(accepts(&parts, wait) && !accepts(&parts, light));
        parts.tool_choice = ToolChoice::Auto;
        parts.format = OutputFormat::JsonObject;
        assert!(accepts(&parts, wait) && accepts(&parts, r#"{"answer": 1}"#));
        assert!(!accepts(&parts, "hello"));
    }

    #[test]
    fn any_text_needs_no_grammar_and_no_tables() {
        let ledger = Ledger::new(Bytes(0));
        let grammars = Grammars::new(Arc::clone(&ledger));
        let parts = ChatRequestParts { tools: vec![tool("wait", None)], ..parts() };
        let grammar = grammars.of(&parts, &parts.tools, &byte_tokenizer());
        assert!(matches!(grammar, Ok(None)), "{grammar:?}");
        let parts = ChatRequestParts { format: OutputFormat::JsonObject, ..parts };
        let refused = grammars.of(&parts, &[], &byte_tokenizer());
        assert!(matches!(refused, Err(ChatError::NoHeadroom { .. })), "{refused:?}");
        assert_eq!(ledger.promised(), Bytes(0));
    }

    #[test]
    fn grammars_are_paid_for() {
        let ledger = Ledger::new(Bytes(1 << 30));
        let grammars = Grammars::new(Arc::clone(&ledger));
        let parts = ChatRequestParts { format: OutputFormat::JsonObject, ..parts() };
        let grammar = grammars.of(&parts, &[], &byte_tokenizer()).expect("it fits");
        let tables = 259 * TABLE_BYTES_PER_TOKEN;
        assert_eq!(ledger.promised(), Bytes(tables + GRAMMAR_BYTES.0));
        drop(grammar);
        assert_eq!(ledger.promised(), Bytes(tables));
        drop(grammars);
        assert_eq!(ledger.promised(), Bytes(0));
    }

    #[test]
    fn evil_schemas_are_refused() {
        let schema = |schema: Value, strict| ChatRequestParts {
            format: OutputFormat::JsonSchema { schema, strict },
            ..parts()
        };
        let mut deep = json!({ "type": "string" });
        for _ in 0..100 {
            deep = json!({ "type": "array", "items": deep });
        }
        let long = json!({ "enum": vec!["a long text again and again"; 5000] });
        for evil in [
            json!("text"),
            json!({ "type": "nonsense" }),
            json!({ "type": "string", "pattern": "(" }),
            json!({ "$ref": "#/$defs/missing" }),
            json!({ "$ref": "http://example.com/schema.json" }),
            json!({ "type": "object", "x-guidance": 7, "required": 7 }),
            deep,
            long,
        ] {
            let refused = refusal(&schema(evil.clone(), true));
            let named = matches!(&refused, ChatError::Invalid { param: Some(param), .. }
                if param == "response_format");
            assert!(named, "{evil} gave {refused:?}");
            assert!(refused.to_string().len() < 500, "{refused}");
        }
        // What cannot be expressed matters only if the client is strict about it.
        let odd = json!({ "type": "object", "not": { "required": ["a"] } });
        assert!(matches!(refusal(&schema(odd.clone(), true)), ChatError::Invalid { .. }));
        assert!(accepts(&schema(odd, false), "{}"));
    }
}
