//! The active health check: is this backend alive?
//!
//! A `GET` of the engine's health path (engines answer HEAD with 405) with a patient timeout, because a saturated engine is slow to
//! answer and SGLang's always takes a second; several failures in a row before a backend counts as down. Probes of one upstream run in parallel,
//! each with a jitter of its own, so they neither wait for each other nor arrive together.
//!
//! A probe that times out proves nothing against a backend that has sent bytes since the last one: it is busy, not dead
//! (research/reliability.md s.0.8 and s.2). Scheduling and thresholds are those of Pingora's `HealthCheckService`.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;
use pingora::{Error, ErrorType};
use pingora_load_balancing::Backend;
use pingora_load_balancing::health_check::HealthCheck;

use super::client::{Client, NoAnswer};
use super::{Live, Shared};
use crate::config;

/// The fraction of the interval over which probes are spread.
const JITTER: f64 = 0.2;

/// The health check of one upstream.
pub(super) struct Probe {
    config: config::Probe,
    path: String,
    client: Client,
    shared: Arc<Shared>,
    live: HashMap<SocketAddr, Arc<Live>>,
}

impl Probe {
    /// The check that `config` describes; `None` if it is switched off.
    pub(super) fn new(
        config: &config::Upstream,
        authorization: Option<String>,
        shared: Arc<Shared>,
        live: HashMap<SocketAddr, Arc<Live>>,
    ) -> Option<Self> {
        let probe = config.probe.clone()?;
        let path = config.probe_path()?.to_owned();
        Some(Self { config: probe, path, client: Client::new(config, authorization), shared, live })
    }

    fn was_heard_lately(&self, live: &Live) -> bool {
        live.silence(self.shared.clock.now()) < self.config.interval + self.config.timeout
    }
}

/// Health is that of an address, whatever weight it has at the moment.
pub(super) fn by_address(backend: &Backend) -> u64 {
    let mut hasher = DefaultHasher::new();
    backend.addr.hash(&mut hasher);
    hasher.finish()
}

#[async_trait]
impl HealthCheck for Probe {
    async fn check(&self, target: &Backend) -> pingora::Result<()> {
        let Some(live) = target.addr.as_inet().and_then(|address| self.live.get(address)) else {
            return Ok(());
        };
        tokio::time::sleep(self.config.interval.mul_f64(JITTER * fastrand::f64())).await;
        match self.client.get(live, &self.path, self.config.timeout).await {
            Ok((200..=299, _)) => Ok(()),
            Ok((status, _)) => Error::e_explain(ErrorType::HTTPStatus(status), "probe"),
            Err(NoAnswer::Late) if self.was_heard_lately(live) => Ok(()),
            Err(no_answer) => Error::e_explain(ErrorType::ConnectError, format!("probe: {no_answer}")),
        }
    }

    async fn health_status_change(&self, target: &Backend, healthy: bool) {
        if let Some(address) = target.addr.as_inet() {
            self.shared.observe_health(address, healthy);
        }
    }

    fn backend_summary(&self, target: &Backend) -> String {
        format!("upstream={} backend={}", self.shared.name, target.addr)
    }

    fn health_threshold(&self, success: bool) -> usize {
        (if success { self.config.up_after } else { self.config.down_after }) as usize
    }
}
