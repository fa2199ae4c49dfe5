//! The core wired to pingora-load-balancing: one [`Upstream`] is a named group of interchangeable backends,
//! alive.
//!
//! Pingora's `LoadBalancer` owns membership and health, the [`Balancer`] owns every decision; [`selector`]
//! joins the two. Requests come in through [`Upstream::admit`] (which may wait) and [`Upstream::assign`]
//! (which does not), and hold a [`Charge`] for as long as they are in flight. In the background each upstream
//! is probed ([`probe`]) and polled ([`poller`]), and finds its backends if the configuration does not name them
//! ([`discovery`], [`view`]).

mod charge;
mod client;
mod connections;
mod discovery;
mod heritage;
mod models;
mod operate;
mod poller;
mod probe;
mod queue;
pub mod selector;
mod view;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use pingora::server::ShutdownWatch;
use pingora_load_balancing::Backend;

pub use charge::Charge;
pub use discovery::{Origin, Source, first_answers, resolve, source};
pub use heritage::{Heritage, Load};
pub use models::{Catalog, Serves};
pub use probe::Probes;
pub use queue::Refusal;
pub use view::{Live, Member};

use crate::balance::retry::{self, Failure};
use crate::balance::{Balancer, Settings, State, Tier, ejection};
use crate::clock::Clock;
use crate::config;
use crate::fetch::Fetcher;
use crate::observe::metrics::{DiscoveryMetrics, Metrics, UpstreamMetrics};
use crate::policy::{Request, Slot};
use crate::prompt::{BytesPerToken, Digest};
use queue::Queue;
use selector::Key;
use view::{Maker, View, Views};

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
    /// Asks its backends how they are.
    fetcher: Arc<Fetcher>,
    /// The models its backends serve.
    pub catalog: Catalog,
    /// When it is tried again.
    pub retry: Arc<retry::Rule>,
    shared: Arc<Shared>,
    maker: Maker,
    views: Arc<Views>,
    /// Which of its configurations this is.
    reign: u64,
    /// Who says which backends there are, if the configuration does not.
    discovery: Option<(Arc<dyn Source>, DiscoveryMetrics)>,
}

/// What selectors, charges and background tasks of one upstream share, and what stays when its configuration changes.
pub struct Shared {
    name: String,
    clock: Clock,
    /// Never held while the view is looked at: whoever changes the view holds that, and then this.
    balancer: Mutex<Balancer>,
    queue: Queue,
    metrics: UpstreamMetrics,
    /// Bytes per prompt token, by model.
    prices: RwLock<HashMap<String, BytesPerToken>>,
}

impl Upstream {
    /// Builds an upstream over the backends of `origin`. Nothing runs until [`Upstream::run`]. What was known `before`,
    /// of the upstream of this name, is known to the new one, and both owe the same: from now on, that is by the new
    /// rules.
    pub fn new(
        name: &str,
        config: config::Upstream,
        origin: Origin,
        before: Option<&Self>,
        clock: Clock,
        metrics: &Arc<Metrics>,
        probes: &mut Probes,
    ) -> Arc<Self> {
        let authorization = config.api_key.as_ref().map(|key| format!("Bearer {}", key.expose()));
        let shared = match before {
            Some(before) => before.shared.configure(&config, &before.config),
            None => Shared::new(name, &config, clock, metrics),
        };
        let maker = Maker {
            server_name: config.tls.as_ref().and_then(|tls| tls.server_name.clone()),
            shared: shared.clone(),
            metrics: metrics.clone(),
            round: probes.round(&config, authorization.as_deref()),
        };
        let (views, reign) = match before {
            Some(Self { views, .. }) => {
                let mut reign = views.reign.lock();
                *reign += 1;
                let known = views.now();
                let members = if origin.members.is_empty() { known.members.clone() } else { origin.members };
                views.publish(maker.view(members, Some(&known)));
                (views.clone(), *reign)
            }
            None => (Views::begin(maker.view(origin.members, None), clock.now()), 0),
        };
        if before.is_none_or(|before| before.config.discover != config.discover) {
            *views.answered.lock() = clock.now();
        }
        maker.round.watch(shared.clone(), views.clone());
        let catalog = Catalog::new(&config.models, before.map(|before| &before.catalog));
        catalog.keep(|address| views.now().live.contains_key(address));
        Arc::new(Self {
            name: name.to_owned(),
            retry: Arc::new(config.retry.rule()),
            discovery: origin.source.map(|source| (source, metrics.discovery(name))),
            config,
            authorization,
            fetcher: probes.fetcher.clone(),
            catalog,
            shared,
            maker,
            views,
            reign,
        })
    }

    /// Takes the probes' verdicts for what they are now, once they are published; whoever waits may find room.
    pub fn adopt_health(&self) {
        self.adopt(|_| true);
    }

    /// Takes the probes' verdicts on those backends for what they are now.
    fn adopt(&self, concerns: impl Fn(&SocketAddr) -> bool) {
        self.shared.adopt(&self.views.now(), concerns);
        // Another backend, or a larger `max_requests`, is room.
        self.shared.queue.wake();
    }

    /// From now on its backends are `members`, at least one, in the order of their addresses. Those that are new are
    /// probed and polled at once, those that are gone get no more requests. After a reload this does nothing: another
    /// one sees to the backends.
    fn replace(&self, members: Vec<Member>) {
        let reign = self.views.reign.lock();
        if *reign != self.reign {
            return;
        }
        *self.views.answered.lock() = self.shared.clock.now();
        let before = self.views.now();
        if members == before.members {
            return;
        }
        let view = self.maker.view(members, Some(&before));
        let listed =
            |some: &[&SocketAddr]| some.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let added: Vec<_> = view.live.keys().filter(|address| !before.live.contains_key(address)).collect();
        let removed: Vec<_> = before.live.keys().filter(|address| !view.live.contains_key(address)).collect();
        let (name, count) = (&self.name, view.members.len());
        let (added, removed) = (listed(&added), listed(&removed));
        log::info!("backends changed upstream={name} added={added} removed={removed} backends={count}");
        self.views.publish(view);
        drop(reign);
        // What is known of those that stay is right already.
        self.adopt(|address| !before.live.contains_key(address));
        self.catalog.keep(|address| self.views.now().live.contains_key(address));
        self.maker.round.hurry();
    }

    fn view(&self) -> Arc<View> {
        self.views.now()
    }

    /// How long ago its source of backends gave a good answer, or was asked for the first time; `None` without one.
    pub fn answer_age(&self) -> Option<Duration> {
        let answered = *self.views.answered.lock();
        self.discovery.as_ref().map(|_| self.shared.clock.now().since(answered))
    }

    /// Who says which backends there are.
    pub fn source(&self) -> Option<Arc<dyn Source>> {
        self.discovery.as_ref().map(|(source, _)| source.clone())
    }

    /// Polls the backends until `shutdown`, and keeps them as their source says.
    pub async fn run(&self, shutdown: ShutdownWatch) {
        let discover = async {
            if let Some((source, metrics)) = &self.discovery {
                discovery::run(self, source.as_ref(), metrics).await;
            }
        };
        futures::join!(discover, poller::run(self, shutdown));
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
        loop {
            let view = self.view();
            let chosen = view.balancing.select_with(key.as_bytes(), view.live.len(), accept);
            if let Some(mut charge) = chosen.as_ref().and_then(selector::charge_of) {
                // It may leave before the request gets there, and is chosen all the same.
                charge.live = view.live.get(&charge.address).cloned();
                self.shared.metrics.chose(charge.reason);
                return Some(charge);
            }
            // Nobody, or only nobody of a view that has been replaced meanwhile.
            if Arc::ptr_eq(&view, &self.view()) {
                return None;
            }
        }
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

    /// Takes the probes' verdicts on those backends of `view` for what they are now.
    fn adopt(&self, view: &View, concerns: impl Fn(&SocketAddr) -> bool) {
        let backends = view.balancing.backends();
        for backend in backends.get_backend().iter() {
            let Some(address) = backend.addr.as_inet().filter(|address| concerns(address)) else { continue };
            let healthy = backends.ready(backend);
            self.balancer.lock().observe_health(address, healthy, self.clock.now());
        }
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

#[cfg(test)]
mod tests;
