//! The main claim, end to end: recorded traffic through real sockets, and users wait least under the default
//! policy.
//!
//! `sim/` shows the same in virtual time, through the same decision code. What it cannot show is that the
//! process around that code knows in time what the code has to know: that prefixes are found in the bytes of
//! a prompt, that a charge is released at the first content event, that nothing leaks, that streams are not
//! held up. So here every part is the real one, each a process of its own: four simulated engines (`plimsoll
//! engine`), the balancer (`plimsoll run`), and clients in an open loop. Engines and traffic both run
//! [`SPEED`] times as fast as in life, which leaves the queues as they are and makes ten minutes of traffic
//! out of one:
//!
//! ```text
//! a request is sent at  recorded time / (LOAD * SPEED)      a step of an engine takes  step_time / SPEED
//! ```
//!
//! Each policy meets the same requests with empty caches, first in one order and then, with half of the
//! requests, in the other. It passes if the mean time to first token falls from policy to policy in both; if
//! no request failed; if engines, balancer and clients counted the same tokens; and if the balancer owes
//! nothing at the end. Beside it stands what the simulator says of the very same requests. Run by `cargo
//! bench --bench replay`.

pub mod predict;
pub mod process;
pub mod prompt;
pub mod run;
pub mod scrape;
pub mod table;

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use plimsoll::sim::trace::Trace;
use plimsoll::simulate::file;

use run::Run;

/// From the one under which users wait longest to the default.
const POLICIES: [&str; 3] = ["round_robin", "least_connections", "least_pending_tokens"];
const ENGINES: usize = 4;
/// Requests per engine as in the reference figures (research/routing.md s.7.3): eight engines at 2.5.
const LOAD: f64 = 1.25;
/// Virtual seconds per second.
const SPEED: f64 = 10.0;
/// How long the traffic of the first pass lasts. The second takes half of it.
const PASS: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let trace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/traces/mooncake_conv.jsonl.zst");
    if !trace.exists() {
        say(&format!("SKIPPED: there is no {}", trace.display()));
        return ExitCode::SUCCESS;
    }
    match bench(&trace) {
        Ok(faults) if faults.is_empty() => {
            say("PASS: mean TTFT round_robin > least_connections > least_pending_tokens in both passes,");
            say("no failed request, every token counted alike, all counters of the balancer back at 0");
            ExitCode::SUCCESS
        }
        Ok(faults) => {
            faults.iter().for_each(|fault| say(&format!("FAIL: {fault}")));
            ExitCode::FAILURE
        }
        Err(error) => {
            say(&format!("FAIL: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Runs both passes and prints their tables; returns what was not as it should be.
fn bench(trace: &Path) -> io::Result<Vec<String>> {
    let trace = file::read(trace).map_err(io::Error::other)?;
    let folder = Folder::create()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut faults = Vec::new();
    for (pass, length) in [(1, PASS), (2, PASS / 2)] {
        let slice = first(&trace, length);
        let mut order = POLICIES;
        if pass == 2 {
            order.reverse();
        }
        say(&introduction(pass, length, &slice));
        say(table::HEADER);
        let mut runs = Vec::new();
        for policy in order {
            let run =
                runtime.block_on(run::run(&slice, policy, &folder.0.join(format!("{pass}-{policy}"))))?;
            say(&table::row(&run, &predict::predict(&slice, policy)?));
            faults.extend(run.faults.iter().map(|fault| format!("pass {pass}, {policy}: {fault}")));
            runs.push(run);
        }
        say("");
        runs.iter().for_each(|run| say(&table::load(run)));
        say("");
        faults.extend(disorder(&runs).map(|fault| format!("pass {pass}: {fault}")));
    }
    Ok(faults)
}

/// The requests of the trace that are sent within `length`.
fn first(trace: &Trace, length: Duration) -> Trace {
    let end = length.mul_f64(LOAD * SPEED);
    let requests = trace.requests.iter().filter(|request| request.at < end).cloned().collect();
    Trace { name: trace.name.clone(), block_tokens: trace.block_tokens, requests }
}

/// Neighbours in [`POLICIES`] of which the later made users wait as long or longer.
fn disorder(runs: &[Run]) -> impl Iterator<Item = String> {
    let mean = |policy| runs.iter().find(|run| run.policy == policy).and_then(|run| run.first_token.mean());
    POLICIES.windows(2).filter_map(move |pair| {
        let falls = mean(pair[0]).zip(mean(pair[1])).is_some_and(|(before, after)| before > after);
        (!falls).then(|| format!("mean TTFT of {} is not above that of {}", pair[0], pair[1]))
    })
}

fn introduction(pass: u32, length: Duration, slice: &Trace) -> String {
    let sum =
        |count: fn(&plimsoll::sim::trace::Request) -> u64| slice.requests.iter().map(count).sum::<u64>();
    let (input, output) = (sum(|request| request.prompt_tokens), sum(|request| request.output_tokens));
    format!(
        "pass {pass}: {} requests of mooncake_conv in {} s; {:.1} M tokens in, {:.2} M out; {ENGINES} engines \
         x {SPEED}, trace x {LOAD} x {SPEED}; all times real, not scaled back",
        slice.requests.len(),
        length.as_secs(),
        input as f64 / 1e6,
        output as f64 / 1e6,
    )
}

/// Where configurations and logs are; gone at the end.
struct Folder(PathBuf);

impl Folder {
    fn create() -> io::Result<Self> {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("replay-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // It is below cargo's folder for such files; `cargo clean` takes what is left.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Prints a line; a reader who has seen enough is no failure.
fn say(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}
