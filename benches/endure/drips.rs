//! Clients that send a byte of their head per second, by the thousand, and what everybody else feels of them.
//!
//! Ordinary requests come at a steady rate, each on a connection of its own, first without the drips and then with
//! them, three times over: what the rest of the machine does in a minute touches both alike. A drip has ended when
//! its client reads the answer or the end of the connection.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use plimsoll::clock::{Clock, Time};
use plimsoll::sim::report::Samples;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::client::Client;
use super::engine::{Ending, Fleet, Plan};
use super::proxy::Proxy;
use super::verdict::{self, Sort};
use super::{Findings, say};

/// The default of `limits.header_timeout`, and how exactly it is kept.
const DEADLINE: Duration = Duration::from_secs(10);
const EXACTLY: Duration = Duration::from_secs(1);
/// Between two bytes of a drip.
const DRIP: Duration = Duration::from_secs(1);
/// Between two ordinary requests.
const PACE: Duration = Duration::from_millis(5);
/// How long ordinary requests are timed without the drips, and with them, before they end.
const WINDOW: Duration = Duration::from_secs(8);
/// What a drip may cost.
const KIB_MAX: f64 = 64.0;
/// p99 with the drips, as a multiple of that without.
const SLOWER_MAX: f64 = 2.0;
const REPEATS: u32 = 3;
const REST: Duration = Duration::from_secs(30);

/// Runs it and says what was found.
pub async fn run(clients: usize, folder: &Path, findings: &mut Findings) -> io::Result<()> {
    say(&format!("\n## drips: {clients} clients, a byte each {} s\n", DRIP.as_secs()));
    let fleet = Fleet::start(2, false).await?;
    let backends: Vec<_> = fleet.addresses.iter().map(ToString::to_string).collect();
    let upstream = format!(
        "  sim:\n    engine: openai\n    models: [m]\n    probe: off\n    backends: [{}]\n",
        backends.join(", ")
    );
    let proxy = Proxy::start(folder, &upstream).await?;
    // What the first requests make once is not the drips'.
    ordinary(proxy.address, WINDOW / 2).await?;
    say(
        "| | p50 ms without | with | p99 ms without | with | first ended s | last s | answered 408 | PSS KiB each |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|---:|",
    );
    let (mut without, mut with, mut ended) = (Samples::default(), Samples::default(), Samples::default());
    let (mut costs, mut answered) = (Vec::new(), 0);
    for repeat in 1..=REPEATS {
        let quiet = ordinary(proxy.address, WINDOW).await?;
        let before = proxy.holding()?;
        let drips = Drips::start(proxy.address, clients).await?;
        let loud = ordinary(proxy.address, WINDOW).await?;
        let held = proxy.holding()?;
        let (ends, refusals) = drips.end().await?;
        let cost = (held.pss.saturating_sub(before.pss)) as f64 / clients as f64;
        let ms = |samples: &Samples| {
            samples
                .quantiles([0.5, 0.99])
                .map_or([f64::NAN; 2], |times| times.map(|time| time.as_secs_f64() * 1e3))
        };
        let ([p50, p99], [p50_with, p99_with]) = (ms(&quiet), ms(&loud));
        let [first, last] = ends.quantiles([0.0, 1.0]).unwrap_or_default().map(|time| time.as_secs_f64());
        say(&format!(
            "| {repeat} | {p50:.2} | {p50_with:.2} | {p99:.2} | {p99_with:.2} | {first:.2} | {last:.2} | {refusals} | {cost:.1} |"
        ));
        without.merge(&quiet);
        with.merge(&loud);
        ended.merge(&ends);
        costs.push(cost);
        answered += refusals;
        proxy.rest(REST, |holding| holding.descriptors <= before.descriptors).await?;
    }
    say("");
    let p99 = |samples: &Samples| samples.quantiles([0.99]).map_or(f64::NAN, |[p99]| p99.as_secs_f64());
    let slower = p99(&with) / p99(&without);
    let worst = costs.into_iter().fold(0.0, f64::max);
    let [first, last] = ended.quantiles([0.0, 1.0]).unwrap_or_default();
    let expected = clients * REPEATS as usize;
    let in_time = first + EXACTLY >= DEADLINE && last <= DEADLINE + EXACTLY;
    findings.check(
        in_time && ended.len() == expected,
        format!("{} of {expected} ended at {} s +- {} s", ended.len(), DEADLINE.as_secs(), EXACTLY.as_secs()),
    );
    findings.check(answered == expected, format!("{answered} of them were told 408"));
    findings.check(
        slower < SLOWER_MAX,
        format!("p99 of ordinary requests is {slower:.2} times that without drips, below {SLOWER_MAX}"),
    );
    findings.check(worst < KIB_MAX, format!("a drip costs {worst:.1} KiB at most, below {KIB_MAX}"));
    let panics = proxy.log().panics;
    findings.check(panics.is_empty(), format!("{} panics in the log {panics:?}", panics.len()));
    Ok(())
}

/// Ordinary requests at a steady rate; how long each took, from the moment at which it was due.
async fn ordinary(address: SocketAddr, length: Duration) -> io::Result<Samples> {
    let (clock, mut asking, mut samples) = (Clock::start(), JoinSet::new(), Samples::default());
    let elapsed = move || clock.now().since(Time::ZERO);
    for number in 0.. {
        let due = PACE * number;
        if due >= length {
            break;
        }
        tokio::time::sleep(due.saturating_sub(elapsed())).await;
        let plan = Plan {
            id: u64::from(number),
            stream: true,
            events: 3,
            pause_us: 0,
            ending: Ending::Whole,
            tries: 0,
        };
        asking.spawn(async move {
            let json = serde_json::to_string(&plan)?;
            let body = Bytes::from(format!(
                "{{\"model\":\"m\",\"stream\":true,\"plan\":{json},\"messages\":[{{\"role\":\"user\",\"content\":\"hi\"}}]}}"
            ));
            let reply = Client::connect(address, false).await?.ask(&body).await?;
            match verdict::judge(&plan, &reply) {
                Ok(Sort::Whole) => Ok(elapsed().saturating_sub(due)),
                other => Err(io::Error::other(format!("an ordinary request came out as {other:?}"))),
            }
        });
    }
    for time in asking.join_all().await {
        samples.push(time?);
    }
    Ok(samples)
}

/// All drips, under way.
struct Drips(JoinSet<io::Result<(Duration, bool)>>);

impl Drips {
    /// Connects them all, one after another.
    async fn start(address: SocketAddr, clients: usize) -> io::Result<Self> {
        let mut drips = JoinSet::new();
        let head: Arc<[u8]> = Arc::from(&b"POST /v1/chat/completions HTTP/1.1\r\nhost: endure\r\n"[..]);
        for _ in 0..clients {
            let stream = TcpStream::connect(address).await?;
            drips.spawn(drip(stream, head.clone()));
        }
        Ok(Self(drips))
    }

    /// Waits for their ends: when each came, and how many were told why.
    async fn end(self) -> io::Result<(Samples, usize)> {
        let (mut samples, mut answered) = (Samples::default(), 0);
        for end in self.0.join_all().await {
            let (time, is_answered) = end?;
            samples.push(time);
            answered += usize::from(is_answered);
        }
        Ok((samples, answered))
    }
}

/// A byte per second until somebody has had enough; when that was, and whether it was said.
async fn drip(mut stream: TcpStream, head: Arc<[u8]>) -> io::Result<(Duration, bool)> {
    let clock = Clock::start();
    stream.set_nodelay(true)?;
    let mut answer = [0; 12];
    for byte in head.iter().cycle() {
        stream.write_all(&[*byte]).await?;
        if let Ok(read) = timeout(DRIP, stream.read_exact(&mut answer)).await {
            return Ok((clock.now().since(Time::ZERO), read.is_ok() && answer == *b"HTTP/1.1 408"));
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}
