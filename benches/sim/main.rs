//! What a routing policy is worth: every policy of ours, and those of others, on recorded traffic, in virtual
//! time.
//!
//! `cargo bench --bench sim` replays four traces under every contender and three seeds, prints a report in
//! Markdown and checks the gates of issue 3: the exit code is 1 if one fails. `-- --write` also puts the
//! report into benches/README.md and the short of it into README.md. The same command prints the same bytes, except for the time it took.

pub mod contenders;
pub mod gates;
pub mod measure;
#[expect(
    dead_code,
    unused_imports,
    reason = "a bench is compiled like a test and has no harness: tests/rivals.rs runs the tests of the formulas"
)]
pub mod rivals;
pub mod tables;
pub mod traces;
pub mod workloads;

use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use plimsoll::sim::trace::Trace;

use self::contenders::{Contender, LEAST_CONNECTIONS, LEAST_PENDING};
use self::measure::{Job, Outcome, Study};
use self::workloads::CONV;

/// Replays recorded traffic under every policy and checks the gates of issue 3.
#[derive(Parser)]
#[command(name = "sim")]
struct Options {
    /// One trace only.
    #[arg(long, value_name = "NAME")]
    trace: Option<String>,
    /// One policy only, beside plain round robin and the oracle.
    #[arg(long, value_name = "NAME")]
    policy: Option<String>,
    /// How many seeds: 1 to K.
    #[arg(long, value_name = "K", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// One seed and no capacities: a minute instead of six.
    #[arg(long, conflicts_with_all = ["seeds", "write"])]
    quick: bool,
    /// Only what the gates need.
    #[arg(long, conflicts_with_all = ["policy", "write"])]
    gates: bool,
    /// Put the report into benches/README.md, and the short of it into README.md.
    #[arg(long, conflicts_with_all = ["trace", "policy"])]
    write: bool,
    /// What cargo says to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let traces = match options.traces() {
        Ok(traces) => traces,
        Err(why) => {
            let _ = writeln!(io::stderr(), "{why}");
            return ExitCode::from(2);
        }
    };
    let jobs = options.jobs();
    let outcomes = measure::answer(&jobs, &traces, |number, job, outcome| {
        let _ = writeln!(io::stderr(), "[{number}/{}] {}", jobs.len(), progress(job, outcome));
    });
    let gates = gates::gates(&outcomes);
    let report = tables::report(&outcomes, &gates);
    let _ = io::stdout().write_all(report.as_bytes());
    if options.write {
        let summary = tables::summary(&outcomes);
        for (file, name, section) in
            [("benches/README.md", "sim", &report), ("README.md", "routing", &summary)]
        {
            if let Err(why) = write(file, name, section) {
                let _ = writeln!(io::stderr(), "{file}: {why}");
                return ExitCode::from(2);
            }
        }
    }
    if gates.iter().all(|gate| gate.passes) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Options {
    /// The traces that are asked for, by workload.
    fn traces(&self) -> Result<Vec<Option<Trace>>, String> {
        let names = workloads::ALL.map(|workload| workload.name);
        if let Some(name) = &self.trace
            && !names.contains(&name.as_str())
        {
            return Err(format!("no trace called {name}, known are {}", names.join(", ")));
        }
        let contenders = Contender::all();
        if let Some(name) = &self.policy
            && contenders.iter().all(|contender| contender.name() != name)
        {
            let mut names: Vec<_> = contenders.iter().map(|contender| contender.name()).collect();
            names.dedup();
            return Err(format!("no policy called {name}, known are {}", names.join(", ")));
        }
        let asked = |name: &str| self.trace.as_ref().is_none_or(|asked| asked == name);
        let folder = traces::folder();
        let trace = |name: &str| {
            let trace = traces::read(name);
            trace.ok_or_else(|| format!("{name}.jsonl.zst is not in {}", folder.display()))
        };
        names.into_iter().map(|name| asked(name).then(|| trace(name)).transpose()).collect()
    }

    fn jobs(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        let asked = |workload: &usize| {
            self.trace.as_ref().is_none_or(|asked| asked == workloads::ALL[*workload].name)
        };
        for seed in 1..=if self.quick { 1 } else { self.seeds } {
            let mut ask = |study, workload, contender| {
                jobs.push(Job { study, workload, contender, seed });
            };
            for (workload, contender, capacity) in self.asked() {
                if asked(&workload) {
                    ask(Study::Main(capacity && !self.quick), workload, contender);
                }
            }
            if self.policy.is_some() {
                continue;
            }
            let study = |(study, workload, contender)| {
                if asked(&workload) {
                    ask(study, workload, contender);
                }
            };
            self.studies().into_iter().for_each(study);
        }
        jobs
    }

    /// Workload, contender, and whether its capacity is wanted.
    fn asked(&self) -> Vec<(usize, Contender, bool)> {
        if self.gates {
            let mut asked = gates::NEEDED.to_vec();
            // All of ours, for the time they take.
            let ours = Contender::all().into_iter().filter(|c| matches!(c, Contender::Ours(_)));
            asked.extend(ours.map(|ours| (CONV, ours, false)));
            asked.sort_by_key(|(workload, contender, capacity)| (*workload, *contender, !capacity));
            asked.dedup_by_key(|(workload, contender, _)| (*workload, *contender));
            return asked;
        }
        let wanted = |contender: &Contender| {
            let yardstick = matches!(contender, Contender::Plain("round_robin") | Contender::Oracle);
            yardstick || self.policy.as_ref().is_none_or(|name| contender.name() == name)
        };
        let contenders: Vec<_> = Contender::all().into_iter().filter(wanted).collect();
        let of = |workload| {
            contenders.iter().map(move |contender| (workload, *contender, *contender != Contender::Oracle))
        };
        (0..workloads::ALL.len()).flat_map(of).collect()
    }

    /// What is asked beside the main tables.
    fn studies(&self) -> Vec<(Study, usize, Contender)> {
        let mut studies = vec![
            (Study::HalfSlow(false), CONV, LEAST_CONNECTIONS),
            (Study::HalfSlow(false), CONV, LEAST_PENDING),
            (Study::HalfSlow(true), CONV, LEAST_PENDING),
        ];
        for contender in tables::SCRAPING {
            let of = |interval| (Study::Scrape(interval), CONV, contender);
            studies.extend(gates::INTERVALS.into_iter().map(of));
        }
        if !self.gates {
            for workload in tables::PROXIES_ON {
                for contender in tables::PROXIED {
                    studies.extend(tables::PROXIES.map(|count| (Study::Proxies(count), workload, contender)));
                }
            }
        }
        studies
    }
}

fn progress(job: &Job, outcome: &Outcome) -> String {
    let Job { study, workload, contender, seed } = job;
    let (workload, capacity) = (workloads::ALL[*workload].name, outcome.capacity);
    let capacity = capacity.map_or_else(String::new, |capacity| format!(", capacity {capacity:.2}"));
    format!(
        "{workload}, {}, seed {seed}, {study:?}: mean TTFT {:.1} ms{capacity} ({:.2} s)",
        contender.title(),
        outcome.ttft_mean,
        outcome.seconds
    )
}

/// Puts `section` between the marks called `name` in a file of the repository; what stands around it may be edited.
fn write(file: &str, name: &str, section: &str) -> io::Result<()> {
    let (begin, end) = (format!("<!-- {name}:begin -->\n"), format!("<!-- {name}:end -->\n"));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = std::fs::read_to_string(&path)?;
    let parts = text.split_once(&begin).and_then(|(before, rest)| Some((before, rest.split_once(&end)?.1)));
    let Some((before, after)) = parts else {
        return Err(io::Error::other(format!("no place between `{}` and `{}`", begin.trim(), end.trim())));
    };
    std::fs::write(path, format!("{before}{begin}\n{section}\n{end}{after}"))
}
