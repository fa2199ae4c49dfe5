//! Policy of SMG's (the SGLang gateway's) `cache_aware`, re-implemented from its published formula.
//!
//! Source: SMG 73da68c, `model_gateway/src/policies/cache_aware.rs`, with the defaults of its command line.
//!
//! ```text
//! if most - least > 64 and most > 1.5 * least:   the replica with the fewest requests in flight
//! else if matched / prompt > 0.3:                the owner of the longest match in the tree
//! else:                                          the replica with the fewest requests in flight
//! ```
//!
//! In flight is the router's own count. Among equals the one that has been sent the fewest requests. The
//! owner of a match is the last that was sent it. The tree holds 67,108,864 characters per replica (at four
//! to a token), evicted here one by one instead of every 120 s.

use std::num::NonZeroUsize;

use lru::LruCache;
use plimsoll::clock::Time;
use plimsoll::sim::fleet::{Arrival, Dispatcher};
use plimsoll::sim::replica::Replica;

use super::Site;
use super::flights::Flights;

/// Characters that the tree holds per replica.
const TREE_CHARS: u64 = 67_108_864;
const CHARS_PER_TOKEN: u64 = 4;

/// The rule.
pub struct Smg {
    /// Who was last sent a block.
    tree: LruCache<u64, usize>,
    flights: Flights<()>,
    /// Requests sent to each.
    processed: Vec<u64>,
    block_tokens: u64,
}

impl Smg {
    /// The rule, with an empty tree. It draws nothing.
    pub fn new(site: &Site, _seed: u64) -> Self {
        let blocks = TREE_CHARS / CHARS_PER_TOKEN / site.block_tokens * site.replicas as u64;
        let mut tree = LruCache::unbounded();
        tree.resize(NonZeroUsize::new(blocks as usize).unwrap_or(NonZeroUsize::MIN));
        Self {
            tree,
            flights: Flights::new(site.replicas),
            processed: vec![0; site.replicas],
            block_tokens: site.block_tokens,
        }
    }

    /// The owner of the longest match, and how many blocks that is.
    fn longest(&self, blocks: &[u64]) -> Option<(usize, u64)> {
        let held = blocks.iter().map_while(|block| self.tree.peek(block));
        held.zip(1..).last().map(|(owner, depth)| (*owner, depth))
    }

    fn choose(&self, blocks: &[u64], prompt_tokens: u64) -> Option<usize> {
        let active = self.flights.active();
        let fewest = (0..active.len()).min_by_key(|&i| (active[i], self.processed[i]))?;
        let (least, most) = (active[fewest], active.iter().max().copied()?);
        if most - least > 64 && most as f64 > 1.5 * least as f64 {
            return Some(fewest);
        }
        let owner = self
            .longest(blocks)
            .filter(|(_, depth)| (depth * self.block_tokens) as f64 / prompt_tokens.max(1) as f64 > 0.3);
        Some(owner.map_or(fewest, |(owner, _)| owner))
    }
}

impl Dispatcher for Smg {
    fn dispatch(&mut self, arrival: &Arrival<'_>, _replicas: &[Replica]) -> Option<usize> {
        let blocks = &arrival.request.blocks;
        let to = self.choose(blocks, arrival.request.prompt_tokens)?;
        for block in blocks.iter().rev() {
            self.tree.put(*block, to);
        }
        self.processed[to] += 1;
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

    const SITE: Site = Site { replicas: 2, kv_tokens: 100_000, block_tokens: 10 };

    fn with_load(loads: [u64; 2]) -> Smg {
        let mut smg = Smg::new(&SITE, 1);
        let mut id = 0;
        for (to, load) in loads.into_iter().enumerate() {
            for _ in 0..load {
                smg.flights.send(id, to, ());
                id += 1;
            }
        }
        smg.tree.put(1, 0);
        smg.tree.put(2, 0);
        smg
    }

    #[test]
    fn a_match_above_three_tenths_goes_to_its_owner_and_any_other_to_the_idler() {
        let smg = with_load([5, 2]);
        assert_eq!(smg.choose(&[1, 2, 3], 60), Some(0), "20 of 60");
        assert_eq!(smg.choose(&[1, 2, 3], 70), Some(1), "20 of 70");
        assert_eq!(smg.choose(&[9], 10), Some(1));
    }

    #[test]
    fn the_cache_is_forgotten_only_when_both_thresholds_are_exceeded() {
        assert_eq!(with_load([66, 1]).choose(&[1, 2], 20), Some(1));
        assert_eq!(with_load([65, 1]).choose(&[1, 2], 20), Some(0), "64 apart");
        assert_eq!(with_load([265, 200]).choose(&[1, 2], 20), Some(0), "1.3 times");
    }

    #[test]
    fn among_equals_the_one_that_was_sent_less_comes_first() {
        let mut smg = with_load([1, 1]);
        smg.processed = vec![4, 3];
        assert_eq!(smg.choose(&[], 10), Some(1));
    }
}
