//! The Ollama dialect: `/api/*`.

mod answer;
mod context;
mod listing;
mod management;
mod request;

pub use answer::{LineWriter, Shape, error_line, error_text, loaded, reply};
pub use listing::{model_name, ps, show, tags, version};
pub use management::{PullAsked, progress_line, pull_asked, status_line};
pub use request::{ChatBody, GenerateBody, Work};

#[cfg(test)]
mod tests;
