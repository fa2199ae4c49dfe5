//! The route: host, path, headers and model of a request lead to an upstream.
//!
//! Routes are tried in order; the first whose conditions hold and whose upstream serves the model wins.
//! Without routes every upstream is reachable by its models. An unknown model is 404, a known one whose
//! backends are gone stays known (503 later): the difference tells a client whether to fix its request or to
//! wait.

use std::collections::BTreeMap;
use std::sync::Arc;

use pingora::http::RequestHeader;

use super::reply::Refusal;
use crate::balance::retry;
use crate::config;
use crate::upstream::{Serves, Upstream};

/// The routing table.
pub(super) struct Routes {
    routes: Vec<Way>,
}

/// Where a route leads, and on what terms.
pub(super) struct Way {
    route: Option<config::Route>,
    pub(super) upstream: Arc<Upstream>,
    pub(super) retry: Arc<retry::Rule>,
}

impl Routes {
    /// The table for `routes` over `upstreams`. Routes to unknown upstreams were refused with the
    /// configuration.
    pub(super) fn new(routes: &[config::Route], upstreams: &[Arc<Upstream>]) -> Self {
        let to = |upstream: &Arc<Upstream>| Way {
            route: None,
            upstream: upstream.clone(),
            retry: upstream.retry.clone(),
        };
        let along = |route: &config::Route| {
            let way = upstreams.iter().find(|upstream| upstream.name == route.upstream).map(to)?;
            let own = route.retry.as_ref().map(|retry| Arc::new(retry.rule()));
            Some(Way { retry: own.unwrap_or(way.retry), route: Some(route.clone()), upstream: way.upstream })
        };
        let routes = if routes.is_empty() {
            upstreams.iter().map(to).collect()
        } else {
            routes.iter().filter_map(along).collect()
        };
        Self { routes }
    }

    /// The way of a request that showed `key`.
    pub(super) fn resolve(
        &self,
        request: &RequestHeader,
        model: Option<&str>,
        key: Option<&str>,
    ) -> Result<&Way, Refusal> {
        let mut undecided = None;
        let mut reachable = false;
        for way in &self.routes {
            if !way.route.as_ref().is_none_or(|route| leads(route, request, key)) {
                continue;
            }
            let names = way.route.as_ref().map_or(&[][..], |route| &route.model);
            let Some(model) = model else {
                // A route for certain models is not for a request that names none.
                if names.is_empty() {
                    return Ok(way);
                }
                continue;
            };
            reachable = true;
            if !names.is_empty() && !names.iter().any(|name| name.matches(model)) {
                continue;
            }
            match way.upstream.catalog.serves(model) {
                Serves::Yes => return Ok(way),
                // A model that a route names is believed before a backend has confirmed it.
                Serves::Unknown => undecided = undecided.or(Some(way)),
                Serves::No => {}
            }
        }
        match (undecided, model) {
            (Some(way), _) => Ok(way),
            (None, Some(model)) if reachable => Err(Refusal::model_not_found(model)),
            _ => Err(Refusal::route_not_found()),
        }
    }

    /// Every model that can be reached with this request's host and headers, one JSON entry per id, by one who
    /// showed `key`.
    pub(super) fn models(&self, request: &RequestHeader, key: Option<&str>) -> BTreeMap<String, String> {
        let mut models = BTreeMap::new();
        for way in &self.routes {
            if !way.route.as_ref().is_none_or(|route| leads_from(route, request, key)) {
                continue;
            }
            for model in way.upstream.catalog.models() {
                let named = way
                    .route
                    .as_ref()
                    .is_none_or(|r| r.model.is_empty() || r.model.iter().any(|m| m.matches(&model.id)));
                if named {
                    models.entry(model.id).or_insert(model.json);
                }
            }
        }
        models
    }
}

/// Whether all of a route's conditions but the model hold.
fn leads(route: &config::Route, request: &RequestHeader, key: Option<&str>) -> bool {
    leads_from(route, request, key)
        && route.path.as_ref().is_none_or(|prefix| request.uri.path().starts_with(prefix.as_str()))
}

/// Whether a route's key, host and headers fit.
fn leads_from(route: &config::Route, request: &RequestHeader, key: Option<&str>) -> bool {
    let is_for_all = route.key.is_empty();
    (is_for_all || key.is_some_and(|key| route.key.iter().any(|name| name == key)))
        && route.host.as_ref().is_none_or(|pattern| host(request).is_some_and(|host| pattern.matches(host)))
        && route.headers.iter().all(|(name, value)| {
            request.headers.get_all(name.as_str()).iter().any(|v| v.as_bytes() == value.as_bytes())
        })
}

/// The host asked for, without its port.
fn host(request: &RequestHeader) -> Option<&str> {
    if let Some(host) = request.uri.host() {
        return Some(host);
    }
    let host = request.headers.get(http::header::HOST)?.to_str().ok()?;
    Some(match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(host: &str) -> RequestHeader {
        let mut request = RequestHeader::build("GET", b"/v1/x", None).unwrap();
        request.insert_header("host", host).unwrap();
        request
    }

    #[test]
    fn the_port_is_no_part_of_the_host() {
        for (given, want) in [
            ("a.example:8080", "a.example"),
            ("a.example", "a.example"),
            ("[::1]:80", "[::1]"),
            ("[::1]", "[::1]"),
        ] {
            assert_eq!(host(&request(given)), Some(want), "{given}");
        }
    }
}
