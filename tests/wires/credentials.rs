//! Credentials, ours for the engines and those that clients send, are in no log, metric or answer.

use crate::support::client::{Client, Line, Request};
use crate::support::engine::{Answer, Engine, delta};
use crate::support::proxy::{Proxy, folder};
use crate::support::raw::Raw;
use crate::support::tls::write_secret;
use crate::support::{upstream, wait_until};

/// In every credential of this file, and nowhere else.
const CANARY: &str = "canary";

/// Requests that succeed, stream, are retried, fail and are refused, over every line, each with credentials.
async fn traffic(proxy: &Proxy) {
    for line in [Line::Http1, Line::Http1Tls, Line::Http2, Line::Http2Tls] {
        let mut client = proxy.client(line).await;
        for (model, path, status) in [
            ("ours", "/v1/chat/completions", 200),
            ("theirs", "/v1/chat/completions", 200),
            ("streamed", "/v1/chat/completions", 200),
            ("retried", "/v1/chat/completions", 200),
            ("failing", "/v1/chat/completions", 500),
            ("garbled", "/v1/chat/completions", 502),
            ("closing", "/v1/chat/completions", 502),
            ("dead", "/v1/chat/completions", 502),
            ("unknown", "/v1/chat/completions", 404),
            ("ours", "/v1/chat/completions?api_key=canary", 200),
        ] {
            let body =
                serde_json::json!({ "model": model, "messages": [{ "role": "user", "content": "hello" }] });
            let request = with_credentials(Request::post(path, body.to_string()));
            let answer = client.ask(&request).await;
            assert_eq!(answer.status, status, "{line:?} {model}: {}", answer.text());
            assert!(
                !format!("{answer:?} {}", answer.text()).contains(CANARY),
                "{line:?} {model}: {}",
                answer.text()
            );
            if status == 502 {
                client = proxy.client(line).await;
            }
        }
        let answer = client.ask(&with_credentials(Request::get("/v1/models"))).await;
        assert!(!answer.text().contains(CANARY), "{}", answer.text());
    }
    let long = format!(
        "GET / HTTP/1.1\r\nhost: a\r\nauthorization: Bearer canary\r\nx: {}\r\n\r\n",
        "a".repeat(40_000)
    );
    for refused in [
        "GET / HTTP/1.1\r\nauthorization: Bearer canary\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nauthorization : Bearer canary\r\n\r\n",
        "GET / HTTP/1.1\nhost: a\nauthorization: Bearer canary\n\n",
        "GET  / HTTP/1.1\r\nhost: a\r\nauthorization: Bearer canary\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\nauthorization: Bearer canary\r\ncontent-length: x\r\n\r\n",
        &long,
    ] {
        let mut raw = Raw::connect(proxy.address(Line::Http1)).await;
        raw.send(refused).await.expect("a listener that reads");
        let answer = raw.answer().await;
        assert!(answer.status >= 400 && !answer.text().contains(CANARY), "{}", answer.text());
    }
}

fn with_credentials(request: Request) -> Request {
    request
        .with("authorization", "Bearer canary-of-a-client")
        .with("x-api-key", "canary-of-a-client")
        .with("cookie", "session=canary")
        .with("content-type", "application/json")
}

/// A proxy with an upstream per fate of a request, its log at this level, and the engine whose key is ours.
async fn proxy(level: &str) -> (Proxy, Vec<Engine>) {
    let folder = folder();
    write_secret(&folder.join("key"), "canary-of-ours\n");
    let key = format!("api_key: {{ file: {} }}", folder.join("key").display());
    let good = || Engine::start(|_| Answer::json(200, "{}"));
    let engines = vec![
        good(),
        good(),
        Engine::start(|_| Answer::stream_of(&[&delta("a"), &delta("b")])),
        Engine::start(|_| Answer::json(503, "{}")),
        Engine::start(|_| Answer::json(500, "{}")),
        Engine::start(|_| Answer::default().write("HTTP/1.1 200 OK\r\nbad header\r\n\r\n").close()),
        Engine::start(|_| Answer::nothing()),
        Engine::dead(|_| Answer::nothing()),
    ];
    let places: Vec<String> = engines.iter().map(Engine::address).collect();
    let of = |name: &str, backends: &[&String], more: &str| {
        let backends: Vec<String> = backends.iter().map(|&backend| backend.clone()).collect();
        let more = format!("models: [{name}], max_fails: 0, {more}");
        format!("  {name}: {}\n", upstream(&backends, &more))
    };
    let retried = format!("policy: round_robin, retry: {{ tries: 3 }}, {key}");
    let upstreams = [
        of("ours", &[&places[0]], &key),
        of("theirs", &[&places[1]], ""),
        of("streamed", &[&places[2]], &key),
        of("retried", &[&places[3], &places[0]], &retried),
        of("failing", &[&places[4]], &key),
        of("garbled", &[&places[5]], &key),
        of("closing", &[&places[6]], &key),
        of("dead", &[&places[7]], &key),
    ];
    let rest = format!("upstreams:\n{}", upstreams.concat());
    let mut proxy = Proxy::spawn(&rest, &[("RUST_LOG", level)]);
    proxy.listens().await;
    wait_until("the proxy to be ready", async || proxy.admin(&Request::get("/readyz")).await.status == 200)
        .await;
    (proxy, engines)
}

#[tokio::test]
async fn no_credential_is_logged_measured_or_answered_at_any_level_that_does_not_name_pingora() {
    for level in ["info,plimsoll=debug", "debug", "trace"] {
        let (proxy, engines) = proxy(level).await;
        traffic(&proxy).await;
        for (nth, expected) in [(0, "Bearer canary-of-ours"), (1, "Bearer canary-of-a-client")] {
            let sent = engines[nth].seen();
            assert!(
                sent.iter().all(|seen| seen.head.header("authorization") == Some(expected)),
                "{expected}"
            );
        }
        for path in ["/metrics", "/status", "/livez", "/readyz", "/canary-nothing"] {
            let answer = proxy.admin(&with_credentials(Request::get(path))).await;
            assert!(!answer.text().contains(CANARY), "{level}, {path}: {}", answer.text());
        }
        for odd in ["GET / HTTP/1.1\r\nauthorization : Bearer canary\r\nx y\r\n\r\n", "canary\r\n\r\n"] {
            let mut raw = Raw::connect(proxy.admin_address()).await;
            raw.send(odd).await.expect("a listener that reads");
            assert!(!String::from_utf8_lossy(&raw.until_closed().await).contains(CANARY));
        }
        proxy.assert_at_rest().await;
        let log = proxy.log();
        let told = log.lines().find(|line| line.contains(CANARY));
        assert!(told.is_none(), "{level}: {}", told.unwrap_or_default());
        assert!(log.contains("DEBUG plimsoll"), "{level}: {log}");
        assert!(log.contains("model=retried") && log.contains("attempts=2"), "{level}: no retry in {log}");
    }
}

#[tokio::test]
async fn who_names_pingora_sees_what_it_says() {
    let (proxy, _engines) = proxy("debug,pingora_proxy=debug").await;
    let mut client = Client::connect(proxy.address(Line::Http1), Line::Http1).await;
    assert_eq!(client.ask(&Request::chat("ours", "hello")).await.status, 200);
    wait_until("a line of Pingora's", async || proxy.log().contains("DEBUG pingora_proxy")).await;
}
