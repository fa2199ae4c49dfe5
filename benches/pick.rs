//! What one choice costs: `Balancer::pick`, the answer and the settlement, on a warm index.
//!
//! The figure that counts is 64 backends and 256 blocks in at most 20 us (a prompt of 128 KiB). The prompts are
//! those of sessions that grow: four turns, each longer by the same amount, the first fifth a system prompt that
//! many sessions share, in random order of the sessions. They have `blocks` blocks on average, and none is sent
//! twice. Each backend remembers as much as it may (3,125 blocks) before anything is measured, so every choice
//! also forgets; and it has four requests in flight.

use std::collections::VecDeque;
use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use plimsoll::balance::ledger::Charge;
use plimsoll::balance::pulse::Pulse;
use plimsoll::balance::{Balancer, Settings, ejection};
use plimsoll::clock::Time;
use plimsoll::policy::{PolicyConfig, Request};

const BACKENDS: [usize; 5] = [4, 8, 64, 512, 1_024];
const BLOCKS: [usize; 4] = [0, 16, 256, 1_024];
/// What the index remembers of one backend if nobody says how large its cache is.
const CAPACITY: usize = 3_125;
const TURNS: usize = 4;
const IN_FLIGHT: usize = 4;
const SETTINGS: Settings = Settings {
    ejection: ejection::Rule { max_fails: 3, fail_timeout: Duration::from_secs(30) },
    max_requests: None,
    slow_start: Duration::from_secs(10),
    stall_timeout: Duration::from_secs(60),
};

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(50)
        .configure_from_args();
    for backends in BACKENDS {
        for blocks in BLOCKS {
            bench(&mut criterion, "least_pending_tokens", backends, blocks);
        }
    }
    for policy in PolicyConfig::NAMES.iter().filter(|name| **name != "least_pending_tokens") {
        bench(&mut criterion, policy, 64, 256);
    }
    criterion.final_summary();
}

fn bench(criterion: &mut Criterion, policy: &str, backends: usize, blocks: usize) {
    // Warmed once, if it is asked for at all: criterion calls the closure for every sample.
    let mut state = None;
    criterion.bench_function(&format!("pick/{policy}/{backends}x{blocks}"), |bencher| {
        let (traffic, upstream) = state.get_or_insert_with(|| {
            let (mut traffic, mut upstream) =
                (Traffic::new(backends, blocks), Upstream::new(policy, backends));
            upstream.warm(&mut traffic);
            (traffic, upstream)
        });
        // Prompts are made before the clock starts, a few at a time: the digest has just been written, too.
        bencher.iter_batched_ref(
            || traffic.prompt(),
            |prompt| upstream.choose(prompt),
            BatchSize::NumIterations(16),
        );
    });
}

/// A balancer under load.
struct Upstream {
    balancer: Balancer,
    /// By slot; beaten on every answer, lest the backends seem stalled.
    pulses: Vec<Arc<Pulse>>,
    in_flight: VecDeque<Charge>,
    now: Time,
    room: usize,
}

impl Upstream {
    fn new(policy: &str, backends: usize) -> Self {
        let policy = PolicyConfig::by_name(policy).expect("a policy of that name");
        let mut balancer = Balancer::new(SETTINGS, policy.build(), 1);
        let address = |n: usize| SocketAddr::from(([10, 0, (n >> 8) as u8, n as u8], 8000));
        balancer.set_members((0..backends).map(|n| (address(n), 1)), Time::ZERO);
        let pulses = (0..backends).map(|n| balancer.pulse(address(n))).collect();
        Self { balancer, pulses, in_flight: VecDeque::new(), now: Time::ZERO, room: IN_FLIGHT * backends }
    }

    /// The whole choice: one request is placed, one is answered and one has ended.
    fn choose(&mut self, prompt: &[u64]) {
        self.now = self.now + Duration::from_micros(500);
        let tokens = prompt.len() as u64 * 128 + 100;
        let request = Request { prompt_tokens: tokens, blocks: prompt, block_tokens: 128.0, session: None };
        let pick =
            self.balancer.pick(black_box(&request), &[], self.now).expect("no backend is down or full");
        self.in_flight.push_back(pick.charge);
        let middle = self.in_flight.len() / 2;
        if let Some(charge) = self.in_flight.get_mut(middle) {
            self.pulses[charge.slot().0 as usize].beat(self.now);
            self.balancer.answer(charge);
        }
        if self.in_flight.len() > self.room
            && let Some(charge) = self.in_flight.pop_front()
        {
            self.balancer.settle(charge);
        }
    }

    /// Serves until every backend remembers as much as it may, or a policy without an index is under load.
    fn warm(&mut self, traffic: &mut Traffic) {
        let mut before = 0;
        loop {
            (0..2 * self.room).for_each(|_| self.choose(&traffic.prompt()));
            let held: usize = self.balancer.states(self.now).iter().map(|state| state.prefix_blocks).sum();
            if held * IN_FLIGHT >= CAPACITY * self.room || held == before {
                return;
            }
            before = held;
        }
    }
}

/// Sessions that grow turn by turn, a new one for each that has ended.
struct Traffic {
    rng: fastrand::Rng,
    blocks: usize,
    sessions: Vec<Session>,
}

struct Session {
    application: u64,
    seed: u64,
    turn: usize,
}

impl Traffic {
    /// As many sessions as fill half of what `backends` remember.
    fn new(backends: usize, blocks: usize) -> Self {
        let mut rng = fastrand::Rng::with_seed(7);
        let open = (backends * CAPACITY / 2 / blocks.max(16)).max(1);
        let sessions = (0..open).map(|_| Session::new(&mut rng)).collect();
        Self { rng, blocks, sessions }
    }

    /// The next turn of some session: 0.4, 0.8, 1.2 or 1.6 times `blocks` block hashes.
    fn prompt(&mut self) -> Vec<u64> {
        let index = self.rng.usize(..self.sessions.len());
        let session = &mut self.sessions[index];
        session.turn += 1;
        let length = (2 * self.blocks * session.turn).div_ceil(TURNS + 1);
        let system = self.blocks / 5;
        let hash = |i: usize| {
            let seed = if i < system { session.application } else { session.seed };
            xxh3_64_with_seed(&i.to_le_bytes(), seed)
        };
        let prompt = (0..length).map(hash).collect();
        if session.turn == TURNS {
            *session = Session::new(&mut self.rng);
        }
        prompt
    }
}

impl Session {
    /// A session of one of sixteen applications.
    fn new(rng: &mut fastrand::Rng) -> Self {
        Self { application: rng.u64(..16), seed: rng.u64(16..), turn: 0 }
    }
}
