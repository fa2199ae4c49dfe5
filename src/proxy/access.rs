//! Access: which key a request shows, and how much of its allowance is left.
//!
//! A key is found by the start of its SHA-256, and the whole of it is compared in constant time. An allowance is
//! counted in minutes, by counters of pingora-limits: all of the present one, and of the one before it the part that is
//! less than a minute ago, as if it had been used evenly. (The crate's own `Rate` begins its interval at whatever event
//! comes first after the last, so what was used once may count for three minutes.) A request and its prompt are counted
//! when they are let in; what the engine counted takes the place of our estimate at the end.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, header};
use parking_lot::Mutex;
use pingora::http::ResponseHeader;
use pingora_limits::estimator::Estimator;
use subtle::ConstantTimeEq;

use super::Refusal;
use crate::clock::Time;
use crate::config::{self, KeyHash};
use crate::observe::metrics::{KeyMetrics, Metrics};

/// Where a key may be shown beside `authorization: Bearer`, in the manner of Anthropic's and of Azure's clients.
const KEY_HEADERS: [&str; 2] = ["x-api-key", "api-key"];

/// What an allowance is per, in seconds.
const MINUTE: f64 = 60.0;

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
                let window = used.map_or_else(Arc::default, |used| used.window.clone());
                limit.map(|limit| Allowance { limit, window })
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

/// Tokens that a request was charged when it was let in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spent {
    tokens: u64,
    minute: u64,
}

impl Key {
    /// Counts one more request, or refuses it; also one for which no tokens are left, before its body is read.
    pub(super) fn admit(&self, now: Time) -> Result<(), Refusal> {
        if let Some(wait) =
            self.tokens.as_ref().and_then(|tokens| tokens.window.lock().wait(1, tokens.limit, now))
        {
            return Err(Refusal::rate_limited("tokens", wait));
        }
        let Some(requests) = &self.requests else { return Ok(()) };
        let mut window = requests.window.lock();
        match window.wait(1, requests.limit, now) {
            Some(wait) => Err(Refusal::rate_limited("requests", wait)),
            None => {
                window.add(1, now);
                Ok(())
            }
        }
    }

    /// Charges so many tokens, while any are left.
    pub(super) fn spend(&self, tokens: u64, now: Time) -> Result<Spent, Refusal> {
        let Some(allowance) = &self.tokens else { return Ok(Spent { tokens, minute: 0 }) };
        let mut window = allowance.window.lock();
        match window.wait(1, allowance.limit, now) {
            Some(wait) => Err(Refusal::rate_limited("tokens", wait)),
            None => {
                window.add(tokens, now);
                Ok(Spent { tokens, minute: window.minute })
            }
        }
    }

    /// Puts in the place of what was `spent` what it came to. What is given back is only what still counts: it is no
    /// credit for later.
    pub(super) fn settle(&self, spent: Spent, tokens: u64, now: Time) {
        let Some(allowance) = &self.tokens else { return };
        let mut window = allowance.window.lock();
        match tokens.checked_sub(spent.tokens) {
            Some(more) => window.add(more, now),
            None => window.give_back(spent.tokens - tokens, spent.minute, now),
        }
    }

    /// Tells the client what is left of its allowances, in the headers that OpenAI's clients know.
    pub(super) fn announce(&self, response: &mut ResponseHeader, now: Time) -> pingora::Result<()> {
        if let Some(requests) = &self.requests {
            response.insert_header("x-ratelimit-limit-requests", requests.limit)?;
            response.insert_header("x-ratelimit-remaining-requests", requests.left(now))?;
        }
        if let Some(tokens) = &self.tokens {
            response.insert_header("x-ratelimit-limit-tokens", tokens.limit)?;
            response.insert_header("x-ratelimit-remaining-tokens", tokens.left(now))?;
        }
        Ok(())
    }
}

/// How much may be used per minute.
struct Allowance {
    limit: u32,
    window: Arc<Mutex<Window>>,
}

impl Allowance {
    fn left(&self, now: Time) -> u32 {
        (f64::from(self.limit) - self.window.lock().used(now)).max(0.0) as u32
    }
}

/// What was used in the present minute and in the one before it; minutes since the clock's start.
struct Window {
    minute: u64,
    /// By the minute's last bit. One key, one counter: nothing is estimated by hashing.
    counts: [Estimator; 2],
}

impl Default for Window {
    fn default() -> Self {
        Self { minute: 0, counts: std::array::from_fn(|_| Estimator::new(1, 1)) }
    }
}

impl Window {
    /// Goes on to `now`: the counts of the last minute and of this one, and how much of this one has passed.
    fn advance(&mut self, now: Time) -> (f64, f64, f64) {
        let minutes = now.since(Time::ZERO).as_secs_f64() / MINUTE;
        let minute = minutes as u64;
        if minute > self.minute {
            self.count(minute).reset();
            if minute > self.minute + 1 {
                self.count(minute + 1).reset();
            }
            self.minute = minute;
        }
        let [before, present] =
            [self.minute + 1, self.minute].map(|minute| self.count(minute).get(()).max(0) as f64);
        (before, present, (minutes - self.minute as f64).clamp(0.0, 1.0))
    }

    fn count(&self, minute: u64) -> &Estimator {
        &self.counts[(minute & 1) as usize]
    }

    /// What was used in the last sixty seconds.
    fn used(&mut self, now: Time) -> f64 {
        let (before, present, passed) = self.advance(now);
        before * (1.0 - passed) + present
    }

    fn add(&mut self, amount: u64, now: Time) {
        self.advance(now);
        self.count(self.minute).incr((), isize::try_from(amount).unwrap_or(isize::MAX / 2));
    }

    /// Gives back what was used in `minute`, as far as that still counts.
    fn give_back(&mut self, amount: u64, minute: u64, now: Time) {
        self.advance(now);
        if minute + 1 >= self.minute {
            let count = self.count(minute);
            count.decr((), isize::try_from(amount).unwrap_or(isize::MAX).min(count.get(())));
        }
    }

    /// How long until `amount` more is within `limit`; `None` if it is already.
    fn wait(&mut self, amount: u32, limit: u32, now: Time) -> Option<Duration> {
        let room = f64::from(limit) - f64::from(amount);
        if self.used(now) <= room {
            return None;
        }
        let (before, present, passed) = self.advance(now);
        // The part of a minute at whose end so little of `count` counts that it is within `room`.
        let until = |count: f64, room: f64| 1.0 - (room / count).clamp(0.0, 1.0);
        let minutes = if present <= room {
            until(before, room - present) - passed
        } else {
            1.0 - passed + until(present, room)
        };
        Some(Duration::from_secs_f64(MINUTE * minutes.clamp(0.0, 2.0)))
    }
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

    fn at(seconds: f64) -> Time {
        Time::ZERO + Duration::from_secs_f64(seconds)
    }

    #[test]
    fn what_was_used_counts_less_and_less_after_its_minute_and_not_at_all_after_two() {
        let mut window = Window::default();
        window.add(100, at(0.0));
        for (seconds, used) in [(0.0, 100), (59.0, 100), (75.0, 75), (105.0, 25), (119.9, 0), (121.0, 0)] {
            assert_eq!(window.used(at(seconds)).round() as i64, used, "{seconds}");
        }
        // Whenever it is asked first, minutes begin when they begin.
        let mut late = Window::default();
        late.add(100, at(0.0));
        assert_eq!(late.used(at(115.0)).round() as i64, 8);
        assert_eq!(late.used(at(1_000.0)), 0.0);
    }

    #[test]
    fn a_wait_ends_when_there_is_room_and_not_before() {
        for (before, present, passed) in
            [(100, 0, 0.0), (100, 40, 15.0), (100, 100, 30.0), (0, 100, 54.0), (60, 50, 6.0)]
        {
            let filled = || {
                let mut window = Window::default();
                window.add(before, at(30.0));
                window.add(present, at(60.0));
                window
            };
            let now = 60.0 + passed;
            let wait = filled().wait(1, 50, at(now)).unwrap().as_secs_f64();
            assert_eq!(filled().wait(1, 50, at(now + wait + 0.001)), None, "{before} {present} {passed}");
            assert!(filled().wait(1, 50, at(now + wait - 1.0)).is_some(), "{before} {present} {passed}");
        }
    }

    #[test]
    fn what_is_given_back_too_late_is_no_credit() {
        let yaml = format!("{{ a: {{ sha256: {}, tokens_per_minute: 100 }} }}", KeyHash::of(b"sk-a"));
        let key = keys(&yaml).find(&headers(&[("x-api-key", "sk-a")])).unwrap();
        let left = |seconds: f64| key.tokens.as_ref().unwrap().left(at(seconds));
        let spent = key.spend(1_000, at(0.0)).unwrap();
        assert_eq!(
            key.spend(1, at(1.0)).unwrap_err().code,
            "rate_limited",
            "whoever comes second is too late"
        );
        key.settle(spent, 40, at(59.0));
        assert_eq!(left(59.0), 60);
        let spent = key.spend(1_000, at(180.0)).unwrap();
        assert!(key.spend(1, at(290.0)).is_err());
        key.settle(spent, 0, at(299.0));
        assert_eq!(left(299.0), 100, "given back in the minute after it");
        let spent = key.spend(1_000, at(400.0)).unwrap();
        key.settle(spent, 0, at(700.0));
        key.spend(100, at(700.0)).unwrap();
        assert_eq!((left(700.0), key.admit(at(700.0)).is_err()), (0, true));
    }

    #[test]
    fn a_new_configuration_finds_what_a_key_has_used() {
        let before =
            keys(&format!("{{ a: {{ sha256: {}, requests_per_minute: 2 }} }}", KeyHash::of(b"sk-a")));
        before.find(&headers(&[("x-api-key", "sk-a")])).unwrap().admit(at(0.0)).unwrap();
        let yaml = format!("{{ a: {{ sha256: {}, requests_per_minute: 3 }} }}", KeyHash::of(b"sk-b"));
        let after = Keys::new(&serde_yaml::from_str(&yaml).unwrap(), &Metrics::new().unwrap(), Some(&before));
        let key = after.unwrap().find(&headers(&[("x-api-key", "sk-b")])).unwrap();
        let allowance = key.requests.as_ref().unwrap();
        assert_eq!(
            (allowance.limit, allowance.left(at(0.0))),
            (3, 2),
            "a key that was changed keeps its name and its use"
        );
    }

    #[test]
    fn what_is_refused_is_not_counted() {
        let yaml = format!("{{ a: {{ sha256: {}, requests_per_minute: 2 }} }}", KeyHash::of(b"sk-a"));
        let key = keys(&yaml).find(&headers(&[("x-api-key", "sk-a")])).unwrap();
        assert!(key.admit(at(0.0)).is_ok() && key.admit(at(0.0)).is_ok());
        for _ in 0..100 {
            let refusal = key.admit(at(1.0)).unwrap_err();
            assert_eq!((refusal.code, refusal.retry_after), ("rate_limited", Some(89)));
        }
        assert!(key.admit(at(90.0)).is_ok());
    }
}
