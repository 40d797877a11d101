//! What comes back: a stream of events, and the whole reply made of them.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::mpsc;

use super::{ChatError, FusionProgress, FusionReport, Message, Role, ToolCall};
use crate::units::TokenId;

/// A step of an answer. `Done` is always the last one.
#[derive(Clone, Debug, PartialEq)]
pub enum ChatEvent {
    /// The request waits in line or starts now; comes before anything else, at most once.
    Accepted {
        /// Requests ahead of it; 0 starts at once.
        position: u32,
        /// Predicted time to the first token, once speeds have been measured.
        predicted_first_token: Option<Duration>,
    },
    /// Log-probabilities of the prompt's tokens (only if the request asked to echo with logprobs). The first
    /// token has none.
    Prompt(Vec<TokenLogprob>),
    /// More text, and the tokens it came from if log-probabilities were asked for.
    Delta {
        /// Whole characters only.
        text: String,
        /// Empty unless asked for.
        logprobs: Vec<TokenLogprob>,
    },
    /// A whole tool call.
    ToolCall(ToolCall),
    /// A fusion tells how far it is; no part of the answer.
    Progress(FusionProgress),
    /// The end.
    Done(Completion),
}

/// A token, how likely it was, and what else could have stood there.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: TokenId,
    /// Its bytes; not always whole characters.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability before temperature and filters; `None` for a prompt's first token.
    pub logprob: Option<f32>,
    /// The likeliest tokens here, best first; empty if none were asked for.
    pub top: Vec<Alternative>,
}

/// A token that could have been chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Alternative {
    /// The token.
    pub token: TokenId,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Why it ended.
    pub finish: FinishReason,
    /// Tokens counted.
    pub usage: Usage,
    /// Time spent.
    pub timings: Timings,
    /// Where the answer came from, if it is a fusion of several.
    pub fusion: Option<Arc<FusionReport>>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// The deadline ran out; what was ready is the answer.
    Deadline,
    /// `max_tokens` or the context was reached.
    Length,
    /// The model ended its turn, or a stop string appeared.
    Stop,
    /// The model called tools.
    ToolCalls,
}

/// Tokens of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// All tokens of the prompt, cached ones included.
    pub prompt_tokens: u32,
    /// Tokens of the prompt whose keys and values were already there.
    pub cached_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
}

/// Time of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// From arrival to the first prefill step.
    pub queue: Duration,
    /// From there to the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

/// The sending end of a [`ChatStream`], held by a backend.
pub type ChatSender = mpsc::Sender<Result<ChatEvent, ChatError>>;

/// Events of one answer. Dropping it cancels the work behind it.
#[derive(Debug)]
pub struct ChatStream {
    receiver: mpsc::Receiver<Result<ChatEvent, ChatError>>,
}

impl ChatStream {
    /// A stream and its sender; `capacity` bounds what a slow reader leaves unread.
    pub fn channel(capacity: usize) -> (ChatSender, ChatStream) {
        let (sender, receiver) = mpsc::channel(capacity);
        (sender, ChatStream { receiver })
    }

    /// A stream whose only item is `error`.
    pub fn refused(error: ChatError) -> ChatStream {
        let (sender, stream) = ChatStream::channel(1);
        sender.try_send(Err(error)).expect("a new channel of capacity 1 has room");
        stream
    }

    /// The next item; `None` after the last.
    pub async fn next(&mut self) -> Option<Result<ChatEvent, ChatError>> {
        self.receiver.recv().await
    }

    /// The next item, for callers that wait for several streams at once.
    pub fn poll_next(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<ChatEvent, ChatError>>> {
        self.receiver.poll_recv(context)
    }

    /// The next item, for callers outside an async runtime.
    pub fn blocking_next(&mut self) -> Option<Result<ChatEvent, ChatError>> {
        self.receiver.blocking_recv()
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// The stream's own error; `Internal` if it ends without `Done`.
    pub async fn collect(mut self) -> Result<Reply, ChatError> {
        let mut reply = ReplyBuilder::default();
        while let Some(item) = self.next().await {
            if let Some(done) = reply.add(item?) {
                return Ok(done);
            }
        }
        Err(ChatError::Internal("the answer broke off without an end".to_owned()))
    }
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// All text.
    pub text: String,
    /// All tool calls.
    pub tool_calls: Vec<ToolCall>,
    /// The prompt's tokens, if asked for.
    pub prompt: Vec<TokenLogprob>,
    /// The answer's tokens, if asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// How it ended.
    pub completion: Completion,
}

impl Reply {
    /// The reply as a turn of the conversation it ends.
    pub fn turn(&self) -> Message {
        Message {
            tool_calls: self.tool_calls.clone(),
            ..Message::text(Role::Assistant, &self.text)
        }
    }
}

/// Puts a [`Reply`] together from events.
#[derive(Debug, Default)]
pub struct ReplyBuilder {
    text: String,
    tool_calls: Vec<ToolCall>,
    prompt: Vec<TokenLogprob>,
    logprobs: Vec<TokenLogprob>,
}

impl ReplyBuilder {
    /// Takes the next event; the whole reply once that was `Done`.
    pub fn add(&mut self, event: ChatEvent) -> Option<Reply> {
        match event {
            ChatEvent::Accepted { .. } | ChatEvent::Progress(_) => None,
            ChatEvent::Prompt(tokens) => {
                self.prompt = tokens;
                None
            }
            ChatEvent::Delta { text, mut logprobs } => {
                self.text.push_str(&text);
                self.logprobs.append(&mut logprobs);
                None
            }
            ChatEvent::ToolCall(call) => {
                self.tool_calls.push(call);
                None
            }
            ChatEvent::Done(completion) => {
                let built = std::mem::take(self);
                Some(Reply {
                    text: built.text,
                    tool_calls: built.tool_calls,
                    prompt: built.prompt,
                    logprobs: built.logprobs,
                    completion,
                })
            }
        }
    }
}
