//! Which backends an upstream has at this moment, changed as a whole.
//!
//! A [`View`] does not change: another set of backends is another view. Two may put one in the place of another, a
//! reload and a discovery, and they take turns:
//!
//! * Whoever does holds [`Views::reign`] from its look at the view before until the next one stands.
//! * A reload begins a new reign. What the discovery of an earlier one still finds comes too late and is dropped, so no
//!   view is ever made by the rules of a configuration that is gone.
//! * The balancer learns of its members while nobody can look at the view ([`Views::publish`]). A request that still
//!   holds the view before, and finds nobody there, looks again and sees the new one.
//!
//! What is known of a backend is not here: it belongs to its address, in the balancer and in its [`Live`].

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use parking_lot::Mutex;
use pingora_load_balancing::discovery::Static;
use pingora_load_balancing::{Backend, Backends, LoadBalancer};
use tokio::sync::watch;

use super::Shared;
use super::connections::Connections;
use super::probe::Round;
use super::selector::Selector;
use crate::balance::pulse::Pulse;
use crate::clock::Time;
use crate::observe::metrics::{BackendMetrics, Metrics};

/// A backend, as configured or discovered, and resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its weight, at least 1.
    pub weight: u32,
    /// The host it was named by: a name or an address.
    pub host: String,
}

/// The host of a backend of Pingora's.
#[derive(Clone)]
struct Host(String);

impl Member {
    /// The same for Pingora.
    pub(super) fn backend(&self) -> Backend {
        let mut ext = http::Extensions::new();
        ext.insert(Host(self.host.clone()));
        let addr = pingora::protocols::l4::socket::SocketAddr::Inet(self.address);
        Backend { addr, weight: self.weight as usize, ext }
    }

    /// A backend of Pingora's; `None` if it is behind a Unix socket.
    pub(super) fn of(backend: &Backend) -> Option<Self> {
        let address = *backend.addr.as_inet()?;
        let host = backend.ext.get::<Host>().map_or_else(|| address.ip().to_string(), |host| host.0.clone());
        Some(Self { address, weight: u32::try_from(backend.weight).unwrap_or(u32::MAX).max(1), host })
    }
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
    pub(super) fn silence(&self, now: Time) -> Option<Duration> {
        self.last_heard().map(|last| now.since(last))
    }

    /// When the backend last sent a byte; `None` if it never did.
    pub(super) fn last_heard(&self) -> Option<Time> {
        self.pulse.last()
    }
}

/// The backends of an upstream.
pub(super) struct View {
    pub(super) balancing: LoadBalancer<Selector>,
    pub(super) live: HashMap<SocketAddr, Arc<Live>>,
    /// In the order of their addresses, each of them once.
    pub(super) members: Vec<Member>,
}

/// How one configuration of an upstream makes its views.
pub(super) struct Maker {
    /// The name of every backend in TLS, if they share one.
    pub(super) server_name: Option<String>,
    pub(super) shared: Arc<Shared>,
    pub(super) metrics: Arc<Metrics>,
    /// Where its backends are probed.
    pub(super) round: Round,
}

impl Maker {
    /// A view of `members`, in which nothing can be selected before it is published. A backend that was there `before`,
    /// under the same name, is the same.
    pub(super) fn view(&self, mut members: Vec<Member>, before: Option<&View>) -> View {
        members.sort_by_key(|member| member.address);
        members.dedup_by_key(|member| member.address);
        let live = members.iter().map(|member| (member.address, self.live(member, before))).collect();
        let set: BTreeSet<Backend> = members.iter().map(Member::backend).collect();
        let backends = Backends::new_with_health_registry(Static::new(set), self.round.registry.clone());
        let balancing = LoadBalancer::from_backends_with_config(backends, Some(self.shared.clone()));
        View { balancing, live, members }
    }

    fn live(&self, member: &Member, before: Option<&View>) -> Arc<Live> {
        let address = member.address;
        let server_name = self.server_name.as_ref().unwrap_or(&member.host);
        let known = before.and_then(|before| before.live.get(&address));
        if let Some(same) = known.filter(|known| known.server_name == *server_name) {
            return same.clone();
        }
        let label = address.to_string();
        Arc::new(Live {
            address,
            server_name: server_name.clone(),
            metrics: self.metrics.backend(&self.shared.name, &label),
            label,
            connections: known.map_or_else(Arc::default, |known| known.connections.clone()),
            pulse: self.shared.balancer.lock().pulse(address),
        })
    }
}

/// The view of an upstream as it is now, the same under every configuration of it: a request that waits, or is tried
/// again, goes to backends that are there.
pub(super) struct Views {
    now: watch::Sender<Arc<View>>,
    /// Whose turn it is to change the view: the number of the present configuration.
    pub(super) reign: Mutex<u64>,
    /// When the source of the backends last gave a good answer, or when it was first asked.
    pub(super) answered: Mutex<Time>,
}

impl Views {
    /// Begins with `view`.
    pub(super) fn begin(view: View, now: Time) -> Arc<Self> {
        let views =
            Self { now: watch::Sender::new(Arc::new(view)), reign: Mutex::new(0), answered: Mutex::new(now) };
        views.now.send_modify(|view| fill(view));
        Arc::new(views)
    }

    /// The view at this moment.
    pub(super) fn now(&self) -> Arc<View> {
        self.now.borrow().clone()
    }

    /// Hears of every change.
    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<View>> {
        self.now.subscribe()
    }

    /// Puts `view` in the place of the one that there is. Nobody sees either while the balancer learns of its members.
    pub(super) fn publish(&self, view: View) {
        let view = Arc::new(view);
        self.now.send_modify(|now| {
            fill(&view);
            *now = view.clone();
        });
    }
}

/// Tells Pingora of the backends of `view`, which builds a selector, which tells the balancer of its members. A static
/// set is there at once.
fn fill(view: &View) {
    if let Some(Err(e)) = view.balancing.update().now_or_never() {
        log::error!("view without backends error={e}");
    }
}
