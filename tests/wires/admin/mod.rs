//! The admin listener where others can reach it: with a token, or on a Unix socket.

mod explain;
mod operate;
mod schema;
mod seen;

use crate::support::client::Request;
use crate::support::engine::Engine;
use crate::support::proxy::{Keys, Proxy, binary, folder};
use crate::support::tls::write_secret;
use crate::support::{one_upstream, wait_until, within};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const TOKEN: &str = "canary-7f3a";

#[tokio::test]
async fn with_a_token_only_liveness_and_readiness_are_for_everybody() {
    let (engine, folder) = (Engine::good(), folder());
    write_secret(&folder.join("token"), TOKEN);
    let admin = format!("token: {{ file: {} }}", folder.join("token").display());
    let keys = Keys { admin: &admin, ..Keys::default() };
    let proxy = Proxy::start_keyed(keys, &one_upstream(&[engine.address()], "")).await;
    let ask = async |path: &str, authorization: Option<String>| {
        let request = Request::get(path);
        let request = match authorization {
            Some(value) => request.with("authorization", &value),
            None => request,
        };
        proxy.admin(&request).await
    };
    let shorter = &TOKEN[..TOKEN.len() - 1];
    for wrong in [
        None,
        Some(String::new()),
        Some("Bearer".to_owned()),
        Some("Bearer ".to_owned()),
        Some(TOKEN.to_owned()),
        Some(format!("Basic {TOKEN}")),
        Some(format!("Bearer {shorter}")),
        Some(format!("Bearer {TOKEN}{TOKEN}")),
        Some(format!("Bearer {}", TOKEN.to_uppercase())),
    ] {
        for path in ["/metrics", "/status", "/choices", "/nothing", "/livez/", "/metrics?/livez"] {
            let answer = ask(path, wrong.clone()).await;
            assert_eq!(answer.status, 401, "{path} with {wrong:?}: {}", answer.text());
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
            assert!(
                !answer.text().contains(TOKEN) && !answer.text().contains("plimsoll_"),
                "{}",
                answer.text()
            );
        }
        for path in ["/livez", "/readyz"] {
            assert_eq!(ask(path, wrong.clone()).await.status, 200, "{path} with {wrong:?}");
        }
    }
    for right in [format!("Bearer {TOKEN}"), format!("bearer  {TOKEN}")] {
        for (path, status) in [("/metrics", 200), ("/status", 200), ("/livez", 200), ("/nothing", 404)] {
            assert_eq!(ask(path, Some(right.clone())).await.status, status, "{path}");
        }
    }
    assert!(!proxy.log().contains(TOKEN), "{}", proxy.log());
}

#[tokio::test]
async fn readiness_names_no_upstream_to_whoever_has_no_token() {
    let (engine, folder) = (Engine::good(), folder());
    write_secret(&folder.join("token"), TOKEN);
    let admin = format!("token: {{ file: {} }}", folder.join("token").display());
    let probe = "probe: { path: /none, interval: 10ms, timeout: 1s, down_after: 1 }";
    let upstreams = one_upstream(&[engine.address()], probe).replace("llm:", "inhouse:");
    let mut proxy = Proxy::spawn_keyed(Keys { admin: &admin, ..Keys::default() }, &upstreams, &[]);
    drop(engine);
    proxy.listens().await;
    let readiness = Request::get("/readyz");
    wait_until("nothing to be ready", async || proxy.admin(&readiness).await.status == 503).await;
    assert_eq!(proxy.admin(&readiness).await.text(), "no backend is up\n");
    let answer = proxy.admin(&readiness.with("authorization", &format!("Bearer {TOKEN}"))).await;
    assert_eq!(answer.text(), "no backend is up in: inhouse\n");
}

/// The answer on a Unix socket, if somebody listens there.
async fn ask(socket: &Path, path: &str) -> Option<String> {
    let mut stream = UnixStream::connect(socket).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("a listener that reads");
    let mut answer = String::new();
    within("an answer", stream.read_to_string(&mut answer)).await.expect("an orderly end");
    Some(answer)
}

#[tokio::test]
async fn a_unix_socket_is_ours_alone_and_one_that_a_dead_process_left_is_replaced() {
    let (engine, folder) = (Engine::good(), folder());
    let socket = folder.join("admin.sock");
    let admin = format!("address: 'unix:{}'", socket.display());
    let keys = Keys { admin: &admin, ..Keys::default() };
    let upstreams = one_upstream(&[engine.address()], "");
    let answers = async |path: &str| {
        wait_until("the socket to answer", async || {
            ask(&socket, path).await.is_some_and(|answer| answer.starts_with("HTTP/1.1 200 "))
        })
        .await;
    };
    let first = Proxy::spawn_keyed(keys, &upstreams, &[]);
    answers("/readyz").await;
    assert!(ask(&socket, "/metrics").await.expect("a listener").contains("plimsoll_"));
    assert_eq!(socket.metadata().expect("a socket").permissions().mode() & 0o777, 0o600);

    let mut second = Proxy::spawn_keyed(keys, &upstreams, &[]);
    assert_eq!(second.exit().await.code(), Some(1), "{}", second.log());
    assert!(
        second.log().contains("cannot listen on unix:") && second.log().contains("in use"),
        "{}",
        second.log()
    );
    answers("/livez").await;

    // Killed, so the socket stays.
    drop(first);
    assert!(socket.exists() && ask(&socket, "/livez").await.is_none());
    let _third = Proxy::spawn_keyed(keys, &upstreams, &[]);
    answers("/status").await;
}

#[test]
fn an_address_that_others_can_reach_needs_a_token() {
    let folder = folder();
    write_secret(&folder.join("token"), TOKEN);
    let check = |admin: &str| {
        let file = folder.join("plimsoll.yaml");
        let listeners = "listeners: [{ address: 127.0.0.1:8080 }]";
        let upstreams = "upstreams: { llm: { backends: [127.0.0.1:8000] } }";
        std::fs::write(&file, format!("{listeners}\nadmin: {{ {admin} }}\n{upstreams}\n")).expect("a folder");
        let output = Command::new(binary()).arg("check").arg(&file).output().expect("the binary starts");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for local in
        ["127.0.0.1:9", "127.9.9.9:9", "localhost:9", "'[::1]:9'", "'[::ffff:127.0.0.1]:9'", "'unix:a.sock'"]
    {
        assert_eq!(check(&format!("address: {local}")), (Some(0), String::new()), "{local}");
    }
    for others in ["0.0.0.0:9", "'[::]:9'", "10.0.0.1:9", "gpu-1:9", "localhost.example.com:9"] {
        let (code, said) = check(&format!("address: {others}"));
        assert_eq!(code, Some(78), "{others}: {said}");
        assert!(said.contains("no `token` is asked for") && said.contains("(admin.address)"), "{said}");
        assert_eq!(check(&format!("address: {others}, token: {{ file: token }}")), (Some(0), String::new()));
    }
}
