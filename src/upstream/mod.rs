//! The core wired to pingora-load-balancing: one [`Upstream`] is a named group of interchangeable backends,
//! alive.
//!
//! Pingora's `LoadBalancer` owns membership and health, the [`Balancer`] owns every decision; [`selector`]
//! joins the two. Requests come in through [`Upstream::admit`] (which may wait) and [`Upstream::assign`]
//! (which does not), and hold a [`Charge`] for as long as they are in flight. In the background each upstream
//! is probed ([`probe`]) and polled ([`poller`]).

mod charge;
mod client;
mod connections;
mod heritage;
mod models;
mod operate;
mod poller;
mod probe;
mod queue;
pub mod selector;

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use parking_lot::{Mutex, RwLock};
use pingora::server::ShutdownWatch;
use pingora_load_balancing::discovery::Static;
use pingora_load_balancing::{Backend, Backends, LoadBalancer};

pub use charge::Charge;
pub use heritage::{Heritage, Load};
pub use models::{Catalog, Serves};
pub use probe::Probes;
pub use queue::Refusal;

use crate::balance::pulse::Pulse;
use crate::balance::retry::{self, Failure};
use crate::balance::{Balancer, Settings, State, Tier, ejection};
use crate::clock::{Clock, Time};
use crate::config;
use crate::observe::metrics::{BackendMetrics, Metrics, UpstreamMetrics};
use crate::policy::{Request, Slot};
use crate::prompt::{BytesPerToken, Digest};
use connections::Connections;
use queue::Queue;
use selector::{Key, Selector};

/// How many models' prices are remembered, and how long their names may be.
const PRICES_LIMIT: usize = 1_024;
const MODEL_NAME_LIMIT: usize = 256;

/// A named group of interchangeable backends.
pub struct Upstream {
    /// Its name in the configuration.
    pub name: String,
    /// Its configuration.
    pub config: config::Upstream,
    /// The value of `authorization` sent to its backends, if it has an `api_key`.
    pub authorization: Option<String>,
    /// The models its backends serve.
    pub catalog: Catalog,
    /// When it is tried again.
    pub retry: Arc<retry::Rule>,
    shared: Arc<Shared>,
    /// Its backends as they are now, the same under every configuration of it: a request that waits, or is tried again,
    /// goes to backends that are there.
    view: Arc<RwLock<Arc<View>>>,
}

/// The backends of an upstream.
struct View {
    balancing: LoadBalancer<Selector>,
    live: HashMap<SocketAddr, Arc<Live>>,
}

/// What selectors, charges and background tasks of one upstream share, and what stays when its configuration changes.
pub struct Shared {
    name: String,
    clock: Clock,
    balancer: Mutex<Balancer>,
    queue: Queue,
    metrics: UpstreamMetrics,
    /// Bytes per prompt token, by model.
    prices: RwLock<HashMap<String, BytesPerToken>>,
}

/// A backend, as configured and resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its weight, at least 1.
    pub weight: u32,
    /// The host it was configured by: a name or an address.
    pub host: String,
}

/// The part of a backend that is touched on every read of its answers: no lock, no lookup.
pub struct Live {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its name in TLS and in the `Host` of our own requests.
    pub server_name: String,
    /// Its address, as it is shown.
    pub label: String,
    /// Its counters.
    pub metrics: BackendMetrics,
    /// Its open connections.
    pub connections: Arc<Connections>,
    pulse: Arc<Pulse>,
}

impl Live {
    /// The backend has sent bytes.
    pub fn heard(&self, now: Time) {
        self.pulse.beat(now);
    }

    /// How long ago the backend sent a byte; `None` if it never did.
    fn silence(&self, now: Time) -> Option<Duration> {
        self.last_heard().map(|last| now.since(last))
    }

    /// When the backend last sent a byte; `None` if it never did.
    fn last_heard(&self) -> Option<Time> {
        self.pulse.last()
    }
}

impl Upstream {
    /// Builds an upstream over these backends. Nothing runs until [`Upstream::run`]. What was known `before`, of the
    /// upstream of this name, is known to the new one, and both owe the same: from now on, that is by the new rules.
    pub fn new(
        name: &str,
        config: config::Upstream,
        members: &[Member],
        before: Option<&Self>,
        clock: Clock,
        metrics: &Metrics,
        probes: &mut Probes,
    ) -> Arc<Self> {
        let authorization = config.api_key.as_ref().map(|key| format!("Bearer {}", key.expose()));
        let shared = match before {
            Some(before) => before.shared.configure(&config, &before.config),
            None => Shared::new(name, &config, clock, metrics),
        };
        let live = live(name, &config, members, before, &shared, metrics);
        let registry = probes.registry(&config, authorization.as_deref(), (shared.clone(), live.clone()));
        let backends = Backends::new_with_health_registry(Static::new(backend_set(members)), registry);
        let balancing = LoadBalancer::from_backends_with_config(backends, Some(shared.clone()));
        // A static list is there at once; this publishes it and builds the first selector.
        if let Some(Err(e)) = balancing.update().now_or_never() {
            log::error!("upstream without backends upstream={name} error={e}");
        }
        let catalog = match before {
            Some(before) => Catalog::succeed(&config.models, &before.catalog, |a| live.contains_key(a)),
            None => Catalog::new(&config.models),
        };
        let now = Arc::new(View { balancing, live });
        let view = match before {
            Some(before) => {
                *before.view.write() = now;
                before.view.clone()
            }
            None => Arc::new(RwLock::new(now)),
        };
        Arc::new(Self {
            name: name.to_owned(),
            retry: Arc::new(config.retry.rule()),
            config,
            authorization,
            catalog,
            shared,
            view,
        })
    }

    /// Takes the probes' verdicts for what they are now, once they are published; whoever waits may find room.
    pub fn adopt_health(&self) {
        let backends = self.view().balancing.backends().get_backend();
        for backend in backends.iter() {
            let Some(address) = backend.addr.as_inet() else { continue };
            let healthy = self.view().balancing.backends().ready(backend);
            self.shared.balancer.lock().observe_health(address, healthy, self.shared.clock.now());
        }
        // Another backend, or a larger `max_requests`, is room.
        self.shared.queue.wake();
    }

    fn view(&self) -> Arc<View> {
        self.view.read().clone()
    }

    /// Polls the backends until `shutdown`.
    pub async fn run(&self, shutdown: ShutdownWatch) {
        let view = self.view();
        let polls = view.live.values().map(|live| poller::run(self, live, shutdown.clone()));
        futures::future::join_all(polls).await;
    }

    /// What the balancer needs to know of a request for `digest`.
    pub fn price<'a>(&self, digest: &'a Digest, session: Option<u64>) -> Request<'a> {
        let prices = self.shared.prices.read();
        let price = digest.model.as_ref().and_then(|model| prices.get(model)).copied().unwrap_or_default();
        Request {
            prompt_tokens: price.tokens(digest.prompt_bytes),
            blocks: &digest.blocks,
            block_tokens: price.block_tokens(),
            session: session.or(digest.session),
        }
    }

    /// Learns the price of a model's tokens from what an engine counted.
    pub fn learn(&self, digest: &Digest, prompt_tokens: u64) {
        let Some(model) = &digest.model else { return };
        let mut prices = self.shared.prices.write();
        if let Some(price) = prices.get_mut(model) {
            price.learn(digest.prompt_bytes, prompt_tokens);
            return;
        }
        // An engine that takes any name for a model must not make us remember them all.
        let is_model = model.len() <= MODEL_NAME_LIMIT && self.catalog.serves(model) == Serves::Yes;
        if is_model && prices.len() < PRICES_LIMIT {
            prices.entry(model.clone()).or_default().learn(digest.prompt_bytes, prompt_tokens);
        }
    }

    /// Chooses a backend and charges it, waiting for room if all are full. `Ok(None)`: there is no backend at
    /// all.
    pub async fn admit(&self, request: &Request<'_>) -> Result<Option<Charge>, Refusal> {
        let is_empty = self.view().live.is_empty();
        if self.shared.queue.is_empty() || is_empty {
            let charge = self.assign(request, &[]);
            // Where there are backends and none was tried, none is assigned only because all are full.
            if charge.is_some() || is_empty {
                return Ok(charge);
            }
        }
        if self.is_drained() {
            return Err(Refusal::Drained);
        }
        let attempt = || match self.assign(request, &[]) {
            Some(charge) => Some(Ok(Some(charge))),
            None => self.is_drained().then_some(Err(Refusal::Drained)),
        };
        self.shared.queue.wait(attempt).await?
    }

    /// Chooses a backend that was not tried yet and charges it; `None` if none is left or all are full.
    pub fn assign(&self, request: &Request<'_>, tried: &[Slot]) -> Option<Charge> {
        let key = Key::new(request, tried);
        let accept = |backend: &Backend, ready| ready || selector::is_last_resort(backend);
        let view = self.view();
        let backend = view.balancing.select_with(key.as_bytes(), view.live.len(), accept)?;
        let charge = selector::charge_of(&backend)?;
        self.shared.metrics.chose(charge.reason);
        Some(charge)
    }

    /// The backend at `address`, as long as it is a member.
    pub fn live(&self, address: &SocketAddr) -> Option<Arc<Live>> {
        self.view().live.get(address).cloned()
    }

    /// The backend gave a good answer.
    pub fn succeed(&self, slot: Slot) {
        self.shared.balancer.lock().succeed(slot, self.shared.clock.now());
    }

    /// The backend failed. `elsewhere` says that another backend answered the same request.
    pub fn fail(&self, address: SocketAddr, slot: Slot, failure: Failure, elsewhere: bool) {
        let now = self.shared.clock.now();
        let ejected = self.shared.balancer.lock().fail(slot, failure, elsewhere, now);
        if let Some(span) = ejected {
            let (name, reason) = (&self.name, failure.name());
            log::warn!("backend ejected upstream={name} backend={address} reason={reason} for={span:?}");
            self.shared.metrics.ejected(&address.to_string(), reason);
        }
    }

    /// The backend said so that it is full: prefer others for `span`, but no longer than `fail_timeout`.
    pub fn cool(&self, slot: Slot, failure: Failure, span: Duration) {
        let span = span.min(self.config.fail_timeout);
        self.shared.balancer.lock().cool(slot, failure, span, self.shared.clock.now());
    }

    /// Counts a retry after `failure`.
    pub fn retried(&self, failure: Failure) {
        self.shared.metrics.retried(failure.name());
    }

    /// Every backend as it stands.
    pub fn states(&self) -> Vec<State> {
        let now = self.shared.clock.now();
        self.shared.balancer.lock().states(now)
    }

    /// Whether any backend is up and in rotation.
    pub fn is_available(&self) -> bool {
        let now = self.shared.clock.now();
        self.shared.balancer.lock().any_available(now)
    }

    /// Among whom [`Upstream::assign`] would choose; `None` if there is nobody.
    pub fn tier(&self, tried: &[Slot]) -> Option<Tier> {
        self.shared.balancer.lock().tier(tried, self.shared.clock.now()).ok()
    }
}

impl Shared {
    fn new(name: &str, config: &config::Upstream, clock: Clock, metrics: &Metrics) -> Arc<Self> {
        let metrics = metrics.upstream(name);
        let (length, timeout) = (config.queue.length as usize, config.queue.timeout);
        Arc::new(Self {
            name: name.to_owned(),
            clock,
            balancer: Mutex::new(Balancer::new(settings(config), config.policy.build(), fastrand::u64(..))),
            queue: Queue::new(length, timeout, metrics.queued.clone()),
            metrics,
            prices: RwLock::default(),
        })
    }

    /// Goes on by the rules of `config` in place of those `before`.
    fn configure(self: &Arc<Self>, config: &config::Upstream, before: &config::Upstream) -> Arc<Self> {
        let policy = (config.policy != before.policy).then(|| config.policy.build());
        self.balancer.lock().configure(settings(config), policy);
        self.queue.configure(config.queue.length as usize, config.queue.timeout);
        self.clone()
    }

    /// Picks and charges in one step; `None` if no backend is left or all are full.
    fn pick(self: &Arc<Self>, request: &Request<'_>, tried: &[Slot]) -> Option<Charge> {
        let now = self.clock.now();
        let pick = self.balancer.lock().pick(request, tried, now).ok()?;
        Some(Charge::new(self.clone(), pick))
    }

    /// Sets which backends there are; none is no answer to that. Pingora's `LoadBalancer` begins with an empty set, and
    /// those that are known must not be forgotten for it.
    fn set_members(&self, members: impl IntoIterator<Item = (SocketAddr, u32)>) {
        let mut members = members.into_iter().peekable();
        if members.peek().is_some() {
            self.balancer.lock().set_members(members, self.clock.now());
        }
    }

    /// A probe of a backend came to nothing, and why.
    fn miss(&self, address: &SocketAddr, failure: &str) {
        self.balancer.lock().observe_probe(address, Some(failure.to_owned()));
    }

    /// A probe of a backend has been answered.
    fn reach(&self, address: &SocketAddr) {
        let mut balancer = self.balancer.lock();
        balancer.observe_probe(address, None);
        let returns = balancer.reach(address, self.clock.now());
        drop(balancer);
        if returns {
            log::info!("backend returns upstream={} backend={address} by=probe", self.name);
            self.queue.wake();
        }
    }

    /// A backend refuses connections and has fallen silent: what it still has will not be answered.
    fn give_up(&self, live: &Live) {
        let ended = live.connections.hang_up();
        if ended > 0 {
            log::warn!("backend gone upstream={} backend={} connections={ended}", self.name, live.address);
        }
    }

    /// The probes' verdict on a backend has changed.
    fn observe_health(&self, address: &SocketAddr, healthy: bool) {
        self.balancer.lock().observe_health(address, healthy, self.clock.now());
        let state = if healthy { "up" } else { "down" };
        log::warn!("backend {state} upstream={} backend={address} by=probe", self.name);
        self.queue.wake();
    }
}

fn settings(config: &config::Upstream) -> Settings {
    Settings {
        ejection: ejection::Rule { max_fails: config.max_fails, fail_timeout: config.fail_timeout },
        max_requests: config.max_requests,
        slow_start: config.slow_start,
        stall_timeout: config.stall_timeout,
    }
}

fn live(
    upstream: &str,
    config: &config::Upstream,
    members: &[Member],
    before: Option<&Upstream>,
    shared: &Shared,
    metrics: &Metrics,
) -> HashMap<SocketAddr, Arc<Live>> {
    let named = config.tls.as_ref().and_then(|tls| tls.server_name.clone());
    let live = |member: &Member| {
        let label = member.address.to_string();
        let live = Live {
            address: member.address,
            server_name: named.clone().unwrap_or_else(|| member.host.clone()),
            metrics: metrics.backend(upstream, &label),
            label,
            connections: before
                .and_then(|before| before.live(&member.address))
                .map_or_else(Arc::default, |live| live.connections.clone()),
            pulse: shared.balancer.lock().pulse(member.address),
        };
        (member.address, Arc::new(live))
    };
    members.iter().map(live).collect()
}

fn backend_set(members: &[Member]) -> BTreeSet<Backend> {
    members
        .iter()
        .map(|member| Backend {
            addr: pingora::protocols::l4::socket::SocketAddr::Inet(member.address),
            weight: member.weight as usize,
            ext: http::Extensions::new(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::ledger::Account;
    use crate::policy::{PolicyConfig, Reason};

    fn upstream(backends: u8, configure: impl FnOnce(&mut config::Upstream)) -> Arc<Upstream> {
        let mut config = config::Upstream::default();
        configure(&mut config);
        let (metrics, mut probes) = (Metrics::new().unwrap(), Probes::default());
        Upstream::new("llama", config, &members(backends), None, Clock::start(), &metrics, &mut probes)
    }

    fn members(backends: u8) -> Vec<Member> {
        let member =
            |n| Member { address: SocketAddr::from(([10, 0, 0, n], 8000)), weight: 1, host: String::new() };
        (1..=backends).map(member).collect()
    }

    fn request() -> Request<'static> {
        Request { prompt_tokens: 100, blocks: &[], block_tokens: 128.0, session: None }
    }

    fn at_rest(upstream: &Upstream) -> bool {
        upstream.states().iter().all(|state| state.account == Account::default())
    }

    fn succeed(
        before: &Upstream,
        backends: u8,
        configure: impl FnOnce(&mut config::Upstream),
    ) -> Arc<Upstream> {
        let mut config = before.config.clone();
        configure(&mut config);
        let (metrics, mut probes) = (Metrics::new().unwrap(), Probes::default());
        Upstream::new(
            "llama",
            config,
            &members(backends),
            Some(before),
            Clock::start(),
            &metrics,
            &mut probes,
        )
    }

    #[test]
    fn a_new_configuration_finds_what_its_backends_owe_and_the_old_one_settles_it() {
        let before = upstream(2, |_| {});
        let held = before.assign(&Request { blocks: &[1, 2], ..request() }, &[]).unwrap();
        let after = succeed(&before, 3, |config| config.policy = PolicyConfig::LeastConnections);
        let owed = |address| after.states().iter().find(|s| s.address == address).map(|s| s.account);
        assert_eq!(owed(held.address).unwrap().active_requests, 1);
        assert_eq!(after.states().len(), 3);
        let cached: usize = after.states().iter().map(|state| state.prefix_blocks).sum();
        assert_eq!(cached, 2, "what it has cached is not forgotten");
        let next = after.assign(&request(), &[]).unwrap();
        assert_ne!(next.address, held.address, "the new policy counts what the old one sent");
        drop((held, next));
        assert!(at_rest(&after) && at_rest(&before));
    }

    #[tokio::test]
    async fn more_room_in_a_new_configuration_lets_the_first_in_line_go() {
        let before = upstream(1, |config| config.max_requests = Some(1));
        let held = before.assign(&request(), &[]).unwrap();
        let request = request();
        let mut waiting = std::pin::pin!(before.admit(&request));
        assert!((&mut waiting).now_or_never().is_none());
        succeed(&before, 1, |config| config.max_requests = Some(2)).adopt_health();
        assert!(waiting.await.unwrap().is_some());
        drop(held);
        assert!(at_rest(&before));
    }

    #[test]
    fn a_backend_that_was_down_is_down_no_longer_than_somebody_probes_it() {
        let before = upstream(1, |_| {});
        before.shared.observe_health(&members(1)[0].address, false);
        assert!(!before.is_available());
        let after = succeed(&before, 1, |config| config.probe = None);
        after.adopt_health();
        assert!(after.is_available());
    }

    #[test]
    fn an_assignment_is_charged_until_it_is_dropped() {
        let upstream = upstream(2, |_| {});
        let mut first = upstream.assign(&request(), &[]).unwrap();
        let second = upstream.assign(&request(), &[]).unwrap();
        assert_ne!(first.address, second.address);
        let pending =
            |upstream: &Upstream| upstream.states().iter().map(|s| s.account.pending_tokens).sum::<u64>();
        assert_eq!(pending(&upstream), 200);
        first.answer();
        assert_eq!(pending(&upstream), 100);
        drop((first, second));
        assert!(at_rest(&upstream));
    }

    #[test]
    fn a_backend_that_was_tried_is_not_assigned_again() {
        let upstream = upstream(2, |_| {});
        let first = upstream.assign(&request(), &[]).unwrap();
        let second = upstream.assign(&request(), &[first.slot]).unwrap();
        assert_ne!(first.address, second.address);
        assert!(upstream.assign(&request(), &[first.slot, second.slot]).is_none());
        assert_eq!(upstream.tier(&[first.slot]), Some(Tier::Available));
        assert_eq!(upstream.tier(&[first.slot, second.slot]), None);
    }

    #[test]
    fn a_backend_that_is_down_is_assigned_only_as_a_last_resort() {
        let upstream = upstream(2, |_| {});
        let [down, up] = [1, 2].map(|n| SocketAddr::from(([10, 0, 0, n], 8000)));
        upstream.shared.observe_health(&down, false);
        let first = upstream.assign(&request(), &[]).unwrap();
        assert_eq!((first.address, first.reason), (up, Reason::Only));
        let second = upstream.assign(&request(), &[first.slot]).unwrap();
        assert_eq!((second.address, second.reason), (down, Reason::LastResort));
        drop((first, second));
        assert!(at_rest(&upstream));
    }

    #[tokio::test]
    async fn a_request_waits_for_the_backend_that_is_full_and_not_for_the_one_that_is_down() {
        let upstream = upstream(2, |config| config.max_requests = Some(1));
        upstream.shared.observe_health(&SocketAddr::from(([10, 0, 0, 1], 8000)), false);
        let first = upstream.admit(&request()).await.unwrap().unwrap();
        let waiting = upstream.clone();
        let second = tokio::spawn(async move { waiting.admit(&request()).await.unwrap().map(|c| c.address) });
        while upstream.shared.queue.is_empty() {
            tokio::task::yield_now().await;
        }
        let address = first.address;
        drop(first);
        assert_eq!(second.await.unwrap(), Some(address));
    }

    #[tokio::test]
    async fn a_request_waits_for_room_and_is_admitted_when_another_ends() {
        let upstream = upstream(1, |config| config.max_requests = Some(1));
        let first = upstream.admit(&request()).await.unwrap().unwrap();
        let waiting = upstream.clone();
        let second = tokio::spawn(async move { waiting.admit(&request()).await.unwrap().is_some() });
        while upstream.shared.queue.is_empty() {
            tokio::task::yield_now().await;
        }
        drop(first);
        assert!(second.await.unwrap());
        assert!(at_rest(&upstream));
    }

    #[test]
    fn a_price_is_learned_per_model() {
        let upstream = upstream(1, |config| config.models = config::Models::List(vec!["m".to_owned()]));
        let digest = crate::prompt::digest(
            crate::prompt::Endpoint::Completions,
            br#"{"model": "m", "prompt": "0123456789012345678901234567890123456789"}"#,
        );
        assert_eq!(upstream.price(&digest, None).prompt_tokens, 10);
        let long = Digest { prompt_bytes: 8_000, ..digest.clone() };
        for _ in 0..500 {
            upstream.learn(&long, 1_000);
        }
        assert!((5..=6).contains(&upstream.price(&digest, None).prompt_tokens));
    }
}
