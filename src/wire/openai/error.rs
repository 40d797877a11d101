//! Errors as OpenAI clients read them.

use serde_json::{Map, Value};

use crate::chat::ChatError;

/// The inside of `{"error": {…}}`: always an object, since clients index into it.
#[derive(Clone, Debug, PartialEq)]
pub struct ErrorBody {
    /// For people.
    pub message: String,
    /// The error's family.
    pub kind: &'static str,
    /// The field it concerns.
    pub param: Option<String>,
    /// For programs.
    pub code: Option<&'static str>,
    /// Further numbers, as llama-server's clients expect them.
    pub numbers: Vec<(&'static str, u64)>,
}

impl ErrorBody {
    /// An error that concerns no field.
    pub fn new(kind: &'static str, code: Option<&'static str>, message: &str) -> ErrorBody {
        ErrorBody { message: message.to_owned(), kind, param: None, code, numbers: Vec::new() }
    }

    /// The whole body.
    pub fn json(&self) -> Value {
        let mut inner = Map::new();
        inner.insert("message".to_owned(), self.message.as_str().into());
        inner.insert("type".to_owned(), self.kind.into());
        inner.insert("param".to_owned(), self.param.as_deref().into());
        inner.insert("code".to_owned(), self.code.into());
        for &(name, number) in &self.numbers {
            inner.insert(name.to_owned(), number.into());
        }
        serde_json::json!({ "error": inner })
    }
}

impl From<&ChatError> for ErrorBody {
    fn from(error: &ChatError) -> ErrorBody {
        let (kind, code) = match error {
            ChatError::Invalid { .. } => ("invalid_request_error", None),
            ChatError::DigestDiffers => ("conflict_error", Some("digest_differs")),
            ChatError::UnknownModel(_) => ("not_found_error", Some("model_not_found")),
            ChatError::ContextTooLong { .. } => {
                ("exceed_context_size_error", Some("context_length_exceeded"))
            }
            ChatError::NotSupported(_) => ("not_supported_error", Some("not_supported")),
            ChatError::QueueFull { .. } => ("rate_limit_error", Some("queue_full")),
            ChatError::NoHeadroom { .. } => ("unavailable_error", Some("no_headroom")),
            ChatError::DeadlineUnmeetable { .. } => ("unavailable_error", Some("deadline")),
            ChatError::Draining { .. } => ("unavailable_error", Some("draining")),
            ChatError::Upstream(_) => ("unavailable_error", Some("upstream")),
            _ => ("server_error", Some("internal")),
        };
        let mut body = ErrorBody::new(kind, code, &error.public_message());
        match error {
            ChatError::Invalid { param, .. } => body.param = param.clone(),
            ChatError::UnknownModel(_) => body.param = Some("model".to_owned()),
            ChatError::ContextTooLong { prompt, context } => {
                body.numbers =
                    vec![("n_prompt_tokens", (*prompt).into()), ("n_ctx", (*context).into())];
            }
            _ => {}
        }
        body
    }
}
