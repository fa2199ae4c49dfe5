//! The plan: everything about a configuration that can still go wrong, found out before anything changes.
//!
//! Names resolve and certificates fit their keys, or the plan is not made. What is done with a plan cannot fail, at the
//! start as at a reload: so a reload is all or nothing.

use std::collections::BTreeMap;
use std::net::ToSocketAddrs;
use std::sync::Arc;

use super::StartError;
use super::reload::Generation;
use crate::clock::Clock;
use crate::config::{self, Config};
use crate::ingress::{self, certificates};
use crate::observe::metrics::Metrics;
use crate::upstream::{self, Heritage, Origin, Probes, Upstream};

/// What a configuration leads to.
pub(super) struct Plan {
    /// As the front door needs them, in the order of the configuration.
    pub(super) listeners: Vec<ingress::Listener>,
    /// Where the backends of each upstream come from, in the order of the configuration.
    origins: Vec<Origin>,
}

impl Plan {
    /// The plan for `config`, where there are upstreams `before`. Waits for the first answers of sources of backends
    /// that are new; but a source without a good one does not stand in the way.
    ///
    /// # Errors
    /// The first name of a listener or a fixed backend that does not resolve, or file that cannot be used.
    pub(super) fn of(config: &Config, before: &[Arc<Upstream>]) -> Result<Self, StartError> {
        let listeners = config.listeners.iter().map(listener).collect::<Result<_, _>>()?;
        let origins = config.upstreams.iter().map(|(name, config)| origin(name, config, before));
        let mut origins = origins.collect::<Result<Vec<_>, _>>()?;
        let (sources, new): (Vec<_>, Vec<_>) = origins
            .iter_mut()
            .filter(|(_, is_new)| *is_new)
            .filter_map(|(origin, _)| Some((origin.source.clone()?, origin)))
            .unzip();
        if !sources.is_empty() {
            let answers = upstream::first_answers(&sources)
                .map_err(|e| StartError(format!("nobody can be asked for backends: {e}")))?;
            new.into_iter().zip(answers).for_each(|(origin, members)| origin.members = members);
        }
        Ok(Self { listeners, origins: origins.into_iter().map(|(origin, _)| origin).collect() })
    }

    /// Where a source had no good answer yet, begins with the backends that the process before us knows of.
    pub(super) fn inherit(&mut self, config: &Config, heritage: &BTreeMap<String, Heritage>) {
        for (name, origin) in config.upstreams.keys().zip(&mut self.origins) {
            if let Some(known) = heritage.get(name)
                && origin.source.is_some()
                && origin.members.is_empty()
            {
                origin.members = known.members();
            }
        }
    }

    /// The upstreams of the configuration that this was planned for, once; they take over the state of those of
    /// `before` that have their names.
    pub(super) fn generation(
        &mut self,
        config: &Config,
        before: Option<&Generation>,
        clock: Clock,
        metrics: &Arc<Metrics>,
    ) -> Generation {
        let mut probes = before.map_or_else(Probes::default, |before| before.probes.successor());
        let known = before.map_or(&[][..], |before| &before.upstreams);
        let upstream = |((name, config), origin): ((&String, &config::Upstream), Origin)| {
            let before = named(known, name).map(Arc::as_ref);
            Upstream::new(name, config.clone(), origin, before, clock, metrics, &mut probes)
        };
        let planned = config.upstreams.iter().zip(std::mem::take(&mut self.origins));
        let upstreams: Vec<_> = planned.map(upstream).collect();
        probes.publish();
        upstreams.iter().for_each(|upstream| upstream.adopt_health());
        Generation { upstreams, probes }
    }
}

fn named<'a>(upstreams: &'a [Arc<Upstream>], name: &str) -> Option<&'a Arc<Upstream>> {
    upstreams.iter().find(|upstream| upstream.name == name)
}

/// Where the backends of an upstream come from, and whether that is to be asked first. A source that stays, stays with
/// what it knows.
fn origin(
    name: &str,
    config: &config::Upstream,
    before: &[Arc<Upstream>],
) -> Result<(Origin, bool), StartError> {
    let Some(discover) = &config.discover else {
        let members = upstream::resolve(&config.backends)
            .map_err(|why| StartError(format!("upstream `{name}`: {why}")))?;
        return Ok((Origin { members, source: None }, false));
    };
    let same = named(before, name).filter(|before| before.config.discover.as_ref() == Some(discover));
    let known = same.and_then(|before| before.source());
    let is_new = known.is_none();
    let source = known.unwrap_or_else(|| upstream::source(discover));
    Ok((Origin { members: Vec::new(), source: Some(source) }, is_new))
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
