//! Backends that play the engine for the doors' tests.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use scoutd::chat::{
    Alternative, Backend, ChatError, ChatEvent, ChatRequest, ChatRequestParts, ChatSender,
    ChatStream, Completion, FinishReason, ModelCard, ModelName, Timings, TokenLogprob, ToolCall,
    Usage,
};
use scoutd::units::TokenId;

/// What clients may know about a model called `name`.
pub(crate) fn card(name: &str) -> ModelCard {
    ModelCard {
        name: ModelName::new(name),
        architecture: "llama".to_owned(),
        parameters: 134_515_008,
        quantization: "Q4_0".to_owned(),
        file_bytes: 91_000_000,
        digest: "ab".repeat(32),
        modified_unix_s: 1_793_534_400,
        context_tokens: 2048,
        trained_context_tokens: 8192,
        embedding_len: 576,
        vocabulary_len: 49_152,
        template: "{% if tools %}{{ tools }}{% endif %}{{ messages }}".to_owned(),
    }
}

/// An end with fixed numbers.
pub(crate) fn done(finish: FinishReason) -> ChatEvent {
    ChatEvent::Done(Completion {
        finish,
        usage: Usage { prompt_tokens: 12, cached_tokens: 4, completion_tokens: 3 },
        timings: Timings {
            queue: Duration::from_millis(1),
            prefill: Duration::from_millis(16),
            decode: Duration::from_millis(30),
        },
        fusion: None,
    })
}

/// A piece of text.
pub(crate) fn delta(text: &str) -> ChatEvent {
    ChatEvent::Delta { text: text.to_owned(), logprobs: Vec::new() }
}

/// A token of `bytes` with one alternative.
pub(crate) fn token(id: u32, bytes: &[u8], logprob: Option<f32>) -> TokenLogprob {
    let alternative = |token, bytes: &[u8], logprob| Alternative {
        token: TokenId(token),
        bytes: bytes.to_vec(),
        logprob,
    };
    TokenLogprob {
        token: TokenId(id),
        bytes: bytes.to_vec(),
        logprob,
        top: logprob
            .map(|logprob| vec![alternative(id, bytes, logprob), alternative(99, b"!", -3.5)])
            .unwrap_or_default(),
    }
}

/// A call with its arguments as JSON.
pub(crate) fn call(id: &str, name: &str, arguments: &str) -> ChatEvent {
    ChatEvent::ToolCall(ToolCall {
        id: id.to_owned(),
        name: name.to_owned(),
        arguments: serde_json::from_str(arguments).expect("an object"),
    })
}

type Script = dyn Fn(&ChatRequestParts) -> Vec<Result<ChatEvent, ChatError>> + Send + Sync;

/// Answers each request with what a function makes of it, and remembers the requests.
pub(crate) struct Scripted {
    name: String,
    script: Box<Script>,
    seen: Arc<Mutex<Vec<ChatRequestParts>>>,
}

impl Scripted {
    /// A backend under the name `scout`.
    pub(crate) fn new(
        script: impl Fn(&ChatRequestParts) -> Vec<Result<ChatEvent, ChatError>> + Send + Sync + 'static,
    ) -> Scripted {
        Scripted { name: "scout".to_owned(), script: Box::new(script), seen: Arc::default() }
    }

    /// The requests that came, in order.
    pub(crate) fn seen(&self) -> Arc<Mutex<Vec<ChatRequestParts>>> {
        Arc::clone(&self.seen)
    }
}

impl Backend for Scripted {
    fn models(&self) -> Vec<ModelCard> {
        vec![card(&self.name)]
    }

    fn chat(&self, request: ChatRequest) -> ChatStream {
        let items = (self.script)(request.parts());
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).push(request.into_parts());
        let (sender, stream) = ChatStream::channel(4);
        thread::spawn(move || {
            for item in items {
                if sender.blocking_send(item).is_err() {
                    return;
                }
            }
        });
        stream
    }
}

/// Says the same pieces of text to everybody.
pub(crate) fn says(pieces: &'static [&'static str]) -> Scripted {
    Scripted::new(move |_| {
        let accepted = ChatEvent::Accepted { position: 0, predicted_first_token: None };
        let mut items = vec![Ok(accepted)];
        items.extend(pieces.iter().map(|piece| Ok(delta(piece))));
        items.push(Ok(done(FinishReason::Stop)));
        items
    })
}

/// Refuses everybody.
pub(crate) fn refuses(error: ChatError) -> Scripted {
    Scripted::new(move |_| vec![Err(error.clone())])
}

/// Hands each answer's sender to the test, which plays the model itself.
pub(crate) struct Held {
    senders: SyncSender<ChatSender>,
}

impl Held {
    /// The backend, and where the senders arrive.
    pub(crate) fn new() -> (Held, Receiver<ChatSender>) {
        let (senders, arrivals) = sync_channel(256);
        (Held { senders }, arrivals)
    }
}

impl Backend for Held {
    fn models(&self) -> Vec<ModelCard> {
        vec![card("scout")]
    }

    fn chat(&self, _request: ChatRequest) -> ChatStream {
        let (sender, stream) = ChatStream::channel(4);
        self.senders.send(sender).expect("the test still listens");
        stream
    }
}
