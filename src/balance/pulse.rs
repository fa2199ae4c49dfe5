//! The pulse: when a backend last gave a sign of life.
//!
//! An engine can be dead and hold its connections open: a deadlocked scheduler still answers `/health`
//! (research/reliability.md s.0.8). What shows it is work and no byte of any answer for a long time. One
//! silent stream proves nothing, since a preempted sequence is silent while others go on; so the pulse is that
//! of the whole backend. It is beaten on every read of every stream, hence one atomic and no lock.
//!
//! Silence alone ends nothing. Silence of a backend whose port refuses connections does: an engine that has been
//! told to stop may leave its streams open for ever (research/engines.md s.3.1). One that drains refuses as well, and
//! goes on sending.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

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

/// The refused connections of one backend, in a row.
#[derive(Clone, Copy, Debug, Default)]
pub struct Refusals {
    count: u32,
    first: Time,
}

impl Refusals {
    /// A probe was refused at `now`; whether the backend is gone: `enough` refusals in a row, and nothing from it
    /// for `patience` since the first of them. It `last` sent something then, if ever.
    pub fn refuse(&mut self, enough: u32, patience: Duration, last: Option<Time>, now: Time) -> bool {
        if self.count == 0 {
            self.first = now;
        }
        self.count = self.count.saturating_add(1);
        let silent_since = self.first.max(last.unwrap_or(Time::ZERO));
        self.count >= enough && now.since(silent_since) >= patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Time {
        Time::ZERO + Duration::from_secs(seconds)
    }

    #[test]
    fn a_backend_that_refuses_and_is_silent_is_gone_and_one_that_still_sends_is_not() {
        let patience = Duration::from_secs(10);
        let gone = |seconds: &[u64], last: &dyn Fn(u64) -> Option<Time>| {
            let mut refusals = Refusals::default();
            seconds.iter().map(|s| refusals.refuse(3, patience, last(*s), at(*s))).collect::<Vec<_>>()
        };
        assert_eq!(gone(&[100, 105, 110], &|_| Some(at(99))), [false, false, true]);
        assert_eq!(gone(&[100, 105, 110], &|_| None), [false, false, true]);
        assert_eq!(gone(&[100, 120], &|_| None), [false, false], "not often enough");
        assert_eq!(gone(&[100, 101, 102], &|_| None), [false; 3], "not for long enough");
        assert_eq!(gone(&[100, 105, 110, 120], &|now| Some(at(now - 1))), [false; 4], "it still sends");
        let pause = |now| Some(at(u64::min(now, 108)));
        assert_eq!(gone(&[100, 105, 110, 117, 118], &pause), [false, false, false, false, true]);
    }

    #[test]
    fn there_is_no_last_beat_before_the_first() {
        let pulse = Pulse::default();
        assert_eq!(pulse.last(), None);
        pulse.beat(Time::from_nanos(5));
        assert_eq!(pulse.last(), Some(Time::from_nanos(5)));
    }
}
