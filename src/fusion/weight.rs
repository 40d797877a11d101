//! How much a vote counts: calibrated log-odds, families of equal models, and when a vote is decided.
//!
//! Weights are whole thousandths, so that sums do not depend on the order in which answers came.

use std::collections::BTreeMap;

/// The share of right answers, from `right` of `asked` items of known truth, drawn to one half by a Beta(2, 2)
/// prior.
pub fn strength(right: u32, asked: u32) -> f64 {
    (f64::from(right) + 2.0) / (f64::from(asked) + 4.0)
}

/// The weight of a vote in thousandths: log-odds of being right against any particular one of `wrong` effective
/// wrong answers, never less than ten.
pub fn weight(strength: f64, wrong: f64) -> u32 {
    let odds = (strength * wrong / (1.0 - strength)).ln();
    (odds.max(0.01) * 1000.0).round().min(20_000.0) as u32
}

/// The effective number of wrong answers of an uncalibrated pool. With more, two weak members that share an error
/// would outvote a strong one.
pub(super) const WRONG_UNCALIBRATED: f64 = 2.0;

/// The weight of each of `votes` votes of one family in thousandths, if each alone would weigh `weight`: samples
/// of one model err together.
pub fn family_weight(weight: u32, votes: usize) -> u32 {
    let votes = votes.max(1) as f64;
    ((f64::from(weight) * (1.0 + (votes - 1.0) / 2.0)) / votes).round() as u32
}

/// The weights of distinct answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    sums: BTreeMap<String, u64>,
}

impl Tally {
    /// Adds a vote.
    pub fn add(&mut self, key: &str, weight: u32) {
        *self.sums.entry(key.to_owned()).or_default() += u64::from(weight);
    }

    /// The heaviest answer and its weight; the smaller key of equals.
    pub fn leader(&self) -> Option<(&str, u64)> {
        let heaviest = self.sums.iter().max_by(|a, b| a.1.cmp(b.1).then_with(|| b.0.cmp(a.0)));
        heaviest.map(|(key, sum)| (key.as_str(), *sum))
    }

    /// The weight of the second heaviest answer, or 0.
    pub fn runner_up(&self) -> u64 {
        let Some((leader, _)) = self.leader() else { return 0 };
        let others = self.sums.iter().filter(|(key, _)| *key != leader);
        others.map(|(_, sum)| *sum).max().unwrap_or(0)
    }

    /// By how much the heaviest answer leads, as thousandths of all weight.
    pub fn margin(&self) -> u64 {
        let total: u64 = self.sums.values().sum();
        let lead = self.leader().map_or(0, |(_, sum)| sum - self.runner_up());
        (lead * 1000).checked_div(total).unwrap_or(0)
    }

    /// The heaviest answer if `outstanding` weight cannot change it any more.
    pub fn unassailable(&self, outstanding: u64) -> Option<&str> {
        let (key, sum) = self.leader()?;
        (sum > self.runner_up() + outstanding).then_some(key)
    }

    /// Distinct answers.
    pub fn len(&self) -> usize {
        self.sums.len()
    }

    /// Whether nobody has voted.
    pub fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn weights_are_log_odds() {
        assert_eq!(strength(0, 0), 0.5);
        assert_eq!(strength(28, 36), 0.75);
        assert_eq!(weight(0.5, 2.0), 693);
        assert_eq!(weight(0.75, 2.0), 1792);
        assert_eq!(weight(0.9, 10.0), 4500);
        assert_eq!(weight(0.2, 1.0), 10);
        assert_eq!(weight(1.0, 2.0), 20_000);
        assert_eq!([1, 2, 3].map(|votes| family_weight(600, votes)), [600, 450, 400]);
    }

    #[test]
    fn a_leader_is_unassailable_only_strictly() {
        let mut tally = Tally::default();
        assert_eq!(tally.unassailable(0), None);
        tally.add("a", 700);
        tally.add("b", 300);
        assert_eq!(tally.unassailable(399), Some("a"));
        assert_eq!(tally.unassailable(400), None);
        assert_eq!(tally.margin(), 400);
        tally.add("b", 400);
        assert_eq!((tally.unassailable(0), tally.leader()), (None, Some(("a", 700))));
    }

    proptest! {
        /// What early stop rests on: whatever the outstanding votes say, they cannot change an unassailable
        /// leader.
        #[test]
        fn outstanding_votes_do_not_change_an_unassailable_leader(
            cast in prop::collection::vec((0..4_u8, 1..3000_u32), 1..8),
            outstanding in prop::collection::vec((0..5_u8, 1..3000_u32), 0..8),
        ) {
            let mut tally = Tally::default();
            for (key, weight) in &cast {
                tally.add(&key.to_string(), *weight);
            }
            let rest = outstanding.iter().map(|(_, weight)| u64::from(*weight)).sum();
            if let Some(leader) = tally.unassailable(rest).map(str::to_owned) {
                for (key, weight) in &outstanding {
                    tally.add(&key.to_string(), *weight);
                }
                prop_assert_eq!(tally.unassailable(0), Some(leader.as_str()));
            }
        }
    }
}
