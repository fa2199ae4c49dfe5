//! Least pending tokens: the backend that owes the least prefill, with a discount for what it has cached.
//!
//! Requests cost from one to a hundred thousand tokens, so counting them balances nothing; and a backend that
//! has cached a prompt's prefix computes only the rest. Per backend *i* (letters as in [`Candidate`]):
//!
//! ```text
//! cost_i = (P_i + u_i + alpha (A_i + 1) + beta C_i) / weight_i + (lambda - 1)(u_i - min_j u_j)
//! lambda = min(3 + 0.2 w, 20)            alpha = 400 tokens, beta = 0.05
//! ```
//!
//! `P + u` is the prefill that stands before this request's first token. `alpha` is what one more decoding
//! stream costs its neighbours, `beta` the pressure on KV memory. `lambda` is the price of computing a token
//! that another backend has already cached: about 1/(1 - utilisation), so it grows with the queue `w`; when
//! everybody is busy, a cache hit is throughput. That term is not divided by the weight, because the waste
//! does not depend on who commits it.
//!
//! Source: DESIGN.md s.5; research/routing.md s.4 and s.7.1, where the constants were found to be flat (alpha
//! 200 to 1,600, beta 0.02 to 0.1, lambda 2 to 4): they need no tuning per site.

use schemars::JsonSchema;
use serde::Deserialize;

use super::{Candidate, Fleet, Policy, Request};

/// The constants of the formula.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// alpha: what one request in flight counts for, in prompt tokens; 0 or more. Default 400.
    #[schemars(range(min = 0))]
    pub request_tokens: f64,
    /// beta: what one prompt token held in flight counts for, in pending tokens; 0 or more. Default 0.05.
    #[schemars(range(min = 0))]
    pub context_factor: f64,
    /// lambda on an idle fleet: how many times an uncached token counts; 1 (only own delay) or more. Default
    /// 3.
    #[schemars(range(min = 1))]
    pub uncached_factor: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { request_tokens: 400.0, context_factor: 0.05, uncached_factor: 3.0 }
    }
}

/// lambda grows by this for each unanswered request that even the least loaded backend has.
const UNCACHED_FACTOR_STEP: f64 = 0.2;

/// lambda grows no further than this.
const UNCACHED_FACTOR_LIMIT: f64 = 20.0;

/// The policy.
#[derive(Debug)]
pub struct LeastPendingTokens {
    options: Options,
}

impl LeastPendingTokens {
    /// The policy with these constants.
    pub fn new(options: Options) -> Self {
        Self { options }
    }
}

impl Policy for LeastPendingTokens {
    fn cost(&self, _request: &Request<'_>, c: &Candidate, fleet: &Fleet) -> f64 {
        let Options { request_tokens, context_factor, uncached_factor } = self.options;
        let lambda = (uncached_factor + UNCACHED_FACTOR_STEP * f64::from(fleet.least_unanswered))
            .min(UNCACHED_FACTOR_LIMIT.max(uncached_factor));
        let owed = c.pending_tokens as f64
            + c.uncached_tokens as f64
            + request_tokens * f64::from(c.active_requests + 1)
            + context_factor * c.context_tokens as f64;
        let wasted = c.uncached_tokens.saturating_sub(fleet.least_uncached) as f64;
        owed / c.weight + (lambda - 1.0) * wasted
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

    fn choose(candidates: &[Candidate]) -> Choice {
        let policy = LeastPendingTokens::new(Options::default());
        policy.choose(&plain(), candidates, &mut fastrand::Rng::with_seed(3))
    }

    #[test]
    fn the_cost_is_the_formula_of_the_design() {
        let policy = LeastPendingTokens::new(Options::default());
        let c = Candidate {
            weight: 2.0,
            pending_tokens: 1_000,
            active_requests: 3,
            unanswered_requests: 2,
            context_tokens: 8_000,
            uncached_tokens: 600,
            ..idle(0)
        };
        let fleet = Fleet::of(&[c, Candidate { uncached_tokens: 100, unanswered_requests: 5, ..idle(1) }]);
        // (1000 + 600 + 400 * 4 + 0.05 * 8000) / 2 + (3 + 0.2 * 2 - 1) * (600 - 100)
        assert_eq!(policy.cost(&plain(), &c, &fleet), 1_800.0 + 2.4 * 500.0);
    }

    #[test]
    fn one_long_prompt_weighs_more_than_ten_short_ones() {
        let long =
            Candidate { pending_tokens: 100_000, active_requests: 1, context_tokens: 100_000, ..idle(0) };
        let short =
            Candidate { pending_tokens: 1_000, active_requests: 10, context_tokens: 1_000, ..idle(1) };
        assert_eq!(choose(&[long, short]), Choice { index: 1, reason: Reason::Load });
    }

    #[test]
    fn a_cached_prefix_is_worth_waiting_for_but_not_for_ever() {
        let cached = Candidate { uncached_tokens: 10, pending_tokens: 5_000, active_requests: 2, ..idle(0) };
        let cold = Candidate { uncached_tokens: 4_000, ..idle(1) };
        assert_eq!(choose(&[cached, cold]), Choice { index: 0, reason: Reason::Cache });
        let swamped = Candidate { pending_tokens: 50_000, ..cached };
        assert_eq!(choose(&[swamped, cold]), Choice { index: 1, reason: Reason::Load });
    }

    #[test]
    fn ties_are_broken_evenly() {
        let policy = LeastPendingTokens::new(Options::default());
        let mut rng = fastrand::Rng::with_seed(11);
        let candidates = [idle(0), idle(1), idle(2), idle(3)];
        let mut seen = [0; 4];
        for _ in 0..4_000 {
            seen[policy.choose(&plain(), &candidates, &mut rng).index] += 1;
        }
        assert!(seen.iter().all(|n| (850..1_150).contains(n)), "{seen:?}");
    }
}
