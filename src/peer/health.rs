//! Whether a member is worth asking, and how fast it is: a breaker and moving averages. Clocks are arguments.

use std::time::{Duration, Instant};

/// Failures in a row that open the breaker.
const FAILURES_MAX: u32 = 3;

/// How long an open breaker lets nobody through.
const OPEN_FOR: Duration = Duration::from_secs(30);

/// Keeps requests away from a member that fails.
///
/// Three failures in a row open it. After 30 s the next real request is let through to find out (half open): if it
/// succeeds the breaker closes, if it fails another 30 s begin. A server that says it is busy has not failed.
#[derive(Clone, Debug, Default)]
pub(super) struct Breaker {
    failures: u32,
    opened: Option<Instant>,
    /// The request that finds out is under way since then.
    trying: Option<Instant>,
    /// It could not even be connected to.
    unreachable: bool,
}

impl Breaker {
    /// Whether a request may go through now. If it is the one that finds out, it is counted as under way.
    pub(super) fn admit(&mut self, now: Instant) -> bool {
        if !self.would_admit(now) {
            return false;
        }
        if self.opened.is_some() {
            self.trying = Some(now);
        }
        true
    }

    /// As [`Breaker::admit`], without consequences.
    pub(super) fn would_admit(&self, now: Instant) -> bool {
        let Some(opened) = self.opened else { return true };
        // A try that never told how it ended is not waited for longer than a whole period.
        let trying = self.trying.is_some_and(|since| now.duration_since(since) < OPEN_FOR);
        now.duration_since(opened) >= OPEN_FOR && !trying
    }

    /// An answer came.
    pub(super) fn succeeded(&mut self) {
        *self = Breaker::default();
    }

    /// The member failed; whether this opened the breaker.
    pub(super) fn failed(&mut self, now: Instant) -> bool {
        self.failures = self.failures.saturating_add(1);
        let was_open = self.opened.is_some();
        self.trying = None;
        self.unreachable = false;
        if was_open || self.failures >= FAILURES_MAX {
            self.opened = Some(now);
        }
        !was_open && self.opened.is_some()
    }

    /// Nobody could be connected to: it opens at once.
    pub(super) fn unreachable(&mut self, now: Instant) {
        self.failed(now);
        self.opened = Some(now);
        self.unreachable = true;
    }

    /// The member was heard of by another way than an answer. That closes the breaker if all that was wrong was
    /// that nobody could be connected to; whether it answers is another question.
    pub(super) fn heard_of(&mut self) {
        if self.unreachable {
            *self = Breaker::default();
        }
    }

    /// The request that was let through told nothing about the member: cancelled, or the member was busy.
    pub(super) fn undecided(&mut self) {
        self.trying = None;
    }
}

/// A moving average: the newest value weighs a quarter.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Average(Option<f64>);

impl Average {
    const WEIGHT: f64 = 0.25;

    /// Takes a measurement; nonsense is left out.
    pub(super) fn add(&mut self, value: f64) {
        if !value.is_finite() || value < 0.0 {
            return;
        }
        self.0 = Some(match self.0 {
            None => value,
            Some(old) => old + Average::WEIGHT * (value - old),
        });
    }

    /// The average, once something was measured.
    pub(super) fn get(self) -> Option<f64> {
        self.0
    }
}

/// How fast a member is, as measured from here.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rates {
    /// Prompt tokens per second.
    pub(super) prefill: Average,
    /// Tokens per second of one answer.
    pub(super) decode: Average,
    /// Seconds in line before the prompt is read.
    pub(super) queue_s: Average,
}

/// What is assumed of a member before anything was measured: a 3B model on a Pi 5.
const PREFILL_ASSUMED: f64 = 25.0;

impl Rates {
    /// Predicted time until the first token of an answer to a prompt of so many tokens.
    pub(super) fn first_token(&self, prompt_tokens: u32) -> Duration {
        let prefill = self.prefill.get().unwrap_or(PREFILL_ASSUMED).max(0.1);
        let queue = self.queue_s.get().unwrap_or(0.0);
        seconds(queue + f64::from(prompt_tokens) / prefill)
    }

    /// How long to wait for the first byte: three times the prediction, at least 2 s.
    pub(super) fn first_byte_patience(&self, prompt_tokens: u32) -> Duration {
        (self.first_token(prompt_tokens) * 3).max(Duration::from_secs(2))
    }

    /// Tokens that a member can make in `rest`, with a fifth to spare; `None` while its speed is unknown.
    pub(super) fn tokens_within(&self, rest: Duration, prompt_tokens: u32) -> Option<u32> {
        let (prefill, decode) = (self.prefill.get()?, self.decode.get()?);
        let reading = f64::from(prompt_tokens) / prefill.max(0.1);
        let tokens = 0.8 * (rest.as_secs_f64() - reading) * decode;
        Some(tokens.clamp(1.0, 1e9) as u32)
    }
}

/// Seconds as a duration that is never absurd.
fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.clamp(0.0, 86_400.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_failures_in_a_row_open_it_for_half_a_minute() {
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let mut breaker = Breaker::default();
        assert!(!breaker.failed(at(0)) && !breaker.failed(at(1)));
        breaker.succeeded();
        assert!(!breaker.failed(at(2)) && !breaker.failed(at(3)));
        assert!(breaker.admit(at(3)));
        assert!(breaker.failed(at(4)), "the third in a row");
        assert!(!breaker.admit(at(5)) && !breaker.admit(at(33)));
        assert!(breaker.admit(at(34)), "half open");
        assert!(!breaker.admit(at(34)), "one finds out, the others wait");
        assert!(!breaker.failed(at(40)), "it was open already");
        assert!(!breaker.admit(at(69)));
        assert!(breaker.admit(at(70)));
        breaker.succeeded();
        assert!(breaker.admit(at(70)) && breaker.admit(at(70)));
    }

    #[test]
    fn a_try_that_tells_nothing_leaves_room_for_the_next() {
        let start = Instant::now();
        let mut breaker = Breaker::default();
        for _ in 0..3 {
            breaker.failed(start);
        }
        let later = start + OPEN_FOR;
        assert!(breaker.admit(later) && !breaker.would_admit(later));
        breaker.undecided();
        assert!(breaker.admit(later));
        assert!(
            breaker.admit(later + OPEN_FOR),
            "a try that was forgotten does not block for ever"
        );
    }

    #[test]
    fn a_member_that_is_gone_is_known_at_once_and_back_when_heard_of() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        breaker.unreachable(now);
        assert!(!breaker.would_admit(now));
        breaker.heard_of();
        assert!(breaker.would_admit(now));
        for _ in 0..3 {
            breaker.failed(now);
        }
        breaker.heard_of();
        assert!(!breaker.would_admit(now), "it is there, but it does not answer");
    }

    #[test]
    fn rates_predict_and_bound() {
        let mut rates = Rates::default();
        assert_eq!(rates.first_token(50), Duration::from_secs(2));
        assert_eq!(rates.first_byte_patience(0), Duration::from_secs(2));
        assert_eq!(rates.tokens_within(Duration::from_secs(10), 0), None);
        rates.prefill.add(100.0);
        rates.decode.add(10.0);
        rates.queue_s.add(1.0);
        rates.decode.add(f64::NAN);
        assert_eq!(rates.first_token(100), Duration::from_secs(2));
        assert_eq!(rates.first_byte_patience(100), Duration::from_secs(6));
        assert_eq!(rates.tokens_within(Duration::from_secs(11), 100), Some(80));
        assert_eq!(rates.tokens_within(Duration::ZERO, 100), Some(1));
        rates.decode.add(14.0);
        assert_eq!(rates.decode.get(), Some(11.0));
    }
}
