//! Polls: what an engine says of itself guards and corrects, as long as it is fresh.

use crate::support::client::Line;
use crate::support::engine::{Answer, Engine, Gate};
use crate::support::proxy::Proxy;
use crate::support::stage::{before, chat, counts, sent};

const POLLED: &str = "engine: vllm, poll: { interval: 50ms, timeout: 2s }";

async fn ask(proxy: &Proxy, times: usize) {
    for _ in 0..times {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
    }
}

#[tokio::test]
async fn an_engine_out_of_memory_with_a_queue_is_passed_over_until_it_recovers() {
    let engines: [Engine; 2] = std::array::from_fn(|_| Engine::good());
    engines.iter().for_each(|engine| engine.set_readings(0, 0, 0.1));
    let proxy = before(&engines, &format!("{POLLED}, policy: round_robin")).await;
    let strained = |value: f64| proxy.counts("plimsoll_backend_strained", &[], value);
    engines[0].set_readings(0, 3, 0.99);
    strained(1.0).await;
    ask(&proxy, 6).await;
    assert_eq!(counts(&engines), [0, 6]);
    engines[1].set_readings(0, 3, 0.99);
    strained(2.0).await;
    ask(&proxy, 6).await;
    assert_eq!(counts(&engines).iter().sum::<usize>(), 12, "with nobody else left they serve");
    engines.iter().for_each(|engine| engine.set_readings(0, 0, 0.5));
    strained(0.0).await;
    engines.iter().for_each(Engine::forget);
    ask(&proxy, 6).await;
    assert_eq!(counts(&engines), [3, 3]);
}

#[tokio::test]
async fn an_engine_that_others_keep_busy_gets_less_from_us() {
    let gate = Gate::new();
    let held = gate.clone();
    let script = move |_: &_| Answer::json(200, "{}").held_at(&held);
    let engines: [Engine; 2] = std::array::from_fn(|_| Engine::start(script.clone()));
    engines[0].set_readings(8, 0, 0.5);
    engines[1].set_readings(0, 0, 0.1);
    let proxy = before(&engines, &format!("{POLLED}, policy: least_connections")).await;
    proxy.counts("plimsoll_engine_running", &[], 8.0).await;
    let mut clients = Vec::new();
    for n in 1..=4 {
        clients.push(sent(&proxy, Line::Http1).await);
        engines[1].received(n).await;
    }
    assert_eq!(counts(&engines), [0, 4]);
    (0..4).for_each(|_| gate.open());
}
