//! The life of a request, hook by hook, in the order in which Pingora calls them: start reading here.
//!
//! ```text
//! early_request_filter     limits of the connection, the request's id
//! request_filter           the body is read and digested; routed, priced, admitted     body.rs route.rs
//! upstream_peer            ranked and charged: a backend                               peer.rs    again on each attempt
//! upstream_request_filter  headers for the engine                                                 again
//! request_body_filter      the stored body                                                        again
//! upstream_response_filter a status worth another try becomes an error                            again
//! response_filter          the header of a stream is held back                                    again
//! response_body_filter     first event, first content; the stream passes               tap.rs
//! fail_to_connect, error_while_proxy   another try?                                    balance/retry.rs
//! fail_to_proxy            our own answer, or the honest end of a broken stream        reply.rs
//! logging                  settled, counted, written down
//! ```
//!
//! Nothing is decided here that `balance` could decide: the hooks carry facts to it and do what it says.

mod body;
mod context;
mod peer;
mod reply;
mod route;
mod tap;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt;
use http::header;
use parking_lot::Mutex;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::Digest as ConnectionDigest;
use pingora::protocols::http::ServerSession;
use pingora::upstreams::peer::HttpPeer;
use pingora::{BError, Error, ErrorSource, ErrorType, Result};
use pingora_proxy::{FailToProxy, ProxyHttp, Session};

use crate::balance::retry::{self, Budget, Failure, Fault, Progress};
use crate::clock::Clock;
use crate::config;
use crate::observe::Outcome;
use crate::observe::access_log::Entry;
use crate::observe::metrics::Metrics;
use crate::policy::Reason;
use crate::prompt::{self, Endpoint};
use crate::upstream::Upstream;
use body::{Room, Unread};
use context::Attempt;
pub use context::{Context, InFlight};
use peer::ConnectionUses;
use reply::{REQUEST_ID, Refusal};
use route::Routes;
use tap::{Held, Opening, Tap};

/// The header that names the backend which answered.
const BACKEND: &str = "x-plimsoll-backend";

/// The header by which a client keeps a conversation together, beside `prompt_cache_key` in the body.
const SESSION: &str = "x-session-id";

/// How long a backend that says it is full, but not for how long, is left alone.
const COOL_DOWN: Duration = Duration::from_secs(1);

/// The proxy. Clones serve different listeners and share everything.
#[derive(Clone)]
pub struct Proxy {
    routes: Arc<Routes>,
    upstreams: Vec<Arc<Upstream>>,
    limits: config::Limits,
    observe: config::Observe,
    clock: Clock,
    metrics: Arc<Metrics>,
    room: Arc<Room>,
    budget: Arc<Mutex<Budget>>,
    uses: Arc<ConnectionUses>,
    in_flight: InFlight,
}

impl Proxy {
    /// The proxy that `config` describes, over these upstreams.
    pub fn new(
        config: &config::Config,
        upstreams: Vec<Arc<Upstream>>,
        clock: Clock,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            routes: Arc::new(Routes::new(&config.routes, &upstreams)),
            upstreams,
            limits: config.limits.clone(),
            observe: config.observe.clone(),
            clock,
            room: Room::new(config.limits.buffered_bodies, metrics.buffered_body_bytes.clone()),
            metrics,
            budget: Arc::default(),
            uses: Arc::default(),
            in_flight: InFlight::default(),
        }
    }

    /// The requests in flight, for whoever has to wait for their end.
    pub fn in_flight(&self) -> InFlight {
        self.in_flight.clone()
    }

    /// Answers what needs no engine; false if the request is not such a one.
    async fn answer_locally(&self, session: &mut Session, ctx: &mut Context) -> Result<bool> {
        let request = session.req_header();
        if request.method != http::Method::GET && request.method != http::Method::HEAD {
            return Ok(false);
        }
        let (status, body) = match request.uri.path() {
            "/health" => {
                let up = self.upstreams.iter().any(|upstream| upstream.is_available());
                if up {
                    (200, r#"{"status":"ok"}"#.to_owned())
                } else {
                    (503, r#"{"status":"no backend"}"#.to_owned())
                }
            }
            "/v1/models" => {
                let models: Vec<_> = self.routes.models(request).into_values().collect();
                (200, format!(r#"{{"object":"list","data":[{}]}}"#, models.join(",")))
            }
            path => {
                let Some(model) = path.strip_prefix("/v1/models/") else { return Ok(false) };
                match self.routes.models(request).remove(model) {
                    Some(json) => (200, json),
                    None => (404, Refusal::model_not_found(model).json()),
                }
            }
        };
        ctx.local = true;
        reply::json(session, &ctx.id, status, body).await?;
        Ok(true)
    }

    /// Reads, digests, routes, prices and admits the request, or says why not.
    async fn take_in(&self, session: &mut Session, ctx: &mut Context) -> Result<(), Unread> {
        let limits = &self.limits;
        let reading = body::read(session.as_downstream_mut(), limits.body, &self.room);
        ctx.body = match tokio::time::timeout(limits.body_timeout, reading).await {
            Ok(body) => body?,
            Err(_) => return Err(Unread::Refused(Refusal::body_timeout())),
        };
        let bytes = ctx.body.as_ref().map_or(&[][..], |body| &body.bytes);
        ctx.body_bytes = bytes.len();
        let request = session.req_header();
        let digest = prompt::digest(Endpoint::from_path(request.uri.path()), bytes);
        let upstream =
            self.routes.resolve(request, digest.model.as_deref()).map_err(Unread::Refused)?.clone();
        ctx.session = request.headers.get(SESSION).map(|value| xxhash_rust::xxh3::xxh3_64(value.as_bytes()));
        ctx.upstream = Some(upstream.clone());
        let digest = ctx.digest.insert(digest);
        let request = upstream.price(digest, ctx.session);
        ctx.prompt_tokens = request.prompt_tokens;
        let admitted = tokio::select! {
            admitted = upstream.admit(&request) => admitted,
            gone = client_gone(session.as_downstream_mut()) => return Err(Unread::Failed(gone)),
        };
        ctx.admitted = match admitted {
            Ok(Some(charge)) => Some(charge),
            Ok(None) => return Err(Unread::Refused(Refusal::no_backend(&upstream.name))),
            Err(crate::upstream::Refusal::Full) => return Err(Unread::Refused(Refusal::queue_full())),
            Err(crate::upstream::Refusal::Late) => return Err(Unread::Refused(Refusal::queue_timeout())),
        };
        self.budget.lock().deposit();
        Ok(())
    }

    /// Whether `failure` of the present attempt is worth another; asks the one function that decides, and remembers the answer.
    fn judge(&self, ctx: &mut Context, failure: Failure, wait: Option<Duration>) -> bool {
        ctx.last_failure = Some(failure);
        let (Some(upstream), Some(attempt)) = (&ctx.upstream, &ctx.attempt) else { return false };
        let (slot, address) = (attempt.charge.slot, attempt.charge.address);
        match failure.fault() {
            Fault::None => {}
            Fault::BackPressure => upstream.cool(slot, wait.unwrap_or(COOL_DOWN)),
            Fault::Suspect => ctx.suspects.push((address, slot, failure)),
            Fault::Certain => upstream.fail(address, slot, failure, false),
        }
        if failure == Failure::StaleConnection {
            ctx.fresh_connection = true;
        } else {
            ctx.tried.push(slot);
        }
        let elapsed = self.clock.now().since(ctx.arrived);
        let progress = Progress { tries: ctx.tries, elapsed, committed: ctx.committed };
        let retry = upstream.has_room(&ctx.tried)
            && retry::retry(&upstream.retry, failure, progress, &mut self.budget.lock());
        if retry {
            upstream.retried(failure);
        }
        ctx.verdict = Some((failure, retry));
        retry
    }

    /// A byte of the answer goes out: no other backend can be tried any more, so what was kept for that is let go.
    fn commit(&self, ctx: &mut Context) {
        ctx.committed = true;
        ctx.body = None;
        let (Some(upstream), Some(attempt)) = (&ctx.upstream, &ctx.attempt) else { return };
        if attempt.status < 500 && attempt.status != 429 {
            upstream.succeed(attempt.charge.slot);
            // Another backend has answered, so the fault was theirs.
            for (address, slot, failure) in ctx.suspects.drain(..) {
                upstream.fail(address, slot, failure, true);
            }
        }
    }

    /// What remains to be held against the only backend that failed; a fault that a second one reproduced is the request's.
    fn blame(&self, ctx: &mut Context) {
        let Some(upstream) = &ctx.upstream else { return };
        if let [(address, slot, failure)] = ctx.suspects[..] {
            upstream.fail(address, slot, failure, false);
        }
    }

    fn outcome(&self, e: Option<&Error>, ctx: &Context) -> Outcome {
        if ctx.local {
            return Outcome::Local;
        }
        if e.is_some_and(|e| *e.esource() == ErrorSource::Downstream) {
            return Outcome::ClientGone;
        }
        if ctx.refused.is_some() && ctx.attempts == 0 {
            return Outcome::Refused;
        }
        match (&ctx.attempt, e) {
            (Some(attempt), None) if attempt.status >= 500 || attempt.tap.stream_error().is_some() => {
                Outcome::EngineError
            }
            (Some(attempt), None) if attempt.status >= 400 => Outcome::ClientError,
            (_, None) => Outcome::Ok,
            (_, Some(_)) if ctx.committed => Outcome::Cut,
            _ => Outcome::Unreachable,
        }
    }

    /// Counts the end of a request and what the engine said it cost.
    fn count(&self, ctx: &Context, outcome: Outcome) -> Option<prompt::Usage> {
        let upstream = ctx.upstream.as_ref();
        let Some(attempt) = &ctx.attempt else {
            self.metrics.count_without_backend(upstream.map_or("", |u| &u.name), outcome);
            return None;
        };
        let metrics = &attempt.live.metrics;
        metrics.count(outcome);
        let usage = attempt.tap.usage()?;
        metrics.prompt_tokens.inc_by(usage.prompt_tokens);
        metrics.completion_tokens.inc_by(usage.completion_tokens);
        metrics.cached_tokens.inc_by(usage.cached_tokens.unwrap_or(0));
        if let (Some(upstream), Some(digest)) = (upstream, &ctx.digest) {
            upstream.learn(digest, usage.prompt_tokens);
        }
        Some(usage)
    }
}

#[async_trait]
impl ProxyHttp for Proxy {
    type CTX = Context;

    fn new_ctx(&self) -> Context {
        Context::new(self.clock.now(), self.in_flight.enter())
    }

    async fn early_request_filter(&self, session: &mut Session, ctx: &mut Context) -> Result<()> {
        ctx.id = request_id(session.req_header());
        session.set_write_timeout(Some(self.limits.client_write_timeout));
        // Only if the client wants the connection kept at all.
        if session.get_keepalive().is_some() {
            session.set_keepalive(Some(self.limits.client_idle.as_secs().max(1)));
        }
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, ctx: &mut Context) -> Result<bool> {
        if self.answer_locally(session, ctx).await? {
            return Ok(true);
        }
        let refusal = match self.take_in(session, ctx).await {
            Ok(()) => return Ok(false),
            Err(Unread::Refused(refusal)) => refusal,
            Err(Unread::Failed(e)) if is_bad_framing(&e) => Refusal::bad_body(),
            Err(Unread::Failed(e)) => return Err(e.into_down()),
        };
        ctx.refused = Some(refusal.code);
        let body_was_read = session.is_body_done() || ctx.body.is_some();
        reply::refuse(session, &ctx.id, &refusal, body_was_read).await?;
        Ok(true)
    }

    async fn upstream_peer(&self, _session: &mut Session, ctx: &mut Context) -> Result<Box<HttpPeer>> {
        ctx.attempt = None;
        ctx.verdict = None;
        let (Some(upstream), Some(digest)) = (&ctx.upstream, &ctx.digest) else {
            return Error::e_explain(ErrorType::InternalError, "the request was not routed");
        };
        let charge = match ctx.admitted.take() {
            Some(charge) => Some(charge),
            None => upstream.assign(&upstream.price(digest, ctx.session), &ctx.tried),
        };
        let Some((charge, live)) =
            charge.and_then(|c| upstream.live(&c.address).cloned().map(|live| (c, live)))
        else {
            return Error::e_explain(ErrorType::ConnectNoRoute, "no other backend is left")
                .map_err(|e: BError| e.into_up());
        };
        let group = if ctx.fresh_connection { 1 + u64::from(ctx.attempts) } else { 0 };
        let peer = peer::peer(&upstream.config, &live, group);
        live.metrics.attempts.inc();
        ctx.attempts += 1;
        ctx.tries += 1;
        ctx.attempt = Some(Attempt::new(charge, live));
        Ok(Box::new(peer))
    }

    async fn connected_to_upstream(
        &self,
        _session: &mut Session,
        _reused: bool,
        _peer: &HttpPeer,
        fd: std::os::fd::RawFd,
        digest: Option<&ConnectionDigest>,
        ctx: &mut Context,
    ) -> Result<()> {
        let (Some(upstream), Some(attempt)) = (&ctx.upstream, &mut ctx.attempt) else { return Ok(()) };
        let Some(most) = upstream.config.keepalive.requests else { return Ok(()) };
        let timing = digest.and_then(|d| d.timing_digest.first()).and_then(Option::as_ref);
        if let Some(timing) = timing {
            attempt.close_after = self.uses.count(fd, timing.established_ts) >= most;
        }
        Ok(())
    }

    async fn upstream_request_filter(
        &self,
        _session: &mut Session,
        request: &mut RequestHeader,
        ctx: &mut Context,
    ) -> Result<()> {
        let (Some(upstream), Some(attempt)) = (&ctx.upstream, &ctx.attempt) else { return Ok(()) };
        request.remove_header(&header::EXPECT);
        request.remove_header(&header::TRANSFER_ENCODING);
        // An engine's answer has to be readable on its way: events, usage, errors.
        request.remove_header(&header::ACCEPT_ENCODING);
        if let Some(body) = &ctx.body {
            request.insert_header(header::CONTENT_LENGTH, body.bytes.len())?;
        }
        request.insert_header(REQUEST_ID, ctx.id.as_str())?;
        if let Some(authorization) = &upstream.authorization {
            request.insert_header(header::AUTHORIZATION, authorization.as_str())?;
        }
        if upstream.config.tls.is_some() {
            request.insert_header(header::HOST, attempt.live.server_name.as_str())?;
        }
        if attempt.close_after {
            request.insert_header(header::CONNECTION, "close")?;
        }
        Ok(())
    }

    async fn request_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        ctx: &mut Context,
    ) -> Result<()> {
        if let Some(whole) = &ctx.body {
            *body = Some(if end_of_stream { whole.bytes.clone() } else { Bytes::new() });
        }
        Ok(())
    }

    async fn upstream_response_filter(
        &self,
        _session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Context,
    ) -> Result<()> {
        if response.status.is_informational() {
            return Ok(());
        }
        let status = response.status.as_u16();
        if let Some(attempt) = &mut ctx.attempt {
            attempt.header_seen = true;
            attempt.status = status;
        }
        if status == 429 || status >= 500 {
            let failure = Failure::Status(status);
            if self.judge(ctx, failure, peer::retry_after(response)) {
                return retryable(failure);
            }
        }
        Ok(())
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Context,
    ) -> Result<()> {
        if response.status.is_informational() {
            return Ok(());
        }
        response.insert_header(REQUEST_ID, ctx.id.as_str())?;
        let Some(attempt) = &mut ctx.attempt else { return Ok(()) };
        if self.observe.backend_header {
            response.insert_header(BACKEND, attempt.live.label.as_str())?;
        }
        let is_stream = is_event_stream(response);
        attempt.tap = Tap::new(is_stream);
        // HTTP/1.0 has no chunks, so its header cannot be written apart from Pingora's own handling of it.
        let can_hold = session.req_header().version != http::Version::HTTP_10;
        if is_stream && response.status == 200 && can_hold {
            session.set_ignore_info_resp(true);
            // Pingora writes this informational header instead, which a session that ignores them drops.
            let mut real = ResponseHeader::build(102, Some(0))?;
            std::mem::swap(response, &mut real);
            if !real.headers.contains_key(header::CONTENT_LENGTH) {
                real.insert_header(header::TRANSFER_ENCODING, "chunked")?;
                real.set_version(http::Version::HTTP_11);
            }
            attempt.held = Some((Box::new(real), Held::default()));
        } else {
            self.commit(ctx);
        }
        Ok(())
    }

    fn response_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        ctx: &mut Context,
    ) -> Result<Option<Duration>> {
        let now = self.clock.now();
        let arrived = ctx.arrived;
        let Some(attempt) = &mut ctx.attempt else { return Ok(None) };
        if let Some(chunk) = body.as_ref().filter(|chunk| !chunk.is_empty()) {
            let metrics = &attempt.live.metrics;
            attempt.live.heard(now);
            metrics.stream_reads.inc();
            if attempt.tap.is_stream()
                && let Some(last) = attempt.last_read.replace(now)
            {
                metrics.event_gap.observe(now.since(last).as_secs_f64());
            }
            if attempt.tap.read(chunk) {
                attempt.charge.answer();
                let ttft = now.since(arrived);
                if attempt.tap.is_stream() {
                    metrics.ttft.observe(ttft.as_secs_f64());
                }
                ctx.ttft = Some(ttft);
            }
        }
        if let Some((header, mut held)) = attempt.held.take() {
            let opening = held.push(body.take().as_deref().unwrap_or(&[]));
            if let Opening::Error(code) = opening {
                let failure = Failure::StreamError(code);
                if self.judge(ctx, failure, None) {
                    return retryable(failure);
                }
            } else if opening == Opening::Nothing && !end_of_stream {
                attempt.held = Some((header, held));
                return Ok(None);
            }
            self.commit(ctx);
            write_header_now(session, header)?;
            *body = held.take();
        }
        Ok(None)
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        _peer: &HttpPeer,
        ctx: &mut Context,
        mut e: BError,
    ) -> BError {
        // Nothing was sent, so no engine has had this try.
        ctx.tries = ctx.tries.saturating_sub(1);
        e.set_retry(self.judge(ctx, Failure::Connect, None));
        e
    }

    fn error_while_proxy(
        &self,
        peer: &HttpPeer,
        _session: &mut Session,
        e: BError,
        ctx: &mut Context,
        reused: bool,
    ) -> BError {
        let mut e = e.more_context(format!("peer {}", peer._address));
        let retry = match ctx.verdict.take() {
            Some((_, retry)) => retry && !ctx.committed,
            None if *e.esource() == ErrorSource::Downstream => false,
            None => {
                let failure = classify(&e, ctx, reused);
                if failure == Failure::StaleConnection {
                    ctx.tries = ctx.tries.saturating_sub(1);
                }
                self.judge(ctx, failure, None)
            }
        };
        e.set_retry(retry);
        e
    }

    async fn fail_to_proxy(&self, session: &mut Session, e: &Error, ctx: &mut Context) -> FailToProxy {
        let nothing = FailToProxy { error_code: 0, can_reuse_downstream: false };
        if *e.esource() == ErrorSource::Downstream {
            return nothing;
        }
        if ctx.committed {
            if let Some(tap) = ctx.attempt.as_ref().map(|attempt| &attempt.tap).filter(|tap| tap.is_stream())
            {
                let mid_event = tap.mid_event();
                // The status is long gone; this is the only place left to say it.
                let sent = session.write_response_body(Some(reply::stream_cut(mid_event)), true).await;
                log::debug!("stream cut announced id={} sent={}", ctx.id, sent.is_ok());
            }
            return nothing;
        }
        let last_resort = ctx.attempt.as_ref().is_none_or(|a| a.charge.reason == Reason::LastResort);
        let refusal = match (ctx.last_failure, &ctx.upstream) {
            (Some(Failure::Timeout), _) => Refusal::timeout(),
            (Some(Failure::Closed | Failure::StaleConnection), _) => Refusal::closed(),
            (Some(Failure::Connect), _) if !last_resort => Refusal::unreachable(),
            (_, Some(upstream)) => Refusal::no_backend(&upstream.name),
            _ => Refusal::internal(),
        };
        ctx.refused = Some(refusal.code);
        if let Err(e) = reply::refuse(session, &ctx.id, &refusal, false).await {
            log::debug!("error not delivered id={} error={e}", ctx.id);
        }
        FailToProxy { error_code: refusal.status, can_reuse_downstream: false }
    }

    async fn logging(&self, session: &mut Session, e: Option<&Error>, ctx: &mut Context) {
        if e.is_none() {
            // A stream without a single event: its header has not gone out yet.
            if let Some((header, _)) = ctx.attempt.as_mut().and_then(|attempt| attempt.held.take()) {
                let written = session.write_response_header(header, true).await;
                log::debug!("empty stream id={} written={}", ctx.id, written.is_ok());
            }
        }
        self.blame(ctx);
        let outcome = self.outcome(e, ctx);
        let usage = self.count(ctx, outcome);
        if self.observe.access_log {
            log_access(session, ctx, outcome, usage, self.clock.now().since(ctx.arrived));
        }
        ctx.attempt = None;
        ctx.admitted = None;
    }

    fn suppress_error_log(&self, _session: &Session, _ctx: &Context, _e: &Error) -> bool {
        // The access line says it, once.
        true
    }

    fn suppress_proxy_warn_log(
        &self,
        _session: &Session,
        _ctx: &Context,
        _e: &Error,
        _context: pingora_proxy::ProxyWarnLogContext,
    ) -> bool {
        true
    }
}

/// Ends the attempt so that Pingora asks for another peer.
fn retryable<T>(failure: Failure) -> Result<T> {
    let mut e = Error::explain(ErrorType::new("Retry"), failure.name()).into_up();
    e.set_retry(true);
    Err(e)
}

/// What an error says of the attempt, if no byte of its answer has gone out.
fn classify(e: &Error, ctx: &Context, reused: bool) -> Failure {
    let header_seen = ctx.attempt.as_ref().is_some_and(|attempt| attempt.header_seen);
    match e.etype() {
        ErrorType::ReadTimedout => Failure::Timeout,
        _ if reused && !header_seen => Failure::StaleConnection,
        _ => Failure::Closed,
    }
}

/// Writes the header of a stream that was held back, from a hook that cannot wait: it goes to a buffer, and out with the body behind it.
fn write_header_now(session: &mut Session, header: Box<ResponseHeader>) -> Result<()> {
    match session.as_downstream_mut() {
        ServerSession::H2(h2) => h2.write_response_header(header, false),
        ds => ds.write_response_header(header).now_or_never().unwrap_or_else(|| {
            Error::e_explain(ErrorType::WriteError, "no room for the header")
                .map_err(|e: BError| e.into_down())
        }),
    }
}

/// Resolves when the client has gone; pends for as long as it waits.
async fn client_gone(ds: &mut ServerSession) -> BError {
    loop {
        match ds.read_body_or_idle(true).await {
            Err(e) => return e.into_down(),
            Ok(_) => tokio::task::yield_now().await,
        }
    }
}

fn is_bad_framing(e: &Error) -> bool {
    e.etype().as_str().contains("InvalidChunk") || *e.etype() == ErrorType::InvalidHTTPHeader
}

fn is_event_stream(response: &ResponseHeader) -> bool {
    let value = response.headers.get(header::CONTENT_TYPE).map_or(&[][..], |value| value.as_bytes());
    value.get(..17).is_some_and(|kind| kind.eq_ignore_ascii_case(b"text/event-stream"))
}

/// The client's id if it is one (1 to 128 visible ASCII characters), else a new one.
fn request_id(request: &RequestHeader) -> String {
    let given = request.headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let fits = |id: &&str| (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
    given.filter(fits).map_or_else(|| format!("{:032x}", fastrand::u128(..)), str::to_owned)
}

fn log_access(
    session: &Session,
    ctx: &Context,
    outcome: Outcome,
    usage: Option<prompt::Usage>,
    duration: Duration,
) {
    let request = session.req_header();
    let attempt = ctx.attempt.as_ref();
    Entry {
        id: &ctx.id,
        client: session.client_addr().map(ToString::to_string),
        method: request.method.as_str(),
        path: request.uri.path(),
        status: session.response_written().map_or(0, |response| response.status.as_u16()),
        outcome,
        upstream: ctx.upstream.as_ref().map(|upstream| upstream.name.as_str()),
        backend: attempt.map(|attempt| attempt.live.label.as_str()),
        reason: attempt.map(|attempt| Reason::name(attempt.charge.reason)),
        attempts: ctx.attempts,
        model: ctx.digest.as_ref().and_then(|digest| digest.model.as_deref()),
        stream: ctx.digest.as_ref().is_some_and(|digest| digest.stream),
        prompt_estimate: ctx.prompt_tokens,
        matched_estimate: attempt.map_or(0, |attempt| attempt.charge.matched_tokens),
        ttft: ctx.ttft,
        duration,
        bytes_in: ctx.body_bytes,
        bytes_out: session.body_bytes_sent(),
        tokens: usage.map(|u| (u.prompt_tokens, u.completion_tokens, u.cached_tokens)),
        error: ctx.refused.or_else(|| ctx.last_failure.map(Failure::name)),
    }
    .write();
}
