//! What an upstream leaves to the process that takes our place: what was learned, and what is still in flight.
//!
//! Without the first, a new binary would send requests to backends that are down, and to engines that have not cached
//! them. Without the second, two processes would both take the same engine for idle.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::view::Member;
use super::{PRICES_LIMIT, Upstream};
use crate::balance::ledger::Account;
use crate::prompt::BytesPerToken;

/// Blocks of prefixes handed over for one backend: eight million tokens at the usual four bytes for one.
const BLOCKS_LIMIT: usize = 1 << 16;

/// What is known of one upstream. A key that is not there, since another version wrote it, is nothing known.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Heritage {
    /// Backends that are down.
    pub(super) down: BTreeSet<SocketAddr>,
    /// Bytes per prompt token, by model.
    prices: BTreeMap<String, f64>,
    /// What each backend has probably cached, least recently used first.
    prefixes: BTreeMap<SocketAddr, Vec<Vec<u64>>>,
    /// What an operator has decided of each: that it drains, and a weight in the place of another.
    decisions: BTreeMap<SocketAddr, (bool, Option<[u32; 2]>)>,
    /// The backends themselves, with weight and host, if they were discovered: who says so may be silent just now.
    discovered: Vec<(SocketAddr, u32, String)>,
    /// What is in flight at this moment.
    load: Load,
}

impl Heritage {
    /// The backends that were discovered there.
    pub fn members(&self) -> Vec<Member> {
        let member = |(address, weight, host): &(SocketAddr, u32, String)| Member {
            address: *address,
            weight: (*weight).max(1),
            host: host.clone(),
        };
        self.discovered.iter().map(member).collect()
    }
}

/// What is in flight on the backends of one upstream.
pub type Load = BTreeMap<SocketAddr, Account>;

impl Upstream {
    /// What we leave. Locks the balancer for one backend at a time: requests go on meanwhile.
    pub fn heritage(&self) -> Heritage {
        let (states, view) = (self.states(), self.view());
        let addresses = || states.iter().map(|state| state.address);
        let prices = self.shared.prices.read().iter().map(|(m, price)| (m.clone(), price.ratio())).collect();
        let balancer = || self.shared.balancer.lock();
        let members = view.members.iter().filter(|_| self.config.discover.is_some());
        Heritage {
            down: states.iter().filter(|state| !state.healthy).map(|state| state.address).collect(),
            prices,
            prefixes: addresses().map(|a| (a, balancer().prefixes(&a, BLOCKS_LIMIT))).collect(),
            decisions: addresses().map(|a| (a, balancer().decided(&a))).collect(),
            load: self.load(),
            discovered: members.map(|m| (m.address, m.weight, m.host.clone())).collect(),
        }
    }

    /// Begins with what another process has left. Which backends are down is for [`super::Probes::inherit`].
    pub fn inherit(&self, heritage: &Heritage) {
        let prices = heritage.prices.iter().take(PRICES_LIMIT);
        let prices = prices.map(|(model, ratio)| (model.clone(), BytesPerToken::from_ratio(*ratio)));
        self.shared.prices.write().extend(prices);
        let mut balancer = self.shared.balancer.lock();
        for (address, prefixes) in &heritage.prefixes {
            balancer.remember(address, prefixes);
        }
        for (address, decided) in &heritage.decisions {
            balancer.adopt(address, *decided, self.shared.clock.now());
        }
        drop(balancer);
        self.observe_predecessor(Some(&heritage.load));
    }

    /// What is in flight, ours and that of the process before us.
    pub fn load(&self) -> Load {
        let view = self.view();
        view.live.keys().map(|address| (*address, self.shared.balancer.lock().account(address))).collect()
    }

    /// What the process before us still has in flight; nothing, when it has ended.
    pub fn observe_predecessor(&self, load: Option<&Load>) {
        let account = |address| load.and_then(|load| load.get(address)).copied().unwrap_or_default();
        for address in self.view().live.keys() {
            self.shared.balancer.lock().observe_elsewhere(address, account(address));
        }
        // What has ended there is room here.
        self.shared.queue.wake();
    }
}
