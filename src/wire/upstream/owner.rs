//! What the pool's owner says and is told.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::json::{parse, write};
use super::super::lenient::{Int, List, Object, ranged};
use crate::chat::ChatError;

/// A member that the owner adds: the body of `POST /fusion/v1/members`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemberBody {
    /// Its name.
    pub name: String,
    /// What it speaks.
    pub kind: String,
    /// Where it is.
    pub url: String,
    /// The model to ask.
    pub model: Option<String>,
    /// Requests at once.
    pub max_in_flight: Option<u16>,
    /// Its strength in the owner's opinion.
    pub tier: Option<String>,
}

impl MemberBody {
    /// Reads a body. Unknown keys are refused, and keys cannot be set over HTTP: whoever could name a file could
    /// have it sent anywhere.
    ///
    /// # Errors
    /// `Invalid`, naming the field.
    pub fn parse(body: &[u8]) -> Result<MemberBody, ChatError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Body {
            name: Option<String>,
            kind: Option<String>,
            url: Option<String>,
            model: Option<String>,
            max_in_flight: Option<Int>,
            tier: Option<String>,
        }
        let Object(body) = parse::<Object<Body>>(body)?;
        let needed = |field: &str, value: Option<String>| {
            value.ok_or_else(|| ChatError::invalid(field, format!("{field} is missing")))
        };
        Ok(MemberBody {
            name: needed("name", body.name)?,
            kind: needed("kind", body.kind)?,
            url: needed("url", body.url)?,
            model: body.model,
            max_in_flight: ranged("max_in_flight", body.max_in_flight)?,
            tier: body.tier,
        })
    }

    /// The body that says this.
    pub fn write(&self) -> Vec<u8> {
        let mut body = serde_json::json!({ "name": self.name, "kind": self.kind, "url": self.url });
        if let Some(model) = &self.model {
            body["model"] = model.as_str().into();
        }
        if let Some(max) = self.max_in_flight {
            body["max_in_flight"] = max.into();
        }
        if let Some(tier) = &self.tier {
            body["tier"] = tier.as_str().into();
        }
        write(&body)
    }
}

/// The pool as its owner sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PoolReport {
    /// The pool's name.
    pub pool: String,
    /// Whether a pool key is set: without one no other scoutd is trusted, and none trusts us.
    pub key: bool,
    /// The key's fingerprint, to compare nodes.
    pub key_fingerprint: Option<String>,
    /// Whether members outside the LAN may be used at all.
    pub allow_wan: bool,
    /// Everybody who may be asked, the local model first.
    pub members: Vec<PeerReport>,
    /// Announced, but not asked: add them to ask them.
    pub candidates: Vec<CandidateReport>,
}

/// A member as its owner sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PeerReport {
    /// `name/model`.
    pub id: String,
    /// `local`, `scoutd`, `ollama`, …
    pub kind: String,
    /// `local`, `lan`, `wan`.
    pub scope: String,
    /// Where it is.
    pub url: Option<String>,
    /// `candidate`, `healthy`, `open`, `left`.
    pub state: String,
    /// Why it is not healthy, or the last fault.
    pub reason: Option<String>,
    /// Its strength in the owner's opinion.
    pub tier: Option<String>,
    /// How it scores: `exact`, `top_k`, `none`.
    pub score: String,
    /// Requests of ours under way there.
    pub in_flight: u32,
    /// Requests of ours it gets at once; `None` is no bound.
    pub max_in_flight: Option<u16>,
    /// As measured from here.
    pub prefill_tokens_per_s: Option<f64>,
    /// As measured from here.
    pub decode_tokens_per_s: Option<f64>,
    /// Names its model file, where it tells.
    pub digest: Option<String>,
    /// Milliseconds since it was last heard of.
    pub seen_ms: Option<u64>,
}

/// Somebody announced.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CandidateReport {
    /// The name it gives itself.
    pub name: String,
    /// Where it says it is.
    pub url: String,
    /// The pool it says it belongs to.
    pub pool: String,
    /// `mdns` or `mqtt`.
    pub source: String,
    /// Why it is not a member.
    pub reason: String,
}

/// The answer of `/fusion/v1/pool` and `/fusion/v1/members`.
pub fn pool_report(report: &PoolReport) -> Vec<u8> {
    write(report)
}

/// Reads the answer of another daemon's `/fusion/v1/pool`; `None` if it is none.
pub fn read_pool_report(body: &[u8]) -> Option<PoolReport> {
    serde_json::from_slice(body).ok()
}

/// The message of an error that a daemon answered.
pub fn read_error(body: &[u8]) -> Option<String> {
    let body: serde_json::Value = serde_json::from_slice(body).ok()?;
    Some(body.get("error")?.get("message")?.as_str()?.to_owned())
}

/// Questions of known truth: the body of `POST /fusion/v1/calibrate`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CalibrationBody {
    /// How many questions of arithmetic, if there is no list.
    pub items: u32,
    /// The owner's questions with their answers.
    pub list: Vec<(String, String)>,
    /// What the answers are: `text`, `number`, `json`.
    pub form: String,
    /// Time for each.
    pub patience: Duration,
}

/// Questions of one calibration: each costs every member an answer.
const ITEMS_MAX: usize = 1000;

impl CalibrationBody {
    /// Reads a body.
    ///
    /// # Errors
    /// `Invalid`, naming the field.
    pub fn parse(body: &[u8]) -> Result<CalibrationBody, ChatError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Body {
            items: Option<Int>,
            list: Option<List<(String, String), ITEMS_MAX>>,
            form: Option<String>,
            patience_ms: Option<Int>,
        }
        let Object(body) = parse::<Object<Body>>(body)?;
        let items = ranged("items", body.items)?.unwrap_or(40);
        if !(1..=ITEMS_MAX as u32).contains(&items) {
            return Err(ChatError::invalid("items", format!("items must be 1 to {ITEMS_MAX}")));
        }
        let List(list) = body.list.unwrap_or(List(Vec::new()));
        let patience_ms = ranged::<u64>("patience_ms", body.patience_ms)?.unwrap_or(60_000);
        Ok(CalibrationBody {
            items,
            list,
            form: body.form.unwrap_or_else(|| "number".to_owned()),
            patience: Duration::from_millis(patience_ms.clamp(100, 600_000)),
        })
    }

    /// The body that says this.
    pub fn write(&self) -> Vec<u8> {
        write(&serde_json::json!({
            "items": self.items,
            "list": self.list,
            "form": self.form,
            "patience_ms": u64::try_from(self.patience.as_millis()).unwrap_or(u64::MAX),
        }))
    }
}

/// How often a model was right.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CalibrationLine {
    /// Its digest, or the member's id.
    pub model: String,
    /// The kind of answers.
    pub form: String,
    /// Right ones.
    pub right: u32,
    /// All.
    pub asked: u32,
}

/// The answer of `/fusion/v1/calibrate`.
pub fn calibration_report(lines: &[CalibrationLine]) -> Vec<u8> {
    write(&lines)
}

/// Reads it; `None` if it is none.
pub fn read_calibration_report(body: &[u8]) -> Option<Vec<CalibrationLine>> {
    serde_json::from_slice(body).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_to_add() {
        let member = MemberBody {
            name: "hub".to_owned(),
            kind: "ollama".to_owned(),
            url: "http://hub.lan:11434".to_owned(),
            model: Some("llama3.2:3b".to_owned()),
            max_in_flight: Some(2),
            tier: None,
        };
        assert_eq!(MemberBody::parse(&member.write()), Ok(member));
        for (body, names) in [
            (r#"{"name":"a","kind":"openai"}"#, "url is missing"),
            (
                r#"{"name":"a","kind":"openai","url":"http://a","key_file":"/etc/shadow"}"#,
                "key_file",
            ),
            (r#"{"name":"a","kind":"openai","url":"http://a","tier":300}"#, "tier"),
        ] {
            let error = MemberBody::parse(body.as_bytes()).expect_err(body).to_string();
            assert!(error.contains(names), "{error}");
        }
    }

    #[test]
    fn calibrations() {
        let asked = CalibrationBody {
            items: 7,
            list: vec![("1+1".to_owned(), "2".to_owned())],
            form: "number".to_owned(),
            patience: Duration::from_secs(5),
        };
        assert_eq!(CalibrationBody::parse(&asked.write()), Ok(asked));
        for (body, names) in
            [("{\"items\":0}", "items"), ("{\"seed\":1}", "seed"), ("{\"list\":[[1,2]]}", "list")]
        {
            let error = CalibrationBody::parse(body.as_bytes()).expect_err(body).to_string();
            assert!(error.contains(names), "{error}");
        }
    }

    #[test]
    fn reports_read_back() {
        let report = PoolReport {
            pool: "house".to_owned(),
            members: vec![PeerReport { id: "a/b".to_owned(), ..PeerReport::default() }],
            candidates: vec![CandidateReport::default()],
            ..PoolReport::default()
        };
        assert_eq!(read_pool_report(&pool_report(&report)), Some(report));
        let error = br#"{"error":{"message":"no"}}"#;
        assert_eq!(read_error(error).as_deref(), Some("no"));
    }
}
