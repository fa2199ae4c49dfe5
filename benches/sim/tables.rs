//! The outcomes as Markdown: a table per workload, the studies, the gates, and where we lose.
//!
//! Every figure is the median of the seeds; the gates are the worst of them. The best of a column is bold,
//! whoever it is (the oracle, which nobody can be, apart).

use std::fmt::Write as _;

use crate::contenders::{
    Contender, GIE, LEAST_PENDING, OUR_LEAST_CONNECTIONS, PREFIX_HASH, ROUND_ROBIN, span,
};
use crate::gates::{Gate, INTERVALS};
use crate::measure::{Job, Outcome, Outcomes, Study};
use crate::workloads::{self, B2B, CONV, Workload};

/// Proxies side by side that are compared.
pub const PROXIES: [usize; 3] = [1, 2, 4];
/// On which workloads.
pub const PROXIES_ON: [usize; 2] = [CONV, B2B];
/// Under which policies.
pub const PROXIED: [Contender; 3] = [LEAST_PENDING, OUR_LEAST_CONNECTIONS, PREFIX_HASH];
/// Whom, for each interval between readings.
pub const SCRAPING: [Contender; 2] = [LEAST_PENDING, GIE];

/// A figure of a table.
struct Column {
    head: &'static str,
    of: fn(&Outcome) -> f64,
    shown: fn(f64) -> String,
    /// Whether more is better; nothing if neither is.
    more: Option<bool>,
}

const CAPACITY: Column = Column {
    head: "capacity",
    of: |outcome| outcome.capacity.unwrap_or(f64::NAN),
    shown: |value| format!("{value:.2}"),
    more: Some(true),
};
const LATENCIES: [Column; 3] = [
    Column { head: "mean TTFT", of: |outcome| outcome.ttft_mean, shown: time, more: Some(false) },
    Column { head: "p99 TTFT", of: |outcome| outcome.ttft_p99, shown: time, more: Some(false) },
    Column { head: "mean TPOT", of: |outcome| outcome.tpot_mean, shown: time, more: Some(false) },
];
const CACHE: [Column; 2] = [
    Column {
        head: "hit ratio",
        of: |outcome| outcome.hit_ratio,
        shown: |value| format!("{value:.2}"),
        more: Some(true),
    },
    Column {
        head: "largest share",
        of: |outcome| outcome.largest_share,
        shown: |value| format!("{value:.2}"),
        more: None,
    },
];

/// Everything, gates first.
pub fn report(outcomes: &Outcomes, gates: &[Gate]) -> String {
    let mut text = String::new();
    let mut seeds: Vec<u64> = outcomes.keys().map(|job| job.seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    let _ = writeln!(text, "{INTRODUCTION}\n\nSeeds: {seeds:?}.\n\n### Gates, worst of the seeds\n");
    text += &gate_table(gates);
    let view = View { outcomes };
    for (index, workload) in workloads::ALL.iter().enumerate() {
        view.workload_table(&mut text, index, workload);
    }
    view.losses(&mut text);
    view.scrape_table(&mut text);
    view.proxies_table(&mut text);
    text
}

/// The short of it, for the project's README: how much more than plain round robin each serves.
pub fn summary(outcomes: &Outcomes) -> String {
    let view = View { outcomes };
    let mut text = "| capacity, x plain round robin |".to_owned();
    for workload in &workloads::ALL {
        let _ = write!(text, " {} |", workload.name);
    }
    let _ = writeln!(text, "\n|---|{}", "---:|".repeat(workloads::ALL.len()));
    for contender in Contender::all().into_iter().filter(|contender| *contender != Contender::Oracle) {
        let _ = write!(text, "| {} |", contender.title());
        for index in 0..workloads::ALL.len() {
            let turns = view.main(index, ROUND_ROBIN, CAPACITY.of);
            let shown = |capacity: f64| number(capacity / turns, |value| format!("{value:.2}"));
            let multiple = shown(view.main(index, contender, CAPACITY.of));
            let is_best = view.best(index, &CAPACITY).is_some_and(|(_, best)| shown(best) == multiple);
            let _ = if is_best { write!(text, " **{multiple}** |") } else { write!(text, " {multiple} |") };
        }
        text.push('\n');
    }
    text
}

const INTRODUCTION: &str = "\
Replays in virtual time of the traces in `../shared/traces`, on engines modelled by `src/sim` (constants from \
NVIDIA AIConfigurator, no GPU was used). Our policies run the code of production. Policies of other projects are \
**re-implemented from their published formulas** (`benches/sim/rivals`, each with its source): the rows say \
what those formulas do in this model and nothing about the products they come from. Capacity is the largest \
speed-up of the trace at which the SLO is kept (bisection, differences below 3 % are noise); all other figures \
are at the workload's reference speed-up. Figures are medians of the seeds, the best of a column is bold. \"To the \
oracle\" is (mean TTFT - oracle's) / (plain round robin's - oracle's): 0 % is the oracle, 100 % round robin.";

fn gate_table(gates: &[Gate]) -> String {
    let mut text = "| | gate | limit | measured |\n|---|---|---|---|\n".to_owned();
    for Gate { claim, limit, value, passes } in gates {
        let verdict = if *passes { "PASS" } else { "**FAIL**" };
        let _ = writeln!(text, "| {verdict} | {claim} | {limit} | {value} |");
    }
    text
}

struct View<'a> {
    outcomes: &'a Outcomes,
}

impl View<'_> {
    /// The median over the seeds; not a number if there is none.
    fn median(&self, of: impl Fn(&Job) -> bool, figure: fn(&Outcome) -> f64) -> f64 {
        let found = self.outcomes.iter().filter(|(job, _)| of(job)).map(|(_, outcome)| figure(outcome));
        let mut figures: Vec<f64> = found.filter(|figure| !figure.is_nan()).collect();
        figures.sort_by(f64::total_cmp);
        figures.get(figures.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
    }

    fn main(&self, workload: usize, contender: Contender, figure: fn(&Outcome) -> f64) -> f64 {
        let is = |job: &Job| {
            matches!(job.study, Study::Main(_)) && (job.workload, job.contender) == (workload, contender)
        };
        self.median(is, figure)
    }

    /// The contenders of a workload, in the order of the tables.
    fn contenders(&self, workload: usize) -> Vec<Contender> {
        let measured = |contender: &Contender| {
            let is = |job: &Job| matches!(job.study, Study::Main(_)) && job.workload == workload;
            self.outcomes.keys().any(|job| is(job) && job.contender == *contender)
        };
        Contender::all().into_iter().filter(measured).collect()
    }

    /// The best value of a column on a workload; nothing if all are alike.
    fn best(&self, workload: usize, column: &Column) -> Option<(Contender, f64)> {
        let more = column.more?;
        let rows = self.contenders(workload).into_iter().filter(|contender| *contender != Contender::Oracle);
        let mut values: Vec<_> = rows.map(|row| (row, self.main(workload, row, column.of))).collect();
        values.retain(|(_, value)| !value.is_nan());
        // A stable sort: of two alike, the first of the table.
        values.sort_by(|a, b| if more { b.1.total_cmp(&a.1) } else { a.1.total_cmp(&b.1) });
        let (best, worst) = (*values.first()?, *values.last()?);
        (best.1 != worst.1).then_some(best)
    }

    fn workload_table(&self, text: &mut String, index: usize, workload: &Workload) {
        let contenders = self.contenders(index);
        if contenders.is_empty() {
            return;
        }
        let Workload { name, engine, replicas, slo, speedup, .. } = workload;
        let _ = writeln!(
            text,
            "\n### {name}\n\n{replicas} x {engine}; SLO: first token within {}, then {} per token, for {:.0} % \
             of the requests; reference speed-up {speedup}.\n",
            span(slo.first_token),
            span(slo.per_token),
            slo.share * 100.0
        );
        text.push_str("| policy | capacity | x round robin |");
        for column in LATENCIES.iter().chain(&CACHE) {
            let _ = write!(text, " {} |", column.head);
        }
        let _ = writeln!(text, " to the oracle |\n|---|{}", "---:|".repeat(8));
        let turns = self.main(index, ROUND_ROBIN, CAPACITY.of);
        for contender in contenders {
            let capacity = self.main(index, contender, CAPACITY.of);
            let cell = |column| self.cell(index, contender, column);
            let multiple = number(capacity / turns, |value| format!("{value:.2}"));
            let _ = write!(text, "| {} | {} | {multiple} |", contender.title(), cell(&CAPACITY));
            for column in LATENCIES.iter().chain(&CACHE) {
                let _ = write!(text, " {} |", cell(column));
            }
            let _ = writeln!(text, " {} |", number(self.distance(index, contender), percent));
        }
    }

    fn cell(&self, workload: usize, contender: Contender, column: &Column) -> String {
        let shown = number(self.main(workload, contender, column.of), column.shown);
        // What looks like the best is the best: nobody is second by what the table does not show.
        let best = self.best(workload, column).map(|(_, best)| number(best, column.shown));
        if best.as_ref() == Some(&shown) && contender != Contender::Oracle {
            format!("**{shown}**")
        } else {
            shown
        }
    }

    fn distance(&self, workload: usize, contender: Contender) -> f64 {
        let mean = |contender| self.main(workload, contender, LATENCIES[0].of);
        let oracle = mean(Contender::Oracle);
        (mean(contender) - oracle) / (mean(ROUND_ROBIN) - oracle)
    }

    /// Every figure in which somebody is better than the default policy by more than a hundredth.
    fn losses(&self, text: &mut String) {
        let mut losses = String::new();
        for (index, workload) in workloads::ALL.iter().enumerate() {
            for column in std::iter::once(&CAPACITY).chain(&LATENCIES).chain(&CACHE) {
                let ours = self.main(index, LEAST_PENDING, column.of);
                let Some((best, value)) = self.best(index, column) else { continue };
                let worse = (ours / value - 1.0).abs();
                if best == LEAST_PENDING || ours.is_nan() || worse <= 0.01 {
                    continue;
                }
                let (name, head, title) = (workload.name, column.head, best.title());
                let (theirs, ours) = ((column.shown)(value), (column.shown)(ours));
                let _ = writeln!(losses, "- {name}, {head}: {theirs} with {title}, ours {ours}.");
            }
        }
        if !losses.is_empty() {
            let _ = write!(
                text,
                "\n### Where `least_pending_tokens` is not the best\n\nBy more than 1 %; below 3 % it may be noise.\n\n{losses}"
            );
        }
    }

    fn scrape_table(&self, text: &mut String) {
        let mean = |contender, interval| {
            let study = Study::Scrape(interval);
            self.median(|job| (job.study, job.contender) == (study, contender), |o| o.ttft_mean)
        };
        if mean(LEAST_PENDING, INTERVALS[0]).is_nan() {
            return;
        }
        text.push_str(
            "\n### Stale readings: mean TTFT on mooncake_conv x2.5 by the interval between scrapes\n\n",
        );
        text.push_str("| policy |");
        INTERVALS.iter().for_each(|interval| {
            let _ = write!(text, " {} |", span(*interval));
        });
        let _ = writeln!(text, "\n|---|{}", "---:|".repeat(INTERVALS.len()));
        for contender in SCRAPING {
            let title = contender.title();
            let title = title.split(", scrapes every").next().unwrap_or_default();
            let cells: Vec<_> = INTERVALS.iter().map(|i| number(mean(contender, *i), time)).collect();
            let _ = writeln!(text, "| {title} | {} |", cells.join(" | "));
        }
    }

    fn proxies_table(&self, text: &mut String) {
        let mean = |workload, contender, count| {
            let wanted = (Study::Proxies(count), workload, contender);
            self.median(|job| (job.study, job.workload, job.contender) == wanted, |o| o.ttft_mean)
        };
        if mean(CONV, LEAST_PENDING, PROXIES[0]).is_nan() {
            return;
        }
        text.push_str(
            "\n### Several proxies that know nothing of each other: mean TTFT at the reference speed-up\n\n\
             Readings every second; each request comes to one of the proxies by lot.\n\n| workload | policy |",
        );
        PROXIES.iter().for_each(|count| {
            let _ = write!(text, " {count} |");
        });
        let _ = writeln!(text, "\n|---|---|{}", "---:|".repeat(PROXIES.len()));
        for workload in PROXIES_ON {
            for contender in PROXIED {
                let cell = |count: &usize| number(mean(workload, contender, *count), time);
                let cells: Vec<_> = PROXIES.iter().map(cell).collect();
                let (name, title) = (workloads::ALL[workload].name, contender.title());
                let _ = writeln!(text, "| {name} | {title} | {} |", cells.join(" | "));
            }
        }
    }
}

fn number(value: f64, shown: fn(f64) -> String) -> String {
    if value.is_finite() { shown(value) } else { "-".to_owned() }
}

/// Milliseconds, or seconds if there are many.
fn time(ms: f64) -> String {
    match ms {
        ..100.0 => format!("{ms:.1} ms"),
        ..10_000.0 => format!("{ms:.0} ms"),
        _ => format!("{:.1} s", ms / 1e3),
    }
}

/// A share in hundredths; ten times round robin's distance says all there is to say.
fn percent(share: f64) -> String {
    // Rounded first, and without a minus before a zero.
    let tenths = (share * 1e3).round() + 0.0;
    if share > 10.0 { "> 1,000 %".to_owned() } else { format!("{:.1} %", tenths / 10.0) }
}
