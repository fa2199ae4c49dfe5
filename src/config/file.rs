//! The configuration file, as it is written: the top level and everything but upstreams and routes.
//!
//! The doc comments are the reference: what a key means, its unit, its range, its default and why. Each
//! default stands once, in the `impl Default` of its section; the reasons and the evidence are in the comment
//! of the key.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::route::Route;
use super::units;
use super::upstream::Upstream;

/// A whole, checked configuration.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The process itself.
    pub server: Server,
    /// The addresses we accept requests on. Required, at least one.
    pub listeners: Vec<Listener>,
    /// Where metrics and readiness are served. Absent: nowhere.
    pub admin: Option<Admin>,
    /// What is told about requests.
    pub observe: Observe,
    /// What clients may ask of us.
    pub limits: Limits,
    /// Which requests go to which upstream, first match first. Absent: every upstream is reachable by its
    /// models.
    pub routes: Vec<Route>,
    /// Groups of interchangeable backends, by name. Required, at least one.
    pub upstreams: BTreeMap<String, Upstream>,
}

/// The process itself.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Threads that serve requests, 1 to 1024. Default: one per CPU core.
    #[serde(deserialize_with = "units::between::<_, 1, 1024>")]
    pub threads: u32,
    /// Unix socket over which a new process takes the listeners from the old one. Absent: no such upgrade.
    pub upgrade_socket: Option<PathBuf>,
    /// File that holds the process id. Absent: none.
    pub pid_file: Option<PathBuf>,
    /// How long a stopping process waits for its last stream. Default 15m: an answer may run for minutes, and
    /// the 5 to 30 s that are usual elsewhere cut it.
    #[serde(deserialize_with = "units::duration")]
    pub drain_timeout: Duration,
    /// How many files and sockets the process may have open, 64 to 10000000. Absent: as many
    /// as the system allows it.
    #[serde(deserialize_with = "units::some_between::<_, 64, 10_000_000>")]
    pub open_files: Option<u32>,
}

impl Default for Server {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            threads: u32::try_from(cores).unwrap_or(u32::MAX).min(1_024),
            upgrade_socket: None,
            pid_file: None,
            drain_timeout: Duration::from_secs(15 * 60),
            open_files: None,
        }
    }
}

/// An address we accept requests on.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(from = "WrittenListener")]
pub struct Listener {
    /// Host and port. Required.
    pub address: String,
    /// Certificate and key. Absent: plaintext.
    pub tls: Option<ListenerTls>,
    /// HTTP/2 beside HTTP/1.1. Default: with TLS, yes; without, no (yes means clients that know it
    /// beforehand, h2c).
    pub http2: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenListener {
    #[serde(deserialize_with = "units::address")]
    address: String,
    tls: Option<ListenerTls>,
    http2: Option<bool>,
}

impl From<WrittenListener> for Listener {
    fn from(written: WrittenListener) -> Self {
        let WrittenListener { address, tls, http2 } = written;
        Self { address, http2: http2.unwrap_or_else(|| tls.is_some()), tls }
    }
}

/// What we prove to clients who we are with.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenerTls {
    /// PEM file of the certificate, and of those between it and a root. Required.
    pub certificate: PathBuf,
    /// PEM file of its private key, without passphrase. Required.
    pub key: PathBuf,
}

/// The listener for those who run this process, not for clients.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    /// Host and port of `/metrics`, `/livez`, `/readyz` and `/status`. Required; keep it off the public
    /// network.
    #[serde(deserialize_with = "units::address")]
    pub address: String,
}

/// What is told about requests.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Observe {
    /// One log line per request. Default true.
    pub access_log: bool,
    /// The header `x-plimsoll-backend` on answers names the backend. Default true; switch it off where
    /// clients may not know your addresses.
    pub backend_header: bool,
}

impl Default for Observe {
    fn default() -> Self {
        Self { access_log: true, backend_header: true }
    }
}

/// What clients may ask of us.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Largest request body, in bytes; beyond it 413. Default 32MiB: prompts with images are larger than
    /// nginx's 1 MiB.
    #[serde(deserialize_with = "units::size")]
    pub body: u64,
    /// All request bodies held at once, in bytes; beyond it 503 with `Retry-After`. At least `body`. Default
    /// 1GiB.
    #[serde(deserialize_with = "units::size")]
    pub buffered_bodies: u64,
    /// A request body is whole within this, or 408. Default 60s: a deadline, not a gap, lest a body be
    /// dripped for ever.
    #[serde(deserialize_with = "units::duration")]
    pub body_timeout: Duration,
    /// A client's connection without a request is closed after this. Default 75s, as nginx does.
    #[serde(deserialize_with = "units::duration")]
    pub client_idle: Duration,
    /// A client that takes nothing of its answer for this long is cut off, to free the GPU. Default 60s.
    #[serde(deserialize_with = "units::duration")]
    pub client_write_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body: 32 << 20,
            buffered_bodies: 1 << 30,
            body_timeout: Duration::from_secs(60),
            client_idle: Duration::from_secs(75),
            client_write_timeout: Duration::from_secs(60),
        }
    }
}
