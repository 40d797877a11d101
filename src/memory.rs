//! How much memory is left, and who holds what.
//!
//! [`ProcProbe`] reads the kernel, [`headroom`] says what of it may still be promised, the [`Ledger`] promises
//! it as [`Permit`]s before the memory exists, and the [`Watch`] keeps the three in step. The [`Ladder`] says how
//! tight memory is; who holds some reads that from the [`Conditions`] and acts on it.

mod alarm;
mod board;
mod conditions;
mod headroom;
mod heat;
mod ledger;
mod pressure;
mod probe;
mod survey;
mod watch;

use serde::Deserialize;

pub use conditions::{Conditions, Loading};
pub use headroom::{Holdings, headroom};
pub use ledger::{Holder, Ledger, Permit, Purpose, Shortfall};
pub use pressure::{Cause, Change, Ladder, Reading, Room, Rung};
pub use probe::{MemoryProbe, MemorySample, Pressure, ProcProbe, Reclaim, Stall};
pub use survey::{Finding, Verdict, missing, survey};
pub use watch::{Watch, WatchParts};

/// What the operator may set.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Share of the total memory that is never promised, in percent. It is what other programs of the house
    /// can take before pages of ours are at stake.
    pub keep_free_percent: f64,
    /// Time between two samples.
    pub sample_ms: u64,
}

impl Default for Config {
    fn default() -> Config {
        Config { keep_free_percent: 7.0, sample_ms: 1000 }
    }
}

impl Config {
    /// Everything wrong with it; empty is right.
    pub fn check(&self) -> Vec<String> {
        let mut errors = Vec::new();
        if !(0.0..=90.0).contains(&self.keep_free_percent) {
            errors.push(format!(
                "memory.keep_free_percent must be between 0 and 90, not {}",
                self.keep_free_percent
            ));
        }
        if !(100..=60_000).contains(&self.sample_ms) {
            errors.push(format!(
                "memory.sample_ms must be between 100 and 60000, not {}",
                self.sample_ms
            ));
        }
        errors
    }
}
