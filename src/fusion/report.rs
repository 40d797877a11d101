//! The report that goes with an answer.

use std::sync::Arc;
use std::time::Duration;

use super::desk::add;
use super::drive::Drive;
use super::judge;
use super::plan::{Attempt, Decision};
use super::receipt::{self, Facts};
use crate::chat::{
    Completion, FusionReport, FusionTiming, Include, JudgeMethod, JudgeReport, MemberReport,
    MemberState, MemberUsage, QuorumReport, Timings, Usage,
};

/// The end of a fused answer.
pub(super) fn completion(drive: &Drive, decision: &Decision, total: Duration) -> Completion {
    let usage_by_member = usage_by_member(drive);
    let usage = usage_by_member.iter().fold(Usage::default(), |sum, one| add(sum, one.usage));
    let report = report(drive, decision, total, usage_by_member);
    Completion {
        finish: decision.finish,
        usage,
        timings: Timings { prefill: total, ..Timings::default() },
        fusion: Some(Arc::new(report)),
    }
}

fn report(
    drive: &Drive,
    decision: &Decision,
    total: Duration,
    usage_by_member: Vec<MemberUsage>,
) -> FusionReport {
    let job = &drive.job;
    let plan = &drive.plan;
    let options = &job.options;
    let digest = |member: usize| -> Option<String> {
        job.selection.members.get(member)?.digest.as_deref().map(str::to_owned)
    };
    let facts = Facts {
        pool: &job.settings.pool,
        prompt: &job.prompt_hash,
        seed: options.seed.or(job.parts.sampling.seed),
        digests: &digest,
        judge: drive.desk.as_ref().and_then(|desk| desk.judge().digest.as_deref().map(Into::into)),
    };
    let receipt_text = receipt::receipt(&facts, plan, decision);
    let receipt = format!("sha256:{}", super::answer::sha256(receipt_text.as_bytes()));
    job.keep_receipt(receipt_text);
    FusionReport {
        id: job.fusion_id.clone(),
        mode_requested: options.mode,
        mode_used: decision.mode_used,
        mode_reason: decision.mode_reason,
        winner: Some(plan.attempts()[decision.winner].ask.id.clone()),
        degraded: decision.degraded,
        quorum: QuorumReport {
            needed: plan.setup().quorum,
            usable: decision.usable,
            asked: plan.setup().asks.iter().filter(|ask| !ask.fallback).count() as u8,
        },
        members: members(drive),
        votes: decision.votes.clone(),
        sentences: match options.include {
            Include::Sentences => decision.sentences.clone(),
            _ => Vec::new(),
        },
        dissent: decision.dissent.clone(),
        analysis: decision.analysis.clone(),
        judge: judge_report(drive, decision),
        timing: FusionTiming { slowest_used: slowest_used(drive, decision), total },
        usage_by_member,
        ignored: options.ignored.clone(),
        receipt,
        include: options.include,
    }
}

fn members(drive: &Drive) -> Vec<MemberReport> {
    let job = &drive.job;
    let scores = drive.plan.scores();
    let mut members: Vec<MemberReport> = drive
        .plan
        .attempts()
        .iter()
        .enumerate()
        .map(|(index, attempt)| {
            let (usage, estimated) = drive.usage(index);
            let end = attempt.end.as_ref();
            let usable = end.and_then(|end| end.usable.as_ref());
            let hash = usable.map(|usable| super::answer::sha256(usable.text.as_bytes()));
            let score = hash.and_then(|hash| scores.get(&hash)).map(|milli| *milli as f64 / 1e3);
            MemberReport {
                id: attempt.ask.id.clone(),
                scope: job.selection.members[attempt.ask.member].scope,
                state: end.map_or(MemberState::Cancelled, |end| end.state),
                reason: end.and_then(|end| end.reason),
                elapsed: elapsed(attempt),
                tokens: usage.completion_tokens,
                tokens_estimated: estimated,
                score,
                weight: f64::from(attempt.ask.weight) / 1e3,
                text: usable
                    .filter(|_| job.options.include == Include::Answers)
                    .map(|usable| usable.text.clone()),
            }
        })
        .collect();
    members.extend(job.skipped_reports());
    members
}

fn elapsed(attempt: &Attempt) -> Duration {
    attempt.end.as_ref().map_or(Duration::ZERO, |end| end.at.saturating_sub(attempt.begun))
}

/// The end of the last answer that was used.
fn slowest_used(drive: &Drive, decision: &Decision) -> Duration {
    let attempts = drive.plan.attempts();
    let used = attempts.iter().filter(|attempt| !attempt.ask.fallback).filter_map(|attempt| {
        let end = attempt.end.as_ref()?;
        end.usable.is_some().then_some(end.at)
    });
    let winner = attempts[decision.winner].end.as_ref().map(|end| end.at);
    used.chain(winner).max().unwrap_or_default()
}

fn judge_report(drive: &Drive, decision: &Decision) -> Option<JudgeReport> {
    let method = drive.plan.setup().method;
    if matches!(method, JudgeMethod::None | JudgeMethod::Vote) {
        return None;
    }
    let judge = drive.desk.as_ref().map(|desk| desk.judge().id.to_string());
    let overlaps = judge.as_ref().is_some_and(|judge| {
        drive
            .plan
            .attempts()
            .iter()
            .any(|attempt| *drive.job.selection.members[attempt.ask.member].id == **judge)
    });
    Some(JudgeReport {
        model: judge.filter(|_| decision.judged),
        method: match (decision.judged, method) {
            (false, _) => JudgeMethod::Vote,
            (true, JudgeMethod::Auto) if decision.swapped => JudgeMethod::Pairwise,
            (true, JudgeMethod::Auto) => JudgeMethod::Logprob,
            (true, other) => other,
        },
        prompt: judge::PROMPT,
        swapped: decision.swapped,
        overlaps_panel: overlaps,
        reason: decision.judge_reason,
    })
}

/// Tokens by member, all its attempts and judgements together, in the order of asking.
fn usage_by_member(drive: &Drive) -> Vec<MemberUsage> {
    let mut sums: Vec<MemberUsage> = Vec::new();
    let mut count =
        |id: &str, usage: Usage, estimated: bool| match sums.iter_mut().find(|sum| sum.id == id) {
            Some(sum) => {
                sum.usage = add(sum.usage, usage);
                sum.estimated |= estimated;
            }
            None => sums.push(MemberUsage { id: id.to_owned(), usage, estimated }),
        };
    for (index, attempt) in drive.plan.attempts().iter().enumerate() {
        let (usage, estimated) = drive.usage(index);
        let id = &drive.job.selection.members[attempt.ask.member].id;
        count(id, usage, estimated);
    }
    if let Some(desk) = &drive.desk {
        let judged = add(desk.usage(), drive.job.written);
        if judged != Usage::default() {
            count(&desk.judge().id, judged, false);
        }
    }
    sums
}
