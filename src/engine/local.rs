//! The local engine as a backend: the front that doors talk to.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Config;
use super::admission::Load;
use super::grammar::Grammars;
use super::inbox::Inbox;
use super::places::Places;
use super::pool::Pool;
use super::prefix::kv_bytes;
use super::prepare::Preparer;
use super::submission::{Continuation, Job, Prepared, Submission, Ticket, door};
use super::{score, thread};
use crate::chat::{
    Backend, BoxFuture, ChatError, ChatEvent, ChatRequest, ChatStream, Completion, FinishReason,
    ModelCard, ModelName, ScoreReply, ScoreRequest, Timings, Usage,
};
use crate::memory::{Conditions, Ledger, Purpose, Rung, Shortfall};
use crate::metrics::Metrics;
use crate::model::{Model, ModelSpec};
use crate::residency::Keeper;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use crate::units::Bytes;

/// What an engine is made of.
pub struct EngineParts {
    /// The model; it must have [`slots_needed`](EngineParts::slots_needed) slots.
    pub model: Box<dyn Model>,
    /// Its chat template, which knows its tokenizer.
    pub template: ChatTemplate,
    /// What clients may know about it. `context_tokens` bounds every request.
    pub card: ModelCard,
    /// Where memory is promised. Weights and the buffers of a pass are reserved by whoever opened the model.
    pub ledger: Arc<Ledger>,
    /// Where numbers are published.
    pub metrics: Arc<Metrics>,
    /// How tight memory is, and how warm the processor.
    pub conditions: Arc<Conditions>,
    /// What the operator set.
    pub config: Config,
}

impl EngineParts {
    /// How many slots a model must have for this configuration.
    pub fn slots_needed(config: &Config) -> u16 {
        config.slots.saturating_add(config.resting_slots)
    }
}

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(String),
    /// A thread could not be started.
    #[error("cannot start a thread of the engine: {0}")]
    Thread(#[from] io::Error),
    /// The buffers of the engine cannot be promised.
    #[error("no headroom for the logits: {0}")]
    Shortfall(#[from] Shortfall),
}

/// What the front, the preparing threads and the engine thread share.
pub(super) struct Shared {
    pub(super) spec: ModelSpec,
    pub(super) preparer: Preparer,
    pub(super) ledger: Arc<Ledger>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) conditions: Arc<Conditions>,
    pub(super) inbox: Arc<Inbox>,
    /// Cleared when the model can no longer be trusted.
    pub(super) usable: AtomicBool,
    /// Bytes that ended sequences would give back.
    pub(super) resting_bytes: AtomicU64,
    load: Mutex<Load>,
    places: Arc<Places>,
    draining: AtomicBool,
}

/// A model that answers on this machine. Dropping it ends what runs with `Draining`; a reader that left its
/// channel full only sees its stream end.
pub struct Local {
    shared: Arc<Shared>,
    card: ModelCard,
    pool: Option<Pool>,
    thread: Option<JoinHandle<()>>,
    /// Lets the expert slots of a streamed model follow memory.
    _keeper: Option<Keeper>,
}

/// Starts the engine's threads.
///
/// # Errors
/// If the configuration is wrong, the logits' buffers find no headroom, or a thread cannot be started.
pub fn start(parts: EngineParts) -> Result<Local, StartError> {
    let EngineParts { model, template, card, ledger, metrics, conditions, config } = parts;
    if let Some(error) = config.check().into_iter().next() {
        return Err(StartError::Config(error));
    }
    let spec = model.spec().clone();
    let buffers = thread::logits_bytes(&spec, &config);
    let scratch = ledger.try_reserve(Purpose::Scratch, "logits", buffers)?;
    let queue_max = usize::from(config.slots) + config.waiting_max;
    let longest_token_bytes = template.tokenizer().longest_token_bytes();
    let preparer = Preparer {
        template,
        grammars: Grammars::new(Arc::clone(&ledger)),
        context_tokens: card.context_tokens.min(spec.context_len),
        vocab_len: spec.vocab_len,
        longest_token_bytes,
        config: config.clone(),
    };
    let inbox = Arc::new(Inbox::default());
    conditions.wake_on_change(Waker::from(Arc::clone(&inbox)));
    let shared = Arc::new(Shared {
        spec,
        preparer,
        ledger,
        metrics,
        conditions,
        inbox,
        usable: AtomicBool::new(true),
        resting_bytes: AtomicU64::new(0),
        load: Mutex::new(Load { free_places: usize::from(config.slots), ..Load::default() }),
        places: Places::new(queue_max),
        draining: AtomicBool::new(false),
    });
    let worker = Arc::clone(&shared);
    let pool = Pool::start(config.prepare_threads, queue_max, move |job| worker.work(job))?;
    let keep = |slots| {
        let (conditions, metrics) = (Arc::clone(&shared.conditions), Arc::clone(&shared.metrics));
        Keeper::start(slots, conditions, metrics)
    };
    let keeper = model.expert_slots().map(keep).transpose()?;
    let thread = thread::spawn(model, Arc::clone(&shared), scratch)?;
    Ok(Local { shared, card, pool: Some(pool), thread: Some(thread), _keeper: keeper })
}

impl Local {
    /// Refuses new requests from now on and waits, but not longer than `limit`, until those in hand have
    /// ended. Returns whether they all have.
    pub fn drain(&self, limit: Duration) -> bool {
        self.shared.draining.store(true, Ordering::SeqCst);
        self.shared.places.wait_until_empty(limit)
    }

    pub(super) fn card(&self) -> &ModelCard {
        &self.card
    }

    pub(super) fn tokenizer(&self) -> &Tokenizer {
        self.shared.preparer.template.tokenizer()
    }

    /// Requests in hand: being prepared, waiting, running, or not yet read to the end.
    pub fn in_hand(&self) -> usize {
        self.shared.places.len()
    }

    /// Whether requests can still be answered. They cannot if the model could not be brought back into a
    /// defined state after a panic: then only a restart helps.
    pub fn is_usable(&self) -> bool {
        let runs = self.thread.as_ref().is_some_and(|thread| !thread.is_finished());
        runs && self.shared.usable.load(Ordering::SeqCst)
    }

    fn refusal(&self, name: &ModelName) -> Option<ChatError> {
        if !name.as_str().is_empty() && !name.matches(&self.card.name) {
            return Some(ChatError::UnknownModel(name.clone()));
        }
        if self.shared.draining.load(Ordering::SeqCst) {
            return Some(draining());
        }
        None
    }
}

impl Backend for Local {
    fn models(&self) -> Vec<ModelCard> {
        vec![self.card.clone()]
    }

    fn chat(&self, request: ChatRequest) -> ChatStream {
        self.submit(request, None)
    }

    fn score(&self, request: ScoreRequest) -> BoxFuture<'_, Result<ScoreReply, ChatError>> {
        Box::pin(score::score(self, request))
    }
}

impl Local {
    /// The stream of `request`; with a continuation, of its log-probabilities alone.
    pub(super) fn submit(
        &self,
        request: ChatRequest,
        continuation: Option<Continuation>,
    ) -> ChatStream {
        let door = door(&request.parts().origin);
        let refuse = |error: ChatError| {
            self.shared.metrics.requests.with_label_values(&[door, error.code()]).inc();
            ChatStream::refused(error)
        };
        if let Some(error) = self.refusal(request.model()) {
            return refuse(error);
        }
        let full = || ChatError::QueueFull { retry_after: self.shared.load().retry_for_place() };
        let Some(place) = self.shared.places.take() else {
            return refuse(full());
        };
        let (sender, stream) = ChatStream::channel(self.shared.preparer.config.unread_events_max);
        let ticket = Ticket { sender, place, door, arrived: Instant::now() };
        let Some(pool) = &self.pool else { return refuse(draining()) };
        match pool.submit(Job { request, continuation, ticket }) {
            Ok(()) => stream,
            Err(_) => refuse(full()),
        }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.shared.draining.store(true, Ordering::SeqCst);
        drop(self.pool.take());
        self.shared.inbox.stop();
        if let Some(thread) = self.thread.take() {
            // A panic has already been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Shared {
    pub(super) fn load(&self) -> MutexGuard<'_, Load> {
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn slots_max(&self) -> usize {
        usize::from(self.preparer.config.slots)
    }

    /// The whole way of a job on a preparing thread.
    fn work(&self, job: Job) {
        let Job { request, continuation, ticket } = job;
        if ticket.sender.is_closed() {
            return self.refuse(ticket, ChatError::Cancelled);
        }
        let prepared =
            catch_unwind(AssertUnwindSafe(|| self.preparer.prepare(request, continuation)))
                .unwrap_or_else(|_| {
                    Err(ChatError::Internal("preparing a prompt panicked".to_owned()))
                });
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return self.refuse(ticket, error),
        };
        if prepared.max_tokens == 0 && prepared.scores.is_none() {
            return self.answer_nothing(&prepared, &ticket);
        }
        match self.admit(&prepared) {
            Ok(permit) => self.inbox.submit(Submission { prepared, ticket, permit }),
            Err(error) => self.refuse(ticket, error),
        }
    }

    /// A permit for the worst case; none if it depends on what the engine thread can make free; or a refusal
    /// that needs no look at the engine.
    fn admit(&self, prepared: &Prepared) -> Result<Option<crate::memory::Permit>, ChatError> {
        self.check_deadline(prepared, 0)?;
        let needed = Bytes(kv_bytes(&self.spec, prepared.tokens_max()));
        match self.ledger.try_reserve(Purpose::Kv, &prepared.label, needed) {
            Ok(permit) => Ok(Some(permit)),
            Err(shortfall) => {
                let resting = Bytes(self.resting_bytes.load(Ordering::Relaxed));
                let may_help = self.conditions.rung() < Rung::Red;
                if may_help && shortfall.free.saturating_add(resting) >= needed {
                    return Ok(None);
                }
                Err(self.no_headroom(shortfall))
            }
        }
    }

    /// A refusal if the deadline passes before the first token of a prompt of which `uncached` tokens must be
    /// read.
    pub(super) fn check_deadline(
        &self,
        prepared: &Prepared,
        uncached: usize,
    ) -> Result<Option<Duration>, ChatError> {
        let predicted = self.load().first_token(uncached);
        let needs = predicted.unwrap_or_default();
        let left = prepared.deadline.saturating_duration_since(Instant::now());
        match needs > left || left.is_zero() {
            true => Err(ChatError::DeadlineUnmeetable { needs }),
            false => Ok(predicted),
        }
    }

    pub(super) fn no_headroom(&self, shortfall: Shortfall) -> ChatError {
        let Shortfall { needed, free } = shortfall;
        let resting = Bytes(self.resting_bytes.load(Ordering::Relaxed));
        let free = free.saturating_add(resting);
        let retry_after = self.load().retry_for_bytes(needed.saturating_sub(free));
        ChatError::NoHeadroom { needed, free, retry_after }
    }

    /// Sends a refusal as the stream's only item.
    pub(super) fn refuse(&self, ticket: Ticket, error: ChatError) {
        self.metrics.requests.with_label_values(&[ticket.door, error.code()]).inc();
        if let ChatError::Internal(detail) = &error {
            log::error!(target: "engine", detail = detail.as_str(); "request failed");
        }
        // The channel is new and has room; if nobody reads, nobody misses it.
        let _ = ticket.sender.try_send(Err(error));
    }

    /// Answers a request for no tokens and no scores: there is nothing to compute.
    fn answer_nothing(&self, prepared: &Prepared, ticket: &Ticket) {
        let usage = Usage { prompt_tokens: prepared.prompt.len() as u32, ..Usage::default() };
        let timings = Timings { queue: ticket.arrived.elapsed(), ..Timings::default() };
        let done = Completion { finish: FinishReason::Length, usage, timings, fusion: None };
        self.metrics.requests.with_label_values(&[ticket.door, "length"]).inc();
        let _ = ticket.sender.try_send(Ok(ChatEvent::Done(done)));
    }
}

/// A restarted daemon answers within seconds.
pub(super) fn draining() -> ChatError {
    ChatError::Draining { retry_after: Duration::from_secs(10) }
}
