//! LMetric: the pending prefill times the number of requests, a cost without any constant.
//!
//! ```text
//! cost_i = (P_i + u_i) / weight_i * (A_i + 1) / weight_i          letters as in [`Candidate`]
//! ```
//!
//! The first factor is the prefill that would stand before this request's first token, cached prefixes taken
//! off; the second is the batch that it would share each step with. A product needs no exchange rate between
//! tokens and requests, which is its charm. It also has no price for computing what another backend has
//! cached, so it spreads prefixes over too many caches once everybody is busy; there
//! [`super::least_pending_tokens`] is better.
//!
//! Source: arXiv 2603.15202; research/routing.md s.1.6 and s.7.3. Both factors are taken per unit of weight,
//! our addition, so that twice the weight takes twice the requests.

use super::{Candidate, Fleet, Policy, Request};

/// The policy; it has no options.
#[derive(Debug)]
pub struct Lmetric;

impl Policy for Lmetric {
    fn cost(&self, _request: &Request<'_>, c: &Candidate, _fleet: &Fleet) -> f64 {
        let prefill = (c.pending_tokens + c.uncached_tokens) as f64;
        let batch = f64::from(c.active_requests + 1);
        prefill * batch / (c.weight * c.weight)
    }

    fn uses_prefix_index(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{idle, plain};
    use super::super::{Choice, Reason};
    use super::*;

    fn cost(candidate: Candidate) -> f64 {
        Lmetric.cost(&plain(), &candidate, &Fleet::of(&[candidate]))
    }

    #[test]
    fn the_cost_is_the_product_of_prefill_and_batch_per_unit_of_weight() {
        let busy = Candidate { pending_tokens: 900, uncached_tokens: 100, active_requests: 3, ..idle(0) };
        assert_eq!(cost(busy), 4_000.0);
        assert_eq!(cost(Candidate { weight: 2.0, ..busy }), 1_000.0);
    }

    #[test]
    fn a_cached_prefix_outweighs_a_stream_more_but_not_a_long_queue() {
        let mut rng = fastrand::Rng::with_seed(3);
        let mut choose = |candidates: &[Candidate]| Lmetric.choose(&plain(), candidates, &mut rng);
        let cached = Candidate { uncached_tokens: 10, active_requests: 2, ..idle(0) };
        let cold = Candidate { uncached_tokens: 4_000, ..idle(1) };
        assert_eq!(choose(&[cached, cold]), Choice { index: 0, reason: Reason::Cache });
        let queued = Candidate { pending_tokens: 5_000, ..cached };
        assert_eq!(choose(&[queued, cold]), Choice { index: 1, reason: Reason::Load });
    }
}
