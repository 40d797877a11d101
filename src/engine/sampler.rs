//! The next token from its logits: bias, penalties, grammar, temperature, filters, chance.
//!
//! In this order, which is OpenAI's and Ollama's: bias and penalties change logits, the grammar forbids,
//! temperature scales, then top-k, top-p and min-p leave candidates of which one is drawn. Nothing here sorts
//! the vocabulary: greedy choice is one pass, top-k a partial selection, top-p a heap that gives out only the
//! candidates it needs.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};

use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};
use rustc_hash::FxHashMap;

use crate::chat::SamplingParams;
use crate::units::TokenId;

/// How one sequence chooses its tokens. Its random numbers are its own: the same seed gives the same text
/// whatever else runs.
#[derive(Debug)]
pub(super) struct Sampler {
    params: SamplingParams,
    random: ChaCha8Rng,
    seen: Seen,
}

/// Buffers shared by all sequences of an engine; they grow to the vocabulary once.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    candidates: Vec<Candidate>,
    kept: Vec<Candidate>,
}

impl Sampler {
    /// `prompt` counts as already seen.
    pub(super) fn new(params: &SamplingParams, prompt: &[TokenId]) -> Sampler {
        let seed = params.seed.unwrap_or_else(rand::random);
        let mut seen = Seen::new(params);
        for &token in &prompt[prompt.len().saturating_sub(seen.window_max)..] {
            seen.push(token);
        }
        Sampler { params: params.clone(), random: ChaCha8Rng::seed_from_u64(seed), seen }
    }

    /// Chooses a token and remembers it. `logits` are changed; with `allowed`, a token's bit says whether the
    /// grammar permits it. `None` if no token is possible: every logit is NaN or forbidden.
    pub(super) fn sample(
        &mut self,
        logits: &mut [f32],
        allowed: Option<&[u32]>,
        scratch: &mut Scratch,
    ) -> Option<TokenId> {
        for &(token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token.0 as usize) {
                *logit += bias;
            }
        }
        self.seen.penalize(&self.params, logits);
        if let Some(allowed) = allowed {
            forbid(logits, allowed);
        }
        let (best, best_logit) = first_of_the_largest(logits)?;
        let token = if self.params.temperature == 0.0 || best_logit == f32::INFINITY {
            best
        } else {
            self.draw(logits, best_logit, scratch)
        };
        self.seen.push(token);
        Some(token)
    }

    fn draw(&mut self, logits: &[f32], max: f32, scratch: &mut Scratch) -> TokenId {
        let params = &self.params;
        // A temperature below the smallest normal number must not become infinity times zero.
        let scale = (1.0 / params.temperature).min(f32::MAX);
        let candidates = &mut scratch.candidates;
        candidates.clear();
        candidates.extend(
            logits.iter().enumerate().filter(|(_, logit)| **logit > f32::NEG_INFINITY).map(
                |(token, logit)| Candidate {
                    weight: ((logit - max) * scale).exp(),
                    token: token as u32,
                },
            ),
        );
        let top_k = params.top_k as usize;
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, |a, b| b.cmp(a));
            candidates.truncate(top_k);
            candidates.sort_unstable_by(|a, b| b.cmp(a));
        }
        if params.top_p < 1.0 {
            keep_top_p(params.top_p, scratch);
        }
        let candidates = &mut scratch.candidates;
        if params.min_p > 0.0 {
            // The likeliest token has weight 1.
            candidates.retain(|candidate| candidate.weight >= params.min_p);
        }
        let total: f64 = candidates.iter().map(|candidate| f64::from(candidate.weight)).sum();
        let mut left = unit(&mut self.random) * total;
        let drawn = candidates.iter().find(|candidate| {
            left -= f64::from(candidate.weight);
            left < 0.0
        });
        // Rounding may leave a rest after the last candidate with any weight.
        let drawn = drawn.or_else(|| candidates.iter().rfind(|candidate| candidate.weight > 0.0));
        TokenId(drawn.expect("the likeliest token passes every filter").token)
    }
}

/// Keeps the likeliest candidates that together have `top_p` of the weight, best first; always at least one.
fn keep_top_p(top_p: f32, scratch: &mut Scratch) {
    let Scratch { candidates, kept } = scratch;
    let total: f64 = candidates.iter().map(|candidate| f64::from(candidate.weight)).sum();
    let wanted = f64::from(top_p) * total;
    let mut heap = BinaryHeap::from(std::mem::take(candidates));
    kept.clear();
    let mut sum = 0.0;
    while let Some(candidate) = heap.pop() {
        sum += f64::from(candidate.weight);
        kept.push(candidate);
        if sum >= wanted {
            break;
        }
    }
    *candidates = heap.into_vec();
    std::mem::swap(candidates, kept);
}

/// A uniform number in [0, 1) with 53 bits.
fn unit(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

/// The largest logit and its token, the first of equals; `None` if none is above minus infinity.
fn first_of_the_largest(logits: &[f32]) -> Option<(TokenId, f32)> {
    let mut best = None;
    let mut best_logit = f32::NEG_INFINITY;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > best_logit {
            (best, best_logit) = (Some(TokenId(token as u32)), logit);
        }
    }
    best.map(|token| (token, best_logit))
}

/// Makes every token impossible whose bit is not set; tokens beyond the mask too.
fn forbid(logits: &mut [f32], allowed: &[u32]) {
    for (word, logits) in logits.chunks_mut(32).enumerate() {
        let bits = allowed.get(word).copied().unwrap_or(0);
        if bits == u32::MAX {
            continue;
        }
        for (bit, logit) in logits.iter_mut().enumerate() {
            if bits >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// A token that may be drawn. Ordered by weight, then the earlier token is the greater one.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    weight: f32,
    token: u32,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    fn cmp(&self, other: &Candidate) -> Ordering {
        self.weight.total_cmp(&other.weight).then(other.token.cmp(&self.token))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Candidate) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The last tokens, counted, for the penalties.
#[derive(Debug)]
struct Seen {
    /// 0 where no penalty is on.
    window_max: usize,
    window: VecDeque<TokenId>,
    counts: FxHashMap<TokenId, u32>,
}

impl Seen {
    fn new(params: &SamplingParams) -> Seen {
        let off = params.repeat_penalty == 1.0
            && params.presence_penalty == 0.0
            && params.frequency_penalty == 0.0;
        let window_max = match params.repeat_last_n {
            _ if off => 0,
            last_n => usize::try_from(last_n).unwrap_or(usize::MAX),
        };
        Seen { window_max, window: VecDeque::new(), counts: FxHashMap::default() }
    }

    fn push(&mut self, token: TokenId) {
        if self.window_max == 0 {
            return;
        }
        if self.window.len() == self.window_max
            && let Some(oldest) = self.window.pop_front()
            && let Some(count) = self.counts.get_mut(&oldest)
        {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&oldest);
            }
        }
        self.window.push_back(token);
        *self.counts.entry(token).or_insert(0) += 1;
    }

    fn penalize(&self, params: &SamplingParams, logits: &mut [f32]) {
        for (token, &count) in &self.counts {
            let Some(logit) = logits.get_mut(token.0 as usize) else { continue };
            // Dividing a negative logit would reward it.
            *logit = match *logit > 0.0 {
                true => *logit / params.repeat_penalty,
                false => *logit * params.repeat_penalty,
            };
            *logit -= params.presence_penalty + params.frequency_penalty * count as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> SamplingParams {
        SamplingParams { seed: Some(1), ..SamplingParams::default() }
    }

    fn sample(params: &SamplingParams, logits: &[f32]) -> Option<u32> {
        let mut sampler = Sampler::new(params, &[]);
        let mut scratch = Scratch::default();
        sampler.sample(&mut logits.to_vec(), None, &mut scratch).map(|token| token.0)
    }

    /// How often each token is drawn in `draws` draws.
    fn histogram(params: &SamplingParams, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(params, &[]);
        let mut scratch = Scratch::default();
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            let token = sampler.sample(&mut logits.to_vec(), None, &mut scratch);
            counts[token.expect("some token is possible").0 as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        let greedy = SamplingParams { temperature: 0.0, ..params() };
        assert_eq!(sample(&greedy, &[1.0, 3.0, 3.0]), Some(1));
        assert_eq!(sample(&greedy, &[f32::NAN, -3.0, f32::NEG_INFINITY]), Some(1));
        assert_eq!(sample(&greedy, &[f32::NAN, f32::NEG_INFINITY]), None);
        assert_eq!(sample(&params(), &[f32::NAN]), None);
        assert_eq!(sample(&params(), &[0.0, f32::INFINITY]), Some(1));
    }

    #[test]
    fn a_tiny_temperature_is_greedy() {
        let tiny = SamplingParams { temperature: 1e-42, ..params() };
        assert_eq!(histogram(&tiny, &[1.0, 2.0, 1.999], 50), [0, 50, 0]);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits: Vec<f32> = [0.5_f32, 0.3, 0.2].iter().map(|p| p.ln()).collect();
        let counts = histogram(&params(), &logits, 20_000);
        for (count, expected) in counts.iter().zip([10_000, 6000, 4000]) {
            // Five standard deviations of a binomial of 20 000 draws are below 360.
            assert!(count.abs_diff(expected) < 360, "{counts:?}");
        }
        let hot = SamplingParams { temperature: 2.0, ..params() };
        let counts = histogram(&hot, &logits, 20_000);
        let weights = [0.5_f64.sqrt(), 0.3_f64.sqrt(), 0.2_f64.sqrt()];
        for (count, weight) in counts.iter().zip(weights) {
            let expected = weight / weights.iter().sum::<f64>() * 20_000.0;
            assert!((*count as f64 - expected).abs() < 360.0, "{counts:?}");
        }
    }

    #[test]
    fn filters_leave_the_likeliest() {
        let logits: Vec<f32> = [0.1_f32, 0.4, 0.2, 0.3].iter().map(|p| p.ln()).collect();
        let drawn = |params: SamplingParams| -> Vec<usize> {
            let counts = histogram(&params, &logits, 500);
            (0..4).filter(|&token| counts[token] > 0).collect()
        };
        assert_eq!(drawn(SamplingParams { top_k: 2, ..params() }), [1, 3]);
        assert_eq!(drawn(SamplingParams { top_k: 1, ..params() }), [1]);
        assert_eq!(drawn(SamplingParams { top_k: 9, ..params() }), [0, 1, 2, 3]);
        assert_eq!(drawn(SamplingParams { top_p: 0.69, ..params() }), [1, 3]);
        assert_eq!(drawn(SamplingParams { top_p: 0.71, ..params() }), [1, 2, 3]);
        assert_eq!(drawn(SamplingParams { top_p: 0.0, ..params() }), [1]);
        assert_eq!(drawn(SamplingParams { min_p: 0.45, ..params() }), [1, 2, 3]);
        assert_eq!(drawn(SamplingParams { min_p: 1.0, ..params() }), [1]);
        // Top-p counts what top-k left: 0.4 and 0.3 of 0.7.
        assert_eq!(drawn(SamplingParams { top_k: 2, top_p: 0.5, ..params() }), [1]);
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let logits: Vec<f32> = (0..100).map(|i| (i * 37 % 11) as f32 / 4.0).collect();
        let tokens = |seed| -> Vec<u32> {
            let params = SamplingParams { seed: Some(seed), top_p: 0.9, ..params() };
            let mut sampler = Sampler::new(&params, &[]);
            let mut scratch = Scratch::default();
            (0..30)
                .map(|_| sampler.sample(&mut logits.clone(), None, &mut scratch))
                .map(|token| token.expect("every token is possible").0)
                .collect()
        };
        assert_eq!(tokens(5), tokens(5));
        assert_ne!(tokens(5), tokens(6));
    }

    #[test]
    fn penalties_look_at_the_last_tokens() {
        let greedy = SamplingParams { temperature: 0.0, ..params() };
        let after = |params: SamplingParams, prompt: &[u32], logits: &[f32]| {
            let prompt: Vec<TokenId> = prompt.iter().copied().map(TokenId).collect();
            let mut sampler = Sampler::new(&params, &prompt);
            let mut scratch = Scratch::default();
            sampler.sample(&mut logits.to_vec(), None, &mut scratch).expect("finite logits").0
        };
        let repeat = SamplingParams { repeat_penalty: 2.0, ..greedy.clone() };
        assert_eq!(after(repeat.clone(), &[0], &[3.0, 2.0]), 1);
        assert_eq!(after(repeat.clone(), &[0], &[-1.0, -1.5]), 1);
        let short = SamplingParams { repeat_last_n: 1, ..repeat.clone() };
        assert_eq!(after(short, &[0, 5], &[3.0, 2.0]), 0);
        let none = SamplingParams { repeat_last_n: 0, ..repeat.clone() };
        assert_eq!(after(none, &[0], &[3.0, 2.0]), 0);
        let all = SamplingParams { repeat_last_n: -1, ..repeat };
        assert_eq!(after(all, &[0, 5, 6], &[3.0, 2.0]), 1);
        let presence = SamplingParams { presence_penalty: 0.6, ..greedy.clone() };
        assert_eq!(after(presence.clone(), &[0, 0, 0], &[1.0, 0.5]), 1);
        assert_eq!(after(presence, &[0, 0, 0], &[1.2, 0.5]), 0);
        let frequency = SamplingParams { frequency_penalty: 0.6, ..greedy };
        assert_eq!(after(frequency, &[0, 0, 0], &[2.0, 0.5]), 1);
    }

    #[test]
    fn the_window_forgets() {
        let params = SamplingParams { presence_penalty: 1.0, repeat_last_n: 2, ..params() };
        let mut seen = Seen::new(&params);
        for token in [1, 1, 2, 3] {
            seen.push(TokenId(token));
        }
        let mut left: Vec<(u32, u32)> = seen.counts.iter().map(|(t, c)| (t.0, *c)).collect();
        left.sort_unstable();
        assert_eq!(left, [(2, 1), (3, 1)]);
    }

    #[test]
    fn bias_and_grammar_apply() {
        let greedy = SamplingParams { temperature: 0.0, ..params() };
        let biased = SamplingParams {
            logit_bias: vec![(TokenId(2), 5.0), (TokenId(99), 5.0)],
            ..greedy.clone()
        };
        assert_eq!(sample(&biased, &[1.0, 2.0, 0.0]), Some(2));
        let mut scratch = Scratch::default();
        let mut sampler = Sampler::new(&greedy, &[]);
        let mut logits: Vec<f32> = (0..70).map(|i| i as f32).collect();
        let token = sampler.sample(&mut logits, Some(&[u32::MAX, 1 << 3]), &mut scratch);
        assert_eq!(token, Some(TokenId(35)));
        let token = sampler.sample(&mut [1.0, 2.0], Some(&[0]), &mut scratch);
        assert_eq!(token, None);
    }
}
