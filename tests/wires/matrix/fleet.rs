//! A fleet under load: poison, a rolling restart, a backend that is killed.

use crate::support::client::{Client, Line, Request};
use crate::support::engine::{Answer, Engine, Gate, Seen, delta};
use crate::support::stage::{BOTH, before, reply};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

/// The three ways of a poison prompt: a status, a crash, an error inside a 200.
const POISONS: [&str; 3] = ["500", "crash", "event"];

fn poisonable(seen: &Seen) -> Answer {
    match seen.head.header("x-poison") {
        Some("500") => Answer::json(500, r#"{"error":{"message":"poison"}}"#),
        Some("crash") => Answer::default().reset(),
        Some(_) => Answer::stream_of(&[r#"{"error":{"message":"poison","code":500}}"#]),
        None => Answer::stream_of(&[&delta("hello")]),
    }
}

async fn is_served(address: SocketAddr, line: Line) -> bool {
    let answer = Client::connect(address, line).await.ask(&Request::streamed("tiny", "hello")).await;
    answer.status == 200 && answer.complete && answer.events() == [delta("hello"), "[DONE]".to_owned()]
}

#[tokio::test]
async fn a_hundred_poison_prompts_leave_three_of_four_backends_and_every_good_request_is_served() {
    let engines: [Engine; 4] = std::array::from_fn(|_| Engine::start(poisonable));
    let proxy = before(&engines, "policy: round_robin, fail_timeout: 60s").await;
    let mut served = 0;
    for batch in 0..25 {
        let poison = (0..4).map(|number| {
            let kind = POISONS[(batch * 4 + number) % POISONS.len()];
            let request = Request::streamed("tiny", "poison").with("x-poison", kind);
            let id = format!("poison-{}", batch * 4 + number);
            let (address, line) = (proxy.address(BOTH[number % 2]), BOTH[number % 2]);
            async move { Client::connect(address, line).await.ask(&request.with("x-request-id", &id)).await }
        });
        let good = (0..4).map(|number| is_served(proxy.address(BOTH[number % 2]), BOTH[number % 2]));
        let (_, good) = futures::join!(futures::future::join_all(poison), futures::future::join_all(good));
        served += good.into_iter().filter(|served| *served).count();
        let up = proxy.metrics().await.sum("plimsoll_backend_up", &[]);
        assert!(up >= 3.0, "{up} backends in rotation after {} poison prompts", (batch + 1) * 4);
    }
    assert_eq!(served, 100);
    for number in 0..100 {
        let id = format!("poison-{number}");
        let seen = engines.iter().flat_map(Engine::seen);
        let times = seen.filter(|seen| seen.head.header("x-request-id") == Some(&*id)).count();
        assert!((1..=2).contains(&times), "{id} reached {times} engines");
    }
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_rolling_restart_of_all_backends_half_a_second_apart_fails_no_request() {
    let engines: [Engine; 3] = std::array::from_fn(|_| Engine::start(poisonable));
    let proxy = before(&engines, "").await;
    let addresses = BOTH.map(|line| (proxy.address(line), line));
    let restart = async {
        for engine in engines.iter().chain(&engines) {
            engine.kill().await;
            tokio::time::sleep(Duration::from_millis(250)).await;
            engine.revive();
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    };
    let mut requests = JoinSet::new();
    let load = async {
        let mut ticks = interval(Duration::from_millis(8));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for (address, line) in addresses.into_iter().cycle() {
            ticks.tick().await;
            requests.spawn(is_served(address, line));
        }
    };
    tokio::select! {
        () = restart => {}
        () = load => unreachable!("the load is endless"),
    }
    let served = requests.join_all().await;
    assert!(served.len() > 50, "{} requests are no load", served.len());
    assert_eq!(served.iter().filter(|served| !**served).count(), 0, "of {}", served.len());
    assert!(proxy.metrics().await.sum("plimsoll_retries_total", &[("reason", "connect")]) > 0.0);
    proxy.assert_at_rest().await;
}

/// Holds a request that has begun after its first event, and any other before its header.
fn held(gate: &Gate) -> impl Fn(&Seen) -> Answer + Send + Sync + 'static {
    let gate = gate.clone();
    move |seen| match (seen.head.header("x-begun"), seen.head.header("x-held")) {
        (Some(_), _) => Answer::stream().event(&delta("hello")).wait(&gate).event("[DONE]").end(),
        (None, Some(_)) => Answer::stream_of(&[&delta("hello")]).held_at(&gate),
        (None, None) => Answer::stream_of(&[&delta("hello")]),
    }
}

#[tokio::test]
async fn of_a_killed_backend_only_the_streams_that_had_begun_are_cut() {
    let gates: [Gate; 4] = std::array::from_fn(|_| Gate::new());
    let engines: [Engine; 4] = std::array::from_fn(|number| Engine::start(held(&gates[number])));
    let proxy = before(&engines, "policy: round_robin").await;
    let mut clients = Vec::new();
    for number in 0..40 {
        let mut client = proxy.client(BOTH[number % 2]).await;
        let begun = (number / 4) % 2 == 0;
        let request = Request::streamed("tiny", "hello").with(if begun { "x-begun" } else { "x-held" }, "1");
        client.send(&request).await;
        clients.push((client, begun));
        let under_way = || engines.iter().map(Engine::count).sum::<usize>();
        crate::support::wait_until("the engine", async || under_way() == number + 1).await;
    }
    // What has begun has begun for its client.
    for (client, begun) in &mut clients {
        if *begun {
            assert_eq!(client.head().await.status, 200);
        }
    }
    let lost = engines[0].seen().iter().filter(|seen| seen.head.header("x-begun").is_some()).count();
    assert!(lost >= 1 && lost < engines[0].count(), "{lost} of {}", engines[0].count());
    engines[0].kill().await;
    for number in 0..40 {
        assert!(
            is_served(proxy.address(BOTH[number % 2]), BOTH[number % 2]).await,
            "request {number} afterwards"
        );
    }
    gates.iter().for_each(|gate| (0..40).for_each(|_| gate.open()));
    let mut cut = 0;
    for (mut client, begun) in clients {
        let text = match begun {
            true => client.rest().await.0,
            false => {
                let reply = reply(&mut client).await;
                assert!(reply.status == 200 && reply.complete, "{}", reply.text());
                reply.body
            }
        };
        let text = String::from_utf8_lossy(&text).into_owned();
        cut += usize::from(begun && text.contains("stream_cut"));
        assert!(text.ends_with("data: [DONE]\n\n") != text.contains("stream_cut"), "{text}");
        assert!(begun || !text.contains("stream_cut"), "{text}");
    }
    assert_eq!(cut, lost);
    proxy.assert_at_rest().await;
}
