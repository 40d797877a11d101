//! scoutd nodes of one pool: proof, replay, scores, and strangers that announce themselves.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use scoutd::chat::{
    Backend, BoxFuture, ChatError, ChatRequest, ChatStream, FaultReason, Message, ModelCard,
    ModelName, Origin, Priority, RequestId, Role, Router, ScoreReply, ScoreRequest,
};
use scoutd::metrics::Metrics;
use scoutd::peer::{
    AUTH_HEADER, Announcement, BOOT_HEADER, Config, Kind, PoolKey, Signed, Signer, Standing,
};
use scoutd::rest::{self, Keys, PoolDoor, Readiness, RestParts, StopHandle};

use super::{Home, KEY, key_file, member, read_request, serve};
use crate::doubles::{card, says};
use crate::http::{Connection, PATIENCE, Response};

const LONG: Duration = Duration::from_secs(10);

/// Says yes, and is three quarters sure of it.
struct Sure(crate::doubles::Scripted);

impl Backend for Sure {
    fn models(&self) -> Vec<ModelCard> {
        self.0.models()
    }

    fn chat(&self, request: ChatRequest) -> ChatStream {
        self.0.chat(request)
    }

    fn score(&self, request: ScoreRequest) -> BoxFuture<'_, Result<ScoreReply, ChatError>> {
        let logprob =
            |candidate: &String| if candidate == "Yes" { 0.75f64.ln() } else { 0.25f64.ln() };
        let reply = ScoreReply {
            logprobs: request.candidates.iter().map(logprob).collect(),
            tokens: vec![1; request.candidates.len()],
            prompt_tokens: 20,
            cached_tokens: 12,
            digest: card("scout").digest,
        };
        Box::pin(std::future::ready(Ok(reply)))
    }
}

/// A node with its door open.
struct Node {
    home: Home,
    address: SocketAddr,
    handle: StopHandle,
    _folder: tempfile::TempDir,
}

impl Node {
    /// With a pool key, and the lines of a keys file.
    fn start(key: Option<&str>, keys: &str) -> Node {
        Node::start_at("127.0.0.1:0", key, keys)
    }

    fn start_at(listen: &str, key: Option<&str>, keys: &str) -> Node {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let key_file = key.map(|key| key_file(folder.path(), key));
        let home = Home::new(Config { key_file, ..Config::default() });
        let backend: Arc<dyn Backend> = Arc::new(Sure(says(&["it ", "is on"])));
        let readiness = Arc::new(Readiness::new());
        readiness.set_ready();
        let door = PoolDoor {
            pool: Arc::clone(&home.pool),
            local: Arc::clone(&backend),
            node: "there".to_owned(),
            fusion: None,
            calibration_file: None,
        };
        let parts = RestParts {
            router: Router::new(vec![backend]),
            metrics: Arc::new(Metrics::new()),
            readiness,
            keys: Keys::parse(keys).expect("valid keys"),
            default_deadline: Duration::from_secs(60),
            slots: 4,
            pool: Some(door),
            models: None,
        };
        let config = rest::Config { listen: vec![listen.to_owned()], ..rest::Config::default() };
        let server = rest::bind(&config, parts).expect("a free port");
        let (address, handle) = (server.addresses()[0], server.handle());
        home.runtime.spawn(server.run());
        Node { home, address, handle, _folder: folder }
    }

    /// Ends, and comes up again at the same address.
    fn restart(self) -> Node {
        self.home.runtime.block_on(self.handle.stop(Duration::ZERO));
        Node::start_at(&self.address.to_string(), Some(KEY), "")
    }

    fn send(&self, method: &str, path: &str, headers: &[&str], body: &str) -> Response {
        let stream = std::net::TcpStream::connect(self.address).expect("listening");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut connection = Connection { stream: std::io::BufReader::new(stream) };
        connection.send(method, path, headers, body.as_bytes());
        connection.response(method)
    }
}

/// A pool that has `node` as its member, under this key.
fn asker(node: &Node, key: &str) -> (Home, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let key_file = Some(key_file(folder.path(), key));
    let members = vec![member(Kind::Scoutd, node.address)];
    (Home::new(Config { key_file, members, ..Config::default() }), folder)
}

fn score(digest: Option<&str>) -> ScoreRequest {
    ScoreRequest {
        id: RequestId::random(),
        origin: Origin::Fusion { depth: 1 },
        client: "test".into(),
        model: ModelName::new(""),
        digest: digest.map(str::to_owned),
        messages: vec![Message::text(Role::User, "is it right?")],
        candidates: vec!["Yes".to_owned(), "No".to_owned()],
        deadline: Instant::now() + LONG,
        priority: Priority::Normal,
    }
}

#[test]
fn a_node_is_asked_once_it_has_proved_itself() {
    let node = Node::start(Some(KEY), "");
    let (home, _folder) = asker(&node, KEY);
    assert_eq!(home.peer().snapshot().standing, Standing::Candidate);
    assert_eq!(home.fault(LONG), FaultReason::Unauthorized, "nothing is sent to a candidate");
    home.look().expect("it proves itself");
    let seen = home.peer().snapshot();
    assert_eq!((seen.standing, seen.id.as_str()), (Standing::Healthy, "there/scout"));
    assert_eq!(seen.digest.as_deref(), Some(card("scout").digest.as_str()));
    let reply = home.ask(LONG).expect("an answer");
    assert_eq!((reply.text.as_str(), reply.completion.usage.completion_tokens), ("it is on", 3));
    assert!(home.is_idle());
}

#[test]
fn scores_come_from_the_very_model() {
    let node = Node::start(Some(KEY), "");
    let (home, _folder) = asker(&node, KEY);
    home.look().expect("it proves itself");
    let peer = home.peer();
    let digest = card("scout").digest;
    let scored = home.runtime.block_on(peer.score(score(Some(&digest)))).expect("scores");
    assert!((scored.logprobs[0] - 0.75f64.ln()).abs() < 1e-9);
    assert_eq!((scored.prompt_tokens, scored.cached_tokens), (20, 12));
    let other = home.runtime.block_on(peer.score(score(Some(&"cd".repeat(32)))));
    assert!(
        matches!(other, Err(ChatError::Upstream(fault)) if fault.reason == FaultReason::WrongModel)
    );
}

#[test]
fn without_the_key_nobody_comes_in_and_nobody_is_believed() {
    let node = Node::start(Some(KEY), "");
    let (stranger, _folder) = asker(&node, "ffeeddccbbaa99887766554433221100");
    assert_eq!(stranger.look(), Err(FaultReason::Unauthorized));
    assert_eq!(stranger.peer().snapshot().standing, Standing::Candidate);
    for path in ["/fusion/v1/self", "/fusion/v1/score"] {
        let method = if path.ends_with("self") { "GET" } else { "POST" };
        let answer = node.send(method, path, &["Authorization: Bearer 0123456789abcdef"], "");
        assert_eq!(answer.status, 401, "{path}");
        assert!(answer.header("x-scoutd-boot-id").is_some(), "{path}");
    }
    let closed = Node::start(None, "");
    assert_eq!(closed.send("GET", "/fusion/v1/self", &[], "").status, 403);
    let (home, _folder) = asker(&closed, KEY);
    assert_eq!(home.look(), Err(FaultReason::Unauthorized));
}

#[test]
fn a_proof_is_good_once_and_for_its_own_request() {
    let node = Node::start(Some(KEY), "owner admin 0123456789abcdef\n");
    let signer = Signer::new(PoolKey::parse(KEY).expect("a key"));
    let boot = node.home.pool.gate().expect("a key").boot_id();
    let host = node.address.to_string();
    let proof = |path: &str, body: &str, host: &str| {
        let method = if body.is_empty() { "GET" } else { "POST" };
        let what = Signed { method, host, path, body: body.as_bytes() };
        format!("{AUTH_HEADER}: {}", signer.sign(&what, &boot))
    };
    let named = format!("Host: {host}");
    let header = proof("/fusion/v1/self", "", &host);
    assert_eq!(node.send("GET", "/fusion/v1/self", &[&named, &header], "").status, 200);
    let again = node.send("GET", "/fusion/v1/self", &[&named, &header], "");
    assert_eq!(again.status, 401, "replayed");
    assert_eq!(again.header(&BOOT_HEADER.to_ascii_lowercase()), Some(boot.as_str()));
    let header = proof("/fusion/v1/score", "{}", &host);
    assert_eq!(node.send("POST", "/fusion/v1/score", &[&named, &header], "{ }").status, 401);
    // Somebody at another address hands on what he was asked.
    let relayed = proof("/fusion/v1/self", "", "192.168.77.7:11434");
    let to = "Host: 192.168.77.7:11434";
    assert_eq!(node.send("GET", "/fusion/v1/self", &[to, &relayed], "").status, 401);
    // The pool key opens answers, where others need a key, and never the owner's endpoints.
    let body = r#"{"messages":[{"role":"user","content":"x"}]}"#;
    assert_eq!(node.send("POST", "/v1/chat/completions", &[], body).status, 401);
    let header = proof("/v1/chat/completions", body, &host);
    assert_eq!(node.send("POST", "/v1/chat/completions", &[&named, &header], body).status, 200);
    let add = r#"{"name":"x","kind":"openai","url":"http://127.0.0.1:1","model":"m"}"#;
    let header = proof("/fusion/v1/members", add, &host);
    assert_eq!(node.send("POST", "/fusion/v1/members", &[&named, &header], add).status, 401);
}

#[test]
fn a_restarted_node_is_asked_again_with_its_new_boot_id() {
    let node = Node::start(Some(KEY), "");
    let (home, _folder) = asker(&node, KEY);
    home.look().expect("it proves itself");
    // The first proof was made without a boot id, refused, and repeated; now the id is known.
    home.ask(LONG).expect("an answer");
    let before = node.home.pool.gate().expect("a key").boot_id();
    let node = node.restart();
    assert_ne!(node.home.pool.gate().expect("a key").boot_id(), before);
    home.ask(LONG).expect("an answer all the same");
}

#[test]
fn announcements_are_tried_out_and_strangers_get_no_prompt() {
    let node = Node::start(Some(KEY), "");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let key_file = Some(key_file(folder.path(), KEY));
    let home = Home::new(Config { key_file, ..Config::default() });
    let (asked, requests) = sync_channel(256);
    let asked = Mutex::new(asked);
    let rogue = serve(move |mut stream| {
        let (head, _) = read_request(&mut stream);
        let first = head.lines().next().unwrap_or_default().to_owned();
        asked.lock().expect("no panic").send(first).expect("the test listens");
        let body = r#"{"node":"rogue","boot_id":"1","models":[{"name":"m","digest":"d"}]}"#;
        let proof = "0".repeat(64);
        let head = format!(
            "HTTP/1.1 200 OK\r\nX-Scoutd-Proof: {proof}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        let _ = stream.write_all(format!("{head}{body}").as_bytes());
    });
    let announce = |name: &str, pool: &str, address: SocketAddr| Announcement {
        node: name.to_owned(),
        pool: pool.to_owned(),
        url: format!("http://{address}"),
        source: "mdns",
    };
    home.runtime.block_on(async {
        home.pool.found(announce("rogue", "default", rogue)).await;
        home.pool.found(announce("rogue", "default", rogue)).await;
        home.pool.found(announce("neighbour", "theirs", node.address)).await;
        home.pool.found(announce("here", "default", node.address)).await;
        home.pool.found(announce("pi-b", "default", node.address)).await;
    });
    let names: Vec<String> = home.pool.peers().iter().map(|peer| peer.name().to_owned()).collect();
    assert_eq!(names, ["pi-b"], "who proved the key, once, and not ourselves");
    let report = home.pool.report(Vec::new());
    let candidates: Vec<&str> = report.candidates.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(candidates, ["neighbour", "rogue"]);
    home.ask(LONG).expect("the member answers");
    let lines: Vec<String> = requests.try_iter().collect();
    assert!(
        !lines.is_empty() && lines.iter().all(|line| line.starts_with("GET /fusion/v1/self")),
        "{lines:?}"
    );
}

#[test]
fn the_owner_adds_and_removes_members() {
    let node =
        Node::start(None, "owner admin 0123456789abcdef\nguest inference fedcba9876543210\n");
    let owner = "Authorization: Bearer 0123456789abcdef";
    let guest = "Authorization: Bearer fedcba9876543210";
    let add =
        r#"{"name":"hub","kind":"ollama","url":"http://127.0.0.1:1","model":"m","tier":"small"}"#;
    assert_eq!(node.send("POST", "/fusion/v1/members", &[guest], add).status, 403);
    let added = node.send("POST", "/fusion/v1/members", &[owner], add);
    assert_eq!(added.status, 200, "{}", added.text());
    let members = node.send("GET", "/fusion/v1/pool", &[guest], "").json();
    let ids: Vec<&str> = members["members"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|member| member["id"].as_str().expect("a name"))
        .collect();
    assert_eq!(ids, ["local/scout", "hub/m"]);
    for (body, names) in [
        (add.to_owned(), "already"),
        (add.replace("hub", "far").replace("127.0.0.1:1", "8.8.8.8"), "outside the LAN"),
        (add.replace("hub", "x").replace("ollama", "telnet"), "kind must be"),
        (add.replace("hub", "x").replace("\"tier\"", "\"wan\":true,\"tier\""), "wan"),
    ] {
        let refused = node.send("POST", "/fusion/v1/members", &[owner], &body);
        assert!(refused.status == 400 && refused.text().contains(names), "{}", refused.text());
    }
    assert_eq!(node.send("DELETE", "/fusion/v1/members/hub", &[guest], "").status, 403);
    assert_eq!(node.send("DELETE", "/fusion/v1/members/hub", &[owner], "").status, 200);
    assert_eq!(node.send("DELETE", "/fusion/v1/members/hub", &[owner], "").status, 404);
}

#[test]
fn members_added_at_run_time_are_there_after_a_restart() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let state = Some(folder.path().to_owned());
    let first = Home::with_state(Config::default(), state.clone()).expect("a pool");
    let added = member(Kind::Ollama, "127.0.0.1:1".parse().expect("an address"));
    first.pool.add(added).expect("a valid member");
    let second = Home::with_state(Config::default(), state.clone()).expect("a pool");
    assert_eq!(second.peer().name(), "there");
    assert!(second.pool.remove("there") && !second.pool.remove("there"));
    let third = Home::with_state(Config::default(), state).expect("a pool");
    assert!(third.pool.peers().is_empty());
}

#[test]
fn keys_that_others_can_read_or_that_are_short_are_refused() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = key_file(folder.path(), KEY);
    let with = |path: &std::path::Path| {
        Home::try_new(Config { key_file: Some(path.to_owned()), ..Config::default() })
    };
    assert!(with(&path).is_ok());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("it is ours");
    assert!(with(&path).err().expect("readable by all").to_string().contains("chmod 600"));
    let short = key_file(folder.path(), "secret\n");
    assert!(with(&short).err().expect("too short").to_string().contains("128 bits"));
    let empty = key_file(folder.path(), "\n");
    assert!(with(&empty).err().expect("empty").to_string().contains("empty"));
}
