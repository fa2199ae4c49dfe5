//! The four workloads: a trace, what serves it, what is promised, and the load at which it is looked at.
//!
//! Hardware, promises and reference loads are those of research/routing.md s.7.3 and 7.5, so that its figures
//! and ours can be held against each other; it has no promise for `b2b_qps10`, which gets that of
//! `mooncake_conv`.
//!
//! A seed is another day of the same traffic. Seed 1 is the trace as it is. Any other draws each arrival anew:
//! within its tick of 3 s where the recording has ticks (`mooncake_conv`, which was de-quantised by such a
//! draw), else within 1 s before or after the recorded moment. It also seeds whatever a policy draws.

use std::time::Duration;

use plimsoll::sim::hardware::Hardware;
use plimsoll::sim::report::Slo;
use plimsoll::sim::trace::Trace;

/// What is replayed and how it is judged.
pub struct Workload {
    /// The name of the trace.
    pub name: &'static str,
    /// The row of [`Hardware::ALL`] that each replica is.
    pub engine: &'static str,
    /// How many replicas.
    pub replicas: usize,
    /// What makes a request good, and how many must be for the capacity.
    pub slo: Slo,
    /// The speed-up at which latencies are compared.
    pub speedup: f64,
    /// The grid on which arrivals were recorded.
    pub tick: Option<Duration>,
}

/// All of them.
pub const ALL: [Workload; 4] = [
    Workload {
        name: "mooncake_conv",
        engine: "llama-8b-h100",
        replicas: 8,
        slo: slo(2_000, 50, 0.9),
        speedup: 2.5,
        tick: Some(Duration::from_secs(3)),
    },
    Workload {
        name: "azure2023_conv",
        engine: "llama-8b-a100",
        replicas: 4,
        slo: slo(300, 50, 0.95),
        speedup: 4.0,
        tick: None,
    },
    Workload {
        name: "toolagent_like",
        engine: "llama-8b-h100",
        replicas: 8,
        slo: slo(1_000, 30, 0.95),
        speedup: 3.5,
        tick: None,
    },
    Workload {
        name: "b2b_qps10",
        engine: "qwen-32b-2xh100",
        replicas: 8,
        slo: slo(2_000, 50, 0.9),
        speedup: 1.0,
        tick: None,
    },
];
/// Where `mooncake_conv` is in [`ALL`].
pub const CONV: usize = 0;
/// Where `azure2023_conv` is in [`ALL`].
pub const AZURE: usize = 1;
/// Where `toolagent_like` is in [`ALL`].
pub const TOOLAGENT: usize = 2;
/// Where `b2b_qps10` is in [`ALL`].
pub const B2B: usize = 3;

const fn slo(first_token_ms: u64, per_token_ms: u64, share: f64) -> Slo {
    Slo {
        first_token: Duration::from_millis(first_token_ms),
        per_token: Duration::from_millis(per_token_ms),
        share,
    }
}

impl Workload {
    /// What each replica runs on.
    pub fn hardware(&self) -> Hardware {
        Hardware::named(self.engine).unwrap_or_default()
    }

    /// The traffic of the day `seed`.
    pub fn day(&self, trace: &Trace, seed: u64) -> Trace {
        let mut day = trace.clone();
        if seed == 1 {
            return day;
        }
        let mut rng = fastrand::Rng::with_seed(seed);
        for request in &mut day.requests {
            request.at = match self.tick {
                Some(tick) => {
                    let before = request.at.as_nanos() / tick.as_nanos();
                    tick * before as u32 + tick.mul_f64(rng.f64())
                }
                None => (request.at + Duration::from_secs(2).mul_f64(rng.f64()))
                    .saturating_sub(Duration::from_secs(1)),
            };
        }
        day.requests.sort_by_key(|request| request.at);
        day
    }
}
