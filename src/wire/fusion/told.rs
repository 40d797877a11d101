//! The report of a fusion, and its progress.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::chat::{
    Analysis, FusionProgress, FusionReport, Include, JudgeReport, MemberReport, SentenceReport,
};

/// The `fusion` object of an answer; `None` if the client does not want it.
pub(in crate::wire) fn report(report: &FusionReport) -> Option<Value> {
    if report.include == Include::None {
        return None;
    }
    let votes: Map<String, Value> =
        report.votes.iter().map(|(answer, votes)| (answer.clone(), (*votes).into())).collect();
    let usage: Map<String, Value> = report
        .usage_by_member
        .iter()
        .map(|used| {
            let tokens = json!({
                "prompt_tokens": used.usage.prompt_tokens,
                "completion_tokens": used.usage.completion_tokens,
                "estimated": used.estimated,
            });
            (used.id.clone(), tokens)
        })
        .collect();
    let mut object = json!({
        "id": report.id,
        "mode_requested": report.mode_requested.as_str(),
        "mode_used": report.mode_used.as_str(),
        "mode_reason": report.mode_reason,
        "winner": report.winner,
        "degraded": report.degraded,
        "quorum": {
            "needed": report.quorum.needed,
            "usable": report.quorum.usable,
            "asked": report.quorum.asked,
        },
        "members": report.members.iter().map(member).collect::<Vec<_>>(),
        "votes": votes,
        "sentences": sentences(&report.sentences),
        "dissent": sentences(&report.dissent),
        "judge": report.judge.as_ref().map(judge),
        "timing": {
            "slowest_used_ms": ms(report.timing.slowest_used),
            "total_ms": ms(report.timing.total),
            "overhead_ratio": report.timing.overhead_ratio().map(|ratio| rounded(ratio, 1e3)),
        },
        "usage_by_member": usage,
        "ignored": report.ignored,
        "receipt": report.receipt,
    });
    if let Some(found) = &report.analysis {
        object["analysis"] = analysis(found);
    }
    Some(object)
}

/// Something that happened while members were answering.
pub(in crate::wire) fn progress(progress: &FusionProgress) -> Value {
    match progress {
        FusionProgress::Degraded { reason } => json!({ "type": "degraded", "reason": reason }),
        FusionProgress::JudgeStart { judge, method } => {
            json!({ "type": "judge_start", "judge": judge, "method": method.as_str() })
        }
        FusionProgress::MemberDone { id, state, reason, elapsed } => json!({
            "type": "member_done",
            "id": id,
            "state": state.as_str(),
            "reason": reason.map(|reason| reason.to_string()),
            "ms": ms(*elapsed),
        }),
        FusionProgress::Quorum { usable, needed } => {
            json!({ "type": "quorum", "usable": usable, "needed": needed })
        }
    }
}

fn member(member: &MemberReport) -> Value {
    let mut object = json!({
        "id": member.id,
        "scope": member.scope.as_str(),
        "state": member.state.as_str(),
        "reason": member.reason.map(|reason| reason.to_string()),
        "ms": ms(member.elapsed),
        "tokens": member.tokens,
        "tokens_estimated": member.tokens_estimated,
        "score": member.score.map(|score| rounded(score, 1e3)),
        "weight": rounded(member.weight, 1e3),
    });
    if let Some(text) = &member.text {
        object["text"] = text.as_str().into();
    }
    object
}

fn judge(judge: &JudgeReport) -> Value {
    json!({
        "model": judge.model,
        "method": judge.method.as_str(),
        "prompt": judge.prompt,
        "swapped": judge.swapped,
        "overlaps_panel": judge.overlaps_panel,
        "reason": judge.reason,
    })
}

fn sentences(sentences: &[SentenceReport]) -> Vec<Value> {
    sentences.iter().map(sentence).collect()
}

fn sentence(sentence: &SentenceReport) -> Value {
    json!({ "t": sentence.text, "from": sentence.from, "support": sentence.support })
}

fn analysis(analysis: &Analysis) -> Value {
    let pair = |(one, other): &(SentenceReport, SentenceReport)| {
        Value::from(vec![sentence(one), sentence(other)])
    };
    json!({
        "consensus": sentences(&analysis.consensus),
        "contradictions": analysis.contradictions.iter().map(pair).collect::<Vec<_>>(),
        "partial_coverage": sentences(&analysis.partial_coverage),
        "unique_insights": sentences(&analysis.unique_insights),
        "blind_spots": analysis.blind_spots,
    })
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn rounded(value: f64, places: f64) -> f64 {
    (value * places).round() / places
}
