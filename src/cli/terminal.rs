//! The terminal as a door: sampling flags to a request, events to text.

use std::io::Write;
use std::time::{Duration, Instant};

use clap::Args;

use crate::chat::{
    ChatEvent, ChatRequest, ChatRequestParts, ChatStream, Completion, Input, Message, Origin,
    Reply, ReplyBuilder,
};

/// How the answer is chosen and how long it may be.
#[derive(Args, Clone, Debug)]
pub(super) struct SamplingOptions {
    /// 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Only the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Only the k likeliest tokens; 0 is all
    #[arg(long, default_value_t = 0)]
    top_k: u32,
    /// The same seed gives the same answer
    #[arg(long)]
    seed: Option<u64>,
    /// At most so many tokens
    #[arg(long)]
    max_tokens: Option<u32>,
    /// At most so many seconds
    #[arg(long, default_value_t = 600)]
    timeout_s: u64,
}

impl SamplingOptions {
    /// A request with these choices.
    ///
    /// # Errors
    /// If a value is out of its range.
    pub(super) fn request(&self, messages: Vec<Message>) -> anyhow::Result<ChatRequest> {
        let deadline = Instant::now() + Duration::from_secs(self.timeout_s);
        let input = Input::Messages(messages);
        let mut parts = ChatRequestParts::new(Origin::Terminal, "terminal", input, deadline);
        parts.sampling.temperature = self.temperature;
        parts.sampling.top_p = self.top_p;
        parts.sampling.top_k = self.top_k;
        parts.sampling.seed = self.seed;
        parts.max_tokens = self.max_tokens;
        parts.truncate = true;
        Ok(ChatRequest::try_from(parts)?)
    }
}

/// Writes text as it comes, tool calls as one line of JSON each, and returns the whole reply.
///
/// # Errors
/// The stream's own error, or output that cannot be written.
pub(super) fn print(stream: &mut ChatStream, out: &mut impl Write) -> anyhow::Result<Reply> {
    let mut builder = ReplyBuilder::default();
    while let Some(item) = stream.blocking_next() {
        let event = item?;
        match &event {
            ChatEvent::Delta { text, .. } => write!(out, "{text}")?,
            ChatEvent::ToolCall(call) => {
                let arguments = serde_json::to_string(&call.arguments)?;
                writeln!(out, "{} {arguments}", call.name)?;
            }
            _ => {}
        }
        out.flush()?;
        if let Some(reply) = builder.add(event) {
            return Ok(reply);
        }
    }
    anyhow::bail!("the answer broke off without an end")
}

/// Token counts and speed in one line.
pub(super) fn stats(completion: &Completion) -> String {
    let usage = &completion.usage;
    let timings = &completion.timings;
    let rate = |tokens: u32, time: Duration| {
        if time.is_zero() { 0.0 } else { f64::from(tokens) / time.as_secs_f64() }
    };
    let prefilled = usage.prompt_tokens - usage.cached_tokens;
    format!(
        "prompt {} tokens ({} cached, {:.1} tokens/s), answer {} tokens ({:.1} tokens/s)",
        usage.prompt_tokens,
        usage.cached_tokens,
        rate(prefilled, timings.prefill),
        usage.completion_tokens,
        rate(usage.completion_tokens.saturating_sub(1), timings.decode),
    )
}
