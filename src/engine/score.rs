//! Scoring: how likely the model finds continuations of a conversation.
//!
//! Every candidate is one pass over the conversation and its own tokens, of which the engine keeps what it has
//! read, so that the next candidate, and the next question about the same text, cost only what differs. The first
//! token of all candidates is judged in the first pass; candidates of one token need no other.

use super::local::Local;
use super::submission::Continuation;
use crate::chat::{
    ChatError, ChatEvent, ChatRequest, ChatRequestParts, Input, ScoreReply, ScoreRequest,
    TokenLogprob, Usage,
};
use crate::tokenizer::Specials;
use crate::units::TokenId;

/// # Errors
/// `Invalid` for candidates that cannot be scored; otherwise as a chat request.
pub(super) async fn score(engine: &Local, request: ScoreRequest) -> Result<ScoreReply, ChatError> {
    let digest = engine.card().digest.clone();
    if request.digest.as_ref().is_some_and(|wanted| *wanted != digest) {
        return Err(ChatError::DigestDiffers);
    }
    let candidates = tokens(engine, &request.candidates)?;
    let firsts: Vec<TokenId> = candidates.iter().map(|tokens| tokens[0]).collect();
    let mut reply = ScoreReply {
        logprobs: Vec::with_capacity(candidates.len()),
        tokens: candidates.iter().map(|tokens| tokens.len() as u32).collect(),
        prompt_tokens: 0,
        cached_tokens: 0,
        digest,
    };
    let mut alone: Vec<f64> = Vec::new();
    for (index, tokens) in candidates.into_iter().enumerate() {
        if index > 0 && tokens.len() == 1 {
            reply.logprobs.push(alone[index]);
            continue;
        }
        let after = tokens.len() as u32 - 1;
        let beside = if index == 0 { firsts.clone() } else { Vec::new() };
        let (entries, usage) = pass(engine, &request, Continuation { tokens, beside }).await?;
        if index == 0 {
            reply.prompt_tokens = usage.prompt_tokens.saturating_sub(after);
            reply.cached_tokens = usage.cached_tokens;
            let first = entries.first().map(|entry| entry.top.as_slice()).unwrap_or_default();
            alone = first.iter().map(|other| f64::from(other.logprob)).collect();
        }
        reply.logprobs.push(sum(&entries));
    }
    match reply.logprobs.iter().all(|logprob| !logprob.is_nan()) && alone.len() == firsts.len() {
        true => Ok(reply),
        false => Err(ChatError::Internal("a score is missing".to_owned())),
    }
}

fn tokens(engine: &Local, candidates: &[String]) -> Result<Vec<Vec<TokenId>>, ChatError> {
    const FIELD: &str = "candidates";
    let max = ScoreRequest::CANDIDATES_MAX;
    if candidates.is_empty() || candidates.len() > max {
        return Err(ChatError::invalid(FIELD, format!("candidates must be 1 to {max} texts")));
    }
    let longest = ScoreRequest::CANDIDATE_BYTES_MAX;
    candidates
        .iter()
        .map(|text| {
            if text.is_empty() || text.len() > longest {
                let message = format!("a candidate must have 1 to {longest} bytes");
                return Err(ChatError::invalid(FIELD, message));
            }
            let mut tokens = Vec::new();
            engine
                .tokenizer()
                .encode_into(text, Specials::Text, &mut tokens)
                .map_err(|error| ChatError::invalid(FIELD, error.to_string()))?;
            match tokens.is_empty() {
                true => Err(ChatError::invalid(FIELD, "a candidate has no tokens")),
                false => Ok(tokens),
            }
        })
        .collect()
}

/// The entries of one continuation's tokens.
async fn pass(
    engine: &Local,
    request: &ScoreRequest,
    continuation: Continuation,
) -> Result<(Vec<TokenLogprob>, Usage), ChatError> {
    let input = Input::Messages(request.messages.clone());
    let mut parts =
        ChatRequestParts::new(request.origin.clone(), &request.client, input, request.deadline);
    parts.id = request.id.clone();
    parts.model = request.model.clone();
    parts.priority = request.priority;
    let mut stream = engine.submit(ChatRequest::try_from(parts)?, Some(continuation));
    let mut entries = None;
    while let Some(event) = stream.next().await {
        match event? {
            ChatEvent::Prompt(scored) => entries = Some(scored),
            ChatEvent::Done(done) => {
                // An end without scores is the deadline's.
                let late = || ChatError::DeadlineUnmeetable { needs: done.timings.queue };
                return Ok((entries.ok_or_else(late)?, done.usage));
            }
            _ => {}
        }
    }
    Err(ChatError::Internal("the scores broke off without an end".to_owned()))
}

/// NaN if an entry is missing.
fn sum(entries: &[TokenLogprob]) -> f64 {
    let logprob = |entry: &TokenLogprob| entry.logprob.map_or(f64::NAN, f64::from);
    if entries.is_empty() { f64::NAN } else { entries.iter().map(logprob).sum() }
}
