//! The way of every request through the door: checks from cheap to dear, then its endpoint.

use std::net::{IpAddr, Ipv4Addr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use actix_web::http::Method;
use actix_web::http::header::{
    self, ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue, ORIGIN, VARY,
};
use actix_web::web::Data;
use actix_web::{HttpRequest, HttpResponse};

use super::answer::{Answer, cut_short};
use super::body::Body;
use super::error::Problem;
use super::guard::Provenance;
use super::keys::Denied;
use super::routes::{Endpoint, Route};
use super::{Shared, active, body, keys, models, ollama, openai, pool, routes};
use crate::chat::{ChatError, Limits, Origin, RequestId};
use crate::wire::Caller;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const FUSION_DEPTH: HeaderName = HeaderName::from_static("x-scoutd-fusion-depth");

/// Answers any request, whatever it is.
pub(super) async fn handle(
    request: HttpRequest,
    payload: actix_web::web::Payload,
    shared: Data<Shared>,
) -> HttpResponse {
    let began = Instant::now();
    let id = request_id(&request);
    let dialect = routes::dialect(request.path());
    let mut response = {
        let mut answer = pin!(answer(&request, payload, &shared, &id));
        std::future::poll_fn(|context| {
            catch_unwind(AssertUnwindSafe(|| answer.as_mut().poll(context))).unwrap_or_else(|_| {
                let error = ChatError::Internal("a panic while answering".to_owned());
                Poll::Ready(Err(error.into()))
            })
        })
        .await
        .unwrap_or_else(|problem| {
            let problem = problem.in_dialect(dialect);
            log::debug!(target: "rest", request_id:% = id, reason = problem.reason(); "refused");
            problem.response(dialect)
        })
    };
    finish_headers(&request, &shared, &id, &mut response);
    log::debug!(
        target: "rest",
        request_id:% = id,
        method:% = request.method(),
        path = request.path(),
        status = response.status().as_u16(),
        head_ms = began.elapsed().as_millis() as u64;
        "request"
    );
    response
}

async fn answer(
    request: &HttpRequest,
    payload: actix_web::web::Payload,
    shared: &Shared,
    id: &RequestId,
) -> Result<HttpResponse, Problem> {
    check_head(request, shared)?;
    let from = provenance(request);
    shared.guard.check(&from).map_err(Problem::forbidden)?;
    if let Some(host) = request.uri().host()
        && !shared.guard.knows_host(host)
    {
        return Err(Problem::forbidden("this host name is not one of this server's"));
    }
    let Some(route) = routes::find(request.path()) else { return Err(Problem::no_such_path()) };
    if request.method() == Method::OPTIONS {
        return Ok(preflight(request, &route));
    }
    if !route.methods.split(", ").any(|method| method == request.method().as_str()) {
        return Err(Problem::method_not_allowed(route.methods));
    }
    let client = request.peer_addr().map_or(Ipv4Addr::UNSPECIFIED.into(), |peer| peer.ip());
    let mut payload = Payload::Waiting(payload);
    let key = match pool::proof(request, shared, &route)? {
        // The proof is about the whole request, so its body comes first.
        Some(proof) => {
            let body = payload.read(request, shared).await?;
            pool::check_proof(request, shared, &body, proof)?;
            payload = Payload::Read(body);
            None
        }
        None => open(request, shared, &route, client)?,
    };
    let caller = || caller(request, shared, id, key.as_ref(), keys::plain_ip(client));
    let read = || payload.read(request, shared);
    match route.endpoint {
        Endpoint::Absent(what) => Err(Problem::not_implemented(what)),
        Endpoint::Root => Ok(root(request, shared)),
        Endpoint::Health => Ok(openai::health(shared)),
        Endpoint::Live => Ok(text("ok\n")),
        Endpoint::Ready => Ok(openai::ready(shared)),
        Endpoint::Metrics => Ok(metrics(shared)),
        Endpoint::Props => openai::props(shared),
        Endpoint::Models => Ok(openai::models(shared)),
        Endpoint::Model(name) => openai::model(shared, &name),
        Endpoint::OllamaVersion => Ok(ollama::version()),
        Endpoint::OllamaTags => Ok(models::tags(shared).await),
        Endpoint::OllamaPs => Ok(ollama::ps(shared)),
        Endpoint::OllamaShow => ollama::show(shared, &read().await?.bytes),
        Endpoint::OllamaDelete => models::delete(shared, &read().await?.bytes).await,
        Endpoint::OllamaPull => {
            let active = shared.active.enter();
            models::pull(shared, active, &read().await?.bytes).await
        }
        Endpoint::PoolCalibrate
        | Endpoint::PoolMember(_)
        | Endpoint::PoolMembers
        | Endpoint::PoolReceipt(_)
        | Endpoint::PoolScore
        | Endpoint::PoolSelf
        | Endpoint::PoolState => {
            let caller = caller()?;
            pool::answer(request, shared, &route.endpoint, caller, read().await?).await
        }
        Endpoint::Chat
        | Endpoint::Completions
        | Endpoint::OllamaChat
        | Endpoint::OllamaGenerate => {
            let caller = caller()?;
            let worked = work(&route.endpoint, request, shared, caller, read()).await;
            if let Err(problem) = &worked
                && problem.is_the_doors()
            {
                let reason = problem.reason();
                shared.metrics.requests.with_label_values(&["rest", reason]).inc();
            }
            worked
        }
    }
}

/// A body that is still to be read, or that was read to check a proof.
enum Payload {
    Waiting(actix_web::web::Payload),
    Read(Body),
}

impl Payload {
    async fn read(self, request: &HttpRequest, shared: &Shared) -> Result<Body, Problem> {
        match self {
            Payload::Waiting(payload) => read_body(request, shared, payload).await,
            Payload::Read(body) => Ok(body),
        }
    }
}

/// The name of the key that opens `route`, if one is needed.
fn open(
    request: &HttpRequest,
    shared: &Shared,
    route: &Route,
    client: IpAddr,
) -> Result<Option<Arc<str>>, Problem> {
    let scope = route.scope_for(request.method().as_str());
    let authorization = text_header(request, &header::AUTHORIZATION);
    shared.access.check(scope, authorization, client).map_err(|denied| match denied {
        Denied::Unauthorized => Problem::unauthorized(),
        Denied::WrongScope => Problem::forbidden("this key does not open this"),
    })
}

/// Runs an endpoint that answers.
async fn work(
    endpoint: &Endpoint,
    request: &HttpRequest,
    shared: &Shared,
    caller: Caller,
    body: impl Future<Output = Result<Body, Problem>>,
) -> Result<HttpResponse, Problem> {
    let mut active = shared.active.enter();
    let body = body.await?;
    check_ready(shared)?;
    if let Some(asked) = active::fingerprint(&caller.client, request.path(), &body.bytes) {
        active.note(asked, is_retry(request));
    }
    let cut = active.until_cut();
    let answer = async {
        match endpoint {
            Endpoint::Chat => openai::chat(shared, &active, caller, body).await,
            Endpoint::Completions => openai::completions(shared, &active, caller, body).await,
            Endpoint::OllamaChat => ollama::chat(shared, &active, caller, body).await,
            _ => ollama::generate(shared, &active, caller, body).await,
        }
    };
    let answer = tokio::select! {
        answer = answer => answer,
        replaced = cut => Err(Problem::of_backend(cut_short(replaced))),
    };
    match answer? {
        Answer::Whole(bytes) => Ok(json(bytes)),
        Answer::Stream(body) => Ok(HttpResponse::Ok()
            .insert_header((CONTENT_TYPE, body.content_type()))
            .insert_header((CACHE_CONTROL, "no-cache"))
            .insert_header(("x-accel-buffering", "no"))
            .message_body(body.holding(active))
            .expect("constant headers are valid")
            .map_into_boxed_body()),
    }
}

fn check_ready(shared: &Shared) -> Result<(), Problem> {
    if shared.readiness.is_draining() {
        return Err(cut_short(false).into());
    }
    if shared.readiness.is_loading() {
        return Err(Problem::loading());
    }
    Ok(())
}

/// Whether the client's library says that it has asked this before.
fn is_retry(request: &HttpRequest) -> bool {
    text_header(request, &HeaderName::from_static("x-stainless-retry-count"))
        .and_then(|count| count.parse::<u32>().ok())
        .is_some_and(|count| count > 0)
}

fn check_head(request: &HttpRequest, shared: &Shared) -> Result<(), Problem> {
    let limit = shared.limits.header_bytes;
    let path = request.uri().path_and_query().map_or(0, |path| path.as_str().len());
    let headers = request.headers().iter();
    let bytes =
        path + headers.map(|(name, value)| name.as_str().len() + value.len() + 4).sum::<usize>();
    if bytes > limit { Err(Problem::head_too_large(limit)) } else { Ok(()) }
}

fn provenance(request: &HttpRequest) -> Provenance<'_> {
    let mut hosts = request.headers().get_all(header::HOST);
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => Some(host.to_str().unwrap_or("")),
        (Some(_), Some(_)) => Some(""),
        (None, _) => None,
    };
    Provenance {
        host,
        origin: request.headers().get(ORIGIN).map(|origin| origin.to_str().unwrap_or("")),
        fetch_site: text_header(request, &HeaderName::from_static("sec-fetch-site")),
        acts: !matches!(*request.method(), Method::GET | Method::HEAD),
    }
}

async fn read_body(
    request: &HttpRequest,
    shared: &Shared,
    payload: actix_web::web::Payload,
) -> Result<Body, Problem> {
    let encoding = text_header(request, &header::CONTENT_ENCODING).unwrap_or("identity");
    if !encoding.eq_ignore_ascii_case("identity") {
        return Err(Problem::encoded_body());
    }
    let declared = text_header(request, &header::CONTENT_LENGTH).and_then(|len| len.parse().ok());
    body::read(shared, payload, declared).await
}

fn caller(
    request: &HttpRequest,
    shared: &Shared,
    id: &RequestId,
    key: Option<&Arc<str>>,
    client: IpAddr,
) -> Result<Caller, Problem> {
    let patience = match text_header(request, &HeaderName::from_static("x-scoutd-deadline-ms")) {
        None => shared.default_deadline,
        Some(text) => match text.trim().parse() {
            Ok(ms) => Duration::from_millis(ms).min(Limits::DEADLINE_MAX),
            Err(_) => {
                let message = "X-Scoutd-Deadline-Ms must be a whole number of milliseconds";
                return Err(Problem::bad_request(message));
            }
        },
    };
    Ok(Caller {
        id: id.clone(),
        origin: match fusion_depth(request)? {
            0 => Origin::Rest { client },
            depth => Origin::Fusion { depth },
        },
        client: key.cloned().unwrap_or_else(|| client.to_string().into()),
        deadline: Instant::now() + patience,
    })
}

/// How many fusions are around this request; 0 for a client's own.
fn fusion_depth(request: &HttpRequest) -> Result<u8, Problem> {
    let Some(text) = text_header(request, &FUSION_DEPTH) else { return Ok(0) };
    text.trim()
        .parse()
        .map_err(|_| Problem::bad_request("X-Scoutd-Fusion-Depth must be a small whole number"))
}

fn request_id(request: &HttpRequest) -> RequestId {
    text_header(request, &REQUEST_ID).and_then(RequestId::parse).unwrap_or_else(RequestId::random)
}

pub(super) fn text_header<'a>(request: &'a HttpRequest, name: &HeaderName) -> Option<&'a str> {
    request.headers().get(name).and_then(|value| value.to_str().ok())
}

fn finish_headers(
    request: &HttpRequest,
    shared: &Shared,
    id: &RequestId,
    response: &mut HttpResponse,
) {
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(id.as_str()) {
        headers.insert(REQUEST_ID, id);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Some(origin) = request.headers().get(ORIGIN)
        && shared.guard.knows_origin(&provenance(request))
    {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        headers.insert(VARY, HeaderValue::from_static("Origin"));
    }
}

/// What a browser asks before a request across origins; foreign pages do not get this far.
fn preflight(request: &HttpRequest, route: &Route) -> HttpResponse {
    let mut response = HttpResponse::NoContent();
    response.insert_header((header::ALLOW, format!("{}, OPTIONS", route.methods)));
    response.insert_header((header::ACCESS_CONTROL_ALLOW_METHODS, route.methods));
    if let Some(wanted) = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        response.insert_header((header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone()));
    }
    response.finish()
}

fn root(request: &HttpRequest, shared: &Shared) -> HttpResponse {
    let accepts = text_header(request, &ACCEPT).unwrap_or("");
    if accepts.contains("text/html") {
        return shared.page.response();
    }
    text("Ollama is running")
}

fn metrics(shared: &Shared) -> HttpResponse {
    HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8"))
        .body(shared.metrics.render())
}

fn text(body: &'static str) -> HttpResponse {
    HttpResponse::Ok().insert_header((CONTENT_TYPE, "text/plain; charset=utf-8")).body(body)
}

/// A 200 of JSON.
pub(super) fn json(body: Vec<u8>) -> HttpResponse {
    HttpResponse::Ok().insert_header((CONTENT_TYPE, "application/json")).body(body)
}
