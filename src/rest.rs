//! The HTTP door: OpenAI's and Ollama's API, health, metrics and one page for browsers.
//!
//! It translates and guards, and nothing else: what it answers comes from the [`Router`] it is given, and a
//! handler never waits for anything but the client and that answer. Two threads serve all connections, so
//! listings and health answer while every other core decodes.

mod active;
mod answer;
mod body;
mod config;
mod door;
mod error;
mod guard;
mod keys;
mod models;
mod ollama;
mod openai;
mod page;
mod pool;
mod readiness;
mod routes;

pub use config::{Config, Limits};
pub use keys::{KeyError, Keys, Scope};
pub use models::ModelDoor;
pub use pool::PoolDoor;
pub use readiness::Readiness;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use actix_web::dev::{Extensions, Server, ServerHandle};
use actix_web::rt::net::TcpStream;
use actix_web::{App, HttpServer, web};

use crate::chat::Router;
use crate::metrics::Metrics;

use active::Active;
use guard::Guard;
use keys::Access;

/// What the door works with.
pub struct RestParts {
    /// Who answers.
    pub router: Router,
    /// What `/metrics` shows, and where requests are counted.
    pub metrics: Arc<Metrics>,
    /// What `/health` and `/readyz` say.
    pub readiness: Arc<Readiness>,
    /// The content of [`Config::keys_file`], read by whoever starts the door; none means no keys.
    pub keys: Keys,
    /// How long a request may take that does not say.
    pub default_deadline: Duration,
    /// How many requests are answered at once, for `/props`.
    pub slots: u16,
    /// The other machines, if there is a pool.
    pub pool: Option<PoolDoor>,
    /// The store, if models are managed over HTTP.
    pub models: Option<ModelDoor>,
}

/// A server whose ports are open and which nobody serves yet.
pub struct BoundServer {
    /// None where there is no port.
    server: Option<Server>,
    addresses: Vec<SocketAddr>,
    shared: Arc<Shared>,
}

/// Ends a running server; clones end the same one.
#[derive(Clone)]
pub struct StopHandle {
    server: Option<ServerHandle>,
    shared: Arc<Shared>,
}

/// What every handler sees.
struct Shared {
    router: Router,
    metrics: Arc<Metrics>,
    readiness: Arc<Readiness>,
    access: Access,
    guard: Guard,
    limits: Limits,
    default_deadline: Duration,
    slots: u16,
    pool: Option<PoolDoor>,
    models: Option<ModelDoor>,
    active: Arc<Active>,
    body_budget: Arc<tokio::sync::Semaphore>,
    connections: Arc<Mutex<HashMap<IpAddr, usize>>>,
    page: page::Page,
}

/// Opens every port of `config`.
///
/// # Errors
/// An address that cannot be resolved or bound, a rule that does not parse, or an address beyond loopback
/// without a key; each names what it is about.
pub fn bind(config: &Config, parts: RestParts) -> io::Result<BoundServer> {
    let mut listeners = Vec::new();
    for address in &config.listen {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{address}: {error}"));
        for resolved in address.to_socket_addrs().map_err(named)? {
            listeners.push(TcpListener::bind(resolved).map_err(named)?);
        }
    }
    let addresses =
        listeners.iter().map(TcpListener::local_addr).collect::<io::Result<Vec<_>>>()?;
    let lan = addresses.iter().any(|address| !address.ip().is_loopback());
    let has_gate = parts.pool.as_ref().is_some_and(|door| door.pool.gate().is_some());
    let shared = Arc::new(Shared {
        router: parts.router,
        metrics: parts.metrics,
        readiness: parts.readiness,
        access: Access::new(config, parts.keys, lan, has_gate).map_err(invalid_input)?,
        guard: Guard::new(&config.allowed_hosts, &config.allowed_origins),
        limits: config.limits,
        default_deadline: parts.default_deadline,
        slots: parts.slots,
        pool: parts.pool,
        models: parts.models,
        active: Arc::default(),
        body_budget: Arc::new(body::budget(&config.limits)),
        connections: Arc::default(),
        page: page::Page::new(),
    });
    let server = match listeners.is_empty() {
        true => None,
        false => Some(build(listeners, Arc::clone(&shared))?),
    };
    Ok(BoundServer { server, addresses, shared })
}

impl BoundServer {
    /// Where it listens; a port of 0 has become a real one.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// What ends it.
    pub fn handle(&self) -> StopHandle {
        let server = self.server.as_ref().map(Server::handle);
        StopHandle { server, shared: Arc::clone(&self.shared) }
    }

    /// Serves until it is stopped, or not at all where there is no port. Runs on any Tokio runtime; the connections live on threads of their own.
    ///
    /// # Errors
    /// The threads could not be started.
    pub async fn run(self) -> io::Result<()> {
        match self.server {
            Some(server) => server.await,
            None => Ok(()),
        }
    }
}

impl StopHandle {
    /// Refuses new requests, lets running ones end for at most `grace`, ends the rest with an error, and stops.
    pub async fn stop(&self, grace: Duration) {
        self.shared.readiness.set_draining();
        let _ = tokio::time::timeout(grace, self.shared.active.idle()).await;
        self.shared.active.cut();
        let _ = tokio::time::timeout(CUT_PATIENCE, self.shared.active.idle()).await;
        if let Some(server) = &self.server {
            server.stop(true).await;
        }
    }
}

/// How long streams that were told to end may take to be written out.
const CUT_PATIENCE: Duration = Duration::from_secs(1);

/// How many threads serve connections.
const WORKERS: usize = 2;

fn build(listeners: Vec<TcpListener>, shared: Arc<Shared>) -> io::Result<Server> {
    let limits = shared.limits;
    let for_connections = Arc::clone(&shared);
    let mut server = HttpServer::new(move || {
        App::new()
            .app_data(web::Data::from(Arc::clone(&shared)))
            .default_service(web::to(door::handle))
    })
    .workers(WORKERS)
    .worker_max_blocking_threads(2)
    .max_connections(limits.connections.div_ceil(WORKERS).max(1))
    .client_request_timeout(Duration::from_millis(limits.header_timeout_ms))
    .keep_alive(Duration::from_secs(30))
    // With the default a client that has gone is not noticed while its answer is computed.
    .h1_allow_half_closed(false)
    .h1_write_buffer_size(16 * 1024)
    .shutdown_timeout(2)
    .disable_signals()
    .on_connect(move |connection, extensions| {
        if let Some(stream) = connection.downcast_ref::<TcpStream>() {
            admit(stream, &for_connections, extensions);
        }
    });
    for listener in listeners {
        server = server.listen(listener)?;
    }
    Ok(server.run())
}

/// Bounds what a connection may cost, and closes it at once if its client holds too many.
///
/// A client that does not read leaves its answer in the socket's send buffer, which no ledger counts: it is
/// kept small, and the kernel ends the connection when nothing has moved for a while.
fn admit(stream: &TcpStream, shared: &Arc<Shared>, extensions: &mut Extensions) {
    let limits = &shared.limits;
    let stalled_ms = u32::try_from(limits.stalled_ms).unwrap_or(u32::MAX);
    let tuned = rustix::net::sockopt::set_socket_send_buffer_size(stream, SEND_BUFFER_BYTES)
        .and_then(|()| rustix::net::sockopt::set_tcp_user_timeout(stream, stalled_ms))
        .and_then(|()| rustix::net::sockopt::set_socket_keepalive(stream, true))
        .and_then(|()| rustix::net::sockopt::set_tcp_nodelay(stream, true));
    if let Err(error) = tuned {
        log::debug!(target: "rest", error:% = error; "socket options refused");
    }
    if let Ok(local) = stream.local_addr() {
        extensions.insert(pool::LocalAddress(local.ip()));
    }
    let Ok(peer) = stream.peer_addr() else { return };
    let slot = ConnectionSlot::take(&shared.connections, keys::plain_ip(peer.ip()));
    if slot.count > limits.connections_per_client {
        log::warn!(target: "rest", client:% = peer.ip(); "too many connections of one client");
        let _ = rustix::net::shutdown(stream, rustix::net::Shutdown::Both);
    }
    extensions.insert(Arc::new(slot));
}

const SEND_BUFFER_BYTES: usize = 64 * 1024;

/// One of a client's connections; given back when the connection ends.
struct ConnectionSlot {
    connections: Arc<Mutex<HashMap<IpAddr, usize>>>,
    client: IpAddr,
    /// Connections of this client, this one included.
    count: usize,
}

impl ConnectionSlot {
    fn take(connections: &Arc<Mutex<HashMap<IpAddr, usize>>>, client: IpAddr) -> ConnectionSlot {
        let mut counts = connections.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(client).or_insert(0);
        *count += 1;
        ConnectionSlot { connections: Arc::clone(connections), client, count: *count }
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        let mut counts = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.client);
            }
        }
    }
}

fn invalid_input(error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error.to_string())
}
