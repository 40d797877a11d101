//! What the operator may set.

use std::path::PathBuf;

use serde::Deserialize;

use crate::egress::Url;

/// Where models lie and where they come from.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The folder of models; absent is `models` in the service's state folder, or for a user
    /// `~/.local/share/scoutd/models`.
    pub path: Option<PathBuf>,
    /// The hub. It alone gets the token.
    pub hub: String,
    /// A server with the hub's protocol that is asked instead, without the token.
    pub mirror: Option<String>,
    /// A file with the hub's token, for private and gated models.
    pub token_file: Option<PathBuf>,
    /// Certificates (PEM) to trust beside the system's, for a mirror of one's own.
    pub ca_file: Option<PathBuf>,
    /// Bytes of the disk that downloads leave free.
    pub keep_free_bytes: u64,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            path: None,
            hub: "https://huggingface.co".to_owned(),
            mirror: None,
            token_file: None,
            ca_file: None,
            keep_free_bytes: 1 << 30,
        }
    }
}

impl Config {
    /// Everything wrong with it; empty is right.
    pub fn check(&self) -> Vec<String> {
        let addresses = [("hub", Some(&self.hub)), ("mirror", self.mirror.as_ref())];
        addresses
            .into_iter()
            .filter_map(|(key, address)| {
                let error = address?.parse::<Url>().err()?;
                Some(format!("store.{key}: {error}"))
            })
            .collect()
    }
}
