//! The pure plan of one fusion: `(state, event, now) → actions`.
//!
//! It knows no clock, no socket and no model. Time is the time since the fusion began, answers are texts, weights and
//! scores are whole thousandths. Whatever the order of events, the same usable answers give the same decision.

mod answers;
mod decide;
mod judging;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

pub use answers::{Attempt, End};
pub use decide::Decision;
pub use vocabulary::{Action, Ask, Event, Judge, Setup};

use super::answer::Usable;
use super::merge;
use super::weight::Tally;
use crate::chat::{FaultReason, FusionMode, FusionProgress, JudgeMethod, MemberState, ModeUsed};

/// How far a fusion is.
#[derive(Clone, Debug, PartialEq)]
enum Phase {
    /// Members answer; a debate's later rounds too.
    Panel,
    /// Nobody has a usable answer but the local model may have one.
    Fallback,
    /// The judge scores what is not yet scored.
    Judging,
    /// The judge compares the champion with the next of the rest.
    Comparing { champion: String, challenger: String, rest: Vec<String> },
    /// The judge writes.
    Writing { spine: usize },
    /// Decided or refused.
    Done,
}

/// One fusion.
#[derive(Clone, Debug)]
pub struct Plan {
    setup: Setup,
    attempts: Vec<Attempt>,
    phase: Phase,
    /// Answers that count now: one attempt for each member that has answered.
    ballots: Vec<usize>,
    /// Rounds of debate begun.
    round: u8,
    /// When the quorum was reached.
    quorum_at: Option<Duration>,
    scores: BTreeMap<String, i64>,
    /// Texts given to the judge.
    judged: BTreeSet<String>,
    /// Why the judge is not used, or no longer.
    judge_reason: Option<&'static str>,
    swapped: bool,
    mode_reason: Option<&'static str>,
    told_judge: bool,
    told_degraded: bool,
}

impl Plan {
    /// A plan and its first actions.
    pub fn begin(setup: Setup) -> (Plan, Vec<Action>) {
        let attempts: Vec<Attempt> =
            setup.asks.iter().map(|ask| Attempt::new(ask.clone(), 0, Duration::ZERO)).collect();
        let actions = (0..attempts.len()).map(Action::Ask).collect();
        let judge_reason = match setup.judge {
            Judge::Absent(reason) => Some(reason),
            _ => None,
        };
        let plan = Plan {
            setup,
            attempts,
            phase: Phase::Panel,
            ballots: Vec::new(),
            round: 0,
            quorum_at: None,
            scores: BTreeMap::new(),
            judged: BTreeSet::new(),
            judge_reason,
            swapped: false,
            mode_reason: None,
            told_judge: false,
            told_degraded: false,
        };
        (plan, actions)
    }

    /// Takes in what happened and says what follows.
    pub fn step(&mut self, event: Event, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.phase == Phase::Done {
            return actions;
        }
        // More of an answer changes nothing before it ends, and members may send it byte by byte.
        let more = matches!(event, Event::Text { .. } | Event::Call { .. });
        self.take(event, now, &mut actions);
        if more && self.wake().is_some_and(|wake| now < wake) {
            return actions;
        }
        self.advance(now, &mut actions);
        actions
    }

    /// When it has to be told that time has passed, if nothing else happens.
    pub fn wake(&self) -> Option<Duration> {
        match &self.phase {
            Phase::Panel => {
                // Later rounds of a debate have their share of the time and no grace.
                let grace = self.quorum_at.filter(|_| self.round == 0).map(|_| self.grace_end());
                Some(grace.map_or(self.panel_end(), |grace| grace.min(self.panel_end())))
            }
            Phase::Fallback => Some(self.share(95)),
            Phase::Judging | Phase::Comparing { .. } => Some(self.judge_end()),
            Phase::Writing { .. } => Some(self.share(97)),
            Phase::Done => None,
        }
    }

    /// All attempts so far.
    pub fn attempts(&self) -> &[Attempt] {
        &self.attempts
    }

    /// The scores so far, by SHA-256 of the text.
    pub fn scores(&self) -> &BTreeMap<String, i64> {
        &self.scores
    }

    /// What it set out with.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// When the members of the current round have to be ready.
    pub fn panel_end(&self) -> Duration {
        let enough = self.ballots.len() >= usize::from(self.setup.quorum);
        match self.setup.mode {
            FusionMode::Debate if enough && self.round > 0 => {
                let rounds = u32::from(self.setup.rounds.max(1));
                self.share(45 + 45 * u32::from(self.round) / rounds)
            }
            FusionMode::Debate if enough => self.share(45),
            _ if enough && self.would_judge() => self.share(70),
            _ => self.share(95),
        }
    }

    fn take(&mut self, event: Event, now: Duration, actions: &mut Vec<Action>) {
        match event {
            Event::Text { attempt, text } => {
                if let Some(attempt) = self.running(attempt) {
                    attempt.said.push_str(&text);
                }
            }
            Event::Call { attempt } => {
                if let Some(attempt) = self.running(attempt) {
                    attempt.calls += 1;
                }
            }
            Event::Ended { attempt, finish } => {
                let end = self.running(attempt).map(|a| (a.said.clone(), a.calls));
                let Some((said, calls)) = end else { return };
                let end = answers::ended(&self.setup.form, &said, calls, finish);
                self.finish(attempt, end, now, actions);
            }
            Event::Failed { attempt, reason } => {
                let Some(said) = self.running(attempt).map(|a| a.said.clone()) else { return };
                let end = answers::failed(&self.setup.form, &said, reason);
                let retry =
                    matches!(reason, FaultReason::ConnectRefused | FaultReason::ConnectTimeout)
                        && self.round == 0
                        && !self.attempts[attempt].ask.fallback;
                self.finish(attempt, end, now, actions);
                if retry && !self.setup.spares.is_empty() {
                    let ask = self.setup.spares.remove(0);
                    self.attempts.push(Attempt::new(ask, 0, now));
                    actions.push(Action::Ask(self.attempts.len() - 1));
                }
            }
            Event::Scored { hash, milli } => {
                self.scores.insert(hash, milli);
            }
            Event::Compared { milli } => self.compared(milli, now, actions),
            Event::JudgeFailed { reason } => self.judge_reason = Some(reason),
            Event::Written { text, finish } => {
                if let Phase::Writing { spine } = self.phase {
                    self.decide_written(spine, text, finish, now, actions);
                }
            }
            Event::NotWritten => {
                if let Phase::Writing { spine } = self.phase {
                    self.mode_reason = Some("judge_failed");
                    self.decide_answer(ModeUsed::BestOf, spine, now, actions);
                }
            }
            Event::Tick => {}
        }
    }

    fn advance(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.phase == Phase::Panel {
            self.advance_panel(now, actions);
        }
        if self.phase == Phase::Fallback {
            self.advance_fallback(now, actions);
        }
        if self.phase == Phase::Judging {
            self.advance_judging(now, actions);
        }
        if let Phase::Comparing { champion, .. } = &self.phase
            && (self.judge_reason.is_some() || now >= self.judge_end())
        {
            let champion = champion.clone();
            self.judge_reason = self.judge_reason.or(Some("late"));
            self.choose(&champion, now, actions);
        }
        if matches!(self.phase, Phase::Writing { .. }) && now >= self.share(97) {
            actions.push(Action::StopWriting);
        }
    }

    fn advance_panel(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let quorum = usize::from(self.setup.quorum);
        if self.quorum_at.is_none() && self.ballots.len() >= quorum {
            self.quorum_at = Some(now);
            actions.push(Action::Tell(FusionProgress::Quorum {
                usable: self.ballots.len() as u8,
                needed: self.setup.quorum,
            }));
        }
        if self.round == 0 && self.quorum_at.is_some() && self.stops_early() {
            self.close(FaultReason::EarlyStop, now, actions);
            return self.conclude(now, actions);
        }
        let asked = |attempt: &Attempt| !attempt.ask.fallback && attempt.end.is_none();
        if !self.attempts.iter().any(asked) {
            return self.conclude(now, actions);
        }
        if self.quorum_at.is_some() && self.round == 0 && now >= self.grace_end() {
            self.close(FaultReason::GraceOver, now, actions);
            return self.conclude(now, actions);
        }
        if now >= self.panel_end() {
            self.close(FaultReason::Deadline, now, actions);
            return self.conclude(now, actions);
        }
        if self.would_judge() && self.round == 0 && self.setup.method != JudgeMethod::Pairwise {
            self.score_missing(actions);
        }
    }

    /// Whether what is outstanding cannot change the answer.
    fn stops_early(&self) -> bool {
        if self.setup.mode == FusionMode::Merge {
            return false;
        }
        let outstanding: u64 = self
            .attempts
            .iter()
            .filter(|attempt| !attempt.ask.fallback && attempt.end.is_none())
            .map(|attempt| u64::from(attempt.ask.weight))
            .sum();
        // Cut-off answers with the same words agree on how far they came, not on an answer.
        let any_whole = self.ballots.iter().any(|&ballot| self.attempts[ballot].is_whole());
        if outstanding > 0 && !self.setup.form.is_closed() && !any_whole {
            return false;
        }
        if self.setup.mode == FusionMode::Debate {
            return self.has_majority();
        }
        let tally = self.tally();
        tally.unassailable(outstanding).is_some_and(|leader| self.is_decisive(leader))
    }

    /// Whether one answer has more than half of all weight that was asked: then there is nothing to debate.
    fn has_majority(&self) -> bool {
        let asked = self.attempts.iter().filter(|a| !a.ask.fallback && a.round == 0);
        let all: u64 = asked.map(|attempt| u64::from(attempt.ask.weight)).sum();
        let tally = self.tally();
        tally.leader().is_some_and(|(key, sum)| sum * 2 > all && self.is_decisive(key))
    }

    /// In open text weight alone decides nothing: two answers must be the same.
    fn is_decisive(&self, leader: &str) -> bool {
        self.is_closed() || self.votes_for(leader) >= 2
    }

    /// When stragglers have had their time after the quorum.
    fn grace_end(&self) -> Duration {
        let reached = self.quorum_at.unwrap_or_default();
        let panel_end = self.panel_end();
        if let Some(grace) = self.setup.grace {
            return (reached + grace).min(panel_end);
        }
        let grace = (reached / 4).max(Duration::from_millis(500));
        let end = (reached + grace).min(panel_end);
        let best = self.ballots.iter().map(|&ballot| self.attempts[ballot].ask.tier).max();
        let stronger = self.attempts.iter().any(|attempt| {
            let pending = attempt.end.is_none() && !attempt.ask.fallback;
            pending && Some(attempt.ask.tier) > best
        });
        match stronger {
            // A fast small majority must not shut out the strong member, up to half of the time that is left.
            true => end.max(reached + panel_end.saturating_sub(reached) / 2),
            false => end,
        }
    }

    /// Ends what still runs; at the deadline with what it has said so far.
    fn close(&mut self, reason: FaultReason, now: Duration, actions: &mut Vec<Action>) {
        for index in 0..self.attempts.len() {
            let attempt = &self.attempts[index];
            if attempt.end.is_some() || attempt.ask.fallback {
                continue;
            }
            let end = match reason {
                FaultReason::Deadline => {
                    answers::failed(&self.setup.form, &attempt.said, FaultReason::Deadline)
                }
                reason => {
                    End { state: MemberState::Cancelled, reason: Some(reason), ..End::none() }
                }
            };
            actions.push(Action::Drop(index));
            self.finish(index, end, now, actions);
        }
    }

    fn finish(&mut self, index: usize, mut end: End, now: Duration, actions: &mut Vec<Action>) {
        end.at = now;
        let attempt = &mut self.attempts[index];
        actions.push(Action::Tell(FusionProgress::MemberDone {
            id: attempt.ask.id.clone(),
            state: end.state,
            reason: end.reason,
            elapsed: now.saturating_sub(attempt.begun),
        }));
        if end.usable.is_some() && !attempt.ask.fallback {
            match attempt.argues_for {
                // The newer answer takes the place of the older one.
                Some(older) => {
                    let place = self.ballots.iter().position(|ballot| *ballot == older);
                    if let Some(place) = place {
                        self.ballots[place] = index;
                    }
                }
                None => self.ballots.push(index),
            }
        }
        attempt.end = Some(end);
    }

    /// Whether a judge would be asked about the answers so far.
    fn would_judge(&self) -> bool {
        let merges = self.setup.mode == FusionMode::Merge;
        let asks = !matches!(self.setup.method, JudgeMethod::None | JudgeMethod::Vote);
        asks && self.judge_reason.is_none() && (merges || !self.is_closed())
    }

    /// Whether answers are counted rather than judged.
    fn is_closed(&self) -> bool {
        let short = |&ballot: &usize| self.usable(ballot).is_some_and(|usable| usable.words <= 5);
        self.setup.form.is_closed() || (!self.ballots.is_empty() && self.ballots.iter().all(short))
    }

    fn usable(&self, attempt: usize) -> Option<&Usable> {
        self.attempts[attempt].end.as_ref()?.usable.as_ref()
    }

    /// Votes of whole answers; of partial ones where their form says that they are complete, or there are no others.
    fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        for ballot in self.voters() {
            if let Some(usable) = self.usable(ballot) {
                tally.add(&usable.key, self.attempts[ballot].ask.weight);
            }
        }
        tally
    }

    fn voters(&self) -> Vec<usize> {
        let whole = |&ballot: &usize| self.attempts[ballot].is_whole();
        let any_whole = self.ballots.iter().any(&whole);
        let all = self.ballots.iter().copied();
        match self.setup.form.is_closed() || !any_whole {
            true => all.collect(),
            false => all.filter(whole).collect(),
        }
    }

    fn votes_for(&self, key: &str) -> usize {
        let same = |ballot: &usize| self.usable(*ballot).is_some_and(|usable| usable.key == key);
        self.voters().iter().filter(|ballot| same(ballot)).count()
    }

    fn running(&mut self, attempt: usize) -> Option<&mut Attempt> {
        self.attempts.get_mut(attempt).filter(|attempt| attempt.end.is_none())
    }

    fn share(&self, percent: u32) -> Duration {
        self.setup.deadline * percent / 100
    }

    fn judge_end(&self) -> Duration {
        self.share(95)
    }

    /// A fallback that nobody else can replace.
    fn advance_fallback(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Some(index) = self.attempts.iter().position(|attempt| attempt.ask.fallback) else {
            return self.refuse(actions);
        };
        if self.attempts[index].end.is_none() && now >= self.share(95) {
            let said = self.attempts[index].said.clone();
            let end = answers::failed(&self.setup.form, &said, FaultReason::Deadline);
            actions.push(Action::Drop(index));
            self.finish(index, end, now, actions);
        }
        if self.attempts[index].end.is_none() {
            return;
        }
        match self.usable(index).is_some() {
            true => {
                self.mode_reason = Some("no_quorum");
                self.decide_answer(ModeUsed::Single, index, now, actions);
            }
            false if self.ballots.is_empty() => self.refuse(actions),
            false => self.best_available(now, actions),
        }
    }

    fn sources(&self) -> Vec<merge::Source<'_>> {
        let groups = self.groups();
        let of = |attempt: usize| merge::Source {
            id: &self.attempts[attempt].ask.id,
            text: self.text_of(attempt),
        };
        let mut ballots: Vec<usize> =
            groups.iter().flat_map(|group| group.votes.iter().copied()).collect();
        ballots.sort_by_key(|ballot| self.canonical(*ballot));
        ballots.into_iter().map(of).collect()
    }

    fn text_of(&self, attempt: usize) -> &str {
        self.usable(attempt).map_or("", |usable| usable.text.as_str())
    }
}
