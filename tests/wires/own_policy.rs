//! `examples/two_lanes.rs`, a binary of somebody else's on our library: its policy decides, and only it knows it.

use crate::support::client::{Answer as Reply, Line, Request};
use crate::support::engine::{Answer, Engine, Gate};
use crate::support::one_upstream;
use crate::support::proxy::{Proxy, binary, example, folder};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Two backends, of which the second is heavy.
fn file(light: &str, heavy: &str, policy: &str) -> String {
    let heavy = format!("{{ address: {heavy}, weight: 2 }}");
    one_upstream(&[light.to_owned(), heavy], &format!("policy: {policy}"))
}

/// A chat of about that many tokens; no two of them begin alike.
fn chat(name: &str, tokens: usize) -> Request {
    Request::chat("tiny", &format!("{name} {}", "four".repeat(tokens)))
}

fn backend(reply: &Reply) -> String {
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.header("x-plimsoll-backend").expect("the answer names its backend").to_owned()
}

#[tokio::test]
async fn it_decides_where_each_request_goes() {
    let [light, heavy] = [(); 2].map(|()| Engine::good());
    let rest = file(&light.address(), &heavy.address(), "two_lanes");
    let own = Proxy::start_binary(&example("two_lanes"), &rest).await;
    for n in 0..8 {
        for line in [Line::Http1, Line::Http2] {
            let short = own.client(line).await.ask(&chat(&format!("{n}"), 100)).await;
            assert_eq!(backend(&short), light.address());
            let long = own.client(line).await.ask(&chat(&format!("{n}"), 6_000)).await;
            assert_eq!(backend(&long), heavy.address());
        }
    }
    assert_eq!([light.count(), heavy.count()], [16, 16]);
    let status = own.admin(&Request::get("/status")).await;
    assert!(status.text().contains("two_lanes"), "{}", status.text());
    own.assert_at_rest().await;
}

/// What it would be without the policy: the built-in ones serve its binary as they serve ours.
#[tokio::test]
async fn its_binary_knows_the_built_in_policies_too_and_they_decide_otherwise() {
    let [light, heavy] = [(); 2].map(|()| Engine::good());
    let rest = file(&light.address(), &heavy.address(), "least_pending_tokens");
    let own = Proxy::start_binary(&example("two_lanes"), &rest).await;
    for n in 0..4 {
        assert_eq!(backend(&own.ask(&chat(&format!("{n}"), 100)).await), heavy.address());
    }
    assert_eq!([light.count(), heavy.count()], [0, 4]);
}

#[tokio::test]
async fn it_sees_what_a_backend_owes() {
    let gate = Gate::new();
    let scripted = gate.clone();
    let light = Engine::good();
    let heavy = Engine::start(move |_| Answer::json(200, "{}").held_at(&scripted));
    let rest = file(&light.address(), &heavy.address(), "two_lanes");
    let own = Proxy::start_binary(&example("two_lanes"), &rest).await;
    let mut waiting = own.client(Line::Http1).await;
    waiting.send(&chat("first", 100_000)).await;
    gate.reached(1).await;
    // 100,000 tokens at weight 2 are more than the detour of 16,384.
    assert_eq!(backend(&own.ask(&chat("second", 6_000)).await), light.address());
    gate.open();
    assert_eq!(waiting.head().await.status, 200);
    let (_, complete) = waiting.rest().await;
    assert!(complete);
    own.assert_at_rest().await;
    let mut last = own.client(Line::Http1).await;
    last.send(&chat("third", 6_000)).await;
    gate.reached(2).await;
}

fn run(binary: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } =
        Command::new(binary).args(arguments).output().expect("the binary starts");
    (status.code(), String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned())
}

fn written(name: &str, text: &str) -> PathBuf {
    let path = folder().join(name);
    std::fs::write(&path, text).expect("a writable folder");
    path
}

fn check(binary: &Path, policy: &str) -> (Option<i32>, String) {
    let upstreams = file("127.0.0.1:8000", "127.0.0.1:8001", policy);
    let path = written("plimsoll.yaml", &format!("listeners: [{{ address: 127.0.0.1:8080 }}]\n{upstreams}"));
    run(binary, &["check", path.to_str().expect("UTF-8")])
}

#[test]
fn check_knows_it_in_its_own_binary_and_refuses_it_in_ours_with_every_name_it_knows() {
    let (code, said) = check(&example("two_lanes"), "two_lanes");
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = check(&binary(), "two_lanes");
    assert_eq!(code, Some(78), "{said}");
    assert!(
        said.contains("unknown policy `two_lanes`") && said.contains("`random_two`, `lmetric`"),
        "{said}"
    );
    assert!(said.contains("one of your own is known to the binary that it was built into"), "{said}");
    let (code, said) = check(&example("two_lanes"), "two_lane");
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("did you mean `two_lanes`?"), "{said}");
}

#[test]
fn simulate_compares_it_with_the_others_by_its_name() {
    let trace = "{\"trace\":\"tiny\",\"block_tokens\":512}\n{\"t\":0,\"in\":1100,\"out\":3,\"h\":[1,2]}\n";
    let path = written("tiny.jsonl", trace);
    let of = |binary: &Path, policies: &str| {
        run(binary, &["simulate", "--trace", path.to_str().expect("UTF-8"), "--policy", policies])
    };
    let (code, said) = of(&example("two_lanes"), "two_lanes,round_robin");
    assert_eq!(code, Some(0), "{said}");
    for policy in ["two_lanes", "round_robin"] {
        assert!(said.lines().any(|line| line.starts_with(&format!("{policy} "))), "{said}");
    }
    let (code, said) = of(&binary(), "two_lanes");
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("no such policy, known are least_pending_tokens, "), "{said}");
    let (code, said) = of(&example("two_lanes"), "two_lane");
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("did you mean two_lanes?"), "{said}");
}

#[test]
fn it_fits_on_a_screen() {
    let lines = include_str!("../../examples/two_lanes.rs").lines().count();
    assert!(lines <= 60, "{lines} lines");
}
