//! From answers to one answer.

use std::time::Duration;

use super::super::merge;
use super::answers::Group;
use super::{Action, Attempt, Judge, Phase, Plan};
use crate::chat::{
    Analysis, Fault, FaultReason, FinishReason, FusionMode, FusionProgress, JudgeMethod,
    MemberState, MergeStyle, ModeUsed, NoQuorum, SentenceReport,
};

/// The end of a fusion.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// What was done.
    pub mode_used: ModeUsed,
    /// Why that is not what was asked for.
    pub mode_reason: Option<&'static str>,
    /// The attempt whose words these are, or begin with.
    pub winner: usize,
    /// The answer.
    pub text: String,
    /// The text has gone out already.
    pub written: bool,
    /// How it ended.
    pub finish: FinishReason,
    /// Less than was asked for.
    pub degraded: bool,
    /// Usable answers.
    pub usable: u8,
    /// Distinct answers, each with its votes, the weightiest first.
    pub votes: Vec<(String, u32)>,
    /// Whose the answer's sentences are.
    pub sentences: Vec<SentenceReport>,
    /// What was said against it.
    pub dissent: Vec<SentenceReport>,
    /// A comparison of the answers, if it was asked for.
    pub analysis: Option<Analysis>,
    /// Whether a judge said something that counted.
    pub judged: bool,
    /// A pair was judged in both orders.
    pub swapped: bool,
    /// Why the judge was not used, or no longer.
    pub judge_reason: Option<&'static str>,
}

impl Plan {
    /// The panel has ended: what now?
    pub(super) fn conclude(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let usable = self.ballots.len();
        if usable < usize::from(self.setup.quorum) {
            self.tell_degraded("no_quorum", actions);
            return match self.setup.on_no_quorum {
                NoQuorum::Error => self.refuse(actions),
                _ if usable == 0 => self.phase = Phase::Fallback,
                NoQuorum::Local => self.local(now, actions),
                NoQuorum::BestAvailable => self.best_available(now, actions),
            };
        }
        let unanimous = self.tally().len() == 1;
        if self.setup.mode == FusionMode::Debate && self.debate(unanimous, now, actions) {
            return;
        }
        let leader = self.tally().unassailable(0).map(str::to_owned);
        match self.setup.mode {
            FusionMode::Merge if unanimous => {
                self.mode_reason = Some("unanimous");
                self.vote(leader, now, actions);
            }
            FusionMode::Merge => self.judge(now, actions),
            _ => match leader.filter(|leader| self.is_decisive(leader)) {
                Some(leader) => self.vote(Some(leader), now, actions),
                None => self.judge(now, actions),
            },
        }
    }

    /// Whether the debate goes on, or has just decided.
    fn debate(&mut self, unanimous: bool, now: Duration, actions: &mut Vec<Action>) -> bool {
        if self.round > 0 && self.margin_fell() {
            let older = |ballot: usize| self.attempts[ballot].argues_for;
            self.ballots = self.ballots.iter().map(|&b| older(b).unwrap_or(b)).collect();
            self.mode_reason = Some("margin_fell");
            return false;
        }
        if self.round == 0 && (unanimous || self.has_majority()) {
            self.mode_reason = Some(if unanimous { "unanimous" } else { "decided" });
            return false;
        }
        if self.round >= self.setup.rounds || now >= self.share(80) {
            return false;
        }
        self.argue(now, actions);
        true
    }

    fn argue(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.round += 1;
        let mut ballots = self.ballots.clone();
        ballots.sort_by_key(|ballot| self.canonical(*ballot));
        for &ballot in &ballots {
            let mut ask = self.attempts[ballot].ask.clone();
            ask.id = format!("{}@{}", ask.id.split('@').next().unwrap_or(""), self.round);
            let mut attempt = Attempt::new(ask, self.round, now);
            attempt.argues_for = Some(ballot);
            self.attempts.push(attempt);
            actions.push(Action::Argue {
                attempt: self.attempts.len() - 1,
                own: self.text_of(ballot).to_owned(),
                others: ballots
                    .iter()
                    .filter(|other| **other != ballot)
                    .map(|other| self.text_of(*other).to_owned())
                    .collect(),
            });
        }
    }

    /// Whether the last round made the vote less clear.
    fn margin_fell(&self) -> bool {
        let mut before = self.clone();
        before.ballots =
            self.ballots.iter().map(|&b| self.attempts[b].argues_for.unwrap_or(b)).collect();
        self.tally().margin() < before.tally().margin()
    }

    fn vote(&mut self, leader: Option<String>, now: Duration, actions: &mut Vec<Action>) {
        let Some(winner) = leader.and_then(|key| self.group(&key)) else {
            return self.choose_by_weight(now, actions);
        };
        if self.setup.mode == FusionMode::BestOf {
            self.mode_reason = Some("decided");
        }
        let mode = match self.setup.mode {
            FusionMode::Debate if self.round > 0 && self.mode_reason.is_none() => ModeUsed::Debate,
            _ => ModeUsed::Vote,
        };
        self.decide_answer(mode, winner.representative, now, actions);
    }

    fn judge(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if matches!(self.setup.method, JudgeMethod::None | JudgeMethod::Vote) {
            return self.choose_by_weight(now, actions);
        }
        self.phase = Phase::Judging;
        self.advance_judging(now, actions);
    }

    /// Without a judge: the weightiest answer, then the strongest member's, then the smaller hash.
    pub(super) fn choose_by_weight(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let best = self.groups().into_iter().max_by(|a, b| {
            let none = self.setup.method == JudgeMethod::None;
            let sums = if none { std::cmp::Ordering::Equal } else { a.weight.cmp(&b.weight) };
            sums.then(a.heaviest.cmp(&b.heaviest)).then_with(|| b.hash.cmp(&a.hash))
        });
        match best {
            Some(best) => self.choose(&best.key, now, actions),
            None => self.refuse(actions),
        }
    }

    /// The answer is this one, or is to be merged around it.
    pub(super) fn choose(&mut self, key: &str, now: Duration, actions: &mut Vec<Action>) {
        let Some(group) = self.group(key) else { return self.refuse(actions) };
        let spine = group.representative;
        if self.setup.mode != FusionMode::Merge {
            let mode = match self.setup.mode {
                FusionMode::Debate if self.round > 0 && self.mode_reason.is_none() => {
                    ModeUsed::Debate
                }
                _ if self.judge_counted() => ModeUsed::BestOf,
                _ if self.is_closed() || self.setup.method == JudgeMethod::Vote => ModeUsed::Vote,
                _ => ModeUsed::BestOf,
            };
            return self.decide_answer(mode, spine, now, actions);
        }
        let may_write = self.setup.judge == Judge::Strong && self.judge_reason.is_none();
        match (self.setup.style, may_write) {
            (MergeStyle::Generative, false) => {
                let weaker = self.setup.judge == Judge::Weaker;
                self.mode_reason = Some(if weaker { "judge_weaker" } else { "judge_failed" });
                self.decide_answer(ModeUsed::BestOf, spine, now, actions);
            }
            (MergeStyle::Generative | MergeStyle::Auto, true) => {
                let drafts = self.sources().iter().map(|source| source.text.to_owned()).collect();
                self.phase = Phase::Writing { spine };
                actions.push(Action::Write { drafts });
            }
            _ => self.decide_answer(ModeUsed::MergeExtractive, spine, now, actions),
        }
    }

    /// The representatives by score, the strongest member's first among equals, then the smaller hash.
    pub(super) fn ranked(&self) -> Vec<Group> {
        let mut groups = self.groups();
        groups.sort_by(|a, b| {
            let scores = self.score_of(b).cmp(&self.score_of(a));
            scores.then(b.heaviest.cmp(&a.heaviest)).then_with(|| a.hash.cmp(&b.hash))
        });
        groups
    }

    pub(super) fn score_of(&self, group: &Group) -> i64 {
        self.scores.get(&group.text_hash).copied().unwrap_or(i64::MIN / 4)
    }

    /// Two keys in canonical order.
    pub(super) fn pair(&self, one: &str, other: &str) -> (String, String) {
        let hash = |key: &str| self.group(key).map(|group| group.hash);
        match hash(one) <= hash(other) {
            true => (one.to_owned(), other.to_owned()),
            false => (other.to_owned(), one.to_owned()),
        }
    }

    /// Which of two equally good answers it is.
    pub(super) fn prior(&self, one: &str, other: &str) -> String {
        let rank = |key: &str| {
            let group = self.group(key);
            group.map(|group| (group.heaviest, std::cmp::Reverse(group.hash)))
        };
        if rank(one) >= rank(other) { one.to_owned() } else { other.to_owned() }
    }

    fn judge_counted(&self) -> bool {
        self.judge_reason.is_none() && self.told_judge
    }

    fn local(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let asked = self.ballots.iter().copied().find(|ballot| self.attempts[*ballot].ask.local);
        match asked {
            Some(local) => {
                self.mode_reason = Some("no_quorum");
                self.decide_answer(ModeUsed::Single, local, now, actions);
            }
            None if self.attempts.iter().any(|attempt| attempt.ask.fallback) => {
                self.phase = Phase::Fallback;
            }
            None => self.best_available(now, actions),
        }
    }

    /// Fewer answers than wanted: the strongest member's whole one.
    pub(super) fn best_available(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let best = self.ballots.iter().copied().min_by_key(|ballot| self.canonical(*ballot));
        let Some(best) = best else { return self.refuse(actions) };
        self.mode_reason = Some("no_quorum");
        let mode = if self.ballots.len() == 1 { ModeUsed::Single } else { ModeUsed::BestOf };
        self.decide_answer(mode, best, now, actions);
    }

    pub(super) fn decide_written(
        &mut self,
        spine: usize,
        text: String,
        finish: FinishReason,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let sentences = merge::trace(&text, &self.sources());
        let mut decision = self.decision(ModeUsed::MergeGenerative, spine);
        decision.text = text;
        decision.finish = finish;
        decision.written = true;
        decision.sentences = sentences;
        self.end(decision, now, actions);
    }

    pub(super) fn decide_answer(
        &mut self,
        mode_used: ModeUsed,
        winner: usize,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let mut decision = self.decision(mode_used, winner);
        if mode_used == ModeUsed::MergeExtractive {
            let sources = self.sources();
            let spine = sources.iter().position(|s| s.id == self.attempts[winner].ask.id);
            let merged = merge::extract(&sources, spine.unwrap_or(0));
            decision.text = merged.text;
            decision.sentences = merged.sentences;
            decision.dissent = merged.dissent;
        }
        self.end(decision, now, actions);
    }

    fn decision(&self, mode_used: ModeUsed, winner: usize) -> Decision {
        let end = self.attempts[winner].end.as_ref();
        let text = self.text_of(winner).to_owned();
        let id = self.attempts[winner].ask.id.clone();
        let mut groups = self.groups();
        groups.sort_by(|a, b| b.weight.cmp(&a.weight).then_with(|| a.hash.cmp(&b.hash)));
        let usable = self.ballots.len();
        let short = |text: &str| text.chars().take(VOTE_CHARS).collect();
        let key = self.usable(winner).map(|usable| usable.key.clone());
        Decision {
            mode_used,
            mode_reason: self.mode_reason,
            winner,
            sentences: merge::sentences(&text)
                .into_iter()
                .map(|sentence| SentenceReport {
                    text: sentence.to_owned(),
                    from: vec![id.clone()],
                    support: 1,
                })
                .collect(),
            text,
            written: false,
            finish: end.map_or(FinishReason::Stop, |end| end.finish),
            degraded: usable < usize::from(self.setup.quorum)
                || end.is_some_and(|end| end.state == MemberState::Partial),
            usable: usable as u8,
            dissent: groups
                .iter()
                .filter(|group| self.is_closed() && Some(&group.key) != key.as_ref())
                .map(|group| SentenceReport {
                    text: short(self.text_of(group.representative)),
                    from: group.votes.iter().map(|v| self.attempts[*v].ask.id.clone()).collect(),
                    support: group.votes.len() as u32,
                })
                .collect(),
            votes: groups.iter().map(|g| (short(&g.key), g.votes.len() as u32)).collect(),
            analysis: self.setup.analysis.then(|| merge::analyse(&self.sources())),
            judged: self.judge_counted(),
            swapped: self.swapped && self.judge_counted(),
            judge_reason: self.judge_reason,
        }
    }

    fn end(&mut self, decision: Decision, now: Duration, actions: &mut Vec<Action>) {
        if decision.degraded {
            self.tell_degraded("partial", actions);
        }
        self.close(FaultReason::EarlyStop, now, actions);
        self.drop_fallback(now, actions);
        self.phase = Phase::Done;
        actions.push(Action::Decide(Box::new(decision)));
    }

    pub(super) fn refuse(&mut self, actions: &mut Vec<Action>) {
        let told: Vec<String> = self
            .attempts
            .iter()
            .filter_map(|attempt| {
                let end = attempt.end.as_ref()?;
                let why = end.reason.map_or(end.state.as_str().to_owned(), |r| r.to_string());
                Some(format!("{}: {why}", attempt.ask.id))
            })
            .collect();
        for index in 0..self.attempts.len() {
            if self.attempts[index].end.is_none() {
                actions.push(Action::Drop(index));
            }
        }
        self.phase = Phase::Done;
        let fault = Fault::explained(FaultReason::NoQuorum, told.join(", "));
        actions.push(Action::Refuse(fault));
    }

    fn drop_fallback(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let running = |attempt: &Attempt| attempt.ask.fallback && attempt.end.is_none();
        if let Some(index) = self.attempts.iter().position(running) {
            actions.push(Action::Drop(index));
            self.attempts[index].end = Some(super::End {
                state: MemberState::Cancelled,
                reason: Some(FaultReason::EarlyStop),
                at: now,
                ..super::End::none()
            });
        }
    }

    fn tell_degraded(&mut self, reason: &'static str, actions: &mut Vec<Action>) {
        if !std::mem::replace(&mut self.told_degraded, true) {
            actions.push(Action::Tell(FusionProgress::Degraded { reason }));
        }
    }
}

/// How much of an answer the table of votes repeats.
const VOTE_CHARS: usize = 200;
