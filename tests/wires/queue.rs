//! Where every backend is full, requests wait: in order, within bounds, and never for a backend that is down.

use crate::support::client::{Answer as Reply, Client, Head, Line};
use crate::support::engine::{Answer, Engine, Gate, Seen};
use crate::support::proxy::Proxy;
use crate::support::stage::{BOTH, answered, assert_error, before, chat, counts, retry_after, sent};

/// Waits until that many requests are in the queue.
async fn queued(proxy: &Proxy, count: f64) {
    proxy.counts("plimsoll_queued_requests", &[], count).await;
}

/// A proxy that lets one request at a time to its backend, which holds it until the gate is opened.
async fn one_at_a_time(queue: &str) -> (Proxy, Engine, Gate) {
    let gate = Gate::new();
    let scripted = gate.clone();
    let engine = Engine::start(move |_| Answer::json(200, "{}").held_at(&scripted));
    let proxy = before(std::slice::from_ref(&engine), &format!("max_requests: 1, queue: {queue}")).await;
    (proxy, engine, gate)
}

async fn whole(head: Head, client: &mut Client) -> Reply {
    let (body, complete) = client.rest().await;
    Reply { status: head.status, headers: head.headers, body, complete }
}

#[tokio::test]
async fn beyond_max_requests_a_request_waits_and_beyond_the_queue_it_is_a_503() {
    let (proxy, engine, gate) = one_at_a_time("{ length: 1, timeout: 30s }").await;
    let first = sent(&proxy, Line::Http1).await;
    gate.reached(1).await;
    // One of these two waits, the other finds the queue full: whichever comes second.
    let waiting = [sent(&proxy, Line::Http1).await, sent(&proxy, Line::Http2).await];
    let [mut one, mut two] = waiting;
    let (reply, queued) = tokio::select! {
        head = one.head() => (whole(head, &mut one).await, two),
        head = two.head() => (whole(head, &mut two).await, one),
    };
    assert_error(&reply, 503, "queue_full");
    assert!(retry_after(&reply) >= 1);
    assert_eq!(engine.count(), 1);
    gate.open();
    assert_eq!(answered(first).await, 200);
    gate.reached(2).await;
    gate.open();
    assert_eq!(answered(queued).await, 200);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_request_that_waits_too_long_in_the_queue_is_a_503() {
    let (proxy, engine, gate) = one_at_a_time("{ length: 10, timeout: 200ms }").await;
    let first = sent(&proxy, Line::Http1).await;
    gate.reached(1).await;
    for line in BOTH {
        assert_error(&proxy.client(line).await.ask(&chat()).await, 503, "queue_timeout");
    }
    gate.open();
    assert_eq!((answered(first).await, engine.count()), (200, 1));
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn requests_that_wait_are_served_in_the_order_of_their_arrival() {
    let (proxy, engine, gate) = one_at_a_time("{ length: 10, timeout: 30s }").await;
    let mut clients: Vec<Client> = Vec::new();
    let names = ["first", "second", "third", "fourth"];
    for ((waiting, name), line) in (0..).zip(names).zip([Line::Http2, Line::Http1, Line::Http2, Line::Http1])
    {
        let mut client = proxy.client(line).await;
        client.send(&chat().with("x-name", name)).await;
        gate.reached(1).await;
        queued(&proxy, f64::from(waiting)).await;
        clients.push(client);
    }
    for (client, served) in clients.into_iter().zip(1..) {
        gate.reached(served).await;
        gate.open();
        assert_eq!(answered(client).await, 200);
    }
    let order: Vec<String> =
        engine.seen().iter().map(|seen| seen.head.header("x-name").unwrap().to_owned()).collect();
    assert_eq!(order, names);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_request_waits_for_the_backend_that_is_full_while_the_other_is_down() {
    let gate = Gate::new();
    let engines = [(); 2].map(|()| {
        let gate = gate.clone();
        Engine::start(move |_| Answer::json(200, "{}").held_at(&gate))
    });
    let probe = "engine: vllm, probe: { interval: 100ms, timeout: 5s, down_after: 1 }";
    let proxy = before(&engines, &format!("max_requests: 1, {probe}")).await;
    engines[1].set_health(503);
    proxy.counts("plimsoll_backend_up", &[("backend", &engines[1].address())], 0.0).await;
    let first = sent(&proxy, Line::Http1).await;
    gate.reached(1).await;
    let second = sent(&proxy, Line::Http2).await;
    queued(&proxy, 1.0).await;
    gate.open();
    assert_eq!(answered(first).await, 200);
    gate.reached(2).await;
    gate.open();
    assert_eq!(answered(second).await, 200);
    assert_eq!(counts(&engines), [2, 0]);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn the_last_place_is_kept_by_a_request_whose_pooled_connection_was_dead() {
    let gate = Gate::new();
    let scripted = gate.clone();
    let alive_once = move |seen: &Seen| match seen.nth {
        0 => Answer::json(200, "{}").held_at(&scripted),
        _ => Answer::nothing(),
    };
    let engine = Engine::start(alive_once);
    let proxy = before(std::slice::from_ref(&engine), "max_requests: 1").await;
    let first = sent(&proxy, Line::Http1).await;
    gate.reached(1).await;
    // Both find the connection of the one before them dead; the second while the third waits for its place.
    let second = sent(&proxy, Line::Http1).await;
    queued(&proxy, 1.0).await;
    let third = sent(&proxy, Line::Http1).await;
    queued(&proxy, 2.0).await;
    for (client, served) in [first, second, third].into_iter().zip(1..) {
        gate.reached(served).await;
        gate.open();
        assert_eq!(answered(client).await, 200, "request {served}");
    }
    assert!(engine.seen().iter().any(|seen| seen.nth == 1), "no connection was used twice");
    assert_eq!(proxy.metrics().await.sum("plimsoll_ejections_total", &[]), 0.0);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn an_engine_that_closes_after_each_answer_serves_one_request_after_another() {
    let engine = Engine::start(|_| Answer::json(200, "{}").close());
    let proxy = before(std::slice::from_ref(&engine), "max_requests: 1").await;
    for _ in 0..10 {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
    }
    assert_eq!(engine.count(), 10);
    proxy.assert_at_rest().await;
}
