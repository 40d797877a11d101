//! The endpoints of the OpenAI dialect, and llama-server's small ones.

use std::time::{SystemTime, UNIX_EPOCH};

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use actix_web::http::header::CONTENT_TYPE;
use actix_web::web;

use super::Shared;
use super::active::ActiveGuard;
use super::answer::{Answer, EventBody, Jobs};
use super::body::Body;
use super::door::json;
use super::error::Problem;
use crate::chat::{ChatError, ChatRequest, ChatRequestParts, ModelCard, ModelName, RequestId};
use crate::wire::openai::{
    self, ChatBody, ChatWriter, CompletionBody, CompletionWriter, Head, chat_reply,
    completion_reply,
};
use crate::wire::{Caller, check_model_name};

/// `/v1/chat/completions`.
pub(super) async fn chat(
    shared: &Shared,
    active: &ActiveGuard,
    caller: Caller,
    body: Body,
) -> Result<Answer, Problem> {
    let asked = parse(body, ChatBody::parse).await?;
    let head = head(shared, "chatcmpl", &caller, &asked.model())?;
    let (stream, include_usage, logprobs) =
        (asked.stream(), asked.include_usage(), asked.logprobs());
    let events = asked.events();
    let choices = asked.choices()?;
    let parts = asked.into_parts(&caller)?;
    let requests = (0..choices)
        .map(|choice| {
            let mut parts = parts.clone();
            parts.sampling.seed = parts.sampling.seed.map(|seed| seed.wrapping_add(choice as u64));
            numbered(parts, choice)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut jobs = Jobs::start(&shared.router, requests);
    if stream {
        let first = jobs.first().await?;
        let writer = ChatWriter::new(head, choices, logprobs, include_usage).with_events(events);
        let body = EventBody::new(active, jobs, first, Box::new(writer));
        return Ok(Answer::Stream(Box::new(body)));
    }
    let replies = jobs.collect().await?;
    Ok(Answer::Whole(chat_reply(&head, &replies, logprobs)))
}

/// `/v1/completions`.
pub(super) async fn completions(
    shared: &Shared,
    active: &ActiveGuard,
    caller: Caller,
    body: Body,
) -> Result<Answer, Problem> {
    let asked = parse(body, CompletionBody::parse).await?;
    let head = head(shared, "cmpl", &caller, &asked.model())?;
    let (stream, include_usage, logprobs) =
        (asked.stream(), asked.include_usage(), asked.logprobs());
    let (parts, echoes): (Vec<_>, Vec<_>) = asked.into_requests(&caller)?.into_iter().unzip();
    let requests = parts
        .into_iter()
        .enumerate()
        .map(|(choice, parts)| numbered(parts, choice))
        .collect::<Result<Vec<_>, _>>()?;
    let mut jobs = Jobs::start(&shared.router, requests);
    if stream {
        let first = jobs.first().await?;
        let writer = CompletionWriter::new(head, echoes, logprobs, include_usage);
        let body = EventBody::new(active, jobs, first, Box::new(writer));
        return Ok(Answer::Stream(Box::new(body)));
    }
    let replies = jobs.collect().await?;
    Ok(Answer::Whole(completion_reply(&head, &replies, &echoes, logprobs)))
}

/// `/v1/models`.
pub(super) fn models(shared: &Shared) -> HttpResponse {
    json(openai::models(&shared.router.models()))
}

/// `/v1/models/{id}`.
pub(super) fn model(shared: &Shared, name: &str) -> Result<HttpResponse, Problem> {
    Ok(json(openai::model(&known_model(shared, &ModelName::new(name))?)))
}

/// `/health`.
pub(super) fn health(shared: &Shared) -> HttpResponse {
    if shared.readiness.is_loading() {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        return unready(openai::loading(status.as_u16()));
    }
    json(openai::health())
}

/// `/readyz`.
pub(super) fn ready(shared: &Shared) -> HttpResponse {
    let reasons = shared.readiness.reasons();
    let body = openai::ready(&reasons);
    if reasons.is_empty() { json(body) } else { unready(body) }
}

/// `/props`.
pub(super) fn props(shared: &Shared) -> Result<HttpResponse, Problem> {
    let card = known_model(shared, &ModelName::new(""))?;
    Ok(json(openai::props(&card, shared.slots, env!("CARGO_PKG_VERSION"))))
}

/// The model that `name` means.
pub(super) fn known_model(shared: &Shared, name: &ModelName) -> Result<ModelCard, ChatError> {
    check_model_name(name)?;
    shared.router.find(name).ok_or_else(|| ChatError::UnknownModel(name.clone()))
}

/// Reads a body; a large one away from the threads that serve connections.
pub(super) async fn parse<T: Send + 'static>(
    body: Body,
    parse: fn(&[u8]) -> Result<T, ChatError>,
) -> Result<T, Problem> {
    const LARGE: usize = 128 * 1024;
    if body.bytes.len() < LARGE {
        return Ok(parse(&body.bytes)?);
    }
    match web::block(move || parse(&body.bytes)).await {
        Ok(parsed) => Ok(parsed?),
        Err(_) => Err(ChatError::Internal("reading a body was cancelled".to_owned()).into()),
    }
}

/// `parts` checked, under an id of its own if it is not the first choice.
fn numbered(mut parts: ChatRequestParts, choice: usize) -> Result<ChatRequest, ChatError> {
    if choice > 0 {
        parts.id =
            RequestId::parse(&format!("{}.{choice}", parts.id)).unwrap_or_else(RequestId::random);
    }
    ChatRequest::try_from(parts)
}

fn head(
    shared: &Shared,
    prefix: &str,
    caller: &Caller,
    asked: &ModelName,
) -> Result<Head, Problem> {
    let card = known_model(shared, asked)?;
    Ok(Head {
        id: format!("{prefix}-{}", caller.id),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        model: card.name.to_string(),
    })
}

fn unready(body: Vec<u8>) -> HttpResponse {
    HttpResponse::ServiceUnavailable().insert_header((CONTENT_TYPE, "application/json")).body(body)
}
