//! A network of addresses, such as `10.0.0.0/8`: whom we believe.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::Deserializer;

use super::units;

/// An IP address and how many of its first bits count; IPv4 as the part of IPv6 that it is mapped to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, JsonSchema)]
#[schemars(with = "String", extend("title" = "network", "pattern" = "^[0-9A-Fa-f:.]+(/[0-9]+)?$"))]
pub struct Network {
    address: u128,
    bits: u32,
}

impl Network {
    /// Whether `address` is in any of `networks`.
    pub fn any_contains(networks: &[Self], address: IpAddr) -> bool {
        networks.iter().any(|network| network.contains(address))
    }

    /// Whether `address` is in it. An IPv4 address is the same one when it is written as an IPv6 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        let differing = bits(address) ^ self.address;
        differing.leading_zeros() >= self.bits
    }

    fn parse(text: &str) -> Option<Self> {
        let (address, length) = text.split_once('/').map_or((text, None), |(a, length)| (a, Some(length)));
        let address: IpAddr = address.parse().ok()?;
        let (most, before) = if address.is_ipv4() { (32, 96) } else { (128, 0) };
        let length = match length {
            None => most,
            Some(length) => {
                let is_plain = !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit());
                length.parse().ok().filter(|length| is_plain && *length <= most)?
            }
        };
        Some(Self { address: bits(address), bits: before + length })
    }
}

const fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = Ipv6Addr::from(self.address);
        match address.to_ipv4_mapped() {
            Some(address) if self.bits >= 96 => write!(f, "{address}/{}", self.bits - 96),
            _ => write!(f, "{address}/{}", self.bits),
        }
    }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        units::text(deserializer, "an IP address or a network such as `10.0.0.0/8`", Self::parse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_holds_the_addresses_that_begin_as_it_does() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.1"),
            ("10.1.2.3", "10.1.2.3", "10.1.2.2"),
            ("10.0.0.0/8", "::ffff:10.0.0.1", "::10.0.0.1"),
            ("192.168.1.128/25", "192.168.1.200", "192.168.1.100"),
            ("2001:db8::/32", "2001:db8:1::", "2001:db9::"),
            ("::1", "::1", "127.0.0.1"),
            ("::/0", "10.0.0.1", "::"),
        ] {
            let parsed = Network::parse(network).unwrap();
            assert!(parsed.contains(inside.parse().unwrap()), "{network} {inside}");
            let everything = network == "::/0";
            assert_eq!(parsed.contains(outside.parse().unwrap()), everything, "{network} {outside}");
        }
        assert!(Network::parse("0.0.0.0/0").unwrap().contains("1.2.3.4".parse().unwrap()));
        assert!(!Network::parse("0.0.0.0/0").unwrap().contains("::1".parse().unwrap()));
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for text in
            ["", "10", "10.0.0.0/33", "::/129", "10.0.0.0/", "10.0.0.0/+8", "10.0.0.0/8/8", "host", "/8"]
        {
            assert!(Network::parse(text).is_none(), "{text}");
        }
    }
}
