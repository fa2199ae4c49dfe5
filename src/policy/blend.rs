//! Blend: a weighted sum of the costs of other policies, for a rule of one's own without a line of Rust.
//!
//! ```text
//! cost_i = sum over the parts p of factor_p * cost_p,i
//! ```
//!
//! Only policies whose answer is "the cheapest" can be parts: [`super::least_pending_tokens`] (with its
//! default constants; in tokens), [`super::least_connections`] (in requests) and [`super::lmetric`] (in token
//! requests). The factors are the exchange rates between their units. Taking turns and hashing have no cost
//! that could be added to another.
//!
//! Source: DESIGN.md s.5; the weighted scorers of the Gateway API inference extension are the same idea
//! (research/routing.md s.1.1), but each squeezes its score into 0 to 1 first, so that a difference of one
//! waiting request may count as much as one of a hundred; sums of plain costs keep their proportions.

use schemars::JsonSchema;
use serde::Deserialize;

use super::least_connections::LeastConnections;
use super::least_pending_tokens::{self, LeastPendingTokens};
use super::lmetric::Lmetric;
use super::{Candidate, Fleet, Policy, Request};

/// The factor of each part, 0 or more; a part that is left out has none. With no part at all,
/// [`Options::USUAL`] is meant.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// What a token of the cost of `least_pending_tokens` counts for.
    #[schemars(range(min = 0))]
    pub least_pending_tokens: Option<f64>,
    /// What a request per unit of weight counts for.
    #[schemars(range(min = 0))]
    pub least_connections: Option<f64>,
    /// What a token request of the cost of `lmetric` counts for.
    #[schemars(range(min = 0))]
    pub lmetric: Option<f64>,
}

impl Options {
    /// Pending tokens with half as much again for every request in flight: what suits long answers.
    pub const USUAL: Self =
        Self { least_pending_tokens: Some(1.0), least_connections: Some(200.0), lmetric: None };

    /// The parts that are named, each with its factor.
    pub fn factors(&self) -> impl Iterator<Item = (&'static str, f64)> {
        [
            ("least_pending_tokens", self.least_pending_tokens),
            ("least_connections", self.least_connections),
            ("lmetric", self.lmetric),
        ]
        .into_iter()
        .filter_map(|(name, factor)| Some((name, factor?)))
    }
}

/// The policy.
pub struct Blend {
    parts: Vec<(f64, Box<dyn Policy>)>,
}

impl Blend {
    /// The policy with these factors.
    pub fn new(options: &Options) -> Self {
        let options = if *options == Options::default() { &Options::USUAL } else { options };
        let mut parts: Vec<(f64, Box<dyn Policy>)> = Vec::new();
        if let Some(factor) = options.least_pending_tokens {
            let constants = least_pending_tokens::Options::default();
            parts.push((factor, Box::new(LeastPendingTokens::new(constants))));
        }
        if let Some(factor) = options.least_connections {
            parts.push((factor, Box::new(LeastConnections)));
        }
        if let Some(factor) = options.lmetric {
            parts.push((factor, Box::new(Lmetric)));
        }
        Self { parts }
    }
}

impl Policy for Blend {
    fn cost(&self, request: &Request<'_>, candidate: &Candidate, fleet: &Fleet) -> f64 {
        self.parts.iter().map(|(factor, part)| factor * part.cost(request, candidate, fleet)).sum()
    }

    fn uses_prefix_index(&self) -> bool {
        self.parts.iter().any(|(_, part)| part.uses_prefix_index())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{idle, plain};
    use super::*;

    #[test]
    fn the_cost_is_the_weighted_sum_of_the_parts() {
        let c = Candidate { pending_tokens: 900, active_requests: 3, context_tokens: 2_000, ..idle(0) };
        let fleet = Fleet::of(&[c]);
        let options = Options { least_pending_tokens: Some(2.0), ..Options::default() };
        let cost = |options: &Options| Blend::new(options).cost(&plain(), &c, &fleet);
        // 900 + 100 + 400 * 4 + 0.05 * 2000
        assert_eq!(cost(&options), 2.0 * 2_700.0);
        let options = Options { least_connections: Some(10.0), lmetric: Some(0.5), ..options };
        assert_eq!(cost(&options), 2.0 * 2_700.0 + 10.0 * 4.0 + 0.5 * 4_000.0);
    }

    #[test]
    fn without_a_part_it_is_the_usual_blend() {
        let c = idle(0);
        let fleet = Fleet::of(&[c]);
        let cost = |options: &Options| Blend::new(options).cost(&plain(), &c, &fleet);
        assert_eq!(cost(&Options::default()), 100.0 + 400.0 + 200.0);
        assert_eq!(cost(&Options::default()), cost(&Options::USUAL));
    }

    #[test]
    fn it_asks_the_prefix_index_only_if_a_part_does() {
        let blind = Options { least_connections: Some(1.0), ..Options::default() };
        assert!(!Blend::new(&blind).uses_prefix_index());
        assert!(Blend::new(&Options::USUAL).uses_prefix_index());
    }
}
