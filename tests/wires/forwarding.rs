//! What the engine is told of the client, by whom, and what ends at each hop.

use crate::support::client::{Line, Request};
use crate::support::engine::{Answer, Engine, Seen};
use crate::support::proxy::Proxy;
use crate::support::raw::Raw;
use crate::support::stage::{assert_error, before, chat};
use crate::support::{one_upstream, wait_until};

/// A chat that claims to come from somewhere else.
fn spoofed() -> Request {
    chat()
        .with("x-forwarded-for", "6.6.6.6, 1.2.3.4")
        .with("x-forwarded-proto", "gopher")
        .with("x-forwarded-host", "spoofed.example")
        .with("x-forwarded-port", "1")
        .with("x_forwarded_for", "6.6.6.6")
        .with("forwarded", "for=1.2.3.4")
        .with("x-real-ip", "1.2.3.4")
}

/// The values of these headers in what the engine saw last.
fn seen<const N: usize>(engine: &Engine, names: [&str; N]) -> [String; N] {
    let all: Vec<Seen> = engine.seen();
    let head = &all.last().expect("a request").head;
    names.map(|name| head.header(name).unwrap_or("-").to_owned())
}

const NAMES: [&str; 8] = [
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-host",
    "x-forwarded-port",
    "x_forwarded_for",
    "forwarded",
    "x-real-ip",
    "via",
];

#[tokio::test]
async fn a_stranger_cannot_say_that_it_is_somebody_else() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    for (line, scheme, version) in [
        (Line::Http1, "http", "1.1"),
        (Line::Http2, "http", "2"),
        (Line::Http1Tls, "https", "1.1"),
        (Line::Http2Tls, "https", "2"),
    ] {
        assert_eq!(proxy.client(line).await.ask(&spoofed()).await.status, 200);
        let [client, proto, host, port, odd, forwarded, real, via] = seen(&engine[0], NAMES);
        assert_eq!(
            [client.as_str(), &proto, &port, &odd, &real],
            ["127.0.0.1", scheme, "-", "-", "-"],
            "{line:?}"
        );
        let [engine_host] = seen(&engine[0], ["host"]);
        assert_eq!(host, engine_host, "{line:?}");
        assert_eq!(forwarded, format!("for=127.0.0.1;proto={scheme};host=\"{host}\""), "{line:?}");
        assert_eq!(via, format!("{version} plimsoll"));
    }
    let is_ours = |line: &&str| line.contains("] request ") && line.contains("client=127.0.0.1");
    wait_until("four lines in the log", async || proxy.log().lines().filter(is_ours).count() == 4).await;
    assert!(!proxy.log().contains("1.2.3.4"));
}

#[tokio::test]
async fn a_trusted_proxy_says_who_the_client_is() {
    let engine = [Engine::good()];
    let trusted = "trusted_proxies: [10.0.0.0/8, 127.0.0.0/8]\n";
    let proxy = Proxy::start(&format!("{trusted}{}", one_upstream(&[engine[0].address()], ""))).await;
    assert_eq!(proxy.ask(&spoofed()).await.status, 200);
    let [client, proto, host, port, odd, forwarded, real, via] = seen(&engine[0], NAMES);
    assert_eq!(client, "6.6.6.6, 1.2.3.4, 127.0.0.1");
    assert_eq!([proto.as_str(), &host, &port, &odd], ["gopher", "spoofed.example", "1", "-"]);
    assert!(forwarded.starts_with("for=1.2.3.4, for=127.0.0.1;"), "{forwarded}");
    assert_eq!([real.as_str(), &via], ["1.2.3.4", "1.1 plimsoll"]);
    wait_until("a line in the log", async || proxy.log().contains("client=1.2.3.4")).await;
}

#[tokio::test]
async fn headers_of_one_hop_go_no_further_either_way() {
    let engine = [Engine::start(|_| {
        let headers = "connection: keep-alive, x-engine-hop\r\nx-engine-hop: 1\r\nkeep-alive: timeout=5\r\n\
                       proxy-connection: keep-alive\r\nupgrade: h2c\r\nx-kept: 1\r\n";
        Answer::json_with(200, headers, "{}")
    })];
    let proxy = before(&engine, "").await;
    let mut client = Raw::connect(proxy.address(Line::Http1)).await;
    let hops = "connection: keep-alive, X-Client-Hop\r\nx-client-hop: 1\r\nkeep-alive: timeout=5\r\nte: trailers\r\n\
                proxy-connection: keep-alive\r\nproxy-authorization: Basic eA==\r\nx-kept: 1\r\n";
    client.send(format!("GET /v1/x HTTP/1.1\r\nhost: x\r\n{hops}\r\n")).await.unwrap();
    let answer = client.answer().await;
    for name in ["x-engine-hop", "keep-alive", "proxy-connection", "upgrade"] {
        assert_eq!(answer.header(name), None, "{name}");
    }
    assert_eq!((answer.status, answer.header("x-kept")), (200, Some("1")));
    let gone = ["x-client-hop", "keep-alive", "te", "proxy-connection", "proxy-authorization", "x-kept"];
    assert_eq!(seen(&engine[0], gone), ["-", "-", "-", "-", "-", "1"]);
}

#[tokio::test]
async fn connection_cannot_take_away_what_others_rely_on() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    for named in ["host", "close, content-length", "x-forwarded-for", "\"host\""] {
        let mut client = Raw::connect(proxy.address(Line::Http1)).await;
        let head = format!("GET /v1/x HTTP/1.1\r\nhost: x\r\nconnection: {named}\r\n\r\n");
        client.send(head).await.unwrap();
        assert_error(&client.answer().await, 400, "bad_request");
    }
    assert_eq!(engine[0].count(), 0);
}

/// A PROXY header of version 2 for a client at 192.0.2.1, port 4000.
fn version_2() -> Vec<u8> {
    let addresses = [192, 0, 2, 1, 10, 0, 0, 1, 0x0f, 0xa0, 0, 80];
    [&b"\r\n\r\n\0\r\nQUIT\n"[..], &[0x21, 0x11, 0, 12], &addresses].concat()
}

#[tokio::test]
async fn the_proxy_protocol_names_the_client_of_a_connection() {
    let engine = [Engine::good()];
    let rest = format!("trusted_proxies: [127.0.0.1]\n{}", one_upstream(&[engine[0].address()], ""));
    let proxy = Proxy::start_with("proxy_protocol: true", &rest).await;
    let request = "GET /v1/x HTTP/1.1\r\nhost: x\r\nx-forwarded-for: 6.6.6.6\r\n\r\n";
    for header in [b"PROXY TCP4 192.0.2.1 10.0.0.1 4000 80\r\n".to_vec(), version_2()] {
        let mut client = Raw::connect(proxy.address(Line::Http1)).await;
        // It comes once for the connection, not for each request.
        for header in [&header[..], b""] {
            client.send([header, request.as_bytes()].concat()).await.unwrap();
            assert_eq!(client.answer().await.status, 200);
            assert_eq!(seen(&engine[0], ["x-forwarded-for"]), ["192.0.2.1"]);
        }
    }
    let mut local = Raw::connect(proxy.address(Line::Http1)).await;
    local.send(format!("PROXY UNKNOWN\r\n{request}")).await.unwrap();
    assert_eq!(local.answer().await.status, 200);
    assert_eq!(seen(&engine[0], ["x-forwarded-for"]), ["6.6.6.6, 127.0.0.1"]);
    let asked = engine[0].count();
    let mut without = Raw::connect(proxy.address(Line::Http1)).await;
    without.send(request).await.unwrap();
    assert!(without.until_closed().await.is_empty());
    assert_eq!(engine[0].count(), asked);
}

#[tokio::test]
async fn the_proxy_protocol_is_not_believed_of_strangers() {
    let engine = [Engine::good()];
    let rest = format!("trusted_proxies: [10.0.0.0/8]\n{}", one_upstream(&[engine[0].address()], ""));
    let proxy = Proxy::start_with("proxy_protocol: true", &rest).await;
    let mut client = Raw::connect(proxy.address(Line::Http1)).await;
    let request = "GET /v1/x HTTP/1.1\r\nhost: x\r\n\r\n";
    // The proxy may have closed before it is sent.
    let _sent = client.send([&version_2()[..], request.as_bytes()].concat()).await;
    let answered = tokio::time::timeout(crate::support::PATIENCE, client.readable()).await;
    assert!(answered.is_ok(), "the connection has to end");
    assert_eq!(engine[0].count(), 0);
    assert!(proxy.metrics().await.sum("plimsoll_refusals_total", &[("code", "proxy_header")]) >= 1.0);
}

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test]
async fn a_trace_goes_on_to_every_engine_that_is_tried_and_into_the_log() {
    let engines = [Engine::start(|_| Answer::json(503, "{}")), Engine::good()];
    let proxy = before(&engines, "policy: round_robin, max_fails: 0").await;
    let state = "vendor=t61rcWkgMzE,other@x=00f067aa0ba902b7";
    for line in [Line::Http1, Line::Http2] {
        // Two in turn, so that one of them is tried on both.
        for _ in 0..2 {
            let request = chat().with("traceparent", PARENT).with("tracestate", state);
            assert_eq!(proxy.client(line).await.ask(&request).await.status, 200, "{line:?}");
        }
        for engine in &engines {
            assert_eq!(seen(engine, ["traceparent", "tracestate"]), [PARENT, state], "{line:?}");
        }
    }
    wait_until("four access lines", async || proxy.log().matches("plimsoll::access").count() == 4).await;
    assert_eq!(proxy.log().matches(" trace=4bf92f3577b34da6a3ce929d0e0e4736 ").count(), 4, "{}", proxy.log());
}

#[tokio::test]
async fn a_malformed_trace_ends_here_and_none_is_made_up() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    let requests = [
        chat(),
        chat().with("tracestate", "a=1"),
        chat().with("traceparent", &PARENT[1..]).with("tracestate", "a=1"),
        chat().with("traceparent", PARENT).with("traceparent", PARENT).with("tracestate", "a=1"),
    ];
    for line in [Line::Http1, Line::Http2] {
        for request in &requests {
            assert_eq!(proxy.client(line).await.ask(request).await.status, 200, "{line:?}");
            assert_eq!(seen(&engine[0], ["traceparent", "tracestate"]), ["-", "-"], "{line:?} {request:?}");
        }
    }
    wait_until("eight access lines", async || proxy.log().matches("plimsoll::access").count() == 8).await;
    assert!(!proxy.log().contains(" trace="), "{}", proxy.log());
}
