//! Which expert of a layer goes when another needs its slot: pure, and replayed over recorded choices.

use serde::Deserialize;

/// How the victim is chosen among the experts of a layer that are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// The one whose last use is the longest ago.
    Lru,
    /// The one used least often, uses counting half after [`HALF_LIFE_TURNS`].
    #[default]
    Lfu,
    /// Among the stale ones, unused for as many turns as the layer has experts, the one used least often; if none
    /// is stale, the one whose last use is the longest ago.
    LeastStale,
}

impl Policy {
    /// All of them.
    pub const ALL: [Policy; 3] = [Policy::Lru, Policy::Lfu, Policy::LeastStale];

    /// The word of the configuration and of reports.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Lru => "lru",
            Policy::Lfu => "lfu",
            Policy::LeastStale => "least-stale",
        }
    }
}

/// Turns of a layer after which a use counts half. A turn is a step that runs through the layer.
pub const HALF_LIFE_TURNS: f64 = 64.0;

/// What a layer has used, as far as a policy needs it.
#[derive(Clone, Debug)]
pub(super) struct History {
    policy: Policy,
    turn: u64,
    uses: Vec<Use>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Use {
    /// Turn of the last use; 0 is never.
    last: u64,
    /// Uses, as they counted at that turn.
    score: f64,
}

impl History {
    /// A layer of `experts` experts, none of them used yet.
    pub(super) fn new(policy: Policy, experts: usize) -> History {
        History { policy, turn: 0, uses: vec![Use::default(); experts] }
    }

    /// A step has run through the layer and used `experts`, each named once.
    pub(super) fn turn(&mut self, experts: impl IntoIterator<Item = usize>) {
        self.turn += 1;
        for expert in experts {
            let score = self.score(expert) + 1.0;
            if let Some(used) = self.uses.get_mut(expert) {
                *used = Use { last: self.turn, score };
            }
        }
    }

    /// The one of `kept` that goes.
    pub(super) fn victim(&self, kept: impl IntoIterator<Item = usize>) -> Option<usize> {
        kept.into_iter().min_by(|&a, &b| self.worth(a).total_cmp(&self.worth(b)))
    }

    /// Grows with how long an expert should be kept.
    fn worth(&self, expert: usize) -> f64 {
        let last = self.uses.get(expert).map_or(0, |used| used.last);
        match self.policy {
            Policy::Lru => last as f64,
            Policy::Lfu => self.score(expert),
            Policy::LeastStale => {
                let stale = self.turn - last > self.uses.len() as u64;
                // A score is bounded by the half-life, so every fresh one is worth more than any stale one.
                if stale { self.score(expert) - 4.0 * HALF_LIFE_TURNS } else { last as f64 }
            }
        }
    }

    fn score(&self, expert: usize) -> f64 {
        let Some(used) = self.uses.get(expert) else { return 0.0 };
        used.score * 0.5_f64.powf((self.turn - used.last) as f64 / HALF_LIFE_TURNS)
    }
}

/// Hits of a layer of `experts` experts that keeps `slots` of them, over its recorded turns.
pub fn replay(policy: Policy, experts: usize, slots: usize, turns: &[Vec<usize>]) -> u64 {
    let mut history = History::new(policy, experts);
    let mut kept: Vec<usize> = Vec::new();
    let mut hits = 0;
    for turn in turns {
        history.turn(turn.iter().copied());
        hits += turn.iter().filter(|expert| kept.contains(expert)).count() as u64;
        for &expert in turn {
            if kept.contains(&expert) || slots == 0 {
                continue;
            }
            if kept.len() >= slots {
                let others = kept.iter().copied().filter(|other| !turn.contains(other));
                let Some(victim) = history.victim(others) else { continue };
                kept.retain(|&other| other != victim);
            }
            kept.push(expert);
        }
    }
    hits
}

/// The most hits that any policy could have had: it drops what is needed again last (Belady).
pub fn best_hits(slots: usize, turns: &[Vec<usize>]) -> u64 {
    let mut kept: Vec<usize> = Vec::new();
    let mut hits = 0;
    for (now, turn) in turns.iter().enumerate() {
        let next_use = |expert: usize| {
            let later = turns[now + 1..].iter().position(|turn| turn.contains(&expert));
            later.unwrap_or(usize::MAX)
        };
        for &expert in turn {
            if kept.contains(&expert) {
                hits += 1;
                continue;
            }
            kept.push(expert);
            if kept.len() > slots {
                let others = kept.iter().copied().filter(|o| o == &expert || !turn.contains(o));
                let victim = others.max_by_key(|&other| next_use(other)).unwrap_or(expert);
                kept.retain(|&other| other != victim);
            }
        }
    }
    hits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ones(experts: &[usize]) -> Vec<Vec<usize>> {
        experts.iter().map(|&expert| vec![expert]).collect()
    }

    #[test]
    fn each_policy_drops_its_own_victim() {
        // 0 often but long ago, 1 seldom and long ago, 2 once just now.
        let mut turns = ones(&[1, 0, 0, 0]);
        turns.extend(ones(&[3, 3, 3, 3, 2]));
        let victim = |policy| {
            let mut history = History::new(policy, 4);
            for turn in &turns {
                history.turn(turn.iter().copied());
            }
            history.victim([0, 1, 2])
        };
        assert_eq!(victim(Policy::Lru), Some(1));
        assert_eq!(victim(Policy::Lfu), Some(1));
        assert_eq!(victim(Policy::LeastStale), Some(1));
        let mut history = History::new(Policy::Lfu, 3);
        for turn in ones(&[0, 0, 0, 1, 2, 2]) {
            history.turn(turn);
        }
        assert_eq!(history.victim([0, 2]), Some(2));
        let mut history = History::new(Policy::Lru, 3);
        for turn in ones(&[0, 0, 0, 1, 2, 2]) {
            history.turn(turn);
        }
        assert_eq!(history.victim([0, 2]), Some(0));
        assert_eq!(history.victim([]), None);
    }

    #[test]
    fn old_uses_fade() {
        let mut history = History::new(Policy::Lfu, 2);
        for turn in ones(&[0; 20]) {
            history.turn(turn);
        }
        for turn in ones(&[1; 400]) {
            history.turn(turn);
        }
        assert_eq!(history.victim([0, 1]), Some(0));
    }

    #[test]
    fn replays_count_hits() {
        let turns = ones(&[0, 1, 0, 1, 2, 0, 1]);
        assert_eq!(replay(Policy::Lru, 3, 0, &turns), 0);
        assert_eq!(replay(Policy::Lru, 3, 1, &turns), 0);
        assert_eq!(replay(Policy::Lru, 3, 2, &turns), 2);
        assert_eq!(replay(Policy::Lru, 3, 3, &turns), 4);
        // The 2 is used once, so the best does not keep it at all.
        assert_eq!(best_hits(2, &turns), 4);
        assert_eq!(best_hits(1, &turns), 2);
        assert_eq!(best_hits(3, &turns), 4);
        // Several sequences in one turn: what the turn itself uses is no victim.
        let turns = vec![vec![0, 1, 2], vec![0, 1, 2]];
        assert_eq!(replay(Policy::Lfu, 3, 2, &turns), 2);
    }

    #[test]
    fn no_policy_beats_the_best() {
        // A skewed sequence without a period.
        let mut x = 12_345_u64;
        let turns: Vec<Vec<usize>> = (0..500)
            .map(|_| {
                x = x
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let uniform = (x >> 33) as f64 / (1_u64 << 31) as f64;
                vec![(16.0 * uniform * uniform) as usize]
            })
            .collect();
        for slots in [1, 2, 4, 8, 16] {
            let best = best_hits(slots, &turns);
            for policy in Policy::ALL {
                let hits = replay(policy, 16, slots, &turns);
                assert!(hits <= best, "{policy:?} with {slots}: {hits} of {best}");
                assert!(slots < 16 || hits == best, "{policy:?}");
            }
        }
    }
}
