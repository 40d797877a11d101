//! The integration tests: one binary against the library and the real server.

mod tidy;
mod tokenizers;
