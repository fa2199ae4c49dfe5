//! Policy of NVIDIA Dynamo's KV router, re-implemented from its published formula.
//!
//! Source: `ai-dynamo` 1.6.1, `docs/components/router/router-concepts.md` and
//! `lib/kv-router/src/scheduling/selector/default.rs`; the load is that of its active sequences.
//!
//! ```text
//! cost_i = max(0, active prefill_i + prompt - overlap_i) + active blocks_i + new blocks_i
//! the least wins, random among equals (temperature 0)
//! ```
//!
//! All in tokens here. Active prefill is what is uncached of the requests without a first token. Active
//! blocks are those of all requests in flight, a shared one counted once; new are the prompt's blocks that
//! are not active there. Overlap is what the replica has cached: an index of the size of its cache stands for
//! the engines' events. Read otherwise than in research/routing.md s.1.3, which adds all incoming blocks: that is the
//! same for every replica and would decide nothing; the shared ones off is kinder to the rule. Left out: host and disk tiers, growth of the answer, all that is off by default.

use std::collections::HashMap;

use plimsoll::clock::Time;
use plimsoll::sim::fleet::{Arrival, Dispatcher};
use plimsoll::sim::replica::Replica;

use super::flights::Flights;
use super::prefixes::Prefixes;
use super::{Site, least};

/// The rule.
pub struct Dynamo {
    loads: Vec<Load>,
    flights: Flights<Note>,
    prefixes: Prefixes,
    block_tokens: u64,
    rng: fastrand::Rng,
}

/// What is active on one replica.
#[derive(Clone, Default)]
struct Load {
    prefill_tokens: u64,
    /// How many requests use a block.
    blocks: HashMap<u64, u32>,
    /// Tokens of prompts outside whole blocks.
    private_tokens: u64,
}

/// What a request added.
struct Note {
    prefill_tokens: u64,
    blocks: Vec<u64>,
    private_tokens: u64,
}

impl Dynamo {
    /// The rule, with nothing sent.
    pub fn new(site: &Site, seed: u64) -> Self {
        Self {
            loads: vec![Load::default(); site.replicas],
            flights: Flights::new(site.replicas),
            prefixes: Prefixes::new(site.replicas, site.kv_tokens / site.block_tokens),
            block_tokens: site.block_tokens,
            rng: fastrand::Rng::with_seed(seed),
        }
    }

    fn cost(&self, replica: usize, blocks: &[u64], prompt_tokens: u64) -> u64 {
        let load = &self.loads[replica];
        let overlap = self.prefixes.matched(replica, blocks) * self.block_tokens;
        let active = load.blocks.len() as u64 * self.block_tokens + load.private_tokens;
        let shared = blocks.iter().filter(|block| load.blocks.contains_key(block)).count() as u64;
        let new = prompt_tokens.saturating_sub(shared * self.block_tokens);
        (load.prefill_tokens + prompt_tokens).saturating_sub(overlap) + active + new
    }
}

impl Dispatcher for Dynamo {
    fn dispatch(&mut self, arrival: &Arrival<'_>, _replicas: &[Replica]) -> Option<usize> {
        let (blocks, prompt_tokens) = (&arrival.request.blocks, arrival.request.prompt_tokens);
        let cost = |replica| self.cost(replica, blocks, prompt_tokens) as f64;
        let costs: Vec<f64> = (0..self.loads.len()).map(cost).collect();
        let to = least(costs, &mut self.rng)?;
        let cached = self.prefixes.matched(to, blocks) * self.block_tokens;
        let note = Note {
            prefill_tokens: prompt_tokens.saturating_sub(cached),
            blocks: blocks.clone(),
            private_tokens: prompt_tokens.saturating_sub(blocks.len() as u64 * self.block_tokens),
        };
        let load = &mut self.loads[to];
        load.prefill_tokens += note.prefill_tokens;
        load.private_tokens += note.private_tokens;
        for block in blocks {
            *load.blocks.entry(*block).or_default() += 1;
        }
        self.prefixes.insert(to, blocks);
        self.flights.send(arrival.id, to, note);
        Some(to)
    }

    fn answered(&mut self, id: usize, _now: Time) {
        if let Some((to, note)) = self.flights.find(id) {
            self.loads[to].prefill_tokens -= std::mem::take(&mut note.prefill_tokens);
        }
    }

    fn finished(&mut self, id: usize, now: Time) {
        self.answered(id, now);
        let Some((to, note)) = self.flights.end(id) else { return };
        let load = &mut self.loads[to];
        load.private_tokens -= note.private_tokens;
        for block in note.blocks {
            if let Some(users) = load.blocks.get_mut(&block) {
                *users -= 1;
                if *users == 0 {
                    load.blocks.remove(&block);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll::sim::trace::Request;
    use std::time::Duration;

    fn send(rule: &mut Dynamo, id: usize, prompt_tokens: u64, blocks: &[u64]) -> usize {
        let request =
            Request { at: Duration::ZERO, prompt_tokens, output_tokens: 1, blocks: blocks.to_vec() };
        let arrival = Arrival { id, request: &request, block_tokens: 10, now: Time::ZERO };
        rule.dispatch(&arrival, &[]).unwrap()
    }

    #[test]
    fn prefill_is_owed_until_the_first_token_and_blocks_until_the_last() {
        let mut rule = Dynamo::new(&Site { replicas: 2, kv_tokens: 1_000, block_tokens: 10 }, 1);
        let first = send(&mut rule, 0, 25, &[1, 2]);
        let (there, elsewhere) = (first, 1 - first);
        // 25 + 35 - 20 cached + 25 active + 15 new; 35 + 35 elsewhere.
        assert_eq!(rule.cost(there, &[1, 2, 3], 35), 80);
        assert_eq!(rule.cost(elsewhere, &[1, 2, 3], 35), 70);
        rule.answered(0, Time::ZERO);
        assert_eq!(rule.cost(there, &[1, 2, 3], 35), 55);
        rule.finished(0, Time::ZERO);
        assert_eq!(rule.cost(there, &[1, 2, 3], 35), 15 + 35);
    }

    #[test]
    fn a_block_in_use_twice_counts_once_and_nothing_is_left_at_the_end() {
        let mut rule = Dynamo::new(&Site { replicas: 1, kv_tokens: 1_000, block_tokens: 10 }, 1);
        send(&mut rule, 0, 25, &[1, 2]);
        send(&mut rule, 1, 20, &[1, 2]);
        // Prefill 25 + 0, active 20 + 5.
        assert_eq!(rule.cost(0, &[], 7), (25 + 7) + 25 + 7);
        rule.finished(1, Time::ZERO);
        rule.finished(0, Time::ZERO);
        assert_eq!(rule.cost(0, &[], 7), 14);
    }
}
