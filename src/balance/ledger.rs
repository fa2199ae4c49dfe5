//! The ledger: what each backend owes, in tokens and requests, kept by the proxy itself.
//!
//! Every request in flight is one [`Charge`]: made at dispatch, lightened at the first content byte (the
//! prefill is done), settled exactly once at the end, however it ends. The amounts are frozen in the charge,
//! so what is taken is what is given back, and all counters are zero when nothing is in flight.
//!
//! Entries are keyed by address: a backend that leaves and returns, or changes its weight, finds its counters
//! as they were.

use std::collections::HashMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::policy::Slot;

/// The counters of one backend; the letters are those of [`crate::policy::Candidate`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Account {
    /// P: uncached prompt tokens not yet answered by a first content byte.
    pub pending_tokens: u64,
    /// A: requests in flight.
    pub active_requests: u32,
    /// Requests in flight without a first content byte.
    pub unanswered_requests: u32,
    /// C: prompt tokens of all requests in flight.
    pub context_tokens: u64,
}

impl Account {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: &Self) -> Self {
        Self {
            pending_tokens: self.pending_tokens.saturating_add(other.pending_tokens),
            active_requests: self.active_requests.saturating_add(other.active_requests),
            unanswered_requests: self.unanswered_requests.saturating_add(other.unanswered_requests),
            context_tokens: self.context_tokens.saturating_add(other.context_tokens),
        }
    }
}

/// One request in flight on one backend. Give it back with [`Ledger::settle`].
#[derive(Debug)]
#[must_use = "a charge that is not settled makes its backend look busy for ever"]
pub struct Charge {
    slot: Slot,
    prompt_tokens: u64,
    uncached_tokens: u64,
    answered: bool,
}

impl Charge {
    /// The backend that was charged.
    pub fn slot(&self) -> Slot {
        self.slot
    }

    /// The prompt tokens charged as uncached.
    pub fn uncached_tokens(&self) -> u64 {
        self.uncached_tokens
    }
}

/// The accounts of all backends of one upstream.
#[derive(Debug, Default)]
pub struct Ledger {
    accounts: Vec<Account>,
    slots: HashMap<SocketAddr, Slot>,
}

impl Ledger {
    /// The slot of the backend at `address`, opened if it is new.
    pub fn open(&mut self, address: SocketAddr) -> Slot {
        let next = Slot(self.accounts.len() as u32);
        let slot = *self.slots.entry(address).or_insert(next);
        if slot == next {
            self.accounts.push(Account::default());
        }
        slot
    }

    /// The slot of the backend at `address`, if it was ever opened.
    pub fn slot(&self, address: &SocketAddr) -> Option<Slot> {
        self.slots.get(address).copied()
    }

    /// The counters of `slot`.
    pub fn account(&self, slot: Slot) -> &Account {
        &self.accounts[slot.0 as usize]
    }

    /// Charges a request of `prompt_tokens`, of which `uncached_tokens` have to be computed, to `slot`.
    pub fn charge(&mut self, slot: Slot, prompt_tokens: u64, uncached_tokens: u64) -> Charge {
        let account = &mut self.accounts[slot.0 as usize];
        account.pending_tokens += uncached_tokens;
        account.active_requests += 1;
        account.unanswered_requests += 1;
        account.context_tokens += prompt_tokens;
        Charge { slot, prompt_tokens, uncached_tokens, answered: false }
    }

    /// The first content byte has come: the prefill is done. Later calls do nothing.
    pub fn answer(&mut self, charge: &mut Charge) {
        if !std::mem::replace(&mut charge.answered, true) {
            let account = &mut self.accounts[charge.slot.0 as usize];
            account.pending_tokens -= charge.uncached_tokens;
            account.unanswered_requests -= 1;
        }
    }

    /// The request has ended, whichever way.
    pub fn settle(&mut self, mut charge: Charge) {
        self.answer(&mut charge);
        let account = &mut self.accounts[charge.slot.0 as usize];
        account.active_requests -= 1;
        account.context_tokens -= charge.prompt_tokens;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, n], 8000))
    }

    #[test]
    fn the_first_byte_releases_the_prefill_and_the_end_releases_the_rest() {
        let mut ledger = Ledger::default();
        let slot = ledger.open(address(1));
        let mut charge = ledger.charge(slot, 1_000, 300);
        let open = Account {
            pending_tokens: 300,
            active_requests: 1,
            unanswered_requests: 1,
            context_tokens: 1_000,
        };
        assert_eq!(*ledger.account(slot), open);
        ledger.answer(&mut charge);
        ledger.answer(&mut charge);
        let answered = Account { pending_tokens: 0, unanswered_requests: 0, ..open };
        assert_eq!(*ledger.account(slot), answered);
        ledger.settle(charge);
        assert_eq!(*ledger.account(slot), Account::default());
    }

    #[test]
    fn a_backend_that_returns_finds_its_account() {
        let mut ledger = Ledger::default();
        let first = ledger.open(address(1));
        let charge = ledger.charge(first, 10, 10);
        assert_ne!(ledger.open(address(2)), first);
        assert_eq!(ledger.open(address(1)), first);
        assert_eq!(ledger.account(first).active_requests, 1);
        ledger.settle(charge);
    }

    #[test]
    fn any_order_of_charges_answers_and_ends_leaves_zero() {
        let seed = std::env::var("PLIMSOLL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(7);
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut ledger = Ledger::default();
        let slots: Vec<_> = (0..4).map(|n| ledger.open(address(n))).collect();
        let mut open = Vec::new();
        for _ in 0..10_000 {
            match rng.u8(..3) {
                0 => {
                    let prompt = rng.u64(1..100_000);
                    open.push(ledger.charge(slots[rng.usize(..4)], prompt, rng.u64(1..=prompt)));
                }
                1 if !open.is_empty() => {
                    let i = rng.usize(..open.len());
                    ledger.answer(&mut open[i]);
                }
                _ if !open.is_empty() => {
                    let i = rng.usize(..open.len());
                    ledger.settle(open.swap_remove(i));
                }
                _ => {}
            }
            let active: u32 = slots.iter().map(|s| ledger.account(*s).active_requests).sum();
            assert_eq!(active as usize, open.len(), "replay: PLIMSOLL_SEED={seed}");
        }
        for charge in open {
            ledger.settle(charge);
        }
        for slot in slots {
            assert_eq!(*ledger.account(slot), Account::default(), "replay: PLIMSOLL_SEED={seed}");
        }
    }
}
