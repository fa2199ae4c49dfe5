//! Clients that read streams, and look at every event: whose it is, when it was written, and with which others it came.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use memchr::memmem;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::engine;
use super::http::Connection;
use super::load::Tally;
use super::prompt::{Plan, Prompts};

/// What is known of all streams together.
#[derive(Default)]
pub struct Streams {
    /// Streams whose first content has come.
    pub begun: AtomicU64,
    /// Streams that have ended as they should.
    pub ended: AtomicU64,
    /// Events with content, while the tally records.
    pub events: AtomicU64,
    /// In how many reads they came.
    pub reads: AtomicU64,
    /// And in how many chunks.
    pub chunks: AtomicU64,
    /// From an event's writing to its being read, in nanoseconds.
    pub delays: Mutex<Vec<u64>>,
    /// From asking to the first content.
    pub firsts: Mutex<Vec<u64>>,
}

/// What clients need to begin.
#[derive(Clone)]
pub struct Reading {
    /// Where they ask.
    pub addresses: Vec<SocketAddr>,
    /// What they ask.
    pub prompts: Arc<Prompts>,
    /// Events, and their pace.
    pub plan: Plan,
    /// Where they write down what they see.
    pub tally: Arc<Tally>,
    /// And what else.
    pub streams: Arc<Streams>,
}

impl Reading {
    /// Begins `count` streams within `over`.
    pub async fn begin(&self, count: usize, over: Duration) -> JoinSet<()> {
        let mut clients = JoinSet::new();
        let start = self.tally.clock.now();
        for number in 0..count {
            let reading = self.clone();
            clients.spawn(async move {
                if let Err(error) = reading.read(reading.addresses[number % reading.addresses.len()]).await {
                    reading.tally.fail(&error);
                }
            });
            let due = start + over.mul_f64(number as f64 / count as f64);
            let early = due.since(self.tally.clock.now());
            if early > Duration::ZERO {
                tokio::time::sleep(early).await;
            }
        }
        clients
    }

    async fn read(&self, address: SocketAddr) -> io::Result<()> {
        let Self { prompts, tally, streams, .. } = self;
        let mut connection = Connection::new(TcpStream::connect(address).await?)?;
        let plan = Plan { nonce: tally.nonce(), ..self.plan };
        let asked = tally.clock.now();
        connection.write(prompts.request(&plan, true)).await?;
        let head = connection.head(true).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        if head.status() != 200 {
            let body = connection.whole().await?;
            let said = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
            return Err(io::Error::other(format!("status {}: {said}", head.status())));
        }
        let (mut text, mut content, mut last) = (BytesMut::new(), 0, Vec::new());
        loop {
            let (reads, chunks) = (connection.reads, connection.chunks);
            let Some(part) = connection.part().await? else { break };
            let (now, records) = (tally.clock.now(), tally.is_recording());
            text.extend_from_slice(&part);
            let mut events = 0;
            while let Some(end) = memmem::find(&text, b"\n\n") {
                let event = text.split_to(end + 2);
                if &event[..] == engine::DONE {
                    last = event.to_vec();
                    continue;
                }
                let Some(written) = engine::written_at(&event, plan.nonce)? else { continue };
                content += 1;
                events += 1;
                if content == 1 {
                    streams.begun.fetch_add(1, Ordering::Relaxed);
                    streams.firsts.lock().push(now.since(asked).as_nanos() as u64);
                } else if records {
                    streams.delays.lock().push(now.since(written).as_nanos() as u64);
                }
            }
            if records {
                streams.events.fetch_add(events, Ordering::Relaxed);
                streams.reads.fetch_add(connection.reads - reads, Ordering::Relaxed);
                streams.chunks.fetch_add(connection.chunks - chunks, Ordering::Relaxed);
            }
        }
        if content != plan.events || last.is_empty() || !text.is_empty() {
            return Err(io::Error::other(format!("{content} events of {}, or no end", plan.events)));
        }
        streams.ended.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
