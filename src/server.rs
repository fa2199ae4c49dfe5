//! From a configuration to a running process: the wiring, and how it starts and stops.
//!
//! Everything that can be wrong is found out before anything is started: addresses that do not resolve or are
//! taken, certificates that do not fit their keys. Then one Pingora server runs the proxy, the admin listener
//! and one background service, which probes and polls the upstreams, tells systemd that we are ready, and
//! ends the process when the last request has ended after a SIGTERM.

use std::collections::HashSet;
use std::fs::{File, Permissions};
use std::io::{self, BufRead, BufReader};
use std::net::{TcpListener, ToSocketAddrs};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pingora::apps::HttpServerOptions;
use pingora::protocols::http::v2::server::default_h2_options;
use pingora::server::configuration::{Opt, ServerConf};
use pingora::server::{RunArgs, Server, ShutdownSignal, ShutdownSignalWatch, ShutdownWatch};
use pingora::services::background::{BackgroundService, background_service};
use pingora::services::listening::Service;
use pingora_proxy::HttpProxy;
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::Admin;
use crate::clock::Clock;
use crate::config::{self, AdminAddress, Config};
use crate::ingress::{self, Ingress, certificates};
use crate::observe::metrics::Metrics;
use crate::proxy::{InFlight, Proxy};
use crate::upstream::{Member, Probes, Upstream};

/// Pingora ends a request after so many attempts, whatever we say; ours end long before.
const ATTEMPTS_LIMIT: usize = 64;

/// Seconds up to which Pingora's own timers are used. They are cheaper than tokio's, and stay in memory until
/// their time has come, needed or not: ten minutes of them on every thread, with a read timeout of ten minutes.
const CHEAP_TIMERS: u64 = 1;

/// HTTP/2 windows: a prompt of a megabyte should not need sixteen round trips.
const H2_STREAM_WINDOW: u32 = 1 << 20;
const H2_CONNECTION_WINDOW: u32 = 4 << 20;

/// What the last frames of a finished HTTP/2 answer get to leave the process.
const LAST_FRAMES: Duration = Duration::from_millis(100);

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

/// Runs what `config` describes until a signal ends it. With `upgrade`, the listening sockets are taken over
/// from the process that runs already.
pub fn run(config: &Config, upgrade: bool) -> Result<(), StartError> {
    let clock = Clock::start();
    raise_open_files(config.server.open_files);
    let metrics = Arc::new(Metrics::new().map_err(|e| StartError(format!("metrics: {e}")))?);
    let mut probes = Probes::default();
    let upstreams = upstreams(config, clock, &metrics, &mut probes)?;
    probes.publish();
    if !upgrade {
        check_free(config)?;
    }
    let listeners = config.listeners.iter().map(listener).collect::<Result<_, _>>()?;
    let mut server = Server::new_with_opt_and_conf(Opt { upgrade, ..Opt::default() }, server_conf(config));
    server.bootstrap();
    let proxy = Proxy::new(config, upstreams.clone(), clock, metrics.clone());
    let in_flight = proxy.in_flight();
    let app = app(&server.configuration, proxy, config);
    let ingress = Ingress::new(app, listeners, config, clock, metrics.clone());
    let mut service = Service::new("proxy".to_owned(), ingress);
    config.listeners.iter().for_each(|listener| service.add_tcp(&listener.address));
    server.add_service(service);
    if let Some(admin) = &config.admin {
        let app = Admin::new(upstreams.clone(), metrics, admin.token.clone());
        let mut service = Service::new("admin".to_owned(), app);
        service.threads = Some(1);
        match &admin.address {
            AdminAddress::Tcp(address) => service.add_tcp(address),
            AdminAddress::Unix(socket) => {
                service.add_uds(&socket.to_string_lossy(), Some(Permissions::from_mode(SOCKET_MODE)));
            }
        }
        server.add_service(service);
    }
    let background = Background {
        upstreams,
        probes,
        in_flight: in_flight.clone(),
        drain_timeout: config.server.drain_timeout,
        listeners: config.listeners.iter().map(|l| l.address.clone()).collect(),
    };
    server.add_service(background_service("background", background));
    if let Some(path) = &config.server.pid_file {
        write_pid(path)?;
    }
    let socket = config.server.upgrade_socket.as_ref().map(|path| path.display().to_string());
    server.run(RunArgs { shutdown_signal: Box::new(Signals { upgrade_socket: socket, in_flight }) });
    Ok(())
}

/// Finds out what only cryptography tells of `config`: a certificate that does not fit its key, say.
///
/// # Errors
/// The first file that cannot be used.
pub fn check(config: &Config) -> Result<(), StartError> {
    let mut tls = config.listeners.iter().filter_map(|listener| listener.tls.as_ref());
    tls.try_for_each(|tls| certificates::acceptor(tls, true).map(drop).map_err(StartError))
}

fn upstreams(
    config: &Config,
    clock: Clock,
    metrics: &Metrics,
    probes: &mut Probes,
) -> Result<Vec<Arc<Upstream>>, StartError> {
    config
        .upstreams
        .iter()
        .map(|(name, upstream)| {
            let members = resolve(name, &upstream.backends)?;
            Ok(Upstream::new(name, upstream.clone(), &members, None, clock, metrics, probes))
        })
        .collect()
}

/// The addresses of an upstream's backends; a name with several addresses is several backends.
fn resolve(upstream: &str, backends: &[config::Backend]) -> Result<Vec<Member>, StartError> {
    let mut members: Vec<Member> = Vec::new();
    for backend in backends {
        let addresses = backend.address.to_socket_addrs().map_err(|e| {
            StartError(format!("upstream `{upstream}`: backend {} does not resolve: {e}", backend.address))
        })?;
        for address in addresses {
            if !members.iter().any(|known| known.address == address) {
                let host = backend.address.rsplit_once(':').map_or("", |(host, _)| host);
                members.push(Member { address, weight: backend.weight, host: host.to_owned() });
            }
        }
    }
    Ok(members)
}

fn server_conf(config: &Config) -> ServerConf {
    // One pool for all upstreams, and Pingora multiplies its size by the threads.
    let connections: usize = config.upstreams.values().map(|u| u.keepalive.connections as usize).sum();
    let threads = config.server.threads as usize;
    let mut conf = ServerConf {
        threads,
        upstream_keepalive_pool_size: connections.div_ceil(threads).max(1),
        max_retries: ATTEMPTS_LIMIT,
        grace_period_seconds: Some(config.server.drain_timeout.as_secs()),
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

fn listener(listener: &config::Listener) -> Result<ingress::Listener, StartError> {
    let unusable = |e: &dyn std::fmt::Display| StartError(format!("listener {}: {e}", listener.address));
    // Pingora listens on the first address of a name, too.
    let address = listener.address.to_socket_addrs().map_err(|e| unusable(&e))?.next();
    let tls = listener.tls.as_ref();
    let acceptor = tls.map(|tls| certificates::acceptor(tls, listener.http2).map_err(|e| unusable(&e)));
    Ok(ingress::Listener {
        address: address.ok_or_else(|| unusable(&"no such address"))?,
        tls: acceptor.transpose()?,
        mutual: tls.is_some_and(|tls| tls.client_ca.is_some()),
        http2: listener.http2,
        proxy_protocol: listener.proxy_protocol,
    })
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

/// Each stream takes two descriptors, and the usual soft limit is 1,024.
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

/// What runs beside the proxy.
struct Background {
    upstreams: Vec<Arc<Upstream>>,
    probes: Probes,
    in_flight: InFlight,
    drain_timeout: Duration,
    listeners: Vec<String>,
}

#[async_trait]
impl BackgroundService for Background {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        let upstreams = futures::future::join_all(self.upstreams.iter().map(|u| u.run(shutdown.clone())));
        let probes = self.probes.run(shutdown.clone());
        let work = async {
            futures::join!(self.announce(), upstreams, probes);
            // Nothing to probe or poll is no reason to end.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = work => {}
            // An error means that the server itself is gone, which is the end as well.
            _ = shutdown.changed() => {}
        }
        self.drain().await;
    }
}

impl Background {
    /// Tells log and systemd that we accept connections.
    async fn announce(&self) {
        let ports: Vec<_> = self.listeners.iter().filter_map(|address| port(address)).collect();
        while listening_ports().is_some_and(|open| !ports.iter().all(|port| open.contains(port))) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        log::info!("ready listeners={} pid={}", self.listeners.join(","), std::process::id());
        notify("READY=1");
    }

    /// Ends the process when the last request has ended, at the latest after `drain_timeout`, or at a second
    /// signal.
    async fn drain(&self) {
        notify("STOPPING=1");
        let mut again = signal(SignalKind::terminate()).ok();
        let second = async {
            match &mut again {
                Some(again) => again.recv().await,
                None => std::future::pending().await,
            }
        };
        log::info!("draining in_flight={}", self.in_flight.count());
        tokio::select! {
            () = self.at_rest() => log::info!("drained"),
            () = tokio::time::sleep(self.drain_timeout) => log::warn!("drain timeout cut={}", self.in_flight.count()),
            _ = second => log::warn!("second signal cut={}", self.in_flight.count()),
        }
        log::logger().flush();
        std::process::exit(0);
    }
}

impl Background {
    /// Resolves when nothing has been in flight for a moment: the last frames of an HTTP/2 answer are still
    /// being written when its request has ended.
    async fn at_rest(&self) {
        loop {
            self.in_flight.none().await;
            tokio::time::sleep(LAST_FRAMES).await;
            if self.in_flight.count() == 0 {
                return;
            }
        }
    }
}

fn port(address: &str) -> Option<u16> {
    address.rsplit_once(':')?.1.parse().ok()
}

/// The TCP ports that somebody listens on, by the kernel's own table: a connection made to find out would be
/// logged as a failed handshake. `None` where there is no such table.
fn listening_ports() -> Option<HashSet<u16>> {
    let mut ports = HashSet::new();
    let mut found = false;
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let Ok(table) = File::open(table) else { continue };
        found = true;
        // Listening sockets come first, and a busy machine has very many others.
        let listening = |row: &String| row.split_whitespace().nth(3) == Some("0A");
        for row in BufReader::new(table).lines().map_while(Result::ok).skip(1).take_while(listening) {
            let local = row.split_whitespace().nth(1).and_then(|local| local.rsplit_once(':'));
            ports.extend(local.and_then(|(_, port)| u16::from_str_radix(port, 16).ok()));
        }
    }
    found.then_some(ports)
}

/// One datagram to systemd, if it asked for it.
fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = (|| {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::ffi::OsStrExt;
        use std::os::unix::net::{SocketAddr, UnixDatagram};
        let address = match path.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(&path)?,
        };
        UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)
    })();
    if let Err(e) = sent {
        log::warn!("systemd not notified state={state} error={e}");
    }
}

/// TERM drains, INT ends at once, QUIT hands over to a successor if there is one: without, Pingora would stop
/// serving for nothing.
struct Signals {
    upgrade_socket: Option<String>,
    in_flight: InFlight,
}

impl Signals {
    /// Whether a process listens on the upgrade socket.
    fn successor_waits(&self) -> bool {
        let Some(path) = &self.upgrade_socket else { return false };
        let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
        let is_listening =
            |line: &str| line.ends_with(path.as_str()) && line.split_whitespace().nth(3) == Some("00010000");
        sockets.lines().any(is_listening)
    }

    /// The next signal that ends this process.
    async fn wait(&self) -> ShutdownSignal {
        let signals = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::quit()].map(signal);
        let [Ok(mut term), Ok(mut int), Ok(mut quit)] = signals else {
            log::error!("signals cannot be watched");
            return std::future::pending().await;
        };
        loop {
            tokio::select! {
                _ = term.recv() => return ShutdownSignal::GracefulTerminate,
                _ = int.recv() => return ShutdownSignal::FastShutdown,
                _ = quit.recv() => {
                    if self.successor_waits() {
                        return ShutdownSignal::GracefulUpgrade;
                    }
                    log::warn!("SIGQUIT refused: no successor listens on server.upgrade_socket");
                }
            }
        }
    }
}

#[async_trait]
impl ShutdownSignalWatch for Signals {
    async fn recv(&self) -> ShutdownSignal {
        let signal = self.wait().await;
        self.in_flight.stop();
        signal
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

    #[test]
    fn a_listening_port_is_seen_without_connecting_to_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listening_ports().unwrap().contains(&port));
        drop(listener);
        assert!(!listening_ports().unwrap().contains(&port));
    }
}
