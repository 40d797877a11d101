//! The real binary with its built-in model: what a newcomer types, and what must not bring it down.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, PublishProperties};
use rumqttc::v5::{Client, Event, MqttOptions};
use serde_json::{Value, json};

/// A running daemon on free ports; dropping it kills it.
struct Daemon {
    process: Child,
    http: SocketAddr,
    mqtt: SocketAddr,
    topic_root: String,
}

impl Daemon {
    fn start() -> Daemon {
        Daemon::start_with(&[])
    }

    fn start_with(more: &[&str]) -> Daemon {
        let mut process = scoutd()
            .args(["serve", "--set", "mqtt.node=test", "--set", "mqtt.listen=127.0.0.1:0"])
            .args(["--set", "rest.listen=[\"127.0.0.1:0\"]", "--threads", "2"])
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let lines = BufReader::new(process.stdout.take().expect("its output is piped")).lines();
        let (mut http, mut mqtt) = (None, None);
        for line in lines {
            let line = line.expect("its output is text");
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("HTTP"), Some(url)) => {
                    http = url.strip_prefix("http://").and_then(|address| address.parse().ok());
                }
                (Some("MQTT"), Some(address)) => mqtt = address.parse().ok(),
                (Some("Ctrl-C"), _) => break,
                _ => {}
            }
        }
        let http = http.expect("the HTTP address is printed");
        let mqtt = mqtt.expect("the MQTT address is printed");
        Daemon { process, http, mqtt, topic_root: "scoutd/test".to_owned() }
    }

    fn get(&self, path: &str) -> (u16, String) {
        self.send(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))
    }

    fn post(&self, path: &str, body: &str) -> (u16, String) {
        let length = body.len();
        self.send(&format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        ))
    }

    fn send(&self, request: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.http).expect("the daemon listens");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a valid timeout");
        stream.write_all(request.as_bytes()).expect("the daemon reads");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("the daemon answers");
        let answer = String::from_utf8(answer).expect("the answer is text");
        let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        (status.expect("a status"), body.to_owned())
    }

    fn chat(&self, content: &str) -> String {
        let body = json!({"messages": home(content), "temperature": 0, "max_tokens": 48});
        let (status, answer) = self.post("/v1/chat/completions", &body.to_string());
        assert_eq!(status, 200, "{answer}");
        let answer: Value = serde_json::from_str(&answer).expect("an answer in JSON");
        answer["choices"][0]["message"]["content"].as_str().expect("text").to_owned()
    }

    /// The text of a streamed answer, put together from its events.
    fn chat_streamed(&self, content: &str) -> String {
        let body =
            json!({"messages": home(content), "temperature": 0, "max_tokens": 48, "stream": true});
        let (status, answer) = self.post("/v1/chat/completions", &body.to_string());
        assert_eq!(status, 200, "{answer}");
        let events = answer.lines().filter_map(|line| line.strip_prefix("data: "));
        let chunks = events.filter(|data| *data != "[DONE]");
        chunks
            .map(|data| {
                let chunk: Value = serde_json::from_str(data).expect("a chunk in JSON");
                chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned()
            })
            .collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn scoutd() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_scoutd"));
    command.env_clear().stderr(Stdio::null());
    command
}

/// A conversation about a small home.
fn home(request: &str) -> Value {
    json!([
        {"role": "system", "content": "You are scout, the assistant of this home.\nNow: Monday 08:15\nDevices:\n\
            light.kitchen_lamp: kitchen lamp, off\nlock.front_door: front door, locked\n\
            sensor.hall_temperature: hall temperature, 21 °C"},
        {"role": "user", "content": request},
    ])
}

const REQUESTS: [&str; 4] = [
    "turn on the kitchen lamp",
    "is the front door locked?",
    "what is the hall temperature?",
    "please unlock the front door",
];

#[test]
fn a_home_request_is_answered_over_http_and_mqtt_alike() {
    let daemon = Daemon::start();
    assert_eq!(daemon.get("/readyz").0, 200);
    let over_http = daemon.chat(REQUESTS[0]);
    assert_eq!(
        over_http,
        r#"{"name":"light.turn_on","parameters":{"entity_id":"light.kitchen_lamp"}}"#
    );
    assert_eq!(ask_over_mqtt(&daemon, REQUESTS[0]), over_http);
    let (_, metrics) = daemon.get("/metrics");
    assert!(metrics.contains("scoutd_headroom_bytes"), "{metrics}");
}

fn ask_over_mqtt(daemon: &Daemon, request: &str) -> String {
    let mut options = MqttOptions::new("asker", daemon.mqtt.ip().to_string(), daemon.mqtt.port());
    options.set_keep_alive(Duration::from_secs(30));
    let (client, mut connection) = Client::new(options, 8);
    let answers = format!("{}/response/asker", daemon.topic_root);
    client.subscribe(&answers, QoS::AtLeastOnce).expect("the queue has room");
    for event in connection.iter() {
        match event.expect("the embedded broker answers") {
            Event::Incoming(Packet::SubAck(_)) => {
                let properties = PublishProperties {
                    response_topic: Some(answers.clone()),
                    correlation_data: Some("42".into()),
                    ..PublishProperties::default()
                };
                let body = json!({"messages": home(request), "temperature": 0, "max_tokens": 48});
                let topic = format!("{}/request/chat", daemon.topic_root);
                client
                    .publish_with_properties(
                        topic,
                        QoS::AtLeastOnce,
                        false,
                        body.to_string(),
                        properties,
                    )
                    .expect("the queue has room");
            }
            Event::Incoming(Packet::Publish(publish)) => {
                let properties = publish.properties.expect("an answer has properties");
                assert_eq!(properties.correlation_data.as_deref(), Some(&b"42"[..]));
                let answer: Value = serde_json::from_slice(&publish.payload).expect("JSON");
                if answer["type"] == "final" {
                    assert_eq!(answer["status"], "ok", "{answer}");
                    return answer["data"]["text"].as_str().expect("text").to_owned();
                }
            }
            _ => {}
        }
    }
    unreachable!("the connection's iterator does not end")
}

#[test]
fn four_clients_at_once_each_get_what_they_get_alone() {
    let daemon = Daemon::start();
    let alone: Vec<String> = REQUESTS.iter().map(|request| daemon.chat(request)).collect();
    for text in &alone {
        assert!(!text.is_empty());
    }
    for _ in 0..3 {
        let together: Vec<String> = thread::scope(|scope| {
            let clients: Vec<_> = REQUESTS
                .iter()
                .map(|request| scope.spawn(|| daemon.chat_streamed(request)))
                .collect();
            clients.into_iter().map(|client| client.join().expect("no panic")).collect()
        });
        assert_eq!(together, alone);
    }
}

#[test]
fn bad_requests_are_refused_by_name_and_hurt_nobody() {
    let daemon = Daemon::start();
    let before = daemon.chat(REQUESTS[1]);
    let long = "word ".repeat(20_000);
    let cases = [
        ("", 400, "missing request body"),
        ("{\"messages\": [", 400, ""),
        (r#"{"messages": []}"#, 400, "messages"),
        (r#"{"messages": "hello"}"#, 400, "messages"),
        (r#"{"messages": [{"role": "user", "content": 5}]}"#, 400, "content"),
        (
            r#"{"messages": [{"role": "user", "content": "x"}], "temperature": "warm"}"#,
            400,
            "temperature",
        ),
        (r#"{"messages": [{"role": "user", "content": "x"}], "model": "other"}"#, 404, "other"),
        (&json!({"messages": [{"role": "user", "content": long}]}).to_string(), 400, "context"),
    ];
    for (body, status, names) in cases {
        let (got, answer) = daemon.post("/v1/chat/completions", body);
        let start: String = body.chars().take(60).collect();
        assert_eq!(got, status, "{start}: {answer}");
        assert!(answer.contains(names), "{start}: {answer}");
        let answer: Value = serde_json::from_str(&answer).expect("errors are JSON");
        assert!(answer["error"]["message"].is_string(), "{answer}");
    }
    assert_eq!(daemon.chat(REQUESTS[1]), before);
}

#[test]
fn it_stops_cleanly_when_told() {
    let mut daemon = Daemon::start();
    let id = daemon.process.id().to_string();
    let killed = Command::new("kill").args(["-TERM", &id]).status().expect("kill is there");
    assert!(killed.success());
    let status = daemon.process.wait().expect("it ends");
    assert!(status.success(), "{status}");
    assert!(TcpStream::connect(daemon.http).is_err(), "the port is closed");
}

fn run(arguments: &[&str]) -> Output {
    scoutd().args(arguments).stderr(Stdio::piped()).output().expect("the binary runs")
}

#[test]
fn it_says_why_it_does_not_start() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let listen = format!("rest.listen=[\"{}\"]", taken.local_addr().expect("it is bound"));
    let cases: [(&[&str], i32, &str); 5] = [
        (&["serve", "--model", "/nonexistent.gguf"], 69, "/nonexistent.gguf"),
        (&["serve", "--model", env!("CARGO_MANIFEST_DIR")], 69, "directory"),
        (&["serve", "--set", "model.colour=red"], 64, "colour"),
        (&["serve", "--set", "model.isa=\"sse9\""], 64, "sse9"),
        (&["serve", "--set", &listen, "--set", "mqtt.enabled=false"], 1, "127.0.0.1"),
    ];
    for (arguments, code, names) in cases {
        let output = run(arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(names), "{arguments:?}: {text}");
    }
}

#[test]
fn a_question_can_be_asked_without_a_daemon() {
    let home = home("").get(0).and_then(|turn| turn["content"].as_str().map(str::to_owned));
    let home = home.expect("the system turn");
    let output = run(&["ask", "lock the front door", "--system", &home, "--stats"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(text.contains("lock.front_door"), "{text}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("tokens/s"));
}

/// A copy of the embedded model as a file.
fn model_file(dir: &Path) -> PathBuf {
    let path = dir.join("nano.gguf");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/scout-nano-q4_0.gguf");
    fs::copy(source, &path).expect("room for a small model");
    path
}

/// Cuts or overwrites the model while it is served: requests fail by name, the process lives.
fn survives(more: &[&str], change: impl Fn(&Path)) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = model_file(dir.path());
    let name = path.to_str().expect("a plain name");
    let mut daemon = Daemon::start_with(&[&["--model", name], more].concat());
    let body = json!({"messages": home(REQUESTS[0]), "temperature": 0, "max_tokens": 48});
    let (status, answer) = daemon.post("/v1/chat/completions", &body.to_string());
    assert_eq!(status, 200, "{answer}");
    change(&path);
    for _ in 0..3 {
        let (status, answer) = daemon.post("/v1/chat/completions", &body.to_string());
        assert_eq!(status, 500, "{answer}");
    }
    assert_eq!(daemon.get("/healthz").0, 200);
    assert!(daemon.process.try_wait().expect("it is ours").is_none(), "the daemon lives");
}

fn cut(path: &Path) {
    let file = OpenOptions::new().write(true).open(path).expect("the copy is ours");
    file.set_len(4096).expect("cut");
}

#[test]
fn a_model_file_that_is_cut_does_not_kill_the_daemon() {
    survives(&[], cut);
}

#[test]
fn a_streamed_model_file_that_is_cut_does_not_kill_the_daemon() {
    survives(&["--set", "residency.expert_slots_bytes=100000"], cut);
}

#[test]
fn a_model_file_that_is_overwritten_is_no_longer_answered_from() {
    survives(&[], |path| {
        let mut file = OpenOptions::new().write(true).open(path).expect("the copy is ours");
        file.write_all(&[0; 64]).expect("overwritten");
    });
}

#[test]
fn a_model_file_cut_in_mid_answer_does_not_kill_the_daemon() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = model_file(dir.path());
    let name = path.to_str().expect("a plain name");
    let mut daemon = Daemon::start_with(&["--model", name]);
    let body = json!({
        "messages": home("tell me everything about this home"), "stream": true,
        "max_tokens": 2000,
    });
    let body = body.to_string();
    let mut stream = TcpStream::connect(daemon.http).expect("the daemon listens");
    let length = body.len();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
    );
    stream.write_all(format!("{head}{body}").as_bytes()).expect("the daemon reads");
    let mut first = [0; 64];
    stream.read_exact(&mut first).expect("an answer begins");
    cut(&path);
    let mut rest = Vec::new();
    // However the answer ends, it ends.
    let _ = stream.read_to_end(&mut rest);
    assert_eq!(daemon.get("/healthz").0, 200);
    assert!(daemon.process.try_wait().expect("it is ours").is_none(), "the daemon lives");
}
