//! From a configuration to a running process: the wiring, and how it starts and stops.
//!
//! Everything that can be wrong is found out before anything is started: addresses that do not resolve or are
//! taken, certificates that do not fit their keys. Then one Pingora server runs the proxy, the admin listener
//! and one background service, which lets them accept, probes and polls the upstreams, tells systemd that we are
//! ready, and ends the process when the last request has ended after a SIGTERM, or after an upgrade.

mod background;
mod handover;
mod listening;
mod notify;
mod plan;
mod predecessor;
mod reload;
mod signals;
mod sockets;
mod successor;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;
use pingora::apps::HttpServerOptions;
use pingora::protocols::http::v2::server::default_h2_options;
use pingora::server::configuration::{Opt, ServerConf};
use pingora::server::{RunArgs, Server};
use pingora::services::background::background_service;
use pingora_proxy::HttpProxy;
use tokio::sync::{mpsc, oneshot, watch};

use crate::admin::{self, Admin, Reloaded};
use crate::clock::Clock;
use crate::config::Config;
use crate::ingress::{Door, Ingress, certificates};
use crate::observe::Records;
use crate::observe::metrics::Metrics;
use crate::observe::verbosity::Verbosity;
use crate::policy::Policies;
use crate::proxy::Proxy;
use background::Background;
use listening::{Gate, Listening};
use plan::Plan;
pub use predecessor::Predecessor;
use reload::{Generation, Reloader};
use signals::{Asked, Signals, Watched};
use sockets::{Socket, Sockets};
use successor::Upgrader;

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
/// of `policies`, describes after a reload. With a `predecessor`, in its place. `verbosity` is that of the log.
pub fn run(
    file: &Path,
    config: Config,
    policies: &Policies,
    mut predecessor: Option<Predecessor>,
    verbosity: Verbosity,
) -> Result<(), StartError> {
    let clock = Clock::start();
    raise_open_files(config.server.open_files);
    let signals = Watched::new().map_err(|e| StartError(format!("signals cannot be watched: {e}")))?;
    let ready = Ready::new(&config, clock, predecessor.as_mut());
    let Ready { plan, sockets, metrics, generation, records } = match (ready, &predecessor) {
        (Ok(ready), _) => ready,
        (Err(why), predecessor) => {
            predecessor.iter().for_each(|waiting| waiting.disappoint(&why.to_string()));
            return Err(why);
        }
    };
    let mut server = Server::new_with_opt_and_conf(Opt::default(), server_conf(&config));
    server.bootstrap();
    let proxy = Proxy::new(&config, generation.upstreams.clone(), clock, metrics.clone(), records.clone());
    let in_flight = proxy.in_flight();
    let app = app(&server.configuration, proxy.clone(), &config);
    let door =
        Door::new(Ingress::new(app, plan.listeners, &config, in_flight.clone(), clock, metrics.clone()));
    let (listeners, admin) = (addresses(&config), config.admin.clone());
    let generations = watch::Sender::new(Arc::new(generation));
    let again = sockets.again().map_err(|e| StartError(format!("no sockets for a successor: {e}")))?;
    let upgrader = Arc::new(Upgrader {
        file: file.to_owned(),
        sockets: Mutex::new(again),
        generations: generations.subscribe(),
    });
    let reloader = Arc::new(Reloader {
        file: file.to_owned(),
        policies: policies.clone(),
        clock,
        metrics: metrics.clone(),
        proxy: proxy.clone(),
        door: door.clone(),
        drain_timeout: Mutex::new(config.server.drain_timeout),
        running: Mutex::new(config),
        last: Mutex::default(),
        generations,
    });
    predecessor.is_none().then(|| reloader.write_pid()).transpose()?;
    let gate = Gate::closed();
    let services = 1 + usize::from(sockets.admin.is_some());
    server.add_service(Listening {
        name: "proxy",
        app: Arc::new(door),
        sockets: sockets.listeners,
        threads: None,
        gate: gate.clone(),
        in_flight: in_flight.clone(),
    });
    let (upgrades, asked) = mpsc::channel(1);
    if let (Some(socket), Some(config)) = (sockets.admin, &admin) {
        let process = Process { reloader: reloader.clone(), upgrades, upgrading: Default::default() };
        server.add_service(Listening {
            name: "admin",
            app: Arc::new(Admin::new(proxy, metrics.clone(), config, Arc::new(process), verbosity)),
            sockets: vec![socket],
            threads: Some(1),
            gate: gate.clone(),
            in_flight: in_flight.clone(),
        });
    }
    let (hangup, ending) = signals.split();
    server.add_service(background_service(
        "background",
        Background {
            reloader,
            hangup: Mutex::new(Some(hangup)),
            in_flight: in_flight.clone(),
            records: records.clone(),
            gate: gate.clone(),
            services,
            listeners,
            predecessor: Mutex::new(predecessor),
            follows: watch::Sender::new(false),
        },
    ));
    let asked = Mutex::new(Some(asked));
    let signals = Signals { signals: ending, asked, upgrader, in_flight, gate, metrics };
    server.run(RunArgs { shutdown_signal: Box::new(signals) });
    records.access_log.flush();
    Ok(())
}

/// The addresses of the listeners, as they are written.
fn addresses(config: &Config) -> Vec<String> {
    config.listeners.iter().map(|listener| listener.address.clone()).collect()
}

/// What the admin listener can have done to this process.
struct Process {
    reloader: Arc<Reloader>,
    upgrades: mpsc::Sender<Asked>,
    /// Held for as long as one takes.
    upgrading: tokio::sync::Mutex<()>,
}

#[async_trait]
impl admin::Process for Process {
    fn reload(&self) -> Result<String, String> {
        self.reloader.reload()
    }

    fn config(&self) -> String {
        self.reloader.config()
    }

    fn last_reload(&self) -> Option<Reloaded> {
        self.reloader.last_reload()
    }

    async fn upgrade(&self) -> Result<String, String> {
        let busy = || "another upgrade is under way, or the end".to_owned();
        let _one = self.upgrading.try_lock().map_err(|_| busy())?;
        let (whom, said) = oneshot::channel();
        // When the process is about to end, nobody listens any more.
        self.upgrades.try_send(whom).map_err(|_| busy())?;
        said.await.unwrap_or_else(|_| Err("the process is about to end".to_owned()))
    }
}

/// All that can go wrong before anything runs.
struct Ready {
    plan: Plan,
    sockets: Sockets,
    metrics: Arc<Metrics>,
    generation: Generation,
    records: Records,
}

impl Ready {
    fn new(config: &Config, clock: Clock, predecessor: Option<&mut Predecessor>) -> Result<Self, StartError> {
        let metrics = Arc::new(Metrics::new().map_err(|e| StartError(format!("metrics: {e}")))?);
        let mut plan = Plan::of(config, &[])?;
        let is_successor = predecessor.is_some();
        let (mut inherited, heritage) = match predecessor {
            Some(predecessor) => {
                (std::mem::take(&mut predecessor.sockets), std::mem::take(&mut predecessor.heritage))
            }
            None => (Socket::from_systemd()?, BTreeMap::new()),
        };
        plan.inherit(config, &heritage);
        let sockets = Sockets::open(config, &mut inherited)?;
        if let Some(socket) = inherited.first().filter(|_| !is_successor) {
            // Who connects there would wait for ever.
            let what = "has the address of no listener: change one or the other";
            return Err(StartError(format!("{socket:?}, which systemd has opened, {what}")));
        }
        let generation = plan.generation(config, None, clock, &metrics);
        for upstream in &generation.upstreams {
            heritage.get(&upstream.name).into_iter().for_each(|known| upstream.inherit(known));
        }
        if !heritage.is_empty() {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|e| StartError(format!("no runtime: {e}")))?;
            runtime.block_on(generation.probes.inherit(heritage.values()));
        }
        let records = Records::open(&config.observe, &metrics).map_err(StartError)?;
        Ok(Self { plan, sockets, metrics, generation, records })
    }
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
    ServerConf {
        threads,
        upstream_keepalive_pool_size: connections.div_ceil(threads).max(1),
        max_retries: ATTEMPTS_LIMIT,
        // The drain ends the process itself, in its own time.
        grace_period_seconds: Some(FOREVER),
        graceful_shutdown_timeout_seconds: Some(0),
        fast_timeout_to_tokio_threshold_seconds: Some(CHEAP_TIMERS),
        ..ServerConf::default()
    }
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
