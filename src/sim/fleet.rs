//! A fleet in virtual time: a trace, the production [`Balancer`], and as many [`Replica`]s as one likes.
//!
//! Nothing is decided here. A request is picked, answered and settled by the calls that the proxy makes, at
//! the moments at which it makes them: picked and charged on arrival, answered at the first token, settled
//! after the last. So what a replay says of a policy, it says of the code that production runs.
//!
//! ```text
//! the next event = the earliest end of a step, or else the next arrival / speed-up
//! ```
//!
//! Simplifications beside those of the replica: the length of a prompt is known, not estimated from its
//! bytes; the network takes no time; nothing fails, so nobody is retried, ejected or queued for. The engines'
//! cache and the prefix index count in the trace's blocks, which are all that is known of sharing, and the
//! index knows the size of the caches, as it does from the first scrape on.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::hardware::Hardware;
use super::replica::{Emission, Job, Kind, Replica};
use super::report::{Figures, Slo, Timing};
use super::trace::{self, Trace};
use crate::balance::ledger::Charge;
use crate::balance::{Balancer, Settings, ejection};
use crate::clock::Time;
use crate::engine::Reading;
use crate::policy::{PolicyConfig, Request};

/// What is replayed, and on what.
#[derive(Clone, Debug)]
pub struct Scenario<'a> {
    /// The traffic.
    pub trace: &'a Trace,
    /// How many times faster than recorded it comes; above 0.
    pub speedup: f64,
    /// What every replica runs on.
    pub hardware: Hardware,
    /// How fast each replica is, as a part of `hardware`; above 0, one per replica.
    pub speeds: &'a [f64],
    /// Who chooses.
    pub policy: &'a PolicyConfig,
    /// Seed of the policy's draws and ties.
    pub seed: u64,
    /// What makes a request good.
    pub slo: Slo,
}

/// Replays the whole trace until its last answer, and calls `progress` with the number of requests sent so
/// far, once for each.
pub fn replay(scenario: &Scenario<'_>, mut progress: impl FnMut(usize)) -> Figures {
    let mut fleet = Fleet::new(scenario);
    for (index, request) in scenario.trace.requests.iter().enumerate() {
        let now = Time::ZERO + request.at.div_f64(scenario.speedup);
        fleet.run_until(now);
        fleet.arrive(index, request, now);
        progress(index + 1);
    }
    fleet.run_until(Time::from_nanos(u64::MAX));
    fleet.figures()
}

struct Fleet {
    balancer: Balancer,
    replicas: Vec<Replica>,
    /// The ends of the steps in progress: one for each replica that is not idle.
    calendar: BinaryHeap<Reverse<(Time, usize)>>,
    /// By number in the trace, which is the id of the job too.
    flights: Vec<Flight>,
    /// Requests sent to each replica.
    sent: Vec<u64>,
    /// Tokens per block of the trace.
    block_tokens: u64,
    slo: Slo,
    figures: Figures,
    /// The last token so far.
    ended: Time,
    emissions: Vec<Emission>,
}

/// A request on its way.
struct Flight {
    charge: Option<Charge>,
    arrived: Time,
    first_token: Duration,
    output_tokens: u64,
}

/// Nothing fails in virtual time, so when to eject does not matter.
const SETTINGS: Settings = Settings {
    ejection: ejection::Rule { max_fails: 3, fail_timeout: Duration::from_secs(30) },
    max_requests: None,
};

impl Fleet {
    fn new(scenario: &Scenario<'_>) -> Self {
        let block_tokens = scenario.trace.block_tokens;
        let mut balancer = Balancer::new(SETTINGS, scenario.policy.build(), scenario.seed);
        let addresses: Vec<_> = (0..scenario.speeds.len()).map(address).collect();
        balancer.set_members(addresses.iter().map(|address| (*address, 1)));
        let capacity = Some(scenario.hardware.kv_tokens);
        let reading = Reading { kv_capacity_tokens: capacity, ..Reading::default() };
        for address in &addresses {
            balancer.observe_reading(address, reading, block_tokens as f64, Time::ZERO);
        }
        let replica =
            |speed: &f64| Replica::new(Hardware { block_tokens, ..scenario.hardware.at_speed(*speed) });
        Self {
            balancer,
            replicas: scenario.speeds.iter().map(replica).collect(),
            calendar: BinaryHeap::new(),
            flights: Vec::with_capacity(scenario.trace.requests.len()),
            sent: vec![0; scenario.speeds.len()],
            block_tokens,
            slo: scenario.slo,
            figures: Figures::default(),
            ended: Time::ZERO,
            emissions: Vec::new(),
        }
    }

    /// A request arrives: it is picked, charged and submitted. `run_until(now)` has been called.
    fn arrive(&mut self, index: usize, request: &trace::Request, now: Time) {
        self.figures.requests += 1;
        let mut flight = Flight {
            charge: None,
            arrived: now,
            first_token: Duration::ZERO,
            output_tokens: request.output_tokens,
        };
        let asked = Request {
            prompt_tokens: request.prompt_tokens,
            blocks: &request.blocks,
            block_tokens: self.block_tokens as f64,
            session: None,
        };
        // Only a fleet without replicas picks nothing.
        if let Ok(pick) = self.balancer.pick(&asked, &[], now) {
            let to = pick.charge.slot().0 as usize;
            self.sent[to] += 1;
            if self.submit(to, index, request, now) {
                flight.charge = Some(pick.charge);
            } else {
                self.balancer.settle(pick.charge);
                self.figures.refused += 1;
            }
        }
        self.flights.push(flight);
    }

    /// Hands the request to replica `to`, unless it could never fit there.
    fn submit(&mut self, to: usize, index: usize, request: &trace::Request, now: Time) -> bool {
        let job = Job {
            id: index as u64,
            prompt_tokens: request.prompt_tokens,
            blocks: request.blocks.clone(),
            output_tokens: request.output_tokens,
        };
        let replica = &mut self.replicas[to];
        let idle = replica.next_step().is_none();
        let taken = replica.submit(now, job).is_ok();
        if idle && let Some(end) = replica.next_step() {
            self.calendar.push(Reverse((end, to)));
        }
        taken
    }

    /// Ends every step that ends at or before `now`, in order of time; at the same moment, the first replica
    /// first.
    fn run_until(&mut self, now: Time) {
        while let Some(&Reverse((end, at))) = self.calendar.peek()
            && end <= now
        {
            self.calendar.pop();
            self.replicas[at].advance(end, &mut self.emissions);
            if let Some(next) = self.replicas[at].next_step() {
                self.calendar.push(Reverse((next, at)));
            }
            let mut emissions = std::mem::take(&mut self.emissions);
            for emission in emissions.drain(..) {
                self.hear(&emission);
            }
            self.emissions = emissions;
        }
    }

    /// What the proxy does when a token reaches it.
    fn hear(&mut self, emission: &Emission) {
        let flight = &mut self.flights[emission.id as usize];
        match emission.kind {
            Kind::First { .. } => {
                flight.first_token = emission.at.since(flight.arrived);
                if let Some(charge) = &mut flight.charge {
                    self.balancer.answer(charge);
                }
            }
            Kind::Token => {}
            Kind::Finished => {
                let timing = Timing {
                    first_token: flight.first_token,
                    whole: emission.at.since(flight.arrived),
                    output_tokens: flight.output_tokens,
                };
                self.figures.book(&timing, &self.slo);
                self.ended = emission.at;
                if let Some(charge) = flight.charge.take() {
                    self.balancer.settle(charge);
                }
            }
        }
    }

    fn figures(self) -> Figures {
        let sum = |count: fn(&super::replica::Stats) -> u64| -> u64 {
            self.replicas.iter().map(|replica| count(&replica.stats())).sum()
        };
        let most = self.sent.iter().max().copied().unwrap_or(0);
        let began = self.flights.first().map_or(Time::ZERO, |flight| flight.arrived);
        Figures {
            hit_ratio: sum(|stats| stats.hit_tokens) as f64 / sum(|stats| stats.queried_tokens).max(1) as f64,
            largest_share: most as f64 / self.figures.requests.max(1) as f64,
            preemptions: sum(|stats| stats.preemptions),
            lasted: self.ended.since(began),
            ..self.figures
        }
    }
}

/// A made-up address for replica number `index`, from 0.
fn address(index: usize) -> SocketAddr {
    let [.., a, b] = index.to_be_bytes();
    SocketAddr::from((Ipv4Addr::new(10, 0, a, b), 8000))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::ledger::Account;

    /// A step takes 10 ms and 1 ms per prompt token.
    const PLAIN: Hardware = Hardware {
        name: "plain",
        base_ms: 10.0,
        token_ms: 1.0,
        attention_ms: 0.0,
        sequence_ms: 0.0,
        context_ms: 0.0,
        kv_tokens: 10_000,
        batch_tokens: 8_192,
        max_sequences: 100,
        block_tokens: 16,
    };

    const SLO: Slo =
        Slo { first_token: Duration::from_millis(25), per_token: Duration::from_millis(10), share: 0.9 };

    fn trace(requests: &str) -> Trace {
        Trace::parse(format!("{{\"block_tokens\":10}}\n{requests}").as_bytes()).unwrap()
    }

    fn run(trace: &Trace, policy: &str, speedup: f64, speeds: &[f64]) -> Figures {
        let policy = PolicyConfig::by_name(policy).unwrap();
        let scenario =
            Scenario { trace, speedup, hardware: PLAIN, speeds, policy: &policy, seed: 1, slo: SLO };
        replay(&scenario, |_| ())
    }

    fn samples(millis: impl IntoIterator<Item = u64>) -> super::super::report::Samples {
        let mut samples = super::super::report::Samples::default();
        millis.into_iter().for_each(|ms| samples.push(Duration::from_millis(ms)));
        samples
    }

    const TWO: &str = "{\"t\":0,\"in\":20,\"out\":3}\n{\"t\":100,\"in\":10,\"out\":1}";

    #[test]
    fn two_requests_on_one_engine_take_what_the_arithmetic_says() {
        let figures = run(&trace(TWO), "least_pending_tokens", 1.0, &[1.0]);
        // The first: 10 + 20 for its prompt, then two steps of 10. The second: 10 + 10.
        assert_eq!(figures.first_token, samples([30, 20]));
        assert_eq!(figures.per_token, samples([10]));
        assert_eq!(figures.whole, samples([50, 20]));
        assert_eq!((figures.requests, figures.good, figures.refused), (2, 1, 0));
        assert_eq!(figures.lasted, Duration::from_millis(120));
        assert_eq!((figures.largest_share, figures.hit_ratio), (1.0, 0.0));
    }

    #[test]
    fn a_speed_up_brings_requests_closer_and_a_slow_replica_takes_longer() {
        let fast = run(&trace(TWO), "least_pending_tokens", 4.0, &[1.0]);
        // The second comes at 25, waits for the step that ends at 30 and shares the next: 10 + 10 to 50.
        assert_eq!(fast.first_token, samples([25, 30]), "in the order of their ends");
        let slow = run(&trace(TWO), "least_pending_tokens", 1.0, &[0.5]);
        assert_eq!(slow.first_token, samples([60, 40]));
        assert_eq!(slow.per_token, samples([20]));
    }

    #[test]
    fn a_policy_that_sees_tokens_keeps_short_prompts_off_a_busy_engine() {
        let trace = trace(
            "{\"t\":0,\"in\":1000,\"out\":1}\n{\"t\":1,\"in\":10,\"out\":1}\n{\"t\":50,\"in\":10,\"out\":1}",
        );
        let turns = run(&trace, "round_robin", 1.0, &[1.0, 1.0]);
        // The third waits until 1010 for its turn on the first engine, and then takes 20.
        assert_eq!(turns.first_token, samples([20, 1010, 980]));
        let tokens = run(&trace, "least_pending_tokens", 1.0, &[1.0, 1.0]);
        assert_eq!(tokens.first_token, samples([20, 20, 1010]));
        assert_eq!(tokens.largest_share, 2.0 / 3.0);
    }

    #[test]
    fn a_prompt_that_begins_like_an_earlier_one_goes_where_that_is_cached() {
        let line = |t| format!("{{\"t\":{t},\"in\":105,\"out\":1,\"h\":[1,2,3,4,5,6,7,8,9,10]}}\n");
        let trace = trace(&(line(0) + &line(1000) + &line(2000)));
        for policy in ["least_pending_tokens", "lmetric", "blend"] {
            let figures = run(&trace, policy, 1.0, &[1.0; 4]);
            assert_eq!(figures.first_token, samples([115, 15, 15]), "{policy}");
            assert_eq!((figures.hit_ratio, figures.largest_share), (200.0 / 315.0, 1.0), "{policy}");
        }
        let blind = run(&trace, "round_robin", 1.0, &[1.0; 4]);
        assert_eq!((blind.first_token, blind.hit_ratio), (samples([115, 115, 115]), 0.0));
    }

    #[test]
    fn what_no_engine_can_hold_is_refused_and_counts_as_not_good() {
        let trace = trace("{\"t\":0,\"in\":20000,\"out\":1}\n{\"t\":10,\"in\":5,\"out\":1}");
        let figures = run(&trace, "least_pending_tokens", 1.0, &[1.0]);
        assert_eq!((figures.requests, figures.refused, figures.good), (2, 1, 1));
        assert_eq!(figures.first_token, samples([15]), "the refused one is not in the way");
    }

    #[test]
    fn the_same_seed_gives_the_same_figures_and_nothing_is_owed_at_the_end() {
        let mut rng = fastrand::Rng::with_seed(9);
        let lines: String = (0..400)
            .map(|n| {
                let (t, group) = (n * 20 + rng.u64(..20), rng.u64(..6));
                let (input, output) = (40 + rng.u64(..300), rng.u64(1..30));
                format!("{{\"t\":{t},\"in\":{input},\"out\":{output},\"h\":[{group},{group},{group},{n}]}}\n")
            })
            .collect();
        let trace = trace(&lines);
        for name in PolicyConfig::NAMES {
            let once = run(&trace, name, 1.0, &[1.0, 1.0, 0.5]);
            assert_eq!(once, run(&trace, name, 1.0, &[1.0, 1.0, 0.5]), "{name}");
            assert_eq!(once.whole.len(), 400, "{name}");
        }
        let policy = PolicyConfig::default();
        let scenario = Scenario {
            trace: &trace,
            speedup: 1.0,
            hardware: PLAIN,
            speeds: &[1.0; 3],
            policy: &policy,
            seed: 1,
            slo: SLO,
        };
        let mut fleet = Fleet::new(&scenario);
        for (index, request) in trace.requests.iter().enumerate() {
            fleet.run_until(Time::ZERO + request.at);
            fleet.arrive(index, request, Time::ZERO + request.at);
        }
        let owed = |fleet: &mut Fleet| {
            fleet.balancer.states(Time::ZERO).iter().any(|s| s.account != Account::default())
        };
        assert!(owed(&mut fleet), "the last request is still in flight");
        fleet.run_until(Time::from_nanos(u64::MAX));
        assert!(!owed(&mut fleet));
    }
}
