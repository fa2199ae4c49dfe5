//! What an operator decides about a backend: that it gets no new request, or another weight.
//!
//! A drained backend gets none *ever*, not even as a last resort: whoever drains an engine is about to stop it, and a
//! request that arrives then is lost. If only drained backends are left, requests are refused. What is in flight goes
//! on, sessions and prefixes move to others; what the backend has cached is remembered for its return.
//!
//! Both decisions are kept with the address, so a reload does not undo them. A weight that was set holds until the
//! configured weight of that backend changes: whoever edits it means it. Both end with `undrain` or another weight,
//! when the backend leaves the upstream (its address may come back as another machine's), and with the process.

use std::net::SocketAddr;

use super::{Backend, Balancer};
use crate::clock::Time;
use crate::policy::Slot;

/// A weight that was set in the place of the configured one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reweighed {
    configured: u32,
    set: u32,
}

impl Balancer {
    /// From now on the backend at `address` gets no new request; false if it is no member. One that is being drained
    /// already goes on so.
    pub fn drain(&mut self, address: &SocketAddr, now: Time) -> bool {
        let Some(slot) = self.member(address) else { return false };
        self.backends[slot.0 as usize].draining.get_or_insert(now);
        true
    }

    /// The backend at `address` gets requests again; false if it is no member.
    pub fn undrain(&mut self, address: &SocketAddr) -> bool {
        let Some(slot) = self.member(address) else { return false };
        self.backends[slot.0 as usize].draining = None;
        true
    }

    /// From now on the backend at `address` has this weight, at least 1; what it had, or `None` if it is no member.
    pub fn reweigh(&mut self, address: &SocketAddr, weight: u32) -> Option<u32> {
        let member = self.members.iter_mut().find(|member| member.address == *address)?;
        let before = std::mem::replace(&mut member.weight, weight.max(1));
        let backend = &mut self.backends[member.slot.0 as usize];
        let configured = backend.reweighed.map_or(before, |reweighed| reweighed.configured);
        backend.reweighed = Some(Reweighed { configured, set: member.weight });
        self.weights_changed();
        Some(before)
    }

    /// Whether the backend at `address` drains, and, if its weight was set, the configured one and that.
    pub fn decided(&self, address: &SocketAddr) -> (bool, Option<[u32; 2]>) {
        let Some(slot) = self.member(address) else { return (false, None) };
        let backend = &self.backends[slot.0 as usize];
        (backend.draining.is_some(), backend.reweighed.map(|weight| [weight.configured, weight.set]))
    }

    /// Decides so again, for another process, with what [`Balancer::decided`] said there. A weight that is no longer
    /// configured as it was then is left.
    pub fn adopt(&mut self, address: &SocketAddr, (drains, weight): (bool, Option<[u32; 2]>), now: Time) {
        let configured = self.members.iter().find(|member| member.address == *address).map(|m| m.weight);
        if let Some([_, set]) = weight.filter(|[before, _]| configured == Some(*before)) {
            self.reweigh(address, set);
        }
        if drains {
            self.drain(address, now);
        }
    }

    pub(super) fn is_draining(&self, slot: Slot) -> bool {
        self.backends[slot.0 as usize].draining.is_some()
    }

    fn member(&self, address: &SocketAddr) -> Option<Slot> {
        self.members.iter().find(|member| member.address == *address).map(|member| member.slot)
    }
}

impl Backend {
    /// The weight it has when `configured` is what the configuration says.
    pub(super) fn weigh(&mut self, configured: u32) -> u32 {
        self.reweighed = self.reweighed.filter(|reweighed| reweighed.configured == configured);
        self.reweighed.map_or(configured, |reweighed| reweighed.set)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{NoPick, Settings, Standing, ejection};
    use super::*;
    use crate::policy::{PolicyConfig, Reason, Request};

    fn address(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, n], 8000))
    }

    fn balancer(policy: &str) -> Balancer {
        let rule = ejection::Rule { max_fails: 1, fail_timeout: Duration::from_secs(30) };
        let settings = Settings {
            ejection: rule,
            max_requests: None,
            slow_start: Duration::ZERO,
            stall_timeout: Duration::ZERO,
        };
        let mut balancer = Balancer::new(settings, PolicyConfig::by_name(policy).unwrap().build(), 1);
        balancer.set_members((0..3).map(|n| (address(n), 2)), Time::ZERO);
        balancer
    }

    fn pick(b: &mut Balancer, session: u64) -> Result<SocketAddr, NoPick> {
        let request =
            Request { prompt_tokens: 100, blocks: &[1, 2, 3], block_tokens: 128.0, session: Some(session) };
        let pick = b.pick(&request, &[], Time::ZERO)?;
        let address = pick.address;
        b.settle(pick.charge);
        Ok(address)
    }

    #[test]
    fn a_drained_backend_gets_nothing_from_any_policy_and_its_sessions_move_and_return() {
        for policy in PolicyConfig::NAMES {
            let mut b = balancer(policy);
            let homes: Vec<_> = (0..100).map(|session| pick(&mut b, session).unwrap()).collect();
            assert!(b.drain(&address(1), Time::ZERO) && !b.drain(&address(9), Time::ZERO));
            for session in 0..100 {
                let to = pick(&mut b, session).unwrap();
                assert_ne!(to, address(1), "{policy}");
                let home = homes[session as usize];
                assert!(*policy != "prefix_hash" || home == address(1) || to == home, "others stay");
            }
            assert!(b.undrain(&address(1)));
            let returned: Vec<_> = (0..100).map(|session| pick(&mut b, session).unwrap()).collect();
            assert!(*policy != "prefix_hash" || returned == homes, "{policy}");
        }
    }

    #[test]
    fn a_drained_backend_is_no_last_resort_and_alone_it_is_said_so() {
        let mut b = balancer("round_robin");
        for n in [1, 2] {
            b.observe_health(&address(n), false, Time::ZERO);
        }
        assert!(b.any_available(Time::ZERO));
        b.drain(&address(0), Time::ZERO);
        assert!(!b.any_available(Time::ZERO));
        let request = Request { prompt_tokens: 1, blocks: &[], block_tokens: 128.0, session: None };
        let last = b.pick(&request, &[], Time::ZERO).unwrap();
        assert_eq!(last.reason, Reason::LastResort);
        assert_ne!(last.address, address(0));
        b.settle(last.charge);
        for n in [1, 2] {
            b.drain(&address(n), Time::ZERO);
        }
        assert_eq!(pick(&mut b, 1), Err(NoPick::Drained));
        assert_eq!(b.tier(&[], Time::ZERO), Err(NoPick::Drained));
        let states = b.states(Time::ZERO);
        assert!(states.iter().all(|state| state.standing == Standing::Draining && state.draining));
        assert_eq!(states[0].reason.as_deref(), Some("drained on request, nothing in flight"));
    }

    #[test]
    fn a_drained_backend_is_nobody_to_fall_back_on_when_another_is_ejected() {
        let mut b = balancer("round_robin");
        b.drain(&address(0), Time::ZERO);
        let slots: Vec<_> = b.members.iter().map(|member| member.slot).collect();
        let fail = |b: &mut Balancer, slot| b.fail(slot, super::super::Failure::Connect, false, Time::ZERO);
        assert!(fail(&mut b, slots[1]).is_some());
        assert!(fail(&mut b, slots[2]).is_none(), "it is the last that serves");
    }

    #[test]
    fn a_reload_keeps_what_was_decided_until_it_changes_that_weight_or_the_backend_leaves() {
        let mut b = balancer("prefix_hash");
        b.drain(&address(0), Time::ZERO);
        assert_eq!((b.reweigh(&address(1), 7), b.reweigh(&address(1), 5)), (Some(2), Some(7)));
        assert_eq!(b.reweigh(&address(9), 5), None);
        let look = |b: &mut Balancer| -> Vec<_> {
            b.states(Time::ZERO).iter().map(|state| (state.weight, state.draining)).collect()
        };
        assert_eq!(look(&mut b), [(2, true), (5, false), (2, false)]);
        b.set_members([(address(0), 2), (address(1), 2), (address(2), 9)], Time::ZERO);
        assert_eq!(look(&mut b), [(2, true), (5, false), (9, false)]);
        b.set_members([(address(0), 2), (address(1), 3)], Time::ZERO);
        assert_eq!(look(&mut b), [(2, true), (3, false)], "whoever edits it means it");
        b.set_members([(address(1), 3)], Time::ZERO);
        b.set_members([(address(0), 2), (address(1), 2)], Time::ZERO);
        assert_eq!(look(&mut b), [(2, false), (2, false)]);
    }
}
