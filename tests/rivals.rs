//! The yardsticks of `benches/sim` keep to their formulas, and to the rules of a replay.
//!
//! A benchmark without a test harness runs no tests of its own, so those that stand beside each formula are
//! run here.

#[path = "../benches/sim/rivals/mod.rs"]
pub mod rivals;

use std::fmt::Write as _;
use std::time::Duration;

use plimsoll::sim::fleet::{Scenario, Scrape, replay};
use plimsoll::sim::hardware::Hardware;
use plimsoll::sim::report::{Figures, Slo};
use plimsoll::sim::trace::Trace;
use rivals::{Rival, Site};

/// Six groups that begin alike, and prompts too long for any engine.
fn trace() -> Trace {
    let mut rng = fastrand::Rng::with_seed(4);
    let mut text = "{\"block_tokens\":512}\n".to_owned();
    for n in 0..600 {
        let (group, input) = (rng.u64(..6), if n % 50 == 7 { 900_000 } else { rng.u64(1_600..9_000) });
        let output = rng.u64(1..60);
        let _ = writeln!(
            text,
            "{{\"t\":{},\"in\":{input},\"out\":{output},\"h\":[{group},{group},{n}]}}",
            n * 30
        );
    }
    Trace::parse(text.as_bytes()).expect("a trace")
}

fn run(rival: Rival, trace: &Trace, replicas: usize) -> Figures {
    let hardware = Hardware::default();
    let slo = Slo { first_token: Duration::from_secs(2), per_token: Duration::from_millis(50), share: 0.9 };
    let speeds = vec![1.0; replicas];
    let scrape = Some(Scrape { interval: Duration::from_millis(50), delay: Duration::ZERO });
    let scenario = Scenario { trace, speedup: 1.0, hardware, speeds: &speeds, scrape, slo };
    let site = Site { replicas, kv_tokens: hardware.kv_tokens, block_tokens: trace.block_tokens };
    replay(&scenario, rival.build(&site, 7).as_mut(), |_| ())
}

#[test]
fn every_rival_serves_all_that_can_be_served_and_repeats_itself() {
    let trace = trace();
    for rival in Rival::ALL {
        for replicas in [1, 5] {
            let figures = run(rival, &trace, replicas);
            assert_eq!((figures.requests, figures.refused), (600, 12), "{}", rival.name());
            assert_eq!(figures.whole.len(), 588, "{}", rival.name());
            assert_eq!(figures, run(rival, &trace, replicas), "{}", rival.name());
        }
    }
}

#[test]
fn whoever_knows_of_prefixes_finds_more_of_them_cached_than_chance_does() {
    let trace = trace();
    let chance = run(Rival::Ketama, &trace, 1).hit_ratio / 2.0;
    for rival in Rival::ALL {
        let found = run(rival, &trace, 5).hit_ratio;
        assert!(found > chance, "{}: {found} against {chance}", rival.name());
    }
}
