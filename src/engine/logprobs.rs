//! Log-probabilities as the model gave them: before temperature, penalties and filters.

use crate::units::TokenId;

/// The logits of one token position, with what turns them into log-probabilities.
#[derive(Clone, Copy, Debug)]
pub(super) struct Logprobs<'a> {
    logits: &'a [f32],
    /// Logarithm of the sum of their exponentials.
    log_sum: f64,
}

impl<'a> Logprobs<'a> {
    /// One pass over the vocabulary.
    pub(super) fn new(logits: &'a [f32]) -> Logprobs<'a> {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits
            .iter()
            .filter(|logit| !logit.is_nan())
            .map(|logit| f64::from((logit - max).exp()))
            .sum();
        Logprobs { logits, log_sum: f64::from(max) + sum.ln() }
    }

    /// Of one token. Chosen tokens and alternatives both come from here, so equal tokens have equal floats.
    pub(super) fn of(&self, token: TokenId) -> f32 {
        match self.logits.get(token.0 as usize) {
            Some(logit) => (f64::from(*logit) - self.log_sum) as f32,
            None => f32::NEG_INFINITY,
        }
    }

    /// The `count` likeliest tokens, best first, the first of equals first. One pass, without sorting all.
    pub(super) fn top(&self, count: usize) -> Vec<(TokenId, f32)> {
        let mut best: Vec<(f32, u32)> = Vec::with_capacity(count + 1);
        if count == 0 {
            return Vec::new();
        }
        for (token, &logit) in self.logits.iter().enumerate() {
            let full = best.len() == count;
            if logit.is_nan() || (full && logit <= best[count - 1].0) {
                continue;
            }
            let place = best.partition_point(|(other, _)| *other >= logit);
            best.insert(place, (logit, token as u32));
            best.truncate(count);
        }
        best.into_iter().map(|(_, token)| (TokenId(token), self.of(TokenId(token)))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one() {
        let logits = [1.0, -2.0, 0.5, 30.0, 29.0];
        let logprobs = Logprobs::new(&logits);
        let sum: f32 = (0..5).map(|token| logprobs.of(TokenId(token)).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        let expected = 1.0 / (1.0 + (-1.0_f32).exp());
        assert!((logprobs.of(TokenId(3)).exp() - expected).abs() < 1e-6);
    }

    #[test]
    fn the_top_is_sorted_and_has_the_same_floats() {
        let logits = [0.5, 2.0, f32::NAN, 2.0, -1.0, 3.0];
        let logprobs = Logprobs::new(&logits);
        let top = logprobs.top(3);
        let tokens: Vec<u32> = top.iter().map(|(token, _)| token.0).collect();
        assert_eq!(tokens, [5, 1, 3]);
        for (token, logprob) in top {
            assert_eq!(logprob.to_bits(), logprobs.of(token).to_bits());
        }
        assert_eq!(logprobs.top(0), []);
        assert_eq!(logprobs.top(99).len(), 5);
    }

    #[test]
    fn masked_tokens_are_impossible() {
        let logprobs = Logprobs::new(&[0.0, f32::NEG_INFINITY]);
        assert_eq!(logprobs.of(TokenId(0)), 0.0);
        assert_eq!(logprobs.of(TokenId(1)), f32::NEG_INFINITY);
        assert_eq!(logprobs.of(TokenId(2)), f32::NEG_INFINITY);
    }
}
