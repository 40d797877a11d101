//! What can go wrong on the way out.

use std::error::Error;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

/// Why there is no answer. Each names the host, because a redirect may have led elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EgressError {
    /// The address of the request is none.
    #[error("{message}")]
    Address {
        /// What is wrong with it.
        message: String,
    },
    /// Nobody listens there.
    #[error("{host} refused the connection")]
    ConnectRefused {
        /// The host asked.
        host: String,
    },
    /// No connection within the configured time.
    #[error("no connection to {host} within {} s", after.as_secs_f32())]
    ConnectTimeout {
        /// The host asked.
        host: String,
        /// The configured time.
        after: Duration,
    },
    /// The host's addresses lie outside of what may be connected to.
    #[error("{host} is {address}, which may not be connected to")]
    NotAllowed {
        /// The host asked.
        host: String,
        /// Its first address.
        address: IpAddr,
    },
    /// What came is not HTTP.
    #[error("{host}: {message}")]
    Protocol {
        /// The host asked.
        host: String,
        /// What is wrong.
        message: String,
    },
    /// The connection ended before the answer did.
    #[error("{host} closed the connection in the middle")]
    Reset {
        /// The host asked.
        host: String,
    },
    /// The name has no address.
    #[error("cannot resolve {host}: {message}")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver said.
        message: String,
    },
    /// Silence for too long.
    #[error("{host} sent nothing for {} s", after.as_secs_f32())]
    Stalled {
        /// The host asked.
        host: String,
        /// How long was waited.
        after: Duration,
    },
    /// The other side is not who it should be, or a certificate cannot be used.
    #[error("{host}: TLS: {message}")]
    Tls {
        /// The host asked.
        host: String,
        /// What is wrong.
        message: String,
    },
    /// More bytes than the caller takes.
    #[error("{host} sent more than {limit} bytes")]
    TooLong {
        /// The host asked.
        host: String,
        /// The caller's limit.
        limit: usize,
    },
    /// No way there.
    #[error("cannot reach {host}: {message}")]
    Unreachable {
        /// The host asked.
        host: String,
        /// What the system said.
        message: String,
    },
}

impl EgressError {
    /// An error of connecting a socket.
    pub(super) fn from_connect(error: &io::Error, host: &str) -> EgressError {
        let host = host.to_owned();
        match error.kind() {
            io::ErrorKind::ConnectionRefused => EgressError::ConnectRefused { host },
            io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted => {
                EgressError::Reset { host }
            }
            _ => EgressError::Unreachable { host, message: error.to_string() },
        }
    }

    /// An error of the TLS handshake.
    pub(super) fn from_handshake(error: &io::Error, host: &str) -> EgressError {
        let host = host.to_owned();
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(tls) => EgressError::Tls { host, message: tls.to_string() },
            None => EgressError::Reset { host },
        }
    }

    /// An error between sending and the head of the answer.
    pub(super) fn from_send(error: &hyper_util::client::legacy::Error, host: &str) -> EgressError {
        if let Some(own) = find::<EgressError>(error) {
            return own.clone();
        }
        match find::<hyper::Error>(error) {
            Some(error) => EgressError::from_body(error, host),
            None => EgressError::Protocol { host: host.to_owned(), message: chain(error) },
        }
    }

    /// An error of an open connection.
    pub(super) fn from_body(error: &hyper::Error, host: &str) -> EgressError {
        let host = host.to_owned();
        if let Some(tls) = find::<rustls::Error>(error) {
            return EgressError::Tls { host, message: tls.to_string() };
        }
        let cut = error.is_incomplete_message() || error.is_closed() || error.is_canceled();
        // hyper reads a broken chunk as `InvalidInput` or `InvalidData`; every other I/O error is the socket's.
        let broken = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData)
        };
        if cut || find::<io::Error>(error).is_some_and(|error| !broken(error)) {
            EgressError::Reset { host }
        } else {
            EgressError::Protocol { host, message: chain(error) }
        }
    }
}

/// The first error of this type, from the outermost inwards.
fn find<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<E>() {
            return Some(found);
        }
        // An I/O error hides what it wraps from `source`.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = match wrapped {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    None
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text.push_str(": ");
        text.push_str(&error.to_string());
        next = error.source();
    }
    text
}
