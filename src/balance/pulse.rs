//! The pulse: when a backend last gave a sign of life.
//!
//! An engine can be dead and hold its connections open: a deadlocked scheduler still answers `/health`
//! (research/reliability.md s.0.8). What shows it is work and no byte of any answer for a long time. One
//! silent stream proves nothing, since a preempted sequence is silent while others go on; so the pulse is that
//! of the whole backend. It is beaten on every read of every stream, hence one atomic and no lock.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::Time;

/// When something last came; shared between those who hear it and those who ask.
#[derive(Debug, Default)]
pub struct Pulse {
    /// Nanoseconds of [`Time`]; 0 before the first.
    last: AtomicU64,
}

impl Pulse {
    /// Something has come at `now`.
    pub fn beat(&self, now: Time) {
        self.last.store(now.as_nanos(), Ordering::Relaxed);
    }

    /// When something last came, if ever.
    pub fn last(&self) -> Option<Time> {
        let last = self.last.load(Ordering::Relaxed);
        (last > 0).then(|| Time::from_nanos(last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_no_last_beat_before_the_first() {
        let pulse = Pulse::default();
        assert_eq!(pulse.last(), None);
        pulse.beat(Time::from_nanos(5));
        assert_eq!(pulse.last(), Some(Time::from_nanos(5)));
    }
}
