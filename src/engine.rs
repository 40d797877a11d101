//! The local engine: admission, scheduling, sampling, and the thread that runs the model.
//!
//! A request takes a place, is made into tokens by a small pool of threads, gets a permit for its worst case,
//! and is handed to the engine thread. That thread goes round: take in submissions, drop what nobody reads,
//! give out slots, plan, run the model, sample, commit, send. It never waits for a client and never polls.

mod admission;
mod grammar;
mod inbox;
mod local;
mod logprobs;
mod outlet;
mod output;
mod places;
mod pool;
mod prefix;
mod prepare;
mod queue;
mod request;
mod sampler;
mod scheduler;
mod score;
mod stop;
mod submission;
mod thread;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use serde::Deserialize;

pub use local::{EngineParts, Local, StartError, start};

/// What the operator may set.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Sequences that run at once.
    pub slots: u16,
    /// Ended sequences whose keys and values are kept for the next prompt that begins alike.
    pub resting_slots: u16,
    /// Requests that wait for a slot; more are refused.
    pub waiting_max: usize,
    /// Prompt tokens of one step while nobody is writing.
    pub prefill_tokens_max: usize,
    /// Prompt tokens of one step beside sequences that are writing.
    pub prefill_tokens_beside_decode: usize,
    /// Bytes of logits of one step while a prompt is being scored; at least one token is.
    pub score_logits_bytes: u64,
    /// Length of an answer for which the client sets no bound.
    pub default_max_tokens: u32,
    /// Events that a slow client may leave unread before its sequence pauses.
    pub unread_events_max: usize,
    /// Threads that render prompts and make tokens.
    pub prepare_threads: usize,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            slots: 4,
            resting_slots: 4,
            waiting_max: 32,
            prefill_tokens_max: 256,
            prefill_tokens_beside_decode: 64,
            score_logits_bytes: 16 << 20,
            default_max_tokens: 512,
            unread_events_max: 64,
            prepare_threads: 2,
        }
    }
}

impl Config {
    /// Everything wrong with it; empty is right.
    pub fn check(&self) -> Vec<String> {
        let mut errors = Vec::new();
        let mut bound = |name: &str, value: u64, min: u64, max: u64| {
            if !(min..=max).contains(&value) {
                errors.push(format!("engine.{name} must be between {min} and {max}, not {value}"));
            }
        };
        bound("slots", self.slots.into(), 1, 64);
        bound("resting_slots", self.resting_slots.into(), 0, 256);
        bound("waiting_max", self.waiting_max as u64, 0, 10_000);
        bound("prefill_tokens_max", self.prefill_tokens_max as u64, 1, 65_536);
        let beside = self.prefill_tokens_beside_decode as u64;
        bound("prefill_tokens_beside_decode", beside, 1, 65_536);
        bound("score_logits_bytes", self.score_logits_bytes, 1, 1 << 32);
        bound("default_max_tokens", self.default_max_tokens.into(), 1, 1 << 20);
        bound("unread_events_max", self.unread_events_max as u64, 1, 65_536);
        bound("prepare_threads", self.prepare_threads as u64, 1, 64);
        errors
    }
}
