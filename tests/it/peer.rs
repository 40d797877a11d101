//! Other machines as members: what real and misbehaving servers do to us, over real sockets.

mod faults;
mod lan;
mod nodes;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use scoutd::chat::{
    Backend, ChatError, ChatRequest, ChatRequestParts, ChatStream, FaultReason, Input, Message,
    Origin, Reply, Role,
};
use scoutd::metrics::Metrics;
use scoutd::peer::{Config, Kind, MemberConfig, Peer, Pool, PoolError, PoolParts};
use tokio::runtime::Runtime;

use crate::http::PATIENCE;

/// A key of 128 bits.
const KEY: &str = "00112233445566778899aabbccddeeff";

/// A pool on a runtime of its own.
struct Home {
    runtime: Runtime,
    metrics: Arc<Metrics>,
    pool: Arc<Pool>,
}

impl Home {
    fn new(config: Config) -> Home {
        Home::try_new(config).expect("a valid pool")
    }

    fn try_new(config: Config) -> Result<Home, PoolError> {
        Home::with_state(config, None)
    }

    fn with_state(config: Config, state: Option<PathBuf>) -> Result<Home, PoolError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let metrics = Arc::new(Metrics::new());
        let parts = PoolParts {
            node: "here".to_owned(),
            state,
            runtime: runtime.handle().clone(),
            metrics: Arc::clone(&metrics),
        };
        let pool = Pool::new(config, parts)?;
        Ok(Home { runtime, metrics, pool })
    }

    /// With one member.
    fn with(kind: Kind, address: SocketAddr) -> Home {
        Home::new(Config { members: vec![member(kind, address)], ..Config::default() })
    }

    fn peer(&self) -> Peer {
        self.pool.peers().into_iter().next().expect("a member")
    }

    fn ask(&self, patience: Duration) -> Result<Reply, ChatError> {
        let stream = self.peer().chat(request(patience));
        self.collect(stream)
    }

    fn collect(&self, stream: ChatStream) -> Result<Reply, ChatError> {
        let read = async { tokio::time::timeout(PATIENCE, stream.collect()).await };
        self.runtime.block_on(read).expect("an end")
    }

    /// Why the member gave no answer within `patience`.
    fn fault(&self, patience: Duration) -> FaultReason {
        match self.ask(patience) {
            Err(ChatError::Upstream(fault)) => fault.reason,
            other => panic!("an upstream's fault, not {other:?}"),
        }
    }

    fn look(&self) -> Result<(), FaultReason> {
        let peer = self.peer();
        self.runtime.block_on(peer.look()).map_err(|fault| fault.reason)
    }

    /// Waits until no request of ours is under way anywhere.
    fn is_idle(&self) -> bool {
        let deadline = Instant::now() + Duration::from_millis(500);
        while self.metrics.peer_requests_running.get() != 0 {
            if Instant::now() > deadline {
                return false;
            }
            thread::yield_now();
        }
        true
    }
}

fn member(kind: Kind, address: SocketAddr) -> MemberConfig {
    MemberConfig {
        name: "there".to_owned(),
        kind,
        url: format!("http://{address}"),
        model: (kind != Kind::Scoutd).then(|| "m".to_owned()),
        key_file: None,
        tier: None,
        wan: false,
        max_in_flight: None,
        context_tokens: None,
    }
}

fn request(patience: Duration) -> ChatRequest {
    let input = Input::Messages(vec![Message::text(Role::User, "is the lamp on?")]);
    let origin = Origin::Fusion { depth: 1 };
    let parts = ChatRequestParts::new(origin, "test", input, Instant::now() + patience);
    ChatRequest::try_from(parts).expect("valid")
}

/// A key file that only we can read.
fn key_file(folder: &Path, key: &str) -> PathBuf {
    let path = folder.join("pool.key");
    fs::write(&path, key).expect("the folder can be written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("it is ours");
    path
}

/// A server that treats each connection as `serve` does, in a thread of its own.
fn serve(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            let serve = Arc::clone(&serve);
            thread::spawn(move || serve(stream));
        }
    });
    address
}

/// Reads one request; head and body as they came.
fn read_request(stream: &mut TcpStream) -> (String, String) {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => bytes.push(byte[0]),
            _ => return (String::new(), String::new()),
        }
    }
    let head = String::from_utf8(bytes).expect("a head is text");
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().expect("a number"))];
    stream.read_exact(&mut body).expect("the whole body");
    (head, String::from_utf8(body).expect("a body is text"))
}

/// A server that answers every request with the same bytes and closes.
fn answers(bytes: impl Into<Vec<u8>>) -> SocketAddr {
    let bytes = bytes.into();
    serve(move |mut stream| {
        read_request(&mut stream);
        let _ = stream.write_all(&bytes);
    })
}

/// A streamed answer of these events.
fn events(events: &[&str]) -> String {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n";
    events.iter().fold(head.to_owned(), |text, event| format!("{text}data: {event}\n\n"))
}

/// One event with a delta.
fn chunk(delta: &str, finish: &str) -> String {
    format!(r#"{{"model":"m","choices":[{{"index":0,"delta":{delta},"finish_reason":{finish}}}]}}"#)
}
