//! One request to one member over HTTP, and everything that can go wrong with it as a value.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use ulid::Ulid;

use super::answer::Answer;
use super::config::Kind;
use super::frames::{Frames, Framing};
use super::member::{Shared, Ticket};
use super::trust::{AUTH_HEADER, BOOT_HEADER, PROOF_HEADER, Signed};
use crate::chat::{
    ChatError, ChatEvent, ChatRequest, ChatRequestParts, ChatSender, Completion, Fault,
    FaultReason, Input, Origin, Scope,
};
use crate::egress::{Bytes, EgressError, HeaderMap, Method, Request, Response, Url, header};
use crate::wire::upstream::{chat_body, read_node_report, read_ollama_models};

/// Silence in the middle of an answer.
const STALL: Duration = Duration::from_secs(15);

/// From an answer's last word to the end of its body.
const END_PATIENCE: Duration = Duration::from_millis(10);

/// A node answers about itself from memory.
const LOOK_PATIENCE: Duration = Duration::from_secs(3);

/// Bytes of a refusal, a listing or a node's report.
pub(super) const SMALL_BODY_MAX: usize = 256 << 10;

/// Length of an answer for which nobody sets a bound.
const DEFAULT_MAX_TOKENS: u32 = 512;

/// Runs a chat request to its end, or until nobody reads its stream any more.
pub(super) async fn chat(ticket: Ticket, request: ChatRequest, sender: ChatSender) {
    let shared = ticket.shared.clone();
    let outcome = tokio::select! {
        biased;
        // Dropping the work closes its connection, and the ticket says that nothing was learnt.
        () = sender.closed() => return,
        outcome = answer(&shared, request.parts(), &sender) => outcome,
    };
    let (told, deadline) = match outcome {
        Ok(completion) => {
            ticket.succeeded();
            (Ok(ChatEvent::Done(completion)), request.parts().deadline)
        }
        Err(ChatError::Upstream(fault)) => {
            ticket.failed(fault.reason);
            (Err(ChatError::Upstream(fault)), request.parts().deadline)
        }
        Err(other) => (Err(other), request.parts().deadline),
    };
    // A reader that leaves the last word unread until long after the deadline does not hold this task up.
    let limit = tokio::time::Instant::from_std(deadline) + STALL;
    let _ = tokio::time::timeout_at(limit, sender.send(told)).await;
}

async fn answer(
    shared: &Shared,
    parts: &ChatRequestParts,
    sender: &ChatSender,
) -> Result<Completion, ChatError> {
    let clock = Clock::new(parts.deadline);
    let (model, rates) = {
        let state = shared.lock();
        (shared.model_of(&state), state.rates)
    };
    check_where_it_runs(shared, &model, &clock).await?;
    let prompt = estimate_tokens(parts);
    let asked = parts.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
    // A scoutd is told its deadline and knows its own speed best.
    let can = match shared.parts.config.kind {
        Kind::Scoutd => None,
        _ => rates.tokens_within(clock.rest(), prompt),
    };
    let max_tokens = can.map_or(asked, |can| asked.min(can.max(MIN_TOKENS)));
    let body = chat_body(parts, &model, max_tokens, shared.dialect())?;
    let (path, accept) = match shared.parts.config.kind {
        Kind::Ollama => ("/api/chat", "application/x-ndjson"),
        _ => ("/v1/chat/completions", "text/event-stream"),
    };
    let headers = inner_headers(shared, parts, &clock, accept);
    let patience = rates.first_byte_patience(prompt);
    let sent = send(shared, Method::POST, path, body, headers);
    let response = clock.within(patience, FaultReason::FirstByteTimeout, sent).await??;
    let mut response = accepted(shared, response, &clock).await?;
    let mut answer = Answer::new(shared.parts.config.kind, &model, parts, clock.start);
    let outcome = read(&mut response, &mut answer, sender, &clock, patience).await;
    answer.measure(&mut shared.lock().rates, prompt, max_tokens);
    let (completion, calls) = outcome.map_err(ChatError::Upstream)?;
    for call in calls {
        let event = sender.send(Ok(ChatEvent::ToolCall(call)));
        let _ = clock.within(STALL, FaultReason::Deadline, event).await?;
    }
    Ok(completion)
}

/// Reads the answer's pieces and hands their texts on.
async fn read(
    response: &mut Response,
    answer: &mut Answer<'_>,
    sender: &ChatSender,
    clock: &Clock,
    patience: Duration,
) -> Result<(Completion, Vec<crate::chat::ToolCall>), Fault> {
    let mut frames = Frames::new(framing(response, answer.kind()));
    let mut found = Vec::new();
    loop {
        // Servers that answer before they have read the prompt are silent for as long as that takes.
        let limit = if answer.has_begun() { STALL } else { patience.max(STALL) };
        let chunk = match clock.within(limit, FaultReason::Stall, response.chunk()).await {
            Ok(chunk) => chunk.map_err(|error| fault(&error))?,
            Err(late) if late.reason == FaultReason::Deadline => return answer.cut_by_deadline(),
            Err(late) => return Err(late),
        };
        let ended = chunk.is_none();
        match chunk {
            Some(bytes) => frames.push(&bytes, &mut found),
            None => frames.finish(&mut found),
        }
        .map_err(|_| Fault::new(FaultReason::TooLarge))?;
        for frame in found.drain(..) {
            if let Some(text) = answer.take(&frame)? {
                let event = ChatEvent::Delta { text, logprobs: Vec::new() };
                match clock
                    .within(Duration::MAX, FaultReason::Deadline, sender.send(Ok(event)))
                    .await
                {
                    Ok(_) => {}
                    Err(_) => return answer.cut_by_deadline(),
                }
            }
        }
        if ended && frames.is_foreign() && !answer.has_frames() {
            return Err(Fault::new(FaultReason::BadJson));
        }
        if ended {
            return answer.finish();
        }
        if answer.is_complete() {
            // The end of the body is there already or comes at once; with it the connection can be used again.
            let _ = tokio::time::timeout(END_PATIENCE, response.chunk()).await;
            return answer.finish();
        }
    }
}

/// Asks a scoutd about itself. Only an answer that proves the key is believed.
pub(super) async fn look(shared: &Shared) -> Result<(), Fault> {
    let looked = tokio::time::timeout(LOOK_PATIENCE, look_once(shared))
        .await
        .unwrap_or_else(|_| Err(Fault::new(FaultReason::FirstByteTimeout)));
    if let Err(fault) = &looked {
        let mut state = shared.lock();
        // A faulty answer to this says nothing about the work (health and work paths fail separately), but if
        // nobody is there, nobody has to find that out again.
        if matches!(fault.reason, FaultReason::ConnectRefused | FaultReason::ConnectTimeout) {
            state.breaker.unreachable(Instant::now());
        }
        state.last_fault = Some(fault.reason);
    }
    looked
}

async fn look_once(shared: &Shared) -> Result<(), Fault> {
    const PATH: &str = "/fusion/v1/self";
    let Some(signer) = &shared.parts.signer else {
        return Err(Fault::explained(FaultReason::Unauthorized, "there is no pool key"));
    };
    let sent = send_signed(shared, Method::GET, PATH, Vec::new(), HeaderMap::new()).await?;
    let (mut response, proof) = (sent.response, sent.proof);
    if response.status != 200 {
        return Err(refusal(shared, &mut response).await);
    }
    let body = response.body(SMALL_BODY_MAX).await.map_err(|error| fault(&error))?;
    let shown = response.header(PROOF_HEADER).unwrap_or_default();
    if !signer.believes(&proof, &body, shown) {
        return Err(Fault::explained(FaultReason::Unauthorized, "it does not prove the pool key"));
    }
    let report = read_node_report(&body).ok_or(Fault::new(FaultReason::BadJson))?;
    let wanted = shared.parts.config.model.as_deref().map(crate::chat::ModelName::new);
    let has = |wanted: &crate::chat::ModelName| {
        report.models.iter().any(|model| wanted.matches(&crate::chat::ModelName::new(&model.name)))
    };
    if report.models.is_empty() || wanted.as_ref().is_some_and(|wanted| !has(wanted)) {
        return Err(Fault::explained(FaultReason::WrongModel, "it does not have the model"));
    }
    let mut state = shared.lock();
    state.boot = Some(report.boot_id.clone());
    let waiting = report.waiting;
    if let (Some(prefill), true) = (report.prefill_tokens_per_s, waiting > 0) {
        // Whoever waits has a prompt to be read first; how long it is nobody knows.
        state.rates.queue_s.add(f64::from(waiting) * 100.0 / prefill.max(0.1));
    } else if waiting == 0 {
        state.rates.queue_s.add(0.0);
    }
    state.node = Some(report);
    state.seen = Some(Instant::now());
    state.breaker.heard_of();
    if state.last_fault.is_some_and(|reason| reason == FaultReason::ConnectRefused) {
        state.last_fault = None;
    }
    Ok(())
}

/// An Ollama server lists models that really run in a cloud; asking one of those would leave the house.
async fn check_where_it_runs(shared: &Shared, model: &str, clock: &Clock) -> Result<(), ChatError> {
    let config = &shared.parts.config;
    if config.kind != Kind::Ollama || shared.parts.scope == Scope::Wan {
        return Ok(());
    }
    let wan = || ChatError::Upstream(Fault::new(FaultReason::WanModel));
    if model.ends_with("-cloud") || model.ends_with(":cloud") {
        return Err(wan());
    }
    let known = shared.lock().runs_there;
    let runs_there = match known {
        Some(known) => known,
        None => {
            let asked = list_ollama(shared, model);
            let runs = clock.within(LOOK_PATIENCE, FaultReason::FirstByteTimeout, asked).await??;
            shared.lock().runs_there = Some(runs);
            runs
        }
    };
    if runs_there { Ok(()) } else { Err(wan()) }
}

async fn list_ollama(shared: &Shared, model: &str) -> Result<bool, Fault> {
    let mut response = send(shared, Method::GET, "/api/tags", Vec::new(), HeaderMap::new()).await?;
    if response.status != 200 {
        return Err(refusal(shared, &mut response).await);
    }
    let body = response.body(SMALL_BODY_MAX * 4).await.map_err(|error| fault(&error))?;
    let models = read_ollama_models(&body).ok_or(Fault::new(FaultReason::BadJson))?;
    let wanted = crate::chat::ModelName::new(model);
    let elsewhere = models
        .iter()
        .any(|(name, remote)| *remote && wanted.matches(&crate::chat::ModelName::new(name)));
    Ok(!elsewhere)
}

/// A 200, or the fault that another status is.
async fn accepted(
    shared: &Shared,
    mut response: Response,
    clock: &Clock,
) -> Result<Response, Fault> {
    if response.status == 200 {
        return Ok(response);
    }
    let limit = Duration::from_secs(2);
    clock.within(limit, FaultReason::Stall, refusal(shared, &mut response)).await.and_then(Err)
}

/// What a status other than 200 means.
pub(super) async fn refusal(shared: &Shared, response: &mut Response) -> Fault {
    let busy = |response: &Response| {
        let seconds = response.header("retry-after").and_then(|text| text.trim().parse().ok());
        Fault { retry_after: seconds.map(Duration::from_secs), ..Fault::new(FaultReason::Busy) }
    };
    let told_faithfully = matches!(shared.parts.config.kind, Kind::Scoutd | Kind::Ollama);
    match response.status {
        300..=399 => Fault::new(FaultReason::Redirect),
        401 | 403 => Fault::new(FaultReason::Unauthorized),
        404 | 409 if told_faithfully => Fault::new(FaultReason::WrongModel),
        429 | 503 => busy(response),
        400..=499 => Fault::explained(FaultReason::Http4xx, response.status.to_string()),
        status => Fault::new(FaultReason::Http5xx(status)),
    }
}

/// What an error of the way there means.
pub(super) fn fault(error: &EgressError) -> Fault {
    let reason = match error {
        EgressError::ConnectRefused { .. } | EgressError::Unreachable { .. } => {
            FaultReason::ConnectRefused
        }
        EgressError::ConnectTimeout { .. } => FaultReason::ConnectTimeout,
        EgressError::NotAllowed { host, .. } if host.parse::<IpAddr>().is_ok() => {
            FaultReason::WanAddress
        }
        EgressError::NotAllowed { .. } => FaultReason::WanDns,
        EgressError::Reset { .. } => FaultReason::Reset,
        EgressError::Resolve { .. } => FaultReason::NoSuchHost,
        EgressError::Stalled { .. } => FaultReason::Stall,
        EgressError::Tls { .. } => FaultReason::Tls,
        EgressError::TooLong { .. } => FaultReason::TooLarge,
        _ => FaultReason::BadJson,
    };
    Fault::new(reason)
}

/// Sends a request, proved if the member is a scoutd.
pub(super) async fn send(
    shared: &Shared,
    method: Method,
    path: &str,
    body: Vec<u8>,
    headers: HeaderMap,
) -> Result<Response, Fault> {
    send_signed(shared, method, path, body, headers).await.map(|sent| sent.response)
}

struct Sent {
    response: Response,
    /// Our proof, to which an answer's proof belongs.
    proof: String,
}

async fn send_signed(
    shared: &Shared,
    method: Method,
    path: &str,
    body: Vec<u8>,
    mut headers: HeaderMap,
) -> Result<Sent, Fault> {
    let url = endpoint(&shared.parts.url, path).map_err(|error| fault(&error))?;
    let host = authority(&url);
    put(&mut headers, "host", &host);
    if !body.is_empty() {
        put(&mut headers, "content-type", "application/json");
    }
    if let Some(bearer) = &shared.parts.bearer {
        put(&mut headers, "authorization", &format!("Bearer {bearer}"));
    }
    let body = Bytes::from(body);
    let mut boot = shared.lock().boot.clone().unwrap_or_default();
    let mut repeated = false;
    loop {
        let mut proof = String::new();
        if let Some(signer) = &shared.parts.signer {
            let what =
                Signed { method: method.as_str(), host: &host, path: url.path(), body: &body };
            proof = signer.sign(&what, &boot);
            put(&mut headers, AUTH_HEADER, &proof);
        }
        let request = Request {
            method: method.clone(),
            url: url.clone(),
            headers: headers.clone(),
            body: body.clone(),
        };
        let response = shared.parts.client.send(request).await.map_err(|error| fault(&error))?;
        let told = response.header(BOOT_HEADER).filter(|told| told.len() <= 64 && *told != boot);
        if let (401, false, true, Some(told)) =
            (response.status, repeated, shared.parts.signer.is_some(), told)
        {
            boot = told.to_owned();
            shared.lock().boot = Some(boot.clone());
            repeated = true;
            continue;
        }
        return Ok(Sent { response, proof });
    }
}

fn inner_headers(
    shared: &Shared,
    parts: &ChatRequestParts,
    clock: &Clock,
    accept: &'static str,
) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::ACCEPT, header::HeaderValue::from_static(accept));
    put(&mut headers, "x-request-id", &Ulid::from_bytes(rand::random()).to_string());
    // Nobody outside the house has to know how we work.
    if shared.parts.scope != Scope::Wan {
        let depth = match parts.origin {
            Origin::Fusion { depth } => depth.max(1),
            _ => 1,
        };
        put(&mut headers, "x-scoutd-fusion-depth", &depth.to_string());
        put(&mut headers, "x-scoutd-deadline-ms", &clock.inner_rest().as_millis().to_string());
    }
    headers
}

fn put(headers: &mut HeaderMap, name: &str, value: &str) {
    let name = header::HeaderName::from_bytes(name.as_bytes());
    if let (Ok(name), Ok(value)) = (name, header::HeaderValue::from_str(value)) {
        headers.insert(name, value);
    }
}

/// `path` below the member's own address.
fn endpoint(base: &Url, path: &str) -> Result<Url, EgressError> {
    base.with_path(&format!("{}{path}", base.path().trim_end_matches('/')))
}

fn authority(url: &Url) -> String {
    let host = url.host();
    if host.contains(':') {
        format!("[{host}]:{}", url.port())
    } else {
        format!("{host}:{}", url.port())
    }
}

fn framing(response: &Response, kind: Kind) -> Framing {
    let media = response.header("content-type").unwrap_or_default().to_ascii_lowercase();
    if media.starts_with("text/event-stream") {
        Framing::Events
    } else if media.contains("ndjson") {
        Framing::Lines
    } else if media.starts_with("application/json") && kind != Kind::Ollama {
        Framing::Whole
    } else if kind == Kind::Ollama {
        Framing::Lines
    } else {
        Framing::Events
    }
}

/// Tokens of the prompt, roughly: three characters each.
fn estimate_tokens(parts: &ChatRequestParts) -> u32 {
    let bytes = match &parts.input {
        Input::Messages(messages) => messages.iter().map(|m| m.content.len() + 12).sum(),
        Input::Text(text) => text.len(),
        Input::Tokens(tokens) => tokens.len() * 3,
    };
    u32::try_from(bytes / 3).unwrap_or(u32::MAX)
}

/// An answer that is not even this long is no use.
const MIN_TOKENS: u32 = 8;

/// When the request began, and when it must be over.
pub(super) struct Clock {
    pub(super) start: Instant,
    deadline: Instant,
}

impl Clock {
    pub(super) fn new(deadline: Instant) -> Clock {
        Clock { start: Instant::now(), deadline }
    }

    pub(super) fn rest(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// What a member is told: a little less, so that its answer arrives in time.
    pub(super) fn inner_rest(&self) -> Duration {
        let rest = self.rest();
        rest.saturating_sub((rest / 20).min(Duration::from_millis(250)))
    }

    /// Does `work` for at most `limit`, and never beyond the deadline.
    pub(super) async fn within<T>(
        &self,
        limit: Duration,
        reason: FaultReason,
        work: impl Future<Output = T>,
    ) -> Result<T, Fault> {
        let rest = self.rest();
        let reason = if rest <= limit { FaultReason::Deadline } else { reason };
        tokio::time::timeout(rest.min(limit), work).await.map_err(|_| Fault::new(reason))
    }
}

impl From<Fault> for ChatError {
    fn from(fault: Fault) -> ChatError {
        ChatError::Upstream(fault)
    }
}
