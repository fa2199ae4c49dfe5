//! A policy of one's own in a binary of one's own: long prompts keep to a lane of their own.
//!
//! An engine computes prompts in the same steps as the next token of each stream it serves, so one prompt of
//! 100,000 tokens makes every chat beside it stutter. This policy keeps long prompts on the heavy backends
//! (those of `weight: 2` and more) and short ones on the light:
//!
//! ```text
//! cost = (owed by the backend + added by this request) / weight + DETOUR if it is not the prompt's lane
//! ```
//!
//! Both terms are tokens. So the lanes are a preference and not a wall: where the own lane owes `DETOUR` more
//! than the other, or is down, the request goes to the other.
//!
//! Built on the library: `cargo run --example two_lanes -- run --config plimsoll.yaml`, where the file says
//! `policy: two_lanes`; `check` and `simulate --policy two_lanes` know it too.

use std::collections::HashSet;
use std::process::ExitCode;

use plimsoll::cli;
use plimsoll::policy::{Candidate, Fleet, Member, NameRefused, Policies, Policy, Request, Slot};

/// From this many tokens on a prompt is long.
const LONG: u64 = 4_096;
/// From this weight on a backend is heavy.
const HEAVY: u32 = 2;
/// What a request in flight counts for: its stream takes a part of each step. In tokens.
const REQUEST: u64 = 400;
/// How much more the own lane may owe than the other. In tokens per unit of weight.
const DETOUR: f64 = 16_384.0;

/// The heavy backends. A candidate's own weight does not tell: it is less while the backend starts slowly.
#[derive(Default)]
struct TwoLanes(HashSet<Slot>);

impl Policy for TwoLanes {
    fn cost(&self, request: &Request<'_>, backend: &Candidate, _fleet: &Fleet) -> f64 {
        let owed = backend.pending_tokens + REQUEST * u64::from(backend.active_requests);
        let added = backend.uncached_tokens + REQUEST;
        let in_own_lane = (request.prompt_tokens >= LONG) == self.0.contains(&backend.slot);
        (owed + added) as f64 / backend.weight + if in_own_lane { 0.0 } else { DETOUR }
    }

    fn rebuild(&mut self, backends: &[Member]) {
        self.0 = backends.iter().filter(|b| b.weight >= HEAVY).map(|b| b.slot).collect();
    }

    /// Without it, `uncached_tokens` would be the whole prompt.
    fn uses_prefix_index(&self) -> bool {
        true
    }
}

fn main() -> Result<ExitCode, NameRefused> {
    let policies = Policies::default().with("two_lanes", TwoLanes::default)?;
    Ok(cli::main_with(&policies))
}
