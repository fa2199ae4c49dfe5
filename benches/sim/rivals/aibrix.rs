//! Policy of AIBrix's `prefix-cache`, re-implemented from its published formula.
//!
//! Source: `vllm-project/aibrix` e3e10f9, `pkg/plugins/gateway/algorithms/prefix_cache.go`.
//!
//! ```text
//! if most - least > 8 requests in flight:   the replica with the fewest
//! else, of the replicas with a match:       the longest match first, then the fewest in flight,
//!                                           skipping those above mean + 1 standard deviation
//! else:                                     the replica with the fewest
//! ```
//!
//! In flight is the gateway's own count; equals are drawn. The thresholds are those of the code, which its
//! README contradicts; the size of the index is the README's (200,000 blocks of 128 characters, 6.4 M tokens
//! in all), because with the code's blocks of four characters it would forget a prompt of this length at
//! once. Each replica may fill it alone, and nothing expires after 20 minutes: both are to its advantage.

use plimsoll::clock::Time;
use plimsoll::sim::fleet::{Arrival, Dispatcher};
use plimsoll::sim::replica::Replica;

use super::flights::Flights;
use super::prefixes::Prefixes;
use super::{Site, least};

/// Tokens that the index holds: 200,000 blocks of 128 characters, at four to a token.
const INDEX_TOKENS: u64 = 200_000 * 128 / 4;

/// The rule.
pub struct Aibrix {
    flights: Flights<()>,
    prefixes: Prefixes,
    rng: fastrand::Rng,
}

impl Aibrix {
    /// The rule, with nothing sent.
    pub fn new(site: &Site, seed: u64) -> Self {
        Self {
            flights: Flights::new(site.replicas),
            prefixes: Prefixes::new(site.replicas, INDEX_TOKENS / site.block_tokens),
            rng: fastrand::Rng::with_seed(seed),
        }
    }

    fn choose(&mut self, blocks: &[u64]) -> Option<usize> {
        let active: Vec<f64> = self.flights.active().iter().map(|count| *count as f64).collect();
        let (fewest, most) = active.iter().fold((f64::MAX, 0.0_f64), |(a, b), n| (a.min(*n), b.max(*n)));
        if most - fewest > 8.0 {
            return least(active, &mut self.rng);
        }
        let mean = active.iter().sum::<f64>() / active.len() as f64;
        let deviation = (active.iter().map(|n| (n - mean).powi(2)).sum::<f64>() / active.len() as f64).sqrt();
        // One number orders by match first and by requests in flight second: there are at most eight apart.
        let cost = |(replica, active): (usize, &f64)| match self.prefixes.matched(replica, blocks) {
            0 => f64::INFINITY,
            _ if *active > mean + deviation => f64::INFINITY,
            matched => *active - 1e6 * matched as f64,
        };
        let costs: Vec<f64> = active.iter().enumerate().map(cost).collect();
        if costs.iter().any(|cost| cost.is_finite()) {
            return least(costs, &mut self.rng);
        }
        least(active, &mut self.rng)
    }
}

impl Dispatcher for Aibrix {
    fn dispatch(&mut self, arrival: &Arrival<'_>, _replicas: &[Replica]) -> Option<usize> {
        let to = self.choose(&arrival.request.blocks)?;
        self.prefixes.insert(to, &arrival.request.blocks);
        self.flights.send(arrival.id, to, ());
        Some(to)
    }

    fn finished(&mut self, id: usize, _now: Time) {
        self.flights.end(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_load(loads: &[u64]) -> Aibrix {
        let mut aibrix = Aibrix::new(&Site { replicas: loads.len(), kv_tokens: 1, block_tokens: 16 }, 1);
        let all = loads.iter().enumerate().flat_map(|(to, load)| (0..*load).map(move |_| to));
        for (id, to) in all.enumerate() {
            aibrix.flights.send(id, to, ());
        }
        aibrix
    }

    #[test]
    fn the_longest_match_wins_and_the_idler_of_two_alike() {
        let mut aibrix = with_load(&[4, 4, 3, 4]);
        aibrix.prefixes.insert(0, &[1, 2]);
        assert_eq!(aibrix.choose(&[1, 2, 3]), Some(0));
        aibrix.prefixes.insert(2, &[1, 2]);
        assert_eq!(aibrix.choose(&[1, 2, 3]), Some(2));
        aibrix.prefixes.insert(1, &[1, 2, 3]);
        assert_eq!(aibrix.choose(&[1, 2, 3]), Some(1));
        assert_eq!(aibrix.choose(&[9]), Some(2), "no match: the fewest in flight");
    }

    #[test]
    fn a_match_is_passed_over_where_it_is_busier_than_a_deviation_above_the_mean() {
        let mut aibrix = with_load(&[8, 2, 2, 1]);
        aibrix.prefixes.insert(0, &[1, 2]);
        assert_eq!(aibrix.choose(&[1, 2]), Some(3));
        aibrix.prefixes.insert(1, &[1]);
        assert_eq!(aibrix.choose(&[1, 2]), Some(1), "the next best match");
    }

    #[test]
    fn more_than_eight_apart_only_the_count_matters() {
        let mut aibrix = with_load(&[0, 9, 8, 9]);
        aibrix.prefixes.insert(2, &[1]);
        assert_eq!(aibrix.choose(&[1]), Some(0));
        aibrix.flights.send(99, 0, ());
        assert_eq!(aibrix.choose(&[1]), Some(2));
    }
}
