//! The endpoints of the Ollama dialect.

use std::time::SystemTime;

use actix_web::HttpResponse;

use super::Shared;
use super::active::ActiveGuard;
use super::answer::{Answer, EventBody, Jobs};
use super::body::Body;
use super::door::json;
use super::error::Problem;
use super::openai::{known_model, parse};
use crate::chat::{ChatError, ChatRequest, ModelName};
use crate::wire::Caller;
use crate::wire::ollama::{self, ChatBody, GenerateBody, LineWriter, Shape, Work};

/// `/api/chat`.
pub(super) async fn chat(
    shared: &Shared,
    active: &ActiveGuard,
    caller: Caller,
    body: Body,
) -> Result<Answer, Problem> {
    let asked = parse(body, ChatBody::parse).await?;
    let name = shown_name(shared, asked.model())?;
    let (stream, logprobs) = (asked.stream(), asked.logprobs());
    let work = asked.into_work(&caller)?;
    run(shared, active, work, stream, |_| LineWriter::new(name, Shape::Chat, logprobs)).await
}

/// `/api/generate`.
pub(super) async fn generate(
    shared: &Shared,
    active: &ActiveGuard,
    caller: Caller,
    body: Body,
) -> Result<Answer, Problem> {
    let asked = parse(body, GenerateBody::parse).await?;
    let name = shown_name(shared, asked.model())?;
    let (stream, logprobs) = (asked.stream(), asked.logprobs());
    let work = asked.into_work(&caller)?;
    run(shared, active, work, stream, |turns| {
        LineWriter::new(name, Shape::Generate(turns), logprobs)
    })
    .await
}

/// `/api/version`.
pub(super) fn version() -> HttpResponse {
    json(ollama::version())
}

/// `/api/ps`. What is installed stays loaded.
pub(super) fn ps(shared: &Shared) -> HttpResponse {
    json(ollama::ps(&shared.router.models(), SystemTime::now()))
}

/// `/api/show`.
pub(super) fn show(shared: &Shared, body: &[u8]) -> Result<HttpResponse, Problem> {
    Ok(json(ollama::show(&known_model(shared, &ollama::model_name(body)?)?)))
}

async fn run(
    shared: &Shared,
    active: &ActiveGuard,
    work: Work,
    stream: bool,
    writer: impl FnOnce(Option<Vec<crate::chat::Message>>) -> LineWriter,
) -> Result<Answer, Problem> {
    let (parts, turns) = match work {
        Work::Answer { parts, turns } => (parts, turns),
        Work::Load => return Ok(loaded(&writer(None), false)),
        Work::Unload => return Ok(loaded(&writer(None), true)),
    };
    let writer = writer(turns);
    let request = ChatRequest::try_from(*parts)?;
    let mut jobs = Jobs::start(&shared.router, vec![request]);
    if stream {
        let first = jobs.first().await?;
        let body = EventBody::new(active, jobs, first, Box::new(writer));
        return Ok(Answer::Stream(Box::new(body)));
    }
    let mut replies = jobs.collect().await?;
    let reply = replies.pop().ok_or_else(|| ChatError::Internal("no reply".to_owned()))?;
    Ok(Answer::Whole(ollama::reply(writer, &reply, SystemTime::now())))
}

fn loaded(writer: &LineWriter, unload: bool) -> Answer {
    Answer::Whole(ollama::loaded(writer, unload, SystemTime::now()))
}

/// The name as the client wrote it, which its code may compare; the default model's if it wrote none.
fn shown_name(shared: &Shared, asked: ModelName) -> Result<String, ChatError> {
    let card = known_model(shared, &asked)?;
    Ok(if asked.as_str().is_empty() { card.name.to_string() } else { asked.to_string() })
}
