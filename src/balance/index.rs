//! The prefix index: which backend has probably cached how much of this prompt.
//!
//! Engines cache prompt prefixes in blocks and answer a prompt whose prefix they hold many times faster, but
//! they do not say what they hold. What they were sent, we know: the index remembers the block hashes of
//! dispatched prompts, per backend and as long as the backend's cache would (least recently used goes first).
//! Hashes are chained, so one hash stands for the whole prefix that ends in its block.
//!
//! All backends share one map from hash to a set of holders. A prompt is matched by walking its chain once,
//! narrowing the set of backends that held every block so far: O(blocks), whatever the number of backends.
//! The walk leaves a trail, so that remembering the prompt on the backend that was chosen looks up only what
//! the walk did not reach. Formula and evidence: research/routing.md s.7.2.
//!
//! A hash is found nowhere near the one before it, so a map of all blocks would cost a miss of the CPU's cache
//! for each of them. But one block follows the other in every prompt: the blocks of a prompt stand in
//! consecutive rows of a table, and only those that do not follow their predecessor are in the map.

mod recency;
mod spread;

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::num::NonZeroUsize;

use recency::Recency;
pub(crate) use spread::Spread;

/// Remembered prefixes of all backends of one upstream.
#[derive(Default)]
pub struct PrefixIndex {
    /// The row of each block that does not stand behind the block before it.
    listed: HashMap<u64, u32, BuildHasherDefault<Spread>>,
    /// By row: the block, then `words` words with one bit per backend.
    table: Vec<u64>,
    words: usize,
    /// By row: which of `USED`, `LISTED` and `QUEUED` it is.
    flags: Vec<u8>,
    /// Rows that were given up, some of which are used again.
    vacant: Vec<u32>,
    caches: Vec<Cache>,
    /// The rows of the leading blocks of the prompt that was matched last; empty after any change.
    trail: Vec<u32>,
    /// Scratch space of `matched`, kept to spare the allocation.
    holders: Vec<u64>,
}

/// The row stands for a block that some backend holds.
const USED: u8 = 1;
/// Its block is in the map.
const LISTED: u8 = 2;
/// It stands in the queue of vacant rows.
const QUEUED: u8 = 4;

/// What one backend holds.
struct Cache {
    capacity: usize,
    rows: Recency,
}

impl PrefixIndex {
    /// How many leading blocks of `blocks` each backend holds, written to `matched` by slot.
    pub fn matched(&mut self, blocks: &[u64], matched: &mut Vec<u32>) {
        matched.clear();
        matched.resize(self.caches.len(), 0);
        self.trail.clear();
        let mut held = std::mem::take(&mut self.holders);
        held.clear();
        held.resize(self.words, u64::MAX);
        for block in blocks {
            let Some(row) = self.find(*block, self.trail.last().copied()) else { break };
            let depth = self.trail.len() as u32;
            let mut any = 0;
            for (word, (held, holders)) in held.iter_mut().zip(self.holders(row)).enumerate() {
                if depth > 0 {
                    for_each_bit(word, *held & !holders, |slot| matched[slot] = depth);
                }
                *held &= holders;
                any |= *held;
            }
            if any == 0 {
                break;
            }
            self.trail.push(row);
        }
        let depth = self.trail.len() as u32;
        if depth > 0 {
            for (word, held) in held.iter().enumerate() {
                for_each_bit(word, *held, |slot| matched[slot] = depth);
            }
        }
        self.holders = held;
    }

    /// Remembers that `slot` was sent `blocks`; returns how many leading ones it held before.
    pub fn insert(&mut self, slot: usize, blocks: &[u64]) -> u32 {
        self.make_room(slot);
        let capacity = self.caches[slot].capacity;
        let blocks = &blocks[..blocks.len().min(capacity)];
        let mut trail = std::mem::take(&mut self.trail);
        let known = trail.iter().zip(blocks).take_while(|(row, block)| self.block(**row) == **block).count();
        trail.truncate(known);
        for block in &blocks[known..] {
            trail.push(self.open(*block, trail.last().copied()));
        }
        let held = self.caches[slot].rows.touch(&trail);
        for row in &trail[held..] {
            let at = self.start(*row) + 1 + slot / 64;
            self.table[at] |= 1 << (slot % 64);
        }
        trail.clear();
        self.trail = trail;
        self.shrink(slot, capacity);
        held as u32
    }

    /// Sets how many blocks `slot` can hold; the least recently used ones beyond that are forgotten.
    pub fn resize(&mut self, slot: usize, blocks: NonZeroUsize) {
        self.make_room(slot);
        self.caches[slot].capacity = blocks.get();
        self.shrink(slot, blocks.get());
    }

    /// Forgets everything `slot` held: it was restarted, or is down.
    pub fn clear(&mut self, slot: usize) {
        if slot < self.caches.len() {
            self.shrink(slot, 0);
        }
    }

    /// Blocks remembered for `slot`.
    pub fn held(&self, slot: usize) -> usize {
        self.caches.get(slot).map_or(0, |cache| cache.rows.held())
    }

    /// What `slot` holds, as chains of blocks, the least recently used first; of more than `most` blocks the most
    /// recently used ones. Inserted in this order elsewhere, they make the same of it.
    pub fn chains(&self, slot: usize, most: usize) -> Vec<Vec<u64>> {
        let Some(cache) = self.caches.get(slot) else { return Vec::new() };
        let mut left = most;
        let runs = cache.rows.latest().take_while(|run| {
            let fits = run.len() <= left;
            left = left.saturating_sub(run.len());
            fits
        });
        let mut chains: Vec<Vec<u64>> =
            runs.map(|run| run.iter().map(|row| self.block(*row)).collect()).collect();
        chains.reverse();
        chains
    }

    /// Where a row begins in the table.
    const fn start(&self, row: u32) -> usize {
        row as usize * (1 + self.words)
    }

    fn block(&self, row: u32) -> u64 {
        self.table[self.start(row)]
    }

    fn holders(&self, row: u32) -> &[u64] {
        let start = self.start(row) + 1;
        &self.table[start..start + self.words]
    }

    /// The row of `block`, whose predecessor has the row `before`.
    fn find(&self, block: u64, before: Option<u32>) -> Option<u32> {
        let next = before.map(|row| row + 1);
        let here = |row: &u32| {
            self.flags.get(*row as usize).is_some_and(|flags| flags & USED != 0) && self.block(*row) == block
        };
        next.filter(here).or_else(|| self.listed.get(&block).copied())
    }

    /// The row of `block`, a new one if nobody holds it yet: the one behind its predecessor's if it is vacant.
    fn open(&mut self, block: u64, before: Option<u32>) -> u32 {
        if let Some(row) = self.find(block, before) {
            return row;
        }
        let end = self.flags.len() as u32;
        let vacant = |flags: &[u8], row: &u32| flags.get(*row as usize).is_none_or(|flags| flags & USED == 0);
        let next = before.map(|row| row + 1).filter(|row| vacant(&self.flags, row));
        let row = next.unwrap_or_else(|| {
            loop {
                let Some(row) = self.vacant.pop() else { break end };
                self.flags[row as usize] &= !QUEUED;
                if vacant(&self.flags, &row) {
                    break row;
                }
            }
        });
        if row == end {
            self.flags.push(0);
            self.table.resize(self.table.len() + 1 + self.words, 0);
        }
        let start = self.start(row);
        self.table[start] = block;
        self.flags[row as usize] |= USED;
        if next.is_none() {
            self.flags[row as usize] |= LISTED;
            self.listed.insert(block, row);
        }
        row
    }

    /// Lets `slot` forget what it used least recently, until `most` blocks are left.
    fn shrink(&mut self, slot: usize, most: usize) {
        self.trail.clear();
        let (table, width, word, bit) = (&mut self.table, 1 + self.words, slot / 64, 1 << (slot % 64));
        self.caches[slot].rows.shrink(most, |row| {
            let start = row as usize * width;
            let holders = &mut table[start + 1..start + width];
            let held = holders[word] & bit != 0;
            holders[word] &= !bit;
            if !held || holders.iter().any(|word| *word != 0) {
                return;
            }
            let flags = &mut self.flags[row as usize];
            if *flags & LISTED != 0 {
                self.listed.remove(&table[start]);
            }
            if *flags & QUEUED == 0 {
                self.vacant.push(row);
            }
            *flags = QUEUED;
        });
    }

    /// Makes room for `slot`, widening every row when its bit would not fit.
    fn make_room(&mut self, slot: usize) {
        while self.caches.len() <= slot {
            self.caches.push(Cache { capacity: DEFAULT_CAPACITY, rows: Recency::default() });
        }
        let words = self.caches.len().div_ceil(64);
        if words > self.words {
            let old = std::mem::take(&mut self.table);
            for row in old.chunks_exact(1 + self.words) {
                self.table.extend_from_slice(row);
                self.table.resize(self.table.len() + words - self.words, 0);
            }
            self.words = words;
        }
    }
}

/// 400,000 tokens of 4 bytes in blocks of 512 bytes: what an 8B model leaves free on an 80 GB GPU.
const DEFAULT_CAPACITY: usize = 3_125;

/// Calls `f` with the slot of each bit set in `bits`, the word number `word` of a row.
fn for_each_bit(word: usize, mut bits: u64, mut f: impl FnMut(usize)) {
    while bits != 0 {
        f(word * 64 + bits.trailing_zeros() as usize);
        bits &= bits - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(seed: u64, n: u64) -> Vec<u64> {
        (0..n).map(|i| xxhash_rust::xxh3::xxh3_64_with_seed(&i.to_le_bytes(), seed)).collect()
    }

    fn matched(index: &mut PrefixIndex, blocks: &[u64]) -> Vec<u32> {
        let mut out = Vec::new();
        index.matched(blocks, &mut out);
        out
    }

    #[test]
    fn each_backend_is_credited_with_the_prefix_it_was_sent() {
        let mut index = PrefixIndex::default();
        let blocks = chain(1, 10);
        assert_eq!(index.insert(0, &blocks[..4]), 0);
        assert_eq!(index.insert(2, &blocks), 0);
        assert_eq!(matched(&mut index, &blocks), [4, 0, 10]);
        assert_eq!(matched(&mut index, &blocks[..2]), [2, 0, 2]);
        assert_eq!(matched(&mut index, &chain(2, 10)), [0, 0, 0]);
        assert_eq!(index.insert(0, &blocks), 4);
        assert_eq!(matched(&mut index, &blocks), [10, 0, 10]);
    }

    #[test]
    fn the_tail_of_the_oldest_chain_is_forgotten_first() {
        let mut index = PrefixIndex::default();
        index.resize(0, NonZeroUsize::new(6).unwrap());
        let (old, new) = (chain(1, 4), chain(2, 4));
        index.insert(0, &old);
        index.insert(0, &new);
        assert_eq!(matched(&mut index, &old), [2]);
        assert_eq!(matched(&mut index, &new), [4]);
        assert_eq!(index.held(0), 6);
        index.resize(0, NonZeroUsize::new(3).unwrap());
        assert_eq!(matched(&mut index, &old), [0]);
        assert_eq!(matched(&mut index, &new), [3]);
    }

    #[test]
    fn a_cleared_backend_holds_nothing_and_costs_no_memory() {
        let mut index = PrefixIndex::default();
        index.insert(0, &chain(1, 50));
        index.insert(1, &chain(1, 20));
        index.clear(0);
        assert_eq!(matched(&mut index, &chain(1, 50)), [0, 20]);
        index.clear(1);
        index.clear(9);
        assert_eq!((index.listed.len(), index.vacant.len()), (0, 50));
        for seed in 2..100 {
            index.insert(1, &chain(seed, 50));
            index.clear(1);
        }
        assert_eq!((index.flags.len(), index.table.len(), index.vacant.len()), (50, 100, 50));
    }

    #[test]
    fn a_seventieth_backend_widens_the_sets_and_keeps_what_was_there() {
        let mut index = PrefixIndex::default();
        let blocks = chain(1, 3);
        index.insert(1, &blocks);
        index.insert(70, &blocks[..1]);
        let got = matched(&mut index, &blocks);
        assert_eq!((got[1], got[70], got[5]), (3, 1, 0));
    }

    #[test]
    fn a_random_history_agrees_with_a_plain_list_per_backend() {
        let seed = std::env::var("PLIMSOLL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(42);
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut index = PrefixIndex::default();
        let mut model: Vec<Vec<u64>> = vec![Vec::new(); 5]; // most recently used last
        for slot in 0..5 {
            index.resize(slot, NonZeroUsize::new(20).unwrap());
        }
        for step in 0..5_000 {
            let slot = rng.usize(..5);
            let blocks = chain(rng.u64(..12), rng.u64(1..15));
            if rng.u8(..50) == 0 {
                index.clear(slot);
                model[slot].clear();
            } else {
                index.insert(slot, &blocks);
                for block in blocks.iter().rev() {
                    model[slot].retain(|b| b != block);
                    model[slot].push(*block);
                }
                let excess = model[slot].len().saturating_sub(20);
                model[slot].drain(..excess);
            }
            let probe = chain(rng.u64(..12), 15);
            let want: Vec<u32> = model
                .iter()
                .map(|held| probe.iter().take_while(|b| held.contains(b)).count() as u32)
                .collect();
            assert_eq!(matched(&mut index, &probe), want, "step {step}; replay: PLIMSOLL_SEED={seed}");
        }
    }
}
