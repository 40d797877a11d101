//! What every dialect's answers have in common.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::chat::{ChatError, ChatEvent, ChatRequestParts, Input, Origin, RequestId};

/// Who asks, as the door knows it and the body does not say.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The request's id.
    pub id: RequestId,
    /// Where it came in.
    pub origin: Origin,
    /// For fairness among clients.
    pub client: Arc<str>,
    /// When the answer must be there.
    pub deadline: Instant,
}

impl Caller {
    pub(super) fn parts(&self, input: Input) -> ChatRequestParts {
        let mut parts =
            ChatRequestParts::new(self.origin.clone(), &self.client, input, self.deadline);
        parts.id = self.id.clone();
        parts
    }
}

/// Writes one answer as a stream of bytes in a client's dialect.
pub trait StreamWriter: Send {
    /// Appends what `event` of choice `index` looks like; may append nothing.
    fn event(&mut self, index: usize, event: ChatEvent, now: SystemTime, out: &mut Vec<u8>);

    /// Appends the end, after every choice has seen its `Done`.
    fn end(&mut self, out: &mut Vec<u8>);

    /// Appends an error that came after the answer had begun; nothing follows it.
    fn error(&mut self, error: &ChatError, out: &mut Vec<u8>);

    /// Appends something that keeps the connection alive and means nothing.
    fn heartbeat(&mut self, now: SystemTime, out: &mut Vec<u8>);

    /// How often that should be, until the first event of substance.
    fn heartbeat_period(&self) -> Duration;

    /// The stream's media type.
    fn content_type(&self) -> &'static str;
}

/// Milliseconds with fractions.
pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// A probability's logarithm that JSON can hold.
pub(super) fn finite(logprob: f32) -> f32 {
    const IMPOSSIBLE: f32 = -9999.0; // OpenAI's value for a token that cannot be
    if logprob.is_finite() { logprob } else { IMPOSSIBLE }
}
