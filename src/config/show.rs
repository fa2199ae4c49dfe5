//! The configuration that runs, written down again with every default, without any secret.
//!
//! Every section is taken apart key by key, so the compiler asks for each new key; a test reads back what was written
//! and finds the same configuration. Of a secret it is told where it is kept; of a key, that there is one.

use std::path::Path;
use std::time::Duration;

use serde_yaml::{Mapping, Value};

use super::discover::Discover;
use super::file::{
    Admin, AdminAddress, Config, Identity, Limits, Listener, ListenerTls, Observe, Server, Traces,
};
use super::upstream::{
    Backend, BackendTls, Keepalive, Models, Poll, Probe, Queue, Retry, Timeouts, Upstream,
};
use super::{Key, Route, Secret};
use crate::balance::retry::Cause;
use crate::policy::{PolicyConfig, blend, least_pending_tokens, prefix_hash};

/// What stands in the place of a key's hash.
pub(super) const REDACTED: &str = "redacted";

/// The configuration as YAML, as `plimsoll check` takes it, but for the hashes of keys.
pub fn show(config: &Config) -> String {
    let Config { server, listeners, admin, observe, limits, trusted_proxies, keys, routes, upstreams } =
        config;
    let shown = Map::default()
        .put("server", of_server(server))
        .put("listeners", list(listeners, of_listener))
        .some("admin", admin.as_ref().map(of_admin))
        .put("observe", of_observe(observe))
        .put("limits", of_limits(limits))
        .put("trusted_proxies", list(trusted_proxies, ToString::to_string))
        .some("keys", (!keys.is_empty()).then(|| map(keys, of_key)))
        .some("routes", (!routes.is_empty()).then(|| list(routes, of_route)))
        .put("upstreams", map(upstreams, of_upstream));
    let text = serde_yaml::to_string(&Value::from(shown));
    text.unwrap_or_else(|e| format!("# cannot be written: {e}\n"))
}

/// A map in the order in which it is filled.
#[derive(Default)]
struct Map(Mapping);

impl Map {
    fn put(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.0.insert(key.into(), value.into());
        self
    }

    fn some(self, key: &str, value: Option<impl Into<Value>>) -> Self {
        match value {
            Some(value) => self.put(key, value),
            None => self,
        }
    }
}

impl From<Map> for Value {
    fn from(map: Map) -> Self {
        Self::Mapping(map.0)
    }
}

fn list<T, V: Into<Value>>(items: impl IntoIterator<Item = T>, show: impl Fn(T) -> V) -> Value {
    Value::Sequence(items.into_iter().map(|item| show(item).into()).collect())
}

fn map<'a, T: 'a>(items: impl IntoIterator<Item = (&'a String, &'a T)>, show: impl Fn(&T) -> Map) -> Map {
    items.into_iter().fold(Map::default(), |map, (name, item)| map.put(name, show(item)))
}

fn span(duration: &Duration) -> String {
    match (duration.as_secs(), duration.subsec_millis()) {
        (0, 0) => "off".to_owned(),
        (seconds, 0) => format!("{seconds}s"),
        _ => format!("{}ms", duration.as_millis()),
    }
}

fn size(bytes: &u64) -> String {
    format!("{bytes}B")
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

fn of_server(server: &Server) -> Map {
    let Server { threads, pid_file, drain_timeout, open_files } = server;
    Map::default()
        .put("threads", *threads)
        .some("pid_file", pid_file.as_deref().map(path))
        .put("drain_timeout", span(drain_timeout))
        .some("open_files", *open_files)
}

fn of_listener(listener: &Listener) -> Map {
    let Listener { address, tls, http2, proxy_protocol } = listener;
    let tls = tls.as_ref().map(|tls| {
        let ListenerTls { certificate, key, others, client_ca } = tls;
        Map::default()
            .put("certificate", path(certificate))
            .put("key", path(key))
            .put("others", list(others, of_identity))
            .some("client_ca", client_ca.as_deref().map(path))
    });
    Map::default()
        .put("address", address.as_str())
        .some("tls", tls)
        .put("http2", *http2)
        .put("proxy_protocol", *proxy_protocol)
}

fn of_identity(identity: &Identity) -> Map {
    let Identity { certificate, key } = identity;
    Map::default().put("certificate", path(certificate)).put("key", path(key))
}

fn of_admin(admin: &Admin) -> Map {
    let Admin { address, token } = admin;
    let address = match address {
        AdminAddress::Tcp(address) => address.clone(),
        AdminAddress::Unix(socket) => format!("unix:{}", socket.display()),
    };
    Map::default().put("address", address).some("token", token.as_ref().map(of_secret))
}

fn of_observe(observe: &Observe) -> Map {
    let Observe { access_log, backend_header, traces } = observe;
    let traces = traces.as_ref().map(|traces| {
        let Traces { endpoint, sample } = traces;
        Map::default().put("endpoint", endpoint.to_string()).put("sample", *sample)
    });
    Map::default()
        .put("access_log", *access_log)
        .put("backend_header", *backend_header)
        .some("traces", traces)
}

/// Where it is kept.
fn of_secret(secret: &Secret) -> Map {
    let (key, place) = secret.place();
    Map::default().put(key, place)
}

fn of_limits(limits: &Limits) -> Map {
    let Limits {
        url,
        headers,
        header_count,
        header_timeout,
        tls_timeout,
        body,
        buffered_bodies,
        body_timeout,
        body_rate,
        client_connections,
        http2_streams,
        http2_control_frames,
        client_idle,
        client_write_timeout,
    } = limits;
    Map::default()
        .put("url", size(url))
        .put("headers", size(headers))
        .put("header_count", *header_count)
        .put("header_timeout", span(header_timeout))
        .put("tls_timeout", span(tls_timeout))
        .put("body", size(body))
        .put("buffered_bodies", size(buffered_bodies))
        .put("body_timeout", span(body_timeout))
        .put("body_rate", size(body_rate))
        .some("client_connections", *client_connections)
        .put("http2_streams", *http2_streams)
        .put("http2_control_frames", *http2_control_frames)
        .put("client_idle", span(client_idle))
        .put("client_write_timeout", span(client_write_timeout))
}

fn of_key(key: &Key) -> Map {
    // The hash stays here; where the key was kept is forgotten when it is read.
    let Key { requests_per_minute, tokens_per_minute, .. } = key;
    Map::default()
        .put("sha256", REDACTED)
        .some("requests_per_minute", *requests_per_minute)
        .some("tokens_per_minute", *tokens_per_minute)
}

fn of_route(route: &Route) -> Map {
    let Route { host, path, model, headers, key, upstream, retry } = route;
    let texts = |empty: bool, list: Value| (!empty).then_some(list);
    let headers_shown =
        headers.iter().fold(Map::default(), |map, (name, value)| map.put(name, shown_value(name, value)));
    Map::default()
        .some("host", host.as_ref().map(ToString::to_string))
        .some("path", path.as_deref())
        .some("model", texts(model.is_empty(), list(model, ToString::to_string)))
        .some("headers", (!headers.is_empty()).then_some(headers_shown))
        .some("key", texts(key.is_empty(), list(key, String::as_str)))
        .put("upstream", upstream.as_str())
        .some("retry", retry.as_ref().map(of_retry))
}

/// The value of a header, unless by its name it is one that opens something.
fn shown_value<'a>(name: &str, value: &'a str) -> &'a str {
    let name = name.to_ascii_lowercase();
    let opens = ["auth", "cookie", "key", "token", "secret"].iter().any(|part| name.contains(part));
    if opens { REDACTED } else { value }
}

fn of_discover(discover: &Discover) -> Map {
    let Discover { dns, srv, file, interval, timeout, servers } = discover;
    Map::default()
        .some("dns", dns.as_deref())
        .some("srv", srv.as_deref())
        .some("file", file.as_deref().map(path))
        .some("interval", interval.as_ref().map(span))
        .put("timeout", span(timeout))
        .put("servers", list(servers, |server| server.0.to_string()))
}

fn of_upstream(upstream: &Upstream) -> Map {
    let Upstream {
        engine,
        policy,
        models,
        backends,
        discover,
        tls,
        api_key,
        timeouts,
        keepalive,
        retry,
        max_fails,
        fail_timeout,
        slow_start,
        stall_timeout,
        max_requests,
        queue,
        probe,
        poll,
    } = upstream;
    let Timeouts { connect, read, send } = timeouts;
    let Keepalive { idle_timeout, connections, requests } = keepalive;
    let Queue { length, timeout } = queue;
    let timeouts =
        Map::default().put("connect", span(connect)).put("read", span(read)).put("send", span(send));
    let keepalive = Map::default()
        .put("idle_timeout", span(idle_timeout))
        .put("connections", *connections)
        .some("requests", *requests);
    Map::default()
        .put("engine", engine.name())
        .put("policy", of_policy(policy))
        .put("models", of_models(models))
        .some("backends", (!backends.is_empty()).then(|| list(backends, of_backend)))
        .some("discover", discover.as_ref().map(of_discover))
        .some("tls", tls.as_ref().map(of_tls))
        .some("api_key", api_key.as_ref().map(of_secret))
        .put("timeouts", timeouts)
        .put("keepalive", keepalive)
        .put("retry", of_retry(retry))
        .put("max_fails", *max_fails)
        .put("fail_timeout", span(fail_timeout))
        .put("slow_start", span(slow_start))
        .put("stall_timeout", span(stall_timeout))
        .some("max_requests", *max_requests)
        .put("queue", Map::default().put("length", *length).put("timeout", span(timeout)))
        .put("probe", probe.as_ref().map_or_else(|| "off".into(), of_probe))
        .put("poll", poll.as_ref().map_or_else(|| "off".into(), of_poll))
}

fn of_backend(backend: &Backend) -> Map {
    let Backend { address, weight } = backend;
    Map::default().put("address", address.as_str()).put("weight", *weight)
}

fn of_tls(tls: &BackendTls) -> Map {
    let BackendTls { server_name } = tls;
    Map::default().some("server_name", server_name.as_deref())
}

fn of_models(models: &Models) -> Value {
    match models {
        Models::Discover => "discover".into(),
        Models::Any => "any".into(),
        Models::List(models) => list(models, String::as_str),
    }
}

fn of_policy(policy: &PolicyConfig) -> Value {
    let options = match policy {
        PolicyConfig::LeastPendingTokens(options) => {
            let least_pending_tokens::Options { request_tokens, context_factor, uncached_factor } = options;
            Map::default()
                .put("request_tokens", *request_tokens)
                .put("context_factor", *context_factor)
                .put("uncached_factor", *uncached_factor)
        }
        PolicyConfig::PrefixHash(options) => {
            let prefix_hash::Options { load_factor } = options;
            Map::default().put("load_factor", *load_factor)
        }
        PolicyConfig::Blend(options) if *options != blend::Options::default() => {
            options.factors().fold(Map::default(), |map, (part, factor)| map.put(part, factor))
        }
        PolicyConfig::Blend(_)
        | PolicyConfig::LeastConnections
        | PolicyConfig::RoundRobin
        | PolicyConfig::RandomTwo
        | PolicyConfig::Lmetric
        | PolicyConfig::Custom(_) => return policy.name().into(),
    };
    Map::default().put(policy.name(), options).into()
}

fn of_retry(retry: &Retry) -> Map {
    let Retry { tries, within, on } = retry;
    let cause = |cause: &Cause| match cause {
        Cause::Connect => "connect",
        Cause::Closed => "closed",
        Cause::Timeout => "timeout",
        Cause::Status429 => "status_429",
        Cause::Status500 => "status_500",
        Cause::Status502 => "status_502",
        Cause::Status503 => "status_503",
        Cause::Status504 => "status_504",
        Cause::StreamError => "stream_error",
    };
    Map::default().put("tries", *tries).put("within", span(within)).put("on", list(on, cause))
}

fn of_probe(probe: &Probe) -> Value {
    let Probe { path, interval, timeout, down_after, up_after } = probe;
    Map::default()
        .some("path", path.as_deref())
        .put("interval", span(interval))
        .put("timeout", span(timeout))
        .put("down_after", *down_after)
        .put("up_after", *up_after)
        .into()
}

fn of_poll(poll: &Poll) -> Value {
    let Poll { path, interval, timeout } = poll;
    Map::default()
        .some("path", path.as_deref())
        .put("interval", span(interval))
        .put("timeout", span(timeout))
        .into()
}
