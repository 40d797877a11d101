//! Who is asked, who stands by, and who judges.

use std::time::Duration;

use super::answer::Form;
use super::calibrate::Calibration;
use super::member::{Health, Member, MemberKind, ScoreKind};
use super::plan::{Ask, Judge};
use super::weight::family_weight;
use crate::chat::{ChatError, FaultReason, FusionRequest, JudgeMethod};

/// The members of one fusion.
#[derive(Clone, Debug)]
pub(super) struct Selection {
    /// All members of the roster that have a part in it; the asks name them by index.
    pub(super) members: Vec<Member>,
    /// Asked at once, the strongest first.
    pub(super) asks: Vec<Ask>,
    /// Asked if connecting to one of those fails.
    pub(super) spares: Vec<Ask>,
    /// Not asked, and why.
    pub(super) skipped: Vec<(usize, FaultReason)>,
    /// Who judges, and what it may do.
    pub(super) judge: Result<(usize, Judge), &'static str>,
    /// Members that could be asked.
    pub(super) healthy: usize,
    /// Each member is asked for so many answers.
    pub(super) samples: u8,
}

/// What the choice of members depends on.
pub(super) struct Wanted<'a> {
    pub(super) options: &'a FusionRequest,
    pub(super) form: &'a Form,
    pub(super) calibration: &'a Calibration,
    /// Tokens of the prompt, roughly, and of the answer at most.
    pub(super) tokens: (u32, u32),
    /// Time for the answers.
    pub(super) panel: Duration,
    /// The likeliest token is always taken: equal models give equal answers.
    pub(super) greedy: bool,
    /// Most answers of one fusion, as the owner set it.
    pub(super) answers_max: u8,
}

/// # Errors
/// `Invalid` for names that no member has.
pub(super) fn select(roster: Vec<Member>, wanted: &Wanted<'_>) -> Result<Selection, ChatError> {
    let options = wanted.options;
    check_names(&roster, options)?;
    let mut selection = Selection {
        members: roster,
        asks: Vec::new(),
        spares: Vec::new(),
        skipped: Vec::new(),
        judge: Err("no_judge"),
        healthy: 0,
        samples: options.samples,
    };
    let mut able = selection.able(wanted);
    selection.healthy = able.len();
    selection.judge = judge(&selection.members, &able, wanted);
    let members = &selection.members;
    able.sort_by(|&a, &b| strongest_first(members, wanted, a, b));
    if options.n == Some(1) && options.members.len() != 1 {
        // One answer is wanted: whoever is ready first.
        able.sort_by_key(|&index| predicted(&members[index], wanted));
    }
    let able = selection.without_weak(able, wanted);
    let (twins, able) = selection.twins(able, wanted);
    let asked = usize::from(options.n.unwrap_or(3).min(wanted.answers_max)).min(able.len());
    let per_member = usize::from(options.samples);
    let room = usize::from(wanted.answers_max / options.samples.max(1)).max(1);
    let asked = asked.min(room);
    for &index in &able[..asked] {
        let weight = wanted.calibration.weight(&selection.members[index], wanted.form);
        let family = selection.family(&able[..asked], index, wanted) * per_member;
        for sample in 0..options.samples {
            let ask = selection.ask(index, sample, family_weight(weight, family));
            selection.asks.push(ask);
        }
    }
    for &index in able[asked..].iter().chain(&twins) {
        let weight = wanted.calibration.weight(&selection.members[index], wanted.form);
        let ask = selection.ask(index, 0, weight);
        selection.spares.push(ask);
    }
    selection.add_fallback();
    if let Ok((judge, may)) = &mut selection.judge {
        let judge = &selection.members[*judge];
        let weaker = selection.asks.iter().filter(|ask| !ask.fallback).any(|ask| {
            let member = &selection.members[ask.member];
            wanted.calibration.is_stronger(member, judge, wanted.form.kind())
        });
        *may = if weaker { Judge::Weaker } else { Judge::Strong };
    }
    Ok(selection)
}

fn check_names(roster: &[Member], options: &FusionRequest) -> Result<(), ChatError> {
    for pattern in &options.members {
        if !roster.iter().any(|member| member.matches(pattern)) {
            let message = format!("fusion.members: no member is called \"{pattern}\"");
            return Err(ChatError::invalid("fusion.members", message));
        }
    }
    let judge = options.judge.model.as_str();
    let known = matches!(judge, "auto" | "local") || roster.iter().any(|m| *m.id == *judge);
    if known {
        return Ok(());
    }
    let message = format!("fusion.judge.model: no member is called \"{judge}\"");
    Err(ChatError::invalid("fusion.judge.model", message))
}

impl Selection {
    /// Members that can be asked; the others are noted as skipped.
    fn able(&mut self, wanted: &Wanted<'_>) -> Vec<usize> {
        let patterns = &wanted.options.members;
        let mut able = Vec::new();
        for (index, member) in self.members.iter().enumerate() {
            let meant =
                patterns.is_empty() || patterns.iter().any(|pattern| member.matches(pattern));
            if !meant || matches!(member.vitals.health, Health::Candidate | Health::Left) {
                continue;
            }
            match unable(member, wanted) {
                None => able.push(index),
                Some(reason) => self.skipped.push((index, reason)),
            }
        }
        able
    }

    /// Weak members help beside one strong one, but not beside two; who is named is asked.
    fn without_weak(&mut self, able: Vec<usize>, wanted: &Wanted<'_>) -> Vec<usize> {
        let best = able.iter().map(|&index| self.members[index].tier()).max();
        let strong = able.iter().filter(|&&index| Some(self.members[index].tier()) == best).count();
        if strong < 2 {
            return able;
        }
        let named =
            |member: &Member| wanted.options.members.iter().any(|name| **name == *member.id);
        let (kept, weak): (Vec<usize>, Vec<usize>) = able.into_iter().partition(|&index| {
            let member = &self.members[index];
            Some(member.tier()) == best || named(member)
        });
        self.skipped.extend(weak.iter().map(|&index| (index, FaultReason::WeakBesideStrong)));
        kept
    }

    /// Members that would only repeat another's answer, and the rest.
    fn twins(&self, able: Vec<usize>, wanted: &Wanted<'_>) -> (Vec<usize>, Vec<usize>) {
        let mut seen: Vec<&str> = Vec::new();
        able.into_iter().partition(|&index| {
            let Some(digest) = self.members[index].digest.as_deref() else { return false };
            let repeats = wanted.greedy && wanted.options.samples == 1 && seen.contains(&digest);
            seen.push(digest);
            repeats
        })
    }

    /// Members of the same family among those asked.
    fn family(&self, asked: &[usize], index: usize, wanted: &Wanted<'_>) -> usize {
        let model = |index: usize| Calibration::model_of(&self.members[index]);
        let sampled = !wanted.greedy || wanted.options.samples > 1;
        let same = asked.iter().filter(|&&other| model(other) == model(index)).count();
        if sampled { same } else { 1 }
    }

    fn ask(&self, index: usize, sample: u8, weight: u32) -> Ask {
        let member = &self.members[index];
        let id = match sample {
            0 => member.id.to_string(),
            more => format!("{}#{}", member.id, more + 1),
        };
        let local = member.kind == MemberKind::Local;
        Ask { member: index, id, weight, tier: member.tier(), local, fallback: false }
    }

    /// The local model answers too, so that there is an answer if nobody else has one.
    fn add_fallback(&mut self) {
        let local = |member: &Member| member.kind == MemberKind::Local && member.is_healthy();
        let Some(index) = self.members.iter().position(local) else { return };
        if self.asks.iter().any(|ask| ask.member == index) {
            return;
        }
        self.spares.retain(|ask| ask.member != index);
        let ask = self.ask(index, 0, 0);
        self.asks.push(Ask { fallback: true, ..ask });
    }
}

fn unable(member: &Member, wanted: &Wanted<'_>) -> Option<FaultReason> {
    let vitals = &member.vitals;
    let full = member.max_in_flight.is_some_and(|max| vitals.in_flight >= max);
    let alone = member.kind == MemberKind::Dllama && vitals.in_flight > 0;
    let late = member.vitals.predict(wanted.tokens.0, 1).is_some_and(|first| first > wanted.panel);
    match () {
        () if vitals.health == Health::Open => Some(FaultReason::BreakerOpen),
        () if vitals.headroom == Some(0) => Some(FaultReason::NoHeadroom),
        () if vitals.hot => Some(FaultReason::Hot),
        () if full || alone => Some(FaultReason::Load),
        () if late => Some(FaultReason::TooLate),
        () => None,
    }
}

fn strongest_first(
    members: &[Member],
    wanted: &Wanted<'_>,
    a: usize,
    b: usize,
) -> std::cmp::Ordering {
    let rank = |index: usize| {
        let member = &members[index];
        (member.tier(), wanted.calibration.weight(member, wanted.form))
    };
    let time = |index: usize| predicted(&members[index], wanted);
    rank(b).cmp(&rank(a)).then(time(a).cmp(&time(b))).then(members[a].id.cmp(&members[b].id))
}

fn predicted(member: &Member, wanted: &Wanted<'_>) -> Duration {
    let (prompt, output) = wanted.tokens;
    member.vitals.predict(prompt, output).unwrap_or(member.vitals.queue)
}

/// The judge by the request, or the strongest that can score exactly.
fn judge(
    members: &[Member],
    able: &[usize],
    wanted: &Wanted<'_>,
) -> Result<(usize, Judge), &'static str> {
    let options = wanted.options;
    if matches!(options.judge.method, JudgeMethod::None | JudgeMethod::Vote) {
        return Err("not_wanted");
    }
    let found = |index: usize| Ok((index, Judge::Weaker));
    let asked_for = match options.judge.model.as_str() {
        "auto" => None,
        "local" => Some(members.iter().position(|member| member.kind == MemberKind::Local)),
        id => Some(members.iter().position(|member| *member.id == *id)),
    };
    if let Some(index) = asked_for {
        let Some(index) = index else { return Err("no_judge") };
        return match &members[index] {
            member if !member.is_healthy() => Err("judge_down"),
            member if member.score == ScoreKind::None => Err("judge_no_logprobs"),
            _ => found(index),
        };
    }
    let exact = (0..members.len())
        .filter(|&index| members[index].is_healthy() && members[index].score == ScoreKind::Exact);
    let large = |member: &Member| {
        let size = member.parameters.map(|(active, total)| (active as f64 * total as f64).sqrt());
        member.tier.is_some() || size.is_none_or(|size| size >= JUDGE_WEIGHTS_MIN)
    };
    let all: Vec<usize> = exact.collect();
    let fit: Vec<usize> = all.iter().copied().filter(|&i| large(&members[i])).collect();
    // Among equally strong ones, one that has no answer to write has its cores free.
    let best = fit.into_iter().min_by(|&a, &b| {
        let busy = |index: usize| able.contains(&index);
        let tier = members[b].tier().cmp(&members[a].tier());
        tier.then(busy(a).cmp(&busy(b))).then_with(|| strongest_first(members, wanted, a, b))
    });
    match best {
        Some(index) => found(index),
        None if all.is_empty() => Err("no_judge"),
        None => Err("judge_too_small"),
    }
}

/// Smaller models' verdicts are close to chance; whoever wants one names it.
const JUDGE_WEIGHTS_MIN: f64 = 1.5e9;
