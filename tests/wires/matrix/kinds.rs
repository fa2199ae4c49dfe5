//! Engines of a kind: what vLLM, SGLang and llama.cpp do where others would fail, and what no single engine
//! shows.

use super::backend::Backend;
use super::row::{End, Gets, ILL_BODY, Row};
use super::rows;
use super::run::Run;
use crate::support::client::{Answer as Reply, Request};
use crate::support::engine::{Answer, Engine, Gate, Seen, delta};
use crate::support::stage::reply;
use futures::FutureExt;
use futures::future::LocalBoxFuture;

type Replies<'a> = LocalBoxFuture<'a, Vec<Option<Reply>>>;

const GOOD: End = End::good(1);
const PASSED: End = End::passed(500, None, "engine_error", 1).error("status_500");
const MOVED: End = End::good(2).error("status_500");

/// The row's requests, one after another, each settled before the next.
fn in_turn<'a>(run: &'a Run<'a>) -> Replies<'a> {
    async move {
        let mut replies = Vec::new();
        for number in 0..run.row.ends.len() {
            replies.push(run.ask(number).await);
            run.settled(number).await;
        }
        replies
    }
    .boxed_local()
}

/// An engine that drains, before one that is well.
fn draining_as_vllm(_: &Gate) -> Vec<Backend> {
    let well = Backend::doing(super::backend::good);
    vec![Backend::doing(|_| Answer::json(500, ILL_BODY)), well]
}

/// Probes that would find at once whatever a health check shows.
const PROBES: &str =
    "engine: vllm, policy: round_robin, probe: { interval: 50ms, timeout: 5s, down_after: 1 }";

/// The health check of an engine fails while it goes on serving.
fn drain_as_sglang<'a>(run: &'a Run<'a>) -> Replies<'a> {
    async move {
        let mut first = run.sent(0).await;
        run.gate.reached(1).await;
        run.engine(0).set_health(503);
        run.proxy.counts("plimsoll_backend_up", &[("upstream", run.name)], 1.0).await;
        let mut second = run.sent(1).await;
        run.engine(1).received(1).await;
        run.gate.reached(2).await;
        (0..2).for_each(|_| run.gate.open());
        vec![Some(reply(&mut first).await), Some(reply(&mut second).await)]
    }
    .boxed_local()
}

/// An engine that is told to stop: its port refuses, and its stream is neither continued nor ended.
fn stop_as_vllm<'a>(run: &'a Run<'a>) -> Replies<'a> {
    async move {
        let mut client = run.sent(0).await;
        run.gate.reached(1).await;
        run.engine(0).close_port();
        vec![Some(reply(&mut client).await)]
    }
    .boxed_local()
}

/// The same, but the stream goes on once the probes have found the port closed.
fn finish_and_stop<'a>(run: &'a Run<'a>) -> Replies<'a> {
    async move {
        let mut client = run.sent(0).await;
        run.gate.reached(1).await;
        run.engine(0).close_port();
        let labels = [("upstream", run.name), ("backend", &*run.engine(0).address())];
        run.proxy.counts("plimsoll_backend_up", &labels, 0.0).await;
        run.gate.open();
        vec![Some(reply(&mut client).await)]
    }
    .boxed_local()
}

/// A backend whose stream stands still at the gate after its first event, and one that is well.
fn begun(gate: &Gate) -> Vec<Backend> {
    let gate = gate.clone();
    let stream = move |_: &Seen| Answer::stream().event(&delta("a")).wait(&gate).event("[DONE]").end();
    vec![Backend::doing(stream), Backend::doing(super::backend::good)]
}

/// The same before its first event.
fn opened(gate: &Gate) -> Vec<Backend> {
    let gate = gate.clone();
    let stream = move |_: &Seen| Answer::stream().wait(&gate).event("[DONE]").end();
    vec![Backend::doing(stream), Backend::doing(super::backend::good)]
}

/// Probes that take a backend for gone after a third of a second.
const HASTY_PROBES: &str = "engine: vllm, probe: { interval: 50ms, timeout: 300ms, down_after: 3 }";

/// Answers before the body is sent: 413, and the connection is closed.
fn upload<'a>(run: &'a Run<'a>) -> Replies<'a> {
    async move {
        let body = format!(r#"{{"model":"tiny","prompt":"{}"}}"#, "x".repeat(8 << 20));
        let request = run.addressed(Request::post("/v1/completions", body), "0");
        vec![Some(run.proxy.client(run.line).await.ask(&request).await)]
    }
    .boxed_local()
}

/// Asks for a stream of 32 MiB and reads none of it until it is too late.
fn do_not_read<'a>(run: &'a Run<'a>) -> Replies<'a> {
    async move {
        let mut client = run.sent(0).await;
        run.engine(0).abandoned(1).await;
        vec![Some(reply(&mut client).await)]
    }
    .boxed_local()
}

fn closes_after_each_stream(_: &Gate) -> Vec<Backend> {
    vec![Backend::doing(|_| Answer::stream_of(&[&delta("hello")]).close())]
}

fn closes_a_reused_connection(_: &Gate) -> Vec<Backend> {
    vec![Backend::doing(|seen: &Seen| match seen.nth {
        0 => super::backend::good(seen),
        _ => Answer::nothing(),
    })]
}

rows! {
    llama_cpp_closes_its_connection_after_every_stream =>
        Row::play(closes_after_each_stream, in_turn, vec![GOOD; 3], 3).streamed();

    it_closes_a_reused_connection_when_the_next_request_comes =>
        Row::play(
            closes_a_reused_connection,
            in_turn,
            vec![GOOD, End::good(2).error("stale_connection")],
            3,
        )
        // Pingora does not always keep a connection that served HTTP/2.
        .over_http1()
        // Kept for as long as this test may take.
        .beside("keepalive: { idle_timeout: 60s }")
        .retried("stale_connection");

    vllm_drains_with_health_200_and_every_chat_a_500 =>
        Row::play(
            draining_as_vllm,
            in_turn,
            vec![PASSED, GOOD, PASSED, PASSED, GOOD, GOOD, GOOD, GOOD],
            8,
        )
        .upstream("max_fails: 3")
        .beside(PROBES)
        .ejected("status_500");

    vllm_drains_so_and_a_500_is_worth_a_retry =>
        Row::play(
            draining_as_vllm,
            in_turn,
            vec![MOVED, GOOD, MOVED, MOVED, GOOD, GOOD, GOOD, GOOD],
            11,
        )
        .upstream("max_fails: 3, retry: { on: [connect, closed, status_500] }")
        .beside(PROBES)
        .retried_times(3, "status_500")
        .ejected("status_500");

    vllm_is_stopped_and_leaves_a_stream_open_in_silence =>
        Row::play(begun, stop_as_vllm, vec![End::cut(Gets::Cut, "closed")], 1)
            .streamed()
            .beside(HASTY_PROBES);

    vllm_is_stopped_so_before_the_first_event =>
        Row::play(opened, stop_as_vllm, vec![End::good(2).error("closed")], 2)
            .streamed()
            .beside(HASTY_PROBES)
            .retried("closed")
            .ejected("closed");

    dynamo_is_stopped_and_finishes_its_stream_with_its_port_closed =>
        Row::play(begun, finish_and_stop, vec![GOOD], 1).streamed().beside(PROBES);

    sglang_drains_with_health_503_and_serves_what_it_has =>
        Row::play(|gate| vec![Backend::well(gate), Backend::well(gate)], drain_as_sglang, vec![GOOD; 2], 2)
            .streamed()
            .beside(PROBES);

    llama_cpp_answers_413_and_closes_before_it_has_the_body =>
        Row::play(
            |_| vec![Backend::Engine(Engine::hasty(|_| Answer::json(413, ILL_BODY).close()))],
            upload,
            vec![End::passed(413, None, "client_error", 1)],
            1,
        );

    three_backends_answer_503 =>
        Row::play(
            |_| [(); 3].map(|()| Backend::doing(|_| Answer::json(503, ILL_BODY))).into(),
            in_turn,
            vec![End::passed(503, None, "engine_error", 2).error("status_503")],
            2,
        )
        .retried("status_503");

    a_client_does_not_read_its_stream =>
        Row::play(
            |_| {
                vec![Backend::doing(|_| Answer::stream().event(&delta("a")).event(&"x".repeat(32 << 20)).end())]
            },
            do_not_read,
            vec![End::gone(Gets::Truncated, Some(1))],
            1,
        )
        .streamed()
        .limits("limits: { client_write_timeout: 300ms }");
}
