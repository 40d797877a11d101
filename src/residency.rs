//! Which bytes of a model stay in memory, which are cached, and which are read from disk when they are needed.

mod plan;

pub use plan::{ExpertLayer, Needs, Parts, Plan, Refusal, STAGING_EXPERTS, Streaming, plan};
