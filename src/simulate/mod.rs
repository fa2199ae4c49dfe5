//! `plimsoll simulate`: which policy serves a recorded day best, found out in seconds and without a GPU.
//!
//! A trace, or traffic made up from a seed, is replayed in virtual time through the decision code that
//! production runs ([`crate::sim::fleet`]) onto as many engines of a known speed as one likes, once per
//! policy and seed. Either at one speed-up, with all figures; or `--capacity`, which looks for the largest
//! speed-up at which the SLO is still kept. Everything is read and checked before anything runs ([`setup`]); the same
//! command prints the same bytes every time, on any number of cores.

pub mod file;
mod options;
pub mod parallel;
mod plot;
mod progress;
mod setup;
mod table;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::Path;

pub use self::options::{SimulateOptions, with_policies};
use self::progress::Progress;
use self::setup::{Contestant, Setup, Task};
use self::table::{Limit, Run};
use crate::config;
use crate::policy::Policies;
use crate::sim::capacity;
use crate::sim::fleet::{Scenario, replay};
use crate::sim::oracle::Oracle;
use crate::sim::proxies::{Fleet, Proxies};
use crate::sim::report::Figures;
use crate::sim::trace::Trace;

/// Why nothing was simulated.
#[derive(Clone, Debug, PartialEq)]
pub enum Failure {
    /// The configuration, or a file of constants, is not valid.
    Invalid(config::Report),
    /// Anything else, in a sentence.
    Other(String),
}

impl From<config::Report> for Failure {
    fn from(report: config::Report) -> Self {
        Self::Invalid(report)
    }
}

impl From<String> for Failure {
    fn from(why: String) -> Self {
        Self::Other(why)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(report) => report.fmt(f),
            Self::Other(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Failure {}

/// Simulates, writes the plot if one is wanted, and returns what to print. A configuration may name any of
/// `policies`.
///
/// # Errors
/// If a file cannot be read, understood or written, or the options do not go with what it says.
pub fn simulate(options: &SimulateOptions, policies: &Policies) -> Result<String, Failure> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    simulate_on(options, policies, cores)
}

fn simulate_on(options: &SimulateOptions, policies: &Policies, threads: usize) -> Result<String, Failure> {
    let setup = Setup::new(options, policies)?;
    let unwritable = |path: &Path, error: &std::io::Error| format!("{}: {error}", path.display());
    if let Some(path) = &options.plot {
        // Before an hour of work, not after it.
        File::options().append(true).create(true).open(path).map_err(|error| unwritable(path, &error))?;
    }
    let tasks = setup.tasks();
    let progress = Progress::of(tasks.len());
    let simulation = Simulation { setup, tasks, threads, draws: options.plot.is_some(), progress };
    let (text, picture) = if options.capacity {
        simulation.capacities(options.json)
    } else {
        simulation.runs(options.speedup, options.json)
    };
    if let (Some(path), Some(picture)) = (&options.plot, picture) {
        std::fs::write(path, picture).map_err(|error| unwritable(path, &error))?;
    }
    Ok(text)
}

struct Simulation {
    setup: Setup,
    tasks: Vec<Task>,
    threads: usize,
    /// Whether a picture is wanted.
    draws: bool,
    progress: Progress,
}

impl Simulation {
    /// What is printed and what is drawn of a run of each contestant under each seed.
    fn runs(&self, speedup: f64, json: bool) -> (String, Option<String>) {
        let runs = self.each(|task| {
            let trace = self.setup.traffic.trace(task.seed);
            let figures = self.replay(task, &trace, speedup);
            Run { policy: self.contestant(task).name().to_owned(), seed: task.seed, figures }
        });
        let (title, promise) = (format!("{}; speed-up {speedup}", self.setup.line()), self.setup.promise());
        let picture = self.draws.then(|| plot::runs(&runs, &self.setup.slo, &title, &promise));
        if json {
            let mut json = self.setup.json();
            json["speedup"] = speedup.into();
            json["runs"] = table::runs_json(&runs);
            return (format!("{json:#}\n"), picture);
        }
        (format!("{title}\n{promise}\n\n{}", table::runs(&runs)), picture)
    }

    /// What is printed and what is drawn of the search for the capacity of each.
    fn capacities(&self, json: bool) -> (String, Option<String>) {
        let share = self.setup.slo.share;
        let limits = self.each(|task| {
            let trace = self.setup.traffic.trace(task.seed);
            let mut tried = Vec::new();
            let keeps = |speedup| {
                let good = self.replay(task, &trace, speedup).good_share();
                tried.push((speedup, good));
                good >= share
            };
            let speedup = capacity::largest(keeps);
            let rate = speedup.and_then(|speedup| self.setup.traffic.rate(speedup));
            Limit { policy: self.contestant(task).name().to_owned(), seed: task.seed, speedup, rate, tried }
        });
        let (title, promise) = (self.setup.line(), self.setup.promise());
        let picture = self.draws.then(|| plot::limits(&limits, share, &title, &promise));
        if json {
            let mut json = self.setup.json();
            json["capacities"] = table::limits_json(&limits);
            return (format!("{json:#}\n"), picture);
        }
        let sought = format!("the largest speed-up at which {} % of the requests keep it", share * 100.0);
        (format!("{title}\n{promise}; {sought}\n\n{}", table::limits(&limits)), picture)
    }

    /// `work` of every task, in the order of the output.
    fn each<R: Send>(&self, work: impl Fn(&Task) -> R + Sync) -> Vec<R> {
        let done = parallel::map(&self.tasks, self.threads, |task| {
            let answer = work(task);
            self.progress.end(task.number);
            ((task.contestant, task.seed), answer)
        });
        self.progress.clear();
        let ordered: BTreeMap<(usize, u64), R> = done.into_iter().collect();
        ordered.into_values().collect()
    }

    fn contestant(&self, task: &Task) -> &Contestant {
        &self.setup.contestants[task.contestant]
    }

    fn replay(&self, task: &Task, trace: &Trace, speedup: f64) -> Figures {
        let Setup { hardware, ref speeds, ref weights, proxies, scrape, slo, .. } = self.setup;
        let scenario = Scenario { trace, speedup, hardware, speeds, scrape, slo };
        let contestant = self.contestant(task);
        let progress = |sent| {
            let label = || format!("{}, seed {}, speed-up {speedup:.2}:", contestant.name(), task.seed);
            self.progress.show(task.number, sent, trace.requests.len(), label);
        };
        match contestant {
            Contestant::Policy(policy) => {
                let (kv_tokens, block_tokens) = (hardware.kv_tokens, trace.block_tokens);
                let fleet = Fleet { weights, kv_tokens, block_tokens };
                replay(&scenario, &mut Proxies::new(proxies, policy, &fleet, task.seed), progress)
            }
            // It looks into the engines themselves.
            Contestant::Oracle => {
                replay(&Scenario { scrape: None, ..scenario }, &mut Oracle::default(), progress)
            }
        }
    }
}

#[cfg(test)]
mod tests;
