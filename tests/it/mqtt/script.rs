//! A backend that says what its prompt tells it to.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use scoutd::chat::{
    Backend, ChatError, ChatEvent, ChatRequest, ChatSender, ChatStream, Completion, FinishReason,
    Input, ModelCard, ModelName, Timings, Usage,
};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::client::PATIENCE;

/// `say …` answers with the rest of the prompt word by word, `refuse` refuses, `hold` leaves the answer to the
/// test, anything else is repeated.
#[derive(Default)]
pub(super) struct Script {
    asked: AtomicUsize,
    held: Mutex<VecDeque<(ChatRequest, ChatSender)>>,
    holds: Notify,
}

impl Script {
    /// How many requests came.
    pub(super) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    /// The next request left to the test.
    pub(super) async fn held(&self) -> (ChatRequest, ChatSender) {
        loop {
            let next = self.held.lock().expect("no test panics with it").pop_front();
            if let Some(next) = next {
                return next;
            }
            let notified = timeout(PATIENCE, self.holds.notified()).await;
            notified.expect("a request reaches the backend in time");
        }
    }
}

impl Backend for Script {
    fn models(&self) -> Vec<ModelCard> {
        vec![ModelCard {
            name: ModelName::new("parrot"),
            architecture: "llama4".into(),
            parameters: 1000,
            quantization: "Q4_0".into(),
            file_bytes: 4096,
            digest: "0".repeat(64),
            modified_unix_s: 0,
            context_tokens: 512,
            trained_context_tokens: 2048,
            embedding_len: 8,
            vocabulary_len: 32,
            template: String::new(),
        }]
    }

    fn chat(&self, request: ChatRequest) -> ChatStream {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let prompt = prompt(&request);
        if prompt == "refuse" {
            return ChatStream::refused(ChatError::QueueFull {
                retry_after: Duration::from_secs(8),
            });
        }
        let (sender, stream) = ChatStream::channel(1024);
        if prompt == "hold" {
            self.held.lock().expect("no test panics with it").push_back((request, sender));
            self.holds.notify_one();
            return stream;
        }
        let text = prompt.strip_prefix("say ").unwrap_or(&prompt);
        put(&sender, ChatEvent::Accepted { position: 0, predicted_first_token: None });
        for word in text.split_inclusive(' ') {
            put(&sender, delta(word));
        }
        put(&sender, done(FinishReason::Stop));
        stream
    }
}

fn put(sender: &ChatSender, event: ChatEvent) {
    sender.try_send(Ok(event)).expect("the channel has room for a test's answer");
}

pub(super) fn delta(text: &str) -> ChatEvent {
    ChatEvent::Delta { text: text.to_owned(), logprobs: Vec::new() }
}

pub(super) fn done(finish: FinishReason) -> ChatEvent {
    let usage = Usage { prompt_tokens: 3, cached_tokens: 0, completion_tokens: 5 };
    ChatEvent::Done(Completion { finish, usage, timings: Timings::default(), fusion: None })
}

fn prompt(request: &ChatRequest) -> String {
    match &request.parts().input {
        Input::Messages(messages) => {
            messages.last().map(|message| message.content.clone()).unwrap_or_default()
        }
        Input::Text(text) => text.clone(),
        Input::Tokens(_) => String::new(),
    }
}
