//! The MQTT door: requests, answers, telemetry and Home Assistant discovery over a broker, which may be the
//! embedded one.
//!
//! Translation and nothing else: payload shapes are [`crate::wire::mqtt`]'s, answers are the backends'. What a
//! topic means is known in this module alone. `docs/reference/mqtt.md` says it for users.

mod answer;
mod broker;
mod discovery;
mod door;
mod link;
mod outbox;
mod queue;
mod requests;
mod telemetry;
mod tls;
mod topics;
mod v311;
mod v5;

pub use self::queue::PoolLine;

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::chat::Router;
use crate::metrics::Metrics;

use self::broker::{EmbeddedBroker, Login};
use self::door::Door;
use self::link::{LinkOptions, Protocol};
use self::queue::{Queue, QueueParts};
use self::topics::{PoolTopics, Topics};

/// Settings of the MQTT door.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Whether there is an MQTT door at all.
    pub enabled: bool,
    /// `embedded`, or where a broker is: `host`, `host:port`, `mqtt://…` or `mqtts://…` (TLS).
    pub broker: String,
    /// Where the embedded broker listens; beyond loopback only with `username` and `password_file`.
    pub listen: SocketAddr,
    /// This machine's name in topics; absent is the host's name.
    pub node: Option<String>,
    /// What every topic begins with.
    pub base: String,
    /// `auto`, `5` or `3.1.1`.
    pub protocol: ProtocolChoice,
    /// Name shown to the broker; required of clients by the embedded one.
    pub username: Option<String>,
    /// File whose first line is the password.
    pub password_file: Option<PathBuf>,
    /// Certificates (PEM) to trust instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// Whether Home Assistant is told about us.
    pub discovery: bool,
    /// Home Assistant's discovery prefix.
    pub discovery_prefix: String,
    /// Beginnings of topics outside our own on which clients may have answers published.
    pub answer_prefixes: Vec<String>,
    /// Largest request.
    pub payload_bytes_max: usize,
    /// How long a request may take that names no deadline.
    pub deadline_s: u64,
    /// Requests at once; more are refused as `queue_full`.
    pub requests_max: u16,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            enabled: true,
            broker: EMBEDDED.to_owned(),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 1883)),
            node: None,
            base: "scoutd".to_owned(),
            protocol: ProtocolChoice::Auto,
            username: None,
            password_file: None,
            ca_file: None,
            discovery: true,
            discovery_prefix: "homeassistant".to_owned(),
            answer_prefixes: Vec::new(),
            payload_bytes_max: 256 << 10,
            deadline_s: 300,
            requests_max: 64,
        }
    }
}

/// Which version of MQTT is spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum ProtocolChoice {
    /// 5, and 3.1.1 where that is refused.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// 3.1.1 only.
    #[serde(rename = "3.1.1")]
    V311,
    /// 5 only.
    #[serde(rename = "5")]
    V5,
}

/// What the door is connected to inside the process.
pub struct MqttParts {
    /// Who answers.
    pub router: Router,
    /// What is published as `state`.
    pub metrics: Arc<Metrics>,
    /// The host's name, where the configuration names no node.
    pub host: String,
    /// The program's version.
    pub version: String,
    /// The board, as `Raspberry Pi 5`.
    pub board: Option<String>,
    /// The page of the REST door, as seen from the network.
    pub url: Option<String>,
    /// More for the retained `info`: commit, operating system, doors. No secrets.
    pub info: Map<String, Value>,
    /// The contents of the configured files.
    pub secrets: Secrets,
    /// The pool's line of requests, if this node takes from it.
    pub line: Option<PoolLine>,
}

/// The contents of `password_file` and `ca_file`.
#[derive(Clone, Default)]
pub struct Secrets {
    /// The password.
    pub password: Option<String>,
    /// Certificates in PEM.
    pub ca_pem: Option<Vec<u8>>,
}

impl fmt::Debug for Secrets {
    /// Says which are there, never what they are.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secrets")
            .field("password", &self.password.is_some())
            .field("ca_pem", &self.ca_pem.is_some())
            .finish()
    }
}

/// Why the door could not open.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MqttError {
    /// The embedded broker's address cannot be bound.
    #[error("mqtt: the embedded broker cannot listen on {listen}: {source}")]
    Bind {
        /// The address.
        listen: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The embedded broker failed.
    #[error("mqtt: the embedded broker failed: {0}")]
    Broker(String),
    /// A setting makes no sense.
    #[error("mqtt: {0}")]
    Config(String),
    /// The embedded broker would serve the network without a password.
    #[error(
        "mqtt: the embedded broker would be open to the network on {0}: set mqtt.username and mqtt.password_file, \
         or listen on loopback"
    )]
    OpenBroker(SocketAddr),
    /// Something else listens where the embedded broker should.
    #[error(
        "mqtt: {0} is in use, probably by another broker: use that one with mqtt.broker = \"{0}\", or give the \
         embedded one another port with mqtt.listen"
    )]
    PortTaken(SocketAddr),
    /// A file of the configuration cannot be read.
    #[error("mqtt: cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// TLS cannot be set up.
    #[error("mqtt: TLS: {0}")]
    Tls(String),
}

impl Config {
    /// Checks what can be checked without a connection, for a check-only run.
    ///
    /// # Errors
    /// The first setting that makes no sense.
    pub fn check(&self, host: &str) -> Result<(), MqttError> {
        self.topics(host)?;
        self.broker_address()?;
        let bad = |message: &str| Err(MqttError::Config(message.to_owned()));
        if self.password_file.is_some() && self.username.is_none() {
            return bad("mqtt.password_file needs mqtt.username");
        }
        if !(1024..=1 << 20).contains(&self.payload_bytes_max) {
            return bad("mqtt.payload_bytes_max must be between 1024 and 1048576");
        }
        if !(1..=86_400).contains(&self.deadline_s) {
            return bad("mqtt.deadline_s must be between 1 and 86400");
        }
        if self.requests_max == 0 {
            return bad("mqtt.requests_max must be at least 1");
        }
        Ok(())
    }

    /// Reads `password_file` and `ca_file`.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn read_secrets(&self) -> Result<Secrets, MqttError> {
        let read = |path: &Option<PathBuf>| -> Result<Option<Vec<u8>>, MqttError> {
            let Some(path) = path else { return Ok(None) };
            let failed = |source| MqttError::Read { path: path.clone(), source };
            std::fs::read(path).map(Some).map_err(failed)
        };
        let password = read(&self.password_file)?.map(|bytes| {
            let text = String::from_utf8_lossy(&bytes);
            text.lines().next().unwrap_or_default().to_owned()
        });
        Ok(Secrets { password, ca_pem: read(&self.ca_file)? })
    }

    fn topics(&self, host: &str) -> Result<Topics, MqttError> {
        let node = self.node.clone().unwrap_or_else(|| topics::node_of_host(host));
        Topics::new(&self.base, &node, &self.discovery_prefix, &self.answer_prefixes)
            .map_err(|error| MqttError::Config(error.to_string()))
    }

    /// The configured broker; `None` is the embedded one.
    fn broker_address(&self) -> Result<Option<BrokerAddress>, MqttError> {
        if self.broker == EMBEDDED {
            return Ok(None);
        }
        BrokerAddress::parse(&self.broker).map(Some).ok_or_else(|| {
            let broker = &self.broker;
            let rule = "`embedded`, `host`, `host:port`, `mqtt://host:port` or `mqtts://host:port`";
            MqttError::Config(format!("mqtt.broker must be {rule}, not `{broker}`"))
        })
    }
}

/// Where a broker is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct BrokerAddress {
    host: String,
    port: u16,
    tls: bool,
}

impl BrokerAddress {
    fn parse(text: &str) -> Option<BrokerAddress> {
        let (tls, rest) = match text.split_once("://") {
            Some(("mqtt" | "tcp", rest)) => (false, rest),
            Some(("mqtts" | "ssl" | "tls", rest)) => (true, rest),
            Some(_) => return None,
            None => (false, text),
        };
        let rest = rest.trim_end_matches('/');
        let default = if tls { 8883 } else { 1883 };
        let (host, port) = match rest.rsplit_once(':') {
            // The last colon of a bare `[::1]` belongs to the address.
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
            _ => (rest, default),
        };
        let bracketed = host.starts_with('[') && host.ends_with(']');
        let plain = host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b));
        let fits = !host.is_empty() && port != 0 && (plain || bracketed);
        fits.then(|| BrokerAddress { host: host.to_owned(), port, tls })
    }
}

/// A running door.
pub struct MqttDoor {
    topic_root: String,
    broker: String,
    embedded: Option<EmbeddedBroker>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
    queue: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl MqttDoor {
    /// `<base>/<node>`, for the banner.
    pub fn topic_root(&self) -> &str {
        &self.topic_root
    }

    /// The broker it talks to, as `host:port`.
    pub fn broker(&self) -> &str {
        &self.broker
    }

    /// Where the embedded broker listens, if it is used.
    pub fn embedded_address(&self) -> Option<SocketAddr> {
        self.embedded.as_ref().map(EmbeddedBroker::address)
    }

    /// Ends what runs with `draining`, says `offline` and goodbye, and stops the embedded broker. Bounded to a few
    /// seconds.
    pub async fn stop(mut self) {
        if let Some((stop, mut task)) = self.queue.take() {
            let _ = stop.send(());
            if tokio::time::timeout(STOP_TIMEOUT, &mut task).await.is_err() {
                task.abort();
            }
        }
        if let Some(stop) = self.stop.take() {
            // The task may have ended by itself.
            let _ = stop.send(());
        }
        if tokio::time::timeout(STOP_TIMEOUT, &mut self.task).await.is_err() {
            self.task.abort();
        }
        if let Some(embedded) = self.embedded.take() {
            embedded.stop().await;
        }
    }
}

impl Drop for MqttDoor {
    fn drop(&mut self) {
        self.task.abort();
        if let Some((_, task)) = &self.queue {
            task.abort();
        }
    }
}

/// Opens the door: starts the embedded broker if it is wanted, then connects and stays connected. Returns as soon
/// as that is under way; a broker that is away is tried again and again.
///
/// # Errors
/// A setting that makes no sense, or the embedded broker's address is taken.
pub async fn start(config: Config, parts: MqttParts) -> Result<MqttDoor, MqttError> {
    config.check(&parts.host)?;
    let topics = config.topics(&parts.host)?;
    let login = match (&config.username, &parts.secrets.password) {
        (Some(username), Some(password)) => {
            Some(Login { username: username.clone(), password: password.clone() })
        }
        _ => None,
    };
    let (address, embedded) = match config.broker_address()? {
        Some(address) => (address, None),
        None => {
            let embedded = EmbeddedBroker::start(config.listen, login).await?;
            (loopback(embedded.address()), Some(embedded))
        }
    };
    let ca_pem = parts.secrets.ca_pem.as_deref();
    let tls = address.tls.then(|| tls::client_config(ca_pem)).transpose()?;
    let mut filters = topics.filters().to_vec();
    if config.discovery {
        filters.push(topics.birth());
    }
    let broker = format!("{}:{}", address.host, address.port);
    let options = LinkOptions {
        host: address.host,
        port: address.port,
        tls,
        client_id: format!("scoutd-{}", topics.node()),
        username: config.username.clone(),
        password: parts.secrets.password.clone(),
        will_topic: topics.own("availability"),
        will_payload: "offline",
        receive_max: config.requests_max,
        keeps_session: true,
        filters,
    };
    let queue = parts.line.clone().map(|line| open_line(&config, &options, &topics, &parts, line));
    let topic_root = topics.root().to_owned();
    let (stop, stopped) = oneshot::channel();
    let door = Door::new(config, topics, options, parts, embedded.is_some());
    let task = tokio::spawn(door.run(stopped));
    Ok(MqttDoor { topic_root, broker, embedded, stop: Some(stop), task, queue })
}

/// Opens the pool's line on a connection of its own.
fn open_line(
    config: &Config,
    door: &LinkOptions,
    topics: &Topics,
    parts: &MqttParts,
    line: PoolLine,
) -> (oneshot::Sender<()>, JoinHandle<()>) {
    let topics = PoolTopics::new(&config.base, line.pool.name(), topics.node());
    let options = LinkOptions {
        client_id: format!("{}-pool", door.client_id),
        will_topic: topics.status(),
        receive_max: 1,
        keeps_session: false,
        filters: topics.filters(),
        ..door.clone()
    };
    let (stop, stopped) = oneshot::channel();
    let queue = Queue::new(QueueParts {
        topics,
        options,
        line,
        router: parts.router.clone(),
        metrics: Arc::clone(&parts.metrics),
        default_deadline: Duration::from_secs(config.deadline_s),
    });
    (stop, tokio::spawn(queue.run(stopped)))
}

/// How to reach our own broker: an unspecified address is no destination.
fn loopback(listen: SocketAddr) -> BrokerAddress {
    let host = match listen {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => "127.0.0.1".to_owned(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => "[::1]".to_owned(),
        SocketAddr::V4(v4) => v4.ip().to_string(),
        SocketAddr::V6(v6) => format!("[{}]", v6.ip()),
    };
    BrokerAddress { host, port: listen.port(), tls: false }
}

impl ProtocolChoice {
    fn first(self) -> Protocol {
        match self {
            ProtocolChoice::Auto | ProtocolChoice::V5 => Protocol::V5,
            ProtocolChoice::V311 => Protocol::V311,
        }
    }
}

/// The value of `broker` that means our own.
const EMBEDDED: &str = "embedded";

const STOP_TIMEOUT: Duration = Duration::from_secs(8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brokers_are_read_from_many_spellings() {
        let address = |host: &str, port, tls| Some(BrokerAddress { host: host.into(), port, tls });
        let cases = [
            ("nas", address("nas", 1883, false)),
            ("nas.local:1884", address("nas.local", 1884, false)),
            ("192.168.1.2:1883", address("192.168.1.2", 1883, false)),
            ("mqtt://nas", address("nas", 1883, false)),
            ("mqtts://nas", address("nas", 8883, true)),
            ("mqtts://nas:8884/", address("nas", 8884, true)),
            ("[::1]", address("[::1]", 1883, false)),
            ("[::1]:1884", address("[::1]", 1884, false)),
            ("http://nas", None),
            ("", None),
            (":1883", None),
            ("nas:", None),
            ("nas:0", None),
            ("nas:99999", None),
            ("user@nas", None),
            ("::1", None),
        ];
        for (text, expected) in cases {
            assert_eq!(BrokerAddress::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn settings_that_make_no_sense_are_named() {
        let check = |change: fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            config.check("pi5").map_err(|error| error.to_string())
        };
        assert_eq!(check(|_| {}), Ok(()));
        let refused = |change, named: &str| {
            let error = check(change).expect_err(named);
            assert!(error.contains(named), "{error}");
        };
        refused(|c| c.broker = "http://x".into(), "mqtt.broker");
        refused(|c| c.base = "#".into(), "mqtt.base");
        refused(|c| c.node = Some("pool".into()), "mqtt.node");
        refused(|c| c.deadline_s = 0, "mqtt.deadline_s");
        refused(|c| c.payload_bytes_max = 1 << 30, "mqtt.payload_bytes_max");
        refused(|c| c.password_file = Some("x".into()), "mqtt.username");
    }

    #[test]
    fn secrets_are_never_shown() {
        let secrets = Secrets { password: Some("hunter2".into()), ca_pem: None };
        assert!(!format!("{secrets:?}").contains("hunter2"));
    }
}
