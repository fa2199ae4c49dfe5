//! Engines that cost nothing: they answer at once, or send events at the pace that a request asks for.
//!
//! An answer names the request that it is for and how many bytes of its text came, so that a client can say of every
//! answer whether it is whole and its own. An event carries the moment at which it was written; engines and clients are
//! one process with one clock. Like vLLM behind uvicorn they write each event as a chunk of its own.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use memchr::memmem;
use plimsoll::clock::{Clock, Time};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::http::{Connection, Head, broken};
use super::prompt::Plan;

/// Where they listen; what the configurations of all peers say.
pub const PORTS: [u16; 4] = [7711, 7712, 7713, 7714];

/// Bytes of an event with content, `data: ` and the blank line included.
pub const EVENT_BYTES: usize = 220;
/// The end of a stream.
pub const DONE: &[u8] = b"data: [DONE]\n\n";

const BIND_TRIES: u32 = 200;

const HEAD: &str = "HTTP/1.1 200 OK\r\ndate: Mon, 23 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\n";
const SENTENCE: &str = "A load line says of every ship how much more it may carry, in which water and at what time of \
    the year, and whoever paints it on the hull has weighed the ship before. ";
/// What engines say of themselves.
const METRICS: &str =
    "vllm:num_requests_waiting 0\nvllm:num_requests_running 1\nvllm:kv_cache_usage_perc 0.1\n";
const MODELS: &str = r#"{"object":"list","data":[{"id":"llama-3.1-8b","object":"model","owned_by":"vllm"}]}"#;
const ABOUT: &str = r#"{"model_path":"llama-3.1-8b","served_model_name":"llama-3.1-8b","version":"0.32.0","is_generation":true}"#;

/// Four of them. They are gone when this is dropped, and their connections with them.
pub struct Engines {
    _listening: JoinSet<()>,
}

impl Engines {
    /// Starts them.
    pub async fn start(clock: Clock) -> io::Result<Self> {
        let mut listening = JoinSet::new();
        for address in addresses() {
            let mut listener = TcpListener::bind(address).await;
            for _ in 0..BIND_TRIES {
                if listener.is_ok() {
                    break;
                }
                // Those of the measurement before are still going.
                tokio::time::sleep(Duration::from_millis(10)).await;
                listener = TcpListener::bind(address).await;
            }
            let listener =
                listener.map_err(|error| io::Error::other(format!("an engine on {address}: {error}")))?;
            listening.spawn(listen(listener, clock));
        }
        Ok(Self { _listening: listening })
    }
}

/// Where they listen.
pub fn addresses() -> Vec<SocketAddr> {
    PORTS.iter().map(|&port| SocketAddr::from(([127, 0, 0, 1], port))).collect()
}

async fn listen(listener: TcpListener, clock: Clock) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => if let Ok((stream, _)) = accepted {
                connections.spawn(async move {
                    // Whoever goes away in the middle has had enough.
                    let _ = serve(stream, clock).await;
                });
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(stream: TcpStream, clock: Clock) -> io::Result<()> {
    let mut connection = Connection::new(stream)?;
    while let Some(head) = connection.head(false).await? {
        let body = connection.whole().await?;
        match Plan::find(&body) {
            None => connection.write(Bytes::from(page(&head))).await?,
            Some((plan, length)) if plan.events == 0 => {
                let answer = answer(plan.nonce, length);
                let length = answer.len();
                let head =
                    format!("{HEAD}content-type: application/json\r\ncontent-length: {length}\r\n\r\n");
                connection.write(Bytes::from(head + &answer)).await?;
            }
            Some((plan, _)) => {
                drop(body);
                stream_to(&mut connection, &plan, clock).await?;
            }
        }
        if !head.keeps {
            break;
        }
    }
    Ok(())
}

/// What probes, polls and discovery ask for.
fn page(head: &Head) -> String {
    let line = head.first_line();
    let knows = |path: &str| memmem::find(line, path.as_bytes()).is_some();
    let body = if knows("/models") {
        MODELS
    } else if knows("/metrics") {
        METRICS
    } else if knows("info") || knows("/version") {
        ABOUT
    } else {
        "{}"
    };
    let (kind, length) = (if knows("/metrics") { "text/plain" } else { "application/json" }, body.len());
    let status = if knows("/load") { HEAD.replace("200 OK", "404 Not Found") } else { HEAD.to_owned() };
    format!("{status}content-type: {kind}\r\ncontent-length: {length}\r\n\r\n{body}")
}

/// The answer to the request `nonce`, of whose text `received` bytes came; about 1 KB.
pub fn answer(nonce: u64, received: usize) -> String {
    let content = SENTENCE.repeat(4);
    let choice = format!(
        r#"{{"index":0,"message":{{"role":"assistant","content":"{content}","tool_calls":[]}},"finish_reason":"stop"}}"#
    );
    let (prompt, total) = (received / 4, received / 4 + 200);
    let usage = format!(r#"{{"prompt_tokens":{prompt},"total_tokens":{total},"completion_tokens":200}}"#);
    format!(
        "{{\"id\":\"chatcmpl-{nonce:016x}\",\"object\":\"chat.completion\",\"created\":1764000000,\
         \"model\":\"llama-3.1-8b\",\"choices\":[{choice}],\"usage\":{usage},\"system_fingerprint\":\"{received:08}\"}}"
    )
}

async fn stream_to(connection: &mut Connection, plan: &Plan, clock: Clock) -> io::Result<()> {
    let nonce = plan.nonce;
    let head =
        format!("{HEAD}content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n");
    let role = format!(
        "data: {{\"id\":\"chatcmpl-{nonce:016x}\",\"object\":\"chat.completion.chunk\",\"created\":1764000000,\
         \"model\":\"llama-3.1-8b\",\"choices\":[{{\"index\":0,\"delta\":{{\"role\":\"assistant\",\"content\":\"\"}},\
         \"logprobs\":null,\"finish_reason\":null}}]}}\n\n"
    );
    connection.write(Bytes::from(format!("{head}{:x}\r\n{role}\r\n", role.len()))).await?;
    // The first event comes at once. Streams that begin together do not stay together.
    let mut due = clock.now();
    let shift = plan.pace.mul_f64(nonce.wrapping_mul(0x9e37_79b9_7f4a_7c15) as f64 / u64::MAX as f64);
    for number in 0..plan.events {
        connection.write(chunk(&event(nonce, clock.now()))).await?;
        due = due + if number == 0 { shift } else { plan.pace };
        let pause = due.since(clock.now());
        if pause > Duration::ZERO {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = connection.closed() => return Ok(()),
            }
        }
    }
    let usage = format!(
        "data: {{\"id\":\"chatcmpl-{nonce:016x}\",\"object\":\"chat.completion.chunk\",\"created\":1764000000,\
         \"model\":\"llama-3.1-8b\",\"choices\":[],\"usage\":{{\"prompt_tokens\":256,\"total_tokens\":{},\
         \"completion_tokens\":{}}}}}\n\n",
        plan.events + 256,
        plan.events,
    );
    connection.write(chunk(usage.as_bytes())).await?;
    let done = String::from_utf8_lossy(DONE);
    connection.write(Bytes::from(format!("{:x}\r\n{done}\r\n0\r\n\r\n", DONE.len()))).await
}

fn chunk(data: &[u8]) -> Bytes {
    let mut chunk = format!("{:x}\r\n", data.len()).into_bytes();
    chunk.extend_from_slice(data);
    chunk.extend_from_slice(b"\r\n");
    chunk.into()
}

/// An event with content, written `at`.
fn event(nonce: u64, at: Time) -> Vec<u8> {
    let mut event = format!(
        "data: {{\"id\":\"chatcmpl-{nonce:016x}\",\"object\":\"chat.completion.chunk\",\"created\":1764000000,\
         \"model\":\"llama-3.1-8b\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" {:016x}\"}},\
         \"logprobs\":null,\"finish_reason\":null}}]",
        at.as_nanos()
    )
    .into_bytes();
    // Room that a longer word, or probabilities, would take.
    event.resize(EVENT_BYTES - 3, b' ');
    event.extend_from_slice(b"}\n\n");
    event
}

/// When an event of the stream `nonce` was written, if it has content; an error if it is of another stream.
pub fn written_at(event: &[u8], nonce: u64) -> io::Result<Option<Time>> {
    const ID: usize = "data: {\"id\":\"chatcmpl-".len();
    let digits =
        |from: usize| u64::from_str_radix(std::str::from_utf8(event.get(from..from + 16)?).ok()?, 16).ok();
    if digits(ID) != Some(nonce) {
        return Err(broken("an event of another stream"));
    }
    const CONTENT: &[u8] = b"{\"content\":\" ";
    let at = memmem::find(event, CONTENT).and_then(|at| digits(at + CONTENT.len()));
    Ok(at.map(Time::from_nanos))
}
