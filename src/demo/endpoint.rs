//! The HTTP side of the simulated engine: paths, bodies, streams, and clients that leave.
//!
//! A Pingora `HttpServerApp` and not a `ServeHttp`, because tokens go out one by one. The header of a stream
//! is sent at once, before the engine has a place for the request, as vLLM does. While nothing is to be
//! written the connection is watched, so that a client that leaves is noticed in the queue, in the prefill
//! and between tokens alike.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, StatusCode, Version, header};
use pingora::http::ResponseHeader;
use pingora_core::ErrorType::InternalError;
use pingora_core::apps::{HttpPersistentSettings, HttpServerApp, ReusedHttpStream};
use pingora_core::protocols::http::ServerSession;
use pingora_core::server::ShutdownWatch;
use pingora_core::{Error, Result};

use super::answer::Answer;
use super::engine::{Engine, KEEP_ALIVE, Ticket};
use super::vllm::{Api, Fault, Question};
use crate::sim::replica::Kind;

/// Largest request body; a prompt of a million tokens has four.
const BODY_BYTES_MAX: usize = 64 << 20;

const JSON: &str = "application/json";
const METRICS: &str = "text/plain; version=1.0.0; charset=utf-8";
const EVENTS: &str = "text/event-stream; charset=utf-8";

/// An engine with HTTP in front.
#[derive(Debug)]
pub(super) struct Endpoint {
    engine: Arc<Engine>,
}

/// An answer that is complete before it is sent.
struct Page {
    status: u16,
    kind: &'static str,
    body: String,
    allow: Option<&'static str>,
}

impl Page {
    fn ok(kind: &'static str, body: String) -> Self {
        Self { status: 200, kind, body, allow: None }
    }

    fn detail(status: StatusCode, allow: Option<&'static str>) -> Self {
        let reason = status.canonical_reason().unwrap_or_default();
        Self { status: status.as_u16(), kind: JSON, body: format!("{{\"detail\":\"{reason}\"}}"), allow }
    }
}

impl From<Fault> for Page {
    fn from(fault: Fault) -> Self {
        Self { status: fault.status, kind: JSON, body: fault.body(), allow: None }
    }
}

impl Endpoint {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }

    async fn serve(&self, http: &mut ServerSession) -> Result<()> {
        let body = read_body(http).await?;
        let method = http.req_header().method.clone();
        let api = match http.req_header().uri.path() {
            "/v1/chat/completions" => Api::Chat,
            "/v1/completions" => Api::Completions,
            path => {
                let page = self.page(path, &method);
                return write_page(http, page).await;
            }
        };
        if method != Method::POST {
            return write_page(http, Page::detail(StatusCode::METHOD_NOT_ALLOWED, Some("POST"))).await;
        }
        let question = match body {
            Some(body) => self.engine.served().question(api, &body),
            None => Err(Fault::too_large()),
        };
        match question {
            Ok(question) => self.generate(http, &question).await,
            Err(fault) => write_page(http, fault.into()).await,
        }
    }

    /// Every path that generates nothing.
    fn page(&self, path: &str, method: &Method) -> Page {
        let allowed = match path {
            "/health" | "/v1/models" | "/metrics" => Method::GET,
            "/reset_prefix_cache" => Method::POST,
            _ => return Page::detail(StatusCode::NOT_FOUND, None),
        };
        if *method != allowed {
            let allow = if allowed == Method::GET { "GET" } else { "POST" };
            return Page::detail(StatusCode::METHOD_NOT_ALLOWED, Some(allow));
        }
        match path {
            "/v1/models" => Page::ok(JSON, self.engine.served().models()),
            "/metrics" => Page::ok(METRICS, self.engine.metrics()),
            "/reset_prefix_cache" => {
                self.engine.reset_prefix_cache();
                Page::ok("", String::new())
            }
            _ => Page::ok("", String::new()),
        }
    }

    async fn generate(&self, http: &mut ServerSession, question: &Question) -> Result<()> {
        let Ok(mut ticket) = self.engine.submit(question) else {
            let longest = self.engine.served().hardware.kv_tokens;
            return write_page(http, Fault::too_long(longest).into()).await;
        };
        let served = self.engine.served();
        let created = self.engine.unix_seconds();
        let answer = Answer { question, model: served.model, id: ticket.id(), created };
        if question.stream {
            return stream(http, &answer, &mut ticket).await;
        }
        let mut cached = 0;
        while let Some(kind) = next_token(http, &mut ticket).await? {
            if let Kind::First { cached_tokens } = kind {
                cached = cached_tokens;
            }
        }
        write_page(http, Page::ok(JSON, answer.whole(cached))).await
    }
}

#[async_trait]
impl HttpServerApp for Endpoint {
    async fn process_new_http(
        self: &Arc<Self>,
        mut http: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        if !http.read_request().await.ok()? {
            return None;
        }
        let lasting = !*shutdown.borrow() && http.req_header().version == Version::HTTP_11;
        http.set_keepalive(lasting.then_some(KEEP_ALIVE.as_secs()));
        // An error means that the client is gone; what it had asked for was dropped on the way here.
        self.serve(&mut http).await.ok()?;
        let settings = HttpPersistentSettings::for_session(&http);
        let stream = http.finish().await.ok()??;
        Some(ReusedHttpStream::from_reusable_stream(stream, settings))
    }
}

async fn stream(http: &mut ServerSession, answer: &Answer<'_>, ticket: &mut Ticket) -> Result<()> {
    let mut head = head(200, EVENTS)?;
    head.insert_header(header::TRANSFER_ENCODING, "chunked")?;
    http.write_response_header(Box::new(head)).await?;
    let (mut cached, mut count) = (0, 0);
    while let Some(kind) = next_token(http, ticket).await? {
        if let Kind::First { cached_tokens } = kind {
            cached = cached_tokens;
            if let Some(event) = answer.role_event() {
                http.write_response_body(event.into(), false).await?;
            }
        }
        count += 1;
        http.write_response_body(answer.token_event(count).into(), false).await?;
    }
    if let Some(event) = answer.usage_event(cached) {
        http.write_response_body(event.into(), false).await?;
    }
    http.write_response_body(Bytes::from_static(b"data: [DONE]\n\n"), true).await
}

/// The next token, or an error as soon as the client is gone.
async fn next_token(http: &mut ServerSession, ticket: &mut Ticket) -> Result<Option<Kind>> {
    tokio::select! {
        biased;
        token = ticket.token() => Ok(token),
        left = http.read_body_or_idle(true) => Err(left.err().unwrap_or_else(|| Error::new(InternalError))),
    }
}

/// The whole body; nothing if it is too large, in which case the rest is read and thrown away.
async fn read_body(http: &mut ServerSession) -> Result<Option<Vec<u8>>> {
    if http
        .get_header(header::EXPECT)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
    {
        http.write_continue_response().await?;
    }
    let (mut body, mut fits) = (Vec::new(), true);
    while let Some(part) = http.read_request_body().await? {
        fits = fits && body.len() + part.len() <= BODY_BYTES_MAX;
        if fits {
            body.extend_from_slice(&part);
        }
    }
    Ok(fits.then_some(body))
}

async fn write_page(http: &mut ServerSession, page: Page) -> Result<()> {
    let mut head = head(page.status, page.kind)?;
    head.insert_header(header::CONTENT_LENGTH, page.body.len())?;
    if let Some(allow) = page.allow {
        head.insert_header(header::ALLOW, allow)?;
    }
    let without_body = http.req_header().method == Method::HEAD;
    http.write_response_header(Box::new(head)).await?;
    let body = if without_body { String::new() } else { page.body };
    http.write_response_body(body.into(), true).await
}

fn head(status: u16, kind: &str) -> Result<ResponseHeader> {
    let mut head = ResponseHeader::build(status, Some(6))?;
    head.insert_header(header::SERVER, "plimsoll-sim")?;
    if !kind.is_empty() {
        head.insert_header(header::CONTENT_TYPE, kind)?;
    }
    Ok(head)
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};
    use std::time::Duration;

    use serde_json::{Value, json};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::sync::watch;

    use super::super::client;
    use super::super::engine::{EngineOptions, serve};
    use super::*;
    use crate::sim::hardware::Hardware;

    /// Serves an engine on a free port and runs `test` against it.
    fn with_engine<F: Future<Output = ()>>(speed: f64, test: impl FnOnce(Arc<Engine>, SocketAddr) -> F) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let engine = Arc::new(Engine::new(EngineOptions {
                listen: address,
                model: "sim-8b".to_owned(),
                hardware: Hardware::default(),
                speed,
                kv_tokens: Some(10_000),
                seed: 0,
            }));
            let (_keep, shutdown) = watch::channel(false);
            tokio::select! {
                served = serve(engine.clone(), listener, shutdown) => panic!("{served:?}"),
                () = test(engine, address) => {}
            }
        });
    }

    fn chat(words: usize, stream: bool, max_tokens: u64) -> String {
        let content = "ahoy ".repeat(words);
        json!({
            "model": "sim-8b", "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens,
            "stream": stream, "stream_options": {"include_usage": true},
        })
        .to_string()
    }

    async fn ask(address: SocketAddr, body: &str) -> (u16, String) {
        let reply = client::send(address, "POST", "/v1/chat/completions", body).await.unwrap();
        (reply.status, reply.text().await.unwrap())
    }

    /// Waits until the engine's gauges are as `wanted`, which takes no longer than the machine is slow.
    async fn until(engine: &Engine, wanted: impl Fn(usize, usize) -> bool) {
        for _ in 0..5000 {
            let stats = engine.stats();
            if wanted(stats.running, stats.waiting) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("{:?}", engine.stats());
    }

    #[test]
    fn a_stream_is_a_role_then_tokens_then_usage_then_done() {
        with_engine(100.0, |_, address| async move {
            let (status, body) = ask(address, &chat(10, true, 5)).await;
            assert_eq!(status, 200);
            let events: Vec<_> =
                body.split_terminator("\n\n").map(|it| it.strip_prefix("data: ").unwrap()).collect();
            assert_eq!(events.len(), 1 + 5 + 1 + 1);
            assert_eq!(events[7], "[DONE]");
            let usage: Value = serde_json::from_str(events[6]).unwrap();
            assert_eq!(usage["usage"]["completion_tokens"], 5);
        });
    }

    #[test]
    fn a_prefix_seen_before_is_reported_as_cached_until_the_cache_is_reset() {
        with_engine(100.0, |_, address| async move {
            let cached = || async {
                let (status, body) = ask(address, &chat(100, false, 2)).await;
                assert_eq!(status, 200, "{body}");
                let body: Value = serde_json::from_str(&body).unwrap();
                body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
            };
            assert_eq!(cached().await, 0);
            // 500 bytes and the frame around them: seven whole blocks of 64.
            assert_eq!(cached().await, 7 * 16);
            let reset = client::send(address, "POST", "/reset_prefix_cache", "").await.unwrap();
            assert_eq!((reset.status, reset.text().await.unwrap()), (200, String::new()));
            assert_eq!(cached().await, 0);
        });
    }

    #[test]
    fn a_client_that_leaves_frees_the_engine_whatever_it_was_waiting_for() {
        with_engine(1.0, |engine, address| async move {
            // Hours of work, unless somebody stops it.
            for stream in [true, false] {
                let body = chat(100, stream, 9000);
                let asking = tokio::spawn(async move { ask(address, &body).await });
                until(&engine, |running, _| running == 1).await;
                asking.abort();
                until(&engine, |running, waiting| running + waiting == 0).await;
            }
            let long = chat(6000, true, 2000);
            let first = tokio::spawn({
                let long = long.clone();
                async move { ask(address, &long).await }
            });
            until(&engine, |running, _| running == 1).await;
            let queued = tokio::spawn(async move { ask(address, &long.replace("ahoy", "land")).await });
            until(&engine, |running, waiting| (running, waiting) == (1, 1)).await;
            queued.abort();
            until(&engine, |running, waiting| (running, waiting) == (1, 0)).await;
            first.abort();
            until(&engine, |running, waiting| running + waiting == 0).await;
        });
    }

    #[test]
    fn a_connection_serves_one_request_after_another() {
        with_engine(100.0, |_, address| async move {
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            let body = chat(1, true, 2);
            let length = body.len();
            let post = format!(
                "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n{body}"
            );
            for (request, end) in
                [(post.as_str(), "\r\n0\r\n\r\n"), ("GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n", "}]}")]
            {
                stream.write_all(request.as_bytes()).await.unwrap();
                let mut answer = String::new();
                while !answer.ends_with(end) {
                    let mut part = [0; 4096];
                    let read = stream.read(&mut part).await.unwrap();
                    assert_ne!(read, 0, "closed after {answer}");
                    answer.push_str(std::str::from_utf8(&part[..read]).unwrap());
                }
                assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            }
        });
    }

    #[test]
    fn what_is_not_served_is_refused_as_vllm_does() {
        with_engine(100.0, |_, address| async move {
            for (method, path, status) in [
                ("GET", "/v1/chat/completions", 405),
                ("HEAD", "/health", 405),
                ("GET", "/health", 200),
                ("GET", "/metrics", 200),
                ("GET", "/reset_prefix_cache", 405),
                ("GET", "/v2/models", 404),
            ] {
                let reply = client::send(address, method, path, "").await.unwrap();
                assert_eq!(reply.status, status, "{method} {path}");
            }
            assert_eq!(ask(address, "{").await.0, 400);
            assert_eq!(ask(address, &chat(1, false, 1).replace("sim-8b", "nope")).await.0, 404);
            assert_eq!(ask(address, &chat(9000, false, 1)).await.0, 400);
        });
    }
}
