//! From an address to a connection: resolve, check, connect to what was checked.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Uri;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::{EgressError, Reach, Url};

/// The address at the other end, as an extension of each response.
#[derive(Clone, Copy)]
pub(super) struct RemoteAddress(pub(super) SocketAddr);

/// Makes connections for hyper's client.
#[derive(Clone)]
pub(super) struct Connector {
    pub(super) reach: Arc<Reach>,
    pub(super) tls: Arc<ClientConfig>,
    pub(super) timeout: Duration,
}

impl tower_service::Service<Uri> for Connector {
    type Response = Socket;
    type Error = EgressError;
    type Future = Pin<Box<dyn Future<Output = Result<Socket, EgressError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), EgressError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move {
            let url: Url = uri.to_string().parse()?;
            let late = || EgressError::ConnectTimeout {
                host: url.host().to_owned(),
                after: connector.timeout,
            };
            let deadline = Instant::now() + connector.timeout;
            let work = connector.connect(&url, deadline);
            tokio::time::timeout_at(deadline, work).await.unwrap_or_else(|_| Err(late()))
        })
    }
}

impl Connector {
    async fn connect(&self, url: &Url, deadline: Instant) -> Result<Socket, EgressError> {
        let host = url.host();
        let unknown = |message: String| EgressError::Resolve { host: host.to_owned(), message };
        let found: Vec<SocketAddr> = tokio::net::lookup_host((host, url.port()))
            .await
            .map_err(|error| unknown(error.to_string()))?
            .collect();
        let first = found.first().ok_or_else(|| unknown("no address".to_owned()))?.ip();
        let allowed: Vec<SocketAddr> =
            found.into_iter().filter(|address| self.reach.allows(address.ip())).collect();
        if allowed.is_empty() {
            return Err(EgressError::NotAllowed { host: host.to_owned(), address: first });
        }
        let stream = self.connect_first(host, &allowed, deadline).await?;
        let remote = stream.peer_addr().map_err(|error| EgressError::from_connect(&error, host))?;
        // Requests are written whole; waiting for more would only delay them.
        let _ = stream.set_nodelay(true);
        let stream = if url.is_https() {
            Stream::Tls(TokioIo::new(Box::new(self.shake_hands(host, stream).await?)))
        } else {
            Stream::Plain(TokioIo::new(stream))
        };
        Ok(Socket { stream, remote })
    }

    /// Tries one address after the other, each for its share of the time that is left: a silent one (IPv6
    /// without a route is common in homes) must not use up everybody's.
    async fn connect_first(
        &self,
        host: &str,
        addresses: &[SocketAddr],
        deadline: Instant,
    ) -> Result<TcpStream, EgressError> {
        let mut last = EgressError::ConnectTimeout { host: host.to_owned(), after: self.timeout };
        for (tried, address) in addresses.iter().enumerate() {
            let left = deadline.saturating_duration_since(Instant::now());
            let share = left / u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
            match tokio::time::timeout(share, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => last = EgressError::from_connect(&error, host),
                Err(_) => {}
            }
        }
        Err(last)
    }

    async fn shake_hands(
        &self,
        host: &str,
        stream: TcpStream,
    ) -> Result<TlsStream<TcpStream>, EgressError> {
        let name = ServerName::try_from(host.to_owned()).map_err(|error| EgressError::Tls {
            host: host.to_owned(),
            message: error.to_string(),
        })?;
        TlsConnector::from(Arc::clone(&self.tls))
            .connect(name, stream)
            .await
            .map_err(|error| EgressError::from_handshake(&error, host))
    }
}

/// A connection, encrypted or not.
pub(super) struct Socket {
    stream: Stream,
    remote: SocketAddr,
}

enum Stream {
    Plain(TokioIo<TcpStream>),
    Tls(TokioIo<Box<TlsStream<TcpStream>>>),
}

impl Connection for Socket {
    fn connected(&self) -> Connected {
        Connected::new().extra(RemoteAddress(self.remote))
    }
}

impl Read for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Stream::Tls(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl Write for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Plain(io) => Pin::new(io).poll_write(cx, buf),
            Stream::Tls(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(io) => Pin::new(io).poll_flush(cx),
            Stream::Tls(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Stream::Tls(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}
