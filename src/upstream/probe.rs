//! The active health check: is this backend alive?
//!
//! A `GET` of the engine's health path (engines answer HEAD with 405) with a patient timeout, because a
//! saturated engine is slow to answer and SGLang's always takes a second; several failures in a row before a
//! backend counts as down. Any answer below 500 is a sign of life: an engine that wants a key is not dead.
//! A probe that times out proves nothing against a backend that has sent bytes meanwhile: it is busy
//! (research/reliability.md s.0.8 and s.2). One that is refused proves that the engine's process goes: if it is
//! refused `down_after` times in a row, and no stream has brought a byte for `timeout` meanwhile, the streams are
//! ended (`balance/pulse.rs`).
//!
//! Thresholds are those of Pingora's registries of health: all backends of one are probed in parallel, each with a
//! jitter of its own, and a round ends with its slowest probe. Backends that join do not wait for the interval: the
//! next round begins when the present one has ended. No round is cut short, or backends that come and go faster than
//! probes are answered would keep us from ever knowing. Upstreams that probe in the same way share one registry, keyed
//! by address, so that an engine which serves several of them is probed once and is up or down for all.

use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::{Mutex, RwLock};
use pingora::server::ShutdownWatch;
use pingora::{Error, ErrorType};
use pingora_load_balancing::health_check::HealthCheck;
use pingora_load_balancing::{Backend, HealthRegistry};
use tokio::sync::Notify;

use super::client::{Client, NoAnswer};
use super::view::Views;
use super::{Heritage, Live, Shared};
use crate::balance::pulse::Refusals;
use crate::config;
use crate::fetch::Fetcher;

/// The fraction of the interval over which probes are spread.
const JITTER: f64 = 0.2;

/// The registries of the process, one for each way of probing.
#[derive(Default)]
pub struct Probes {
    registries: Vec<Probed>,
    /// Asks for all of them, and for whoever else asks backends.
    pub(super) fetcher: Arc<Fetcher>,
}

/// One registry, and those who look at it.
struct Probed {
    settings: Settings,
    round: Round,
    watchers: Watchers,
    found: Found,
}

/// A registry, as those see it whose backends are probed there.
#[derive(Clone)]
pub(super) struct Round {
    pub(super) registry: Arc<HealthRegistry>,
    /// Those who will look at it, once [`Probes::publish`] is called.
    coming: Arc<Mutex<Vec<Watcher>>>,
    joined: Arc<Notify>,
}

impl Round {
    fn new() -> Self {
        let registry = Arc::new(HealthRegistry::with_equivalence(by_address));
        Self { registry, coming: Arc::default(), joined: Arc::default() }
    }

    /// From the next [`Probes::publish`] on, an upstream and its backends hear of the probes.
    pub(super) fn watch(&self, shared: Arc<Shared>, views: Arc<Views>) {
        self.coming.lock().push((shared, views));
    }

    /// Backends have joined: they are probed at once.
    pub(super) fn hurry(&self) {
        self.joined.notify_one();
    }

    /// Waits for the next pass: for the interval, or until backends join.
    async fn pause(&self, interval: Duration) {
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            () = self.joined.notified() => {}
        }
    }
}

impl Probed {
    /// Probes at every interval, and when backends join.
    async fn run(&self) {
        loop {
            let pass = async {
                self.round.registry.run_health_check(true).await;
                self.settle();
            };
            futures::join!(pass, self.round.pause(self.settings.probe.interval));
        }
    }

    /// Every verdict once more as it stands: a backend that has left and come back during a pass has one of its own,
    /// and what the pass said of the one before is not about it.
    fn settle(&self) {
        let watchers = self.watchers.read().clone();
        for (shared, views) in watchers {
            shared.adopt(&views.now(), |_| true);
        }
    }
}

/// A way of probing.
#[derive(Clone, PartialEq)]
struct Settings {
    probe: config::Probe,
    path: String,
    tls: Option<config::BackendTls>,
    authorization: Option<String>,
}

/// The upstreams of a registry.
type Watchers = Arc<RwLock<Vec<Watcher>>>;

/// The backends that are down, while another process says so ([`Probes::inherit`]).
type Found = Arc<RwLock<Option<BTreeSet<SocketAddr>>>>;

/// An upstream and its backends.
type Watcher = (Arc<Shared>, Arc<Views>);

impl Probes {
    /// The same ways of probing, with what they have found, for the upstreams of a new configuration.
    pub fn successor(&self) -> Self {
        let registries = self.registries.iter().map(|probed| Probed {
            settings: probed.settings.clone(),
            round: probed.round.clone(),
            watchers: probed.watchers.clone(),
            found: probed.found.clone(),
        });
        Self { registries: registries.collect(), fetcher: self.fetcher.clone() }
    }

    /// Where an upstream's backends are probed as `config` says, or not at all.
    pub(super) fn round(&mut self, config: &config::Upstream, authorization: Option<&str>) -> Round {
        let (Some(probe), Some(path)) = (&config.probe, config.probe_path()) else { return Round::new() };
        let settings = Settings {
            probe: probe.clone(),
            path: path.to_owned(),
            tls: config.tls.clone(),
            authorization: authorization.map(str::to_owned),
        };
        if let Some(known) = self.registries.iter().find(|known| known.settings == settings) {
            return known.round.clone();
        }
        let (round, watchers, found) = (Round::new(), Watchers::default(), Found::default());
        round.registry.set_health_check(Box::new(Probe {
            client: Client::new(config, settings.authorization.clone(), self.fetcher.clone()),
            settings: settings.clone(),
            watchers: watchers.clone(),
            found: found.clone(),
            refusals: Mutex::default(),
        }));
        self.registries.push(Probed { settings, round: round.clone(), watchers, found });
        round
    }

    /// From now on the upstreams that asked for a registry look at it, and no others.
    pub fn publish(&mut self) {
        for probed in &mut self.registries {
            *probed.watchers.write() = std::mem::take(&mut *probed.round.coming.lock());
        }
        self.registries.retain(|probed| !probed.watchers.read().is_empty());
    }

    /// Takes the backends that another process has found to be down for down, until they are probed.
    pub async fn inherit(&self, heritage: impl IntoIterator<Item = &Heritage>) {
        let down: BTreeSet<_> = heritage.into_iter().flat_map(|known| known.down.iter().copied()).collect();
        for probed in &self.registries {
            *probed.found.write() = Some(down.clone());
            for _ in 0..probed.settings.probe.down_after {
                probed.round.registry.run_health_check(true).await;
            }
            *probed.found.write() = None;
        }
    }

    /// Probes until `shutdown`.
    pub async fn run(&self, mut shutdown: ShutdownWatch) {
        let rounds = self.registries.iter().map(Probed::run);
        tokio::select! {
            _ = futures::future::join_all(rounds) => {}
            _ = shutdown.changed() => {}
        }
    }
}

/// Health is that of an address, whatever weight it has at the moment.
fn by_address(backend: &Backend) -> u64 {
    let mut hasher = DefaultHasher::new();
    backend.addr.hash(&mut hasher);
    hasher.finish()
}

/// The health check of one registry.
struct Probe {
    settings: Settings,
    client: Client,
    watchers: Watchers,
    found: Found,
    /// Of the backends that refused their last probe.
    refusals: Mutex<HashMap<SocketAddr, Refusals>>,
}

/// A backend, as each upstream that has it sees it.
type Watched = [(Arc<Shared>, Arc<Live>)];

impl Probe {
    /// The backend at `address`, as each upstream that has it sees it.
    fn watched(&self, address: &SocketAddr) -> Vec<(Arc<Shared>, Arc<Live>)> {
        let watchers = self.watchers.read();
        let of = |(shared, views): &Watcher| Some((shared.clone(), views.now().live.get(address)?.clone()));
        watchers.iter().filter_map(of).collect()
    }

    /// Whether a backend has sent bytes since the probe before the present one.
    fn was_heard_lately(&self, watched: &Watched) -> bool {
        let lately = self.settings.probe.interval + self.settings.probe.timeout;
        let heard = |(shared, live): &(Arc<Shared>, Arc<Live>)| live.silence(shared.clock.now());
        watched.iter().filter_map(heard).any(|silence| silence < lately)
    }

    /// Keeps count of refused connections, and gives up a backend that is gone.
    fn note(&self, watched: &Watched, refused: bool) {
        let Some((shared, live)) = watched.first() else { return };
        if !refused {
            self.refusals.lock().remove(&live.address);
            return;
        }
        let config::Probe { down_after, timeout, .. } = self.settings.probe;
        let last = watched.iter().filter_map(|(_, live)| live.last_heard()).max();
        let now = shared.clock.now();
        let gone =
            self.refusals.lock().entry(live.address).or_default().refuse(down_after, timeout, last, now);
        if gone {
            watched.iter().for_each(|(shared, live)| shared.give_up(live));
        }
    }
}

#[async_trait]
impl HealthCheck for Probe {
    async fn check(&self, target: &Backend) -> pingora::Result<()> {
        let watched = target.addr.as_inet().map_or_else(Vec::new, |address| self.watched(address));
        let Some((_, live)) = watched.first() else { return Ok(()) };
        if let Some(down) = &*self.found.read() {
            let is_down = down.contains(&live.address);
            return if is_down {
                Error::e_explain(ErrorType::ConnectError, "down elsewhere")
            } else {
                Ok(())
            };
        }
        let probe = &self.settings.probe;
        tokio::time::sleep(probe.interval.mul_f64(JITTER * fastrand::f64())).await;
        let answer = self.client.get(live, &self.settings.path, probe.timeout).await;
        self.note(&watched, answer.as_ref().is_err_and(NoAnswer::is_refused));
        let (kind, failure) = match answer {
            Ok((..500, _)) => {
                watched.iter().for_each(|(shared, live)| shared.reach(&live.address));
                return Ok(());
            }
            Ok((status, _)) => (ErrorType::HTTPStatus(status), format!("status {status}")),
            Err(NoAnswer::Late) if self.was_heard_lately(&watched) => return Ok(()),
            Err(no_answer) => (ErrorType::ConnectError, no_answer.to_string()),
        };
        watched.iter().for_each(|(shared, live)| shared.miss(&live.address, &failure));
        Error::e_explain(kind, format!("probe: {failure}"))
    }

    async fn health_status_change(&self, target: &Backend, healthy: bool) {
        let Some(address) = target.addr.as_inet() else { return };
        for (shared, _) in self.watched(address) {
            shared.observe_health(address, healthy);
        }
    }

    fn backend_summary(&self, target: &Backend) -> String {
        format!("backend={}", target.addr)
    }

    fn health_threshold(&self, success: bool) -> usize {
        let probe = &self.settings.probe;
        (if success { probe.up_after } else { probe.down_after }) as usize
    }
}
