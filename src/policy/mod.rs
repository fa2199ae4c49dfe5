//! Which backend? One file per answer.
//!
//! A policy sees one [`Request`] and the [`Candidate`]s that may serve it, and names one of them. It owns no
//! counters, reads no clock and draws its randomness from an argument, so the simulator and the proxy run the
//! very same code and a seed replays a run.
//!
//! There are three ways to a rule of one's own:
//!
//! 1. YAML: the options of a policy, or [`blend`], a sum of the costs of others.
//! 2. A built-in policy: a file here with its options, its formula and its tests, and one variant in
//!    [`PolicyConfig`]; the compiler asks for the rest.
//! 3. A binary of one's own on this library: a type that is a [`Policy`], registered under a name in
//!    [`Policies`], which [`crate::cli::main_with`] makes known to `run`, `check` and `simulate`.
//!    `examples/two_lanes.rs` is a whole one.
//!
//! Most policies are a [`Policy::cost`]; only those whose answer is not "the cheapest" (taking turns, hashing)
//! override [`Policy::choose`].
//!
//! # What is called when
//!
//! | call | when | how often |
//! |---|---|---|
//! | the constructor | as an upstream is made | once per upstream, so none shares its state with another |
//! | [`Policy::rebuild`] | before the first choice, then when a backend joins, leaves or changes its weight | rarely |
//! | [`Policy::uses_prefix_index`] | around each choice | must always give the same answer |
//! | [`Policy::choose`] | for each attempt of a request to reach a backend | once; a retry and `/explain` ask again |
//! | [`Policy::note`] | after each choice that somebody goes by | once; never by `/explain` |
//! | [`Policy::cost`] | by the default `choose` | once per candidate |
//!
//! **Who is a candidate** is settled before: a backend that is full or was tried by this request is never
//! offered, one that is strained, down, ejected or cooling only if nothing else is left. The one that is
//! chosen is charged in the same step, so the next choice sees its figures already raised; a policy counts
//! nothing itself.
//!
//! **Under a lock.** All calls but the first hold the lock of the upstream, one at a time: a policy needs no
//! lock of its own, and whatever it waits for, every request of the upstream waits for. So no I/O and no
//! blocking; a microsecond per candidate is seen in the latency of every request. A panic costs the request
//! that met it, and leaves the policy as it was at that moment.

pub mod blend;
pub mod least_connections;
pub mod least_pending_tokens;
pub mod lmetric;
pub mod prefix_hash;
pub mod random_two;
mod registry;
pub mod round_robin;

use std::net::SocketAddr;

pub use registry::{Custom, NameRefused, Policies};

/// What a policy may know of a request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Estimated prompt length, in tokens.
    pub prompt_tokens: u64,
    /// Chained hashes of the prompt's leading blocks, shallowest first.
    pub blocks: &'a [u64],
    /// Tokens that one block stands for.
    pub block_tokens: f64,
    /// Hash of the client's session key, if it sent one.
    pub session: Option<u64>,
}

/// One backend that may serve the request, as it stands at this moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Names the backend; stable for as long as anything of it is in flight.
    pub slot: Slot,
    /// Configured weight as a part of the upstream's largest, and less while the backend starts slowly; above
    /// 0, at most 1. A policy may add terms that it divides by this to terms that it does not.
    pub weight: f64,
    /// P: uncached prompt tokens charged and not yet answered by a first content byte.
    pub pending_tokens: u64,
    /// A: requests in flight.
    pub active_requests: u32,
    /// Requests in flight that have not been answered by a first content byte.
    pub unanswered_requests: u32,
    /// C: prompt tokens of all requests in flight.
    pub context_tokens: u64,
    /// u: tokens of this request's prompt that this backend has not cached, as far as the prefix index knows;
    /// at least 1.
    pub uncached_tokens: u64,
}

/// What is true of all candidates together, computed once per choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fleet {
    /// w: the least number of unanswered requests on any candidate.
    pub least_unanswered: u32,
    /// The least number of uncached tokens on any candidate.
    pub least_uncached: u64,
    /// Requests in flight on all candidates.
    pub active_requests: u64,
    /// Sum of the weights.
    pub weight: f64,
}

impl Fleet {
    /// The sums and minima over `candidates`.
    pub fn of(candidates: &[Candidate]) -> Self {
        let mut fleet =
            Self { least_unanswered: u32::MAX, least_uncached: u64::MAX, active_requests: 0, weight: 0.0 };
        for c in candidates {
            fleet.least_unanswered = fleet.least_unanswered.min(c.unanswered_requests);
            fleet.least_uncached = fleet.least_uncached.min(c.uncached_tokens);
            fleet.active_requests += u64::from(c.active_requests);
            fleet.weight += c.weight;
        }
        fleet
    }
}

/// Index of a backend in the ledger of its upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// A backend as the configuration knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Names the backend in [`Candidate::slot`].
    pub slot: Slot,
    /// Where it listens.
    pub address: SocketAddr,
    /// Configured weight, at least 1.
    pub weight: u32,
}

/// Why a backend was chosen: a label for logs and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No other backend was eligible.
    Only,
    /// It holds a part of the prompt that not every other candidate holds.
    Cache,
    /// It owes the least work.
    Load,
    /// It was its turn.
    Turn,
    /// The lesser of random draws.
    Draw,
    /// The request's place on the hash ring.
    Home,
    /// The place on the ring was full; a later one took it.
    Overflow,
    /// One backend had most of the traffic while others were idle, so nobody was credited with a cache.
    Spread,
    /// Nothing healthy was left, so an ejected or unhealthy backend was tried.
    LastResort,
}

impl Reason {
    /// The label, in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Only => "only",
            Self::Cache => "cache",
            Self::Load => "load",
            Self::Turn => "turn",
            Self::Draw => "draw",
            Self::Home => "home",
            Self::Overflow => "overflow",
            Self::Spread => "spread",
            Self::LastResort => "last_resort",
        }
    }

    /// Every label there is, so that metrics can start at zero.
    pub const ALL: [Self; 9] = [
        Self::Only,
        Self::Cache,
        Self::Load,
        Self::Turn,
        Self::Draw,
        Self::Home,
        Self::Overflow,
        Self::Spread,
        Self::LastResort,
    ];
}

/// The answer of a policy: an index into the candidates, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Index into the candidates that were offered.
    pub index: usize,
    /// Why this one.
    pub reason: Reason,
}

/// A balancing rule. The [module](self) says what is called when, and under which lock.
///
/// ```
/// use plimsoll::policy::{Candidate, Fleet, Policy, Request};
///
/// /// The backend with the least context in flight, per unit of weight.
/// struct LeastContext;
///
/// impl Policy for LeastContext {
///     fn cost(&self, request: &Request<'_>, candidate: &Candidate, _fleet: &Fleet) -> f64 {
///         (candidate.context_tokens + request.prompt_tokens) as f64 / candidate.weight
///     }
/// }
/// ```
pub trait Policy: Send {
    /// What it would cost to send `request` to `candidate`, in any unit; less is better, and only differences
    /// matter. Weights are honoured by dividing by [`Candidate::weight`]: nobody else does.
    ///
    /// `f64::INFINITY` means "only if all others are infinite too". NaN is never the least.
    fn cost(&self, request: &Request<'_>, candidate: &Candidate, fleet: &Fleet) -> f64;

    /// Chooses among `candidates`, of which there is at least one, in no order that means anything; the index
    /// must be one of theirs. The default is the least cost, random among ties. Whoever overrides it takes
    /// all randomness from `rng` (of the crate `fastrand`), so that a seed still replays a run.
    ///
    /// It only says what it would choose. Whoever wants to remember a choice does so in [`Policy::note`]: so a choice
    /// can be explained without being made.
    fn choose(&self, request: &Request<'_>, candidates: &[Candidate], rng: &mut fastrand::Rng) -> Choice {
        cheapest(self, request, candidates, rng)
    }

    /// `request` goes to the one of `candidates` that was the choice among them.
    fn note(&mut self, _request: &Request<'_>, _candidates: &[Candidate], _choice: Choice) {}

    /// The set of backends, or a weight, has changed: rebuild rings and the like. `members` are all that are
    /// configured, whether they are up or not.
    fn rebuild(&mut self, _members: &[Member]) {}

    /// Whether [`Candidate::uncached_tokens`] should be looked up in the prefix index. If not, it is the
    /// whole prompt, and nothing is remembered of where prompts went.
    fn uses_prefix_index(&self) -> bool {
        false
    }
}

/// A policy as configured: which one, and its options.
#[derive(Clone, Debug, PartialEq)]
pub enum PolicyConfig {
    /// See [`least_pending_tokens`].
    LeastPendingTokens(least_pending_tokens::Options),
    /// See [`prefix_hash`].
    PrefixHash(prefix_hash::Options),
    /// See [`least_connections`].
    LeastConnections,
    /// See [`round_robin`].
    RoundRobin,
    /// See [`random_two`].
    RandomTwo,
    /// See [`lmetric`].
    Lmetric,
    /// See [`blend`].
    Blend(blend::Options),
    /// One that is not built in: see [`Policies`].
    Custom(Custom),
}

impl PolicyConfig {
    /// The names of the built-in policies, as written in YAML.
    pub const NAMES: &[&str] = &[
        "least_pending_tokens",
        "prefix_hash",
        "least_connections",
        "round_robin",
        "random_two",
        "lmetric",
        "blend",
    ];

    /// The policy's name, as written in YAML.
    pub fn name(&self) -> &str {
        match self {
            Self::LeastPendingTokens(_) => "least_pending_tokens",
            Self::PrefixHash(_) => "prefix_hash",
            Self::LeastConnections => "least_connections",
            Self::RoundRobin => "round_robin",
            Self::RandomTwo => "random_two",
            Self::Lmetric => "lmetric",
            Self::Blend(_) => "blend",
            Self::Custom(custom) => custom.name(),
        }
    }

    /// The built-in policy of that name with its default options; `None` if there is none.
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "least_pending_tokens" => Self::LeastPendingTokens(least_pending_tokens::Options::default()),
            "prefix_hash" => Self::PrefixHash(prefix_hash::Options::default()),
            "least_connections" => Self::LeastConnections,
            "round_robin" => Self::RoundRobin,
            "random_two" => Self::RandomTwo,
            "lmetric" => Self::Lmetric,
            "blend" => Self::Blend(blend::Options::default()),
            _ => return None,
        })
    }

    /// The policy itself.
    pub fn build(&self) -> Box<dyn Policy> {
        match self {
            Self::LeastPendingTokens(options) => {
                Box::new(least_pending_tokens::LeastPendingTokens::new(options.clone()))
            }
            Self::PrefixHash(options) => Box::new(prefix_hash::PrefixHash::new(options.clone())),
            Self::LeastConnections => Box::new(least_connections::LeastConnections),
            Self::RoundRobin => Box::new(round_robin::RoundRobin::default()),
            Self::RandomTwo => Box::new(random_two::RandomTwo),
            Self::Lmetric => Box::new(lmetric::Lmetric),
            Self::Blend(options) => Box::new(blend::Blend::new(options)),
            Self::Custom(custom) => custom.build(),
        }
    }
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self::LeastPendingTokens(least_pending_tokens::Options::default())
    }
}

/// The candidate of least cost; among exact ties, each is as likely (reservoir sampling).
///
/// A fixed order among ties would send a cold fleet's first burst to one backend.
fn cheapest<P: Policy + ?Sized>(
    policy: &P,
    request: &Request<'_>,
    candidates: &[Candidate],
    rng: &mut fastrand::Rng,
) -> Choice {
    let fleet = Fleet::of(candidates);
    let mut best = (f64::INFINITY, 0);
    let mut ties = 0u32;
    for (index, candidate) in candidates.iter().enumerate() {
        let cost = policy.cost(request, candidate, &fleet);
        if cost < best.0 {
            best = (cost, index);
            ties = 1;
        } else if cost == best.0 {
            ties += 1;
            if rng.u32(..ties) == 0 {
                best.1 = index;
            }
        }
    }
    let chosen = &candidates[best.1];
    let most_uncached = candidates.iter().map(|c| c.uncached_tokens).max().unwrap_or(0);
    let reason = if candidates.len() == 1 {
        Reason::Only
    } else if chosen.uncached_tokens < most_uncached {
        Reason::Cache
    } else {
        Reason::Load
    };
    Choice { index: best.1, reason }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An idle backend of weight 1.
    pub(crate) fn idle(slot: u32) -> Candidate {
        Candidate {
            slot: Slot(slot),
            weight: 1.0,
            pending_tokens: 0,
            active_requests: 0,
            unanswered_requests: 0,
            context_tokens: 0,
            uncached_tokens: 100,
        }
    }

    /// Chooses, and goes by it.
    pub(crate) fn take<P: Policy + ?Sized>(
        policy: &mut P,
        request: &Request<'_>,
        candidates: &[Candidate],
        rng: &mut fastrand::Rng,
    ) -> Choice {
        let choice = policy.choose(request, candidates, rng);
        policy.note(request, candidates, choice);
        choice
    }

    /// A request of 100 tokens that shares no prefix.
    pub(crate) fn plain() -> Request<'static> {
        Request { prompt_tokens: 100, blocks: &[], block_tokens: 128.0, session: None }
    }

    pub(crate) fn members(weights: &[u32]) -> Vec<Member> {
        (0u32..)
            .zip(weights)
            .map(|(i, &weight)| Member {
                slot: Slot(i),
                address: SocketAddr::from(([10, 0, (i >> 8) as u8, i as u8], 8000)),
                weight,
            })
            .collect()
    }

    /// Sends `requests` requests, none of which ever ends, and counts how many each backend got.
    pub(crate) fn spread(policy: &mut dyn Policy, weights: &[u32], requests: u32) -> Vec<u32> {
        let mut rng = fastrand::Rng::with_seed(7);
        policy.rebuild(&members(weights));
        let mut candidates: Vec<_> = (0u32..)
            .zip(weights)
            .map(|(i, &weight)| Candidate { weight: f64::from(weight), ..idle(i) })
            .collect();
        for n in 0..requests {
            let blocks = [u64::from(n).wrapping_mul(0x9E37_79B9_7F4A_7C15)];
            let request = Request { blocks: &blocks, ..plain() };
            let chosen = take(policy, &request, &candidates, &mut rng).index;
            let c = &mut candidates[chosen];
            c.active_requests += 1;
            c.unanswered_requests += 1;
            c.pending_tokens += c.uncached_tokens;
            c.context_tokens += request.prompt_tokens;
        }
        candidates.iter().map(|c| c.active_requests).collect()
    }

    fn every_policy() -> impl Iterator<Item = (&'static str, Box<dyn Policy>)> {
        PolicyConfig::NAMES.iter().map(|name| {
            let config = PolicyConfig::by_name(name).unwrap();
            assert_eq!(config.name(), *name);
            (*name, config.build())
        })
    }

    #[test]
    fn every_policy_honours_weights() {
        for (name, mut policy) in every_policy() {
            let got = spread(policy.as_mut(), &[1, 2, 1, 4], 800);
            for (got, want) in got.iter().zip([100i64, 200, 100, 400]) {
                let off = (i64::from(*got) - want).abs();
                assert!(off <= want / 4, "{name}: {got} requests where about {want} are due");
            }
        }
    }

    #[test]
    fn every_policy_serves_a_single_backend() {
        for (name, mut policy) in every_policy() {
            assert_eq!(spread(policy.as_mut(), &[3], 10), [10], "{name}");
        }
    }

    #[test]
    fn every_policy_reaches_each_of_a_thousand_backends() {
        for (name, mut policy) in every_policy() {
            let got = spread(policy.as_mut(), &[1; 1_000], 20_000);
            let unreached = got.iter().filter(|n| **n == 0).count();
            assert_eq!(unreached, 0, "{name} never chose {unreached} of 1,000 backends");
        }
    }

    #[test]
    fn every_policy_follows_a_backend_that_joins_and_one_that_leaves() {
        for (name, mut policy) in every_policy() {
            let mut rng = fastrand::Rng::with_seed(1);
            let all = members(&[1, 1, 1]);
            for set in [&all[..2], &all[..], &all[1..]] {
                policy.rebuild(set);
                let candidates: Vec<_> = set.iter().map(|m| idle(m.slot.0)).collect();
                let mut seen = vec![0; set.len()];
                for n in 0..600u64 {
                    let blocks = [n.wrapping_mul(0x9E37_79B9_7F4A_7C15)];
                    let request = Request { blocks: &blocks, ..plain() };
                    seen[take(policy.as_mut(), &request, &candidates, &mut rng).index] += 1;
                }
                assert!(seen.iter().all(|n| *n > 0), "{name}: {seen:?} of {} backends", set.len());
            }
        }
    }
}
