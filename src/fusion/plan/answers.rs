//! What attempts came to, and which of them say the same.

use std::time::Duration;

use super::super::answer::{Form, Usable, sha256};
use super::super::merge;
use super::{Ask, Plan};
use crate::chat::{FaultReason, FinishReason, MemberState};

/// One question to one member, and what came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Attempt {
    /// Whom it asks.
    pub ask: Ask,
    /// The round of a debate; 0 is the first answer.
    pub round: u8,
    /// When it was started.
    pub begun: Duration,
    /// What it said so far.
    pub said: String,
    /// Tool calls so far.
    pub calls: usize,
    /// The attempt whose answer this one revises.
    pub argues_for: Option<usize>,
    /// How it ended.
    pub end: Option<End>,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// Its state.
    pub state: MemberState,
    /// Why it is not whole.
    pub reason: Option<FaultReason>,
    /// Its answer, if it can be used.
    pub usable: Option<Usable>,
    /// How the answer ended.
    pub finish: FinishReason,
    /// When.
    pub at: Duration,
}

/// Equal answers.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Group {
    /// What they are compared as.
    pub(super) key: String,
    /// SHA-256 of that: the canonical order.
    pub(super) hash: String,
    /// The attempts.
    pub(super) votes: Vec<usize>,
    /// Sum of their weights.
    pub(super) weight: u64,
    /// The weight of the weightiest.
    pub(super) heaviest: u32,
    /// Whose words stand for all.
    pub(super) representative: usize,
    /// SHA-256 of those words.
    pub(super) text_hash: String,
}

impl Attempt {
    pub(super) fn new(ask: Ask, round: u8, begun: Duration) -> Attempt {
        let said = String::new();
        Attempt { ask, round, begun, said, calls: 0, argues_for: None, end: None }
    }

    /// Whether its answer is usable and came to its end.
    pub fn is_whole(&self) -> bool {
        self.end.as_ref().is_some_and(|end| end.state == MemberState::Ok)
    }
}

impl End {
    pub(super) fn none() -> End {
        End {
            state: MemberState::Empty,
            reason: None,
            usable: None,
            finish: FinishReason::Stop,
            at: Duration::ZERO,
        }
    }
}

/// An answer that came to its end, or to a bound.
pub(super) fn ended(form: &Form, said: &str, calls: usize, finish: FinishReason) -> End {
    let cut = match finish {
        FinishReason::Deadline => return failed(form, said, FaultReason::Deadline),
        FinishReason::Length => Some(FaultReason::Length),
        FinishReason::Stop | FinishReason::ToolCalls => None,
    };
    match form.usable(said, calls) {
        Ok(usable) => {
            let state = if cut.is_some() { MemberState::Partial } else { MemberState::Ok };
            End { state, reason: cut, usable: Some(usable), finish, ..End::none() }
        }
        Err(reason) => End { state: reason.state(), reason: Some(reason), ..End::none() },
    }
}

/// An answer that broke off: its whole sentences are used where time or the line were at fault.
pub(super) fn failed(form: &Form, said: &str, reason: FaultReason) -> End {
    let breaks = matches!(reason, FaultReason::Deadline | FaultReason::Reset | FaultReason::Stall);
    if breaks && let Ok(whole) = form.usable(said, 0) {
        let text = merge::whole_sentences(&whole.text);
        if let Ok(usable) = form.usable(text, 0) {
            return End {
                state: MemberState::Partial,
                reason: Some(reason),
                usable: Some(usable),
                finish: FinishReason::Deadline,
                ..End::none()
            };
        }
    }
    End { state: reason.state(), reason: Some(reason), ..End::none() }
}

impl Plan {
    /// The distinct answers in canonical order.
    pub(super) fn groups(&self) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for ballot in self.voters() {
            let Some(usable) = self.usable(ballot) else { continue };
            let weight = self.attempts[ballot].ask.weight;
            match groups.iter_mut().find(|group| group.key == usable.key) {
                Some(group) => {
                    group.votes.push(ballot);
                    group.weight += u64::from(weight);
                    group.heaviest = group.heaviest.max(weight);
                    if self.canonical(ballot) < self.canonical(group.representative) {
                        group.representative = ballot;
                    }
                }
                None => groups.push(Group {
                    key: usable.key.clone(),
                    hash: sha256(usable.key.as_bytes()),
                    votes: vec![ballot],
                    weight: u64::from(weight),
                    heaviest: weight,
                    representative: ballot,
                    text_hash: String::new(),
                }),
            }
        }
        for group in &mut groups {
            group.votes.sort_by_key(|vote| self.canonical(*vote));
            group.text_hash = sha256(self.text_of(group.representative).as_bytes());
        }
        groups.sort_by(|a, b| a.hash.cmp(&b.hash));
        groups
    }

    pub(super) fn group(&self, key: &str) -> Option<Group> {
        self.groups().into_iter().find(|group| group.key == key)
    }

    /// Whole answers first, then the weightiest, then by content, then by name: never by arrival.
    pub(super) fn canonical(
        &self,
        attempt: usize,
    ) -> (bool, std::cmp::Reverse<u32>, String, String) {
        let Attempt { ask, .. } = &self.attempts[attempt];
        let hash = sha256(self.text_of(attempt).as_bytes());
        let partial = !self.attempts[attempt].is_whole();
        (partial, std::cmp::Reverse(ask.weight), hash, ask.id.clone())
    }
}
