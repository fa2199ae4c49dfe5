//! Engines that answer with a status that is none of the client's doing.

use super::row::{End, ILL_BODY, Ill, Next, Row};
use super::rows;
use crate::support::engine::{Answer, Gate};

/// What `Retry-After` says: longer than any run of a row takes.
const WAIT: &str = "30";

fn says<const STATUS: u16>(gate: &Gate) -> Answer {
    Answer::json(STATUS, ILL_BODY).held_at(gate)
}

fn says_when<const STATUS: u16>(gate: &Gate) -> Answer {
    Answer::json_with(STATUS, &format!("retry-after: {WAIT}\r\n"), ILL_BODY).held_at(gate)
}

/// The status passes through, the first time it comes.
fn passes(
    ill: fn(&Gate) -> Answer,
    status: u16,
    retry_after: Option<&'static str>,
    outcome: &'static str,
) -> Row {
    Row::one(Ill::Does(ill), End::passed(status, retry_after, outcome, 1), 1)
}

/// The status is worth another try.
fn moves(ill: fn(&Gate) -> Answer, name: &'static str) -> Row {
    Row::one(Ill::Does(ill), End::good(2).error(name), 2).retried(name)
}

/// The status passes through, the second time it comes.
fn passes_twice(
    ill: fn(&Gate) -> Answer,
    status: u16,
    retry_after: Option<&'static str>,
    name: &'static str,
) -> Row {
    Row::both(Ill::Does(ill), End::passed(status, retry_after, "engine_error", 2).error(name), 2)
        .retried(name)
}

rows! {
    it_answers_429 => passes(says::<429>, 429, None, "client_error").error("status_429").next(Next::Unasked);

    it_answers_429_with_a_retry_after =>
        passes(says_when::<429>, 429, Some(WAIT), "client_error").error("status_429").next(Next::Other);

    it_answers_500 => passes(says::<500>, 500, None, "engine_error").error("status_500").next(Next::Unasked);

    it_answers_500_with_a_retry_after =>
        passes(says_when::<500>, 500, Some(WAIT), "engine_error").error("status_500").next(Next::Unasked);

    it_answers_500_and_that_is_worth_a_retry =>
        moves(says::<500>, "status_500")
            .upstream("retry: { on: [connect, closed, status_500] }")
            .ejected("status_500");

    every_backend_answers_500_and_that_is_worth_a_retry =>
        passes_twice(says::<500>, 500, None, "status_500")
            .upstream("retry: { on: [connect, closed, status_500] }");

    it_answers_501 => passes(says::<501>, 501, None, "engine_error").error("status_other");

    it_answers_502 => moves(says::<502>, "status_502").ejected("status_502");

    it_answers_502_with_a_retry_after => moves(says_when::<502>, "status_502").ejected("status_502");

    every_backend_answers_502 => passes_twice(says::<502>, 502, None, "status_502");

    it_answers_503 => moves(says::<503>, "status_503").next(Next::Unasked);

    it_answers_503_with_a_retry_after => moves(says_when::<503>, "status_503").next(Next::Other);

    every_backend_answers_503 => passes_twice(says::<503>, 503, None, "status_503");

    every_backend_answers_503_with_a_retry_after =>
        passes_twice(says_when::<503>, 503, Some(WAIT), "status_503");

    it_answers_504 => passes(says::<504>, 504, None, "engine_error").error("status_504").next(Next::Unasked);

    it_answers_504_with_a_retry_after =>
        passes(says_when::<504>, 504, Some(WAIT), "engine_error").error("status_504").next(Next::Unasked);

    a_retry_is_switched_off_and_it_answers_503 =>
        passes(says::<503>, 503, None, "engine_error")
            .error("status_503")
            .upstream("retry: { on: [] }")
            .next(Next::Unasked);
}
