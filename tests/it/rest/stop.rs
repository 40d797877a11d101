//! Stopping: running answers may end, then they must.

use std::time::{Duration, Instant};

use scoutd::chat::FinishReason;

use crate::doubles::{Held, delta, done};
use crate::http::{PATIENCE, Server};

const STREAM: &str = r#"{"stream":true,"messages":[{"role":"user","content":"x"}]}"#;

#[test]
fn running_answers_are_waited_for() {
    let (backend, arrivals) = Held::new();
    let server = Server::start(backend);
    let mut client = server.connect();
    client.send("POST", "/v1/chat/completions", &[], STREAM.as_bytes());
    let sender = arrivals.recv_timeout(PATIENCE).expect("the request");
    sender.blocking_send(Ok(delta("a"))).expect("read");
    assert_eq!(client.head().status, 200);
    client.chunk().expect("the first piece");
    let handle = server.handle.clone();
    let stopping = server.runtime.spawn(async move { handle.stop(PATIENCE).await });
    while !server.readiness.is_draining() {
        std::thread::yield_now();
    }
    sender.blocking_send(Ok(delta("b"))).expect("still read");
    sender.blocking_send(Ok(done(FinishReason::Stop))).expect("still read");
    let mut rest = Vec::new();
    while let Some(mut chunk) = client.chunk() {
        rest.append(&mut chunk);
    }
    assert!(String::from_utf8_lossy(&rest).ends_with("data: [DONE]\n\n"));
    server.runtime.block_on(stopping).expect("it stops");
}

#[test]
fn streams_that_do_not_end_are_ended() {
    let (backend, arrivals) = Held::new();
    let server = Server::start(backend);
    let mut idle = server.connect();
    idle.send("GET", "/healthz", &[], b"");
    assert_eq!(idle.response("GET").status, 200);
    let mut client = server.connect();
    client.send("POST", "/api/chat", &[], STREAM.as_bytes());
    let sender = arrivals.recv_timeout(PATIENCE).expect("the request");
    sender.blocking_send(Ok(delta("a"))).expect("read");
    let began = Instant::now();
    server.runtime.block_on(server.handle.stop(Duration::ZERO));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let response = client.response("POST");
    let last = response.lines().pop().expect("a line");
    assert_eq!(last["error"], "shutting down");
    assert!(sender.is_closed());
}

#[test]
fn new_requests_are_refused_while_draining() {
    let (backend, _arrivals) = Held::new();
    let server = Server::start(backend);
    server.readiness.set_draining();
    let response = server.post("/v1/chat/completions", STREAM);
    assert_eq!((response.status, response.header("retry-after")), (503, Some("5")));
    assert_eq!(server.get("/readyz").status, 503);
    assert_eq!(server.get("/healthz").status, 200);
}
