//! Engines that fail: before they have the request, before the answer, and in the middle of it.

use super::row::{Charged, End, Gets, Ill, Next, Row, Scene};
use super::{rows, run, statuses};
use crate::support::engine::{Answer, Gate, delta};

const CUT: End = End::cut(Gets::Cut, "closed");

/// A stream whose first content is with the proxy, and then the gate.
fn begun(gate: &Gate) -> Answer {
    Answer::stream().event(&delta("a")).wait(gate)
}

fn nothing(gate: &Gate) -> Answer {
    Answer::nothing().held_at(gate)
}

fn silence(gate: &Gate) -> Answer {
    Answer::silence().held_at(gate)
}

fn nonsense(gate: &Gate) -> Answer {
    Answer::default().write("SSH-2.0-OpenSSH_9.2\r\n\r\n").close().held_at(gate)
}

fn error_first(gate: &Gate) -> Answer {
    Answer::stream_of(&[r#"{"error":{"message":"EngineCore encountered an issue.","code":500}}"#])
        .held_at(gate)
}

fn full_first(gate: &Gate) -> Answer {
    Answer::stream_of(&[r#"{"error":{"message":"The request queue is full.","code":503}}"#]).held_at(gate)
}

rows! {
    it_refuses_connections =>
        Row::one(Ill::Refuses, End::good(2).error("connect"), 1).retried("connect").ejected("connect");

    every_backend_refuses_connections =>
        Row::both(Ill::Refuses, End::own(502, "upstream_unreachable", 2), 0)
            .charged(Charged::Unseen)
            .retried("connect")
            .ejected("connect");

    its_host_does_not_answer_connections =>
        Row::one(Ill::BlackHole, End::good(2).error("connect"), 1)
            .upstream("timeouts: { connect: 200ms }")
            .retried("connect")
            .ejected("connect");

    it_accepts_and_closes =>
        Row::one(Ill::ClosesAtOnce, End::good(2).error("closed"), 1).retried("closed").ejected("closed");

    it_takes_the_request_and_closes =>
        Row::one(Ill::Does(nothing), End::good(2).error("closed"), 2).retried("closed").ejected("closed");

    every_backend_takes_the_request_and_closes =>
        Row::both(Ill::Does(nothing), End::own(502, "upstream_closed", 2), 2).retried("closed");

    it_takes_the_request_and_resets_the_connection =>
        Row::one(Ill::Does(|gate| Answer::default().reset().held_at(gate)), End::good(2).error("closed"), 2)
            .retried("closed")
            .ejected("closed");

    it_closes_in_the_middle_of_its_header =>
        Row::one(
            Ill::Does(|gate| Answer::default().write("HTTP/1.1 200 OK\r\nx-a").wait(gate).close()),
            End::good(2).error("closed"),
            2,
        )
        .retried("closed")
        .ejected("closed");

    it_answers_nonsense =>
        Row::one(Ill::Does(nonsense), End::good(2).error("closed"), 2).retried("closed").ejected("closed");

    it_says_nothing_until_the_read_timeout =>
        Row::one(Ill::Does(silence), End::own(504, "upstream_timeout", 1), 1)
            .upstream("timeouts: { read: 1s }").next(Next::Unasked);

    it_says_nothing_and_a_timeout_is_worth_a_retry =>
        Row::one(Ill::Does(silence), End::good(2).error("timeout"), 2)
            .upstream("timeouts: { read: 1s }, retry: { on: [connect, closed, timeout] }")
            .retried("timeout")
            .ejected("timeout");

    it_closes_a_stream_after_its_header_and_before_the_first_event =>
        Row::one(Ill::Does(|gate| Answer::stream().wait(gate).close()), End::good(2).error("closed"), 2)
            .streamed()
            .retried("closed")
            .ejected("closed");

    it_falls_silent_after_the_header_of_a_stream =>
        Row::one(
            Ill::Does(|gate| Answer::stream().wait(gate).wait(&Gate::new())),
            End::own(504, "upstream_timeout", 1),
            1,
        )
        .streamed()
        .upstream("timeouts: { read: 1s }").next(Next::Unasked);

    an_error_of_500_is_the_first_event_of_a_200 =>
        Row::one(Ill::Does(error_first), End::good(2).error("stream_error"), 2)
            .streamed()
            .retried("stream_error")
            .ejected("stream_error");

    an_error_of_503_is_the_first_event_of_a_200 =>
        Row::one(Ill::Does(full_first), End::good(2).error("stream_error"), 2)
            .streamed()
            .retried("stream_error")
            .next(Next::Unasked);

    every_backend_opens_its_200_with_an_error_of_500 =>
        Row::both(Ill::Does(error_first), End::stream_error("engine_error", 2).error("stream_error"), 2)
            .streamed()
            .retried("stream_error");

    a_mistake_of_the_client_is_the_first_event_of_a_200 =>
        Row::one(
            Ill::Does(|gate| {
                Answer::stream_of(&[r#"{"error":{"message":"too long","code":400}}"#]).held_at(gate)
            }),
            End::stream_error("client_error", 1),
            1,
        )
        .streamed();

    an_error_comes_later_in_a_200 =>
        Row::one(
            Ill::Does(|gate| {
                begun(gate).event(r#"{"error":{"message":"EngineCore died","code":500}}"#).event("[DONE]").end()
            }),
            End::stream_error("engine_error", 1).error("stream_error"),
            1,
        )
        .streamed()
        .charged(Charged::Place);

    it_closes_in_the_middle_of_a_stream =>
        Row::one(Ill::Does(|gate| begun(gate).close()), CUT, 1).streamed().charged(Charged::Place).next(Next::Unasked);

    it_resets_the_connection_in_the_middle_of_a_stream =>
        Row::one(Ill::Does(|gate| begun(gate).reset()), CUT, 1).streamed().charged(Charged::Place).next(Next::Unasked);

    it_closes_in_the_middle_of_an_event =>
        Row::one(Ill::Does(|gate| begun(gate).chunk("data: {\"choi").close()), CUT, 1)
            .streamed()
            .charged(Charged::Place).next(Next::Unasked);

    it_closes_in_the_middle_of_a_chunk =>
        Row::one(Ill::Does(|gate| begun(gate).write("100\r\ndata: {\"choices").close()), CUT, 1)
            .streamed()
            .charged(Charged::Place).next(Next::Unasked);

    it_falls_silent_in_the_middle_of_a_stream =>
        Row::one(
            Ill::Does(|gate| begun(gate).wait(&Gate::new())),
            End::cut(Gets::Cut, "timeout"),
            1,
        )
        .streamed()
        .charged(Charged::Place)
        .upstream("timeouts: { read: 1s }").next(Next::Unasked);

    it_closes_in_the_middle_of_an_answer_of_known_length =>
        Row::one(
            Ill::Does(|gate| {
                let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n";
                Answer::default().write(format!("{head}{{")).wait(gate).close()
            }),
            End::cut(Gets::Truncated, "closed"),
            1,
        )
        .charged(Charged::Place).next(Next::Unasked);
}

#[tokio::test]
async fn with_retries_off_every_request_is_seen_exactly_once() {
    let mut rows = rows();
    rows.extend(statuses::rows());
    rows.retain(|(_, row)| matches!(row.scene, Scene::One(Ill::Does(_))) && !row.upstream.contains("retry:"));
    assert!(rows.len() > 20, "{}", rows.len());
    run::keep_without_retries(rows).await;
}
