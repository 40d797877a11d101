//! What scoutd nodes of one pool tell each other.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::json::{parse, write};
use super::super::lenient::{Float, Int, List, Object};
use super::request::role;
use crate::chat::{ChatError, Message, ModelCard, ScoreReply, ScoreRequest};

/// A node about itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeReport {
    /// Its name.
    pub node: String,
    /// What proofs sent to it must contain.
    pub boot_id: String,
    /// Its version.
    pub version: String,
    /// Its models, the default one first.
    pub models: Vec<NodeModel>,
    /// Prompt tokens per second; `None` until measured.
    pub prefill_tokens_per_s: Option<f64>,
    /// Tokens per second of one answer; `None` until measured.
    pub decode_tokens_per_s: Option<f64>,
    /// Memory that may still be promised.
    pub headroom_bytes: Option<u64>,
    /// Requests being answered.
    pub running: u32,
    /// Requests in line.
    pub waiting: u32,
    /// Of the processor.
    pub temperature_celsius: Option<f64>,
    /// It takes no new requests.
    pub draining: bool,
}

/// One of a node's models.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeModel {
    /// The name to ask for.
    pub name: String,
    /// What names its file.
    pub digest: String,
    /// The longest context of one request.
    pub context_tokens: u32,
    /// Weights, all experts counted.
    pub parameters: u64,
    /// `llama4`, `llama`, …
    pub architecture: String,
    /// As `Q4_0`.
    pub quantization: String,
}

impl From<&ModelCard> for NodeModel {
    fn from(card: &ModelCard) -> NodeModel {
        NodeModel {
            name: card.name.to_string(),
            digest: card.digest.clone(),
            context_tokens: card.context_tokens,
            parameters: card.parameters,
            architecture: card.architecture.clone(),
            quantization: card.quantization.clone(),
        }
    }
}

#[derive(Serialize)]
struct NodeBody<'a> {
    node: &'a str,
    boot_id: &'a str,
    version: &'a str,
    models: Vec<ModelBody<'a>>,
    prefill_tokens_per_s: Option<f64>,
    decode_tokens_per_s: Option<f64>,
    headroom_bytes: Option<u64>,
    running: u32,
    waiting: u32,
    temperature_celsius: Option<f64>,
    draining: bool,
}

#[derive(Serialize)]
struct ModelBody<'a> {
    name: &'a str,
    digest: &'a str,
    context_tokens: u32,
    parameters: u64,
    architecture: &'a str,
    quantization: &'a str,
    score: &'static str,
}

/// The answer of `/fusion/v1/self`.
pub fn node_report(report: &NodeReport) -> Vec<u8> {
    write(&NodeBody {
        node: &report.node,
        boot_id: &report.boot_id,
        version: &report.version,
        models: report
            .models
            .iter()
            .map(|model| ModelBody {
                name: &model.name,
                digest: &model.digest,
                context_tokens: model.context_tokens,
                parameters: model.parameters,
                architecture: &model.architecture,
                quantization: &model.quantization,
                score: "exact",
            })
            .collect(),
        prefill_tokens_per_s: report.prefill_tokens_per_s,
        decode_tokens_per_s: report.decode_tokens_per_s,
        headroom_bytes: report.headroom_bytes,
        running: report.running,
        waiting: report.waiting,
        temperature_celsius: report.temperature_celsius,
        draining: report.draining,
    })
}

/// Reads the answer of another node's `/fusion/v1/self`; `None` if it is none.
pub fn read_node_report(body: &[u8]) -> Option<NodeReport> {
    #[derive(Deserialize)]
    struct Body {
        node: Option<String>,
        boot_id: Option<String>,
        version: Option<String>,
        models: Option<List<Object<Model>, 64>>,
        prefill_tokens_per_s: Option<Float>,
        decode_tokens_per_s: Option<Float>,
        headroom_bytes: Option<Int>,
        running: Option<Int>,
        waiting: Option<Int>,
        temperature_celsius: Option<Float>,
        draining: Option<bool>,
    }
    #[derive(Deserialize)]
    struct Model {
        name: Option<String>,
        digest: Option<String>,
        context_tokens: Option<Int>,
        parameters: Option<Int>,
        architecture: Option<String>,
        quantization: Option<String>,
    }
    let Object(body) = serde_json::from_slice::<Object<Body>>(body).ok()?;
    let short = |text: Option<String>| text.filter(|text| text.len() <= 128);
    let number = |int: Option<Int>| int.and_then(|Int(n)| u64::try_from(n).ok());
    let small = |int: Option<Int>| int.and_then(|Int(n)| u32::try_from(n).ok()).unwrap_or(0);
    let float = |value: Option<Float>| value.map(|Float(value)| f64::from(value));
    let model = |Object(model): Object<Model>| {
        Some(NodeModel {
            name: short(model.name)?,
            digest: short(model.digest)?,
            context_tokens: small(model.context_tokens),
            parameters: number(model.parameters).unwrap_or(0),
            architecture: short(model.architecture).unwrap_or_default(),
            quantization: short(model.quantization).unwrap_or_default(),
        })
    };
    let List(models) = body.models?;
    Some(NodeReport {
        node: short(body.node)?,
        boot_id: short(body.boot_id)?,
        version: short(body.version).unwrap_or_default(),
        models: models.into_iter().filter_map(model).collect(),
        prefill_tokens_per_s: float(body.prefill_tokens_per_s),
        decode_tokens_per_s: float(body.decode_tokens_per_s),
        headroom_bytes: number(body.headroom_bytes),
        running: small(body.running),
        waiting: small(body.waiting),
        temperature_celsius: float(body.temperature_celsius),
        draining: body.draining.unwrap_or(false),
    })
}

/// The body of `/fusion/v1/score`, as another node wrote it.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreBody {
    /// The model's name.
    pub model: String,
    /// The model's digest; another one is a conflict.
    pub digest: String,
    /// The conversation.
    pub messages: Vec<Message>,
    /// The continuations.
    pub candidates: Vec<String>,
    /// Time left.
    pub deadline: Option<Duration>,
}

/// Asks another node for scores.
pub fn score_body(request: &ScoreRequest, model: &str, digest: &str, rest: Duration) -> Vec<u8> {
    #[derive(Serialize)]
    struct Body<'a> {
        model: &'a str,
        digest: &'a str,
        messages: Vec<Turn<'a>>,
        candidates: &'a [String],
        deadline_ms: u64,
    }
    #[derive(Serialize)]
    struct Turn<'a> {
        role: &'static str,
        content: &'a str,
    }
    write(&Body {
        model,
        digest,
        messages: request
            .messages
            .iter()
            .map(|message| Turn { role: role(message.role), content: &message.content })
            .collect(),
        candidates: &request.candidates,
        deadline_ms: u64::try_from(rest.as_millis()).unwrap_or(u64::MAX),
    })
}

impl ScoreBody {
    /// Reads a body.
    ///
    /// # Errors
    /// `Invalid`, naming the field.
    pub fn parse(body: &[u8]) -> Result<ScoreBody, ChatError> {
        #[derive(Deserialize)]
        struct Body {
            model: Option<String>,
            digest: Option<String>,
            messages: Option<List<Object<Turn>, { crate::chat::Limits::MESSAGES_MAX }>>,
            candidates: Option<List<String, { ScoreRequest::CANDIDATES_MAX }>>,
            deadline_ms: Option<Int>,
        }
        #[derive(Deserialize)]
        struct Turn {
            role: Option<String>,
            content: Option<String>,
        }
        let Object(body) = parse::<Object<Body>>(body)?;
        let missing = |field: &str| ChatError::invalid(field, format!("{field} is missing"));
        let List(turns) = body.messages.ok_or_else(|| missing("messages"))?;
        let mut messages = Vec::with_capacity(turns.len());
        for (index, Object(turn)) in turns.into_iter().enumerate() {
            let field = format!("messages[{index}].role");
            let role = super::super::message::role(&field, turn.role.as_deref())?;
            messages.push(Message::text(role, turn.content.unwrap_or_default()));
        }
        let List(candidates) = body.candidates.ok_or_else(|| missing("candidates"))?;
        let deadline_ms = super::super::lenient::ranged::<u64>("deadline_ms", body.deadline_ms)?;
        Ok(ScoreBody {
            model: body.model.unwrap_or_default(),
            digest: body.digest.ok_or_else(|| missing("digest"))?,
            messages,
            candidates,
            deadline: deadline_ms.map(Duration::from_millis),
        })
    }
}

/// The answer of `/fusion/v1/score`.
pub fn score_reply(reply: &ScoreReply) -> Vec<u8> {
    #[derive(Serialize)]
    struct Body<'a> {
        logprobs: &'a [f64],
        tokens: &'a [u32],
        prompt_tokens: u32,
        cached_tokens: u32,
        digest: &'a str,
    }
    write(&Body {
        logprobs: &reply.logprobs,
        tokens: &reply.tokens,
        prompt_tokens: reply.prompt_tokens,
        cached_tokens: reply.cached_tokens,
        digest: &reply.digest,
    })
}

/// Reads the answer of another node's `/fusion/v1/score`; `None` if it is none for so many candidates.
pub fn read_score_reply(body: &[u8], candidates: usize) -> Option<ScoreReply> {
    #[derive(Deserialize)]
    struct Body {
        logprobs: Option<List<f64, { ScoreRequest::CANDIDATES_MAX }>>,
        tokens: Option<List<Int, { ScoreRequest::CANDIDATES_MAX }>>,
        prompt_tokens: Option<Int>,
        cached_tokens: Option<Int>,
        digest: Option<String>,
    }
    let Object(body) = serde_json::from_slice::<Object<Body>>(body).ok()?;
    let List(logprobs) = body.logprobs?;
    let List(tokens) = body.tokens?;
    let right = |value: &f64| value.is_finite() && *value <= 1e-6;
    if logprobs.len() != candidates || !logprobs.iter().all(right) {
        return None;
    }
    let small = |Int(n): Int| u32::try_from(n).unwrap_or(0);
    Some(ScoreReply {
        logprobs,
        tokens: tokens.into_iter().map(small).collect(),
        prompt_tokens: body.prompt_tokens.map_or(0, small),
        cached_tokens: body.cached_tokens.map_or(0, small),
        digest: body.digest.filter(|digest| digest.len() <= 128)?,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::chat::{ModelName, Origin, Priority, RequestId, Role};

    #[test]
    fn nodes_understand_each_other() {
        let report = NodeReport {
            node: "pi-a".to_owned(),
            boot_id: "01J".to_owned(),
            version: "0.1.0".to_owned(),
            models: vec![NodeModel {
                name: "scout".to_owned(),
                digest: "ab".repeat(32),
                context_tokens: 2048,
                parameters: 1 << 33,
                architecture: "llama4".to_owned(),
                quantization: "Q4_0".to_owned(),
            }],
            prefill_tokens_per_s: Some(25.5),
            headroom_bytes: Some(1 << 33),
            waiting: 2,
            draining: true,
            ..NodeReport::default()
        };
        assert_eq!(read_node_report(&node_report(&report)), Some(report));
        for bad in ["", "[]", "{}", "{\"node\":\"a\",\"boot_id\":\"b\"}", "{\"node\":5}"] {
            assert_eq!(read_node_report(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn scores_there_and_back() {
        let request = ScoreRequest {
            id: RequestId::random(),
            origin: Origin::Terminal,
            client: "test".into(),
            model: ModelName::new("m"),
            digest: None,
            messages: vec![Message::text(Role::User, "is it?")],
            candidates: vec!["Yes".to_owned(), "No".to_owned()],
            deadline: Instant::now(),
            priority: Priority::Normal,
        };
        let body = score_body(&request, "m", "d", Duration::from_millis(1500));
        let read = ScoreBody::parse(&body).expect("our own body");
        assert_eq!((read.messages, read.candidates), (request.messages, request.candidates));
        assert_eq!((read.digest.as_str(), read.deadline), ("d", Some(Duration::from_millis(1500))));
        let reply = ScoreReply {
            logprobs: vec![-0.25, -2.0],
            tokens: vec![1, 1],
            prompt_tokens: 9,
            cached_tokens: 4,
            digest: "d".to_owned(),
        };
        assert_eq!(read_score_reply(&score_reply(&reply), 2), Some(reply.clone()));
        assert_eq!(read_score_reply(&score_reply(&reply), 3), None, "one is missing");
        let impossible = ScoreReply { logprobs: vec![0.5, -1.0], ..reply };
        assert_eq!(read_score_reply(&score_reply(&impossible), 2), None, "no probability");
        for (body, names) in [("{}", "messages"), ("{\"messages\":[],\"candidates\":[]}", "digest")]
        {
            let error = ScoreBody::parse(body.as_bytes()).expect_err(body).to_string();
            assert!(error.contains(names), "{error}");
        }
    }
}
