//! How soon an engine is free again when its client has gone, in every stage of a request and every way to leave.
//!
//! From the moment just before the client closes to the moment at which the engine's socket reads the end or the
//! reset, both on this machine's clock. A request that waits in the queue has no engine yet: free means that it
//! leaves the queue and is never sent on. One that is being uploaded has none either: free means that the memory of
//! its body is given back. Both are read from `/metrics`, so these figures are too large by up to the time between
//! two readings, about a millisecond.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fastrand::Rng;
use plimsoll::clock::Time;
use plimsoll::sim::report::Samples;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::timeout;

use super::client::{Client, Way};
use super::engine::{Ending, Fleet, Mark, Plan};
use super::proxy::Proxy;
use super::{Findings, say, scrape};

/// What is promised, at p99.
const FREE_WITHIN: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(5);
const REST: Duration = Duration::from_secs(20);
/// Of an upload, and of that the part that is sent.
const UPLOAD: usize = 256 << 10;

const QUEUED: &str = "plimsoll_queued_requests";
const BUFFERED: &str = "plimsoll_buffered_body_bytes";

/// How far a request has got when its client leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Queued,
    Uploading,
    Waiting,
    HeldBack,
    Streaming,
    Silent,
}

impl Stage {
    const ALL: [Self; 6] =
        [Self::Queued, Self::Uploading, Self::Waiting, Self::HeldBack, Self::Streaming, Self::Silent];

    const fn name(self) -> &'static str {
        match self {
            Self::Queued => "in the queue",
            Self::Uploading => "uploading",
            Self::Waiting => "waiting for the header",
            Self::HeldBack => "header held back, no event yet",
            Self::Streaming => "streaming",
            Self::Silent => "silence within the stream",
        }
    }

    const fn seen_at(self) -> &'static str {
        match self {
            Self::Queued => "queue, /metrics",
            Self::Uploading => "body's memory, /metrics",
            _ => "engine's socket",
        }
    }

    const fn ending(self) -> Ending {
        match self {
            Self::Queued | Self::Uploading => Ending::Whole,
            Self::Waiting => Ending::Mute,
            Self::HeldBack => Ending::Silence(0),
            Self::Streaming => Ending::Endless,
            Self::Silent => Ending::Silence(2),
        }
    }
}

struct Scene {
    fleet: Arc<Fleet>,
    proxy: Proxy,
    next: u64,
    rng: Rng,
}

/// Measures every stage and way and says what was found.
pub async fn run(samples: usize, folder: &Path, findings: &mut Findings) -> io::Result<()> {
    say(&format!("\n## aborts: {samples} of each kind\n"));
    let fleet = Fleet::start(2, true).await?;
    let upstream = |name, engine: usize, more| {
        let backend = fleet.addresses[engine];
        format!(
            "  {name}:\n    engine: openai\n    models: [{name}]\n    backends: [{backend}]\n    probe: off\n{more}"
        )
    };
    let narrow = upstream("narrow", 1, "    max_requests: 1\n");
    let proxy = Proxy::start(folder, &(upstream("wide", 0, "") + &narrow)).await?;
    let mut scene = Scene { fleet, proxy, next: 0, rng: Rng::with_seed(1) };
    say("| stage | way | seen at | p50 ms | p99 ms | max ms | never |\n|---|---|---|---:|---:|---:|---:|");
    let mut slow = Vec::new();
    for stage in Stage::ALL {
        for way in Way::HTTP1.into_iter().chain(Way::HTTP2) {
            let (times, never) = scene.measure(stage, way, samples).await?;
            let [p50, p99, max] = times.quantiles([0.5, 0.99, 1.0]).unwrap_or([Duration::MAX; 3]);
            let ms = |time: Duration| format!("{:.2}", time.as_secs_f64() * 1e3);
            say(&format!(
                "| {} | {} | {} | {} | {} | {} | {never} |",
                stage.name(),
                way.name(),
                stage.seen_at(),
                ms(p50),
                ms(p99),
                ms(max)
            ));
            if never > 0 || p99 > FREE_WITHIN {
                slow.push(format!("{} by {}", stage.name(), way.name()));
            }
        }
    }
    say("");
    findings.check(
        slow.is_empty(),
        format!("freed within {} ms, p99, in every stage {slow:?}", FREE_WITHIN.as_millis()),
    );
    let owed = scene.proxy.rest(REST, |_| scene.fleet.connections() == 0).await?;
    findings.check(owed.is_empty(), format!("every gauge of what is in flight is 0 {owed:?}"));
    let panics = scene.proxy.log().panics;
    findings.check(panics.is_empty(), format!("{} panics in the log {panics:?}", panics.len()));
    Ok(())
}

impl Scene {
    /// The times until all was free, and how often it never was.
    async fn measure(&mut self, stage: Stage, way: Way, samples: usize) -> io::Result<(Samples, usize)> {
        if stage == Stage::Queued {
            return self.measure_queue(way, samples).await;
        }
        let (mut times, mut never) = (Samples::default(), 0);
        for _ in 0..samples {
            match timeout(PATIENCE, self.sample(stage, way)).await {
                Ok(time) => times.push(time?),
                Err(_) => never += 1,
            }
        }
        Ok((times, never))
    }

    fn plan(&mut self, ending: Ending) -> Plan {
        self.next += 1;
        Plan { id: self.next, stream: true, events: 4, pause_us: 2_000, ending, tries: usize::MAX }
    }

    async fn sample(&mut self, stage: Stage, way: Way) -> io::Result<Duration> {
        let plan = self.plan(stage.ending());
        let mut client = Client::connect(self.proxy.address, Way::HTTP2.contains(&way)).await?;
        if stage == Stage::Uploading {
            let body = body("wide", &plan, UPLOAD);
            client.send(&body, UPLOAD / 2).await?;
            self.until(BUFFERED, |bytes| bytes > 0.0).await?;
            let left = self.fleet.clock.now();
            let _kept = client.leave(way).await?;
            return Ok(self.until(BUFFERED, |bytes| bytes == 0.0).await?.since(left));
        }
        let mut marks = self.fleet.watch(plan.id);
        let body = body("wide", &plan, 0);
        client.send(&body, body.len()).await?;
        match stage {
            Stage::Waiting => drop(until(&mut marks, Mark::Asked).await?),
            Stage::HeldBack => drop(until(&mut marks, Mark::Silent).await?),
            _ => {
                let head = client.head().await?;
                if head.status != 200 {
                    return Err(io::Error::other(format!("status {} in {stage:?}", head.status)));
                }
                for _ in 0..2 {
                    client.part().await?;
                }
            }
        }
        // Until what was just sent has arrived everywhere, and at no particular phase of the stream.
        tokio::time::sleep(Duration::from_micros(self.rng.u64(2_000..8_000))).await;
        let left = self.fleet.clock.now();
        let _kept = client.leave(way).await?;
        let gone = until(&mut marks, Mark::Gone).await?;
        self.fleet.unwatch(plan.id);
        Ok(gone.since(left))
    }

    /// One request holds the only place, others wait behind it and leave. None of those may be sent on.
    async fn measure_queue(&mut self, way: Way, samples: usize) -> io::Result<(Samples, usize)> {
        let (mut times, mut never, mut ids) = (Samples::default(), 0, BTreeSet::new());
        let first = self.plan(Ending::Mute);
        let mut marks = self.fleet.watch(first.id);
        let mut holder = Client::connect(self.proxy.address, false).await?;
        let whole = body("narrow", &first, 0);
        holder.send(&whole, whole.len()).await?;
        until(&mut marks, Mark::Asked).await?;
        for _ in 0..samples {
            let plan = self.plan(Ending::Whole);
            ids.insert(plan.id);
            let mut client = Client::connect(self.proxy.address, Way::HTTP2.contains(&way)).await?;
            let body = body("narrow", &plan, 0);
            client.send(&body, body.len()).await?;
            self.until(QUEUED, |waiting| waiting == 1.0).await?;
            let left = self.fleet.clock.now();
            let _kept = client.leave(way).await?;
            match timeout(PATIENCE, self.until(QUEUED, |waiting| waiting == 0.0)).await {
                Ok(free) => times.push(free?.since(left)),
                Err(_) => never += 1,
            }
        }
        holder.leave(Way::Reset).await?;
        until(&mut marks, Mark::Gone).await?;
        self.fleet.unwatch(first.id);
        // The place is free: whoever was still waiting would get it before this one.
        let last = self.plan(Ending::Whole);
        let mut client = Client::connect(self.proxy.address, false).await?;
        client.ask(&body("narrow", &last, 0)).await?;
        never += ids.into_iter().filter(|id| !self.fleet.sightings(*id).is_empty()).count();
        Ok((times, never))
    }

    /// Reads the gauge until it is so; when it was.
    async fn until(&self, gauge: &str, is_so: impl Fn(f64) -> bool) -> io::Result<Time> {
        loop {
            let page = self.proxy.page().await?;
            if scrape::sum(&page, gauge, "").is_some_and(&is_so) {
                return Ok(self.fleet.clock.now());
            }
        }
    }
}

async fn until(marks: &mut UnboundedReceiver<(Mark, Time)>, wanted: Mark) -> io::Result<Time> {
    while let Some((mark, at)) = marks.recv().await {
        if mark == wanted {
            return Ok(at);
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

/// A chat with `model`, at least so many bytes long.
fn body(model: &str, plan: &Plan, bytes: usize) -> Bytes {
    let json = serde_json::to_string(plan).unwrap_or_default();
    let text = "x".repeat(bytes);
    Bytes::from(format!(
        "{{\"model\":\"{model}\",\"stream\":true,\"plan\":{json},\"messages\":[{{\"role\":\"user\",\"content\":\"{text}\"}}]}}"
    ))
}
