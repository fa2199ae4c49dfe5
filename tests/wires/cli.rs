//! The command line as an operator and systemd use it.

use crate::support::client::{Line, Request};
use crate::support::engine::{Answer, Engine, Gate, delta};
use crate::support::proxy::{Proxy, binary, folder};
use crate::support::{one_upstream, wait_until, within};
use std::path::PathBuf;
use std::process::{Command, Output};
use tokio::net::{TcpStream, UnixDatagram};

fn plimsoll(arguments: &[&str]) -> Output {
    Command::new(binary()).args(arguments).output().expect("the binary starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn file(content: &str) -> PathBuf {
    let file = folder().join("plimsoll.yaml");
    std::fs::write(&file, content).expect("a writable folder");
    file
}

const GOOD: &str =
    "listeners: [{ address: 127.0.0.1:8080 }]\nupstreams: { llm: { backends: [127.0.0.1:8000] } }\n";
const BAD: &str =
    "listeners: [{ adress: 127.0.0.1:8080 }]\nupstreams: { llm: { backends: [127.0.0.1:8000] } }\n";

#[test]
fn help_names_every_command_and_succeeds() {
    let output = plimsoll(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    let help = text(&output.stdout);
    for command in ["run", "check", "reload", "status", "top", "key", "demo", "engine", "simulate"] {
        assert!(
            help.lines().any(|line| line.trim_start().starts_with(command)),
            "{command} is not in\n{help}"
        );
    }
}

#[test]
fn an_unknown_command_fails_with_a_hint() {
    let output = plimsoll(&["chekc"]);
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("check"), "{}", text(&output.stderr));
}

#[test]
fn check_says_that_a_good_file_is_ok() {
    let file = file(GOOD);
    let output = plimsoll(&["check", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with(&format!("{}: ok", file.display())), "{}", text(&output.stdout));
}

#[test]
fn check_of_a_bad_or_missing_file_exits_with_78_and_says_where() {
    let file = file(BAD);
    let output = plimsoll(&["check", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(78));
    let said = text(&output.stderr);
    assert!(
        said.contains("plimsoll.yaml:1:") && said.contains("adress") && said.contains("address"),
        "{said}"
    );
    let output = plimsoll(&["check", "/nowhere/at-all.yaml"]);
    assert_eq!(output.status.code(), Some(78));
    assert!(text(&output.stderr).contains("/nowhere/at-all.yaml"), "{}", text(&output.stderr));
}

#[tokio::test]
async fn run_with_a_bad_file_exits_with_78_and_starts_nothing() {
    let mut proxy = Proxy::spawn("upstreams: { llm: { backends: [127.0.0.1:8000], max_fail: 3 } }\n", &[]);
    assert_eq!(proxy.exit().await.code(), Some(78), "{}", proxy.log());
    assert!(proxy.log().contains("max_fails"), "{}", proxy.log());
    assert!(TcpStream::connect(proxy.address(Line::Http1)).await.is_err());
}

/// A proxy that has told systemd that it is ready, and what it told.
async fn ready(rest: &str) -> (Proxy, String) {
    let socket = folder().join("notify");
    let systemd = UnixDatagram::bind(&socket).expect("a datagram socket");
    let proxy = Proxy::spawn(rest, &[("NOTIFY_SOCKET", socket.to_str().unwrap())]);
    let told = async {
        let mut told = String::new();
        let mut message = [0; 4096];
        while !told.lines().any(|line| line == "READY=1") {
            let size = systemd.recv(&mut message).await.expect("a datagram");
            told += &format!("{}\n", text(&message[..size]));
        }
        told
    };
    let told = within("READY=1", told).await;
    (proxy, told)
}

#[tokio::test]
async fn readiness_is_told_to_systemd_once_the_listeners_are_open() {
    let engine = Engine::good();
    let (proxy, told) = ready(&one_upstream(&[engine.address()], "")).await;
    for line in [Line::Http1, Line::Http1Tls, Line::Http2, Line::Http2Tls] {
        let reply = proxy.client(line).await.ask(&Request::chat("m", "hello")).await;
        assert_eq!(reply.status, 200, "{line:?} after {told}");
    }
}

#[tokio::test]
async fn an_idle_process_ends_soon_after_sigterm() {
    let engine = Engine::good();
    let (mut proxy, _) = ready(&one_upstream(&[engine.address()], "")).await;
    // One idle keep-alive connection must not hold it up.
    let mut client = proxy.client(Line::Http1).await;
    assert_eq!(client.ask(&Request::chat("m", "hello")).await.status, 200);
    proxy.signal("TERM");
    assert_eq!(proxy.exit().await.code(), Some(0), "{}", proxy.log());
}

#[tokio::test]
async fn a_stream_under_way_outlives_sigterm_and_the_process_ends_with_it() {
    let gate = Gate::new();
    let scripted = gate.clone();
    let engine = Engine::start(move |_| {
        Answer::stream().event(&delta("a")).wait(&scripted).event(&delta("b")).event("[DONE]").end()
    });
    let (mut proxy, _) = ready(&one_upstream(&[engine.address()], "")).await;
    let mut client = proxy.client(Line::Http1).await;
    client.send(&Request::streamed("m", "hello")).await;
    assert_eq!(client.head().await.status, 200);
    gate.reached(1).await;
    proxy.signal("TERM");
    wait_until("the listener to be closed", async || {
        TcpStream::connect(proxy.address(Line::Http1)).await.is_err()
    })
    .await;
    gate.open();
    let (body, complete) = client.rest().await;
    assert!(complete && body.ends_with(b"data: [DONE]\n\n"), "{}", text(&body));
    assert_eq!(proxy.exit().await.code(), Some(0), "{}", proxy.log());
}

#[tokio::test]
async fn the_admin_listener_tells_life_readiness_status_and_metrics() {
    let engine = Engine::good();
    let proxy = Proxy::start(&one_upstream(&[engine.address()], "")).await;
    for path in ["/livez", "/readyz", "/status", "/metrics"] {
        assert_eq!(proxy.admin(&Request::get(path)).await.status, 200, "{path}");
    }
    let metrics = proxy.admin(&Request::get("/metrics")).await;
    assert!(metrics.header("content-type").is_some_and(|kind| kind.starts_with("text/plain")));
    assert_eq!(proxy.admin(&Request::get("/nothing")).await.status, 404);
    assert!(proxy.admin(&Request::get("/status")).await.text().contains(&engine.address()));
}
