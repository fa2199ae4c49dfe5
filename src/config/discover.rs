//! Discovery, as it is written: who says which backends an upstream has, if not the configuration itself.
//!
//! The doc comments are the reference, as in [`super::file`]. Of `dns`, `srv` and `file` there is one; `check` sees to
//! that.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::Deserializer;

use super::{schema, units};

/// Where backends come from, in place of `backends`: one of `dns`, `srv` and `file`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Discover {
    /// Host and port: every address of the host, IPv4 and IPv6, is a backend.
    #[serde(deserialize_with = "units::some_address")]
    #[schemars(schema_with = "schema::address")]
    pub dns: Option<String>,
    /// The name of SRV records: every address of their targets is a backend, with their ports and weights. Only
    /// records of the lowest priority number count.
    #[serde(deserialize_with = "units::some_service")]
    #[schemars(schema_with = "schema::service")]
    pub srv: Option<String>,
    /// A file with a list like `backends`, in YAML or JSON.
    pub file: Option<PathBuf>,
    /// How often the file is read; how long an answer of DNS is believed at most, whatever its TTL. Absent: 1s for a
    /// file, 30s for DNS.
    #[serde(deserialize_with = "units::some_duration")]
    #[schemars(schema_with = "schema::duration")]
    pub interval: Option<Duration>,
    /// How long an answer of DNS is waited for. Default 2s.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub timeout: Duration,
    /// Name servers to ask. Absent: those of /etc/resolv.conf.
    #[schemars(schema_with = "schema::name_servers")]
    pub servers: Vec<NameServer>,
}

impl Default for Discover {
    fn default() -> Self {
        Self {
            dns: None,
            srv: None,
            file: None,
            interval: None,
            timeout: Duration::from_secs(2),
            servers: Vec::new(),
        }
    }
}

impl Discover {
    /// How often a file is read, or how long an answer of DNS is believed at most.
    pub fn interval(&self) -> Duration {
        let usual = if self.file.is_some() { Duration::from_secs(1) } else { Duration::from_secs(30) };
        self.interval.unwrap_or(usual)
    }
}

/// As it is named in the log: `dns engines.internal:8000`.
impl fmt::Display for Discover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.dns, &self.srv, &self.file) {
            (Some(name), _, _) => write!(f, "dns {name}"),
            (_, Some(name), _) => write!(f, "srv {name}"),
            (_, _, Some(path)) => write!(f, "file {}", path.display()),
            (None, None, None) => f.write_str("nobody"),
        }
    }
}

/// A name server: `10.0.0.53`, or with a port other than 53.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NameServer(pub SocketAddr);

/// Where name servers listen.
const DNS_PORT: u16 = 53;

impl<'de> Deserialize<'de> for NameServer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let parse = |text: &str| {
            let alone = || text.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, DNS_PORT));
            text.parse().ok().or_else(alone).map(Self)
        };
        units::text(deserializer, "a name server such as `10.0.0.53` or `10.0.0.53:5353`", parse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_server_listens_on_port_53_unless_it_says_otherwise() {
        let read = |text: &str| serde_yaml::from_str::<NameServer>(text).map(|server| server.0.to_string());
        assert_eq!(read("10.0.0.53").unwrap(), "10.0.0.53:53");
        assert_eq!(read("10.0.0.53:5353").unwrap(), "10.0.0.53:5353");
        assert_eq!(read("'::1'").unwrap(), "[::1]:53");
        assert!(read("ns.internal").is_err(), "somebody would have to resolve it");
    }

    #[test]
    fn a_file_is_read_more_often_than_dns_is_asked() {
        let read = |text: &str| serde_yaml::from_str::<Discover>(text).unwrap().interval();
        assert_eq!(read("file: a.yaml"), Duration::from_secs(1));
        assert_eq!(read("dns: 'a:1'"), Duration::from_secs(30));
        assert_eq!(read("{dns: 'a:1', interval: 5s}"), Duration::from_secs(5));
    }
}
