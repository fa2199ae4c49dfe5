//! The order of the policies, kept by CI: a small edition of `benches/sim`.
//!
//! Always on the demo's traffic, drawn from seeds; and on the first 3,000 requests of a recorded day, if
//! ../shared/traces is there. Limits are loose enough for any seed and tight enough that a broken policy does
//! not pass: whoever forgets what it has sent becomes round robin or worse. Everything is in virtual time, so
//! nothing here depends on the machine.

#[path = "../benches/sim/rivals/mod.rs"]
pub mod rivals;
#[path = "../benches/sim/traces.rs"]
pub mod traces;

use std::io::Write as _;
use std::time::Duration;

use plimsoll::policy::PolicyConfig;
use plimsoll::sim::fleet::{Dispatcher, Scenario, Scrape, replay};
use plimsoll::sim::hardware::Hardware;
use plimsoll::sim::oracle::Oracle;
use plimsoll::sim::proxies::{Fleet, Proxies};
use plimsoll::sim::report::{Figures, Slo};
use plimsoll::sim::trace::{Request, Trace};
use plimsoll::sim::workload::{Mix, Passage, Workload};
use rivals::{Rival, Site};

const SEEDS: [u64; 3] = [1, 2, 3];

/// Traffic and the fleet that serves it.
struct Day {
    trace: Trace,
    replicas: usize,
    speedup: f64,
}

impl Day {
    /// The first `requests` of the demo's traffic, for its four engines.
    fn synthetic(requests: usize, seed: u64) -> Self {
        const BLOCK: u64 = 128;
        let request = |asked: plimsoll::sim::workload::Request| {
            // A block is named by the passage it is of and its place in it, and so names what comes before.
            let named =
                |Passage { seed, tokens }| (1..=tokens / BLOCK).map(move |place| seed ^ (place << 48));
            let system = asked.system.map_or(0, |system| system.tokens);
            Request {
                at: asked.at,
                prompt_tokens: system + asked.user.tokens,
                output_tokens: asked.output_tokens,
                blocks: asked.system.into_iter().flat_map(named).collect(),
            }
        };
        let requests = Workload::new(Mix::default(), seed).take(requests).map(request).collect();
        let trace = Trace { name: None, block_tokens: BLOCK, requests };
        Self { trace, replicas: 4, speedup: 1.0 }
    }

    /// The first 3,000 requests of `mooncake_conv` at the speed-up of benches/sim; nothing, loudly, if the
    /// trace is not there.
    fn recorded() -> Option<Self> {
        let Some(mut trace) = traces::read("mooncake_conv") else {
            // Not `eprintln`, which the test harness swallows.
            let folder = traces::folder();
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED, nothing was tested on recorded traffic: no mooncake_conv.jsonl.zst in {}",
                folder.display()
            );
            return None;
        };
        assert_eq!((trace.requests.len(), trace.block_tokens), (12_031, 512));
        trace.requests.truncate(3_000);
        Some(Self { trace, replicas: 8, speedup: 2.5 })
    }

    fn replay(&self, dispatcher: &mut dyn Dispatcher, scrape: Option<Duration>) -> Figures {
        let scrape = scrape.map(|interval| Scrape { interval, delay: Duration::ZERO });
        let slo =
            Slo { first_token: Duration::from_secs(2), per_token: Duration::from_millis(50), share: 0.9 };
        let speeds = vec![1.0; self.replicas];
        let (trace, speedup, hardware) = (&self.trace, self.speedup, Hardware::default());
        replay(&Scenario { trace, speedup, hardware, speeds: &speeds, scrape, slo }, dispatcher, |_| ())
    }

    /// A policy of ours; with readings every second if `read`.
    fn ours(&self, name: &str, read: bool, seed: u64) -> Figures {
        let policy = PolicyConfig::by_name(name).expect("a policy of that name");
        let weights = vec![1; self.replicas];
        let kv_tokens = Hardware::default().kv_tokens;
        let fleet = Fleet { weights: &weights, kv_tokens, block_tokens: self.trace.block_tokens };
        let mut proxies = Proxies::new(1, &policy, &fleet, seed);
        self.replay(&mut proxies, read.then_some(Duration::from_secs(1)))
    }

    fn rival(&self, rival: Rival, seed: u64) -> Figures {
        let kv_tokens = Hardware::default().kv_tokens;
        let site = Site { replicas: self.replicas, kv_tokens, block_tokens: self.trace.block_tokens };
        self.replay(rival.build(&site, seed).as_mut(), Some(Duration::from_millis(50)))
    }

    fn oracle(&self) -> Figures {
        self.replay(&mut Oracle::default(), None)
    }
}

/// Mean time to the first token, in milliseconds.
fn mean(figures: &Figures) -> f64 {
    figures.first_token.mean().expect("an answer").as_secs_f64() * 1e3
}

/// Tokens before counts before turns; near the oracle; before the rivals; and nobody swamped.
fn the_order_holds(day: &Day, within: f64, seed: u64) {
    let tokens = day.ours("least_pending_tokens", true, seed);
    let (ours, counts) = (mean(&tokens), mean(&day.ours("least_connections", false, seed)));
    let turns = mean(&day.ours("round_robin", false, seed));
    assert!(ours < counts && counts < turns, "seed {seed}: {ours} < {counts} < {turns}");

    let oracle = mean(&day.oracle());
    assert!(ours < oracle * within, "seed {seed}: {ours} against {oracle} of the oracle");
    for rival in [Rival::Smg, Rival::Gie] {
        let theirs = mean(&day.rival(rival, seed));
        assert!(ours < theirs, "seed {seed}: {ours} against {theirs} of the {}", rival.title());
    }

    let fair = 1.0 / day.replicas as f64;
    for name in ["least_pending_tokens", "lmetric", "prefix_hash"] {
        let share = day.ours(name, true, seed).largest_share;
        assert!((fair..2.0 * fair).contains(&share), "seed {seed}: {share} of all to one under {name}");
    }
}

#[test]
fn on_seeded_traffic_tokens_beat_counts_counts_beat_turns_and_the_oracle_is_near() {
    for seed in SEEDS {
        the_order_holds(&Day::synthetic(3_000, seed), 1.15, seed);
    }
}

#[test]
fn on_recorded_traffic_tokens_beat_counts_counts_beat_turns_and_the_oracle_is_near() {
    let Some(day) = Day::recorded() else { return };
    the_order_holds(&day, 1.03, 1);
    let one = day.rival(Rival::Ketama, 1).largest_share;
    assert_eq!(one, 1.0, "every prompt of this trace begins alike: plain hashing knows one backend");
}

#[test]
fn a_seed_replays_to_the_last_nanosecond_and_another_differs() {
    let day = Day::synthetic(1_000, 4);
    for name in PolicyConfig::NAMES {
        assert_eq!(day.ours(name, true, 4), day.ours(name, true, 4), "{name}");
    }
    for rival in Rival::ALL {
        assert_eq!(day.rival(rival, 4), day.rival(rival, 4), "{}", rival.name());
    }
    assert_ne!(day.ours("random_two", true, 4), day.ours("random_two", true, 5));
    assert_ne!(Day::synthetic(10, 4).trace, Day::synthetic(10, 5).trace);
}

#[test]
fn readings_that_are_stale_change_nothing_for_one_proxy() {
    let day = Day::synthetic(3_000, 1);
    let policy = PolicyConfig::by_name("least_pending_tokens").expect("the default");
    let fleet = Fleet { weights: &[1; 4], kv_tokens: 400_000, block_tokens: day.trace.block_tokens };
    let means = [50, 1_000, 15_000].map(|ms| {
        let mut proxies = Proxies::new(1, &policy, &fleet, 1);
        mean(&day.replay(&mut proxies, Some(Duration::from_millis(ms))))
    });
    let (least, most) = means.iter().fold((f64::MAX, 0.0_f64), |(a, b), m| (a.min(*m), b.max(*m)));
    assert!(most <= least * 1.02, "{means:?}");
}
