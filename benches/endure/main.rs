//! Nothing is lost and nothing leaks: the real binary under clients that leave, engines that die, and a million
//! requests.
//!
//! `cargo bench --bench endure -- soak|aborts|failures|drips|handovers|all` runs the binary as a process of its own between
//! clients and engines of this one, and says PASS or FAIL of each promise; the exit code is 1 if one is broken. What
//! is drawn at random is drawn from `--seed` and the number of the request, so that a failing request can be asked
//! again.

pub mod aborts;
pub mod client;
pub mod drips;
pub mod engine;
pub mod failures;
pub mod handovers;
pub mod proxy;
#[path = "../replay/scrape.rs"]
pub mod scrape;
pub mod soak;
pub mod verdict;

use std::fmt::Display;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

/// Shows that nothing is lost and nothing leaks.
#[derive(Parser)]
#[command(name = "endure")]
struct Options {
    /// What to run.
    #[arg(value_enum)]
    what: What,
    /// Requests of `soak`.
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1_000..))]
    requests: u64,
    /// Samples of `aborts` for each stage and way.
    #[arg(long, value_name = "N", default_value_t = 200)]
    samples: usize,
    /// Failures that `failures` injects, with retries and again without.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    failures: u64,
    /// Dripping clients of `drips`.
    #[arg(long, value_name = "N", default_value_t = 2_000)]
    clients: usize,
    /// What everything random is drawn from.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// What cargo says to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

/// The parts of this bench.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// A million requests, one in twenty aborted and one in twenty meeting a failure: memory, descriptors, counters.
    Soak,
    /// How soon an engine is freed when its client has gone.
    Aborts,
    /// Engines that die at any byte: no answer is mixed or doubled, nobody is asked a third time.
    Failures,
    /// Thousands of clients that send a byte per second.
    Drips,
    /// A hundred reloads and ten upgrades under load, and how soon a process ends.
    Handovers,
    /// All of them.
    All,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("FAIL: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Runs what is asked for; how many promises are broken.
fn run(options: &Options) -> io::Result<usize> {
    // Thousands of clients, each of which has a descriptor here.
    rlimit::increase_nofile_limit(rlimit::INFINITY)?;
    let folder = Folder::create()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut findings = Findings::default();
    proxy::introduce()?;
    let asked = |what| options.what == what || options.what == What::All;
    runtime.block_on(async {
        let (findings, folder) = (&mut findings, folder.0.as_path());
        if asked(What::Failures) {
            failures::run(options.failures, options.seed, folder, findings).await?;
        }
        if asked(What::Aborts) {
            aborts::run(options.samples, folder, findings).await?;
        }
        if asked(What::Drips) {
            drips::run(options.clients, folder, findings).await?;
        }
        if asked(What::Handovers) {
            handovers::run(folder, findings).await?;
        }
        if asked(What::Soak) {
            soak::run(options.requests, options.seed, folder, findings).await?;
        }
        io::Result::Ok(())
    })?;
    Ok(findings.broken)
}

/// What was found out.
#[derive(Default)]
pub struct Findings {
    broken: usize,
}

impl Findings {
    /// Says whether a promise is kept.
    pub fn check(&mut self, is_kept: bool, promise: impl Display) {
        self.broken += usize::from(!is_kept);
        say(&format!("{}: {promise}", if is_kept { "PASS" } else { "FAIL" }));
    }
}

/// Where configurations are; gone at the end.
struct Folder(PathBuf);

impl Folder {
    fn create() -> io::Result<Self> {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("endure-{}", std::process::id()));
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
pub fn say(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}
