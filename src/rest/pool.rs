//! `/fusion/v1/*`: what nodes of a pool ask each other, and what their owner asks.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use actix_web::HttpRequest;
use actix_web::HttpResponse;
use actix_web::http::header::{HeaderName, HeaderValue};

use super::Shared;
use super::body::Body;
use super::door::{json, text_header};
use super::error::Problem;
use super::keys::{Scope, plain_ip};
use super::openai::parse;
use super::routes::{Endpoint, Route};
use crate::chat::{
    AnswerForm, Backend, ChatError, ModelName, OutputFormat, Priority, ScoreRequest,
};
use crate::fusion::{Calibration, Form, Fusion, Item, arithmetic};
use crate::peer::{
    AUTH_HEADER, BOOT_HEADER, Kind, MemberConfig, PROOF_HEADER, Pool, Signed, Strength,
};
use crate::wire::upstream::{
    CalibrationBody, CalibrationLine, MemberBody, NodeModel, NodeReport, PeerReport, ScoreBody,
    calibration_report, node_report, pool_report, score_reply,
};
use crate::wire::{Caller, check_model_name};

/// What the door knows of the pool.
#[derive(Clone)]
pub struct PoolDoor {
    /// The other machines.
    pub pool: Arc<Pool>,
    /// What this machine itself can answer with.
    pub local: Arc<dyn Backend>,
    /// This machine's name.
    pub node: String,
    /// What answers as `fusion`.
    pub fusion: Option<Arc<Fusion>>,
    /// Where it is kept how often each model was right.
    pub calibration_file: Option<PathBuf>,
}

/// The connection's own address.
pub(super) struct LocalAddress(pub(super) IpAddr);

/// The proof that another node sends instead of a key, where it may.
pub(super) fn proof<'a>(
    request: &'a HttpRequest,
    shared: &Shared,
    route: &Route,
) -> Result<Option<&'a str>, Problem> {
    let header = text_header(request, &header_name(AUTH_HEADER));
    let scope = route.scope_for(request.method().as_str());
    let for_nodes = scope == Scope::Pool;
    let gate = shared.pool.as_ref().and_then(|door| door.pool.gate());
    match (gate, header) {
        (Some(_), Some(header)) if for_nodes || scope == Scope::Inference => Ok(Some(header)),
        (Some(gate), None) if for_nodes => Err(Problem::unproven(&gate.boot_id())),
        (None, _) if for_nodes => {
            Err(Problem::forbidden("this node has no pool key (fusion.key_file)"))
        }
        _ => Ok(None),
    }
}

/// Whether the proof holds for this request.
pub(super) fn check_proof(
    request: &HttpRequest,
    shared: &Shared,
    body: &Body,
    proof: &str,
) -> Result<(), Problem> {
    let Some(gate) = shared.pool.as_ref().and_then(|door| door.pool.gate()) else {
        return Err(Problem::unauthorized());
    };
    let host =
        request.headers().get("host").and_then(|host| host.to_str().ok()).unwrap_or_default();
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    let what = Signed { method: request.method().as_str(), host, path, body: &body.bytes };
    // The host that was proved must be us: else somebody hands on what he was asked.
    if !is_own_host(host, request.conn_data::<LocalAddress>()) {
        return Err(Problem::unproven(&gate.boot_id()));
    }
    gate.check(&what, proof).map_err(|unproven| Problem::unproven(&unproven.boot_id))
}

/// An address must be the one that the connection came to; a name was checked like every request's.
fn is_own_host(host: &str, local: Option<&LocalAddress>) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    match (name.parse::<IpAddr>(), local) {
        (Ok(address), Some(LocalAddress(own))) => plain_ip(address) == plain_ip(*own),
        (Ok(_), None) => false,
        (Err(_), _) => true,
    }
}

/// Answers one of the pool's endpoints.
pub(super) async fn answer(
    request: &HttpRequest,
    shared: &Shared,
    endpoint: &Endpoint,
    caller: Caller,
    body: Body,
) -> Result<HttpResponse, Problem> {
    let Some(door) = &shared.pool else {
        return Err(Problem::not_implemented("this daemon has no pool"));
    };
    match endpoint {
        Endpoint::PoolCalibrate => calibrate(door, body).await,
        Endpoint::PoolReceipt(id) => {
            let receipt = door.fusion.as_ref().and_then(|fusion| fusion.receipt(id));
            receipt.map(|text| json(text.into_bytes())).ok_or_else(Problem::no_such_receipt)
        }
        Endpoint::PoolSelf => Ok(myself(request, shared, door)),
        Endpoint::PoolScore => score(door, caller, body).await,
        Endpoint::PoolMember(name) => {
            if !door.pool.remove(name) {
                return Err(Problem::no_such_member());
            }
            Ok(report(shared, door))
        }
        Endpoint::PoolMembers if request.method() == actix_web::http::Method::POST => {
            let member = parse(body, MemberBody::parse).await?;
            door.pool.add(member_config(member)?).map_err(|error| {
                let message = error.to_string();
                Problem::from(ChatError::Invalid { message, param: None })
            })?;
            Ok(report(shared, door))
        }
        _ => Ok(report(shared, door)),
    }
}

fn member_config(member: MemberBody) -> Result<MemberConfig, ChatError> {
    let kind = Kind::parse(&member.kind).ok_or_else(|| {
        ChatError::invalid("kind", "kind must be \"scoutd\", \"ollama\", \"openai\" or \"dllama\"")
    })?;
    let tier = match member.tier.as_deref() {
        None => None,
        Some(word) => Some(Strength::parse(word).ok_or_else(|| {
            ChatError::invalid("tier", "tier must be \"tiny\", \"small\", \"medium\" or \"large\"")
        })?),
    };
    Ok(MemberConfig {
        name: member.name,
        kind,
        url: member.url,
        model: member.model,
        key_file: None,
        tier,
        // What leaves the house is decided in the configuration alone.
        wan: false,
        max_in_flight: member.max_in_flight,
        context_tokens: None,
    })
}

fn myself(request: &HttpRequest, shared: &Shared, door: &PoolDoor) -> HttpResponse {
    let metrics = &shared.metrics;
    let measured = |value: f64| Some(value).filter(|value| value.is_finite() && *value > 0.0);
    let count = |value: i64| u32::try_from(value).unwrap_or(0);
    let body = node_report(&NodeReport {
        node: door.node.clone(),
        boot_id: door.pool.gate().map(|gate| gate.boot_id()).unwrap_or_default(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        models: door.local.models().iter().map(NodeModel::from).collect(),
        prefill_tokens_per_s: measured(metrics.prefill_tokens_per_s.get()),
        decode_tokens_per_s: measured(metrics.decode_tokens_per_s.get()),
        headroom_bytes: Some(metrics.headroom_bytes.get().max(0.0) as u64),
        running: count(metrics.requests_running.get()),
        waiting: count(metrics.requests_waiting.get()),
        temperature_celsius: measured(metrics.soc_temperature_celsius.get()),
        draining: shared.readiness.is_draining(),
    });
    let proof = text_header(request, &header_name(AUTH_HEADER)).unwrap_or_default();
    let own = door.pool.gate().map(|gate| gate.proof(proof, &body)).unwrap_or_default();
    let mut response = json(body);
    if let Ok(value) = HeaderValue::from_str(&own) {
        response.headers_mut().insert(header_name(PROOF_HEADER), value);
    }
    response
}

/// Asks all members questions of known truth, one after the other, and keeps what was learnt after each: a client
/// that goes away leaves what is known by then.
async fn calibrate(door: &PoolDoor, body: Body) -> Result<HttpResponse, Problem> {
    let Some(fusion) = &door.fusion else {
        return Err(Problem::not_implemented("this daemon has no pool"));
    };
    let asked = parse(body, CalibrationBody::parse).await?;
    let form = match asked.form.as_str() {
        "json" => AnswerForm::Json,
        "number" => AnswerForm::Number,
        "text" => AnswerForm::Text,
        _ => {
            let message = "form must be \"text\", \"number\" or \"json\"";
            return Err(ChatError::invalid("form", message).into());
        }
    };
    let form = Form::new(&form, &OutputFormat::Text)?;
    let items: Vec<Item> = match asked.list.is_empty() {
        true => arithmetic(rand::random(), asked.items as usize),
        false => {
            let item = |(question, truth)| Item { question, truth };
            asked.list.into_iter().map(item).collect()
        }
    };
    for item in &items {
        fusion.calibrate(item, &form, asked.patience).await?;
        keep(door, &fusion.calibration());
    }
    let calibration = fusion.calibration();
    let lines: Vec<CalibrationLine> = calibration
        .models
        .iter()
        .flat_map(|(model, kinds)| {
            kinds.iter().map(|(form, score)| CalibrationLine {
                model: model.clone(),
                form: form.clone(),
                right: score.right,
                asked: score.asked,
            })
        })
        .collect();
    Ok(json(calibration_report(&lines)))
}

fn keep(door: &PoolDoor, calibration: &Calibration) {
    let Some(path) = &door.calibration_file else { return };
    let text = serde_json::to_vec(calibration).expect("names and counts serialize");
    let part = path.with_extension("part");
    let written = fs::write(&part, text).and_then(|()| fs::rename(&part, path));
    if let Err(error) = written {
        log::warn!(target: "rest", path:% = path.display(), error:%; "the calibration is lost at the next start");
    }
}

async fn score(door: &PoolDoor, caller: Caller, body: Body) -> Result<HttpResponse, Problem> {
    let asked = parse(body, ScoreBody::parse).await?;
    let model = ModelName::new(&asked.model);
    check_model_name(&model)?;
    let card = door.local.card(&model).ok_or_else(|| ChatError::UnknownModel(model.clone()))?;
    if card.digest != asked.digest {
        return Err(Problem::other_digest());
    }
    let deadline = match asked.deadline {
        Some(rest) => {
            caller.deadline.min(Instant::now() + rest.min(crate::chat::Limits::DEADLINE_MAX))
        }
        None => caller.deadline,
    };
    let request = ScoreRequest {
        id: caller.id,
        origin: caller.origin,
        client: caller.client,
        model: card.name.clone(),
        digest: Some(asked.digest),
        messages: asked.messages,
        candidates: asked.candidates,
        deadline,
        priority: Priority::Normal,
    };
    let reply = door.local.score(request).await.map_err(Problem::of_backend)?;
    Ok(json(score_reply(&reply)))
}

fn report(shared: &Shared, door: &PoolDoor) -> HttpResponse {
    let metrics = &shared.metrics;
    let measured = |value: f64| Some(value).filter(|value| value.is_finite() && *value > 0.0);
    let local = door.local.models().into_iter().map(|card| PeerReport {
        id: format!("local/{}", card.name),
        kind: "local".to_owned(),
        scope: "local".to_owned(),
        state: "healthy".to_owned(),
        score: "exact".to_owned(),
        in_flight: u32::try_from(metrics.requests_running.get()).unwrap_or(0),
        prefill_tokens_per_s: measured(metrics.prefill_tokens_per_s.get()),
        decode_tokens_per_s: measured(metrics.decode_tokens_per_s.get()),
        digest: Some(card.digest),
        ..PeerReport::default()
    });
    json(pool_report(&door.pool.report(local.collect())))
}

/// Names of headers are constants, written as other machines read them.
fn header_name(name: &str) -> HeaderName {
    debug_assert!(name == AUTH_HEADER || name == PROOF_HEADER || name == BOOT_HEADER);
    HeaderName::from_bytes(name.as_bytes()).expect("our own headers have valid names")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proved_host_is_this_machine() {
        let own = LocalAddress("192.168.1.5".parse().expect("an address"));
        for host in ["192.168.1.5:11434", "192.168.1.5", "[::ffff:192.168.1.5]:80", "pi-a.local:80"]
        {
            assert!(is_own_host(host, Some(&own)), "{host}");
        }
        for host in ["192.168.1.6:11434", "[::1]:80", "127.0.0.1"] {
            assert!(!is_own_host(host, Some(&own)), "{host}");
        }
        assert!(!is_own_host("192.168.1.5", None));
    }
}
