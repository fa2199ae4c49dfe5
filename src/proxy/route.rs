//! The route: host, path, headers and model of a request lead to an upstream.
//!
//! Routes are tried in order; the first whose conditions hold and whose upstream serves the model wins.
//! Without routes every upstream is reachable by its models. An unknown model is 404, a known one whose
//! backends are gone stays known (503 later): the difference tells a client whether to fix its request or to
//! wait.

use std::sync::Arc;

use pingora::http::RequestHeader;

use super::reply::Refusal;
use crate::config;
use crate::upstream::{Serves, Upstream};

/// The routing table.
pub(super) struct Routes {
    routes: Vec<(Option<config::Route>, Arc<Upstream>)>,
}

impl Routes {
    /// The table for `routes` over `upstreams`. Routes to unknown upstreams were refused with the
    /// configuration.
    pub(super) fn new(routes: &[config::Route], upstreams: &[Arc<Upstream>]) -> Self {
        let find = |name: &str| upstreams.iter().find(|u| u.name == name).cloned();
        let routes = if routes.is_empty() {
            upstreams.iter().map(|upstream| (None, upstream.clone())).collect()
        } else {
            routes.iter().filter_map(|r| Some((Some(r.clone()), find(&r.upstream)?))).collect()
        };
        Self { routes }
    }

    /// The upstream for a request.
    pub(super) fn resolve(
        &self,
        request: &RequestHeader,
        model: Option<&str>,
    ) -> Result<&Arc<Upstream>, Refusal> {
        let mut undecided = None;
        let mut reachable = false;
        for (route, upstream) in &self.routes {
            if !route.as_ref().is_none_or(|route| leads(route, request)) {
                continue;
            }
            let names = route.as_ref().map_or(&[][..], |route| &route.model);
            let Some(model) = model else {
                // A route for certain models is not for a request that names none.
                if names.is_empty() {
                    return Ok(upstream);
                }
                continue;
            };
            reachable = true;
            if !names.is_empty() && !names.iter().any(|name| name.matches(model)) {
                continue;
            }
            match upstream.catalog.serves(model) {
                Serves::Yes => return Ok(upstream),
                // A model that a route names is believed before a backend has confirmed it.
                Serves::Unknown => undecided = undecided.or(Some(upstream)),
                Serves::No => {}
            }
        }
        match (undecided, model) {
            (Some(upstream), _) => Ok(upstream),
            (None, Some(model)) if reachable => Err(Refusal::model_not_found(model)),
            _ => Err(Refusal::route_not_found()),
        }
    }

    /// Every model that can be reached with this request's host and headers, one JSON entry per id.
    pub(super) fn models(&self, request: &RequestHeader) -> std::collections::BTreeMap<String, String> {
        let mut models = std::collections::BTreeMap::new();
        for (route, upstream) in &self.routes {
            if !route.as_ref().is_none_or(|route| leads_from(route, request)) {
                continue;
            }
            for model in upstream.catalog.models() {
                let named = route
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
fn leads(route: &config::Route, request: &RequestHeader) -> bool {
    leads_from(route, request)
        && route.path.as_ref().is_none_or(|prefix| request.uri.path().starts_with(prefix.as_str()))
}

/// Whether a route's host and headers fit.
fn leads_from(route: &config::Route, request: &RequestHeader) -> bool {
    route.host.as_ref().is_none_or(|pattern| host(request).is_some_and(|host| pattern.matches(host)))
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
