//! What the engine does about tight memory and heat, and how it is undone. Each act is counted and logged.

use log::{info, warn};

use super::{Engine, SchedulerLimits};
use crate::memory::Rung;

/// What has been done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Heeded {
    rung: Rung,
    hot: bool,
}

impl Heeded {
    /// Whether nothing may run: memory is as good as gone.
    pub(super) fn is_paused(self) -> bool {
        self.rung == Rung::Critical
    }

    /// Whether kept prefixes may become more.
    pub(super) fn may_keep_more(self) -> bool {
        self.rung == Rung::Green
    }

    /// Whether prefixes are kept at all.
    pub(super) fn may_keep(self) -> bool {
        self.rung < Rung::Orange
    }
}

/// Prompts are read in pieces of this share where memory is tight or the processor hot: pages then come to be
/// touched in smaller steps, and a pause takes hold sooner.
const SMALLER: usize = 4;

impl Engine {
    /// Does what rung and heat ask for, and undoes what they no longer do.
    pub(super) fn heed(&mut self) {
        let conditions = &self.shared.conditions;
        let now = Heeded { rung: conditions.rung(), hot: conditions.is_hot() };
        let before = std::mem::replace(&mut self.heeded, now);
        if now == before {
            return;
        }
        let streams = self.expert_slots.is_some();
        self.scheduler.set_limits(limits(self.limits, now, streams));
        let narrow = |heeded: Heeded| heeded.hot || heeded.rung >= Rung::Orange;
        self.act(narrow(before), narrow(now), "smaller_pieces", "full_pieces");
        let short = |heeded: Heeded| heeded.rung >= Rung::Orange;
        self.act(short(before), short(now), "shorter_line", "full_line");
        self.act(before.is_paused(), now.is_paused(), "pause", "resume");
        if now.rung >= Rung::Orange {
            self.drop_prefixes();
        }
        if now.is_paused() && !before.is_paused() {
            self.release_weights();
        }
    }

    /// Counts and logs that something began or ended.
    fn act(&self, before: bool, now: bool, begins: &'static str, ends: &'static str) {
        let act = match (before, now) {
            (false, true) => begins,
            (true, false) => ends,
            _ => return,
        };
        self.shared.metrics.memory_acts.with_label_values(&[act]).inc();
        info!(target: "engine", act; "memory or heat");
    }

    /// Gives back the pages of prompts that nobody reads.
    fn drop_prefixes(&mut self) {
        let (count, bytes) = (self.resting.len(), self.resting.bytes());
        while self.give_up_resting(None) {}
        if count > 0 {
            let acts = self.shared.metrics.memory_acts.with_label_values(&["drop_prefixes"]);
            acts.inc();
            info!(target: "engine", count, bytes:%; "kept prefixes given back");
        }
    }

    /// Weights leave memory until the next pass reads them again. Running sequences keep their pages.
    fn release_weights(&mut self) {
        match self.model.release_weights() {
            Ok(bytes) => {
                self.shared.metrics.memory_acts.with_label_values(&["release_weights"]).inc();
                warn!(target: "engine", bytes:%; "weights given back until memory is there again");
            }
            Err(error) => warn!(target: "engine", error:%; "weights not given back"),
        }
    }
}

/// The configured limits, or narrower ones. A model that `streams` reads most of its file for each piece of a
/// prompt: smaller pieces would only be more work.
fn limits(configured: SchedulerLimits, heeded: Heeded, streams: bool) -> SchedulerLimits {
    let mut limits = configured;
    if !streams && (heeded.hot || heeded.rung >= Rung::Orange) {
        let smaller = |tokens: usize| (tokens / SMALLER).max(1);
        limits.prefill_tokens_max = smaller(limits.prefill_tokens_max);
        limits.prefill_tokens_beside_decode = smaller(limits.prefill_tokens_beside_decode);
    }
    if heeded.rung >= Rung::Orange {
        limits.waiting_max = limits.waiting_max.min(limits.running_max);
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIGURED: SchedulerLimits = SchedulerLimits {
        running_max: 4,
        waiting_max: 32,
        prefill_tokens_max: 256,
        prefill_tokens_beside_decode: 2,
        score_tokens_max: 7,
    };

    #[test]
    fn limits_narrow_by_rung_and_heat_and_come_back() {
        let at = |rung, hot| limits(CONFIGURED, Heeded { rung, hot }, false);
        assert_eq!(at(Rung::Green, false), CONFIGURED);
        assert_eq!(at(Rung::Yellow, false), CONFIGURED);
        let pieces = SchedulerLimits {
            prefill_tokens_max: 64,
            prefill_tokens_beside_decode: 1,
            ..CONFIGURED
        };
        assert_eq!(at(Rung::Green, true), pieces);
        let tight = SchedulerLimits { waiting_max: 4, ..pieces };
        for rung in [Rung::Orange, Rung::Red, Rung::Critical] {
            assert_eq!(at(rung, false), tight);
        }
        let streamed = limits(CONFIGURED, Heeded { rung: Rung::Orange, hot: true }, true);
        assert_eq!(streamed, SchedulerLimits { waiting_max: 4, ..CONFIGURED });
    }
}
