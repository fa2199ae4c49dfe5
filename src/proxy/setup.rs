//! The part of the proxy that a configuration describes, and that a reload replaces as a whole.
//!
//! A request goes by the setup that was there when it began, to its end, so that it never sees half of one and half of
//! another. What has to outlive a configuration (upstreams' states, keys' allowances) is handed from each to the next.

use std::sync::Arc;

use super::access::Keys;
use super::route::Routes;
use crate::config::{Config, Limits, Network, Observe};
use crate::observe::metrics::Metrics;
use crate::upstream::Upstream;

/// What requests go by.
pub(super) struct Setup {
    pub(super) routes: Routes,
    /// `None`: everybody may ask.
    pub(super) keys: Option<Keys>,
    pub(super) upstreams: Vec<Arc<Upstream>>,
    pub(super) limits: Limits,
    /// The proxies in front of us that are believed.
    pub(super) trusted: Vec<Network>,
    pub(super) observe: Observe,
}

impl Setup {
    /// The setup that `config` describes, over these upstreams; keys that were there `before` have used what they had
    /// used then.
    pub(super) fn new(
        config: &Config,
        upstreams: Vec<Arc<Upstream>>,
        metrics: &Metrics,
        before: Option<&Self>,
    ) -> Self {
        Self {
            routes: Routes::new(&config.routes, &upstreams),
            keys: Keys::new(&config.keys, metrics, before.and_then(|before| before.keys.as_ref())),
            upstreams,
            limits: config.limits.clone(),
            trusted: config.trusted_proxies.clone(),
            observe: config.observe.clone(),
        }
    }
}
