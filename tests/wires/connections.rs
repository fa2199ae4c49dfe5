//! Connections to the engines: used again, closed in time, and never mistaken for a fault when they die idle.
//!
//! A pooled connection that breaks under a request blames nobody, since it may have been dead already; but it counts
//! as a try, since the engine may have had the request and died of it.

use crate::support::client::{Line, Request};
use crate::support::engine::{Answer, Engine, Gate, Seen};
use crate::support::one_upstream;
use crate::support::proxy::Proxy;
use crate::support::stage::{BOTH, assert_error, before, chat, counts, reply, sent, total};
use std::time::Duration;

/// Longer than a connection that was dead already takes to show it (one second).
const WORKED_ON: Duration = Duration::from_millis(1500);

#[tokio::test]
async fn upstream_connections_are_reused() {
    let engine = Engine::good();
    let proxy =
        Proxy::start(&format!("server: {{ threads: 1 }}\n{}", one_upstream(&[engine.address()], ""))).await;
    for line in BOTH {
        for _ in 0..5 {
            assert_eq!(proxy.client(line).await.ask(&chat()).await.status, 200);
        }
    }
    let connections: std::collections::HashSet<u64> =
        engine.seen().iter().map(|seen| seen.connection).collect();
    assert!(connections.len() <= 2, "{connections:?} connections for ten requests one after another");
}

#[tokio::test]
async fn a_connection_that_the_engine_closed_while_idle_is_invisible() {
    let engine = Engine::start(|_| Answer::json(200, "{}").close());
    let proxy = before(std::slice::from_ref(&engine), "max_fails: 1, fail_timeout: 60s").await;
    for line in BOTH {
        let mut client = proxy.client(line).await;
        for _ in 0..10 {
            assert_eq!(client.ask(&chat()).await.status, 200);
        }
    }
    assert_eq!(engine.count(), 20);
    assert_eq!(proxy.metrics().await.sum("plimsoll_ejections_total", &[]), 0.0);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_reused_connection_that_dies_under_a_request_is_invisible_even_with_one_backend() {
    for death in [Answer::nothing, || Answer::default().reset()] {
        let engine = Engine::start(move |seen| if seen.nth > 0 { death() } else { Answer::json(200, "{}") });
        let proxy = before(std::slice::from_ref(&engine), "max_fails: 1, fail_timeout: 60s").await;
        for line in BOTH {
            let mut client = proxy.client(line).await;
            for _ in 0..6 {
                let reply = client.ask(&chat()).await;
                assert_eq!(reply.status, 200, "{line:?}: {}", reply.text());
            }
        }
        assert_eq!(proxy.metrics().await.sum("plimsoll_ejections_total", &[]), 0.0);
        proxy.assert_at_rest().await;
    }
}

/// Answers the first request of each connection; any further one, and any that is to die, is worked on until
/// the gate opens, and then the process is gone.
fn dies_at_its_second_request(gate: &Gate) -> impl Fn(&Seen) -> Answer + Clone + Send + Sync + 'static {
    let gate = gate.clone();
    move |seen| match (seen.nth, seen.head.header("x-dies")) {
        (0, None) => Answer::json(200, "{}"),
        _ => Answer::nothing().held_at(&gate),
    }
}

/// Sends as many requests as there are engines, one after another, so that each keeps a connection.
async fn warm(proxy: &Proxy, engines: &[Engine]) {
    for (_, settled) in engines.iter().zip(1_u32..) {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
        proxy.counts("plimsoll_requests_total", &[("outcome", "ok")], f64::from(settled)).await;
    }
    assert!(counts(engines).iter().all(|&count| count == 1), "{:?}", counts(engines));
    engines.iter().for_each(Engine::forget);
}

#[tokio::test]
async fn an_engine_that_dies_long_into_a_request_on_a_reused_connection_has_had_its_try() {
    let gate = Gate::new();
    let engine = [Engine::start(dies_at_its_second_request(&gate))];
    let proxy = before(&engine, "retry: { tries: 1 }, max_fails: 0").await;
    warm(&proxy, &engine).await;
    let mut client = sent(&proxy, Line::Http1).await;
    gate.reached(1).await;
    tokio::time::sleep(WORKED_ON).await;
    gate.open();
    assert_error(&reply(&mut client).await, 502, "upstream_closed");
    let seen = engine[0].seen();
    assert_eq!((seen.len(), seen[0].nth), (1, 1), "once, and on the connection of the request before");
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_request_whose_engines_die_long_into_it_moves_once_and_no_further() {
    let gate = Gate::new();
    let engines: [Engine; 3] = std::array::from_fn(|_| Engine::start(dies_at_its_second_request(&gate)));
    // Idle connections are kept for as long as this test may take.
    let proxy = before(&engines, "policy: round_robin, max_fails: 0, keepalive: { idle_timeout: 60s }").await;
    warm(&proxy, &engines).await;
    let mut client = proxy.client(Line::Http1).await;
    client.send(&chat().with("x-dies", "1")).await;
    for death in 1..=2 {
        gate.reached(death).await;
        tokio::time::sleep(WORKED_ON).await;
        gate.open();
    }
    assert_error(&reply(&mut client).await, 502, "upstream_closed");
    assert_eq!(total(&engines), 2);
    assert!(engines.iter().all(|engine| engine.count() <= 1), "{:?}", counts(&engines));
    let mut nth: Vec<u64> = engines.iter().flat_map(Engine::seen).map(|seen| seen.nth).collect();
    nth.sort_unstable();
    assert_eq!(nth, [0, 1], "the first on a connection that was there, the second on a new one");
    proxy.counts("plimsoll_retries_total", &[("reason", "closed")], 1.0).await;
    proxy.counts("plimsoll_retries_total", &[], 1.0).await;
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn engines_that_die_at_once_on_reused_connections_have_had_their_tries() {
    for (tries, retries) in [(1, 0.0), (2, 1.0)] {
        let dies = |seen: &Seen| if seen.nth == 0 { Answer::json(200, "{}") } else { Answer::nothing() };
        let engines: [Engine; 4] = std::array::from_fn(|_| Engine::start(dies));
        // Fresh connections are answered: only an engine that is asked on its old one dies.
        let more = format!(
            "policy: round_robin, max_fails: 1, keepalive: {{ idle_timeout: 60s }}, retry: {{ tries: {tries} }}"
        );
        let proxy = before(&engines, &more).await;
        warm(&proxy, &engines).await;
        let reply = proxy.ask(&chat()).await;
        if tries == 1 {
            assert_error(&reply, 502, "upstream_closed");
        } else {
            assert_eq!(reply.status, 200, "on a new connection: {}", reply.text());
        }
        assert_eq!(total(&engines), tries);
        proxy.counts("plimsoll_retries_total", &[("reason", "stale_connection")], retries).await;
        assert_eq!(proxy.metrics().await.sum("plimsoll_ejections_total", &[]), 0.0);
        proxy.assert_at_rest().await;
    }
}

#[tokio::test]
async fn a_request_that_kills_every_engine_at_once_kills_two_and_ejects_nobody() {
    // What is asked before it is good; of the poison each dies, on whatever connection.
    let dies = |seen: &Seen| {
        let is_poison = seen.body.windows(6).any(|bytes| bytes == b"poison");
        if is_poison { Answer::nothing() } else { Answer::json(200, "{}") }
    };
    for line in BOTH {
        let engines: [Engine; 4] = std::array::from_fn(|_| Engine::start(dies));
        let more = "policy: round_robin, max_fails: 1, keepalive: { idle_timeout: 60s }";
        let proxy = before(&engines, more).await;
        warm(&proxy, &engines).await;
        let reply = proxy.client(line).await.ask(&Request::chat("tiny", "poison")).await;
        assert_error(&reply, 502, "upstream_closed");
        assert_eq!(total(&engines), 2);
        assert_eq!(proxy.metrics().await.sum("plimsoll_ejections_total", &[]), 0.0);
        proxy.assert_at_rest().await;
    }
}

#[tokio::test]
async fn a_connection_is_closed_after_as_many_requests_as_it_may_carry() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "keepalive: { requests: 2, idle_timeout: 60s }").await;
    for settled in 1_u32..=6 {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
        proxy.counts("plimsoll_requests_total", &[("outcome", "ok")], f64::from(settled)).await;
    }
    let seen = engine[0].seen();
    assert_eq!(seen.iter().map(|seen| seen.nth).collect::<Vec<_>>(), [0, 1, 0, 1, 0, 1]);
    let connections: Vec<u64> = seen.iter().map(|seen| seen.connection).collect();
    assert!(connections.as_chunks::<2>().0.iter().all(|[first, second]| first == second), "{connections:?}");
}
