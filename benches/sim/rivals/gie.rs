//! Policy of the Gateway API Inference Extension and llm-d, default profile, re-implemented from its
//! published formula.
//!
//! Source: `kubernetes-sigs/gateway-api-inference-extension` 84436a9, `pkg/epp/config/loader/defaults.go`
//! (weights), `pkg/epp/framework/plugins/scheduling/scorer/{queuedepth,kvcacheutilization,prefix}` and
//! `.../requestcontrol/dataproducer/approximateprefix` (256 blocks of 16 tokens; the same in
//! `llm-d/llm-d-router` ebab687).
//!
//! ```text
//! score_i = 2 * (most waiting - waiting_i) / (most waiting - least waiting)     1 for all if they are equal
//!         + 2 * (1 - KV usage_i)
//!         + 3 * matched blocks_i / blocks of the prompt             of 16 tokens, within its first 4,096
//! the greatest wins, random among equals
//! ```
//!
//! Waiting and KV usage are the engine's, as of the last scrape (every 50 ms by default); nothing is counted
//! between scrapes. The index is sized like the engine's cache, from `cache_config_info`. It is as fine as the
//! trace's blocks here, the share of a prompt that matches as fine as the original's. Left out: the saturation
//! filter, which sheds load and does not choose.

use plimsoll::clock::Time;
use plimsoll::sim::fleet::{Arrival, Dispatcher};
use plimsoll::sim::replica::{Replica, Stats};

use super::prefixes::Prefixes;
use super::{Site, least};

/// Tokens of a prompt that the approximate prefix index looks at.
pub const INDEXED_TOKENS: u64 = 256 * BLOCK_TOKENS;
const BLOCK_TOKENS: u64 = 16;

/// The rule.
pub struct Gie {
    /// The last metrics page of each replica.
    pages: Vec<Stats>,
    prefixes: Prefixes,
    /// Blocks of a prompt that are looked at.
    depth: usize,
    block_tokens: u64,
    rng: fastrand::Rng,
}

impl Gie {
    /// The rule, before its first scrape.
    pub fn new(site: &Site, seed: u64) -> Self {
        Self {
            pages: vec![Stats::default(); site.replicas],
            prefixes: Prefixes::new(site.replicas, site.kv_tokens / site.block_tokens),
            depth: (INDEXED_TOKENS / site.block_tokens) as usize,
            block_tokens: site.block_tokens,
            rng: fastrand::Rng::with_seed(seed),
        }
    }

    fn scores(&self, blocks: &[u64], prompt_tokens: u64) -> Vec<f64> {
        let blocks_of = |tokens: u64| (tokens.min(INDEXED_TOKENS) / BLOCK_TOKENS) as f64;
        let waiting = || self.pages.iter().map(|page| page.waiting);
        let (least, most) = (waiting().min().unwrap_or(0), waiting().max().unwrap_or(0));
        let score = |(replica, page): (usize, &Stats)| {
            let queue =
                if most == least { 1.0 } else { (most - page.waiting) as f64 / (most - least) as f64 };
            let matched = self.prefixes.matched(replica, blocks) * self.block_tokens;
            let prefix = blocks_of(matched) / blocks_of(prompt_tokens).max(1.0);
            2.0 * queue + 2.0 * (1.0 - page.kv_usage) + 3.0 * prefix
        };
        self.pages.iter().enumerate().map(score).collect()
    }
}

impl Dispatcher for Gie {
    fn dispatch(&mut self, arrival: &Arrival<'_>, _replicas: &[Replica]) -> Option<usize> {
        let blocks = &arrival.request.blocks;
        let blocks = &blocks[..blocks.len().min(self.depth)];
        let costs = self.scores(blocks, arrival.request.prompt_tokens).into_iter().map(|score| -score);
        let to = least(costs, &mut self.rng)?;
        self.prefixes.insert(to, blocks);
        Some(to)
    }

    fn scraped(&mut self, replica: usize, stats: &Stats, _now: Time) {
        self.pages[replica] = *stats;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SITE: Site = Site { replicas: 3, kv_tokens: 10_000, block_tokens: 512 };

    #[test]
    fn the_score_is_the_weighted_sum_of_queue_memory_and_prefix() {
        let mut gie = Gie::new(&SITE, 1);
        for (replica, waiting, kv_usage) in [(0, 0, 0.5), (1, 1, 0.25), (2, 4, 0.0)] {
            gie.scraped(replica, &Stats { waiting, kv_usage, ..Stats::default() }, Time::ZERO);
        }
        gie.prefixes.insert(2, &[1, 2]);
        // 2 * 4/4 + 2 * .5; 2 * 3/4 + 2 * .75; 0 + 2 + 3 * 64/128.
        assert_eq!(gie.scores(&[1, 2, 3, 4], 4 * 512 + 5), [3.0, 3.0, 3.5]);
        // 64 of at most 256.
        assert_eq!(gie.scores(&[1, 2, 3, 4], 100_000)[2], 2.75);
    }

    #[test]
    fn equal_queues_score_one_and_only_the_first_4096_tokens_count() {
        let gie = Gie::new(&SITE, 1);
        assert_eq!(gie.scores(&[], 10), [4.0; 3]);
        assert_eq!(gie.depth, 8);
    }
}
