//! A stream passes through untouched, event by event, and whoever leaves it frees the other side at once.
//!
//! Time proves nothing on a busy machine, order does: an event is made only when the one before has arrived
//! at the client, so a proxy that holds anything back makes the test stand still.

use crate::support::client::{Answer as Reply, Client, Line, Request};
use crate::support::engine::{Answer, Engine, Gate, addresses, delta, usage};
use crate::support::proxy::Proxy;
use crate::support::{one_upstream, wait_until};

const BOTH: [Line; 2] = [Line::Http1, Line::Http2];

fn streamed() -> Request {
    Request::streamed("tiny", "how much may she carry")
}

async fn before(engine: &Engine) -> Proxy {
    Proxy::start(&one_upstream(&[engine.address()], "")).await
}

/// Sends a streamed request and waits for the head of its answer and its first event.
async fn first_event(client: &mut Client) -> String {
    client.send(&streamed()).await;
    let head = client.head().await;
    assert_eq!(head.status, 200);
    assert!(head.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream")));
    let piece = client.piece().await.expect("a stream that lives").expect("a first event");
    String::from_utf8_lossy(&piece).into_owned()
}

fn seen(engines: &[Engine]) -> Vec<usize> {
    engines.iter().map(Engine::count).collect()
}

fn assert_is_the_good_stream(reply: &Reply) {
    assert_eq!((reply.status, reply.complete), (200, true));
    assert_eq!(reply.events(), [delta("hello"), "[DONE]".to_owned()]);
}

#[tokio::test]
async fn neither_the_head_nor_a_part_of_an_answer_that_says_its_length_waits_for_the_rest() {
    let gate = Gate::new();
    let scripted = gate.clone();
    let engine = Engine::start(move |_| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 4\r\n\r\n";
        Answer::default().write(head).wait(&scripted).write("{ ").wait(&scripted).write(" }")
    });
    let proxy = before(&engine).await;
    for (line, nth) in BOTH.into_iter().zip([1, 3]) {
        let mut client = proxy.client(line).await;
        client.send(&Request::chat("tiny", "hello")).await;
        gate.reached(nth).await;
        assert_eq!(client.head().await.status, 200, "{line:?}");
        gate.open();
        gate.reached(nth + 1).await;
        assert_eq!(client.piece().await.unwrap().unwrap(), "{ ", "{line:?}");
        gate.open();
        assert_eq!(client.rest().await.0, " }", "{line:?}");
    }
}

async fn every_event_arrives_before_the_next_is_made(line: Line) {
    const EVENTS: u64 = 40;
    let gate = Gate::new();
    let scripted = gate.clone();
    let engine = Engine::start(move |_| {
        let events = (1..EVENTS).fold(Answer::stream().event(&delta("0")), |answer, number| {
            answer.wait(&scripted).event(&delta(&number.to_string()))
        });
        events.wait(&scripted).end()
    });
    let proxy = before(&engine).await;
    let mut client = proxy.client(line).await;
    assert_eq!(first_event(&mut client).await, format!("data: {}\n\n", delta("0")));
    for number in 1..EVENTS {
        gate.reached(number).await;
        let reads = client.reads();
        gate.open();
        let piece = client.piece().await.unwrap().unwrap();
        assert_eq!(piece, format!("data: {}\n\n", delta(&number.to_string())));
        assert_eq!(client.reads() - reads, 1, "event {number} took more than one read");
    }
    gate.open();
    assert_eq!(client.piece().await.unwrap(), None);
    #[expect(clippy::cast_precision_loss, reason = "40 is exact")]
    proxy.counts("plimsoll_stream_reads_total", &[("backend", &engine.address())], EVENTS as f64).await;
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn every_event_reaches_an_http1_client_in_one_read_before_the_next_is_made() {
    every_event_arrives_before_the_next_is_made(Line::Http1).await;
}

#[tokio::test]
async fn every_event_reaches_an_http1_client_over_tls_before_the_next_is_made() {
    every_event_arrives_before_the_next_is_made(Line::Http1Tls).await;
}

#[tokio::test]
async fn every_event_reaches_an_http2_client_in_one_frame_before_the_next_is_made() {
    every_event_arrives_before_the_next_is_made(Line::Http2).await;
}

#[tokio::test]
async fn every_event_reaches_an_http2_client_over_tls_before_the_next_is_made() {
    every_event_arrives_before_the_next_is_made(Line::Http2Tls).await;
}

#[tokio::test]
async fn a_burst_of_events_arrives_byte_for_byte() {
    let whole: String = (0..3000).map(|number| format!("data: {}\n\n", delta(&number.to_string()))).collect();
    let engine = Engine::start(|_| {
        let events =
            (0..3000).fold(Answer::stream(), |answer, number| answer.event(&delta(&number.to_string())));
        events.end()
    });
    let proxy = before(&engine).await;
    for line in BOTH {
        let reply = proxy.client(line).await.ask(&streamed()).await;
        assert!(reply.complete);
        assert!(reply.text() == whole, "{line:?}: {} of {} bytes", reply.body.len(), whole.len());
    }
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn an_event_in_many_pieces_and_one_of_a_megabyte_arrive_byte_for_byte() {
    let large = delta(&"x".repeat(1 << 20));
    let whole = format!(": hello\r\n\r\ndata: {}\r\n\r\ndata: {large}\n\ndata: [DONE]\n\n", delta("a"));
    let sent = whole.clone();
    let engine = Engine::start(move |_| {
        let (start, rest) = sent.split_at(200);
        let pieces = start.as_bytes().chunks(1).fold(Answer::stream(), Answer::chunk);
        rest.as_bytes().chunks(50_000).fold(pieces, Answer::chunk).end()
    });
    let proxy = before(&engine).await;
    for line in BOTH {
        let reply = proxy.client(line).await.ask(&streamed()).await;
        assert!(reply.complete);
        assert!(reply.text() == whole, "{line:?}: {} of {} bytes", reply.body.len(), whole.len());
    }
}

#[tokio::test]
async fn a_stream_that_ends_with_its_connection_is_complete() {
    let engine = Engine::start(|_| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
        Answer::default().write(head).write("data: a\n\n").write("data: [DONE]\n\n").close()
    });
    let proxy = before(&engine).await;
    for line in BOTH {
        let reply = proxy.client(line).await.ask(&streamed()).await;
        assert_eq!((reply.text().as_str(), reply.complete), ("data: a\n\ndata: [DONE]\n\n", true));
    }
}

#[tokio::test]
async fn an_http2_connection_outlives_a_request_that_was_given_up() {
    let engine = Engine::start(|seen| match seen.head.header("x-quick") {
        Some(_) => Answer::stream_of(&[&delta("hello")]),
        None => Answer::stream().event(&delta("a")).wait(&Gate::new()),
    });
    let proxy = before(&engine).await;
    let mut client = proxy.client(Line::Http2).await;
    first_event(&mut client).await;
    let mut client = client.cancel().expect("HTTP/2 keeps its connection");
    engine.abandoned(1).await;
    assert_is_the_good_stream(&client.ask(&streamed().with("x-quick", "1")).await);
}

#[tokio::test]
async fn an_error_as_first_event_passes_through_where_there_is_no_other_backend() {
    let error = r#"{"error":{"message":"The request queue is full.","code":503}}"#;
    let engine = Engine::start(move |_| Answer::stream_of(&[error]));
    let proxy = before(&engine).await;
    for (line, count) in BOTH.into_iter().zip(1..) {
        let reply = proxy.client(line).await.ask(&streamed()).await;
        assert_eq!((reply.status, reply.complete), (200, true));
        assert_eq!(reply.events(), [error, "[DONE]"]);
        assert_eq!(engine.count(), count);
    }
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_poisonous_stream_that_fails_everywhere_ejects_nobody() {
    let error = r#"{"error":{"message":"EngineCore encountered an issue.","code":500}}"#;
    let engines: [Engine; 4] = std::array::from_fn(|_| {
        Engine::start(move |seen| match seen.head.header("x-poison") {
            Some(_) => Answer::stream_of(&[error]),
            None => Answer::stream_of(&[&delta("hello")]),
        })
    });
    let more = "policy: round_robin, max_fails: 3, fail_timeout: 60s";
    let proxy = Proxy::start(&one_upstream(&addresses(&engines.each_ref()), more)).await;
    for number in 0..10 {
        let reply = proxy.client(BOTH[number % 2]).await.ask(&streamed().with("x-poison", "1")).await;
        assert_eq!((reply.status, reply.events()), (200, vec![error.to_owned(), "[DONE]".to_owned()]));
        let well = proxy.client(BOTH[number % 2]).await.ask(&streamed()).await;
        assert_is_the_good_stream(&well);
    }
    assert_eq!(seen(&engines).iter().sum::<usize>(), 10 * 2 + 10, "two tries for poison, one for the rest");
    proxy.counts("plimsoll_requests_total", &[("outcome", "engine_error")], 10.0).await;
    let metrics = proxy.metrics().await;
    for engine in &engines {
        let backend = engine.address();
        assert!(metrics.has("plimsoll_ejections_total", &[("backend", &backend)]));
        assert_eq!(metrics.sum("plimsoll_ejections_total", &[("backend", &backend)]), 0.0);
        assert_eq!(metrics.sum("plimsoll_backend_up", &[("backend", &backend)]), 1.0);
    }
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn tokens_are_counted_from_the_usage_of_streams_and_of_whole_answers() {
    let engine = Engine::start(|seen| match seen.head.header("x-whole") {
        Some(_) => Answer::json(200, &usage(100, 20, 3)),
        None => Answer::stream_of(&[&delta("a"), &delta("b"), &usage(1000, 200, 30)]),
    });
    let proxy = before(&engine).await;
    for line in BOTH {
        assert!(proxy.client(line).await.ask(&streamed()).await.complete);
    }
    assert!(proxy.ask(&Request::chat("tiny", "hello").with("x-whole", "1")).await.complete);
    let backend = engine.address();
    for (kind, tokens) in [("prompt", 2100.0), ("completion", 420.0), ("cached", 63.0)] {
        proxy.counts("plimsoll_tokens_total", &[("kind", kind), ("backend", &backend)], tokens).await;
    }
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_charge_is_held_until_the_first_content_event_and_no_longer() {
    let gate = Gate::new();
    let scripted = gate.clone();
    let engine = Engine::start(move |_| {
        let role = r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}"#;
        Answer::stream().event(role).wait(&scripted).event(&delta("a")).wait(&scripted).event("[DONE]").end()
    });
    let proxy = before(&engine).await;
    let mut client = proxy.client(Line::Http1).await;
    let prompt = "long ".repeat(4000);
    client.send(&Request::streamed("tiny", &prompt)).await;
    gate.reached(1).await;
    let pending = proxy.metrics().await.sum("plimsoll_pending_tokens", &[]);
    assert!((2000.0..20_000.0).contains(&pending), "{pending} tokens for 20,000 bytes of prompt");
    assert_eq!(proxy.metrics().await.sum("plimsoll_active_requests", &[]), 1.0);
    gate.open();
    wait_until("the first content to free the charge", async || {
        let metrics = proxy.metrics().await;
        metrics.sum("plimsoll_pending_tokens", &[]) == 0.0
            && metrics.sum("plimsoll_active_requests", &[]) == 1.0
    })
    .await;
    gate.open();
    client.head().await;
    assert!(client.rest().await.1);
    proxy.counts("plimsoll_requests_total", &[("outcome", "ok")], 1.0).await;
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn the_time_to_the_first_token_and_the_gaps_are_observed_once_each() {
    let engine = Engine::streaming(&["a", "b", "c"]);
    let proxy = before(&engine).await;
    assert!(proxy.ask(&streamed()).await.complete);
    proxy.counts("plimsoll_ttft_seconds_count", &[("backend", &engine.address())], 1.0).await;
    assert!(proxy.metrics().await.has("plimsoll_event_gap_seconds_count", &[]));
}
