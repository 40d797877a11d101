//! How likely a model finds continuations of a conversation: the question that logit judges ask.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use super::{Message, ModelName, Origin, Priority, RequestId};

/// A boxed future that may move between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Asks for the log-probabilities of `candidates`, each right after the conversation rendered as for an answer.
#[derive(Clone, Debug)]
pub struct ScoreRequest {
    /// Its name in logs.
    pub id: RequestId,
    /// Where it came in.
    pub origin: Origin,
    /// Who is asking, for fairness among clients.
    pub client: Arc<str>,
    /// The model; empty is the default one.
    pub model: ModelName,
    /// If given, only a model of this digest may answer.
    pub digest: Option<String>,
    /// The conversation.
    pub messages: Vec<Message>,
    /// The continuations; at most [`ScoreRequest::CANDIDATES_MAX`], none of them empty.
    pub candidates: Vec<String>,
    /// When the scores must be there.
    pub deadline: Instant,
    /// Who goes first.
    pub priority: Priority,
}

impl ScoreRequest {
    /// Most continuations of one request.
    pub const CANDIDATES_MAX: usize = 16;

    /// Most bytes of one continuation.
    pub const CANDIDATE_BYTES_MAX: usize = 256;
}

/// The answer to a [`ScoreRequest`].
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreReply {
    /// Natural logarithm of each candidate's probability, summed over its tokens; in the order asked.
    pub logprobs: Vec<f64>,
    /// Tokens of each candidate.
    pub tokens: Vec<u32>,
    /// Tokens of the rendered conversation.
    pub prompt_tokens: u32,
    /// Tokens of it whose keys and values were already there.
    pub cached_tokens: u32,
    /// The digest of the model that answered.
    pub digest: String,
}
