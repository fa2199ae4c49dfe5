//! Access: which key a request shows, and how much of its allowance is left.
//!
//! A key is found by the start of its SHA-256, and the whole of it is compared in constant time. The allowances
//! are estimates over the last minute by pingora-limits: all of the present interval, and of the one before it the
//! part that is less than a minute old. A request and its prompt are counted when they are let in; what the engine
//! counted takes the place of our estimate at the end.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, header};
use parking_lot::Mutex;
use pingora::http::ResponseHeader;
use pingora_limits::rate::{Rate, RateComponents};
use subtle::ConstantTimeEq;

use super::Refusal;
use crate::config::{self, KeyHash};
use crate::observe::metrics::{KeyMetrics, Metrics};

/// Where a key may be shown beside `authorization: Bearer`, in the manner of Anthropic's and of Azure's clients.
const KEY_HEADERS: [&str; 2] = ["x-api-key", "api-key"];

/// What an allowance is per.
const INTERVAL: Duration = Duration::from_secs(60);

/// Every key there is.
pub(super) struct Keys {
    /// By the first bytes of their hashes, which tell nobody anything.
    by_start: HashMap<u64, Vec<Arc<Key>>>,
}

/// A key, and what has been used of it.
pub(super) struct Key {
    pub(super) name: String,
    pub(super) metrics: KeyMetrics,
    hash: KeyHash,
    requests: Option<Allowance>,
    tokens: Option<Allowance>,
}

impl Keys {
    /// The keys of a configuration; `None` if it has none, and everybody may ask. A key of a name that was there
    /// `before` has used what it had used then.
    pub(super) fn new(
        keys: &BTreeMap<String, config::Key>,
        metrics: &Metrics,
        before: Option<&Self>,
    ) -> Option<Self> {
        let known = |name: &str| before?.by_start.values().flatten().find(|key| key.name == name);
        let mut by_start: HashMap<u64, Vec<Arc<Key>>> = HashMap::new();
        for (name, key) in keys {
            let used = known(name);
            let allowance = |limit: Option<u32>, used: Option<&Allowance>| {
                limit.map(|limit| Allowance::new(limit, used.map(|used| used.rate.clone())))
            };
            let live = Key {
                name: name.clone(),
                metrics: metrics.key(name),
                hash: key.hash,
                requests: allowance(key.requests_per_minute, used.and_then(|key| key.requests.as_ref())),
                tokens: allowance(key.tokens_per_minute, used.and_then(|key| key.tokens.as_ref())),
            };
            by_start.entry(key.hash.start()).or_default().push(Arc::new(live));
        }
        (!keys.is_empty()).then_some(Self { by_start })
    }

    /// The key that a request with these headers shows.
    pub(super) fn find(&self, headers: &HeaderMap) -> Result<Arc<Key>, Refusal> {
        let shown = shown(headers)?.ok_or_else(Refusal::missing_api_key)?;
        let hash = KeyHash::of(shown);
        let mut alike = self.by_start.get(&hash.start()).into_iter().flatten();
        let key = alike.find(|key| bool::from(key.hash.as_bytes().ct_eq(hash.as_bytes())));
        key.cloned().ok_or_else(Refusal::invalid_api_key)
    }
}

/// The one key among the headers. Two different ones would be a request that two people read differently.
fn shown(headers: &HeaderMap) -> Result<Option<&[u8]>, Refusal> {
    let bearer = headers.get_all(header::AUTHORIZATION).iter().map(|value| bearer(value).ok_or(()));
    let plain = KEY_HEADERS.iter().flat_map(|name| headers.get_all(*name)).map(|value| Ok(value.as_bytes()));
    let mut found = None;
    for key in bearer.chain(plain) {
        match (key, found) {
            (Ok(key), None) => found = Some(key),
            (Ok(key), Some(first)) if key == first => {}
            _ => return Err(Refusal::invalid_api_key()),
        }
    }
    Ok(found)
}

fn bearer(value: &HeaderValue) -> Option<&[u8]> {
    let value = value.as_bytes();
    let space = value.iter().position(|&b| b == b' ')?;
    value[..space].eq_ignore_ascii_case(b"bearer").then(|| value[space..].trim_ascii())
}

/// Takes the clients' keys from what goes to an engine.
pub(super) fn conceal(request: &mut pingora::http::RequestHeader) {
    request.remove_header(&header::AUTHORIZATION);
    for name in KEY_HEADERS {
        request.remove_header(name);
    }
}

impl Key {
    /// Counts one more request, or refuses it.
    pub(super) fn admit(&self) -> Result<(), Refusal> {
        if let Some(wait) = self.tokens.as_ref().and_then(|tokens| tokens.peek(1)) {
            return Err(Refusal::rate_limited("tokens", wait));
        }
        match self.requests.as_ref().and_then(|requests| requests.take(1)) {
            Some(wait) => Err(Refusal::rate_limited("requests", wait)),
            None => Ok(()),
        }
    }

    /// Counts `tokens`; fewer than none are given back.
    pub(super) fn spend(&self, tokens: i64) {
        if let Some(allowance) = &self.tokens {
            allowance.add(tokens);
        }
    }

    /// Tells the client what is left of its allowances, in the headers that OpenAI's clients know.
    pub(super) fn announce(&self, response: &mut ResponseHeader) -> pingora::Result<()> {
        if let Some(requests) = &self.requests {
            response.insert_header("x-ratelimit-limit-requests", requests.limit)?;
            response.insert_header("x-ratelimit-remaining-requests", requests.left())?;
        }
        if let Some(tokens) = &self.tokens {
            response.insert_header("x-ratelimit-limit-tokens", tokens.limit)?;
            response.insert_header("x-ratelimit-remaining-tokens", tokens.left())?;
        }
        Ok(())
    }
}

/// How much may be used per minute.
struct Allowance {
    limit: u32,
    /// Behind a lock because two threads at the end of an interval may make a `Rate` count backwards, which
    /// panics in a debug build and forgets the interval in a release.
    rate: Arc<Mutex<Rate>>,
}

impl Allowance {
    /// An allowance of which something may be `used` already.
    fn new(limit: u32, used: Option<Arc<Mutex<Rate>>>) -> Self {
        // One key, one counter: nothing to estimate by hashing.
        let unused = || Arc::new(Mutex::new(Rate::new_with_estimator_config(INTERVAL, 1, 1)));
        Self { limit, rate: used.unwrap_or_else(unused) }
    }

    /// Takes `amount`; if that is more than what is left, takes nothing and says when it will be there.
    fn take(&self, amount: u32) -> Option<Duration> {
        let rate = self.rate.lock();
        let wait = rate.rate_with(&(), |used| wait(used, self.limit, amount));
        if wait.is_none() {
            rate.observe(&(), isize::try_from(amount).unwrap_or(isize::MAX));
        }
        wait
    }

    /// When `amount` will be there; `None` if it is.
    fn peek(&self, amount: u32) -> Option<Duration> {
        self.rate.lock().rate_with(&(), |used| wait(used, self.limit, amount))
    }

    fn add(&self, amount: i64) {
        self.rate.lock().observe(&(), isize::try_from(amount).unwrap_or(0));
    }

    fn left(&self) -> u32 {
        let used = self.rate.lock().rate_with(&(), used);
        (f64::from(self.limit) - used).clamp(0.0, f64::from(self.limit)) as u32
    }
}

/// What was used in the last minute.
fn used(seen: RateComponents) -> f64 {
    let before = (seen.prev_samples.max(0) as f64) * (1.0 - seen.current_interval_fraction);
    (before + seen.curr_samples as f64).max(0.0)
}

/// How long until `amount` more is within `limit`; `None` if it is already.
fn wait(seen: RateComponents, limit: u32, amount: u32) -> Option<Duration> {
    let room = f64::from(limit) - f64::from(amount);
    if used(seen) <= room {
        return None;
    }
    let (before, now) = (seen.prev_samples.max(0) as f64, seen.curr_samples.max(0) as f64);
    let passed = seen.current_interval_fraction;
    // The fraction of an interval at whose end so little of `count` counts that it is within `room`.
    let until = |count: f64, room: f64| 1.0 - (room / count).clamp(0.0, 1.0);
    let intervals =
        if now <= room { until(before, room - now) - passed } else { 1.0 - passed + until(now, room) };
    Some(seen.interval.mul_f64(intervals.clamp(0.0, 2.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(text: &str) -> Keys {
        let keys: BTreeMap<String, config::Key> = serde_yaml::from_str(text).unwrap();
        Keys::new(&keys, &Metrics::new().unwrap(), None).unwrap()
    }

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (http::HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        let mut map = HeaderMap::new();
        pairs.iter().map(pair).for_each(|(name, value)| {
            map.append(name, value);
        });
        map
    }

    #[test]
    fn a_key_is_found_wherever_clients_show_it_and_only_if_there_is_one() {
        let keys = keys(&format!("{{ a: {{ sha256: {} }} }}", KeyHash::of(b"sk-a")));
        for shown in [
            &[("authorization", "Bearer sk-a")][..],
            &[("authorization", "bearer  sk-a ")],
            &[("x-api-key", "sk-a")],
            &[("api-key", "sk-a"), ("authorization", "Bearer sk-a")],
        ] {
            assert_eq!(
                keys.find(&headers(shown)).map(|key| key.name.clone()),
                Ok("a".to_owned()),
                "{shown:?}"
            );
        }
        assert_eq!(keys.find(&headers(&[])).err().unwrap().code, "missing_api_key");
        for shown in [
            &[("authorization", "Bearer sk-b")][..],
            &[("authorization", "sk-a")],
            &[("authorization", "Basic sk-a")],
            &[("authorization", "Bearer sk-a"), ("authorization", "Bearer sk-b")],
            &[("authorization", "Basic x"), ("x-api-key", "sk-a")],
            &[("x-api-key", "")],
        ] {
            assert_eq!(keys.find(&headers(shown)).err().unwrap().code, "invalid_api_key", "{shown:?}");
        }
    }

    fn seen(before: isize, now: isize, passed: f64) -> RateComponents {
        // The type is closed to others, so one of its own is taken and changed.
        let mut seen = Rate::new(INTERVAL).rate_with(&(), |seen| seen);
        (seen.prev_samples, seen.curr_samples, seen.current_interval_fraction) = (before, now, passed);
        seen
    }

    #[test]
    fn a_wait_ends_when_there_is_room_and_not_before() {
        for (before, now, passed, limit) in [
            (100, 0, 0.0, 50),
            (100, 40, 0.25, 50),
            (100, 100, 0.5, 50),
            (0, 100, 0.9, 50),
            (60, 50, 0.1, 50),
        ] {
            let wait = wait(seen(before, now, passed), limit, 1).unwrap();
            let at = |later: f64| {
                let end = passed + wait.as_secs_f64() / INTERVAL.as_secs_f64() + later;
                let then = if end < 1.0 { seen(before, now, end) } else { seen(now, 0, end - 1.0) };
                used(then) + 1.0
            };
            let case = format!("{before} {now} {passed}: {wait:?}");
            assert!(at(1e-6) <= f64::from(limit) && at(-0.02) > f64::from(limit), "{case}: {}", at(1e-6));
        }
        assert_eq!(wait(seen(100, 0, 0.5), 51, 1), None);
        assert_eq!(used(seen(10, -30, 0.5)), 0.0, "what was given back of an earlier minute is no credit");
    }

    #[test]
    fn a_new_configuration_finds_what_a_key_has_used() {
        let before =
            keys(&format!("{{ a: {{ sha256: {}, requests_per_minute: 2 }} }}", KeyHash::of(b"sk-a")));
        before.find(&headers(&[("x-api-key", "sk-a")])).unwrap().admit().unwrap();
        let yaml = format!("{{ a: {{ sha256: {}, requests_per_minute: 3 }} }}", KeyHash::of(b"sk-b"));
        let after = Keys::new(&serde_yaml::from_str(&yaml).unwrap(), &Metrics::new().unwrap(), Some(&before));
        let key = after.unwrap().find(&headers(&[("x-api-key", "sk-b")])).unwrap();
        let allowance = key.requests.as_ref().unwrap();
        assert_eq!(
            (allowance.limit, allowance.left()),
            (3, 2),
            "a key that was changed keeps its name and its use"
        );
    }

    #[test]
    fn what_is_refused_is_not_counted_and_what_is_given_back_is_there_again() {
        let allowance = Allowance::new(10, None);
        assert_eq!((allowance.take(10), allowance.left()), (None, 0));
        assert!(allowance.take(1).is_some() && allowance.take(1).is_some());
        allowance.add(-4);
        assert_eq!((allowance.left(), allowance.peek(4)), (4, None));
        assert!(allowance.peek(5).is_some());
        allowance.add(1_000_000);
        assert_eq!(allowance.left(), 0);
    }
}
