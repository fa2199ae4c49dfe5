//! Prefix hash: requests that begin alike go to the same backend, as far as its load allows.
//!
//! A Ketama ring (160 points per unit of weight) gives every key a home without any shared state, so that
//! several independent proxies agree on it. Two things keep it from becoming a hot spot (research/routing.md
//! s.7.4):
//!
//! * **Adaptive depth.** Hashing the first N characters sends a whole trace to one backend when every prompt
//!   opens with the same system prompt. The key here is the prefix hash at the shallowest power-of-two depth
//!   of blocks whose share of recent traffic is below `1 / (2 N)` for N backends. A session key, if the
//!   client sent one, goes before.
//! * **Bounded load** (Mirrokni et al.; HAProxy's `hash-balance-factor`). A backend takes the request only
//!   while `A_i < ceil(load_factor * weight_i * (total + 1) / sum of weights)`; else the next one on the
//!   ring.
//!
//! The ring is walked to its end if need be, so every backend can be reached whatever the number of points. A
//! request without a key (a prompt shorter than one block) goes to the least busy backend.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;

use pingora_ketama::{Bucket, Continuum, DEFAULT_POINT_MULTIPLE};
use schemars::JsonSchema;
use serde::Deserialize;

use super::{Candidate, Choice, Fleet, Member, Policy, Reason, Request, Slot, cheapest, least_connections};

/// The options of the policy.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// How much busier than the mean a backend may be and still take its own keys; above 1. Default 1.25.
    #[schemars(extend("exclusiveMinimum" = 1))]
    pub load_factor: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { load_factor: 1.25 }
    }
}

/// Larger weights are scaled down to this on the ring, lest a weight of 1,000 make 160,000 points.
const HEAVIEST: u32 = 16;

/// The policy.
pub struct PrefixHash {
    options: Options,
    ring: Continuum,
    /// No fewer than the ring has: where a walk must end.
    points: usize,
    slots: HashMap<SocketAddr, Slot>,
    popularity: Popularity,
    /// By slot: the index of its candidate, or `ABSENT`. Scratch space of `choose`.
    places: RefCell<Vec<u32>>,
}

/// No candidate, or one that was asked already.
const ABSENT: u32 = u32::MAX;

impl PrefixHash {
    /// The policy, without backends yet.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            ring: Continuum::new(&[]),
            points: 0,
            slots: HashMap::new(),
            popularity: Popularity::default(),
            places: RefCell::default(),
        }
    }

    /// The session key, or the prefix hash at adaptive depth.
    fn key(&self, request: &Request<'_>) -> Option<u64> {
        if request.session.is_some() {
            return request.session;
        }
        self.popularity.key(request.blocks, self.slots.len())
    }
}

impl Options {
    fn has_room(&self, candidate: &Candidate, fleet: &Fleet) -> bool {
        let mean = candidate.weight * (fleet.active_requests + 1) as f64 / fleet.weight;
        f64::from(candidate.active_requests) < (self.load_factor * mean).ceil()
    }
}

impl Policy for PrefixHash {
    fn cost(&self, _request: &Request<'_>, candidate: &Candidate, _fleet: &Fleet) -> f64 {
        least_connections::cost(candidate)
    }

    fn choose(&self, request: &Request<'_>, candidates: &[Candidate], rng: &mut fastrand::Rng) -> Choice {
        let Some(key) = self.key(request) else { return cheapest(self, request, candidates, rng) };
        if candidates.len() == 1 {
            return Choice { index: 0, reason: Reason::Only };
        }
        let fleet = Fleet::of(candidates);
        let mut places = self.places.borrow_mut();
        places.fill(ABSENT);
        for (index, slot) in (0u32..).zip(candidates.iter().map(|c| c.slot.0 as usize)) {
            if slot >= places.len() {
                places.resize(slot + 1, ABSENT);
            }
            places[slot] = index;
        }
        let mut asked = 0;
        for address in self.ring.node_iter(&key.to_be_bytes()).take(self.points) {
            let Some(slot) = self.slots.get(address) else { continue };
            let Some(place) = places.get_mut(slot.0 as usize).filter(|at| **at != ABSENT) else {
                continue;
            };
            let index = std::mem::replace(place, ABSENT) as usize;
            asked += 1;
            if self.options.has_room(&candidates[index], &fleet) {
                let reason = if asked == 1 { Reason::Home } else { Reason::Overflow };
                return Choice { index, reason };
            }
            if asked == candidates.len() {
                break;
            }
        }
        cheapest(self, request, candidates, rng)
    }

    fn note(&mut self, request: &Request<'_>, _candidates: &[Candidate], _choice: Choice) {
        if request.session.is_none() {
            self.popularity.count(request.blocks, self.slots.len());
        }
    }

    fn rebuild(&mut self, members: &[Member]) {
        let heaviest = members.iter().map(|m| m.weight).max().unwrap_or(1).max(1);
        let scale = (f64::from(HEAVIEST) / f64::from(heaviest)).min(1.0);
        let buckets: Vec<_> = members
            .iter()
            .map(|m| Bucket::new(m.address, ((f64::from(m.weight) * scale).round() as u32).max(1)))
            .collect();
        self.ring = Continuum::new(&buckets);
        self.points = members.len() * (HEAVIEST * DEFAULT_POINT_MULTIPLE) as usize;
        self.slots = members.iter().map(|m| (m.address, m.slot)).collect();
    }
}

/// How often each prefix was seen lately: counters that are halved now and then.
#[derive(Debug, Default)]
struct Popularity {
    seen: HashMap<u64, u32>,
    total: u32,
}

impl Popularity {
    /// After so many requests all counters are halved: a popular prefix is forgotten within a few such spans.
    const SPAN: u32 = 4_096;

    /// Too few requests to speak of shares; until then the first block is the key.
    const WARM_UP: u32 = 32;

    /// The key of a request that is about to be counted: the hash at the shallowest depth that is not too popular.
    fn key(&self, blocks: &[u64], backends: usize) -> Option<u64> {
        let deepest = *blocks.last()?;
        let total = self.total + 1;
        let is_popular = |block: &u64| {
            let seen = self.seen.get(block).copied().unwrap_or(0) + 1;
            total > Self::WARM_UP && u64::from(seen) * 2 * backends as u64 >= u64::from(total)
        };
        Some(depths(blocks).find(|block| !is_popular(block)).unwrap_or(deepest))
    }

    /// Counts the request, down to its key.
    fn count(&mut self, blocks: &[u64], backends: usize) {
        let Some(key) = self.key(blocks, backends) else { return };
        self.total += 1;
        for block in depths(blocks) {
            *self.seen.entry(block).or_insert(0) += 1;
            if block == key {
                break;
            }
        }
        if self.total >= Self::SPAN {
            self.total /= 2;
            self.seen.retain(|_, seen| {
                *seen /= 2;
                *seen > 0
            });
        }
    }
}

/// The hashes at depths 1, 2, 4, 8, ... blocks.
fn depths(blocks: &[u64]) -> impl Iterator<Item = u64> + '_ {
    std::iter::successors(Some(1usize), |depth| depth.checked_mul(2))
        .map_while(|depth| blocks.get(depth - 1).copied())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{idle, members, plain, take};
    use super::*;

    fn policy(backends: usize) -> (PrefixHash, Vec<Candidate>) {
        let mut policy = PrefixHash::new(Options::default());
        policy.rebuild(&members(&vec![1; backends]));
        (policy, (0..backends as u32).map(idle).collect())
    }

    fn hash(n: u64) -> u64 {
        xxhash_rust::xxh3::xxh3_64(&n.to_le_bytes())
    }

    #[test]
    fn a_session_stays_at_home_while_there_is_room() {
        let (mut policy, candidates) = policy(8);
        let mut rng = fastrand::Rng::with_seed(1);
        let request = Request { session: Some(hash(42)), ..plain() };
        let home = take(&mut policy, &request, &candidates, &mut rng);
        assert_eq!(home.reason, Reason::Home);
        for _ in 0..10 {
            assert_eq!(take(&mut policy, &request, &candidates, &mut rng), home);
        }
    }

    #[test]
    fn a_full_home_overflows_to_the_same_neighbour_each_time() {
        let (mut policy, mut candidates) = policy(8);
        let mut rng = fastrand::Rng::with_seed(1);
        let request = Request { session: Some(hash(42)), ..plain() };
        let home = take(&mut policy, &request, &candidates, &mut rng).index;
        candidates[home].active_requests = 3;
        let neighbour = take(&mut policy, &request, &candidates, &mut rng);
        assert_eq!(neighbour.reason, Reason::Overflow);
        assert_ne!(neighbour.index, home);
        assert_eq!(take(&mut policy, &request, &candidates, &mut rng), neighbour);
    }

    #[test]
    fn a_system_prompt_that_all_share_does_not_collapse_onto_one_backend() {
        let (mut policy, candidates) = policy(8);
        let mut rng = fastrand::Rng::with_seed(1);
        let mut seen = [0u32; 8];
        for n in 0..4_000u64 {
            // The first two blocks are common to all; 200 conversations differ from the third on.
            let blocks = [hash(1), hash(2), hash(1_000 + n % 200), hash(2_000 + n % 200)];
            let request = Request { blocks: &blocks, ..plain() };
            seen[take(&mut policy, &request, &candidates, &mut rng).index] += 1;
        }
        let most = seen.iter().max().copied().unwrap_or(0);
        assert!(most < 1_200, "largest share {most} of 4,000: {seen:?}");
    }

    #[test]
    fn only_the_keys_of_a_backend_that_leaves_move() {
        let (mut policy, candidates) = policy(8);
        let mut rng = fastrand::Rng::with_seed(1);
        let mut homes = |policy: &mut PrefixHash, candidates: &[Candidate]| -> Vec<Slot> {
            (0..1_000)
                .map(|n| {
                    let request = Request { session: Some(hash(n)), ..plain() };
                    candidates[take(policy, &request, candidates, &mut rng).index].slot
                })
                .collect()
        };
        let before = homes(&mut policy, &candidates);
        let after = homes(&mut policy, &candidates[..7]);
        assert!(before.iter().zip(&after).all(|(b, a)| b == a || *b == Slot(7)));
    }

    #[test]
    fn a_request_without_a_key_goes_to_the_least_busy_backend() {
        let (mut policy, mut candidates) = policy(3);
        for c in &mut candidates[..2] {
            c.active_requests = 1;
        }
        let mut rng = fastrand::Rng::with_seed(1);
        assert_eq!(take(&mut policy, &plain(), &candidates, &mut rng).index, 2);
    }
}
