//! The admin listener: what those who run this process ask of it, and tell it.
//!
//! It has a listener and a thread of its own, so that a scrape never waits behind traffic: on loopback, on a Unix
//! socket, or where others can reach it, and then it asks for a token. `/livez` and `/readyz` never do: they are
//! for kubelets and balancers, and name nothing. All there is: [`endpoints`], and `docs/openapi.yaml` for machines.

mod backends;
mod dashboard;
mod endpoints;
mod explain;
mod guard;
mod query;
mod status;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use http::{HeaderValue, Response, StatusCode, header};
use pingora::apps::http_app::ServeHttp;
use pingora::http::RequestHeader;
use pingora::protocols::http::ServerSession;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::config;
use crate::observe::metrics::Metrics;
use crate::observe::verbosity::Verbosity;
use crate::proxy::{CHOICES_LIMIT, Proxy};
use dashboard::Dashboard;
use endpoints::{Ask, Unknown};
use guard::Guard;
use query::Query;

/// The application behind the admin listener.
pub struct Admin {
    proxy: Proxy,
    metrics: Arc<Metrics>,
    guard: Guard,
    process: Arc<dyn Process>,
    verbosity: Verbosity,
    dashboard: Dashboard,
    /// One body at a time is held to be explained.
    explaining: Semaphore,
}

/// What of the process is asked here and decided elsewhere.
#[async_trait]
pub trait Process: Send + Sync {
    /// Reloads the configuration, and says what came of it, or why nothing did. It may take its time.
    fn reload(&self) -> Result<String, String>;

    /// The configuration that runs, as YAML and without secrets. It may wait for a reload.
    fn config(&self) -> String;

    /// What came of the last reload, whoever asked for it; `None` if there was none.
    fn last_reload(&self) -> Option<Reloaded>;

    /// Lets another process take the place of this one, and says which, or why none has.
    async fn upgrade(&self) -> Result<String, String>;
}

/// What came of a reload.
#[derive(Clone, Debug)]
pub struct Reloaded {
    /// Whether another configuration runs since.
    pub ok: bool,
    /// What of it applies, or why nothing has changed.
    pub said: String,
    /// How long ago it was.
    pub ago: Duration,
}

/// All of this for machines.
const OPENAPI: &str = include_str!("../../docs/openapi.yaml");

/// An answer, whole.
type Answer = Response<Vec<u8>>;

/// What is wrong with a question, and the status that says so.
struct Flaw(StatusCode, String);

impl From<String> for Flaw {
    fn from(why: String) -> Self {
        Self(StatusCode::UNPROCESSABLE_ENTITY, why)
    }
}

impl Admin {
    /// The admin of this proxy and process, as `config` has it.
    pub fn new(
        proxy: Proxy,
        metrics: Arc<Metrics>,
        config: &config::Admin,
        process: Arc<dyn Process>,
        verbosity: Verbosity,
    ) -> Self {
        Self {
            proxy,
            metrics,
            guard: Guard::new(&config.address, config.token.clone()),
            process,
            verbosity,
            dashboard: Dashboard::new(),
            explaining: Semaphore::new(1),
        }
    }

    /// Whether the request may have an answer; if not, what it gets.
    fn refusal(&self, request: &RequestHeader) -> Option<Answer> {
        if !self.guard.knows_token(request) {
            let mut refusal = text(StatusCode::UNAUTHORIZED, "only with the token\n");
            refusal.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            return Some(refusal);
        }
        let why = self.guard.is_foreign(request)?;
        Some(text(StatusCode::FORBIDDEN, format!("{why}\n")))
    }

    /// The answer to a request that may have one, and knows or does not know the token.
    async fn answer(&self, ask: Ask, session: &mut ServerSession, may_ask: bool) -> Result<Answer, Flaw> {
        let query = session.req_header().uri.query();
        Ok(match ask {
            Ask::Dashboard => self.dashboard.page(),
            Ask::Metrics => answer(StatusCode::OK, "text/plain; version=0.0.4", self.exposition()),
            Ask::Livez => text(StatusCode::OK, "ok\n"),
            Ask::Readyz => self.readiness(may_ask),
            Ask::Status => of_json(&self.status()),
            Ask::Choices => {
                let limit = Query::parse(query, &["limit"])?.number("limit")?;
                of_json(&self.choices(limit.map_or(CHOICES_LIMIT, |limit| limit as usize)))
            }
            Ask::Requests => of_json(&self.requests()),
            Ask::LastReload => {
                of_json(&self.process.last_reload().as_ref().map_or(Value::Null, status::reloaded))
            }
            Ask::Reload => self.reload().await,
            Ask::Upgrade => match self.process.upgrade().await {
                Ok(said) => text(StatusCode::OK, format!("upgraded: {said}\n")),
                Err(why) => text(
                    StatusCode::UNPROCESSABLE_ENTITY,
                    format!("{}\nnot upgraded: nothing has changed\n", why.trim_end()),
                ),
            },
            Ask::Drain => text(StatusCode::OK, self.drain(query)?),
            Ask::Undrain => text(StatusCode::OK, self.undrain(query)?),
            Ask::Weight => text(StatusCode::OK, self.reweigh(query)?),
            Ask::Explain => self.explain(session).await?,
            Ask::Config => self.config().await,
            Ask::Log => of_json(&json!({ "level": self.verbosity.words() })),
            Ask::SetLog => text(StatusCode::OK, self.set_log(query)?),
            Ask::OpenApi => answer(StatusCode::OK, "application/yaml", OPENAPI),
        })
    }

    fn exposition(&self) -> Vec<u8> {
        self.metrics.forget_states();
        for upstream in self.proxy.upstreams() {
            self.metrics.set_states(&upstream.name, &upstream.states());
            if let Some(age) = upstream.answer_age() {
                self.metrics.set_discovery_age(&upstream.name, age);
            }
        }
        self.metrics.exposition()
    }

    fn readiness(&self, may_ask: bool) -> Answer {
        let upstreams = self.proxy.upstreams();
        let without: Vec<_> =
            upstreams.iter().filter(|u| !u.is_available()).map(|u| u.name.as_str()).collect();
        let names = if may_ask { format!(" in: {}", without.join(", ")) } else { String::new() };
        match without.len() {
            _ if self.proxy.is_stopping() && !self.proxy.in_flight().is_handed_over() => {
                text(StatusCode::SERVICE_UNAVAILABLE, "the process is stopping\n")
            }
            0 => text(StatusCode::OK, "ok\n"),
            n if n < upstreams.len() && may_ask => {
                text(StatusCode::OK, format!("ok, but no backend is up{names}\n"))
            }
            n if n < upstreams.len() => text(StatusCode::OK, "ok\n"),
            _ => text(StatusCode::SERVICE_UNAVAILABLE, format!("no backend is up{names}\n")),
        }
    }

    /// Changes how much is logged, and says what it was.
    fn set_log(&self, query: Option<&str>) -> Result<String, Flaw> {
        let query = Query::parse(query, &["level"])?;
        let (level, before) = (query.required("level")?, self.verbosity.words());
        self.verbosity.set(level)?;
        log::warn!("log level changed level={level:?} before={before:?} by=admin");
        Ok(format!("logged is {level}; before, {before}\n"))
    }

    async fn config(&self) -> Answer {
        let process = self.process.clone();
        match tokio::task::spawn_blocking(move || process.config()).await {
            Ok(config) => answer(StatusCode::OK, "application/yaml", config),
            Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("not shown: {e}\n")),
        }
    }

    async fn reload(&self) -> Answer {
        let process = self.process.clone();
        match tokio::task::spawn_blocking(move || process.reload()).await {
            Ok(Ok(said)) => text(StatusCode::OK, format!("reloaded: {said}\n")),
            Ok(Err(why)) => {
                text(StatusCode::UNPROCESSABLE_ENTITY, format!("{why}\nnot reloaded: nothing has changed\n"))
            }
            Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("not reloaded: {e}\n")),
        }
    }
}

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, session: &mut ServerSession) -> Answer {
        let request = session.req_header();
        let path = request.uri.path();
        let refusal = self.refusal(request);
        let may_ask = refusal.is_none();
        if let Some(refusal) = refusal.filter(|_| !endpoints::is_open(path)) {
            return refusal;
        }
        match endpoints::find(request.method.as_str(), path) {
            Ok(endpoint) => match self.answer(endpoint.ask, session, may_ask).await {
                Ok(answer) => answer,
                Err(Flaw(status, why)) => text(status, why + "\n"),
            },
            Err(Unknown::Path) => text(StatusCode::NOT_FOUND, endpoints::list()),
            Err(Unknown::Method(methods)) => {
                let mut refusal = text(StatusCode::METHOD_NOT_ALLOWED, format!("only {methods}\n"));
                if let Ok(methods) = HeaderValue::from_str(&methods) {
                    refusal.headers_mut().insert(header::ALLOW, methods);
                }
                refusal
            }
        }
    }
}

fn text(status: StatusCode, body: impl Into<Vec<u8>>) -> Answer {
    answer(status, "text/plain", body)
}

fn of_json(value: &Value) -> Answer {
    answer(StatusCode::OK, "application/json", format!("{value:#}\n"))
}

fn answer(status: StatusCode, kind: &'static str, body: impl Into<Vec<u8>>) -> Answer {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let length = response.body().len();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    response
}
