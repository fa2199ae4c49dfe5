//! Random schedules: in whatever order requests come, are answered, fail, move on and break off, while backends leave,
//! return and are ejected, the accounts are the sum of what is in flight, and zero once nothing is.
//!
//! The balancer is driven as the proxy drives it, and beside it a model: a plain list of the requests in flight and of
//! the recent picks, from which every figure is counted anew after each step.

use std::collections::{HashMap, VecDeque};

use super::retry::{Budget, Failure, Fault, Progress, retry};
use super::*;
use crate::policy::PolicyConfig;

/// Backends there may be; most of the time some of them are not members.
const BACKENDS: u8 = 6;
const SCHEDULES: u64 = 1_500;
const STEPS: usize = 150;

/// The seconds that a share covers.
const SHARE_SECONDS: u64 = 10;

/// Every failure that is judged differently.
const FAILURES: [Failure; 10] = [
    Failure::Connect,
    Failure::StaleConnection,
    Failure::Closed,
    Failure::Timeout,
    Failure::Status(400),
    Failure::Status(500),
    Failure::Status(501),
    Failure::Status(503),
    Failure::StreamError(None),
    Failure::StreamError(Some(429)),
];

#[test]
fn accounts_are_the_sum_of_what_is_in_flight_and_zero_at_rest() {
    let replayed = std::env::var("PLIMSOLL_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = match replayed {
        Some(seed) => seed..seed + 1,
        None => {
            let first = fastrand::u64(..u64::MAX - SCHEDULES);
            first..first + SCHEDULES
        }
    };
    let mut seen = Seen::default();
    for seed in seeds {
        let replay = Replay(seed);
        World::new(seed).run(&mut seen);
        std::mem::forget(replay);
    }
    assert!(replayed.is_some() || seen.is_everything(), "the schedules do not lead everywhere: {seen:?}");
}

/// Says how to run a schedule again that has failed.
struct Replay(u64);

impl Drop for Replay {
    fn drop(&mut self) {
        println!("replay: PLIMSOLL_SEED={} cargo test --lib balance::schedules", self.0);
    }
}

/// How often the schedules met what they are meant to meet.
#[derive(Debug, Default)]
struct Seen {
    full: u32,
    exhausted: u32,
    drained: u32,
    last_resorts: u32,
    ejections: u32,
    refuted: u32,
    retries: u32,
    orphans: u32,
    strained: u32,
    stalled: u32,
    cached: u32,
}

impl Seen {
    fn is_everything(&self) -> bool {
        let Self { full, exhausted, drained, last_resorts, ejections, refuted, .. } = *self;
        let Self { retries, orphans, strained, stalled, cached, .. } = *self;
        [
            full,
            exhausted,
            drained,
            last_resorts,
            ejections,
            refuted,
            retries,
            orphans,
            strained,
            stalled,
            cached,
        ]
        .iter()
        .all(|&count| count > 10)
    }
}

/// A request, and what it holds of a backend.
struct Flight {
    prompt_tokens: u64,
    blocks: Vec<u64>,
    tried: Vec<Slot>,
    since: Time,
    address: SocketAddr,
    charge: Charge,
    answered: bool,
}

struct World {
    rng: fastrand::Rng,
    settings: Settings,
    balancer: Balancer,
    members: Vec<(SocketAddr, u32)>,
    /// Of members: whether they are drained, and a weight in the place of theirs.
    decided: HashMap<SocketAddr, (bool, Option<u32>)>,
    flights: Vec<Flight>,
    /// The second of each pick, and where it went.
    picks: VecDeque<(u64, SocketAddr)>,
    rule: retry::Rule,
    budget: Budget,
    /// An account as it stood when some engine was asked for its reading.
    asked: Account,
    now: Time,
}

fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 8000))
}

/// Compares what was explained with what was done a moment later.
fn agrees(explained: &Explained, picked: &Result<Pick, NoPick>) {
    let winner = picked.as_ref().map(|pick| (pick.address, pick.reason)).map_err(|why| *why);
    assert_eq!(explained.winner, winner);
    let candidates: Vec<_> = explained.backends.iter().filter(|b| b.left_out.is_none()).collect();
    assert_eq!(candidates.is_empty(), winner.is_err(), "{explained:?}");
    assert!(explained.backends.iter().all(|b| b.cost.is_some() == b.left_out.is_none()), "{explained:?}");
    if let Ok(pick) = picked {
        let won = candidates.iter().find(|b| b.state.address == pick.address).unwrap();
        assert_eq!(won.matched_tokens, pick.matched_tokens);
        assert!(explained.spread || won.uncached_tokens == pick.charge.uncached_tokens());
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let settings = Settings {
            ejection: ejection::Rule { max_fails: rng.u32(..4), fail_timeout: Duration::from_secs(30) },
            max_requests: rng.bool().then(|| rng.u32(1..4)),
            slow_start: Duration::from_secs(10 * rng.u64(..2)),
            stall_timeout: Duration::from_secs(60 * rng.u64(..2)),
        };
        let name = rng.choice(PolicyConfig::NAMES).copied().unwrap_or_default();
        let policy = PolicyConfig::by_name(name).unwrap().build();
        use retry::Cause::{Closed, Connect, Status500, Status503, StreamError, Timeout};
        let on = [Closed, Connect, Status500, Status503, StreamError, Timeout].into();
        let mut world = Self {
            settings,
            balancer: Balancer::new(settings, policy, rng.u64(..)),
            members: Vec::new(),
            decided: HashMap::new(),
            flights: Vec::new(),
            picks: VecDeque::new(),
            rule: retry::Rule { tries: rng.u32(1..4), within: Duration::from_secs(10), on },
            budget: Budget::default(),
            asked: Account::default(),
            now: Time::ZERO,
            rng,
        };
        world.reload();
        world
    }

    fn run(mut self, seen: &mut Seen) {
        for _ in 0..STEPS {
            self.step(seen);
            self.check(seen);
        }
        while !self.flights.is_empty() {
            self.end();
            self.check(seen);
        }
        for n in 0..BACKENDS {
            assert_eq!(self.balancer.account(&address(n)), Account::default(), "something is owed at rest");
        }
        self.now = self.now + Duration::from_secs(SHARE_SECONDS);
        let at_rest =
            |state: &State| state.share == 0.0 && !state.stalled && state.account == Account::default();
        assert!(self.balancer.states(self.now).iter().all(at_rest));
    }

    fn step(&mut self, seen: &mut Seen) {
        match self.rng.u32(..100) {
            ..30 => self.arrive(seen),
            30..45 => self.fail(seen),
            45..57 => self.answer(),
            57..72 => self.end(),
            72..75 => self.succeed(),
            75..80 => self.probe(seen),
            80..85 => self.scrape(),
            85..88 => self.reload(),
            88..91 => self.operate(),
            _ => self.wait(),
        }
    }

    fn arrive(&mut self, seen: &mut Seen) {
        self.budget.deposit();
        let (chain, depth) = (self.rng.u64(..4), self.rng.u64(..40));
        let prompt_tokens =
            if self.rng.u8(..20) == 0 { self.rng.u64(..1 << 40) } else { self.rng.u64(..20_000) };
        let blocks = (0..depth).map(|n| chain * 1_000 + n).collect();
        self.pick(prompt_tokens, blocks, Vec::new(), self.now, seen);
    }

    /// Picks for a request, and compares what was picked with everybody's state before.
    fn pick(&mut self, prompt_tokens: u64, blocks: Vec<u64>, tried: Vec<Slot>, since: Time, seen: &mut Seen) {
        let states = self.balancer.states(self.now);
        let request =
            Request { prompt_tokens, blocks: &blocks, block_tokens: 128.0, session: self.session() };
        let tier = self.balancer.tier(&tried, self.now);
        let explained = tried.is_empty().then(|| self.balancer.explain(&request, self.now));
        let picked = self.balancer.pick(&request, &tried, self.now);
        if let Some(explained) = explained {
            agrees(&explained, &picked);
        }
        assert_eq!(picked.as_ref().err(), tier.as_ref().err(), "what was promised");

        let slot = |state: &State| self.balancer.ledger.slot(&state.address).unwrap();
        let untried: Vec<&State> =
            states.iter().filter(|s| !s.draining && !tried.contains(&slot(s))).collect();
        let is_alive = |s: &State| s.healthy && !s.ejected;
        let is_available = |s: &State| is_alive(s) && !s.on_trial && !s.cooling && !s.stalled;
        let available: Vec<&State> = untried.iter().copied().filter(|s| is_available(s)).collect();
        let alive: Vec<&State> = untried.iter().copied().filter(|s| is_alive(s)).collect();
        let asked =
            [&available, &alive, &untried].into_iter().find(|tier| !tier.is_empty()).unwrap_or(&untried);
        let has_room =
            |s: &State| self.settings.max_requests.is_none_or(|max| s.account.active_requests < max);
        match picked {
            Err(NoPick::Exhausted) => {
                seen.exhausted += 1;
                assert!(untried.is_empty(), "{untried:?} were not tried");
            }
            Err(NoPick::Drained) => {
                seen.drained += 1;
                assert!(!states.is_empty() && states.iter().all(|state| state.draining), "{states:?}");
            }
            Err(NoPick::Full) => {
                seen.full += 1;
                assert!(!asked.is_empty() && !asked.iter().any(|s| has_room(s)), "{asked:?} are not full");
            }
            Ok(pick) => {
                let state = asked.iter().find(|state| state.address == pick.address);
                let state = state.unwrap_or_else(|| panic!("{pick:?}, but {asked:?} were to be asked"));
                assert_eq!(pick.charge.slot(), slot(state));
                assert!(has_room(state), "{state:?} is full");
                let others = || asked.iter().filter(|s| has_room(s));
                assert!(!state.strained || others().all(|s| s.strained), "{state:?} is strained");
                assert_eq!(pick.reason == Reason::LastResort, available.is_empty(), "{pick:?}");
                let uncached = pick.charge.uncached_tokens();
                assert!((1..=prompt_tokens.max(1)).contains(&uncached), "{pick:?} of {prompt_tokens}");
                assert_eq!(pick.matched_tokens, prompt_tokens.saturating_sub(uncached));
                seen.last_resorts += u32::from(available.is_empty());
                seen.cached += u32::from(pick.matched_tokens > 0);
                self.picks.push_back((self.second(), pick.address));
                let Pick { address, charge, .. } = pick;
                let flight = Flight { prompt_tokens, blocks, tried, since, address, charge, answered: false };
                self.flights.push(flight);
            }
        }
    }

    /// An attempt fails, and is tried elsewhere or ends.
    fn fail(&mut self, seen: &mut Seen) {
        let Some(mut flight) = self.take() else { return };
        let failure = *self.rng.choice(&FAILURES).unwrap();
        let (slot, fault) = (flight.charge.slot(), failure.fault());
        if fault == Fault::BackPressure {
            self.balancer.cool(slot, failure, Duration::from_secs(self.rng.u64(..20)), self.now);
        }
        let span = self.balancer.fail(slot, failure, self.rng.bool(), self.now);
        let states = self.balancer.states(self.now);
        let state = states.iter().find(|state| state.address == flight.address);
        if let Some(span) = span {
            seen.ejections += 1;
            assert!(matches!(fault, Fault::Suspect | Fault::Certain) && span > Duration::ZERO, "{failure:?}");
            assert!(state.is_none_or(|state| state.ejected));
            let serving: Vec<_> = states.iter().filter(|state| !state.draining).collect();
            let ejected = serving.iter().filter(|state| state.ejected).count();
            assert!(
                state.is_none() || ejected <= ejection::limit(serving.len(), fault),
                "{ejected} are ejected"
            );
        }
        let tries = flight.tried.len() as u32 + 1;
        let progress = Progress { tries, elapsed: self.now.since(flight.since), committed: flight.answered };
        if !retry(&self.rule, failure, progress, &mut self.budget) {
            return self.balancer.settle(flight.charge);
        }
        seen.retries += 1;
        flight.tried.push(slot);
        let Flight { prompt_tokens, blocks, tried, since, address, charge, answered } = flight;
        if self.rng.bool() {
            self.balancer.settle(charge);
            self.pick(prompt_tokens, blocks, tried, since, seen);
        } else {
            // The next attempt is charged before the one that failed is settled.
            let old =
                Flight { prompt_tokens, blocks: vec![], tried: vec![], since, address, charge, answered };
            self.flights.push(old);
            let at = self.flights.len() - 1;
            self.pick(prompt_tokens, blocks, tried, since, seen);
            self.balancer.settle(self.flights.remove(at).charge);
        }
    }

    /// The first content comes, or more of it.
    fn answer(&mut self) {
        if let Some(mut flight) = self.take() {
            self.balancer.pulse(flight.address).beat(self.now);
            self.balancer.answer(&mut flight.charge);
            flight.answered = true;
            self.flights.push(flight);
        }
    }

    /// A request ends: as it should, or broken off at whatever stage it had reached.
    fn end(&mut self) {
        let Some(flight) = self.take() else { return };
        if flight.answered && self.rng.bool() {
            self.balancer.succeed(flight.charge.slot(), self.now);
        }
        self.balancer.settle(flight.charge);
    }

    fn succeed(&mut self) {
        if let Some(flight) = self.take() {
            self.balancer.succeed(flight.charge.slot(), self.now);
            self.flights.push(flight);
        }
    }

    fn probe(&mut self, seen: &mut Seen) {
        let address = self.any_address();
        if self.rng.bool() {
            seen.refuted += u32::from(self.balancer.reach(&address, self.now));
        } else {
            self.balancer.observe_health(&address, self.rng.u8(..3) > 0, self.now);
        }
    }

    fn scrape(&mut self) {
        let address = self.any_address();
        let before = if self.rng.bool() { self.balancer.account(&address) } else { self.asked };
        let count = |rng: &mut fastrand::Rng| match rng.u8(..8) {
            0 => None,
            1 => Some(u64::MAX),
            _ => Some(rng.u64(..20)),
        };
        let reading = Reading {
            running: count(&mut self.rng),
            waiting: count(&mut self.rng),
            kv_usage: self.rng.bool().then(|| self.rng.f64().sqrt().sqrt()),
            kv_capacity_tokens: count(&mut self.rng).map(|count| count.saturating_mul(1_000)),
            process_start: self.rng.bool().then(|| f64::from(self.rng.u8(..3))),
        };
        self.balancer.observe_reading(&address, reading, &before, 128.0, self.now);
        self.asked = self.balancer.account(&address);
    }

    /// The configuration changes: backends leave, return, and change their weights.
    fn reload(&mut self) {
        let mut numbers: Vec<u8> = (0..BACKENDS).collect();
        self.rng.shuffle(&mut numbers);
        numbers.truncate(self.rng.usize(..=usize::from(BACKENDS)));
        let before = std::mem::take(&mut self.members);
        self.members = numbers.into_iter().map(|n| (address(n), self.rng.u32(1..5))).collect();
        // A decision goes with its backend, and that on a weight with another weight in the configuration.
        self.decided.retain(|address, _| self.members.iter().any(|member| member.0 == *address));
        for member in self.members.iter().filter(|member| !before.contains(member)) {
            self.decided.entry(member.0).or_default().1 = None;
        }
        self.balancer.set_members(self.members.iter().copied(), self.now);
    }

    /// Somebody drains a backend, lets it serve again, or gives it another weight.
    fn operate(&mut self) {
        let address = self.any_address();
        let is_member = self.members.iter().any(|member| member.0 == address);
        let decided = self.decided.entry(address).or_default();
        let known = match self.rng.u8(..3) {
            0 => {
                decided.0 = true;
                self.balancer.drain(&address, self.now)
            }
            1 => {
                decided.0 = false;
                self.balancer.undrain(&address)
            }
            _ => {
                decided.1 = Some(self.rng.u32(1..5));
                self.balancer.reweigh(&address, decided.1.unwrap()).is_some()
            }
        };
        assert_eq!(known, is_member);
        if !is_member {
            self.decided.remove(&address);
        }
    }

    fn wait(&mut self) {
        let most = *self.rng.choice(&[10, 1_000, 20_000, 200_000]).unwrap();
        self.now = self.now + Duration::from_millis(self.rng.u64(..most));
    }

    /// Counts everything anew, and compares.
    fn check(&mut self, seen: &mut Seen) {
        for n in 0..BACKENDS {
            let mut expected = Account::default();
            for flight in self.flights.iter().filter(|flight| flight.address == address(n)) {
                expected.active_requests += 1;
                expected.context_tokens += flight.prompt_tokens;
                if !flight.answered {
                    expected.unanswered_requests += 1;
                    expected.pending_tokens += flight.charge.uncached_tokens();
                }
            }
            assert_eq!(self.balancer.account(&address(n)), expected, "the account of {n}");
            let is_member = self.members.iter().any(|member| member.0 == address(n));
            seen.orphans += u32::from(!is_member && expected != Account::default());
        }
        let since = (self.second() + 1).saturating_sub(SHARE_SECONDS);
        self.picks.retain(|pick| pick.0 >= since);
        let states = self.balancer.states(self.now);
        let shown: Vec<_> = states.iter().map(|s| (s.address, s.weight, s.draining)).collect();
        let decided = |address| self.decided.get(address).copied().unwrap_or_default();
        let expected = self.members.iter().map(|(address, weight)| {
            let (draining, reweighed) = decided(address);
            (*address, reweighed.unwrap_or(*weight), draining)
        });
        assert_eq!(shown, expected.collect::<Vec<_>>());
        for state in &states {
            let picks = self.picks.iter().filter(|pick| pick.1 == state.address).count();
            assert_eq!(state.share, picks as f64 / self.picks.len().max(1) as f64, "{state:?}");
            assert!(!state.stalled || state.account.active_requests > 0, "{state:?}");
            seen.strained += u32::from(state.strained);
            seen.stalled += u32::from(state.stalled);
        }
        let any_available = states.iter().any(|state| state.healthy && !state.ejected && !state.draining);
        assert_eq!(self.balancer.any_available(self.now), any_available);
    }

    fn take(&mut self) -> Option<Flight> {
        let at = self.rng.usize(..self.flights.len().max(1));
        (!self.flights.is_empty()).then(|| self.flights.swap_remove(at))
    }

    fn any_address(&mut self) -> SocketAddr {
        address(self.rng.u8(..BACKENDS))
    }

    fn session(&mut self) -> Option<u64> {
        self.rng.bool().then(|| self.rng.u64(..4))
    }

    fn second(&self) -> u64 {
        self.now.since(Time::ZERO).as_secs()
    }
}
