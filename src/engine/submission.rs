//! A request on its way from the door to the engine thread.

use std::sync::Arc;
use std::time::Instant;

use super::grammar::Grammar;
use super::places::Place;
use crate::chat::{ChatRequest, ChatSender, Origin, Priority, SamplingParams, Tool};
use crate::memory::Permit;
use crate::units::TokenId;

/// A request that has a place but has not been looked at.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: ChatRequest,
    /// For scoring: what is to follow the prompt.
    pub(super) continuation: Option<Continuation>,
    pub(super) ticket: Ticket,
}

/// Tokens after a prompt whose log-probabilities are wanted.
#[derive(Clone, Debug)]
pub(super) struct Continuation {
    /// Never empty.
    pub(super) tokens: Vec<TokenId>,
    /// What else could stand in the first one's place.
    pub(super) beside: Vec<TokenId>,
}

/// Which log-probabilities of a prompt are wanted.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scores {
    /// The first position whose logits are needed: they are about the token after it.
    pub(super) from: usize,
    /// The token after the prompt's last one.
    pub(super) tail: Option<TokenId>,
    /// Tokens to list beside the first scored one.
    pub(super) beside: Vec<TokenId>,
}

/// Who waits for the answer, and since when.
#[derive(Debug)]
pub(super) struct Ticket {
    pub(super) sender: ChatSender,
    pub(super) place: Place,
    pub(super) door: &'static str,
    pub(super) arrived: Instant,
}

/// What the engine needs to know of a request, its prompt already in tokens.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) label: String,
    pub(super) client: Arc<str>,
    pub(super) priority: Priority,
    pub(super) deadline: Instant,
    pub(super) prompt: Vec<TokenId>,
    pub(super) max_tokens: u32,
    pub(super) sampling: SamplingParams,
    pub(super) stops: Vec<String>,
    /// Tools whose calls are looked for in the answer; empty for plain text.
    pub(super) tools: Vec<Tool>,
    /// Alternatives per token, if log-probabilities are wanted.
    pub(super) logprobs: Option<usize>,
    /// Log-probabilities of the prompt too; the end token then counts as output.
    pub(super) scores: Option<Scores>,
    /// The form the answer must have, if it must have one.
    pub(super) grammar: Option<Grammar>,
}

impl Prepared {
    /// Tokens the sequence may come to hold.
    pub(super) fn tokens_max(&self) -> usize {
        self.prompt.len() + self.max_tokens as usize
    }
}

/// A prepared request for the engine thread; without a permit its memory must first be made free.
#[derive(Debug)]
pub(super) struct Submission {
    pub(super) prepared: Prepared,
    pub(super) ticket: Ticket,
    pub(super) permit: Option<Permit>,
}

/// The metrics' word for a door.
pub(super) fn door(origin: &Origin) -> &'static str {
    match origin {
        Origin::Fusion { .. } => "fusion",
        Origin::Mqtt { .. } => "mqtt",
        Origin::Rest { .. } => "rest",
        Origin::Terminal => "terminal",
    }
}
