//! The pool's line: a request is taken by one node, who says so, and another takes it if that node is lost.

use std::collections::BTreeMap;
use std::sync::Arc;

use scoutd::metrics::Metrics;
use scoutd::mqtt::{PoolLine, Secrets};
use scoutd::peer::{Pool, PoolParts};
use serde_json::json;

use super::client::Client;
use super::{House, embedded, guest};

const CHAT: &str = "scoutd/pool/default/request/chat";

fn line() -> Option<PoolLine> {
    let parts = PoolParts {
        node: "here".to_owned(),
        state: None,
        runtime: tokio::runtime::Handle::current(),
        metrics: Arc::new(Metrics::new()),
    };
    let pool = Pool::new(scoutd::peer::Config::default(), parts).expect("a valid pool");
    Some(PoolLine { pool, at_once: 1, url: None })
}

/// Two nodes on the broker of the first, and a client that hears everything of the pool.
async fn pool() -> (House, House, Client) {
    let first = House::with_line(embedded(), Secrets::default(), line()).await.expect("it opens");
    let port = first.port();
    let mut client = Client::v5("test", port, &["scoutd/pool/default/#"]).await;
    let second =
        House::with_line(guest(port, "pi6"), Secrets::default(), line()).await.expect("it opens");
    let mut online = Vec::new();
    while online.len() < 2 {
        let message = client.next().await;
        if message.topic.ends_with("/capacity") && !online.contains(&message.topic) {
            online.push(message.topic);
        }
    }
    (first, second, client)
}

#[tokio::test]
async fn each_request_is_taken_by_one_node_and_both_work() {
    let (_first, _second, mut client) = pool().await;
    for index in 0..6 {
        let body = json!({"id": format!("r{index}"), "prompt": format!("say {index}")});
        client.publish(CHAT, body.to_string()).await;
    }
    let (mut claims, mut finals) = (BTreeMap::new(), BTreeMap::new());
    while finals.len() < 6 {
        let message = client.next().await;
        if !message.topic.starts_with("scoutd/pool/default/response/") {
            continue;
        }
        let said = message.json();
        let id = said["id"].as_str().expect("an id").to_owned();
        assert_eq!(message.topic, format!("scoutd/pool/default/response/{id}"));
        if said["type"] == "accepted" {
            assert!(said["lease_ms"].as_u64().is_some_and(|ms| ms > 0), "{said}");
            let node = said["node"].as_str().expect("a node").to_owned();
            assert_eq!(claims.insert(id, node), None, "claimed twice");
        } else {
            assert_eq!(said["status"], "ok", "{said}");
            assert!(claims.contains_key(&id), "answered before it was claimed");
            assert_eq!(finals.insert(id, said), None, "answered twice");
        }
    }
    let nodes: std::collections::BTreeSet<&String> = claims.values().collect();
    assert_eq!(nodes.len(), 2, "one node took everything: {claims:?}");
}

#[tokio::test]
async fn after_the_loss_of_a_node_the_same_id_is_answered_by_the_other() {
    let (first, second, mut client) = pool().await;
    second.door.stop().await;
    loop {
        let message = client.next().await;
        if message.topic == "scoutd/pool/default/member/pi6/status" && message.text() == "offline" {
            break;
        }
    }
    client.publish(CHAT, r#"{"id":"again","prompt":"say it"}"#).await;
    let answer = client.final_on("scoutd/pool/default/response/again").await;
    assert_eq!((&answer["status"], &answer["data"]["text"]), (&json!("ok"), &json!("it")));
    // The asker had sent it twice: whoever answered repeats the answer and computes nothing.
    client.publish(CHAT, r#"{"id":"again","prompt":"say it"}"#).await;
    let repeated = client.final_on("scoutd/pool/default/response/again").await;
    assert_eq!(repeated, answer);
    drop(first);
}
