//! What routers chose, and what that means for slots: how skewed, how soon again, how predictable, and which way of
//! eviction keeps the right experts. Pure.

use super::policy::{Policy, best_hits, replay};

/// What one pass chose in one layer with experts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// The layer's number among those with experts.
    pub layer: usize,
    /// For each token of the pass its expert.
    pub experts: Vec<usize>,
    /// What the layer before would have guessed for each token; empty if nobody guessed.
    pub guesses: Vec<usize>,
    /// Whether the tokens belonged to a prompt.
    pub prompt: bool,
}

/// What was found in recorded choices.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceReport {
    /// Experts of a layer.
    pub experts: usize,
    /// Tokens that were written.
    pub decoded_tokens: u64,
    /// Tokens that were read.
    pub prompt_tokens: u64,
    /// One for each layer with experts.
    pub layers: Vec<LayerReport>,
    /// What slots would have found while tokens were written.
    pub hits: Vec<HitReport>,
}

/// The choices of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerReport {
    /// How often each expert was chosen for a token that was written.
    pub decode_counts: Vec<u64>,
    /// The same for tokens that were read.
    pub prompt_counts: Vec<u64>,
    /// How many equally likely experts would be as uncertain as these.
    pub effective_experts: f64,
    /// Steps until the same expert is needed again: the middle one, and the one that nine in ten do not exceed.
    pub reuse_median: Option<usize>,
    pub reuse_p90: Option<usize>,
    /// Share of right guesses from the layer before; `None` where nobody guessed.
    pub guess_ratio: Option<f64>,
}

/// Share of uses found in slots.
#[derive(Clone, Debug, PartialEq)]
pub struct HitReport {
    /// Slots of each layer.
    pub slots: usize,
    /// By the policies in the order of [`Policy::ALL`].
    pub ratios: [f64; Policy::ALL.len()],
    /// If the future were known.
    pub best: f64,
}

/// Looks at what passes chose, in their order, in a model whose layers have `experts` experts.
pub fn report(experts: usize, routes: &[Route]) -> TraceReport {
    let layer_count = routes.iter().map(|route| route.layer + 1).max().unwrap_or(0);
    let mut layers = Vec::new();
    let mut turns_of = Vec::new();
    for layer in 0..layer_count {
        let own = || routes.iter().filter(move |route| route.layer == layer);
        let decoded = own().filter(|route| !route.prompt);
        let turns: Vec<Vec<usize>> =
            decoded.clone().map(|route| distinct(&route.experts)).collect();
        let (reuse_median, reuse_p90) = reuse(experts, &turns);
        let guessed = decoded.clone().filter(|route| route.guesses.len() == route.experts.len());
        let pairs = guessed.flat_map(|route| route.experts.iter().zip(&route.guesses));
        let (right, all) = pairs.fold((0_u64, 0_u64), |(right, all), (chosen, guess)| {
            (right + u64::from(chosen == guess), all + 1)
        });
        let decode_counts = counts(experts, decoded.flat_map(|route| &route.experts));
        layers.push(LayerReport {
            effective_experts: effective(&decode_counts),
            decode_counts,
            prompt_counts: counts(
                experts,
                own().filter(|route| route.prompt).flat_map(|route| &route.experts),
            ),
            reuse_median,
            reuse_p90,
            guess_ratio: (all > 0).then(|| right as f64 / all as f64),
        });
        turns_of.push(turns);
    }
    let tokens = |prompt: bool| {
        let first = routes.iter().filter(|route| route.layer == 0 && route.prompt == prompt);
        first.map(|route| route.experts.len() as u64).sum()
    };
    TraceReport {
        experts,
        decoded_tokens: tokens(false),
        prompt_tokens: tokens(true),
        layers,
        hits: slot_counts(experts).map(|slots| hits(experts, slots, &turns_of)).collect(),
    }
}

impl TraceReport {
    /// Share of right guesses over all layers.
    pub fn guess_ratio(&self) -> Option<f64> {
        let ratios: Vec<f64> = self.layers.iter().filter_map(|layer| layer.guess_ratio).collect();
        (!ratios.is_empty()).then(|| ratios.iter().sum::<f64>() / ratios.len() as f64)
    }
}

/// 1, 2, 3, 4, 6, 8, 12, 16, … below all experts.
fn slot_counts(experts: usize) -> impl Iterator<Item = usize> {
    let steps = (0..).flat_map(|power: u32| [1_usize << power, 3 << power]).skip(1);
    let mut counts: Vec<usize> = [1].into_iter().chain(steps.take(24)).collect();
    counts.sort_unstable();
    counts.dedup();
    counts.into_iter().take_while(move |&slots| slots < experts)
}

fn hits(experts: usize, slots: usize, turns_of: &[Vec<Vec<usize>>]) -> HitReport {
    let uses: u64 = turns_of.iter().flatten().map(|turn| turn.len() as u64).sum();
    let share = |hits: u64| if uses == 0 { 0.0 } else { hits as f64 / uses as f64 };
    let sum = |of: &dyn Fn(&[Vec<usize>]) -> u64| turns_of.iter().map(|turns| of(turns)).sum();
    HitReport {
        slots,
        ratios: Policy::ALL
            .map(|policy| share(sum(&|turns| replay(policy, experts, slots, turns)))),
        best: share(sum(&|turns| best_hits(slots, turns))),
    }
}

fn distinct(experts: &[usize]) -> Vec<usize> {
    let mut experts = experts.to_vec();
    experts.sort_unstable();
    experts.dedup();
    experts
}

fn counts<'a>(experts: usize, chosen: impl Iterator<Item = &'a usize>) -> Vec<u64> {
    let mut counts = vec![0; experts];
    for &expert in chosen {
        if let Some(count) = counts.get_mut(expert) {
            *count += 1;
        }
    }
    counts
}

/// Two to the power of the entropy.
fn effective(counts: &[u64]) -> f64 {
    let all: u64 = counts.iter().sum();
    if all == 0 {
        return 0.0;
    }
    let share = |count: u64| count as f64 / all as f64;
    let bits = |p: f64| if p > 0.0 { -p * p.log2() } else { 0.0 };
    counts.iter().map(|&count| bits(share(count))).sum::<f64>().exp2()
}

fn reuse(experts: usize, turns: &[Vec<usize>]) -> (Option<usize>, Option<usize>) {
    let mut last = vec![None; experts];
    let mut distances = Vec::new();
    for (now, turn) in turns.iter().enumerate() {
        for &expert in turn {
            let Some(last) = last.get_mut(expert) else { continue };
            if let Some(before) = last.replace(now) {
                distances.push(now - before);
            }
        }
    }
    distances.sort_unstable();
    let at = |share: f64| {
        let index = ((distances.len() as f64 * share).ceil() as usize).saturating_sub(1);
        distances.get(index).copied()
    };
    (at(0.5), at(0.9))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(layer: usize, experts: &[usize], guesses: &[usize]) -> Route {
        Route { layer, experts: experts.to_vec(), guesses: guesses.to_vec(), prompt: false }
    }

    #[test]
    fn counts_reuse_and_guesses_are_found() {
        let mut routes = vec![
            Route { layer: 0, experts: vec![0, 1, 1], guesses: Vec::new(), prompt: true },
            Route { layer: 1, experts: vec![2, 2, 3], guesses: Vec::new(), prompt: true },
        ];
        for turn in 0..8 {
            routes.push(decode(0, &[turn % 2], &[]));
            routes.push(decode(1, &[3], &[if turn < 6 { 3 } else { 0 }]));
        }
        let report = report(4, &routes);
        assert_eq!((report.prompt_tokens, report.decoded_tokens), (3, 8));
        assert_eq!(report.layers[0].decode_counts, [4, 4, 0, 0]);
        assert_eq!(report.layers[1].prompt_counts, [0, 0, 2, 1]);
        assert!((report.layers[0].effective_experts - 2.0).abs() < 1e-9);
        assert!((report.layers[1].effective_experts - 1.0).abs() < 1e-9);
        assert_eq!((report.layers[0].reuse_median, report.layers[1].reuse_p90), (Some(2), Some(1)));
        assert_eq!(
            (report.layers[0].guess_ratio, report.layers[1].guess_ratio),
            (None, Some(0.75))
        );
        let slots: Vec<usize> = report.hits.iter().map(|hits| hits.slots).collect();
        assert_eq!(slots, [1, 2, 3]);
        // With one slot the alternating layer never hits, the other one always but once.
        assert!((report.hits[0].ratios[0] - 7.0 / 16.0).abs() < 1e-9);
        assert!((report.hits[1].best - 13.0 / 16.0).abs() < 1e-9);
    }

    #[test]
    fn nothing_recorded_is_an_empty_report() {
        let report = report(16, &[]);
        assert!(report.layers.is_empty() && report.guess_ratio().is_none());
        let slots: Vec<usize> = report.hits.iter().map(|hits| hits.slots).collect();
        assert_eq!(slots, [1, 2, 3, 4, 6, 8, 12]);
        assert!(report.hits.iter().all(|hits| hits.best == 0.0));
    }
}
