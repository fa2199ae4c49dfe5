//! Who may ask, where, and how much: keys, their routes and their allowances.

use crate::support::client::{Answer as Reply, Line, Request};
use crate::support::engine::{Answer, Engine, Seen, delta, usage};
use crate::support::one_upstream;
use crate::support::proxy::{Proxy, binary};
use crate::support::stage::{assert_error, chat, retry_after};
use std::process::Command;

/// SHA-256 of `sk-a` and of `sk-b`, by another program.
const HASH_A: &str = "a4a6d307ad00fa67176e1099fdbc4f4a09bb527a7f24718a5030f2f173d11f7f";
const HASH_B: &str = "18519d64d0d18b0e84e43301547425933dc0394576666e8da1ef1790fb64ca9f";

const LINES: [Line; 4] = [Line::Http1, Line::Http1Tls, Line::Http2, Line::Http2Tls];

/// A chat that shows a key.
fn chat_with(key: &str) -> Request {
    chat().with("authorization", &format!("Bearer {key}"))
}

/// Two keys; `a` and `b` are what stands beside their hashes.
fn keys(a: &str, b: &str) -> String {
    format!("keys:\n  a: {{ sha256: {HASH_A}, {a} }}\n  b: {{ sha256: {HASH_B}, {b} }}\n")
}

async fn guarded(engine: &Engine, a: &str, more: &str) -> Proxy {
    Proxy::start(&(keys(a, "") + &one_upstream(&[engine.address()], more))).await
}

/// A remaining allowance, as the answer tells it.
fn remaining(reply: &Reply, what: &str) -> u64 {
    let name = format!("x-ratelimit-remaining-{what}");
    reply.header(&name).and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name}"))
}

#[tokio::test]
async fn who_shows_no_key_is_refused_before_a_body_is_read_and_never_reaches_an_engine() {
    let engine = Engine::good();
    let proxy = guarded(&engine, "", "").await;
    for line in LINES {
        let ask = async |request: &Request| proxy.client(line).await.ask(request).await;
        let refused = ask(&chat()).await;
        assert_error(&refused, 401, "missing_api_key");
        assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
        assert_eq!(refused.value()["error"]["type"], "authentication_error");
        assert_error(&ask(&chat_with("sk-c")).await, 401, "invalid_api_key");
        assert_error(&ask(&chat_with("")).await, 401, "invalid_api_key");
        assert_error(&ask(&chat().with("authorization", "Basic sk-a")).await, 401, "invalid_api_key");
        assert_error(&ask(&chat_with("sk-a").with("x-api-key", "sk-b")).await, 401, "invalid_api_key");
        assert_error(&ask(&Request::get("/v1/models")).await, 401, "missing_api_key");
        let endless = chat().missing_bytes(1 << 20);
        assert_error(&ask(&endless).await, 401, "missing_api_key");
        assert_eq!(ask(&Request::get("/health")).await.status, 200, "balancers in front of us have no key");
        // What is more than a question is for an engine, and is no way past the keys.
        assert_error(&ask(&Request::post("/health", "{}")).await, 401, "missing_api_key");
    }
    assert_eq!(engine.count(), 0);
    proxy.counts("plimsoll_refusals_total", &[("code", "missing_api_key")], 16.0).await;
    proxy.counts("plimsoll_refusals_total", &[("code", "invalid_api_key")], 16.0).await;
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_key_opens_the_door_wherever_it_is_shown_and_stays_outside() {
    let engine = Engine::good();
    let proxy = guarded(&engine, "", "").await;
    for line in LINES {
        for (name, value) in [
            ("authorization", "Bearer sk-a"),
            ("authorization", "bearer sk-a"),
            ("x-api-key", "sk-a"),
            ("api-key", "sk-a"),
        ] {
            assert_eq!(proxy.client(line).await.ask(&chat().with(name, value)).await.status, 200, "{name}");
        }
        let models = Request::get("/v1/models").with("authorization", "Bearer sk-b");
        assert_eq!(proxy.client(line).await.ask(&models).await.status, 200);
    }
    assert_eq!(engine.count(), 16);
    for Seen { head, .. } in engine.seen() {
        assert_eq!(["authorization", "x-api-key", "api-key"].map(|name| head.header(name)), [None; 3]);
    }
    let labels = |outcome| [("key", "a"), ("outcome", outcome)];
    proxy.counts("plimsoll_key_requests_total", &labels("ok"), 16.0).await;
    let metrics = proxy.metrics().await;
    assert_eq!(metrics.sum("plimsoll_key_requests_total", &[("key", "b"), ("outcome", "local")]), 4.0);
    assert!(metrics.has("plimsoll_key_requests_total", &labels("cut")), "not there from the start");
    let log = proxy.log();
    assert!(log.contains(" key=a upstream=llm ") && !log.contains("sk-a"), "{log}");
}

#[tokio::test]
async fn without_keys_a_clients_authorization_is_the_engines_to_judge() {
    let engine = Engine::good();
    let proxy = Proxy::start(&one_upstream(&[engine.address()], "")).await;
    assert_eq!(proxy.ask(&chat_with("sk-of-the-engine")).await.status, 200);
    let seen = engine.seen();
    assert_eq!(seen[0].head.header("authorization"), Some("Bearer sk-of-the-engine"));
}

#[tokio::test]
async fn a_route_may_be_for_some_keys_only() {
    let (gold, silver) = (Engine::good(), Engine::good());
    let yaml = format!(
        "{}routes:\n  - {{ key: a, upstream: gold }}\n  - {{ key: [a, b], path: /v1/chat, upstream: silver }}\n\
         upstreams:\n  gold: {{ models: any, backends: ['{}'], probe: off }}\n  silver: {{ models: [tiny], backends: \
         ['{}'], probe: off }}\n",
        keys("", ""),
        gold.address(),
        silver.address()
    );
    let proxy = Proxy::start(&yaml).await;
    assert_eq!(proxy.ask(&chat_with("sk-a")).await.status, 200);
    assert_eq!(proxy.ask(&chat_with("sk-b")).await.status, 200);
    assert_eq!((gold.count(), silver.count()), (1, 1));
    let elsewhere = Request::post("/v1/completions", r#"{"model":"tiny","prompt":"x"}"#);
    let reply = proxy.ask(&elsewhere.with("authorization", "Bearer sk-b")).await;
    assert_error(&reply, 404, "route_not_found");
    let models = async |key: &str| {
        let reply =
            proxy.ask(&Request::get("/v1/models").with("authorization", &format!("Bearer {key}"))).await;
        reply.value()["data"].as_array().map(Vec::len)
    };
    assert_eq!(models("sk-b").await, Some(1));
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn beyond_its_requests_per_minute_a_key_waits_and_another_does_not() {
    let engine = Engine::good();
    let proxy = guarded(&engine, "requests_per_minute: 3", "").await;
    for left in [2, 1, 0] {
        let reply = proxy.ask(&chat_with("sk-a")).await;
        assert_eq!((reply.status, remaining(&reply, "requests")), (200, left));
        assert_eq!(reply.header("x-ratelimit-limit-requests"), Some("3"));
    }
    for line in LINES {
        let reply = proxy.client(line).await.ask(&chat_with("sk-a")).await;
        assert_error(&reply, 429, "rate_limited");
        assert_eq!(reply.value()["error"]["type"], "rate_limit_error");
        assert!((1..=120).contains(&retry_after(&reply)), "{}", retry_after(&reply));
    }
    assert_eq!(proxy.ask(&chat_with("sk-b")).await.status, 200);
    assert_eq!(engine.count(), 4);
    proxy.counts("plimsoll_key_requests_total", &[("key", "a"), ("outcome", "refused")], 4.0).await;
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn the_tokens_that_the_engine_counts_are_charged_to_the_key() {
    let counted = usage(70, 20, 0);
    let engine = Engine::start(move |seen| {
        if seen.head.header("x-fail").is_some() {
            return Answer::json(500, "{}");
        }
        Answer::stream_of(&[&delta("a"), &counted])
    });
    let proxy = guarded(&engine, "tokens_per_minute: 200", "").await;
    let streamed = Request::streamed("tiny", "hello").with("authorization", "Bearer sk-a");
    let tokens = |kind: &'static str| [("key", "a"), ("kind", kind)];
    for (times, spent) in [(1.0, 90), (2.0, 180)] {
        assert_eq!(proxy.ask(&streamed).await.status, 200);
        proxy.counts("plimsoll_key_tokens_total", &tokens("completion"), 20.0 * times).await;
        assert_eq!(proxy.metrics().await.sum("plimsoll_key_tokens_total", &tokens("prompt")), 70.0 * times);
        // What a failed request was charged is given back, so that its own answer shows what is left.
        let failed = proxy.ask(&streamed.clone().with("x-fail", "1")).await;
        assert_eq!(failed.status, 500);
        assert!(remaining(&failed, "tokens") <= 200 - spent, "{}", remaining(&failed, "tokens"));
        proxy
            .counts("plimsoll_key_requests_total", &[("key", "a"), ("outcome", "engine_error")], times)
            .await;
    }
    assert_eq!(proxy.ask(&streamed).await.status, 200, "20 are left, so one more is let in");
    proxy.counts("plimsoll_key_tokens_total", &tokens("completion"), 60.0).await;
    let reply = proxy.ask(&streamed).await;
    assert_error(&reply, 429, "rate_limited");
    assert!(reply.text().contains("tokens per minute"), "{}", reply.text());
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_stream_without_usage_costs_its_prompt_and_a_token_for_each_read() {
    let engine = Engine::start(|_| Answer::stream_of(&[&delta("a"), &delta("b")]));
    let proxy = guarded(&engine, "tokens_per_minute: 1000", "").await;
    let words = "word ".repeat(80);
    let request = Request::streamed("tiny", &words).with("authorization", "Bearer sk-a");
    assert_eq!(proxy.ask(&request).await.status, 200);
    proxy.counts("plimsoll_key_requests_total", &[("key", "a"), ("outcome", "ok")], 1.0).await;
    let metrics = proxy.metrics().await;
    let tokens = |kind| metrics.sum("plimsoll_key_tokens_total", &[("key", "a"), ("kind", kind)]);
    assert!((90.0..=130.0).contains(&tokens("prompt")), "{}", tokens("prompt"));
    assert_eq!(tokens("completion"), metrics.sum("plimsoll_stream_reads_total", &[]));
}

#[tokio::test]
async fn a_route_may_have_its_own_causes_of_retry() {
    let engines: [Engine; 2] = std::array::from_fn(|_| Engine::start(|_| Answer::json(500, "{}")));
    let yaml = format!(
        "routes:\n  - {{ path: /v1/embeddings, upstream: llm, retry: {{ on: [status_500] }} }}\n  \
         - {{ path: /v1/rerank, upstream: llm, retry: {{ tries: 1 }} }}\n  - {{ upstream: llm }}\n{}",
        one_upstream(&engines.each_ref().map(Engine::address), "max_fails: 0")
    );
    let proxy = Proxy::start(&yaml).await;
    for (path, tries) in [("/v1/embeddings", 2), ("/v1/rerank", 1), ("/v1/chat/completions", 1)] {
        engines.iter().for_each(Engine::forget);
        assert_eq!(proxy.ask(&Request::post(path, r#"{"model":"tiny"}"#)).await.status, 500);
        assert_eq!(engines.iter().map(Engine::count).sum::<usize>(), tries, "{path}");
    }
    proxy.counts("plimsoll_retries_total", &[("reason", "status_500")], 1.0).await;
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_key_that_plimsoll_made_is_one_that_plimsoll_knows() {
    let made = |_| {
        let output = Command::new(binary()).args(["key", "team-a"]).output().expect("the binary runs");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let [yaml, other] = [0, 1].map(made);
    assert_ne!(yaml, other);
    let key = yaml.lines().next().and_then(|line| line.rsplit(' ').next()).expect("a key").to_owned();
    assert!(key.starts_with("sk-") && key.len() == 67, "{key}");
    let engine = Engine::good();
    // The key itself is in a comment, which is for the client and harms nobody here.
    let proxy = Proxy::start(&(yaml + &one_upstream(&[engine.address()], ""))).await;
    assert_eq!(proxy.ask(&chat_with(&key)).await.status, 200);
    assert_error(&proxy.ask(&chat_with("sk-a")).await, 401, "invalid_api_key");
}
