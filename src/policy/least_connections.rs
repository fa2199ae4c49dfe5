//! Least connections: the backend with the fewest requests in flight per unit of weight.
//!
//! The classic of nginx and HAProxy, for comparison and for engines whose requests are all alike:
//! `cost_i = (A_i + 1) / weight_i`, random among ties. It knows nothing of tokens or caches.

use super::{Candidate, Fleet, Policy, Request};

/// The policy; it has no options.
#[derive(Debug)]
pub struct LeastConnections;

impl Policy for LeastConnections {
    fn cost(&self, _request: &Request<'_>, candidate: &Candidate, _fleet: &Fleet) -> f64 {
        cost(candidate)
    }
}

/// Requests that `candidate` would have per unit of weight if it took one more.
pub(super) fn cost(candidate: &Candidate) -> f64 {
    f64::from(candidate.active_requests + 1) / candidate.weight
}

#[cfg(test)]
mod tests {
    use super::super::tests::{idle, plain};
    use super::*;

    #[test]
    fn a_backend_of_double_weight_takes_double_the_requests() {
        let heavy = Candidate { weight: 2.0, active_requests: 2, ..idle(0) };
        let light = Candidate { active_requests: 1, ..idle(1) };
        let mut rng = fastrand::Rng::with_seed(1);
        assert_eq!(LeastConnections.choose(&plain(), &[heavy, light], &mut rng).index, 0);
        let full = Candidate { active_requests: 4, ..heavy };
        assert_eq!(LeastConnections.choose(&plain(), &[full, light], &mut rng).index, 1);
    }
}
