//! What the admin listener is told: drain, undrain, weight; and by whom it is not.

use super::seen::{backend, told};
use crate::support::client::{Answer as Reply, Client, Line, Request};
use crate::support::engine::{Answer, Engine, Gate, delta};
use crate::support::proxy::{Keys, Proxy, binary, folder};
use crate::support::stage::{assert_error, before, chat, counts, reply, sent};
use crate::support::tls::write_secret;
use crate::support::{one_upstream, wait_until};
use std::process::Command;

async fn post(proxy: &Proxy, path: &str) -> Reply {
    proxy.admin(&Request::post(path, "")).await
}

fn of_session(session: u32) -> Request {
    chat().with("x-session-id", &format!("s{session}"))
}

#[tokio::test]
async fn draining_moves_sessions_at_once_lets_streams_end_and_is_undone() {
    let gate = Gate::new();
    let engines = [(); 2].map(|()| {
        let gate = gate.clone();
        Engine::start(move |seen| match String::from_utf8_lossy(&seen.body).contains("\"stream\":true") {
            true => Answer::stream_of(&[&delta("a"), &delta("b")]).gated_after_first_event(&gate),
            false => Answer::json(200, "{}"),
        })
    });
    let proxy = before(&engines, "policy: { prefix_hash: { load_factor: 100 } }").await;
    let mut client = Client::connect(proxy.address(Line::Http1), Line::Http1).await;
    let mut homes = Vec::new();
    for session in 0..20 {
        let reply = client.ask(&of_session(session)).await;
        homes.push(reply.header("x-plimsoll-backend").expect("a backend").to_owned());
    }
    let (drained, other) = (engines[0].address(), engines[1].address());
    let at_home = homes.iter().position(|home| *home == drained).expect("a session of the first") as u32;
    let mut stream = proxy.client(Line::Http2).await;
    let request = Request::streamed("tiny", "x").with("x-session-id", &format!("s{at_home}"));
    stream.send(&request).await;
    gate.reached(1).await;
    let answer = post(&proxy, &format!("/drain?upstream=llm&backend={drained}")).await;
    assert_eq!(answer.text(), format!("{drained} gets no new request in llm; 1 in flight\n"));
    for session in 0..20 {
        let reply = client.ask(&of_session(session)).await;
        assert_eq!((reply.status, reply.header("x-plimsoll-backend")), (200, Some(other.as_str())));
    }
    let backend = backend(&told(&proxy, "/status").await, &drained);
    assert_eq!((backend["state"].as_str(), backend["draining"].as_bool()), (Some("draining"), Some(true)));
    for (of, value) in [(&drained, 0.0), (&other, 1.0)] {
        proxy.counts("plimsoll_backend_up", &[("backend", of)], value).await;
    }
    gate.open();
    let ended = reply(&mut stream).await;
    assert!(ended.complete && ended.text().contains("\"b\""), "{}", ended.text());
    assert_eq!(post(&proxy, &format!("/undrain?backend={drained}")).await.status, 200);
    for session in 0..20 {
        let reply = client.ask(&of_session(session)).await;
        assert_eq!(reply.header("x-plimsoll-backend"), Some(homes[session as usize].as_str()), "{session}");
    }
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_reload_keeps_a_drain_and_if_all_are_drained_that_is_the_reason() {
    let engines = [Engine::good(), Engine::good()];
    let proxy = before(&engines, "").await;
    let rest = one_upstream(&[engines[0].address(), engines[1].address()], "max_fails: 7");
    for engine in &engines {
        assert_eq!(post(&proxy, &format!("/drain?backend={}", engine.address())).await.status, 200);
    }
    assert_eq!(proxy.reload(&rest).await.status, 200);
    assert_error(&proxy.ask(&chat()).await, 503, "draining");
    let readiness = proxy.admin(&Request::get("/readyz")).await;
    assert_eq!((readiness.status, readiness.text().as_str()), (503, "no backend is up in: llm\n"));
    assert_eq!(proxy.ask(&Request::get("/health")).await.status, 503);
    assert_eq!(counts(&engines), [0, 0]);
    post(&proxy, &format!("/undrain?backend={}", engines[1].address())).await;
    assert_eq!(proxy.ask(&chat()).await.status, 200);
    assert_eq!(counts(&engines), [0, 1]);
}

#[tokio::test]
async fn who_waits_for_room_is_told_when_the_last_backend_is_drained() {
    let gate = Gate::new();
    let scripted = gate.clone();
    let engine = Engine::start(move |_| Answer::json(200, "{}").held_at(&scripted));
    let proxy =
        before(std::slice::from_ref(&engine), "max_requests: 1, queue: { length: 9, timeout: 60s }").await;
    let mut first = sent(&proxy, Line::Http1).await;
    gate.reached(1).await;
    let mut waiting = [sent(&proxy, Line::Http1).await, sent(&proxy, Line::Http2).await];
    proxy.counts("plimsoll_queued_requests", &[], 2.0).await;
    post(&proxy, &format!("/drain?backend={}", engine.address())).await;
    for client in &mut waiting {
        assert_error(&reply(client).await, 503, "draining");
    }
    gate.open();
    assert_eq!(reply(&mut first).await.status, 200);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_weight_holds_until_its_configured_weight_changes() {
    let engines = [Engine::good(), Engine::good()];
    let proxy = before(&engines, "policy: round_robin").await;
    let [light, heavy] = [0, 1].map(|n| engines[n].address());
    assert_eq!(post(&proxy, &format!("/weight?backend={heavy}&weight=3")).await.status, 200);
    for _ in 0..8 {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
    }
    assert_eq!(counts(&engines), [2, 6]);
    let weights = async || {
        let status = told(&proxy, "/status").await;
        [&light, &heavy].map(|address| backend(&status, address)["weight"].as_u64().unwrap_or(0))
    };
    assert_eq!(weights().await, [1, 3]);
    let file = |weight: u32| {
        let heavy = format!("{{ address: '{heavy}', weight: {weight} }}");
        one_upstream(&[light.clone(), heavy], "policy: round_robin, max_fails: 7")
    };
    assert_eq!(proxy.reload(&file(1)).await.status, 200);
    assert_eq!(weights().await, [1, 3]);
    assert_eq!(proxy.reload(&file(5)).await.status, 200);
    assert_eq!(weights().await, [1, 5]);
}

#[tokio::test]
async fn what_is_not_there_or_makes_no_sense_is_said() {
    let engine = Engine::good();
    let proxy = before(std::slice::from_ref(&engine), "").await;
    let address = engine.address();
    for (path, status) in [
        ("/drain?backend=10.9.9.9:1".to_owned(), 404),
        (format!("/drain?backend={address}&upstream=other"), 404),
        ("/drain".to_owned(), 422),
        ("/drain?backend=gpu-1".to_owned(), 422),
        (format!("/drain?backend={address}&weight=1"), 422),
        (format!("/weight?backend={address}"), 422),
        (format!("/weight?backend={address}&weight=0"), 422),
        (format!("/weight?backend={address}&weight=1001"), 422),
        (format!("/weight?backend={address}&weight=many"), 422),
    ] {
        let answer = post(&proxy, &path).await;
        assert_eq!(answer.status, status, "{path}: {}", answer.text());
        assert!(answer.text().len() > 5);
    }
    assert_eq!(proxy.ask(&chat()).await.status, 200);
}

#[tokio::test]
async fn no_web_page_can_ask_or_tell() {
    let engine = Engine::good();
    let proxy = before(std::slice::from_ref(&engine), "").await;
    let own = proxy.admin_address().to_string();
    let drain = Request::post(&format!("/drain?backend={}", engine.address()), "");
    for (host, origin) in [
        (own.as_str(), Some("http://evil.example")),
        (own.as_str(), Some("null")),
        ("evil.example:9090", Some("http://evil.example:9090")),
        ("evil.example:9090", None),
    ] {
        for request in [drain.clone(), Request::get("/status"), Request::get("/requests")] {
            let request = request.with("host", host);
            let request = match origin {
                Some(origin) => request.with("origin", origin),
                None => request,
            };
            let answer = proxy.admin(&request).await;
            assert_eq!(answer.status, 403, "{host} {origin:?}: {}", answer.text());
        }
        assert_eq!(proxy.admin(&Request::get("/livez").with("host", host)).await.status, 200);
    }
    assert_eq!(proxy.ask(&chat()).await.status, 200, "nothing was drained");
    let own_page = drain.with("host", &own).with("origin", &format!("http://{own}"));
    assert_eq!(proxy.admin(&own_page).await.status, 200);
}

#[tokio::test]
async fn the_commands_drain_wait_undrain_and_weigh() {
    let gate = Gate::new();
    let scripted = gate.clone();
    let engine = Engine::start(move |_| Answer::json(200, "{}").held_at(&scripted));
    let proxy = before(std::slice::from_ref(&engine), "").await;
    let address = engine.address();
    let command = |words: &[&str]| {
        let mut command = Command::new(binary());
        command.args(words).arg("--config").arg(proxy.file()).arg(&address);
        command
    };
    let run = async |mut command: Command| {
        let output = tokio::task::spawn_blocking(move || command.output()).await;
        let output = output.expect("no panic").expect("the binary starts");
        (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let mut client = sent(&proxy, Line::Http1).await;
    gate.reached(1).await;
    let mut waiting = Box::pin(run(command(&["drain", "--wait"])));
    tokio::select! {
        (_, said) = &mut waiting => panic!("a request is in flight, and yet: {said}"),
        () = wait_until("the drain", async || {
            told(&proxy, "/status").await["upstreams"]["llm"]["backends"][0]["draining"] == true
        }) => {}
    }
    gate.open();
    assert_eq!(reply(&mut client).await.status, 200);
    assert_eq!(waiting.await, (Some(0), format!("{address} has no request in flight\n")));
    let (code, said) = run(command(&["undrain", "--upstream", "llm"])).await;
    assert_eq!((code, said), (Some(0), format!("{address} gets requests again in llm\n")));
    let mut weigh = command(&["weight"]);
    weigh.arg("7");
    assert_eq!(run(weigh).await.0, Some(0));
    let (code, said) = run(command(&["drain", "--upstream", "none"])).await;
    assert_eq!((code, said.as_str()), (Some(1), "error: there is no upstream `none`\n"));
}

#[tokio::test]
async fn the_level_of_the_log_changes_under_way_and_credentials_stay_out_of_it() {
    let engine = Engine::good();
    let proxy = before(std::slice::from_ref(&engine), "").await;
    let set = async |level: &str| {
        let answer = Client::connect(proxy.admin_address(), Line::Http1).await;
        put(answer, &proxy, &format!("/log?level={level}")).await
    };
    assert_eq!(told(&proxy, "/log").await["level"], "info,plimsoll=debug");
    assert_eq!(set("trace").await, 200);
    assert_eq!(told(&proxy, "/log").await["level"], "trace");
    let request = chat().with("authorization", "Bearer canary-4711").with("x-request-id", "while-loud");
    assert_eq!(proxy.ask(&request).await.status, 200);
    wait_until("the access line", async || proxy.log().contains("while-loud")).await;
    assert!(!proxy.log().contains("canary-4711"), "{}", proxy.log());
    assert_eq!(set("off").await, 200);
    assert_eq!(proxy.ask(&chat().with("x-request-id", "while-quiet")).await.status, 200);
    proxy.assert_at_rest().await;
    assert_eq!(set("info").await, 200);
    assert_eq!(proxy.ask(&chat().with("x-request-id", "again-heard")).await.status, 200);
    wait_until("the access line", async || proxy.log().contains("again-heard")).await;
    assert!(!proxy.log().contains("while-quiet"), "{}", proxy.log());
    for flawed in ["loud", "", "info,x=loud"] {
        assert_eq!(set(flawed).await, 422, "{flawed}");
    }
    assert_eq!(told(&proxy, "/log").await["level"], "info");
}

/// The status of a PUT.
async fn put(mut client: Client, proxy: &Proxy, path: &str) -> u16 {
    let request = Request::put(path).with("host", &proxy.admin_address().to_string());
    client.ask(&request).await.status
}

#[tokio::test]
async fn the_configuration_is_shown_as_it_runs_without_a_secret_and_can_be_used_again() {
    let (engine, folder) = (Engine::good(), folder());
    let secrets = ["canary-admin-1", "canary-engine-2", "canary-client-3"];
    for (name, secret) in ["admin", "engine", "client"].iter().zip(secrets) {
        write_secret(&folder.join(name), secret);
    }
    let at = |name: &str| format!("{{ file: {} }}", folder.join(name).display());
    let rest = format!(
        "keys: {{ team: {} }}\n{}",
        at("client"),
        one_upstream(&[engine.address()], &format!("api_key: {}, max_fails: 9", at("engine")))
    );
    let admin = format!("token: {}", at("admin"));
    let proxy = Proxy::start_keyed(Keys { admin: &admin, ..Keys::default() }, &rest).await;
    let show = async || {
        let request = Request::get("/config").with("authorization", &format!("Bearer {}", secrets[0]));
        proxy.admin(&request).await.text()
    };
    let shown = show().await;
    for secret in secrets {
        assert!(!shown.contains(secret), "{shown}");
    }
    assert!(!shown.contains("sha256: ") || shown.contains("sha256: redacted"), "{shown}");
    assert!(shown.contains("max_fails: 9") && shown.contains("stall_timeout: 60s"), "{shown}");
    let check = |text: &str| {
        let file = folder.join("shown.yaml");
        std::fs::write(&file, text).expect("a folder");
        let output = Command::new(binary()).arg("check").arg(&file).output().expect("the binary starts");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = check(&shown);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("redacted") || said.contains("sha256"), "only that is wrong: {said}");
    assert_eq!(check(&shown.replace("redacted", &"a".repeat(64))), (Some(0), String::new()));
    let request = Request::post("/reload", "").with("authorization", &format!("Bearer {}", secrets[0]));
    proxy.rewrite(&rest.replace("max_fails: 9", "max_fails: 4"));
    assert_eq!(proxy.admin(&request).await.status, 200);
    assert!(show().await.contains("max_fails: 4"));
}
