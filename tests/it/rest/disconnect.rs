//! A client that goes away frees what works for it, at once.

use std::net::Shutdown;
use std::sync::mpsc::Receiver;

use scoutd::chat::{ChatEvent, ChatSender, FinishReason};
use scoutd::rest::Config;

use crate::doubles::{Held, delta, done};
use crate::http::{PATIENCE, Server};

const STREAM: &str = r#"{"stream":true,"messages":[{"role":"user","content":"x"}]}"#;
const WHOLE: &str = r#"{"stream":false,"messages":[{"role":"user","content":"x"}]}"#;

/// Waits until nobody reads the stream of `sender` any more.
fn freed(server: &Server, sender: &ChatSender) {
    let closed = async { tokio::time::timeout(PATIENCE, sender.closed()).await };
    server.runtime.block_on(closed).expect("the stream is dropped");
}

fn next(arrivals: &Receiver<ChatSender>) -> ChatSender {
    arrivals.recv_timeout(PATIENCE).expect("the request arrives")
}

#[test]
fn in_every_state_and_every_way() {
    let (backend, arrivals) = Held::new();
    let server = Server::start(backend);
    for path in ["/v1/chat/completions", "/api/chat"] {
        for body in [STREAM, WHOLE] {
            for begun in [false, true] {
                for way in [Shutdown::Both, Shutdown::Write] {
                    let mut client = server.connect();
                    client.send("POST", path, &[], body.as_bytes());
                    let sender = next(&arrivals);
                    if begun {
                        sender.blocking_send(Ok(delta("so"))).expect("somebody reads");
                        if body == STREAM {
                            assert_eq!(client.head().status, 200);
                            client.chunk().expect("the first piece");
                        }
                    }
                    assert!(!sender.is_closed());
                    client.stream.get_ref().shutdown(way).expect("a socket");
                    freed(&server, &sender);
                }
            }
        }
    }
}

#[test]
fn a_client_that_reads_nothing_is_cut_off() {
    let (backend, arrivals) = Held::new();
    let mut config = Config::default();
    config.limits.stalled_ms = 300;
    let server = Server::start_with(backend, config, "");
    let mut client = server.connect();
    client.send("POST", "/v1/chat/completions", &[], STREAM.as_bytes());
    let sender = next(&arrivals);
    let text = "x".repeat(16 * 1024);
    let mut sent = 0;
    let flood = async {
        while sender.send(Ok(delta(&text))).await.is_ok() {
            sent += text.len();
        }
    };
    let ended = server.runtime.block_on(async { tokio::time::timeout(PATIENCE, flood).await });
    ended.expect("the stream is dropped");
    assert!(sent < 16 << 20, "{sent} bytes were buffered for nobody");
    drop(client);
}

#[test]
fn listings_do_not_wait_behind_answers() {
    let (backend, arrivals) = Held::new();
    let mut config = Config::default();
    config.limits.connections_per_client = 200;
    let server = Server::start_with(backend, config, "");
    let mut clients = Vec::new();
    for index in 0..60 {
        let mut client = server.connect();
        let body = if index % 2 == 0 { STREAM } else { WHOLE };
        client.send("POST", "/api/chat", &[], body.as_bytes());
        clients.push((client, next(&arrivals)));
    }
    for path in ["/api/tags", "/v1/models", "/health", "/readyz", "/metrics", "/api/ps"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    for (client, sender) in &mut clients {
        let accepted = ChatEvent::Accepted { position: 3, predicted_first_token: None };
        sender.blocking_send(Ok(accepted)).expect("somebody reads");
        assert!(!client.stream.buffer().contains(&b'x'));
    }
}

#[test]
fn a_retry_takes_the_place_of_the_first_try() {
    let (backend, arrivals) = Held::new();
    let server = Server::start(backend);
    for body in [STREAM, WHOLE] {
        let ask = |headers: &[&str], body: &str| {
            let mut client = server.connect();
            client.send("POST", "/v1/chat/completions", headers, body.as_bytes());
            (client, next(&arrivals))
        };
        let (mut first_client, first) = ask(&["x-stainless-retry-count: 0"], body);
        let (_twin_client, twin) = ask(&[], body);
        assert!(!first.is_closed(), "the same question twice is two questions");
        let other_body = body.replace('x', "y");
        let (_other_client, other) = ask(&["x-stainless-retry-count: 1"], &other_body);
        let (_retry_client, retry) = ask(&["x-stainless-retry-count: 1"], body);
        freed(&server, &twin);
        assert!(!other.is_closed() && !retry.is_closed() && !first.is_closed());
        first.blocking_send(Ok(delta("still here"))).expect("somebody reads");
        first.blocking_send(Ok(done(FinishReason::Stop))).expect("somebody reads");
        assert_eq!(first_client.response("POST").status, 200);
    }
}
