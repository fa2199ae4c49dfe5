//! Passive ejection: a backend that keeps failing is left alone for a while.
//!
//! The classic `max_fails` / `fail_timeout` of nginx, with the holes closed that make it an outage switch: a
//! poison prompt that fails everywhere must not empty the fleet, a full engine is not a broken one, and the
//! last backend is never removed (research/reliability.md s.0 and s.1.2).
//!
//! * A *certain* fault (no connection) counts at once. `max_fails` of them within `fail_timeout` eject for
//!   `fail_timeout`.
//! * A *suspect* one (5xx, connection lost before the first byte, timeout) may be the request's fault. It
//!   counts at once if another backend answered the same request. Otherwise it is held: it counts when
//!   `max_fails` of them come in a row on this backend while others succeed, and a success here clears it. If no other
//!   was asked meanwhile, as when a lone session keeps to a vLLM that drains with 500s (research/engines.md s.3.3), it
//!   is left alone for a moment, so that another is.
//! * *Back-pressure* (429, 503) never counts; the backend cools down for as long as it asked.
//! * At most [`limit`] backends are ejected together.
//! * Ejections in a row last longer each: `n` times `fail_timeout` for the n-th, up to ten times, give or take
//!   a fifth so that those who went together do not return together. One that comes more than ten times
//!   `fail_timeout` after the last is a first one again.
//! * One that returns is on probation: it gets one request, and no other until that has been answered. A fault
//!   ejects it again, a success clears it.
//! * A probe that is answered refutes an ejection for want of a connection: it ends at once, in probation. A
//!   rolling restart is over in seconds, and its last victim must not find the others still ejected.

use std::time::Duration;

use super::retry::Fault;
use crate::clock::Time;

/// `max_fails` and `fail_timeout` of an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Faults that eject; 0 switches ejection off.
    pub max_fails: u32,
    /// The span in which they must come, and the time of a first ejection.
    pub fail_timeout: Duration,
}

/// The most that a row of ejections lengthens one, and the memory of such a row, both in `fail_timeout`s.
const LONGEST: u32 = 10;

/// An ejection is this part shorter or longer, at most.
const JITTER: f64 = 0.2;

/// How long a backend that keeps failing is left alone, to see whether another would not.
const PAUSE: Duration = Duration::from_secs(1);

/// The record of one backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    fails: u32,
    first_fail: Time,
    suspects: u32,
    /// Ejections in a row.
    ejections: u32,
    ejected_until: Time,
    /// The last ejection was for want of a connection.
    unreachable: bool,
    cooling_until: Time,
    /// It was ejected and has not answered since.
    probation: bool,
    /// The request on which a backend on probation is tried has until then to be answered.
    trial_until: Time,
    /// Another backend has answered since this one last did.
    overtaken: bool,
    /// For who asks why: the last failure, how many ejected it, and since when it is ejected, tried or left alone.
    last: Option<&'static str>,
    faults: u32,
    ejected_at: Time,
    tried_at: Time,
    cooling_at: Time,
    /// It asked to be left alone itself.
    full: bool,
}

impl Record {
    /// Whether the backend is ejected at `now`.
    pub fn ejected(&self, now: Time) -> bool {
        now < self.ejected_until
    }

    /// When its last ejection ended, if it has.
    pub fn returned(&self, now: Time) -> Option<Time> {
        (self.ejected_until > Time::ZERO && !self.ejected(now)).then_some(self.ejected_until)
    }

    /// Whether the backend is being tried by one request, and should get no other at `now`.
    pub fn on_trial(&self, now: Time) -> bool {
        self.probation && now < self.trial_until
    }

    /// Whether the backend asked to be left alone at `now`.
    pub fn cooling(&self, now: Time) -> bool {
        now < self.cooling_until
    }

    /// Leaves the backend alone for `span`, because it said it is full.
    pub fn cool(&mut self, now: Time, span: Duration) {
        self.pause(now, span);
        self.full = true;
    }

    /// Leaves the backend alone for `span`.
    fn pause(&mut self, now: Time, span: Duration) {
        if !self.cooling(now) {
            self.cooling_at = now;
            self.full = false;
        }
        self.cooling_until = self.cooling_until.max(now + span);
    }

    /// What its last failure was called.
    pub fn remark(&mut self, failure: &'static str) {
        self.last = Some(failure);
    }

    /// Why it is ejected, or was the last time.
    pub fn why_ejected(&self) -> String {
        failures(self.faults, self.last)
    }

    /// Why it is left alone for a moment.
    pub fn why_cooling(&self) -> String {
        match self.full {
            true => format!("it says that it is full: {}", self.last.unwrap_or("no reason given")),
            false => format!("{} in a row, others are asked first", failures(self.suspects, self.last)),
        }
    }

    /// Since when it is ejected.
    pub fn ejected_at(&self) -> Time {
        self.ejected_at
    }

    /// Since when it is on trial.
    pub fn tried_at(&self) -> Time {
        self.tried_at
    }

    /// Since when it is left alone for a moment.
    pub fn cooling_at(&self) -> Time {
        self.cooling_at
    }

    /// The backend was chosen. One on probation is on trial until it answers or fails; if the request goes
    /// away without either, until `fail_timeout` has passed.
    pub fn choose(&mut self, rule: Rule, now: Time) {
        if self.probation && !self.ejected(now) {
            self.trial_until = now + rule.fail_timeout;
            self.tried_at = now;
        }
    }

    /// The backend answered. An ejected one stays ejected: the answer may be to a request from before.
    pub fn succeed(&mut self, now: Time) {
        if !self.ejected(now) {
            self.probation = false;
        }
        self.suspects = 0;
        self.overtaken = false;
    }

    /// Another backend of the upstream answered.
    pub fn overtake(&mut self) {
        self.overtaken = true;
    }

    /// A probe has been answered: whatever is wrong, a connection can be made. True if that ends an ejection.
    pub fn reach(&mut self, now: Time) -> bool {
        let refuted = self.unreachable && self.ejected(now);
        if refuted {
            self.ejected_until = now;
            self.trial_until = Time::ZERO;
        }
        refuted
    }

    /// The backend failed; true if that is one too many. `elsewhere` says that another backend answered the
    /// same request.
    #[must_use]
    pub fn fail(&mut self, rule: Rule, fault: Fault, elsewhere: bool, now: Time) -> bool {
        if rule.max_fails == 0 || self.ejected(now) {
            return false;
        }
        match fault {
            Fault::None | Fault::BackPressure => return false,
            Fault::Suspect if !elsewhere => {
                self.suspects += 1;
                let many = self.suspects >= rule.max_fails;
                if many && !self.overtaken {
                    self.pause(now, PAUSE);
                }
                return self.overtaken && many;
            }
            Fault::Suspect | Fault::Certain => {}
        }
        if self.fails == 0 || now.since(self.first_fail) > rule.fail_timeout {
            self.first_fail = now;
            self.fails = 0;
        }
        self.fails += 1;
        self.probation || self.fails >= rule.max_fails
    }

    /// Ejects the backend because of `fault`, and says for how long; `chance` is drawn from 0 to 1.
    pub fn eject(&mut self, rule: Rule, fault: Fault, chance: f64, now: Time) -> Duration {
        let in_a_row = self.returned(now).is_some_and(|at| now.since(at) <= rule.fail_timeout * LONGEST);
        let ejections = if in_a_row { self.ejections.saturating_add(1) } else { 1 };
        let jitter = 1.0 + JITTER * (2.0 * chance - 1.0);
        let span = (rule.fail_timeout * ejections.min(LONGEST)).mul_f64(jitter);
        *self = Self {
            ejections,
            ejected_until: now + span,
            unreachable: fault == Fault::Certain,
            cooling_until: self.cooling_until,
            cooling_at: self.cooling_at,
            full: self.full,
            probation: true,
            last: self.last,
            faults: self.fails.max(self.suspects),
            ejected_at: now,
            ..Self::default()
        };
        span
    }
}

/// So many failures, of which the last is called so.
fn failures(count: u32, last: Option<&'static str>) -> String {
    let s = if count == 1 { "" } else { "s" };
    format!("{count} failure{s}: {}", last.unwrap_or("of a kind that is not known"))
}

/// How many of `members` may be ejected together: all but one for certain faults, which no request can
/// provoke; for suspected ones, all but one of up to three, else a third.
pub fn limit(members: usize, fault: Fault) -> usize {
    if members <= 3 || fault == Fault::Certain { members.saturating_sub(1) } else { members / 3 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: Rule = Rule { max_fails: 3, fail_timeout: Duration::from_secs(30) };

    fn at(seconds: u64) -> Time {
        Time::ZERO + Duration::from_secs(seconds)
    }

    /// Feeds the fault until it ejects; how many it took, up to 10.
    fn faults_until_ejection(record: &mut Record, fault: Fault, elsewhere: bool, now: Time) -> Option<usize> {
        (1..=10).find(|_| record.fail(RULE, fault, elsewhere, now))
    }

    #[test]
    fn the_third_certain_fault_ejects_for_fail_timeout() {
        let mut record = Record::default();
        assert_eq!(faults_until_ejection(&mut record, Fault::Certain, false, at(100)), Some(3));
        assert_eq!(record.eject(RULE, Fault::Certain, 0.5, at(100)), RULE.fail_timeout);
        assert!(record.ejected(at(129)));
        assert!(!record.ejected(at(130)));
    }

    #[test]
    fn faults_further_apart_than_fail_timeout_do_not_add_up() {
        let mut record = Record::default();
        for seconds in [0, 31, 62, 93] {
            assert!(!record.fail(RULE, Fault::Certain, false, at(seconds)));
        }
    }

    #[test]
    fn a_backend_on_probation_is_ejected_by_its_next_fault_and_cleared_by_its_next_success() {
        let mut record = Record::default();
        let _span = record.eject(RULE, Fault::Suspect, 0.5, at(0));
        record.succeed(at(10));
        let mut failing = record;
        assert_eq!(faults_until_ejection(&mut failing, Fault::Certain, false, at(40)), Some(1));
        record.succeed(at(40));
        assert_eq!(faults_until_ejection(&mut record, Fault::Certain, false, at(41)), Some(3));
    }

    #[test]
    fn a_backend_that_only_fails_makes_room_for_another_to_show_whose_fault_it_is() {
        let mut record = Record::default();
        for _ in 0..RULE.max_fails {
            assert!(!record.cooling(at(1)));
            assert!(!record.fail(RULE, Fault::Suspect, false, at(1)));
        }
        assert!(record.cooling(at(1)) && !record.cooling(at(2)));
        record.overtake();
        assert!(record.fail(RULE, Fault::Suspect, false, at(3)));
    }

    #[test]
    fn a_fault_that_another_backend_did_not_reproduce_counts() {
        let mut record = Record::default();
        assert_eq!(faults_until_ejection(&mut record, Fault::Suspect, true, at(1)), Some(3));
    }

    #[test]
    fn a_poison_prompt_that_fails_everywhere_ejects_nobody() {
        let mut record = Record::default();
        assert_eq!(faults_until_ejection(&mut record, Fault::Suspect, false, at(1)), None);
    }

    #[test]
    fn a_backend_that_fails_every_request_while_others_succeed_is_ejected() {
        let mut record = Record::default();
        record.overtake();
        assert_eq!(faults_until_ejection(&mut record, Fault::Suspect, false, at(1)), Some(3));
        let mut mixed = Record::default();
        for _ in 0..10 {
            mixed.overtake();
            assert!(!mixed.fail(RULE, Fault::Suspect, false, at(1)));
            mixed.succeed(at(1));
        }
    }

    #[test]
    fn back_pressure_and_client_errors_never_count() {
        let mut record = Record::default();
        for fault in [Fault::BackPressure, Fault::None] {
            assert_eq!(faults_until_ejection(&mut record, fault, true, at(1)), None);
        }
        record.cool(at(1), Duration::from_secs(5));
        record.cool(at(1), Duration::from_secs(2));
        assert!(record.cooling(at(5)) && !record.cooling(at(6)));
    }

    #[test]
    fn max_fails_of_zero_switches_ejection_off() {
        let rule = Rule { max_fails: 0, ..RULE };
        let mut record = Record::default();
        assert!((0..10).all(|_| !record.fail(rule, Fault::Certain, true, at(1))));
    }

    #[test]
    fn the_last_backend_is_never_ejected() {
        assert_eq!([1, 2, 3, 4, 8, 9].map(|n| limit(n, Fault::Suspect)), [0, 1, 2, 1, 2, 3]);
        assert_eq!([1, 2, 4, 8].map(|n| limit(n, Fault::Certain)), [0, 1, 3, 7]);
    }

    #[test]
    fn ejections_in_a_row_grow_to_ten_times_with_jitter_and_are_forgotten_in_time() {
        let mut record = Record::default();
        let mut now = at(1);
        for n in 1..=12 {
            let span = record.eject(RULE, Fault::Suspect, 0.5, now);
            assert_eq!(span, RULE.fail_timeout * n.min(10));
            now = now + span;
        }
        assert_eq!(record.eject(RULE, Fault::Suspect, 0.0, now), RULE.fail_timeout * 8);
        now = now + RULE.fail_timeout * 8;
        assert_eq!(record.eject(RULE, Fault::Suspect, 1.0, now), RULE.fail_timeout * 12);
        now = now + RULE.fail_timeout * 22 + Duration::from_nanos(1);
        assert_eq!(record.eject(RULE, Fault::Suspect, 0.5, now), RULE.fail_timeout);
    }

    #[test]
    fn a_backend_that_returns_is_tried_by_one_request_at_a_time() {
        let mut record = Record::default();
        record.choose(RULE, at(0));
        assert!(!record.on_trial(at(0)), "no probation, no trial");
        let _span = record.eject(RULE, Fault::Suspect, 0.5, at(0));
        assert!(!record.on_trial(at(30)), "nobody has tried it yet");
        record.choose(RULE, at(29));
        assert!(!record.on_trial(at(30)), "the last resort is no trial");
        record.choose(RULE, at(31));
        assert!(record.on_trial(at(32)));
        let mut forgotten = record;
        assert!(!forgotten.on_trial(at(61)), "its request went away without a verdict");
        forgotten.choose(RULE, at(61));
        assert!(forgotten.on_trial(at(62)));
        record.succeed(at(33));
        assert!(!record.on_trial(at(33)));
    }

    #[test]
    fn an_answered_probe_ends_an_ejection_for_want_of_a_connection_and_no_other() {
        let (mut refused, mut failing) = (Record::default(), Record::default());
        let _span = refused.eject(RULE, Fault::Certain, 0.5, at(0));
        let _span = failing.eject(RULE, Fault::Suspect, 0.5, at(0));
        assert!(refused.reach(at(5)) && !failing.reach(at(5)));
        assert!(!refused.ejected(at(5)) && failing.ejected(at(5)));
        assert!(!refused.reach(at(5)), "it has ended");
        refused.choose(RULE, at(5));
        assert!(refused.on_trial(at(6)), "it is on probation like any other");
    }
}
