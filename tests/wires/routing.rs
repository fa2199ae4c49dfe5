//! Which upstream a request belongs to, which of its backends it goes to, and what both sides are told about
//! it.

use crate::support::client::{Line, Request};
use crate::support::engine::{Answer, Engine, Gate, addresses, delta};
use crate::support::proxy::Proxy;
use crate::support::stage::{BOTH, assert_error, counts};
use crate::support::{one_upstream, upstream, wait_until};
use std::collections::HashSet;

fn good_engines<const N: usize>() -> [Engine; N] {
    std::array::from_fn(|_| Engine::good())
}

/// The model names that the proxy lists.
async fn models(proxy: &Proxy) -> HashSet<String> {
    let reply = proxy.ask(&Request::get("/v1/models")).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let value = reply.value();
    assert_eq!(value["object"], "list");
    let list = value["data"].as_array().unwrap();
    assert!(list.iter().all(|model| model["object"] == "model"), "{value}");
    let ids: HashSet<String> = list.iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(ids.len(), list.len(), "a model is listed twice: {value}");
    ids
}

#[tokio::test]
async fn discovered_models_lead_to_their_upstream_and_are_listed_together() {
    let [alpha, beta, twin] = good_engines();
    alpha.set_models(&["alpha", "shared"]);
    twin.set_models(&["alpha", "shared"]);
    beta.set_models(&["beta"]);
    let one = upstream(&addresses(&[&alpha, &twin]), "poll: { interval: 200ms }");
    let two = upstream(&[beta.address()], "models: discover");
    let proxy = Proxy::start(&format!("upstreams: {{ one: {one}, two: {two} }}\n")).await;
    wait_until("discovery", async || models(&proxy).await.len() == 3).await;
    assert_eq!(models(&proxy).await, ["alpha", "shared", "beta"].map(str::to_owned).into());
    for _ in 0..4 {
        assert_eq!(proxy.ask(&Request::chat("alpha", "hello")).await.status, 200);
    }
    assert_eq!((alpha.count() + twin.count(), beta.count()), (4, 0));
    assert_eq!(proxy.ask(&Request::streamed("beta", "hello")).await.status, 200);
    assert_eq!((alpha.count() + twin.count(), beta.count()), (4, 1));
    assert_error(&proxy.ask(&Request::chat("gamma", "hello")).await, 404, "model_not_found");
    assert_eq!((alpha.count() + twin.count(), beta.count()), (4, 1));
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn an_upstream_that_takes_any_model_lists_what_its_backends_say() {
    let [engine] = good_engines();
    engine.set_models(&["org/name", "plain"]);
    let proxy = Proxy::start(&one_upstream(&[engine.address()], "")).await;
    wait_until("discovery", async || !models(&proxy).await.is_empty()).await;
    assert_eq!(models(&proxy).await, ["org/name", "plain"].map(str::to_owned).into());
    assert_eq!(proxy.ask(&Request::chat("unlisted", "hello")).await.status, 200);
}

#[tokio::test]
async fn a_model_with_a_slash_is_found_by_either_spelling_of_its_path() {
    let [engine] = good_engines();
    engine.set_models(&["org/name", "plain"]);
    let proxy = Proxy::start(&one_upstream(&[engine.address()], "")).await;
    wait_until("discovery", async || !models(&proxy).await.is_empty()).await;
    for line in BOTH {
        for (path, id) in [
            ("org%2Fname", "org/name"),
            ("org%2fname", "org/name"),
            ("org/name", "org/name"),
            ("plain", "plain"),
        ] {
            let reply = proxy.client(line).await.ask(&Request::get(&format!("/v1/models/{path}"))).await;
            assert_eq!((reply.status, reply.value()["id"].as_str()), (200, Some(id)), "{path}");
        }
        for path in ["org", "name", "org%2Fother", "org%252Fname"] {
            let reply = proxy.client(line).await.ask(&Request::get(&format!("/v1/models/{path}"))).await;
            assert_error(&reply, 404, "model_not_found");
        }
    }
    assert_eq!(engine.count(), 0);
}

#[tokio::test]
async fn an_unknown_model_is_a_404_that_no_engine_sees_over_either_protocol() {
    let [engine] = good_engines();
    let llm = upstream(&[engine.address()], "models: [alpha]");
    let proxy = Proxy::start(&format!("upstreams: {{ llm: {llm} }}\n")).await;
    for line in [Line::Http1, Line::Http1Tls, Line::Http2, Line::Http2Tls] {
        let mut client = proxy.client(line).await;
        let reply = client.ask(&Request::chat("nobody", "hello")).await;
        assert_error(&reply, 404, "model_not_found");
        assert!(reply.text().contains("nobody"), "the message names the model: {}", reply.text());
        // The connection is as good as before.
        assert_eq!(client.ask(&Request::chat("alpha", "hello")).await.status, 200);
    }
    assert_eq!(engine.count(), 4);
    assert_eq!(models(&proxy).await, HashSet::from(["alpha".to_owned()]));
    proxy.counts("plimsoll_requests_total", &[("outcome", "refused")], 4.0).await;
}

#[tokio::test]
async fn a_known_model_whose_backends_are_down_is_a_503_with_retry_after() {
    let dead = Engine::dead(|_| Answer::nothing());
    let probed = "models: [alpha], probe: { interval: 100ms, timeout: 1s, down_after: 1 }";
    let mut proxy =
        Proxy::spawn(&format!("upstreams: {{ llm: {} }}\n", upstream(&[dead.address()], probed)), &[]);
    proxy.listens().await;
    proxy.counts("plimsoll_backend_up", &[("backend", &dead.address())], 0.0).await;
    let reply = proxy.ask(&Request::chat("alpha", "hello")).await;
    assert_error(&reply, 503, "no_backend");
    let wait = reply.header("retry-after").and_then(|value| value.parse::<u64>().ok());
    assert!(wait.is_some_and(|seconds| (1..=600).contains(&seconds)), "retry-after {wait:?}");
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn routes_choose_by_host_path_header_and_model_in_their_order() {
    let engines: [Engine; 6] = good_engines();
    let names = ["host", "wild", "path", "gold", "qwen", "rest"];
    let upstreams: Vec<String> = names
        .iter()
        .zip(&engines)
        .map(|(name, engine)| format!("{name}: {}", upstream(&[engine.address()], "models: any")))
        .collect();
    let routes = "routes:
  - { host: api.example.com, upstream: host }
  - { host: '*.example.org', upstream: wild }
  - { path: /special/, upstream: path }
  - { headers: { x-tier: gold }, upstream: gold }
  - { model: [llama-3.1-8b, 'qwen*'], upstream: qwen }
  - { path: /v1/, upstream: rest }
";
    let proxy = Proxy::start(&format!("{routes}upstreams: {{ {} }}\n", upstreams.join(", "))).await;
    let chat = |model| Request::chat(model, "hello");
    let cases = [
        (chat("any").with("host", "api.example.com"), "host"),
        (chat("qwen").with("host", "API.example.com:8080"), "host"),
        (chat("any").with("host", "eu.example.org"), "wild"),
        (Request::post("/special/generate", "{}"), "path"),
        (chat("qwen-72b").with("x-tier", "gold"), "gold"),
        (chat("qwen-72b").with("x-tier", "silver"), "qwen"),
        (chat("llama-3.1-8b"), "qwen"),
        (chat("llama-3.1-8b-instruct"), "rest"),
        (chat("any").with("host", "example.org"), "rest"),
    ];
    for (request, name) in cases {
        engines.iter().for_each(Engine::forget);
        let reply = proxy.ask(&request).await;
        assert_eq!(reply.status, 200, "{request:?}: {}", reply.text());
        let wanted: Vec<usize> = names.iter().map(|n| usize::from(*n == name)).collect();
        assert_eq!(counts(&engines), wanted, "{request:?} belongs to {name}");
    }
    engines.iter().for_each(Engine::forget);
    assert_error(&proxy.ask(&Request::post("/elsewhere", "{}")).await, 404, "route_not_found");
    assert_eq!(counts(&engines), [0; 6]);
}

#[tokio::test]
async fn an_http2_request_is_routed_by_its_authority() {
    let [named, other] = good_engines();
    let routes = "routes: [{ host: plimsoll, upstream: named }, { upstream: other }]";
    let (one, two) =
        (upstream(&[named.address()], "models: any"), upstream(&[other.address()], "models: any"));
    let proxy = Proxy::start(&format!("{routes}\nupstreams: {{ named: {one}, other: {two} }}\n")).await;
    for line in [Line::Http2, Line::Http2Tls] {
        assert_eq!(proxy.client(line).await.ask(&Request::chat("m", "hello")).await.status, 200);
    }
    assert_eq!((named.count(), other.count()), (2, 0));
}

#[tokio::test]
async fn a_request_id_is_made_or_accepted_and_told_to_both_sides() {
    let [engine] = good_engines();
    let proxy = Proxy::start(&one_upstream(&[engine.address()], "")).await;
    for line in [Line::Http1, Line::Http2] {
        let mut made = Vec::new();
        for _ in 0..2 {
            let reply = proxy.client(line).await.ask(&Request::chat("m", "hello")).await;
            made.push(reply.header("x-request-id").expect("an id").to_owned());
        }
        assert!(made[0] != made[1] && made.iter().all(|id| id.len() >= 8), "{made:?}");
        let reply =
            proxy.client(line).await.ask(&Request::chat("m", "hello").with("x-request-id", "mine-7")).await;
        assert_eq!(reply.header("x-request-id"), Some("mine-7"));
        let told: Vec<String> =
            engine.seen().iter().map(|seen| seen.head.header("x-request-id").unwrap().into()).collect();
        assert_eq!(told, [made[0].as_str(), made[1].as_str(), "mine-7"]);
        engine.forget();
    }
}

#[tokio::test]
async fn the_backend_is_named_in_the_answer_unless_switched_off() {
    let [engine] = good_engines();
    let yaml = one_upstream(&[engine.address()], "");
    let proxy = Proxy::start(&yaml).await;
    for line in [Line::Http1, Line::Http2] {
        let reply = proxy.client(line).await.ask(&Request::chat("m", "hello")).await;
        assert_eq!(reply.header("x-plimsoll-backend"), Some(&*engine.address()));
    }
    let proxy = Proxy::start(&format!("observe: {{ backend_header: false }}\n{yaml}")).await;
    assert_eq!(proxy.ask(&Request::chat("m", "hello")).await.header("x-plimsoll-backend"), None);
}

#[tokio::test]
async fn the_engine_is_given_a_clean_request() {
    let [engine] = good_engines();
    let secret = "api_key: { env: WIRES_KEY }";
    let mut proxy = Proxy::spawn(&one_upstream(&[engine.address()], secret), &[("WIRES_KEY", "sesame")]);
    proxy.listens().await;
    let request = Request::chat("m", "hello")
        .with("connection", "x-hop, keep-alive")
        .with("x-hop", "1")
        .with("keep-alive", "timeout=5")
        .with("te", "trailers")
        .with("proxy-connection", "close")
        .with("authorization", "Bearer client-secret")
        .with("x-kept", "yes");
    assert_eq!(proxy.ask(&request).await.status, 200);
    let head = engine.seen().remove(0).head;
    for gone in ["x-hop", "keep-alive", "te", "proxy-connection", "transfer-encoding", "expect"] {
        assert_eq!(head.header(gone), None, "{gone} was passed on");
    }
    assert_eq!(head.header("authorization"), Some("Bearer sesame"));
    assert_eq!(head.header("x-kept"), Some("yes"));
    assert_eq!(head.header("host"), Some("plimsoll"));
    assert_eq!((head.method(), head.path()), ("POST", "/v1/chat/completions"));
    assert!(!proxy.log().contains("sesame") && !proxy.log().contains("client-secret"), "a secret in the log");
}

#[tokio::test]
async fn an_answer_passes_through_with_its_status_headers_and_body() {
    let body = r#"{"error":{"message":"too long","code":400}}"#;
    let engine = Engine::start(move |seen| match seen.head.path() {
        "/v1/embeddings?x=1" => {
            Answer::json_with(200, "x-engine: e\r\nset-cookie: a\r\nset-cookie: b\r\n", "[1]")
        }
        _ => Answer::json(400, body),
    });
    let proxy = Proxy::start(&one_upstream(&[engine.address()], "")).await;
    for line in [Line::Http1, Line::Http2] {
        let mut client = proxy.client(line).await;
        let reply = client.ask(&Request::post("/v1/embeddings?x=1", "{}")).await;
        assert_eq!((reply.status, reply.text().as_str()), (200, "[1]"));
        assert_eq!(reply.header("x-engine"), Some("e"));
        assert_eq!(reply.headers.iter().filter(|(name, _)| name == "set-cookie").count(), 2);
        let reply = client.ask(&Request::chat("m", "hello")).await;
        assert_eq!((reply.status, reply.text().as_str()), (400, body));
    }
    proxy.counts("plimsoll_requests_total", &[("outcome", "client_error")], 2.0).await;
    proxy.counts("plimsoll_requests_total", &[("outcome", "ok")], 2.0).await;
}

#[tokio::test]
async fn a_get_reaches_the_engine_without_a_body() {
    let [engine] = good_engines();
    let proxy = Proxy::start(&one_upstream(&[engine.address()], "")).await;
    for line in [Line::Http1, Line::Http2] {
        assert_eq!(proxy.client(line).await.ask(&Request::get("/v1/responses/7")).await.status, 200);
        let seen = engine.seen().remove(0);
        assert_eq!((seen.head.method(), seen.body.len()), ("GET", 0));
        engine.forget();
    }
}

#[tokio::test]
async fn round_robin_honours_weights() {
    let engines: [Engine; 2] = good_engines();
    let heavy = format!("{{ address: {}, weight: 3 }}", engines[0].address());
    let proxy = Proxy::start(&one_upstream(&[heavy, engines[1].address()], "policy: round_robin")).await;
    for _ in 0..40 {
        assert_eq!(proxy.ask(&Request::chat("m", "hello")).await.status, 200);
    }
    assert!((29..=31).contains(&engines[0].count()), "{:?} of 40 by weights 3 and 1", counts(&engines));
}

#[tokio::test]
async fn requests_that_share_a_long_prefix_land_on_one_backend_while_it_is_idle() {
    let engines: [Engine; 3] = good_engines();
    let proxy = Proxy::start(&one_upstream(&addresses(&engines.each_ref()), "")).await;
    let prefix = "the quick token batch queue explains where each prefix cache belongs ".repeat(300);
    for number in 0..10 {
        let reply = proxy.ask(&Request::chat("m", &format!("{prefix} {number}"))).await;
        assert_eq!(reply.status, 200);
        proxy.counts("plimsoll_active_requests", &[], 0.0).await;
    }
    let mut counts = counts(&engines);
    counts.sort_unstable();
    assert_eq!(counts, [0, 0, 10]);
}

#[tokio::test]
async fn a_long_pending_prompt_steers_short_ones_away() {
    let gate = Gate::new();
    let engines = [(); 2].map(|()| {
        let gate = gate.clone();
        Engine::start(move |seen| match seen.body.len() {
            0..100_000 => Answer::json(200, "{}"),
            _ => Answer::stream().wait(&gate).event(&delta("a")).event("[DONE]").end(),
        })
    });
    let proxy = Proxy::start(&one_upstream(&addresses(&engines.each_ref()), "")).await;
    let mut long = proxy.client(Line::Http1).await;
    let noise: String = (0..40_000).map(|number| format!("{number} ")).collect();
    long.send(&Request::streamed("m", &noise)).await;
    gate.reached(1).await;
    let other = usize::from(engines[0].count() == 1);
    for number in 0..10 {
        assert_eq!(proxy.ask(&Request::chat("m", &format!("short {number}"))).await.status, 200);
    }
    assert_eq!(engines[other].count(), 10);
    gate.open();
    assert_eq!(long.head().await.status, 200);
    assert!(long.rest().await.1);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn least_connections_avoids_a_backend_with_a_request_in_flight() {
    let gate = Gate::new();
    let engines = [(); 2].map(|()| {
        let gate = gate.clone();
        Engine::start(move |seen| match seen.head.header("x-held") {
            Some(_) => Answer::json(200, "{}").held_at(&gate),
            None => Answer::json(200, "{}"),
        })
    });
    let proxy =
        Proxy::start(&one_upstream(&addresses(&engines.each_ref()), "policy: least_connections")).await;
    let mut held = proxy.client(Line::Http1).await;
    held.send(&Request::chat("m", "hello").with("x-held", "1")).await;
    gate.reached(1).await;
    let other = usize::from(engines[0].count() == 1);
    for _ in 0..10 {
        assert_eq!(proxy.ask(&Request::chat("m", "hello")).await.status, 200);
        // An answer is settled a moment after the client has it: only then is its backend idle again.
        proxy.counts("plimsoll_active_requests", &[], 1.0).await;
    }
    assert_eq!(engines[other].count(), 10);
    gate.open();
    assert_eq!(held.head().await.status, 200);
    assert!(held.rest().await.1);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn random_two_spreads_requests() {
    let engines: [Engine; 3] = good_engines();
    let proxy = Proxy::start(&one_upstream(&addresses(&engines.each_ref()), "policy: random_two")).await;
    for _ in 0..90 {
        assert_eq!(proxy.ask(&Request::chat("m", "hello")).await.status, 200);
    }
    assert!(counts(&engines).iter().all(|&count| count > 5), "{:?}", counts(&engines));
}

#[tokio::test]
async fn prefix_hash_keeps_a_session_on_its_backend_and_spreads_sessions() {
    let engines: [Engine; 3] = good_engines();
    let policy = "policy: { prefix_hash: { load_factor: 1.25 } }";
    let proxy = Proxy::start(&one_upstream(&addresses(&engines.each_ref()), policy)).await;
    let mut homes = HashSet::new();
    for session in 0..24 {
        let mut backends = HashSet::new();
        for turn in 0..4 {
            let messages = serde_json::json!([{ "role": "user", "content": format!("turn {turn}") }]);
            let key = format!("session-{session}");
            let body = serde_json::json!({ "model": "m", "messages": messages, "prompt_cache_key": key });
            let reply = proxy.ask(&Request::json(&body)).await;
            assert_eq!(reply.status, 200);
            backends.insert(reply.header("x-plimsoll-backend").expect("a backend").to_owned());
            proxy.counts("plimsoll_active_requests", &[], 0.0).await;
        }
        assert_eq!(backends.len(), 1, "session {session} moved: {backends:?}");
        homes.extend(backends);
    }
    assert_eq!(homes.len(), 3, "24 sessions on {homes:?} only");
}

#[tokio::test]
async fn every_choice_is_counted_by_its_reason_and_every_request_by_its_backend() {
    let engines: [Engine; 2] = good_engines();
    let proxy = Proxy::start(&one_upstream(&addresses(&engines.each_ref()), "")).await;
    for number in 0..10 {
        assert_eq!(proxy.ask(&Request::chat("m", &format!("{number}"))).await.status, 200);
    }
    proxy.counts("plimsoll_requests_total", &[("upstream", "llm"), ("outcome", "ok")], 10.0).await;
    proxy.counts("plimsoll_choices_total", &[("upstream", "llm")], 10.0).await;
    proxy.counts("plimsoll_attempts_total", &[("upstream", "llm")], 10.0).await;
    let metrics = proxy.metrics().await;
    for engine in &engines {
        let (backend, count) = (engine.address(), u32::try_from(engine.count()).unwrap());
        let labels = [("backend", &*backend), ("outcome", "ok")];
        assert_eq!(metrics.sum("plimsoll_requests_total", &labels), f64::from(count));
        assert!(metrics.has("plimsoll_traffic_share", &[("backend", &backend)]));
        assert_eq!(metrics.sum("plimsoll_backend_up", &[("backend", &backend)]), 1.0);
    }
}
