//! Outgoing HTTP: every address is resolved and checked before it is connected to.
//!
//! One client for pulls and for other servers. It connects only to addresses that its [`Reach`] allows, and to
//! the very address that was checked, so a name that changes its mind between check and connection gains
//! nothing. Redirects are returned, never followed: where a hop may lead, and which headers may go along, only
//! the caller knows. Proxy variables are not read.

mod connector;
mod error;
mod reach;
mod tls;
mod url;

pub use bytes::Bytes;
pub use error::EgressError;
pub use hyper::{HeaderMap, Method, header};
pub use reach::{Reach, Scope, scope_of};
pub use url::Url;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use connector::{Connector, RemoteAddress};

/// What a client may connect to, and how long it waits.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Which addresses may be connected to.
    pub reach: Reach,
    /// From the name to a usable connection: resolving, connecting and the TLS handshake.
    pub connect_timeout: Duration,
    /// The longest silence while waiting for an answer's head or for more of its body; `None` leaves it to the
    /// caller.
    pub stall_timeout: Option<Duration>,
    /// Certificates (PEM) that are trusted beside the system's.
    pub extra_ca_pem: Option<Vec<u8>>,
    /// The `User-Agent` of requests that bring none.
    pub user_agent: String,
}

impl ClientConfig {
    /// The usual waits: 10 s to connect, the rest is the caller's.
    pub fn new(reach: Reach) -> ClientConfig {
        ClientConfig {
            reach,
            connect_timeout: Duration::from_secs(10),
            stall_timeout: None,
            extra_ca_pem: None,
            user_agent: concat!("scoutd/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// Sends requests over HTTP/1.1 and keeps a few idle connections; clones share them.
#[derive(Clone)]
pub struct Client {
    inner: legacy::Client<Connector, Full<Bytes>>,
    stall_timeout: Option<Duration>,
    user_agent: header::HeaderValue,
}

/// A request.
#[derive(Clone, Debug)]
pub struct Request {
    /// GET, HEAD, POST, …
    pub method: Method,
    /// Where to.
    pub url: Url,
    /// `Host`, `Content-Length` and `User-Agent` are added where absent.
    pub headers: HeaderMap,
    /// Empty for none.
    pub body: Bytes,
}

impl Request {
    /// A GET without headers.
    pub fn get(url: Url) -> Request {
        Request { method: Method::GET, url, headers: HeaderMap::new(), body: Bytes::new() }
    }

    /// A POST of JSON.
    pub fn post_json(url: Url, body: impl Into<Bytes>) -> Request {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        Request { method: Method::POST, url, headers, body: body.into() }
    }
}

/// An answer whose body is still to be read. Dropping it before its end closes the connection.
#[derive(Debug)]
pub struct Response {
    /// The status code; a redirect is an answer like any other.
    pub status: u16,
    /// Its headers.
    pub headers: HeaderMap,
    /// The address that answered.
    pub remote: SocketAddr,
    body: Incoming,
    host: String,
    stall_timeout: Option<Duration>,
}

impl Client {
    /// A client; nothing is connected yet.
    ///
    /// # Errors
    /// `Tls` if `extra_ca_pem` holds no certificate, `Address` if the user agent is no header value.
    pub fn new(config: ClientConfig) -> Result<Client, EgressError> {
        let user_agent = header::HeaderValue::from_str(&config.user_agent)
            .map_err(|error| EgressError::Address { message: format!("user agent: {error}") })?;
        let connector = Connector {
            reach: Arc::new(config.reach),
            tls: tls::client_config(config.extra_ca_pem.as_deref())?,
            timeout: config.connect_timeout,
        };
        let inner = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(IDLE_PER_HOST_MAX)
            .http1_title_case_headers(true)
            .http1_max_headers(HEADERS_MAX)
            .build(connector);
        Ok(Client { inner, stall_timeout: config.stall_timeout, user_agent })
    }

    /// Sends a request and waits for the head of its answer. Dropping the future closes the connection.
    ///
    /// # Errors
    /// As [`EgressError`] says; every status code is an answer, not an error.
    pub async fn send(&self, request: Request) -> Result<Response, EgressError> {
        let host = request.url.host().to_owned();
        let mut outgoing = hyper::Request::new(Full::new(request.body));
        *outgoing.method_mut() = request.method;
        *outgoing.uri_mut() = request.url.into();
        *outgoing.headers_mut() = request.headers;
        outgoing.headers_mut().entry(header::USER_AGENT).or_insert_with(|| self.user_agent.clone());
        let answer = bounded(self.stall_timeout, &host, self.inner.request(outgoing)).await?;
        let (head, body) =
            answer.map_err(|error| EgressError::from_send(&error, &host))?.into_parts();
        // Every connection of our connector carries its address.
        let remote = head.extensions.get::<RemoteAddress>().map(|remote| remote.0);
        let remote = remote.ok_or_else(|| EgressError::Protocol {
            host: host.clone(),
            message: "connection without an address".to_owned(),
        })?;
        Ok(Response {
            status: head.status.as_u16(),
            headers: head.headers,
            remote,
            body,
            host,
            stall_timeout: self.stall_timeout,
        })
    }
}

impl Response {
    /// The next piece of the body, `None` at its end. A body shorter than its announced length is an error.
    ///
    /// # Errors
    /// `Reset`, `Stalled` or `Protocol`.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, EgressError> {
        loop {
            let next = bounded(self.stall_timeout, &self.host, self.body.frame()).await?;
            match next {
                None => return Ok(None),
                Some(Err(error)) => return Err(EgressError::from_body(&error, &self.host)),
                // Trailers carry nothing that we use.
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => return Ok(Some(data)),
                    Err(_) => {}
                },
            }
        }
    }

    /// The whole body.
    ///
    /// # Errors
    /// As [`Response::chunk`], and `TooLong` beyond `limit` bytes.
    pub async fn body(&mut self, limit: usize) -> Result<Vec<u8>, EgressError> {
        let mut all = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            if all.len() + chunk.len() > limit {
                return Err(EgressError::TooLong { host: self.host.clone(), limit });
            }
            all.extend_from_slice(&chunk);
        }
        Ok(all)
    }

    /// A header's value, if it is there and is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

async fn bounded<T>(
    limit: Option<Duration>,
    host: &str,
    work: impl Future<Output = T>,
) -> Result<T, EgressError> {
    let Some(limit) = limit else { return Ok(work.await) };
    tokio::time::timeout(limit, work)
        .await
        .map_err(|_| EgressError::Stalled { host: host.to_owned(), after: limit })
}

/// Servers close idle connections after some seconds; whoever keeps them longer only meets dead ones.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
const IDLE_PER_HOST_MAX: usize = 4;
const HEADERS_MAX: usize = 128;
