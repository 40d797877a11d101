//! Finding other nodes by mDNS, and being found: `_scoutd._tcp.local.`
//!
//! Opt-in. What is announced says where a node is and which pool it means, never how loaded it is; what others
//! announce is tried out by [`Pool::found`], which believes nothing without the pool key.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mdns_sd::{ResolvedService, ServiceDaemon, ServiceEvent, ServiceInfo};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::pool::{Announcement, Pool};

/// Our service, as DNS-SD writes it.
const SERVICE: &str = "_scoutd._tcp.local.";

/// A running announcement and search. Dropping it takes the announcement back.
pub struct Discovery {
    daemon: ServiceDaemon,
    fullname: Option<String>,
    listener: JoinHandle<()>,
}

/// mDNS cannot be used here.
#[derive(Debug, thiserror::Error)]
#[error("mDNS: {0}")]
pub struct DiscoveryError(#[from] mdns_sd::Error);

/// What is announced.
#[derive(Clone, Debug)]
pub struct Announced {
    /// The node's name.
    pub node: String,
    /// Where it can be reached from other machines; `None` announces nothing and only searches.
    pub address: Option<SocketAddr>,
}

impl Discovery {
    /// Announces this node, if others can reach it, and tells `pool` about everybody found.
    ///
    /// # Errors
    /// If no socket for mDNS can be had.
    pub fn start(
        pool: &Arc<Pool>,
        own: &Announced,
        runtime: &Handle,
    ) -> Result<Discovery, DiscoveryError> {
        let daemon = ServiceDaemon::new()?;
        let fullname = match own.address {
            None => None,
            Some(address) => {
                let info = service(pool.name(), &own.node, address)?;
                let fullname = info.get_fullname().to_owned();
                daemon.register(info)?;
                Some(fullname)
            }
        };
        let events = daemon.browse(SERVICE)?;
        let pool = Arc::downgrade(pool);
        let listener = runtime.spawn(async move {
            while let Ok(event) = events.recv_async().await {
                let Some(pool) = pool.upgrade() else { return };
                match event {
                    ServiceEvent::ServiceResolved(service) => {
                        if let Some(announced) = announcement(&service) {
                            pool.found(announced).await;
                        }
                    }
                    ServiceEvent::ServiceRemoved(_, fullname) => pool.gone(instance(&fullname)),
                    _ => {}
                }
            }
        });
        Ok(Discovery { daemon, fullname, listener })
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        self.listener.abort();
        if let Some(fullname) = &self.fullname {
            let _ = self.daemon.unregister(fullname);
        }
        let _ = self.daemon.shutdown();
    }
}

fn service(pool: &str, node: &str, address: SocketAddr) -> Result<ServiceInfo, mdns_sd::Error> {
    // `txtvers` first (RFC 6763 §6.7); all of it together stays far below 400 bytes.
    let texts = [
        ("txtvers", "1"),
        ("id", node),
        ("pool", pool),
        ("v", env!("CARGO_PKG_VERSION")),
        ("api", "/fusion/v1"),
    ];
    let host = format!("{node}.local.");
    let any = address.ip().is_unspecified();
    let ip = if any { String::new() } else { address.ip().to_string() };
    let info = ServiceInfo::new(SERVICE, node, &host, ip.as_str(), address.port(), &texts[..])?;
    Ok(if any { info.enable_addr_auto() } else { info })
}

/// What a resolved service says, if it can be tried out. The address is taken from mDNS as a number: nothing is
/// looked up again later that could lead elsewhere.
fn announcement(service: &ResolvedService) -> Option<Announcement> {
    let text = |key: &str| service.get_property_val_str(key).unwrap_or_default().to_owned();
    let mut addresses: Vec<IpAddr> =
        service.get_addresses().iter().map(|scoped| scoped.to_ip_addr()).collect();
    addresses.sort();
    let texts: HashMap<&str, String> = [("id", text("id")), ("pool", text("pool"))].into();
    announced(&texts["id"], &texts["pool"], &addresses, service.get_port())
}

/// IPv4 before IPv6, and no link-local IPv6: that needs the interface's name besides.
fn announced(node: &str, pool: &str, addresses: &[IpAddr], port: u16) -> Option<Announcement> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if !(1..=64).contains(&node.len()) || !node.bytes().all(plain) || pool.len() > 32 || port == 0 {
        return None;
    }
    let usable = |address: &&IpAddr| match address {
        IpAddr::V4(_) => true,
        IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    };
    let address = addresses.iter().find(usable)?;
    Some(Announcement {
        node: node.to_owned(),
        pool: pool.to_owned(),
        url: format!("http://{}", SocketAddr::new(*address, port)),
        source: "mdns",
    })
}

/// `pi-a` of `pi-a._scoutd._tcp.local.`
fn instance(fullname: &str) -> &str {
    fullname.strip_suffix(SERVICE).and_then(|name| name.strip_suffix('.')).unwrap_or(fullname)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_are_read_or_left() {
        let v6: IpAddr = "fe80::1".parse().expect("an address");
        let v4: IpAddr = "192.168.1.5".parse().expect("an address");
        let found = announced("pi-a", "house", &[v6, v4], 11434).expect("usable");
        assert_eq!(found.url, "http://192.168.1.5:11434");
        assert_eq!(announced("pi-a", "house", &[v6], 11434), None);
        assert_eq!(announced("pi a", "house", &[v4], 11434), None);
        assert_eq!(announced("", "house", &[v4], 11434), None);
        assert_eq!(announced("pi-a", "house", &[v4], 0), None);
        assert_eq!(instance("pi-a._scoutd._tcp.local."), "pi-a");
    }

    #[test]
    fn the_text_begins_with_its_version_and_is_short() {
        let address = "192.168.1.5:11434".parse().expect("an address");
        let info = service("house", "pi-a", address).expect("valid");
        let texts: Vec<String> = info.get_properties().iter().map(ToString::to_string).collect();
        assert!(texts[0].starts_with("txtvers"), "{texts:?}");
        assert!(texts.iter().map(|text| text.len() + 1).sum::<usize>() < 400);
        assert_eq!(info.get_property_val_str("pool"), Some("house"));
    }
}
