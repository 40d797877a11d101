//! One member's answer, passed through as it comes.
//!
//! Requests with tools go this way, because panels answer them with prose; so do requests for one answer, pools with
//! one member, and pools under load. Until the first word the next member can still take over.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::Job;
use super::answer::sha256;
use super::desk::add;
use super::drive::{Task, estimate, reason};
use super::plan::Ask;
use crate::chat::{
    ChatError, ChatEvent, ChatSender, Completion, Fault, FaultReason, FinishReason, FusionReport,
    FusionTiming, MemberReport, MemberState, MemberUsage, ModeUsed, QuorumReport, Timings, Usage,
};

/// What a try came to.
enum Tried {
    /// The answer has gone out.
    Answered(FinishReason, Usage, bool),
    /// Nothing has gone out; the next may try.
    Failed(FaultReason),
    /// Words have gone out, then it broke.
    Broken(FaultReason),
    /// Nobody reads.
    Gone,
}

/// The whole way of a request that one member answers.
pub(super) fn single(job: Job, why: Option<&'static str>, sender: ChatSender) -> Task {
    Box::pin(async move {
        let mut single = Single {
            began: Instant::now(),
            sender,
            text: String::new(),
            members: Vec::new(),
            usage: Vec::new(),
            job,
        };
        single.run(why).await;
    })
}

struct Single {
    job: Job,
    sender: ChatSender,
    began: Instant,
    text: String,
    members: Vec<MemberReport>,
    usage: Vec<MemberUsage>,
}

impl Single {
    async fn run(&mut self, why: Option<&'static str>) {
        let mut asks = self.job.selection.asks.clone();
        asks.extend(self.job.selection.spares.clone());
        // The local model, which stands by, comes last.
        asks.sort_by_key(|ask| ask.fallback);
        if why == Some("load") {
            let vitals = |ask: &Ask| self.job.selection.members[ask.member].vitals;
            asks.sort_by_key(|ask| (ask.fallback, vitals(ask).queue, vitals(ask).in_flight));
        }
        let deadline = self.began + self.job.deadline;
        let mut told = Vec::new();
        for (number, ask) in asks.iter().take(TRIES_MAX).enumerate() {
            let began = self.began.elapsed();
            let tried = self.attempt(number, ask, deadline).await;
            match tried {
                Tried::Gone => return self.job.count_cancelled(),
                Tried::Answered(finish, usage, estimated) => {
                    self.note(ask, None, began, (usage, estimated));
                    return self.finish(ask, finish, why, number > 0).await;
                }
                Tried::Failed(reason) => {
                    told.push(format!("{}: {reason}", ask.id));
                    self.note(ask, Some(reason), began, (estimate(self.prompt_bytes(), 0), true));
                    self.job.count_fault(&ask.id, reason);
                }
                Tried::Broken(reason) => {
                    self.job.count_fault(&ask.id, reason);
                    let fault = Fault::explained(reason, ask.id.clone());
                    let _ = self.sender.send(Err(ChatError::Upstream(fault))).await;
                    return self.job.count_refused();
                }
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        self.job.count_refused();
        let fault = Fault::explained(FaultReason::NoQuorum, told.join(", "));
        let _ = self.sender.send(Err(ChatError::Upstream(fault))).await;
    }

    async fn attempt(&mut self, number: usize, ask: &Ask, deadline: Instant) -> Tried {
        let member = &self.job.selection.members[ask.member];
        let messages = self.job.messages.to_vec();
        let mut stream = match self.job.request_for(member, number, messages, deadline) {
            Ok(request) => member.backend.chat(request),
            Err(error) => return Tried::Failed(reason(&error)),
        };
        let mut said = 0;
        let mut bytes = 0;
        loop {
            let sender = self.sender.clone();
            let item = tokio::select! {
                biased;
                () = sender.closed() => return Tried::Gone,
                item = timeout_at(deadline, stream.next()) => item,
            };
            let event = match item {
                Err(_) if said > 0 => {
                    let usage = estimate(self.prompt_bytes(), bytes);
                    return Tried::Answered(FinishReason::Deadline, usage, true);
                }
                Err(_) => return Tried::Failed(FaultReason::Deadline),
                Ok(Some(Ok(event))) => event,
                Ok(Some(Err(error))) if said == 0 => return Tried::Failed(reason(&error)),
                Ok(Some(Err(error))) => return Tried::Broken(reason(&error)),
                Ok(None) if said == 0 => return Tried::Failed(FaultReason::Reset),
                Ok(None) => return Tried::Broken(FaultReason::Reset),
            };
            match event {
                ChatEvent::Accepted { .. } | ChatEvent::Progress(_) => {}
                ChatEvent::Done(done) => {
                    if said == 0 {
                        return Tried::Failed(FaultReason::NoText);
                    }
                    let told = done.usage != Usage::default();
                    let usage =
                        if told { done.usage } else { estimate(self.prompt_bytes(), bytes) };
                    return Tried::Answered(done.finish, usage, !told);
                }
                ChatEvent::Delta { text, logprobs } => {
                    bytes += text.len();
                    if bytes > self.job.settings.answer_bytes_max {
                        let usage = estimate(self.prompt_bytes(), bytes);
                        return Tried::Answered(FinishReason::Length, usage, true);
                    }
                    said += usize::from(!text.is_empty());
                    self.text.push_str(&text);
                    let _ = self.sender.send(Ok(ChatEvent::Delta { text, logprobs })).await;
                }
                other => {
                    said += 1;
                    let _ = self.sender.send(Ok(other)).await;
                }
            }
        }
    }

    fn prompt_bytes(&self) -> usize {
        self.job.messages.iter().map(|message| message.content.len()).sum()
    }

    fn note(
        &mut self,
        ask: &Ask,
        reason: Option<FaultReason>,
        began: Duration,
        (usage, estimated): (Usage, bool),
    ) {
        let member = &self.job.selection.members[ask.member];
        let elapsed = self.began.elapsed().saturating_sub(began);
        if reason.is_none() {
            self.job.served(&member.id, elapsed);
        }
        self.members.push(MemberReport {
            id: member.id.to_string(),
            scope: member.scope,
            state: reason.map_or(MemberState::Ok, FaultReason::state),
            reason,
            elapsed,
            tokens: usage.completion_tokens,
            tokens_estimated: estimated,
            score: None,
            weight: f64::from(ask.weight) / 1e3,
            text: None,
        });
        self.usage.push(MemberUsage { id: member.id.to_string(), usage, estimated });
    }

    async fn finish(
        &mut self,
        ask: &Ask,
        finish: FinishReason,
        why: Option<&'static str>,
        replaced: bool,
    ) {
        let total = self.began.elapsed();
        let usage = self.usage.iter().fold(Usage::default(), |sum, one| add(sum, one.usage));
        let degraded = replaced || matches!(why, Some("degraded" | "load"));
        let options = &self.job.options;
        let mut members = self.members.clone();
        members.extend(self.job.skipped_reports());
        let member = &self.job.selection.members[ask.member];
        let receipt = self.job.single_receipt(&member.id, &sha256(self.text.as_bytes()));
        let report = FusionReport {
            id: self.job.fusion_id.clone(),
            mode_requested: options.mode,
            mode_used: ModeUsed::Single,
            mode_reason: why,
            winner: Some(member.id.to_string()),
            degraded,
            quorum: QuorumReport { needed: 1, usable: 1, asked: 1 },
            members,
            votes: Vec::new(),
            sentences: Vec::new(),
            dissent: Vec::new(),
            analysis: None,
            judge: None,
            timing: FusionTiming { slowest_used: total, total },
            usage_by_member: self.usage.clone(),
            ignored: options.ignored.clone(),
            receipt,
            include: options.include,
        };
        self.job.count_single(degraded, usage);
        let done = Completion {
            finish,
            usage,
            timings: Timings { prefill: total, ..Timings::default() },
            fusion: Some(Arc::new(report)),
        };
        let _ = self.sender.send(Ok(ChatEvent::Done(done))).await;
    }
}

/// Members that may try one after the other.
const TRIES_MAX: usize = 3;
