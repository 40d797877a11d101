//! A hub for tests: the protocol of the real one on two raw TCP listeners, and whatever can go wrong with it.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::http::PATIENCE;

/// The commit that the hub's only branch points to.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A file of the repository. Large ones lie on the second host.
#[derive(Clone)]
pub(crate) struct Served {
    pub(crate) path: &'static str,
    pub(crate) bytes: Arc<Vec<u8>>,
    pub(crate) large: bool,
}

impl Served {
    pub(crate) fn large(path: &'static str, bytes: Vec<u8>) -> Served {
        Served { path, bytes: Arc::new(bytes), large: true }
    }

    pub(crate) fn small(path: &'static str, bytes: &[u8]) -> Served {
        Served { path, bytes: Arc::new(bytes.to_vec()), large: false }
    }

    fn digest(&self) -> String {
        digest(&self.bytes)
    }
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What goes wrong with one answer.
pub(crate) enum Fault {
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// One byte of the body is another.
    Flipped,
    /// After so many bytes of the body nothing comes until somebody says so, then the rest.
    Held(usize, Receiver<()>),
    /// The whole file, whatever range was asked for.
    NoRange,
    /// The announced length is one byte too large.
    Longer,
    /// A redirect to somewhere else.
    Redirect(String),
    /// This status with these header lines.
    Status(u16, &'static str),
}

/// What was asked.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) large: bool,
    pub(crate) target: String,
    pub(crate) head: String,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    }
}

struct State {
    repo: &'static str,
    files: Vec<Served>,
    second: SocketAddr,
    /// Without it nothing is answered, if there is one.
    token: Option<&'static str>,
    seen: Mutex<Vec<Seen>>,
    faults: [Mutex<VecDeque<Fault>>; 2],
}

/// A running hub.
pub(crate) struct FakeHub {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
}

impl FakeHub {
    pub(crate) fn start(repo: &'static str, files: Vec<Served>) -> FakeHub {
        FakeHub::start_with(repo, files, None)
    }

    pub(crate) fn start_with(
        repo: &'static str,
        files: Vec<Served>,
        token: Option<&'static str>,
    ) -> FakeHub {
        let first = TcpListener::bind("127.0.0.1:0").expect("a free port");
        // All of 127/8 is this machine: another address is another host.
        let second = TcpListener::bind("127.0.0.2:0").expect("a free port");
        let address = first.local_addr().expect("bound");
        let state = Arc::new(State {
            repo,
            files,
            second: second.local_addr().expect("bound"),
            token,
            seen: Mutex::new(Vec::new()),
            faults: Default::default(),
        });
        for (listener, large) in [(first, false), (second, true)] {
            let state = Arc::clone(&state);
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let state = Arc::clone(&state);
                    std::thread::spawn(move || state.answer(stream, large));
                }
            });
        }
        FakeHub { address, state }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What goes wrong with the next answers of the hub itself.
    pub(crate) fn fail(&self, fault: Fault) {
        lock(&self.state.faults[0]).push_back(fault);
    }

    /// What goes wrong with the next answers of the second host.
    pub(crate) fn fail_large(&self, fault: Fault) {
        lock(&self.state.faults[1]).push_back(fault);
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        lock(&self.state.seen).clone()
    }

    /// The ranges asked of the second host, in order; a whole file is `-`.
    pub(crate) fn ranges(&self) -> Vec<String> {
        let seen = self.seen().into_iter().filter(|seen| seen.large);
        seen.map(|seen| seen.header("range").unwrap_or("-").to_owned()).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no test panics in here")
}

impl State {
    /// One request a connection.
    fn answer(&self, stream: TcpStream, large: bool) {
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut stream = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head).map_or(true, |bytes| bytes == 0) {
                return;
            }
        }
        let target = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let seen = Seen { large, target, head };
        lock(&self.seen).push(seen.clone());
        let fault = lock(&self.faults[usize::from(large)]).pop_front();
        let stream = stream.get_mut();
        let _ = match (fault, large) {
            (Some(Fault::Status(status, lines)), _) => {
                write!(
                    stream,
                    "HTTP/1.1 {status} X\r\n{lines}Content-Length: 0\r\nConnection: close\r\n\r\n"
                )
            }
            (Some(Fault::Redirect(location)), _) => redirect(stream, &location, ""),
            (fault, true) => self.large(stream, &seen, fault),
            (fault, false) => self.hub(stream, &seen, fault),
        };
    }

    fn hub(
        &self,
        stream: &mut TcpStream,
        seen: &Seen,
        fault: Option<Fault>,
    ) -> std::io::Result<()> {
        let wanted = self.token.map(|token| format!("Bearer {token}"));
        if wanted.is_some() && seen.header("authorization") != wanted.as_deref() {
            let lines = "X-Error-Code: GatedRepo\r\nX-Error-Message: Access is restricted\r\n";
            return refuse(stream, 401, lines);
        }
        let path = seen.target.split('?').next().unwrap_or_default();
        let listing = format!("/api/models/{}", self.repo);
        if path == listing || path == format!("{listing}/revision/main") {
            let body = self.listing().to_string();
            return whole(stream, body.as_bytes(), "Content-Type: application/json\r\n");
        }
        if path.starts_with(&listing) {
            return refuse(stream, 404, "X-Error-Code: RevisionNotFound\r\n");
        }
        let resolve = format!("/{}/resolve/{COMMIT}/", self.repo);
        let Some(name) = path.strip_prefix(&resolve) else {
            // As the real one answers strangers about what is not there.
            return refuse(stream, 401, "X-Error-Message: Invalid username or password.\r\n");
        };
        let Some(file) = self.files.iter().find(|file| file.path == name) else {
            return refuse(stream, 404, "X-Error-Code: EntryNotFound\r\n");
        };
        if !file.large {
            return send(stream, seen, &file.bytes, "\"small\"", fault);
        }
        let (digest, size) = (file.digest(), file.bytes.len());
        let lines = format!(
            "X-Repo-Commit: {COMMIT}\r\nX-Linked-Etag: \"{digest}\"\r\nX-Linked-Size: {size}\r\n"
        );
        redirect(stream, &format!("http://{}/blobs/{digest}?signed=1", self.second), &lines)
    }

    fn large(
        &self,
        stream: &mut TcpStream,
        seen: &Seen,
        fault: Option<Fault>,
    ) -> std::io::Result<()> {
        if seen.header("authorization").is_some() {
            return refuse(stream, 400, "");
        }
        let digest = seen.target.trim_start_matches("/blobs/").split('?').next();
        let file = self.files.iter().find(|file| Some(file.digest().as_str()) == digest);
        match file {
            Some(file) => send(stream, seen, &file.bytes, "\"blob\"", fault),
            None => refuse(stream, 404, ""),
        }
    }

    fn listing(&self) -> Value {
        let files = self.files.iter().map(|file| {
            let size = file.bytes.len();
            let lfs = json!({"sha256": file.digest(), "size": size, "pointerSize": 134});
            match file.large {
                true => json!({"rfilename": file.path, "size": size, "blobId": "b", "lfs": lfs}),
                false => json!({"rfilename": file.path, "size": size, "blobId": "b"}),
            }
        });
        json!({
            "id": self.repo, "modelId": self.repo, "sha": COMMIT, "private": false,
            "siblings": files.collect::<Vec<_>>(),
            "cardData": {"license": "apache-2.0", "license_link": "https://example.org/licence"},
        })
    }
}

/// A file or the range of it that was asked for.
fn send(
    stream: &mut TcpStream,
    seen: &Seen,
    bytes: &[u8],
    etag: &str,
    fault: Option<Fault>,
) -> std::io::Result<()> {
    let range = seen.header("range").filter(|_| !matches!(fault, Some(Fault::NoRange)));
    let range = range.filter(|_| seen.header("if-range").is_none_or(|tag| tag == etag));
    let bounds = range.and_then(|range| {
        let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
        let end = end.parse().map_or(bytes.len(), |last: usize| last + 1).min(bytes.len());
        Some((start.parse().ok()?, end))
    });
    let mut head = format!("ETag: {etag}\r\nAccept-Ranges: bytes\r\n");
    let (status, body) = match bounds {
        Some((start, _)) if start >= bytes.len() => return refuse(stream, 416, ""),
        Some((start, end)) => {
            head += &format!("Content-Range: bytes {start}-{}/{}\r\n", end - 1, bytes.len());
            (206, &bytes[start..end])
        }
        None => (200, bytes),
    };
    let length = body.len() + usize::from(matches!(fault, Some(Fault::Longer)));
    write!(
        stream,
        "HTTP/1.1 {status} X\r\n{head}Content-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    if seen.head.starts_with("HEAD ") {
        return Ok(());
    }
    match fault {
        Some(Fault::Cut(after)) => stream.write_all(&body[..after.min(body.len())]),
        Some(Fault::Flipped) => {
            let mut body = body.to_vec();
            let middle = body.len() / 2;
            body[middle] ^= 1;
            stream.write_all(&body)
        }
        Some(Fault::Held(after, release)) => {
            stream.write_all(&body[..after.min(body.len())])?;
            stream.flush()?;
            // Ends also when the test does.
            let _ = release.recv_timeout(PATIENCE);
            stream.write_all(&body[after.min(body.len())..])
        }
        _ => stream.write_all(body),
    }
}

fn whole(stream: &mut TcpStream, body: &[u8], lines: &str) -> std::io::Result<()> {
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\n{lines}Content-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    stream.write_all(body)
}

fn redirect(stream: &mut TcpStream, location: &str, lines: &str) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 302 Found\r\nLocation: {location}\r\n{lines}Content-Length: 0\r\nConnection: close\r\n\r\n"
    )
}

fn refuse(stream: &mut TcpStream, status: u16, lines: &str) -> std::io::Result<()> {
    let body = "no";
    write!(
        stream,
        "HTTP/1.1 {status} X\r\n{lines}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}
