//! What the simulator says of the same requests: the same decision code, in virtual time, without bytes or
//! sockets.
//!
//! It is asked about the run as it is, not about life: engines [`SPEED`] times as fast and requests that much
//! closer, so that the balancer reads the engines' metrics as seldom as it does here. What it does not share
//! with the run: engines cache in blocks of the trace (512 tokens) and not of 16, and the index counts in
//! them and not in 512 bytes.

use std::io;
use std::time::Duration;

use plimsoll::policy::PolicyConfig;
use plimsoll::sim::fleet::{Scenario, Scrape, replay};
use plimsoll::sim::hardware::Hardware;
use plimsoll::sim::proxies::{Fleet, Proxies};
use plimsoll::sim::report::{Figures, Slo};
use plimsoll::sim::trace::Trace;

use super::{ENGINES, LOAD, SPEED};

const SEED: u64 = 1;
/// Nothing here is judged by it.
const SLO: Slo = Slo { first_token: Duration::MAX, per_token: Duration::MAX, share: 0.0 };

/// The figures of one balancer with this policy.
pub fn predict(trace: &Trace, policy: &str) -> io::Result<Figures> {
    let policy =
        PolicyConfig::by_name(policy).ok_or_else(|| io::Error::other(format!("no policy {policy}")))?;
    let hardware = Hardware::default();
    let scenario = Scenario {
        trace,
        speedup: LOAD * SPEED,
        hardware,
        speeds: &[SPEED; ENGINES],
        scrape: Some(Scrape::default()),
        slo: SLO,
    };
    let fleet =
        Fleet { weights: &[1; ENGINES], kv_tokens: hardware.kv_tokens, block_tokens: trace.block_tokens };
    let mut balancer = Proxies::new(1, &policy, &fleet, SEED);
    Ok(replay(&scenario, &mut balancer, |_| ()))
}
