//! How a backend that was left alone comes back: by one request, by a probe, by its first byte.

use crate::support::client::Line;
use crate::support::engine::{Answer, Engine, Gate, Seen, delta};
use crate::support::stage::{before, chat, counts, reply, sent};
use crate::support::wait_until;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

#[tokio::test]
async fn a_backend_that_returns_is_tried_by_one_request_and_gets_others_when_that_is_answered() {
    let (ill, gate) = (Arc::new(AtomicBool::new(true)), Gate::new());
    let (state, held) = (ill.clone(), gate.clone());
    let failing = move |_: &Seen| match state.load(SeqCst) {
        true => Answer::nothing(),
        false => Answer::json(200, "{}").held_at(&held),
    };
    let engines = [Engine::start(failing), Engine::good()];
    let policy = "policy: round_robin, slow_start: off, fail_timeout: 1s";
    let proxy = before(&engines, policy).await;
    while engines[0].count() < 3 {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
    }
    ill.store(false, SeqCst);
    engines.iter().for_each(Engine::forget);
    let mut clients = Vec::new();
    wait_until("the trial", async || {
        clients.push(sent(&proxy, Line::Http1).await);
        engines[0].count() == 1
    })
    .await;
    for _ in 0..6 {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
    }
    assert_eq!(engines[0].count(), 1, "one trial at a time");
    gate.open();
    for mut client in clients {
        assert_eq!(reply(&mut client).await.status, 200);
    }
    (0..3).for_each(|_| gate.open());
    for _ in 0..6 {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
    }
    assert_eq!(engines[0].count(), 4, "it has its share again");
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_probe_that_is_answered_ends_an_ejection_for_refused_connections() {
    let engines = [Engine::dead(|_| Answer::json(200, "{}")), Engine::good()];
    let probe = "probe: { interval: 100ms, timeout: 2s, down_after: 100, up_after: 1 }";
    let policy = "engine: vllm, policy: round_robin, slow_start: off, fail_timeout: 1h";
    let proxy = before(&engines, &format!("{policy}, {probe}")).await;
    let ejected = [("backend", &*engines[0].address())];
    wait_until("the ejection", async || {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
        proxy.metrics().await.sum("plimsoll_ejections_total", &ejected) == 1.0
    })
    .await;
    engines[0].revive();
    wait_until("the return", async || {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
        engines[0].count() > 0
    })
    .await;
    assert!(proxy.log().contains("backend returns"), "{}", proxy.log());
}

#[tokio::test]
async fn a_backend_that_falls_silent_gets_no_more_requests_and_keeps_its_stream() {
    let gate = Gate::new();
    let held = gate.clone();
    let stream =
        move |_: &Seen| Answer::stream_of(&[&delta("one"), &delta("two")]).gated_after_first_event(&held);
    let engines = [Engine::start(stream), Engine::good()];
    let proxy = before(&engines, "policy: round_robin, stall_timeout: 500ms").await;
    let mut streams = Vec::new();
    while engines[0].count() == 0 {
        streams.push(sent(&proxy, Line::Http1).await);
        wait_until("the engine", async || counts(&engines).iter().sum::<usize>() == streams.len()).await;
    }
    proxy.counts("plimsoll_backend_stalled", &[("backend", &engines[0].address())], 1.0).await;
    engines.iter().for_each(Engine::forget);
    for _ in 0..6 {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
    }
    assert_eq!(counts(&engines), [0, 6]);
    gate.open();
    for mut stream in streams {
        let reply = reply(&mut stream).await;
        assert!(reply.status == 200 && reply.complete, "{}", reply.text());
    }
    proxy.counts("plimsoll_backend_stalled", &[], 0.0).await;
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_lone_session_does_not_stay_with_a_backend_that_only_fails() {
    let first = Arc::new(AtomicU64::new(u64::MAX));
    let engines: [Engine; 2] = std::array::from_fn(|number| {
        let (first, number) = (first.clone(), number as u64);
        Engine::start(move |_| {
            // Whoever is asked first drains, as vLLM does: healthy, and 500 to every chat.
            let _later = first.compare_exchange(u64::MAX, number, SeqCst, SeqCst);
            let status = if first.load(SeqCst) == number { 500 } else { 200 };
            Answer::json(status, "{}")
        })
    });
    let proxy = before(&engines, "policy: prefix_hash, fail_timeout: 60s").await;
    let asked = chat().with("x-session-id", "one");
    let mut failed = 0;
    wait_until("the session to be served elsewhere", async || {
        let served = proxy.ask(&asked).await.status == 200;
        failed += usize::from(!served);
        served
    })
    .await;
    assert_eq!(failed, 3, "`max_fails` of them");
    proxy.counts("plimsoll_backend_up", &[], 2.0).await;
    wait_until("its next fault, which counts now", async || {
        proxy.ask(&asked).await;
        proxy.metrics().await.sum("plimsoll_ejections_total", &[("reason", "status_500")]) == 1.0
    })
    .await;
    for _ in 0..4 {
        assert_eq!(proxy.ask(&asked).await.status, 200);
    }
    proxy.assert_at_rest().await;
}
