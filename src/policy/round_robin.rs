//! Round robin: each backend in turn, in proportion to its weight.
//!
//! nginx's smooth weighted round robin: at each choice every candidate gains its weight as credit, the
//! richest is chosen and pays the sum of all weights. Weights 5, 1, 1 give `a a b a c a a`, not `a a a a a b
//! c`. Blind to load and caches: it is the yardstick, not the recommendation.

use std::collections::HashMap;

use super::{Candidate, Choice, Fleet, Member, Policy, Reason, Request, Slot};

/// The policy; it has no options.
#[derive(Debug, Default)]
pub struct RoundRobin {
    credit: HashMap<Slot, f64>,
}

impl RoundRobin {
    /// What a candidate has when it has gained its weight.
    fn credit_of(&self, candidate: &Candidate) -> f64 {
        self.credit.get(&candidate.slot).copied().unwrap_or(0.0) + candidate.weight
    }
}

impl Policy for RoundRobin {
    /// The more credit, the cheaper.
    fn cost(&self, _request: &Request<'_>, candidate: &Candidate, _fleet: &Fleet) -> f64 {
        -self.credit_of(candidate)
    }

    fn choose(&self, _request: &Request<'_>, candidates: &[Candidate], _rng: &mut fastrand::Rng) -> Choice {
        let mut best = (f64::NEG_INFINITY, 0);
        for (index, candidate) in candidates.iter().enumerate() {
            let credit = self.credit_of(candidate);
            if credit > best.0 {
                best = (credit, index);
            }
        }
        let reason = if candidates.len() == 1 { Reason::Only } else { Reason::Turn };
        Choice { index: best.1, reason }
    }

    fn note(&mut self, _request: &Request<'_>, candidates: &[Candidate], choice: Choice) {
        for candidate in candidates {
            *self.credit.entry(candidate.slot).or_insert(0.0) += candidate.weight;
        }
        if let Some(credit) = self.credit.get_mut(&candidates[choice.index].slot) {
            *credit -= candidates.iter().map(|candidate| candidate.weight).sum::<f64>();
        }
    }

    fn rebuild(&mut self, members: &[Member]) {
        self.credit.retain(|slot, _| members.iter().any(|m| m.slot == *slot));
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{idle, plain, take};
    use super::*;

    #[test]
    fn weights_are_interleaved_smoothly() {
        let mut policy = RoundRobin::default();
        let mut rng = fastrand::Rng::with_seed(1);
        let candidates = [Candidate { weight: 5.0, ..idle(0) }, idle(1), idle(2)];
        let turns: Vec<_> =
            (0..7).map(|_| take(&mut policy, &plain(), &candidates, &mut rng).index).collect();
        assert_eq!(turns, [0, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn a_backend_that_is_skipped_for_a_while_does_not_burst_when_it_returns() {
        let mut policy = RoundRobin::default();
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..100 {
            take(&mut policy, &plain(), &[idle(0), idle(1)], &mut rng);
        }
        let all = [idle(0), idle(1), idle(2)];
        let turns: Vec<_> = (0..6).map(|_| take(&mut policy, &plain(), &all, &mut rng).index).collect();
        assert_eq!(turns.iter().filter(|i| **i == 2).count(), 2, "{turns:?}");
    }
}
