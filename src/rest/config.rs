//! The door's part of the configuration.

use std::path::PathBuf;

use serde::Deserialize;

/// Where the door listens, whom it lets in, and what one client may cost.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Addresses as `host:port`; port 0 takes a free one. Empty: no HTTP.
    pub listen: Vec<String>,
    /// A file with a key per line: `name scope[,scope] secret`; scopes are `inference`, `metrics`, `admin`.
    pub keys_file: Option<PathBuf>,
    /// Serve addresses beyond loopback to everybody who can reach them.
    pub allow_lan_without_key: bool,
    /// Addresses or networks (`192.168.1.0/24`) that may ask for answers without a key.
    pub trusted_clients: Vec<String>,
    /// Further names under which clients reach this machine.
    pub allowed_hosts: Vec<String>,
    /// Further web pages, as `https://page.example`, that may use this door from a browser.
    pub allowed_origins: Vec<String>,
    /// What clients may cost.
    pub limits: Limits,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: vec!["127.0.0.1:11434".to_owned()],
            keys_file: None,
            allow_lan_without_key: false,
            trusted_clients: Vec::new(),
            allowed_hosts: Vec::new(),
            allowed_origins: Vec::new(),
            limits: Limits::default(),
        }
    }
}

/// What clients may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of one request's body.
    pub body_bytes: usize,
    /// Bytes of all bodies held at once.
    pub bodies_bytes: usize,
    /// Bytes of one request's line and headers.
    pub header_bytes: usize,
    /// Open connections.
    pub connections: usize,
    /// Open connections of one address.
    pub connections_per_client: usize,
    /// Milliseconds in which a request's headers must arrive.
    pub header_timeout_ms: u64,
    /// Milliseconds in which a request's body must arrive.
    pub body_timeout_ms: u64,
    /// Milliseconds after which a client that takes nothing of its answer is cut off.
    pub stalled_ms: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            body_bytes: 16 << 20,
            bodies_bytes: 64 << 20,
            header_bytes: 16 << 10,
            connections: 256,
            connections_per_client: 32,
            header_timeout_ms: 5_000,
            body_timeout_ms: 30_000,
            stalled_ms: 60_000,
        }
    }
}
