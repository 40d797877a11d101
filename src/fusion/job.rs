//! A request on its way into the pool: what it asks for, whom, in what time; and what is counted of it.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use super::answer::{Form, canonical, sha256};
use super::desk::{Case, Desk};
use super::drive::{Task, Texts, fused};
use super::member::Member;
use super::plan::{Decision, Judge, Plan, Setup};
use super::receipt::prompt_hash;
use super::select::{Selection, Wanted, select};
use super::single::single;
use super::{Place, Settings, Shared};
use crate::chat::{
    ChatError, ChatRequest, ChatRequestParts, ChatSender, Completion, FaultReason, FusionMode,
    FusionRequest, Input, MemberReport, MemberState, Message, Role, Usage,
};

/// One request with all that was worked out before the first member is asked.
pub(super) struct Job {
    pub(super) parts: ChatRequestParts,
    pub(super) messages: Texts,
    pub(super) options: FusionRequest,
    pub(super) form: Form,
    pub(super) selection: Selection,
    pub(super) settings: Arc<Settings>,
    pub(super) deadline: Duration,
    pub(super) nonce: Arc<str>,
    pub(super) prompt_hash: String,
    pub(super) prompt_tokens: u32,
    pub(super) fusion_id: String,
    /// Tools and log-probabilities go to the one member that answers.
    pub(super) passes_through: bool,
    /// Tokens that the judge wrote.
    pub(super) written: Usage,
    shared: Arc<Shared>,
    _place: Place,
}

impl Job {
    /// The task that answers `request`.
    ///
    /// # Errors
    /// `Invalid` for names and forms that do not exist, `NotSupported` for what a fusion cannot do.
    pub(super) fn task(
        shared: Arc<Shared>,
        place: Place,
        request: ChatRequest,
        sender: ChatSender,
    ) -> Result<Task, ChatError> {
        let mut parts = request.into_parts();
        let options = parts.fusion.take().map(|options| *options).unwrap_or_default();
        let messages = messages(&parts)?;
        let form = Form::new(&options.answer, &parts.format)?;
        let prompt_bytes: usize = messages.iter().map(|m| m.content.len() + 16).sum();
        let prompt_tokens = u32::try_from(prompt_bytes / 4).unwrap_or(u32::MAX);
        let output_tokens = parts.max_tokens.unwrap_or(OUTPUT_TOKENS);
        let roster = shared.roster.members();
        let deadline = deadline(&roster, &parts, &options, &shared.settings, prompt_tokens);
        let selection = {
            let state = shared.state();
            let wanted = Wanted {
                options: &options,
                form: &form,
                calibration: &state.calibration,
                tokens: (prompt_tokens, output_tokens),
                panel: deadline * 7 / 10,
                greedy: parts.sampling.temperature == 0.0,
                answers_max: shared.settings.answers_max,
            };
            select(roster, &wanted)?
        };
        let prompt_hash = prompt_hash(&messages);
        let why = bypass(&shared, &parts, &options, &selection);
        if parts.logprobs.is_some() && why.is_none() {
            let message = "a fusion has no log-probabilities: ask one member (n = 1)";
            return Err(ChatError::NotSupported(message.to_owned()));
        }
        let job = Job {
            nonce: nonce(&shared.secret, &prompt_hash).into(),
            messages: messages.into(),
            fusion_id: format!("fx_{}", ulid::Ulid::generate()),
            settings: Arc::clone(&shared.settings),
            passes_through: why.is_some(),
            written: Usage::default(),
            _place: place,
            parts,
            options,
            form,
            selection,
            deadline,
            prompt_hash,
            prompt_tokens,
            shared,
        };
        job.count_asked(why.is_some());
        Ok(match why {
            Some(why) => single(job, Some(why), sender),
            None => fused(job, sender),
        })
    }

    /// What the plan sets out with.
    pub(super) fn setup(&self) -> Setup {
        let options = &self.options;
        let asked = self.selection.asks.iter().filter(|ask| !ask.fallback).count();
        let quorum = options.quorum.unwrap_or(if asked == 1 { 1 } else { 2 });
        Setup {
            mode: options.mode,
            style: options.style,
            rounds: options.rounds,
            quorum,
            deadline: self.deadline,
            grace: options.grace,
            on_no_quorum: options.on_no_quorum,
            form: self.form.clone(),
            method: options.judge.method,
            swap: options.judge.swap,
            judge: match self.selection.judge {
                Ok((_, judge)) => judge,
                Err(reason) => Judge::Absent(reason),
            },
            asks: self.selection.asks.clone(),
            spares: self.selection.spares.clone(),
            analysis: options.analysis,
        }
    }

    /// The judge at its desk, if there is one.
    pub(super) fn desk(&self) -> Option<Desk> {
        let (index, _) = self.selection.judge.ok()?;
        let deadline = Instant::now() + self.deadline * 95 / 100;
        let case = Case {
            id: self.parts.id.clone(),
            client: Arc::clone(&self.parts.client),
            priority: self.parts.priority,
            messages: Arc::clone(&self.messages),
            nonce: Arc::clone(&self.nonce),
            deadline: deadline.into_std(),
            swap: self.options.judge.swap,
        };
        Some(Desk::new(self.selection.members.get(index)?.clone(), case))
    }

    /// The members that were not asked.
    pub(super) fn skipped_reports(&self) -> impl Iterator<Item = MemberReport> {
        self.selection.skipped.iter().map(|&(index, reason)| {
            let member = &self.selection.members[index];
            MemberReport {
                id: member.id.to_string(),
                scope: member.scope,
                state: reason.state(),
                reason: Some(reason),
                elapsed: Duration::ZERO,
                tokens: 0,
                tokens_estimated: false,
                score: None,
                weight: 0.0,
                text: None,
            }
        })
    }

    pub(super) fn keep_receipt(&self, receipt: String) {
        self.shared.state().receipts.put(self.fusion_id.clone(), receipt);
    }

    /// The receipt of an answer that one member gave.
    pub(super) fn single_receipt(&self, member: &str, output: &str) -> String {
        let value = json!({
            "version": 1,
            "pool": self.settings.pool,
            "mode_used": "single",
            "prompt": self.prompt_hash,
            "seed": self.options.seed.or(self.parts.sampling.seed),
            "form": self.form.kind(),
            "winner": member,
            "output": output,
        });
        let mut text = String::new();
        canonical(&value, &mut text);
        let receipt = format!("sha256:{}", sha256(text.as_bytes()));
        self.keep_receipt(text);
        receipt
    }

    fn now(&self) -> Duration {
        Instant::now().saturating_duration_since(self.shared.began)
    }

    fn count_asked(&self, one: bool) {
        let asks = self.selection.asks.iter().filter(|ask| !ask.fallback);
        let now = self.now();
        let mut state = self.shared.state();
        for ask in asks.take(if one { 1 } else { usize::MAX }) {
            state.load.asks(&self.selection.members[ask.member].id, now);
        }
    }

    pub(super) fn served(&self, member: &str, took: Duration) {
        self.shared.state().load.served(member, took);
    }

    /// Counts what a decided fusion came to.
    pub(super) fn count(&self, plan: &Plan, decision: &Decision, done: &Completion) {
        self.count_faults(plan);
        for attempt in plan.attempts() {
            if let Some(end) = attempt.end.as_ref().filter(|end| end.state == MemberState::Ok) {
                let id = &self.selection.members[attempt.ask.member].id;
                self.served(id, end.at.saturating_sub(attempt.begun));
            }
        }
        let metrics = &self.shared.metrics;
        let degraded = if decision.degraded { "true" } else { "false" };
        let mode = decision.mode_used.as_str();
        metrics.fusion_requests.with_label_values(&[mode, degraded]).inc();
        metrics.requests.with_label_values(&["pool", "stop"]).inc();
        let Some(report) = &done.fusion else { return };
        if let Some(ratio) = report.timing.overhead_ratio() {
            metrics.fusion_overhead_ratio.observe(ratio);
        }
        let early = |member: &MemberReport| member.reason == Some(FaultReason::EarlyStop);
        if report.members.iter().any(early) {
            metrics.fusion_early_stops.inc();
        }
        let winner = report.winner.as_deref();
        for used in &report.usage_by_member {
            let wins = winner.is_some_and(|winner| winner.starts_with(&used.id));
            self.count_tokens(if wins { "winner" } else { "other" }, used.usage);
        }
    }

    /// Counts what one member answered alone.
    pub(super) fn count_single(&self, degraded: bool, usage: Usage) {
        let metrics = &self.shared.metrics;
        let degraded = if degraded { "true" } else { "false" };
        metrics.fusion_requests.with_label_values(&["single", degraded]).inc();
        metrics.requests.with_label_values(&["pool", "stop"]).inc();
        self.count_tokens("winner", usage);
    }

    pub(super) fn count_faults(&self, plan: &Plan) {
        for attempt in plan.attempts() {
            let Some(reason) = attempt.end.as_ref().and_then(|end| end.reason) else { continue };
            if reason.state() != MemberState::Cancelled {
                self.count_fault(&self.selection.members[attempt.ask.member].id, reason);
            }
        }
    }

    pub(super) fn count_fault(&self, member: &str, reason: FaultReason) {
        let faults = &self.shared.metrics.fusion_member_faults;
        faults.with_label_values(&[member, reason.as_str()]).inc();
    }

    pub(super) fn count_refused(&self) {
        self.shared.metrics.requests.with_label_values(&["pool", "upstream"]).inc();
    }

    pub(super) fn count_cancelled(&self) {
        self.shared.metrics.requests.with_label_values(&["pool", "cancelled"]).inc();
    }

    fn count_tokens(&self, purpose: &str, usage: Usage) {
        let tokens = u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens);
        self.shared.metrics.fusion_tokens.with_label_values(&[purpose]).inc_by(tokens);
    }
}

fn messages(parts: &ChatRequestParts) -> Result<Vec<Message>, ChatError> {
    match &parts.input {
        Input::Messages(messages) => Ok(messages.clone()),
        Input::Text(text) if !parts.echo => Ok(vec![Message::text(Role::User, text.as_str())]),
        Input::Text(_) | Input::Tokens(_) => {
            let message = "a fusion answers conversations: members have different tokens";
            Err(ChatError::NotSupported(message.to_owned()))
        }
    }
}

/// Why one member answers alone, if it does.
fn bypass(
    shared: &Shared,
    parts: &ChatRequestParts,
    options: &FusionRequest,
    selection: &Selection,
) -> Option<&'static str> {
    let asks = || selection.asks.iter().filter(|ask| !ask.fallback);
    if !parts.tools.is_empty() {
        return Some("tools");
    }
    if options.n == Some(1) && options.samples == 1 {
        return Some("n_1");
    }
    if asks().count() < 2 {
        return Some("degraded");
    }
    let rounds = match options.mode {
        FusionMode::Debate => 1 + u32::from(options.rounds),
        _ => 1,
    };
    let now = Instant::now().saturating_duration_since(shared.began);
    let ids = asks().map(|ask| &*selection.members[ask.member].id);
    shared.state().load.is_full(ids, rounds, now).then_some("load")
}

/// All the time there is: the client's, the request's, and twice the slowest prediction, whichever ends first.
fn deadline(
    roster: &[Member],
    parts: &ChatRequestParts,
    options: &FusionRequest,
    settings: &Settings,
    prompt_tokens: u32,
) -> Duration {
    let now = Instant::now().into_std();
    let given = parts.deadline.saturating_duration_since(now).min(settings.deadline_max);
    if let Some(asked) = options.deadline {
        return asked.min(given);
    }
    let output = parts.max_tokens.unwrap_or(OUTPUT_TOKENS);
    let healthy = roster.iter().filter(|member| member.is_healthy());
    let predictions: Option<Vec<Duration>> =
        healthy.map(|member| member.vitals.predict(prompt_tokens, output)).collect();
    let slowest = predictions.and_then(|all| all.into_iter().max());
    match slowest {
        Some(slowest) => {
            let least = Duration::from_secs(5);
            given.min((slowest * 2).clamp(least, Duration::from_secs(300)))
        }
        None => given,
    }
}

/// The same for the same conversation while the process lives, and unknown to every member.
fn nonce(secret: &[u8], prompt_hash: &str) -> String {
    let mut bytes = secret.to_vec();
    bytes.extend_from_slice(prompt_hash.as_bytes());
    sha256(&bytes)[..12].to_owned()
}

/// Tokens of an answer whose length the client does not bound, for predictions.
const OUTPUT_TOKENS: u32 = 512;
