//! Who may come in: bounds of the output, predicted times, and when to come again. Pure.

use std::time::Duration;

use super::scheduler::Remaining;
use crate::chat::ChatError;
use crate::units::Bytes;

/// How many tokens an answer may have: what was asked for or the default, but never more than the context
/// leaves.
///
/// # Errors
/// If the prompt leaves no room for the first token.
pub(super) fn output_bound(
    prompt_tokens: usize,
    context_tokens: u32,
    asked: Option<u32>,
    default_max: u32,
) -> Result<u32, ChatError> {
    let prompt = u32::try_from(prompt_tokens).unwrap_or(u32::MAX);
    let wanted = asked.unwrap_or(default_max.max(1));
    let left = context_tokens.checked_sub(prompt);
    match left {
        Some(left) if left > 0 || wanted == 0 => Ok(wanted.min(left)),
        _ => Err(ChatError::ContextTooLong { prompt, context: context_tokens }),
    }
}

/// Moving averages of measured speed; `None` until measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rates {
    /// Prompt tokens read per second.
    pub(super) prefill_tokens_per_s: Option<f64>,
    /// Tokens written per second by one sequence.
    pub(super) decode_tokens_per_s: Option<f64>,
}

/// Share of a new measurement in the average: the last ten or so count.
const NEW_SHARE: f64 = 0.2;

/// Prompt pieces below this say more about the fixed cost of a step than about speed.
const PREFILL_TOKENS_MIN: usize = 16;

impl Rates {
    /// Takes in one step that read `prefill` prompt tokens and wrote one token for each of `decodes` sequences.
    /// A mixed step counts for the prompt what it took longer than a step of decodes alone.
    pub(super) fn note(&mut self, prefill: usize, decodes: usize, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64().max(1e-9);
        if prefill == 0 {
            if decodes > 0 {
                average(&mut self.decode_tokens_per_s, 1.0 / seconds);
            }
            return;
        }
        let decode_seconds = match (decodes, self.decode_tokens_per_s) {
            (0, _) => 0.0,
            (_, Some(rate)) => 1.0 / rate,
            (_, None) => return,
        };
        if prefill >= PREFILL_TOKENS_MIN || self.prefill_tokens_per_s.is_none() {
            let left = (seconds - decode_seconds).max(seconds / 10.0);
            average(&mut self.prefill_tokens_per_s, prefill as f64 / left);
        }
    }
}

fn average(rate: &mut Option<f64>, new: f64) {
    *rate = Some(rate.map_or(new, |old| old + NEW_SHARE * (new - old)));
}

/// What the engine thread is busy with, for those who ask to come in.
#[derive(Clone, Debug, Default)]
pub(super) struct Load {
    /// Places of running sequences that are free.
    pub(super) free_places: usize,
    /// Sequences in line.
    pub(super) waiting: usize,
    /// Prompt tokens in line and not yet read.
    pub(super) prefill_tokens: usize,
    /// The running sequences: what they may still need, and the bytes that come back when they end.
    pub(super) running: Vec<(Remaining, Bytes)>,
    /// Measured speed.
    pub(super) rates: Rates,
}

impl Load {
    /// Predicted time until the first token of a prompt of which `uncached` tokens must be read, standing
    /// behind everything known now; `None` until speeds have been measured.
    pub(super) fn first_token(&self, uncached: usize) -> Option<Duration> {
        let rate = self.rates.prefill_tokens_per_s?;
        let reading = (self.prefill_tokens + uncached) as f64 / rate;
        let place = match self.waiting < self.free_places {
            true => 0.0,
            false => self.place_seconds(self.waiting - self.free_places)?,
        };
        Some(seconds(reading + place))
    }

    /// When somebody who finds the line full should come again.
    pub(super) fn retry_for_place(&self) -> Duration {
        let known = self.place_seconds(0);
        retry(known)
    }

    /// When `missing` more bytes will probably have been given back by running sequences.
    pub(super) fn retry_for_bytes(&self, missing: Bytes) -> Duration {
        let mut ends: Vec<(f64, u64)> = self
            .running
            .iter()
            .filter_map(|(remaining, bytes)| Some((self.end_seconds(*remaining)?, bytes.0)))
            .collect();
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut back = 0_u64;
        let enough = ends.iter().find(|(_, bytes)| {
            back = back.saturating_add(*bytes);
            back >= missing.0
        });
        retry(enough.or(ends.last()).map(|(seconds, _)| *seconds))
    }

    /// Time until the sequence that is `ahead` places behind the first in line gets a place: each round of
    /// places frees when the running sequences end.
    fn place_seconds(&self, ahead: usize) -> Option<f64> {
        let mut ends: Vec<f64> =
            self.running.iter().filter_map(|(remaining, _)| self.end_seconds(*remaining)).collect();
        ends.sort_by(f64::total_cmp);
        let rounds = ahead / ends.len().max(1);
        let longest = ends.last()?;
        Some(ends[ahead % ends.len()] + rounds as f64 * longest)
    }

    /// Time until a running sequence ends at the latest.
    fn end_seconds(&self, remaining: Remaining) -> Option<f64> {
        let prefill = match remaining.prefill {
            0 => 0.0,
            tokens => tokens as f64 / self.rates.prefill_tokens_per_s?,
        };
        Some(prefill + remaining.decode as f64 / self.rates.decode_tokens_per_s?)
    }
}

/// Clients give up on anything beyond two minutes; below a second they hammer.
fn retry(known: Option<f64>) -> Duration {
    const UNKNOWN_S: f64 = 5.0;
    Duration::from_secs_f64(known.unwrap_or(UNKNOWN_S).clamp(1.0, 120.0))
}

/// Far futures stay a finite duration.
fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.clamp(0.0, 1e9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_context_bounds_the_output() {
        let bound = |prompt, asked| output_bound(prompt, 100, asked, 20).ok();
        assert_eq!(bound(10, None), Some(20));
        assert_eq!(bound(10, Some(1000)), Some(90));
        assert_eq!(bound(99, Some(5)), Some(1));
        assert_eq!(bound(100, Some(5)), None);
        assert_eq!(bound(100, Some(0)), Some(0));
        assert_eq!(bound(101, Some(0)), None);
        let error = output_bound(101, 100, None, 20).expect_err("the prompt is too long");
        assert_eq!(error, ChatError::ContextTooLong { prompt: 101, context: 100 });
    }

    #[test]
    fn rates_are_moving_averages() {
        let mut rates = Rates::default();
        rates.note(0, 2, Duration::from_millis(100));
        assert_eq!(rates.decode_tokens_per_s, Some(10.0));
        rates.note(0, 1, Duration::from_millis(50));
        assert_eq!(rates.decode_tokens_per_s, Some(12.0));
        rates.note(100, 0, Duration::from_secs(1));
        assert_eq!(rates.prefill_tokens_per_s, Some(100.0));
        let mut mixed = Rates { decode_tokens_per_s: Some(10.0), ..Rates::default() };
        mixed.note(90, 1, Duration::from_secs(1));
        assert_eq!(mixed.prefill_tokens_per_s, Some(100.0));
        assert_eq!(mixed.decode_tokens_per_s, Some(10.0));
    }

    fn load() -> Load {
        let remaining = |decode| Remaining { prefill: 0, decode };
        Load {
            free_places: 0,
            waiting: 0,
            prefill_tokens: 0,
            running: vec![(remaining(100), Bytes(10)), (remaining(30), Bytes(5))],
            rates: Rates { prefill_tokens_per_s: Some(100.0), decode_tokens_per_s: Some(10.0) },
        }
    }

    #[test]
    fn the_first_token_waits_for_places_and_prompts() {
        let mut load = load();
        assert_eq!(load.first_token(200), Some(Duration::from_secs(5)));
        load.waiting = 1;
        load.prefill_tokens = 100;
        assert_eq!(load.first_token(200), Some(Duration::from_secs(13)));
        load.waiting = 2;
        assert_eq!(load.first_token(0), Some(Duration::from_secs(1 + 3 + 10)));
        load.free_places = 3;
        assert_eq!(load.first_token(200), Some(Duration::from_secs(3)));
        load.rates = Rates::default();
        assert_eq!(load.first_token(200), None);
    }

    #[test]
    fn come_again_when_enough_has_ended() {
        let load = load();
        assert_eq!(load.retry_for_place(), Duration::from_secs(3));
        assert_eq!(load.retry_for_bytes(Bytes(5)), Duration::from_secs(3));
        assert_eq!(load.retry_for_bytes(Bytes(6)), Duration::from_secs(10));
        assert_eq!(load.retry_for_bytes(Bytes(99)), Duration::from_secs(10));
        assert_eq!(Load::default().retry_for_place(), Duration::from_secs(5));
    }
}
