//! Policy of llm-d 0.10's token-load scorer, re-implemented from its published formula.
//!
//! Source: `llm-d/llm-d-router` ebab687, `pkg/epp/framework/plugins/scheduling/scorer/tokenload/token_load.go`
//! and `.../requestcontrol/dataproducer/inflightload/producer.go`.
//!
//! ```text
//! tokens_i = sum of u_r over the requests on i without a first chunk + u_i of the new one
//! u_i      = prompt tokens - tokens of matched blocks on i            of the first 4,096 tokens
//! score_i  = 1 - min(1, tokens_i / 4,194,304)                         the greatest wins, random among equals
//! ```
//!
//! As the only scorer of its profile. The estimate of output tokens is off, as it is by default.

use plimsoll::clock::Time;
use plimsoll::sim::fleet::{Arrival, Dispatcher};
use plimsoll::sim::replica::Replica;

use super::flights::Flights;
use super::gie::INDEXED_TOKENS;
use super::prefixes::Prefixes;
use super::{Site, least};

/// Tokens at which the score is 0.
const FULL: u64 = 4_194_304;

/// The rule.
pub struct TokenLoad {
    /// Uncached tokens of each replica's requests without a first chunk.
    pending: Vec<u64>,
    flights: Flights<u64>,
    prefixes: Prefixes,
    block_tokens: u64,
    rng: fastrand::Rng,
}

impl TokenLoad {
    /// The rule, with nothing sent.
    pub fn new(site: &Site, seed: u64) -> Self {
        Self {
            pending: vec![0; site.replicas],
            flights: Flights::new(site.replicas),
            prefixes: Prefixes::new(site.replicas, site.kv_tokens / site.block_tokens),
            block_tokens: site.block_tokens,
            rng: fastrand::Rng::with_seed(seed),
        }
    }
}

impl Dispatcher for TokenLoad {
    fn dispatch(&mut self, arrival: &Arrival<'_>, _replicas: &[Replica]) -> Option<usize> {
        let blocks = &arrival.request.blocks;
        let blocks = &blocks[..blocks.len().min((INDEXED_TOKENS / self.block_tokens) as usize)];
        let uncached = |replica| {
            let matched = self.prefixes.matched(replica, blocks) * self.block_tokens;
            arrival.request.prompt_tokens.saturating_sub(matched)
        };
        let costs =
            self.pending.iter().enumerate().map(|(i, pending)| (pending + uncached(i)).min(FULL) as f64);
        let to = least(costs, &mut self.rng)?;
        let charged = uncached(to);
        self.prefixes.insert(to, blocks);
        self.pending[to] += charged;
        self.flights.send(arrival.id, to, charged);
        Some(to)
    }

    fn answered(&mut self, id: usize, _now: Time) {
        if let Some((to, charged)) = self.flights.find(id) {
            self.pending[to] -= std::mem::take(charged);
        }
    }

    fn finished(&mut self, id: usize, now: Time) {
        self.answered(id, now);
        self.flights.end(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll::sim::trace::Request;
    use std::time::Duration;

    const SITE: Site = Site { replicas: 2, kv_tokens: 100_000, block_tokens: 512 };

    fn send(rule: &mut TokenLoad, id: usize, prompt_tokens: u64, blocks: &[u64]) -> usize {
        let request =
            Request { at: Duration::ZERO, prompt_tokens, output_tokens: 1, blocks: blocks.to_vec() };
        let arrival = Arrival { id, request: &request, block_tokens: 512, now: Time::ZERO };
        rule.dispatch(&arrival, &[]).unwrap()
    }

    #[test]
    fn tokens_are_owed_until_the_first_chunk_and_cached_ones_never() {
        let mut rule = TokenLoad::new(&SITE, 1);
        let first = send(&mut rule, 0, 2_000, &[1, 2, 3]);
        assert_eq!(rule.pending[first], 2_000);
        // 2,000 + 500 - 0 there, 1,900 here.
        assert_eq!(send(&mut rule, 1, 1_900, &[]), 1 - first);
        rule.answered(0, Time::ZERO);
        rule.finished(0, Time::ZERO);
        // 3 * 512 of them are cached there.
        assert_eq!(send(&mut rule, 2, 2_000, &[1, 2, 3]), first);
        assert_eq!(rule.pending[first], 2_000 - 1_536);
        rule.finished(2, Time::ZERO);
        rule.finished(1, Time::ZERO);
        assert_eq!(rule.pending, [0, 0]);
    }

    #[test]
    fn a_prefix_beyond_4096_tokens_is_not_seen() {
        let mut rule = TokenLoad::new(&SITE, 1);
        let blocks: Vec<u64> = (1..=20).collect();
        let first = send(&mut rule, 0, 20 * 512, &blocks);
        rule.finished(0, Time::ZERO);
        assert_eq!(send(&mut rule, 1, 20 * 512, &blocks), first);
        assert_eq!(rule.pending[first], 12 * 512);
    }
}
