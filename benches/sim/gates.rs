//! The gates of issue 3 ("Done when"): what must hold, in the worst of the seeds.
//!
//! The constants of the policies are one set for all traces; a gate that fails is reported, not tuned away.
//! A gate whose replays were not asked for is left out.

use std::time::Duration;

use crate::contenders::{
    Contender, GIE, KETAMA, LEAST_CONNECTIONS, LEAST_PENDING, PREFIX_HASH, ROUND_ROBIN, SMG,
};
use crate::measure::{Job, Outcome, Outcomes, Study};
use crate::workloads::{AZURE, B2B, CONV, TOOLAGENT};

/// A claim, its limit, and what was measured.
pub struct Gate {
    /// What is measured.
    pub claim: String,
    /// What it must be.
    pub limit: String,
    /// What it is.
    pub value: String,
    /// Whether it is within the limit.
    pub passes: bool,
}

/// The intervals of the sweep over stale readings.
pub const INTERVALS: [Duration; 5] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(15),
];

/// Which contenders the gates need on which workload, and whether with their capacity.
pub const NEEDED: [(usize, Contender, bool); 13] = [
    (CONV, LEAST_PENDING, true),
    (CONV, ROUND_ROBIN, true),
    (CONV, LEAST_CONNECTIONS, true),
    (CONV, GIE, true),
    (CONV, SMG, true),
    (CONV, PREFIX_HASH, false),
    (CONV, KETAMA, false),
    (CONV, Contender::Oracle, false),
    (AZURE, LEAST_PENDING, true),
    (AZURE, ROUND_ROBIN, true),
    (TOOLAGENT, LEAST_PENDING, true),
    (TOOLAGENT, ROUND_ROBIN, true),
    (B2B, LEAST_PENDING, false),
];

/// Every gate that can be told from `outcomes`.
pub fn gates(outcomes: &Outcomes) -> Vec<Gate> {
    let view = View(outcomes);
    let capacities = [
        (CONV, "mooncake_conv", ROUND_ROBIN, 2.0),
        (CONV, "mooncake_conv", LEAST_CONNECTIONS, 1.2),
        (CONV, "mooncake_conv", SMG, 1.4),
        (CONV, "mooncake_conv", GIE, 1.05),
        (AZURE, "azure2023_conv", ROUND_ROBIN, 1.35),
        (TOOLAGENT, "toolagent_like", ROUND_ROBIN, 2.6),
    ];
    let mut gates: Vec<Gate> = Vec::new();
    for (workload, name, than, limit) in capacities {
        let multiple = view.worst(workload, &[LEAST_PENDING, than], f64::min, |found| {
            // No capacity at all is the worst there is; a rival without one is no yardstick.
            Some(found[0].capacity.unwrap_or(0.0) / found[1].capacity.unwrap_or(f64::INFINITY))
        });
        let claim = format!("{name}: capacity of `least_pending_tokens`, as a multiple of {}", than.title());
        gates.extend(multiple.map(|value| at_least(claim, value, limit)));
    }
    gates.extend(view.of_the_latencies());
    gates.extend(view.of_the_hash());
    gates.extend(view.of_the_readings());
    gates.extend(view.of_the_half_slow_fleet());
    gates.extend(view.of_the_replays());
    gates
}

fn at_least(claim: String, value: f64, limit: f64) -> Gate {
    Gate { claim, limit: format!(">= {limit}"), value: format!("{value:.3}"), passes: value >= limit }
}

fn below(claim: &str, value: f64, limit: f64) -> Gate {
    Gate {
        claim: claim.to_owned(),
        limit: format!("< {limit}"),
        value: format!("{value:.3}"),
        passes: value < limit,
    }
}

struct View<'a>(&'a Outcomes);

impl View<'_> {
    /// The worst, over the seeds, of a figure made of the outcomes of `contenders` at the reference load;
    /// nothing if one of them is missing.
    fn worst(
        &self,
        workload: usize,
        contenders: &[Contender],
        worse: fn(f64, f64) -> f64,
        figure: impl Fn(&[&Outcome]) -> Option<f64>,
    ) -> Option<f64> {
        let of = |contender: &Contender, seed| {
            let find = |study| self.0.get(&Job { study, workload, contender: *contender, seed });
            find(Study::Main(true)).or_else(|| find(Study::Main(false)))
        };
        let by_seed = |seed| {
            let found: Option<Vec<&Outcome>> = contenders.iter().map(|c| of(c, seed)).collect();
            found.and_then(|found| figure(&found))
        };
        let seeds = self.seeds(|job| matches!(job.study, Study::Main(_)) && job.workload == workload);
        seeds.into_iter().map(by_seed).collect::<Option<Vec<_>>>()?.into_iter().reduce(worse)
    }

    fn seeds(&self, of: impl Fn(&Job) -> bool) -> Vec<u64> {
        let mut seeds: Vec<u64> = self.0.keys().filter(|job| of(job)).map(|job| job.seed).collect();
        seeds.sort_unstable();
        seeds.dedup();
        seeds
    }

    fn of_the_latencies(&self) -> Vec<Gate> {
        let oracle = self.worst(CONV, &[LEAST_PENDING, Contender::Oracle], f64::max, |found| {
            Some(found[0].ttft_mean / found[1].ttft_mean)
        });
        let p99 = self.worst(B2B, &[LEAST_PENDING], f64::max, |found| Some(found[0].ttft_p99 / 1e3));
        let oracle = oracle.map(|value| Gate {
            claim: "mooncake_conv x2.5: mean TTFT of `least_pending_tokens`, as a multiple of the oracle's"
                .into(),
            limit: "<= 1.03".into(),
            value: format!("{value:.3}"),
            passes: value <= 1.03,
        });
        let p99 =
            p99.map(|value| below("b2b_qps10: p99 TTFT of `least_pending_tokens`, in seconds", value, 0.6));
        oracle.into_iter().chain(p99).collect()
    }

    fn of_the_hash(&self) -> Vec<Gate> {
        let share =
            |contender| self.worst(CONV, &[contender], f64::max, |found| Some(found[0].largest_share));
        let ours = share(PREFIX_HASH)
            .map(|value| below("mooncake_conv: largest share of one of 8 under `prefix_hash`", value, 0.3));
        let plain = share(KETAMA).map(|value| Gate {
            claim: format!("mooncake_conv: the same under {}", KETAMA.title()),
            limit: "= 1".to_owned(),
            value: format!("{value:.3}"),
            passes: value == 1.0,
        });
        ours.into_iter().chain(plain).collect()
    }

    fn of_the_readings(&self) -> Option<Gate> {
        let seeds = self.seeds(|job| matches!(job.study, Study::Scrape(_)));
        let spread = |seed| {
            let mean = |interval| {
                let study = Study::Scrape(interval);
                let job = Job { study, workload: CONV, contender: LEAST_PENDING, seed };
                self.0.get(&job).map(|outcome| outcome.ttft_mean)
            };
            let means = INTERVALS.into_iter().map(mean).collect::<Option<Vec<f64>>>()?;
            let (least, most) = means.iter().fold((f64::MAX, 0.0_f64), |(a, b), m| (a.min(*m), b.max(*m)));
            Some(most / least - 1.0)
        };
        let worst =
            seeds.into_iter().map(spread).collect::<Option<Vec<_>>>()?.into_iter().reduce(f64::max)?;
        Some(Gate {
            claim:
                "mooncake_conv x2.5: spread of the mean TTFT of `least_pending_tokens` over readings every \
                    50 ms to 15 s"
                    .to_owned(),
            limit: "<= 2 %".to_owned(),
            value: format!("{:.2} %", worst * 100.0),
            passes: worst <= 0.02,
        })
    }

    fn of_the_half_slow_fleet(&self) -> Vec<Gate> {
        let seeds = self.seeds(|job| matches!(job.study, Study::HalfSlow(_)));
        let mean = |told, contender, seed| {
            let job = Job { study: Study::HalfSlow(told), workload: CONV, contender, seed };
            self.0.get(&job).map(|outcome| outcome.ttft_mean)
        };
        let worst = |of: &dyn Fn(u64) -> Option<f64>| {
            seeds.iter().map(|seed| of(*seed)).collect::<Option<Vec<_>>>()?.into_iter().reduce(f64::max)
        };
        let told = worst(&|seed| Some(mean(true, LEAST_PENDING, seed)? / mean(false, LEAST_PENDING, seed)?));
        let blind =
            worst(&|seed| Some(mean(false, LEAST_PENDING, seed)? / mean(false, LEAST_CONNECTIONS, seed)?));
        let told = told.map(|value| {
            below(
                "mooncake_conv x1.6, half of the fleet at half speed: mean TTFT of `least_pending_tokens` with \
                 weights, as a multiple of that without",
                value,
                1.0,
            )
        });
        let blind = blind.map(|value| {
            below(
                "the same fleet: mean TTFT without weights, as a multiple of plain least connections",
                value,
                1.0,
            )
        });
        told.into_iter().chain(blind).collect()
    }

    /// How long a replay takes and whether it repeats itself, of every policy of ours on the first trace.
    fn of_the_replays(&self) -> Vec<Gate> {
        let ours = |job: &&Job| {
            matches!((job.study, job.contender), (Study::Main(_), Contender::Ours(_))) && job.workload == CONV
        };
        let mut slowest: Option<(f64, &str)> = None;
        for contender in self.0.keys().filter(ours).map(|job| job.contender) {
            let of_it = self.0.iter().filter(|(job, _)| ours(job) && job.contender == contender);
            // Whoever else uses the machine can only make it slower.
            let seconds = of_it.map(|(_, outcome)| outcome.seconds).fold(f64::MAX, f64::min);
            if slowest.is_none_or(|(most, _)| seconds > most) {
                slowest = Some((seconds, contender.name()));
            }
        }
        let slowest = slowest.map(|(seconds, name)| Gate {
            claim: "mooncake_conv: wall time of a replay of 12,031 requests, slowest policy of ours"
                .to_owned(),
            limit: "<= 2 s".to_owned(),
            value: format!("{seconds:.2} s, {name}"),
            passes: seconds <= 2.0,
        });
        let repeated: Vec<bool> = self.0.values().filter_map(|outcome| outcome.repeats).collect();
        let same = repeated.iter().filter(|same| **same).count();
        let repeats = (!repeated.is_empty()).then(|| Gate {
            claim: "the same seed gives the same figures: replays that did, of those made twice".to_owned(),
            limit: "all".to_owned(),
            value: format!("{same} of {}", repeated.len()),
            passes: same == repeated.len(),
        });
        slowest.into_iter().chain(repeats).collect()
    }
}
