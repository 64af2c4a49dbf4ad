//! Which addresses a page may be read from.
//!
//! A page's URL comes from a search service, or from a page that redirects: neither may make this process ask a service
//! of its own network. The addresses are checked where the connection is made, so that a name that resolves to something
//! else a moment later gains nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

/// Whether an address is one of the public internet: not this machine, its network or a block with a special meaning.
pub(super) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => is_public_v6(v6),
    }
}

/// IANA's special-purpose registry for IPv4 (RFC 6890 and later), and multicast.
fn is_public_v4(a: Ipv4Addr) -> bool {
    let [b0, b1, b2, _] = a.octets();
    !(b0 == 0
        || a.is_private()
        || a.is_loopback()
        || a.is_link_local()
        || b0 == 100 && (64..128).contains(&b1)
        || (b0, b1, b2) == (192, 0, 0)
        || (b0, b1, b2) == (192, 88, 99)
        || a.is_documentation()
        || b0 == 198 && (18..20).contains(&b1)
        || b0 >= 224)
}

/// Global unicast (2000::/3) without the blocks that stand for something else; addresses that carry an IPv4 address are
/// judged by it.
fn is_public_v6(a: Ipv6Addr) -> bool {
    let s = a.segments();
    let v4 = |high: u16, low: u16| Ipv4Addr::from((u32::from(high) << 16) | u32::from(low));
    if let Some(mapped) = a.to_ipv4_mapped() {
        return is_public_v4(mapped);
    }
    // NAT64 (64:ff9b::/96) and 6to4 (2002::/16).
    if s[..6] == [0x64, 0xff9b, 0, 0, 0, 0] {
        return is_public_v4(v4(s[6], s[7]));
    }
    if s[0] == 0x2002 {
        return is_public_v4(v4(s[1], s[2]));
    }
    let teredo_and_others = s[0] == 0x2001 && s[1] < 0x200;
    let documentation = (s[0], s[1]) == (0x2001, 0xdb8) || s[0] == 0x3fff && s[1] < 0x1000;
    (0x2000..0x4000).contains(&s[0]) && !teredo_and_others && !documentation
}

/// The system's resolver, for public addresses and some hosts by name.
#[derive(Debug, Default)]
pub(super) struct PublicOnly {
    system: DefaultResolver,
    allowed: Vec<String>,
}

impl PublicOnly {
    /// Public addresses, and whatever address these hosts have.
    pub fn but(hosts: &[String]) -> Self {
        let allowed = hosts.iter().map(|h| h.to_ascii_lowercase()).collect();
        Self { system: DefaultResolver::default(), allowed }
    }
}

/// What [`PublicOnly`] says of a host without a public address.
#[derive(Debug, thiserror::Error)]
#[error("{host} is not a public address")]
pub(super) struct NotPublic {
    /// The host.
    pub host: String,
}

impl Resolver for PublicOnly {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let all = self.system.resolve(uri, config, timeout)?;
        // Without what may stand in front of the host: user and password.
        let authority = uri.authority().map(|a| a.as_str().to_ascii_lowercase()).unwrap_or_default();
        let host = authority.rsplit('@').next().unwrap_or_default();
        if self.allowed.iter().any(|allowed| allowed == host) {
            return Ok(all);
        }
        // One address that is not public condemns the name: who answers with both is up to something.
        if all.iter().any(|address| !is_public(address.ip())) {
            let host = uri.host().unwrap_or_default().to_owned();
            return Err(ureq::Error::Other(Box::new(NotPublic { host })));
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_the_public_internet_pass() {
        for public in
            ["1.1.1.1", "93.184.216.34", "100.63.0.1", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8"]
        {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        for other in [
            "0.0.0.0",
            "127.0.0.1",
            "127.8.8.8",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "198.18.0.1",
            "192.0.2.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2001:db8::1",
            "2001::1",
            "fe80::1",
            "fc00::1",
            "ff02::1",
        ] {
            assert!(!is_public(other.parse().unwrap()), "{other}");
        }
    }
}
