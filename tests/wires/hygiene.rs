//! HTTP that no well-behaved library writes, and what must never leak from one side to the other.

use crate::support::client::{Line, Request};
use crate::support::engine::{Answer, Engine, Gate, delta};
use crate::support::proxy::Proxy;
use crate::support::raw::Raw;
use crate::support::stage::{BOTH, answered, assert_error, before, chat, reply};
use crate::support::{one_upstream, upstream, wait_until};
use tokio::net::TcpStream;

const CHAT: &str = r#"{"model":"tiny","messages":[{"role":"user","content":"hello"}]}"#;

async fn raw(proxy: &Proxy) -> Raw {
    Raw::connect(proxy.address(Line::Http1)).await
}

/// A POST of a chat completion by hand; `headers` end in CRLF each.
fn post(version: &str, headers: &str) -> String {
    let length = CHAT.len();
    format!("POST /v1/chat/completions {version}\r\ncontent-length: {length}\r\n{headers}\r\n{CHAT}")
}

#[tokio::test]
async fn bodies_that_are_only_announced_take_no_room() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    // Together they announce more than the default `buffered_bodies` of 1 GiB.
    let announced = format!("host: x\r\nexpect: 100-continue\r\ncontent-length: {}\r\n\r\n", 32 << 20);
    let mut idle = Vec::new();
    for number in 0..40 {
        let mut client = raw(&proxy).await;
        client.send(format!("POST /v1/chat/completions HTTP/1.1\r\n{announced}")).await.unwrap();
        // To be asked to go on is to know that the proxy waits for the body.
        assert_eq!(client.head().await.status(), 100, "body {number}");
        idle.push(client);
    }
    for line in BOTH {
        let answer = proxy.client(line).await.ask(&chat()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    drop(idle);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn every_one_of_many_bodies_that_do_not_come_is_a_408() {
    let engine = [Engine::good()];
    let proxy = Proxy::start(&format!(
        "limits: {{ body_timeout: 200ms }}\n{}",
        one_upstream(&[engine[0].address()], "")
    ))
    .await;
    let mut clients = Vec::new();
    for number in 0..100 {
        let mut client = proxy.client(BOTH[number % 2]).await;
        client.send(&chat().missing_bytes(100)).await;
        clients.push(client);
    }
    for mut client in clients {
        assert_error(&reply(&mut client).await, 408, "body_timeout");
    }
    proxy.counts("plimsoll_requests_total", &[("outcome", "refused")], 100.0).await;
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn an_http10_client_gets_an_answer_without_chunks_that_ends_with_the_connection() {
    let stream = format!("data: {}\n\ndata: [DONE]\n\n", delta("hello"));
    let answers = [
        (Answer::stream_of(&[&delta("hello")]), stream.as_str()),
        (Answer::json(200, r#"{"whole":true}"#), r#"{"whole":true}"#),
        (chunked_json(), r#"{"pieces":true}"#),
    ];
    for (answer, body) in answers {
        let engine = [Engine::start(move |_| answer.clone())];
        let proxy = before(&engine, "").await;
        for headers in ["", "host: example.com\r\n"] {
            let mut client = raw(&proxy).await;
            client.send(post("HTTP/1.0", headers)).await.unwrap();
            let head = client.head().await;
            assert_eq!(head.status(), 200, "{head:?}");
            assert_eq!(head.header("transfer-encoding"), None);
            assert_eq!(client.until_closed().await, body, "{head:?}");
        }
        let seen = engine[0].seen();
        assert_eq!(seen.len(), 2);
        assert!(seen[0].head.header("host").is_some_and(|host| !host.is_empty()), "{:?}", seen[0].head);
        assert_eq!(seen[1].head.header("host"), Some("example.com"));
        assert!(seen.iter().all(|seen| seen.body == CHAT));
        proxy.assert_at_rest().await;
    }
}

fn chunked_json() -> Answer {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    Answer::default().write(head).chunk(r#"{"pieces""#).chunk(":true}").end()
}

#[tokio::test]
async fn an_http10_client_that_asks_to_keep_its_connection_still_sees_the_end_of_a_stream() {
    for answer in [Answer::stream_of(&[&delta("hello")]), chunked_json()] {
        let engine = [Engine::start(move |_| answer.clone())];
        let proxy = before(&engine, "").await;
        let mut client = raw(&proxy).await;
        client.send(post("HTTP/1.0", "host: x\r\nconnection: keep-alive\r\n")).await.unwrap();
        let head = client.head().await;
        assert_eq!((head.status(), head.header("transfer-encoding")), (200, None));
        let body = client.until_closed().await;
        assert!(body.ends_with(b"[DONE]\n\n") || body == r#"{"pieces":true}"#, "{body:?}");
    }
}

#[tokio::test]
async fn an_upgrade_is_not_passed_on() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    let request = chat()
        .with("connection", "upgrade")
        .with("upgrade", "websocket")
        .with("sec-websocket-version", "13")
        .with("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
    assert_eq!(proxy.ask(&request).await.status, 200);
    let head = engine[0].seen().remove(0).head;
    assert_eq!(head.header("upgrade"), None);
    let connection = head.header("connection").unwrap_or_default();
    assert!(!connection.to_ascii_lowercase().contains("upgrade"), "connection: {connection}");
}

#[tokio::test]
async fn an_engine_that_switches_protocols_unasked_is_a_502_and_is_asked_once() {
    let switching = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    let engine = [Engine::start(move |_| Answer::default().write(switching).wait(&Gate::new()))];
    let proxy = before(&engine, "max_fails: 0").await;
    for (headers, asked) in
        [("host: x\r\n", 1), ("host: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n", 2)]
    {
        let mut client = raw(&proxy).await;
        client.send(post("HTTP/1.1", headers)).await.unwrap();
        assert_error(&client.answer().await, 502, "upstream_closed");
        assert_eq!(engine[0].count(), asked);
    }
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_malformed_body_is_a_400_and_not_a_silent_close() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    for body in ["zz\r\nhello\r\n", "5\r\nhello\r\nnonsense\r\n", "5\r\nhello world\r\n0\r\n\r\n"] {
        let mut client = raw(&proxy).await;
        let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
        client.send(format!("{head}{body}")).await.unwrap();
        client.readable().await;
        assert_error(&client.answer().await, 400, "bad_request");
    }
    assert_eq!(engine[0].count(), 0);
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_client_that_goes_on_sending_after_a_413_can_still_read_it() {
    let engine = [Engine::good()];
    let proxy = before(&engine, "").await;
    let mut client = raw(&proxy).await;
    let announced = format!("host: x\r\ncontent-length: {}\r\n\r\n", 100 << 20);
    client.send(format!("POST /v1/chat/completions HTTP/1.1\r\n{announced}")).await.unwrap();
    // The answer is there, and perhaps the proxy's side is closed; now a client that looks only later sends on.
    client.readable().await;
    client.send(vec![b' '; 1 << 20]).await.expect("a peer that takes a megabyte more");
    let answer = client.answer().await;
    assert_error(&answer, 413, "body_too_large");
    assert_eq!(answer.header("connection"), Some("close"));
    assert_eq!(engine[0].count(), 0);
}

#[tokio::test]
async fn an_answer_that_begins_during_a_drain_says_that_its_connection_closes() {
    let gate = Gate::new();
    let scripted = gate.clone();
    let engine = Engine::start(move |seen| match seen.head.header("x-kind") {
        Some("under-way") => Answer::stream().event(&delta("a")).wait(&scripted).event("[DONE]").end(),
        Some("streamed") => Answer::stream_of(&[&delta("a")]).held_at(&scripted),
        _ => Answer::json(200, "{}").held_at(&scripted),
    });
    let mut proxy = Proxy::start(&one_upstream(&[engine.address()], "")).await;
    let mut under_way = proxy.client(Line::Http1).await;
    under_way.send(&Request::streamed("tiny", "hello").with("x-kind", "under-way")).await;
    assert_eq!(under_way.head().await.status, 200);
    let mut waiting = Vec::new();
    for line in [Line::Http1, Line::Http1Tls] {
        for kind in ["whole", "streamed"] {
            let mut client = proxy.client(line).await;
            client.send(&chat().with("x-kind", kind)).await;
            waiting.push((line, kind, client));
        }
    }
    gate.reached(5).await;
    proxy.signal("TERM");
    wait_until("the listener to be closed", async || {
        TcpStream::connect(proxy.address(Line::Http1)).await.is_err()
    })
    .await;
    (0..5).for_each(|_| gate.open());
    for (line, kind, mut client) in waiting {
        let answer = reply(&mut client).await;
        assert_eq!((answer.status, answer.complete), (200, true), "{kind} over {line:?}");
        assert_eq!(answer.header("connection"), Some("close"), "{kind} over {line:?}");
    }
    assert!(under_way.rest().await.1);
    assert_eq!(proxy.exit().await.code(), Some(0), "{}", proxy.log());
}

#[tokio::test]
async fn the_engines_keep_alive_is_not_passed_on() {
    let engine = [Engine::start(|seen| {
        let headers = "connection: keep-alive\r\nkeep-alive: timeout=5, max=100\r\n";
        match seen.head.header("x-streamed") {
            Some(_) => {
                let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{headers}");
                let answer = Answer::default().write(format!("{head}transfer-encoding: chunked\r\n\r\n"));
                answer.event(&delta("a")).event("[DONE]").end()
            }
            None => Answer::json_with(200, headers, "{}"),
        }
    })];
    let proxy = before(&engine, "").await;
    for line in BOTH {
        let mut client = proxy.client(line).await;
        for request in [chat(), chat().with("x-streamed", "1")] {
            let answer = client.ask(&request).await;
            assert_eq!((answer.status, answer.header("keep-alive")), (200, None), "{line:?}");
        }
        client.send(&chat()).await;
        assert_eq!(answered(client).await, 200, "the client's own connection is kept");
    }
}

#[tokio::test]
async fn an_answer_of_the_proxys_own_says_whether_its_connection_lives_on() {
    let engine = [Engine::start(|_| Answer::nothing())];
    let llm = upstream(&[engine[0].address()], "models: [tiny], max_fails: 0");
    let proxy = Proxy::start(&format!("limits: {{ body: 64KiB }}\nupstreams: {{ llm: {llm} }}\n")).await;
    let post = |body: &str| {
        let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length:";
        format!("{head} {}\r\n\r\n{body}", body.len())
    };
    let large = " ".repeat((64 << 10) + 1);
    for (body, status, code) in [
        (CHAT, 502, "upstream_closed"),
        (r#"{"model":"nobody"}"#, 404, "model_not_found"),
        (large.as_str(), 413, "body_too_large"),
    ] {
        let mut client = raw(&proxy).await;
        let mut lives = true;
        for _ in 0..2 {
            if !lives {
                assert!(client.until_closed().await.is_empty(), "{code}");
                break;
            }
            client.send(post(body)).await.unwrap();
            // A promise that is not kept costs the client its next request: there is no answer to it.
            let answer = client.answer().await;
            assert_error(&answer, status, code);
            lives = answer.header("connection") != Some("close");
        }
    }
}
