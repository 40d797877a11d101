//! scoutd: a resident language model for the house.
//!
//! The modules stand lowest first; a module uses only modules above it in this list, so circles cannot
//! exist. `tests/it/tidy.rs` holds the table of who may use whom, `docs/ARCHITECTURE.md` explains it.

#![deny(unsafe_code)]

pub mod units;

pub mod metrics;

pub mod gguf;

pub mod tokenizer;

pub mod chat;

pub mod template;

pub mod memory;

pub mod egress;

pub mod residency;

pub mod model;

pub mod store;

pub mod engine;

pub mod wire;

pub mod peer;

pub mod fusion;

pub mod rest;

pub mod mqtt;

pub mod convert;

pub mod config;

pub mod daemon;

pub mod cli;
