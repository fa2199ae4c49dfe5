//! How a backend stands: one word, and why, for everybody who asks.
//!
//! A backend may be several things at once: down, and ejected from before. The word is the first that is true of it in
//! the order of [`Standing::ALL`], where each says more than those behind it. `/status`, its table and the dashboard
//! show this word and this reason; nobody decides them again.

use std::net::SocketAddr;
use std::time::Duration;

use super::ledger::Account;
use super::{Backend, Balancer};
use crate::clock::Time;
use crate::engine::Reading;
use crate::policy::Member;

/// The one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It gets no new request, because somebody asked for that.
    Draining,
    /// Its probes fail.
    Down,
    /// Its requests failed, and it is left out for a while.
    Ejected,
    /// It has had requests for `stall_timeout` and sent nothing.
    Stalled,
    /// Back from an ejection, and tried by one request that has not been answered.
    OnTrial,
    /// It said that it is full, or fails while nobody knows whose fault that is.
    Cooling,
    /// Its engine is out of KV memory and has a queue: others go first.
    Strained,
    /// None of these.
    Up,
}

impl Standing {
    /// Every one, the most telling first.
    pub const ALL: [Self; 8] = [
        Self::Draining,
        Self::Down,
        Self::Ejected,
        Self::Stalled,
        Self::OnTrial,
        Self::Cooling,
        Self::Strained,
        Self::Up,
    ];

    /// The word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Down => "down",
            Self::Ejected => "ejected",
            Self::Stalled => "stalled",
            Self::OnTrial => "on_trial",
            Self::Cooling => "cooling",
            Self::Strained => "strained",
            Self::Up => "up",
        }
    }
}

/// One backend, as an observer sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Its address.
    pub address: SocketAddr,
    /// Its weight: the configured one, or what was set in its place.
    pub weight: u32,
    /// How it stands.
    pub standing: Standing,
    /// Why, in words for people; `None` if it is up.
    pub reason: Option<String>,
    /// For how long, as far as that is known.
    pub for_span: Option<Duration>,
    /// It gets no new request, because somebody asked for that.
    pub draining: bool,
    /// The verdict of the probes.
    pub healthy: bool,
    /// Ejected for its faults.
    pub ejected: bool,
    /// Back from an ejection, and tried by one request that has not been answered.
    pub on_trial: bool,
    /// Asked to be left alone.
    pub cooling: bool,
    /// Its engine is out of KV memory and has a queue, says a fresh reading: others go first.
    pub strained: bool,
    /// It has had requests in flight for `stall_timeout` and sent nothing.
    pub stalled: bool,
    /// What it owes.
    pub account: Account,
    /// Part of the requests of the last ten seconds, 0 to 1.
    pub share: f64,
    /// Blocks of prefixes remembered for it.
    pub prefix_blocks: usize,
    /// Its engine's last readings and their age, if it was ever polled.
    pub reading: Option<(Reading, Duration)>,
}

impl Balancer {
    /// Every backend as it stands.
    pub fn states(&mut self, now: Time) -> Vec<State> {
        let requests = f64::from(self.share.total(now).max(1));
        self.members.iter().map(|member| self.state(member, requests, now)).collect()
    }

    /// The backend as it stands, if all had so many `requests` lately.
    fn state(&self, member: &Member, requests: f64, now: Time) -> State {
        let backend = &self.backends[member.slot.0 as usize];
        let account = self.known(member.slot);
        let stalled = self.is_stalled(member.slot, now);
        let standing = backend.standing(stalled, now);
        let silent_since = backend.silent_since();
        let since = backend.stands_since(standing, silent_since);
        State {
            address: member.address,
            weight: member.weight,
            standing,
            reason: backend.reason(standing, &account, now.since(silent_since)),
            for_span: since.map(|since| now.since(since)),
            draining: backend.draining.is_some(),
            healthy: backend.healthy,
            ejected: backend.record.ejected(now),
            on_trial: backend.record.on_trial(now),
            cooling: backend.record.cooling(now),
            strained: backend.is_strained(now),
            stalled,
            account,
            share: f64::from(self.share.of(member.slot)) / requests,
            prefix_blocks: self.index.held(member.slot.0 as usize),
            reading: backend.gauge.map(|gauge| (gauge.reading, now.since(gauge.at))),
        }
    }
}

impl Backend {
    /// How it stands at `now`, if it is `stalled` or not.
    pub(super) fn standing(&self, stalled: bool, now: Time) -> Standing {
        let is = |standing: &Standing| match standing {
            Standing::Draining => self.draining.is_some(),
            Standing::Down => !self.healthy,
            Standing::Ejected => self.record.ejected(now),
            Standing::Stalled => stalled,
            Standing::OnTrial => self.record.on_trial(now),
            Standing::Cooling => self.record.cooling(now),
            Standing::Strained => self.is_strained(now),
            Standing::Up => true,
        };
        Standing::ALL.into_iter().find(is).unwrap_or(Standing::Up)
    }

    /// Why it stands so, in words for people.
    fn reason(&self, standing: Standing, account: &Account, silence: Duration) -> Option<String> {
        let reading = self.gauge.map(|gauge| gauge.reading).unwrap_or_default();
        Some(match standing {
            Standing::Draining => match account.active_requests {
                0 => "drained on request, nothing in flight".to_owned(),
                n => format!("drained on request, {n} in flight"),
            },
            Standing::Down => {
                format!("probe: {}", self.probe_failure.as_deref().unwrap_or("no answer that counts yet"))
            }
            Standing::Ejected => self.record.why_ejected(),
            Standing::Stalled => {
                format!("{} in flight and no byte for {} s", account.active_requests, silence.as_secs())
            }
            Standing::OnTrial => {
                format!("back from an ejection for {}; tried by one request", self.record.why_ejected())
            }
            Standing::Cooling => self.record.why_cooling(),
            Standing::Strained => format!(
                "KV memory {:.0} % full and {} waiting",
                reading.kv_usage.unwrap_or_default() * 100.0,
                reading.waiting.unwrap_or_default()
            ),
            Standing::Up => return None,
        })
    }

    /// Since when it stands so, as far as that is known. It says nothing since `silent_since`.
    fn stands_since(&self, standing: Standing, silent_since: Time) -> Option<Time> {
        match standing {
            Standing::Draining => self.draining,
            Standing::Down => self.judged_at,
            Standing::Ejected => Some(self.record.ejected_at()),
            Standing::Stalled => Some(silent_since),
            Standing::OnTrial => Some(self.record.tried_at()),
            Standing::Cooling => Some(self.record.cooling_at()),
            Standing::Strained => None,
            Standing::Up => self.since,
        }
    }
}
