//! Requests of which it is not certain where they end or for whom they are: refused, and no byte of them
//! passed on.

use crate::support::client::{Line, Request};
use crate::support::engine::Engine;
use crate::support::one_upstream;
use crate::support::proxy::Proxy;
use crate::support::raw::Raw;
use crate::support::stage::{assert_error, before};

const BODY: &str = r#"{"model":"tiny"}"#;

/// What a smuggler hopes somebody takes for the next request.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n";

/// Sends `request` and, right behind it, another one; the answer, after which nothing may follow.
async fn refused(proxy: &Proxy, request: &[u8], status: u16, code: &str) {
    let mut client = Raw::connect(proxy.address(Line::Http1)).await;
    client.send([request, SMUGGLED.as_bytes()].concat()).await.unwrap();
    let answer = client.answer().await;
    let shown = String::from_utf8_lossy(request);
    assert_eq!(answer.status, status, "{shown:?}: {}", answer.text());
    assert_error(&answer, status, code);
    assert_eq!(answer.header("connection"), Some("close"), "{shown:?}");
    assert!(client.until_closed().await.is_empty(), "{shown:?}: something was served behind it");
}

/// A POST with these headers beside its host, and a body of sixteen bytes.
fn post(headers: &str) -> String {
    format!("POST /v1/x HTTP/1.1\r\nhost: x\r\n{headers}\r\n\r\n{BODY}")
}

#[tokio::test]
async fn an_ambiguous_framing_is_refused_and_nothing_behind_it_is_served() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    let ambiguous = [
        "content-length: 16\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked\r\ncontent-length: 16",
        "content-length: 16\r\ncontent-length: 16",
        "content-length: 16\r\ncontent-length: 17",
        "content-length: 16, 16",
        "content-length: +16",
        "content-length: 0x10",
        "content-length: 16;",
        "content-length:",
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked, identity",
        "transfer-encoding: identity, chunked",
        "transfer-encoding: xchunked",
        "transfer-encoding:",
    ];
    for headers in ambiguous {
        refused(&proxy, post(headers).as_bytes(), 400, "ambiguous_framing").await;
    }
    let old = "POST /v1/x HTTP/1.0\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
    refused(&proxy, old.as_bytes(), 400, "ambiguous_framing").await;
    assert_eq!(engine[0].count(), 0);
    let count = ambiguous.len() as f64 + 1.0;
    proxy.counts("plimsoll_refusals_total", &[("code", "ambiguous_framing")], count).await;
}

#[tokio::test]
async fn a_head_that_is_not_well_formed_is_refused() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    for headers in [
        "content-length : 16",
        "transfer-encoding\t: chunked",
        "a: b\r\n content-length: 16",
        "content-length: 16\na: b",
        "a: b\rcontent-length: 16",
        "a: b\0",
        "no colon",
        ": no name",
    ] {
        refused(&proxy, post(headers).as_bytes(), 400, "bad_request").await;
    }
    for head in [
        "GET /v1/x HTTP/1.1\nhost: x\n\n",
        "GET /v1/x HTTP/1.2\r\nhost: x\r\n\r\n",
        "GET /v1/x\r\n\r\n",
        "GET  /v1/x HTTP/1.1\r\nhost: x\r\n\r\n",
        "GET v1/x HTTP/1.1\r\nhost: x\r\n\r\n",
        "GET /v1/\u{fc} HTTP/1.1\r\nhost: x\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        refused(&proxy, head.as_bytes(), 400, "bad_request").await;
    }
    for method in ["CONNECT x:443", "TRACE /"] {
        let head = format!("{method} HTTP/1.1\r\nhost: x:443\r\n\r\n");
        refused(&proxy, head.as_bytes(), 405, "method_not_allowed").await;
    }
    assert_eq!(engine[0].count(), 0);
}

#[tokio::test]
async fn a_request_without_one_well_formed_host_is_refused() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    for hosts in [
        "",
        "host:\r\n",
        "host: a b\r\n",
        "host: a, b\r\n",
        "host: a/b\r\n",
        "host: a@b\r\n",
        "host: a\r\nhost: a\r\n",
    ] {
        let head = format!("GET /v1/x HTTP/1.1\r\n{hosts}\r\n");
        refused(&proxy, head.as_bytes(), 400, "bad_host").await;
    }
    refused(&proxy, b"GET http://a/v1/x HTTP/1.1\r\nhost: b\r\n\r\n", 400, "bad_host").await;
    assert_eq!(engine[0].count(), 0);
}

#[tokio::test]
async fn chunks_that_could_be_cut_differently_are_refused() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    for body in [
        "\r\n0\r\n\r\n",
        "10 \r\n",
        "0x10\r\n",
        "10;a\nb\r\n",
        "10\n",
        "10\r\n0123456789abcdef0\r\n\r\n",
        "0\r\n a\r\n\r\n",
    ] {
        let head = "POST /v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
        let mut client = Raw::connect(proxy.address(Line::Http1)).await;
        client.send(format!("{head}{body}")).await.unwrap();
        assert_error(&client.answer().await, 400, "bad_request");
    }
    assert_eq!(engine[0].count(), 0);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_chunked_body_with_extensions_and_trailers_is_whole() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    let mut client = Raw::connect(proxy.address(Line::Http1)).await;
    let head = "POST /v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
    for nth in 1..=2 {
        // Byte by byte, so that every state is met at the end of a read.
        for byte in format!("{head}5;a=\"b\"\r\n{{\"a\":\r\n2\r\n1}}\r\n0\r\nx-sum: 1\r\n\r\n").bytes() {
            client.send([byte]).await.unwrap();
        }
        assert_eq!(client.answer().await.status, 200);
        assert_eq!(engine[0].count(), nth, "on one connection");
    }
    assert!(engine[0].seen().iter().all(|seen| seen.body == r#"{"a":1}"#));
}

#[tokio::test]
async fn requests_sent_ahead_are_answered_in_their_order() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    let mut client = Raw::connect(proxy.address(Line::Http1)).await;
    let large = "x".repeat(100_000);
    let chunked = "POST /chunked HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
    let all = format!(
        "POST /first HTTP/1.1\r\nhost: x\r\ncontent-length: 16\r\n\r\n{BODY}\
         {chunked}{:x}\r\n{large}\r\n0\r\n\r\n\r\n\
         GET http://x/absolute?a=b HTTP/1.1\r\nhost: x\r\n\r\n\
         GET /last HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n{SMUGGLED}",
        large.len()
    );
    client.send(all).await.unwrap();
    for _ in 0..4 {
        assert_eq!(client.answer().await.status, 200);
    }
    assert!(client.until_closed().await.is_empty());
    let seen = engine[0].seen();
    let paths: Vec<&str> = seen.iter().map(|seen| seen.head.path()).collect();
    assert_eq!(paths, ["/first", "/chunked", "/absolute?a=b", "/last"]);
    assert_eq!((seen[0].body.len(), seen[1].body.len()), (BODY.len(), large.len()));
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn an_empty_line_after_a_body_neither_ends_the_request_nor_the_connection() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    let mut client = Raw::connect(proxy.address(Line::Http1)).await;
    for nth in 1..=3 {
        client.send(format!("{}\r\n", post("content-length: 16"))).await.unwrap();
        assert_eq!(client.answer().await.status, 200);
        assert_eq!(engine[0].count(), nth);
    }
}

#[tokio::test]
async fn what_is_too_long_has_its_own_status() {
    let engine = [Engine::good()];
    let limits = "limits: { url: 1KiB, headers: 4KiB, header_count: 20 }";
    let proxy = Proxy::start(&format!("{limits}\n{}", one_upstream(&[engine[0].address()], ""))).await;
    let url = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(1024));
    refused(&proxy, url.as_bytes(), 414, "url_too_long").await;
    let mut endless = Raw::connect(proxy.address(Line::Http1)).await;
    endless.send(format!("GET /{}", "a".repeat(2000))).await.unwrap();
    assert_error(&endless.answer().await, 414, "url_too_long");
    let large = format!("a: {}", "b".repeat(4096));
    refused(&proxy, post(&large).as_bytes(), 431, "headers_too_large").await;
    let many = "a: b\r\n".repeat(19) + "a: b";
    refused(&proxy, post(&many).as_bytes(), 431, "headers_too_large").await;
    assert_eq!(engine[0].count(), 0);

    let mut client = proxy.client(Line::Http2).await;
    let long = Request::get(&format!("/{}", "a".repeat(1024)));
    assert_error(&client.ask(&long).await, 414, "url_too_long");
    let many = (0..21).fold(Request::get("/v1/x"), |request, n| request.with(&format!("x-{n}"), "1"));
    assert_error(&client.ask(&many).await, 431, "headers_too_large");
    // What does not even fit HTTP/2's own limit is refused by the library, in fewer words.
    assert_eq!(client.ask(&Request::get("/v1/x").with("a", &"b".repeat(4096))).await.status, 431);
    assert_eq!(client.ask(&Request::get("/v1/x")).await.status, 200, "the connection lives on");
    assert_eq!(engine[0].count(), 1);
}

#[tokio::test]
async fn a_target_that_no_url_can_hold_is_refused_in_our_words() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    for target in ["/a<b", "/a`b", "/?q=\"x\"", "/?q=<x"] {
        let head = format!("GET {target} HTTP/1.1\r\nhost: x\r\n\r\n");
        refused(&proxy, head.as_bytes(), 400, "bad_request").await;
    }
    let evil = "GET http://x\\evil/ HTTP/1.1\r\nhost: x\r\n\r\n";
    for head in [evil, "GET http://x/ HTTP/1.0\r\n\r\n", "GET http:/// HTTP/1.0\r\n\r\n"] {
        refused(&proxy, head.as_bytes(), 400, "bad_host").await;
    }
    assert_eq!(engine[0].count(), 0);
}

#[tokio::test]
async fn an_empty_line_in_two_pieces_is_an_empty_line() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    let mut client = Raw::connect(proxy.address(Line::Http1)).await;
    for _ in 0..3 {
        client.send("GET /v1/x HTTP/1.1\r\nhost: x\r\n\r\n\r").await.unwrap();
        assert_eq!(client.answer().await.status, 200);
        // Long enough for the CR to have been read by itself.
        assert_eq!(proxy.ask(&Request::get("/health")).await.status, 200);
        client.send("\n").await.unwrap();
    }
}

#[tokio::test]
async fn a_preface_that_is_none_is_not_served() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    let mut client = Raw::connect(proxy.address(Line::Http2)).await;
    client.send("PRI * HTTP/2.0\r\n\r\nXXXXXX").await.unwrap();
    assert!(client.until_closed().await.is_empty());
    proxy.counts("plimsoll_refusals_total", &[("code", "bad_request")], 1.0).await;
}
