//! What is simulated, after everything was read and before anything runs.
//!
//! The words of the command, the trace, the balancer's configuration and the engine's constants come together
//! here; whatever is wrong with any of them is said now. What follows cannot fail.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::options::{Engine, Interval, SimulateOptions};
use super::table::ORACLE;
use super::{Failure, file};
use crate::config::{self, Upstream};
use crate::policy::{Policies, PolicyConfig};
use crate::sim::fleet::Scrape;
use crate::sim::hardware::Hardware;
use crate::sim::report::Slo;
use crate::sim::sessions::Kind;
use crate::sim::trace::Trace;

/// What is simulated.
#[derive(Debug)]
pub(super) struct Setup {
    pub(super) traffic: Traffic,
    /// The engine's name, or the file of its constants.
    pub(super) engine: String,
    pub(super) hardware: Hardware,
    /// Of each engine.
    pub(super) speeds: Vec<f64>,
    /// Of each engine, as the policies are told.
    pub(super) weights: Vec<u32>,
    pub(super) proxies: usize,
    pub(super) scrape: Option<Scrape>,
    pub(super) slo: Slo,
    /// Who is compared, in the order of the output.
    pub(super) contestants: Vec<Contestant>,
    pub(super) seeds: u64,
}

/// Where requests come from.
#[derive(Debug)]
pub(super) enum Traffic {
    /// The trace, and its name or its file's.
    Recorded(Trace, String),
    /// Made up, anew for each seed.
    Made { kind: Kind, rate: f64, requests: usize },
}

/// Who sends them on.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Contestant {
    Policy(PolicyConfig),
    Oracle,
}

/// One contestant under one seed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Task {
    /// Its place among all tasks.
    pub(super) number: usize,
    /// Index into [`Setup::contestants`].
    pub(super) contestant: usize,
    pub(super) seed: u64,
}

impl Contestant {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Policy(policy) => policy.name(),
            Self::Oracle => ORACLE,
        }
    }
}

impl Traffic {
    /// What is replayed under a seed.
    pub(super) fn trace(&self, seed: u64) -> Cow<'_, Trace> {
        match self {
            Self::Recorded(trace, _) => Cow::Borrowed(trace),
            Self::Made { kind, rate, requests } => Cow::Owned(kind.trace(*rate, *requests, seed)),
        }
    }

    /// Requests per second, as it is replayed at `speedup`; nothing if all come at once.
    pub(super) fn rate(&self, speedup: f64) -> Option<f64> {
        let rate = match self {
            Self::Made { rate, .. } => *rate,
            Self::Recorded(trace, _) => trace.requests.len() as f64 / trace.span().as_secs_f64(),
        };
        Some(rate * speedup).filter(|rate| rate.is_finite())
    }

    pub(super) fn name(&self) -> &str {
        match self {
            Self::Recorded(_, name) => name,
            Self::Made { kind, .. } => kind.name(),
        }
    }

    pub(super) fn requests(&self) -> usize {
        match self {
            Self::Recorded(trace, _) => trace.requests.len(),
            Self::Made { requests, .. } => *requests,
        }
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, requests) = (self.name(), self.requests());
        match self {
            Self::Recorded(trace, _) => {
                write!(f, "{name}: {requests} requests in {:.0} s", trace.span().as_secs_f64())
            }
            Self::Made { rate, .. } => write!(f, "{name}, made up: {requests} requests at {rate}/s"),
        }
    }
}

impl Setup {
    /// Reads everything that `options` name; a configuration may name any of `policies`.
    pub(super) fn new(options: &SimulateOptions, policies: &Policies) -> Result<Self, Failure> {
        let upstream = options.config.as_deref().map(|path| upstream(path, options, policies)).transpose()?;
        let upstream = upstream.as_ref();
        // Backends that are discovered are not in the file.
        let listed = upstream.map_or(&[][..], |upstream| &upstream.backends);
        let count = if listed.is_empty() { usize::from(options.replicas) } else { listed.len() };
        let speeds = speeds(options, count)?;
        let mut weights: Vec<u32> = listed.iter().map(|backend| backend.weight).collect();
        weights.resize(count, 1);
        if options.weighted {
            weights = weighted(&weights, &speeds);
        }
        let (engine, hardware) = match &options.engine {
            Engine::Known(row) => (row.name.to_owned(), *row),
            Engine::File(path) => (path.display().to_string(), config::load_hardware(path)?),
        };
        Ok(Self {
            scrape: scrape(options, upstream)?,
            traffic: traffic(options, count)?,
            engine,
            hardware,
            speeds,
            weights,
            proxies: usize::from(options.proxies),
            slo: options.slo,
            contestants: contestants(options, upstream),
            seeds: options.seeds,
        })
    }

    /// Every contestant under every seed, the slowest contestant first.
    pub(super) fn tasks(&self) -> Vec<Task> {
        let mut contestants: Vec<usize> = (0..self.contestants.len()).collect();
        contestants.sort_by_key(|index| self.contestants[*index] != Contestant::Oracle);
        let seeds = |contestant| (1..=self.seeds).map(move |seed| (contestant, seed));
        let pairs = (0..).zip(contestants.into_iter().flat_map(seeds));
        pairs.map(|(number, (contestant, seed))| Task { number, contestant, seed }).collect()
    }

    /// All of it that is not as usual, in a line.
    pub(super) fn line(&self) -> String {
        let mut line = format!("{} on {} x {}", self.traffic, self.speeds.len(), self.engine);
        let mut slow = (1..).zip(&self.speeds).filter(|(_, speed)| **speed != 1.0).peekable();
        if slow.peek().is_some() {
            line += ", slow:";
            slow.for_each(|(number, speed)| _ = write!(line, " {number}={speed}"));
        }
        let ends = self.weights.iter().min().zip(self.weights.iter().max());
        if let Some((least, most)) = ends.filter(|(least, most)| least != most) {
            line += ", weights:";
            if self.weights.len() <= MOST_LISTED {
                self.weights.iter().for_each(|weight| _ = write!(line, " {weight}"));
            } else {
                let _ = write!(line, " {least} to {most}");
            }
        }
        if self.proxies > 1 {
            let _ = write!(line, ", {} balancers", self.proxies);
        }
        match self.scrape {
            None => line += ", metrics not read",
            Some(scrape) if scrape == Scrape::default() => {}
            Some(Scrape { interval, delay }) => {
                let _ = write!(line, ", metrics every {interval:?}");
                if !delay.is_zero() {
                    let _ = write!(line, ", {delay:?} old");
                }
            }
        }
        line
    }

    /// The promise, in a line.
    pub(super) fn promise(&self) -> String {
        let Slo { first_token, per_token, .. } = self.slo;
        format!("SLO: first token within {first_token:?}, then {per_token:?} per token")
    }

    /// All of it as JSON.
    pub(super) fn json(&self) -> Value {
        let Slo { first_token, per_token, share } = self.slo;
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let mut json = json!({
            "requests": self.traffic.requests(),
            "rate": self.traffic.rate(1.0),
            "engine": self.engine,
            "speeds": self.speeds,
            "weights": self.weights,
            "proxies": self.proxies,
            "scrape_ms": self.scrape.map(|scrape| ms(scrape.interval)),
            "stale_ms": self.scrape.map(|scrape| ms(scrape.delay)),
            "slo": { "ttft_ms": ms(first_token), "tpot_ms": ms(per_token), "share": share },
        });
        match &self.traffic {
            Traffic::Made { kind, .. } => json["workload"] = kind.name().into(),
            Traffic::Recorded(trace, name) => {
                json["trace"] = name.as_str().into();
                json["seconds"] = trace.span().as_secs_f64().into();
            }
        }
        json
    }
}

/// More weights would not fit into a line.
const MOST_LISTED: usize = 16;

/// The upstream of the configuration at `path` that is meant.
fn upstream(path: &Path, options: &SimulateOptions, policies: &Policies) -> Result<Upstream, Failure> {
    let mut config = config::load(path, policies)?;
    let names = config.upstreams.keys().cloned().collect::<Vec<_>>().join(", ");
    let found = match &options.upstream {
        Some(name) => config.upstreams.remove(name),
        None if config.upstreams.len() > 1 => {
            return Err(format!("{}: which --upstream of {names}?", path.display()).into());
        }
        None => config.upstreams.pop_first().map(|(_, upstream)| upstream),
    };
    let wanted = options.upstream.as_deref().unwrap_or_default();
    found.ok_or_else(|| format!("{}: no upstream {wanted}, there are {names}", path.display()).into())
}

/// The speed of each of `count` engines.
fn speeds(options: &SimulateOptions, count: usize) -> Result<Vec<f64>, Failure> {
    let mut speeds = vec![1.0; count];
    for (number, speed) in &options.slow {
        let slow = number.checked_sub(1).and_then(|index| speeds.get_mut(index));
        *slow.ok_or_else(|| format!("--slow {number}={speed}: the engines are numbered 1 to {count}"))? =
            *speed;
    }
    Ok(speeds)
}

/// The weights times the speeds, in the smallest whole numbers; speeds count to the hundredth.
fn weighted(weights: &[u32], speeds: &[f64]) -> Vec<u32> {
    let times = |(weight, speed): (&u32, &f64)| weight * ((speed * 100.0).round() as u32).max(1);
    let products: Vec<u32> = weights.iter().zip(speeds).map(times).collect();
    let divisor = products.iter().copied().fold(0, greatest_common_divisor).max(1);
    products.into_iter().map(|product| product / divisor).collect()
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

fn scrape(options: &SimulateOptions, upstream: Option<&Upstream>) -> Result<Option<Scrape>, Failure> {
    let usual = Scrape::default();
    let configured = upstream.map_or(Some(usual.interval), |upstream| {
        upstream.poll_path().and(upstream.poll.as_ref()).map(|poll| poll.interval)
    });
    let interval = options.scrape_interval.map_or(configured, |Interval(interval)| interval);
    let delay = options.stale.unwrap_or(usual.delay);
    if interval.is_none() && options.stale.is_some() {
        return Err("--stale: metrics are not read at all, --scrape-interval makes it so".to_owned().into());
    }
    Ok(interval.map(|interval| Scrape { interval, delay }))
}

fn traffic(options: &SimulateOptions, engines: usize) -> Result<Traffic, String> {
    let Some(path) = &options.trace else {
        let kind = options.workload;
        let rate = options.rate.unwrap_or_else(|| kind.rate_per_engine() * engines as f64);
        return Ok(Traffic::Made { kind, rate, requests: options.requests as usize });
    };
    let trace = file::read(path)?;
    let name = trace.name.clone().unwrap_or_else(|| path.display().to_string());
    Ok(Traffic::Recorded(trace, name))
}

fn contestants(options: &SimulateOptions, upstream: Option<&Upstream>) -> Vec<Contestant> {
    let configured = upstream.map(|upstream| &upstream.policy);
    let mut asked = options.policy.clone();
    if asked.is_empty() {
        asked = vec![PolicyConfig::RoundRobin, PolicyConfig::LeastConnections];
        asked.push(configured.cloned().unwrap_or_default());
    }
    let mut contestants: Vec<Contestant> = Vec::new();
    for policy in asked {
        let policy = configured.filter(|other| other.name() == policy.name()).cloned().unwrap_or(policy);
        let contestant = Contestant::Policy(policy);
        if !contestants.contains(&contestant) {
            contestants.push(contestant);
        }
    }
    contestants.extend(options.oracle.then_some(Contestant::Oracle));
    contestants
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_multiplied_by_speeds_and_stay_as_small_as_can_be() {
        assert_eq!(weighted(&[1, 1], &[1.0, 0.5]), [2, 1]);
        assert_eq!(weighted(&[1, 2, 4], &[1.0, 1.0, 0.25]), [1, 2, 1]);
        assert_eq!(weighted(&[1, 1], &[1.0, 0.33]), [100, 33]);
        assert_eq!(weighted(&[1000, 1], &[100.0, 0.01]), [10_000_000, 1]);
    }
}
