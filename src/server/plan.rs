//! The plan: everything about a configuration that can still go wrong, found out before anything changes.
//!
//! Names resolve and certificates fit their keys, or the plan is not made. What is done with a plan cannot fail, at the
//! start as at a reload: so a reload is all or nothing.

use std::net::ToSocketAddrs;
use std::sync::Arc;

use super::StartError;
use super::reload::Generation;
use crate::clock::Clock;
use crate::config::{self, Config};
use crate::ingress::{self, certificates};
use crate::observe::metrics::Metrics;
use crate::upstream::{Member, Probes, Upstream};

/// What a configuration leads to.
pub(super) struct Plan {
    /// As the front door needs them, in the order of the configuration.
    pub(super) listeners: Vec<ingress::Listener>,
    /// The backends of each upstream, in the order of the configuration.
    members: Vec<Vec<Member>>,
}

impl Plan {
    /// The plan for `config`.
    ///
    /// # Errors
    /// The first name that does not resolve, or file that cannot be used.
    pub(super) fn of(config: &Config) -> Result<Self, StartError> {
        Ok(Self {
            listeners: config.listeners.iter().map(listener).collect::<Result<_, _>>()?,
            members: config
                .upstreams
                .iter()
                .map(|(name, u)| resolve(name, &u.backends))
                .collect::<Result<_, _>>()?,
        })
    }

    /// The upstreams of the configuration that this was planned for, which take over the state of those of `before`
    /// that have their names.
    pub(super) fn generation(
        &self,
        config: &Config,
        before: Option<&Generation>,
        clock: Clock,
        metrics: &Metrics,
    ) -> Generation {
        let mut probes = before.map_or_else(Probes::default, |before| before.probes.successor());
        let known = before.map_or(&[][..], |before| &before.upstreams);
        let planned = config.upstreams.iter().zip(&self.members);
        let upstream = |((name, config), members): ((&String, &config::Upstream), &Vec<Member>)| {
            let before = known.iter().find(|before| before.name == *name).map(Arc::as_ref);
            Upstream::new(name, config.clone(), members, before, clock, metrics, &mut probes)
        };
        let upstreams: Vec<_> = planned.map(upstream).collect();
        probes.publish();
        upstreams.iter().for_each(|upstream| upstream.adopt_health());
        Generation { upstreams, probes }
    }
}

/// The addresses of an upstream's backends; a name with several addresses is several backends.
fn resolve(upstream: &str, backends: &[config::Backend]) -> Result<Vec<Member>, StartError> {
    let mut members: Vec<Member> = Vec::new();
    for backend in backends {
        let addresses = backend.address.to_socket_addrs().map_err(|e| {
            StartError(format!("upstream `{upstream}`: backend {} does not resolve: {e}", backend.address))
        })?;
        for address in addresses {
            if !members.iter().any(|known| known.address == address) {
                let host = backend.address.rsplit_once(':').map_or("", |(host, _)| host);
                members.push(Member { address, weight: backend.weight, host: host.to_owned() });
            }
        }
    }
    Ok(members)
}

fn listener(listener: &config::Listener) -> Result<ingress::Listener, StartError> {
    let unusable = |e: &dyn std::fmt::Display| StartError(format!("listener {}: {e}", listener.address));
    // Pingora listens on the first address of a name, too.
    let address = listener.address.to_socket_addrs().map_err(|e| unusable(&e))?.next();
    let tls = listener.tls.as_ref();
    let acceptor = tls.map(|tls| certificates::acceptor(tls, listener.http2).map_err(|e| unusable(&e)));
    Ok(ingress::Listener {
        address: address.ok_or_else(|| unusable(&"no such address"))?,
        tls: acceptor.transpose()?,
        mutual: tls.is_some_and(|tls| tls.client_ca.is_some()),
        http2: listener.http2,
        proxy_protocol: listener.proxy_protocol,
    })
}
