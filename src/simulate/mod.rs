//! `plimsoll simulate`: which policy serves a recorded day best, found out in seconds and without a GPU.
//!
//! A trace is replayed in virtual time through the decision code that production runs ([`crate::sim::fleet`])
//! onto as many engines of a known speed as one likes, once per policy and seed. Either at one speed-up, with
//! all figures; or `--capacity`, which looks for the largest speed-up at which the SLO is still kept. The
//! whole trace is read and checked before anything runs; the same command prints the same bytes every time.

mod file;
mod table;

use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;

use serde_json::json;

use self::table::{Limit, Run};
use crate::config::{nearest, parse_duration};
use crate::demo::engine::hardware;
use crate::policy::{Policies, PolicyConfig};
use crate::sim::capacity::{self, SPEEDUPS};
use crate::sim::fleet::{Scenario, Scrape, replay};
use crate::sim::hardware::Hardware;
use crate::sim::proxies::{Fleet, Proxies};
use crate::sim::report::{Figures, Slo};
use crate::sim::trace::Trace;

/// What to replay, on what, and what to look for.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = TRACES)]
pub struct SimulateOptions {
    /// The trace: JSON lines, plain or compressed with zstd.
    #[arg(long, value_name = "FILE")]
    pub trace: PathBuf,
    /// How many engines.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub replicas: u16,
    /// Model and GPU of each engine.
    #[arg(long, value_name = "NAME", default_value = Hardware::ALL[0].name, value_parser = hardware)]
    pub engine: Hardware,
    /// How many times faster than recorded the requests come.
    #[arg(long, value_name = "FACTOR", default_value = "1", value_parser = speedup)]
    pub speedup: f64,
    /// The policies to compare, with their default options.
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', value_parser = built_in,
          default_value = "round_robin,least_connections,least_pending_tokens")]
    pub policy: Vec<PolicyConfig>,
    /// How many seeds to run each policy with: 1 to K.
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100))]
    pub seeds: u64,
    /// What makes a request good; and the share of requests that must be, for --capacity.
    #[arg(long, value_name = "LIMITS", default_value = "ttft=2s,tpot=50ms,share=0.9", value_parser = slo)]
    pub slo: Slo,
    /// Engines, numbered from 1, that run at a part of the usual speed, which the policies are not told.
    #[arg(long, value_name = "N=SPEED,..", value_delimiter = ',', value_parser = slow)]
    pub slow: Vec<(usize, f64)>,
    /// Find the largest speed-up at which the SLO is kept.
    #[arg(long, conflicts_with = "speedup")]
    pub capacity: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

const TRACES: &str = "A trace begins with {\"trace\": NAME, \"block_tokens\": N}; every further line is a request, \
{\"t\": MS, \"in\": PROMPT_TOKENS, \"out\": OUTPUT_TOKENS, \"h\": [BLOCK_IDS]}. Prompts share a prefix for as long \
as their block ids agree. Mooncake's own format, {\"timestamp\", \"input_length\", \"output_length\", \
\"hash_ids\"}, is read as it is.";

/// `command`, the arguments of which are [`SimulateOptions`], with a `--policy` that may name any of
/// `policies`.
pub fn with_policies(command: clap::Command, policies: &Policies) -> clap::Command {
    let policies = policies.clone();
    command.mut_arg("policy", |arg| arg.value_parser(move |name: &str| policy(name, &policies)))
}

/// Simulates, and returns what to print.
///
/// # Errors
/// If the trace cannot be read or understood, or `--slow` names an engine that does not exist.
pub fn simulate(options: &SimulateOptions) -> Result<String, String> {
    let speeds = speeds(options)?;
    let trace = file::read(&options.trace)?;
    let simulation = Simulation { options, trace, speeds, progress: Progress::new() };
    Ok(if options.capacity { simulation.capacities() } else { simulation.runs() })
}

struct Simulation<'a> {
    options: &'a SimulateOptions,
    trace: Trace,
    /// Of each engine.
    speeds: Vec<f64>,
    progress: Progress,
}

impl Simulation<'_> {
    fn runs(&self) -> String {
        let speedup = self.options.speedup;
        let run = |(policy, seed): (&PolicyConfig, u64)| {
            let figures = self.replay(policy, seed, speedup);
            Run { policy: policy.name().to_owned(), seed, figures }
        };
        let runs: Vec<Run> = self.asked().map(run).collect();
        self.progress.clear();
        if self.options.json {
            let mut json = self.header_json();
            json["speedup"] = speedup.into();
            json["runs"] = table::runs_json(&runs);
            return format!("{json:#}\n");
        }
        format!("{}; speed-up {speedup}\n{}\n\n{}", self.header(), self.promise(), table::runs(&runs))
    }

    fn capacities(&self) -> String {
        let share = self.options.slo.share;
        let limit = |(policy, seed): (&PolicyConfig, u64)| {
            let keeps = |speedup| self.replay(policy, seed, speedup).good_share() >= share;
            Limit { policy: policy.name().to_owned(), seed, speedup: capacity::largest(keeps) }
        };
        let limits: Vec<Limit> = self.asked().map(limit).collect();
        self.progress.clear();
        if self.options.json {
            let mut json = self.header_json();
            json["capacities"] = table::limits_json(&limits);
            return format!("{json:#}\n");
        }
        let share = share * 100.0;
        let sought = format!("the largest speed-up at which {share} % of the requests keep it");
        format!("{}\n{}; {sought}\n\n{}", self.header(), self.promise(), table::limits(&limits))
    }

    /// Every policy under every seed.
    fn asked(&self) -> impl Iterator<Item = (&PolicyConfig, u64)> {
        let seeds = 1..=self.options.seeds;
        self.options.policy.iter().flat_map(move |policy| seeds.clone().map(move |seed| (policy, seed)))
    }

    fn replay(&self, policy: &PolicyConfig, seed: u64, speedup: f64) -> Figures {
        let SimulateOptions { engine, slo, .. } = self.options;
        let scrape = Some(Scrape::default());
        let scenario = Scenario {
            trace: &self.trace,
            speedup,
            hardware: *engine,
            speeds: &self.speeds,
            scrape,
            slo: *slo,
        };
        let weights = vec![1; self.speeds.len()];
        let (kv_tokens, block_tokens) = (engine.kv_tokens, self.trace.block_tokens);
        let mut proxies =
            Proxies::new(1, policy, &Fleet { weights: &weights, kv_tokens, block_tokens }, seed);
        let requests = self.trace.requests.len();
        replay(&scenario, &mut proxies, |sent| {
            self.progress.show(policy.name(), seed, speedup, sent, requests)
        })
    }

    fn header(&self) -> String {
        let requests = self.trace.requests.len();
        let seconds = self.trace.span().as_secs_f64();
        let SimulateOptions { replicas, engine, slow, .. } = self.options;
        let slow: String = slow.iter().map(|(number, speed)| format!(" {number}={speed}")).collect();
        let slow = if slow.is_empty() { slow } else { format!(", slow:{slow}") };
        format!(
            "{}: {requests} requests in {seconds:.0} s on {replicas} x {}{slow}",
            self.name(),
            engine.name
        )
    }

    fn promise(&self) -> String {
        let Slo { first_token, per_token, .. } = self.options.slo;
        format!("SLO: first token within {first_token:?}, then {per_token:?} per token")
    }

    fn header_json(&self) -> serde_json::Value {
        let Slo { first_token, per_token, share } = self.options.slo;
        let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
        json!({
            "trace": self.name(),
            "requests": self.trace.requests.len(),
            "seconds": self.trace.span().as_secs_f64(),
            "engine": self.options.engine.name,
            "speeds": self.speeds,
            "slo": { "ttft_ms": ms(first_token), "tpot_ms": ms(per_token), "share": share },
        })
    }

    /// The trace's own name, or its file's.
    fn name(&self) -> String {
        self.trace.name.clone().unwrap_or_else(|| self.options.trace.display().to_string())
    }
}

/// The speed of each engine.
fn speeds(options: &SimulateOptions) -> Result<Vec<f64>, String> {
    let mut speeds = vec![1.0; usize::from(options.replicas)];
    for (number, speed) in &options.slow {
        let Some(slow) = number.checked_sub(1).and_then(|index| speeds.get_mut(index)) else {
            return Err(format!(
                "--slow {number}={speed}: the engines are numbered 1 to {}",
                options.replicas
            ));
        };
        *slow = *speed;
    }
    Ok(speeds)
}

/// One line on the terminal's error output that says how far we are; nothing anywhere else.
struct Progress {
    shown: bool,
}

impl Progress {
    fn new() -> Self {
        Self { shown: io::stderr().is_terminal() }
    }

    fn show(&self, policy: &str, seed: u64, speedup: f64, sent: usize, requests: usize) {
        // A hundred times per replay is often enough.
        if self.shown && sent.is_multiple_of(requests.div_ceil(100)) {
            let percent = sent * 100 / requests;
            self.write(&format!("\r\x1b[K{policy}, seed {seed}, speed-up {speedup:.2}: {percent} %"));
        }
    }

    fn clear(&self) {
        if self.shown {
            self.write("\r\x1b[K");
        }
    }

    /// A terminal that is gone is no reason to stop.
    fn write(&self, text: &str) {
        let mut terminal = io::stderr().lock();
        let _ = terminal.write_all(text.as_bytes()).and_then(|()| terminal.flush());
    }
}

fn speedup(text: &str) -> Result<f64, String> {
    let range = || format!("not a number from {} to {}", SPEEDUPS.start(), SPEEDUPS.end());
    text.parse().ok().filter(|factor| SPEEDUPS.contains(factor)).ok_or_else(range)
}

fn built_in(name: &str) -> Result<PolicyConfig, String> {
    policy(name, &Policies::default())
}

fn policy(name: &str, policies: &Policies) -> Result<PolicyConfig, String> {
    policies.by_name(name).ok_or_else(|| {
        let names: Vec<&str> = policies.names().collect();
        let meant = nearest(name, &names).map_or_else(String::new, |name| format!("did you mean {name}? "));
        format!("no such policy, {meant}known are {}", names.join(", "))
    })
}

fn slo(text: &str) -> Result<Slo, String> {
    let (mut first_token, mut per_token, mut share) = (None, None, 0.9);
    for part in text.split(',') {
        let (key, value) =
            part.split_once('=').ok_or_else(|| format!("`{part}` is not of the form key=value"))?;
        let duration =
            || parse_duration(value).ok_or_else(|| format!("`{value}` is not a duration such as 2s or 50ms"));
        match key {
            "ttft" => first_token = Some(duration()?),
            "tpot" => per_token = Some(duration()?),
            "share" => {
                let usable = |share: &f64| (0.01..=1.0).contains(share);
                share = value.parse().ok().filter(usable).ok_or("`share` is a number from 0.01 to 1")?;
            }
            _ => return Err(format!("`{key}` is none of ttft, tpot, share")),
        }
    }
    match (first_token, per_token) {
        (Some(first_token), Some(per_token)) => Ok(Slo { first_token, per_token, share }),
        _ => Err("both ttft and tpot are needed".to_owned()),
    }
}

fn slow(text: &str) -> Result<(usize, f64), String> {
    let parsed = text.split_once('=').and_then(|(number, speed)| {
        let speed: f64 = speed.parse().ok().filter(|speed| (0.01..=100.0).contains(speed))?;
        Some((number.parse().ok()?, speed))
    });
    parsed.ok_or_else(|| "not an engine and its speed from 0.01 to 100, such as 3=0.5".to_owned())
}

#[cfg(test)]
mod tests;
