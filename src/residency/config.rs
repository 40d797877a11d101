//! What the operator may set.

use serde::Deserialize;

use super::{Ahead, Policy, SlotsOptions};
use crate::units::Bytes;

/// How a model that is larger than memory is kept.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Bytes of expert slots instead of what the plan finds room for. Set, it streams even a model that would fit.
    pub expert_slots_bytes: Option<u64>,
    /// Which expert goes when another needs its slot.
    pub eviction: Policy,
    /// Whether the next layer's likely expert is read while the disk is idle.
    pub read_ahead: Ahead,
    /// Threads that read experts.
    pub read_threads: usize,
    /// Whether experts are read past the page cache, where the file system can.
    pub direct: bool,
    /// Whether weights and slots of a streamed model are locked in memory, where the system allows it.
    pub lock: bool,
}

impl Default for Config {
    fn default() -> Config {
        let options = SlotsOptions::default();
        Config {
            expert_slots_bytes: None,
            eviction: options.policy,
            read_ahead: options.ahead,
            read_threads: options.threads,
            direct: options.direct,
            lock: options.lock,
        }
    }
}

impl Config {
    /// Everything wrong with it; empty is right.
    pub fn check(&self) -> Vec<String> {
        if (1..=16).contains(&self.read_threads) {
            return Vec::new();
        }
        vec![format!("residency.read_threads must be between 1 and 16, not {}", self.read_threads)]
    }

    /// The same for slots of `slots` bytes.
    pub fn slots_options(&self, slots: Bytes) -> SlotsOptions {
        SlotsOptions {
            slots_bytes: slots,
            threads: self.read_threads,
            direct: self.direct,
            policy: self.eviction,
            lock: self.lock,
            ahead: self.read_ahead,
            ..SlotsOptions::default()
        }
    }
}
