//! Which replays are made, and what is kept of each.
//!
//! A [`Job`] names one question; its answer depends on nothing else, so jobs run on all cores in any order and
//! the outcome is the same.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use plimsoll::clock::Clock;
use plimsoll::sim::capacity;
use plimsoll::sim::report::Figures;
use plimsoll::sim::trace::Trace;
use plimsoll::simulate::parallel;

use crate::contenders::{Contender, Setting, run};
use crate::workloads;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Study {
    /// The figures at the reference load; and the capacity at the SLO, if `true`.
    Main(bool),
    /// The figures when readings come this often.
    Scrape(Duration),
    /// The figures of so many proxies that know nothing of each other.
    Proxies(usize),
    /// The figures at [`HALF_SLOW_SPEEDUP`] when every second replica runs at half speed: which the
    /// contender is told by weights, if `true`.
    HalfSlow(bool),
}

/// The load that a fleet of which half is slow is given.
pub const HALF_SLOW_SPEEDUP: f64 = 1.6;

/// One question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Job {
    /// What is asked.
    pub study: Study,
    /// Index into [`workloads::ALL`].
    pub workload: usize,
    /// Of whom.
    pub contender: Contender,
    /// On which day; see [`workloads::Workload::day`].
    pub seed: u64,
}

/// Its answer.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The largest speed-up that keeps the SLO, if it was asked for and there is one.
    pub capacity: Option<f64>,
    /// Mean time to the first token, in milliseconds.
    pub ttft_mean: f64,
    /// Its 99th percentile, in milliseconds.
    pub ttft_p99: f64,
    /// Mean time per further token, in milliseconds.
    pub tpot_mean: f64,
    /// Share of the prompt tokens that the engines had cached.
    pub hit_ratio: f64,
    /// Share of the requests that the most used replica got.
    pub largest_share: f64,
    /// A second replay had the same outcome to the last nanosecond; `None` if there was none.
    pub repeats: Option<bool>,
    /// How long a replay took, in seconds.
    pub seconds: f64,
}

/// All answers.
pub type Outcomes = BTreeMap<Job, Outcome>;

/// Answers `jobs` on all cores. `traces` are by workload; `said` is called after each job with its number.
pub fn answer(
    jobs: &[Job],
    traces: &[Option<Trace>],
    said: impl Fn(usize, &Job, &Outcome) + Sync,
) -> Outcomes {
    let (cores, done) = (std::thread::available_parallelism().map_or(1, usize::from), AtomicUsize::new(0));
    let answers = parallel::map(jobs, cores, |job| {
        let outcome = job.answer(traces[job.workload].as_ref()?);
        said(done.fetch_add(1, Ordering::Relaxed) + 1, job, &outcome);
        Some((*job, outcome))
    });
    answers.into_iter().flatten().collect()
}

impl Job {
    fn answer(&self, trace: &Trace) -> Outcome {
        let workload = &workloads::ALL[self.workload];
        let trace = workload.day(trace, self.seed);
        let replicas = workload.replicas;
        let mut setting = Setting {
            workload,
            trace: &trace,
            seed: self.seed,
            speedup: workload.speedup,
            speeds: vec![1.0; replicas],
            weights: vec![1; replicas],
            proxies: 1,
            scrape: None,
        };
        match self.study {
            Study::Main(_) => {}
            Study::Scrape(interval) => setting.scrape = Some(interval),
            Study::Proxies(count) => setting.proxies = count,
            Study::HalfSlow(told) => {
                setting.speedup = HALF_SLOW_SPEEDUP;
                setting.speeds = [1.0, 0.5].into_iter().cycle().take(replicas).collect();
                if told {
                    setting.weights = [2, 1].into_iter().cycle().take(replicas).collect();
                }
            }
        }
        let clock = Clock::start();
        let figures = run(self.contender, &setting);
        let seconds = clock.now().as_nanos() as f64 / 1e9;
        let mut outcome = Outcome::of(&figures, seconds);
        if matches!(self.study, Study::Main(_)) && self.seed == 1 && self.contender != Contender::Oracle {
            let clock = Clock::start();
            outcome.repeats = Some(run(self.contender, &setting) == figures);
            outcome.seconds = outcome.seconds.min(clock.now().as_nanos() as f64 / 1e9);
        }
        if self.study == Study::Main(true) {
            outcome.capacity = capacity::largest(|speedup| {
                setting.speedup = speedup;
                run(self.contender, &setting).good_share() >= workload.slo.share
            });
        }
        outcome
    }
}

impl Outcome {
    fn of(figures: &Figures, seconds: f64) -> Self {
        let ms = |duration: Option<Duration>| duration.map_or(f64::NAN, |d| d.as_secs_f64() * 1e3);
        let p99 = figures.first_token.quantiles([0.99]).map(|[p99]| p99);
        Self {
            capacity: None,
            ttft_mean: ms(figures.first_token.mean()),
            ttft_p99: ms(p99),
            tpot_mean: ms(figures.per_token.mean()),
            hit_ratio: figures.hit_ratio,
            largest_share: figures.largest_share,
            repeats: None,
            seconds,
        }
    }
}
