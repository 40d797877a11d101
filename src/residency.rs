//! Which bytes of a model stay in memory, which are cached, and which are read from disk when they are needed.
//!
//! [`plan`](plan()) decides, [`pager`] asks the kernel to lock, populate and drop pages. [`ExpertSlots`] keeps the
//! routed experts of a model that is larger than memory: as many as there is room for, the others arrive by large
//! reads on threads of their own, so that whoever computes waits for a disk and never for a page fault.

mod config;
mod keeper;
pub mod pager;
mod pinned;
mod plan;
mod policy;
mod readers;
mod slots;
mod source;
mod trace;

pub use config::Config;
pub use keeper::Keeper;
pub use pinned::Pinned;
pub use plan::{ExpertLayer, Needs, Parts, Plan, Refusal, STAGING_EXPERTS, Streaming, plan};
pub use policy::{HALF_LIFE_TURNS, Policy, best_hits, replay};
pub use slots::{
    Ahead, ExpertSlots, ExpertStream, LayerFile, PARTS, PartFile, SlotStats, SlotsError,
    SlotsOptions, Step,
};
pub use source::ReadError;
pub use trace::{HitReport, LayerReport, Route, TraceReport, report};
