//! Probes: who is alive, for everyone who asks, at no more than one question per interval.

use crate::support::client::Request;
use crate::support::engine::Engine;
use crate::support::proxy::Proxy;
use crate::support::stage::{before, chat, counts};
use crate::support::upstream;

#[tokio::test]
async fn a_probe_takes_a_backend_out_and_brings_it_back() {
    let engines: [Engine; 2] = std::array::from_fn(|_| Engine::good());
    let probe = "probe: { interval: 100ms, timeout: 2s, down_after: 2, up_after: 2 }";
    let policy = "engine: vllm, policy: round_robin, slow_start: off";
    let proxy = before(&engines, &format!("{policy}, {probe}")).await;
    let ill = engines[0].address();
    proxy.counts("plimsoll_backend_up", &[], 2.0).await;
    engines[0].set_health(503);
    proxy.counts("plimsoll_backend_up", &[("backend", &ill)], 0.0).await;
    engines.iter().for_each(Engine::forget);
    for _ in 0..8 {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
    }
    assert_eq!(counts(&engines), [0, 8]);
    engines[0].set_health(200);
    proxy.counts("plimsoll_backend_up", &[("backend", &ill)], 1.0).await;
    for _ in 0..8 {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
    }
    assert!(engines[0].count() >= 3, "{:?}", counts(&engines));
}

#[tokio::test]
async fn a_backend_that_comes_back_gets_a_tenth_of_its_share_at_first() {
    let engines: [Engine; 2] = std::array::from_fn(|_| Engine::good());
    let probe = "probe: { interval: 100ms, timeout: 2s, down_after: 2, up_after: 2 }";
    let policy = "engine: vllm, policy: round_robin, slow_start: 1h";
    let proxy = before(&engines, &format!("{policy}, {probe}")).await;
    let ill = engines[0].address();
    for (health, up) in [(503, 0.0), (200, 1.0)] {
        engines[0].set_health(health);
        proxy.counts("plimsoll_backend_up", &[("backend", &ill)], up).await;
    }
    engines.iter().for_each(Engine::forget);
    for _ in 0..22 {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
    }
    assert_eq!(counts(&engines), [2, 20]);
}

#[tokio::test]
async fn a_probe_finds_a_killed_backend_and_its_return() {
    let engines: [Engine; 2] = std::array::from_fn(|_| Engine::good());
    let probe = "engine: vllm, probe: { interval: 100ms, timeout: 2s, down_after: 2, up_after: 1 }";
    let proxy = before(&engines, probe).await;
    proxy.counts("plimsoll_backend_up", &[], 2.0).await;
    engines[1].kill().await;
    proxy.counts("plimsoll_backend_up", &[("backend", &engines[1].address())], 0.0).await;
    engines[1].revive();
    proxy.counts("plimsoll_backend_up", &[("backend", &engines[1].address())], 1.0).await;
}

#[tokio::test]
async fn an_engine_that_wants_a_key_or_knows_no_health_is_up_and_one_that_fails_is_down() {
    let engines = [Engine::good()];
    let probe = "engine: vllm, probe: { interval: 50ms, timeout: 5s, down_after: 2, up_after: 1 }";
    let proxy = before(&engines, probe).await;
    let up = [("backend", &*engines[0].address())];
    for (alive, ill) in [(401, 500), (404, 503)] {
        engines[0].set_health(alive);
        proxy.counts("plimsoll_backend_up", &up, 1.0).await;
        // Twice what would take it down, and one that may have been under way.
        engines[0].probed(5).await;
        assert_eq!(proxy.metrics().await.sum("plimsoll_backend_up", &up), 1.0, "down by {alive}");
        assert_eq!(proxy.ask(&chat()).await.status, 200, "down by {alive}");
        engines[0].set_health(ill);
        proxy.counts("plimsoll_backend_up", &up, 0.0).await;
    }
}

#[tokio::test]
async fn an_engine_of_two_upstreams_is_probed_once_and_is_down_for_both() {
    let [shared, alone] = [Engine::good(), Engine::good()];
    let more =
        "engine: vllm, models: any, probe: { interval: 50ms, timeout: 5s, down_after: 2, up_after: 1 }";
    let one = upstream(&[shared.address(), alone.address()], more);
    let two = upstream(&[shared.address()], more);
    let routes = "routes: [{ path: /v1/one/, upstream: one }, { path: /v1/two/, upstream: two }]";
    let proxy = Proxy::start(&format!("{routes}\nupstreams: {{ one: {one}, two: {two} }}\n")).await;
    for path in ["/v1/one/x", "/v1/two/x"] {
        assert_eq!(proxy.ask(&Request::post(path, "{}")).await.status, 200, "{path}");
    }
    alone.probed(20).await;
    let (of_two, of_one) = (shared.probes(), alone.probes());
    assert!(of_two.abs_diff(of_one) <= 2, "{of_two} probes of a shared engine, {of_one} of the other");
    let up_for = |name| [("backend", shared.address()), ("upstream", String::from(name))];
    for (health, up) in [(503, 0.0), (200, 1.0)] {
        shared.set_health(health);
        for name in ["one", "two"] {
            let labels = up_for(name);
            let labels: Vec<(&str, &str)> =
                labels.iter().map(|(key, value)| (*key, value.as_str())).collect();
            proxy.counts("plimsoll_backend_up", &labels, up).await;
        }
    }
    proxy.counts("plimsoll_backend_up", &[("backend", &alone.address())], 1.0).await;
}
