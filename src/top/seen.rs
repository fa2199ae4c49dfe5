//! What has been seen of the process: its answers, and what their differences say of the last seconds.
//!
//! Counters count from the start of the process, so what is recent is the difference of two looks. A process that has
//! been started again counts anew: its number or its age tells.

use std::collections::{BTreeMap, VecDeque};

use serde::Deserialize;

/// Seconds over which rates and waits are taken.
const RECENT: f64 = 10.0;
/// Seconds over which failures and cached tokens are taken; looks are kept as long.
pub(super) const MINUTE: f64 = 60.0;
/// Less than this, in seconds, is too short for a rate.
const SHORTEST: f64 = 0.5;
/// Outcomes that are the engines' failures.
const FAILURES: [&str; 3] = ["engine_error", "cut", "unreachable"];

/// `GET /status`, as far as it is shown. What is missing is not known.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Status {
    pub(super) version: String,
    pub(super) uptime_seconds: Option<f64>,
    pub(super) pid: Option<u64>,
    pub(super) in_flight: Option<u64>,
    pub(super) reload: Option<Reload>,
    pub(super) upstreams: BTreeMap<String, Upstream>,
}

/// The last reload.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Reload {
    pub(super) ok: bool,
    pub(super) said: String,
    pub(super) ago_seconds: f64,
}

/// An upstream.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Upstream {
    pub(super) policy: String,
    pub(super) queued: Option<u64>,
    pub(super) backends: Vec<Backend>,
}

/// A backend.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Backend {
    pub(super) address: String,
    pub(super) state: String,
    pub(super) reason: Option<String>,
    pub(super) since_seconds: Option<f64>,
    pub(super) pending_tokens: Option<u64>,
    pub(super) active_requests: Option<u64>,
    pub(super) context_tokens: Option<u64>,
    pub(super) share: Option<f64>,
    pub(super) requests: BTreeMap<String, u64>,
    pub(super) ttft_seconds: Waits,
    pub(super) tokens: Tokens,
    pub(super) engine: Option<Engine>,
}

/// Times to first token since the start.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Waits {
    count: u64,
    sum: f64,
}

/// Tokens since the start.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Tokens {
    prompt: u64,
    cached: u64,
}

/// What the engine last said of itself.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Engine {
    pub(super) running: Option<u64>,
    pub(super) waiting: Option<u64>,
    pub(super) kv_usage: Option<f64>,
    pub(super) age_seconds: Option<f64>,
}

/// `GET /choices`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Choices {
    pub(super) choices: Vec<Choice>,
}

/// Where a request went.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Choice {
    pub(super) ago_seconds: f64,
    pub(super) upstream: String,
    pub(super) backend: String,
    pub(super) reason: String,
    pub(super) model: Option<String>,
    pub(super) prompt_tokens: Option<u64>,
    pub(super) matched_tokens: Option<u64>,
}

/// What one or several backends have done in some time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Done {
    seconds: f64,
    ended: u64,
    failed: u64,
    firsts: u64,
    waited: f64,
    prompt: u64,
    cached: u64,
}

impl Done {
    /// Requests ended per second.
    pub(super) fn rate(&self) -> f64 {
        self.ended as f64 / self.seconds
    }

    /// Seconds to the first token, on average.
    pub(super) fn wait(&self) -> Option<f64> {
        (self.firsts > 0).then(|| self.waited / self.firsts as f64)
    }

    /// The part of the requests that failed, 0..=1.
    pub(super) fn failed(&self) -> Option<f64> {
        (self.ended > 0).then(|| self.failed as f64 / self.ended as f64)
    }

    /// The part of the prompt tokens that engines had cached, 0..=1.
    pub(super) fn cached(&self) -> Option<f64> {
        (self.prompt > 0).then(|| self.cached as f64 / self.prompt as f64)
    }

    /// Both together, as of the longer of their times.
    fn with(self, other: Self) -> Self {
        Self {
            seconds: self.seconds.max(other.seconds),
            ended: self.ended + other.ended,
            failed: self.failed + other.failed,
            firsts: self.firsts + other.firsts,
            waited: self.waited + other.waited,
            prompt: self.prompt + other.prompt,
            cached: self.cached + other.cached,
        }
    }

    fn totals(at: f64, backend: &Backend) -> Self {
        let failures = FAILURES.iter().filter_map(|name| backend.requests.get(*name));
        Self {
            seconds: at,
            ended: backend.requests.values().sum(),
            failed: failures.sum(),
            firsts: backend.ttft_seconds.count,
            waited: backend.ttft_seconds.sum,
            prompt: backend.tokens.prompt,
            cached: backend.tokens.cached,
        }
    }

    /// What came after `before`.
    fn less(self, before: Self) -> Self {
        Self {
            seconds: self.seconds - before.seconds,
            ended: self.ended.saturating_sub(before.ended),
            failed: self.failed.saturating_sub(before.failed),
            firsts: self.firsts.saturating_sub(before.firsts),
            waited: (self.waited - before.waited).max(0.0),
            prompt: self.prompt.saturating_sub(before.prompt),
            cached: self.cached.saturating_sub(before.cached),
        }
    }
}

/// The last answers, and the looks before them.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    pub(super) status: Status,
    pub(super) choices: Vec<Choice>,
    /// By upstream and address; the newest last.
    looks: BTreeMap<(String, String), VecDeque<Done>>,
}

impl Seen {
    /// Takes in an answer that came `now` seconds after any fixed moment.
    pub(super) fn look(&mut self, status: Status, choices: Vec<Choice>, now: f64) {
        let (before, after) = (self.status.uptime_seconds, status.uptime_seconds);
        if self.status.pid != status.pid || after < before {
            self.looks.clear();
        }
        // The process's own time, if it tells: answers may have been on their way for long.
        let at = after.unwrap_or(now);
        let mut looks = BTreeMap::new();
        for (name, upstream) in &status.upstreams {
            for backend in &upstream.backends {
                let key = (name.clone(), backend.address.clone());
                let mut past = self.looks.remove(&key).unwrap_or_default();
                past.push_back(Done::totals(at, backend));
                // One older than a minute stays, to measure the minute from.
                while past.get(1).is_some_and(|second| second.seconds <= at - MINUTE) {
                    past.pop_front();
                }
                looks.insert(key, past);
            }
        }
        (self.looks, self.status, self.choices) = (looks, status, choices);
    }

    /// What this backend has done in the last `seconds`, or as far back as is known.
    pub(super) fn done(&self, upstream: &str, address: &str, seconds: f64) -> Option<Done> {
        let past = self.looks.get(&(upstream.to_owned(), address.to_owned()))?;
        let last = *past.back()?;
        let before =
            past.iter().rfind(|look| look.seconds <= last.seconds - seconds).or_else(|| past.front())?;
        let done = last.less(*before);
        (done.seconds >= SHORTEST).then_some(done)
    }

    /// What this backend has done in the last seconds.
    pub(super) fn lately(&self, upstream: &str, address: &str) -> Option<Done> {
        self.done(upstream, address, RECENT)
    }

    /// What all backends of this upstream have done in the last `seconds`.
    pub(super) fn together(&self, upstream: &str, seconds: f64) -> Option<Done> {
        let backends = &self.status.upstreams.get(upstream)?.backends;
        backends.iter().filter_map(|b| self.done(upstream, &b.address, seconds)).reduce(Done::with)
    }

    /// What all backends of this upstream have done in the last seconds.
    pub(super) fn together_lately(&self, upstream: &str) -> Option<Done> {
        self.together(upstream, RECENT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A status of one backend that has answered `ok` requests, waiting 0.2 s for each, since `uptime` seconds.
    fn status(pid: u64, uptime: f64, ok: u64) -> Status {
        let text = format!(
            r#"{{"version":"1","pid":{pid},"uptime_seconds":{uptime},"upstreams":{{"llm":{{"policy":"p","backends":[
                {{"address":"a:1","state":"up","requests":{{"ok":{ok},"cut":{cut}}},"more":[1],
                "ttft_seconds":{{"count":{ok},"sum":{sum}}},"tokens":{{"prompt":{p},"completion":1,"cached":{ok}}}}}
            ]}}}}}}"#,
            cut = ok / 4,
            sum = ok as f64 * 0.2,
            p = ok * 4
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn rates_are_differences_over_the_last_seconds() {
        let mut seen = Seen::default();
        seen.look(status(1, 100.0, 1000), Vec::new(), 0.0);
        assert_eq!(seen.lately("llm", "a:1"), None);
        for second in 1..=30_u32 {
            let ok = if second <= 20 { 1000 } else { 1000 + u64::from(second - 20) * 8 };
            seen.look(status(1, 100.0 + f64::from(second), ok), Vec::new(), 0.0);
        }
        let done = seen.lately("llm", "a:1").unwrap();
        assert_eq!((done.seconds, done.ended, done.firsts), (10.0, 100, 80));
        assert!((done.wait().unwrap() - 0.2).abs() < 1e-9);
        assert_eq!((done.rate(), done.failed(), done.cached()), (10.0, Some(0.2), Some(0.25)));
        assert_eq!(seen.together("llm", MINUTE).unwrap().seconds, 30.0);
        assert_eq!(seen.lately("llm", "b:1"), None);
        for second in 31..=200_u32 {
            seen.look(status(1, 100.0 + f64::from(second), 1080), Vec::new(), 0.0);
        }
        let done = seen.lately("llm", "a:1").unwrap();
        assert_eq!((done.rate(), done.wait(), done.failed(), done.cached()), (0.0, None, None, None));
        assert!(seen.looks.values().all(|past| past.len() == 61), "a minute is kept");
    }

    #[test]
    fn a_process_that_was_started_again_counts_anew() {
        for (pid, uptime) in [(2, 500.0), (1, 3.0)] {
            let mut seen = Seen::default();
            seen.look(status(1, 100.0, 1000), Vec::new(), 0.0);
            seen.look(status(1, 105.0, 1010), Vec::new(), 0.0);
            assert!(seen.lately("llm", "a:1").is_some());
            seen.look(status(pid, uptime, 4), Vec::new(), 0.0);
            assert_eq!(seen.lately("llm", "a:1"), None);
        }
    }

    #[test]
    fn what_an_older_process_does_not_tell_is_not_known() {
        let status: Status =
            serde_json::from_str(r#"{"upstreams":{"llm":{"backends":[{"address":"a:1"}]}}}"#).unwrap();
        let mut seen = Seen::default();
        seen.look(status.clone(), Vec::new(), 1.0);
        seen.look(status, Vec::new(), 3.0);
        assert_eq!(seen.lately("llm", "a:1").map(|done| (done.rate(), done.wait())), Some((0.0, None)));
    }
}
