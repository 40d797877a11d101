//! One request's task: reads the backend's events and says what is to be published.
//!
//! It never touches the connection, so a lost broker does not disturb it and its final is sent when the broker is
//! back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::link::Outgoing;
use super::requests::{Key, Stop};
use crate::chat::{ChatError, ChatEvent, ChatStream, Completion, FinishReason, Timings, Usage};
use crate::wire::mqtt::{self, Answer, Echo};

/// Where an answer goes.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// The retained-free topic `last`, whole.
    Last { topic: String },
    /// A client's answer topic.
    Reply { topic: String, correlation: Option<Bytes>, echo: Echo, stream: bool },
}

/// A request to answer.
pub(super) struct Job {
    pub(super) key: Key,
    pub(super) target: Target,
    pub(super) model: String,
    pub(super) deadline: Instant,
    /// Largest packet the broker takes now.
    pub(super) packet_bytes_max: Arc<AtomicUsize>,
}

/// What a task has to say to the door.
pub(super) enum Said {
    /// The request was admitted or refused: its delivery may be acknowledged.
    Settled { key: Key },
    /// To be published; lost without harm.
    Chunk { message: Outgoing },
    /// To be published once, before the chunks.
    Accepted { message: Outgoing },
    /// The end.
    Ended { key: Key, message: Outgoing, event: &'static str, reason: &'static str },
}

/// Answers one request and ends with exactly one [`Said::Ended`].
pub(super) async fn answer(
    job: Job,
    stream: ChatStream,
    stopped: oneshot::Receiver<Stop>,
    said: mpsc::Sender<Said>,
) {
    let answer = Answer { model: job.model.clone(), ..Answer::default() };
    let mut task =
        Task { job, said, answer, text_lost: false, pending: String::new(), next_chunk: 0 };
    if task.streams() {
        task.answer.chunks = Some(0);
    }
    let outcome = task.read(stream, stopped).await;
    task.end(outcome).await;
}

struct Task {
    job: Job,
    said: mpsc::Sender<Said>,
    answer: Answer,
    /// The answer outgrew what any final may hold.
    text_lost: bool,
    /// Text not yet sent as a chunk.
    pending: String,
    next_chunk: u32,
}

impl Task {
    async fn read(
        &mut self,
        mut stream: ChatStream,
        mut stopped: oneshot::Receiver<Stop>,
    ) -> Result<Completion, ChatError> {
        let settle_by = Instant::now() + SETTLE_TIMEOUT;
        let deadline = self.job.deadline + DEADLINE_GRACE;
        let mut settled = false;
        let mut chunk_at = Instant::now();
        loop {
            tokio::select! {
                item = stream.next() => {
                    if !std::mem::replace(&mut settled, true) {
                        self.settle().await;
                    }
                    match item {
                        Some(Ok(ChatEvent::Done(completion))) => {
                            self.send_chunk();
                            return Ok(completion);
                        }
                        Some(Ok(event)) => self.take(event).await,
                        Some(Err(error)) => return Err(error),
                        None => return Err(broken_off()),
                    }
                    if Instant::now() >= chunk_at && !self.pending.is_empty() {
                        self.send_chunk();
                        chunk_at = Instant::now() + CHUNK_PERIOD;
                    }
                }
                () = sleep_until(chunk_at), if !self.pending.is_empty() => {
                    self.send_chunk();
                    chunk_at = Instant::now() + CHUNK_PERIOD;
                }
                () = sleep_until(settle_by), if !settled => {
                    settled = true;
                    self.settle().await;
                }
                () = sleep_until(deadline) => return Ok(out_of_time()),
                why = &mut stopped => {
                    return Err(match why {
                        Ok(Stop::Draining) => ChatError::Draining { retry_after: DRAIN_RETRY },
                        Ok(Stop::Cancelled) | Err(_) => ChatError::Cancelled,
                    });
                }
            }
        }
    }

    async fn take(&mut self, event: ChatEvent) {
        match event {
            ChatEvent::Accepted { position, predicted_first_token } => {
                if let Target::Reply { echo, .. } = &self.job.target
                    && self.streams()
                {
                    let payload = mqtt::accepted(echo, position, predicted_first_token);
                    let message = self.message(payload, true);
                    self.say(Said::Accepted { message }).await;
                }
            }
            ChatEvent::Delta { text, .. } => {
                if self.answer.text.len() + text.len() > TEXT_BYTES_MAX {
                    self.text_lost = true;
                } else {
                    self.answer.text.push_str(&text);
                }
                if self.streams() {
                    self.pending.push_str(&text);
                }
            }
            ChatEvent::ToolCall(call) => self.answer.tool_calls.push(call),
            ChatEvent::Prompt(_) | ChatEvent::Progress(_) | ChatEvent::Done(_) => {}
        }
    }

    /// Whether chunks are wanted.
    fn streams(&self) -> bool {
        matches!(self.job.target, Target::Reply { stream: true, .. })
    }

    /// Hands the pending text over. A door that does not keep up loses it: the final repeats it.
    fn send_chunk(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let text = std::mem::take(&mut self.pending);
        let Target::Reply { echo, .. } = &self.job.target else { return };
        let payload = mqtt::chunk(echo, self.next_chunk, &text);
        self.next_chunk = self.next_chunk.saturating_add(1);
        self.answer.chunks = Some(self.next_chunk);
        let message = self.message(payload, false);
        let _ = self.said.try_send(Said::Chunk { message });
    }

    async fn settle(&self) {
        self.say(Said::Settled { key: self.job.key.clone() }).await;
    }

    async fn end(self, outcome: Result<Completion, ChatError>) {
        let (event, reason) = match &outcome {
            Ok(completion) => ("done", mqtt::finish_reason(completion.finish)),
            Err(error) => (self.event_of(error), error.code()),
        };
        if let Err(ChatError::Internal(detail)) = &outcome {
            log::error!(target: "mqtt", id:% = self.job.key.id, detail:% = detail; "request failed");
        }
        let message = self.final_message(&outcome);
        let key = self.job.key.clone();
        self.say(Said::Ended { key, message, event, reason }).await;
    }

    fn event_of(&self, error: &ChatError) -> &'static str {
        match error {
            ChatError::Cancelled => "cancelled",
            _ if self.answer.text.is_empty() => "refused",
            _ => "error",
        }
    }

    /// The final that fits the broker's packets.
    fn final_message(&self, outcome: &Result<Completion, ChatError>) -> Outgoing {
        let whole = self.message(self.final_payload(outcome, &self.answer, self.text_lost), true);
        if whole.packet_bytes() <= self.job.packet_bytes_max.load(Ordering::Relaxed) {
            return whole;
        }
        let bare = Answer { text: String::new(), tool_calls: Vec::new(), ..self.answer.clone() };
        self.message(self.final_payload(outcome, &bare, true), true)
    }

    fn final_payload(
        &self,
        outcome: &Result<Completion, ChatError>,
        answer: &Answer,
        truncated: bool,
    ) -> Vec<u8> {
        match (&self.job.target, outcome) {
            (Target::Reply { echo, .. }, Ok(completion)) => {
                mqtt::final_answer(echo, answer, completion, truncated)
            }
            (Target::Reply { echo, .. }, Err(error)) => mqtt::final_error(echo, error, answer),
            (Target::Last { .. }, outcome) => {
                mqtt::last(self.job.key.id.as_str(), answer, outcome.as_ref())
            }
        }
    }

    fn message(&self, payload: Vec<u8>, assured: bool) -> Outgoing {
        let (topic, correlation) = match &self.job.target {
            Target::Last { topic } => (topic.clone(), None),
            Target::Reply { topic, correlation, .. } => (topic.clone(), correlation.clone()),
        };
        reply(topic, correlation, payload, assured)
    }

    async fn say(&self, said: Said) {
        // A door that is gone publishes nothing any more.
        let _ = self.said.send(said).await;
    }
}

/// An answer's message: JSON, not retained, and of no use to anybody after five minutes.
pub(super) fn reply(
    topic: String,
    correlation: Option<Bytes>,
    payload: Vec<u8>,
    assured: bool,
) -> Outgoing {
    Outgoing {
        topic,
        payload: payload.into(),
        assured,
        retain: false,
        correlation,
        json: true,
        expiry: Some(ANSWER_EXPIRY),
    }
}

fn broken_off() -> ChatError {
    ChatError::Internal("the answer broke off without an end".to_owned())
}

/// The backend should have ended by itself; what there is is the answer.
fn out_of_time() -> Completion {
    Completion {
        finish: FinishReason::Deadline,
        usage: Usage::default(),
        timings: Timings::default(),
        fusion: None,
    }
}

/// At most five chunks a second: brokers and automations are made for messages, not for tokens.
const CHUNK_PERIOD: Duration = Duration::from_millis(200);

/// A request whose backend says nothing is acknowledged after this, so that a cancel can still be delivered.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(1);

/// How much longer than the deadline a backend may take to end by itself.
const DEADLINE_GRACE: Duration = Duration::from_secs(2);

const ANSWER_EXPIRY: Duration = Duration::from_secs(300);
const DRAIN_RETRY: Duration = Duration::from_secs(10);

/// More text than any final holds is not collected.
const TEXT_BYTES_MAX: usize = 1 << 20;
