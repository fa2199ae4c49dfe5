//! From a configuration to a running process: the wiring, and how it starts and stops.
//!
//! Everything that can be wrong is found out before anything is started: addresses that do not resolve or are
//! taken, certificates that do not fit their keys. Then one Pingora server runs the proxy, the admin listener
//! and one background service, which probes and polls the upstreams, tells systemd that we are ready, and
//! ends the process when the last request has ended after a SIGTERM.

mod background;
mod notify;
mod plan;
mod reload;
mod signals;

use std::fs::Permissions;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use pingora::apps::HttpServerOptions;
use pingora::protocols::http::v2::server::default_h2_options;
use pingora::server::configuration::{Opt, ServerConf};
use pingora::server::{RunArgs, Server};
use pingora::services::background::background_service;
use pingora::services::listening::Service;
use pingora_proxy::HttpProxy;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::admin::Admin;
use crate::clock::Clock;
use crate::config::{self, AdminAddress, Config};
use crate::ingress::{Door, Ingress, certificates};
use crate::observe::metrics::Metrics;
use crate::policy::Policies;
use crate::proxy::Proxy;
use crate::upstream::Probes;
use background::Background;
use plan::Plan;
use reload::{Generation, Reloader};
use signals::Signals;

/// Pingora ends a request after so many attempts, whatever we say; ours end long before.
const ATTEMPTS_LIMIT: usize = 64;

/// Seconds up to which Pingora's own timers are used. They are cheaper than tokio's, and stay in memory until
/// their time has come, needed or not: ten minutes of them on every thread, with a read timeout of ten minutes.
const CHEAP_TIMERS: u64 = 1;

/// Longer than any drain, in seconds.
const FOREVER: u64 = 10 * 366 * 24 * 3600;

/// HTTP/2 windows: a prompt of a megabyte should not need sixteen round trips.
const H2_STREAM_WINDOW: u32 = 1 << 20;
const H2_CONNECTION_WINDOW: u32 = 4 << 20;

/// Nobody but us and root talks to a socket of ours.
const SOCKET_MODE: u32 = 0o600;

/// Why the server could not start.
#[derive(Debug)]
pub struct StartError(String);

impl std::fmt::Display for StartError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StartError {}

/// Runs what `config` describes until a signal ends it, and what `file`, from which it was read and which may name any
/// of `policies`, describes after a reload. With `upgrade`, the listening sockets are taken over from the process that
/// runs already.
pub fn run(file: &Path, config: Config, policies: &Policies, upgrade: bool) -> Result<(), StartError> {
    let clock = Clock::start();
    raise_open_files(config.server.open_files);
    let hangup = watch_hangup().map_err(|e| StartError(format!("signals cannot be watched: {e}")))?;
    let metrics = Arc::new(Metrics::new().map_err(|e| StartError(format!("metrics: {e}")))?);
    let plan = Plan::of(&config)?;
    if !upgrade {
        check_free(&config)?;
    }
    let mut probes = Probes::default();
    let upstreams = plan.upstreams(&config, &[], clock, &metrics, &mut probes);
    probes.publish();
    upstreams.iter().for_each(|upstream| upstream.adopt_health());
    let mut server = Server::new_with_opt_and_conf(Opt { upgrade, ..Opt::default() }, server_conf(&config));
    server.bootstrap();
    let proxy = Proxy::new(&config, upstreams.clone(), clock, metrics.clone());
    let in_flight = proxy.in_flight();
    let app = app(&server.configuration, proxy.clone(), &config);
    let door = Door::new(Ingress::new(app, plan.listeners, &config, clock, metrics.clone()));
    let listeners: Vec<_> = config.listeners.iter().map(|listener| listener.address.clone()).collect();
    let (admin, pid_file) = (config.admin.clone(), config.server.pid_file.clone());
    let upgrade_socket = config.server.upgrade_socket.as_ref().map(|path| path.display().to_string());
    let mut service = Service::new("proxy".to_owned(), door.clone());
    listeners.iter().for_each(|address| service.add_tcp(address));
    server.add_service(service);
    let reloader = Arc::new(Reloader {
        file: file.to_owned(),
        policies: policies.clone(),
        clock,
        metrics: metrics.clone(),
        proxy: proxy.clone(),
        door,
        drain_timeout: Mutex::new(config.server.drain_timeout),
        running: Mutex::new(config),
        generations: watch::Sender::new(Arc::new(Generation { upstreams, probes })),
    });
    if let Some(admin) = &admin {
        server.add_service(admin_service(admin, proxy, metrics, reloader.clone()));
    }
    let background =
        Background { reloader, hangup: Mutex::new(Some(hangup)), in_flight: in_flight.clone(), listeners };
    server.add_service(background_service("background", background));
    if let Some(path) = &pid_file {
        write_pid(path)?;
    }
    server.run(RunArgs { shutdown_signal: Box::new(Signals { upgrade_socket, in_flight }) });
    Ok(())
}

fn admin_service(
    admin: &config::Admin,
    proxy: Proxy,
    metrics: Arc<Metrics>,
    reloader: Arc<Reloader>,
) -> Service<Admin> {
    let app = Admin::new(proxy, metrics, admin.token.clone(), Box::new(move || reloader.reload()));
    let mut service = Service::new("admin".to_owned(), app);
    service.threads = Some(1);
    match &admin.address {
        AdminAddress::Tcp(address) => service.add_tcp(address),
        AdminAddress::Unix(socket) => {
            service.add_uds(&socket.to_string_lossy(), Some(Permissions::from_mode(SOCKET_MODE)));
        }
    }
    service
}

/// Finds out what only cryptography tells of `config`: a certificate that does not fit its key, say.
///
/// # Errors
/// The first file that cannot be used.
pub fn check(config: &Config) -> Result<(), StartError> {
    let mut tls = config.listeners.iter().filter_map(|listener| listener.tls.as_ref());
    tls.try_for_each(|tls| certificates::acceptor(tls, true).map(drop).map_err(StartError))
}

fn server_conf(config: &Config) -> ServerConf {
    // One pool for all upstreams, and Pingora multiplies its size by the threads.
    let connections: usize = config.upstreams.values().map(|u| u.keepalive.connections as usize).sum();
    let threads = config.server.threads as usize;
    let mut conf = ServerConf {
        threads,
        upstream_keepalive_pool_size: connections.div_ceil(threads).max(1),
        max_retries: ATTEMPTS_LIMIT,
        // The drain ends the process itself, in its own time.
        grace_period_seconds: Some(FOREVER),
        graceful_shutdown_timeout_seconds: Some(0),
        fast_timeout_to_tokio_threshold_seconds: Some(CHEAP_TIMERS),
        ..ServerConf::default()
    };
    if let Some(path) = &config.server.upgrade_socket {
        conf.upgrade_sock = path.display().to_string();
    }
    conf
}

/// What speaks HTTP behind the front door, which speaks TLS: to Pingora every listener is plain TCP.
fn app(conf: &Arc<ServerConf>, proxy: Proxy, config: &Config) -> HttpProxy<Proxy> {
    let mut app = pingora_proxy::http_proxy(conf, proxy);
    let mut options = HttpServerOptions::default();
    // The front door lets nobody speak HTTP/2 who may not.
    options.h2c = true;
    options.h2_idle_timeout = Some(config.limits.client_idle);
    app.server_options = Some(options);
    let mut h2 = default_h2_options();
    h2.initial_window_size(H2_STREAM_WINDOW).initial_connection_window_size(H2_CONNECTION_WINDOW);
    let limits = &config.limits;
    h2.max_concurrent_streams(limits.http2_streams);
    h2.max_header_list_size(u32::try_from(limits.headers).unwrap_or(u32::MAX));
    // Whoever cancels all its streams at once keeps its connection: floods are counted at the front door.
    h2.max_pending_accept_reset_streams(limits.http2_control_frames as usize);
    app.h2_options = Some(h2);
    app
}

/// Finds out now what Pingora would find out in a task of its own, after the start.
fn check_free(config: &Config) -> Result<(), StartError> {
    let mut tcp: Vec<&String> = config.listeners.iter().map(|listener| &listener.address).collect();
    match config.admin.as_ref().map(|admin| &admin.address) {
        Some(AdminAddress::Tcp(address)) => tcp.push(address),
        Some(AdminAddress::Unix(socket)) => check_socket(socket)
            .map_err(|e| StartError(format!("cannot listen on unix:{}: {e}", socket.display())))?,
        None => {}
    }
    for address in tcp {
        TcpListener::bind(address).map_err(|e| StartError(format!("cannot listen on {address}: {e}")))?;
    }
    Ok(())
}

/// Finds out whether a socket can be made at `path`. Pingora removes what is there, whatever it is: so here it may be
/// a socket only, and only one that a dead process has left.
fn check_socket(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file, and it is no socket"));
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => return Err(io::ErrorKind::AddrInUse.into()),
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
            Err(e) => return Err(e),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    UnixListener::bind(path)?;
    std::fs::remove_file(path)
}

fn write_pid(path: &Path) -> Result<(), StartError> {
    std::fs::write(path, format!("{}\n", std::process::id()))
        .map_err(|e| StartError(format!("cannot write the pid file {}: {e}", path.display())))
}

/// Watches for SIGHUP from now on, which ends a process that does not. The handler stays when the runtime goes in
/// which it was installed.
fn watch_hangup() -> io::Result<Signal> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { signal(SignalKind::hangup()) })
}

/// Each stream takes three descriptors, and the usual soft limit is 1,024.
fn raise_open_files(wanted: Option<u32>) {
    let wanted_limit = wanted.map_or(rlimit::INFINITY, u64::from);
    let raised = rlimit::Resource::NOFILE.get().and_then(|(soft, hard)| {
        let target = wanted_limit.min(hard);
        // Not set again where nothing changes: a sandbox may forbid the call.
        if soft < target { rlimit::Resource::NOFILE.set(target, hard).map(|()| target) } else { Ok(soft) }
    });
    match (raised, wanted) {
        (Ok(limit), Some(wanted)) if limit < u64::from(wanted) => {
            log::warn!("open files limited limit={limit} wanted={wanted}");
        }
        (Err(e), _) => log::warn!("open files limit unchanged error={e}"),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_replaced_only_if_nobody_listens_on_it() {
        let folder = std::env::temp_dir().join(format!("plimsoll-socket-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("admin.sock");
        check_socket(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(check_socket(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        assert!(path.exists(), "a dead process leaves its socket");
        check_socket(&path).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(check_socket(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        assert!(check_socket(&folder.join("absent/admin.sock")).is_err());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
