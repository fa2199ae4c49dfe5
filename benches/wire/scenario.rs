//! What is measured: each scenario on one peer, once.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use plimsoll::clock::Clock;
use tokio::task::JoinSet;

use super::engine::{self, Engines};
use super::load::{self, Tally};
use super::process::{self, DIRECT, PLAIN, Proxy, TLS};
use super::prompt::{Plan, Prompts};
use super::stream::{Reading, Streams};
use super::tls;

/// Connections of a closed loop.
const CLIENTS: usize = 32;
/// Connections over TLS, and requests at a time on each.
const TLS_CLIENTS: [usize; 2] = [4, 8];
/// Of what nginx can do, an open loop asks for so much: those that take five times as long are not overrun by it.
const OPEN_SHARE: f64 = 0.1;
/// Of a stream that is measured, and of one that mostly waits.
const STREAM: Duration = Duration::from_millis(20);
const IDLE: Duration = Duration::from_secs(10);
const STREAMS: usize = 200;
/// Files that are open beside the streams'.
const SPARE_FILES: usize = 300;

/// The shape of a scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A closed loop on kept connections, with prompts of so many bytes.
    Closed(usize),
    /// A fixed rate.
    Open(usize),
    /// A closed loop with a connection for each request.
    Connect,
    /// A closed loop over HTTP/2 and TLS.
    Tls,
    /// Streams at full pace.
    Stream,
    /// So many streams that mostly wait.
    Idle(usize),
    /// How long a start takes.
    Ready,
}

/// A column of a table: its key in results, its heading, and how many decimals are shown.
pub type Column = (&'static str, &'static str, usize);

/// Something to measure.
pub struct Scenario {
    /// What it is asked for by.
    pub name: &'static str,
    /// In a sentence.
    pub what: &'static str,
    /// Its shape.
    pub kind: Kind,
}

const COST: Column = ("cpu_us", "CPU us", 1);
const P50: Column = ("p50_us", "p50 us", 0);
const P99: Column = ("p99_us", "p99 us", 0);
const BUSY: Column = ("proxy_busy", "proxy busy", 2);
const BENCH: Column = ("bench_busy", "bench busy", 2);

/// All of them.
pub const SCENARIOS: [Scenario; 12] = [
    Scenario { name: "chat-1k", what: "1 KB prompts, closed loop", kind: Kind::Closed(1 << 10) },
    Scenario { name: "chat-32k", what: "32 KB prompts, closed loop", kind: Kind::Closed(32 << 10) },
    Scenario { name: "chat-256k", what: "256 KB prompts, closed loop", kind: Kind::Closed(256 << 10) },
    Scenario { name: "open-1k", what: "1 KB prompts, fixed rate", kind: Kind::Open(1 << 10) },
    Scenario { name: "open-32k", what: "32 KB prompts, fixed rate", kind: Kind::Open(32 << 10) },
    Scenario { name: "open-256k", what: "256 KB prompts, fixed rate", kind: Kind::Open(256 << 10) },
    Scenario { name: "stream", what: "200 streams of 50 events/s of 220 B", kind: Kind::Stream },
    Scenario { name: "idle-2k", what: "2,000 streams of an event per 10 s", kind: Kind::Idle(2000) },
    Scenario { name: "idle-10k", what: "10,000 streams of an event per 10 s", kind: Kind::Idle(10_000) },
    Scenario { name: "connect", what: "1 KB prompts, a connection for each", kind: Kind::Connect },
    Scenario { name: "tls", what: "1 KB prompts, HTTP/2 over TLS", kind: Kind::Tls },
    Scenario { name: "ready", what: "from the start to the first answer", kind: Kind::Ready },
];

impl Scenario {
    /// What its table shows; ratios are of the first.
    pub fn columns(&self) -> &'static [Column] {
        match self.kind {
            Kind::Closed(_) | Kind::Connect | Kind::Tls => {
                &[COST, ("rate", "requests/s", 0), P50, P99, BUSY, BENCH]
            }
            Kind::Open(_) => &[
                COST,
                ("added_p50_us", "added p50 us", 0),
                ("added_p99_us", "added p99 us", 0),
                P50,
                P99,
                ("rate", "requests/s", 0),
                BUSY,
                BENCH,
            ],
            Kind::Stream => &[
                ("cpu_us", "CPU us/event", 2),
                ("added_p50_us", "added p50 us", 0),
                ("added_p99_us", "added p99 us", 0),
                ("p50_us", "delay p50 us", 0),
                ("p99_us", "delay p99 us", 0),
                ("ttft_p50_us", "TTFT p50 us", 0),
                ("ttft_p99_us", "TTFT p99 us", 0),
                ("reads", "reads/event", 3),
                ("chunks", "chunks/event", 3),
                BENCH,
            ],
            Kind::Idle(_) => &[
                ("kib", "KiB/stream", 1),
                ("streams", "streams", 0),
                ("idle_mib", "idle MiB", 1),
                ("full_mib", "with streams MiB", 1),
                ("cpu_us", "CPU us/event", 1),
            ],
            Kind::Ready => &[("ready_ms", "ready ms", 1), ("idle_mib", "idle MiB", 1)],
        }
    }

    /// Whether this says anything of engines that are asked without a proxy.
    pub fn knows_direct(&self) -> bool {
        !matches!(self.kind, Kind::Tls | Kind::Idle(_) | Kind::Ready)
    }
}

/// What came of one measurement.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Sample {
    /// Figures by the keys of the columns.
    pub values: BTreeMap<&'static str, f64>,
    /// Answers that were wrong, or none.
    pub errors: u64,
    /// What was wrong first.
    pub first_error: Option<String>,
}

/// What is the same for all measurements of a scenario.
pub struct Setting {
    /// How long each lasts.
    pub time: Duration,
    /// Requests per second of an open loop; found out if absent.
    pub rate: Option<f64>,
    /// All requests that are made.
    pub prompts: Arc<Prompts>,
}

impl Setting {
    /// What `scenario` asks.
    pub fn new(scenario: &Scenario, time: Duration, rate: Option<f64>) -> Self {
        let size = match scenario.kind {
            Kind::Closed(size) | Kind::Open(size) => size,
            _ => 1 << 10,
        };
        Self { time, rate, prompts: Arc::new(Prompts::new(size, 7)) }
    }

    /// The rate at which all peers are asked: a part of what `peer` can do.
    pub async fn find_rate(&mut self, peer: &str) -> io::Result<()> {
        let brief = Self { time: Duration::from_secs(1), rate: None, prompts: self.prompts.clone() };
        let sample = brief.measure(Kind::Closed(0), peer).await?;
        self.rate = sample.values.get("rate").map(|rate| rate * OPEN_SHARE);
        Ok(())
    }

    /// Measures once.
    pub async fn measure(&self, kind: Kind, peer: &str) -> io::Result<Sample> {
        let clock = Clock::start();
        let _engines = Engines::start(clock).await?;
        let with_tls = kind == Kind::Tls;
        let tally = Tally::new(clock);
        let proxy = match peer {
            DIRECT => None,
            _ => Some(Proxy::start(peer, with_tls, &self.prompts, &tally).await?),
        };
        let addresses = match (&proxy, with_tls) {
            (None, _) => engine::addresses(),
            (Some(_), false) => vec![PLAIN],
            (Some(_), true) => vec![TLS],
        };
        let run = Run { setting: self, addresses, proxy, tally };
        let mut sample = match kind {
            Kind::Stream => run.stream().await?,
            Kind::Idle(streams) => run.idle(streams).await?,
            Kind::Ready => run.ready().await?,
            Kind::Open(_) => run.open().await?,
            Kind::Closed(_) => run.closed(true).await?,
            Kind::Connect => run.closed(false).await?,
            Kind::Tls => run.tls().await?,
        };
        sample.errors += run.tally.errors.load(Ordering::Relaxed);
        sample.first_error = sample.first_error.or_else(|| run.tally.first_error.lock().clone());
        Ok(sample)
    }
}

/// One measurement under way.
struct Run<'a> {
    setting: &'a Setting,
    addresses: Vec<SocketAddr>,
    proxy: Option<Proxy>,
    tally: Arc<Tally>,
}

/// What has been used at a moment.
struct Reckoning {
    proxy: Duration,
    bench: Duration,
    at: plimsoll::clock::Time,
    count: u64,
}

impl Run<'_> {
    fn reckon(&self, count: u64) -> io::Result<Reckoning> {
        Ok(Reckoning {
            proxy: self.proxy.as_ref().map_or(Ok(Duration::ZERO), Proxy::cpu)?,
            bench: process::cpu(std::process::id())?,
            at: self.tally.clock.now(),
            count,
        })
    }

    /// What `events` have cost between two reckonings.
    fn cost(&self, before: &Reckoning, after: &Reckoning) -> BTreeMap<&'static str, f64> {
        let time = after.at.since(before.at).as_secs_f64();
        let count = (after.count - before.count) as f64;
        let (proxy, bench) = (after.proxy - before.proxy, after.bench - before.bench);
        BTreeMap::from([
            ("cpu_us", proxy.as_secs_f64() * 1e6 / count.max(1.0)),
            ("rate", count / time),
            ("proxy_busy", proxy.as_secs_f64() / time),
            ("bench_busy", bench.as_secs_f64() / time),
        ])
    }

    /// Lets clients that are at it get warm, then measures what they cost, then ends them.
    async fn loops(&self, mut clients: JoinSet<()>) -> io::Result<Sample> {
        tokio::time::sleep(self.setting.time / 3).await;
        self.tally.is_recording.store(true, Ordering::Relaxed);
        let before = self.reckon(self.tally.done())?;
        tokio::time::sleep(self.setting.time).await;
        let after = self.reckon(self.tally.done())?;
        self.tally.is_recording.store(false, Ordering::Relaxed);
        self.tally.is_over.store(true, Ordering::Relaxed);
        while clients.join_next().await.is_some() {}
        let mut values = self.cost(&before, &after);
        let [p50, p99] = quantiles(&mut self.tally.waits.lock());
        values.extend([("p50_us", p50), ("p99_us", p99)]);
        Ok(Sample { values, ..Sample::default() })
    }

    async fn closed(&self, keeps: bool) -> io::Result<Sample> {
        self.loops(load::closed(&self.addresses, &self.setting.prompts, CLIENTS, keeps, &self.tally)).await
    }

    async fn tls(&self) -> io::Result<Sample> {
        let clients = tls::closed(TLS, &self.setting.prompts, TLS_CLIENTS, &self.tally).await?;
        self.loops(clients).await
    }

    async fn open(&self) -> io::Result<Sample> {
        let rate = self.setting.rate.unwrap_or(1000.0);
        let (prompts, tally) = (self.setting.prompts.clone(), self.tally.clone());
        let asking = tokio::spawn(load::open(self.addresses.clone(), prompts, rate, tally));
        let mut sample = self.loops(JoinSet::new()).await?;
        if !asking.await? {
            sample.errors += 1;
            sample.first_error = Some(format!("cannot answer {rate:.0} requests/s"));
        }
        Ok(sample)
    }

    async fn stream(&self) -> io::Result<Sample> {
        let streams = Arc::<Streams>::default();
        // They begin within a second, are measured for as long as was asked, and have half a second to spare.
        let lasts = self.setting.time + Duration::from_millis(2000);
        let plan =
            Plan { events: (lasts.as_secs_f64() / STREAM.as_secs_f64()) as u64, pace: STREAM, nonce: 0 };
        let reading = self.reading(plan, &streams);
        let mut clients = reading.begin(STREAMS, Duration::from_secs(1)).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        self.tally.is_recording.store(true, Ordering::Relaxed);
        let before = self.reckon(streams.events.load(Ordering::Relaxed))?;
        tokio::time::sleep(self.setting.time).await;
        let after = self.reckon(streams.events.load(Ordering::Relaxed))?;
        self.tally.is_recording.store(false, Ordering::Relaxed);
        while clients.join_next().await.is_some() {}
        let mut values = self.cost(&before, &after);
        let per_event = |count: u64| count as f64 / streams.events.load(Ordering::Relaxed).max(1) as f64;
        let [p50, p99] = quantiles(&mut streams.delays.lock());
        let [ttft_p50, ttft_p99] = quantiles(&mut streams.firsts.lock());
        values.extend([
            ("p50_us", p50),
            ("p99_us", p99),
            ("ttft_p50_us", ttft_p50),
            ("ttft_p99_us", ttft_p99),
            ("reads", per_event(streams.reads.load(Ordering::Relaxed))),
            ("chunks", per_event(streams.chunks.load(Ordering::Relaxed))),
        ]);
        Ok(Sample { values, ..Sample::default() })
    }

    async fn idle(&self, count: usize) -> io::Result<Sample> {
        let Some(proxy) = &self.proxy else { return Ok(Sample::default()) };
        // Each takes two sockets, here and in the proxy.
        let limit = rlimit::Resource::NOFILE.get_soft()? as usize;
        let count = count.min(limit.saturating_sub(SPARE_FILES) / 2);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let idle = proxy.memory()?;
        let streams = Arc::<Streams>::default();
        let reading = self.reading(Plan { events: 1000, pace: IDLE, nonce: 0 }, &streams);
        // Two thousand a second: what a start costs is not what is asked here.
        let _clients = reading.begin(count, Duration::from_secs_f64(count as f64 / 2000.0)).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        self.tally.is_recording.store(true, Ordering::Relaxed);
        let before = self.reckon(streams.events.load(Ordering::Relaxed))?;
        // Long enough for each of them to have had an event.
        tokio::time::sleep(IDLE).await;
        let after = self.reckon(streams.events.load(Ordering::Relaxed))?;
        let full = proxy.memory()?;
        let begun = streams.begun.load(Ordering::Relaxed);
        let mut values = self.cost(&before, &after);
        values.extend([
            ("kib", full.saturating_sub(idle) as f64 / 1024.0 / count as f64),
            ("streams", count as f64),
            ("idle_mib", idle as f64 / f64::from(1 << 20)),
            ("full_mib", full as f64 / f64::from(1 << 20)),
        ]);
        let missing = count as u64 - begun;
        let first_error = (missing > 0).then(|| format!("{missing} streams have not begun"));
        Ok(Sample { values, errors: missing, first_error })
    }

    async fn ready(&self) -> io::Result<Sample> {
        let Some(proxy) = &self.proxy else { return Ok(Sample::default()) };
        tokio::time::sleep(Duration::from_secs(1)).await;
        let memory = proxy.memory()? as f64 / f64::from(1 << 20);
        let ready = proxy.ready_after.as_secs_f64() * 1e3;
        let values = BTreeMap::from([("ready_ms", ready), ("idle_mib", memory)]);
        Ok(Sample { values, ..Sample::default() })
    }

    fn reading(&self, plan: Plan, streams: &Arc<Streams>) -> Reading {
        Reading {
            addresses: self.addresses.clone(),
            prompts: self.setting.prompts.clone(),
            plan,
            tally: self.tally.clone(),
            streams: streams.clone(),
        }
    }
}

/// The median and the 99th percentile, in microseconds; sorts.
fn quantiles(nanos: &mut [u64]) -> [f64; 2] {
    nanos.sort_unstable();
    [0.5, 0.99].map(|share| {
        let at = (nanos.len() as f64 * share) as usize;
        nanos.get(at).map_or(f64::NAN, |&nanos| nanos as f64 / 1000.0)
    })
}
