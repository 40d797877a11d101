//! The thread that runs the model.
//!
//! Each round: take in submissions, drop what nobody reads, give out slots, plan, forward, sample, commit,
//! send. If a round panics, every request in it gets `Internal`, all slots are cleared and the thread goes on
//! with an empty scheduler; if the slots cannot be cleared either, every later request is refused with
//! `Internal`, and the watchdog of the service manager is no longer served.

mod ladder;
mod slots;
mod step;

use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Waker;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use log::{error, info};

use self::ladder::Heeded;
use super::Config;
use super::admission::{Load, Rates};
use super::local::{Shared, draining};
use super::outlet::{Flow, Outlet};
use super::prefix::{RestingSlots, SlotMemory, common_prefix, kv_bytes};
use super::request::{Leaving, Request};
use super::sampler::Scratch;
use super::scheduler::{Retired, Scheduler, SchedulerLimits, Sequence};
use super::submission::{Prepared, Submission};
use crate::chat::{ChatError, ChatEvent, FinishReason};
use crate::memory::{Permit, Purpose, Shortfall};
use crate::model::{Model, ModelSpec};
use crate::residency::{ExpertSlots, SlotStats};
use crate::units::{Bytes, SequenceId, SlotId, TokenId};

/// How long an ended answer's last events wait for a reader that is still there.
const LEAVING_GRACE: Duration = Duration::from_secs(30);

/// What the thread works with.
struct Engine {
    model: Box<dyn Model>,
    expert_slots: Option<Arc<ExpertSlots>>,
    /// The file of the weights is no longer what was opened.
    lost: bool,
    /// What the metrics know of the expert slots.
    published: SlotStats,
    shared: Arc<Shared>,
    waker: Waker,
    scheduler: Scheduler,
    limits: SchedulerLimits,
    requests: BTreeMap<SequenceId, Request>,
    leaving: Vec<Leaving>,
    resting: RestingSlots,
    free_slots: Vec<SlotId>,
    next_id: u64,
    rates: Rates,
    /// What the last round has done about memory and heat.
    heeded: Heeded,
    buffers: Buffers,
    /// Covers the buffers.
    _scratch: Permit,
}

/// Reused from step to step.
#[derive(Default)]
struct Buffers {
    logits: Vec<f32>,
    raw: Vec<f32>,
    scratch: Scratch,
}

/// What a round came to.
enum Round {
    /// The model has run.
    Worked,
    /// Nothing can run before something comes in or, at the latest, this moment.
    Idle(Option<Instant>),
    Stop,
}

/// Starts the thread.
pub(super) fn spawn(
    model: Box<dyn Model>,
    shared: Arc<Shared>,
    scratch: Permit,
) -> io::Result<JoinHandle<()>> {
    Builder::new()
        .name("engine".to_owned())
        .spawn(move || Engine::new(model, shared, scratch).run())
}

/// Bytes of the buffers for logits, one copy of a row, and candidates of the sampler.
pub(super) fn logits_bytes(spec: &ModelSpec, config: &Config) -> Bytes {
    let row = u64::from(spec.vocab_len) * size_of::<f32>() as u64;
    let rows = score_tokens_max(spec, config) as u64 + u64::from(config.slots);
    // A row as it was, and twice a candidate of eight bytes per token.
    Bytes(row * (rows + 1 + 4))
}

/// Prompt tokens whose logits fit into the configured bytes.
fn score_tokens_max(spec: &ModelSpec, config: &Config) -> usize {
    let row = u64::from(spec.vocab_len.max(1)) * size_of::<f32>() as u64;
    usize::try_from(config.score_logits_bytes / row).unwrap_or(usize::MAX).max(1)
}

impl Engine {
    fn new(model: Box<dyn Model>, shared: Arc<Shared>, scratch: Permit) -> Engine {
        let config = &shared.preparer.config;
        // Where each piece costs a sweep over the disk, small ones would not leave more to those that write.
        let wanted = model.prefill_tokens_wanted();
        let limits = SchedulerLimits {
            running_max: usize::from(config.slots),
            waiting_max: config.waiting_max,
            prefill_tokens_max: config.prefill_tokens_max.max(wanted),
            prefill_tokens_beside_decode: config
                .prefill_tokens_beside_decode
                .min(config.prefill_tokens_max)
                .max(wanted),
            score_tokens_max: score_tokens_max(&shared.spec, config),
        };
        Engine {
            expert_slots: model.expert_slots(),
            lost: false,
            published: SlotStats::default(),
            model,
            waker: Waker::from(Arc::clone(&shared.inbox)),
            scheduler: Scheduler::new(limits),
            limits,
            requests: BTreeMap::new(),
            leaving: Vec::new(),
            resting: RestingSlots::default(),
            free_slots: all_slots(config),
            next_id: 0,
            rates: Rates::default(),
            heeded: Heeded::default(),
            buffers: Buffers::default(),
            shared,
            _scratch: scratch,
        }
    }

    fn run(mut self) {
        loop {
            match catch_unwind(AssertUnwindSafe(|| self.round())) {
                Ok(_) if self.lost => {
                    error!(target: "engine", "the model file changed under us; the engine has ended, start again");
                    return self.refuse_forever();
                }
                Ok(Round::Worked) => {}
                Ok(Round::Idle(until)) => self.shared.inbox.wait(until),
                Ok(Round::Stop) => return self.end(draining),
                Err(_) => {
                    error!(target: "engine", "a step panicked; running requests are lost");
                    if catch_unwind(AssertUnwindSafe(|| self.rebuild())).is_err() {
                        error!(target: "engine", "the model cannot be cleared; the engine has ended");
                        return self.refuse_forever();
                    }
                }
            }
        }
    }

    fn round(&mut self) -> Round {
        let letters = self.shared.inbox.take();
        if letters.stop {
            for submission in letters.submissions {
                self.shared.refuse(submission.ticket, draining());
            }
            return Round::Stop;
        }
        let now = Instant::now();
        self.heed();
        self.sweep(now);
        for submission in letters.submissions {
            self.admit(submission);
        }
        if self.heeded.is_paused() {
            self.publish();
            return Round::Idle(self.next_deadline());
        }
        self.start_waiting();
        let plan = self.scheduler.plan();
        let worked = plan.is_some();
        if let Some(plan) = plan {
            self.step(&plan);
        }
        self.publish();
        if worked { Round::Worked } else { Round::Idle(self.next_deadline()) }
    }

    /// Ends what nobody reads or what is late, and sends what was kept back.
    fn sweep(&mut self, now: Instant) {
        let ids: Vec<SequenceId> = self.requests.keys().copied().collect();
        for id in ids {
            let Some(request) = self.requests.get_mut(&id) else { continue };
            if request.outlet.is_closed() {
                self.cancel(id, now);
            } else if request.deadline <= now {
                self.finish(id, FinishReason::Deadline, now);
            } else {
                self.flush(id, now);
            }
        }
        let waker = &self.waker;
        self.leaving.retain_mut(|leaving| {
            leaving.outlet.flush(waker) == Flow::Full && leaving.deadline + LEAVING_GRACE > now
        });
    }

    /// Sends a request's events; a full channel pauses it, a closed one cancels it.
    fn flush(&mut self, id: SequenceId, now: Instant) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        match request.outlet.flush(&self.waker) {
            Flow::Open => self.scheduler.resume(id),
            Flow::Full => self.scheduler.pause(id),
            Flow::Closed => self.cancel(id, now),
        }
    }

    fn admit(&mut self, submission: Submission) {
        let Submission { mut prepared, ticket, permit } = submission;
        if ticket.sender.is_closed() {
            return self.shared.refuse(ticket, ChatError::Cancelled);
        }
        self.publish();
        let known = self.best_prefix(&prepared);
        let uncached = prepared.prompt.len() - known.map_or(0, |(_, len)| len);
        let predicted = match self.shared.check_deadline(&prepared, uncached) {
            Ok(predicted) => predicted,
            Err(error) => return self.shared.refuse(ticket, error),
        };
        let permit = match permit {
            Some(permit) => permit,
            None => match self.make_room(&prepared, known.map(|(slot, _)| slot)) {
                Ok(permit) => permit,
                Err(shortfall) => {
                    return self.shared.refuse(ticket, self.shared.no_headroom(shortfall));
                }
            },
        };
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let outlet = Outlet::new(ticket.sender.clone(), &self.waker);
        let memory = SlotMemory::new(permit, prepared.tokens_max());
        let mut request = Request::new(&mut prepared, ticket, memory, outlet);
        let sequence = Sequence {
            id,
            client: prepared.client,
            priority: prepared.priority,
            prompt: prepared.prompt,
            max_tokens: prepared.max_tokens,
            scores_from: prepared.scores.as_ref().map(|scores| scores.from),
        };
        match self.scheduler.submit(sequence) {
            Ok(ahead) => {
                request.outlet.push(Ok(ChatEvent::Accepted {
                    position: u32::try_from(ahead).unwrap_or(u32::MAX),
                    predicted_first_token: predicted,
                }));
                self.requests.insert(id, request);
                self.flush(id, Instant::now());
            }
            Err(_) => {
                let retry_after = self.shared.load().retry_for_place();
                self.fail_request(request, ChatError::QueueFull { retry_after }, Instant::now());
            }
        }
    }

    /// Gives up resting slots, the least recently used first and `except` last, until the worst case of
    /// `prepared` can be promised.
    fn make_room(
        &mut self,
        prepared: &Prepared,
        except: Option<SlotId>,
    ) -> Result<Permit, Shortfall> {
        let needed = Bytes(kv_bytes(&self.shared.spec, prepared.tokens_max()));
        loop {
            match self.shared.ledger.try_reserve(Purpose::Kv, &prepared.label, needed) {
                Ok(permit) => return Ok(permit),
                Err(shortfall) => {
                    if !self.give_up_resting(except) {
                        self.publish();
                        return Err(shortfall);
                    }
                }
            }
        }
    }

    fn cancel(&mut self, id: SequenceId, now: Instant) {
        if let Some(request) = self.take_out(id) {
            request.cancel(&self.shared.metrics, now);
        }
    }

    fn finish(&mut self, id: SequenceId, reason: FinishReason, now: Instant) {
        if let Some(request) = self.take_out(id) {
            self.finish_request(request, reason, now);
        }
    }

    /// Takes a request out of line or slot, and lets the slot rest.
    fn take_out(&mut self, id: SequenceId) -> Option<Request> {
        let mut request = self.requests.remove(&id)?;
        if let Some(retired) = self.scheduler.cancel_running(id) {
            self.rest(retired, request.memory.take());
        } else {
            self.scheduler.cancel_waiting(id);
            drop(request.memory.take());
        }
        Some(request)
    }

    fn finish_request(&mut self, request: Request, reason: FinishReason, now: Instant) {
        let leaving = request.finish(reason, &self.shared.metrics, now);
        self.let_leave(leaving);
    }

    fn fail_request(&mut self, request: Request, error: ChatError, now: Instant) {
        let leaving = request.fail(error, &self.shared.metrics, now);
        self.let_leave(leaving);
    }

    fn let_leave(&mut self, mut leaving: Leaving) {
        // Whoever sees the end of an answer finds the numbers and the place as they are without it.
        self.publish();
        leaving.free_place();
        if leaving.outlet.flush(&self.waker) == Flow::Full {
            self.leaving.push(leaving);
        }
    }

    /// When the next request is late.
    fn next_deadline(&self) -> Option<Instant> {
        let requests = self.requests.values().map(|request| request.deadline);
        let leaving = self.leaving.iter().map(|leaving| leaving.deadline + LEAVING_GRACE);
        requests.chain(leaving).min()
    }

    /// Tells the front and the metrics how things stand.
    fn publish(&mut self) {
        if let Some(slots) = &self.expert_slots {
            let stats = slots.stats();
            let new = stats.since(&self.published);
            self.published = stats;
            let metrics = &self.shared.metrics;
            metrics.expert_uses.inc_by(new.uses);
            metrics.expert_hits.inc_by(new.hits);
            metrics.expert_ahead_reads.inc_by(new.ahead_reads);
            metrics.expert_ahead_hits.inc_by(new.ahead_hits);
            metrics.expert_read_bytes.inc_by(new.bytes_read);
            metrics.expert_wait_seconds.inc_by(new.wait_ns as f64 / 1e9);
            metrics.expert_slots.set(stats.slots as f64);
            metrics.expert_slot_bytes.set(stats.held_bytes as f64);
        }
        let resting = self.resting.bytes();
        self.shared.resting_bytes.store(resting.0, Ordering::Relaxed);
        let metrics = &self.shared.metrics;
        let (running, waiting) = (self.scheduler.running_len(), self.scheduler.waiting_len());
        metrics.requests_running.set(running as i64);
        metrics.requests_waiting.set(waiting as i64);
        metrics.prefill_tokens_per_s.set(self.rates.prefill_tokens_per_s.unwrap_or(0.0));
        metrics.decode_tokens_per_s.set(self.rates.decode_tokens_per_s.unwrap_or(0.0));
        let load = Load {
            free_places: self.shared.slots_max() - running,
            waiting,
            prefill_tokens: self.scheduler.waiting_prompt_tokens()
                + self.scheduler.remaining().map(|(_, left)| left.prefill).sum::<usize>(),
            running: self
                .scheduler
                .remaining()
                .map(|(id, left)| {
                    let bytes = self.requests.get(&id).and_then(|r| r.memory.as_ref());
                    (left, bytes.map_or(Bytes(0), SlotMemory::bytes))
                })
                .collect(),
            rates: self.rates,
        };
        *self.shared.load() = load;
    }

    /// After a panic: nothing that was running is trusted.
    fn rebuild(&mut self) {
        let config = &self.shared.preparer.config;
        for slot in all_slots(config) {
            self.model.clear(slot);
        }
        self.scheduler = Scheduler::new(self.limits);
        self.resting.clear();
        self.free_slots = all_slots(config);
        self.fail_all(|| ChatError::Internal("a step of the engine panicked".to_owned()));
        self.publish();
    }

    fn fail_all(&mut self, error: impl Fn() -> ChatError) {
        let now = Instant::now();
        for (_, mut request) in std::mem::take(&mut self.requests) {
            drop(request.memory.take());
            self.fail_request(request, error(), now);
        }
    }

    fn end(mut self, error: impl Fn() -> ChatError) {
        self.fail_all(error);
        info!(target: "engine", "engine stopped");
    }

    /// The model is unusable: everything is refused until the front is dropped.
    fn refuse_forever(mut self) {
        self.shared.usable.store(false, Ordering::SeqCst);
        let broken = || ChatError::Internal("the engine has ended".to_owned());
        self.fail_all(broken);
        loop {
            let letters = self.shared.inbox.take();
            for submission in letters.submissions {
                self.shared.refuse(submission.ticket, broken());
            }
            if letters.stop {
                return;
            }
            self.shared.inbox.wait(None);
        }
    }
}

/// The highest first, so that the lowest is given out first.
fn all_slots(config: &Config) -> Vec<SlotId> {
    (0..config.slots.saturating_add(config.resting_slots)).rev().map(SlotId).collect()
}
