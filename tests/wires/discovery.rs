//! Backends that come and go while the process runs, by a file or by DNS: nothing is cut, and no trouble of those who
//! say which there are takes one away.

use crate::support::client::{Line, Request};
use crate::support::dns::{NameServer, Reply};
use crate::support::engine::{Answer, Engine, Gate, delta};
use crate::support::proxy::{Proxy, folder};
use crate::support::stage::{BOTH, answered, assert_error, chat, reply, sent};
use crate::support::{one_upstream, wait_until};
use futures::future::join_all;
use hickory_resolver::proto::rr::RecordType;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// A file that lists backends, in a folder of its own.
struct List {
    folder: PathBuf,
}

impl List {
    fn new() -> Self {
        Self { folder: folder() }
    }

    fn of(engines: &[&Engine]) -> Self {
        let list = Self::new();
        list.names(engines);
        list
    }

    fn path(&self) -> PathBuf {
        self.folder.join("backends.yaml")
    }

    /// Puts another text in its place, at once.
    fn says(&self, text: &str) {
        std::fs::write(self.folder.join("new"), text).unwrap();
        std::fs::rename(self.folder.join("new"), self.path()).unwrap();
    }

    fn names(&self, engines: &[&Engine]) {
        self.says(&yaml(engines));
    }

    /// An upstream whose backends it lists; `more` is further keys.
    fn upstream(&self, more: &str) -> String {
        discovering(&format!("file: {}, interval: 100ms", self.path().display()), more)
    }
}

impl Drop for List {
    fn drop(&mut self) {
        let _left_behind = std::fs::remove_dir_all(&self.folder);
    }
}

fn yaml(engines: &[&Engine]) -> String {
    engines.iter().map(|engine| format!("- {}\n", engine.address())).collect()
}

/// One upstream `llm` that finds its backends so.
fn discovering(source: &str, more: &str) -> String {
    let off = |key: &str| if more.contains(key) { String::new() } else { format!(", {key} off") };
    let (probe, poll) = (off("probe:"), off("poll:"));
    format!("upstreams: {{ llm: {{ discover: {{ {source} }}, models: any{probe}{poll}, {more} }} }}\n")
}

/// Waits until the proxy has exactly these backends.
async fn has(proxy: &Proxy, engines: &[&Engine]) {
    let mut wanted: Vec<String> = engines.iter().map(|engine| engine.address()).collect();
    wanted.sort();
    wait_until(&format!("the backends {wanted:?}"), async || {
        let mut there: Vec<String> = weights(proxy).await.into_iter().map(|(address, _)| address).collect();
        there.sort();
        there == wanted
    })
    .await;
}

/// The backends and their weights.
async fn weights(proxy: &Proxy) -> Vec<(String, u64)> {
    let status = proxy.admin(&Request::get("/status")).await.value();
    let backends = status["upstreams"]["llm"]["backends"].as_array().unwrap().clone();
    let backend =
        |b: &serde_json::Value| (b["address"].as_str().unwrap().to_owned(), b["weight"].as_u64().unwrap());
    backends.iter().map(backend).collect()
}

/// Waits for another answer of the source with that result.
async fn another(proxy: &Proxy, result: &str) {
    let count = async || proxy.metrics().await.sum("plimsoll_discoveries_total", &[("result", result)]);
    let before = count().await;
    wait_until(&format!("another answer: {result}"), async || count().await > before).await;
}

fn lines(proxy: &Proxy, text: &str) -> usize {
    proxy.log().lines().filter(|line| line.contains(text)).count()
}

#[tokio::test]
async fn a_file_grows_shrinks_breaks_and_moves_under_streams_that_all_end_whole() {
    let engines: [Engine; 3] = std::array::from_fn(|_| Engine::streaming(&["a", "b", "c"]));
    let [a, b, c] = &engines;
    let list = List::of(&[a]);
    let proxy = Proxy::start(&list.upstream("policy: round_robin")).await;
    let over = Arc::new(AtomicBool::new(false));
    let client = async |line: Line| {
        let mut client = proxy.client(line).await;
        let mut count = 0;
        while !over.load(SeqCst) {
            client.send(&Request::streamed("tiny", "hello")).await;
            let answer = reply(&mut client).await;
            assert!(answer.status == 200 && answer.complete, "{}", answer.text());
            assert_ne!(answer.header("connection"), Some("close"));
            count += 1;
        }
        count
    };
    let changes = async {
        list.names(&[a, b, c]);
        has(&proxy, &[a, b, c]).await;
        list.names(&[b]);
        has(&proxy, &[b]).await;
        // None of those before: whoever looks at this moment must find one.
        for turn in 0..6 {
            let only = &engines[turn % 3];
            list.names(&[only]);
            has(&proxy, &[only]).await;
        }
        // Broken, empty, gone: nothing changes.
        for (text, result) in [("- 10.0.0.1:8000\n- gpu\n", "failed"), ("[]", "empty"), ("", "failed")] {
            list.says(text);
            another(&proxy, result).await;
            another(&proxy, result).await;
            has(&proxy, &[c]).await;
        }
        std::fs::remove_file(list.path()).unwrap();
        another(&proxy, "failed").await;
        has(&proxy, &[c]).await;
        // As Kubernetes moves a ConfigMap: a link to a link to a folder, of which the inner one is swapped.
        for (version, only) in [("v1", a), ("v2", b)] {
            let folder = list.folder.join(version);
            std::fs::create_dir(&folder).unwrap();
            std::fs::write(folder.join("backends.yaml"), yaml(&[only])).unwrap();
            symlink(version, list.folder.join("data.new")).unwrap();
            std::fs::rename(list.folder.join("data.new"), list.folder.join("data")).unwrap();
            if version == "v1" {
                symlink("data/backends.yaml", list.path()).unwrap();
            }
            has(&proxy, &[only]).await;
        }
        // In place, as `echo` does.
        std::fs::write(list.folder.join("v2/backends.yaml"), yaml(&[a, b, c])).unwrap();
        has(&proxy, &[a, b, c]).await;
        over.store(true, SeqCst);
    };
    let lines_of = [Line::Http1, Line::Http2, Line::Http1Tls, Line::Http2Tls];
    let (asked, ()) = futures::join!(join_all(lines_of.into_iter().chain(lines_of).map(client)), changes);
    assert!(asked.iter().all(|&count| count > 5), "{asked:?}");
    proxy.assert_at_rest().await;
    assert!(engines.iter().all(|engine| engine.count() > 0));
    // Each trouble is told once, with its place; and its end.
    let place = format!("{}:2:3", list.path().display());
    assert_eq!(lines(&proxy, &place), 1, "{}", proxy.log());
    assert_eq!(lines(&proxy, "an answer without backends"), 1);
    assert_eq!(lines(&proxy, "discovery working again"), 1);
    assert!(proxy.log().contains(&format!("backends changed upstream=llm added={}", b.address())));
}

#[tokio::test]
async fn a_stream_ends_as_it_began_on_a_backend_that_was_removed() {
    let new = Engine::good();
    for line in BOTH {
        let gate = Gate::new();
        let script = gate.clone();
        let old = Engine::start(move |_| {
            Answer::stream().event(&delta("a")).wait(&script).event(&delta("b")).event("[DONE]").end()
        });
        new.forget();
        let list = List::of(&[&old]);
        let proxy = Proxy::start(&list.upstream("")).await;
        let mut client = proxy.client(line).await;
        client.send(&Request::streamed("tiny", "hello")).await;
        assert_eq!(client.head().await.status, 200);
        client.piece().await.unwrap();
        list.names(&[&new]);
        has(&proxy, &[&new]).await;
        assert_eq!(proxy.client(line).await.ask(&chat()).await.status, 200);
        assert_eq!((old.count(), new.count()), (1, 1));
        // It is still owed what the stream was charged, and finds that when it returns.
        list.names(&[&old, &new]);
        has(&proxy, &[&old, &new]).await;
        proxy.counts("plimsoll_active_requests", &[("backend", &old.address())], 1.0).await;
        gate.open();
        let (rest, complete) = client.rest().await;
        assert!(complete && String::from_utf8_lossy(&rest).ends_with("data: [DONE]\n\n"));
        proxy.assert_at_rest().await;
    }
}

#[tokio::test]
async fn a_start_without_backends_is_not_ready_and_takes_them_up_when_they_come() {
    let (engine, list) = (Engine::good(), List::new());
    let mut proxy = Proxy::spawn(&list.upstream(""), &[]);
    proxy.listens().await;
    assert_eq!(proxy.admin(&Request::get("/readyz")).await.status, 503);
    assert_error(&proxy.ask(&chat()).await, 503, "no_backend");
    let before = proxy.metrics().await;
    assert_eq!(before.sum("plimsoll_discoveries_total", &[("result", "ok")]), 0.0);
    assert!(before.has("plimsoll_discoveries_total", &[("upstream", "llm"), ("result", "empty")]));
    assert!(before.has("plimsoll_discovery_age_seconds", &[("upstream", "llm")]));
    list.names(&[&engine]);
    wait_until("the proxy to be ready", async || proxy.admin(&Request::get("/readyz")).await.status == 200)
        .await;
    assert_eq!(proxy.ask(&chat()).await.status, 200);
    another(&proxy, "ok").await;
    assert!(proxy.metrics().await.sum("plimsoll_discovery_age_seconds", &[]) < 5.0);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_request_that_waits_goes_to_a_backend_that_is_found_meanwhile() {
    let gate = Gate::new();
    let script = gate.clone();
    let full = Engine::start(move |_| Answer::json(200, "{}").held_at(&script));
    let new = Engine::good();
    let list = List::of(&[&full]);
    let proxy = Proxy::start(&list.upstream("max_requests: 1")).await;
    let held = sent(&proxy, Line::Http1).await;
    gate.reached(1).await;
    let waits = sent(&proxy, Line::Http1).await;
    proxy.counts("plimsoll_queued_requests", &[], 1.0).await;
    list.names(&[&full, &new]);
    assert_eq!((answered(waits).await, new.count()), (200, 1));
    gate.open();
    assert_eq!(answered(held).await, 200);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_backend_that_is_found_is_probed_before_the_interval_ends_and_one_that_is_down_stays_so() {
    let engines = [Engine::good(), Engine::good()];
    let [a, b] = &engines;
    b.set_health(503);
    let list = List::of(&[a]);
    // The jitter is a fifth of the interval, and the interval longer than any test waits.
    let probe = "engine: vllm, probe: { interval: 20s, timeout: 1s, down_after: 1, up_after: 1 }";
    let proxy = Proxy::start(&list.upstream(probe)).await;
    a.probed(1).await;
    let joined = b.address();
    list.names(&[a, b]);
    has(&proxy, &[a, b]).await;
    b.probed(1).await;
    proxy.counts("plimsoll_backend_up", &[("backend", &joined)], 0.0).await;
    // Another weight is no news of its health.
    list.says(&format!("- {}\n- {{ address: {joined}, weight: 3 }}\n", a.address()));
    wait_until("the weight", async || weights(&proxy).await.contains(&(joined.clone(), 3))).await;
    assert_eq!(proxy.metrics().await.sum("plimsoll_backend_up", &[("backend", &joined)]), 0.0);
    assert_eq!(proxy.ask(&chat()).await.status, 200);
    assert_eq!((a.count(), b.count()), (1, 0));
}

#[tokio::test]
async fn models_are_asked_of_backends_that_are_found_and_known_until_they_have_answered() {
    let engines = [Engine::good(), Engine::good(), Engine::good()];
    engines[0].set_models(&["tiny"]);
    engines[1].set_models(&["tiny"]);
    engines[2].set_models(&["large"]);
    let list = List::of(&[&engines[0]]);
    let upstream = |models: &str| list.upstream("").replace("models: any", models);
    let proxy = Proxy::start(&upstream("models: discover")).await;
    let asks = async |model: &str| proxy.ask(&Request::chat(model, "hello")).await.status;
    wait_until("the models", async || asks("none").await == 404).await;
    for turn in [1, 0, 1] {
        list.names(&[&engines[turn]]);
        has(&proxy, &[&engines[turn]]).await;
        assert_eq!(asks("tiny").await, 200);
    }
    list.names(&[&engines[2]]);
    wait_until("the other model", async || asks("large").await == 200).await;
    wait_until("the first model to be forgotten", async || asks("tiny").await == 404).await;
}

#[tokio::test]
async fn a_reload_keeps_what_was_found_and_takes_another_source_up() {
    let engines = [Engine::good(), Engine::good(), Engine::good()];
    let [a, b, c] = &engines;
    let (list, other) = (List::of(&[a, b]), List::of(&[c]));
    let proxy = Proxy::start(&list.upstream("")).await;
    has(&proxy, &[a, b]).await;
    // Neither a reload nor one that finds the file gone loses anybody.
    std::fs::remove_file(list.path()).unwrap();
    assert_eq!(proxy.reload(&list.upstream("max_fails: 7")).await.status, 200);
    has(&proxy, &[a, b]).await;
    another(&proxy, "failed").await;
    has(&proxy, &[a, b]).await;
    list.names(&[b]);
    has(&proxy, &[b]).await;
    // Another source: by its answer, or by those before until it has one.
    assert_eq!(proxy.reload(&other.upstream("")).await.status, 200);
    has(&proxy, &[c]).await;
    let absent = List::new();
    assert_eq!(proxy.reload(&absent.upstream("")).await.status, 200);
    has(&proxy, &[c]).await;
    assert_eq!(proxy.ask(&chat()).await.status, 200);
    absent.names(&[a]);
    has(&proxy, &[a]).await;
    // From a source to a list and back.
    assert_eq!(proxy.reload(&one_upstream(&[b.address(), c.address()], "")).await.status, 200);
    has(&proxy, &[b, c]).await;
    assert!(!proxy.metrics().await.has("plimsoll_discovery_age_seconds", &[]));
    absent.names(&[c]);
    assert_eq!(proxy.reload(&absent.upstream("")).await.status, 200);
    has(&proxy, &[c]).await;
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn reloads_and_changes_at_the_same_time_lose_nothing_and_end_with_the_last_of_each() {
    let engines: [Engine; 3] = std::array::from_fn(|_| Engine::streaming(&["a", "b"]));
    let [a, b, c] = &engines;
    let list = List::of(&[a]);
    let upstream = |turn: usize| list.upstream(&format!("max_fails: {turn}")).replace("100ms", "5ms");
    let proxy = Proxy::start(&upstream(1)).await;
    let over = Arc::new(AtomicBool::new(false));
    let client = async {
        let mut client = proxy.client(Line::Http2).await;
        while !over.load(SeqCst) {
            client.send(&Request::streamed("tiny", "hello")).await;
            let answer = reply(&mut client).await;
            assert!(answer.status == 200 && answer.complete, "{}", answer.text());
        }
    };
    let changes = async {
        for turn in 1..=20 {
            list.names(&[&engines[turn % 3], &engines[(turn + 1) % 3]]);
            has(&proxy, &[&engines[turn % 3], &engines[(turn + 1) % 3]]).await;
        }
        list.names(&[a, b, c]);
    };
    let reloads = async {
        for turn in 1..=20 {
            assert_eq!(proxy.reload(&upstream(turn)).await.status, 200);
        }
    };
    let under_load = async {
        futures::join!(changes, reloads);
        has(&proxy, &[a, b, c]).await;
        over.store(true, SeqCst);
    };
    futures::join!(client, under_load);
    proxy.assert_at_rest().await;
}

/// Two engines on one port of two addresses, and the name of both.
fn on_one_port() -> ([Engine; 2], String) {
    let first = Engine::good();
    let second = first.beside(2);
    let port = first.socket().port();
    ([first, second], format!("engines.internal:{port}"))
}

fn said(engines: &[&Engine], ttl: u32) -> Reply {
    Reply::addresses(ttl, &engines.iter().map(|engine| engine.socket().ip()).collect::<Vec<_>>())
}

#[tokio::test]
async fn a_name_gains_and_loses_addresses_and_no_trouble_with_dns_takes_one_away() {
    let ([a, b], name) = on_one_port();
    let dns = NameServer::start().await;
    let host = "engines.internal";
    dns.say(host, RecordType::A, said(&[&a], 300));
    let source = format!("dns: '{name}', interval: 100ms, timeout: 300ms, servers: ['{}']", dns.address());
    let proxy = Proxy::start(&discovering(&source, "policy: round_robin")).await;
    has(&proxy, &[&a]).await;
    dns.say(host, RecordType::A, said(&[&a, &b], 300));
    has(&proxy, &[&a, &b]).await;
    let troubles = [
        (Reply::Failure, "failed", "Server Failure"),
        (Reply::Records(0, Vec::new()), "empty", "an answer without backends"),
        (Reply::Silence, "failed", "no answer within 300ms"),
        (Reply::NoSuchName, "empty", "an answer without backends"),
    ];
    for (index, (trouble, result, told)) in troubles.into_iter().enumerate() {
        for kind in [RecordType::A, RecordType::AAAA] {
            dns.say(host, kind, trouble.clone());
        }
        for _ in 0..2 {
            another(&proxy, result).await;
        }
        has(&proxy, &[&a, &b]).await;
        assert_eq!(proxy.ask(&chat()).await.status, 200);
        assert!(lines(&proxy, told) >= 1, "{told}: {}", proxy.log());
        dns.say(host, RecordType::AAAA, Reply::Records(0, Vec::new()));
        dns.say(host, RecordType::A, said(&[&a, &b], 300));
        another(&proxy, "ok").await;
        // On a busy machine an answer may be late once more.
        assert!(lines(&proxy, "discovery working again") > index, "{}", proxy.log());
    }
    // Half of the answer fails: the other half counts.
    dns.say(host, RecordType::AAAA, Reply::Failure);
    dns.say(host, RecordType::A, said(&[&b], 300));
    has(&proxy, &[&b]).await;
    assert_eq!(proxy.ask(&chat()).await.status, 200);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_name_is_asked_again_when_its_ttl_ends() {
    let ([a, b], name) = on_one_port();
    let dns = NameServer::start().await;
    dns.say("engines.internal", RecordType::A, said(&[&a], 1));
    let source = format!("dns: '{name}', interval: 1h, servers: ['{}']", dns.address());
    let proxy = Proxy::start(&discovering(&source, "")).await;
    dns.say("engines.internal", RecordType::A, said(&[&b], 3600));
    has(&proxy, &[&b]).await;
    assert!(dns.asked() >= 4, "two questions each time");
}

#[tokio::test]
async fn srv_records_bring_ports_and_weights_and_the_lowest_priority_alone_counts() {
    let engines = [Engine::good(), Engine::good(), Engine::good()];
    let port = |n: usize| engines[n].socket().port();
    let dns = NameServer::start().await;
    let (service, host) = ("_vllm._tcp.engines.internal", "gpu.internal");
    dns.say(host, RecordType::A, Reply::addresses(300, &[engines[0].socket().ip()]));
    let services = [(20, 50, port(2), host), (10, 20, port(0), host), (10, 60, port(1), host)];
    dns.say(service, RecordType::SRV, Reply::services(300, &services));
    let source = format!("srv: {service}, interval: 100ms, servers: ['{}']", dns.address());
    let mut proxy = Proxy::spawn(&discovering(&source, ""), &[]);
    proxy.listens().await;
    has(&proxy, &[&engines[0], &engines[1]]).await;
    let mut found = weights(&proxy).await;
    found.sort_by_key(|(_, weight)| *weight);
    assert_eq!(found, [(engines[0].address(), 20), (engines[1].address(), 60)]);
    // A target that cannot be looked up takes nobody away, neither does a record of a service that is gone.
    dns.say(host, RecordType::A, Reply::Failure);
    dns.say(host, RecordType::AAAA, Reply::Failure);
    another(&proxy, "failed").await;
    has(&proxy, &[&engines[0], &engines[1]]).await;
    dns.say(host, RecordType::A, Reply::addresses(300, &[engines[0].socket().ip()]));
    dns.say(service, RecordType::SRV, Reply::services(300, &[(0, 0, port(2), host), (1, 9, port(0), host)]));
    has(&proxy, &[&engines[2]]).await;
    assert_eq!(proxy.ask(&chat()).await.status, 200);
}

#[tokio::test]
async fn a_start_whose_name_server_fails_takes_the_backends_up_when_it_recovers() {
    let ([a, _b], name) = on_one_port();
    let dns = NameServer::start().await;
    for kind in [RecordType::A, RecordType::AAAA] {
        dns.say("engines.internal", kind, Reply::Failure);
    }
    let source = format!("dns: '{name}', interval: 100ms, timeout: 300ms, servers: ['{}']", dns.address());
    let mut proxy = Proxy::spawn(&discovering(&source, ""), &[]);
    proxy.listens().await;
    assert_eq!(proxy.admin(&Request::get("/readyz")).await.status, 503);
    assert_error(&proxy.ask(&chat()).await, 503, "no_backend");
    dns.say("engines.internal", RecordType::A, said(&[&a], 300));
    has(&proxy, &[&a]).await;
    assert_eq!(proxy.admin(&Request::get("/readyz")).await.status, 200);
    assert_eq!(proxy.ask(&chat()).await.status, 200);
    proxy.assert_at_rest().await;
}
