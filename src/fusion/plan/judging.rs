//! What the judge is asked, and what its word comes to.

use std::time::Duration;

use super::super::judge::TAU_MILLI;
use super::{Action, Phase, Plan};
use crate::chat::{FusionProgress, JudgeMethod};

impl Plan {
    pub(super) fn score_missing(&mut self, actions: &mut Vec<Action>) -> bool {
        let mut missing = false;
        for group in self.groups() {
            if self.scores.contains_key(&group.text_hash) {
                continue;
            }
            missing = true;
            if self.judged.insert(group.text_hash.clone()) {
                self.tell_judge(actions);
                let text = self.text_of(group.representative).to_owned();
                actions.push(Action::Score { hash: group.text_hash, text });
            }
        }
        missing
    }

    pub(super) fn advance_judging(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.judge_reason.is_none() && now >= self.judge_end() {
            self.judge_reason = Some("late");
        }
        if self.judge_reason.is_some() {
            return self.choose_by_weight(now, actions);
        }
        let groups = self.groups();
        if let [only] = groups.as_slice() {
            let key = only.key.clone();
            return self.choose(&key, now, actions);
        }
        if self.setup.method == JudgeMethod::Pairwise {
            let mut keys = groups.into_iter().map(|group| group.key);
            let (champion, rest) = (keys.next().unwrap_or_default(), keys.collect());
            return self.compare_next(champion, rest, now, actions);
        }
        if self.score_missing(actions) {
            return;
        }
        let ranked = self.ranked();
        let close = self.score_of(&ranked[0]) - self.score_of(&ranked[1]) < TAU_MILLI;
        let [first, second] = [0, 1].map(|place| ranked[place].key.clone());
        match close && self.setup.method == JudgeMethod::Auto {
            true => self.compare_next(first, vec![second], now, actions),
            false => self.choose(&first, now, actions),
        }
    }

    fn compare_next(
        &mut self,
        champion: String,
        mut rest: Vec<String>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        if rest.is_empty() {
            return self.choose(&champion, now, actions);
        }
        self.tell_judge(actions);
        let challenger = rest.remove(0);
        // In canonical order, so that the pair is the same pair whatever came first.
        let (first, second) = self.pair(&champion, &challenger);
        let text = |key: &str| {
            let representative = self.group(key).map(|group| group.representative);
            representative.map(|attempt| self.text_of(attempt).to_owned()).unwrap_or_default()
        };
        actions.push(Action::Compare { first: text(&first), second: text(&second) });
        self.phase = Phase::Comparing { champion, challenger, rest };
        self.swapped = self.setup.swap;
    }

    pub(super) fn compared(&mut self, milli: i64, now: Duration, actions: &mut Vec<Action>) {
        let Phase::Comparing { champion, challenger, rest } = &self.phase else { return };
        let (champion, challenger, rest) = (champion.clone(), challenger.clone(), rest.clone());
        let (first, second) = self.pair(&champion, &challenger);
        let winner = match milli {
            0 => self.prior(&champion, &challenger),
            1.. => first,
            _ => second,
        };
        self.compare_next(winner, rest, now, actions);
    }

    fn tell_judge(&mut self, actions: &mut Vec<Action>) {
        if !std::mem::replace(&mut self.told_judge, true) {
            actions.push(Action::Tell(FusionProgress::JudgeStart {
                judge: String::new(),
                method: self.setup.method,
            }));
        }
    }
}
