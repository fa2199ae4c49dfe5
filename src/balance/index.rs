//! The prefix index: which backend has probably cached how much of this prompt.
//!
//! Engines cache prompt prefixes in blocks and answer a prompt whose prefix they hold many times faster, but
//! they do not say what they hold. What they were sent, we know: the index remembers the block hashes of
//! dispatched prompts, per backend and as long as the backend's cache would (least recently used goes first).
//! Hashes are chained, so one hash stands for the whole prefix that ends in its block.
//!
//! All backends share one map from hash to a set of holders. A prompt is matched by walking its chain once,
//! narrowing the set of backends that held every block so far: O(blocks), whatever the number of backends.
//! Formula and evidence: research/routing.md s.7.2.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::num::NonZeroUsize;

use lru::LruCache;

/// Remembered prefixes of all backends of one upstream.
#[derive(Default)]
pub struct PrefixIndex {
    /// Where the holders of a block are found in `holders`, counted in rows.
    rows: HashMap<u64, u32, BuildHasherDefault<Identity>>,
    /// One bit per backend, `words` words per row.
    holders: Vec<u64>,
    words: usize,
    free: Vec<u32>,
    /// What each backend holds, in order of use.
    caches: Vec<LruCache<u64, (), BuildHasherDefault<Identity>>>,
}

impl PrefixIndex {
    /// How many leading blocks of `blocks` each backend holds, written to `matched` by slot.
    pub fn matched(&self, blocks: &[u64], matched: &mut Vec<u32>) {
        matched.clear();
        matched.resize(self.caches.len(), 0);
        let mut held = vec![u64::MAX; self.words];
        let mut depth = 0;
        for block in blocks {
            let Some(&row) = self.rows.get(block) else { break };
            let mut any = 0;
            for (word, (held, holders)) in held.iter_mut().zip(self.row(row)).enumerate() {
                if depth > 0 {
                    for_each_bit(word, *held & !holders, |slot| matched[slot] = depth);
                }
                *held &= holders;
                any |= *held;
            }
            if any == 0 {
                return;
            }
            depth += 1;
        }
        if depth > 0 {
            for (word, held) in held.iter().enumerate() {
                for_each_bit(word, *held, |slot| matched[slot] = depth);
            }
        }
    }

    /// Remembers that `slot` was sent `blocks`; returns how many leading ones it held before.
    pub fn insert(&mut self, slot: usize, blocks: &[u64]) -> u32 {
        self.make_room(slot);
        let mut held = 0;
        while held < blocks.len() && self.caches[slot].contains(&blocks[held]) {
            held += 1;
        }
        // The deepest first: engines free the tail of a chain before its head, so the head must be the most
        // recent.
        for block in blocks.iter().rev() {
            if self.caches[slot].promote(block) {
                continue;
            }
            if let Some((evicted, ())) = self.caches[slot].push(*block, ()) {
                self.release(evicted, slot);
            }
            self.hold(*block, slot);
        }
        held as u32
    }

    /// Sets how many blocks `slot` can hold; the least recently used ones beyond that are forgotten.
    pub fn resize(&mut self, slot: usize, blocks: NonZeroUsize) {
        self.make_room(slot);
        while self.caches[slot].len() > blocks.get() {
            if let Some((evicted, ())) = self.caches[slot].pop_lru() {
                self.release(evicted, slot);
            }
        }
        self.caches[slot].resize(blocks);
    }

    /// Forgets everything `slot` held: it was restarted, or is down.
    pub fn clear(&mut self, slot: usize) {
        if slot >= self.caches.len() {
            return;
        }
        while let Some((evicted, ())) = self.caches[slot].pop_lru() {
            self.release(evicted, slot);
        }
    }

    /// Blocks remembered for `slot`.
    pub fn held(&self, slot: usize) -> usize {
        self.caches.get(slot).map_or(0, LruCache::len)
    }

    fn row(&self, row: u32) -> &[u64] {
        let start = row as usize * self.words;
        &self.holders[start..start + self.words]
    }

    fn hold(&mut self, block: u64, slot: usize) {
        let row = match self.rows.get(&block) {
            Some(row) => *row,
            None => {
                let row = self.free.pop().unwrap_or_else(|| {
                    let row = (self.holders.len() / self.words) as u32;
                    self.holders.resize(self.holders.len() + self.words, 0);
                    row
                });
                self.rows.insert(block, row);
                row
            }
        };
        self.holders[row as usize * self.words + slot / 64] |= 1 << (slot % 64);
    }

    fn release(&mut self, block: u64, slot: usize) {
        let Some(&row) = self.rows.get(&block) else { return };
        let start = row as usize * self.words;
        self.holders[start + slot / 64] &= !(1 << (slot % 64));
        if self.row(row).iter().all(|word| *word == 0) {
            self.rows.remove(&block);
            self.free.push(row);
        }
    }

    /// Makes room for `slot`, widening every row when its bit would not fit.
    fn make_room(&mut self, slot: usize) {
        while self.caches.len() <= slot {
            self.caches.push(LruCache::with_hasher(DEFAULT_CAPACITY, BuildHasherDefault::default()));
        }
        let words = self.caches.len().div_ceil(64);
        if words > self.words {
            let old = std::mem::take(&mut self.holders);
            for row in old.chunks_exact(self.words.max(1)) {
                self.holders.extend_from_slice(row);
                self.holders.resize(self.holders.len() + words - row.len(), 0);
            }
            self.words = words;
        }
    }
}

/// 400,000 tokens of 4 bytes in blocks of 512 bytes: what an 8B model leaves free on an 80 GB GPU.
const DEFAULT_CAPACITY: NonZeroUsize = match NonZeroUsize::new(3_125) {
    Some(n) => n,
    None => NonZeroUsize::MIN,
};

/// Calls `f` with the slot of each bit set in `bits`, the word number `word` of a row.
fn for_each_bit(word: usize, mut bits: u64, mut f: impl FnMut(usize)) {
    while bits != 0 {
        f(word * 64 + bits.trailing_zeros() as usize);
        bits &= bits - 1;
    }
}

/// The keys are hashes already.
#[derive(Default)]
pub struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, n: u64) {
        self.0 = n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(seed: u64, n: u64) -> Vec<u64> {
        (0..n).map(|i| xxhash_rust::xxh3::xxh3_64_with_seed(&i.to_le_bytes(), seed)).collect()
    }

    fn matched(index: &PrefixIndex, blocks: &[u64]) -> Vec<u32> {
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
        assert_eq!(matched(&index, &blocks), [4, 0, 10]);
        assert_eq!(matched(&index, &blocks[..2]), [2, 0, 2]);
        assert_eq!(matched(&index, &chain(2, 10)), [0, 0, 0]);
        assert_eq!(index.insert(0, &blocks), 4);
        assert_eq!(matched(&index, &blocks), [10, 0, 10]);
    }

    #[test]
    fn the_tail_of_the_oldest_chain_is_forgotten_first() {
        let mut index = PrefixIndex::default();
        index.resize(0, NonZeroUsize::new(6).unwrap());
        let (old, new) = (chain(1, 4), chain(2, 4));
        index.insert(0, &old);
        index.insert(0, &new);
        assert_eq!(matched(&index, &old), [2]);
        assert_eq!(matched(&index, &new), [4]);
        assert_eq!(index.held(0), 6);
        index.resize(0, NonZeroUsize::new(3).unwrap());
        assert_eq!(matched(&index, &old), [0]);
        assert_eq!(matched(&index, &new), [3]);
    }

    #[test]
    fn a_cleared_backend_holds_nothing_and_costs_no_memory() {
        let mut index = PrefixIndex::default();
        index.insert(0, &chain(1, 50));
        index.insert(1, &chain(1, 20));
        index.clear(0);
        assert_eq!(matched(&index, &chain(1, 50)), [0, 20]);
        index.clear(1);
        index.clear(9);
        assert_eq!(index.rows.len(), 0);
        assert_eq!(index.free.len() * index.words, index.holders.len());
    }

    #[test]
    fn a_seventieth_backend_widens_the_sets_and_keeps_what_was_there() {
        let mut index = PrefixIndex::default();
        let blocks = chain(1, 3);
        index.insert(1, &blocks);
        index.insert(70, &blocks[..1]);
        let got = matched(&index, &blocks);
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
            assert_eq!(matched(&index, &probe), want, "step {step}; replay: PLIMSOLL_SEED={seed}");
        }
    }
}
