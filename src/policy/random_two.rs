//! Random two: draw two backends, take the less busy one.
//!
//! nginx's `random two least_conn`: backends are drawn in proportion to their weight, the second from the
//! rest, and the one with fewer requests per unit of weight wins. It needs no scan and resists stale
//! counters; with exact counters, as here, a full scan is better (research/routing.md s.4).

use super::{Candidate, Choice, Fleet, Policy, Reason, Request, least_connections};

/// The policy; it has no options.
#[derive(Debug)]
pub struct RandomTwo;

impl Policy for RandomTwo {
    fn cost(&self, _request: &Request<'_>, candidate: &Candidate, _fleet: &Fleet) -> f64 {
        least_connections::cost(candidate)
    }

    fn choose(&self, _request: &Request<'_>, candidates: &[Candidate], rng: &mut fastrand::Rng) -> Choice {
        let Some(first) = draw(candidates, None, rng) else {
            return Choice { index: 0, reason: Reason::Only };
        };
        let Some(second) = draw(candidates, Some(first), rng) else {
            return Choice { index: first, reason: Reason::Only };
        };
        let worse =
            least_connections::cost(&candidates[second]) < least_connections::cost(&candidates[first]);
        Choice { index: if worse { second } else { first }, reason: Reason::Draw }
    }
}

/// An index drawn in proportion to weight, other than `except`.
fn draw(candidates: &[Candidate], except: Option<usize>, rng: &mut fastrand::Rng) -> Option<usize> {
    let open = || candidates.iter().enumerate().filter(move |(i, _)| Some(*i) != except);
    let mut left = rng.f64() * open().map(|(_, c)| c.weight).sum::<f64>();
    let mut last = None;
    for (index, candidate) in open() {
        last = Some(index);
        left -= candidate.weight;
        if left < 0.0 {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::super::tests::{idle, plain};
    use super::*;

    #[test]
    fn of_two_backends_the_less_busy_one_is_always_taken() {
        let busy = Candidate { active_requests: 5, ..idle(0) };
        let mut rng = fastrand::Rng::with_seed(5);
        for _ in 0..100 {
            assert_eq!(RandomTwo.choose(&plain(), &[busy, idle(1)], &mut rng).index, 1);
        }
    }

    #[test]
    fn the_busiest_of_many_is_never_taken() {
        let mut candidates: Vec<_> = (0..10).map(idle).collect();
        candidates[3].active_requests = 1;
        let mut rng = fastrand::Rng::with_seed(6);
        assert!((0..1_000).all(|_| RandomTwo.choose(&plain(), &candidates, &mut rng).index != 3));
    }
}
