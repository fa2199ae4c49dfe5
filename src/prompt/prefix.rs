//! Prefix blocks: chained hashes by which two prompts are known to begin alike.
//!
//! An engine reuses the KV cache of a prompt's longest cached beginning, in blocks of tokens. The proxy
//! mirrors that in blocks of 512 bytes of prompt text, about 128 tokens (research/routing.md s.7.2), of which
//! only whole ones count. The hash of a block covers everything before it:
//!
//! ```text
//! h[0] = xxh3(block[0], seed = partition)        h[i] = xxh3(block[i], seed = h[i - 1])
//! ```
//!
//! so that `h[i]` is equal for two prompts exactly if they agree in their first `512 (i + 1)` bytes and in
//! their partition: model, cache salt, adapter. A prefix index looks up single numbers, never text.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Bytes of prompt text per block.
pub const BLOCK_BYTES: usize = 512;
/// The most blocks of one prompt: what lies beyond 512 KiB neither adds to the choice nor is worth its
/// hashing.
pub const MAX_BLOCKS: usize = 1_024;

/// Turns text into block hashes while it streams by.
#[derive(Clone, Debug)]
pub struct BlockHasher {
    chain: u64,
    blocks: Vec<u64>,
    partial: [u8; BLOCK_BYTES],
    filled: usize,
}

impl BlockHasher {
    /// A hasher for prompts of one `partition`: hashes of different partitions differ from the first block
    /// on.
    pub const fn new(partition: u64) -> Self {
        Self { chain: partition, blocks: Vec::new(), partial: [0; BLOCK_BYTES], filled: 0 }
    }

    /// Takes the next piece of the text; how the text is cut into pieces does not matter.
    pub fn feed(&mut self, mut piece: &[u8]) {
        while !piece.is_empty() && self.blocks.len() < MAX_BLOCKS {
            if self.filled == 0
                && let Some((block, rest)) = piece.split_first_chunk::<BLOCK_BYTES>()
            {
                self.close(block);
                piece = rest;
                continue;
            }
            let taken = piece.len().min(BLOCK_BYTES - self.filled);
            self.partial[self.filled..self.filled + taken].copy_from_slice(&piece[..taken]);
            self.filled += taken;
            piece = &piece[taken..];
            if self.filled == BLOCK_BYTES {
                let block = self.partial;
                self.close(&block);
                self.filled = 0;
            }
        }
    }

    /// The hashes of the whole blocks, at most [`MAX_BLOCKS`].
    pub fn finish(self) -> Vec<u64> {
        self.blocks
    }

    fn close(&mut self, block: &[u8; BLOCK_BYTES]) {
        self.chain = xxh3_64_with_seed(block, self.chain);
        self.blocks.push(self.chain);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(partition: u64, pieces: &[&[u8]]) -> Vec<u64> {
        let mut hasher = BlockHasher::new(partition);
        pieces.iter().for_each(|piece| hasher.feed(piece));
        hasher.finish()
    }

    #[test]
    fn only_whole_blocks_count() {
        assert!(blocks(1, &[&[b'x'; 511]]).is_empty());
        assert_eq!(blocks(1, &[&[b'x'; 512]]).len(), 1);
        assert_eq!(blocks(1, &[&[b'x'; 1_535]]).len(), 2);
    }

    #[test]
    fn the_hashes_do_not_depend_on_how_the_text_is_cut() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let text: Vec<u8> = (0..5_000).map(|_| rng.u8(..)).collect();
        let whole = blocks(7, &[&text]);
        for _ in 0..200 {
            let mut hasher = BlockHasher::new(7);
            let mut rest = text.as_slice();
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(rng.usize(0..=rest.len().min(1_500)));
                hasher.feed(piece);
                rest = after;
            }
            assert_eq!(hasher.finish(), whole);
        }
    }

    #[test]
    fn prompts_agree_up_to_the_block_where_they_differ() {
        let mut text = vec![b'a'; 4_096];
        let first = blocks(7, &[&text]);
        text[1_600] = b'b';
        let second = blocks(7, &[&text]);
        assert_eq!(first[..3], second[..3]);
        assert!((3..8).all(|i| first[i] != second[i]), "a block's hash covers everything before it");
    }

    #[test]
    fn another_partition_differs_from_the_first_block_on() {
        let text = [b'a'; 2_048];
        let (one, other) = (blocks(1, &[&text]), blocks(2, &[&text]));
        assert!(one.iter().all(|hash| !other.contains(hash)));
    }

    #[test]
    fn the_number_of_blocks_is_capped() {
        let text = vec![b'a'; 2 * BLOCK_BYTES * MAX_BLOCKS];
        assert_eq!(blocks(1, &[&text]).len(), MAX_BLOCKS);
        assert_eq!(blocks(1, &[b"x", &text, &text]).len(), MAX_BLOCKS);
    }
}
