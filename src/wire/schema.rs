//! Bounds on JSON schemas, and the forms in which clients ask for structured output.

use serde_json::Value;

use crate::chat::{ChatError, OutputFormat};

/// Bytes of one schema, one tool's parameters or one call's arguments.
pub(super) const BYTES_MAX: usize = 64 * 1024;

/// How deep a schema may nest.
const DEPTH_MAX: usize = 32;

/// A schema that is an object of bearable depth.
pub(super) fn checked(field: &str, schema: Value) -> Result<Value, ChatError> {
    if !schema.is_object() {
        return Err(ChatError::invalid(field, format!("{field} must be an object")));
    }
    if depth(&schema) > DEPTH_MAX {
        let message = format!("{field} nests deeper than {DEPTH_MAX}");
        return Err(ChatError::invalid(field, message));
    }
    Ok(schema)
}

/// OpenAI's `response_format`, and llama-server's `schema` beside `type`.
pub(super) fn response_format(value: Value) -> Result<OutputFormat, ChatError> {
    const FIELD: &str = "response_format";
    let Value::Object(mut format) = value else {
        return Err(ChatError::invalid(FIELD, "response_format must be an object"));
    };
    let schema = format.remove("schema").filter(|schema| !schema.is_null());
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(OutputFormat::Text),
        Some("json_object") => match schema {
            Some(schema) => enforced("response_format.schema", schema, false),
            None => Ok(OutputFormat::JsonObject),
        },
        Some("json_schema") => {
            let (schema, strict) = match format.remove("json_schema") {
                Some(Value::Object(mut named)) => (
                    named.remove("schema").filter(|schema| !schema.is_null()).or(schema),
                    named.get("strict").and_then(Value::as_bool).unwrap_or(false),
                ),
                _ => (schema, false),
            };
            let field = "response_format.json_schema.schema";
            match schema {
                Some(schema) => enforced(field, schema, strict),
                None => Err(ChatError::invalid(field, format!("{field} is missing"))),
            }
        }
        _ => Err(ChatError::invalid(
            FIELD,
            "response_format.type must be \"text\", \"json_object\" or \"json_schema\"",
        )),
    }
}

/// Ollama's `format`.
pub(super) fn ollama_format(value: Value) -> Result<OutputFormat, ChatError> {
    match value {
        Value::Null => Ok(OutputFormat::Text),
        Value::String(name) if name.is_empty() => Ok(OutputFormat::Text),
        Value::String(name) if name == "json" => Ok(OutputFormat::JsonObject),
        schema @ Value::Object(_) => enforced("format", schema, false),
        _ => Err(ChatError::invalid("format", "format must be \"json\" or a JSON schema")),
    }
}

fn enforced(field: &str, schema: Value, strict: bool) -> Result<OutputFormat, ChatError> {
    Ok(OutputFormat::JsonSchema { schema: checked(field, schema)?, strict })
}

/// Recursion is bounded by the depth that [`super::json::parse`] lets through.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(fields) => 1 + fields.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_form_of_response_format() {
        let schema = json!({"type": "object"});
        let enforced =
            |strict| Ok(OutputFormat::JsonSchema { schema: json!({"type": "object"}), strict });
        let cases = [
            (json!({"type": "text"}), Ok(OutputFormat::Text)),
            (json!({"type": "json_object"}), Ok(OutputFormat::JsonObject)),
            (json!({"type": "json_object", "schema": schema}), enforced(false)),
            (json!({"type": "json_schema", "schema": schema}), enforced(false)),
            (
                json!({"type": "json_schema", "json_schema": {"schema": schema, "strict": true}}),
                enforced(true),
            ),
            (json!("json"), Err("response_format must be an object")),
            (
                json!({"type": "xml"}),
                Err("response_format.type must be \"text\", \"json_object\" or \"json_schema\""),
            ),
            (
                json!({"type": "json_schema", "json_schema": {"name": "x"}}),
                Err("response_format.json_schema.schema is missing"),
            ),
            (
                json!({"type": "json_schema", "json_schema": {"schema": [1]}}),
                Err("response_format.json_schema.schema must be an object"),
            ),
        ];
        for (value, expected) in cases {
            let got = response_format(value.clone()).map_err(|error| error.to_string());
            assert_eq!(got, expected.map_err(str::to_owned), "{value}");
        }
    }

    #[test]
    fn deep_schemas_are_refused() {
        let deep = (0..40).fold(json!({}), |inner, _| json!({ "items": inner }));
        let error = ollama_format(deep).expect_err("too deep").to_string();
        assert_eq!(error, "format nests deeper than 32");
        assert!(ollama_format(json!(5)).is_err());
    }
}
