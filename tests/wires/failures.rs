//! What clients see, and what engines are spared, when a backend refuses, fails, stalls or dies.
//!
//! A request is sent again only while no byte of an answer has gone to the client, never more than once, to a
//! backend that was not tried; 503 and 429 are back-pressure and blame nobody; nobody is ejected for ever,
//! and an ejected backend is better than an error.

use crate::support::client::{Framing, Line, Request};
use crate::support::engine::{Answer, Engine, Gate, Seen};
use crate::support::proxy::Proxy;
use crate::support::stage::{BOTH, alike, assert_error, before, chat, counts, retry_after, total};
use crate::support::{one_upstream, wait_until};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

#[tokio::test]
async fn a_refused_connection_goes_to_another_backend_and_is_ejected_after_three() {
    let engines = [Engine::dead(|_| Answer::nothing()), Engine::good()];
    let proxy = before(&engines, "policy: round_robin, max_fails: 3, fail_timeout: 60s").await;
    for _ in 0..20 {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
    }
    let dead = engines[0].address();
    proxy.counts("plimsoll_ejections_total", &[("backend", &dead)], 1.0).await;
    proxy.counts("plimsoll_attempts_total", &[("backend", &dead)], 3.0).await;
    proxy.counts("plimsoll_retries_total", &[("reason", "connect")], 3.0).await;
    assert_eq!(engines[1].count(), 20);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn an_ejected_backend_is_spared_and_comes_back_after_its_time() {
    for (fail_timeout, returns) in [("60s", false), ("300ms", true)] {
        let ill = Arc::new(AtomicBool::new(true));
        let state = ill.clone();
        let failing =
            move |_: &Seen| if state.load(SeqCst) { Answer::nothing() } else { Answer::json(200, "{}") };
        let engines = [Engine::start(failing), Engine::good()];
        let proxy = before(&engines, &format!("policy: round_robin, fail_timeout: {fail_timeout}")).await;
        while engines[0].count() < 3 {
            assert_eq!(proxy.ask(&chat()).await.status, 200);
        }
        proxy.counts("plimsoll_ejections_total", &[("backend", &engines[0].address())], 1.0).await;
        ill.store(false, SeqCst);
        if returns {
            wait_until("the ejected backend to return", async || {
                assert_eq!(proxy.ask(&chat()).await.status, 200);
                engines[0].count() > 3
            })
            .await;
        } else {
            for _ in 0..10 {
                assert_eq!(proxy.ask(&chat()).await.status, 200);
            }
            assert_eq!(engines[0].count(), 3, "an ejected backend was tried");
        }
        proxy.assert_at_rest().await;
    }
}

#[tokio::test]
async fn retries_and_ejections_are_counted_from_zero() {
    let engines = [Engine::good(), Engine::good()];
    let proxy = before(&engines, "").await;
    let metrics = proxy.metrics().await;
    for reason in ["connect", "closed", "timeout", "status_502", "status_503", "stream_error"] {
        let labels = [("upstream", "llm"), ("reason", reason)];
        assert!(metrics.has("plimsoll_retries_total", &labels), "{reason}");
        for engine in &engines {
            let labels = [("backend", &*engine.address()), ("upstream", "llm"), ("reason", reason)];
            assert!(metrics.has("plimsoll_ejections_total", &labels), "{reason}");
        }
    }
    assert_eq!(metrics.sum("plimsoll_retries_total", &[]), 0.0);
    assert_eq!(metrics.sum("plimsoll_ejections_total", &[]), 0.0);
}

#[tokio::test]
async fn poison_that_fails_everywhere_is_no_backends_fault() {
    let engines = alike(|seen| match seen.head.header("x-poison") {
        Some(_) => Answer::json(500, r#"{"error":{"message":"poison"}}"#),
        None => Answer::json(200, "{}"),
    });
    let more = "retry: { on: [connect, closed, status_500] }, max_fails: 3, fail_timeout: 60s";
    let proxy = before(&engines, more).await;
    for _ in 0..8 {
        assert_eq!(proxy.ask(&chat().with("x-poison", "1")).await.status, 500);
    }
    assert_eq!(proxy.metrics().await.sum("plimsoll_ejections_total", &[]), 0.0);
    for _ in 0..4 {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
    }
}

#[tokio::test]
async fn when_both_tries_fail_the_last_status_passes_through() {
    let engines: [Engine; 3] =
        [1, 2, 3].map(|name| Engine::start(move |_| Answer::json(503, &format!(r#"{{"engine":{name}}}"#))));
    let proxy = before(&engines, "").await;
    for line in BOTH {
        engines.iter().for_each(Engine::forget);
        let reply = proxy.client(line).await.ask(&chat()).await;
        assert_eq!((reply.status, reply.complete), (503, true));
        assert!(reply.value()["engine"].is_u64(), "{}", reply.text());
        assert_eq!(total(&engines), 2, "at most two tries");
        assert!(counts(&engines).iter().all(|&count| count <= 1), "never the same backend twice");
        let teller = usize::try_from(reply.value()["engine"].as_u64().unwrap()).unwrap() - 1;
        assert_eq!(reply.header("x-plimsoll-backend"), Some(&*engines[teller].address()));
    }
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn when_every_backend_is_dead_the_client_gets_a_json_error() {
    let engines: [Engine; 2] = std::array::from_fn(|_| Engine::dead(|_| Answer::nothing()));
    let proxy = before(&engines, "").await;
    for line in BOTH {
        for _ in 0..4 {
            let reply = proxy.client(line).await.ask(&chat()).await;
            match reply.status {
                502 => assert_error(&reply, 502, "upstream_unreachable"),
                _ => assert_error(&reply, 503, "no_backend"),
            }
        }
    }
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn ejected_backends_are_tried_before_an_error() {
    let ill = Arc::new(AtomicBool::new(true));
    let state = ill.clone();
    let failing =
        move |_: &Seen| if state.load(SeqCst) { Answer::nothing() } else { Answer::json(200, "{}") };
    let engines = [Engine::start(failing), Engine::good()];
    let proxy = before(&engines, "policy: round_robin, fail_timeout: 60s").await;
    while engines[0].count() < 3 {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
    }
    proxy.counts("plimsoll_ejections_total", &[("backend", &engines[0].address())], 1.0).await;
    // A rolling restart: the first is well again but still ejected when the second goes away.
    ill.store(false, SeqCst);
    engines[1].kill().await;
    for _ in 0..8 {
        let reply = proxy.ask(&chat()).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    assert_eq!(engines[0].count(), 3 + 8);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_body_that_is_too_large_is_a_413() {
    let engine = Engine::good();
    let yaml = format!("limits: {{ body: 64KiB }}\n{}", one_upstream(&[engine.address()], ""));
    let proxy = Proxy::start(&yaml).await;
    for line in [Line::Http1, Line::Http1Tls, Line::Http2, Line::Http2Tls] {
        for framing in [Framing::Declared, Framing::Open] {
            let request = |size| Request::post("/v1/chat/completions", vec![b' '; size]).framed(framing);
            let reply = proxy.client(line).await.ask(&request((64 << 10) + 1)).await;
            assert_error(&reply, 413, "body_too_large");
            let reply = proxy.client(line).await.ask(&request(4 << 20)).await;
            assert_error(&reply, 413, "body_too_large");
            let reply = proxy.client(line).await.ask(&request(64 << 10)).await;
            assert_eq!(reply.status, 200, "{line:?} {framing:?}: exactly the limit is allowed");
        }
        let declared = Request::post("/v1/chat/completions", "x").missing_bytes(1 << 20);
        assert_error(&proxy.client(line).await.ask(&declared).await, 413, "body_too_large");
    }
    assert_eq!(engine.count(), 8);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_body_that_does_not_come_is_a_408() {
    let engine = Engine::good();
    let yaml = format!("limits: {{ body_timeout: 300ms }}\n{}", one_upstream(&[engine.address()], ""));
    let proxy = Proxy::start(&yaml).await;
    for line in [Line::Http1, Line::Http1Tls, Line::Http2, Line::Http2Tls] {
        for framing in [Framing::Declared, Framing::Open] {
            let request =
                Request::post("/v1/chat/completions", "{\"model\":").framed(framing).missing_bytes(100);
            let reply = proxy.client(line).await.ask(&request).await;
            assert_error(&reply, 408, "body_timeout");
        }
    }
    assert_eq!(engine.count(), 0);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn bodies_beyond_the_memory_for_them_are_a_503_with_retry_after() {
    let gate = Gate::new();
    let scripted = gate.clone();
    let engine = Engine::start(move |_| Answer::json(200, "{}").held_at(&scripted));
    let yaml = format!(
        "limits: {{ body: 90KiB, buffered_bodies: 100KiB }}\n{}",
        one_upstream(&[engine.address()], "")
    );
    let proxy = Proxy::start(&yaml).await;
    let large = Request::post("/v1/chat/completions", vec![b' '; 80 << 10]);
    let mut first = proxy.client(Line::Http1).await;
    first.send(&large).await;
    gate.reached(1).await;
    for framing in [Framing::Declared, Framing::Open] {
        for line in BOTH {
            let reply = proxy.client(line).await.ask(&large.clone().framed(framing)).await;
            assert_error(&reply, 503, "buffers_full");
            assert!(retry_after(&reply) >= 1);
        }
    }
    gate.open();
    assert_eq!(first.head().await.status, 200);
    assert!(first.rest().await.1);
    proxy.assert_at_rest().await;
    gate.open();
    assert_eq!(proxy.ask(&large).await.status, 200);
}

#[tokio::test]
async fn with_one_try_nothing_is_sent_twice() {
    let engines = alike(|_| Answer::json(503, r#"{"error":{}}"#));
    let proxy = before(&engines, "retry: { tries: 1 }").await;
    assert_eq!(proxy.ask(&chat()).await.status, 503);
    assert_eq!(total(&engines), 1);
}
