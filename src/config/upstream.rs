//! An upstream, as it is written: its backends, and how they are chosen, reached, retried and watched.
//!
//! The doc comments are the reference, as in [`super::file`]. What sets these defaults apart from those of a
//! classic proxy: an answer may take minutes to begin and minutes to end, repeating a request costs a GPU its
//! time, and a busy engine looks like a dead one to a hasty probe.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::discover::Discover;
use super::schema;
use super::secret::Secret;
use super::units;
use crate::balance::retry::{Cause, Rule};
use crate::engine::Engine;
use crate::policy::PolicyConfig;

/// A named group of interchangeable backends.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Upstream {
    /// What the backends run: `vllm`, `sglang`, `tgi`, `trtllm`, `llamacpp`, `lmdeploy`, or `openai` for
    /// anything else that speaks the API, which then has no metrics to read. Default openai.
    pub engine: Engine,
    /// How a backend is chosen: `least_pending_tokens`, `prefix_hash`, `least_connections`, `round_robin`,
    /// `random_two`, `lmetric`, `blend`, one of this binary's own, or a map of one of them to its options.
    /// Default least_pending_tokens.
    #[serde(deserialize_with = "units::policy")]
    #[schemars(schema_with = "schema::policy")]
    pub policy: PolicyConfig,
    /// What the backends serve. Default discover.
    #[schemars(schema_with = "schema::models")]
    pub models: Models,
    /// Required, at least one; or `discover` in its place.
    #[schemars(length(min = 1))]
    pub backends: Vec<Backend>,
    /// Who says which backends there are, at any time. Absent: `backends` does.
    pub discover: Option<Discover>,
    /// TLS to the backends. Absent: plaintext.
    pub tls: Option<BackendTls>,
    /// Sent to the backends as `authorization: Bearer`. Absent: no key is added.
    pub api_key: Option<Secret>,
    /// How long we wait for a backend.
    pub timeouts: Timeouts,
    /// Idle connections to the backends.
    pub keepalive: Keepalive,
    /// When a request goes to another backend.
    pub retry: Retry,
    /// Failures within `fail_timeout` that eject a backend, 0 to 1000; 0 ejects none. Default 3. Client
    /// errors, 429 and what another backend fails on too do not count.
    #[serde(deserialize_with = "units::between::<_, 0, 1000>")]
    #[schemars(schema_with = "schema::between::<0, 1000>")]
    pub max_fails: u32,
    /// How long failures are remembered, and how long an ejected backend gets no requests. Default 30s.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub fail_timeout: Duration,
    /// How long a backend that joins or comes back takes to reach its weight, from a tenth of it; `off` for at
    /// once. Default 10s. It does not apply when the whole fleet starts.
    #[serde(deserialize_with = "units::duration_or_off")]
    #[schemars(schema_with = "schema::duration_or_off")]
    pub slow_start: Duration,
    /// How long a backend with requests in flight may send nothing before it gets no more of them; `off` for
    /// ever. Default 60s. Its streams are not cut, and its first byte brings it back. An answer that is not
    /// streamed sends nothing until its end: where such answers take longer, so should this.
    #[serde(deserialize_with = "units::duration_or_off")]
    #[schemars(schema_with = "schema::duration_or_off")]
    pub stall_timeout: Duration,
    /// Requests in flight per backend, 1 to 1000000; beyond it they queue. Absent: no limit.
    #[serde(deserialize_with = "units::some_between::<_, 1, 1_000_000>")]
    #[schemars(schema_with = "schema::between::<1, 1_000_000>")]
    pub max_requests: Option<u32>,
    /// Where requests wait once every backend has `max_requests`.
    pub queue: Queue,
    /// Active health check; `off` for none.
    #[serde(deserialize_with = "units::off_or")]
    #[schemars(schema_with = "schema::off_or::<Probe>")]
    pub probe: Option<Probe>,
    /// Reading of the engine's metrics; `off` for none.
    #[serde(deserialize_with = "units::off_or")]
    #[schemars(schema_with = "schema::off_or::<Poll>")]
    pub poll: Option<Poll>,
}

impl Default for Upstream {
    fn default() -> Self {
        Self {
            engine: Engine::Openai,
            policy: PolicyConfig::default(),
            models: Models::Discover,
            backends: Vec::new(),
            discover: None,
            tls: None,
            api_key: None,
            timeouts: Timeouts::default(),
            keepalive: Keepalive::default(),
            retry: Retry::default(),
            max_fails: 3,
            fail_timeout: Duration::from_secs(30),
            slow_start: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(60),
            max_requests: None,
            queue: Queue::default(),
            probe: Some(Probe::default()),
            poll: Some(Poll::default()),
        }
    }
}

impl Upstream {
    /// The path that probes ask for; `None` if there are none.
    pub fn probe_path(&self) -> Option<&str> {
        let probe = self.probe.as_ref()?;
        Some(probe.path.as_deref().unwrap_or_else(|| self.engine.preset().probe_path))
    }

    /// The path that metrics are read from; `None` if there are none, or they are not read.
    pub fn poll_path(&self) -> Option<&str> {
        let poll = self.poll.as_ref()?;
        poll.path.as_deref().or_else(|| self.engine.preset().metrics_path)
    }
}

/// One engine: `10.0.0.1:8000`, or a map with its weight.
#[derive(Clone, Debug, PartialEq, Eq, JsonSchema)]
#[schemars(deny_unknown_fields, transform = schema::or_address)]
pub struct Backend {
    /// Host and port. Required.
    #[schemars(schema_with = "schema::address")]
    pub address: String,
    /// Its share of the work relative to the others, 1 to 1000. Default 1.
    #[schemars(default = "ordinary_weight", schema_with = "schema::between::<1, 1000>")]
    pub weight: u32,
}

impl<'de> Deserialize<'de> for Backend {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AddressOrMap)
    }
}

struct AddressOrMap;

impl<'de> Visitor<'de> for AddressOrMap {
    type Value = Backend;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an address such as `10.0.0.1:8000`, or a map with `address` and `weight`")
    }

    fn visit_str<E: Error>(self, address: &str) -> Result<Backend, E> {
        units::check_address(address)?;
        Ok(Backend { address: address.to_owned(), weight: ORDINARY_WEIGHT })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Backend, A::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Written {
            #[serde(deserialize_with = "units::address")]
            address: String,
            #[serde(default = "ordinary_weight", deserialize_with = "units::between::<_, 1, 1000>")]
            weight: u32,
        }
        let Written { address, weight } = Written::deserialize(MapAccessDeserializer::new(map))?;
        Ok(Backend { address, weight })
    }
}

const ORDINARY_WEIGHT: u32 = 1;

fn ordinary_weight() -> u32 {
    ORDINARY_WEIGHT
}

/// What the backends of an upstream serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Models {
    /// What they say themselves at `/v1/models`.
    Discover,
    /// Whatever is asked for.
    Any,
    /// Exactly these, at least one.
    List(Vec<String>),
}

impl<'de> Deserialize<'de> for Models {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ModelsVisitor)
    }
}

struct ModelsVisitor;

impl<'de> Visitor<'de> for ModelsVisitor {
    type Value = Models;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`discover`, `any` or a list of models")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Models, E> {
        match text {
            "discover" => Ok(Models::Discover),
            "any" => Ok(Models::Any),
            _ => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Models, A::Error> {
        let mut models = Vec::new();
        while let Some(model) = list.next_element()? {
            models.push(model);
        }
        if models.is_empty() {
            Err(A::Error::custom("expected at least one model, found none"))
        } else {
            Ok(Models::List(models))
        }
    }
}

/// TLS to the backends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BackendTls {
    /// The name that the backends' certificates bear. Absent: the host of each address.
    pub server_name: Option<String>,
}

/// How long we wait for a backend. There is no limit on a whole answer: as long as tokens come, it is alive.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// For a connection. Default 5s.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub connect: Duration,
    /// For each read of the answer: the wait for its first byte (the engine's queue and the whole prefill) as
    /// well as the gaps within it. Default 600s; the 15 to 60 s that are usual elsewhere cut good answers.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub read: Duration,
    /// For each write of the request. Default 60s.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub send: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            read: Duration::from_secs(600),
            send: Duration::from_secs(60),
        }
    }
}

/// Idle connections to the backends, kept for the next request.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Keepalive {
    /// How long one is kept. Default 4s: uvicorn and llama.cpp close theirs after 5 s, and a request that
    /// meets the closing is lost.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub idle_timeout: Duration,
    /// How many are kept, 0 to 100000; 0 keeps none. Default 100.
    #[serde(deserialize_with = "units::between::<_, 0, 100_000>")]
    #[schemars(schema_with = "schema::between::<0, 100_000>")]
    pub connections: u32,
    /// Requests after which one is closed, 1 to 1000000. Absent: no limit.
    #[serde(deserialize_with = "units::some_between::<_, 1, 1_000_000>")]
    #[schemars(schema_with = "schema::between::<1, 1_000_000>")]
    pub requests: Option<u32>,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self { idle_timeout: Duration::from_secs(4), connections: 100, requests: None }
    }
}

/// When a request goes to another backend. Never once a byte of an answer has gone to the client.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retry {
    /// Attempts in all, the first among them, 1 to 10. Default 2: if two backends fail, it is likely the
    /// request.
    #[serde(deserialize_with = "units::between::<_, 1, 10>")]
    #[schemars(schema_with = "schema::between::<1, 10>")]
    pub tries: u32,
    /// No further attempt later than this after the request arrived. Default 10s.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub within: Duration,
    /// The causes. Default connect, closed, status_502, status_503, stream_error: there the request was not
    /// worked on, or its work is lost. Not status_500 (a poisonous prompt would visit every backend) nor
    /// timeout (a busy engine would get twice the work).
    pub on: BTreeSet<Cause>,
}

impl Retry {
    /// The same for the core, which knows no configuration.
    pub fn rule(&self) -> Rule {
        Rule { tries: self.tries, within: self.within, on: self.on.clone() }
    }
}

impl Default for Retry {
    fn default() -> Self {
        use Cause::{Closed, Connect, Status502, Status503, StreamError};
        let on = BTreeSet::from([Connect, Closed, Status502, Status503, StreamError]);
        Self { tries: 2, within: Duration::from_secs(10), on }
    }
}

/// Where requests wait once every backend has its `max_requests`.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Queue {
    /// Most requests that wait, 0 to 1000000; beyond it 503 with `Retry-After`. Default 1000.
    #[serde(deserialize_with = "units::between::<_, 0, 1_000_000>")]
    #[schemars(schema_with = "schema::between::<0, 1_000_000>")]
    pub length: u32,
    /// Longest wait; then 503 with `Retry-After`. Default 30s.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub timeout: Duration,
}

impl Default for Queue {
    fn default() -> Self {
        Self { length: 1_000, timeout: Duration::from_secs(30) }
    }
}

/// Active health check: a GET that is answered, with anything below 500.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Probe {
    /// What is asked for. Absent: the health path of the engine.
    #[serde(deserialize_with = "units::some_url_path")]
    #[schemars(schema_with = "schema::url_path")]
    pub path: Option<String>,
    /// From one probe to the next. Default 5s.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub interval: Duration,
    /// For the answer. Default 10s: a saturated engine misses the usual 1 s, and is not dead.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub timeout: Duration,
    /// Failures in a row until a backend gets no requests, 1 to 100. Default 3.
    #[serde(deserialize_with = "units::between::<_, 1, 100>")]
    #[schemars(schema_with = "schema::between::<1, 100>")]
    pub down_after: u32,
    /// Successes in a row until it gets requests again, 1 to 100. Default 2.
    #[serde(deserialize_with = "units::between::<_, 1, 100>")]
    #[schemars(schema_with = "schema::between::<1, 100>")]
    pub up_after: u32,
}

impl Default for Probe {
    fn default() -> Self {
        Self {
            path: None,
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(10),
            down_after: 3,
            up_after: 2,
        }
    }
}

/// Reading of the engine's metrics. They guard and correct our own counters; they do not decide.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Poll {
    /// Where they are. Absent: the metrics path of the engine; an engine without one is not polled.
    #[serde(deserialize_with = "units::some_url_path")]
    #[schemars(schema_with = "schema::url_path")]
    pub path: Option<String>,
    /// From one reading to the next. Default 1s.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub interval: Duration,
    /// For the answer. Default 2s.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub timeout: Duration,
}

impl Default for Poll {
    fn default() -> Self {
        Self { path: None, interval: Duration::from_secs(1), timeout: Duration::from_secs(2) }
    }
}
