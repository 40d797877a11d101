//! Why a request was refused or broke off.

use std::time::Duration;

use super::{Fault, ModelName};
use crate::units::Bytes;

/// Every way a request can fail; each door maps it once, with whether to retry and when.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The client has gone; nobody reads this.
    #[error("cancelled")]
    Cancelled,
    /// Prompt and asked-for output do not fit the model's (or the request's own) context.
    #[error("prompt of {prompt} tokens exceeds the context of {context}")]
    ContextTooLong {
        /// Tokens of the prompt.
        prompt: u32,
        /// Tokens that fit.
        context: u32,
    },
    /// At the measured speed the first token would come after the deadline.
    #[error("deadline cannot be met: the answer needs about {needs:.1?}")]
    DeadlineUnmeetable {
        /// The predicted time to the first token.
        needs: Duration,
    },
    /// Another file is loaded than the one that was asked for.
    #[error("the model's digest differs")]
    DigestDiffers,
    /// The daemon is shutting down.
    #[error("shutting down")]
    Draining {
        /// When a restarted daemon probably answers.
        retry_after: Duration,
    },
    /// Our own fault. The text is for the log; clients see only `internal error` and the request's id.
    #[error("internal error: {0}")]
    Internal(String),
    /// The request contradicts itself or the API.
    #[error("{message}")]
    Invalid {
        /// What is wrong, naming the field.
        message: String,
        /// The field, as clients write it.
        param: Option<String>,
    },
    /// The request's worst case does not fit beside what is already promised.
    #[error("no headroom: needs {needed}, {free} can be promised")]
    NoHeadroom {
        /// Bytes of the worst case.
        needed: Bytes,
        /// Bytes that could be promised now.
        free: Bytes,
        /// When running requests will probably have given enough back.
        retry_after: Duration,
    },
    /// The model or this daemon cannot do that at all.
    #[error("{0}")]
    NotSupported(String),
    /// All slots are taken and the waiting line is full.
    #[error("queue full")]
    QueueFull {
        /// When a place will probably be free.
        retry_after: Duration,
    },
    /// No backend answers to this name.
    #[error("model \"{0}\" not found")]
    UnknownModel(ModelName),
    /// Another server failed while answering for us.
    #[error("upstream failed: {0}")]
    Upstream(Fault),
}

impl ChatError {
    /// An [`ChatError::Invalid`] that names `param`.
    pub fn invalid(param: &str, message: impl Into<String>) -> ChatError {
        ChatError::Invalid { message: message.into(), param: Some(param.to_owned()) }
    }

    /// When the same request may succeed; `None` if repeating it is useless.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            ChatError::Draining { retry_after }
            | ChatError::NoHeadroom { retry_after, .. }
            | ChatError::QueueFull { retry_after } => Some(*retry_after),
            ChatError::Upstream(fault) => fault.retry_after(),
            _ => None,
        }
    }

    /// One word for metrics, logs and the MQTT door.
    pub fn code(&self) -> &'static str {
        match self {
            ChatError::Cancelled => "cancelled",
            ChatError::ContextTooLong { .. } => "context_too_long",
            ChatError::DeadlineUnmeetable { .. } => "deadline",
            ChatError::DigestDiffers => "digest_differs",
            ChatError::Draining { .. } => "draining",
            ChatError::Internal(_) => "internal",
            ChatError::Invalid { .. } => "invalid",
            ChatError::NoHeadroom { .. } => "no_headroom",
            ChatError::NotSupported(_) => "not_supported",
            ChatError::QueueFull { .. } => "queue_full",
            ChatError::UnknownModel(_) => "unknown_model",
            ChatError::Upstream(_) => "upstream",
        }
    }

    /// What a client may read: the message, except where it could tell something about our insides.
    pub fn public_message(&self) -> String {
        match self {
            ChatError::Internal(_) => "internal error".to_owned(),
            other => other.to_string(),
        }
    }
}
