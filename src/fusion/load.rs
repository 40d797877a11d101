//! How much the pool can carry: above that, a fusion asks one member only.
//!
//! With `k` proposers every request costs the pool about `k` times the work, so queues grow without bound where
//! arrivals come faster than `1 / (rounds · service time)` of the slowest member. Per member the share of its time
//! that fusions take is arrivals that ask it, times rounds, times its mean service time.

use std::collections::BTreeMap;
use std::time::Duration;

/// Arrivals and service times of one pool, as moving averages.
#[derive(Clone, Debug, Default)]
pub struct Load {
    members: BTreeMap<String, Member>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Member {
    /// Arrivals that asked it, each fading over the window.
    asked: f64,
    /// When `asked` was last brought up to date.
    at: Duration,
    /// Mean seconds of one answer.
    service_s: Option<f64>,
}

impl Load {
    /// Whether one more fusion of `rounds` rounds at `now` would take more of a member's time than it has.
    pub fn is_full<'a>(
        &self,
        mut members: impl Iterator<Item = &'a str>,
        rounds: u32,
        now: Duration,
    ) -> bool {
        members.any(|id| {
            let Some(member) = self.members.get(id) else { return false };
            let Some(service_s) = member.service_s else { return false };
            // Between two arrivals the average fades; half an arrival is what it fades on average.
            let arrivals_per_s = (member.faded(now) + 0.5) / member.window_s();
            arrivals_per_s * f64::from(rounds) * service_s >= SHARE_MAX
        })
    }

    /// A request asks this member.
    pub fn asks(&mut self, id: &str, now: Duration) {
        let member = self.members.entry(id.to_owned()).or_default();
        member.asked = member.faded(now) + 1.0;
        member.at = now;
    }

    /// A member took so long for an answer.
    pub fn served(&mut self, id: &str, took: Duration) {
        let member = self.members.entry(id.to_owned()).or_default();
        let took = took.as_secs_f64();
        member.service_s = Some(member.service_s.map_or(took, |mean| mean + (took - mean) * 0.2));
    }
}

impl Member {
    fn faded(&self, now: Duration) -> f64 {
        let age = now.saturating_sub(self.at).as_secs_f64();
        self.asked * (-age / self.window_s()).exp()
    }

    /// Over how long arrivals are averaged: long enough to hold several answers.
    fn window_s(&self) -> f64 {
        (self.service_s.unwrap_or(0.0) * 5.0).max(60.0)
    }
}

/// The share of a member's time that fusions may take.
const SHARE_MAX: f64 = 0.8;

#[cfg(test)]
mod tests {
    use super::*;

    /// Arrivals every `gap` seconds at one member that needs `service` seconds; how many of the last 200 are fused.
    fn fused(gap: f64, service: f64) -> usize {
        let mut load = Load::default();
        load.served("a", Duration::from_secs_f64(service));
        let mut fused = 0;
        for index in 0..400 {
            let now = Duration::from_secs_f64(gap * f64::from(index));
            let full = load.is_full(["a"].into_iter(), 1, now);
            if !full {
                load.asks("a", now);
                fused += usize::from(index >= 200);
            }
        }
        fused
    }

    #[test]
    fn below_the_bound_all_are_fused_above_it_as_many_as_there_is_time_for() {
        assert_eq!(fused(10.0, 5.0), 200, "half of its time");
        let over = fused(2.0, 5.0);
        // 200 arrivals in 400 s; 0.8 of that time is 64 answers of 5 s.
        assert!((50..80).contains(&over), "{over}");
        let far_over = fused(1.0, 100.0);
        assert!(far_over <= 4, "{far_over}: 200 s have room for one or two");
    }
}
