//! A request body reaches the engine byte for byte, whichever way it came in and however often it had to be
//! sent.
//!
//! 192 combinations: four ways in (HTTP/1.1 and HTTP/2, each plain and over TLS), a length that is declared
//! or open, six sizes around the 64 KiB of pingora's retry buffer, and four fates of the first try. Pingora
//! by itself loses every body that a filter has read and every retry of more than 64 KiB (research/pingora.md
//! s.1), so each of them is a case.

use crate::support::client::{Client, Framing, Line, Request};
use crate::support::engine::{Answer, Engine, Seen, addresses};
use crate::support::one_upstream;
use crate::support::proxy::Proxy;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::HashSet;
use std::sync::{Arc, LazyLock};

const SIZES: [usize; 6] = [0, 10 << 10, 64 << 10, (64 << 10) + 1, 1 << 20, 20 << 20];

/// What becomes of the first try.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Answered,
    Busy,
    Closed,
    Refused,
}

/// Random bytes, the same in every run.
static NOISE: LazyLock<Bytes> = LazyLock::new(|| {
    let mut noise = vec![0; SIZES[5]];
    fastrand::Rng::with_seed(7).fill(&mut noise);
    noise.into()
});

/// The bodies of one size: random bytes, and a chat completion padded to the size.
fn bodies(size: usize) -> Vec<Bytes> {
    let opaque = NOISE.slice(..size);
    let frame = r#"{"model":"tiny","messages":[{"role":"user","content":""}]}"#;
    let Some(padding) = size.checked_sub(frame.len()) else { return vec![opaque] };
    let letters = NOISE[..padding].iter().map(|byte| char::from(b'a' + byte % 26));
    let chat = frame.replace("\"\"", &format!("\"{}\"", letters.collect::<String>()));
    vec![opaque, chat.into()]
}

/// Two backends. Unless the fate is to be answered, whichever is tried first for a case fails, so every case
/// has exactly one retry, no matter whom the policy prefers.
async fn stage(fate: Fate) -> (Proxy, Vec<Engine>) {
    let met = Arc::new(Mutex::new(HashSet::new()));
    let engines: Vec<Engine> = (0..2)
        .map(|_| {
            let met = met.clone();
            let script = move |seen: &Seen| {
                let case = seen.head.header("x-case").unwrap_or_default().to_owned();
                match (fate, met.lock().insert(case)) {
                    (Fate::Busy, true) => Answer::json(503, r#"{"error":{"message":"full"}}"#),
                    (Fate::Closed, true) => Answer::nothing(),
                    _ => Answer::json(200, r#"{"choices":[]}"#),
                }
            };
            if fate == Fate::Refused { Engine::dead(script) } else { Engine::start(script) }
        })
        .collect();
    let mut backends = addresses(&engines.iter().collect::<Vec<_>>());
    if fate == Fate::Refused {
        // By weight the dead one is tried first in all but one of 1,001 choices.
        engines[1].revive();
        backends[0] = format!("{{ address: {}, weight: 1000 }}", backends[0]);
    }
    let proxy = Proxy::start(&one_upstream(&backends, "policy: round_robin, max_fails: 0")).await;
    (proxy, engines)
}

/// Sends one body and says what is wrong with how it arrived.
async fn deliver(
    client: &mut Client,
    engines: &[Engine],
    fate: Fate,
    request: &Request,
) -> Result<(), String> {
    let answer = client.ask(request).await;
    if answer.status != 200 || !answer.complete {
        return Err(format!("answered {} {}", answer.status, answer.text()));
    }
    let seen: Vec<Seen> = engines.iter().flat_map(Engine::seen).collect();
    let tries: Vec<usize> = engines.iter().map(Engine::count).collect();
    engines.iter().for_each(Engine::forget);
    let right = match fate {
        Fate::Answered => tries.iter().sum::<usize>() == 1,
        Fate::Busy | Fate::Closed => tries == [1, 1],
        Fate::Refused => tries == [0, 1],
    };
    if !right {
        return Err(format!("seen {tries:?} times"));
    }
    let body = request.body();
    for seen in seen {
        let head = &seen.head;
        if seen.body != body {
            let same = seen.body.iter().zip(&body).take_while(|(a, b)| a == b).count();
            return Err(format!("{} bytes arrived, different from byte {same} on", seen.body.len()));
        }
        let length = head.header("content-length");
        if !body.is_empty() && length != Some(body.len().to_string().as_str()) {
            return Err(format!("content-length {length:?}"));
        }
        if head.header("transfer-encoding").is_some() {
            return Err("transfer-encoding".into());
        }
    }
    Ok(())
}

/// The twelve cases (six sizes, declared or open) of one way in and one fate.
async fn every_size_arrives(line: Line, fate: Fate) {
    let (proxy, engines) = stage(fate).await;
    let mut wrong = Vec::new();
    let mut sent = 0;
    for framing in [Framing::Declared, Framing::Open] {
        for size in SIZES {
            for (kind, body) in ["opaque", "chat"].into_iter().zip(bodies(size)) {
                let request = Request::post("/v1/chat/completions", body).framed(framing);
                let request =
                    request.with("content-type", "application/json").with("x-case", &sent.to_string());
                let mut client = proxy.client(line).await;
                if let Err(problem) = deliver(&mut client, &engines, fate, &request).await {
                    wrong.push(format!("{framing:?} {size} bytes {kind}: {problem}"));
                }
                sent += 1;
            }
        }
    }
    assert!(wrong.is_empty(), "{line:?} {fate:?}:\n{}", wrong.join("\n"));
    if fate == Fate::Refused {
        let dead = [("backend", &*engines[0].address())];
        let attempts = proxy.metrics().await.sum("plimsoll_attempts_total", &dead);
        assert!(
            attempts >= f64::from(sent - 1),
            "only {attempts} of {sent} cases tried the dead backend first"
        );
    }
    proxy.assert_at_rest().await;
}

macro_rules! cases {
    ($($name:ident: $line:ident, $fate:ident;)*) => {
        $(#[tokio::test]
        async fn $name() {
            every_size_arrives(Line::$line, Fate::$fate).await;
        })*
    };
}

cases! {
    bodies_over_http1_arrive_at_the_first_try: Http1, Answered;
    bodies_over_http1_arrive_after_a_503: Http1, Busy;
    bodies_over_http1_arrive_after_a_close_without_response: Http1, Closed;
    bodies_over_http1_arrive_after_a_refused_connection: Http1, Refused;
    bodies_over_http1_with_tls_arrive_at_the_first_try: Http1Tls, Answered;
    bodies_over_http1_with_tls_arrive_after_a_503: Http1Tls, Busy;
    bodies_over_http1_with_tls_arrive_after_a_close_without_response: Http1Tls, Closed;
    bodies_over_http1_with_tls_arrive_after_a_refused_connection: Http1Tls, Refused;
    bodies_over_http2_arrive_at_the_first_try: Http2, Answered;
    bodies_over_http2_arrive_after_a_503: Http2, Busy;
    bodies_over_http2_arrive_after_a_close_without_response: Http2, Closed;
    bodies_over_http2_arrive_after_a_refused_connection: Http2, Refused;
    bodies_over_http2_with_tls_arrive_at_the_first_try: Http2Tls, Answered;
    bodies_over_http2_with_tls_arrive_after_a_503: Http2Tls, Busy;
    bodies_over_http2_with_tls_arrive_after_a_close_without_response: Http2Tls, Closed;
    bodies_over_http2_with_tls_arrive_after_a_refused_connection: Http2Tls, Refused;
}

#[tokio::test]
async fn a_connection_carries_bodies_of_every_framing_one_after_another() {
    let engine = Engine::good();
    let proxy = Proxy::start(&one_upstream(&[engine.address()], "")).await;
    for line in [Line::Http1, Line::Http1Tls, Line::Http2, Line::Http2Tls] {
        let mut client = proxy.client(line).await;
        for (framing, size) in [(Framing::Declared, 100_000), (Framing::Open, 1000), (Framing::Declared, 0)] {
            let request = Request::post("/v1/chat/completions", NOISE.slice(..size)).framed(framing);
            let fate = Fate::Answered;
            let delivered = deliver(&mut client, std::slice::from_ref(&engine), fate, &request).await;
            delivered.unwrap_or_else(|problem| panic!("{line:?} {framing:?} {size}: {problem}"));
        }
    }
}

#[tokio::test]
async fn a_client_that_expects_100_continue_is_served() {
    let engine = Engine::good();
    let proxy = Proxy::start(&one_upstream(&[engine.address()], "")).await;
    let request = Request::post("/v1/chat/completions", NOISE.slice(..5000)).with("expect", "100-continue");
    let mut client = proxy.client(Line::Http1).await;
    for _ in 0..2 {
        let delivered = deliver(&mut client, std::slice::from_ref(&engine), Fate::Answered, &request).await;
        assert_eq!(delivered, Ok(()));
    }
}
