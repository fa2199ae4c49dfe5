//! Engines that die at any byte of their answer: nobody gets two answers in one, and no engine works in vain.
//!
//! One request in four meets a failure; that is near what the retry budget allows, so most failures before the first
//! byte are tried elsewhere. Each engine writes down the requests it has read. The rules, for every request:
//!
//! - what the client got is the beginning of what one engine says, and at most our own last event;
//! - at most two engines have read it; none has, if every connection was refused;
//! - once a byte of the first engine's answer has reached the client, no other engine has read it;
//! - with `retry.tries: 1` no second engine reads anything, whatever happens.

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
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::client::Client;
use super::engine::{self, Ending, Fleet, Plan};
use super::proxy::Proxy;
use super::verdict::{self, Sort};
use super::{Findings, say, scrape};

const ENGINES: usize = 6;
const LANES: u64 = 32;
const PATIENCE: Duration = Duration::from_secs(30);
const REST: Duration = Duration::from_secs(20);
const SHOWN: usize = 5;

/// Where and how an engine dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Death {
    BeforeAnything,
    Close,
    Reset,
    InsideEvent,
    InsideChunkSize,
    ErrorEvent,
}

impl Death {
    const ALL: [Self; 6] = [
        Self::BeforeAnything,
        Self::Close,
        Self::Reset,
        Self::InsideEvent,
        Self::InsideChunkSize,
        Self::ErrorEvent,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::BeforeAnything => "closed before the first byte",
            Self::Close => "closed after any byte",
            Self::Reset => "reset after any byte",
            Self::InsideEvent => "closed inside an event",
            Self::InsideChunkSize => "closed inside the size of a chunk",
            Self::ErrorEvent => "an error as an event",
        }
    }

    fn ending(self, plan: &Plan, rng: &mut Rng) -> Ending {
        let wire = engine::wire(0, plan, false);
        // A part that is an event, by the index of its end.
        let event = rng.usize(1..=plan.events as usize);
        match self {
            Self::BeforeAnything => Ending::Close(0),
            Self::Close => Ending::Close(rng.usize(..=wire.bytes.len())),
            Self::Reset => Ending::Reset(rng.usize(..=wire.bytes.len())),
            Self::InsideEvent => Ending::Close(rng.usize(wire.ends[event - 1] + 4..wire.ends[event] - 3)),
            Self::InsideChunkSize => Ending::Close(wire.ends[event - 1] + 1),
            Self::ErrorEvent => Ending::Error(rng.u32(..=plan.events)),
        }
    }
}

/// What came of all requests.
#[derive(Default)]
struct Tally {
    requests: u64,
    by_death: HashMap<Death, HashMap<Sort, u64>>,
    /// Requests by how many engines have read them.
    sightings: [u64; 4],
    /// Those that were tried elsewhere, by what came of it.
    retried: u64,
    faults: Vec<String>,
}

struct Crowd {
    address: SocketAddr,
    fleet: Arc<Fleet>,
    seed: u64,
    /// How often an engine may be asked.
    tries: usize,
    next: AtomicU64,
    failures: u64,
    injected: AtomicU64,
    tally: Mutex<Tally>,
}

/// Runs both halves and says what was found.
pub async fn run(failures: u64, seed: u64, folder: &Path, findings: &mut Findings) -> io::Result<()> {
    for tries in [2, 1] {
        say(&format!("\n## failures: {failures} with `retry.tries: {tries}`, seed {seed}\n"));
        let fleet = Fleet::start(ENGINES, true).await?;
        let proxy = Proxy::start(folder, &upstreams(&fleet, tries)).await?;
        let crowd = Arc::new(Crowd {
            address: proxy.address,
            fleet,
            seed: seed.wrapping_add(tries as u64),
            tries,
            next: AtomicU64::new(0),
            failures,
            injected: AtomicU64::new(0),
            tally: Mutex::default(),
        });
        let mut lanes = JoinSet::new();
        for number in 0..LANES {
            lanes.spawn(crowd.clone().lane(number % 4 == 3));
        }
        lanes.join_all().await;
        let owed = proxy.rest(REST, |_| true).await?;
        let page = proxy.page().await?;
        crowd.report(&page, findings);
        findings.check(owed.is_empty(), format!("every gauge of what is in flight is 0 {owed:?}"));
        let panics = proxy.log().panics;
        findings.check(panics.is_empty(), format!("{} panics in the log {panics:?}", panics.len()));
    }
    Ok(())
}

fn upstreams(fleet: &Fleet, tries: usize) -> String {
    let backends: Vec<_> = fleet.addresses.iter().chain([&fleet.refusing]).map(ToString::to_string).collect();
    // Nobody is ejected for long: what is looked at here is one request at a time.
    format!(
        "  sim:\n    engine: openai\n    policy: round_robin\n    models: [m]\n    backends: [{}]\n    max_fails: 10\n    \
         fail_timeout: 50ms\n    slow_start: off\n    probe: off\n    retry: {{ tries: {tries} }}\n",
        backends.join(", ")
    )
}

impl Crowd {
    /// One request after another, until enough failures have been met.
    async fn lane(self: Arc<Self>, is_http2: bool) {
        let mut client: Option<Client> = None;
        while self.injected.load(Ordering::Relaxed) < self.failures {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let (plan, body, death) = self.draw(number);
            let kept = client.take().filter(Client::is_reusable);
            let exchange = async {
                let mut client = match kept {
                    Some(client) => client,
                    None => Client::connect(self.address, is_http2).await?,
                };
                client.ask(&body).await.map(|reply| (reply, client))
            };
            let judged = match timeout(PATIENCE, exchange).await {
                Err(_) => Err(format!("no end of {plan:?}")),
                Ok(Err(error)) => Err(format!("no answer to {plan:?}: {error}")),
                Ok(Ok((reply, kept))) => verdict::judge(&plan, &reply).map(|sort| {
                    // After a cut the balancer closes the connection.
                    client = Some(kept).filter(|_| sort != Sort::Cut);
                    (sort, reply.head.engine)
                }),
            };
            self.book(&plan, death, judged);
        }
    }

    fn draw(&self, number: u64) -> (Plan, Bytes, Option<Death>) {
        let mut rng = Rng::with_seed(self.seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        let mut plan = Plan {
            id: number,
            stream: rng.u8(..10) < 7,
            events: rng.u32(1..=8),
            // Half of them have time to go out before the engine dies.
            pause_us: rng.u64(..2) * 500,
            ending: Ending::Whole,
            tries: if rng.u8(..5) == 0 { 2 } else { 1 },
        };
        let death = (rng.u8(..4) == 0).then(|| Death::ALL[rng.usize(..Death::ALL.len())]);
        if let Some(death) = death {
            plan.stream |= !matches!(death, Death::BeforeAnything | Death::Close | Death::Reset);
            plan.ending = death.ending(&plan, &mut rng);
        }
        let json = serde_json::to_string(&plan).unwrap_or_default();
        let text = "How deep may she lie? ".repeat(rng.usize(1..200));
        let body = format!(
            "{{\"model\":\"m\",\"stream\":{},\"plan\":{json},\"messages\":[{{\"role\":\"user\",\"content\":\"{text}\"}}]}}",
            plan.stream
        );
        (plan, Bytes::from(body), death)
    }

    /// Holds the answer against what the engines have seen.
    fn book(&self, plan: &Plan, death: Option<Death>, judged: Result<(Sort, Option<usize>), String>) {
        let seen = self.fleet.sightings(plan.id);
        let mut tally = self.tally.lock();
        tally.requests += 1;
        tally.sightings[seen.len().min(3)] += 1;
        tally.retried += u64::from(seen.len() > 1);
        let (sort, engine) = match judged {
            Ok(judged) => judged,
            Err(why) => return tally.faults.push(why),
        };
        if seen.len() > self.tries {
            tally.faults.push(format!("engines {seen:?} have read {plan:?}"));
        }
        if seen.is_empty() && sort != Sort::Unserved {
            tally.faults.push(format!("no engine has read {plan:?}, and yet it came out as {sort:?}"));
        }
        // The answer is from the last engine that was asked, and so from the only one of which a byte went out.
        if engine.is_some() && engine != seen.last().copied() {
            tally.faults.push(format!("engines {seen:?} have read {plan:?}, and {engine:?} has answered"));
        }
        if let Some(death) = death.filter(|_| !seen.is_empty()) {
            let met = seen.len().min(plan.tries) as u64;
            self.injected.fetch_add(met, Ordering::Relaxed);
            *tally.by_death.entry(death).or_default().entry(sort).or_default() += 1;
        } else if death.is_none() && sort != Sort::Whole && sort != Sort::Unserved {
            tally.faults.push(format!("nothing was to happen to {plan:?}, and it came out as {sort:?}"));
        }
    }

    fn report(&self, page: &str, findings: &mut Findings) {
        let tally = self.tally.lock();
        let sorts = [Sort::Whole, Sort::EngineError, Sort::Cut, Sort::Unserved];
        say(
            "| the first engine | requests | whole answer | engine's error | cut | unserved |\n|---|---:|---:|---:|---:|---:|",
        );
        for death in Death::ALL {
            let count =
                |sort| tally.by_death.get(&death).and_then(|sorts| sorts.get(&sort)).copied().unwrap_or(0);
            let counts = sorts.map(count);
            let [whole, error, cut, unserved] = counts;
            let sum: u64 = counts.iter().sum();
            say(&format!("| {} | {sum} | {whole} | {error} | {cut} | {unserved} |", death.name()));
        }
        let [none, one, two, more] = tally.sightings;
        let retries = scrape::sum(page, "plimsoll_retries_total", "").unwrap_or(0.0);
        let connects = scrape::sum(page, "plimsoll_retries_total", "reason=\"connect\"").unwrap_or(0.0);
        let injected = self.injected.load(Ordering::Relaxed);
        say(&format!(
            "\n{} requests met {injected} failures; read by no engine {none}, by one {one}, by two {two}, by more {more}; \
             /metrics: {retries} retries, {connects} of them after a refused connection\n",
            tally.requests
        ));
        findings.check(injected >= self.failures, format!("{injected} failures were met"));
        findings.check(
            more == 0 && (self.tries > 1 || two == 0),
            format!("no request was read by more than {} engines", self.tries),
        );
        findings.check(self.tries == 1 || two > 0, format!("{two} requests were tried on a second engine"));
        findings.check(
            tally.faults.is_empty(),
            format!(
                "{} answers doubled, mixed, or from an engine that should not have been asked",
                tally.faults.len()
            ),
        );
        tally.faults.iter().take(SHOWN).for_each(|fault| say(&format!("  {fault}")));
    }
}
