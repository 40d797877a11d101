//! How far two distributions lie apart, over many positions.

use super::report::{Divergence, Likeness, Perplexity, Share};
use super::rows::{Row, log_sum, top};

/// What one position gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Position {
    /// Kullback-Leibler divergence of the file's distribution from the reference's, in nats.
    pub(super) divergence: f64,
    /// Probability that the reference gives to tokens merged into one entry.
    pub(super) tail: f64,
    /// Log-probabilities of the token that came.
    pub(super) reference: f64,
    pub(super) file: f64,
    /// Both find the same token likeliest.
    pub(super) same_top: bool,
}

impl Position {
    /// The reference's row against the file's logits at the same place.
    pub(super) fn new(row: &Row, logits: &[f32]) -> Position {
        let log_sum = log_sum(logits);
        let of = |id: u32| f64::from(logits[id as usize]) - log_sum;
        let (mut divergence, mut kept) = (0.0, 0.0);
        for (token, reference) in &row.kept {
            let file = of(token.0);
            kept += file.exp();
            divergence += f64::from(*reference).exp() * (f64::from(*reference) - file);
        }
        let tail = f64::from(row.tail).exp();
        if tail > 0.0 {
            // What rounding takes below zero is a tail of the smallest size.
            let file = (1.0 - kept).max(f64::MIN_POSITIVE);
            divergence += tail * (f64::from(row.tail) - file.ln());
        }
        Position {
            divergence: divergence.max(0.0),
            tail,
            reference: f64::from(row.logprob),
            file: of(row.token.0),
            same_top: row.top() == top(logits),
        }
    }
}

/// The positions of one part of the comparison.
#[derive(Clone, Debug, Default)]
pub(super) struct Positions(Vec<Position>);

impl Positions {
    pub(super) fn add(&mut self, position: Position) {
        self.0.push(position);
    }

    /// The summary; `None` if there is no position.
    pub(super) fn likeness(&self) -> Option<Likeness> {
        let count = self.0.len();
        if count == 0 {
            return None;
        }
        let mut divergences: Vec<f64> = self.0.iter().map(|p| p.divergence).collect();
        divergences.sort_by(f64::total_cmp);
        let same = self.0.iter().filter(|p| p.same_top).count();
        Some(Likeness {
            positions: count,
            divergence: Divergence {
                mean: self.mean(|p| p.divergence),
                median: rank(&divergences, 0.5),
                p99: rank(&divergences, 0.99),
                max: divergences[count - 1],
                mean_tail: self.mean(|p| p.tail),
            },
            same_top: Share::new(same, count),
            perplexity: self.perplexity(),
        })
    }

    fn perplexity(&self) -> Perplexity {
        let reference = -self.mean(|p| p.reference);
        let file = -self.mean(|p| p.file);
        let rise = file - reference;
        let count = self.0.len() as f64;
        let spread = self.mean(|p| (p.reference - p.file - rise).powi(2));
        let error = if count > 1.0 { (spread / (count - 1.0)).sqrt() } else { f64::NAN };
        Perplexity {
            reference: reference.exp(),
            file: file.exp(),
            rise_percent: 100.0 * rise.exp_m1(),
            // Of the ratio: a small error of its logarithm is the same share of it.
            standard_error_percent: 100.0 * rise.exp() * error,
        }
    }

    fn mean(&self, of: impl Fn(&Position) -> f64) -> f64 {
        self.0.iter().map(of).sum::<f64>() / self.0.len() as f64
    }
}

/// The value that a share of the sorted values does not exceed.
fn rank(sorted: &[f64], share: f64) -> f64 {
    let at = (share * sorted.len() as f64).ceil() as usize;
    sorted[at.clamp(1, sorted.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::super::rows::KEPT;
    use super::*;
    use crate::units::TokenId;

    #[test]
    fn divergence_of_two_coins() {
        // P = (3/4, 1/4), Q = (1/2, 1/2): ¾ ln 1.5 + ¼ ln 0.5.
        let row = Row::new(&[3.0_f32.ln(), 0.0], TokenId(1));
        let position = Position::new(&row, &[5.0, 5.0]);
        let wanted = 0.75 * 1.5_f64.ln() + 0.25 * 0.5_f64.ln();
        assert!((position.divergence - wanted).abs() < 1e-6, "{position:?}");
        assert!((position.reference - 0.25_f64.ln()).abs() < 1e-6);
        assert!((position.file - 0.5_f64.ln()).abs() < 1e-6);
        assert!(position.same_top, "the first of equals");
    }

    #[test]
    fn equal_logits_do_not_diverge_and_merging_only_lowers() {
        let logits = |seed: usize| -> Vec<f32> {
            let value = |id: usize| ((id * seed) % 997) as f32 / 150.0;
            (0..3 * KEPT).map(value).collect()
        };
        let (p, q) = (logits(7919), logits(104_729));
        let row = Row::new(&p, TokenId(0));
        assert!(Position::new(&row, &p).divergence < 1e-6);
        let exact: f64 = {
            let (of_p, of_q) = (log_sum(&p), log_sum(&q));
            let pairs = p.iter().zip(&q).map(|(a, b)| (f64::from(*a) - of_p, f64::from(*b) - of_q));
            pairs.map(|(a, b)| a.exp() * (a - b)).sum()
        };
        let merged = Position::new(&row, &q).divergence;
        assert!(merged > 0.5 * exact && merged <= exact + 1e-6, "{merged} of {exact}");
    }

    #[test]
    fn summary_of_positions() {
        let mut positions = Positions::default();
        assert!(positions.likeness().is_none());
        for n in 1..=200 {
            positions.add(Position {
                divergence: f64::from(n),
                tail: 0.0,
                reference: -1.0,
                file: if n % 2 == 0 { -1.0 } else { -1.2 },
                same_top: n % 4 != 0,
            });
        }
        let likeness = positions.likeness().unwrap();
        let Divergence { mean, median, p99, max, .. } = likeness.divergence;
        assert_eq!((mean, median, p99, max), (100.5, 100.0, 198.0, 200.0));
        assert_eq!((likeness.same_top.count, likeness.same_top.of), (150, 200));
        let perplexity = likeness.perplexity;
        assert!((perplexity.reference - 1.0_f64.exp()).abs() < 1e-12);
        assert!((perplexity.rise_percent - 100.0 * 0.1_f64.exp_m1()).abs() < 1e-9);
        // Half the differences are 0, half 0.2: deviation 0.1, over √199.
        let error = 100.0 * 0.1_f64.exp() * 0.1 / 199.0_f64.sqrt();
        assert!((perplexity.standard_error_percent - error).abs() < 1e-9);
    }
}
