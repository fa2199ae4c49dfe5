//! The stage of the wire tests: the real binary between scripted engines and counting clients, on real
//! sockets.
//!
//! Nothing here sleeps to let something happen: an engine waits at a [`engine::Gate`] that the test opens, a
//! test waits for a condition with [`wait_until`], and [`within`] bounds every wait, so that a hang is a
//! failure with a name.

pub mod client;
pub mod dns;
pub mod engine;
pub mod frames;
pub mod http1;
pub mod http2;
pub mod metrics;
pub mod port;
pub mod proxy;
pub mod raw;
pub mod stage;
pub mod tls;

use std::time::Duration;

/// What any single wait may take. Generous: it decides nothing but how soon a hang is reported.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// The output of `future`, or a failure that says what did not come.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what}: not within {PATIENCE:?}"),
    }
}

/// Polls `condition` until it holds.
pub async fn wait_until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let poll = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(what, poll).await;
}

/// The YAML of one upstream `llm` that takes any model, as the rest of a configuration. `more` is further
/// keys in flow style (`max_fails: 0, policy: round_robin`) or empty. Probes and polls are off unless `more`
/// sets them.
pub fn one_upstream(backends: &[String], more: &str) -> String {
    format!("upstreams: {{ llm: {} }}\n", upstream(backends, &format!("models: any, {more}")))
}

/// One upstream as a YAML map in flow style; `more` as for [`one_upstream`].
pub fn upstream(backends: &[String], more: &str) -> String {
    let mut keys = format!("backends: [{}]", backends.join(", "));
    for (key, value) in [("probe:", "off"), ("poll:", "off")] {
        if !more.contains(key) {
            keys += &format!(", {key} {value}");
        }
    }
    match more.trim().trim_end_matches(',') {
        "" => format!("{{ {keys} }}"),
        more => format!("{{ {keys}, {more} }}"),
    }
}
