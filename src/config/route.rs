//! Which requests go to which upstream.
//!
//! Routes are tried in the order of the file; the first that matches wins. Every condition that is written
//! must hold.

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::{Deserializer, Error, Unexpected};

use super::schema;
use super::units;
use super::upstream::Retry;

/// The conditions on a request, and the upstream that serves it then.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// The host the client asked for, without port: `api.example.com`, or `*.example.com` for every name
    /// below it. Absent: any.
    #[serde(default)]
    pub host: Option<HostPattern>,
    /// What the path begins with. Absent: any.
    #[serde(default, deserialize_with = "units::some_url_path")]
    #[schemars(schema_with = "schema::url_path")]
    pub path: Option<String>,
    /// The models, each a name or the beginning of one: `qwen*`. Absent: any.
    #[serde(default, deserialize_with = "units::one_or_many")]
    #[schemars(schema_with = "schema::one_or_many::<ModelPattern>")]
    pub model: Vec<ModelPattern>,
    /// Headers that the request must carry with exactly these values. Default: none.
    #[serde(default, deserialize_with = "headers")]
    #[schemars(schema_with = "schema::headers::<HeaderName>")]
    pub headers: BTreeMap<String, String>,
    /// The names of the keys that may use this route, one or a list. Absent: any.
    #[serde(default, deserialize_with = "units::one_or_many")]
    #[schemars(schema_with = "schema::one_or_many::<String>")]
    pub key: Vec<String>,
    /// The name of the upstream. Required.
    pub upstream: String,
    /// When its requests go to another backend. Absent: as the upstream says.
    #[serde(default)]
    pub retry: Option<Retry>,
}

impl Route {
    /// Whether every request that `other` matches is matched by this route too.
    pub(super) fn covers(&self, other: &Self) -> bool {
        let host = match (&self.host, &other.host) {
            (None, _) => true,
            (Some(mine), Some(theirs)) => mine.covers(theirs),
            (Some(_), None) => false,
        };
        let path = match (&self.path, &other.path) {
            (None, _) => true,
            (Some(mine), Some(theirs)) => theirs.starts_with(mine.as_str()),
            (Some(_), None) => false,
        };
        let model = self.model.is_empty()
            || (!other.model.is_empty()
                && other.model.iter().all(|theirs| self.model.iter().any(|mine| mine.covers(theirs))));
        let headers = self.headers.iter().all(|(name, value)| other.headers.get(name) == Some(value));
        let key = self.key.is_empty()
            || (!other.key.is_empty() && other.key.iter().all(|theirs| self.key.contains(theirs)));
        host && path && model && headers && key
    }
}

/// A host name in lower case, or `*.` and the end of one.
#[derive(Clone, Debug, PartialEq, Eq, JsonSchema)]
#[schemars(extend("pattern" = r"^((\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|(\*\.)?\[.*\])$"))]
pub struct HostPattern(String);

impl HostPattern {
    /// Whether `host`, which has no port, is meant. Case does not matter, nor does a final dot.
    pub fn matches(&self, host: &str) -> bool {
        let host = host.strip_suffix('.').unwrap_or(host);
        match self.0.strip_prefix('*') {
            None => host.eq_ignore_ascii_case(&self.0),
            Some(end) => {
                let (host, end) = (host.as_bytes(), end.as_bytes());
                host.len() > end.len() && host[host.len() - end.len()..].eq_ignore_ascii_case(end)
            }
        }
    }

    fn covers(&self, other: &Self) -> bool {
        self == other || self.matches(&other.0)
    }

    fn parse(text: &str) -> Option<Self> {
        let name = text.strip_prefix("*.").unwrap_or(text);
        let is_label = |label: &str| {
            !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        let is_ipv6 = name.starts_with('[') && name.ends_with(']');
        (is_ipv6 || name.split('.').all(is_label)).then(|| Self(text.to_ascii_lowercase()))
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for HostPattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = "a host such as `api.example.com` or `*.example.com`, without port";
        units::text(deserializer, expected, Self::parse)
    }
}

/// The name of a model, or the beginning of one and `*`.
#[derive(Clone, Debug, PartialEq, Eq, JsonSchema)]
#[schemars(extend("pattern" = r"^([^*]+\*?|\*)$"))]
pub struct ModelPattern(String);

impl ModelPattern {
    /// Whether the model `name` is meant.
    pub fn matches(&self, name: &str) -> bool {
        match self.0.strip_suffix('*') {
            None => name == self.0,
            Some(start) => name.starts_with(start),
        }
    }

    /// The model's name, if only one is meant.
    pub fn name(&self) -> Option<&str> {
        (!self.0.ends_with('*')).then_some(&self.0)
    }

    fn parse(text: &str) -> Option<Self> {
        let inner_star = text.find('*').is_some_and(|at| at + 1 < text.len());
        (!text.is_empty() && !inner_star).then(|| Self(text.to_owned()))
    }

    fn covers(&self, other: &Self) -> bool {
        self == other || (self.name().is_none() && self.matches(&other.0))
    }
}

impl fmt::Display for ModelPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ModelPattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = "a model such as `llama-3.1-8b`, or the beginning of one such as `llama*`";
        units::text(deserializer, expected, Self::parse)
    }
}

fn headers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error> {
    let written = BTreeMap::<HeaderName, String>::deserialize(deserializer)?;
    Ok(written.into_iter().map(|(HeaderName(name), value)| (name, value)).collect())
}

/// A header's name, in lower case.
#[derive(PartialEq, Eq, PartialOrd, Ord, JsonSchema)]
#[schemars(extend("pattern" = r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$"))]
struct HeaderName(String);

impl<'de> Deserialize<'de> for HeaderName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        if !name.is_empty() && name.bytes().all(is_token) {
            return Ok(Self(name.to_ascii_lowercase()));
        }
        Err(D::Error::invalid_value(Unexpected::Str(&name), &"the name of a header"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(text: &str) -> Route {
        serde_yaml::from_str(text).unwrap()
    }

    #[test]
    fn a_star_stands_for_at_least_one_label_of_a_host() {
        let pattern = HostPattern("*.example.com".to_owned());
        assert!(pattern.matches("api.example.com") && pattern.matches("A.B.EXAMPLE.com."));
        assert!(!pattern.matches("example.com") && !pattern.matches("badexample.com"));
        assert!(!pattern.matches("é"), "must not panic on a cut character");
    }

    #[test]
    fn a_star_ends_the_name_of_a_model() {
        let pattern = ModelPattern("qwen*".to_owned());
        assert!(pattern.matches("qwen") && pattern.matches("qwen-2.5"));
        assert!(!pattern.matches("Qwen"), "models have case");
        assert_eq!(pattern.name(), None);
    }

    #[test]
    fn a_route_covers_another_if_none_of_its_conditions_asks_for_more() {
        let pairs = [
            ("{upstream: a}", "{upstream: b, model: x, path: /v1}", true),
            ("{upstream: a, path: /v1}", "{upstream: b, path: /v1/chat}", true),
            ("{upstream: a, path: /v1/chat}", "{upstream: b, path: /v1}", false),
            ("{upstream: a, path: /v1}", "{upstream: b}", false),
            ("{upstream: a, model: [qwen*, x]}", "{upstream: b, model: [qwen-2*, x]}", true),
            ("{upstream: a, model: qwen}", "{upstream: b, model: qwen*}", false),
            ("{upstream: a, model: [x]}", "{upstream: b}", false),
            ("{upstream: a, host: '*.x.org'}", "{upstream: b, host: a.x.org}", true),
            ("{upstream: a, host: '*.x.org'}", "{upstream: b, host: '*.a.x.org'}", true),
            ("{upstream: a, host: a.x.org}", "{upstream: b, host: '*.x.org'}", false),
            ("{upstream: a, headers: {X-Tier: gold}}", "{upstream: b, headers: {x-tier: gold, y: z}}", true),
            ("{upstream: a, headers: {x-tier: gold}}", "{upstream: b, headers: {x-tier: lead}}", false),
            ("{upstream: a}", "{upstream: b, key: x}", true),
            ("{upstream: a, key: [x, y]}", "{upstream: b, key: x}", true),
            ("{upstream: a, key: x}", "{upstream: b, key: [x, y]}", false),
            ("{upstream: a, key: x}", "{upstream: b}", false),
        ];
        for (first, second, covers) in pairs {
            assert_eq!(route(first).covers(&route(second)), covers, "{first} {second}");
        }
    }
}
