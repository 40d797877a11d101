//! What a node says on the pool's topics of a broker.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::json::write;
use super::super::lenient::Object;
use super::super::mqtt::Echo;

/// A request was taken from the pool's line.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    /// Who took it.
    pub node: &'a str,
    /// Whoever asked may send it anew after this.
    pub lease: Duration,
}

/// What a node can do now.
#[derive(Clone, Debug, Serialize)]
pub struct Capacity<'a> {
    /// Its name.
    pub node: &'a str,
    /// Where it is reached over HTTP.
    pub url: Option<&'a str>,
    /// Its models.
    pub models: Vec<String>,
    /// Prompt tokens per second.
    pub prefill_tokens_per_s: Option<f64>,
    /// Tokens per second of one answer.
    pub decode_tokens_per_s: Option<f64>,
    /// Memory that may still be promised.
    pub headroom_bytes: u64,
    /// Requests being answered.
    pub running: u32,
    /// Requests in line.
    pub waiting: u32,
}

/// Says who took a request, and for how long to believe it.
pub fn claimed(echo: &Echo, claim: &Claim<'_>) -> Vec<u8> {
    #[derive(Serialize)]
    struct Body<'a> {
        r#type: &'static str,
        id: &'a Value,
        #[serde(skip_serializing_if = "Option::is_none")]
        transaction: Option<&'a Value>,
        node: &'a str,
        lease_ms: u64,
    }
    write(&Body {
        r#type: "accepted",
        id: &echo.id,
        transaction: echo.transaction.as_ref(),
        node: claim.node,
        lease_ms: u64::try_from(claim.lease.as_millis()).unwrap_or(u64::MAX),
    })
}

/// A node's capacity.
pub fn capacity(capacity: &Capacity<'_>) -> Vec<u8> {
    write(capacity)
}

/// Where a node that told its capacity says that it is; nothing else of it is believed.
pub fn read_capacity_url(payload: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Body {
        url: Option<String>,
    }
    let Object(body) = serde_json::from_slice::<Object<Body>>(payload).ok()?;
    body.url.filter(|url| url.len() <= 256)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacities_tell_where_a_node_is() {
        let told = |url| {
            capacity(&Capacity {
                node: "pi-b",
                url,
                models: vec!["scout".to_owned()],
                prefill_tokens_per_s: Some(25.0),
                decode_tokens_per_s: None,
                headroom_bytes: 1,
                running: 0,
                waiting: 0,
            })
        };
        let url = "http://192.168.1.12:11434";
        assert_eq!(read_capacity_url(&told(Some(url))).as_deref(), Some(url));
        assert_eq!(read_capacity_url(&told(None)), None);
        assert_eq!(read_capacity_url(b"[]"), None);
    }
}
