//! The state of one upstream and every decision about it.
//!
//! [`Balancer`] is the heart of the product, without I/O, clock or global randomness: it knows the backends,
//! what each owes ([`ledger`]), what each has probably cached ([`index`]), who is down, ejected or cooling
//! ([`ejection`]), and asks the [`crate::policy`] for the rest. The proxy and the simulator drive the same
//! object.
//!
//! ```text
//! pick ──> Pick { charge, reason }   rank and charge in one step: no two requests see the same idle backend
//! answer(&mut charge)                first content byte: the prefill is done
//! succeed / fail / cool              what the attempt says of the backend
//! settle(charge)                     the end, exactly once
//! ```

pub mod ejection;
pub mod index;
pub mod ledger;
pub mod retry;
pub mod share;

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::time::Duration;

use crate::clock::Time;
use crate::engine::Reading;
use crate::policy::{Candidate, Member, Policy, Reason, Request, Slot};
use ejection::Record;
use index::PrefixIndex;
use ledger::{Account, Charge, Ledger};
use retry::Fault;
use share::Share;

/// What an upstream's configuration says to its balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// When to eject.
    pub ejection: ejection::Rule,
    /// Requests in flight that a backend may have; `None` is no limit.
    pub max_requests: Option<u32>,
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
}

/// Which backends are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Those that are up, not ejected and not cooling down.
    Available,
    /// All of them: the last resort.
    Any,
}

/// One backend, as an observer sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct State {
    /// Its address.
    pub address: SocketAddr,
    /// Configured weight.
    pub weight: u32,
    /// The verdict of the probes.
    pub healthy: bool,
    /// Ejected for its faults.
    pub ejected: bool,
    /// Asked to be left alone.
    pub cooling: bool,
    /// What it owes.
    pub account: Account,
    /// Part of the requests of the last ten seconds, 0 to 1.
    pub share: f64,
    /// Blocks of prefixes remembered for it.
    pub prefix_blocks: usize,
    /// Its engine's last readings and their age, if it was ever polled.
    pub reading: Option<(Reading, Duration)>,
}

/// A backend's part of the balancer beside its account.
#[derive(Debug, Default)]
struct Backend {
    healthy: bool,
    record: Record,
    reading: Option<(Reading, Time)>,
}

/// The balancer of one upstream.
pub struct Balancer {
    settings: Settings,
    policy: Box<dyn Policy>,
    members: Vec<Member>,
    ledger: Ledger,
    index: PrefixIndex,
    /// By slot, like the accounts.
    backends: Vec<Backend>,
    share: Share,
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
            ledger: Ledger::default(),
            index: PrefixIndex::default(),
            backends: Vec::new(),
            share: Share::default(),
            rng: fastrand::Rng::with_seed(seed),
            matched: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// Sets which backends there are, with their weights. Those known before keep their state; new ones start
    /// healthy.
    pub fn set_members(&mut self, members: impl IntoIterator<Item = (SocketAddr, u32)>) {
        self.members.clear();
        for (address, weight) in members {
            let slot = self.ledger.open(address);
            while self.backends.len() <= slot.0 as usize {
                self.backends.push(Backend { healthy: true, ..Backend::default() });
            }
            self.members.push(Member { slot, address, weight });
        }
        self.policy.rebuild(&self.members);
    }

    /// Chooses a backend for `request` that is not in `tried`, and charges it.
    ///
    /// Backends that are down, ejected or cooling are left out while others remain; when nothing else is left
    /// they are tried before the request is refused. A full backend is never picked.
    pub fn pick(&mut self, request: &Request<'_>, tried: &[Slot], now: Time) -> Result<Pick, NoPick> {
        self.matched.clear();
        if self.policy.uses_prefix_index() {
            self.index.matched(request.blocks, &mut self.matched);
        }
        let tier = self.tier(tried, now)?;
        self.gather(request, tried, tier, now);
        let choice = self.policy.choose(request, &self.candidates, &mut self.rng);
        let chosen = self.candidates[choice.index];
        if self.policy.uses_prefix_index() {
            self.index.insert(chosen.slot.0 as usize, request.blocks);
        }
        self.share.count(chosen.slot, now);
        let address = self.members.iter().find(|m| m.slot == chosen.slot).map(|m| m.address);
        Ok(Pick {
            address: address.ok_or(NoPick::Exhausted)?,
            charge: self.ledger.charge(chosen.slot, request.prompt_tokens, chosen.uncached_tokens),
            reason: if tier == Tier::Any { Reason::LastResort } else { choice.reason },
            matched_tokens: request.prompt_tokens.saturating_sub(chosen.uncached_tokens),
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

    /// The backend failed; true if that ejected it. `elsewhere` says that another backend answered the same
    /// request.
    #[must_use]
    pub fn fail(&mut self, slot: Slot, fault: Fault, elsewhere: bool, now: Time) -> bool {
        let rule = self.settings.ejection;
        let index = slot.0 as usize;
        let ejected = |b: &&Member| self.backends[b.slot.0 as usize].record.ejected(now);
        let full = self.members.iter().filter(ejected).count() >= ejection::limit(self.members.len(), fault);
        let record = &mut self.backends[index].record;
        if !record.fail(rule, fault, elsewhere, now) || full {
            return false;
        }
        record.eject(rule, now);
        true
    }

    /// The backend said it is full: prefer others for `span`.
    pub fn cool(&mut self, slot: Slot, span: Duration, now: Time) {
        self.backends[slot.0 as usize].record.cool(now, span);
    }

    /// The probes' verdict on the backend at `address` has changed. One that went down has lost its cache, as
    /// far as we know.
    pub fn observe_health(&mut self, address: &SocketAddr, healthy: bool) {
        let Some(slot) = self.ledger.slot(address) else { return };
        self.backends[slot.0 as usize].healthy = healthy;
        if !healthy {
            self.index.clear(slot.0 as usize);
        }
    }

    /// New readings of the engine at `address`. A restart clears what we think it has cached; its cache size
    /// bounds that.
    pub fn observe_reading(&mut self, address: &SocketAddr, reading: Reading, block_tokens: f64, now: Time) {
        let Some(slot) = self.ledger.slot(address) else { return };
        // An answer without a single metric is none of the engine's.
        if reading == Reading::default() {
            return;
        }
        let index = slot.0 as usize;
        let before = self.backends[index].reading.replace((reading, now));
        let started = before.and_then(|(before, _)| before.process_start);
        if let (Some(before), Some(after)) = (started, reading.process_start)
            && before != after
        {
            self.index.clear(index);
        }
        let capacity =
            reading.kv_capacity_tokens.and_then(|t| NonZeroUsize::new((t as f64 / block_tokens) as usize));
        if let Some(blocks) = capacity {
            self.index.resize(index, blocks);
        }
    }

    /// Among whom [`Balancer::pick`] would choose: those in rotation if any of them is untried, else whoever is
    /// left; but no one who is full.
    pub fn tier(&self, tried: &[Slot], now: Time) -> Result<Tier, NoPick> {
        let untried = || self.members.iter().filter(|m| !tried.contains(&m.slot));
        let tier = if untried().any(|m| self.admits(Tier::Available, m.slot, now)) {
            Tier::Available
        } else {
            Tier::Any
        };
        let mut asked = untried().filter(|m| self.admits(tier, m.slot, now)).peekable();
        if asked.peek().is_none() {
            return Err(NoPick::Exhausted);
        }
        if asked.any(|m| self.has_room(m.slot)) { Ok(tier) } else { Err(NoPick::Full) }
    }

    /// Whether any backend is up and in rotation.
    pub fn any_available(&self, now: Time) -> bool {
        self.members.iter().any(|m| self.backends[m.slot.0 as usize].available(now))
    }

    /// Every backend as it stands.
    pub fn states(&mut self, now: Time) -> Vec<State> {
        let mut states = Vec::with_capacity(self.members.len());
        let requests = f64::from(self.share.total(now).max(1));
        for member in &self.members {
            let backend = &self.backends[member.slot.0 as usize];
            states.push(State {
                address: member.address,
                weight: member.weight,
                healthy: backend.healthy,
                ejected: backend.record.ejected(now),
                cooling: backend.record.cooling(now),
                account: *self.ledger.account(member.slot),
                share: f64::from(self.share.of(member.slot)) / requests,
                prefix_blocks: self.index.held(member.slot.0 as usize),
                reading: backend.reading.map(|(reading, at)| (reading, now.since(at))),
            });
        }
        states
    }

    fn admits(&self, tier: Tier, slot: Slot, now: Time) -> bool {
        tier == Tier::Any || self.backends[slot.0 as usize].available(now)
    }

    fn has_room(&self, slot: Slot) -> bool {
        self.settings.max_requests.is_none_or(|max| self.ledger.account(slot).active_requests < max)
    }

    /// Fills `candidates` with the untried members of the tier that have room.
    fn gather(&mut self, request: &Request<'_>, tried: &[Slot], tier: Tier, now: Time) {
        self.candidates.clear();
        for member in &self.members {
            let slot = member.slot;
            if tried.contains(&slot) || !self.admits(tier, slot, now) || !self.has_room(slot) {
                continue;
            }
            let account = self.ledger.account(slot);
            let matched = self.matched.get(slot.0 as usize).map_or(0.0, |blocks| f64::from(*blocks));
            let matched_tokens = (matched * request.block_tokens) as u64;
            self.candidates.push(Candidate {
                slot,
                weight: f64::from(member.weight),
                pending_tokens: account.pending_tokens,
                active_requests: account.active_requests,
                unanswered_requests: account.unanswered_requests,
                context_tokens: account.context_tokens,
                uncached_tokens: request.prompt_tokens.saturating_sub(matched_tokens).max(1),
            });
        }
    }
}

impl Backend {
    fn available(&self, now: Time) -> bool {
        self.healthy && !self.record.ejected(now) && !self.record.cooling(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::PolicyConfig;

    const SETTINGS: Settings = Settings {
        ejection: ejection::Rule { max_fails: 3, fail_timeout: Duration::from_secs(30) },
        max_requests: None,
    };

    fn address(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, n], 8000))
    }

    fn balancer(backends: u8, settings: Settings) -> Balancer {
        let mut balancer = Balancer::new(settings, PolicyConfig::default().build(), 1);
        balancer.set_members((0..backends).map(|n| (address(n), 1)));
        balancer
    }

    fn request(blocks: &[u64]) -> Request<'_> {
        Request { prompt_tokens: 1_000, blocks, block_tokens: 128.0, session: None }
    }

    fn slot(balancer: &Balancer, n: u8) -> Slot {
        balancer.ledger.slot(&address(n)).unwrap()
    }

    #[test]
    fn a_shared_prefix_lands_where_it_was_computed() {
        let mut b = balancer(4, SETTINGS);
        let blocks: Vec<u64> = (1..=7).collect();
        let first = b.pick(&request(&blocks), &[], Time::ZERO).unwrap();
        assert_eq!((first.matched_tokens, first.charge.uncached_tokens()), (0, 1_000));
        b.settle(first.charge);
        let second = b.pick(&request(&blocks), &[], Time::ZERO).unwrap();
        assert_eq!(
            (second.address, second.reason, second.matched_tokens),
            (first.address, Reason::Cache, 896)
        );
        b.settle(second.charge);
        b.observe_health(&first.address, false);
        b.observe_health(&first.address, true);
        let third = b.pick(&request(&blocks), &[], Time::ZERO).unwrap();
        assert_eq!(third.matched_tokens, 0, "a backend that was down has lost its cache");
        b.settle(third.charge);
    }

    #[test]
    fn a_burst_is_spread_because_each_pick_is_charged_at_once() {
        let mut b = balancer(4, SETTINGS);
        let picks: Vec<_> = (0..8).map(|_| b.pick(&request(&[]), &[], Time::ZERO).unwrap()).collect();
        for n in 0..4 {
            assert_eq!(picks.iter().filter(|p| p.address == address(n)).count(), 2);
        }
        for pick in picks {
            b.settle(pick.charge);
        }
    }

    #[test]
    fn tried_down_ejected_and_cooling_backends_are_left_out_until_nothing_else_remains() {
        let now = Time::ZERO + Duration::from_secs(1);
        let mut b = balancer(4, SETTINGS);
        b.observe_health(&address(0), false);
        let ejected = slot(&b, 1);
        assert!((0..3).any(|_| b.fail(ejected, Fault::Certain, false, now)));
        let cooling = slot(&b, 2);
        b.cool(cooling, Duration::from_secs(5), now);
        for _ in 0..20 {
            let pick = b.pick(&request(&[]), &[], now).unwrap();
            assert_eq!((pick.address, pick.reason), (address(3), Reason::Only));
            b.settle(pick.charge);
        }
        let mut tried = vec![slot(&b, 3)];
        for _ in 0..3 {
            let pick = b.pick(&request(&[]), &tried, now).unwrap();
            assert_eq!(pick.reason, Reason::LastResort);
            assert!(!tried.contains(&pick.charge.slot()));
            tried.push(pick.charge.slot());
            b.settle(pick.charge);
        }
        assert_eq!(b.pick(&request(&[]), &tried, now).unwrap_err(), NoPick::Exhausted);
    }

    #[test]
    fn a_full_fleet_says_so_and_takes_requests_again_after_a_settlement() {
        let mut b = balancer(2, Settings { max_requests: Some(1), ..SETTINGS });
        assert_eq!(b.tier(&[], Time::ZERO), Ok(Tier::Available));
        let one = b.pick(&request(&[]), &[], Time::ZERO).unwrap();
        let two = b.pick(&request(&[]), &[], Time::ZERO).unwrap();
        assert_eq!(b.pick(&request(&[]), &[], Time::ZERO).unwrap_err(), NoPick::Full);
        assert_eq!(b.tier(&[], Time::ZERO), Err(NoPick::Full));
        b.observe_health(&one.address, false);
        assert_eq!(
            b.pick(&request(&[]), &[], Time::ZERO).unwrap_err(),
            NoPick::Full,
            "one is full, one is down"
        );
        b.observe_health(&one.address, true);
        b.settle(one.charge);
        let three = b.pick(&request(&[]), &[], Time::ZERO).unwrap();
        assert_eq!(three.address, one.address);
        b.settle(two.charge);
        b.settle(three.charge);
    }

    #[test]
    fn suspected_faults_never_eject_more_than_the_limit() {
        let mut b = balancer(8, SETTINGS);
        let mut ejected = 0;
        for n in 0..8 {
            let slot = slot(&b, n);
            ejected += (0..10).filter(|_| b.fail(slot, Fault::Suspect, true, Time::ZERO)).count();
        }
        assert_eq!(ejected, 2);
    }

    #[test]
    fn a_restart_of_the_engine_clears_its_prefixes_and_its_cache_size_bounds_them() {
        let mut b = balancer(1, SETTINGS);
        let blocks: Vec<u64> = (1..=50).collect();
        let reading =
            Reading { process_start: Some(1.0), kv_capacity_tokens: Some(1_280), ..Reading::default() };
        b.observe_reading(&address(0), reading, 128.0, Time::ZERO);
        let pick = b.pick(&request(&blocks), &[], Time::ZERO).unwrap();
        b.settle(pick.charge);
        assert_eq!(b.states(Time::ZERO)[0].prefix_blocks, 10);
        for silent in [Reading::default(), Reading { process_start: None, ..reading }, reading] {
            b.observe_reading(&address(0), silent, 128.0, Time::ZERO);
            assert_eq!(b.states(Time::ZERO)[0].prefix_blocks, 10, "{silent:?} is no restart");
        }
        b.observe_reading(&address(0), Reading { process_start: Some(2.0), ..reading }, 128.0, Time::ZERO);
        assert_eq!(b.states(Time::ZERO)[0].prefix_blocks, 0);
    }

    #[test]
    fn counters_survive_a_change_of_members_and_weights() {
        let mut b = balancer(2, SETTINGS);
        let pick = b.pick(&request(&[]), &[], Time::ZERO).unwrap();
        b.set_members([(address(5), 1)]);
        b.set_members([(pick.address, 7), (address(5), 1)]);
        let states = b.states(Time::ZERO);
        assert_eq!((states[0].weight, states[0].account.active_requests), (7, 1));
        b.settle(pick.charge);
        assert!(b.states(Time::ZERO).iter().all(|s| s.account == Account::default()));
    }
}
