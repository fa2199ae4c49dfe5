//! A million requests, one in twenty aborted and one in twenty meeting a failing engine; then: is everything back?
//!
//! The loop is closed: as soon as a lane has its answer it asks again, over connections that are kept, replaced, or
//! torn by an abort. Every answer is compared byte by byte. Three counts of how requests ended must agree: of the
//! clients, of `/metrics`, and of the access log. To make that exact, an abort happens while the engine holds the
//! request back, so the balancer cannot have finished it a moment before; only an upload over HTTP/2 that is reset
//! may be gone before the balancer has heard of it.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use fastrand::Rng;
use parking_lot::Mutex;
use plimsoll::clock::{Clock, Time};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::client::{Client, Http2, Way};
use super::engine::{self, Ending, Fleet, Mark, Plan};
use super::proxy::{Holding, Log, Proxy};
use super::verdict::{self, Sort};
use super::{Findings, say, scrape};

const ENGINES: usize = 8;
/// Connections over HTTP/1.1, over HTTP/2 with one request at a time, and over HTTP/2 with [`LANES`].
const HTTP1: usize = 48;
const HTTP2: usize = 8;
const SHARED: usize = 4;
const LANES: usize = 4;
/// Requests of a lane until its shared connection is replaced.
const LANE_REQUESTS: u64 = 500;

/// An exchange that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long everything may take to come to rest: the balancer closes idle connections to engines after 4 s.
const REST: Duration = Duration::from_secs(60);
/// Part of the requests before the first measurement, and between two.
const PARTS: u64 = 10;
/// Requests after which caches and pools are as large as they get.
const WARM_UP: u64 = 100_000;
/// Memory at the end, as a multiple of that after the warm-up.
const GROWTH_MAX: f64 = 1.1;
/// Faults that are printed.
const SHOWN: usize = 5;

/// Prompts begin in so many ways.
const SYSTEM_PROMPTS: u64 = 50;

/// When a client leaves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Uploading,
    Waiting,
    HeldBack,
    Streaming,
    Silent,
}

/// A request, as it was drawn.
struct Draw {
    plan: Plan,
    body: Bytes,
    abort: Option<Stage>,
    rng: Rng,
}

/// The clients.
struct Crowd {
    address: SocketAddr,
    fleet: Arc<Fleet>,
    seed: u64,
    requests: u64,
    next: AtomicU64,
    done: AtomicU64,
    seen: Mutex<Seen>,
}

/// What the clients have seen.
#[derive(Default)]
struct Seen {
    sorts: HashMap<Sort, u64>,
    /// Aborted over HTTP/2 in the middle of the upload.
    reset_uploads: u64,
    /// Aborted while an engine had it.
    abandoned: u64,
    faults: Vec<String>,
}

/// Runs it and says what was found.
pub async fn run(requests: u64, seed: u64, folder: &Path, findings: &mut Findings) -> io::Result<()> {
    say(&format!("\n## soak: {requests} requests, seed {seed}\n"));
    let fleet = Fleet::start(ENGINES, false).await?;
    let proxy = Proxy::start(folder, &upstreams(&fleet)).await?;
    // A few requests first: what is made once, by the first of its kind, is no leak.
    let first = Arc::new(Crowd::new(&proxy, &fleet, seed ^ u64::MAX, 500));
    first.clone().ask().await;
    proxy.rest(REST, |_| fleet.connections() == 0).await?;
    let (before, asked, page) = (proxy.holding()?, fleet.asked(), proxy.page().await?);
    let (abandoned, log) = (fleet.abandoned(), proxy.log());

    let crowd = Arc::new(Crowd::new(&proxy, &fleet, seed, requests));
    let clock = Clock::start();
    let asking = tokio::spawn(crowd.clone().ask());
    let samples = samples(&crowd, &proxy, &before, clock).await?;
    asking.await.map_err(io::Error::other)?;
    let lasted = clock.now().since(Time::ZERO).as_secs_f64();
    let owed = proxy.rest(REST, |now| now.descriptors <= before.descriptors).await?;
    let (after, later, now) = (proxy.holding()?, proxy.page().await?, proxy.log());
    row("at rest", lasted, &after);
    let cpu = proxy.cpu()?;
    say(&format!(
        "\n{requests} requests in {lasted:.0} s, {:.0} per second; {cpu:.0} s of CPU time in the balancer, {:.0} us per \
         request; {} tries at engines",
        requests as f64 / lasted,
        cpu * 1e6 / requests as f64,
        fleet.asked() - asked,
    ));
    let counted = |name: &str| {
        scrape::sum(&later, name, "").unwrap_or(0.0) - scrape::sum(&page, name, "").unwrap_or(0.0)
    };
    say(&format!(
        "retries {}, ejections {}\n",
        counted("plimsoll_retries_total"),
        counted("plimsoll_ejections_total")
    ));
    held(requests, &samples, &before, &after, findings);
    findings.check(owed.is_empty(), format!("every gauge of what is in flight is 0 {owed:?}"));
    let seen = crowd.seen.lock();
    outcomes(&seen, [&page, &later], [&log, &now], findings);
    let freed = fleet.abandoned() - abandoned;
    findings.check(
        freed == seen.abandoned,
        format!(
            "engines lost {freed} connections to aborts, clients left {} requests that engines had",
            seen.abandoned
        ),
    );
    findings.check(now.panics.is_empty(), format!("{} panics in the log {:?}", now.panics.len(), now.panics));
    findings
        .check(seen.faults.is_empty(), format!("{} exchanges were not as they must be", seen.faults.len()));
    seen.faults.iter().take(SHOWN).for_each(|fault| say(&format!("  {fault}")));
    now.others.iter().take(SHOWN).for_each(|line| say(&format!("  log: {line}")));
    Ok(())
}

fn upstreams(fleet: &Fleet) -> String {
    let backends: Vec<_> = fleet.addresses.iter().chain([&fleet.refusing]).map(ToString::to_string).collect();
    // Ejections that come and go, and an address that refuses for a long time before a probe gives it up.
    format!(
        "  sim:\n    engine: vllm\n    models: [m]\n    backends: [{}]\n    max_fails: 5\n    fail_timeout: 500ms\n    \
         slow_start: off\n    probe: {{ interval: 1s, down_after: 100 }}\n",
        backends.join(", ")
    )
}

/// Prints what the balancer holds after each part of the requests; the first row is the warm-up.
async fn samples(crowd: &Crowd, proxy: &Proxy, before: &Holding, clock: Clock) -> io::Result<Vec<Holding>> {
    say("| requests | seconds | RSS KiB | PSS KiB | descriptors | threads |\n|---|---:|---:|---:|---:|---:|");
    row("before", 0.0, before);
    let mut samples = Vec::new();
    for part in 1..=PARTS {
        let due = crowd.requests * part / PARTS;
        while crowd.done.load(Ordering::Relaxed) < due {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let holding = proxy.holding()?;
        row(&due.to_string(), clock.now().since(Time::ZERO).as_secs_f64(), &holding);
        samples.push(holding);
    }
    Ok(samples)
}

fn row(name: &str, seconds: f64, holding: &Holding) {
    let Holding { rss, pss, descriptors, threads } = holding;
    say(&format!("| {name} | {seconds:.0} | {rss} | {pss} | {descriptors} | {threads} |"));
}

/// Judges memory, descriptors and threads.
fn held(requests: u64, samples: &[Holding], before: &Holding, after: &Holding, findings: &mut Findings) {
    let most = samples.iter().chain([after]).map(|holding| holding.rss).max().unwrap_or_default();
    let growth = most as f64 / samples[0].rss as f64;
    let is_warm = requests / PARTS >= WARM_UP;
    let most = format!("the most memory after the warm-up is {growth:.3} times that at its end");
    if is_warm {
        findings.check(growth <= GROWTH_MAX, format!("{most}, at most {GROWTH_MAX}"));
    } else {
        say(&format!("memory is not judged before {WARM_UP} requests: {most}"));
    }
    findings.check(
        after.descriptors == before.descriptors,
        format!("descriptors at rest: {} before, {} after", before.descriptors, after.descriptors),
    );
    findings.check(
        after.threads == before.threads,
        format!("threads: {} before, {} after", before.threads, after.threads),
    );
}

/// Compares how requests ended for the clients, in the metrics and in the access log.
fn outcomes(seen: &Seen, pages: [&String; 2], logs: [&Log; 2], findings: &mut Findings) {
    say("| outcome | clients | /metrics | access log |\n|---|---:|---:|---:|");
    let (mut agree, mut logged) = (true, true);
    for sort in Sort::ALL {
        let (name, labels) = sort.names();
        let metric = |page: &str, label: &str| {
            let label = format!("outcome=\"{label}\"");
            scrape::sum(page, "plimsoll_requests_total", &label).unwrap_or(0.0) as u64
        };
        let line = |log: &Log, label: &&str| log.outcomes.get(*label).copied().unwrap_or(0);
        let clients = seen.sorts.get(&sort).copied().unwrap_or(0);
        let metrics: u64 = labels.iter().map(|label| metric(pages[1], label) - metric(pages[0], label)).sum();
        let lines: u64 = labels.iter().map(|label| line(logs[1], label) - line(logs[0], label)).sum();
        say(&format!("| {name} | {clients} | {metrics} | {lines} |"));
        // Of a stream that is reset at once the balancer need not have heard.
        let unheard = if sort == Sort::Aborted { seen.reset_uploads } else { 0 };
        agree &= (clients - unheard.min(clients)..=clients).contains(&metrics);
        logged &= lines == metrics;
    }
    say("");
    findings.check(
        agree,
        format!(
            "clients and /metrics count the same (but for {} uploads reset over HTTP/2)",
            seen.reset_uploads
        ),
    );
    findings.check(logged, "/metrics and access log count the same");
}

impl Crowd {
    fn new(proxy: &Proxy, fleet: &Arc<Fleet>, seed: u64, requests: u64) -> Self {
        let (next, done, seen) = Default::default();
        Self { address: proxy.address, fleet: fleet.clone(), seed, requests, next, done, seen }
    }

    /// Asks everything.
    async fn ask(self: Arc<Self>) {
        let mut lanes = JoinSet::new();
        for number in 0..HTTP1 + HTTP2 {
            let (crowd, is_http2) = (self.clone(), number >= HTTP1);
            lanes.spawn(async move {
                let ways = if is_http2 { &Way::HTTP2[..] } else { &Way::HTTP1 };
                crowd.lane(None, is_http2, ways, u64::MAX).await;
            });
        }
        for _ in 0..SHARED {
            lanes.spawn(self.clone().shared());
        }
        lanes.join_all().await;
    }

    /// Connections over HTTP/2 with several requests at a time, one after another.
    async fn shared(self: Arc<Self>) {
        while self.next.load(Ordering::Relaxed) < self.requests {
            let connection: Http2 = match Client::connect(self.address, true).await {
                Ok(Client::Two(connection)) => connection,
                Ok(Client::One(_)) => return,
                Err(error) => return self.fault(format!("no connection: {error}")),
            };
            let mut lanes = JoinSet::new();
            for _ in 0..LANES {
                let (crowd, client) = (self.clone(), Client::Two(connection.lane()));
                lanes.spawn(async move {
                    crowd.lane(Some(client), true, &[Way::StreamReset], LANE_REQUESTS).await;
                });
            }
            lanes.join_all().await;
        }
    }

    /// One request after another, until there are no more, or `limit`.
    async fn lane(&self, mut client: Option<Client>, is_http2: bool, ways: &[Way], limit: u64) {
        for _ in 0..limit {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.requests {
                return;
            }
            let mut draw = self.draw(number);
            let way = ways[draw.rng.usize(..ways.len())];
            let kept = client.take().filter(|client| client.is_reusable());
            let exchange = async {
                let client = match kept {
                    Some(client) => client,
                    None => Client::connect(self.address, is_http2).await.map_err(|e| e.to_string())?,
                };
                match draw.abort {
                    None => self.exchange(client, &draw).await,
                    Some(stage) => self.abort(client, &mut draw, stage, way).await,
                }
            };
            match timeout(PATIENCE, exchange).await.unwrap_or_else(|_| Err("it takes too long".to_owned())) {
                Ok((sort, kept)) => {
                    *self.seen.lock().sorts.entry(sort).or_default() += 1;
                    client = kept;
                }
                Err(why) => self.fault(format!("request {number}: {why}")),
            }
            self.done.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn fault(&self, why: String) {
        self.seen.lock().faults.push(why);
    }

    /// The request with this number, from the seed.
    fn draw(&self, number: u64) -> Draw {
        let mut rng = Rng::with_seed(self.seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        let id = self.seed.wrapping_mul(1 << 40).wrapping_add(number);
        let mut plan = Plan {
            id,
            stream: rng.u8(..10) < 7,
            events: rng.u32(1..=6),
            pause_us: 0,
            ending: Ending::Whole,
            tries: 0,
        };
        if rng.u8(..10) == 0 {
            plan.pause_us = 1_000;
        }
        let mut abort = None;
        match rng.u8(..20) {
            0 => {
                use Stage::{HeldBack, Silent, Streaming, Uploading, Waiting};
                let stage = rng.choice([Uploading, Waiting, HeldBack, Streaming, Silent]).unwrap_or(Waiting);
                plan.stream = true;
                plan.pause_us = 1_000;
                // Whichever engine gets it.
                plan.tries = usize::MAX;
                plan.ending = match stage {
                    Uploading => Ending::Whole,
                    Waiting => Ending::Mute,
                    HeldBack => Ending::Silence(0),
                    Streaming => Ending::Endless,
                    Silent => Ending::Silence(plan.events),
                };
                abort = Some(stage);
            }
            1 => {
                plan.tries = if rng.u8(..10) == 0 { 2 } else { 1 };
                let at = rng.usize(..engine::wire(0, &plan, false).bytes.len());
                plan.ending = match rng.u8(..6) {
                    0 => Ending::Status(500),
                    1 => Ending::Status(503),
                    2 if plan.stream => Ending::Error(0),
                    3 => Ending::Close(0),
                    4 => Ending::Close(at),
                    _ => Ending::Reset(at),
                };
            }
            _ => {}
        }
        let body = body(&plan, &mut rng);
        Draw { plan, body, abort, rng }
    }

    async fn exchange(&self, mut client: Client, draw: &Draw) -> Result<(Sort, Option<Client>), String> {
        let reply =
            client.ask(&draw.body).await.map_err(|error| format!("no answer: {error} {:?}", draw.plan))?;
        self.fleet.sightings(draw.plan.id);
        let sort = verdict::judge(&draw.plan, &reply)?;
        // After a cut the balancer closes the connection.
        Ok((sort, Some(client).filter(|_| sort != Sort::Cut)))
    }

    /// Asks, and leaves in this stage. An answer that comes instead is judged like any other.
    async fn abort(
        &self,
        mut client: Client,
        draw: &mut Draw,
        stage: Stage,
        way: Way,
    ) -> Result<(Sort, Option<Client>), String> {
        let explain = |error: io::Error| format!("{error} before it could leave");
        let (id, all) = (draw.plan.id, draw.body.len());
        if stage == Stage::Uploading {
            match &mut client {
                Client::One(client) => client.send_when_told(&draw.body, all / 2).await.map_err(explain)?,
                Client::Two(_) => {
                    client.send(&draw.body, all / 2).await.map_err(explain)?;
                    self.seen.lock().reset_uploads += 1;
                }
            }
            tokio::time::sleep(Duration::from_micros(draw.rng.u64(..5_000))).await;
            return Ok((
                Sort::Aborted,
                client.leave(way).await.map_err(explain)?.filter(|_| way == Way::StreamReset),
            ));
        }
        let mut marks = self.fleet.watch(id);
        client.send(&draw.body, all).await.map_err(explain)?;
        let head = match stage {
            Stage::Waiting | Stage::HeldBack => {
                let until = if stage == Stage::Waiting { Mark::Asked } else { Mark::Silent };
                tokio::select! {
                    head = client.head() => Some(head.map_err(explain)?),
                    () = async { while marks.recv().await.is_some_and(|(mark, _)| mark != until) {} } => None,
                }
            }
            _ => Some(client.head().await.map_err(explain)?),
        };
        match head {
            Some(head) if head.status != 200 => {
                self.fleet.unwatch(id);
                let reply = client.rest(head).await;
                return Ok((verdict::judge(&draw.plan, &reply)?, Some(client)));
            }
            Some(_) => drop(client.part().await.map_err(explain)?),
            None => {}
        }
        tokio::time::sleep(Duration::from_micros(draw.rng.u64(..5_000))).await;
        let kept = client.leave(way).await.map_err(explain)?;
        while let Some((mark, _)) = marks.recv().await {
            if mark == Mark::Gone {
                break;
            }
        }
        self.fleet.unwatch(id);
        self.fleet.sightings(id);
        self.seen.lock().abandoned += 1;
        Ok((Sort::Aborted, kept.filter(|_| way == Way::StreamReset)))
    }
}

/// A chat of some hundred bytes to some thousand, that begins like others.
fn body(plan: &Plan, rng: &mut Rng) -> Bytes {
    let plan_json = serde_json::to_string(plan).unwrap_or_default();
    let system = format!("You are number {:02}. ", rng.u64(..SYSTEM_PROMPTS)).repeat(30);
    let text = format!("{:08x} ", rng.u32(..)).repeat(1 << rng.u32(2..9));
    Bytes::from(format!(
        "{{\"model\":\"m\",\"stream\":{},\"plan\":{plan_json},\"messages\":[{{\"role\":\"system\",\"content\":\"{system}\"}},\
         {{\"role\":\"user\",\"content\":\"{text}\"}}]}}",
        plan.stream
    ))
}
