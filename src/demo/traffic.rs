//! The demo's clients: each request of the workload goes out at its time, whether or not earlier ones were
//! answered.
//!
//! An open loop is the honest one: users do not wait for each other, and a client that did would hide the
//! queue it causes. What is measured is what the client sees: the first content event, the backend named in
//! the header, and the engine's own usage.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::sync::mpsc;

use super::client::{self, Reply};
use crate::clock::Clock;
use crate::sim::workload::Request;

/// A request that takes longer counts as failed.
const PATIENCE: Duration = Duration::from_secs(120);

/// Something a client saw.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Sighting {
    /// A request went out.
    Sent,
    /// The first token came from this backend, so long after the request.
    First { backend: String, after: Duration },
    /// The answer is complete.
    Done { backend: String, usage: Usage },
    /// The request failed.
    Failed(String),
}

/// The engine's own count of tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
    #[serde(default, rename = "prompt_tokens_details")]
    details: Details,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
struct Details {
    #[serde(default)]
    cached_tokens: u64,
}

impl Usage {
    /// Prompt tokens the engine had cached.
    pub(super) fn cached_tokens(&self) -> u64 {
        self.details.cached_tokens
    }
}

/// Sends `requests` to `proxy`, each at its time, and reports what comes back; ends when the last has been
/// sent.
pub(super) async fn drive(
    proxy: SocketAddr,
    model: &str,
    requests: Vec<Request>,
    seen: mpsc::UnboundedSender<Sighting>,
) {
    let clock = Clock::start();
    for request in requests {
        let body = body(model, &request);
        let elapsed = Duration::from_nanos(clock.now().as_nanos());
        tokio::time::sleep(request.at.saturating_sub(elapsed)).await;
        let seen = seen.clone();
        // The table may be gone before the last answer; then nobody wants to know.
        let _ = seen.send(Sighting::Sent);
        tokio::spawn(async move {
            let outcome = tokio::time::timeout(PATIENCE, ask(proxy, &body, &seen)).await;
            let _ = seen.send(match outcome {
                Ok(Ok(done)) => done,
                Ok(Err(problem)) => Sighting::Failed(problem),
                Err(_) => Sighting::Failed(format!("no answer within {} s", PATIENCE.as_secs())),
            });
        });
    }
}

async fn ask(
    proxy: SocketAddr,
    body: &str,
    seen: &mpsc::UnboundedSender<Sighting>,
) -> Result<Sighting, String> {
    let clock = Clock::start();
    let reply = client::send(proxy, "POST", "/v1/chat/completions", body).await;
    let mut reply = reply.map_err(|error| error.to_string())?;
    if reply.status != 200 {
        let status = reply.status;
        return Err(format!("{status} {}", reply.text().await.unwrap_or_default()));
    }
    let backend = reply.backend.clone().ok_or("no backend named in the answer")?;
    let first = || {
        let after = Duration::from_nanos(clock.now().as_nanos());
        let _ = seen.send(Sighting::First { backend: backend.clone(), after });
    };
    let usage = read_stream(&mut reply, first).await?;
    Ok(Sighting::Done { backend, usage })
}

/// Reads a stream to its end, calling `first` at the first content. An error event, or an end without
/// `[DONE]` or usage, is a failure.
async fn read_stream(reply: &mut Reply, first: impl FnOnce()) -> Result<Usage, String> {
    let mut first = Some(first);
    let (mut pending, mut usage, mut done) = (Vec::new(), None, false);
    while let Some(part) = reply.part().await.map_err(|error| error.to_string())? {
        pending.extend_from_slice(&part);
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            match read_line(&pending[..end])? {
                Line::Content => {
                    if let Some(first) = first.take() {
                        first();
                    }
                }
                Line::Usage(counted) => usage = Some(counted),
                Line::Done => done = true,
                Line::Other => {}
            }
            pending.drain(..=end);
        }
    }
    usage.filter(|_| done).ok_or_else(|| "the stream ended early".to_owned())
}

/// What a line of a stream means to the measurement.
#[derive(Debug, PartialEq)]
enum Line {
    Content,
    Usage(Usage),
    Done,
    Other,
}

fn read_line(line: &[u8]) -> Result<Line, String> {
    let Some(data) = line.strip_prefix(b"data: ") else { return Ok(Line::Other) };
    if data.trim_ascii_end() == b"[DONE]" {
        return Ok(Line::Done);
    }
    let chunk: Chunk = serde_json::from_slice(data).map_err(|error| format!("not a chunk: {error}"))?;
    if let Some(error) = chunk.error {
        return Err(error.message);
    }
    let has_content = chunk.choices.iter().any(|choice| !choice.delta.content.is_empty());
    Ok(match chunk.usage {
        Some(usage) => Line::Usage(usage),
        None if has_content => Line::Content,
        None => Line::Other,
    })
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Problem>,
}

#[derive(Deserialize)]
struct Choice {
    delta: Delta,
}

#[derive(Deserialize)]
struct Delta {
    #[serde(default)]
    content: String,
}

#[derive(Deserialize)]
struct Problem {
    message: String,
}

fn body(model: &str, request: &Request) -> String {
    let system = request.system.map(|system| json!({"role": "system", "content": system.text()}));
    let user = json!({"role": "user", "content": request.user.text()});
    let messages: Vec<_> = system.into_iter().chain([user]).collect();
    json!({
        "model": model, "messages": messages, "max_tokens": request.output_tokens, "ignore_eos": true,
        "stream": true, "stream_options": {"include_usage": true},
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_is_not_a_first_token_and_an_error_event_is_a_failure() {
        let read = |line: &str| read_line(line.as_bytes());
        let role = r#"data: {"choices":[{"delta":{"role":"assistant","content":""}}]}"#;
        assert_eq!(read(role), Ok(Line::Other));
        assert_eq!(read(r#"data: {"choices":[{"delta":{"content":"a"}}]}"#), Ok(Line::Content));
        assert_eq!(read("data: [DONE]\r"), Ok(Line::Done));
        assert_eq!(read(": comment"), Ok(Line::Other));
        assert_eq!(read(r#"data: {"error":{"message":"cut","code":"stream_cut"}}"#), Err("cut".to_owned()));
        let usage = r#"data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2}}"#;
        let counted = Usage { prompt_tokens: 9, completion_tokens: 2, details: Details::default() };
        assert_eq!(read(usage), Ok(Line::Usage(counted)));
    }
}
