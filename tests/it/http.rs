//! A small HTTP client that can misbehave, and a server to talk to.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use scoutd::chat::{Backend, Router};
use scoutd::metrics::Metrics;
use scoutd::rest::{self, Config, Keys, ModelDoor, Readiness, RestParts, StopHandle};

/// Longer than anything takes; a test that waits so long fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The real server on a free port, with a double behind it.
pub(crate) struct Server {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// What it counts.
    pub(crate) metrics: Arc<Metrics>,
    /// What its health says.
    pub(crate) readiness: Arc<Readiness>,
    /// What ends it.
    pub(crate) handle: StopHandle,
    /// Where it runs.
    pub(crate) runtime: tokio::runtime::Runtime,
}

impl Server {
    /// With the default configuration.
    pub(crate) fn start(backend: impl Backend + 'static) -> Server {
        Server::start_with(backend, Config::default(), "")
    }

    /// With another configuration and the content of a keys file.
    pub(crate) fn start_with(
        backend: impl Backend + 'static,
        config: Config,
        keys: &str,
    ) -> Server {
        Server::start_managing(backend, config, keys, None)
    }

    /// With a store of models.
    pub(crate) fn start_managing(
        backend: impl Backend + 'static,
        mut config: Config,
        keys: &str,
        models: Option<ModelDoor>,
    ) -> Server {
        config.listen = vec!["127.0.0.1:0".to_owned()];
        let metrics = Arc::new(Metrics::new());
        let readiness = Arc::new(Readiness::new());
        readiness.set_ready();
        let parts = RestParts {
            router: Router::new(vec![Arc::new(backend)]),
            metrics: Arc::clone(&metrics),
            readiness: Arc::clone(&readiness),
            keys: Keys::parse(keys).expect("valid keys"),
            default_deadline: Duration::from_secs(60),
            slots: 4,
            pool: None,
            models,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let server = rest::bind(&config, parts).expect("a free port");
        let (address, handle) = (server.addresses()[0], server.handle());
        runtime.spawn(server.run());
        Server { address, metrics, readiness, handle, runtime }
    }

    /// A new connection.
    pub(crate) fn connect(&self) -> Connection {
        let stream = TcpStream::connect(self.address).expect("listening");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        stream.set_write_timeout(Some(PATIENCE)).expect("a socket");
        Connection { stream: BufReader::new(stream) }
    }

    /// One request on a connection of its own.
    pub(crate) fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[&str],
        body: &str,
    ) -> Response {
        let mut connection = self.connect();
        connection.send(method, path, headers, body.as_bytes());
        connection.response(method)
    }

    /// A GET.
    pub(crate) fn get(&self, path: &str) -> Response {
        self.request("GET", path, &[], "")
    }

    /// A POST.
    pub(crate) fn post(&self, path: &str, body: &str) -> Response {
        self.request("POST", path, &[], body)
    }

    /// How many requests the door itself refused for `reason`.
    pub(crate) fn refused(&self, reason: &str) -> u64 {
        self.metrics.requests.with_label_values(&["rest", reason]).get()
    }
}

/// A connection.
pub(crate) struct Connection {
    /// For tests that send what nobody should.
    pub(crate) stream: BufReader<TcpStream>,
}

impl Connection {
    /// Sends a request; `Host` is this machine's unless `headers` name another.
    pub(crate) fn send(&mut self, method: &str, path: &str, headers: &[&str], body: &[u8]) {
        let mut head = format!("{method} {path} HTTP/1.1\r\n");
        if !headers.iter().any(|line| line.to_ascii_lowercase().starts_with("host:")) {
            head.push_str("Host: localhost\r\n");
        }
        if !body.is_empty() || method == "POST" {
            head.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        for line in headers {
            head.push_str(line);
            head.push_str("\r\n");
        }
        head.push_str("\r\n");
        self.raw(head.as_bytes());
        self.raw(body);
    }

    /// Sends bytes.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).expect("the server reads");
    }

    /// Reads a status line and headers.
    pub(crate) fn head(&mut self) -> Response {
        let status_line = self.line();
        let status = status_line
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .unwrap_or_else(|| panic!("no status line: {status_line:?}"));
        let mut headers = Vec::new();
        loop {
            let line = self.line();
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        Response { status, headers, body: Vec::new() }
    }

    /// Reads a whole response.
    pub(crate) fn response(&mut self, method: &str) -> Response {
        let mut response = self.head();
        if method == "HEAD" || response.status == 204 {
            return response;
        }
        if response.header("transfer-encoding") == Some("chunked") {
            while let Some(mut chunk) = self.chunk() {
                response.body.append(&mut chunk);
            }
        } else if let Some(len) = response.header("content-length") {
            response.body = vec![0; len.parse().expect("a length")];
            self.stream.read_exact(&mut response.body).expect("the whole body");
        } else {
            self.stream.read_to_end(&mut response.body).expect("the whole body");
        }
        response
    }

    /// The next chunk of a chunked body; `None` after the last.
    pub(crate) fn chunk(&mut self) -> Option<Vec<u8>> {
        let size = self.line();
        let size = usize::from_str_radix(size.trim(), 16)
            .unwrap_or_else(|_| panic!("no chunk size: {size:?}"));
        let mut chunk = vec![0; size + 2];
        self.stream.read_exact(&mut chunk).expect("the whole chunk");
        chunk.truncate(size);
        (size > 0).then_some(chunk)
    }

    /// Whether the server has closed the connection without another byte.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        matches!(self.stream.read(&mut byte), Ok(0) | Err(_))
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Response {
    /// Its code.
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    /// Unchunked.
    pub(crate) body: Vec<u8>,
}

impl Response {
    /// A header's value.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("UTF-8")
    }

    /// The body as JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.text()))
    }

    /// The lines of NDJSON.
    pub(crate) fn lines(&self) -> Vec<serde_json::Value> {
        self.text().lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// The objects of server-sent events, without the final `[DONE]`, which must be there.
    pub(crate) fn events(&self) -> Vec<serde_json::Value> {
        let mut events: Vec<&str> =
            self.text().split_terminator("\n\n").filter(|event| !event.starts_with(':')).collect();
        assert_eq!(events.pop(), Some("data: [DONE]"), "{}", self.text());
        events
            .iter()
            .map(|event| event.strip_prefix("data: ").expect("data"))
            .map(|json| serde_json::from_str(json).expect("JSON"))
            .collect()
    }
}
