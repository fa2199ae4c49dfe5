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

use super::StartError;
use super::notify::{notify, reloading};
use super::plan::Plan;
use crate::admin::Reloaded;
use crate::clock::{Clock, Time};
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
    /// What came of the last reload, and when.
    pub(super) last: Mutex<Option<(Time, Result<String, String>)>>,
}

impl Reloader {
    /// Reloads, tells log, metrics and systemd, and says what came of it. Reads files and resolves names: not for a
    /// thread that serves requests.
    ///
    /// # Errors
    /// Everything that is wrong with the file, or the first thing that stands in its way.
    pub(super) fn reload(&self) -> Result<String, String> {
        reloading();
        let result = self.apply();
        self.metrics.reloaded(result.is_ok());
        *self.last.lock() = Some((self.clock.now(), result.clone()));
        match &result {
            Ok(done) => log::info!("reloaded file={} {done}", self.file.display()),
            Err(why) => log::error!("not reloaded, nothing has changed file={}\n{why}", self.file.display()),
        }
        if !self.proxy.is_stopping() {
            notify("READY=1");
        }
        result
    }

    /// The configuration that runs, without its secrets.
    pub(super) fn config(&self) -> String {
        config::show(&self.running.lock())
    }

    /// What came of the last reload.
    pub(super) fn last_reload(&self) -> Option<Reloaded> {
        let last = self.last.lock();
        let (at, result) = last.as_ref()?;
        let (Ok(said) | Err(said)) = result;
        Some(Reloaded { ok: result.is_ok(), said: said.clone(), ago: self.clock.now().since(*at) })
    }

    /// Writes down our process id, where the configuration says.
    ///
    /// # Errors
    /// It cannot be written there.
    pub(super) fn write_pid(&self) -> Result<(), StartError> {
        let path = self.running.lock().server.pid_file.clone();
        let written =
            path.as_ref().map(|path| (path, std::fs::write(path, format!("{}\n", std::process::id()))));
        match written {
            Some((path, Err(e))) => {
                Err(StartError(format!("cannot write the pid file {}: {e}", path.display())))
            }
            _ => Ok(()),
        }
    }

    fn apply(&self) -> Result<String, String> {
        let mut running = self.running.lock();
        let config = config::load(&self.file, &self.policies).map_err(|report| report.to_string())?;
        let before = self.generations.borrow().clone();
        let mut plan = Plan::of(&config, &before.upstreams).map_err(|e| e.to_string())?;
        if self.proxy.is_stopping() {
            return Err("the process is about to end".to_owned());
        }
        let generation = plan.generation(&config, Some(&before), self.clock, &self.metrics);
        self.proxy.configure(&config, generation.upstreams.clone());
        self.door.configure(&config, plan.listeners);
        self.generations.send_replace(Arc::new(generation));
        let waiting = running.fixed_differences(&config);
        *self.drain_timeout.lock() = config.server.drain_timeout;
        *running = config;
        Ok(match &waiting[..] {
            [] => "all of it applies".to_owned(),
            keys => format!("but for what needs a restart: {}", keys.join(", ")),
        })
    }
}
