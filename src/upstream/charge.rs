//! A charge that settles itself.
//!
//! The ledger's charge, held by the request it belongs to. Whatever ends the request (a full answer, a client
//! that leaves, a retry, a panic in a hook) drops this, and dropping settles: exactly once, on every path.

use std::net::SocketAddr;
use std::sync::Arc;

use super::{Live, Shared};
use crate::balance::ledger;
use crate::policy::{Reason, Slot};

/// One request in flight on one backend, until dropped.
pub struct Charge {
    shared: Arc<Shared>,
    /// Somebody goes there with it.
    pub(super) accepted: bool,
    charge: Option<ledger::Charge>,
    /// The backend that was charged.
    pub slot: Slot,
    /// Its address.
    pub address: SocketAddr,
    /// The same, alive: for a second try on a fresh connection too; `None` before it is accepted.
    pub live: Option<Arc<Live>>,
    /// Why it was chosen.
    pub reason: Reason,
    /// Prompt tokens that it had probably cached.
    pub matched_tokens: u64,
}

impl Charge {
    pub(super) fn new(shared: Arc<Shared>, pick: crate::balance::Pick) -> Self {
        Self {
            shared,
            accepted: false,
            slot: pick.charge.slot(),
            charge: Some(pick.charge),
            address: pick.address,
            live: None,
            reason: pick.reason,
            matched_tokens: pick.matched_tokens,
        }
    }

    /// The first content byte has come: the prefill is no longer pending. Further calls do nothing.
    pub fn answer(&mut self) {
        if let Some(charge) = &mut self.charge {
            self.shared.balancer.lock().answer(charge);
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if let Some(charge) = self.charge.take() {
            self.shared.balancer.lock().settle(charge);
            // What nobody was sent on with has made no room: whoever waits would only try the same again, for ever.
            if self.accepted {
                self.shared.queue.wake();
            }
        }
    }
}
