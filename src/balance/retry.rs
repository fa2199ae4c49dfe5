//! What now? The one place that decides whether a failed attempt is tried elsewhere and whom to blame.
//!
//! A POST to an engine costs GPU seconds, and a client that has seen the first byte cannot be given another
//! answer. So a request is re-sent only while nothing has gone downstream, only for causes the route names,
//! at most [`Rule::tries`] times and not after [`Rule::within`]. An attempt that found no connection cost nothing and
//! does not count as a try. One whose pooled connection broke at once does: an engine that was killed by the request
//! looks the same as one that had closed its end a moment before, and a prompt that crashes engines must not visit
//! them all. It needs no cause and no budget, since it is the keep-alive's doing far more often.
//!
//! Sources: DESIGN.md s.6; research/reliability.md s.1.4 and s.2; research/engines.md s.3 (surprises 3, 5, 7,
//! 12).

use std::collections::BTreeSet;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Why an attempt failed, before any of it went downstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No connection could be made; nothing was sent.
    Connect,
    /// A pooled connection was closed by the engine before it answered: the race of keep-alive, no fault.
    StaleConnection,
    /// The connection broke before the first byte of an answer.
    Closed,
    /// No first byte within `timeouts.read`.
    Timeout,
    /// The engine answered with this status.
    Status(u16),
    /// The engine answered 200 and its first event was an error, with this code if it named one.
    StreamError(Option<u16>),
}

impl Failure {
    /// The label in logs and metrics; the same word as in `retry.on` where there is one.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::StaleConnection => "stale_connection",
            Self::Closed => "closed",
            Self::Timeout => "timeout",
            Self::Status(429) => "status_429",
            Self::Status(500) => "status_500",
            Self::Status(502) => "status_502",
            Self::Status(503) => "status_503",
            Self::Status(504) => "status_504",
            Self::Status(_) => "status_other",
            Self::StreamError(_) => "stream_error",
        }
    }

    /// Every label, so that metrics can start at zero.
    pub const NAMES: [&'static str; 11] = [
        "connect",
        "stale_connection",
        "closed",
        "timeout",
        "status_429",
        "status_500",
        "status_502",
        "status_503",
        "status_504",
        "status_other",
        "stream_error",
    ];

    /// The switch in `retry.on` that governs this failure, if any does.
    const fn cause(self) -> Option<Cause> {
        Some(match self {
            Self::Connect => Cause::Connect,
            Self::Closed => Cause::Closed,
            Self::Timeout => Cause::Timeout,
            Self::Status(429) => Cause::Status429,
            Self::Status(500) => Cause::Status500,
            Self::Status(502) => Cause::Status502,
            Self::Status(503) => Cause::Status503,
            Self::Status(504) => Cause::Status504,
            Self::StreamError(_) => Cause::StreamError,
            Self::StaleConnection | Self::Status(_) => return None,
        })
    }

    /// What the failure says of the backend.
    pub const fn fault(self) -> Fault {
        match self {
            Self::StaleConnection => Fault::None,
            Self::Connect => Fault::Certain,
            Self::Closed | Self::Timeout => Fault::Suspect,
            // 529 is Anthropic's and llm-d's "overloaded".
            Self::Status(429 | 503 | 529) | Self::StreamError(Some(429 | 503 | 529)) => Fault::BackPressure,
            // 501 and 505 speak of the request, not of the backend.
            Self::Status(501 | 505) => Fault::None,
            Self::Status(500..=599) | Self::StreamError(_) => Fault::Suspect,
            Self::Status(_) => Fault::None,
        }
    }
}

/// What a failure says of the backend that produced it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: the client's mistake, or a race.
    None,
    /// It is full, which is no fault: let it cool down.
    BackPressure,
    /// It failed, but the request may be to blame: count it unless another backend fails the same way.
    Suspect,
    /// It failed whatever the request was.
    Certain,
}

/// A cause of retry that can be switched on per upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// No connection could be made.
    Connect,
    /// The connection broke before the first byte.
    Closed,
    /// No first byte in time.
    Timeout,
    /// 429 Too Many Requests.
    #[serde(rename = "status_429")]
    Status429,
    /// 500 Internal Server Error.
    #[serde(rename = "status_500")]
    Status500,
    /// 502 Bad Gateway.
    #[serde(rename = "status_502")]
    Status502,
    /// 503 Service Unavailable.
    #[serde(rename = "status_503")]
    Status503,
    /// 504 Gateway Timeout.
    #[serde(rename = "status_504")]
    Status504,
    /// An error as the first event of a 200 stream.
    StreamError,
}

/// When an upstream may be tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// How often an engine may be sent one request; 1 or more.
    pub tries: u32,
    /// No try starts later than this after the request was admitted.
    pub within: Duration,
    /// The causes that are worth another try.
    pub on: BTreeSet<Cause>,
}

/// How far a request has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Attempts that may have reached an engine, the failed one included.
    pub tries: u32,
    /// Time since the request was admitted: read whole, and out of the queue.
    pub elapsed: Duration,
    /// Whether any byte has gone downstream.
    pub committed: bool,
}

/// Whether to try again after `failure`. Whether another backend is left is the balancer's to say.
pub fn retry(rule: &Rule, failure: Failure, progress: Progress, budget: &mut Budget) -> bool {
    if progress.committed || progress.elapsed >= rule.within {
        return false;
    }
    match failure.cause() {
        None => failure == Failure::StaleConnection && progress.tries < rule.tries,
        Some(cause) if !rule.on.contains(&cause) => false,
        Some(Cause::Connect) => true,
        Some(_) => progress.tries < rule.tries && budget.withdraw(),
    }
}

/// Limits the retries that cost an engine work to a fraction of all requests, so that they cannot feed an
/// overload.
///
/// Each request deposits a fifth of a retry, each retry withdraws one; the balance is capped, and starts
/// full, so that a quiet proxy can still retry. Source: Finagle's and Linkerd's retry budgets.
#[derive(Debug)]
pub struct Budget {
    balance: f64,
}

impl Budget {
    const DEPOSIT: f64 = 0.2;
    const LIMIT: f64 = 100.0;

    /// A request has arrived.
    pub fn deposit(&mut self) {
        self.balance = (self.balance + Self::DEPOSIT).min(Self::LIMIT);
    }

    fn withdraw(&mut self) -> bool {
        let enough = self.balance >= 1.0;
        if enough {
            self.balance -= 1.0;
        }
        enough
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self { balance: Self::LIMIT }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule() -> Rule {
        use Cause::{Closed, Connect, Status502, Status503, StreamError};
        Rule {
            tries: 2,
            within: Duration::from_secs(10),
            on: [Connect, Closed, Status502, Status503, StreamError].into(),
        }
    }

    fn first() -> Progress {
        Progress { tries: 1, elapsed: Duration::from_millis(5), committed: false }
    }

    fn decide(failure: Failure, progress: Progress) -> bool {
        retry(&rule(), failure, progress, &mut Budget::default())
    }

    #[test]
    fn the_default_causes_are_retried_once() {
        use Failure::{Closed, Status, StreamError};
        for failure in [Closed, Status(502), Status(503), StreamError(None), StreamError(Some(503))] {
            assert!(decide(failure, first()), "{failure:?}");
            assert!(!decide(failure, Progress { tries: 2, ..first() }), "{failure:?} a second time");
        }
    }

    #[test]
    fn what_the_rule_does_not_name_is_not_retried() {
        use Failure::{Status, Timeout};
        for failure in [Timeout, Status(500), Status(429), Status(504), Status(400), Status(404), Status(501)]
        {
            assert!(!decide(failure, first()), "{failure:?}");
        }
        let mut generous = rule();
        generous.on.insert(Cause::Status500);
        assert!(retry(&generous, Status(500), first(), &mut Budget::default()));
    }

    #[test]
    fn nothing_is_retried_once_a_byte_has_gone_out_or_time_is_up() {
        for failure in [Failure::Connect, Failure::StaleConnection, Failure::Closed, Failure::Status(503)] {
            assert!(!decide(failure, Progress { committed: true, ..first() }), "{failure:?}");
            assert!(
                !decide(failure, Progress { elapsed: Duration::from_secs(10), ..first() }),
                "{failure:?}"
            );
        }
    }

    #[test]
    fn an_attempt_that_found_no_connection_is_free() {
        let late = Progress { tries: 2, ..first() };
        assert!(decide(Failure::Connect, late));
    }

    #[test]
    fn a_dead_connection_needs_no_cause_and_counts_as_a_try() {
        let none = Rule { on: BTreeSet::new(), ..rule() };
        let mut empty = Budget { balance: 0.0 };
        assert!(retry(&none, Failure::StaleConnection, first(), &mut empty));
        assert!(!decide(Failure::StaleConnection, Progress { tries: 2, ..first() }));
    }

    #[test]
    fn an_overload_exhausts_the_budget_but_not_the_free_moves() {
        let mut budget = Budget::default();
        let allowed =
            (0..1_000).filter(|_| retry(&rule(), Failure::Status(503), first(), &mut budget)).count();
        assert_eq!(allowed, 100);
        assert!(retry(&rule(), Failure::Connect, first(), &mut budget));
        for _ in 0..5 {
            budget.deposit();
        }
        assert!(retry(&rule(), Failure::Status(503), first(), &mut budget));
        assert!(!retry(&rule(), Failure::Status(503), first(), &mut budget));
    }

    #[test]
    fn every_failure_has_a_label_on_the_list() {
        use Failure::{Closed, Connect, StaleConnection, Status, StreamError, Timeout};
        let mut failures = vec![Connect, StaleConnection, Closed, Timeout, StreamError(None)];
        failures.extend((400..600).map(Status));
        assert!(failures.iter().all(|failure| Failure::NAMES.contains(&failure.name())));
    }

    #[test]
    fn back_pressure_is_no_fault_and_a_client_error_says_nothing() {
        assert_eq!(Failure::Status(503).fault(), Fault::BackPressure);
        assert_eq!(Failure::Status(429).fault(), Fault::BackPressure);
        assert_eq!(Failure::StreamError(Some(503)).fault(), Fault::BackPressure);
        assert_eq!(Failure::Status(529).fault(), Fault::BackPressure);
        assert_eq!(Failure::Status(400).fault(), Fault::None);
        assert_eq!(Failure::Status(501).fault(), Fault::None);
        assert_eq!(Failure::Status(500).fault(), Fault::Suspect);
        assert_eq!(Failure::Connect.fault(), Fault::Certain);
    }
}
