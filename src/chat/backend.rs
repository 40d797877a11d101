//! Whatever answers a request, and the choice among several by model name.

use std::sync::Arc;

use super::{BoxFuture, ChatError, ChatRequest, ChatStream, ModelName, ScoreReply, ScoreRequest};

/// Whatever answers a chat request: the local engine, another machine, a fusion of several.
pub trait Backend: Send + Sync {
    /// The models it answers for, as clients name them; the default one first. Answers at once, from memory.
    fn models(&self) -> Vec<ModelCard>;

    /// Starts answering `request`, and returns at once. A refusal is the stream's first and only item.
    fn chat(&self, request: ChatRequest) -> ChatStream;

    /// The card of the model that a client means by `name`, which may be one that is not listed.
    fn card(&self, name: &ModelName) -> Option<ModelCard> {
        self.models().into_iter().find(|card| name.as_str().is_empty() || card.name.matches(name))
    }

    /// How likely the model finds continuations of a conversation. Dropping the future cancels the work.
    ///
    /// # Errors
    /// `NotSupported` where log-probabilities cannot be had; otherwise as [`chat`](Backend::chat).
    fn score(&self, request: ScoreRequest) -> BoxFuture<'_, Result<ScoreReply, ChatError>> {
        let message = format!("model \"{}\" cannot score", request.model);
        Box::pin(std::future::ready(Err(ChatError::NotSupported(message))))
    }
}

/// What clients may know about a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelCard {
    /// The name clients use.
    pub name: ModelName,
    /// `llama4`, `llama`, …
    pub architecture: String,
    /// Weights, all experts counted.
    pub parameters: u64,
    /// The prevailing format of the weights, as `Q4_0`.
    pub quantization: String,
    /// Size of the file.
    pub file_bytes: u64,
    /// SHA-256 of the file's header (metadata and tensor table), 64 hexadecimal digits: it names the model
    /// without reading gigabytes.
    pub digest: String,
    /// When the file was last changed, in seconds since 1970.
    pub modified_unix_s: u64,
    /// Longest context one request may use here.
    pub context_tokens: u32,
    /// Longest context the model was trained for.
    pub trained_context_tokens: u32,
    /// Width of the residual stream.
    pub embedding_len: u32,
    /// Entries of the vocabulary.
    pub vocabulary_len: u32,
    /// The chat template's source.
    pub template: String,
}

/// The backends of this process, found by model name.
#[derive(Clone)]
pub struct Router {
    backends: Arc<[Arc<dyn Backend>]>,
}

impl Router {
    /// The first backend's first model is the default one.
    pub fn new(backends: Vec<Arc<dyn Backend>>) -> Router {
        Router { backends: backends.into() }
    }

    /// All models, the default one first.
    pub fn models(&self) -> Vec<ModelCard> {
        self.backends.iter().flat_map(|backend| backend.models()).collect()
    }

    /// The model that a client means by `name`: compared without case, `x` and `x:latest` are one, and an
    /// empty name is the default model.
    pub fn find(&self, name: &ModelName) -> Option<ModelCard> {
        self.lookup(name).map(|(_, card)| card)
    }

    fn lookup(&self, name: &ModelName) -> Option<(&Arc<dyn Backend>, ModelCard)> {
        self.backends.iter().find_map(|backend| Some((backend, backend.card(name)?)))
    }
}

impl Backend for Router {
    fn models(&self) -> Vec<ModelCard> {
        Router::models(self)
    }

    fn chat(&self, request: ChatRequest) -> ChatStream {
        match self.lookup(request.model()) {
            Some((backend, _)) => backend.chat(request),
            None => ChatStream::refused(ChatError::UnknownModel(request.model().clone())),
        }
    }

    fn card(&self, name: &ModelName) -> Option<ModelCard> {
        self.find(name)
    }

    fn score(&self, request: ScoreRequest) -> BoxFuture<'_, Result<ScoreReply, ChatError>> {
        match self.lookup(&request.model) {
            Some((backend, _)) => backend.score(request),
            None => Box::pin(std::future::ready(Err(ChatError::UnknownModel(request.model)))),
        }
    }
}
