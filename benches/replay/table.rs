//! The table: a row of Markdown per run, and a line on what it cost, without which a row is not to be
//! believed.

use std::time::Duration;

use plimsoll::sim::report::{Figures, Samples};

use super::SPEED;
use super::run::Run;

/// The head of the table. Times are real; a user of engines at their own speed would wait [`SPEED`] times as
/// long.
pub const HEADER: &str = "\
| policy | requests | failed | TTFT mean ms | p50 | p99 | hit ratio | largest share | simulated mean ms | p50 | p99 \
| hit ratio | largest share | measured / simulated mean |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|";

/// The row of a run beside what the simulator says of it.
pub fn row(run: &Run, simulated: &Figures) -> String {
    let ratio = ms(run.first_token.mean()) / ms(simulated.first_token.mean());
    format!(
        "| {} | {} | {} | {} | {:.3} | {:.3} | {} | {:.3} | {:.3} | {ratio:.2} |",
        run.policy,
        run.requests,
        run.failed,
        times(&run.first_token),
        run.hit_ratio,
        run.largest_share,
        times(&simulated.first_token),
        simulated.hit_ratio,
        simulated.largest_share,
    )
}

/// What the run cost, and whether its clients kept up.
pub fn load(run: &Run) -> String {
    let cores = |time: Duration| time.as_secs_f64() / run.lasted.as_secs_f64();
    let others =
        run.cpu.all.saturating_sub(run.cpu.idle + run.cpu.engines + run.cpu.balancer + run.cpu.clients);
    let [half, most] =
        run.late.quantiles([0.5, 0.99]).unwrap_or_default().map(|late| late.as_secs_f64() * 1e3);
    // Only a policy that asks keeps an index of prefixes.
    let expected = if run.expected_hit_ratio > 0.0 {
        format!("; hit ratio as the balancer expected {:.3}", run.expected_hit_ratio)
    } else {
        String::new()
    };
    format!(
        "{}: {:.1} s, CPU {:.0} % idle; cores: engines {:.2}, balancer {:.2}, clients {:.2}, others {:.2}; \
         sent late by {half:.1} ms (p50), {most:.1} ms (p99); mean TTFT x {SPEED}: {:.0} ms{expected}",
        run.policy,
        run.lasted.as_secs_f64(),
        100.0 * run.cpu.idle.as_secs_f64() / run.cpu.all.as_secs_f64(),
        cores(run.cpu.engines),
        cores(run.cpu.balancer),
        cores(run.cpu.clients),
        cores(others),
        ms(run.first_token.mean()) * SPEED,
    )
}

fn times(samples: &Samples) -> String {
    let [half, most] = samples.quantiles([0.5, 0.99]).unwrap_or_default().map(Some).map(ms);
    format!("{:.1} | {half:.1} | {most:.1}", ms(samples.mean()))
}

fn ms(time: Option<Duration>) -> f64 {
    time.map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
}
