//! Keys, what they open, and clients that need none.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use super::Config;

/// What a key opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Pull, delete, settings; opens everything else too.
    Admin,
    /// Answers and listings.
    Inference,
    /// Metrics.
    Metrics,
    /// What nodes of a pool ask each other; no key opens it, only the pool key's proof.
    Pool,
    /// Needs no key at all.
    Public,
}

/// The keys that open the door. Only their digests are kept.
#[derive(Clone, Default)]
pub struct Keys {
    keys: Vec<Key>,
}

#[derive(Clone)]
struct Key {
    name: Arc<str>,
    scopes: Vec<Scope>,
    digest: [u8; 32],
}

/// A line of a keys file that is not a key. It does not quote the line, which may be a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {fault}")]
pub struct KeyError {
    /// From 1.
    pub line: usize,
    /// What is wrong.
    pub fault: &'static str,
}

impl Keys {
    /// Reads `name scope[,scope] secret` lines; empty ones and those that begin with `#` are skipped.
    ///
    /// # Errors
    /// The first line that is none of these.
    pub fn parse(text: &str) -> Result<Keys, KeyError> {
        let mut keys = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            keys.push(Key::parse(line).map_err(|fault| KeyError { line: index + 1, fault })?);
        }
        Ok(Keys { keys })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The key whose secret is `secret`. Looks at all of them, so that time tells nothing.
    fn find(&self, secret: &str) -> Option<&Key> {
        let digest: [u8; 32] = Sha256::digest(secret.as_bytes()).into();
        let mut found = u32::MAX;
        for (index, key) in self.keys.iter().enumerate() {
            let same: Choice = key.digest.ct_eq(&digest);
            found = u32::conditional_select(&found, &(index as u32), same);
        }
        self.keys.get(found as usize)
    }
}

impl Key {
    fn parse(line: &str) -> Result<Key, &'static str> {
        const SECRET_MIN: usize = 16;
        let parts: Vec<&str> = line.split_whitespace().collect();
        let [name, scopes, secret] = parts[..] else {
            return Err("expected a name, scopes and a secret, separated by spaces");
        };
        if secret.len() < SECRET_MIN {
            return Err("the secret has fewer than 16 characters");
        }
        let scopes = scopes
            .split(',')
            .map(|scope| match scope {
                "admin" => Ok(Scope::Admin),
                "inference" => Ok(Scope::Inference),
                "metrics" => Ok(Scope::Metrics),
                _ => Err("scopes are inference, metrics and admin"),
            })
            .collect::<Result<_, _>>()?;
        Ok(Key { name: name.into(), scopes, digest: Sha256::digest(secret.as_bytes()).into() })
    }

    fn opens(&self, scope: Scope) -> bool {
        self.scopes.iter().any(|&own| own == Scope::Admin || own == scope)
    }
}

/// Who may do what.
pub(super) struct Access {
    keys: Keys,
    trusted: Vec<Network>,
    key_required: bool,
}

/// Why somebody may not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Denied {
    /// No key, or one that nobody has.
    Unauthorized,
    /// A key that does not open this.
    WrongScope,
}

impl Access {
    /// `lan`: some address is reachable from other machines. `pool`: nodes of a pool can come in by their own key.
    pub(super) fn new(
        config: &Config,
        keys: Keys,
        lan: bool,
        pool: bool,
    ) -> Result<Access, String> {
        let trusted = config
            .trusted_clients
            .iter()
            .map(|text| {
                Network::parse(text)
                    .ok_or_else(|| format!("trusted_clients: \"{text}\" is no address or network"))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let key_required = !keys.is_empty() || (lan && !config.allow_lan_without_key);
        if key_required && keys.is_empty() && trusted.is_empty() && !pool {
            return Err("listening beyond loopback needs a key (keys_file), trusted_clients, or \
                        allow_lan_without_key = true"
                .to_owned());
        }
        Ok(Access { keys, trusted, key_required })
    }

    /// Whether `authorization` or the address opens `scope`; the key's name, if one did.
    pub(super) fn check(
        &self,
        scope: Scope,
        authorization: Option<&str>,
        client: IpAddr,
    ) -> Result<Option<Arc<str>>, Denied> {
        if scope == Scope::Pool {
            return Err(Denied::Unauthorized);
        }
        if scope == Scope::Public || !self.key_required {
            return Ok(None);
        }
        let key = authorization
            .and_then(|header| header.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .and_then(|(_, secret)| self.keys.find(secret.trim()));
        if let Some(key) = key
            && key.opens(scope)
        {
            return Ok(Some(Arc::clone(&key.name)));
        }
        let client = plain_ip(client);
        if scope == Scope::Inference && self.trusted.iter().any(|network| network.holds(client)) {
            return Ok(None);
        }
        Err(if key.is_some() { Denied::WrongScope } else { Denied::Unauthorized })
    }
}

/// An address, or all with the same first bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Network {
    address: u128,
    bits: u32,
}

impl Network {
    fn parse(text: &str) -> Option<Network> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let (width, offset) = if address.is_ipv4() { (32, 96) } else { (128, 0) };
        let prefix = prefix.map_or(Some(width), |p| p.parse().ok())?;
        (prefix <= width).then_some(Network { address: bits(address), bits: prefix + offset })
    }

    fn holds(self, client: IpAddr) -> bool {
        let differing = self.address ^ bits(client);
        differing.checked_shr(128 - self.bits).unwrap_or(0) == 0
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// An IPv4 address that arrived on an IPv6 socket, as what it is.
pub(super) fn plain_ip(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(v6) => Ipv6Addr::to_canonical(&v6),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# who\nphone inference phone-secret-0123\n\nroot admin root-secret-01234\n\
                        prom metrics,inference prom-secret-01234\n";

    fn access(trusted: &[&str]) -> Access {
        let config = Config {
            trusted_clients: trusted.iter().map(|&text| text.to_owned()).collect(),
            ..Config::default()
        };
        Access::new(&config, Keys::parse(FILE).expect("valid"), true, false).expect("has keys")
    }

    #[test]
    fn keys_open_their_scopes() {
        let stranger = IpAddr::from([10, 0, 0, 9]);
        let cases = [
            (Scope::Inference, Some("Bearer phone-secret-0123"), Ok(Some("phone"))),
            (Scope::Inference, Some("bearer  root-secret-01234"), Ok(Some("root"))),
            (Scope::Metrics, Some("Bearer prom-secret-01234"), Ok(Some("prom"))),
            (Scope::Metrics, Some("Bearer phone-secret-0123"), Err(Denied::WrongScope)),
            (Scope::Admin, Some("Bearer prom-secret-01234"), Err(Denied::WrongScope)),
            (Scope::Inference, Some("Bearer phone-secret-0124"), Err(Denied::Unauthorized)),
            (Scope::Inference, Some("phone-secret-0123"), Err(Denied::Unauthorized)),
            (Scope::Inference, Some("Basic phone-secret-0123"), Err(Denied::Unauthorized)),
            (Scope::Inference, None, Err(Denied::Unauthorized)),
            (Scope::Public, None, Ok(None)),
        ];
        for (scope, header, expected) in cases {
            let got = access(&[]).check(scope, header, stranger);
            assert_eq!(
                got.as_ref().map(Option::as_deref),
                expected.as_ref().copied(),
                "{header:?}"
            );
        }
    }

    #[test]
    fn trusted_clients_may_ask_and_nothing_else() {
        let access = access(&["192.168.1.0/28", "fd00::/8", "10.0.0.7"]);
        let inside = ["192.168.1.10", "::ffff:192.168.1.10", "fd12::1", "10.0.0.7"];
        for client in inside {
            let client = client.parse().expect("an address");
            assert!(access.check(Scope::Inference, None, client).is_ok(), "{client}");
            assert!(access.check(Scope::Admin, None, client).is_err(), "{client}");
            assert!(access.check(Scope::Metrics, None, client).is_err(), "{client}");
        }
        for client in ["192.168.1.16", "10.0.0.8", "fe80::1", "::1"] {
            let client = client.parse().expect("an address");
            assert!(access.check(Scope::Inference, None, client).is_err(), "{client}");
        }
    }

    #[test]
    fn the_lan_needs_a_key_or_a_word() {
        let closed = Config::default();
        assert!(Access::new(&closed, Keys::default(), false, false).is_ok());
        assert!(Access::new(&closed, Keys::default(), true, false).is_err());
        let open = Config { allow_lan_without_key: true, ..Config::default() };
        assert!(Access::new(&open, Keys::default(), true, false).is_ok());
        for bad in ["pi", "1.2.3.4/33", "1.2.3.4/", "::/129", ""] {
            let config = Config { trusted_clients: vec![bad.to_owned()], ..Config::default() };
            assert!(Access::new(&config, Keys::default(), false, false).is_err(), "{bad}");
        }
        let everybody = Network::parse("::/0").expect("a network");
        assert!(everybody.holds(IpAddr::from([1, 2, 3, 4])));
    }

    #[test]
    fn faulty_lines_are_named_without_their_text() {
        for (text, line, fault) in [
            ("a inference short", 1, "the secret has fewer than 16 characters"),
            ("\na all 0123456789abcdef", 2, "scopes are inference, metrics and admin"),
            ("just-a-secret", 1, "expected a name, scopes and a secret, separated by spaces"),
        ] {
            assert_eq!(Keys::parse(text).err(), Some(KeyError { line, fault }));
        }
    }
}
