//! The decision: where a request goes and why, before anything is done about it.
//!
//! [`Balancer::pick`] decides and goes by it; [`Balancer::explain`] decides in the same way and shows what everybody
//! would have cost. To decide changes nothing: randomness is drawn from a copy, which only a pick keeps.

use std::net::SocketAddr;

use super::{Balancer, NoPick, State, Tier};
use crate::clock::Time;
use crate::policy::{Choice, Fleet, Reason, Request, Slot};

/// Where a request would go.
pub(super) struct Decision {
    pub(super) slot: Slot,
    /// Among the candidates, one of whom it names.
    pub(super) choice: Choice,
    pub(super) reason: Reason,
    /// The randomness that is left.
    pub(super) rng: fastrand::Rng,
}

/// What the balancer would do with a request at this moment, and what it knows of everybody.
#[derive(Clone, Debug)]
pub struct Explained {
    /// Where it would go and why; or why nowhere.
    pub winner: Result<(SocketAddr, Reason), NoPick>,
    /// One backend had nearly all of the traffic, so nobody is credited with what it has cached.
    pub spread: bool,
    /// Every backend, in the order of the configuration.
    pub backends: Vec<Weighed>,
}

/// One backend, weighed for a request.
#[derive(Clone, Debug)]
pub struct Weighed {
    /// How it stands.
    pub state: State,
    /// Why it is no candidate; `None` if it is one.
    pub left_out: Option<String>,
    /// Its weight as a part of the largest, and less while it starts slowly; above 0, at most 1.
    pub weight: f64,
    /// Prompt tokens it owes, with what others have probably sent to it.
    pub pending_tokens: u64,
    /// Tokens of the prompt that it has probably cached.
    pub matched_tokens: u64,
    /// Tokens of the prompt that it would compute, as the policy sees it.
    pub uncached_tokens: u64,
    /// What the policy says that it costs, in the policy's own unit; `None` if it is no candidate.
    pub cost: Option<f64>,
}

impl Balancer {
    /// What [`Balancer::pick`] would do with `request` now, and why. Nothing is charged or remembered.
    pub fn explain(&mut self, request: &Request<'_>, now: Time) -> Explained {
        let decided = self.decide(request, &[], now);
        let tier = self.tier(&[], now).unwrap_or(Tier::Any);
        if decided.is_err() {
            self.candidates.clear();
        }
        let fleet = Fleet::of(&self.candidates);
        let states = self.states(now);
        let weigh = |(member, state): (&crate::policy::Member, State)| {
            let offered = self.candidates.iter().find(|candidate| candidate.slot == member.slot);
            let candidate = offered.copied().unwrap_or_else(|| self.candidate(member, request, now));
            let cached = request.prompt_tokens.saturating_sub(self.uncached_tokens(request, member.slot));
            Weighed {
                left_out: offered.is_none().then(|| self.why_left_out(tier, member.slot, &state, now)),
                weight: candidate.weight,
                pending_tokens: candidate.pending_tokens,
                matched_tokens: cached,
                uncached_tokens: candidate.uncached_tokens,
                cost: offered.map(|candidate| self.policy.cost(request, candidate, &fleet)),
                state,
            }
        };
        let backends = self.members.iter().zip(states).map(weigh).collect();
        let spread = matches!(&decided, Ok(decision) if decision.reason == Reason::Spread);
        let address = |slot: Slot| self.backends[slot.0 as usize].address;
        Explained { winner: decided.map(|d| (address(d.slot), d.reason)), spread, backends }
    }

    /// Why a member that is in this state is no candidate, if those of `tier` are asked.
    fn why_left_out(&self, tier: Tier, slot: Slot, state: &State, now: Time) -> String {
        if !self.admits(tier, slot, now) {
            let word = state.standing.name();
            return state
                .reason
                .as_ref()
                .map_or_else(|| word.to_owned(), |reason| format!("{word}: {reason}"));
        }
        if !self.has_room(slot) {
            return format!("full: {} in flight", state.account.active_requests);
        }
        format!("{}: others go first", state.standing.name())
    }

    /// Where `request` would go among those who are not in `tried`. Only scratch space is written.
    pub(super) fn decide(
        &mut self,
        request: &Request<'_>,
        tried: &[Slot],
        now: Time,
    ) -> Result<Decision, NoPick> {
        self.matched.clear();
        let by_prefix = self.policy.uses_prefix_index();
        if by_prefix {
            self.index.matched(request.blocks, &mut self.matched);
        }
        let tier = self.tier(tried, now)?;
        self.gather(request, tried, tier, now);
        let spread = by_prefix && self.is_lopsided(now);
        if spread {
            self.candidates.iter_mut().for_each(|c| c.uncached_tokens = request.prompt_tokens.max(1));
        }
        let mut rng = self.rng.clone();
        let mut choice = self.policy.choose(request, &self.candidates, &mut rng);
        // A policy of somebody's own may answer with anything.
        if choice.index >= self.candidates.len() {
            choice.index = 0;
        }
        let slot = self.candidates.get(choice.index).ok_or(NoPick::Exhausted)?.slot;
        let reason = match tier {
            Tier::Any | Tier::Reluctant => Reason::LastResort,
            Tier::Available if spread && self.candidates.len() > 1 => Reason::Spread,
            Tier::Available => choice.reason,
        };
        Ok(Decision { slot, choice, reason, rng })
    }

    /// Fills `candidates` with the untried members of the tier that have room, but for those whose engines are
    /// strained, unless there is nobody else.
    fn gather(&mut self, request: &Request<'_>, tried: &[Slot], tier: Tier, now: Time) {
        for strained_too in [false, true] {
            self.candidates.clear();
            for member in &self.members {
                let slot = member.slot;
                if !tried.contains(&slot)
                    && self.admits(tier, slot, now)
                    && self.has_room(slot)
                    && (strained_too || !self.backends[slot.0 as usize].is_strained(now))
                {
                    self.candidates.push(self.candidate(member, request, now));
                }
            }
            if !self.candidates.is_empty() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Settings, ejection};
    use super::*;
    use crate::policy::PolicyConfig;

    fn address(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, n], 8000))
    }

    fn balancer(policy: &str) -> Balancer {
        let settings = Settings {
            ejection: ejection::Rule { max_fails: 0, fail_timeout: Duration::from_secs(1) },
            max_requests: Some(8),
            slow_start: Duration::ZERO,
            stall_timeout: Duration::ZERO,
        };
        let mut balancer = Balancer::new(settings, PolicyConfig::by_name(policy).unwrap().build(), 7);
        balancer.set_members((0..4).map(|n| (address(n), 1 + u32::from(n % 2))), Time::ZERO);
        balancer
    }

    #[test]
    fn who_asks_for_explanations_changes_no_choice_and_is_told_the_truth() {
        for policy in PolicyConfig::NAMES {
            let mut rng = fastrand::Rng::with_seed(11);
            let (mut silent, mut asked) = (balancer(policy), balancer(policy));
            let mut charges = Vec::new();
            for n in 0..600 {
                let blocks: Vec<u64> = (0..rng.u64(..12)).map(|depth| rng.u64(..3) * 100 + depth).collect();
                let session = rng.bool().then(|| rng.u64(..9));
                let request = Request {
                    prompt_tokens: rng.u64(..4_000),
                    blocks: &blocks,
                    block_tokens: 128.0,
                    session,
                };
                let now = Time::ZERO + Duration::from_millis(20 * n);
                for _ in 0..rng.u8(..3) {
                    let elsewhere = [rng.u64(..), 1, 2];
                    asked.explain(&Request { blocks: &elsewhere, ..request }, now);
                }
                let explained = asked.explain(&request, now);
                let [one, two] = [&mut silent, &mut asked].map(|b| b.pick(&request, &[], now));
                let where_to = |pick: &Result<super::super::Pick, NoPick>| match pick {
                    Ok(pick) => Ok((pick.address, pick.reason)),
                    Err(why) => Err(*why),
                };
                assert_eq!(where_to(&one), where_to(&two), "{policy}, request {n}");
                assert_eq!(explained.winner, where_to(&two), "{policy}, request {n}");
                charges.extend(one.ok().zip(two.ok()).map(|(one, two)| (one.charge, two.charge)));
                if charges.len() > rng.usize(..40) {
                    let (one, two) = charges.swap_remove(rng.usize(..charges.len()));
                    silent.settle(one);
                    asked.settle(two);
                }
            }
            assert_eq!(silent.states(Time::ZERO), asked.states(Time::ZERO), "{policy}");
        }
    }

    #[test]
    fn where_the_cheapest_wins_the_explanation_shows_it_to_be_the_cheapest_and_says_who_is_left_out() {
        let mut b = balancer("least_pending_tokens");
        b.observe_health(&address(0), false, Time::ZERO);
        b.observe_probe(&address(0), Some("status 503".to_owned()));
        b.drain(&address(1), Time::ZERO);
        let request = Request { prompt_tokens: 900, blocks: &[1, 2], block_tokens: 128.0, session: None };
        let explained = b.explain(&request, Time::ZERO);
        let (winner, _) = explained.winner.unwrap();
        let cost = |backend: &Weighed| backend.cost.unwrap_or(f64::INFINITY);
        let least = explained.backends.iter().min_by(|a, b| cost(a).total_cmp(&cost(b))).unwrap();
        assert_eq!(least.state.address, winner);
        let left_out: Vec<_> = explained.backends.iter().map(|b| b.left_out.as_deref()).collect();
        let drained = "draining: drained on request, nothing in flight";
        assert_eq!(left_out, [Some("down: probe: status 503"), Some(drained), None, None]);
    }
}
