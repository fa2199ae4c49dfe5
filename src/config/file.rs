//! The configuration file, as it is written: the top level and everything but upstreams and routes.
//!
//! The doc comments are the reference: what a key means, its unit, its range, its default and why. Each
//! default stands once, in the `impl Default` of its section; the reasons and the evidence are in the comment
//! of the key.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use http::Uri;
use schemars::JsonSchema;
use serde::Deserialize;

use super::key::Key;
use super::network::Network;
use super::route::Route;
use super::schema;
use super::secret::Secret;
use super::units;
use super::upstream::Upstream;

/// A whole, checked configuration.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("required" = ["listeners", "upstreams"]))]
pub struct Config {
    /// The process itself.
    pub server: Server,
    /// The addresses we accept requests on. Required, at least one.
    #[schemars(length(min = 1))]
    pub listeners: Vec<Listener>,
    /// Where metrics and readiness are served. Absent: nowhere.
    pub admin: Option<Admin>,
    /// What is told about requests.
    pub observe: Observe,
    /// What clients may ask of us.
    pub limits: Limits,
    /// Addresses and networks of proxies in front of us, such as `10.0.0.0/8`. They may say who the client
    /// is, by forwarding headers and, on listeners with `proxy_protocol`, by that; nobody else is believed.
    /// Default: none.
    pub trusted_proxies: Vec<Network>,
    /// Who may ask, by name; the names stand in logs, metrics and routes. With keys, a request shows one of them
    /// as `authorization: Bearer KEY`, `x-api-key: KEY` or `api-key: KEY`, or is refused with 401; engines never
    /// see it. Absent: everybody may ask, and `authorization` is passed on.
    #[schemars(schema_with = "schema::named::<Key>")]
    pub keys: BTreeMap<String, Key>,
    /// Which requests go to which upstream, first match first. Absent: every upstream is reachable by its
    /// models.
    pub routes: Vec<Route>,
    /// Groups of interchangeable backends, by name. Required, at least one.
    #[schemars(schema_with = "schema::some_named::<Upstream>")]
    pub upstreams: BTreeMap<String, Upstream>,
}

/// The process itself.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Threads that serve requests, 1 to 1024. Default: one per CPU core.
    #[serde(deserialize_with = "units::between::<_, 1, 1024>")]
    #[schemars(schema_with = "schema::between::<1, 1024>")]
    pub threads: u32,
    /// File that holds the process id. Absent: none.
    pub pid_file: Option<PathBuf>,
    /// How long a stopping process waits for its last stream. Default 15m: an answer may run for minutes, and
    /// the 5 to 30 s that are usual elsewhere cut it.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub drain_timeout: Duration,
    /// How many files and sockets the process may have open, 64 to 10000000. Absent: as many
    /// as the system allows it.
    #[serde(deserialize_with = "units::some_between::<_, 64, 10_000_000>")]
    #[schemars(schema_with = "schema::between::<64, 10_000_000>")]
    pub open_files: Option<u32>,
}

impl Default for Server {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            threads: u32::try_from(cores).unwrap_or(u32::MAX).min(1_024),
            pid_file: None,
            drain_timeout: Duration::from_secs(15 * 60),
            open_files: None,
        }
    }
}

/// An address we accept requests on.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(from = "WrittenListener")]
#[schemars(!from, deny_unknown_fields)]
pub struct Listener {
    /// Host and port. Required.
    #[schemars(schema_with = "schema::address")]
    pub address: String,
    /// Certificate and key. Absent: plaintext.
    pub tls: Option<ListenerTls>,
    /// HTTP/2 beside HTTP/1.1. Default: with TLS, yes; without, no (yes means clients that know it
    /// beforehand, h2c).
    #[schemars(with = "Option<bool>")]
    pub http2: bool,
    /// Each connection begins with a header of the PROXY protocol, version 1 or 2, from one of the
    /// `trusted_proxies`. Default false.
    #[schemars(default)]
    pub proxy_protocol: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenListener {
    #[serde(deserialize_with = "units::address")]
    address: String,
    tls: Option<ListenerTls>,
    http2: Option<bool>,
    #[serde(default)]
    proxy_protocol: bool,
}

impl From<WrittenListener> for Listener {
    fn from(written: WrittenListener) -> Self {
        let WrittenListener { address, tls, http2, proxy_protocol } = written;
        Self { address, http2: http2.unwrap_or_else(|| tls.is_some()), tls, proxy_protocol }
    }
}

/// What we prove to clients who we are with.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListenerTls {
    /// PEM file of the certificate, and of those between it and a root. Required.
    pub certificate: PathBuf,
    /// PEM file of its private key, without passphrase; refused if everybody on the machine may read it.
    /// Required.
    pub key: PathBuf,
    /// Certificates for other names, each with its key. Whoever asks for a name is shown the first certificate,
    /// of the one above and these, that is valid for it; the one above if none is. Default: none.
    #[serde(default)]
    pub others: Vec<Identity>,
    /// PEM file of the certificates that sign those of clients: who shows no such certificate gets no handshake.
    /// Absent: clients need none.
    pub client_ca: Option<PathBuf>,
}

impl ListenerTls {
    /// All certificates, in the order in which they are tried for a name.
    pub fn identities(&self) -> impl Iterator<Item = Identity> {
        let first = Identity { certificate: self.certificate.clone(), key: self.key.clone() };
        std::iter::once(first).chain(self.others.iter().cloned())
    }
}

/// A certificate and its key.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// As the `certificate` of `tls`. Required.
    pub certificate: PathBuf,
    /// As the `key` of `tls`. Required.
    pub key: PathBuf,
}

/// The listener for those who run this process, not for clients.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    /// Where `/metrics`, `/livez`, `/readyz` and `/status` are. Required. What is not loopback needs a `token`.
    #[serde(deserialize_with = "units::admin_address")]
    #[schemars(schema_with = "schema::admin_address")]
    pub address: AdminAddress,
    /// What all of them but `/livez` and `/readyz`, which tell nothing, ask for as `authorization: Bearer`. It
    /// travels in the clear: on a network that you trust. Absent: nothing is asked for.
    pub token: Option<Secret>,
}

/// Where the admin listener is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminAddress {
    /// Host and port.
    Tcp(String),
    /// A Unix socket of ours alone, written `unix:` and its path.
    Unix(PathBuf),
}

impl AdminAddress {
    /// Whether it can be reached from this machine only.
    pub fn is_local(&self) -> bool {
        let Self::Tcp(address) = self else { return true };
        let host = address.rsplit_once(':').map_or("", |(host, _)| host);
        let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        ip.map_or_else(|_| host.eq_ignore_ascii_case("localhost"), |ip| ip.to_canonical().is_loopback())
    }
}

/// What is told about requests.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Observe {
    /// One log line per request. Default true.
    pub access_log: bool,
    /// The header `x-plimsoll-backend` on answers names the backend. Default true; switch it off where
    /// clients may not know your addresses.
    pub backend_header: bool,
    /// Spans of requests, for a collector that speaks the protocol of OpenTelemetry. Absent: none, and the trace that
    /// a client names is passed on as it is.
    pub traces: Option<Traces>,
}

impl Default for Observe {
    fn default() -> Self {
        Self { access_log: true, backend_header: true, traces: None }
    }
}

/// Where the spans of requests go.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Traces {
    /// The collector: OTLP over HTTP with protobuf, such as `http://127.0.0.1:4318`; `/v1/traces` is meant where there
    /// is no path. Headers that it wants are in `OTEL_EXPORTER_OTLP_HEADERS`. Required.
    #[serde(deserialize_with = "units::collector")]
    #[schemars(schema_with = "schema::collector")]
    pub endpoint: Uri,
    /// Of the requests that come without a trace, the share that begins a recorded one, 0 to 1. Of the others, the
    /// client has decided. Default 1.
    #[serde(default = "Traces::every", deserialize_with = "units::share")]
    #[schemars(schema_with = "schema::share")]
    pub sample: f64,
}

impl Traces {
    const fn every() -> f64 {
        1.0
    }
}

/// What clients may ask of us.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Longest URL, in bytes, at most 60KiB; beyond it 414. Default 8KiB, as nginx and most others do.
    #[serde(deserialize_with = "units::size")]
    #[schemars(schema_with = "schema::size")]
    pub url: u64,
    /// Largest head of a request (the first line and all headers), in bytes, at most 1000KiB; beyond it 431.
    /// Default 32KiB, as nginx: long keys and cookies pass, megabytes for nothing do not.
    #[serde(deserialize_with = "units::size")]
    #[schemars(schema_with = "schema::size")]
    pub headers: u64,
    /// Most headers of a request, 1 to 256; beyond it 431. Default 100, as Envoy and HAProxy do.
    #[serde(deserialize_with = "units::between::<_, 1, 256>")]
    #[schemars(schema_with = "schema::between::<1, 256>")]
    pub header_count: u32,
    /// The head of a request is whole within this, or 408. Default 10s: a deadline, not a gap, lest it be
    /// dripped for ever.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub header_timeout: Duration,
    /// A TLS handshake ends within this. Default 10s.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub tls_timeout: Duration,
    /// Largest request body, in bytes; beyond it 413. Default 32MiB: prompts with images are larger than
    /// nginx's 1 MiB.
    #[serde(deserialize_with = "units::size")]
    #[schemars(schema_with = "schema::size")]
    pub body: u64,
    /// All request bodies held at once, in bytes; beyond it 503 with `Retry-After`. At least `body`. Default
    /// 1GiB.
    #[serde(deserialize_with = "units::size")]
    #[schemars(schema_with = "schema::size")]
    pub buffered_bodies: u64,
    /// A request body is whole within this and the time its bytes take at `body_rate`, or 408. Default 60s: a
    /// deadline, not a gap, lest a body be dripped for ever.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub body_timeout: Duration,
    /// How slowly a large body may come, in bytes per second. Default 64KiB, half a megabit: slower clients
    /// have `body_timeout` for what they send.
    #[serde(deserialize_with = "units::size")]
    #[schemars(schema_with = "schema::size")]
    pub body_rate: u64,
    /// Connections of one client (an IPv4 address, or an IPv6 /64) at a time, 1 to 1000000; beyond it 429, or
    /// with TLS no handshake. Those of `trusted_proxies` are not counted. Absent: no limit, because many
    /// clients may be behind one address.
    #[serde(deserialize_with = "units::some_between::<_, 1, 1_000_000>")]
    #[schemars(schema_with = "schema::between::<1, 1_000_000>")]
    pub client_connections: Option<u32>,
    /// Requests at a time on one HTTP/2 connection, 1 to 10000. Default 100, as HAProxy does.
    #[serde(deserialize_with = "units::between::<_, 1, 10_000>")]
    #[schemars(schema_with = "schema::between::<1, 10_000>")]
    pub http2_streams: u32,
    /// HTTP/2 frames at once that cost us more than the client (RST_STREAM, SETTINGS, PING, PRIORITY,
    /// CONTINUATION, empty DATA), 10 to 1000000; a tenth of it comes back every second, and beyond it the
    /// connection is closed. Default 1000: a client that cancels 100 streams at once, ten times, keeps its
    /// connection.
    #[serde(deserialize_with = "units::between::<_, 10, 1_000_000>")]
    #[schemars(schema_with = "schema::between::<10, 1_000_000>")]
    pub http2_control_frames: u32,
    /// A client's connection without a request is closed after this. Default 75s, as nginx does.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub client_idle: Duration,
    /// A client that takes nothing of its answer for this long is cut off, to free the GPU. Default 60s.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub client_write_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            url: 8 << 10,
            headers: 32 << 10,
            header_count: 100,
            header_timeout: Duration::from_secs(10),
            tls_timeout: Duration::from_secs(10),
            body: 32 << 20,
            buffered_bodies: 1 << 30,
            body_timeout: Duration::from_secs(60),
            body_rate: 64 << 10,
            client_connections: None,
            http2_streams: 100,
            http2_control_frames: 1_000,
            client_idle: Duration::from_secs(75),
            client_write_timeout: Duration::from_secs(60),
        }
    }
}
