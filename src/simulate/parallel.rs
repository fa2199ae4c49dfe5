//! The same work on many things, on as many threads; the answers come in the order of the things.
//!
//! Whoever is free takes the next one, so what is slow should stand first. Nothing that is computed may
//! depend on who computes it: then the output is the same on any number of cores.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, Builder};

/// `work` of each of `things`, done by at most `threads` threads of which this is one.
pub fn map<T: Sync, R: Send>(things: &[T], threads: usize, work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let take = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(thing) = things.get(index) else { return done };
            done.push((index, work(thing)));
        }
    };
    let mut done = thread::scope(|scope| {
        // A thread that cannot be had is no reason to stop: the others do its part.
        let start = |_| Builder::new().spawn_scoped(scope, take).ok();
        let others: Vec<_> = (1..threads.min(things.len())).filter_map(start).collect();
        let mut done = take();
        for other in others {
            done.extend(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, answer)| answer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn answers_come_in_order_from_any_number_of_threads() {
        let things: Vec<usize> = (0..100).collect();
        let squares: Vec<usize> = things.iter().map(|n| n * n).collect();
        for threads in [0, 1, 2, 7, 200] {
            assert_eq!(map(&things, threads, |n| n * n), squares, "{threads}");
        }
        assert!(map(&[0; 0], 4, |n: &i32| *n).is_empty());
    }

    #[test]
    fn two_threads_are_at_work_at_once() {
        // Neither gets past the barrier alone.
        let barrier = Barrier::new(2);
        assert_eq!(map(&[1, 2], 2, |n| (barrier.wait(), n * 2).1), [2, 4]);
    }
}
