//! What each replica has been sent: its block hashes, the least recently used of which is forgotten first.
//!
//! Hashes are chained, so a block is held together with all that comes before it, and a prompt is matched by
//! walking its chain to the first block that is not there.

use std::num::NonZeroUsize;

use lru::LruCache;

/// The blocks sent to each replica.
pub struct Prefixes(Vec<LruCache<u64, ()>>);

impl Prefixes {
    /// None sent to any of `replicas`, each of which is remembered `blocks` of, at least one.
    pub fn new(replicas: usize, blocks: u64) -> Self {
        let blocks = usize::try_from(blocks).ok().and_then(NonZeroUsize::new).unwrap_or(NonZeroUsize::MIN);
        // Not `LruCache::new`, which reserves the whole capacity.
        let cache = || {
            let mut cache = LruCache::unbounded();
            cache.resize(blocks);
            cache
        };
        Self((0..replicas).map(|_| cache()).collect())
    }

    /// How many leading blocks of `blocks` were sent to `replica` before.
    pub fn matched(&self, replica: usize, blocks: &[u64]) -> u64 {
        blocks.iter().take_while(|block| self.0[replica].contains(block)).count() as u64
    }

    /// `blocks` are sent to `replica`.
    pub fn insert(&mut self, replica: usize, blocks: &[u64]) {
        // The deepest first, so that a chain is forgotten from its end.
        for block in blocks.iter().rev() {
            self.0[replica].put(*block, ());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_matches_as_far_as_an_earlier_one_went() {
        let mut prefixes = Prefixes::new(2, 10);
        prefixes.insert(1, &[1, 2, 3]);
        assert_eq!((prefixes.matched(0, &[1, 2]), prefixes.matched(1, &[1, 2, 9, 3])), (0, 2));
    }

    #[test]
    fn the_end_of_the_oldest_chain_is_forgotten_first() {
        let mut prefixes = Prefixes::new(1, 4);
        prefixes.insert(0, &[1, 2, 3]);
        prefixes.insert(0, &[7, 8]);
        assert_eq!((prefixes.matched(0, &[1, 2, 3]), prefixes.matched(0, &[7, 8])), (2, 2));
    }
}
