//! What the admin listener shows: states with reasons, choices, requests in flight, and its own description.

use super::schema::{check, description};
use crate::support::client::{Client, Line, Request};
use crate::support::engine::{Answer, Engine, Gate, delta};
use crate::support::proxy::Proxy;
use crate::support::stage::{answered, before, chat, sent};
use crate::support::{one_upstream, wait_until};
use serde_json::Value;
use std::net::SocketAddr;

/// What `GET path` says, which has to be as its description says.
pub(super) async fn told(proxy: &Proxy, path: &str) -> Value {
    let answer = proxy.admin(&Request::get(path)).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")), "{path}");
    let value = answer.value();
    check("get", path.split('?').next().unwrap_or(path), &value);
    value
}

/// What `/status` says of the backend at `address`.
pub(super) fn backend(status: &Value, address: &str) -> Value {
    let backends = status["upstreams"]["llm"]["backends"].as_array().expect("a list");
    backends.iter().find(|backend| backend["address"] == address).expect("it is one of them").clone()
}

/// The requests in flight.
pub(super) async fn requests(proxy: &Proxy) -> Vec<Value> {
    told(proxy, "/requests").await["requests"].as_array().expect("a list").clone()
}

/// Waits until the stages of the requests in flight are these.
async fn stages(proxy: &Proxy, wanted: &[&str]) {
    wait_until(&format!("stages {wanted:?}"), async || {
        let mut stages: Vec<_> =
            requests(proxy).await.iter().map(|r| r["stage"].as_str().unwrap_or("?").to_owned()).collect();
        stages.sort();
        stages == wanted
    })
    .await;
}

#[tokio::test]
async fn a_request_is_listed_at_every_stage_and_struck_off_after_its_end_or_abort() {
    let gate = Gate::new();
    let scripted = gate.clone();
    let engine = Engine::start(move |_| {
        Answer::stream_of(&[&delta("a"), &delta("b")]).gated_after_first_event(&scripted)
    });
    let proxy =
        before(std::slice::from_ref(&engine), "max_requests: 1, queue: { length: 9, timeout: 30s }").await;
    assert_eq!(requests(&proxy).await.len(), 0);
    let mut streaming = proxy.client(Line::Http1).await;
    let request = Request::streamed("tiny", "a secret prompt").with("x-request-id", "mine");
    streaming.send(&request.with("authorization", "Bearer canary")).await;
    stages(&proxy, &["streaming"]).await;
    let listed = requests(&proxy).await.remove(0);
    assert_eq!((&listed["id"], &listed["model"]), (&"mine".into(), &"tiny".into()));
    assert_eq!((&listed["upstream"], &listed["backend"]), (&"llm".into(), &engine.address().into()));
    assert_eq!((&listed["attempts"], &listed["key"]), (&1.into(), &Value::Null));
    assert!(listed["reads"].as_u64() >= Some(1) && listed["prompt_tokens"].as_u64() > Some(0), "{listed}");
    let queued = sent(&proxy, Line::Http2).await;
    stages(&proxy, &["queued", "streaming"]).await;
    let mut reading = proxy.client(Line::Http1).await;
    reading.send(&chat().missing_bytes(5)).await;
    stages(&proxy, &["queued", "reading", "streaming"]).await;
    let status = told(&proxy, "/status").await;
    assert_eq!((&status["in_flight"], &status["upstreams"]["llm"]["queued"]), (&3.into(), &1.into()));
    let shown = proxy.admin(&Request::get("/requests")).await.text() + &status.to_string();
    assert!(!shown.contains("secret") && !shown.contains("canary"), "{shown}");
    // All three clients leave.
    drop((streaming, queued, reading));
    gate.open();
    wait_until("nothing in flight", async || requests(&proxy).await.is_empty()).await;
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_request_without_an_answer_yet_waits() {
    let gate = Gate::new();
    let scripted = gate.clone();
    let engine = Engine::start(move |_| Answer::json(200, "{}").held_at(&scripted));
    let proxy = before(std::slice::from_ref(&engine), "").await;
    let client = sent(&proxy, Line::Http1).await;
    stages(&proxy, &["waiting"]).await;
    gate.open();
    assert_eq!(answered(client).await, 200);
    stages(&proxy, &[]).await;
}

#[tokio::test]
async fn the_last_256_choices_are_told_newest_first_with_their_reasons() {
    let engines = [Engine::good(), Engine::good()];
    let proxy = before(&engines, "policy: round_robin").await;
    let mut client = Client::connect(proxy.address(Line::Http1), Line::Http1).await;
    for n in 0..260 {
        let answer = client.ask(&chat().with("x-request-id", &format!("r{n}"))).await;
        assert_eq!(answer.status, 200);
    }
    let choices = told(&proxy, "/choices").await["choices"].as_array().expect("a list").clone();
    let ids: Vec<_> = choices.iter().filter_map(|choice| choice["id"].as_str()).collect();
    let expected: Vec<_> = (4..260).rev().map(|n| format!("r{n}")).collect();
    assert_eq!(ids, expected);
    assert!(choices.iter().all(|choice| choice["reason"] == "turn" && choice["upstream"] == "llm"));
    assert_ne!(choices[0]["backend"], choices[1]["backend"]);
    assert_eq!(told(&proxy, "/choices?limit=3").await["choices"].as_array().map(Vec::len), Some(3));
    for flawed in ["/choices?limit=x", "/choices?limit=-1", "/choices?most=3"] {
        assert_eq!(proxy.admin(&Request::get(flawed)).await.status, 422, "{flawed}");
    }
}

#[tokio::test]
async fn a_state_says_why_it_is_so() {
    let engines = [Engine::good(), Engine::good()];
    let probe = "engine: vllm, probe: { interval: 20ms, timeout: 5s, down_after: 1 }";
    let proxy = before(&engines, probe).await;
    engines[1].set_health(503);
    let down = async || {
        let status = told(&proxy, "/status").await;
        let backends = status["upstreams"]["llm"]["backends"].as_array().expect("a list").clone();
        backends.into_iter().find(|b| b["address"] == engines[1].address()).expect("the second")
    };
    wait_until("the probe to notice", async || down().await["state"] == "down").await;
    assert_eq!(down().await["reason"], "probe: status 503");
    assert!(down().await["since_seconds"].as_f64() >= Some(0.0));
    engines[1].set_health(200);
    wait_until("the probe to notice", async || down().await["state"] == "up").await;
    assert_eq!(down().await["reason"], Value::Null);
}

#[tokio::test]
async fn an_ejection_names_its_failures_and_counters_count() {
    let dead = Engine::good();
    dead.close_port();
    let good = Engine::good();
    let rest = one_upstream(&[dead.address(), good.address()], "max_fails: 2, policy: round_robin");
    let proxy = Proxy::start(&rest).await;
    wait_until("an ejection", async || {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
        backend(&told(&proxy, "/status").await, &dead.address())["state"] == "ejected"
    })
    .await;
    let status = told(&proxy, "/status").await;
    assert_eq!(backend(&status, &dead.address())["reason"], "2 failures: connect");
    assert!(backend(&status, &good.address())["requests"]["ok"].as_u64() >= Some(2), "{status}");
    let shown = status["upstreams"]["llm"]["backends"].as_array().expect("a list");
    let addresses = shown.iter().map(|b| b["address"].as_str().and_then(|a| a.parse::<SocketAddr>().ok()));
    assert!(addresses.is_sorted(), "in an order that stays: {status}");
    assert_eq!(status["reload"], Value::Null);
    proxy.reload(&rest).await;
    assert_eq!(told(&proxy, "/reload").await["ok"], true);
    proxy.reload("nonsense").await;
    let last = told(&proxy, "/status").await["reload"].clone();
    assert_eq!(last["ok"], false);
    assert!(last["said"].as_str().is_some_and(|said| !said.is_empty()), "{last}");
}

#[tokio::test]
async fn what_is_described_is_answered_and_nothing_else() {
    let engine = Engine::good();
    let proxy = before(std::slice::from_ref(&engine), "").await;
    let served = proxy.admin(&Request::get("/openapi.yaml")).await;
    let served: Value = serde_yaml::from_str(&served.text()).expect("YAML");
    assert_eq!(served, description());
    let answer = proxy.admin(&Request::get("/nothing")).await;
    assert_eq!(answer.status, 404);
    let mut listed: Vec<_> = answer.text().lines().skip(1).map(|line| line.trim().to_owned()).collect();
    let mut described = Vec::new();
    for (path, methods) in description()["paths"].as_object().expect("paths") {
        for method in methods.as_object().expect("methods").keys() {
            described.push(format!("{} {path}", method.to_uppercase()));
        }
    }
    listed.sort();
    described.sort();
    assert_eq!(listed, described);
    let other = proxy.admin(&Request::post("/status", "")).await;
    assert_eq!((other.status, other.header("allow")), (405, Some("GET, HEAD")));
    let other = proxy.admin(&Request::get("/drain")).await;
    assert_eq!((other.status, other.header("allow")), (405, Some("POST")));
}
