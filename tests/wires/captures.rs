//! What real engines said, sent through the proxy byte by byte: clients must receive exactly that, and its
//! tokens be counted.
//!
//! The captures are answers of vLLM, SGLang, llama.cpp and Dynamo as they came off the wire
//! (`tests/captures/README.md`). They are replayed in pieces that no engine would choose, since TCP may
//! choose them: single bytes, or seeded random slices.

use crate::support::client::{Line, Request};
use crate::support::engine::{Answer, Engine, Seen};
use crate::support::http1::Wire;
use crate::support::one_upstream;
use crate::support::proxy::Proxy;
use bytes::{Bytes, BytesMut};
use std::path::{Path, PathBuf};

/// An answer as the file holds it.
struct Capture {
    name: String,
    raw: Bytes,
    status: u16,
    body: Bytes,
    /// Whether the answer came to its end; the capture of a queue's keep-alive comments breaks off.
    complete: bool,
}

/// What the names of such answers begin with; the rest are health checks, models and metrics.
const KINDS: [&str; 7] =
    ["chat-", "completions-", "err-", "overload-503-c", "overload-chat-", "req-", "sse-keep-alive-"];

fn folder(engine: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/captures").join(engine)
}

/// The captures of answers to requests for a completion, in the order of their names. An empty file is an
/// engine that said nothing within the time of the capture.
async fn captures(engine: &str) -> Vec<Capture> {
    let folder = folder(engine);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut names: Vec<String> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name.ends_with(".http") && KINDS.iter().any(|kind| name.starts_with(kind)));
    names.sort();
    let mut captures = Vec::new();
    for name in names {
        let raw: Bytes = std::fs::read(folder.join(&name)).unwrap().into();
        if raw.is_empty() {
            continue;
        }
        let mut wire = Wire::new(&raw[..]);
        let head = wire.final_head().await.unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut framing = head.response_framing().unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut body = BytesMut::new();
        let complete = loop {
            match wire.piece(&mut framing).await {
                Ok(Some(piece)) => body.extend_from_slice(&piece),
                end => break end.is_ok(),
            }
        };
        captures.push(Capture { name, raw, status: head.status(), body: body.freeze(), complete });
    }
    captures
}

/// The answer in pieces: single bytes up to 1 KiB, random slices of up to 200 bytes beyond; then the
/// connection ends.
fn replay(raw: &Bytes, rng: &mut fastrand::Rng) -> Answer {
    let mut rest = raw.clone();
    let mut answer = Answer::default();
    while !rest.is_empty() {
        let size = if raw.len() <= 1024 { 1 } else { rng.usize(1..=200) };
        answer = answer.write(rest.split_to(size.min(rest.len())));
    }
    answer.close()
}

/// The last usage that the body tells: prompt, completion and cached tokens.
fn usage(body: &[u8]) -> Option<[u64; 3]> {
    let text = String::from_utf8_lossy(body);
    let documents = text.lines().map(|line| line.strip_prefix("data: ").unwrap_or(line));
    let parsed = documents.filter_map(|document| serde_json::from_str::<serde_json::Value>(document).ok());
    parsed
        .filter_map(|value: serde_json::Value| {
            let usage = value.get("usage")?.as_object()?.clone();
            let cached =
                usage.get("prompt_tokens_details").and_then(|details| details["cached_tokens"].as_u64());
            Some([
                usage["prompt_tokens"].as_u64()?,
                usage["completion_tokens"].as_u64()?,
                cached.unwrap_or(0),
            ])
        })
        .next_back()
}

fn request(capture: &Capture, number: usize) -> Request {
    let streamed = capture.body.starts_with(b"data:") || capture.name.contains("stream");
    let request = if capture.name.contains("completions") {
        Request::post(
            "/v1/completions",
            format!(r#"{{"model":"tiny","prompt":"hello","stream":{streamed}}}"#),
        )
    } else if streamed && !capture.name.contains("nonstream") {
        Request::streamed("tiny", "hello")
    } else {
        Request::chat("tiny", "hello")
    };
    request.with("x-capture", &number.to_string())
}

async fn answers_arrive_as_captured(folder: &str, engine: &str) {
    let captures = captures(folder).await;
    assert!(captures.len() >= 6, "only {} captures of {folder}", captures.len());
    let raw: Vec<Bytes> = captures.iter().map(|capture| capture.raw.clone()).collect();
    let script = move |seen: &Seen| {
        let number: usize =
            seen.head.header("x-capture").and_then(|n| n.parse().ok()).expect("a number of ours");
        replay(&raw[number], &mut fastrand::Rng::with_seed(number as u64))
    };
    let backend = Engine::start(script);
    let proxy =
        Proxy::start(&one_upstream(&[backend.address()], &format!("engine: {engine}, max_fails: 0"))).await;
    let mut wanted = [0; 3];
    for (number, capture) in captures.iter().enumerate() {
        let name = format!("{folder}/{}", capture.name);
        for line in [Line::Http1, Line::Http2] {
            let reply = proxy.client(line).await.ask(&request(capture, number)).await;
            assert_eq!((reply.status, reply.complete), (capture.status, true), "{name} over {line:?}");
            let added = reply.body.strip_prefix(&*capture.body);
            let added = added.unwrap_or_else(|| panic!("{name} over {line:?}: {}", reply.text()));
            let cut = String::from_utf8_lossy(added).contains("\"stream_cut\"");
            assert!(
                cut != capture.complete && (cut || added.is_empty()),
                "{name} over {line:?}: {}",
                reply.text()
            );
            let tokens = usage(&capture.body).unwrap_or_default();
            (0..3).for_each(|kind| wanted[kind] += tokens[kind]);
        }
        eprintln!("{name}: {wanted:?} tokens in all");
        for (kind, tokens) in ["prompt", "completion", "cached"].into_iter().zip(wanted) {
            let tokens = u32::try_from(tokens).expect("small captures");
            proxy.counts("plimsoll_tokens_total", &[("kind", kind)], f64::from(tokens)).await;
        }
    }
    assert!(wanted[0] > 0 && wanted[1] > 0, "no capture with usage");
    assert_eq!(backend.count(), captures.len() * 2, "an answer was asked for twice");
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn the_answers_of_vllm_arrive_as_captured() {
    answers_arrive_as_captured("vllm-0.32.0", "vllm").await;
}

#[tokio::test]
async fn the_answers_of_vllm_with_further_flags_arrive_as_captured() {
    answers_arrive_as_captured("vllm-0.32.0-flags", "vllm").await;
}

#[tokio::test]
async fn the_answers_of_sglang_arrive_as_captured() {
    answers_arrive_as_captured("sglang-0.5.23", "sglang").await;
}

#[tokio::test]
async fn the_answers_of_llama_cpp_arrive_as_captured() {
    answers_arrive_as_captured("llama.cpp-b11434", "llamacpp").await;
}

#[tokio::test]
async fn the_answers_of_llama_cpp_in_xllamacpp_arrive_as_captured() {
    answers_arrive_as_captured("llama.cpp-b11549-xllamacpp", "llamacpp").await;
}

#[tokio::test]
async fn the_answers_of_dynamo_arrive_as_captured() {
    answers_arrive_as_captured("dynamo-1.6.1-mocker", "openai").await;
}
