//! The fusion pool: one question goes to several members at once, and one answer comes back.
//!
//! The pool knows no sockets: whoever wires the process hands it members, each with the backend that reaches it
//! and what is known of its health and speed. What is decided is decided by the pure [`plan`]; this module only picks
//! members, carries the plan out, and tells what was done.

mod answer;
mod calibrate;
mod decimal;
mod desk;
mod drive;
mod job;
mod judge;
mod load;
mod member;
mod merge;
pub mod plan;
mod prompts;
mod receipt;
mod report;
mod select;
mod single;
#[cfg(test)]
mod tests;
mod weight;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;

pub use answer::{Form, Usable};
pub use calibrate::{Calibration, Graded, Item, Pairs, Score, arithmetic};
use job::Job;
pub use load::Load;
pub use member::{Health, Member, MemberKind, Roster, ScoreKind, Tier, Vitals};
use receipt::Drawer;
pub use weight::{Tally, family_weight, strength, weight};

use crate::chat::{
    Backend, ChatError, ChatEvent, ChatRequest, ChatRequestParts, ChatStream, Input, Message,
    ModelCard, ModelName, Origin, Role,
};
use crate::metrics::Metrics;

/// What the owner may set.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The pool's name, of `[a-z0-9-]{1,32}`.
    pub pool: String,
    /// Whether plain `fusion` means this pool.
    pub is_default: bool,
    /// Fusions at once.
    pub running_max: usize,
    /// Answers of one fusion: members times samples.
    pub answers_max: u8,
    /// Longest time for one.
    pub deadline_max: Duration,
    /// Bytes of one answer.
    pub answer_bytes_max: usize,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            pool: "default".to_owned(),
            is_default: true,
            running_max: 4,
            answers_max: 8,
            deadline_max: Duration::from_secs(300),
            answer_bytes_max: 1 << 20,
        }
    }
}

/// What a pool is made of.
pub struct FusionParts {
    /// What the owner set.
    pub settings: Settings,
    /// Its members.
    pub roster: Arc<dyn Roster>,
    /// What is known of their strength.
    pub calibration: Calibration,
    /// Where numbers are published.
    pub metrics: Arc<Metrics>,
    /// Where fusions run.
    pub runtime: Handle,
}

/// A pool as a backend.
pub struct Fusion {
    shared: Arc<Shared>,
    runtime: Handle,
}

/// What the fusions of a pool share.
struct Shared {
    settings: Arc<Settings>,
    roster: Arc<dyn Roster>,
    metrics: Arc<Metrics>,
    running: AtomicUsize,
    state: Mutex<State>,
    began: Instant,
    /// Makes marks in prompts that no member can know.
    secret: [u8; 16],
}

#[derive(Default)]
struct State {
    calibration: Calibration,
    load: Load,
    receipts: Drawer,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running fusion's place.
struct Place(Arc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Fusion {
    /// A pool.
    pub fn new(parts: FusionParts) -> Fusion {
        let FusionParts { settings, roster, calibration, metrics, runtime } = parts;
        let began = {
            let _runtime = runtime.enter();
            Instant::now()
        };
        let shared = Shared {
            settings: Arc::new(settings),
            roster,
            metrics,
            running: AtomicUsize::new(0),
            state: Mutex::new(State { calibration, ..State::default() }),
            began,
            secret: rand::random(),
        };
        Fusion { shared: Arc::new(shared), runtime }
    }

    /// The members as they are now.
    pub fn members(&self) -> Vec<Member> {
        self.shared.roster.members()
    }

    /// Fusions under way.
    pub fn running(&self) -> usize {
        self.shared.running.load(Ordering::SeqCst)
    }

    /// What is known of the members' strength, to be kept.
    pub fn calibration(&self) -> Calibration {
        self.shared.state().calibration.clone()
    }

    /// Replaces it.
    pub fn set_calibration(&self, calibration: Calibration) {
        self.shared.state().calibration = calibration;
    }

    /// The receipt of one of the last fusions, by the id of its report, as canonical JSON. Its SHA-256 is the report's
    /// `receipt`.
    pub fn receipt(&self, id: &str) -> Option<String> {
        self.shared.state().receipts.get(id).map(str::to_owned)
    }

    /// Asks every healthy member one item of known truth and learns from the answers. What was learned is in
    /// [`calibration`](Fusion::calibration) afterwards.
    ///
    /// # Errors
    /// `Invalid` if the truth is not of the form.
    pub async fn calibrate(
        &self,
        item: &Item,
        form: &Form,
        patience: Duration,
    ) -> Result<Graded, ChatError> {
        let truth = form.usable(&item.truth, 0).map_err(|reason| {
            ChatError::invalid("truth", format!("the truth is no answer of its form: {reason}"))
        })?;
        let deadline = Instant::now() + patience;
        let members: Vec<Member> = self.members().into_iter().filter(Member::is_healthy).collect();
        let mut streams = Vec::with_capacity(members.len());
        for member in &members {
            let input = Input::Messages(vec![Message::text(Role::User, item.question.as_str())]);
            let origin = Origin::Fusion { depth: 1 };
            let mut parts =
                ChatRequestParts::new(origin, "calibration", input, deadline.into_std());
            parts.model = member.model.clone();
            parts.sampling.temperature = 0.0;
            parts.max_tokens = Some(CALIBRATION_TOKENS_MAX);
            streams.push((member, member.backend.chat(ChatRequest::try_from(parts)?)));
        }
        let mut graded = Graded { truth: truth.key, answers: Vec::new() };
        for (member, stream) in streams {
            // All are under way; the time is the same for all.
            let reply = tokio::time::timeout_at(deadline, stream.collect()).await;
            let answer = match reply {
                Ok(Ok(reply)) => form.usable(&reply.text, 0).ok().map(|usable| usable.key),
                Ok(Err(_)) | Err(_) => None,
            };
            graded.answers.push((Calibration::model_of(member).to_owned(), answer));
        }
        self.shared.state().calibration.learn(form.kind(), &graded);
        Ok(graded)
    }

    fn answers_to(&self, name: &ModelName) -> bool {
        let settings = &self.shared.settings;
        let own = ModelName::new(&format!("fusion:{}", settings.pool));
        let named = |other: &str| name.matches(&ModelName::new(other));
        own.matches(name)
            || (settings.is_default && (named("fusion") || named("openrouter/fusion")))
    }

    fn own_card(&self) -> ModelCard {
        let settings = &self.shared.settings;
        let name = match settings.is_default {
            true => "fusion".to_owned(),
            false => format!("fusion:{}", settings.pool),
        };
        let members = self.members();
        let healthy = members.iter().filter(|member| member.is_healthy());
        let cards: Vec<ModelCard> =
            healthy.filter_map(|member| member.backend.card(&member.model)).collect();
        let ids: Vec<&str> = members.iter().map(|member| &*member.id).collect();
        ModelCard {
            name: ModelName::new(&name),
            architecture: "fusion".to_owned(),
            parameters: cards.iter().map(|card| card.parameters).sum(),
            quantization: "mixed".to_owned(),
            file_bytes: 0,
            digest: answer::sha256(ids.join("\n").as_bytes()),
            modified_unix_s: 0,
            context_tokens: cards.iter().map(|card| card.context_tokens).min().unwrap_or(0),
            trained_context_tokens: cards
                .iter()
                .map(|card| card.trained_context_tokens)
                .min()
                .unwrap_or(0),
            embedding_len: 0,
            vocabulary_len: 0,
            template: String::new(),
        }
    }

    fn take_place(&self) -> Option<Place> {
        let max = self.shared.settings.running_max;
        let taken = self
            .shared
            .running
            .try_update(Ordering::SeqCst, Ordering::SeqCst, |n| (n < max).then_some(n + 1));
        taken.ok().map(|_| Place(Arc::clone(&self.shared)))
    }

    fn start(&self, request: ChatRequest) -> Result<ChatStream, ChatError> {
        if !self.answers_to(request.model()) {
            return Err(ChatError::UnknownModel(request.model().clone()));
        }
        if matches!(request.parts().origin, Origin::Fusion { depth: 1.. }) {
            let message = "a fusion is not answered by fusions: name one model";
            return Err(ChatError::invalid("model", message));
        }
        let busy = || ChatError::QueueFull { retry_after: Duration::from_secs(2) };
        let place = self.take_place().ok_or_else(busy)?;
        let _runtime = self.runtime.enter();
        let (sender, stream) = ChatStream::channel(EVENTS_MAX);
        let task = Job::task(Arc::clone(&self.shared), place, request, sender.clone())?;
        let accepted = ChatEvent::Accepted { position: 0, predicted_first_token: None };
        // The channel is new and has room.
        let _ = sender.try_send(Ok(accepted));
        drop(sender);
        self.runtime.spawn(task);
        Ok(stream)
    }
}

impl Backend for Fusion {
    /// Listed while a member besides the local one can be asked; unlisted it still answers.
    fn models(&self) -> Vec<ModelCard> {
        let others = |member: &Member| member.is_healthy() && member.kind != MemberKind::Local;
        match self.members().iter().any(others) {
            true => vec![self.own_card()],
            false => Vec::new(),
        }
    }

    fn card(&self, name: &ModelName) -> Option<ModelCard> {
        self.answers_to(name).then(|| self.own_card())
    }

    fn chat(&self, request: ChatRequest) -> ChatStream {
        match self.start(request) {
            Ok(stream) => stream,
            Err(error) => {
                self.shared.metrics.requests.with_label_values(&["pool", error.code()]).inc();
                ChatStream::refused(error)
            }
        }
    }
}

/// Events that a slow client may leave unread before its fusion waits.
const EVENTS_MAX: usize = 64;

/// Tokens of an answer to an item of known truth.
const CALIBRATION_TOKENS_MAX: u32 = 64;
