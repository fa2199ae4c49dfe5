//! An engine that does what a test tells it, byte by byte: the far side of every wire test.
//!
//! A script is a function from a request to an [`Answer`], and an answer is a list of steps: write, wait at a
//! gate, close, reset. While it waits the engine watches its connection, so a test can ask whether the proxy
//! has hung up on it. Health, models and metrics are answered by themselves, since probes and polls would
//! otherwise disturb every script.

use super::http1::{Framing, Head, Wire};
use super::port::Port;
use super::wait_until;
use bytes::Bytes;
use parking_lot::Mutex;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering::SeqCst};
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::{JoinHandle, JoinSet};

/// A request as the engine received it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Which connection of the engine it came on, from 0.
    pub connection: u64,
    /// Which request on that connection, from 0.
    pub nth: u64,
    /// Its request line and headers.
    pub head: Head,
    /// Its whole body, free of any chunk framing.
    pub body: Bytes,
}

/// A place in an answer where the engine waits until the test lets it pass.
#[derive(Clone)]
pub struct Gate {
    passes: Arc<Semaphore>,
    arrived: Arc<AtomicU64>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { passes: Arc::new(Semaphore::new(0)), arrived: Arc::default() }
    }
}

impl Gate {
    /// A closed gate.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets one waiting step pass, now or when it comes.
    pub fn open(&self) {
        self.passes.add_permits(1);
    }

    /// Waits until `times` steps in all have come to the gate.
    pub async fn reached(&self, times: u64) {
        wait_until("an engine at its gate", async || self.arrived.load(SeqCst) >= times).await;
    }

    async fn pass(&self) {
        self.arrived.fetch_add(1, SeqCst);
        self.passes.acquire().await.expect("the gate is never closed").forget();
    }
}

#[derive(Clone)]
enum Step {
    Write(Bytes),
    Wait(Gate),
    Reset,
    Close,
}

/// What an engine does for one request. Without [`Answer::close`] or [`Answer::reset`] the connection lives
/// on.
#[derive(Clone, Default)]
pub struct Answer {
    steps: Vec<Step>,
}

impl Answer {
    /// Closes the connection without a word.
    pub fn nothing() -> Self {
        Self::default().close()
    }

    /// Says nothing until the peer leaves.
    pub fn silence() -> Self {
        Self::default().wait(&Gate::new())
    }

    /// A whole JSON answer with a content-length.
    pub fn json(status: u16, body: &str) -> Self {
        Self::json_with(status, "", body)
    }

    /// A whole JSON answer with further header lines, each ending in CRLF.
    pub fn json_with(status: u16, headers: &str, body: &str) -> Self {
        let length = body.len();
        let own = format!("content-type: application/json\r\ncontent-length: {length}\r\n");
        Self::default().write(format!("HTTP/1.1 {status} Scripted\r\n{own}{headers}\r\n{body}"))
    }

    /// The header of an event stream; the events follow with [`Answer::event`].
    pub fn stream() -> Self {
        Self::default().write(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n",
        )
    }

    /// A whole event stream of the given `data:` values, ending in `[DONE]`.
    pub fn stream_of(events: &[&str]) -> Self {
        events.iter().fold(Self::stream(), |answer, data| answer.event(data)).event("[DONE]").end()
    }

    /// One event as one chunk in one write.
    pub fn event(self, data: &str) -> Self {
        self.chunk(format!("data: {data}\n\n"))
    }

    /// One chunk in one write.
    pub fn chunk(self, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        let mut framed = format!("{:x}\r\n", bytes.len()).into_bytes();
        framed.extend_from_slice(bytes);
        framed.extend_from_slice(b"\r\n");
        self.write(framed)
    }

    /// The end of a chunked body.
    pub fn end(self) -> Self {
        self.write("0\r\n\r\n")
    }

    /// These bytes in one write.
    pub fn write(mut self, bytes: impl Into<Bytes>) -> Self {
        self.steps.push(Step::Write(bytes.into()));
        self
    }

    /// Waits until the test opens the gate.
    pub fn wait(mut self, gate: &Gate) -> Self {
        self.steps.push(Step::Wait(gate.clone()));
        self
    }

    /// The same answer behind a gate.
    pub fn held_at(mut self, gate: &Gate) -> Self {
        self.steps.insert(0, Step::Wait(gate.clone()));
        self
    }

    /// The same with a gate behind its first two writes, the header and the first event of a stream.
    pub fn gated_after_first_event(mut self, gate: &Gate) -> Self {
        self.steps.insert(2, Step::Wait(gate.clone()));
        self
    }

    /// Closes the connection in good order.
    pub fn close(mut self) -> Self {
        self.steps.push(Step::Close);
        self
    }

    /// Resets the connection, as a killed process with unread input does.
    pub fn reset(mut self) -> Self {
        self.steps.push(Step::Reset);
        self
    }
}

type Script = Box<dyn Fn(&Seen) -> Answer + Send + Sync>;

struct State {
    script: Script,
    reads_bodies: bool,
    seen: Mutex<Vec<Seen>>,
    models: Mutex<Vec<String>>,
    page: Mutex<String>,
    health: AtomicU16,
    probes: AtomicU64,
    connections: AtomicU64,
    left: AtomicU64,
    closing: Notify,
}

/// A scripted engine on a port of its own.
pub struct Engine {
    port: Port,
    state: Arc<State>,
    accepting: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// Starts an engine that answers every request by `script`.
    pub fn start(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let engine = Self::dead(script);
        engine.revive();
        engine
    }

    /// An engine that answers as soon as it has the head of a request, and never reads the body.
    pub fn hasty(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let engine = Self::unheard(script, false);
        engine.revive();
        engine
    }

    /// An engine whose port refuses connections until [`Engine::revive`].
    pub fn dead(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        Self::unheard(script, true)
    }

    fn unheard(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static, reads_bodies: bool) -> Self {
        let state = State {
            script: Box::new(script),
            reads_bodies,
            seen: Mutex::default(),
            models: Mutex::new(vec!["tiny".to_owned()]),
            page: Mutex::default(),
            health: AtomicU16::new(200),
            probes: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            left: AtomicU64::new(0),
            closing: Notify::new(),
        };
        Self { port: Port::take(), state: Arc::new(state), accepting: Mutex::new(None) }
    }

    /// An engine that gives every request the same short answer.
    pub fn good() -> Self {
        Self::start(|_| Answer::json(200, r#"{"object":"chat.completion","choices":[]}"#))
    }

    /// Such an engine on the same port of `127.0.0.host`, another address of this machine.
    pub fn beside(&self, host: u8) -> Self {
        let mut engine = Self::dead(|_| Answer::json(200, r#"{"object":"chat.completion","choices":[]}"#));
        engine.port = self.port.beside(host);
        engine.revive();
        engine
    }

    /// An engine that sends the events of `texts` as a stream of content deltas.
    pub fn streaming(texts: &'static [&'static str]) -> Self {
        Self::start(move |_| {
            let events: Vec<String> = texts.iter().map(|text| delta(text)).collect();
            Answer::stream_of(&events.iter().map(String::as_str).collect::<Vec<_>>())
        })
    }

    /// Where it is, as a backend address of the configuration and as in the `backend` label of the metrics.
    pub fn address(&self) -> String {
        self.port.address().to_string()
    }

    /// The same for a client that speaks to it directly.
    pub fn socket(&self) -> SocketAddr {
        self.port.address()
    }

    /// Starts to listen (again) on its port.
    pub fn revive(&self) {
        let accept = accept(self.port.listen(), self.state.clone());
        *self.accepting.lock() = Some(tokio::spawn(accept));
    }

    /// Dies as by `kill -9`: every connection is cut, the port refuses.
    pub async fn kill(&self) {
        let accepting = self.accepting.lock().take();
        if let Some(accepting) = accepting {
            accepting.abort();
            let _cancelled = accepting.await;
        }
    }

    /// Stops listening, as an engine that has been told to stop: the port refuses, and what it has goes on.
    pub fn close_port(&self) {
        self.state.closing.notify_one();
    }

    /// What `GET /health` answers from now on.
    pub fn set_health(&self, status: u16) {
        self.state.health.store(status, SeqCst);
    }

    /// How often `GET /health` was asked.
    pub fn probes(&self) -> u64 {
        self.state.probes.load(SeqCst)
    }

    /// Waits until `count` more probes have been answered, all with what health is now.
    pub async fn probed(&self, count: u64) {
        let enough = self.probes() + count;
        wait_until("a probe", async || self.probes() >= enough).await;
    }

    /// What `GET /v1/models` lists from now on.
    pub fn set_models(&self, models: &[&str]) {
        *self.state.models.lock() = models.iter().map(|&model| model.to_owned()).collect();
    }

    /// What vLLM's metrics page says from now on.
    pub fn set_readings(&self, running: u64, waiting: u64, kv_usage: f64) {
        *self.state.page.lock() = format!(
            "vllm:num_requests_running {running}\nvllm:num_requests_waiting {waiting}\n\
             vllm:kv_cache_usage_perc {kv_usage}\n"
        );
    }

    /// Every request that went to the script so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().clone()
    }

    /// How many those are.
    pub fn count(&self) -> usize {
        self.state.seen.lock().len()
    }

    /// Forgets what was seen.
    pub fn forget(&self) {
        self.state.seen.lock().clear();
    }

    /// Waits until the script has been given `count` requests.
    pub async fn received(&self, count: usize) {
        wait_until("a request at the engine", async || self.count() >= count).await;
    }

    /// Waits until the proxy has closed `count` connections in the middle of an answer.
    pub async fn abandoned(&self, count: u64) {
        wait_until("the engine's connection to be closed", async || self.state.left.load(SeqCst) >= count)
            .await;
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(accepting) = self.accepting.lock().take() {
            accepting.abort();
        }
    }
}

/// The addresses of `engines` for [`super::one_upstream`].
pub fn addresses(engines: &[&Engine]) -> Vec<String> {
    engines.iter().map(|engine| engine.address()).collect()
}

/// A chat completion chunk with this content.
pub fn delta(text: &str) -> String {
    let choice = format!(r#"{{"index":0,"delta":{{"content":"{text}"}}}}"#);
    format!(r#"{{"id":"c","object":"chat.completion.chunk","model":"tiny","choices":[{choice}]}}"#)
}

/// The usage event that ends a stream asked for with `include_usage`.
pub fn usage(prompt: u64, completion: u64, cached: u64) -> String {
    let counted = format!(r#""prompt_tokens":{prompt},"completion_tokens":{completion}"#);
    let details = format!(r#""prompt_tokens_details":{{"cached_tokens":{cached}}}"#);
    format!(r#"{{"choices":[],"usage":{{{counted},{details}}}}}"#)
}

async fn accept(listener: TcpListener, state: Arc<State>) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(_) => break,
            },
            () = state.closing.notified() => break,
        };
        let number = state.connections.fetch_add(1, SeqCst);
        connections.spawn(serve(stream, number, state.clone()));
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn serve(stream: TcpStream, connection: u64, state: Arc<State>) {
    let _no_delay = stream.set_nodelay(true);
    let (reader, mut writer) = tokio::io::split(stream);
    let mut wire = Wire::new(reader);
    let mut nth = 0;
    while let Ok(Some(head)) = wire.head().await {
        let Ok(framing) = head.request_framing() else { return };
        let framing = if state.reads_bodies { framing } else { Framing::Length(0) };
        let Ok(body) = wire.body(framing).await else { return };
        let answer = match housekeeping(&state, &head) {
            Some(answer) => answer,
            None => {
                let seen = Seen { connection, nth, head, body };
                nth += 1;
                state.seen.lock().push(seen.clone());
                (state.script)(&seen)
            }
        };
        match play(answer, &mut wire, &mut writer).await {
            Ok(After::Next) => {}
            Ok(After::Close) => return,
            Ok(After::Reset) => {
                let stream = wire.into_inner().unsplit(writer);
                let _reset = stream.set_zero_linger();
                return;
            }
            Err(_) => {
                state.left.fetch_add(1, SeqCst);
                return;
            }
        }
    }
}

enum After {
    Next,
    Close,
    Reset,
}

/// Goes through the steps; an error is a peer that left before the last one.
async fn play(
    answer: Answer,
    wire: &mut Wire<ReadHalf<TcpStream>>,
    writer: &mut WriteHalf<TcpStream>,
) -> io::Result<After> {
    for step in answer.steps {
        match step {
            Step::Write(bytes) => writer.write_all(&bytes).await?,
            Step::Wait(gate) => tokio::select! {
                () = gate.pass() => {}
                left = until_closed(wire) => return left.map(|()| After::Close),
            },
            Step::Close => return Ok(After::Close),
            Step::Reset => return Ok(After::Reset),
        }
    }
    Ok(After::Next)
}

async fn until_closed(wire: &mut Wire<ReadHalf<TcpStream>>) -> io::Result<()> {
    while wire.fill().await? {}
    Err(io::ErrorKind::ConnectionAborted.into())
}

fn housekeeping(state: &State, head: &Head) -> Option<Answer> {
    if head.method() != "GET" {
        return None;
    }
    match head.path() {
        "/health" => {
            state.probes.fetch_add(1, SeqCst);
            Some(Answer::json(state.health.load(SeqCst), ""))
        }
        "/metrics" => Some(Answer::json_with(200, "", &state.page.lock())),
        "/v1/models" => {
            let models = state.models.lock();
            let list =
                models.iter().map(|id| format!(r#"{{"id":"{id}","object":"model"}}"#)).collect::<Vec<_>>();
            Some(Answer::json(200, &format!(r#"{{"object":"list","data":[{}]}}"#, list.join(","))))
        }
        _ => None,
    }
}
