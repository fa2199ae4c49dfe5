//! Backends from DNS: the addresses of a name, or the targets of its SRV records.
//!
//! Asked again when the shortest TTL of the answer ends, not sooner than [`SOONEST`] and not later than the interval.
//! Each asking reads /etc/resolv.conf and /etc/hosts anew and caches nothing: a machine that moves to another network
//! needs no restart.
//!
//! An address record and its IPv6 sister are two questions, and one of them may fail while the other is answered. The
//! one that failed then says what it said last, so that nobody is removed for it; if both fail, the whole asking has.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::rdata::SRV;
use hickory_resolver::proto::rr::{RData, RecordType};
use parking_lot::Mutex;
use pingora_load_balancing::Backend;
use pingora_load_balancing::discovery::ServiceDiscovery;

use super::{AGAIN, Member, Source, failed};
use crate::config;

/// A TTL of zero is no reason to ask without end.
const SOONEST: Duration = Duration::from_secs(1);

/// The largest weight that a backend may have in the configuration.
const HEAVIEST: u32 = 1_000;

/// A UDP packet may be lost: each question is asked so many times within its timeout.
const TRIES: u32 = 3;

/// What DNS is asked.
pub(super) struct Dns {
    question: Question,
    servers: Vec<SocketAddr>,
    timeout: Duration,
    latest: Duration,
    memory: Mutex<Memory>,
}

enum Question {
    /// Where is this host? Its backends listen on this port.
    Host(String, u16),
    /// Who offers this service?
    Service(String),
}

/// What was answered last.
struct Memory {
    holds_for: Duration,
    addresses: BTreeMap<(String, RecordType), Vec<IpAddr>>,
}

/// Somewhere to be looked up.
struct Target {
    host: String,
    port: u16,
    weight: u32,
}

/// Records, and for how many seconds they hold.
#[derive(Debug, Default)]
struct Records {
    data: Vec<RData>,
    ttl: Option<u32>,
}

impl Dns {
    /// The `dns` or `srv` of `config`.
    pub(super) fn new(config: &config::Discover) -> Self {
        let host = config.dns.as_ref().and_then(|dns| dns.rsplit_once(':'));
        let question = match (host, &config.srv) {
            (Some((host, port)), _) => Question::Host(host.to_owned(), port.parse().unwrap_or(0)),
            (None, service) => Question::Service(service.clone().unwrap_or_default()),
        };
        Self {
            question,
            servers: config.servers.iter().map(|server| server.0).collect(),
            timeout: config.timeout,
            latest: config.interval(),
            memory: Mutex::new(Memory { holds_for: config.interval(), addresses: BTreeMap::new() }),
        }
    }

    /// A resolver that knows what the system knows now.
    fn resolver(&self) -> Result<TokioResolver, NetError> {
        let mut builder = if self.servers.is_empty() {
            TokioResolver::builder_tokio()?
        } else {
            let servers = self.servers.iter().map(|server| {
                let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
                    connection.port = server.port();
                    connection
                });
                NameServerConfig::new(server.ip(), true, connections.into())
            });
            let config = ResolverConfig::from_name_servers(servers.collect());
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        };
        let options = builder.options_mut();
        options.cache_size = 0;
        options.timeout = self.timeout / TRIES;
        options.attempts = TRIES as usize - 1;
        // A CNAME may end sooner than the addresses behind it.
        options.preserve_intermediates = true;
        builder.build()
    }

    /// The backends, and for how many seconds they hold.
    async fn ask(&self) -> Result<(Vec<Member>, Option<u32>), String> {
        let resolver = self.resolver().map_err(|e| e.to_string())?;
        let (targets, mut ttl) = self.targets(&resolver).await?;
        let answers = join_all(targets.iter().map(|target| self.addresses(&resolver, &target.host))).await;
        let mut members: Vec<Member> = Vec::new();
        for (target, answer) in targets.iter().zip(answers) {
            let (addresses, of_these) = answer?;
            ttl = shorter(ttl, of_these);
            for address in addresses.into_iter().map(|ip| SocketAddr::new(ip, target.port)) {
                match members.iter_mut().find(|known| known.address == address) {
                    Some(known) => known.weight = known.weight.max(target.weight),
                    None => {
                        members.push(Member { address, weight: target.weight, host: target.host.clone() })
                    }
                }
            }
        }
        let asked: BTreeSet<&String> = targets.iter().map(|target| &target.host).collect();
        self.memory.lock().addresses.retain(|(host, _), _| asked.contains(host));
        Ok((members, ttl))
    }

    async fn targets(&self, resolver: &TokioResolver) -> Result<(Vec<Target>, Option<u32>), String> {
        match &self.question {
            Question::Host(host, port) => {
                let host = host.trim_matches(['[', ']']).to_owned();
                Ok((vec![Target { host, port: *port, weight: 1 }], None))
            }
            Question::Service(name) => {
                let records = self.records(resolver, name, RecordType::SRV).await?;
                let services = records.data.into_iter().filter_map(|data| match data {
                    RData::SRV(service) => Some(service),
                    _ => None,
                });
                Ok((preferred(services.collect()), records.ttl))
            }
        }
    }

    /// The addresses of `host`, and for how many seconds they hold.
    async fn addresses(
        &self,
        resolver: &TokioResolver,
        host: &str,
    ) -> Result<(Vec<IpAddr>, Option<u32>), String> {
        if let Ok(ip) = host.parse() {
            return Ok((vec![ip], None));
        }
        let kinds = [RecordType::A, RecordType::AAAA];
        let answers = join_all(kinds.map(|kind| self.records(resolver, host, kind))).await;
        if let [Err(why), Err(_)] = &answers[..] {
            return Err(why.clone());
        }
        let (mut addresses, mut ttl) = (Vec::new(), None);
        let mut memory = self.memory.lock();
        for (kind, answer) in kinds.into_iter().zip(answers) {
            let last = memory.addresses.entry((host.to_owned(), kind)).or_default();
            match answer {
                Ok(records) => {
                    *last = records.data.iter().filter_map(RData::ip_addr).collect();
                    ttl = shorter(ttl, records.ttl);
                }
                Err(why) => log::debug!("half an answer host={host} kind={kind} error={why:?}"),
            }
            addresses.extend(last.iter().copied());
        }
        Ok((addresses, ttl))
    }

    /// The records of that kind; none is an answer as well.
    async fn records(
        &self,
        resolver: &TokioResolver,
        name: &str,
        kind: RecordType,
    ) -> Result<Records, String> {
        let answer = tokio::time::timeout(self.timeout, resolver.lookup(name, kind)).await;
        match answer.unwrap_or(Err(NetError::Timeout)) {
            Ok(lookup) => Ok(Records::of(&lookup, kind)),
            Err(NetError::Dns(DnsError::NoRecordsFound(none)))
                if matches!(none.response_code, ResponseCode::NoError | ResponseCode::NXDomain) =>
            {
                Ok(Records::default())
            }
            Err(NetError::Timeout) => Err(format!("{kind} {name}: no answer within {:?}", self.timeout)),
            Err(e) => Err(format!("{kind} {name}: {e}")),
        }
    }
}

impl Records {
    fn of(lookup: &Lookup, kind: RecordType) -> Self {
        let ttl = lookup.answers().iter().map(|record| record.ttl).min();
        let data = lookup.answers().iter().map(|record| &record.data);
        Self { data: data.filter(|data| data.record_type() == kind).cloned().collect(), ttl }
    }
}

#[async_trait]
impl ServiceDiscovery for Dns {
    async fn discover(&self) -> pingora::Result<(BTreeSet<Backend>, HashMap<u64, bool>)> {
        let answer = self.ask().await;
        let useful = answer.as_ref().is_ok_and(|(members, _)| !members.is_empty());
        let ttl = answer.as_ref().ok().and_then(|(_, ttl)| *ttl);
        self.memory.lock().holds_for =
            if useful { holds_for(ttl, self.latest) } else { AGAIN.min(self.latest) };
        match answer {
            Ok((members, _)) => Ok((members.iter().map(Member::backend).collect(), HashMap::new())),
            Err(why) => failed(why),
        }
    }
}

impl Source for Dns {
    fn holds_for(&self) -> Duration {
        self.memory.lock().holds_for
    }
}

/// How long an answer with that TTL, in seconds, is believed.
fn holds_for(ttl: Option<u32>, latest: Duration) -> Duration {
    ttl.map_or(latest, |ttl| Duration::from_secs(ttl.into())).max(SOONEST).min(latest)
}

fn shorter(a: Option<u32>, b: Option<u32>) -> Option<u32> {
    a.into_iter().chain(b).min()
}

/// The targets of lowest priority number, in the order of their hosts. A weight of 0 counts as 1; where one is larger
/// than ours may be, all are brought down.
fn preferred(services: Vec<SRV>) -> Vec<Target> {
    let first = services.iter().map(|service| service.priority).min();
    // A lone `.` says that the service is not there.
    let preferred: Vec<&SRV> = services
        .iter()
        .filter(|service| Some(service.priority) == first && !service.target.is_root())
        .collect();
    let weight = |service: &SRV| u32::from(service.weight.max(1));
    // By a factor that does not depend on who else is there: weights that stay the same stay the same here.
    let is_large = preferred.iter().any(|service| weight(service) > HEAVIEST);
    let scaled =
        |weight: u32| if is_large { (weight * HEAVIEST / u32::from(u16::MAX)).max(1) } else { weight };
    let target = |service: &&SRV| Target {
        host: service.target.to_ascii().trim_end_matches('.').to_owned(),
        port: service.port,
        weight: scaled(weight(service)),
    };
    let mut targets: Vec<Target> = preferred.iter().map(target).collect();
    // Records rotate; who is asked first must not.
    targets.sort_by(|a, b| (&a.host, a.port).cmp(&(&b.host, b.port)));
    targets
}

#[cfg(test)]
mod tests {
    use hickory_resolver::proto::rr::Name;

    use super::*;

    #[test]
    fn an_answer_holds_as_long_as_its_ttl_within_bounds() {
        let [latest, short] = [Duration::from_secs(30), Duration::from_millis(100)];
        assert_eq!(holds_for(Some(0), latest), SOONEST);
        assert_eq!(holds_for(Some(7), latest), Duration::from_secs(7));
        assert_eq!(holds_for(Some(u32::MAX), latest), latest);
        assert_eq!(holds_for(None, latest), latest);
        assert_eq!(holds_for(Some(0), short), short, "whoever wants it sooner gets it");
        assert_eq!(shorter(Some(3), None), Some(3));
        assert_eq!(shorter(Some(3), Some(2)), Some(2));
    }

    fn weights(records: &[(u16, u16)]) -> Vec<(String, u32)> {
        let record = |(n, (priority, weight)): (usize, &(u16, u16))| {
            SRV::new(*priority, *weight, 8000, Name::from_ascii(format!("gpu-{n}.internal.")).unwrap())
        };
        let targets = preferred(records.iter().enumerate().map(record).collect());
        targets.into_iter().map(|target| (target.host, target.weight)).collect()
    }

    #[test]
    fn only_the_lowest_priority_counts_and_weights_keep_their_proportions() {
        let host = |n: usize| format!("gpu-{n}.internal");
        assert_eq!(weights(&[(10, 5), (20, 5), (10, 15)]), [(host(0), 5), (host(2), 15)]);
        assert_eq!(weights(&[(0, 0), (0, 0)]), [(host(0), 1), (host(1), 1)]);
        assert_eq!(weights(&[(0, 0), (0, 10)]), [(host(0), 1), (host(1), 10)]);
        assert_eq!(weights(&[(0, 1), (0, 65_535)]), [(host(0), 1), (host(1), 1_000)]);
        assert_eq!(weights(&[(0, 20_000), (0, 65_535)]), [(host(0), 305), (host(1), 1_000)]);
        assert_eq!(weights(&[]), []);
        assert!(preferred(vec![SRV::new(0, 0, 0, Name::root())]).is_empty(), "not offered here");
    }
}
