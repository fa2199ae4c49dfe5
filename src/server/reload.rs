//! The reload: another configuration, from one moment to the next, under the requests of the one before.
//!
//! ```text
//! read and check the file -> plan what may fail -> upstreams over the old state -> swap -> probe and poll the new ones
//! ```
//!
//! What is wrong with the file or the plan changes nothing. Requests in flight end as they began; connections stay;
//! what is known of a backend stays with its address. What a running process cannot change is said, and waits for a
//! restart.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pingora_proxy::HttpProxy;
use tokio::sync::watch;

use super::notify::notify;
use super::plan::Plan;
use crate::clock::Clock;
use crate::config::{self, Config};
use crate::ingress::Door;
use crate::observe::metrics::Metrics;
use crate::policy::Policies;
use crate::proxy::Proxy;
use crate::upstream::{Probes, Upstream};

/// What is probed and polled.
pub(super) struct Generation {
    pub(super) upstreams: Vec<Arc<Upstream>>,
    pub(super) probes: Probes,
}

/// Reads the configuration again, and puts it in the place of the one that runs.
pub(super) struct Reloader {
    /// The configuration file.
    pub(super) file: PathBuf,
    /// The policies that it may name.
    pub(super) policies: Policies,
    pub(super) clock: Clock,
    pub(super) metrics: Arc<Metrics>,
    pub(super) proxy: Proxy,
    pub(super) door: Door<HttpProxy<Proxy>>,
    /// The configuration that runs; held for as long as a reload takes, so that there is one at a time.
    pub(super) running: Mutex<Config>,
    /// Of it, what the drain needs, which must not wait for a reload.
    pub(super) drain_timeout: Mutex<Duration>,
    pub(super) generations: watch::Sender<Arc<Generation>>,
}

impl Reloader {
    /// Reloads, tells log, metrics and systemd, and says what came of it. Reads files and resolves names: not for a
    /// thread that serves requests.
    ///
    /// # Errors
    /// Everything that is wrong with the file, or the first thing that stands in its way.
    pub(super) fn reload(&self) -> Result<String, String> {
        notify("RELOADING=1");
        let result = self.apply();
        self.metrics.reloaded(result.is_ok());
        match &result {
            Ok(done) => log::info!("reloaded file={} {done}", self.file.display()),
            Err(why) => log::error!("not reloaded, nothing has changed file={}\n{why}", self.file.display()),
        }
        if !self.proxy.is_stopping() {
            notify("READY=1");
        }
        result
    }

    fn apply(&self) -> Result<String, String> {
        let mut running = self.running.lock();
        let config = config::load(&self.file, &self.policies).map_err(|report| report.to_string())?;
        let plan = Plan::of(&config).map_err(|e| e.to_string())?;
        if self.proxy.is_stopping() {
            return Err("the process is about to end".to_owned());
        }
        let before = self.generations.borrow().clone();
        let mut probes = before.probes.successor();
        let upstreams = plan.upstreams(&config, &before.upstreams, self.clock, &self.metrics, &mut probes);
        probes.publish();
        upstreams.iter().for_each(|upstream| upstream.adopt_health());
        self.proxy.configure(&config, upstreams.clone());
        self.door.configure(&config, plan.listeners);
        self.generations.send_replace(Arc::new(Generation { upstreams, probes }));
        let waiting = running.fixed_differences(&config);
        *self.drain_timeout.lock() = config.server.drain_timeout;
        *running = config;
        Ok(match &waiting[..] {
            [] => "all of it applies".to_owned(),
            keys => format!("but for what needs a restart: {}", keys.join(", ")),
        })
    }
}
