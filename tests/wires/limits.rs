//! Clients that take their time, come in crowds or flood: bounded, and nobody else notices.

use crate::support::client::{Client, Line};
use crate::support::engine::{Answer, Engine};
use crate::support::proxy::Proxy;
use crate::support::raw::Raw;
use crate::support::stage::{assert_error, before, chat};
use crate::support::{one_upstream, wait_until, within};
use bytes::Bytes;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A proxy with these limits before one engine.
async fn limited(engine: &Engine, limits: &str) -> Proxy {
    Proxy::start(&format!("limits: {{ {limits} }}\n{}", one_upstream(&[engine.address()], ""))).await
}

async fn raw(proxy: &Proxy) -> Raw {
    Raw::connect(proxy.address(Line::Http1)).await
}

#[tokio::test]
async fn a_head_that_is_dripped_or_never_ends_is_a_408() {
    let engine = Engine::good();
    let proxy = limited(&engine, "header_timeout: 300ms").await;
    let mut stalled = raw(&proxy).await;
    stalled.send("POST /v1/x HT").await.unwrap();
    let mut dripping = raw(&proxy).await;
    let mut kept = raw(&proxy).await;
    kept.send("GET /v1/x HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert_eq!(kept.answer().await.status, 200);
    kept.send("GET /v1/x HTTP/1.1\r\nho").await.unwrap();
    let drip = async {
        // Whoever sends for ever is refused by time, not for a gap.
        while dripping.send("a").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = drip => {}
        answer = stalled.answer() => assert_error(&answer, 408, "header_timeout"),
    }
    assert_error(&dripping.answer().await, 408, "header_timeout");
    assert_error(&kept.answer().await, 408, "header_timeout");
    proxy.counts("plimsoll_refusals_total", &[("code", "header_timeout")], 3.0).await;
    assert_eq!(engine.count(), 1);
}

#[tokio::test]
async fn a_connection_on_which_nothing_comes_is_closed_in_silence() {
    let engine = Engine::good();
    let proxy = limited(&engine, "header_timeout: 300ms, tls_timeout: 300ms, client_idle: 300ms").await;
    for line in [Line::Http1, Line::Http2, Line::Http1Tls] {
        let mut silent = Raw::connect(proxy.address(line)).await;
        assert!(silent.until_closed().await.is_empty(), "{line:?}");
    }
    proxy.counts("plimsoll_refusals_total", &[("code", "tls_timeout")], 1.0).await;
    let mut kept = raw(&proxy).await;
    kept.send("GET /v1/x HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert_eq!(kept.answer().await.status, 200);
    assert!(kept.until_closed().await.is_empty(), "an idle connection");
    let mut half = Raw::connect(proxy.address(Line::Http2)).await;
    half.send(&PREFACE[..20]).await.unwrap();
    assert!(half.until_closed().await.is_empty(), "half a preface");
    let stream = TcpStream::connect(proxy.address(Line::Http2Tls)).await.unwrap();
    let mut speechless = crate::support::tls::handshake(stream, "h2").await;
    let end = within("the end of a connection without a preface", speechless.read(&mut [0; 1])).await;
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
}

#[tokio::test]
async fn a_body_may_take_longer_the_more_of_it_has_come() {
    let engine = Engine::good();
    let head = "POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 20000\r\n\r\n";
    let half = "x".repeat(10_000);
    for (rate, status) in [("1KiB", 200), ("1GiB", 408)] {
        let proxy = limited(&engine, &format!("body_timeout: 300ms, body_rate: {rate}")).await;
        let mut client = raw(&proxy).await;
        client.send(format!("{head}{half}")).await.unwrap();
        tokio::time::sleep(Duration::from_millis(700)).await;
        // To a client that was refused it is no matter whether this arrives.
        let _sent = client.send(&half).await;
        let answer = client.answer().await;
        assert_eq!(answer.status, status, "{rate}");
    }
}

#[tokio::test]
async fn bodies_that_would_take_more_than_their_memory_are_a_503() {
    let engine = Engine::good();
    let proxy = limited(&engine, "body: 1MiB, buffered_bodies: 1MiB").await;
    let mut first = raw(&proxy).await;
    let head = |length: usize| format!("POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n");
    first.send(head(1 << 20) + &"x".repeat((1 << 20) - 1)).await.unwrap();
    proxy.counts("plimsoll_buffered_body_bytes", &[], ((1 << 20) - 1) as f64).await;
    let mut second = raw(&proxy).await;
    second.send(head(2) + "{}").await.unwrap();
    let answer = second.answer().await;
    assert_error(&answer, 503, "buffers_full");
    assert_eq!(answer.header("retry-after"), Some("1"));
    first.send("x").await.unwrap();
    assert_eq!(first.answer().await.status, 200);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_client_has_so_many_connections_and_no_more() {
    let engine = Engine::good();
    let proxy = limited(&engine, "client_connections: 2").await;
    let mut held = Vec::new();
    // The proxy may still see those that asked whether it listens.
    wait_until("two connections", async || {
        let mut client = raw(&proxy).await;
        client.send("GET /v1/x HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        if client.answer().await.status == 200 {
            held.push(client);
        }
        held.len() == 2
    })
    .await;
    let before = engine.count();
    let answer = raw(&proxy).await.answer().await;
    assert_error(&answer, 429, "too_many_connections");
    assert!(answer.header("retry-after").is_some());
    assert!(Raw::connect(proxy.address(Line::Http1Tls)).await.until_closed().await.is_empty());
    assert_eq!(engine.count(), before);
    held.pop();
    wait_until("room again", async || {
        let mut client = raw(&proxy).await;
        client.send("GET /v1/x HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        client.answer().await.status == 200
    })
    .await;
}

#[tokio::test]
async fn connections_of_a_trusted_proxy_are_not_counted() {
    let engine = Engine::good();
    let config = "limits: { client_connections: 1 }\ntrusted_proxies: [127.0.0.1]\n";
    let proxy = Proxy::start(&format!("{config}{}", one_upstream(&[engine.address()], ""))).await;
    let mut clients = Vec::new();
    for _ in 0..5 {
        let mut client = proxy.client(Line::Http1).await;
        assert_eq!(client.ask(&chat()).await.status, 200);
        clients.push(client);
    }
}

#[tokio::test]
async fn a_client_that_cancels_a_batch_of_streams_keeps_its_connection() {
    let engine = [Engine::start(|seen| match seen.head.header("x-kind") {
        Some("batch") => Answer::silence(),
        _ => Answer::json(200, "{}"),
    })];
    let proxy = before(&engine, "").await;
    let stream = TcpStream::connect(proxy.address(Line::Http2)).await.unwrap();
    let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
    let driver = tokio::spawn(connection);
    let request = |kind: &str| {
        let uri = "http://x/v1/chat/completions";
        http::Request::post(uri).header("x-kind", kind).body(()).unwrap()
    };
    for _ in 0..3 {
        let mut batch = Vec::new();
        for _ in 0..100 {
            sender = within("room for a stream", sender.ready()).await.expect("a connection that lives");
            let (response, mut body) = sender.send_request(request("batch"), false).unwrap();
            body.send_data(Bytes::from_static(b"{"), false).unwrap();
            batch.push((response, body));
        }
        // Opened and cancelled in one write, as far as the proxy can tell.
        drop(batch);
        wait_until("an answer on the same connection", async || {
            sender = sender.clone().ready().await.expect("a connection that lives");
            let (response, _) = sender.send_request(request("single"), true).unwrap();
            match response.await {
                Ok(response) => response.status() == 200,
                // Until the cancellations have arrived, there is one stream too many.
                Err(e) if e.reason() == Some(h2::Reason::REFUSED_STREAM) => false,
                Err(e) => panic!("the connection is gone: {e}"),
            }
        })
        .await;
    }
    driver.abort();
    proxy.assert_at_rest().await;
}

/// An HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

#[tokio::test]
async fn an_http2_flood_ends_its_connection_and_no_other() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    let mut bystander = proxy.client(Line::Http2).await;
    assert_eq!(bystander.ask(&chat()).await.status, 200);
    let floods = [
        frame(4, 0, 0, &[]),
        frame(6, 0, 0, &[0; 8]),
        frame(2, 0, 1, &[0, 0, 0, 0, 1]),
        frame(0x77, 0, 0, &[]),
    ];
    for (number, flood) in (1_u32..).zip(floods) {
        let mut client = TcpStream::connect(proxy.address(Line::Http2)).await.unwrap();
        client.write_all(&[PREFACE, &frame(4, 0, 0, &[])].concat()).await.unwrap();
        // More than the budget, and at once; the proxy may close before it has read all.
        let (mut reader, mut writer) = client.split();
        let flooding = async { while writer.write_all(&flood.repeat(500)).await.is_ok() {} };
        let ending = async { while matches!(reader.read(&mut [0; 4096]).await, Ok(1..)) {} };
        within("the end of a flood", async { tokio::join!(flooding, ending) }).await;
        proxy.counts("plimsoll_refusals_total", &[("code", "http2_flood")], f64::from(number)).await;
    }
    assert_eq!(bystander.ask(&chat()).await.status, 200, "another connection");
}

#[tokio::test]
async fn a_client_that_takes_many_small_events_is_no_flood() {
    let events: Vec<String> = (0..3_000).map(|n| crate::support::engine::delta(&n.to_string())).collect();
    let engine =
        [Engine::start(move |_| Answer::stream_of(&events.iter().map(String::as_str).collect::<Vec<_>>()))];
    let proxy = Proxy::start(&format!(
        "limits: {{ http2_control_frames: 10 }}\n{}",
        one_upstream(&[engine[0].address()], "")
    ))
    .await;
    let mut client = Client::connect(proxy.address(Line::Http2), Line::Http2).await;
    let answer = client.ask(&chat()).await;
    assert!(answer.complete && answer.events().len() >= 3_000);
}

#[tokio::test]
async fn a_client_that_asks_and_never_reads_is_let_go() {
    let engine = Engine::good();
    let mut proxy = limited(&engine, "client_write_timeout: 300ms").await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut deaf = socket.connect(proxy.address(Line::Http1)).await.unwrap();
    // Bodiless answers, which Pingora flushes without a limit of time.
    let requests = "HEAD /health HTTP/1.1\r\nhost: x\r\n\r\n".repeat(1000);
    let deafness = async { while deaf.write_all(requests.as_bytes()).await.is_ok() {} };
    within("the end of a connection that is not read", deafness).await;
    proxy.signal("TERM");
    assert!(within("the end of the process", proxy.exit()).await.success());
}
