//! Every metric there is, in one table, with its help text.
//!
//! Counters and histograms are resolved per backend once, when the backend joins ([`BackendMetrics`]), so
//! that nothing on the path of a request or of a stream's event looks up a label. All series exist from the
//! start, at zero, so that `increase()` sees the first event. Gauges that mirror state are set from a
//! snapshot when they are scraped, by [`Metrics::set_states`].

use prometheus::core::Collector;
use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, TextEncoder,
};

use super::Outcome;
use super::process::Process;
use super::registry::Registry;
pub use super::registry::Row;
use crate::balance::State;
use crate::balance::retry::Failure;
use crate::policy::Reason;

/// Result of registering metrics.
type Result<T> = std::result::Result<T, prometheus::Error>;

/// The metrics of the process.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    attempts: IntCounterVec,
    ttft: HistogramVec,
    event_gap: HistogramVec,
    tokens: IntCounterVec,
    stream_reads: IntCounterVec,
    retries: IntCounterVec,
    ejections: IntCounterVec,
    choices: IntCounterVec,
    state: StateGauges,
    queued: IntGaugeVec,
    refusals: IntCounterVec,
    reloads: IntCounterVec,
    reload_failed: IntGauge,
    upgrades: IntCounterVec,
    key_requests: IntCounterVec,
    key_tokens: IntCounterVec,
    certificate_expiry: IntGaugeVec,
    process: Process,
    trace_exports: IntCounterVec,
    discoveries: IntCounterVec,
    discovery_age: GaugeVec,
    /// Bytes of request bodies held in memory.
    pub buffered_body_bytes: IntGauge,
}

/// The gauges that mirror [`State`], labelled by upstream and backend.
struct StateGauges {
    pending_tokens: IntGaugeVec,
    active_requests: IntGaugeVec,
    context_tokens: IntGaugeVec,
    traffic_share: GaugeVec,
    up: IntGaugeVec,
    weight: IntGaugeVec,
    strained: IntGaugeVec,
    stalled: IntGaugeVec,
    engine_waiting: IntGaugeVec,
    engine_running: IntGaugeVec,
    engine_kv_usage: GaugeVec,
    poll_age: GaugeVec,
}

/// The counters of one backend.
#[derive(Clone)]
pub struct BackendMetrics {
    /// Requests by outcome, in the order of [`Outcome::ALL`].
    requests: [IntCounter; Outcome::ALL.len()],
    /// Attempts sent to it.
    pub attempts: IntCounter,
    /// Seconds from arrival of the request to the first content byte.
    pub ttft: Histogram,
    /// Seconds between two reads of a stream.
    pub event_gap: Histogram,
    /// Prompt tokens, as the engine reported them.
    pub prompt_tokens: IntCounter,
    /// Generated tokens, as the engine reported them.
    pub completion_tokens: IntCounter,
    /// Prompt tokens served from the engine's cache, as it reported them.
    pub cached_tokens: IntCounter,
    /// Reads of a response body that were passed on.
    pub stream_reads: IntCounter,
}

impl BackendMetrics {
    /// Counts a request that ended so.
    pub fn count(&self, outcome: Outcome) {
        self.requests[outcome as usize].inc();
    }

    /// How many requests have ended how.
    pub fn outcomes(&self) -> impl Iterator<Item = (Outcome, u64)> {
        Outcome::ALL.into_iter().zip(self.requests.iter().map(IntCounter::get))
    }
}

/// The counters of one upstream that belong to none of its backends.
#[derive(Clone)]
pub struct UpstreamMetrics {
    /// Choices by reason, in the order of [`Reason::ALL`].
    choices: [IntCounter; Reason::ALL.len()],
    retries: IntCounterVec,
    ejections: IntCounterVec,
    /// Requests waiting for room.
    pub queued: IntGauge,
    name: String,
}

impl UpstreamMetrics {
    /// Counts a choice made for `reason`.
    pub fn chose(&self, reason: Reason) {
        self.choices[reason as usize].inc();
    }

    /// Counts a retry after a failure of that name.
    pub fn retried(&self, failure: &str) {
        self.retries.with_label_values(&[self.name.as_str(), failure]).inc();
    }

    /// Counts an ejection of `backend` after a failure of that name.
    pub fn ejected(&self, backend: &str, failure: &str) {
        self.ejections.with_label_values(&[self.name.as_str(), backend, failure]).inc();
    }
}

/// The counters of one client's key.
pub struct KeyMetrics {
    /// Requests by outcome, in the order of [`Outcome::ALL`].
    requests: [IntCounter; Outcome::ALL.len()],
    /// Prompt tokens, as engines report them, or our estimate where they do not.
    pub prompt_tokens: IntCounter,
    /// Generated tokens, likewise.
    pub completion_tokens: IntCounter,
}

impl KeyMetrics {
    /// Counts a request that ended so.
    pub fn count(&self, outcome: Outcome) {
        self.requests[outcome as usize].inc();
    }
}

/// The counters of one upstream's source of backends.
pub struct DiscoveryMetrics([IntCounter; DISCOVERIES.len()]);

impl DiscoveryMetrics {
    /// Counts an answer with that result, one of `ok`, `empty` and `failed`.
    pub fn count(&self, result: &str) {
        let counters = DISCOVERIES.iter().zip(&self.0).filter(|(known, _)| **known == result);
        counters.for_each(|(_, counter)| counter.inc());
    }
}

/// The counters of batches of spans.
pub struct ExportMetrics([IntCounter; RESULTS.len()]);

impl ExportMetrics {
    /// Counts a batch.
    pub fn count(&self, well: bool) {
        self.0[usize::from(!well)].inc();
    }
}

/// The results of asking a source of backends.
const DISCOVERIES: [&str; 3] = ["ok", "empty", "failed"];

/// The results of a reload, an upgrade, or a batch of spans.
const RESULTS: [&str; 2] = ["ok", "failed"];

const BACKEND: &[&str] = &["upstream", "backend"];

/// Seconds to the first token: from a cached prefix on an idle GPU to a long queue.
const TTFT_BUCKETS: &[f64] = &[
    0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0,
    300.0, 600.0,
];

/// Seconds between events: from a small model to a preempted stream.
const GAP_BUCKETS: &[f64] = &[
    0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
];

impl Metrics {
    /// Registers every metric. Errors only if two had one name.
    pub fn new() -> Result<Self> {
        let r = Registry::default();
        let outcome = &["upstream", "backend", "outcome"];
        let kind = &["upstream", "backend", "kind"];
        let reason = &["upstream", "reason"];
        let ejected = &["upstream", "backend", "reason"];
        let ttft = "Time from a request's arrival to the first content of its stream.";
        let queued = "Requests waiting for a backend with room.";
        let bodies =
            IntGauge::with_opts(opts("buffered_body_bytes", "Bytes of request bodies held in memory."))?;
        let age = "Age of the last good answer of an upstream's source of backends, or of the upstream without one.";
        let discovery_age = GaugeVec::new(opts("discovery_age_seconds", age), &["upstream"])?;
        let failed = "1 if the last reload failed, and the configuration before it runs on.";
        let reload_failed = IntGauge::with_opts(opts("reload_failed", failed))?;
        let expiry = "When a certificate that clients are shown expires, by the file it came from.";
        let certificate = &["listener", "certificate"];
        let build = gauges(&r, "build_info", "1, with the version that runs.", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let metrics = Self {
            requests: counters(&r, "requests_total", "Requests by backend and how they ended.", outcome)?,
            attempts: counters(
                &r,
                "attempts_total",
                "Attempts sent to a backend, retries included.",
                BACKEND,
            )?,
            ttft: histograms(&r, "ttft_seconds", ttft, TTFT_BUCKETS)?,
            event_gap: histograms(
                &r,
                "event_gap_seconds",
                "Time between two reads of a stream.",
                GAP_BUCKETS,
            )?,
            tokens: counters(&r, "tokens_total", "Tokens by kind, as engines report them in `usage`.", kind)?,
            stream_reads: counters(
                &r,
                "stream_reads_total",
                "Reads of answers passed on to clients.",
                BACKEND,
            )?,
            retries: counters(&r, "retries_total", "Further attempts, by the failure before them.", reason)?,
            ejections: counters(&r, "ejections_total", "Backends ejected, by the last failure.", ejected)?,
            choices: counters(&r, "choices_total", "Choices of a backend, by reason.", reason)?,
            state: StateGauges::new(&r)?,
            queued: gauges(&r, "queued_requests", queued, &["upstream"])?,
            refusals: counters(&r, "refusals_total", "Answers and endings of our own, by code.", &["code"])?,
            reloads: counters(&r, "reloads_total", "Reloads of the configuration, by result.", &["result"])?,
            reload_failed: register(&r, reload_failed)?,
            upgrades: counters(&r, "upgrades_total", "Upgrades of the process, by result.", &["result"])?,
            key_requests: counters(
                &r,
                "key_requests_total",
                "Requests by key and how they ended.",
                &["key", "outcome"],
            )?,
            key_tokens: counters(
                &r,
                "key_tokens_total",
                "Tokens by key and kind, as it is charged for them.",
                &["key", "kind"],
            )?,
            certificate_expiry: gauges(&r, "certificate_expiry_timestamp_seconds", expiry, certificate)?,
            process: Process::new(&r)?,
            trace_exports: counters(
                &r,
                "trace_exports_total",
                "Batches of spans for the collector, by whether it took them.",
                &["result"],
            )?,
            discoveries: counters(
                &r,
                "discoveries_total",
                "Answers of an upstream's source of backends, by result.",
                &["upstream", "result"],
            )?,
            discovery_age: register(&r, discovery_age)?,
            buffered_body_bytes: register(&r, bodies)?,
            registry: r,
        };
        for result in RESULTS {
            metrics.reloads.with_label_values(&[result]);
            metrics.upgrades.with_label_values(&[result]);
            metrics.trace_exports.with_label_values(&[result]);
        }
        for outcome in Outcome::ALL {
            metrics.requests.with_label_values(&["", "", outcome.name()]);
        }
        Ok(metrics)
    }

    /// Counts a reload.
    pub fn reloaded(&self, well: bool) {
        self.reloads.with_label_values(&[RESULTS[usize::from(!well)]]).inc();
        self.reload_failed.set(i64::from(!well));
    }

    /// Counts an upgrade.
    pub fn upgraded(&self, well: bool) {
        self.upgrades.with_label_values(&[RESULTS[usize::from(!well)]]).inc();
    }

    /// The counters of batches of spans.
    pub fn exports(&self) -> ExportMetrics {
        ExportMetrics(RESULTS.map(|result| self.trace_exports.with_label_values(&[result])))
    }

    /// The counters of a backend, all present at zero from now on.
    pub fn backend(&self, upstream: &str, backend: &str) -> BackendMetrics {
        let labels = &[upstream, backend];
        for failure in Failure::NAMES {
            self.ejections.with_label_values(&[upstream, backend, failure]);
        }
        let tokens = |kind| self.tokens.with_label_values(&[upstream, backend, kind]);
        BackendMetrics {
            requests: Outcome::ALL.map(|o| self.requests.with_label_values(&[upstream, backend, o.name()])),
            attempts: self.attempts.with_label_values(labels),
            ttft: self.ttft.with_label_values(labels),
            event_gap: self.event_gap.with_label_values(labels),
            prompt_tokens: tokens("prompt"),
            completion_tokens: tokens("completion"),
            cached_tokens: tokens("cached"),
            stream_reads: self.stream_reads.with_label_values(labels),
        }
    }

    /// The counters of an upstream, all present at zero from now on.
    pub fn upstream(&self, upstream: &str) -> UpstreamMetrics {
        for failure in Failure::NAMES {
            self.retries.with_label_values(&[upstream, failure]);
        }
        for outcome in Outcome::ALL {
            self.requests.with_label_values(&[upstream, "", outcome.name()]);
        }
        UpstreamMetrics {
            choices: Reason::ALL.map(|r| self.choices.with_label_values(&[upstream, r.name()])),
            retries: self.retries.clone(),
            ejections: self.ejections.clone(),
            queued: self.queued.with_label_values(&[upstream]),
            name: upstream.to_owned(),
        }
    }

    /// The counters of a client's key, all present at zero from now on.
    pub fn key(&self, name: &str) -> KeyMetrics {
        KeyMetrics {
            requests: Outcome::ALL.map(|o| self.key_requests.with_label_values(&[name, o.name()])),
            prompt_tokens: self.key_tokens.with_label_values(&[name, "prompt"]),
            completion_tokens: self.key_tokens.with_label_values(&[name, "completion"]),
        }
    }

    /// The counters of an upstream's source of backends, all present at zero from now on.
    pub fn discovery(&self, upstream: &str) -> DiscoveryMetrics {
        DiscoveryMetrics(DISCOVERIES.map(|result| self.discoveries.with_label_values(&[upstream, result])))
    }

    /// Brings the age of the last good answer of an upstream's source of backends up to date.
    pub fn set_discovery_age(&self, upstream: &str, age: std::time::Duration) {
        self.discovery_age.with_label_values(&[upstream]).set(age.as_secs_f64());
    }

    /// The counter of refusals with that code, present from now on.
    pub fn refusal(&self, code: &str) -> IntCounter {
        self.refusals.with_label_values(&[code])
    }

    /// Counts a request that no backend was chosen for.
    pub fn count_without_backend(&self, upstream: &str, outcome: Outcome) {
        self.requests.with_label_values(&[upstream, "", outcome.name()]).inc();
    }

    /// Shows these certificates, and no others: listener, file, and when it expires, in seconds since 1970.
    pub fn show_certificates<'a>(&self, shown: impl Iterator<Item = (String, &'a str, i64)>) {
        self.certificate_expiry.reset();
        for (listener, file, expires) in shown {
            self.certificate_expiry.with_label_values(&[listener.as_str(), file]).set(expires);
        }
    }

    /// Forgets the gauges of all backends, of which some may be gone; [`Metrics::set_states`] brings back the others.
    pub fn forget_states(&self) {
        let g = &self.state;
        let ints = [
            &g.pending_tokens,
            &g.active_requests,
            &g.context_tokens,
            &g.up,
            &g.weight,
            &g.strained,
            &g.stalled,
            &g.engine_waiting,
            &g.engine_running,
        ];
        ints.into_iter().for_each(IntGaugeVec::reset);
        let floats = [&g.traffic_share, &g.engine_kv_usage, &g.poll_age, &self.discovery_age];
        floats.into_iter().for_each(GaugeVec::reset);
    }

    /// Brings the gauges of an upstream up to date.
    pub fn set_states(&self, upstream: &str, states: &[State]) {
        for state in states {
            let backend = state.address.to_string();
            let labels = &[upstream, backend.as_str()];
            let g = &self.state;
            g.pending_tokens.with_label_values(labels).set(state.account.pending_tokens as i64);
            g.active_requests.with_label_values(labels).set(i64::from(state.account.active_requests));
            g.context_tokens.with_label_values(labels).set(state.account.context_tokens as i64);
            g.traffic_share.with_label_values(labels).set(state.share);
            g.up.with_label_values(labels).set(i64::from(state.healthy && !state.ejected && !state.draining));
            g.weight.with_label_values(labels).set(i64::from(state.weight));
            g.stalled.with_label_values(labels).set(i64::from(state.stalled));
            g.strained.with_label_values(labels).set(i64::from(state.strained));
            let Some((reading, age)) = state.reading else { continue };
            g.poll_age.with_label_values(labels).set(age.as_secs_f64());
            if let Some(waiting) = reading.waiting {
                g.engine_waiting.with_label_values(labels).set(waiting as i64);
            }
            if let Some(running) = reading.running {
                g.engine_running.with_label_values(labels).set(running as i64);
            }
            if let Some(kv_usage) = reading.kv_usage {
                g.engine_kv_usage.with_label_values(labels).set(kv_usage);
            }
        }
    }

    /// Every metric there is, in the order of names.
    pub fn rows(&self) -> Vec<Row> {
        self.registry.rows()
    }

    /// All metrics in the Prometheus text format.
    pub fn exposition(&self) -> Vec<u8> {
        self.process.read();
        let mut out = Vec::with_capacity(64 * 1024);
        if let Err(e) = TextEncoder::new().encode(&self.registry.gather(), &mut out) {
            log::error!("metrics cannot be written: {e}");
        }
        out
    }
}

impl StateGauges {
    fn new(r: &Registry) -> Result<Self> {
        let int = |name, help| gauges(r, name, help, BACKEND);
        let float = |name, help| float_gauges(r, name, help);
        Ok(Self {
            pending_tokens: int(
                "pending_tokens",
                "Uncached prompt tokens sent and not yet answered (our ledger).",
            )?,
            active_requests: int("active_requests", "Requests in flight (our ledger).")?,
            context_tokens: int("context_tokens", "Prompt tokens of requests in flight (our ledger).")?,
            traffic_share: float(
                "traffic_share",
                "Part of the upstream's requests of the last 10 s, 0 to 1.",
            )?,
            up: int("backend_up", "1 if the backend is in rotation: probes pass, not ejected, not drained.")?,
            weight: int("backend_weight", "Its weight, relative to the others of its upstream.")?,
            stalled: int(
                "backend_stalled",
                "1 if it has had requests for `stall_timeout` and sent nothing.",
            )?,
            strained: int(
                "backend_strained",
                "1 if the engine is out of KV memory and has a queue, at a fresh poll: others go first.",
            )?,
            engine_waiting: int("engine_waiting", "Requests waiting in the engine, at the last poll.")?,
            engine_running: int("engine_running", "Requests running in the engine, at the last poll.")?,
            engine_kv_usage: float(
                "engine_kv_usage",
                "Part of the KV cache in use at the last poll, 0 to 1.",
            )?,
            poll_age: float("poll_age_seconds", "Age of the engine's last readings.")?,
        })
    }
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(name, help).namespace("plimsoll")
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> Result<C> {
    registry.register(metric)
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec> {
    register(registry, IntCounterVec::new(opts(name, help), labels)?)
}

fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec> {
    register(registry, IntGaugeVec::new(opts(name, help), labels)?)
}

fn float_gauges(registry: &Registry, name: &str, help: &str) -> Result<GaugeVec> {
    register(registry, GaugeVec::new(opts(name, help), BACKEND)?)
}

fn histograms(registry: &Registry, name: &str, help: &str, buckets: &[f64]) -> Result<HistogramVec> {
    let opts = HistogramOpts::from(opts(name, help)).buckets(buckets.to_vec());
    register(registry, HistogramVec::new(opts, BACKEND)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_shows_every_outcome_at_zero_before_its_first_request() {
        let metrics = Metrics::new().unwrap();
        let backend = metrics.backend("llama", "10.0.0.1:8000");
        let text = String::from_utf8(metrics.exposition()).unwrap();
        for outcome in Outcome::ALL {
            let line = format!(
                r#"plimsoll_requests_total{{backend="10.0.0.1:8000",outcome="{}",upstream="llama"}} 0"#,
                outcome.name()
            );
            assert!(text.contains(&line), "{line} is missing in\n{text}");
        }
        backend.count(Outcome::Cut);
        let text = String::from_utf8(metrics.exposition()).unwrap();
        assert!(text.contains(r#"outcome="cut",upstream="llama"} 1"#), "{text}");
    }

    #[test]
    fn outcomes_and_reasons_index_their_own_counters() {
        for (index, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(*outcome as usize, index);
        }
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
    }
}
