//! Managing models over HTTP, as Ollama's clients do it.

use scoutd::rest::{Config, ModelDoor};
use serde_json::{Value, json};

use super::server::{FakeHub, Fault, digest};
use super::{Here, NANO, QUICK, REPO, nano};
use crate::doubles::says;
use crate::http::Server;
use scoutd::store::{Access, Hub};

fn server(hub: &FakeHub, here: &Here, keys: &str) -> Server {
    let base = hub.url();
    let door = ModelDoor::new(here.store.clone(), move || {
        let base = base.parse().expect("an address");
        Hub::new(Access { base, token: None, extra_ca_pem: None, retry: QUICK })
            .map_err(|error| error.to_string())
    });
    Server::start_managing(says(&["hello"]), Config::default(), keys, Some(door))
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

fn names(server: &Server) -> Vec<(String, Value)> {
    let tags = server.get("/api/tags").json();
    let models = tags["models"].as_array().expect("a list").iter();
    let name = |model: &Value| model["name"].as_str().expect("a name").to_owned();
    models.map(|model| (name(model), model["capabilities"].clone())).collect()
}

#[test]
fn pull_list_delete() {
    let (hub, here) = (nano(), Here::new());
    let server = server(&hub, &here, "");
    let served = names(&server);
    let body = json!({"model": format!("hf.co/{REPO}:Q4_0")}).to_string();
    let response = server.post("/api/pull", &body);
    assert_eq!(response.header("content-type"), Some("application/x-ndjson"));
    let lines = lines(response.text());
    assert_eq!(lines.first(), Some(&json!({"status": "pulling manifest"})));
    assert_eq!(lines.last(), Some(&json!({"status": "success"})));
    let progress: Vec<&Value> = lines.iter().filter(|line| line["total"].is_u64()).collect();
    let (total, whole) = (NANO.len() as u64, progress.last().expect("some progress"));
    assert_eq!((whole["total"].as_u64(), whole["completed"].as_u64()), (Some(total), Some(total)));
    assert_eq!(whole["digest"], format!("sha256:{}", digest(NANO)));
    assert!(here.is_nano());

    let now = names(&server);
    assert_eq!(now[..served.len()], served[..], "what is served stands first");
    assert_eq!(now[served.len()..], [("scout-nano-Q4_0:latest".to_owned(), json!([]))]);

    // Clients pull what they are about to use; it is here.
    for model in ["scout-nano-q4_0", "scout-nano-q4_0:latest"] {
        let body = json!({"model": model, "stream": false}).to_string();
        assert_eq!(server.post("/api/pull", &body).json(), json!({"status": "success"}));
    }
    let delete = || server.request("DELETE", "/api/delete", &[], r#"{"model":"scout-nano-q4_0"}"#);
    let deleted = delete();
    assert_eq!((deleted.status, deleted.text()), (200, ""));
    assert_eq!(delete().status, 404);
    assert_eq!(names(&server), served);
}

#[test]
fn what_cannot_be_pulled_is_said() {
    let (hub, here) = (nano(), Here::new());
    let server = server(&hub, &here, "");
    let ask = |model: &str| {
        let body = json!({"model": model, "stream": false}).to_string();
        let response = server.post("/api/pull", &body);
        (response.status, response.json()["error"].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(ask("house/nothing").0, 403, "the hub does not say whether it exists");
    assert_eq!(ask(&format!("{REPO}:Q6_K")).0, 404);
    let (status, text) = ask("llama3.2");
    assert!(status == 404 && text.contains("owner/name"), "{status} {text}");
    for bad in ["../x/y", "a/b/c/d", "http://10.0.0.1/x", ""] {
        assert_eq!(ask(bad).0, 400, "{bad}");
    }
    let body = json!({"model": "house/nothing"}).to_string();
    let lines = lines(server.post("/api/pull", &body).text());
    assert!(lines.last().is_some_and(|line| line["error"].is_string()), "{lines:?}");
    assert!(here.files().is_empty());
}

#[test]
fn only_an_admins_key_manages_models() {
    let (hub, here) = (nano(), Here::new());
    let keys = "app inference 0123456789abcdef\nboss admin fedcba9876543210\n";
    let server = server(&hub, &here, keys);
    let body = json!({"model": REPO, "stream": false}).to_string();
    let pull = |key: &[&str]| server.request("POST", "/api/pull", key, &body).status;
    assert_eq!(pull(&[]), 401);
    assert_eq!(pull(&["Authorization: Bearer 0123456789abcdef"]), 403);
    let delete = server.request("DELETE", "/api/delete", &[], r#"{"model":"x"}"#);
    assert_eq!(delete.status, 401);
    assert!(hub.seen().is_empty(), "nothing was asked of the hub");
    assert_eq!(pull(&["Authorization: Bearer fedcba9876543210"]), 200);
    assert!(here.is_nano());
}

#[test]
fn a_client_that_leaves_ends_the_pull_and_the_part_stays() {
    let (hub, here) = (nano(), Here::new());
    let server = server(&hub, &here, "");
    let (release, held) = std::sync::mpsc::sync_channel(1);
    // The first answer of the second host is the header's.
    hub.fail_large(Fault::Cut(usize::MAX));
    hub.fail_large(Fault::Held(1_000_000, held));
    let body = json!({"model": REPO}).to_string();
    let mut connection = server.connect();
    connection.send("POST", "/api/pull", &[], body.as_bytes());
    super::wait_for_part(&here, 1_000_000);
    let busy = server.post("/api/pull", &body);
    assert_eq!(busy.status, 409, "{}", busy.text());
    drop(connection);
    let start = std::time::Instant::now();
    while server.post("/api/pull", r#"{"model":"x/y","stream":false}"#).status == 409 {
        assert!(start.elapsed() < crate::http::PATIENCE, "the pull goes on without its client");
        std::thread::yield_now();
    }
    drop(release);
    assert_eq!(here.files(), ["scout-nano-Q4_0.gguf.part", "scout-nano-Q4_0.gguf.part.json"]);
    let body = json!({"model": REPO, "stream": false}).to_string();
    assert_eq!(server.post("/api/pull", &body).status, 200);
    assert!(here.is_nano());
    assert_eq!(hub.ranges().last().map(String::as_str), Some("bytes=1000000-"));
}
