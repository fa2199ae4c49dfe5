//! What a simulation found, as a table for people and as JSON for programs.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};

use crate::sim::report::{Figures, Samples};

/// What the oracle is called where policies are.
pub(super) const ORACLE: &str = "oracle";

/// The figures of one policy under one seed.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub(super) policy: String,
    pub(super) seed: u64,
    pub(super) figures: Figures,
}

impl Run {
    /// How much longer the mean first token takes than under the oracle and the same seed, as a part of that
    /// time; nothing if the oracle is not among the `runs`.
    fn to_oracle(&self, runs: &[Self]) -> Option<f64> {
        let mean = |run: &Self| Some(run.figures.first_token.mean()?.as_secs_f64());
        let oracle = runs.iter().find(|run| run.policy == ORACLE && run.seed == self.seed)?;
        Some(mean(self)? / mean(oracle)? - 1.0)
    }
}

/// The largest speed-up one policy keeps the SLO at, under one seed.
#[derive(Clone, Debug)]
pub(super) struct Limit {
    pub(super) policy: String,
    pub(super) seed: u64,
    pub(super) speedup: Option<f64>,
    /// Requests per second at that speed-up.
    pub(super) rate: Option<f64>,
    /// Each speed-up that was tried, and the share of good requests.
    pub(super) tried: Vec<(f64, f64)>,
}

/// The runs, one line each, below the names of the columns.
pub(super) fn runs(runs: &[Run]) -> String {
    let mut text = String::new();
    let quantiles =
        |width: usize| ["mean", "p50", "p90", "p99"].map(|name| format!("{name:>width$}")).concat();
    let _ = writeln!(text, "{:<27}{:>32}{:>24}{:>28}", "", "TTFT ms", "TPOT ms", "E2E s");
    let with_oracle = runs.iter().any(|run| run.policy == ORACLE);
    let _ = write!(
        text,
        "{:<22}{:>5}{}{}{}{:>8}{:>8}{:>6}{:>7}{:>9}",
        "policy",
        "seed",
        quantiles(8),
        quantiles(6),
        quantiles(7),
        "in SLO",
        "good/s",
        "hits",
        "share",
        "preempt"
    );
    if with_oracle {
        let _ = write!(text, "{:>10}", "to oracle");
    }
    text.push('\n');
    for run in runs {
        let Run { policy, seed, figures } = run;
        let _ = write!(
            text,
            "{policy:<22}{seed:>5}{}{}{}{:>8}{:>8.2}{:>6}{:>7}{:>9}",
            cells(&figures.first_token, 8, 0, 1e3),
            cells(&figures.per_token, 6, 1, 1e3),
            cells(&figures.whole, 7, 2, 1.0),
            percent(figures.good_share()),
            figures.goodput(),
            percent(figures.hit_ratio),
            percent(figures.largest_share),
            figures.preemptions
        );
        if with_oracle {
            let distance = run.to_oracle(runs).map(|part| format!("{:+.1}%", part * 100.0));
            let _ = write!(text, "{:>10}", distance.as_deref().unwrap_or("-"));
        }
        text.push('\n');
    }
    // The same requests are too long under every policy.
    if let Some(refused) = runs.iter().map(|run| run.figures.refused).max().filter(|refused| *refused > 0) {
        let _ = writeln!(text, "{refused} requests exceed the engine's KV memory and were refused");
    }
    text
}

/// The limits, each also as a multiple of the first policy's under the same seed.
pub(super) fn limits(limits: &[Limit]) -> String {
    let mut text =
        format!("{:<22}{:>5}{:>10}{:>10}{:>10}\n", "policy", "seed", "speed-up", "req/s", "multiple");
    for Limit { policy, seed, speedup, rate, .. } in limits {
        let first = limits.iter().find(|limit| limit.seed == *seed).and_then(|limit| limit.speedup);
        let cell = |number: Option<f64>| number.map_or_else(|| "-".to_owned(), |n| format!("{n:.2}"));
        let multiple = speedup.zip(first).map(|(this, first)| this / first);
        let (speedup, rate, multiple) = (cell(*speedup), cell(*rate), cell(multiple));
        let _ = writeln!(text, "{policy:<22}{seed:>5}{speedup:>10}{rate:>10}{multiple:>10}");
    }
    text
}

/// The runs as JSON.
pub(super) fn runs_json(runs: &[Run]) -> Value {
    let run = |run: &Run| {
        let Run { policy, seed, figures } = run;
        json!({
            "policy": policy,
            "seed": seed,
            "requests": figures.requests,
            "refused": figures.refused,
            "ttft_ms": samples_json(&figures.first_token),
            "tpot_ms": samples_json(&figures.per_token),
            "e2e_ms": samples_json(&figures.whole),
            "good_share": figures.good_share(),
            "goodput": figures.goodput(),
            "hit_ratio": figures.hit_ratio,
            "largest_share": figures.largest_share,
            "preemptions": figures.preemptions,
            "to_oracle": run.to_oracle(runs),
        })
    };
    runs.iter().map(run).collect()
}

/// The limits as JSON; `null` where the SLO is never kept.
pub(super) fn limits_json(limits: &[Limit]) -> Value {
    let limit = |Limit { policy, seed, speedup, rate, tried }: &Limit| {
        let tried: Value =
            tried.iter().map(|(speedup, good)| json!({ "speedup": speedup, "good_share": good })).collect();
        json!({ "policy": policy, "seed": seed, "speedup": speedup, "rate": rate, "tried": tried })
    };
    limits.iter().map(limit).collect()
}

/// Mean, p50, p90 and p99; nothing without samples.
fn summary(samples: &Samples) -> Option<[Duration; 4]> {
    let [p50, p90, p99] = samples.quantiles([0.5, 0.9, 0.99])?;
    Some([samples.mean()?, p50, p90, p99])
}

fn cells(samples: &Samples, width: usize, decimals: usize, per_second: f64) -> String {
    let cell = |value: Duration| format!("{:>width$.decimals$}", value.as_secs_f64() * per_second);
    match summary(samples) {
        Some(values) => values.map(cell).concat(),
        None => format!("{:>width$}", "-").repeat(4),
    }
}

fn samples_json(samples: &Samples) -> Value {
    let Some(values) = summary(samples) else { return Value::Null };
    let [mean, p50, p90, p99] = values.map(|value| value.as_secs_f64() * 1e3);
    json!({ "mean": mean, "p50": p50, "p90": p90, "p99": p99 })
}

fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_compared_with_the_first_under_the_same_seed() {
        let limit = |policy: &str, seed, speedup: Option<f64>| {
            let rate = speedup.map(|speedup| speedup * 2.0);
            Limit { policy: policy.to_owned(), seed, speedup, rate, tried: Vec::new() }
        };
        let text = limits(&[
            limit("round_robin", 1, Some(1.5)),
            limit("round_robin", 2, None),
            limit("lmetric", 1, Some(3.0)),
            limit("lmetric", 2, Some(3.0)),
        ]);
        let cells: Vec<Vec<&str>> =
            text.lines().skip(1).map(|line| line.split_whitespace().skip(1).collect()).collect();
        assert_eq!(cells[..2], [["1", "1.50", "3.00", "1.00"], ["2", "-", "-", "-"]]);
        assert_eq!(cells[2..], [["1", "3.00", "6.00", "2.00"], ["2", "3.00", "6.00", "-"]]);
    }

    #[test]
    fn a_run_without_answers_shows_dashes_and_says_why() {
        let figures = Figures { requests: 2, refused: 2, ..Figures::default() };
        let found = [Run { policy: "lmetric".to_owned(), seed: 1, figures }];
        let text = runs(&found);
        assert_eq!(text.lines().nth(2).map(|line| line.matches(" -").count()), Some(12), "{text}");
        assert!(text.ends_with("2 requests exceed the engine's KV memory and were refused\n"), "{text}");
        assert_eq!(runs_json(&found)[0]["ttft_ms"], Value::Null);
    }

    #[test]
    fn the_distance_to_the_oracle_is_that_of_the_means_under_the_same_seed() {
        let run = |policy: &str, seed, millis| {
            let mut first_token = Samples::default();
            first_token.push(Duration::from_millis(millis));
            let figures = Figures { requests: 1, first_token, ..Figures::default() };
            Run { policy: policy.to_owned(), seed, figures }
        };
        let mut found =
            vec![run("lmetric", 1, 150), run("lmetric", 2, 190), run(ORACLE, 1, 100), run(ORACLE, 2, 200)];
        let ends = |text: &str| -> Vec<String> {
            text.lines()
                .skip(2)
                .filter_map(|line| line.split_whitespace().last().map(str::to_owned))
                .collect()
        };
        assert_eq!(ends(&runs(&found)), ["+50.0%", "-5.0%", "+0.0%", "+0.0%"]);
        let half = runs_json(&found)[0]["to_oracle"].as_f64();
        assert!(half.is_some_and(|half| (half - 0.5).abs() < 1e-9), "{half:?}");
        found.truncate(2);
        assert_eq!(ends(&runs(&found)), ["0", "0"], "the last column is that of preemptions");
        assert_eq!(runs_json(&found)[0]["to_oracle"], Value::Null);
    }
}
