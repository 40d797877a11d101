//! The OpenAI dialect: `/v1/chat/completions`, `/v1/completions`, `/v1/models`, and the body of MQTT requests.

mod answer;
mod chat;
mod completion;
mod error;
mod models;

pub(super) use answer::token_logprob;
pub use answer::{ChatWriter, Head, chat_reply, timings, usage};
pub use chat::ChatBody;
pub(super) use chat::seed;
pub use completion::{CompletionBody, CompletionWriter, Echo, completion_reply};
pub use error::ErrorBody;
pub use models::{health, loading, model, models, props, ready};

/// Choices of one request.
pub const CHOICES_MAX: usize = 4;

/// Prompts of one request for completions.
pub const PROMPTS_MAX: usize = 128;

#[cfg(test)]
mod tests;
