//! The gauge: what an engine last said of itself, and for how long that counts.
//!
//! Readings are old when they arrive, so they never rank backends by themselves; deciding on them herds
//! (research/routing.md s.0 and s.7.3). While they are fresh they do two things that our own counters cannot:
//!
//! * **Strain.** An engine whose KV memory is over 95 % full and whose queue is not empty preempts and
//!   recomputes; it is passed over while another can take the request (s.7.2).
//! * **Others.** Whoever else sends requests to the engine (a second proxy, a batch job) is seen only there:
//!   what was in flight beyond our own at the moment of the sample. It is added to what we count, so that the
//!   load is `max(own now, scraped + our own dispatches since)`.
//!
//! Of that, the steady part stays true and the rest does not: two proxies that take each other's last second for
//! the present rush to the same idle engine together. So the estimate begins at the sample and falls back to
//! its mean, within about the 0.2 s after which a reading is known to be worse than none (s.0):
//!
//! ```text
//! others(age) = mean + (sample - mean) e^(-age / 0.2 s)          mean follows the samples over 30 s
//! ```
//!
//! A page was written at some moment between our asking and its arrival. The larger of our own two counts is
//! taken off, so that a request of ours is not mistaken for somebody else's. (One that asks for several
//! choices still is, in part, where the engine counts each choice; such an engine looks a little busier.)

use std::time::Duration;

use super::ledger::Account;
use crate::clock::Time;
use crate::engine::Reading;

/// How long a reading can show strain (GIE's bound, research/routing.md s.1.1).
const FRESH: Duration = Duration::from_secs(2);

/// Part of the KV memory in use, 0 to 1, from which on an engine with a queue is strained.
const STRAINED_KV_USAGE: f64 = 0.95;

/// How fast a sample of others loses its meaning, how long their mean looks back, and when it is forgotten.
const SAMPLE_SPAN: Duration = Duration::from_millis(200);
const MEAN_SPAN: Duration = Duration::from_secs(30);
const MEMORY: Duration = Duration::from_secs(30);

/// More requests than this no engine has.
const MOST: u64 = 1_000_000;

/// Requests in flight on an engine that are not ours, as an estimate.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Others {
    /// All of them; 0 or more.
    pub requests: f64,
    /// Those that wait in the engine's queue; no more than that.
    pub waiting: f64,
}

impl Others {
    /// This one, moved towards `to` by `part`, 0 to 1, of the way.
    fn towards(self, to: Self, part: f64) -> Self {
        Self {
            requests: self.requests + (to.requests - self.requests) * part,
            waiting: self.waiting + (to.waiting - self.waiting) * part,
        }
    }
}

/// The last reading of one engine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gauge {
    /// What it said.
    pub reading: Reading,
    /// When it arrived.
    pub at: Time,
    sample: Others,
    mean: Others,
}

impl Gauge {
    /// A reading that arrived at `at`, when our own account stood at `after`; `before` is where it stood when
    /// the reading was asked for, and `last` the gauge as it was.
    pub fn new(reading: Reading, before: &Account, after: &Account, at: Time, last: Option<&Self>) -> Self {
        let beyond = |scraped: Option<u64>, before: u32, after: u32| {
            scraped.unwrap_or(0).min(MOST).saturating_sub(u64::from(before.max(after))) as f64
        };
        let in_flight =
            reading.running.zip(reading.waiting).map(|(running, waiting)| running.saturating_add(waiting));
        let requests = beyond(in_flight, before.active_requests, after.active_requests);
        let waiting = beyond(reading.waiting, before.unanswered_requests, after.unanswered_requests);
        let sample = Others { requests, waiting: waiting.min(requests) };
        let mean = last.map_or_else(Others::default, |last| {
            let age = at.since(last.at);
            last.mean.towards(sample, 1.0 - remaining(age, MEAN_SPAN))
        });
        Self { reading, at, sample, mean }
    }

    /// What others have in flight, as far as can be told at `now`.
    pub fn others(&self, now: Time) -> Others {
        let age = now.since(self.at);
        if age < MEMORY {
            self.mean.towards(self.sample, remaining(age, SAMPLE_SPAN))
        } else {
            Others::default()
        }
    }

    /// Whether the engine has neither memory nor time for another request.
    pub fn is_strained(&self, now: Time) -> bool {
        let Reading { kv_usage, waiting, .. } = self.reading;
        now.since(self.at) < FRESH
            && kv_usage.is_some_and(|u| u > STRAINED_KV_USAGE)
            && waiting.is_some_and(|w| w > 0)
    }
}

/// What remains after `age` of something that falls to 1/e within `span`.
fn remaining(age: Duration, span: Duration) -> f64 {
    (-age.as_secs_f64() / span.as_secs_f64()).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(active_requests: u32, unanswered_requests: u32) -> Account {
        Account { active_requests, unanswered_requests, ..Account::default() }
    }

    fn scraped(running: u64, waiting: u64, kv_usage: f64) -> Reading {
        Reading {
            running: Some(running),
            waiting: Some(waiting),
            kv_usage: Some(kv_usage),
            ..Reading::default()
        }
    }

    const NOW: Time = Time::ZERO;

    fn gauge(reading: Reading) -> Gauge {
        Gauge::new(reading, &account(0, 0), &account(0, 0), NOW, None)
    }

    #[test]
    fn what_is_in_flight_beyond_our_own_belongs_to_others() {
        let of = |before, after, reading| {
            let Others { requests, waiting } = Gauge::new(reading, &before, &after, NOW, None).others(NOW);
            (requests, waiting)
        };
        let reading = scraped(5, 3, 0.5);
        assert_eq!(of(account(2, 1), account(2, 1), reading), (6.0, 2.0));
        assert_eq!(of(account(8, 3), account(8, 3), reading), (0.0, 0.0));
        // Three of ours ended, or came, between the question and the answer.
        assert_eq!(of(account(8, 0), account(5, 0), reading), (0.0, 0.0));
        assert_eq!(of(account(2, 0), account(5, 0), reading), (3.0, 3.0));
        // An engine that does not say how many it runs says nothing of others.
        let half = Reading { running: None, ..reading };
        assert_eq!(of(account(0, 0), account(0, 0), half), (0.0, 0.0));
    }

    #[test]
    fn a_steady_load_of_others_stays_and_a_burst_is_soon_forgotten() {
        let second = Duration::from_secs(1);
        let at = |n: u32| NOW + second * n;
        let (busy, calm) = (scraped(10, 0, 0.5), scraped(0, 0, 0.0));
        let idle = account(0, 0);
        let mut steady = gauge(busy);
        for n in 1..200 {
            steady = Gauge::new(busy, &idle, &idle, at(n), Some(&steady));
        }
        assert!((9.9..=10.0).contains(&steady.others(at(200)).requests), "{steady:?}");
        let mut burst = gauge(calm);
        for n in 1..60 {
            burst = Gauge::new(if n < 59 { calm } else { busy }, &idle, &idle, at(n), Some(&burst));
        }
        assert_eq!(burst.others(at(59)).requests, 10.0);
        assert!(burst.others(at(60)).requests < 1.1, "{burst:?}");
        assert_eq!(steady.others(at(199) + MEMORY), Others::default(), "polls that fail prove nothing");
    }

    #[test]
    fn a_full_memory_strains_an_engine_only_if_somebody_waits() {
        let strained = |reading| gauge(reading).is_strained(NOW);
        assert!(strained(scraped(9, 1, 0.96)));
        assert!(!strained(scraped(9, 0, 0.96)));
        assert!(!strained(scraped(9, 1, 0.95)));
        assert!(!strained(Reading { kv_usage: None, ..scraped(9, 1, 0.0) }));
    }

    #[test]
    fn a_reading_of_two_seconds_ago_shows_no_strain() {
        let gauge = gauge(scraped(9, 1, 0.99));
        assert!(gauge.is_strained(NOW + Duration::from_millis(1_999)));
        assert!(!gauge.is_strained(NOW + FRESH));
    }
}
