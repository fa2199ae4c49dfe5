//! The words of the command, and what each of them may be.

use std::path::PathBuf;
use std::time::Duration;

use crate::config::{nearest, parse_duration};
use crate::policy::{Policies, PolicyConfig};
use crate::sim::capacity::SPEEDUPS;
use crate::sim::hardware::Hardware;
use crate::sim::report::Slo;
use crate::sim::sessions::Kind;

/// What to replay, on what, and what to look for.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = FORMATS)]
pub struct SimulateOptions {
    /// Recorded traffic: JSON lines, plain or compressed with zstd. Without it, traffic is made up.
    #[arg(long, value_name = "FILE", help_heading = TRAFFIC)]
    pub trace: Option<PathBuf>,
    /// Made-up traffic: chat, agents, documents or mixed.
    ///
    /// chat: conversations that grow, each with one of a few system prompts.
    /// agents: quick steps that grow, each after one of a few long tool prompts.
    /// documents: a few questions on each of many long texts.
    /// mixed: 60 % of the requests are chats, 30 % agents, 10 % documents.
    #[arg(verbatim_doc_comment, long, value_name = "KIND", default_value = "mixed", value_parser = kind,
          conflicts_with = "trace", help_heading = TRAFFIC)]
    pub workload: Kind,
    /// Requests per second of made-up traffic.
    ///
    /// [default: per engine 13 for chat, 2 for agents, 0.9 for documents, 3 for mixed]
    #[arg(long, value_name = "PER_SECOND", value_parser = rate, conflicts_with = "trace",
          help_heading = TRAFFIC)]
    pub rate: Option<f64>,
    /// How many requests of made-up traffic.
    #[arg(long, value_name = "N", default_value_t = 10_000, conflicts_with = "trace", help_heading = TRAFFIC,
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub requests: u32,
    /// How many times faster than recorded the requests come.
    #[arg(long, value_name = "FACTOR", default_value = "1", value_parser = speedup, help_heading = TRAFFIC)]
    pub speedup: f64,

    /// The configuration of a balancer: backends, weights and policy of one of its upstreams.
    ///
    /// Also how often metrics are read. Limits, queue, retries and ejection play no part: nothing
    /// fails here.
    #[arg(verbatim_doc_comment, long, value_name = "FILE", help_heading = FLEET)]
    pub config: Option<PathBuf>,
    /// Which upstream of --config, if it has several.
    #[arg(long, value_name = "NAME", requires = "config", help_heading = FLEET)]
    pub upstream: Option<String>,
    /// How many engines.
    #[arg(long, value_name = "N", default_value_t = 8, conflicts_with = "config", help_heading = FLEET,
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub replicas: u16,
    /// Model and GPU of each engine: a name, or a YAML file of constants.
    #[arg(long, value_name = "NAME|FILE", default_value = Hardware::ALL[0].name, value_parser = engine,
          help_heading = FLEET)]
    pub engine: Engine,
    /// Engines, numbered from 1, that run at a part of the usual speed, unknown to the policies.
    #[arg(long, value_name = "N=SPEED,..", value_delimiter = ',', value_parser = slow, help_heading = FLEET)]
    pub slow: Vec<(usize, f64)>,
    /// Tell the policies the speeds of --slow: each engine's weight is multiplied by its speed.
    #[arg(long, requires = "slow", help_heading = FLEET)]
    pub weighted: bool,
    /// How many balancers share the engines.
    ///
    /// Each request comes to one of them by lot, and none knows of the others.
    #[arg(long, value_name = "K", default_value_t = 1, help_heading = FLEET,
          value_parser = clap::value_parser!(u8).range(1..=64))]
    pub proxies: u8,
    /// How often each engine's metrics are read, or off [default: 1s, or as --config says].
    #[arg(long, value_name = "DURATION|off", value_parser = interval, help_heading = FLEET)]
    pub scrape_interval: Option<Interval>,
    /// How old metrics are when they are read [default: no time at all].
    #[arg(long, value_name = "DURATION", value_parser = duration, help_heading = FLEET)]
    pub stale: Option<Duration>,

    /// The policies to compare.
    ///
    /// The one that --config names has the options that it has there, all others their defaults.
    ///
    /// [default: round_robin, least_connections, and the one of --config or least_pending_tokens]
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', value_parser = built_in,
          help_heading = COMPARISON)]
    pub policy: Vec<PolicyConfig>,
    /// Also run an oracle that knows every engine's future, and say how far from it each policy is.
    ///
    /// "to oracle" is the mean time to the first token over the oracle's, less one. It takes some 100 times
    /// as long as a policy.
    #[arg(long, help_heading = COMPARISON)]
    pub oracle: bool,
    /// How many seeds to run each policy with: 1 to K. Each has made-up traffic of its own.
    #[arg(long, value_name = "K", default_value_t = 1, help_heading = COMPARISON,
          value_parser = clap::value_parser!(u64).range(1..=100))]
    pub seeds: u64,
    /// What makes a request good; and the share of requests that must be, for --capacity.
    #[arg(long, value_name = "LIMITS", default_value = "ttft=2s,tpot=50ms,share=0.9", value_parser = slo,
          help_heading = COMPARISON)]
    pub slo: Slo,
    /// Find the largest speed-up at which the SLO is kept.
    #[arg(long, conflicts_with = "speedup", help_heading = COMPARISON)]
    pub capacity: bool,

    /// Print JSON.
    #[arg(long, help_heading = OUTPUT)]
    pub json: bool,
    /// Draw an SVG: the times to the first token or, with --capacity, all that was tried.
    #[arg(long, value_name = "FILE", help_heading = OUTPUT)]
    pub plot: Option<PathBuf>,
}

const TRAFFIC: &str = "Traffic";
const FLEET: &str = "Fleet";
const COMPARISON: &str = "Comparison";
const OUTPUT: &str = "Output";

const FORMATS: &str = "\
Engines:
  llama-8b-h100, llama-8b-a100, llama-8b-h200, llama-8b-l40s, qwen-32b-2xh100,
  llama-70b-4xh100, llama-70b-8xh100, llama-70b-4xa100

  A file of constants gives what a step costs, or how it differs from an engine above:
    like: llama-8b-h100     # then every other key is optional
    base_ms: 6.4            # of any step
    token_ms: 0.0171        # per prompt token computed
    attention_ms: 9.8e-7    # per pair of a prompt token and a token it attends to
    sequence_ms: 0.010      # per decoding sequence
    context_ms: 4.22e-5     # per token of context of the decoding sequences
    kv_tokens: 400000       # capacity of the KV cache
    batch_tokens: 8192      # most tokens computed in one step (8192 unless written)
    max_sequences: 1024     # most sequences running at once (1024 unless written)

Traces:
  The first line is {\"trace\": NAME, \"block_tokens\": N}; every further line is a request,
  {\"t\": MS, \"in\": PROMPT_TOKENS, \"out\": OUTPUT_TOKENS, \"h\": [BLOCK_IDS]}. Prompts share a
  prefix for as long as their block ids agree. Mooncake's own format, {\"timestamp\",
  \"input_length\", \"output_length\", \"hash_ids\"}, is read as it is.

Examples:
  plimsoll simulate --workload chat --oracle
  plimsoll simulate --config plimsoll.yaml --capacity --plot capacity.svg
  plimsoll simulate --trace day.jsonl.zst --replicas 8 --slow 3=0.5 --weighted --seeds 3";

/// `command`, the arguments of which are [`SimulateOptions`], with a `--policy` that may name any of
/// `policies`.
pub fn with_policies(command: clap::Command, policies: &Policies) -> clap::Command {
    let policies = policies.clone();
    command.mut_arg("policy", |arg| arg.value_parser(move |name: &str| policy(name, &policies)))
}

/// How fast the engines are.
#[derive(Clone, Debug, PartialEq)]
pub enum Engine {
    /// As one of the table.
    Known(Hardware),
    /// As the constants in a file say.
    File(PathBuf),
}

/// How often metrics are read; `None` if they are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval(pub Option<Duration>);

fn kind(name: &str) -> Result<Kind, String> {
    let names = || Kind::ALL.map(Kind::name).join(", ");
    Kind::named(name).ok_or_else(|| format!("no such workload, known are {}", names()))
}

fn rate(text: &str) -> Result<f64, String> {
    let usable = |rate: &f64| (0.001..=100_000.0).contains(rate);
    text.parse().ok().filter(usable).ok_or_else(|| "not a number from 0.001 to 100000".to_owned())
}

fn speedup(text: &str) -> Result<f64, String> {
    let range = || format!("not a number from {} to {}", SPEEDUPS.start(), SPEEDUPS.end());
    text.parse().ok().filter(|factor| SPEEDUPS.contains(factor)).ok_or_else(range)
}

fn engine(text: &str) -> Result<Engine, String> {
    if let Some(row) = Hardware::named(text) {
        return Ok(Engine::Known(row));
    }
    let is_file = text.contains('/') || text.ends_with(".yaml") || text.ends_with(".yml");
    let known = || {
        let names = Hardware::NAMES.join(", ");
        format!("no such engine, known are {names}; a file of constants ends in .yaml")
    };
    is_file.then(|| Engine::File(text.into())).ok_or_else(known)
}

fn interval(text: &str) -> Result<Interval, String> {
    if text == "off" {
        return Ok(Interval(None));
    }
    let wrong = || "not a duration such as 1s or 50ms, nor `off`".to_owned();
    parse_duration(text).map(|interval| Interval(Some(interval))).ok_or_else(wrong)
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| format!("`{text}` is not a duration such as 2s or 50ms"))
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

pub(super) fn slo(text: &str) -> Result<Slo, String> {
    let (mut first_token, mut per_token, mut share) = (None, None, 0.9);
    for part in text.split(',') {
        let (key, value) =
            part.split_once('=').ok_or_else(|| format!("`{part}` is not of the form key=value"))?;
        match key {
            "ttft" => first_token = Some(duration(value)?),
            "tpot" => per_token = Some(duration(value)?),
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
