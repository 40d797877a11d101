//! Every way in which a member can fail, with its own reason each time, and nothing left behind.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketType};
use scoutd::chat::{Backend, ChatError, ChatEvent, FaultReason, FinishReason};
use scoutd::peer::{Kind, Standing};

use super::{Home, answers, chunk, events, read_request, request, serve};
use crate::http::PATIENCE;

const SHORT: Duration = Duration::from_millis(600);
const LONG: Duration = Duration::from_secs(10);

fn plain(status: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

fn whole(text: &str) -> String {
    let said = chunk(&format!("{{\"content\":{}}}", serde_json::json!(text)), "null");
    events(&[&said, &chunk("{}", "\"stop\""), "[DONE]"])
}

/// The member at `address` fails for `reason`, and our side is clean afterwards.
fn check(kind: Kind, address: SocketAddr, patience: Duration, reason: FaultReason) {
    let home = Home::with(kind, address);
    let began = Instant::now();
    assert_eq!(home.fault(patience), reason);
    assert!(began.elapsed() < patience + Duration::from_millis(50), "{reason}: too late");
    assert!(home.is_idle(), "{reason}: something still runs");
    let counted = home.metrics.peer_faults.with_label_values(&["there", reason.as_str()]);
    assert_eq!(counted.get(), 1);
}

#[test]
fn nobody_listens() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    drop(listener);
    check(Kind::OpenAi, address, LONG, FaultReason::ConnectRefused);
}

#[test]
fn a_black_hole() {
    // A listener whose queue is full drops what comes, as a machine that was switched off does.
    let socket =
        rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    let any: SocketAddr = "127.0.0.1:0".parse().expect("an address");
    rustix::net::bind(&socket, &any).expect("a free port");
    rustix::net::listen(&socket, 0).expect("it is bound");
    let listener = TcpListener::from(socket);
    let address = listener.local_addr().expect("it is bound");
    let mut fillers = Vec::new();
    while let Ok(filler) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
        fillers.push(filler);
        assert!(fillers.len() < 64, "the queue is never full");
    }
    check(Kind::OpenAi, address, LONG, FaultReason::ConnectTimeout);
}

#[test]
fn silence_after_accepting() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    check(Kind::OpenAi, address, LONG, FaultReason::FirstByteTimeout);
    check(Kind::OpenAi, address, SHORT, FaultReason::Deadline);
}

#[test]
fn a_slow_drip() {
    let address = serve(|mut stream| {
        read_request(&mut stream);
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";
        let _ = stream.write_all(head.as_bytes());
        let (_wake, sleep) = sync_channel::<()>(0);
        while stream.write_all(b": \n").is_ok() {
            let _ = sleep.recv_timeout(Duration::from_millis(20));
        }
    });
    check(Kind::OpenAi, address, SHORT, FaultReason::Deadline);
}

#[test]
fn what_came_before_the_deadline_is_the_answer() {
    let address = serve(|mut stream| {
        read_request(&mut stream);
        let _ =
            stream.write_all(events(&[&chunk(r#"{"content":"The lamp is"}"#, "null")]).as_bytes());
        let _ = stream.read(&mut [0]);
    });
    let home = Home::with(Kind::OpenAi, address);
    let reply = home.ask(SHORT).expect("half an answer");
    assert_eq!(
        (reply.text.as_str(), reply.completion.finish),
        ("The lamp is", FinishReason::Deadline)
    );
}

#[test]
fn a_reset_in_the_middle() {
    let half = events(&[&chunk(r#"{"content":"The lamp is"}"#, "null")]);
    check(Kind::OpenAi, answers(half), LONG, FaultReason::Reset);
    let cut = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{\"choices\":";
    check(Kind::OpenAi, answers(cut), LONG, FaultReason::Reset);
}

#[test]
fn statuses() {
    let cases = [
        (plain("500 Oops", "", "oops"), FaultReason::Http5xx(500)),
        (plain("503 Busy", "Retry-After: 7\r\n", ""), FaultReason::Busy),
        (plain("429 Slow down", "", ""), FaultReason::Busy),
        (plain("401 Who", "", ""), FaultReason::Unauthorized),
        (plain("400 What", "", "{}"), FaultReason::Http4xx),
        (plain("302 There", "Location: http://8.8.8.8/\r\n", ""), FaultReason::Redirect),
        (plain("404 Not found", "", ""), FaultReason::Http4xx),
    ];
    for (answer, reason) in cases {
        check(Kind::OpenAi, answers(answer), LONG, reason);
    }
    let home = Home::with(Kind::OpenAi, answers(plain("503 Busy", "Retry-After: 7\r\n", "")));
    let error = home.ask(LONG).expect_err("busy");
    assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
}

#[test]
fn answers_without_text() {
    let stop = chunk("{}", "\"stop\"");
    let cases = [
        (plain("200 OK", "Content-Type: text/event-stream\r\n", ""), FaultReason::NoText),
        (events(&[&stop, "[DONE]"]), FaultReason::NoText),
        (events(&[&chunk(r#"{"content":" \n "}"#, "\"stop\""), "[DONE]"]), FaultReason::Whitespace),
        (
            events(&[&chunk(r#"{"reasoning_content":"hm"}"#, "null"), &stop]),
            FaultReason::ReasoningOnly,
        ),
        (
            events(&[&chunk(
                r#"{"tool_calls":[{"function":{"name":"f","arguments":"{}"}}]}"#,
                "\"stop\"",
            )]),
            FaultReason::ToolOnly,
        ),
    ];
    for (answer, reason) in cases {
        check(Kind::OpenAi, answers(answer), LONG, reason);
    }
}

#[test]
fn answers_that_are_none() {
    let json = "Content-Type: application/json\r\n";
    let cases = [
        (events(&["{\"choices\":["]), FaultReason::BadJson),
        (events(&["null"]), FaultReason::BadJson),
        (plain("200 OK", json, "{\"choices\": nonsense}"), FaultReason::BadJson),
        (
            plain("200 OK", "Content-Type: text/html\r\n", "<html>\nhello\n</html>\n"),
            FaultReason::BadJson,
        ),
        (events(&[r#"{"error":{"code":"no_headroom","message":"x"}}"#]), FaultReason::NoHeadroom),
        (events(&[r#"{"error":"boom"}"#]), FaultReason::Http5xx(500)),
        ("this is not HTTP\r\n\r\n".to_owned(), FaultReason::BadJson),
    ];
    for (answer, reason) in cases {
        check(Kind::OpenAi, answers(answer), LONG, reason);
    }
}

#[test]
fn a_flood() {
    let sent = Arc::new(AtomicUsize::new(0));
    for piece in [
        format!(
            "data: {}\n\n",
            chunk(&format!(r#"{{"content":"{}"}}"#, "x".repeat(32 << 10)), "null")
        ),
        "data: ".to_owned() + &"y".repeat(64 << 10),
        ": ping\n\n".repeat(8 << 10),
    ] {
        let counter = Arc::clone(&sent);
        counter.store(0, Ordering::Relaxed);
        let address = serve(move |mut stream| {
            read_request(&mut stream);
            let _ = stream.write_all(events(&[]).as_bytes());
            while stream.write_all(piece.as_bytes()).is_ok() {
                counter.fetch_add(piece.len(), Ordering::Relaxed);
            }
        });
        check(Kind::OpenAi, address, LONG, FaultReason::TooLarge);
        assert!(sent.load(Ordering::Relaxed) < 48 << 20, "the flood was read on");
    }
}

#[test]
fn another_model() {
    let tags = plain("200 OK", "", r#"{"models":[{"name":"m:latest"}]}"#);
    let address = serve(move |mut stream| {
        let (head, _) = read_request(&mut stream);
        let line = r#"{"model":"other","message":{"role":"assistant","content":"x"},"done":false}"#;
        let answer = match head.starts_with("GET /api/tags") {
            true => tags.clone(),
            false => {
                plain("200 OK", "Content-Type: application/x-ndjson\r\n", &format!("{line}\n"))
            }
        };
        let _ = stream.write_all(answer.as_bytes());
    });
    check(Kind::Ollama, address, LONG, FaultReason::WrongModel);
}

#[test]
fn three_failures_close_the_door_and_being_busy_does_not() {
    let connections = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&connections);
    let answer = Arc::new(Mutex::new(plain("503 Busy", "", "")));
    let said = Arc::clone(&answer);
    let address = serve(move |mut stream| {
        counter.fetch_add(1, Ordering::SeqCst);
        read_request(&mut stream);
        let answer = said.lock().expect("no panic").clone();
        let _ = stream.write_all(answer.as_bytes());
    });
    let home = Home::with(Kind::OpenAi, address);
    for _ in 0..5 {
        assert_eq!(home.fault(LONG), FaultReason::Busy);
    }
    assert_eq!(home.peer().snapshot().standing, Standing::Healthy);
    *answer.lock().expect("no panic") = plain("500 Oops", "", "");
    for _ in 0..3 {
        assert_eq!(home.fault(LONG), FaultReason::Http5xx(500));
    }
    assert_eq!(home.peer().snapshot().standing, Standing::Open);
    let before = connections.load(Ordering::SeqCst);
    assert_eq!(home.fault(LONG), FaultReason::BreakerOpen);
    assert_eq!(connections.load(Ordering::SeqCst), before, "nobody was asked");
}

#[test]
fn a_good_answer_after_two_bad_ones_starts_the_count_anew() {
    let turn = Arc::new(AtomicUsize::new(0));
    let address = serve(move |mut stream| {
        read_request(&mut stream);
        let good = turn.fetch_add(1, Ordering::SeqCst) % 3 == 2;
        let answer = if good { whole("on") } else { plain("500 Oops", "", "") };
        let _ = stream.write_all(answer.as_bytes());
    });
    let home = Home::with(Kind::OpenAi, address);
    for index in 0..6 {
        let asked = home.ask(LONG);
        assert_eq!(asked.is_ok(), index % 3 == 2, "{asked:?}");
    }
}

#[test]
fn dropping_the_stream_closes_the_socket() {
    let (closed, closings) = sync_channel(256);
    let (asked, arrivals) = sync_channel(256);
    let (closed, asked) = (Mutex::new(closed), Mutex::new(asked));
    let address = serve(move |mut stream| {
        let (_, body) = read_request(&mut stream);
        let streams = !body.contains("before the head");
        if streams {
            let first = events(&[&chunk(r#"{"content":"so"}"#, "null")]);
            let _ = stream.write_all(first.as_bytes());
        }
        asked.lock().expect("no panic").send(()).expect("the test listens");
        let _ = stream.read(&mut [0]);
        closed.lock().expect("no panic").send(Instant::now()).expect("the test listens");
    });
    let home = Home::with(Kind::OpenAi, address);
    for begun in [true, false] {
        let mut parts = request(LONG).into_parts();
        if !begun {
            parts.stop = vec!["before the head".to_owned()];
        }
        let mut stream = home.peer().chat(parts.try_into().expect("valid"));
        arrivals.recv_timeout(PATIENCE).expect("the request arrives");
        if begun {
            let first = home.runtime.block_on(stream.next());
            assert!(matches!(first, Some(Ok(ChatEvent::Delta { .. }))), "{first:?}");
        }
        let dropped = Instant::now();
        drop(stream);
        let closed = closings.recv_timeout(PATIENCE).expect("the socket is closed");
        assert!(closed.duration_since(dropped) <= Duration::from_millis(100), "begun: {begun}");
        assert!(home.is_idle());
        assert_eq!(home.peer().snapshot().standing, Standing::Healthy, "nobody failed");
    }
}

#[test]
fn places_are_taken_before_the_request_is_sent() {
    let (asked, arrivals) = sync_channel(256);
    let asked = Mutex::new(asked);
    let address = serve(move |mut stream| {
        read_request(&mut stream);
        asked.lock().expect("no panic").send(()).expect("the test listens");
        let _ = stream.read(&mut [0]);
    });
    let home = Home::with(Kind::Dllama, address);
    let held = home.peer().chat(request(LONG));
    assert_eq!(home.peer().snapshot().in_flight, 1);
    let error = home.ask(LONG).expect_err("distributed-llama takes one at a time");
    assert!(matches!(error, ChatError::Upstream(fault) if fault.reason == FaultReason::Busy));
    arrivals.recv_timeout(PATIENCE).expect("only the first arrives");
    drop(held);
    assert!(home.is_idle());
    assert!(arrivals.try_recv().is_err());
}

#[test]
fn requests_suit_the_strictest_server() {
    let (heads, requests) = sync_channel(256);
    let heads = Mutex::new(heads);
    let address = serve(move |mut stream| {
        let request = read_request(&mut stream);
        heads.lock().expect("no panic").send(request).expect("the test listens");
        let _ = stream.write_all(whole("on").as_bytes());
    });
    for kind in [Kind::Dllama, Kind::OpenAi] {
        let home = Home::with(kind, address);
        let mut parts = request(LONG).into_parts();
        parts.stop = vec!["\n".to_owned()];
        let stream = home.peer().chat(parts.try_into().expect("valid"));
        let reply = home.collect(stream).expect("an answer");
        assert_eq!(reply.text, "on");
        let (head, body) = requests.recv_timeout(PATIENCE).expect("a request");
        for line in head.lines().skip(1).filter(|line| !line.is_empty()) {
            let first = line.chars().next().expect("a name");
            assert!(first.is_ascii_uppercase(), "{line}");
        }
        assert!(head.contains("\r\nContent-Length: "), "{head}");
        assert!(head.contains("\r\nX-Scoutd-Fusion-Depth: 1\r\n"), "{head}");
        let told: u64 = head
            .lines()
            .find_map(|line| line.strip_prefix("X-Scoutd-Deadline-Ms: "))
            .and_then(|ms| ms.parse().ok())
            .expect("a deadline");
        assert!((9_000..9_800).contains(&told), "{told}: a little less than the rest");
        let body: serde_json::Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!(body["messages"][0]["content"], "is the lamp on?");
        assert_eq!(body["stop"], serde_json::json!(["\n"]));
        assert_eq!(body.get("stream_options").is_some(), kind == Kind::OpenAi);
        assert!(body["max_tokens"].is_u64());
    }
}

#[test]
fn many_at_once_leave_nothing_behind() {
    let address = serve(|mut stream| {
        let (_, body) = read_request(&mut stream);
        let text = if body.len() % 2 == 0 { whole("on") } else { plain("503 Busy", "", "") };
        let _ = stream.write_all(text.as_bytes());
    });
    let home = Arc::new(Home::with(Kind::OpenAi, address));
    thread::scope(|scope| {
        for index in 0..8 {
            let home = Arc::clone(&home);
            scope.spawn(move || {
                for _ in 0..10 {
                    let mut parts = request(LONG).into_parts();
                    parts.stop = vec!["x".repeat(index + 1)];
                    let stream = home.peer().chat(parts.try_into().expect("valid"));
                    if index % 4 == 3 {
                        drop(stream);
                    } else {
                        let _ = home.collect(stream);
                    }
                }
            });
        }
    });
    assert!(home.is_idle());
    assert_eq!(home.peer().snapshot().in_flight, 0);
}
