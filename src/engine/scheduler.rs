//! Which tokens go through the model next: pure, without clock, threads or I/O.
//!
//! Sequences wait in a fair line, get a slot, have their prompt read in pieces and then write one token per
//! step, all beside each other. From [`plan`](Scheduler::plan) to [`commit`](Scheduler::commit) nothing else
//! may change the scheduler, so `commit` asserts that what was planned is still there.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::queue::WaitingLine;
use crate::chat::Priority;
use crate::model::{Batch, BatchRow, LogitsWanted};
use crate::units::{SequenceId, SlotId, TokenId};

/// Bounds of the scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SchedulerLimits {
    /// Sequences that run at once.
    pub(super) running_max: usize,
    /// Sequences that wait beyond the free places.
    pub(super) waiting_max: usize,
    /// Prompt tokens of one step while nobody writes.
    pub(super) prefill_tokens_max: usize,
    /// Prompt tokens of one step beside sequences that write: they wait that much longer for their token.
    pub(super) prefill_tokens_beside_decode: usize,
    /// Prompt tokens of one step whose logits are all wanted.
    pub(super) score_tokens_max: usize,
}

impl SchedulerLimits {
    fn check(self) {
        assert!(self.running_max > 0, "at least one sequence must be able to run");
        let smallest = self
            .prefill_tokens_max
            .min(self.prefill_tokens_beside_decode)
            .min(self.score_tokens_max);
        assert!(smallest > 0, "each step must be able to read a token");
    }
}

/// A request as the scheduler sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sequence {
    /// Never used twice.
    pub(super) id: SequenceId,
    /// For fairness among clients.
    pub(super) client: Arc<str>,
    /// For the order among priorities.
    pub(super) priority: Priority,
    /// Never empty.
    pub(super) prompt: Vec<TokenId>,
    /// Ends with the token that reaches this number; 0 only reads the prompt.
    pub(super) max_tokens: u32,
    /// Logits of all prompt tokens from this position on are wanted.
    pub(super) scores_from: Option<usize>,
}

/// What one step runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// For the model.
    pub(super) batch: Batch,
    /// One per row of the batch.
    pub(super) rows: Vec<PlannedRow>,
}

/// Whose tokens a row of the batch holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PlannedRow {
    /// The sequence.
    pub(super) id: SequenceId,
    /// Position of the row's first token.
    pub(super) first: usize,
    /// Tokens in the row.
    pub(super) len: usize,
    /// Whether the row is part of the prompt.
    pub(super) prefill: bool,
    /// Whether a token is sampled from the logits of the row's last token.
    pub(super) samples: bool,
    /// Whether logits for scoring the prompt are there: of every token, or of the last one alone.
    pub(super) scores: bool,
}

/// What was sampled for a row that samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sampled {
    /// The sequence goes on with it.
    Token(TokenId),
    /// The sequence ends with it.
    Last(TokenId),
    /// Nothing could be sampled; the sequence ends.
    Nothing,
}

/// Why the scheduler ended a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// `max_tokens` was reached.
    Length,
    /// Its last token was said to be one.
    Stop,
    /// Nothing could be sampled.
    Nothing,
}

/// A sequence that has left its slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Retired {
    /// The sequence.
    pub(super) id: SequenceId,
    /// The slot it had.
    pub(super) slot: SlotId,
    /// Prompt and generated tokens.
    pub(super) tokens: Vec<TokenId>,
    /// How many of them the slot holds.
    pub(super) held: usize,
}

/// A sequence in a slot.
#[derive(Debug)]
struct Running {
    id: SequenceId,
    slot: SlotId,
    priority: Priority,
    /// Order of starting, for the order of prefills.
    turn: u64,
    tokens: Vec<TokenId>,
    prompt_len: usize,
    /// How many of `tokens` the slot holds.
    held: usize,
    max_tokens: u32,
    scores_from: Option<usize>,
    paused: bool,
}

impl Running {
    fn generated(&self) -> u32 {
        (self.tokens.len() - self.prompt_len) as u32
    }

    fn prefill_left(&self) -> usize {
        self.prompt_len.saturating_sub(self.held)
    }

    /// Of the next `wanted` prompt tokens, how many one row may hold, and how many of them give logits to score
    /// by. A row has logits of all of its tokens or of its last one.
    fn scored_row(&self, wanted: usize, score_budget: usize) -> (usize, usize) {
        match self.scores_from {
            None => (wanted, 0),
            Some(from) if self.held >= from => {
                let len = wanted.min(score_budget);
                (len, len)
            }
            Some(from) if from + 1 == self.prompt_len => {
                (wanted, usize::from(wanted == self.prefill_left()))
            }
            Some(from) => (wanted.min(from - self.held), 0),
        }
    }

    fn retire(self) -> Retired {
        Retired { id: self.id, slot: self.slot, tokens: self.tokens, held: self.held }
    }
}

/// The sequences of one model.
#[derive(Debug)]
pub(super) struct Scheduler {
    limits: SchedulerLimits,
    waiting: WaitingLine,
    running: BTreeMap<SequenceId, Running>,
    turns: u64,
}

impl Scheduler {
    /// An empty one.
    ///
    /// # Panics
    /// If a limit that must not be zero is.
    pub(super) fn new(limits: SchedulerLimits) -> Scheduler {
        limits.check();
        Scheduler { limits, waiting: WaitingLine::default(), running: BTreeMap::new(), turns: 0 }
    }

    /// Goes by other limits from now on. What runs or waits beyond them stays.
    ///
    /// # Panics
    /// As [`new`](Scheduler::new).
    pub(super) fn set_limits(&mut self, limits: SchedulerLimits) {
        limits.check();
        self.limits = limits;
    }

    /// Puts `sequence` into the line; returns how many start before it.
    ///
    /// # Errors
    /// Gives the sequence back if the line is full.
    ///
    /// # Panics
    /// If its prompt is empty.
    pub(super) fn submit(&mut self, sequence: Sequence) -> Result<usize, Box<Sequence>> {
        assert!(!sequence.prompt.is_empty(), "a sequence has a prompt");
        let free = self.limits.running_max.saturating_sub(self.running.len());
        if self.waiting.len() >= self.limits.waiting_max + free {
            return Err(Box::new(sequence));
        }
        let ahead = self.waiting.push(sequence);
        Ok((ahead + 1).saturating_sub(free))
    }

    /// The sequence that may start now. None starts while the prompts being read fill the next step anyway: a
    /// later start finds more of its own prompt in other slots.
    pub(super) fn startable(&self) -> Option<&Sequence> {
        let has_place = self.running.len() < self.limits.running_max;
        let prefill_left: usize = self
            .running
            .values()
            .filter(|running| !running.paused)
            .map(Running::prefill_left)
            .sum();
        (has_place && prefill_left < self.prefill_budget()).then(|| self.waiting.front()).flatten()
    }

    /// Gives [`startable`](Scheduler::startable) a slot that already holds the first `held` tokens of its
    /// prompt.
    ///
    /// # Panics
    /// If nothing is startable, the slot is taken, or no prompt token would be left to read.
    pub(super) fn start(&mut self, slot: SlotId, held: usize) -> SequenceId {
        assert!(self.startable().is_some(), "a sequence may start");
        assert!(self.running.values().all(|running| running.slot != slot), "the slot is free");
        let sequence = self.waiting.pop().expect("a startable sequence waits");
        assert!(held < sequence.prompt.len(), "the last prompt token is always read");
        let (id, prompt_len) = (sequence.id, sequence.prompt.len());
        let running = Running {
            id,
            slot,
            priority: sequence.priority,
            turn: self.turns,
            tokens: sequence.prompt,
            prompt_len,
            held,
            max_tokens: sequence.max_tokens,
            scores_from: sequence.scores_from,
            paused: false,
        };
        self.turns += 1;
        self.running.insert(id, running);
        id
    }

    /// Takes a waiting sequence out of the line; whether it was there.
    pub(super) fn cancel_waiting(&mut self, id: SequenceId) -> bool {
        self.waiting.remove(id).is_some()
    }

    /// Takes a running sequence out of its slot.
    pub(super) fn cancel_running(&mut self, id: SequenceId) -> Option<Retired> {
        self.running.remove(&id).map(Running::retire)
    }

    /// Keeps a running sequence out of plans; it stays in its slot.
    pub(super) fn pause(&mut self, id: SequenceId) {
        if let Some(running) = self.running.get_mut(&id) {
            running.paused = true;
        }
    }

    /// Undoes [`pause`](Scheduler::pause).
    pub(super) fn resume(&mut self, id: SequenceId) {
        if let Some(running) = self.running.get_mut(&id) {
            running.paused = false;
        }
    }

    /// What the next step runs; `None` if nothing can run.
    pub(super) fn plan(&self) -> Option<Plan> {
        let mut plan = Plan { batch: Batch::default(), rows: Vec::new() };
        let ready = || self.running.values().filter(|running| !running.paused);
        for running in ready().filter(|running| running.prefill_left() == 0) {
            push_row(&mut plan, running, 1, 0);
        }
        let mut prefills: Vec<&Running> =
            ready().filter(|running| running.prefill_left() > 0).collect();
        prefills.sort_by_key(|running| (std::cmp::Reverse(running.priority), running.turn));
        let mut budget = self.prefill_budget();
        let mut score_budget = self.limits.score_tokens_max;
        for running in prefills {
            let wanted = running.prefill_left().min(budget);
            let (len, scored) = running.scored_row(wanted, score_budget);
            if len > 0 && scored <= score_budget {
                score_budget -= scored;
                budget -= len;
                push_row(&mut plan, running, len, scored);
            }
        }
        (!plan.rows.is_empty()).then_some(plan)
    }

    /// Takes in what came of `plan`: one entry of `sampled` per row that samples, in their order. Returns the
    /// sequences that ended, each with the reason; their slots are free.
    ///
    /// # Panics
    /// If the plan is not the last one of this scheduler, or `sampled` has another length.
    pub(super) fn commit(&mut self, plan: &Plan, sampled: &[Sampled]) -> Vec<(Retired, Ended)> {
        let wanted = plan.rows.iter().filter(|row| row.samples).count();
        assert_eq!(sampled.len(), wanted, "each sampling row has its token");
        let mut sampled = sampled.iter();
        let mut ended = Vec::new();
        for row in &plan.rows {
            let running = self.running.get_mut(&row.id).expect("a planned sequence is running");
            assert_eq!(running.held, row.first, "a planned row continues its slot");
            running.held += row.len;
            if let Some(reason) = advance(running, row, &mut sampled) {
                let running = self.running.remove(&row.id).expect("it was there just now");
                ended.push((running.retire(), reason));
            }
        }
        ended
    }

    /// Prompt and generated tokens of a running sequence, and how many of them its slot holds.
    pub(super) fn tokens(&self, id: SequenceId) -> Option<(&[TokenId], usize)> {
        self.running.get(&id).map(|running| (running.tokens.as_slice(), running.held))
    }

    /// Tokens of a running sequence's prompt.
    pub(super) fn prompt_len(&self, id: SequenceId) -> Option<usize> {
        self.running.get(&id).map(|running| running.prompt_len)
    }

    /// The running sequences: slot, tokens, and how many of them the slot holds.
    pub(super) fn slots(&self) -> impl Iterator<Item = (SlotId, &[TokenId], usize)> {
        self.running.values().map(|running| (running.slot, running.tokens.as_slice(), running.held))
    }

    /// The slot of a running sequence.
    pub(super) fn slot(&self, id: SequenceId) -> Option<SlotId> {
        self.running.get(&id).map(|running| running.slot)
    }

    /// Tokens that each running sequence may still need: prompt to read, and text to write.
    pub(super) fn remaining(&self) -> impl Iterator<Item = (SequenceId, Remaining)> {
        self.running.values().map(|running| {
            let decode = running.max_tokens.saturating_sub(running.generated());
            (running.id, Remaining { prefill: running.prefill_left(), decode: decode as usize })
        })
    }

    /// Prompt tokens of the waiting sequences.
    pub(super) fn waiting_prompt_tokens(&self) -> usize {
        self.waiting.iter().map(|sequence| sequence.prompt.len()).sum()
    }

    /// How many wait.
    pub(super) fn waiting_len(&self) -> usize {
        self.waiting.len()
    }

    /// How many run, paused ones included.
    pub(super) fn running_len(&self) -> usize {
        self.running.len()
    }

    fn prefill_budget(&self) -> usize {
        let writing = |running: &Running| !running.paused && running.prefill_left() == 0;
        match self.running.values().any(writing) {
            true => self.limits.prefill_tokens_beside_decode,
            false => self.limits.prefill_tokens_max,
        }
    }
}

/// Tokens a sequence may still need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Remaining {
    /// Prompt tokens to read.
    pub(super) prefill: usize,
    /// Tokens to write at most.
    pub(super) decode: usize,
}

fn push_row(plan: &mut Plan, running: &Running, len: usize, scored: usize) {
    let prefill = running.prefill_left() > 0;
    let samples = running.held + len >= running.prompt_len && running.max_tokens > 0;
    let scores = scored > 0;
    let wants_logits = match (scored, samples) {
        (1.., _) if scored == len => LogitsWanted::All,
        (1.., _) | (0, true) => LogitsWanted::Last,
        (0, false) => LogitsWanted::None,
    };
    let tokens = running.tokens[running.held..running.held + len].to_vec();
    plan.batch.rows.push(BatchRow { slot: running.slot, tokens, wants_logits });
    plan.rows.push(PlannedRow {
        id: running.id,
        first: running.held,
        len,
        prefill,
        samples,
        scores,
    });
}

/// Appends what was sampled; says whether the sequence has ended.
fn advance<'a>(
    running: &mut Running,
    row: &PlannedRow,
    sampled: &mut impl Iterator<Item = &'a Sampled>,
) -> Option<Ended> {
    if !row.samples {
        let read = running.prefill_left() == 0;
        return read.then_some(Ended::Length);
    }
    match sampled.next().expect("the number of tokens was asserted") {
        Sampled::Nothing => Some(Ended::Nothing),
        Sampled::Last(token) => {
            running.tokens.push(*token);
            Some(Ended::Stop)
        }
        Sampled::Token(token) => {
            running.tokens.push(*token);
            (running.generated() >= running.max_tokens).then_some(Ended::Length)
        }
    }
}
