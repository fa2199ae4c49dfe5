//! What came out: a table for people, a file for machines, and what one has to know to believe either.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io;
use std::process::Command;

use serde::Serialize;

use super::process::{self, DIRECT};
use super::scenario::{Column, Sample, Scenario};

/// Those to which others are compared.
const MEASURES: [&str; 2] = ["nginx", "pingora"];

/// Where and of what everything was measured.
#[derive(Serialize)]
pub struct Circumstances {
    machine: String,
    kernel: String,
    date: String,
    commit: String,
    command: String,
    load_before: String,
    rounds: usize,
    seconds: f64,
    versions: BTreeMap<&'static str, String>,
}

impl Circumstances {
    /// Those of now.
    pub fn new(rounds: usize, seconds: f64, versions: BTreeMap<&'static str, String>) -> Self {
        let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
        let cpus = read("/proc/cpuinfo");
        let models = cpus.lines().filter_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let models: Vec<&str> = models.map(|(_, model)| model).collect();
        let arguments: Vec<String> = env::args().skip(1).filter(|argument| argument != "--bench").collect();
        let binary =
            env::var("PLIMSOLL_BIN").map(|binary| format!("PLIMSOLL_BIN={binary} ")).unwrap_or_default();
        Self {
            machine: format!("{} x {}", models.len(), models.first().unwrap_or(&"?")),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            date: output("date", &["--utc", "--iso-8601=minutes"]),
            commit: output("git", &["describe", "--always", "--dirty", "--abbrev=9"]),
            command: format!("{binary}cargo bench --bench wire -- {}", arguments.join(" ")),
            load_before: load(),
            rounds,
            seconds,
            versions,
        }
    }

    /// Lines for people.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![
            format!("{}, kernel {}, {}, sources {}", self.machine, self.kernel, self.date, self.commit),
            format!("command: {}", self.command),
            format!("rounds: {}, seconds: {}, load: {}", self.rounds, self.seconds, self.load_before),
        ];
        lines.extend(self.versions.iter().map(|(peer, version)| format!("{peer}: {version}")));
        lines
    }
}

/// The load averages of the machine: whether anybody else is at work.
pub fn load() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    output.map_or_else(|_| "?".to_owned(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// All samples of a scenario, by peer and round.
#[derive(Serialize)]
pub struct Outcome {
    name: &'static str,
    what: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    requests_per_second: Option<f64>,
    #[serde(skip)]
    columns: &'static [Column],
    peers: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    peer: &'static str,
    rounds: Vec<Sample>,
}

impl Outcome {
    /// Of `samples`: a list for each round, in it one for each of `peers`.
    pub fn new(
        scenario: &Scenario,
        rate: Option<f64>,
        peers: &[&'static str],
        mut samples: Vec<Vec<Sample>>,
    ) -> Self {
        let direct = peers.iter().position(|&peer| peer == DIRECT);
        for round in &mut samples {
            let Some(zero) = direct.map(|direct| round[direct].values.clone()) else { continue };
            for sample in round {
                for (key, added) in [("p50_us", "added_p50_us"), ("p99_us", "added_p99_us")] {
                    if let (Some(all), Some(zero)) = (sample.values.get(key), zero.get(key)) {
                        let difference = all - zero;
                        sample.values.insert(added, difference);
                    }
                }
            }
        }
        let row = |number: usize| samples.iter().map(|round| round[number].clone()).collect();
        let peers =
            peers.iter().enumerate().map(|(number, &peer)| Row { peer, rounds: row(number) }).collect();
        let Scenario { name, what, .. } = scenario;
        Self { name, what, requests_per_second: rate, columns: scenario.columns(), peers }
    }

    /// A table: medians, and in brackets the least and the most. Ratios are medians of the rounds' own.
    pub fn table(&self) -> Vec<String> {
        let rate = self.requests_per_second.map(|rate| format!(", {rate:.0} requests/s")).unwrap_or_default();
        let mut lines = vec![String::new(), format!("### {}: {}{rate}", self.name, self.what), String::new()];
        let headings = self.columns.iter().map(|(_, heading, _)| (*heading).to_owned());
        let measures = self.measures().into_iter().map(|measure| format!("x {measure}"));
        let mut headings: Vec<String> = headings.collect();
        headings.splice(1..1, measures);
        lines.push(format!("| peer | {} |", headings.join(" | ")));
        lines.push(format!("|---|{}", "---:|".repeat(headings.len())));
        for row in &self.peers {
            let mut cells: Vec<String> = self.columns.iter().map(|column| row.cell(*column)).collect();
            let ratios = self.measures().into_iter().map(|measure| self.ratio(row, measure));
            cells.splice(1..1, ratios.collect::<Vec<_>>());
            let errors: u64 = row.rounds.iter().map(|sample| sample.errors).sum();
            let invalid = if errors > 0 { format!(" **INVALID: {errors} errors**") } else { String::new() };
            lines.push(format!("| {}{invalid} | {} |", row.peer, cells.join(" | ")));
        }
        for row in &self.peers {
            if let Some(error) = row.rounds.iter().find_map(|sample| sample.first_error.as_ref()) {
                lines.push(format!("{}: {error}", row.peer));
            }
        }
        lines
    }

    fn measures(&self) -> Vec<&'static str> {
        MEASURES.into_iter().filter(|&measure| self.peers.iter().any(|row| row.peer == measure)).collect()
    }

    /// How many times what `measure` has in the first column.
    fn ratio(&self, row: &Row, measure: &str) -> String {
        let Some(measure) = self.peers.iter().find(|row| row.peer == measure) else { return String::new() };
        let key = self.columns[0].0;
        let ratios = row
            .rounds
            .iter()
            .zip(&measure.rounds)
            .filter_map(|(sample, measure)| Some(sample.values.get(key)? / measure.values.get(key)?));
        let mut ratios: Vec<f64> = ratios.filter(|ratio| ratio.is_finite()).collect();
        spread(&mut ratios).map_or_else(|| "-".to_owned(), |[median, ..]| format!("{median:.2}"))
    }
}

impl Row {
    fn cell(&self, (key, _, decimals): Column) -> String {
        let values = self.rounds.iter().filter_map(|sample| sample.values.get(key).copied());
        let mut values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
        let spread = spread(&mut values);
        spread.map_or_else(
            || "-".to_owned(),
            |[median, least, most]| match values.len() {
                1 => format!("{median:.decimals$}"),
                _ => format!("{median:.decimals$} ({least:.decimals$}..{most:.decimals$})"),
            },
        )
    }
}

/// The median, the least and the most.
fn spread(values: &mut [f64]) -> Option<[f64; 3]> {
    values.sort_unstable_by(f64::total_cmp);
    let (least, most) = (*values.first()?, *values.last()?);
    let middle = values.len() / 2;
    let median = if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    };
    Some([median, least, most])
}

/// Writes everything into `results.json`.
pub fn write(circumstances: &Circumstances, outcomes: &[Outcome]) -> io::Result<()> {
    let all = serde_json::json!({ "circumstances": circumstances, "scenarios": outcomes });
    fs::write(process::folder().join("results.json"), serde_json::to_vec_pretty(&all)?)
}
