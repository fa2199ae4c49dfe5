//! The KV memory of one engine: shared prefix blocks with reference counts, and an LRU list of those nobody
//! uses.
//!
//! A block that loses its last user stays, because its content may be asked for again; it goes when the
//! memory is needed, the least recently used first, and of one sequence the tail before the head (a head
//! without its tail is useful, a tail without its head is not). Tokens outside whole prompt blocks (the rest
//! of the prompt and what was generated) are private to their sequence and are only counted. Invariant: `used
//! + idle * block_tokens <= capacity`.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use crate::balance::index::Spread;

/// End of the list of idle blocks.
const NIL: u32 = u32::MAX;

#[derive(Clone, Debug)]
pub(super) struct BlockCache {
    /// Tokens that fit.
    capacity: u64,
    block_tokens: u64,
    /// Tokens of blocks in use, each counted once, and of private tokens.
    used: u64,
    /// Blocks without a user.
    idle: u64,
    index: HashMap<u64, u32, BuildHasherDefault<Spread>>,
    entries: Vec<Entry>,
    vacant: Vec<u32>,
    oldest: u32,
    newest: u32,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    block: u64,
    users: u32,
    /// Neighbours in the list of idle blocks; meaningless while there are users.
    older: u32,
    newer: u32,
}

impl BlockCache {
    pub(super) fn new(capacity: u64, block_tokens: u64) -> Self {
        Self {
            capacity,
            block_tokens,
            used: 0,
            idle: 0,
            index: HashMap::default(),
            entries: Vec::new(),
            vacant: Vec::new(),
            oldest: NIL,
            newest: NIL,
        }
    }

    /// Tokens in use by sequences; idle blocks do not count.
    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// Takes memory for a sequence of `blocks` followed by `private` tokens. Says how many leading blocks, at
    /// most `limit`, were there already, or nothing (and takes nothing) if the sequence does not fit beside
    /// the others.
    pub(super) fn admit(&mut self, blocks: &[u64], limit: usize, private: u64) -> Option<usize> {
        let mut matched = None;
        let mut added = private;
        for (position, block) in blocks.iter().enumerate() {
            match self.index.get(block) {
                Some(&at) if self.entries[at as usize].users > 0 => continue,
                Some(_) => {}
                None => matched = matched.or(Some(position)),
            }
            added += self.block_tokens;
        }
        if self.used + added > self.capacity {
            return None;
        }
        for block in blocks {
            self.hold(*block);
        }
        self.used += private;
        self.evict_surplus();
        Some(matched.unwrap_or(blocks.len()).min(limit))
    }

    /// Takes one more private token; `false` if every token is in use.
    pub(super) fn grow(&mut self) -> bool {
        let fits = self.used < self.capacity;
        if fits {
            self.used += 1;
            self.evict_surplus();
        }
        fits
    }

    /// Gives back what a sequence took. Its first `computed` blocks stay for others to find; the rest holds
    /// nothing.
    pub(super) fn release(&mut self, blocks: &[u64], computed: usize, private: u64) {
        self.used -= private;
        for (position, block) in blocks.iter().enumerate().rev() {
            let Some(&at) = self.index.get(block) else { continue };
            let entry = &mut self.entries[at as usize];
            entry.users -= 1;
            if entry.users > 0 {
                continue;
            }
            self.used -= self.block_tokens;
            if position < computed {
                self.link_newest(at);
            } else {
                self.forget(at);
            }
        }
    }

    /// Forgets every block nobody uses.
    pub(super) fn clear(&mut self) {
        while self.oldest != NIL {
            self.evict_oldest();
        }
    }

    fn hold(&mut self, block: u64) {
        if let Some(&at) = self.index.get(&block) {
            if self.entries[at as usize].users == 0 {
                self.unlink(at);
                self.used += self.block_tokens;
            }
            self.entries[at as usize].users += 1;
            return;
        }
        let entry = Entry { block, users: 1, older: NIL, newer: NIL };
        let at = match self.vacant.pop() {
            Some(at) => {
                self.entries[at as usize] = entry;
                at
            }
            None => {
                self.entries.push(entry);
                (self.entries.len() - 1) as u32
            }
        };
        self.index.insert(block, at);
        self.used += self.block_tokens;
    }

    fn evict_surplus(&mut self) {
        while self.used + self.idle * self.block_tokens > self.capacity && self.oldest != NIL {
            self.evict_oldest();
        }
    }

    fn evict_oldest(&mut self) {
        let at = self.oldest;
        self.unlink(at);
        self.forget(at);
    }

    fn forget(&mut self, at: u32) {
        self.index.remove(&self.entries[at as usize].block);
        self.vacant.push(at);
    }

    fn link_newest(&mut self, at: u32) {
        let older = self.newest;
        let entry = &mut self.entries[at as usize];
        (entry.older, entry.newer) = (older, NIL);
        match older {
            NIL => self.oldest = at,
            _ => self.entries[older as usize].newer = at,
        }
        self.newest = at;
        self.idle += 1;
    }

    fn unlink(&mut self, at: u32) {
        let Entry { older, newer, .. } = self.entries[at as usize];
        match older {
            NIL => self.oldest = newer,
            _ => self.entries[older as usize].newer = newer,
        }
        match newer {
            NIL => self.newest = older,
            _ => self.entries[newer as usize].older = older,
        }
        self.idle -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_two_sequences_share_is_counted_once() {
        let mut cache = BlockCache::new(1000, 10);
        assert_eq!(cache.admit(&[1, 2], 9, 5), Some(0));
        assert_eq!(cache.admit(&[1, 2, 3], 9, 0), Some(2));
        assert_eq!(cache.used(), 35);
        cache.release(&[1, 2], 2, 5);
        assert_eq!(cache.used(), 30);
    }

    #[test]
    fn the_tail_of_the_least_recently_used_sequence_goes_first() {
        let mut cache = BlockCache::new(40, 10);
        cache.admit(&[1, 2], 9, 0);
        cache.release(&[1, 2], 2, 0);
        cache.admit(&[3, 4], 9, 0);
        cache.release(&[3, 4], 2, 0);
        assert_eq!(cache.admit(&[5], 9, 0), Some(0), "takes the place of block 2");
        cache.release(&[5], 1, 0);
        assert_eq!(cache.admit(&[1, 2], 9, 0), Some(1), "block 1 is still there");
        assert_eq!(cache.admit(&[3], 9, 0), Some(1));
    }

    #[test]
    fn what_does_not_fit_takes_nothing() {
        let mut cache = BlockCache::new(40, 10);
        assert_eq!(cache.admit(&[1, 2], 9, 5), Some(0));
        assert_eq!(cache.admit(&[3], 9, 6), None);
        assert_eq!(cache.used(), 25);
        assert_eq!(cache.admit(&[3], 9, 5), Some(0));
        assert!(!cache.grow());
    }

    #[test]
    fn blocks_that_were_never_computed_are_not_found_again() {
        let mut cache = BlockCache::new(100, 10);
        cache.admit(&[1, 2, 3], 9, 0);
        cache.release(&[1, 2, 3], 1, 0);
        assert_eq!(cache.admit(&[1, 2, 3], 9, 0), Some(1));
    }

    #[test]
    fn a_cleared_cache_forgets_idle_blocks_and_keeps_those_in_use() {
        let mut cache = BlockCache::new(100, 10);
        cache.admit(&[1], 9, 0);
        cache.admit(&[2], 9, 0);
        cache.release(&[2], 1, 0);
        cache.clear();
        assert_eq!(cache.admit(&[2], 9, 0), Some(0));
        assert_eq!(cache.admit(&[1], 9, 0), Some(1));
    }
}
