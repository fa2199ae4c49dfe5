//! Who competes: our policies, the classics without any readings, the rivals, and the oracle.
//!
//! Ours read the engines every second, as they do in production. Our `round_robin` and `least_connections`
//! thereby avoid engines that are out of memory; the plain ones, which the gates compare with, know nothing
//! but their turn and their count.

use std::time::Duration;

use plimsoll::policy::PolicyConfig;
use plimsoll::sim::fleet::{Dispatcher, Scenario, Scrape, replay};
use plimsoll::sim::oracle::Oracle;
use plimsoll::sim::proxies::{Fleet, Proxies};
use plimsoll::sim::report::Figures;
use plimsoll::sim::trace::Trace;

use crate::rivals::{Rival, Site};
use crate::workloads::Workload;

/// Who chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    /// A policy of ours, by name, with default options.
    Ours(&'static str),
    /// The same, and nobody reads the engines' metrics.
    Plain(&'static str),
    /// A rival that reads the engines every so often.
    Rival(Rival, Duration),
    /// The clairvoyant.
    Oracle,
}

/// The default policy.
pub const LEAST_PENDING: Contender = Contender::Ours("least_pending_tokens");
/// Ours by hash.
pub const PREFIX_HASH: Contender = Contender::Ours("prefix_hash");
/// Least connections, with readings.
pub const OUR_LEAST_CONNECTIONS: Contender = Contender::Ours("least_connections");
/// What every capacity is a multiple of.
pub const ROUND_ROBIN: Contender = Contender::Plain("round_robin");
/// Least connections, without readings.
pub const LEAST_CONNECTIONS: Contender = Contender::Plain("least_connections");
/// GIE's formula at its default interval.
pub const GIE: Contender = Contender::Rival(Rival::Gie, SCRAPE_OF_RIVALS);
/// SMG's formula.
pub const SMG: Contender = Contender::Rival(Rival::Smg, SCRAPE_OF_RIVALS);
/// The plain hash ring.
pub const KETAMA: Contender = Contender::Rival(Rival::Ketama, SCRAPE_OF_RIVALS);

/// What GIE does by default. Of the others here none looks at a reading.
const SCRAPE_OF_RIVALS: Duration = Duration::from_millis(50);
const SCRAPE_OF_OURS: Duration = Duration::from_secs(1);

impl Contender {
    /// All of them, in the order of the tables.
    pub fn all() -> Vec<Self> {
        let first = "least_pending_tokens";
        let others = PolicyConfig::NAMES.iter().copied().filter(|name| *name != first);
        let ours = std::iter::once(first).chain(others).map(Self::Ours);
        let mut all: Vec<_> = ours.chain([LEAST_CONNECTIONS, ROUND_ROBIN]).collect();
        for rival in Rival::ALL {
            all.push(Self::Rival(rival, SCRAPE_OF_RIVALS));
            if rival == Rival::Gie {
                all.push(Self::Rival(rival, Duration::from_secs(1)));
            }
        }
        all.push(Self::Oracle);
        all
    }

    /// The name on the command line; a rival has one for all its intervals.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours(name) => name,
            Self::Plain("round_robin") => "plain_round_robin",
            Self::Plain(_) => "plain_least_connections",
            Self::Rival(rival, _) => rival.name(),
            Self::Oracle => "oracle",
        }
    }

    /// What a table calls it.
    pub fn title(self) -> String {
        match self {
            Self::Ours(name) => format!("`{name}`"),
            Self::Plain(name) => format!("plain {}", name.replace('_', " ")),
            Self::Rival(rival @ Rival::Gie, interval) => {
                format!("{}, scrapes every {}", rival.title(), span(interval))
            }
            Self::Rival(rival, _) => rival.title().to_owned(),
            Self::Oracle => "(the clairvoyant oracle)".to_owned(),
        }
    }
}

/// A duration as one reads it.
pub fn span(duration: Duration) -> String {
    match duration.subsec_millis() {
        0 => format!("{} s", duration.as_secs()),
        _ => format!("{} ms", duration.as_millis()),
    }
}

/// A replay, in all that may vary.
pub struct Setting<'a> {
    /// What is replayed, on what.
    pub workload: &'a Workload,
    /// The day's traffic.
    pub trace: &'a Trace,
    /// Of all that is drawn.
    pub seed: u64,
    /// How many times faster than recorded.
    pub speedup: f64,
    /// Of each replica.
    pub speeds: Vec<f64>,
    /// That each replica was configured with.
    pub weights: Vec<u32>,
    /// Proxies that know nothing of each other; for policies of ours.
    pub proxies: usize,
    /// Another interval between readings than the contender's own.
    pub scrape: Option<Duration>,
}

/// Replays a trace.
pub fn run(contender: Contender, setting: &Setting<'_>) -> Figures {
    let Setting { workload, trace, seed, .. } = setting;
    let hardware = workload.hardware();
    let (kv_tokens, block_tokens) = (hardware.kv_tokens, trace.block_tokens.max(1));
    let scrape = match contender {
        Contender::Ours(_) => Some(setting.scrape.unwrap_or(SCRAPE_OF_OURS)),
        Contender::Rival(_, interval) => Some(setting.scrape.unwrap_or(interval)),
        Contender::Plain(_) | Contender::Oracle => None,
    };
    let mut dispatcher: Box<dyn Dispatcher> = match contender {
        Contender::Ours(name) | Contender::Plain(name) => {
            let policy = PolicyConfig::by_name(name).unwrap_or_else(|| panic!("no policy called {name}"));
            let fleet = Fleet { weights: &setting.weights, kv_tokens, block_tokens };
            Box::new(Proxies::new(setting.proxies, &policy, &fleet, *seed))
        }
        Contender::Rival(rival, _) => {
            rival.build(&Site { replicas: workload.replicas, kv_tokens, block_tokens }, *seed)
        }
        Contender::Oracle => Box::new(Oracle::default()),
    };
    let scenario = Scenario {
        trace,
        speedup: setting.speedup,
        hardware,
        speeds: &setting.speeds,
        scrape: scrape.map(|interval| Scrape { interval, delay: Duration::ZERO }),
        slo: workload.slo,
    };
    replay(&scenario, dispatcher.as_mut(), |_| ())
}
