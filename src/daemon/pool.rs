//! The pool of this process: the local engine and the other machines, as members that a fusion can ask.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::runtime::Handle;

use super::assembly::Assembly;
use super::{StartError, facts};
use crate::config::Config;
use crate::peer::{Announced, Discovery, Pool, PoolParts};

/// This node's name in the pool: the MQTT node's, else the host's.
pub(super) fn node(config: &Config) -> String {
    config.mqtt.node.clone().unwrap_or_else(facts::host)
}

/// The pool as it is configured, not yet looked at.
///
/// # Errors
/// If a key cannot be used, or a member's address.
pub(super) fn open(
    config: &Config,
    assembly: &Assembly,
    runtime: &Handle,
) -> Result<Arc<Pool>, StartError> {
    let parts = PoolParts {
        node: node(config),
        state: facts::state_folder(),
        runtime: runtime.clone(),
        metrics: Arc::clone(&assembly.metrics),
    };
    Pool::new(config.fusion.clone(), parts)
        .map_err(|error| StartError::Config(format!("fusion: {error}")))
}

/// Announces this node and looks for others, if that is wished. A network without multicast is no reason not to
/// start: members can be named.
pub(super) fn discover(
    config: &Config,
    pool: &Arc<Pool>,
    http: &[SocketAddr],
    runtime: &Handle,
) -> Option<Discovery> {
    if !config.fusion.mdns {
        return None;
    }
    let reachable = http.iter().find(|address| !address.ip().is_loopback());
    if reachable.is_none() {
        log::warn!(target: "daemon", "fusion.mdns: HTTP listens on loopback only, so this node is not announced");
    }
    let own = Announced { node: node(config), address: reachable.copied() };
    match Discovery::start(pool, &own, runtime) {
        Ok(discovery) => Some(discovery),
        Err(error) => {
            log::warn!(target: "daemon", error:%; "no other nodes are looked for");
            None
        }
    }
}
