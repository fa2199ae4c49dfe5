//! One run: every request of a slice at its time through the balancer, what the clients saw, and the books
//! compared.
//!
//! The loop is open: a request goes out at its time whether or not earlier ones were answered, because users
//! do not wait for each other. Every event of every stream is counted; an answer that is one token short is a
//! failure. After the last answer the balancer must owe nothing, and tokens must be the same number wherever
//! they are counted: in the trace, by the clients, by the engines and by the balancer.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use plimsoll::clock::{Clock, Time};
use plimsoll::demo::client::{self, Reply};
use plimsoll::sim::report::Samples;
use plimsoll::sim::trace::Trace;
use serde::Deserialize;
use tokio::sync::mpsc;

use super::process::{Cpu, Stage};
use super::{LOAD, SPEED, prompt, scrape};

/// A request that takes longer counts as failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// A charge is settled after the last byte of its answer; it may take so long until the metrics show it.
const SETTLE_TRIES: u32 = 100;
const SETTLE_PAUSE: Duration = Duration::from_millis(50);

/// What came of one run.
pub struct Run {
    /// Under which policy.
    pub policy: &'static str,
    /// Requests sent.
    pub requests: usize,
    /// Those without a whole answer.
    pub failed: usize,
    /// Times to the first token, as the clients saw them.
    pub first_token: Samples,
    /// How much later than planned requests were sent.
    pub late: Samples,
    /// Part of the prompt tokens that the engines had cached.
    pub hit_ratio: f64,
    /// Part of the prompt tokens that the balancer, when it chose, believed to be cached there.
    pub expected_hit_ratio: f64,
    /// Part of the requests that the most used engine got.
    pub largest_share: f64,
    /// What the run cost.
    pub cpu: Cpu,
    /// How long it took.
    pub lasted: Duration,
    /// What was not as it should be.
    pub faults: Vec<String>,
}

/// What the clients saw.
#[derive(Default)]
struct Sightings {
    first_token: Samples,
    late: Samples,
    backends: HashMap<String, usize>,
    usage: Usage,
    failures: Vec<String>,
}

/// One whole answer.
struct Answer {
    first_token: Duration,
    backend: String,
    usage: Usage,
}

/// Replays `trace` under `policy`, with files in `folder`.
pub async fn run(trace: &Trace, policy: &'static str, folder: &Path) -> io::Result<Run> {
    let stage = Stage::start(policy, folder).await?;
    let (clock, before) = (Clock::start(), stage.cpu()?);
    let seen = drive(stage.proxy, trace).await;
    let (lasted, cpu) = (clock.now().since(Time::ZERO), stage.cpu()?.since(&before));
    let page = rest(&stage).await?;
    let mut faults = Vec::new();
    faults.extend(seen.failures.first().map(|why| format!("{} failed: {why}", seen.failures.len())));
    faults.extend(scrape::owed(&page));
    let mut engines = String::new();
    for backend in &stage.backends {
        engines += &scrape::page(*backend).await?;
    }
    faults.extend(discrepancies(trace, &seen, &engines, &page));
    let prompt_tokens = seen.usage.prompt_tokens.max(1) as f64;
    let requests = trace.requests.len();
    Ok(Run {
        policy,
        requests,
        failed: seen.failures.len(),
        hit_ratio: seen.usage.details.cached_tokens as f64 / prompt_tokens,
        expected_hit_ratio: expected_hits(&folder.join("log"))? as f64 / prompt_tokens,
        largest_share: seen.backends.values().max().copied().unwrap_or(0) as f64 / requests as f64,
        first_token: seen.first_token,
        late: seen.late,
        cpu,
        lasted,
        faults,
    })
}

/// Sends every request at its time and waits for every answer.
async fn drive(proxy: SocketAddr, trace: &Trace) -> Sightings {
    let (answered, mut answers) = mpsc::unbounded_channel();
    let (mut seen, clock) = (Sightings::default(), Clock::start());
    let elapsed = || clock.now().since(Time::ZERO);
    for (number, request) in trace.requests.iter().enumerate() {
        // Made before its time, which it would otherwise delay.
        let body = prompt::body(trace, number);
        let due = request.at.div_f64(LOAD * SPEED);
        tokio::time::sleep(due.saturating_sub(elapsed())).await;
        seen.late.push(elapsed().saturating_sub(due));
        let (answered, expected) = (answered.clone(), request.output_tokens);
        tokio::spawn(async move {
            let answer = tokio::time::timeout(PATIENCE, ask(proxy, &body, expected)).await;
            let answer = answer.unwrap_or_else(|_| Err(format!("no answer in {} s", PATIENCE.as_secs())));
            // The receiver lives until the last of us is gone.
            let _ = answered.send(answer);
        });
    }
    drop(answered);
    while let Some(answer) = answers.recv().await {
        match answer {
            Ok(Answer { first_token, backend, usage }) => {
                seen.first_token.push(first_token);
                *seen.backends.entry(backend).or_default() += 1;
                seen.usage.add(&usage);
            }
            Err(why) => seen.failures.push(why),
        }
    }
    seen
}

/// Asks once and reads the stream to its end.
async fn ask(proxy: SocketAddr, body: &str, expected: u64) -> Result<Answer, String> {
    let clock = Clock::start();
    let reply = client::send(proxy, "POST", "/v1/chat/completions", body).await;
    let mut reply = reply.map_err(|error| error.to_string())?;
    if reply.status != 200 {
        let status = reply.status;
        return Err(format!("{status} {}", reply.text().await.unwrap_or_default()));
    }
    let backend = reply.backend.clone().ok_or("no backend is named in the answer")?;
    let mut stream = Stream::default();
    let mut first_token = None;
    while let Some(part) = next(&mut reply).await? {
        stream.read(&part)?;
        if stream.tokens > 0 && first_token.is_none() {
            first_token = Some(clock.now().since(Time::ZERO));
        }
    }
    let Stream { tokens, usage, done, .. } = stream;
    match (first_token, usage) {
        (Some(first_token), Some(usage))
            if done && tokens == expected && usage.completion_tokens == expected =>
        {
            Ok(Answer { first_token, backend, usage })
        }
        _ => Err(format!("{tokens} of {expected} tokens, done: {done}, usage: {usage:?}")),
    }
}

async fn next(reply: &mut Reply) -> Result<Option<Vec<u8>>, String> {
    reply.part().await.map_err(|error| error.to_string())
}

/// An event stream as it is being read. Only its last event is parsed: the clients share their CPU with what
/// they measure.
#[derive(Default)]
struct Stream {
    line: Vec<u8>,
    tokens: u64,
    usage: Option<Usage>,
    done: bool,
}

impl Stream {
    fn read(&mut self, part: &[u8]) -> Result<(), String> {
        for piece in part.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                self.event(line.trim_ascii_end())?;
                self.line = line;
                self.line.clear();
            }
        }
        Ok(())
    }

    fn event(&mut self, line: &[u8]) -> Result<(), String> {
        let has = |what: &[u8]| line.windows(what.len()).any(|part| part == what);
        match line.strip_prefix(b"data: ") {
            None => {}
            Some(b"[DONE]") => self.done = true,
            Some(data) if has(b"\"usage\":") => {
                let event = serde_json::from_slice::<Last>(data).map_err(|error| error.to_string())?;
                self.usage = Some(event.usage);
            }
            Some(data) if has(b"\"error\":") => return Err(String::from_utf8_lossy(data).into_owned()),
            // The opening event has a role and an empty content.
            Some(_) if !has(b"\"content\":\"\"") => self.tokens += 1,
            Some(_) => {}
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Last {
    usage: Usage,
}

/// The engine's own count of tokens.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    #[serde(rename = "prompt_tokens_details")]
    details: Details,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Details {
    cached_tokens: u64,
}

impl Usage {
    fn add(&mut self, other: &Self) {
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        self.details.cached_tokens += other.details.cached_tokens;
    }
}

/// The balancer's page of metrics as soon as every gauge is back at zero, or what it says if that does not
/// happen.
async fn rest(stage: &Stage) -> io::Result<String> {
    for _ in 0..SETTLE_TRIES {
        let page = scrape::page(stage.admin).await?;
        if scrape::owed(&page).is_empty() {
            return Ok(page);
        }
        tokio::time::sleep(SETTLE_PAUSE).await;
    }
    scrape::page(stage.admin).await
}

/// Prompt tokens of which the balancer expected, when it chose, that the chosen engine had them cached.
fn expected_hits(log: &Path) -> io::Result<u64> {
    let log = fs::read_to_string(log)?;
    let matched = log.lines().filter_map(|line| line.split_once(" matched_est="));
    Ok(matched.filter_map(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok()).sum())
}

/// What is not the same number in every book.
fn discrepancies(trace: &Trace, seen: &Sightings, engines: &str, proxy: &str) -> Vec<String> {
    let engine = |name: &str, label: &str| scrape::sum(engines, name, label).unwrap_or(f64::NAN);
    let balancer = |kind: &str| {
        scrape::sum(proxy, "plimsoll_tokens_total", &format!("kind=\"{kind}\"")).unwrap_or(f64::NAN)
    };
    let of_trace = |count: fn(&plimsoll::sim::trace::Request) -> u64| {
        trace.requests.iter().map(count).sum::<u64>() as f64
    };
    let Usage { prompt_tokens, completion_tokens, details } = seen.usage;
    let cached = details.cached_tokens as f64;
    let asked = trace.requests.len() as f64;
    let finished = engine("vllm:request_success_total", "finished_reason=\"length\"");
    let ok = scrape::sum(proxy, "plimsoll_requests_total", "outcome=\"ok\"").unwrap_or(f64::NAN);
    let books = [
        ("requests", asked, [seen.first_token.len() as f64, finished, ok]),
        (
            "prompt tokens",
            of_trace(|request| request.prompt_tokens),
            [prompt_tokens as f64, engine("vllm:prompt_tokens_total", ""), balancer("prompt")],
        ),
        (
            "completion tokens",
            of_trace(|request| request.output_tokens),
            [completion_tokens as f64, engine("vllm:generation_tokens_total", ""), balancer("completion")],
        ),
        ("cached tokens", cached, [cached, engine("vllm:prefix_cache_hits_total", ""), balancer("cached")]),
    ];
    let differing = books.into_iter().filter(|(_, trace, others)| others.iter().any(|other| other != trace));
    differing
        .map(|(what, trace, [clients, engines, balancer])| {
            format!("{what}: trace {trace}, clients {clients}, engines {engines}, balancer {balancer}")
        })
        .collect()
}
