//! `/explain` tells where a request would go, and that is where it goes.

use super::schema::check;
use crate::support::client::{Line, Request};
use crate::support::engine::{Answer, Engine, Gate};
use crate::support::proxy::Proxy;
use crate::support::stage::{before, sent};
use crate::support::wait_until;
use serde_json::Value;

/// The policies that need no option.
const POLICIES: [&str; 7] = [
    "least_pending_tokens",
    "prefix_hash",
    "least_connections",
    "round_robin",
    "random_two",
    "lmetric",
    "blend",
];

async fn explain(proxy: &Proxy, session: &str, body: &Value) -> Value {
    let request = Request::post("/explain", body.to_string()).with("x-session-id", session);
    let answer = proxy.admin(&request).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    check("post", "/explain", &answer.value());
    answer.value()
}

#[tokio::test]
async fn a_request_goes_where_it_was_said_to_go_under_every_policy() {
    let seed = std::env::var("PLIMSOLL_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("replay: PLIMSOLL_SEED={seed} cargo test --test wires admin::explain");
    let mut rng = fastrand::Rng::with_seed(seed);
    for policy in POLICIES {
        let engines: Vec<_> = (0..3).map(|_| Engine::good()).collect();
        let proxy = before(&engines, &format!("policy: {policy}")).await;
        let mut client = proxy.client(Line::Http1).await;
        for n in 0..25 {
            if rng.u8(..6) == 0 {
                let verb = if rng.bool() { "drain" } else { "undrain" };
                let backend = engines[rng.usize(..2)].address();
                proxy.admin(&Request::post(&format!("/{verb}?backend={backend}"), "")).await;
            }
            let prompt = format!("conversation {} ", rng.u8(..4)).repeat(rng.usize(1..200));
            let session = format!("s{}", rng.u8(..5));
            let messages = serde_json::json!([{ "role": "user", "content": prompt }]);
            let body = serde_json::json!({ "model": "tiny", "messages": messages });
            let explained = explain(&proxy, &session, &body).await;
            assert_eq!((&explained["policy"], &explained["session"]), (&policy.into(), &true.into()));
            let winner = explained["winner"].as_str().expect("a winner");
            let reply = client.ask(&Request::json(&body).with("x-session-id", &session)).await;
            assert_eq!(
                reply.header("x-plimsoll-backend"),
                Some(winner),
                "{policy}, request {n}: {explained}"
            );
            let chosen = proxy.admin(&Request::get("/choices?limit=1")).await.value()["choices"][0].clone();
            assert_eq!(chosen["reason"], explained["reason"], "{policy}, request {n}");
            proxy.counts("plimsoll_active_requests", &[], 0.0).await;
        }
    }
}

#[tokio::test]
async fn an_explanation_charges_nothing_and_says_why_nobody_can_serve() {
    let gate = Gate::new();
    let scripted = gate.clone();
    let engine = Engine::start(move |_| Answer::json(200, "{}").held_at(&scripted));
    let proxy = before(std::slice::from_ref(&engine), "max_requests: 1").await;
    let messages = serde_json::json!([{ "role": "user", "content": "x".repeat(9_000) }]);
    let body = serde_json::json!({ "model": "tiny", "messages": messages });
    let ask = async || explain(&proxy, "s", &body).await;
    let first = ask().await;
    assert_eq!((&first["winner"], &first["reason"]), (&engine.address().into(), &"only".into()));
    assert!(first["prompt_tokens"].as_u64() > Some(500), "{first}");
    assert_eq!(ask().await, first);
    proxy.assert_at_rest().await;
    let client = sent(&proxy, Line::Http1).await;
    gate.reached(1).await;
    let full = ask().await;
    assert_eq!(full["winner"], Value::Null);
    assert!(full["nobody"].as_str().is_some_and(|why| why.contains("full")), "{full}");
    assert_eq!(full["backends"][0]["left_out"], "full: 1 in flight");
    drop(client);
    gate.open();
    wait_until("room", async || ask().await["winner"] == engine.address()).await;
    assert_eq!(engine.count(), 1);
}

#[tokio::test]
async fn what_would_be_refused_is_refused_here_too() {
    let engine = Engine::good();
    let upstream = format!("{{ backends: ['{}'], models: [tiny], probe: off, poll: off }}", engine.address());
    let rest = format!("limits: {{ body: 10KiB }}\nupstreams: {{ llm: {upstream} }}\n");
    let proxy = Proxy::start(&rest).await;
    let ask = async |path: &str, body: &str| {
        let answer = proxy.admin(&Request::post(path, body.to_owned())).await;
        (answer.status, answer.text())
    };
    let (status, said) = ask("/explain", r#"{"model":"huge","messages":[]}"#).await;
    assert_eq!((status, said.starts_with("model_not_found: ")), (404, true), "{said}");
    assert_eq!(ask("/explain?path=nowhere", "{}").await.0, 422);
    assert_eq!(ask("/explain?road=/v1/x", "{}").await.0, 422);
    assert_eq!(ask("/explain", &"x".repeat(20_000)).await.0, 413);
    assert_eq!(ask("/explain?path=/v1/completions", r#"{"model":"tiny","prompt":"x"}"#).await.0, 200);
}
