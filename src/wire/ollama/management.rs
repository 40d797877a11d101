//! `/api/pull` and `/api/delete`, and installed models in `/api/tags`.

use serde::Deserialize;
use serde_json::json;

use super::super::json::{parse, write};
use super::super::lenient::Object;
use crate::chat::ChatError;

/// What a body of `/api/pull` wants.
#[derive(Debug, PartialEq, Eq)]
pub struct PullAsked {
    /// As the client wrote it.
    pub model: String,
    /// Progress as it comes, or one answer at the end.
    pub stream: bool,
}

#[derive(Deserialize)]
struct PullBody {
    model: Option<String>,
    name: Option<String>,
    stream: Option<bool>,
}

/// Reads a body of `/api/pull`. `insecure` is ignored: what is checked is not the client's choice.
///
/// # Errors
/// `Invalid`, naming the field.
pub fn pull_asked(body: &[u8]) -> Result<PullAsked, ChatError> {
    let Object(body): Object<PullBody> = parse(body)?;
    let model = body.model.filter(|name| !name.is_empty()).or(body.name).unwrap_or_default();
    if model.is_empty() {
        return Err(ChatError::invalid("model", "model is required"));
    }
    Ok(PullAsked { model, stream: body.stream.unwrap_or(true) })
}

/// A line of progress without numbers; the last one of all is `success`.
pub fn status_line(status: &str) -> Vec<u8> {
    line(&json!({ "status": status }))
}

/// A line of progress: `completed` of `total` bytes of the file with this SHA-256.
pub fn progress_line(sha256: &str, total: u64, completed: u64) -> Vec<u8> {
    let short = sha256.get(..12).unwrap_or(sha256);
    line(&json!({
        "status": format!("pulling {short}"),
        "digest": format!("sha256:{sha256}"),
        "total": total,
        "completed": completed,
    }))
}

fn line(value: &serde_json::Value) -> Vec<u8> {
    let mut line = write(value);
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_ask() {
        let asked = |body: &str| pull_asked(body.as_bytes()).ok();
        let wanted = |stream| Some(PullAsked { model: "a/b:Q4_0".to_owned(), stream });
        assert_eq!(asked(r#"{"model":"a/b:Q4_0"}"#), wanted(true));
        assert_eq!(asked(r#"{"name":"a/b:Q4_0","stream":false,"insecure":true}"#), wanted(false));
        assert_eq!(asked("{}"), None);
        assert_eq!(asked(r#"{"model":""}"#), None);
    }

    #[test]
    fn lines_are_what_clients_read() {
        let text = String::from_utf8(progress_line(&"ab".repeat(32), 10, 3)).unwrap();
        let digest = format!("sha256:{}", "ab".repeat(32));
        let expected = json!({
            "status": "pulling abababababab", "digest": digest, "total": 10, "completed": 3,
        });
        assert_eq!(text, format!("{expected}\n"));
    }
}
