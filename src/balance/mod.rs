//! The state of one upstream and every decision about it.
//!
//! [`Balancer`] is the heart of the product, without I/O, clock or global randomness: it knows the backends, what each
//! owes ([`ledger`]), what each has probably cached ([`index`]), who is down, ejected or cooling ([`ejection`]), and asks the
//! [`crate::policy`] for the rest. The proxy and the simulator drive the same object.
//!
//! ```text
//! pick ──> Pick { charge, reason }        rank and charge in one step, so that no two requests see the same idle backend
//! answer(&mut charge)                     first content byte: the prefill is done
//! succeed / fail / cool                   what the attempt says of the backend
//! settle(charge)                          the end, exactly once
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

    /// Sets which backends there are, with their weights. Those known before keep their state; new ones start healthy.
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
    /// Backends that are down, ejected or cooling are left out while others remain; when nothing else is left they are tried
    /// before the request is refused. A full backend is never picked.
    pub fn pick(&mut self, request: &Request<'_>, tried: &[Slot], now: Time) -> Result<Pick, NoPick> {
        self.matched.clear();
        if self.policy.uses_prefix_index() {
            self.index.matched(request.blocks, &mut self.matched);
        }
        let mut last_resort = false;
        let mut full = self.gather(request, tried, |b| b.available(now));
        if self.candidates.is_empty() && !full {
            last_resort = true;
            full = self.gather(request, tried, |_| true);
        }
        if self.candidates.is_empty() {
            return Err(if full { NoPick::Full } else { NoPick::Exhausted });
        }
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
            reason: if last_resort { Reason::LastResort } else { choice.reason },
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

    /// The backend failed; true if that ejected it. `elsewhere` says that another backend answered the same request.
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

    /// The probes' verdict on the backend at `address` has changed. One that went down has lost its cache, as far as we know.
    pub fn observe_health(&mut self, address: &SocketAddr, healthy: bool) {
        let Some(slot) = self.ledger.slot(address) else { return };
        self.backends[slot.0 as usize].healthy = healthy;
        if !healthy {
            self.index.clear(slot.0 as usize);
        }
    }

    /// New readings of the engine at `address`. A restart clears what we think it has cached; its cache size bounds that.
    pub fn observe_reading(&mut self, address: &SocketAddr, reading: Reading, block_tokens: f64, now: Time) {
        let Some(slot) = self.ledger.slot(address) else { return };
        let index = slot.0 as usize;
        let before = self.backends[index].reading.replace((reading, now)).map(|(reading, _)| reading);
        if before.is_some_and(|b| b.process_start.is_some() && b.process_start != reading.process_start) {
            self.index.clear(index);
        }
        let capacity =
            reading.kv_capacity_tokens.and_then(|t| NonZeroUsize::new((t as f64 / block_tokens) as usize));
        if let Some(blocks) = capacity {
            self.index.resize(index, blocks);
        }
    }

    /// Whether a backend not in `tried` has room, or would have if it were not down.
    pub fn has_room(&self, tried: &[Slot]) -> bool {
        let room = |slot| {
            self.settings.max_requests.is_none_or(|max| self.ledger.account(slot).active_requests < max)
        };
        self.members.iter().any(|m| !tried.contains(&m.slot) && room(m.slot))
    }

    /// Whether any backend is up and in rotation.
    pub fn any_available(&self, now: Time) -> bool {
        self.members.iter().any(|m| self.backends[m.slot.0 as usize].available(now))
    }

    /// Every backend as it stands.
    pub fn states(&mut self, now: Time) -> Vec<State> {
        let mut states = Vec::with_capacity(self.members.len());
        for member in &self.members {
            let backend = &self.backends[member.slot.0 as usize];
            states.push(State {
                address: member.address,
                weight: member.weight,
                healthy: backend.healthy,
                ejected: backend.record.ejected(now),
                cooling: backend.record.cooling(now),
                account: *self.ledger.account(member.slot),
                share: self.share.of(member.slot, now),
                prefix_blocks: self.index.held(member.slot.0 as usize),
                reading: backend.reading.map(|(reading, at)| (reading, now.since(at))),
            });
        }
        states
    }

    /// Fills `candidates` with the untried members that `admit` lets pass and that have room; true if one had no room.
    fn gather(&mut self, request: &Request<'_>, tried: &[Slot], admit: impl Fn(&Backend) -> bool) -> bool {
        self.candidates.clear();
        let mut full = false;
        for member in &self.members {
            let index = member.slot.0 as usize;
            if tried.contains(&member.slot) || !admit(&self.backends[index]) {
                continue;
            }
            let account = self.ledger.account(member.slot);
            if self.settings.max_requests.is_some_and(|max| account.active_requests >= max) {
                full = true;
                continue;
            }
            let matched =
                self.matched.get(index).map_or(0.0, |blocks| f64::from(*blocks)) * request.block_tokens;
            self.candidates.push(Candidate {
                slot: member.slot,
                weight: f64::from(member.weight),
                pending_tokens: account.pending_tokens,
                active_requests: account.active_requests,
                unanswered_requests: account.unanswered_requests,
                context_tokens: account.context_tokens,
                uncached_tokens: request.prompt_tokens.saturating_sub(matched as u64).max(1),
            });
        }
        full
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
        let one = b.pick(&request(&[]), &[], Time::ZERO).unwrap();
        let two = b.pick(&request(&[]), &[], Time::ZERO).unwrap();
        assert_eq!(b.pick(&request(&[]), &[], Time::ZERO).unwrap_err(), NoPick::Full);
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
