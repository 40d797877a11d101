//! The integration tests: one binary against the library and the real server.

mod certificate;
mod checkpoint;
mod config;
mod convert;
mod convert_scout;
mod daemon;
mod doubles;
mod egress;
mod engine;
mod http;
mod hub;
mod mqtt;
mod peer;
mod plan;
mod rest;
mod smollm2;
mod smollm2_text;
mod templates;
mod tidy;
mod tokenizers;
