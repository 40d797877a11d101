//! Refusals as HTTP: the one place where errors get their status.

use std::time::Duration;

use actix_web::http::StatusCode;
use actix_web::http::header::{ALLOW, CONNECTION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use actix_web::{HttpResponse, HttpResponseBuilder};

use crate::chat::{ChatError, MemberState};
use crate::peer::BOOT_HEADER;
use crate::wire::openai::ErrorBody;
use crate::wire::{ollama, write};

/// In which words a client wants its errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    Ollama,
    OpenAi,
}

/// An answer that is a refusal.
#[derive(Debug)]
pub(super) struct Problem {
    status: StatusCode,
    body: Box<ErrorBody>,
    /// The text for Ollama's clients, where it differs.
    ollama: Option<Box<str>>,
    /// When repeating it may help; `None`: never.
    retry_after: Option<Duration>,
    allow: Option<&'static str>,
    /// What another node needs to prove its key.
    boot_id: Option<String>,
    closes: bool,
    /// One word for metrics.
    reason: &'static str,
    /// Whoever said no has counted it.
    counted: bool,
}

impl Problem {
    pub(super) fn new(status: StatusCode, kind: &'static str, message: &str) -> Problem {
        Problem {
            status,
            body: Box::new(ErrorBody::new(kind, None, message)),
            ollama: None,
            retry_after: None,
            allow: None,
            boot_id: None,
            closes: false,
            reason: "invalid",
            counted: false,
        }
    }

    pub(super) fn bad_request(message: &str) -> Problem {
        Problem::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    pub(super) fn unauthorized() -> Problem {
        Problem {
            reason: "forbidden",
            ..Problem::new(
                StatusCode::UNAUTHORIZED,
                "authentication_error",
                "a valid key is needed: Authorization: Bearer …",
            )
        }
    }

    /// Another node's proof is missing or does not hold; with `boot_id` it can make another.
    pub(super) fn unproven(boot_id: &str) -> Problem {
        Problem {
            reason: "forbidden",
            boot_id: Some(boot_id.to_owned()),
            ..Problem::new(
                StatusCode::UNAUTHORIZED,
                "authentication_error",
                "the pool key's proof is missing or does not hold",
            )
        }
    }

    pub(super) fn other_digest() -> Problem {
        let message = "the model of this name has another digest";
        Problem::new(StatusCode::CONFLICT, "invalid_request_error", message)
    }

    pub(super) fn no_such_receipt() -> Problem {
        let message = "there is no receipt of this id; only the last ones are kept";
        Problem::new(StatusCode::NOT_FOUND, "not_found_error", message)
    }

    pub(super) fn no_such_member() -> Problem {
        Problem::new(StatusCode::NOT_FOUND, "not_found_error", "there is no such member")
    }

    pub(super) fn forbidden(message: &str) -> Problem {
        Problem {
            reason: "forbidden",
            ..Problem::new(StatusCode::FORBIDDEN, "permission_error", message)
        }
    }

    pub(super) fn no_such_path() -> Problem {
        Problem::new(StatusCode::NOT_FOUND, "not_found_error", "there is no such path")
    }

    pub(super) fn method_not_allowed(allow: &'static str) -> Problem {
        Problem {
            allow: Some(allow),
            ..Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "invalid_request_error",
                "this path does not take this method",
            )
        }
    }

    pub(super) fn not_implemented(what: &str) -> Problem {
        Problem {
            reason: "not_supported",
            ..Problem::new(StatusCode::NOT_IMPLEMENTED, "not_supported_error", what)
        }
    }

    pub(super) fn loading() -> Problem {
        Problem {
            retry_after: Some(Duration::from_secs(2)),
            reason: "loading",
            ..Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "unavailable_error",
                "the model is still loading",
            )
        }
    }

    pub(super) fn body_too_large(limit: usize) -> Problem {
        let message = format!("the request body has more than {limit} bytes");
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", &message).closing()
    }

    pub(super) fn head_too_large(limit: usize) -> Problem {
        let message = format!("the request's headers have more than {limit} bytes");
        let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        Problem::new(status, "invalid_request_error", &message).closing()
    }

    pub(super) fn body_too_slow() -> Problem {
        let message = "the request body did not arrive in time";
        Problem::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message).closing()
    }

    pub(super) fn too_many_bodies() -> Problem {
        Problem {
            retry_after: Some(Duration::from_secs(1)),
            reason: "no_headroom",
            ..Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "unavailable_error",
                "too many large requests at once",
            )
        }
        .closing()
    }

    pub(super) fn encoded_body() -> Problem {
        let message = "compressed request bodies are not accepted";
        Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message)
    }

    /// The connection ends with this answer: what follows on it cannot be trusted to be a request.
    fn closing(mut self) -> Problem {
        self.closes = true;
        self
    }

    /// A refusal that comes from the backend, which counts its own.
    pub(super) fn of_backend(error: ChatError) -> Problem {
        Problem { counted: true, ..Problem::from(error) }
    }

    /// Whether the door has to count it.
    pub(super) fn is_the_doors(&self) -> bool {
        !self.counted
    }

    /// One word for metrics.
    pub(super) fn reason(&self) -> &'static str {
        self.reason
    }

    /// As the client reads it.
    pub(super) fn response(&self, dialect: Dialect) -> HttpResponse {
        let body = match dialect {
            Dialect::OpenAi => write(&self.body.json()),
            Dialect::Ollama => {
                ollama::error_line(self.ollama.as_deref().unwrap_or(&self.body.message))
            }
        };
        let mut response = HttpResponseBuilder::new(self.status);
        response.insert_header((CONTENT_TYPE, "application/json"));
        match self.retry_after {
            Some(after) => {
                response.insert_header((RETRY_AFTER, retry_seconds(after).to_string()));
            }
            // The openai client repeats 408, 409, 429 and every 5xx by itself unless told not to.
            None => {
                response.insert_header(("x-should-retry", "false"));
            }
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.insert_header((WWW_AUTHENTICATE, "Bearer"));
        }
        if let Some(boot_id) = &self.boot_id {
            response.insert_header((BOOT_HEADER, boot_id.as_str()));
        }
        if let Some(allow) = self.allow {
            response.insert_header((ALLOW, allow));
        }
        if self.closes {
            response.insert_header((CONNECTION, "close"));
            response.force_close();
        }
        response.body(body)
    }
}

impl From<ChatError> for Problem {
    fn from(error: ChatError) -> Problem {
        if let ChatError::Internal(text) = &error {
            log::error!(target: "rest", text; "internal error");
        }
        Problem {
            status: status(&error),
            ollama: Some(ollama::error_text(&error).into()),
            retry_after: error.retry_after(),
            allow: None,
            boot_id: None,
            closes: false,
            reason: error.code(),
            counted: false,
            body: Box::new(ErrorBody::from(&error)),
        }
    }
}

fn status(error: &ChatError) -> StatusCode {
    match error {
        ChatError::Invalid { .. } | ChatError::ContextTooLong { .. } => StatusCode::BAD_REQUEST,
        ChatError::DigestDiffers => StatusCode::CONFLICT,
        ChatError::UnknownModel(_) => StatusCode::NOT_FOUND,
        ChatError::NotSupported(_) => StatusCode::NOT_IMPLEMENTED,
        ChatError::QueueFull { .. } => StatusCode::TOO_MANY_REQUESTS,
        ChatError::NoHeadroom { .. }
        | ChatError::DeadlineUnmeetable { .. }
        | ChatError::Draining { .. } => StatusCode::SERVICE_UNAVAILABLE,
        ChatError::Upstream(fault) => match fault.reason.state() {
            MemberState::Timeout => StatusCode::GATEWAY_TIMEOUT,
            _ if fault.retry_after().is_some() => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::BAD_GATEWAY,
        },
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl Problem {
    /// Ollama's clients know fewer statuses: what is not supported is 400 there, and a full queue 503.
    pub(super) fn in_dialect(mut self, dialect: Dialect) -> Problem {
        if dialect == Dialect::Ollama && self.ollama.is_some() {
            self.status = match self.status {
                StatusCode::NOT_IMPLEMENTED => StatusCode::BAD_REQUEST,
                StatusCode::TOO_MANY_REQUESTS => StatusCode::SERVICE_UNAVAILABLE,
                other => other,
            };
        }
        self
    }
}

/// Whole seconds between 1 and 120; above that clients give up instead of waiting.
fn retry_seconds(after: Duration) -> u64 {
    (after.as_secs() + u64::from(after.subsec_nanos() > 0)).clamp(1, 120)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::{Fault, FaultReason, ModelName};
    use crate::units::Bytes;

    #[test]
    fn every_error_has_its_status_and_advice() {
        let after = Duration::from_millis(1500);
        let upstream = |reason| ChatError::Upstream(Fault::new(reason));
        let cases = [
            (ChatError::invalid("n", "n is wrong"), 400, 400, None),
            (ChatError::UnknownModel(ModelName::new("x")), 404, 404, None),
            (ChatError::ContextTooLong { prompt: 9, context: 8 }, 400, 400, None),
            (ChatError::NotSupported("no".into()), 501, 400, None),
            (
                ChatError::NoHeadroom { needed: Bytes(2), free: Bytes(1), retry_after: after },
                503,
                503,
                Some("2"),
            ),
            (ChatError::QueueFull { retry_after: Duration::ZERO }, 429, 503, Some("1")),
            (ChatError::DeadlineUnmeetable { needs: after }, 503, 503, None),
            (ChatError::Draining { retry_after: Duration::from_secs(900) }, 503, 503, Some("120")),
            (ChatError::Internal("secret".into()), 500, 500, None),
            (upstream(FaultReason::ConnectRefused), 502, 502, None),
            (upstream(FaultReason::Stall), 504, 504, None),
            (upstream(FaultReason::NoQuorum), 503, 503, Some("2")),
            (ChatError::Upstream(Fault::busy(Duration::from_secs(7))), 503, 503, Some("7")),
        ];
        for (error, openai, ollama, retry) in cases {
            for (dialect, status) in [(Dialect::OpenAi, openai), (Dialect::Ollama, ollama)] {
                let problem = Problem::from(error.clone()).in_dialect(dialect);
                let response = problem.response(dialect);
                assert_eq!(response.status().as_u16(), status, "{error}");
                let header =
                    |name| response.headers().get(name).map(|value| value.to_str().expect("ASCII"));
                assert_eq!(header("retry-after"), retry, "{error}");
                assert_eq!(header("x-should-retry"), retry.is_none().then_some("false"), "{error}");
            }
        }
    }
}
