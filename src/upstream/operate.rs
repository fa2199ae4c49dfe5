//! What an operator asks of an upstream: drain a backend, let it serve again, give it another weight.
//!
//! Decided in `balance/drain.rs`; here it is told and logged, and whoever waits may find room.

use std::net::SocketAddr;
use std::sync::Arc;

use super::{Live, Upstream};
use crate::balance::{Explained, NoPick, State};
use crate::policy::Request;

impl Upstream {
    /// From now on the backend at `address` gets no new request; false if it is none of this upstream's.
    pub fn drain(&self, address: &SocketAddr) -> bool {
        let done = self.shared.balancer.lock().drain(address, self.shared.clock.now());
        if done {
            log::warn!("backend drains upstream={} backend={address} by=admin", self.name);
            // If it was the last, nobody need wait any longer.
            self.shared.queue.wake();
        }
        done
    }

    /// The backend at `address` gets requests again; false if it is none of this upstream's.
    pub fn undrain(&self, address: &SocketAddr) -> bool {
        let done = self.shared.balancer.lock().undrain(address);
        if done {
            log::warn!("backend drains no longer upstream={} backend={address} by=admin", self.name);
            self.shared.queue.wake();
        }
        done
    }

    /// From now on the backend at `address` has this weight; what it had, or `None` if it is none of this upstream's.
    pub fn reweigh(&self, address: &SocketAddr, weight: u32) -> Option<u32> {
        let before = self.shared.balancer.lock().reweigh(address, weight)?;
        log::warn!(
            "backend weighed upstream={} backend={address} weight={weight} before={before} by=admin",
            self.name
        );
        Some(before)
    }

    /// The backend at `address` as it stands, if it is one of this upstream's.
    pub fn state(&self, address: &SocketAddr) -> Option<State> {
        self.states().into_iter().find(|state| state.address == *address)
    }

    /// What would be done with `request` at this moment, and why.
    pub fn explain(&self, request: &Request<'_>) -> Explained {
        self.shared.balancer.lock().explain(request, self.shared.clock.now())
    }

    /// Whether all backends are being drained, so that nobody need wait for room.
    pub(super) fn is_drained(&self) -> bool {
        self.shared.balancer.lock().tier(&[], self.shared.clock.now()) == Err(NoPick::Drained)
    }

    /// The backend at `address`, as long as it is one of this upstream's.
    pub fn live(&self, address: &SocketAddr) -> Option<Arc<Live>> {
        self.view().live.get(address).cloned()
    }

    /// Requests that wait for room.
    pub fn queued(&self) -> usize {
        self.shared.queue.len()
    }
}
