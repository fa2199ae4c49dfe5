//! In which order one backend forgets the blocks it was sent: least recently used first, the end of a prompt
//! before its beginning.
//!
//! The blocks of a prompt are used together, so their order need not be kept block by block. What is kept is
//! *runs*: of each prompt that was sent, the blocks that no later prompt has used again, shallowest first.
//!
//! ```text
//! sent a b c d        runs: abcd              least recent first; within a run, the last block goes first
//! sent a b x          runs: cd, abx           the later prompt takes over what it shares
//! sent a b c d e      runs: x, abcde
//! ```
//!
//! Blocks are chained, each stands for all before it. So a prompt that uses a block uses every block before
//! it, a run is always the *end* of its prompt, and the run that holds the next block of a prompt begins with
//! that block: one lookup per run, instead of one per block, finds all that is there.

use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasherDefault;

use super::spread::Spread;

/// The blocks of one backend in the order of their use.
#[derive(Default)]
pub(super) struct Recency {
    /// By the time of use; none is empty.
    runs: BTreeMap<u64, Vec<u32>>,
    /// The run that begins with a block.
    heads: HashMap<u32, u64, BuildHasherDefault<Spread>>,
    held: usize,
    uses: u64,
}

impl Recency {
    /// Marks the blocks of `prompt` as used, adding those that were not there; returns how many leading ones
    /// were.
    pub(super) fn touch(&mut self, prompt: &[u32]) -> usize {
        let Some(&head) = prompt.first() else { return 0 };
        let mut held = 0;
        while let Some(next) = prompt.get(held)
            && let Some(at) = self.heads.remove(next)
        {
            let Some(run) = self.runs.get_mut(&at) else { break };
            let shared = run.iter().zip(&prompt[held..]).take_while(|(old, new)| old == new).count();
            held += shared;
            // A copy, so that what is kept of a long prompt is no longer than it has to be.
            *run = run.split_off(shared);
            match run.first() {
                Some(&head) => drop(self.heads.insert(head, at)),
                None => drop(self.runs.remove(&at)),
            }
        }
        self.uses += 1;
        self.runs.insert(self.uses, prompt.to_vec());
        self.heads.insert(head, self.uses);
        self.held += prompt.len() - held;
        held
    }

    /// Forgets the least recently used blocks until no more than `most` are left, and names each.
    pub(super) fn shrink(&mut self, most: usize, mut forgotten: impl FnMut(u32)) {
        while self.held > most
            && let Some(mut oldest) = self.runs.first_entry()
        {
            let run = oldest.get_mut();
            let kept = run.len().saturating_sub(self.held - most);
            self.held -= run.len() - kept;
            let head = run.first().copied();
            run.drain(kept..).rev().for_each(&mut forgotten);
            if kept == 0 {
                let at = *oldest.key();
                oldest.remove();
                if let Some(head) = head.filter(|head| self.heads.get(head) == Some(&at)) {
                    self.heads.remove(&head);
                }
            }
        }
    }

    /// The runs, the most recently used first.
    pub(super) fn latest(&self) -> impl Iterator<Item = &[u32]> {
        self.runs.values().rev().map(Vec::as_slice)
    }

    /// How many blocks there are.
    pub(super) const fn held(&self) -> usize {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shrink(recency: &mut Recency, most: usize) -> Vec<u32> {
        let mut gone = Vec::new();
        recency.shrink(most, |block| gone.push(block));
        gone
    }

    #[test]
    fn a_later_prompt_takes_over_what_it_shares() {
        let mut recency = Recency::default();
        assert_eq!(recency.touch(&[1, 2, 3, 4]), 0);
        assert_eq!(recency.touch(&[1, 2, 9]), 2);
        assert_eq!(recency.held(), 5);
        assert_eq!(recency.touch(&[1, 2, 3, 4, 5]), 4, "found in two runs");
        assert_eq!(recency.touch(&[]), 0);
        assert_eq!(recency.held(), 6);
        assert_eq!(shrink(&mut recency, 0), [9, 5, 4, 3, 2, 1]);
        assert_eq!((recency.runs.len(), recency.heads.len()), (0, 0));
    }

    #[test]
    fn the_least_recent_go_first_and_of_a_prompt_its_end() {
        let mut recency = Recency::default();
        recency.touch(&[1, 2, 3]);
        recency.touch(&[7, 8]);
        assert_eq!(shrink(&mut recency, 5), [0; 0]);
        assert_eq!(shrink(&mut recency, 3), [3, 2]);
        assert_eq!(recency.touch(&[1, 2, 3]), 1);
        assert_eq!(shrink(&mut recency, 2), [8, 7, 3]);
    }

    #[test]
    fn the_memory_of_a_long_prompt_is_not_kept_for_its_last_block() {
        let mut recency = Recency::default();
        for last in 0..500 {
            let prompt: Vec<u32> = (0..1_000).chain([10_000 + last]).collect();
            recency.touch(&prompt);
        }
        let room: usize = recency.runs.values().map(Vec::capacity).sum();
        assert_eq!(recency.held(), 1_500);
        assert!(room < 2 * 1_500, "room for {room} blocks");
    }

    #[test]
    fn numbers_that_are_no_chain_never_panic() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut recency = Recency::default();
        for _ in 0..5_000 {
            let prompt: Vec<u32> = (0..rng.usize(..9)).map(|_| rng.u32(..6)).collect();
            assert!(recency.touch(&prompt) <= prompt.len());
            let most = rng.usize(..20);
            recency.shrink(most, |block| assert!(block < 6));
            assert!(recency.held() <= most);
        }
    }
}
