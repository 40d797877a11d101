//! Who may be talking: names under which this machine is reached, and web pages that may reach it.
//!
//! A page on the internet can make a browser in the house send requests here, either across origins or by
//! letting its own name resolve to this address (DNS rebinding). Neither gets past these two checks, on any
//! bind address.

use std::net::{IpAddr, Ipv6Addr};

/// The names and pages that are let in.
#[derive(Debug)]
pub(super) struct Guard {
    hosts: Vec<String>,
    origins: Vec<String>,
}

/// What a request says about where it comes from.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Provenance<'a> {
    /// The `Host` header.
    pub(super) host: Option<&'a str>,
    /// The `Origin` header.
    pub(super) origin: Option<&'a str>,
    /// The `Sec-Fetch-Site` header.
    pub(super) fetch_site: Option<&'a str>,
    /// Whether it changes or costs something.
    pub(super) acts: bool,
}

impl Guard {
    pub(super) fn new(hosts: &[String], origins: &[String]) -> Guard {
        let mut hosts: Vec<String> = hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
        let own = rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase();
        hosts.push(own);
        let origins =
            origins.iter().map(|o| o.trim_end_matches('/').to_ascii_lowercase()).collect();
        Guard { hosts, origins }
    }

    /// Whether `authority` (`name`, `name:port`, `[v6]:port`) is a name of this machine.
    pub(super) fn knows_host(&self, authority: &str) -> bool {
        let Some(name) = host_name(authority) else { return false };
        if name.parse::<IpAddr>().is_ok() {
            return true;
        }
        let local = ["localhost", "local", "lan", "home.arpa", "internal"];
        let is_local = local.iter().any(|suffix| {
            name.strip_suffix(suffix).is_some_and(|rest| {
                rest.ends_with('.') || (rest.is_empty() && *suffix == "localhost")
            })
        });
        is_local || self.hosts.contains(&name)
    }

    /// Whether the request may have come about without a foreign page's doing.
    ///
    /// # Errors
    /// Says what is wrong, for the client.
    pub(super) fn check(&self, from: &Provenance<'_>) -> Result<(), &'static str> {
        match from.host {
            Some(host) if self.knows_host(host) => {}
            Some(_) => return Err("this host name is not one of this server's (allowed_hosts)"),
            None => return Err("the Host header is missing"),
        }
        if !from.acts {
            return Ok(());
        }
        match from.origin {
            Some(_) if self.knows_origin(from) => Ok(()),
            Some(_) => Err("this origin is not allowed (allowed_origins)"),
            None if from.fetch_site == Some("cross-site") => {
                Err("requests from foreign pages are not allowed")
            }
            None => Ok(()),
        }
    }

    /// Whether the page that `Origin` names may use this door: a page of this very door, or a configured one.
    pub(super) fn knows_origin(&self, from: &Provenance<'_>) -> bool {
        let Some(origin) = from.origin.map(str::to_ascii_lowercase) else { return false };
        let own = origin
            .strip_prefix("http://")
            .or_else(|| origin.strip_prefix("https://"))
            .zip(from.host)
            .is_some_and(|(page, host)| page.eq_ignore_ascii_case(host));
        own || self.origins.contains(&origin)
    }
}

/// The name inside an authority, lower case, without port, brackets and final dot.
fn host_name(authority: &str) -> Option<String> {
    let (name, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']')?;
            address.parse::<Ipv6Addr>().ok()?;
            (address, port.strip_prefix(':'))
        }
        None => match authority.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (authority, None),
        },
    };
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return None;
    }
    let name = name.strip_suffix('.').unwrap_or(name);
    (!name.is_empty()).then(|| name.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard() -> Guard {
        Guard::new(&["Pi.Example".to_owned()], &["https://chat.example/".to_owned()])
    }

    #[test]
    fn names_of_this_machine() {
        let own = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let good = [
            "localhost",
            "LOCALHOST:11434",
            "scoutd.local:11434",
            "pi.lan",
            "a.b.home.arpa.",
            "host.docker.internal",
            "127.0.0.1:11434",
            "192.168.1.5",
            "[::1]:11434",
            "[fe80::1]",
            "pi.example:80",
            own.as_str(),
        ];
        for host in good {
            assert!(guard().knows_host(host), "{host}");
        }
        let bad = [
            "evil.example",
            "evil.example:11434",
            "localhost.evil.example",
            "evil-local",
            "evillocal",
            "local",
            ".",
            "",
            ":80",
            "127.0.0.1.evil.example",
            "[::1",
            "[localhost]",
            "localhost:evil",
            "user@localhost",
        ];
        for host in bad {
            assert!(!guard().knows_host(host), "{host}");
        }
    }

    #[test]
    fn foreign_pages_may_not_act() {
        let host = Some("pi.local:11434");
        let cases = [
            (None, None, true),
            (Some("http://pi.local:11434"), Some("same-origin"), true),
            (Some("https://chat.example"), Some("cross-site"), true),
            (Some("https://CHAT.example"), None, true),
            (Some("http://pi.local"), None, false),
            (Some("http://evil.example"), None, false),
            (Some("http://evil.example"), Some("same-origin"), false),
            (Some("null"), None, false),
            (Some(""), None, false),
            (None, Some("cross-site"), false),
            (None, Some("none"), true),
        ];
        for (origin, fetch_site, allowed) in cases {
            let from = Provenance { host, origin, fetch_site, acts: true };
            assert_eq!(guard().check(&from).is_ok(), allowed, "{from:?}");
            let reads = Provenance { acts: false, ..from };
            assert!(guard().check(&reads).is_ok(), "{reads:?}");
        }
        assert!(guard().check(&Provenance::default()).is_err());
    }
}
