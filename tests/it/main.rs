//! The integration tests: one binary against the library and the real server.

mod mqtt;
mod tidy;
mod tokenizers;
