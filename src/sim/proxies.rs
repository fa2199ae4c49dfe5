//! The product in a replay: one production [`Balancer`], or several that do not know of each other.
//!
//! Every call is one that the proxy makes, at the moment at which it makes it: a request is picked and charged
//! on arrival, answered at its first token, settled after its last, and a reading is observed when a scrape
//! comes in. So what a replay says of a policy, it says of the code that production runs. With several proxies
//! each request comes to one of them by lot, and what the others send is seen only in the engines' metrics.
//!
//! The index counts in the trace's blocks and knows the size of the caches, as it does in production from the
//! first scrape on.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::fleet::{Arrival, Dispatcher};
use super::replica::{Replica, Stats};
use crate::balance::ledger::{Account, Charge};
use crate::balance::{Balancer, Settings, ejection};
use crate::clock::Time;
use crate::engine::Reading;
use crate::policy::{PolicyConfig, Request};

/// What the proxies know of the replicas.
#[derive(Clone, Debug)]
pub struct Fleet<'a> {
    /// The weight of each replica, at least 1.
    pub weights: &'a [u32],
    /// The size of each engine's cache, in tokens.
    pub kv_tokens: u64,
    /// Tokens per block of the trace.
    pub block_tokens: u64,
}

/// Balancers that share a fleet.
pub struct Proxies {
    balancers: Vec<Balancer>,
    addresses: Vec<SocketAddr>,
    kv_tokens: u64,
    block_tokens: f64,
    /// Which proxy has the request of that number, and what it charged.
    flights: Vec<Option<(usize, Charge)>>,
    /// What each proxy's account of a replica was when a page was written that is still to be read.
    accounts: VecDeque<Vec<Account>>,
    /// Who gets the next request.
    lot: fastrand::Rng,
}

/// Nothing fails or stalls in virtual time and nobody joins, so what to do then does not matter.
const SETTINGS: Settings = Settings {
    ejection: ejection::Rule { max_fails: 3, fail_timeout: Duration::from_secs(30) },
    max_requests: None,
    slow_start: Duration::ZERO,
    stall_timeout: Duration::ZERO,
};

impl Proxies {
    /// `count` proxies under one policy; everything random is drawn from `seed`.
    pub fn new(count: usize, policy: &PolicyConfig, fleet: &Fleet<'_>, seed: u64) -> Self {
        let addresses: Vec<_> = (0..fleet.weights.len()).map(address).collect();
        let block_tokens = fleet.block_tokens as f64;
        let balancer = |number: usize| {
            let mut balancer =
                Balancer::new(SETTINGS, policy.build(), seed.wrapping_add((number as u64) << 32));
            let weights = fleet.weights.iter().copied();
            balancer.set_members(addresses.iter().copied().zip(weights), Time::ZERO);
            let first = Reading { kv_capacity_tokens: Some(fleet.kv_tokens), ..Reading::default() };
            for address in &addresses {
                let idle = Account::default();
                balancer.observe_reading(address, first, &idle, block_tokens, Time::ZERO);
            }
            balancer
        };
        Self {
            balancers: (0..count).map(balancer).collect(),
            addresses,
            kv_tokens: fleet.kv_tokens,
            block_tokens,
            flights: Vec::new(),
            accounts: VecDeque::new(),
            lot: fastrand::Rng::with_seed(!seed),
        }
    }

    /// What is owed to all replicas by all proxies together.
    pub fn owed(&mut self, now: Time) -> impl Iterator<Item = Account> {
        self.balancers.iter_mut().flat_map(move |balancer| balancer.states(now)).map(|state| state.account)
    }
}

impl Dispatcher for Proxies {
    fn dispatch(&mut self, arrival: &Arrival<'_>, _replicas: &[Replica]) -> Option<usize> {
        let asked = Request {
            prompt_tokens: arrival.request.prompt_tokens,
            blocks: &arrival.request.blocks,
            block_tokens: self.block_tokens,
            session: None,
        };
        let proxy = if self.balancers.len() > 1 { self.lot.usize(..self.balancers.len()) } else { 0 };
        let pick = self.balancers.get_mut(proxy)?.pick(&asked, &[], arrival.now).ok()?;
        // Slots are opened in the order of the members.
        let to = pick.charge.slot().0 as usize;
        if self.flights.len() <= arrival.id {
            self.flights.resize_with(arrival.id + 1, || None);
        }
        self.flights[arrival.id] = Some((proxy, pick.charge));
        Some(to)
    }

    fn answered(&mut self, id: usize, _now: Time) {
        if let Some((proxy, charge)) = self.flights.get_mut(id).and_then(Option::as_mut) {
            self.balancers[*proxy].answer(charge);
        }
    }

    fn finished(&mut self, id: usize, _now: Time) {
        if let Some((proxy, charge)) = self.flights.get_mut(id).and_then(Option::take) {
            self.balancers[proxy].settle(charge);
        }
    }

    fn sampled(&mut self, replica: usize, _now: Time) {
        let address = &self.addresses[replica];
        self.accounts.push_back(self.balancers.iter().map(|balancer| balancer.account(address)).collect());
    }

    fn scraped(&mut self, replica: usize, stats: &Stats, now: Time) {
        let reading = Reading {
            running: Some(stats.running as u64),
            waiting: Some(stats.waiting as u64),
            kv_usage: Some(stats.kv_usage),
            kv_capacity_tokens: Some(self.kv_tokens),
            process_start: None,
        };
        let before = self.accounts.pop_front().unwrap_or_default();
        for (balancer, before) in self.balancers.iter_mut().zip(&before) {
            balancer.observe_reading(&self.addresses[replica], reading, before, self.block_tokens, now);
        }
    }
}

/// A made-up address for replica number `index`, from 0.
fn address(index: usize) -> SocketAddr {
    let [.., a, b] = index.to_be_bytes();
    SocketAddr::from((Ipv4Addr::new(10, 0, a, b), 8000))
}
