//! Other servers as backends: scoutd, Ollama and whatever speaks the OpenAI protocol.
//!
//! A [`Pool`] holds the members; each is a [`Peer`], which sends one validated request out as the JSON of another
//! server's API and reads what comes back as events. Every way that can fail becomes a
//! [`Fault`](crate::chat::Fault) with its reason; no status code leaves this module. Members are reached on the
//! LAN only, unless the owner allows more twice.

mod answer;
mod call;
mod config;
mod discovery;
mod frames;
mod health;
mod member;
mod pool;
mod score;
mod trust;

pub use config::{Config, Kind, MemberConfig, Strength};
pub use discovery::{Announced, Discovery, DiscoveryError};
pub use frames::{FRAME_BYTES_MAX, Frames, Framing, TooLarge, WIRE_BYTES_MAX};
pub use member::{Peer, Scoring, Snapshot, Standing};
pub use pool::{Announcement, Pool, PoolError, PoolParts};
pub use trust::{
    AUTH_HEADER, BOOT_HEADER, Gate, KeyFault, PROOF_HEADER, PoolKey, Signed, Signer, Unproven,
};
