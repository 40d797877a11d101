//! Which addresses may be connected to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Which resolved addresses a client may connect to. Addresses that carry an IPv4 address inside (mapped,
/// NAT64, 6to4) are judged by what they carry. Unspecified, multicast and broadcast addresses are never allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Everything that can be a host.
    Anywhere,
    /// The house: loopback, RFC 1918, link-local, unique local IPv6.
    Lan {
        /// Networks that belong to the house too, such as a VPN's.
        also: Vec<IpNet>,
    },
    /// Everything but the house: where a server elsewhere may send us.
    Wan,
}

/// On which side of the house's router an address lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Loopback, RFC 1918, link-local, unique local IPv6.
    Lan,
    /// All else, also the shared range 100.64/10 of carriers and VPNs.
    Wan,
}

impl Reach {
    /// Whether a connection to this address is allowed.
    pub fn allows(&self, address: IpAddr) -> bool {
        let address = carried(address);
        if is_no_host(address) {
            return false;
        }
        match self {
            Reach::Anywhere => true,
            Reach::Lan { also } => {
                scope_of(address) == Scope::Lan || also.iter().any(|net| net.contains(&address))
            }
            Reach::Wan => scope_of(address) == Scope::Wan,
        }
    }
}

/// Where an address lies, judged by the IPv4 address that it may carry.
pub fn scope_of(address: IpAddr) -> Scope {
    let is_lan = match carried(address) {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_private() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local() || v6.is_unique_local(),
    };
    if is_lan { Scope::Lan } else { Scope::Wan }
}

/// The address that packets are really meant for.
fn carried(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    let [a, b, c, d, e, f, g, h] = v6.segments();
    let v4 = |high: u16, low: u16| {
        let [h0, h1] = high.to_be_bytes();
        let [l0, l1] = low.to_be_bytes();
        IpAddr::V4(Ipv4Addr::new(h0, h1, l0, l1))
    };
    match [a, b, c, d, e, f] {
        // ::ffff:0:0/96, mapped (RFC 4291 §2.5.5.2)
        [0, 0, 0, 0, 0, 0xffff] => v4(g, h),
        // ::/96, compatible (deprecated); :: and ::1 are addresses of their own
        [0, 0, 0, 0, 0, 0] if g != 0 || h > 1 => v4(g, h),
        // ::ffff:0:0:0/96, translated (RFC 7915)
        [0, 0, 0, 0, 0xffff, 0] => v4(g, h),
        // 64:ff9b::/96, NAT64 (RFC 6052)
        [0x64, 0xff9b, 0, 0, 0, 0] => v4(g, h),
        // 64:ff9b:1::/48, NAT64 with the network's own prefix (RFC 8215); in use are prefixes of /96
        [0x64, 0xff9b, 1, ..] => v4(g, h),
        // 2002::/16, 6to4 (RFC 3056)
        [0x2002, high, low, ..] => v4(high, low),
        _ => IpAddr::V6(v6),
    }
}

/// Addresses at which no single host can be meant.
fn is_no_host(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.octets()[0] == 0 || v4.is_multicast() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6 == Ipv6Addr::UNSPECIFIED || v6.is_multicast(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(reach: &Reach, allowed: &[&str], refused: &[&str]) {
        for text in allowed {
            assert!(reach.allows(text.parse().unwrap()), "{text} should be allowed by {reach:?}");
        }
        for text in refused {
            assert!(!reach.allows(text.parse().unwrap()), "{text} should be refused by {reach:?}");
        }
    }

    const HOUSE: &[&str] = &[
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.10",
        "169.254.169.254",
        "::1",
        "fe80::1",
        "fd00::1",
        "::ffff:192.168.1.10",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::10.0.0.1",
        "2002:c0a8:010a::1",
        "::ffff:0:10.0.0.1",
    ];
    const OUTSIDE: &[&str] = &[
        "8.8.8.8",
        "172.32.0.1",
        "100.64.0.1",
        "192.169.0.1",
        "2001:4860:4860::8888",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
        "64:ff9b:1::8.8.8.8",
        "2002:0808:0808::1",
        "::8.8.8.8",
        "::ffff:0:8.8.8.8",
        "fec0::1",
    ];
    const NOBODY: &[&str] =
        &["0.0.0.0", "0.1.2.3", "255.255.255.255", "224.0.0.1", "::", "ff02::1", "::ffff:0.0.0.0"];

    #[test]
    fn the_house_and_what_lies_outside() {
        let lan = Reach::Lan { also: Vec::new() };
        check(&lan, HOUSE, OUTSIDE);
        check(&lan, &[], NOBODY);
        check(&Reach::Wan, OUTSIDE, HOUSE);
        check(&Reach::Wan, &[], NOBODY);
        check(&Reach::Anywhere, OUTSIDE, NOBODY);
        check(&Reach::Anywhere, HOUSE, &[]);
    }

    #[test]
    fn further_networks_of_the_house() {
        let also = vec!["100.64.0.0/10".parse().unwrap(), "2001:db8:1::/48".parse().unwrap()];
        let lan = Reach::Lan { also };
        check(
            &lan,
            &["100.100.1.1", "2001:db8:1::5", "::ffff:100.64.1.1"],
            &["100.128.0.1", "2001:db8:2::5"],
        );
    }
}
