//! Engines that do what the request tells them: answer, hold back, fall silent, or die at a certain byte.
//!
//! Each request carries its [`Plan`] in its body, which the balancer passes on untouched. So the client that drew a
//! fault knows which one, and an answer is a function of engine and plan: whoever reads one can say which engine it
//! is from and whether a byte of it is wrong. What the engines cannot know from a plan they write down: which of
//! them has seen which request, and when its connection went away. They are quick, because `sim::replica` in real
//! time would need days for a million requests.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use memchr::memmem;
use parking_lot::Mutex;
use plimsoll::clock::{Clock, Time};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};

/// What an engine says of itself.
const METRICS: &str =
    "vllm:num_requests_waiting 0\nvllm:num_requests_running 1\nvllm:kv_cache_usage_perc 0.1\n";

/// What a request asks of the engine that gets it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// No other request has it.
    pub id: u64,
    /// Events, or one JSON document.
    pub stream: bool,
    /// Events with content, or as many words.
    pub events: u32,
    /// Between two events; 0 only lets others run.
    pub pause_us: u64,
    /// How the answer ends.
    pub ending: Ending,
    /// How many tries meet that ending; those after them get a whole answer.
    pub tries: usize,
}

/// How an answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// As it should.
    Whole,
    /// Instead of an answer there is this status.
    Status(u16),
    /// The connection is closed after so many bytes of the answer, its header included.
    Close(usize),
    /// The connection is reset after so many bytes.
    Reset(usize),
    /// After so many events there is one that says that the engine died.
    Error(u32),
    /// The request is read, and never answered.
    Mute,
    /// Header and so many events, then nothing more until the other side goes.
    Silence(u32),
    /// Events until the other side goes.
    Endless,
}

/// The bytes of an answer, and where its parts end: the header, each chunk, the end.
pub struct Wire {
    /// Everything, as it goes to the socket.
    pub bytes: Vec<u8>,
    /// The end of each part.
    pub ends: Vec<usize>,
}

/// The answer of `engine`, without HTTP's header and chunks. `fails`: this try meets the plan's ending.
pub fn answer(engine: usize, plan: &Plan, fails: bool) -> Vec<u8> {
    parts(engine, plan, fails).concat().into_bytes()
}

fn parts(engine: usize, plan: &Plan, fails: bool) -> Vec<String> {
    let Plan { id, events, .. } = plan;
    let usage = format!("\"usage\":{{\"prompt_tokens\":9,\"completion_tokens\":{events}}}");
    if !plan.stream {
        let words = format!("e{engine} r{id} ").repeat(*events as usize);
        return vec![format!("{{\"choices\":[{{\"message\":{{\"content\":\"{words}\"}}}}],{usage}}}")];
    }
    let event =
        |n| format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"e{engine} r{id} t{n} \"}}}}]}}\n\n");
    if let (true, Ending::Error(after)) = (fails, plan.ending) {
        let died = format!("data: {{\"error\":{{\"message\":\"e{engine} r{id} died\",\"code\":500}}}}\n\n");
        return (0..after.min(*events)).map(event).chain([died]).collect();
    }
    let last = [format!("data: {{\"choices\":[],{usage}}}\n\n"), "data: [DONE]\n\n".to_owned()];
    (0..*events).map(event).chain(last).collect()
}

/// The same as it is sent.
pub fn wire(engine: usize, plan: &Plan, fails: bool) -> Wire {
    let parts = parts(engine, plan, fails);
    let head = if plan.stream {
        "content-type: text/event-stream\r\ntransfer-encoding: chunked".to_owned()
    } else {
        format!("content-type: application/json\r\ncontent-length: {}", parts[0].len())
    };
    let mut wire = Wire { bytes: Vec::with_capacity(1024), ends: Vec::new() };
    let add = |wire: &mut Wire, part: String| {
        wire.bytes.extend_from_slice(part.as_bytes());
        wire.ends.push(wire.bytes.len());
    };
    add(&mut wire, format!("HTTP/1.1 200 OK\r\n{head}\r\nx-engine: {engine}\r\n\r\n"));
    if plan.stream {
        parts.into_iter().for_each(|part| add(&mut wire, format!("{:x}\r\n{part}\r\n", part.len())));
        add(&mut wire, "0\r\n\r\n".to_owned());
    } else {
        parts.into_iter().for_each(|part| add(&mut wire, part));
    }
    wire
}

/// What an engine tells of a request while it has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// It has been read.
    Asked,
    /// All is sent that will be: now there is silence.
    Silent,
    /// The connection has ended, or was reset.
    Gone,
}

/// All engines, and what they have written down.
pub struct Fleet {
    /// Where they listen, by their number.
    pub addresses: Vec<SocketAddr>,
    /// An address that refuses every connection.
    pub refusing: SocketAddr,
    /// By which [`Mark`]s are timed.
    pub clock: Clock,
    records_all: bool,
    seen: Mutex<HashMap<u64, Vec<usize>>>,
    watched: Mutex<HashMap<u64, UnboundedSender<(Mark, Time)>>>,
    asked: AtomicU64,
    abandoned: AtomicU64,
    connections: AtomicUsize,
    /// Kept bound and never listened on.
    _refusing: TcpSocket,
}

impl Fleet {
    /// Starts `count` engines. Only `records_all` keeps those requests in mind that have a whole answer.
    pub async fn start(count: usize, records_all: bool) -> io::Result<Arc<Self>> {
        let mut listeners = Vec::new();
        for _ in 0..count {
            listeners.push(TcpListener::bind("127.0.0.1:0").await?);
        }
        let addresses = listeners.iter().map(TcpListener::local_addr).collect::<io::Result<_>>()?;
        let closed = TcpSocket::new_v4()?;
        closed.bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        let fleet = Arc::new(Self {
            addresses,
            refusing: closed.local_addr()?,
            clock: Clock::start(),
            records_all,
            seen: Mutex::default(),
            watched: Mutex::default(),
            asked: AtomicU64::new(0),
            abandoned: AtomicU64::new(0),
            connections: AtomicUsize::new(0),
            _refusing: closed,
        });
        for (number, listener) in listeners.into_iter().enumerate() {
            tokio::spawn(listen(number, listener, fleet.clone()));
        }
        Ok(fleet)
    }

    /// Which engines have read the request, in order, and forgets it.
    pub fn sightings(&self, id: u64) -> Vec<usize> {
        self.seen.lock().remove(&id).unwrap_or_default()
    }

    /// What is told of the request from now on.
    pub fn watch(&self, id: u64) -> UnboundedReceiver<(Mark, Time)> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.watched.lock().insert(id, sender);
        receiver
    }

    /// Ends what [`Fleet::watch`] began.
    pub fn unwatch(&self, id: u64) {
        self.watched.lock().remove(&id);
    }

    /// Requests read by engines.
    pub fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// Requests that were held until their connection went away.
    pub fn abandoned(&self) -> u64 {
        self.abandoned.load(Ordering::Relaxed)
    }

    /// Connections that are open now.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    fn tell(&self, id: u64, mark: Mark) {
        let now = self.clock.now();
        if let Some(watcher) = self.watched.lock().get(&id) {
            // Whoever has heard enough listens no more.
            let _ = watcher.send((mark, now));
        }
    }

    /// Writes down that `engine` has the request; how many tries there were before.
    fn see(&self, engine: usize, plan: &Plan) -> usize {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.tell(plan.id, Mark::Asked);
        if !self.records_all && plan.ending == Ending::Whole {
            return 0;
        }
        let mut seen = self.seen.lock();
        let tries = seen.entry(plan.id).or_default();
        tries.push(engine);
        tries.len() - 1
    }
}

async fn listen(number: usize, listener: TcpListener, fleet: Arc<Fleet>) {
    while let Ok((stream, _)) = listener.accept().await {
        let fleet = fleet.clone();
        tokio::spawn(async move {
            fleet.connections.fetch_add(1, Ordering::Relaxed);
            let _ended = serve(number, stream, &fleet).await;
            fleet.connections.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// How an exchange ended, for the connection.
enum After {
    Next,
    Close,
    Reset,
    Gone,
}

/// The part of a request's body that an engine reads.
#[derive(Deserialize)]
struct Asked {
    plan: Plan,
}

async fn serve(number: usize, mut stream: TcpStream, fleet: &Fleet) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = BytesMut::new();
    loop {
        let (mut reader, mut writer) = stream.split();
        let Some((head, body)) = request(&mut reader, &mut buffer).await? else { return Ok(()) };
        if body.is_empty() {
            let page = if head.starts_with(b"GET /metrics ") { METRICS } else { "" };
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{page}", page.len());
            writer.write_all(answer.as_bytes()).await?;
            continue;
        }
        let plan = serde_json::from_slice::<Asked>(&body)?.plan;
        let fails = fleet.see(number, &plan) < plan.tries;
        let after = tokio::select! {
            biased;
            () = gone(&mut reader, &mut buffer) => After::Gone,
            after = play(number, &plan, fails, &mut writer, fleet) => after,
        };
        match after {
            After::Next => {}
            After::Close => return Ok(()),
            After::Reset => return stream.set_zero_linger(),
            After::Gone => {
                fleet.tell(plan.id, Mark::Gone);
                let is_held = matches!(plan.ending, Ending::Mute | Ending::Silence(_) | Ending::Endless);
                fleet.abandoned.fetch_add(u64::from(is_held), Ordering::Relaxed);
                return Ok(());
            }
        }
    }
}

/// Resolves when the balancer ends or resets the connection. What it says before, once it has read the last byte of
/// an answer, is its next request.
async fn gone(reader: &mut ReadHalf<'_>, buffer: &mut BytesMut) {
    while matches!(reader.read_buf(buffer).await, Ok(1..)) {}
}

/// Goes through the plan. An error of a write is found out by [`gone`] as well, and told there.
async fn play(number: usize, plan: &Plan, fails: bool, writer: &mut WriteHalf<'_>, fleet: &Fleet) -> After {
    let ending = if fails { plan.ending } else { Ending::Whole };
    match perform(number, plan, ending, writer, fleet).await {
        Ok(after) => after,
        Err(_) => std::future::pending().await,
    }
}

async fn perform(
    number: usize,
    plan: &Plan,
    ending: Ending,
    writer: &mut WriteHalf<'_>,
    fleet: &Fleet,
) -> io::Result<After> {
    let pause = Duration::from_micros(plan.pause_us);
    if let Ending::Status(status) = ending {
        let body = format!("{{\"error\":{{\"message\":\"e{number} has no time\",\"code\":{status}}}}}");
        let head = format!(
            "HTTP/1.1 {status} No\r\nretry-after: 0\r\nx-engine: {number}\r\ncontent-length: {}",
            body.len()
        );
        writer.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).await?;
        return Ok(After::Next);
    }
    let wire = wire(number, plan, ending != Ending::Whole);
    let (upto, after) = match ending {
        Ending::Close(at) => (at, After::Close),
        Ending::Reset(at) => (at, After::Reset),
        Ending::Mute => (0, After::Gone),
        Ending::Silence(events) => (wire.ends[events as usize], After::Gone),
        Ending::Endless => (wire.ends[1], After::Gone),
        _ => (wire.bytes.len(), After::Next),
    };
    let mut sent = 0;
    for end in wire.ends.iter().map(|end| *end.min(&upto)) {
        if sent == end {
            continue;
        }
        writer.write_all(&wire.bytes[sent..end]).await?;
        sent = end;
        rest(pause).await;
    }
    if ending == Ending::Endless {
        loop {
            writer.write_all(&wire.bytes[wire.ends[0]..wire.ends[1]]).await?;
            rest(pause).await;
        }
    }
    if matches!(after, After::Gone) {
        fleet.tell(plan.id, Mark::Silent);
        std::future::pending::<()>().await;
    }
    Ok(after)
}

async fn rest(pause: Duration) {
    if pause.is_zero() {
        tokio::task::yield_now().await;
    } else {
        tokio::time::sleep(pause).await;
    }
}

/// Head and body of the next request, which says its length if it has a body; nothing at the end of the connection.
async fn request(
    reader: &mut ReadHalf<'_>,
    buffer: &mut BytesMut,
) -> io::Result<Option<(BytesMut, BytesMut)>> {
    let head = loop {
        if let Some(end) = memmem::find(buffer, b"\r\n\r\n") {
            break buffer.split_to(end + 4);
        }
        if reader.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    };
    let length = length(&head).unwrap_or(0);
    while buffer.len() < length {
        if reader.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
    Ok(Some((head, buffer.split_to(length))))
}

fn length(head: &[u8]) -> Option<usize> {
    let lines = std::str::from_utf8(head).ok()?.lines();
    let mut headers = lines.filter_map(|line| line.split_once(':'));
    let (_, value) = headers.find(|(name, _)| name.eq_ignore_ascii_case("content-length"))?;
    value.trim().parse().ok()
}
