//! Requests and what comes back.

use scoutd::chat::{ChatEvent, FinishReason, Priority};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

use super::House;
use super::client::Client;
use super::script::{delta, done};

const CHAT: &str = "scoutd/pi5/request/chat";
const CANCEL: &str = "scoutd/pi5/request/cancel";
const ANSWER: &str = "scoutd/pi5/response/test";

#[tokio::test]
async fn an_mqtt5_request_gets_one_answer_with_its_correlation_data() {
    let house = House::open().await;
    let mut client = Client::v5("test", house.port(), &["scoutd/pi5/response/#"]).await;
    let correlation = [0, 255, 7, 0, 200];
    client.request(CHAT, r#"{"prompt":"say Yes it is"}"#, ANSWER, &correlation).await;
    let message = client.next().await;
    assert_eq!(message.topic, ANSWER);
    assert_eq!(message.correlation.as_deref(), Some(&correlation[..]));
    assert_eq!(message.content_type.as_deref(), Some("application/json"));
    assert!(!message.retain);
    let answer = message.json();
    assert_eq!(answer["type"], "final");
    assert_eq!(answer["status"], "ok");
    assert_eq!(answer["id"], "00ff0700c8");
    assert_eq!(answer["data"]["text"], "Yes it is");
    assert_eq!(answer["data"]["finish_reason"], "stop");
    assert_eq!(answer["data"]["model"], "parrot");
    assert_eq!(answer["data"]["usage"]["completion_tokens"], 5);
    // Whoever answers counts the answer; the door counts only what it refuses itself.
    let counted = |reason| house.metrics.requests.with_label_values(&["mqtt", reason]).get();
    assert_eq!((counted("stop"), counted("invalid")), (0, 0));
    client.request(CHAT, "no JSON", ANSWER, &correlation).await;
    assert_eq!(client.next().await.json()["code"], "invalid");
    assert_eq!((counted("stop"), counted("invalid")), (0, 1));
}

#[tokio::test]
async fn a_311_request_is_paired_by_its_json() {
    let house = House::open().await;
    let mut client = Client::v311("test", house.port(), &["scoutd/pi5/response/#"]).await;
    let request = json!({
        "id": 42, "reply_to": ANSWER, "transaction": {"t": [1, "x"]},
        "messages": [{"role": "user", "content": "hello"}],
    });
    client.publish(CHAT, request.to_string()).await;
    let answer = client.final_on(ANSWER).await;
    assert_eq!(answer["id"], 42);
    assert_eq!(answer["transaction"], json!({"t": [1, "x"]}));
    assert_eq!(answer["data"]["text"], "hello");
    client.publish(CHAT, r#"{"prompt":"again"}"#).await;
    let answer = client.final_on("scoutd/pi5/response/chat").await;
    assert_eq!(answer["data"]["text"], "again");
    assert!(answer["id"].as_str().is_some_and(|id| !id.is_empty()));
}

#[tokio::test]
async fn a_stream_comes_in_numbered_chunks_and_a_whole_final() {
    let house = House::open().await;
    let mut client = Client::v5("test", house.port(), &[ANSWER]).await;
    client.request(CHAT, r#"{"id":"s1","prompt":"hold","stream":true}"#, ANSWER, b"c").await;
    let (_, sender) = house.script.held().await;
    let accepted = ChatEvent::Accepted {
        position: 2,
        predicted_first_token: Some(Duration::from_millis(4200)),
    };
    sender.send(Ok(accepted)).await.expect("the door reads");
    let expected =
        json!({"type": "accepted", "id": "s1", "position": 2, "predicted_ttft_ms": 4200});
    assert_eq!(client.next().await.json(), expected);
    let mut text = String::new();
    for (seq, word) in ["Yes", ", it", " is."].into_iter().enumerate() {
        sender.send(Ok(delta(word))).await.expect("the door reads");
        let chunk = client.next().await;
        assert_eq!(chunk.correlation.as_deref(), Some(&b"c"[..]));
        let chunk = chunk.json();
        assert_eq!((&chunk["type"], &chunk["seq"]), (&json!("chunk"), &json!(seq)));
        text.push_str(chunk["delta"].as_str().expect("a delta is text"));
    }
    sender.send(Ok(done(FinishReason::Length))).await.expect("the door reads");
    let last = client.next().await.json();
    assert_eq!(last["type"], "final");
    assert_eq!(last["chunks"], 3);
    assert_eq!(last["data"]["text"], json!(text));
    assert_eq!(last["data"]["finish_reason"], "length");
}

#[tokio::test]
async fn many_deltas_are_merged_into_few_chunks() {
    let house = House::open().await;
    let mut client = Client::v5("test", house.port(), &[ANSWER]).await;
    let words = "word ".repeat(500);
    let request = json!({"prompt": format!("say {words}"), "stream": true});
    let started = Instant::now();
    client.request(CHAT, request.to_string(), ANSWER, b"c").await;
    let mut chunks = 0;
    let last = loop {
        let json = client.next().await.json();
        match json["type"].as_str() {
            Some("chunk") => chunks += 1,
            Some("final") => break json,
            _ => {}
        }
    };
    let periods = started.elapsed().as_millis() as usize / 200;
    assert!(chunks <= periods + 2, "{chunks} chunks in {periods} periods");
    assert_eq!(last["data"]["text"].as_str().map(str::len), Some(words.len()));
}

#[tokio::test]
async fn a_cancel_stops_the_backend_and_says_what_it_found() {
    let house = House::open().await;
    let mut client = Client::v311("test", house.port(), &["scoutd/pi5/response/#"]).await;
    let request = json!({"id": "a1", "reply_to": ANSWER, "prompt": "hold"});
    client.publish(CHAT, request.to_string()).await;
    let (_, sender) = house.script.held().await;
    sender.send(Ok(delta("half"))).await.expect("the door reads");
    client.publish(CANCEL, r#"{"id":"a1"}"#).await;
    sender.closed().await;
    // Two topics, so either may come first.
    let (mut result, mut cancelled) = (Value::Null, Value::Null);
    while result.is_null() || cancelled.is_null() {
        let message = client.next().await;
        match message.topic.as_str() {
            ANSWER => cancelled = message.json(),
            _ => result = message.json(),
        }
    }
    assert_eq!(result["data"]["result"], "cancelled");
    assert_eq!(cancelled["status"], "error");
    assert_eq!(cancelled["code"], "cancelled");
    assert_eq!(cancelled["data"]["text"], "half");
    for (id, expected) in [("a1", "finished"), ("other", "unknown")] {
        client.publish(CANCEL, json!({"id": id}).to_string()).await;
        let result = client.final_on("scoutd/pi5/response/cancel").await;
        assert_eq!(result["data"]["result"], expected, "{id}");
    }
}

#[tokio::test]
async fn bad_payloads_are_answered_and_name_what_is_wrong() {
    let house = House::open().await;
    let mut client = Client::v5("test", house.port(), &["scoutd/pi5/response/#"]).await;
    let large = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(300 << 10));
    let cases = [
        ("nope", "payload is not JSON"),
        ("[]", "payload must be a JSON object"),
        ("{}", "messages"),
        (r#"{"messages":[]}"#, "messages"),
        (r#"{"messages":"hi"}"#, "messages"),
        (r#"{"messages":[{"role":"king","content":"x"}]}"#, "role"),
        (r#"{"prompt":7}"#, "prompt"),
        (r#"{"prompt":"x","stream":"yes"}"#, "stream"),
        (r#"{"prompt":"x","max_tokens":0}"#, "max_tokens"),
        (r#"{"prompt":"x","temperature":"hot"}"#, "temperature"),
        (r#"{"prompt":"x","temperature":-1}"#, "temperature"),
        (r#"{"prompt":"x","n":2}"#, "n must be 1"),
        (r#"{"prompt":"x","deadline_ms":-5}"#, "deadline_ms"),
        (r#"{"prompt":"x","id":"a b"}"#, "id must be"),
        (r#"{"prompt":"x","top_k":1e308}"#, "top_k"),
        (&large, "payload of"),
    ];
    for (payload, named) in cases {
        client.request(CHAT, payload, ANSWER, b"corr").await;
        let message = client.on(ANSWER).await;
        assert_eq!(message.correlation.as_deref(), Some(&b"corr"[..]));
        let answer = message.json();
        let shown = &payload[..payload.len().min(80)];
        assert_eq!(answer["code"], "invalid", "{shown}: {answer}");
        let error = answer["error"].as_str().expect("an error has a message");
        assert!(error.contains(named), "{shown}: {error}");
    }
    assert_eq!(house.script.asked(), 0);
    // What reaches a backend is counted there.
    let counted = house.metrics.requests.with_label_values(&["mqtt", "invalid"]).get();
    assert_eq!(counted, cases.len() as u64);
    client.request(CHAT, r#"{"prompt":"still here"}"#, ANSWER, b"corr").await;
    assert_eq!(client.final_on(ANSWER).await["data"]["text"], "still here");
}

#[tokio::test]
async fn refusals_carry_code_and_when_to_retry() {
    let house = House::open().await;
    let mut client = Client::v5("test", house.port(), &["scoutd/pi5/response/#"]).await;
    client.request(CHAT, r#"{"id":"r","prompt":"refuse"}"#, ANSWER, b"c").await;
    let expected = json!({
        "type": "final", "id": "r", "status": "error", "code": "queue_full",
        "error": "queue full", "retry_after_ms": 8000, "data": {},
    });
    assert_eq!(client.final_on(ANSWER).await, expected);
    client.request(CHAT, r#"{"prompt":"x","model":"no-such"}"#, ANSWER, b"c").await;
    let answer = client.final_on(ANSWER).await;
    assert_eq!(answer["code"], "unknown_model");
    let counted = house.metrics.requests.with_label_values(&["mqtt", "unknown_model"]).get();
    assert_eq!(counted, 1);
    assert!(answer["error"].as_str().is_some_and(|error| error.contains("no-such")));
    client.request("scoutd/pi5/request/dance", "{}", ANSWER, b"c").await;
    assert_eq!(client.final_on(ANSWER).await["code"], "invalid");
}

#[tokio::test]
async fn answers_go_only_where_clients_may_have_them() {
    let house = House::open().await;
    let mut client = Client::v5("test", house.port(), &["#"]).await;
    for topic in ["homeassistant/status", "scoutd/pi5/ask/set", "scoutd/other/response/x", "x/y"] {
        client.request(CHAT, r#"{"prompt":"secret"}"#, topic, b"c").await;
        let answer = client.final_on("scoutd/pi5/response/chat").await;
        assert_eq!(answer["code"], "invalid");
        assert!(answer["error"].as_str().is_some_and(|error| error.contains(topic)), "{answer}");
    }
    assert_eq!(house.script.asked(), 0);
}

#[tokio::test]
async fn a_redelivered_id_runs_once_and_is_answered_again() {
    let house = House::open().await;
    let mut client = Client::v5("test", house.port(), &[ANSWER]).await;
    let payload = r#"{"id":"once","prompt":"hold"}"#;
    client.request(CHAT, payload, ANSWER, b"c").await;
    let (_, sender) = house.script.held().await;
    client.request(CHAT, payload, ANSWER, b"c").await;
    client.request(CHAT, r#"{"id":"once","prompt":"other"}"#, ANSWER, b"c").await;
    let clash = client.final_on(ANSWER).await;
    assert_eq!(clash["code"], "invalid");
    assert!(clash["error"].as_str().is_some_and(|error| error.contains("once")), "{clash}");
    sender.send(Ok(delta("first"))).await.expect("the door reads");
    sender.send(Ok(done(FinishReason::Stop))).await.expect("the door reads");
    let first = client.final_on(ANSWER).await;
    assert_eq!(first["data"]["text"], "first");
    client.request(CHAT, payload, ANSWER, b"c").await;
    assert_eq!(client.final_on(ANSWER).await, first);
    assert_eq!(house.script.asked(), 1);
    client.request(CHAT, r#"{"id":"once","prompt":"say anew"}"#, ANSWER, b"c").await;
    assert_eq!(client.final_on(ANSWER).await["data"]["text"], "anew");
}

#[tokio::test]
async fn deadline_and_priority_reach_the_backend() {
    let house = House::open().await;
    let client = Client::v5("kitchen", house.port(), &[]).await;
    let payload = r#"{"prompt":"hold","deadline_ms":60000,"priority":"high","max_tokens":7}"#;
    let before = Instant::now();
    client.request(CHAT, payload, ANSWER, b"c").await;
    let (request, _sender) = house.script.held().await;
    let parts = request.parts();
    assert_eq!(parts.priority, Priority::High);
    assert_eq!(parts.max_tokens, Some(7));
    assert_eq!(&*parts.client, "mqtt:kitchen");
    assert_eq!(parts.id.as_str(), "63");
    let wait = parts.deadline - before;
    assert!((60..90).contains(&wait.as_secs()), "{wait:?}");
}

#[tokio::test]
async fn a_backend_that_ignores_the_deadline_is_cut_off_with_what_it_said() {
    let house = House::open().await;
    let mut client = Client::v5("test", house.port(), &[ANSWER]).await;
    client.request(CHAT, r#"{"prompt":"hold","deadline_ms":1}"#, ANSWER, b"c").await;
    let (_, sender) = house.script.held().await;
    sender.send(Ok(delta("so far"))).await.expect("the door reads");
    let answer = client.final_on(ANSWER).await;
    assert_eq!(answer["status"], "ok");
    assert_eq!(answer["data"]["finish_reason"], "deadline");
    assert_eq!(answer["data"]["text"], "so far");
    sender.closed().await;
}

#[tokio::test]
async fn a_backend_that_breaks_off_tells_clients_nothing_of_our_insides() {
    let house = House::open().await;
    let mut client = Client::v5("test", house.port(), &[ANSWER]).await;
    client.request(CHAT, r#"{"prompt":"hold"}"#, ANSWER, b"c").await;
    let (_, sender) = house.script.held().await;
    drop(sender);
    let answer = client.final_on(ANSWER).await;
    assert_eq!(answer["code"], "internal");
    assert_eq!(answer["error"], "internal error");
}

#[tokio::test]
async fn an_answer_beyond_the_brokers_packets_says_that_it_was_cut() {
    let house = House::open().await;
    let mut client = Client::v5("test", house.port(), &[ANSWER]).await;
    client.request(CHAT, r#"{"prompt":"hold"}"#, ANSWER, b"c").await;
    let (_, sender) = house.script.held().await;
    let large = "x".repeat(600 << 10);
    for _ in 0..2 {
        sender.send(Ok(delta(&large))).await.expect("the door reads");
    }
    sender.send(Ok(done(FinishReason::Stop))).await.expect("the door reads");
    let answer = client.final_on(ANSWER).await;
    assert_eq!(answer["status"], "ok");
    assert_eq!(answer["truncated"], true);
    assert_eq!(answer["data"]["text"], "");
}

#[tokio::test]
async fn models_and_status_are_answered() {
    let house = House::open().await;
    let mut client = Client::v5("test", house.port(), &["scoutd/pi5/response/#"]).await;
    client.publish("scoutd/pi5/request/models", "{}").await;
    let models = client.final_on("scoutd/pi5/response/models").await;
    assert_eq!(models["data"]["models"][0]["name"], "parrot");
    assert_eq!(models["data"]["models"][0]["default"], true);
    house.metrics.headroom_bytes.set(123_456_789.0);
    client.request("scoutd/pi5/request/status", r#"{"id":"s"}"#, ANSWER, b"c").await;
    let status = client.final_on(ANSWER).await;
    assert_eq!(status["id"], "s");
    assert_eq!(status["data"]["headroom_bytes"], 123_456_789);
    assert_eq!(status["data"]["state"], "idle");
}

#[tokio::test]
async fn plain_questions_are_answered_on_last() {
    let house = House::open().await;
    let topics = ["scoutd/pi5/last", "scoutd/pi5/completion", "scoutd/pi5/prompt"];
    let mut client = Client::v311("test", house.port(), &topics).await;
    client.publish("scoutd/pi5/ask/set", "Is the window open?").await;
    let last = client.on("scoutd/pi5/last").await;
    assert!(!last.retain);
    let last = last.json();
    assert_eq!(last["summary"], "Is the window open?");
    assert_eq!(last["text"], "Is the window open?");
    assert_eq!(last["status"], "ok");
    let event = client.on("scoutd/pi5/completion").await.json();
    assert_eq!(event["event_type"], "done");
    client.publish("scoutd/pi5/prompt/set", "refuse").await;
    assert_eq!(client.on("scoutd/pi5/prompt").await.text(), "refuse");
    let last = client.on("scoutd/pi5/last").await.json();
    assert_eq!(last["status"], "error");
    assert_eq!(last["code"], "queue_full");
    assert_eq!(client.on("scoutd/pi5/completion").await.json()["event_type"], "refused");
}

#[tokio::test]
async fn settings_shape_plain_questions_and_are_echoed_in_state() {
    let house = House::open().await;
    let mut client = Client::v311("test", house.port(), &["scoutd/pi5/state"]).await;
    client.publish("scoutd/pi5/temperature/set", "0.5").await;
    client.publish("scoutd/pi5/max_tokens/set", "12").await;
    client.publish("scoutd/pi5/temperature/set", "hot").await;
    client.publish("scoutd/pi5/model/set", "no-such").await;
    client.publish("scoutd/pi5/ask/set", "hold").await;
    let (request, sender) = house.script.held().await;
    assert_eq!(request.parts().max_tokens, Some(12));
    assert_eq!(request.parts().sampling.temperature, 0.5);
    loop {
        let state = client.on("scoutd/pi5/state").await.json();
        if state["ask_temperature"] == 0.5 && state["state"] == "generating" {
            assert_eq!(state["ask_max_tokens"], 12);
            assert_eq!(state["model"], "parrot");
            break;
        }
    }
    client.publish("scoutd/pi5/cancel/set", "PRESS").await;
    sender.closed().await;
}
