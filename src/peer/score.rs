//! Log-probabilities from another server: exact ones of a scoutd, or those of the likeliest tokens.

use super::call::{self, Clock, fault, refusal, send};
use super::config::Kind;
use super::member::{Shared, Ticket};
use crate::chat::{Fault, FaultReason, Message, ScoreReply, ScoreRequest};
use crate::egress::{HeaderMap, Method};
use crate::wire::upstream::{label_body, read_score_reply, read_top_logprobs, score_body};

/// Alternatives that servers list per token at most.
const TOP: u8 = 20;

/// Scores `request`, and settles what that says about the member.
pub(super) async fn score(ticket: Ticket, request: &ScoreRequest) -> Result<ScoreReply, Fault> {
    let shared = ticket.shared.clone();
    let clock = Clock::new(request.deadline);
    let patience = shared.lock().rates.first_byte_patience(estimate(&request.messages));
    let work = async {
        match shared.parts.config.kind {
            Kind::Scoutd => exact(&shared, request, &clock).await,
            Kind::Dllama => Err(Fault::explained(FaultReason::Http4xx, NO_LOGPROBS)),
            Kind::Ollama | Kind::OpenAi => top_k(&shared, request).await,
        }
    };
    let scored = clock.within(patience, FaultReason::FirstByteTimeout, work).await;
    match scored.and_then(|scored| scored) {
        Ok(reply) => {
            ticket.succeeded();
            Ok(reply)
        }
        Err(fault) => {
            ticket.failed(fault.reason);
            Err(fault)
        }
    }
}

async fn exact(
    shared: &Shared,
    request: &ScoreRequest,
    clock: &Clock,
) -> Result<ScoreReply, Fault> {
    let (model, digest) = {
        let state = shared.lock();
        let model = shared.model_of(&state);
        let node = state.node.as_ref();
        let told = node.and_then(|node| node.models.iter().find(|told| told.name == model));
        (model, told.map(|told| told.digest.clone()).unwrap_or_default())
    };
    let digest = request.digest.clone().unwrap_or(digest);
    let body = score_body(request, &model, &digest, clock.inner_rest());
    let headers = HeaderMap::new();
    let mut response = send(shared, Method::POST, "/fusion/v1/score", body, headers).await?;
    if response.status != 200 {
        return Err(refusal(shared, &mut response).await);
    }
    let body = response.body(call::SMALL_BODY_MAX).await.map_err(|error| fault(&error))?;
    let reply = read_score_reply(&body, request.candidates.len());
    let reply = reply.ok_or(Fault::new(FaultReason::BadJson))?;
    if reply.digest != digest {
        return Err(Fault::explained(FaultReason::WrongModel, "another model has scored"));
    }
    Ok(reply)
}

/// A candidate's probability is that of every listed token that is the candidate but for blanks around it: chat
/// templates differ in where they put the blank.
async fn top_k(shared: &Shared, request: &ScoreRequest) -> Result<ScoreReply, Fault> {
    if request.digest.is_some() || shared.lock().no_logprobs {
        return Err(Fault::explained(FaultReason::Http4xx, NO_LOGPROBS));
    }
    let model = shared.model_of(&shared.lock());
    let body = label_body(&request.messages, &model, TOP);
    let headers = HeaderMap::new();
    let mut response = send(shared, Method::POST, "/v1/chat/completions", body, headers).await?;
    if response.status != 200 {
        return Err(refusal(shared, &mut response).await);
    }
    let body = response.body(call::SMALL_BODY_MAX).await.map_err(|error| fault(&error))?;
    let Some((top, prompt_tokens)) = read_top_logprobs(&body) else {
        shared.lock().no_logprobs = true;
        return Err(Fault::explained(FaultReason::Http4xx, NO_LOGPROBS));
    };
    let logprobs: Option<Vec<f64>> =
        request.candidates.iter().map(|candidate| listed(&top, candidate.trim())).collect();
    let Some(logprobs) = logprobs else {
        return Err(Fault::explained(
            FaultReason::Http4xx,
            "a label is not among the likeliest tokens",
        ));
    };
    Ok(ScoreReply {
        tokens: vec![1; logprobs.len()],
        logprobs,
        prompt_tokens,
        cached_tokens: 0,
        digest: String::new(),
    })
}

fn listed(top: &[(String, f64)], candidate: &str) -> Option<f64> {
    let same =
        top.iter().filter(|(token, _)| token.trim() == candidate).map(|(_, logprob)| *logprob);
    let total: f64 = same.map(f64::exp).sum();
    (total > 0.0 && total.is_finite()).then(|| total.ln().min(0.0))
}

fn estimate(messages: &[Message]) -> u32 {
    let bytes: usize = messages.iter().map(|message| message.content.len() + 12).sum();
    u32::try_from(bytes / 3).unwrap_or(u32::MAX)
}

const NO_LOGPROBS: &str = "it gives no log-probabilities";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_with_and_without_blanks_are_one() {
        let top = [("Yes", -1.0), (" Yes", -1.0), ("yes", -0.5), ("No", -3.0)]
            .map(|(token, logprob)| (token.to_owned(), logprob));
        let yes = listed(&top, "Yes").expect("listed");
        assert!((yes - (2.0 * (-1.0f64).exp()).ln()).abs() < 1e-12);
        assert_eq!(listed(&top, "No"), Some(-3.0));
        assert_eq!(listed(&top, "Maybe"), None);
    }
}
