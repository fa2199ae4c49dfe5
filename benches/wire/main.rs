//! What a request, an event and an idle stream cost, beside every peer, on the same machine in the same minutes.
//!
//! ```text
//!   CPU 0                                            CPU 1
//!   this process: clients ── 127.0.0.1:7700 ───────> the proxy under test, alone, one thread
//!                 engines <─ 127.0.0.1:7711..7714 ──
//! ```
//!
//! `cargo bench --bench wire -- [scenario ...] [--peers a,b]` starts a proxy, lets it get warm, measures, kills it, and
//! takes the next, round after round, so that what else happens on the machine happens to all. CPU time is what the
//! kernel has booked for the proxy's processes; it is the figure to believe, since latencies on a machine of two cores
//! tell of the bench as much. Every answer is checked, and a row with an error in it is marked. Peers are scripts in
//! `peers/`, installed by `peers.sh`; one that is missing is left out, and that is said.

pub mod engine;
pub mod http;
pub mod instructions;
pub mod load;
pub mod pingora;
pub mod process;
pub mod prompt;
pub mod report;
pub mod scenario;
pub mod stream;
pub mod tls;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use rustix::thread::{CpuSet, sched_setaffinity};

/// As Plimsoll's: bare Pingora runs from this binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

use process::{CPUS, DIRECT, PEERS};
use report::{Circumstances, Outcome};
use scenario::{Kind, SCENARIOS, Sample, Scenario, Setting};

/// Enough for every scenario and every peer.
const OPEN_FILES: u64 = 65_536;

/// Measures Plimsoll's wire beside its peers'.
#[derive(Parser)]
#[command(name = "wire")]
struct Options {
    /// What to measure; all but `instructions`, if nothing is named.
    scenarios: Vec<String>,
    /// Who is measured; all that are installed, if nobody is named.
    #[arg(long, value_delimiter = ',', value_name = "A,B")]
    peers: Vec<String>,
    /// How often each is measured.
    #[arg(long, default_value_t = 3, value_name = "N")]
    rounds: usize,
    /// How long, each time.
    #[arg(long, default_value_t = 3.0, value_name = "S")]
    seconds: f64,
    /// Requests per second of the open loops, instead of a tenth of what nginx can do.
    #[arg(long, value_name = "N")]
    rate: Option<f64>,
    /// Makes what `instructions` counts the baseline.
    #[arg(long)]
    bless: bool,
    /// Says what there is.
    #[arg(long)]
    list: bool,
    /// Be the peer `pingora`.
    #[arg(long, hide = true)]
    bare_pingora: bool,
    /// What cargo says to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let ran = if options.bare_pingora { pingora::run().map(|()| true) } else { run(&options) };
    match ran {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("FAIL: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Runs what is asked for; whether every answer was right.
fn run(options: &Options) -> io::Result<bool> {
    if options.list {
        SCENARIOS.iter().for_each(|scenario| say(&format!("{:<12} {}", scenario.name, scenario.what)));
        say(&format!("{:<12} {}", instructions::NAME, instructions::WHAT));
        say(&format!("peers: {}", PEERS.join(" ")));
        return Ok(true);
    }
    let (counts, names): (Vec<_>, Vec<_>) =
        options.scenarios.iter().cloned().partition(|name| name == instructions::NAME);
    let scenarios = if counts.is_empty() || !names.is_empty() {
        named(&names, &SCENARIOS, |scenario| scenario.name)?
    } else {
        Vec::new()
    };
    let asked = named(&options.peers, &PEERS, |peer| peer)?;
    raise_open_files()?;
    pin()?;
    fs::create_dir_all(process::folder().join("log"))?;
    tls::write_certificate()?;
    let (peers, versions) = present(&asked, !options.peers.is_empty())?;
    let circumstances = Circumstances::new(options.rounds, options.seconds, versions);
    circumstances.lines().iter().for_each(|line| say(line));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut outcomes = Vec::new();
    let mut is_sound = true;
    for scenario in scenarios {
        let outcome = runtime.block_on(measure(scenario, &peers, options))?;
        is_sound &= outcome.1;
        outcome.0.table().iter().for_each(|line| say(line));
        outcomes.push(outcome.0);
        // After each, so that a run that is broken off leaves what it has.
        report::write(&circumstances, &outcomes)?;
    }
    if !counts.is_empty() {
        is_sound &= runtime.block_on(instructions::run(&circumstances, options.bless))?;
    }
    say(&format!(
        "\nload: {}; results: {}",
        report::load(),
        process::folder().join("results.json").display()
    ));
    Ok(is_sound)
}

/// All rounds of a scenario, and whether every answer was right.
async fn measure(
    scenario: &Scenario,
    peers: &[&'static str],
    options: &Options,
) -> io::Result<(Outcome, bool)> {
    let kind = scenario.kind;
    let peers: Vec<&'static str> = peers
        .iter()
        .copied()
        .filter(|&peer| peer != DIRECT || scenario.knows_direct())
        .filter(|peer| kind != Kind::Tls || process::said(peer, "tls").is_some())
        .collect();
    let mut setting = Setting::new(scenario, Duration::from_secs_f64(options.seconds), options.rate);
    if matches!(kind, Kind::Open(_)) && setting.rate.is_none() {
        let measure = if process::said("nginx", "version").is_some() { "nginx" } else { "plimsoll" };
        setting.find_rate(measure).await?;
    }
    let (mut rounds, mut is_sound) = (Vec::new(), true);
    for round in 1..=options.rounds {
        let mut samples = Vec::new();
        for peer in &peers {
            let sample = setting.measure(kind, peer).await;
            let sample = sample.unwrap_or_else(|error| Sample {
                errors: 1,
                first_error: Some(error.to_string()),
                ..Sample::default()
            });
            is_sound &= sample.errors == 0;
            progress(&format!(
                "{} {round}/{} {peer}: {:?} {:?}",
                scenario.name, options.rounds, sample.values, sample.first_error
            ));
            samples.push(sample);
        }
        rounds.push(samples);
    }
    Ok((Outcome::new(scenario, setting.rate, &peers, rounds), is_sound))
}

/// Those of `all` that are named, in the order of `all`; all, if none is.
fn named<T>(
    names: &[String],
    all: &'static [T],
    name: impl Fn(&T) -> &'static str,
) -> io::Result<Vec<&'static T>> {
    if let Some(unknown) = names.iter().find(|asked| !all.iter().any(|one| name(one) == asked.as_str())) {
        let known: Vec<&str> = all.iter().map(&name).collect();
        return Err(io::Error::other(format!("there is no `{unknown}`; there are: {}", known.join(" "))));
    }
    Ok(all.iter().filter(|one| names.is_empty() || names.iter().any(|asked| asked == name(one))).collect())
}

/// Who is installed, and in which version. Only those may be missing that were not named.
fn present(
    asked: &[&&'static str],
    is_named: bool,
) -> io::Result<(Vec<&'static str>, BTreeMap<&'static str, String>)> {
    let mut versions = BTreeMap::new();
    for &&peer in asked {
        match process::said(peer, "version") {
            Some(version) => drop(versions.insert(peer, version)),
            None if is_named => return Err(io::Error::other(format!("{peer} is not installed"))),
            None => say(&format!("SKIPPED: {peer} is not installed: benches/wire/peers.sh")),
        }
    }
    Ok((asked.iter().map(|peer| **peer).filter(|peer| versions.contains_key(peer)).collect(), versions))
}

/// Keeps this process on its own CPU. What it starts is put onto the other.
fn pin() -> io::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(CPUS[0]);
    Ok(sched_setaffinity(None, &cpus)?)
}

/// Ten thousand streams take twenty thousand sockets here, and as many in the proxy, which inherits the limit.
fn raise_open_files() -> io::Result<()> {
    // Only root may go above the hard limit.
    if rlimit::Resource::NOFILE.set(OPEN_FILES, OPEN_FILES).is_err() {
        let limit = rlimit::increase_nofile_limit(OPEN_FILES)?;
        if limit < OPEN_FILES {
            say(&format!("open files: {limit}, less than the {OPEN_FILES} of which all scenarios are sure"));
        }
    }
    Ok(())
}

/// Prints a line; a reader who has seen enough is no failure.
pub fn say(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}

/// Says how far it is, beside the results.
fn progress(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
