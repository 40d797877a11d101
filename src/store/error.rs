//! What can go wrong with models: names, the hub, the way there, and the disk.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::egress::EgressError;
use crate::units::Bytes;

/// Why a model could not be pulled, found or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Several files could be meant.
    #[error("{what}; say which one:\n  {}", choices.join("\n  "))]
    Ambiguous { what: String, choices: Vec<String> },
    /// Another process writes the same file.
    #[error("{} is being written by another pull", .0.display())]
    Busy(PathBuf),
    /// The bytes are not the ones that the hub announced.
    #[error("{file} has the SHA-256 {found}, the hub says {wanted}; nothing was kept")]
    Checksum { file: String, wanted: String, found: String },
    /// Something must be configured differently.
    #[error("{0}")]
    Config(String),
    /// Not enough room before anything was begun.
    #[error(
        "{} has {free} free; {needed} are needed and {keep_free} are kept free (store.keep_free_bytes)",
        dir.display()
    )]
    DiskFull { dir: PathBuf, needed: Bytes, free: Bytes, keep_free: Bytes },
    /// A model of this name is there and is another one.
    #[error(
        "the store has another model named {name} ({origin}); give this one a name with --name"
    )]
    Exists { name: String, origin: String },
    /// The makers' terms must be accepted first.
    #[error("{repo} is gated: {what_to_do}")]
    Gated { repo: String, what_to_do: String },
    /// The hub's answer cannot be used.
    #[error("{0}")]
    Hub(String),
    /// A file or folder.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    /// In use by a running process.
    #[error("{0} is in use by a running scoutd")]
    InUse(String),
    /// The length is not the announced one.
    #[error("{file} has {found} bytes, the hub says {wanted}; nothing was kept")]
    Length { file: String, wanted: u64, found: u64 },
    /// A name that cannot be one.
    #[error("{0}")]
    Name(String),
    /// Nothing like it on the hub.
    #[error("{0}")]
    NotFound(String),
    /// No answer from the hub, also after trying again.
    #[error("{0}")]
    Network(#[from] EgressError),
    /// The disk ran full; what came so far is kept.
    #[error("the disk of {} is full; make room and pull again to go on from here", .0.display())]
    NoSpace(PathBuf),
    /// The hub wants fewer requests.
    #[error("{host} asks to wait {} s before the next request", after.as_secs())]
    RateLimited { host: String, after: Duration },
    /// A redirect that is not followed.
    #[error("{from} redirects to {to}: {reason}")]
    Redirect { from: String, to: String, reason: &'static str },
    /// The hub's own trouble, also after trying again.
    #[error("{host} answers with status {status}")]
    Server { host: String, status: u16 },
    /// A token is needed, or another one.
    #[error("{0}")]
    Unauthorized(String),
    /// No such model in the store.
    #[error("the store has no model named {name}{}", hint(known))]
    Unknown { name: String, known: Vec<String> },
}

impl StoreError {
    /// For `map_err`: names the file, and tells a full disk from other faults.
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> StoreError + '_ {
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                StoreError::NoSpace(path.to_owned())
            }
            _ => StoreError::Io { path: path.to_owned(), source },
        }
    }

    /// Whether the same request may succeed later.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            StoreError::Network(error) => !matches!(
                error,
                EgressError::Address { .. }
                    | EgressError::NotAllowed { .. }
                    | EgressError::Tls { .. }
                    | EgressError::TooLong { .. }
            ),
            StoreError::RateLimited { .. } => true,
            StoreError::Server { status, .. } => matches!(status, 408 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }
}

fn hint(known: &[String]) -> String {
    match known {
        [] => "; it is empty (`scoutd pull` fills it)".to_owned(),
        known => format!("; it has {}", known.join(", ")),
    }
}
