//! A request inside the engine thread: its sampler, its text, its times, its way out.

use std::time::Instant;

use llguidance::toktrie::SimpleVob;

use super::grammar::Grammar;
use super::logprobs::Logprobs;
use super::outlet::Outlet;
use super::output::Output;
use super::places::Place;
use super::prefix::SlotMemory;
use super::sampler::{Sampler, Scratch};
use super::scheduler::Sampled;
use super::submission::{Prepared, Scores, Ticket};
use crate::chat::{
    Alternative, ChatError, ChatEvent, Completion, FinishReason, Timings, TokenLogprob, Usage,
};
use crate::metrics::Metrics;
use crate::tokenizer::Tokenizer;
use crate::units::TokenId;

/// A waiting or running request.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) outlet: Outlet,
    /// Until its slot is given up.
    pub(super) memory: Option<SlotMemory>,
    pub(super) deadline: Instant,
    label: String,
    door: &'static str,
    /// Held until the last event has gone out.
    place: Place,
    sampler: Sampler,
    grammar: Option<Grammar>,
    output: Output,
    logprobs: Option<usize>,
    /// Log-probabilities of the prompt so far, if they are wanted.
    scores: Option<(Scores, Vec<TokenLogprob>)>,
    usage: Usage,
    clock: Clock,
}

/// When what happened.
#[derive(Clone, Copy, Debug)]
struct Clock {
    arrived: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

/// What sampling needs besides the request.
pub(super) struct SamplingTools<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) metrics: &'a Metrics,
    pub(super) scratch: &'a mut Scratch,
    /// A copy of the logits as the model gave them.
    pub(super) raw: &'a mut Vec<f32>,
    pub(super) now: Instant,
}

impl Request {
    pub(super) fn new(
        prepared: &mut Prepared,
        ticket: Ticket,
        memory: SlotMemory,
        outlet: Outlet,
    ) -> Request {
        let prompt_tokens = prepared.prompt.len() as u32;
        // The end of a random id: calls of different replies of one conversation differ.
        let tail = prepared.label.char_indices().rev().nth(7).map_or(0, |(at, _)| at);
        let call_prefix = format!("call_{}_", &prepared.label[tail..]);
        Request {
            outlet,
            memory: Some(memory),
            deadline: prepared.deadline,
            label: prepared.label.clone(),
            door: ticket.door,
            place: ticket.place,
            sampler: Sampler::new(&prepared.sampling, &prepared.prompt),
            grammar: prepared.grammar.take(),
            output: Output::new(&prepared.tools, &prepared.stops, &call_prefix),
            logprobs: prepared.logprobs,
            scores: prepared.scores.clone().map(|scores| (scores, Vec::new())),
            usage: Usage { prompt_tokens, ..Usage::default() },
            clock: Clock {
                arrived: ticket.arrived,
                started: None,
                first_token: None,
                last_token: None,
            },
        }
    }

    /// It has a slot that already holds `cached` tokens of its prompt.
    pub(super) fn start(&mut self, cached: usize, metrics: &Metrics, now: Instant) {
        self.usage.cached_tokens = cached as u32;
        self.clock.started = Some(now);
        metrics.prompt_tokens.inc_by(u64::from(self.usage.prompt_tokens));
        metrics.prefix_cache_queries.inc_by(u64::from(self.usage.prompt_tokens));
        metrics.prefix_cache_hits.inc_by(cached as u64);
        observe(&metrics.request_queue_seconds, self.clock.arrived, now);
    }

    /// Takes in the logits of prompt tokens from position `first` on; `prompt` is the whole prompt.
    pub(super) fn score(
        &mut self,
        tokenizer: &Tokenizer,
        prompt: &[TokenId],
        first: usize,
        logits: &[f32],
        vocab_len: usize,
    ) {
        let Some((wanted, entries)) = &mut self.scores else { return };
        let count = self.logprobs.unwrap_or(0);
        if first == 0 && wanted.tail.is_none() {
            entries.push(entry(tokenizer, prompt[0], None, 0));
        }
        for (index, row) in logits.chunks_exact(vocab_len).enumerate() {
            // The logits at a position are about the token after it.
            let next = prompt.get(first + index + 1).copied();
            if let Some(token) = next.or(wanted.tail) {
                let logprobs = Logprobs::new(row);
                let mut scored = entry(tokenizer, token, Some(&logprobs), count);
                for token in std::mem::take(&mut wanted.beside) {
                    let bytes = tokenizer.token_bytes(token).to_vec();
                    let logprob = logprobs.of(token);
                    scored.top.push(Alternative { token, bytes, logprob });
                }
                entries.push(scored);
            }
        }
    }

    /// The prompt has been read: its log-probabilities go out, if they are wanted.
    pub(super) fn finish_prompt(&mut self) {
        if let Some((_, entries)) = &mut self.scores {
            self.outlet.push(Ok(ChatEvent::Prompt(std::mem::take(entries))));
        }
    }

    /// Chooses the next token and takes it into the answer.
    pub(super) fn sample(&mut self, logits: &mut [f32], tools: SamplingTools<'_>) -> Sampled {
        let SamplingTools { tokenizer, metrics, scratch, raw, now } = tools;
        if self.logprobs.is_some() {
            raw.clear();
            raw.extend_from_slice(logits);
        }
        let allowed = match self.grammar.as_mut().map(Grammar::allowed) {
            None => None,
            Some(Ok(allowed)) => Some(allowed),
            Some(Err(error)) => return self.nothing(&format!("grammar: {error}")),
        };
        let allowed = allowed.as_ref().map(SimpleVob::as_slice);
        let Some(token) = self.sampler.sample(logits, allowed, scratch) else {
            return self.nothing("no token is possible");
        };
        self.count_token(metrics, now);
        let logprob =
            self.logprobs.map(|count| entry(tokenizer, token, Some(&Logprobs::new(raw)), count));
        if tokenizer.stop_tokens().contains(&token) {
            // Whoever scores a prompt wants an entry for every token of the output, the last one too.
            if let (Some(logprob), true) = (logprob, self.scores.is_some()) {
                self.output.push_end(logprob);
            }
            return Sampled::Last(token);
        }
        let stopped = self.output.push(tokenizer, token, logprob, self.outlet.pending());
        let complete = match self.grammar.as_mut().map(|grammar| grammar.push(token)) {
            None => false,
            Some(Ok(complete)) => complete,
            Some(Err(error)) => return self.nothing(&format!("grammar: {error}")),
        };
        match stopped || complete {
            true => Sampled::Last(token),
            false => Sampled::Token(token),
        }
    }

    fn nothing(&mut self, why: &str) -> Sampled {
        log::error!(target: "engine", id = self.label.as_str(), why; "no token");
        Sampled::Nothing
    }

    fn count_token(&mut self, metrics: &Metrics, now: Instant) {
        self.usage.completion_tokens += 1;
        metrics.generated_tokens.inc();
        match self.clock.last_token {
            None => {
                self.clock.first_token = Some(now);
                observe(&metrics.time_to_first_token_seconds, self.clock.arrived, now);
                let started = self.clock.started.unwrap_or(self.clock.arrived);
                observe(&metrics.request_prefill_seconds, started, now);
            }
            Some(last) => observe(&metrics.time_per_output_token_seconds, last, now),
        }
        self.clock.last_token = Some(now);
    }

    /// The answer is complete; what of it is not yet out leaves with the rest.
    pub(super) fn finish(
        mut self,
        finish: FinishReason,
        metrics: &Metrics,
        now: Instant,
    ) -> Leaving {
        self.output.finish(self.outlet.pending());
        let finish = match finish {
            FinishReason::Stop if self.output.calls() > 0 => FinishReason::ToolCalls,
            other => other,
        };
        let clock = self.clock;
        let started = clock.started.unwrap_or(now);
        let first = clock.first_token.unwrap_or(now);
        let timings = Timings {
            queue: started.saturating_duration_since(clock.arrived),
            prefill: first.saturating_duration_since(started),
            decode: clock.last_token.unwrap_or(now).saturating_duration_since(first),
        };
        let completion = Completion { finish, usage: self.usage, timings, fusion: None };
        self.outlet.push(Ok(ChatEvent::Done(completion)));
        if clock.first_token.is_some() {
            metrics.request_decode_seconds.observe(timings.decode.as_secs_f64());
        }
        self.leave(reason(finish), metrics, now)
    }

    /// The answer breaks off.
    pub(super) fn fail(mut self, error: ChatError, metrics: &Metrics, now: Instant) -> Leaving {
        let code = error.code();
        if let ChatError::Internal(detail) = &error {
            log::error!(target: "engine", id = self.label.as_str(), detail = detail.as_str();
                "request failed");
        }
        self.outlet.push(Err(error));
        self.leave(code, metrics, now)
    }

    /// Nobody reads the answer.
    pub(super) fn cancel(self, metrics: &Metrics, now: Instant) {
        drop(self.leave(ChatError::Cancelled.code(), metrics, now));
    }

    fn leave(self, reason: &str, metrics: &Metrics, now: Instant) -> Leaving {
        metrics.requests.with_label_values(&[self.door, reason]).inc();
        observe(&metrics.request_duration_seconds, self.clock.arrived, now);
        Leaving { outlet: self.outlet, deadline: self.deadline, place: Some(self.place) }
    }
}

/// An ended request whose last events have not been read. It has no slot and no permit any more, only its
/// place, so that slow readers count against the bound on requests.
#[derive(Debug)]
pub(super) struct Leaving {
    pub(super) outlet: Outlet,
    pub(super) deadline: Instant,
    place: Option<Place>,
}

impl Leaving {
    /// Frees the place before the last event goes out, if nothing has to be kept: whoever sees the end finds
    /// the place free.
    pub(super) fn free_place(&mut self) {
        if self.outlet.has_room() {
            self.place = None;
        }
    }
}

/// The metrics' word for an end.
fn reason(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::Deadline => "deadline",
        FinishReason::Length => "length",
        FinishReason::Stop => "stop",
        FinishReason::ToolCalls => "tool_calls",
    }
}

fn observe(histogram: &prometheus::Histogram, from: Instant, to: Instant) {
    histogram.observe(to.saturating_duration_since(from).as_secs_f64());
}

/// A token's entry; without log-probabilities it is a prompt's first token.
fn entry(
    tokenizer: &Tokenizer,
    token: TokenId,
    logprobs: Option<&Logprobs<'_>>,
    count: usize,
) -> TokenLogprob {
    let bytes = |token| tokenizer.token_bytes(token).to_vec();
    let top = logprobs.map(|logprobs| logprobs.top(count)).unwrap_or_default();
    TokenLogprob {
        token,
        bytes: bytes(token),
        logprob: logprobs.map(|logprobs| logprobs.of(token)),
        top: top
            .into_iter()
            .map(|(token, logprob)| Alternative { token, bytes: bytes(token), logprob })
            .collect(),
    }
}
