//! `conf/grafana.json`: every query of every panel shows something, in a real Prometheus, of a real run.
//!
//! The run has all that the dashboard is about: traffic through two simulated engines, a backend that is gone (retries,
//! ejections), an engine that is full (a queue) and one that fails, a key, and somebody with a wrong one. Until the
//! trouble begins no critical alert may even be pending; after it, one has to be.

use super::alerts::conf;
use super::found;
use super::names::assert_known;
use super::prometheus::Prometheus;
use crate::support::client::{Client, Line, Request};
use crate::support::engine::{Answer, Engine, Gate};
use crate::support::proxy::{Proxy, binary, folder};
use crate::support::tls::write_secret;
use crate::support::{upstream, wait_until};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use tokio::task::JoinHandle;

const KEY: &str = "a-key-of-32-characters-0123456789";

/// What shows nothing but zeros when all is well, and does so in this run.
const MAY_BE_ZERO: [&str; 3] =
    ["plimsoll_backend_stalled", "plimsoll_backend_strained", "plimsoll_reload_failed"];

/// The expressions of all panels, as they are written.
fn expressions(dashboard: &Value) -> Vec<String> {
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    targets.map(|target| target["expr"].as_str().expect("an expression").to_owned()).collect()
}

fn dashboard() -> Value {
    let text = std::fs::read_to_string(conf("grafana.json")).expect("conf/grafana.json");
    serde_json::from_str(&text).expect("JSON")
}

/// As Grafana fills in its variables when everything is selected.
fn filled(expression: &str) -> String {
    expression.replace("$__rate_interval", "1m").replace("$instance", ".*").replace("$upstream", ".*")
}

#[test]
fn every_panel_is_about_metrics_that_exist() {
    let dashboard = dashboard();
    let expressions = expressions(&dashboard);
    assert!(expressions.len() >= 40, "{}", expressions.len());
    expressions.iter().for_each(|expression| assert_known(expression));
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut ids: Vec<_> = panels.iter().map(|panel| panel["id"].as_u64().expect("an id")).collect();
    ids.dedup();
    assert_eq!(ids.len(), panels.len());
    assert!(expressions.iter().all(|expression| !filled(expression).contains('$')));
}

/// `plimsoll engine` on a port of its own, until dropped.
struct Simulated {
    child: Child,
    address: String,
}

impl Simulated {
    fn start() -> Self {
        let mut child = Command::new(binary())
            .args(["engine", "--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the binary starts");
        let mut line = String::new();
        let stdout = child.stdout.as_mut().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        let address = line.trim().rsplit(' ').next().expect("an address").to_owned();
        Self { child, address }
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _status = self.child.wait();
    }
}

/// A streamed chat of a long prompt and a short answer.
fn chat(model: &str, key: &str) -> Request {
    let messages = json!([{ "role": "user", "content": "the same long story. ".repeat(200) }]);
    let body = json!({ "model": model, "messages": messages, "max_tokens": 8, "stream": true,
        "stream_options": { "include_usage": true } });
    Request::json(&body).with("authorization", &format!("Bearer {key}"))
}

/// Clients that ask, one request after the other, until aborted; once there is `trouble`, also of what fails.
fn traffic(address: SocketAddr, trouble: &Arc<AtomicBool>) -> JoinHandle<()> {
    let trouble = trouble.clone();
    tokio::spawn(async move {
        loop {
            let mut requests = vec![chat("sim-8b", KEY), chat("sim-8b", KEY), chat("sim-8b", "a-wrong-key")];
            if trouble.load(SeqCst) {
                requests.push(chat("broken", KEY));
            }
            for request in requests {
                let answer = Client::connect(address, Line::Http1).await.ask(&request).await;
                assert!(answer.complete);
            }
        }
    })
}

#[tokio::test]
async fn every_query_of_every_panel_shows_something() {
    if !found("prometheus") {
        return;
    }
    let simulated = [Simulated::start(), Simulated::start()];
    let gone = Engine::dead(|_| Answer::nothing());
    let gate = Gate::new();
    let held = gate.clone();
    let full = Engine::start(move |_| Answer::json(200, "{}").held_at(&held));
    full.set_readings(1, 2, 0.5);
    let broken = Engine::start(|_| Answer::json(500, "{}"));
    let configuration = configuration(&simulated, &gone, &full, &broken);
    let proxy = Proxy::start(&configuration).await;
    let trouble = Arc::new(AtomicBool::new(false));
    let traffic = traffic(proxy.address(Line::Http1), &trouble);
    let prometheus = Prometheus::start(proxy.admin_address()).await;

    let served = r#"sum(rate(plimsoll_requests_total{outcome="ok"}[1m]))"#;
    wait_until("traffic", async || prometheus.query(served).await.iter().any(|&rate| rate > 0.0)).await;
    wait_until("every rule to be evaluated, and to be well", async || {
        let data = prometheus.api("rules", &[]).await;
        let rules = data["groups"][0]["rules"].as_array().cloned().unwrap_or_default();
        rules.len() >= 16 && rules.iter().all(|rule| rule["health"] == "ok")
    })
    .await;
    let alerts = prometheus.alerts().await;
    assert!(alerts.iter().all(|(_, severity)| severity != "critical"), "while all is well: {alerts:?}");

    trouble.store(true, SeqCst);
    assert_eq!(proxy.reload(&configuration).await.status, 200);
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let mut client = proxy.client(Line::Http1).await;
        client.send(&chat("full", KEY)).await;
        waiting.push(client);
    }
    let dashboard = dashboard();
    for expression in expressions(&dashboard) {
        let may_be_zero = MAY_BE_ZERO.iter().any(|name| expression.contains(name));
        let query = filled(&expression);
        wait_until(&format!("`{query}` to show something"), async || {
            prometheus.query(&query).await.iter().any(|&value| may_be_zero || value > 0.0)
        })
        .await;
    }
    for (label, metric) in variables(&dashboard) {
        let values = prometheus.api(&format!("label/{label}/values"), &[("match[]", &filled(&metric))]).await;
        assert!(values.as_array().is_some_and(|values| !values.is_empty()), "{label} of {metric}");
    }
    wait_until("the failing upstream to be an alert", async || {
        prometheus.alerts().await.contains(&("PlimsollErrors".to_owned(), "critical".to_owned()))
    })
    .await;
    traffic.abort();
    assert!(traffic.await.is_err_and(|end| end.is_cancelled()), "a client failed");
}

fn configuration(simulated: &[Simulated], gone: &Engine, full: &Engine, broken: &Engine) -> String {
    let file = folder().join("key");
    write_secret(&file, KEY);
    let mut backends: Vec<_> = simulated.iter().map(|engine| engine.address.clone()).collect();
    backends.push(gone.address());
    let poll = "poll: { interval: 100ms }";
    // Ejected for a moment at a time, so that it is tried again.
    let busy = format!(
        "engine: vllm, models: [sim-8b], policy: round_robin, max_fails: 1, fail_timeout: 1s, {poll}"
    );
    let narrow = format!("engine: vllm, models: [full], max_requests: 1, {poll}");
    format!(
        "keys: {{ team: {{ file: {} }} }}\nupstreams:\n  busy: {}\n  full: {}\n  broken: {}\n",
        file.display(),
        upstream(&backends, &busy),
        upstream(&[full.address()], &narrow),
        upstream(&[broken.address()], "models: [broken], max_fails: 0"),
    )
}

/// The label and the series of each variable that is asked of Prometheus.
fn variables(dashboard: &Value) -> Vec<(String, String)> {
    let variables = dashboard["templating"]["list"].as_array().expect("variables");
    let queries = variables.iter().filter_map(|variable| variable["query"]["query"].as_str());
    let parts = queries.map(|query| {
        let inside = query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')'));
        let (series, label) =
            inside.and_then(|inside| inside.rsplit_once(", ")).expect("a series and a label");
        (label.to_owned(), series.to_owned())
    });
    parts.collect()
}
