//! JSON shapes of the doors, and nothing else.
//!
//! Requests come in leniently (integers may be floats, `null` means absent, unknown fields are ignored, any
//! field may be missing) and leave as [`ChatRequestParts`](crate::chat::ChatRequestParts); events leave as
//! bytes through one writer that keeps every line one line for every client. No other module knows a field's
//! name, and this one knows no status code and no topic.

mod answer;
mod fusion;
mod json;
mod lenient;
mod message;
pub mod mqtt;
pub mod ollama;
pub mod openai;
mod schema;
mod time;
pub mod upstream;

pub use answer::{Caller, StreamWriter};
pub use json::{DEPTH_MAX, parse, write};
pub use message::check_model_name;
pub use time::{KeepAlive, rfc3339};
