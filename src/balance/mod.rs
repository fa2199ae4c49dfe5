//! The state of one upstream and every decision about it.
//!
//! [`Balancer`] is the heart of the product, without I/O, clock or global randomness: it knows the backends,
//! what each owes ([`ledger`]), what each has probably cached ([`index`]), what its engine last said
//! ([`gauge`]), who is down, ejected or cooling ([`ejection`]), and asks the [`crate::policy`] for the rest.
//! The proxy and the simulator drive the same object.
//!
//! ```text
//! pick ──> Pick { charge, reason }   rank and charge in one step: no two requests see the same idle backend
//! answer(&mut charge)                first content byte: the prefill is done
//! succeed / fail / cool              what the attempt says of the backend
//! settle(charge)                     the end, exactly once
//! ```

mod decide;
pub mod drain;
pub mod ejection;
pub mod gauge;
pub mod index;
pub mod ledger;
pub mod pulse;
pub mod retry;
pub mod share;
pub mod slow_start;
pub mod state;

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Time;
use crate::engine::Reading;
use crate::policy::{Candidate, Member, Policy, Reason, Request, Slot};
use decide::Decision;
pub use decide::{Explained, Weighed};
use ejection::Record;
use gauge::Gauge;
use index::PrefixIndex;
use ledger::{Account, Charge, Ledger};
use pulse::Pulse;
use retry::Failure;
use share::Share;
pub use state::{Standing, State};

/// What an upstream's configuration says to its balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// When to eject.
    pub ejection: ejection::Rule,
    /// Requests in flight that a backend may have; `None` is no limit.
    pub max_requests: Option<u32>,
    /// How long a backend that joins or returns takes to reach its weight.
    pub slow_start: Duration,
    /// Silence after which a backend with requests in flight is stalled; zero switches that off.
    pub stall_timeout: Duration,
}

/// Where a request goes.
#[derive(Debug)]
pub struct Pick {
    /// The backend's address.
    pub address: SocketAddr,
    /// What was charged to it.
    pub charge: Charge,
    /// Why it was chosen.
    pub reason: Reason,
    /// Prompt tokens that it has probably cached.
    pub matched_tokens: u64,
}

/// Why nothing was picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPick {
    /// Every backend that could serve has `max_requests` in flight: wait.
    Full,
    /// Every backend has been tried, or there is none.
    Exhausted,
    /// Every backend is being drained.
    Drained,
}

/// Which backends are asked, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Those that are up, and neither ejected, on trial, cooling down nor stalled.
    Available,
    /// Those that are up and not ejected: they live, but had rather be left alone.
    Reluctant,
    /// All of them but those that are being drained: the last resort.
    Any,
}

/// Blocks remembered for one backend whatever its engine says of its cache: 134 million tokens.
const INDEX_LIMIT: NonZeroUsize = NonZeroUsize::MIN.saturating_add((1 << 20) - 1);

/// Weight of one request in the mean of uncached tokens.
const MEAN_WEIGHT: f64 = 0.05;

/// One of at least so many backends is crowded if it had more than this share of the last ten seconds' requests
/// and has so many in flight, while another has less than half as many (research/routing.md s.7.2). Below that
/// a single client's session looks the same, and should stay where it is.
const CROWD_MEMBERS: usize = 3;
const CROWD_SHARE: f64 = 0.8;
const CROWD_REQUESTS: u64 = 8;

/// A backend's part of the balancer beside its account.
#[derive(Debug)]
struct Backend {
    address: SocketAddr,
    healthy: bool,
    record: Record,
    gauge: Option<Gauge>,
    /// When its engine's process started, as far as it ever said.
    started: Option<f64>,
    /// When it joined or came back up, if it was not there from the start.
    since: Option<Time>,
    pulse: Arc<Pulse>,
    /// When it last got a request while it had none.
    busy_since: Time,
    /// What the process before us still has in flight on it.
    elsewhere: Account,
    /// What was wrong at the last probe, for who asks, and when the probes' verdict last changed.
    probe_failure: Option<String>,
    judged_at: Option<Time>,
    /// Since when it gets no new request, because somebody asked for that.
    draining: Option<Time>,
    /// The weight that was set in the place of the configured one, and the latter.
    reweighed: Option<drain::Reweighed>,
}

/// The balancer of one upstream.
pub struct Balancer {
    settings: Settings,
    policy: Box<dyn Policy>,
    members: Vec<Member>,
    /// The largest weight of a member.
    heaviest: u32,
    ledger: Ledger,
    index: PrefixIndex,
    /// By slot, like the accounts.
    backends: Vec<Backend>,
    share: Share,
    /// Uncached tokens of a request of ours, on average: what one of somebody else's is taken to cost.
    mean_uncached_tokens: Option<f64>,
    rng: fastrand::Rng,
    // Scratch space of `pick`, kept to spare the allocations.
    matched: Vec<u32>,
    candidates: Vec<Candidate>,
}

impl Balancer {
    /// A balancer without backends. The same `seed` and the same calls give the same picks.
    pub fn new(settings: Settings, policy: Box<dyn Policy>, seed: u64) -> Self {
        Self {
            settings,
            policy,
            members: Vec::new(),
            heaviest: 1,
            ledger: Ledger::default(),
            index: PrefixIndex::default(),
            backends: Vec::new(),
            share: Share::default(),
            mean_uncached_tokens: None,
            rng: fastrand::Rng::with_seed(seed),
            matched: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// Changes the rules: from now on it goes by `settings` and, if there is one, a new `policy`. What is known of the
    /// backends, and what they owe, stays.
    pub fn configure(&mut self, settings: Settings, policy: Option<Box<dyn Policy>>) {
        self.settings = settings;
        if let Some(policy) = policy {
            self.policy = policy;
            self.policy.rebuild(&self.members);
        }
    }

    /// Sets which backends there are, with their weights. Those known before keep their state; new ones start
    /// healthy, and slowly if they join others.
    pub fn set_members(&mut self, members: impl IntoIterator<Item = (SocketAddr, u32)>, now: Time) {
        let before = std::mem::take(&mut self.members);
        for (address, weight) in members {
            let slot = self.open(address);
            if !before.is_empty() && before.iter().all(|member| member.slot != slot) {
                self.backends[slot.0 as usize].since = Some(now);
            }
            let weight = self.backends[slot.0 as usize].weigh(weight);
            self.members.push(Member { slot, address, weight });
        }
        // Its account stays, for what is in flight; what it had cached does not come back with it.
        for gone in before.iter().filter(|old| self.members.iter().all(|m| m.slot != old.slot)) {
            self.index.clear(gone.slot.0 as usize);
            let backend = &mut self.backends[gone.slot.0 as usize];
            (backend.gauge, backend.draining, backend.reweighed) = (None, None, None);
            backend.elsewhere = Account::default();
        }
        self.weights_changed();
    }

    fn weights_changed(&mut self) {
        self.heaviest = self.members.iter().map(|m| m.weight).max().unwrap_or(1).max(1);
        self.policy.rebuild(&self.members);
    }

    /// Chooses a backend for `request` that is not in `tried`, and charges it.
    ///
    /// Backends that are not available are left out while others remain; when nothing else is left
    /// they are tried before the request is refused. A full backend is never picked.
    pub fn pick(&mut self, request: &Request<'_>, tried: &[Slot], now: Time) -> Result<Pick, NoPick> {
        let Decision { slot, choice, reason, rng } = self.decide(request, tried, now)?;
        self.rng = rng;
        self.policy.note(request, &self.candidates, choice);
        if self.policy.uses_prefix_index() {
            self.index.insert(slot.0 as usize, request.blocks);
        }
        self.share.count(slot, now);
        let uncached_tokens = self.uncached_tokens(request, slot);
        let backend = &mut self.backends[slot.0 as usize];
        backend.record.choose(self.settings.ejection, now);
        if self.ledger.account(slot).active_requests == 0 {
            backend.busy_since = now;
        }
        let mean = self.mean_uncached_tokens.get_or_insert(uncached_tokens as f64);
        *mean += MEAN_WEIGHT * (uncached_tokens as f64 - *mean);
        Ok(Pick {
            address: backend.address,
            charge: self.ledger.charge(slot, request.prompt_tokens, uncached_tokens),
            reason,
            matched_tokens: request.prompt_tokens.saturating_sub(uncached_tokens),
        })
    }

    /// The first content byte of the request has come.
    pub fn answer(&mut self, charge: &mut Charge) {
        self.ledger.answer(charge);
    }

    /// The request has ended.
    pub fn settle(&mut self, charge: Charge) {
        self.ledger.settle(charge);
    }

    /// The backend gave a good answer.
    pub fn succeed(&mut self, slot: Slot, now: Time) {
        for member in &self.members {
            let record = &mut self.backends[member.slot.0 as usize].record;
            if member.slot == slot { record.succeed(now) } else { record.overtake() }
        }
    }

    /// The backend failed; for how long that ejects it, if it does. `elsewhere` says that another backend
    /// answered the same request.
    #[must_use]
    pub fn fail(&mut self, slot: Slot, failure: Failure, elsewhere: bool, now: Time) -> Option<Duration> {
        let (rule, fault) = (self.settings.ejection, failure.fault());
        // One that is being drained is nobody to fall back on.
        let serving = || self.members.iter().filter(|m| !self.is_draining(m.slot));
        let ejected = serving().filter(|m| self.backends[m.slot.0 as usize].record.ejected(now)).count();
        let full = ejected >= ejection::limit(serving().count(), fault);
        let record = &mut self.backends[slot.0 as usize].record;
        record.remark(failure.name());
        let out = record.fail(rule, fault, elsewhere, now) && !full;
        out.then(|| record.eject(rule, fault, self.rng.f64(), now))
    }

    /// A probe of the backend at `address` has been answered; true if that ends its ejection.
    pub fn reach(&mut self, address: &SocketAddr, now: Time) -> bool {
        let slot = self.ledger.slot(address);
        slot.is_some_and(|slot| self.backends[slot.0 as usize].record.reach(now))
    }

    /// The backend said so that it is full: prefer others for `span`.
    pub fn cool(&mut self, slot: Slot, failure: Failure, span: Duration, now: Time) {
        let record = &mut self.backends[slot.0 as usize].record;
        record.remark(failure.name());
        record.cool(now, span);
    }

    /// What was wrong at the last probe of the backend at `address`, in words for people; `None` for nothing. Not
    /// every such probe changes the verdict: see [`Balancer::observe_health`].
    pub fn observe_probe(&mut self, address: &SocketAddr, failure: Option<String>) {
        if let Some(slot) = self.ledger.slot(address) {
            self.backends[slot.0 as usize].probe_failure = failure;
        }
    }

    /// The probes' verdict on the backend at `address` has changed. One that went down has lost its cache, as
    /// far as we know; one that comes up starts slowly.
    pub fn observe_health(&mut self, address: &SocketAddr, healthy: bool, now: Time) {
        let Some(slot) = self.ledger.slot(address) else { return };
        let backend = &mut self.backends[slot.0 as usize];
        if healthy && !backend.healthy {
            backend.since = Some(now);
        }
        if backend.healthy != healthy {
            backend.judged_at = Some(now);
        }
        backend.healthy = healthy;
        if !healthy {
            self.index.clear(slot.0 as usize);
        }
    }

    /// What the backend at `address` is known to owe at this moment, to us and the process before us: to be read
    /// before its engine is asked for a reading.
    pub fn account(&self, address: &SocketAddr) -> Account {
        self.ledger.slot(address).map_or_else(Account::default, |slot| self.known(slot))
    }

    /// What the process before us, which takes no more requests, still has in flight on the backend at `address`.
    pub fn observe_elsewhere(&mut self, address: &SocketAddr, account: Account) {
        if let Some(slot) = self.ledger.slot(address) {
            self.backends[slot.0 as usize].elsewhere = account;
        }
    }

    /// The prefixes remembered for the backend at `address`, the least recently used first, at most so many blocks.
    pub fn prefixes(&self, address: &SocketAddr, most: usize) -> Vec<Vec<u64>> {
        let slot = self.ledger.slot(address);
        slot.map_or_else(Vec::new, |slot| self.index.chains(slot.0 as usize, most))
    }

    /// Remembers for the backend at `address` what another process did, in the order of [`Balancer::prefixes`].
    pub fn remember(&mut self, address: &SocketAddr, prefixes: &[Vec<u64>]) {
        let Some(slot) = self.ledger.slot(address).filter(|_| self.policy.uses_prefix_index()) else {
            return;
        };
        for blocks in prefixes {
            self.index.insert(slot.0 as usize, blocks);
        }
    }

    /// New readings of the engine at `address`, which owed `before` when it was asked for them. A restart
    /// clears what we think it has cached; its cache size bounds that.
    pub fn observe_reading(
        &mut self,
        address: &SocketAddr,
        reading: Reading,
        before: &Account,
        block_tokens: f64,
        now: Time,
    ) {
        let Some(slot) = self.ledger.slot(address) else { return };
        // An answer without a single metric is none of the engine's.
        if reading == Reading::default() {
            return;
        }
        let index = slot.0 as usize;
        let last = self.backends[index].gauge;
        let gauge = Gauge::new(reading, before, &self.known(slot), now, last.as_ref());
        self.backends[index].gauge = Some(gauge);
        if let Some(started) = reading.process_start {
            let before = self.backends[index].started.replace(started);
            if before.is_some_and(|before| before != started) {
                self.index.clear(index);
                self.backends[index].since = Some(now);
            }
        }
        let capacity =
            reading.kv_capacity_tokens.and_then(|t| NonZeroUsize::new((t as f64 / block_tokens) as usize));
        if let Some(blocks) = capacity {
            self.index.resize(index, blocks.min(INDEX_LIMIT));
        }
    }

    /// Whether the backend at `address` has requests in flight and has sent nothing for `stall_timeout`.
    pub fn stalled(&self, address: &SocketAddr, now: Time) -> bool {
        self.ledger.slot(address).is_some_and(|slot| self.is_stalled(slot, now))
    }

    /// The pulse of the backend at `address`, member or not, to be beaten on every byte it sends.
    pub fn pulse(&mut self, address: SocketAddr) -> Arc<Pulse> {
        let slot = self.open(address);
        self.backends[slot.0 as usize].pulse.clone()
    }

    /// Among whom [`Balancer::pick`] would choose: the best tier with an untried backend; but no one who is
    /// full.
    pub fn tier(&self, tried: &[Slot], now: Time) -> Result<Tier, NoPick> {
        if !self.members.is_empty() && self.members.iter().all(|m| self.is_draining(m.slot)) {
            return Err(NoPick::Drained);
        }
        let untried = || self.members.iter().filter(|m| !tried.contains(&m.slot));
        let tier = [Tier::Available, Tier::Reluctant]
            .into_iter()
            .find(|tier| untried().any(|m| self.admits(*tier, m.slot, now)))
            .unwrap_or(Tier::Any);
        let mut asked = untried().filter(|m| self.admits(tier, m.slot, now)).peekable();
        if asked.peek().is_none() {
            return Err(NoPick::Exhausted);
        }
        if asked.any(|m| self.has_room(m.slot)) { Ok(tier) } else { Err(NoPick::Full) }
    }

    /// Whether any backend is up and not ejected. One that had rather be left alone still serves.
    pub fn any_available(&self, now: Time) -> bool {
        self.members.iter().any(|m| self.admits(Tier::Reluctant, m.slot, now))
    }

    fn open(&mut self, address: SocketAddr) -> Slot {
        let slot = self.ledger.open(address);
        // Slots are given out in order, and only here.
        if slot.0 as usize == self.backends.len() {
            self.backends.push(Backend::new(address));
        }
        slot
    }

    fn admits(&self, tier: Tier, slot: Slot, now: Time) -> bool {
        if self.is_draining(slot) {
            return false;
        }
        match tier {
            Tier::Available => self.is_available(slot, now),
            Tier::Reluctant => self.backends[slot.0 as usize].is_alive(now),
            Tier::Any => true,
        }
    }

    fn is_available(&self, slot: Slot, now: Time) -> bool {
        self.backends[slot.0 as usize].is_in_rotation(now) && !self.is_stalled(slot, now)
    }

    fn is_stalled(&self, slot: Slot, now: Time) -> bool {
        let Settings { stall_timeout, .. } = self.settings;
        if stall_timeout.is_zero() || self.ledger.account(slot).active_requests == 0 {
            return false;
        }
        now.since(self.backends[slot.0 as usize].silent_since()) >= stall_timeout
    }

    fn has_room(&self, slot: Slot) -> bool {
        self.settings.max_requests.is_none_or(|max| self.known(slot).active_requests < max)
    }

    fn candidate(&self, member: &Member, request: &Request<'_>, now: Time) -> Candidate {
        let backend = &self.backends[member.slot.0 as usize];
        let account = self.known(member.slot);
        let others = backend.gauge.map(|gauge| gauge.others(now)).unwrap_or_default();
        let mean = self.mean_uncached_tokens.unwrap_or(0.0);
        let part =
            backend.came_back(now).map_or(1.0, |at| slow_start::part(at, self.settings.slow_start, now));
        Candidate {
            slot: member.slot,
            weight: f64::from(member.weight) / f64::from(self.heaviest) * part,
            pending_tokens: account.pending_tokens + (others.waiting * mean) as u64,
            active_requests: account.active_requests.saturating_add(others.requests.round() as u32),
            unanswered_requests: account.unanswered_requests.saturating_add(others.waiting.round() as u32),
            context_tokens: account.context_tokens + (others.requests * mean) as u64,
            uncached_tokens: self.uncached_tokens(request, member.slot),
        }
    }

    /// What a backend owes us and the process before us.
    fn known(&self, slot: Slot) -> Account {
        self.ledger.account(slot).plus(&self.backends[slot.0 as usize].elsewhere)
    }

    /// u: what of the prompt the backend has not cached; at least 1.
    fn uncached_tokens(&self, request: &Request<'_>, slot: Slot) -> u64 {
        let matched = self.matched.get(slot.0 as usize).map_or(0.0, |blocks| f64::from(*blocks));
        request.prompt_tokens.saturating_sub((matched * request.block_tokens) as u64).max(1)
    }

    /// Whether one backend had nearly all of the traffic lately and is busy, while another, for its weight and
    /// with one request more, would not be half as busy.
    fn is_lopsided(&mut self, now: Time) -> bool {
        let total = self.share.total(now);
        let available = || self.members.iter().filter(|m| self.admits(Tier::Available, m.slot, now));
        let active = |m: &Member| u64::from(self.ledger.account(m.slot).active_requests);
        let crowd = available().find(|m| {
            f64::from(self.share.of(m.slot)) > CROWD_SHARE * f64::from(total) && active(m) >= CROWD_REQUESTS
        });
        let Some(crowd) = crowd else { return false };
        let (requests, weight) = (active(crowd), u64::from(crowd.weight));
        let is_idle = |m: &Member| 2 * (active(m) + 1) * weight < requests * u64::from(m.weight);
        available().count() >= CROWD_MEMBERS && available().any(is_idle)
    }
}

impl Backend {
    fn new(address: SocketAddr) -> Self {
        Self {
            address,
            healthy: true,
            record: Record::default(),
            gauge: None,
            started: None,
            since: None,
            pulse: Arc::default(),
            busy_since: Time::ZERO,
            elsewhere: Account::default(),
            probe_failure: None,
            judged_at: None,
            draining: None,
            reweighed: None,
        }
    }

    /// Since when it has sent nothing, if it has requests.
    fn silent_since(&self) -> Time {
        self.busy_since.max(self.pulse.last().unwrap_or(Time::ZERO))
    }

    fn is_alive(&self, now: Time) -> bool {
        self.healthy && !self.record.ejected(now)
    }

    fn is_in_rotation(&self, now: Time) -> bool {
        self.is_alive(now) && !self.record.on_trial(now) && !self.record.cooling(now)
    }

    fn is_strained(&self, now: Time) -> bool {
        self.gauge.is_some_and(|gauge| gauge.is_strained(now))
    }

    /// When it last came into rotation, if it was not there from the start.
    fn came_back(&self, now: Time) -> Option<Time> {
        self.since.max(self.record.returned(now))
    }
}

#[cfg(test)]
mod schedules;
#[cfg(test)]
mod tests;
