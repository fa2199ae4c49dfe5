//! Another configuration under load: nothing is cut, nothing is forgotten, and a bad file changes nothing.

use crate::support::client::{Line, Request};
use crate::support::engine::{Answer, Engine, Gate, delta};
use crate::support::proxy::{Proxy, binary, folder};
use crate::support::raw::Raw;
use crate::support::stage::{BOTH, answered, before, chat, counts, reply, sent};
use crate::support::tls::{Authority, Visitor};
use crate::support::{one_upstream, wait_until, within};
use futures::future::join_all;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

#[tokio::test]
async fn a_request_ends_as_it_began_and_the_next_goes_as_the_new_file_says() {
    let gate = Gate::new();
    let script = gate.clone();
    let old = Engine::start(move |_| {
        Answer::stream().event(&delta("a")).wait(&script).event(&delta("b")).event("[DONE]").end()
    });
    let new = Engine::good();
    for line in BOTH {
        let proxy = Proxy::start(&one_upstream(&[old.address()], "")).await;
        let mut client = proxy.client(line).await;
        client.send(&Request::streamed("tiny", "hello")).await;
        assert_eq!(client.head().await.status, 200);
        client.piece().await.unwrap();
        let said = proxy.reload(&one_upstream(&[new.address()], "")).await;
        assert_eq!((said.status, said.text().as_str()), (200, "reloaded: all of it applies\n"));
        new.forget();
        assert_eq!(proxy.client(line).await.ask(&chat()).await.status, 200);
        assert_eq!(new.count(), 1);
        gate.open();
        let (rest, complete) = client.rest().await;
        assert!(complete && String::from_utf8_lossy(&rest).ends_with("data: [DONE]\n\n"));
        // The same connection, under the new file.
        assert_eq!(client.ask(&chat()).await.status, 200);
        assert_eq!(new.count(), 2);
        proxy.assert_at_rest().await;
        let metrics = proxy.metrics().await;
        assert!(!metrics.has("plimsoll_active_requests", &[("backend", &old.address())]), "it is gone");
    }
}

#[tokio::test]
async fn a_file_with_mistakes_changes_nothing_and_says_where_they_are() {
    let engine = Engine::good();
    let proxy = before(std::slice::from_ref(&engine), "").await;
    let taken = "upstreams: { llm: { backends: [no-such-host.invalid:8000] } }\n";
    for (rest, said) in
        [("upstreams: { llm: { backend: 7 } }\n", "plimsoll.yaml:6:"), (taken, "does not resolve")]
    {
        let answer = proxy.reload(rest).await;
        assert_eq!(answer.status, 422, "{}", answer.text());
        assert!(
            answer.text().contains(said) && answer.text().contains("nothing has changed"),
            "{}",
            answer.text()
        );
        assert!(proxy.log().contains(said));
        assert_eq!(proxy.ask(&chat()).await.status, 200);
        assert_eq!(proxy.metrics().await.sum("plimsoll_reload_failed", &[]), 1.0);
    }
    assert_eq!(proxy.metrics().await.sum("plimsoll_reloads_total", &[("result", "failed")]), 2.0);
    assert_eq!(proxy.reload(&one_upstream(&[engine.address()], "")).await.status, 200);
    assert_eq!(proxy.metrics().await.sum("plimsoll_reload_failed", &[]), 0.0);
    assert_eq!(proxy.admin(&Request::get("/reload")).await.value()["ok"], true);
    assert_eq!(proxy.admin(&Request::get("/drain")).await.status, 405);
}

#[tokio::test]
async fn a_hangup_reloads_and_the_command_says_what_came_of_it() {
    let (old, new) = (Engine::good(), Engine::good());
    let proxy = before(std::slice::from_ref(&old), "").await;
    proxy.rewrite(&one_upstream(&[new.address()], ""));
    proxy.signal("HUP");
    proxy.counts("plimsoll_reloads_total", &[("result", "ok")], 1.0).await;
    assert_eq!(proxy.ask(&chat()).await.status, 200);
    assert_eq!((old.count(), new.count()), (0, 1));

    let reload = || {
        let output = Command::new(binary()).args(["reload", "--config"]).arg(proxy.file()).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    };
    proxy.rewrite(&format!("server: {{ threads: 7 }}\n{}", one_upstream(&[old.address()], "")));
    let (code, said) = reload();
    assert_eq!((code, said.as_str()), (Some(0), "reloaded: but for what needs a restart: server.threads\n"));
    proxy.rewrite("upstreams: {}\n");
    let (code, said) = reload();
    assert!(code == Some(78) && said.contains("`upstreams` is empty"), "{code:?} {said}");
    assert_eq!(proxy.ask(&chat()).await.status, 200);
    assert_eq!(old.count(), 1);
}

#[tokio::test]
async fn the_command_shows_how_the_backends_are() {
    let engines = [Engine::good(), Engine::good()];
    let proxy = before(&engines, "policy: round_robin").await;
    let status = |more: &[&str]| {
        let output = Command::new(binary())
            .args(["status", "--config"])
            .arg(proxy.file())
            .args(more)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let table = status(&[]);
    assert!(table.contains("\nllm, round_robin\n  backend"), "{table}");
    for engine in &engines {
        assert!(table.contains(&format!("\n  {}", engine.address())), "{table}");
    }
    let json: serde_json::Value = serde_json::from_str(&status(&["--json"])).unwrap();
    assert_eq!(json["upstreams"]["llm"]["backends"].as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn what_a_backend_owes_and_how_it_is_outlive_a_reload() {
    let gate = Gate::new();
    let script = gate.clone();
    let engines: [Engine; 2] = std::array::from_fn(|_| {
        let script = script.clone();
        Engine::start(move |_| Answer::json(200, "{}").held_at(&script))
    });
    let yaml = |more: &str| {
        let addresses = engines.each_ref().map(Engine::address);
        one_upstream(&addresses, &format!("policy: least_connections, {more}"))
    };
    let proxy = Proxy::start(&yaml("max_requests: 1")).await;
    let (first, second) = (sent(&proxy, Line::Http1).await, sent(&proxy, Line::Http1).await);
    gate.reached(2).await;
    let third = sent(&proxy, Line::Http1).await;
    proxy.counts("plimsoll_queued_requests", &[], 1.0).await;
    assert_eq!(proxy.reload(&yaml("max_requests: 2")).await.status, 200);
    gate.reached(3).await;
    assert_eq!(proxy.metrics().await.sum("plimsoll_active_requests", &[]), 3.0);
    assert_eq!(
        {
            let mut all = counts(&engines);
            all.sort_unstable();
            all
        },
        [1, 2],
        "room that was made is used"
    );
    for _ in 0..3 {
        gate.open();
    }
    for client in [first, second, third] {
        assert_eq!(answered(client).await, 200);
    }
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_request_that_waits_goes_to_a_backend_that_came_meanwhile() {
    let gate = Gate::new();
    let script = gate.clone();
    let full = Engine::start(move |_| Answer::json(200, "{}").held_at(&script));
    let (new, newer) = (Engine::good(), Engine::good());
    let proxy = before(std::slice::from_ref(&full), "max_requests: 1").await;
    let held = sent(&proxy, Line::Http1).await;
    gate.reached(1).await;
    let waits = sent(&proxy, Line::Http1).await;
    proxy.counts("plimsoll_queued_requests", &[], 1.0).await;
    let yaml = one_upstream(&[full.address(), new.address()], "max_requests: 1");
    assert_eq!(proxy.reload(&yaml).await.status, 200);
    assert_eq!((answered(waits).await, new.count()), (200, 1));
    gate.open();
    assert_eq!(answered(held).await, 200);

    // Half a body here, a file without any of the backends it began under there.
    let mut slow = Raw::connect(proxy.address(Line::Http1)).await;
    slow.send("POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 16\r\n\r\n{\"model\":").await.unwrap();
    wait_until("the body to be held", async || {
        proxy.metrics().await.sum("plimsoll_buffered_body_bytes", &[]) > 0.0
    })
    .await;
    assert_eq!(proxy.reload(&one_upstream(&[newer.address()], "")).await.status, 200);
    slow.send("\"tiny\"}").await.unwrap();
    assert_eq!((slow.answer().await.status, newer.count()), (200, 1));
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_longer_drain_applies_at_once() {
    let gate = Gate::new();
    let script = gate.clone();
    let engine =
        Engine::start(move |_| Answer::stream().event(&delta("a")).wait(&script).event("[DONE]").end());
    let rest = |timeout: &str| {
        format!("server: {{ drain_timeout: {timeout} }}\n{}", one_upstream(&[engine.address()], ""))
    };
    let mut proxy = Proxy::start(&rest("300ms")).await;
    assert_eq!(proxy.reload(&rest("1h")).await.status, 200);
    let mut client = proxy.client(Line::Http1).await;
    client.send(&Request::streamed("tiny", "hello")).await;
    client.head().await;
    client.piece().await.unwrap();
    proxy.signal("TERM");
    wait_until("the drain to begin", async || proxy.log().contains("draining in_flight=1")).await;
    // Longer than the file said that it was started with.
    let cut = tokio::time::timeout(std::time::Duration::from_millis(900), client.piece()).await;
    assert!(cut.is_err(), "the stream was cut: {cut:?}");
    gate.open();
    assert!(client.rest().await.1);
    assert!(proxy.exit().await.success());
}

#[tokio::test]
async fn a_backend_that_is_down_stays_down_and_one_that_is_new_is_probed() {
    let engines = [Engine::good(), Engine::good(), Engine::good()];
    let probe = "probe: { interval: 100ms, timeout: 1s, down_after: 1, up_after: 1 }";
    let yaml = |count: usize, more: &str| {
        let addresses: Vec<String> = engines[..count].iter().map(Engine::address).collect();
        one_upstream(&addresses, &format!("engine: vllm, {probe}, {more}"))
    };
    let proxy = Proxy::start(&yaml(2, "")).await;
    engines[0].set_health(503);
    let up = |n: usize| [("backend", engines[n].address())];
    let is = async |n: usize, value: f64| {
        let [(name, address)] = &up(n);
        proxy.counts("plimsoll_backend_up", &[(name, address.as_str())], value).await;
    };
    is(0, 0.0).await;
    assert_eq!(proxy.reload(&yaml(3, "max_fails: 7")).await.status, 200);
    is(0, 0.0).await;
    engines[0].probed(2).await;
    is(0, 0.0).await;
    engines[2].set_health(503);
    is(2, 0.0).await;
    engines[0].set_health(200);
    is(0, 1.0).await;
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_key_that_is_taken_away_opens_nothing_and_its_name_keeps_what_it_used() {
    let engine = Engine::good();
    let keys = |hash: &str, rest: &str| {
        format!("keys: {{ a: {{ sha256: {hash}, requests_per_minute: 3 }} }}\n{rest}")
    };
    let upstream = one_upstream(&[engine.address()], "");
    // Of `sk-a` and of nothing, by another program.
    let hashes = [
        "a4a6d307ad00fa67176e1099fdbc4f4a09bb527a7f24718a5030f2f173d11f7f",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    ];
    let proxy = Proxy::start(&keys(hashes[0], &upstream)).await;
    let asked = chat().with("x-api-key", "sk-a");
    assert_eq!(proxy.ask(&asked).await.status, 200);
    assert_eq!(proxy.reload(&keys(hashes[1], &upstream)).await.status, 200);
    assert_eq!(proxy.ask(&asked).await.status, 401);
    assert_eq!(proxy.reload(&keys(hashes[0], &upstream)).await.status, 200);
    let answer = proxy.ask(&asked).await;
    assert_eq!((answer.status, answer.header("x-ratelimit-remaining-requests")), (200, Some("1")));
}

#[tokio::test]
async fn fifty_reloads_under_load_fail_nothing_and_close_nothing() {
    let engines: [Engine; 3] = std::array::from_fn(|_| Engine::streaming(&["a", "b", "c"]));
    let yaml = |turn: usize| {
        let policy = ["least_pending_tokens", "round_robin", "prefix_hash"][turn % 3];
        let mut addresses = engines.each_ref().map(Engine::address).to_vec();
        if turn % 2 == 1 {
            addresses.remove(turn % 3);
        }
        one_upstream(&addresses, &format!("policy: {policy}, max_requests: {}", 4 + turn % 3))
    };
    let proxy = Proxy::start(&yaml(0)).await;
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
    let reloads = async {
        for turn in 1..=50 {
            assert_eq!(proxy.reload(&yaml(turn)).await.status, 200);
        }
        over.store(true, SeqCst);
    };
    let lines = [Line::Http1, Line::Http2, Line::Http1Tls, Line::Http2Tls];
    let (asked, ()) = futures::join!(join_all(lines.into_iter().chain(lines).map(client)), reloads);
    assert!(asked.iter().all(|&count| count > 5), "{asked:?}");
    assert_eq!(proxy.metrics().await.sum("plimsoll_reloads_total", &[("result", "ok")]), 50.0);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_certificate_that_was_renewed_is_shown_from_then_on() {
    let engine = Engine::good();
    let authority = Authority::unknown();
    let proxy = before(std::slice::from_ref(&engine), "").await;
    let visitor = Visitor::trusting(&authority);
    let (address, mut kept) = (proxy.address(Line::Http1Tls), proxy.client(Line::Http1Tls).await);
    let (old, _) = visitor.visit(address, "127.0.0.1").await.unwrap();
    let renewed = authority.sign(&["127.0.0.1"]);
    // In the place of the old one, as whoever renews it does.
    let folder = proxy.file().parent().unwrap().to_owned();
    renewed.write(&folder, "new");
    std::fs::rename(folder.join("new.pem"), folder.join("cert.pem")).unwrap();
    let rest = one_upstream(&[engine.address()], "");
    let said = proxy.reload(&rest).await;
    assert!(said.status == 422 && said.text().contains("cert.pem"), "the key does not fit: {}", said.text());
    std::fs::rename(folder.join("new.key"), folder.join("key.pem")).unwrap();
    assert_eq!(proxy.reload(&rest).await.status, 200);
    let (shown, _) = visitor.visit(address, "127.0.0.1").await.unwrap();
    assert!(shown == renewed.der && shown != old);
    assert_eq!(kept.ask(&chat()).await.status, 200, "a connection that was there lives on");
}

#[tokio::test]
async fn systemd_is_told_when_a_reload_begins_and_when_it_has_ended() {
    let socket = folder().join("notify");
    let systemd = tokio::net::UnixDatagram::bind(&socket).unwrap();
    let engine = Engine::good();
    let rest = one_upstream(&[engine.address()], "");
    let mut proxy = Proxy::spawn(&rest, &[("NOTIFY_SOCKET", socket.to_str().unwrap())]);
    let heard = async || {
        let mut buffer = [0; 100];
        let length = within("a message to systemd", systemd.recv(&mut buffer)).await.unwrap();
        // What is said beside the state is for people.
        String::from_utf8_lossy(&buffer[..length]).lines().next().unwrap_or_default().to_owned()
    };
    assert_eq!(heard().await, "READY=1");
    proxy.signal("HUP");
    assert_eq!([heard().await, heard().await], ["RELOADING=1", "READY=1"]);
    proxy.listens().await;
    assert_eq!(proxy.reload("upstreams: 7\n").await.status, 422);
    assert_eq!([heard().await, heard().await], ["RELOADING=1", "READY=1"]);
    proxy.signal("TERM");
    assert_eq!(heard().await, "STOPPING=1");
    assert!(proxy.exit().await.success());
}
