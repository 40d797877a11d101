//! One member: another server as a [`Backend`], with what is known of its health.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::call;
use super::config::{Kind, MemberConfig, Strength};
use super::health::{Breaker, Rates};
use super::score;
use super::trust::Signer;
use crate::chat::{
    Backend, BoxFuture, ChatError, ChatRequest, ChatStream, Fault, FaultReason, ModelCard,
    ModelName, Scope, ScoreReply, ScoreRequest,
};
use crate::egress::{Client, Url};
use crate::metrics::Metrics;
use crate::wire::upstream::{Dialect, NodeModel, NodeReport};

/// Another server's model. Clones are the same member.
#[derive(Clone)]
pub struct Peer {
    pub(super) shared: Arc<Shared>,
}

/// What a peer is made of.
pub(super) struct PeerParts {
    pub(super) config: MemberConfig,
    pub(super) url: Url,
    pub(super) scope: Scope,
    /// Found, not configured: it goes when it has been away for long.
    pub(super) discovered: bool,
    pub(super) client: Client,
    pub(super) bearer: Option<String>,
    /// For another scoutd.
    pub(super) signer: Option<Arc<Signer>>,
    pub(super) runtime: Handle,
    pub(super) metrics: Arc<Metrics>,
}

pub(super) struct Shared {
    pub(super) parts: PeerParts,
    state: Mutex<State>,
}

/// What is known at the moment.
#[derive(Default)]
pub(super) struct State {
    pub(super) breaker: Breaker,
    pub(super) rates: Rates,
    pub(super) in_flight: u16,
    /// What proofs must contain.
    pub(super) boot: Option<String>,
    /// What a scoutd said of itself.
    pub(super) node: Option<NodeReport>,
    /// When it was last heard of.
    pub(super) seen: Option<Instant>,
    pub(super) last_fault: Option<FaultReason>,
    /// Ollama: its listing says that the model runs on that machine.
    pub(super) runs_there: Option<bool>,
    /// It was asked for log-probabilities and gave none.
    pub(super) no_logprobs: bool,
}

/// Whether a member can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// Known, but it has not proved that it belongs to the pool.
    Candidate,
    /// It can be asked.
    Healthy,
    /// It has not been heard of for 30 s.
    Left,
    /// It failed repeatedly and is left alone for 30 s.
    Open,
}

impl Standing {
    /// One word.
    pub fn as_str(self) -> &'static str {
        match self {
            Standing::Candidate => "candidate",
            Standing::Healthy => "healthy",
            Standing::Left => "left",
            Standing::Open => "open",
        }
    }
}

/// How a member can score.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scoring {
    /// Any continuation.
    Exact,
    /// Not at all.
    None,
    /// From the likeliest tokens that its server lists.
    TopK,
}

impl Scoring {
    /// One word.
    pub fn as_str(self) -> &'static str {
        match self {
            Scoring::Exact => "exact",
            Scoring::None => "none",
            Scoring::TopK => "top_k",
        }
    }
}

/// What a member looks like from here, now.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// `name/model`.
    pub id: String,
    /// What it speaks.
    pub kind: Kind,
    /// Where it is.
    pub scope: Scope,
    /// What it calls the model.
    pub model: String,
    /// Names the model's file, where it is told.
    pub digest: Option<String>,
    /// Weights, where that is told.
    pub parameters: Option<u64>,
    /// In the owner's opinion.
    pub strength: Option<Strength>,
    /// How it scores.
    pub scoring: Scoring,
    /// Whether it can be asked.
    pub standing: Standing,
    /// Requests of ours under way.
    pub in_flight: u16,
    /// Requests of ours it gets at once.
    pub max_in_flight: Option<u16>,
    /// Predicted wait in line.
    pub queue: Duration,
    /// Prompt tokens per second.
    pub prefill_per_s: Option<f64>,
    /// Tokens per second of one answer.
    pub decode_per_s: Option<f64>,
    /// Bytes it may still promise, where it tells.
    pub headroom: Option<u64>,
    /// Throttled by heat.
    pub hot: bool,
    /// The last fault.
    pub last_fault: Option<FaultReason>,
    /// Since it was last heard of.
    pub seen: Option<Duration>,
}

/// Unread events of one answer.
const UNREAD_MAX: usize = 64;

/// A scoutd that was not heard of for so long has left.
const LEFT_AFTER: Duration = Duration::from_secs(30);

/// A Pi 5 throttles at 80 °C, and from 85 °C on hard.
const HOT_CELSIUS: f64 = 84.0;

impl Peer {
    pub(super) fn new(parts: PeerParts) -> Peer {
        Peer { shared: Arc::new(Shared { parts, state: Mutex::default() }) }
    }

    /// The name its owner gave it, or that it gave itself.
    pub fn name(&self) -> &str {
        &self.shared.parts.config.name
    }

    /// Where it is.
    pub fn url(&self) -> &Url {
        &self.shared.parts.url
    }

    pub(super) fn is_discovered(&self) -> bool {
        self.shared.parts.discovered
    }

    /// What is known of it now.
    pub fn snapshot(&self) -> Snapshot {
        self.shared.snapshot(Instant::now())
    }

    /// Asks a scoutd about itself; other kinds are judged by their traffic.
    ///
    /// # Errors
    /// Why there was no answer that could be believed.
    pub async fn look(&self) -> Result<(), Fault> {
        if self.shared.parts.config.kind != Kind::Scoutd {
            return Ok(());
        }
        call::look(&self.shared).await
    }
}

impl Backend for Peer {
    fn models(&self) -> Vec<ModelCard> {
        let state = self.shared.lock();
        let node = state.node.as_ref();
        let name = self.shared.model_of(&state);
        let model = node.and_then(|node| node.models.iter().find(|model| model.name == name));
        vec![card(&name, model)]
    }

    fn chat(&self, request: ChatRequest) -> ChatStream {
        let ticket = match Ticket::take(&self.shared) {
            Ok(ticket) => ticket,
            Err(fault) => return ChatStream::refused(ChatError::Upstream(fault)),
        };
        let (sender, stream) = ChatStream::channel(UNREAD_MAX);
        self.shared.parts.runtime.spawn(call::chat(ticket, request, sender));
        stream
    }

    fn score(&self, request: ScoreRequest) -> BoxFuture<'_, Result<ScoreReply, ChatError>> {
        Box::pin(async move {
            let ticket = Ticket::take(&self.shared).map_err(ChatError::Upstream)?;
            score::score(ticket, &request).await.map_err(ChatError::Upstream)
        })
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model to ask for: the configured one, else the node's own default.
    pub(super) fn model_of(&self, state: &State) -> String {
        if let Some(model) = &self.parts.config.model {
            return model.clone();
        }
        let default = state.node.as_ref().and_then(|node| node.models.first());
        match (default, self.parts.config.kind) {
            (Some(model), _) => model.name.clone(),
            // distributed-llama serves one model under this name, whatever is asked for.
            (None, Kind::Dllama) => "Distributed Model".to_owned(),
            (None, _) => "default".to_owned(),
        }
    }

    pub(super) fn dialect(&self) -> Dialect {
        let config = &self.parts.config;
        match config.kind {
            Kind::Dllama => Dialect::Bare,
            Kind::Ollama => Dialect::Ollama { context_tokens: config.context_tokens },
            Kind::OpenAi => Dialect::OpenAi,
            Kind::Scoutd => Dialect::Scoutd,
        }
    }

    fn max_in_flight(&self) -> Option<u16> {
        match self.parts.config.kind {
            Kind::Dllama => Some(self.parts.config.max_in_flight.unwrap_or(1)),
            _ => self.parts.config.max_in_flight,
        }
    }

    fn standing(&self, state: &State, now: Instant) -> Standing {
        if self.parts.config.kind == Kind::Scoutd {
            let Some(seen) = state.seen else { return Standing::Candidate };
            if now.duration_since(seen) > LEFT_AFTER {
                return Standing::Left;
            }
        }
        if state.breaker.would_admit(now) { Standing::Healthy } else { Standing::Open }
    }

    fn snapshot(&self, now: Instant) -> Snapshot {
        let state = self.lock();
        let model = self.model_of(&state);
        let config = &self.parts.config;
        let node = state.node.as_ref();
        let told = node.and_then(|node| node.models.iter().find(|told| told.name == model));
        let measured =
            |own: Option<f64>, told: Option<f64>| own.or(told.filter(|rate| *rate > 0.0));
        let prefill_per_s =
            measured(state.rates.prefill.get(), node.and_then(|node| node.prefill_tokens_per_s));
        let decode_per_s =
            measured(state.rates.decode.get(), node.and_then(|node| node.decode_tokens_per_s));
        Snapshot {
            id: format!("{}/{model}", config.name),
            kind: config.kind,
            scope: self.parts.scope,
            digest: told.map(|told| told.digest.clone()),
            parameters: told.map(|told| told.parameters).filter(|count| *count > 0),
            model,
            strength: config.tier,
            scoring: match config.kind {
                Kind::Scoutd => Scoring::Exact,
                Kind::Dllama => Scoring::None,
                Kind::Ollama | Kind::OpenAi if state.no_logprobs => Scoring::None,
                Kind::Ollama | Kind::OpenAi => Scoring::TopK,
            },
            standing: self.standing(&state, now),
            in_flight: state.in_flight,
            max_in_flight: self.max_in_flight(),
            queue: Duration::try_from_secs_f64(state.rates.queue_s.get().unwrap_or(0.0))
                .unwrap_or_default(),
            prefill_per_s,
            decode_per_s,
            headroom: node.and_then(|node| node.headroom_bytes),
            hot: node.and_then(|node| node.temperature_celsius).is_some_and(|t| t >= HOT_CELSIUS),
            last_fault: state.last_fault,
            seen: state.seen.map(|seen| now.duration_since(seen)),
        }
    }
}

/// A request of ours at a member, counted from before it is sent until it has ended in any way.
pub(super) struct Ticket {
    pub(super) shared: Arc<Shared>,
    told: bool,
}

impl Ticket {
    /// Counts one more request, if the member may be asked now.
    fn take(shared: &Arc<Shared>) -> Result<Ticket, Fault> {
        let now = Instant::now();
        let mut state = shared.lock();
        if shared.max_in_flight().is_some_and(|max| state.in_flight >= max) {
            return Err(Fault::explained(FaultReason::Busy, "all places of this member are taken"));
        }
        if shared.standing(&state, now) == Standing::Candidate {
            let why = "it has not proved that it belongs to the pool";
            return Err(Fault::explained(FaultReason::Unauthorized, why));
        }
        if !state.breaker.admit(now) {
            return Err(Fault::new(FaultReason::BreakerOpen));
        }
        state.in_flight += 1;
        shared.parts.metrics.peer_requests_running.inc();
        drop(state);
        Ok(Ticket { shared: Arc::clone(shared), told: false })
    }

    /// The member did what it was asked for.
    pub(super) fn succeeded(mut self) {
        self.told = true;
        let mut state = self.shared.lock();
        state.breaker.succeeded();
        state.last_fault = None;
        state.seen = Some(Instant::now());
    }

    /// The member did not.
    pub(super) fn failed(mut self, reason: FaultReason) {
        self.told = true;
        self.shared.note_fault(reason);
    }
}

impl Shared {
    /// Counts a fault, against the member if it is the member's.
    fn note_fault(&self, reason: FaultReason) {
        let now = Instant::now();
        let config = &self.parts.config;
        let mut state = self.lock();
        state.last_fault = Some(reason);
        match reason {
            // A request that a server does not like says nothing about the next one.
            FaultReason::Http4xx => state.breaker.undecided(),
            FaultReason::ConnectRefused | FaultReason::ConnectTimeout | FaultReason::NoSuchHost => {
                state.breaker.unreachable(now);
            }
            reason if reason.counts_against() => {
                if state.breaker.failed(now) {
                    log::warn!(target: "peer", member = config.name.as_str(), reason:%; "left alone for 30 s");
                }
            }
            _ => state.breaker.undecided(),
        }
        drop(state);
        log::debug!(target: "peer", member = config.name.as_str(), reason:%; "a request failed");
        let labels = [config.name.as_str(), reason.as_str()];
        self.parts.metrics.peer_faults.with_label_values(&labels).inc();
        if matches!(reason, FaultReason::WanAddress | FaultReason::WanDns | FaultReason::WanModel) {
            self.parts.metrics.fusion_egress_refused.inc();
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.in_flight = state.in_flight.saturating_sub(1);
        if !self.told {
            state.breaker.undecided();
        }
        self.shared.parts.metrics.peer_requests_running.dec();
    }
}

fn card(name: &str, model: Option<&NodeModel>) -> ModelCard {
    let model = model.cloned().unwrap_or_default();
    // A server that does not tell its context bounds nobody's.
    let context_tokens =
        Some(model.context_tokens).filter(|tokens| *tokens > 0).unwrap_or(u32::MAX);
    ModelCard {
        name: ModelName::new(name),
        architecture: model.architecture,
        parameters: model.parameters,
        quantization: model.quantization,
        file_bytes: 0,
        digest: model.digest,
        modified_unix_s: 0,
        context_tokens,
        trained_context_tokens: context_tokens,
        embedding_len: 0,
        vocabulary_len: 0,
        template: String::new(),
    }
}
