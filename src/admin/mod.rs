//! The admin listener: metrics, liveness, readiness, and the state of every backend.
//!
//! It has a listener and a thread of its own, so that a scrape never waits behind traffic: on loopback, on a Unix
//! socket, or where others can reach it, and then it asks for a token. `/livez` and `/readyz` never do: they are
//! for kubelets and balancers, and name nothing.

use std::sync::Arc;

use async_trait::async_trait;
use http::{Response, StatusCode, header};
use pingora::apps::http_app::ServeHttp;
use pingora::http::RequestHeader;
use pingora::protocols::http::ServerSession;
use serde_json::{Value, json};

use crate::balance::State;
use crate::config::Secret;
use crate::observe::metrics::Metrics;
use crate::proxy::Proxy;

/// The application behind the admin listener.
pub struct Admin {
    proxy: Proxy,
    metrics: Arc<Metrics>,
    token: Option<Secret>,
    reload: Arc<Reload>,
}

/// Reloads the configuration, and says what came of it, or why nothing did. It may take its time.
pub type Reload = dyn Fn() -> Result<String, String> + Send + Sync;

impl Admin {
    /// The admin of this proxy, for whoever has this token.
    pub fn new(proxy: Proxy, metrics: Arc<Metrics>, token: Option<Secret>, reload: Box<Reload>) -> Self {
        Self { proxy, metrics, token, reload: reload.into() }
    }

    fn may_ask(&self, request: &RequestHeader) -> bool {
        let Some(token) = &self.token else { return true };
        let presented = request.headers.get(header::AUTHORIZATION).and_then(|value| bearer(value.as_bytes()));
        presented.is_some_and(|presented| token.is(presented))
    }

    fn exposition(&self) -> Vec<u8> {
        self.metrics.forget_states();
        for upstream in self.proxy.upstreams() {
            self.metrics.set_states(&upstream.name, &upstream.states());
        }
        self.metrics.exposition()
    }

    fn status(&self) -> Value {
        let upstreams: serde_json::Map<_, _> = self
            .proxy
            .upstreams()
            .iter()
            .map(|upstream| {
                let backends: Vec<_> = upstream.states().iter().map(backend).collect();
                let policy = upstream.config.policy.name();
                (upstream.name.clone(), json!({ "policy": policy, "backends": backends }))
            })
            .collect();
        json!({ "version": env!("CARGO_PKG_VERSION"), "upstreams": upstreams })
    }
}

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let request = session.req_header();
        let (path, may_ask) = (request.uri.path(), self.may_ask(request));
        if !may_ask && !matches!(path, "/livez" | "/readyz") {
            let mut refusal = text(StatusCode::UNAUTHORIZED, "only with the token\n");
            refusal
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
            return refusal;
        }
        match (request.method.as_str(), path) {
            ("POST", "/reload") => self.reload().await,
            (_, "/reload") => text(StatusCode::METHOD_NOT_ALLOWED, "only POST\n"),
            ("GET" | "HEAD", _) => self.tell(path, may_ask),
            _ => text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n"),
        }
    }
}

impl Admin {
    fn tell(&self, path: &str, may_ask: bool) -> Response<Vec<u8>> {
        match path {
            "/metrics" => answer(StatusCode::OK, "text/plain; version=0.0.4", self.exposition()),
            "/livez" => text(StatusCode::OK, "ok\n"),
            "/readyz" => {
                let upstreams = self.proxy.upstreams();
                let without: Vec<_> =
                    upstreams.iter().filter(|u| !u.is_available()).map(|u| u.name.as_str()).collect();
                if without.len() < upstreams.len() {
                    return text(StatusCode::OK, "ok\n");
                }
                let names = if may_ask { format!(" in: {}", without.join(", ")) } else { String::new() };
                text(StatusCode::SERVICE_UNAVAILABLE, format!("no backend is up{names}\n"))
            }
            "/status" => answer(StatusCode::OK, "application/json", format!("{:#}\n", self.status())),
            _ => {
                text(StatusCode::NOT_FOUND, "there is /metrics, /status, /livez and /readyz; POST /reload\n")
            }
        }
    }

    async fn reload(&self) -> Response<Vec<u8>> {
        let reload = self.reload.clone();
        match tokio::task::spawn_blocking(move || reload()).await {
            Ok(Ok(said)) => text(StatusCode::OK, format!("reloaded: {said}\n")),
            Ok(Err(why)) => {
                text(StatusCode::UNPROCESSABLE_ENTITY, format!("{why}\nnot reloaded: nothing has changed\n"))
            }
            Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("not reloaded: {e}\n")),
        }
    }
}

/// The token of `authorization: Bearer TOKEN`.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

fn backend(state: &State) -> Value {
    let reading = state.reading.map(|(reading, age)| {
        json!({
            "running": reading.running,
            "waiting": reading.waiting,
            "kv_usage": reading.kv_usage,
            "age_seconds": age.as_secs_f64(),
        })
    });
    json!({
        "address": state.address.to_string(),
        "weight": state.weight,
        "healthy": state.healthy,
        "ejected": state.ejected,
        "strained": state.strained,
        "stalled": state.stalled,
        "on_trial": state.on_trial,
        "cooling": state.cooling,
        "pending_tokens": state.account.pending_tokens,
        "active_requests": state.account.active_requests,
        "context_tokens": state.account.context_tokens,
        "share": state.share,
        "prefix_blocks": state.prefix_blocks,
        "engine": reading,
    })
}

fn text(status: StatusCode, body: impl Into<Vec<u8>>) -> Response<Vec<u8>> {
    answer(status, "text/plain", body)
}

fn answer(status: StatusCode, kind: &'static str, body: impl Into<Vec<u8>>) -> Response<Vec<u8>> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let length = response.body().len();
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response.headers_mut().insert(header::CONTENT_LENGTH, header::HeaderValue::from(length));
    response
}
