//! Carries a plan out: streams of members, the judge's desk, the client's channel, and the clock.
//!
//! One task owns everything of one fusion. When the client goes, the task ends and with it every stream, so that the
//! work behind them stops.

use std::ops::ControlFlow;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::desk::{Desk, add};
use super::member::{Member, MemberKind};
use super::plan::{Action, Decision, Event, Plan};
use super::{Job, prompts, report};
use crate::chat::{
    ChatError, ChatEvent, ChatRequest, ChatRequestParts, ChatSender, ChatStream, Fault,
    FaultReason, FinishReason, FusionProgress, Input, Message, ModelName, Origin, RequestId,
    ToolChoice, Usage,
};

/// One fusion under way.
pub(super) struct Drive {
    pub(super) job: Job,
    pub(super) plan: Plan,
    pub(super) began: Instant,
    streams: Vec<Lane>,
    pub(super) desk: Option<Desk>,
    writer: Option<Writer>,
    sender: ChatSender,
    turn: usize,
}

/// One attempt's stream and what it cost.
#[derive(Default)]
pub(super) struct Lane {
    stream: Option<ChatStream>,
    bytes: usize,
    prompt_bytes: usize,
    /// What the member said it cost.
    pub(super) usage: Option<Usage>,
}

/// The judge writing a merge.
struct Writer {
    stream: ChatStream,
    text: String,
}

enum Happening {
    Gone,
    Member(usize, Option<Result<ChatEvent, ChatError>>),
    Judged(Event),
    Wrote(Option<Result<ChatEvent, ChatError>>),
    Time,
}

impl Drive {
    pub(super) fn new(job: Job, plan: Plan, sender: ChatSender, began: Instant) -> Drive {
        let desk = job.desk();
        Drive { job, plan, began, streams: Vec::new(), desk, writer: None, sender, turn: 0 }
    }

    /// Runs to the end.
    pub(super) async fn run(mut self, first: Vec<Action>) {
        if self.carry_out(first).await.is_break() {
            return;
        }
        let mut idle = false;
        loop {
            let mut wake = self.plan.wake().map(|at| self.began + at);
            if idle {
                // Time alone changed nothing: whatever the plan says, the members get their turn.
                wake = wake.map(|wake| wake.max(Instant::now() + IDLE_PERIOD));
            }
            let event = match self.next(wake).await {
                Happening::Gone => return self.abandon(),
                Happening::Member(attempt, item) => self.of_member(attempt, item),
                Happening::Judged(event) => event,
                Happening::Wrote(item) => match self.of_writer(item).await {
                    Some(event) => event,
                    None => continue,
                },
                Happening::Time => Event::Tick,
            };
            let tick = event == Event::Tick;
            let actions = self.plan.step(event, self.began.elapsed());
            idle = tick && actions.is_empty();
            if self.carry_out(actions).await.is_break() {
                return;
            }
        }
    }

    async fn next(&mut self, wake: Option<Instant>) -> Happening {
        let sender = self.sender.clone();
        let wake = wake.unwrap_or_else(|| self.began + self.plan.setup().deadline);
        tokio::select! {
            biased;
            () = sender.closed() => Happening::Gone,
            () = sleep_until(wake) => Happening::Time,
            happening = std::future::poll_fn(|context| self.poll(context)) => happening,
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Happening> {
        let count = self.streams.len();
        for step in 0..count {
            let at = (self.turn + step) % count;
            let Some(stream) = &mut self.streams[at].stream else { continue };
            if let Poll::Ready(item) = stream.poll_next(context) {
                self.turn = at + 1;
                return Poll::Ready(Happening::Member(at, item));
            }
        }
        if let Some(desk) = &mut self.desk
            && let Poll::Ready(event) = desk.poll(context)
        {
            return Poll::Ready(Happening::Judged(event));
        }
        if let Some(writer) = &mut self.writer
            && let Poll::Ready(item) = writer.stream.poll_next(context)
        {
            return Poll::Ready(Happening::Wrote(item));
        }
        Poll::Pending
    }

    fn of_member(&mut self, attempt: usize, item: Option<Result<ChatEvent, ChatError>>) -> Event {
        let lane = &mut self.streams[attempt];
        match item {
            Some(Ok(ChatEvent::Delta { text, .. })) => {
                lane.bytes += text.len();
                if lane.bytes > self.job.settings.answer_bytes_max {
                    lane.stream = None;
                    return Event::Failed { attempt, reason: FaultReason::TooLarge };
                }
                Event::Text { attempt, text }
            }
            Some(Ok(ChatEvent::ToolCall(_))) => Event::Call { attempt },
            Some(Ok(ChatEvent::Done(done))) => {
                lane.stream = None;
                lane.usage = Some(done.usage).filter(|usage| *usage != Usage::default());
                Event::Ended { attempt, finish: done.finish }
            }
            Some(Ok(_)) => Event::Text { attempt, text: String::new() },
            Some(Err(error)) => {
                lane.stream = None;
                Event::Failed { attempt, reason: reason(&error) }
            }
            None => {
                lane.stream = None;
                Event::Failed { attempt, reason: FaultReason::Reset }
            }
        }
    }

    /// What the judge writes goes out as it comes.
    async fn of_writer(&mut self, item: Option<Result<ChatEvent, ChatError>>) -> Option<Event> {
        let writer = self.writer.as_mut()?;
        match item {
            Some(Ok(ChatEvent::Delta { text, logprobs })) => {
                writer.text.push_str(&text);
                let large = writer.text.len() > self.job.settings.answer_bytes_max;
                self.say(ChatEvent::Delta { text, logprobs }).await;
                large.then(|| self.written(FinishReason::Length))
            }
            Some(Ok(ChatEvent::Done(done))) => {
                self.job.written = add(self.job.written, done.usage);
                Some(self.written(done.finish))
            }
            Some(Ok(_)) => None,
            Some(Err(_)) | None => Some(self.written(FinishReason::Length)),
        }
    }

    fn written(&mut self, finish: FinishReason) -> Event {
        match self.writer.take() {
            Some(writer) if !writer.text.trim().is_empty() => {
                Event::Written { text: writer.text, finish }
            }
            _ => Event::NotWritten,
        }
    }

    async fn carry_out(&mut self, actions: Vec<Action>) -> ControlFlow<()> {
        let mut waiting = std::collections::VecDeque::from(actions);
        while let Some(action) = waiting.pop_front() {
            match action {
                Action::Ask(attempt) => self.ask(attempt, None),
                Action::Argue { attempt, own, others } => {
                    let messages =
                        prompts::argue(&self.job.messages, &own, &others, &self.job.nonce);
                    self.ask(attempt, Some(messages));
                }
                Action::Drop(attempt) => {
                    if let Some(lane) = self.streams.get_mut(attempt) {
                        lane.stream = None;
                    }
                }
                Action::Score { hash, text } => {
                    if let Some(desk) = &mut self.desk {
                        desk.score(hash, text);
                    }
                }
                Action::Compare { first, second } => {
                    if let Some(desk) = &mut self.desk {
                        desk.compare(first, second);
                    }
                }
                Action::Write { drafts } => {
                    if !self.write(&drafts) {
                        let now = self.began.elapsed();
                        waiting.extend(self.plan.step(Event::NotWritten, now));
                    }
                }
                Action::StopWriting => {
                    let event = self.written(FinishReason::Deadline);
                    waiting.extend(self.plan.step(event, self.began.elapsed()));
                }
                Action::Tell(progress) => self.tell(progress),
                Action::Decide(decision) => {
                    self.answer(*decision).await;
                    return ControlFlow::Break(());
                }
                Action::Refuse(fault) => {
                    self.job.count_faults(&self.plan);
                    self.job.count_refused();
                    let _ = self.sender.send(Err(ChatError::Upstream(fault))).await;
                    return ControlFlow::Break(());
                }
            }
        }
        ControlFlow::Continue(())
    }

    /// Starts an attempt; in a debate with other messages than the client's.
    fn ask(&mut self, attempt: usize, messages: Option<Vec<Message>>) {
        while self.streams.len() <= attempt {
            self.streams.push(Lane::default());
        }
        let ask = &self.plan.attempts()[attempt].ask;
        let member = &self.job.selection.members[ask.member];
        let end = if ask.fallback { self.plan.setup().deadline } else { self.plan.panel_end() };
        let deadline = self.began + end;
        let messages = messages.unwrap_or_else(|| self.job.messages.to_vec());
        let lane = &mut self.streams[attempt];
        lane.prompt_bytes = messages.iter().map(|message| message.content.len()).sum();
        lane.stream = Some(match self.job.request_for(member, attempt, messages, deadline) {
            Ok(request) => member.backend.chat(request),
            Err(error) => ChatStream::refused(error),
        });
    }

    fn write(&mut self, drafts: &[String]) -> bool {
        let Some(judge) = self.desk.as_ref().map(|desk| desk.judge().clone()) else {
            return false;
        };
        let messages = prompts::write(&self.job.messages, drafts, &self.job.nonce);
        let deadline = self.began + self.plan.setup().deadline;
        let Ok(request) = self.job.request_for(&judge, JUDGE_ATTEMPT, messages, deadline) else {
            return false;
        };
        let stream = judge.backend.chat(greedy(request));
        self.writer = Some(Writer { stream, text: String::new() });
        true
    }

    fn tell(&self, mut progress: FusionProgress) {
        if let (FusionProgress::JudgeStart { judge, .. }, Some(desk)) = (&mut progress, &self.desk)
        {
            *judge = desk.judge().id.to_string();
        }
        // Progress that a slow reader has no room for is lost without harm.
        let _ = self.sender.try_send(Ok(ChatEvent::Progress(progress)));
    }

    async fn say(&mut self, event: ChatEvent) {
        // A client that has gone is noticed by the next look at its channel.
        let _ = self.sender.send(Ok(event)).await;
    }

    async fn answer(&mut self, decision: Decision) {
        let total = self.began.elapsed();
        let done = report::completion(self, &decision, total);
        self.job.count(&self.plan, &decision, &done);
        if !decision.written {
            self.say(ChatEvent::Delta { text: decision.text, logprobs: Vec::new() }).await;
        }
        self.say(ChatEvent::Done(done)).await;
    }

    /// Tokens of an attempt, and whether they are an estimate.
    pub(super) fn usage(&self, attempt: usize) -> (Usage, bool) {
        let Some(lane) = self.streams.get(attempt) else { return (Usage::default(), false) };
        match lane.usage {
            Some(usage) => (usage, false),
            None => (estimate(lane.prompt_bytes, lane.bytes), true),
        }
    }

    fn abandon(self) {
        self.job.count_faults(&self.plan);
        self.job.count_cancelled();
    }
}

impl Job {
    /// The client's request as a member is asked it.
    pub(super) fn request_for(
        &self,
        member: &Member,
        attempt: usize,
        messages: Vec<Message>,
        deadline: Instant,
    ) -> Result<ChatRequest, ChatError> {
        let mut parts: ChatRequestParts = self.parts.clone();
        parts.id = RequestId::parse(&format!("{}.{attempt}", self.parts.id))
            .unwrap_or_else(RequestId::random);
        parts.origin = Origin::Fusion { depth: 1 };
        parts.model = ModelName::new(member.model.as_str());
        parts.fusion = None;
        if !self.passes_through {
            parts.tools = Vec::new();
            parts.tool_choice = ToolChoice::Auto;
            parts.logprobs = None;
            parts.echo = false;
        }
        // Inner deadlines end a little earlier, so that rounding does not make a member late.
        let left = deadline.saturating_duration_since(Instant::now());
        let early = (left / 20).min(Duration::from_millis(250));
        parts.deadline = (deadline - early).into_std();
        let first = self.options.seed.or(self.parts.sampling.seed);
        parts.sampling.seed = first.map(|seed| seed.wrapping_add(attempt as u64));
        if self.selection.samples > 1 && parts.sampling.temperature == 0.0 {
            parts.sampling.temperature = 0.7;
        }
        if !matches!(member.kind, MemberKind::Local | MemberKind::Scoutd) {
            parts.max_tokens = self.bound(member, left - early).or(parts.max_tokens);
        }
        parts.input = Input::Messages(messages);
        ChatRequest::try_from(parts)
    }

    /// Tokens that a member without deadlines of its own can write in time, if its speed is known.
    fn bound(&self, member: &Member, left: Duration) -> Option<u32> {
        let vitals = &member.vitals;
        let prefill_s = f64::from(self.prompt_tokens) / vitals.prefill_per_s?;
        let tokens = 0.8 * (left.as_secs_f64() - prefill_s) * vitals.decode_per_s?;
        let bound = tokens.clamp(16.0, 1e6) as u32;
        Some(self.parts.max_tokens.map_or(bound, |asked| asked.min(bound)))
    }
}

/// A judge takes the likeliest token.
fn greedy(request: ChatRequest) -> ChatRequest {
    let mut parts = request.clone().into_parts();
    parts.sampling.temperature = 0.0;
    ChatRequest::try_from(parts).unwrap_or(request)
}

/// Why an attempt failed, in the words of the report.
pub(super) fn reason(error: &ChatError) -> FaultReason {
    match error {
        ChatError::Upstream(Fault { reason, .. }) => *reason,
        ChatError::QueueFull { .. } | ChatError::Draining { .. } => FaultReason::Busy,
        ChatError::NoHeadroom { .. } => FaultReason::NoHeadroom,
        ChatError::DeadlineUnmeetable { .. } => FaultReason::TooLate,
        ChatError::UnknownModel(_) | ChatError::DigestDiffers => FaultReason::WrongModel,
        ChatError::Cancelled => FaultReason::ClientGone,
        ChatError::Internal(_) => FaultReason::Http5xx(500),
        _ => FaultReason::Http4xx,
    }
}

/// About four bytes of text are a token.
pub(super) fn estimate(prompt_bytes: usize, bytes: usize) -> Usage {
    let tokens = |bytes: usize| u32::try_from(bytes.div_ceil(4)).unwrap_or(u32::MAX);
    Usage {
        prompt_tokens: tokens(prompt_bytes),
        cached_tokens: 0,
        completion_tokens: tokens(bytes),
    }
}

/// How soon a plan that did nothing is asked again.
const IDLE_PERIOD: Duration = Duration::from_millis(10);

/// The number of the judge's own request.
const JUDGE_ATTEMPT: usize = 99;

/// The task of one fusion.
pub(super) type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The whole way of a request that is fused.
pub(super) fn fused(job: Job, sender: ChatSender) -> Task {
    Box::pin(async move {
        let began = Instant::now();
        let (plan, first) = Plan::begin(job.setup());
        Drive::new(job, plan, sender, began).run(first).await;
    })
}

/// Keeps `Arc` in the signature of jobs short.
pub(super) type Texts = Arc<[Message]>;
