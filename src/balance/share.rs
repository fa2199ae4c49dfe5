//! The share of traffic: which part of the recent requests each backend got.
//!
//! A backend that gets nearly everything while others are idle is the failure that prefix affinity invites,
//! so the share is a metric to alert on. Requests are counted in ten one-second buckets: the share is that of
//! the last ten seconds.

use crate::clock::Time;
use crate::policy::Slot;

const BUCKETS: usize = 10;

/// Requests of the last ten seconds, by backend.
#[derive(Debug, Default)]
pub struct Share {
    /// By second modulo ten, then by slot.
    buckets: [Vec<u32>; BUCKETS],
    /// The sum of the buckets, by slot.
    sums: Vec<u32>,
    total: u32,
    second: u64,
}

impl Share {
    /// Counts a request sent to `slot`.
    pub fn count(&mut self, slot: Slot, now: Time) {
        self.advance(now);
        let bucket = &mut self.buckets[(self.second % BUCKETS as u64) as usize];
        let index = slot.0 as usize;
        for counts in [bucket, &mut self.sums] {
            if counts.len() <= index {
                counts.resize(index + 1, 0);
            }
            counts[index] += 1;
        }
        self.total += 1;
    }

    /// The requests of the last ten seconds.
    pub fn total(&mut self, now: Time) -> u32 {
        self.advance(now);
        self.total
    }

    /// Those of them that `slot` got, as of the last call of [`Share::total`].
    pub fn of(&self, slot: Slot) -> u32 {
        self.sums.get(slot.0 as usize).copied().unwrap_or(0)
    }

    fn advance(&mut self, now: Time) {
        let second = now.since(Time::ZERO).as_secs();
        for passed in (self.second + 1..=second).rev().take(BUCKETS) {
            let bucket = &mut self.buckets[(passed % BUCKETS as u64) as usize];
            for (sum, count) in self.sums.iter_mut().zip(bucket.drain(..)) {
                *sum -= count;
                self.total -= count;
            }
        }
        self.second = self.second.max(second);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_share_is_that_of_the_last_ten_seconds() {
        let at = |s| Time::ZERO + Duration::from_secs(s);
        let mut share = Share::default();
        assert_eq!(share.total(at(0)), 0);
        for _ in 0..3 {
            share.count(Slot(0), at(1));
        }
        share.count(Slot(1), at(8));
        assert_eq!((share.total(at(9)), share.of(Slot(0)), share.of(Slot(1))), (4, 3, 1));
        assert_eq!((share.total(at(11)), share.of(Slot(0)), share.of(Slot(1))), (1, 0, 1));
        assert_eq!(share.total(at(1_000)), 0);
    }
}
