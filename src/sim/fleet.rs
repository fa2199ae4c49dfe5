//! A fleet in virtual time: a trace, whoever dispatches it, and as many [`Replica`]s as one likes.
//!
//! Nothing is decided here. A [`Dispatcher`] is asked where each request goes, at the moment of its arrival,
//! and is told what becomes of it at the moments at which a proxy would know: at the first token, after the
//! last, and when a metrics page of an engine is written and read. The product's is [`super::proxies`].
//!
//! ```text
//! the next event = the earliest end of a step, metrics page or arrival of a page, or else the next arrival / speed-up
//! ```
//!
//! Simplifications beside those of the replica: the length of a prompt is known, not estimated from its
//! bytes; requests and tokens take no time on the network; nothing fails. Prompts share what the trace's
//! blocks say they share, and no more is known to anybody.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use super::hardware::Hardware;
use super::replica::{Emission, Job, Kind, Replica, Stats};
use super::report::{Figures, Slo, Timing};
use super::trace::{self, Trace};
use crate::clock::Time;

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
    /// How the engines' metrics are read; `None` if they are not.
    pub scrape: Option<Scrape>,
    /// What makes a request good.
    pub slo: Slo,
}

/// How the engines' metrics are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scrape {
    /// How often each page is written, above 0. The engines take turns: each has its own phase.
    pub interval: Duration,
    /// How old a page is when it is read.
    pub delay: Duration,
}

impl Default for Scrape {
    /// What the proxy does unless told otherwise: every second, in no time.
    fn default() -> Self {
        Self { interval: Duration::from_secs(1), delay: Duration::ZERO }
    }
}

/// A request as it arrives.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    /// Its number in the trace, by which it is known later.
    pub id: usize,
    /// The request.
    pub request: &'a trace::Request,
    /// Tokens per block of the trace.
    pub block_tokens: u64,
    /// Now.
    pub now: Time,
}

/// Who sends the requests of a trace to the replicas.
pub trait Dispatcher {
    /// Chooses a replica, by number; `None` refuses the request. What `replicas` know, only an oracle may look
    /// at.
    fn dispatch(&mut self, arrival: &Arrival<'_>, replicas: &[Replica]) -> Option<usize>;

    /// The first token of a request has come.
    fn answered(&mut self, _id: usize, _now: Time) {}

    /// The last token of a request has come, or its replica has refused it.
    fn finished(&mut self, _id: usize, _now: Time) {}

    /// The metrics page of `replica` is being written.
    fn sampled(&mut self, _replica: usize, _now: Time) {}

    /// The metrics page of `replica` is read; pages come in the order in which they were written.
    fn scraped(&mut self, _replica: usize, _stats: &Stats, _now: Time) {}
}

/// Replays the whole trace until its last answer, and calls `progress` with the number of requests sent so
/// far, once for each.
pub fn replay(
    scenario: &Scenario<'_>,
    dispatcher: &mut dyn Dispatcher,
    mut progress: impl FnMut(usize),
) -> Figures {
    let mut fleet = Fleet::new(scenario, dispatcher);
    for (id, request) in scenario.trace.requests.iter().enumerate() {
        let now = Time::ZERO + request.at.div_f64(scenario.speedup);
        fleet.run_until(now);
        fleet.arrive(id, request, now);
        progress(id + 1);
    }
    fleet.over = true;
    fleet.run_until(Time::from_nanos(u64::MAX));
    fleet.figures()
}

struct Fleet<'a> {
    dispatcher: &'a mut dyn Dispatcher,
    replicas: Vec<Replica>,
    calendar: BinaryHeap<Reverse<(Time, Event)>>,
    scrape: Scrape,
    /// Pages that were written and not yet read.
    pages: VecDeque<Stats>,
    /// No request will come any more, so metrics are of no use.
    over: bool,
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

/// What happens beside arrivals, each to the replica of that number. At the same moment, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// Its step ends.
    StepEnds(usize),
    /// Its metrics page is written.
    PageWritten(usize),
    /// The oldest page is read, which is its.
    PageRead(usize),
}

/// A request on its way.
struct Flight {
    arrived: Time,
    first_token: Duration,
    output_tokens: u64,
}

impl<'a> Fleet<'a> {
    fn new(scenario: &Scenario<'_>, dispatcher: &'a mut dyn Dispatcher) -> Self {
        let block_tokens = scenario.trace.block_tokens;
        let replica =
            |speed: &f64| Replica::new(Hardware { block_tokens, ..scenario.hardware.at_speed(*speed) });
        let count = scenario.speeds.len();
        let first_page = |at: usize| {
            let phase = scenario.scrape?.interval.mul_f64((at + 1) as f64 / count as f64);
            Some(Reverse((Time::ZERO + phase, Event::PageWritten(at))))
        };
        Self {
            dispatcher,
            replicas: scenario.speeds.iter().map(replica).collect(),
            calendar: (0..count).filter_map(first_page).collect(),
            scrape: scenario.scrape.unwrap_or_default(),
            pages: VecDeque::new(),
            over: false,
            flights: Vec::with_capacity(scenario.trace.requests.len()),
            sent: vec![0; count],
            block_tokens,
            slo: scenario.slo,
            figures: Figures::default(),
            ended: Time::ZERO,
            emissions: Vec::new(),
        }
    }

    /// A request arrives: it is dispatched and submitted. `run_until(now)` has been called.
    fn arrive(&mut self, id: usize, request: &trace::Request, now: Time) {
        self.figures.requests += 1;
        let output_tokens = request.output_tokens;
        self.flights.push(Flight { arrived: now, first_token: Duration::ZERO, output_tokens });
        let arrival = Arrival { id, request, block_tokens: self.block_tokens, now };
        let Some(to) = self.dispatcher.dispatch(&arrival, &self.replicas) else {
            self.figures.refused += 1;
            return;
        };
        self.sent[to] += 1;
        let replica = &mut self.replicas[to];
        let idle = replica.next_step().is_none();
        if replica.submit(now, job(&arrival)).is_err() {
            self.dispatcher.finished(id, now);
            self.figures.refused += 1;
        }
        if idle && let Some(end) = replica.next_step() {
            self.calendar.push(Reverse((end, Event::StepEnds(to))));
        }
    }

    /// Lets happen what happens up to `now`, in order of time.
    fn run_until(&mut self, now: Time) {
        while let Some(&Reverse((at, event))) = self.calendar.peek()
            && at <= now
        {
            self.calendar.pop();
            match event {
                Event::StepEnds(replica) => self.end_step(replica, at),
                Event::PageWritten(_) if self.over => {}
                Event::PageWritten(replica) => {
                    self.pages.push_back(self.replicas[replica].stats());
                    self.dispatcher.sampled(replica, at);
                    self.calendar.push(Reverse((at + self.scrape.delay, Event::PageRead(replica))));
                    self.calendar.push(Reverse((at + self.scrape.interval, event)));
                }
                Event::PageRead(replica) => {
                    if let Some(stats) = self.pages.pop_front() {
                        self.dispatcher.scraped(replica, &stats, at);
                    }
                }
            }
        }
    }

    fn end_step(&mut self, replica: usize, at: Time) {
        self.replicas[replica].advance(at, &mut self.emissions);
        if let Some(next) = self.replicas[replica].next_step() {
            self.calendar.push(Reverse((next, Event::StepEnds(replica))));
        }
        let mut emissions = std::mem::take(&mut self.emissions);
        for emission in emissions.drain(..) {
            self.hear(&emission);
        }
        self.emissions = emissions;
    }

    /// A token reaches the proxy.
    fn hear(&mut self, emission: &Emission) {
        let id = emission.id as usize;
        let flight = &mut self.flights[id];
        match emission.kind {
            Kind::First { .. } => {
                flight.first_token = emission.at.since(flight.arrived);
                self.dispatcher.answered(id, emission.at);
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
                self.dispatcher.finished(id, emission.at);
            }
        }
    }

    fn figures(self) -> Figures {
        let sum = |count: fn(&Stats) -> u64| -> u64 { self.replicas.iter().map(|r| count(&r.stats())).sum() };
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

/// The request as an engine sees it.
pub(super) fn job(arrival: &Arrival<'_>) -> Job {
    Job {
        id: arrival.id as u64,
        prompt_tokens: arrival.request.prompt_tokens,
        blocks: arrival.request.blocks.clone(),
        output_tokens: arrival.request.output_tokens,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::proxies::{Fleet as Backends, Proxies};
    use super::*;
    use crate::balance::ledger::Account;
    use crate::policy::PolicyConfig;

    /// A step takes 10 ms and 1 ms per prompt token.
    pub(in crate::sim) const PLAIN: Hardware = Hardware {
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

    fn proxies(trace: &Trace, policy: &str, count: usize, replicas: usize) -> Proxies {
        let weights = vec![1; replicas];
        let fleet = Backends { weights: &weights, kv_tokens: 10_000, block_tokens: trace.block_tokens };
        Proxies::new(count, &PolicyConfig::by_name(policy).unwrap(), &fleet, 1)
    }

    fn scenario<'a>(trace: &'a Trace, speedup: f64, speeds: &'a [f64]) -> Scenario<'a> {
        Scenario { trace, speedup, hardware: PLAIN, speeds, scrape: None, slo: SLO }
    }

    fn run(trace: &Trace, policy: &str, speedup: f64, speeds: &[f64]) -> Figures {
        let mut proxies = proxies(trace, policy, 1, speeds.len());
        replay(&scenario(trace, speedup, speeds), &mut proxies, |_| ())
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
        for count in [1, 3] {
            let mut proxies = proxies(&trace, "least_pending_tokens", count, 3);
            let mut fleet = Fleet::new(&scenario(&trace, 1.0, &[1.0; 3]), &mut proxies);
            for (id, request) in trace.requests.iter().enumerate() {
                fleet.run_until(Time::ZERO + request.at);
                fleet.arrive(id, request, Time::ZERO + request.at);
            }
            fleet.over = true;
            fleet.run_until(Time::from_nanos(u64::MAX));
            assert_eq!(fleet.figures().requests, 400);
            assert!(proxies.owed(Time::ZERO).all(|account| account == Account::default()));
        }
    }

    /// Sends every request to the first replica, and writes down what it is told.
    #[derive(Default)]
    struct Scribe(Vec<String>);

    impl Dispatcher for Scribe {
        fn dispatch(&mut self, arrival: &Arrival<'_>, _replicas: &[Replica]) -> Option<usize> {
            self.0.push(format!("{} arrives at {}", arrival.id, arrival.now.as_nanos() / 1_000_000));
            (arrival.request.prompt_tokens < 1_000).then_some(0)
        }

        fn answered(&mut self, id: usize, now: Time) {
            self.0.push(format!("{id} answered at {}", now.as_nanos() / 1_000_000));
        }

        fn finished(&mut self, id: usize, now: Time) {
            self.0.push(format!("{id} finished at {}", now.as_nanos() / 1_000_000));
        }

        fn sampled(&mut self, replica: usize, now: Time) {
            self.0.push(format!("{replica} sampled at {}", now.as_nanos() / 1_000_000));
        }

        fn scraped(&mut self, replica: usize, stats: &Stats, now: Time) {
            let Stats { running, waiting, .. } = stats;
            self.0.push(format!("{replica}: {running}+{waiting} at {}", now.as_nanos() / 1_000_000));
        }
    }

    #[test]
    fn a_dispatcher_hears_of_each_event_in_its_turn_and_of_metrics_with_their_delay() {
        let trace = trace("{\"t\":0,\"in\":20,\"out\":3}\n{\"t\":45,\"in\":1000,\"out\":1}");
        let millis = Duration::from_millis;
        let scrape = Scrape { interval: millis(40), delay: millis(15) };
        let mut scribe = Scribe::default();
        let figures = replay(
            &Scenario { scrape: Some(scrape), ..scenario(&trace, 1.0, &[1.0, 1.0]) },
            &mut scribe,
            |_| (),
        );
        assert_eq!((figures.requests, figures.refused), (2, 1));
        let told = [
            "0 arrives at 0",
            "0 sampled at 20",
            "0 answered at 30",
            "0: 1+0 at 35",
            "1 sampled at 40",
            "1 arrives at 45",
            "0 finished at 50",
            "1: 0+0 at 55",
        ];
        assert_eq!(scribe.0, told);
    }
}
