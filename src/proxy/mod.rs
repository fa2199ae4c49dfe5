//! The life of a request, hook by hook, in the order in which Pingora calls them: start reading here.
//!
//! ```text
//! early_request_filter      limits of the connection, the request's id and trace
//! request_filter            key; body read and digested; routed, admitted      access.rs intake.rs body.rs route.rs
//! upstream_peer             ranked and charged: a backend                      peer.rs             each try
//! upstream_request_filter   headers for the engine                                                 each try
//! request_body_filter       the stored body                                                        each try
//! upstream_response_filter  a status worth another try ends the attempt        verdict.rs          each try
//! response_filter           the header of a stream is held back                                    each try
//! response_body_filter      first event, first content; the stream passes      tap.rs              each try
//! fail_to_connect, error_while_proxy    another try?                           balance/retry.rs
//! fail_to_proxy             our own answer, or the end of a broken stream      reply.rs
//! logging                   settled, counted, written down, told               record.rs spans.rs
//! ```
//!
//! Nothing is decided here that `balance` could decide: the hooks carry facts to it and do what it says.

mod access;
mod body;
mod context;
mod explain;
mod flights;
pub mod forward;
pub mod hygiene;
mod intake;
mod peer;
mod record;
mod reply;
mod route;
mod setup;
mod spans;
pub mod tap;
mod trace;
mod verdict;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt;
use http::header;
use parking_lot::{Mutex, RwLock};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::Digest as ConnectionDigest;
use pingora::protocols::http::ServerSession;
use pingora::upstreams::peer::HttpPeer;
use pingora::{BError, Error, ErrorSource, ErrorType, Result};
use pingora_proxy::{FailToProxy, ProxyHttp, Session};

use crate::balance::retry::{Budget, Failure};
use crate::clock::{Clock, Time};
use crate::config;
use crate::observe::Records;
use crate::observe::metrics::Metrics;
use crate::policy::Reason;
use crate::upstream::Upstream;
use body::{Room, Unread};
use context::Attempt;
pub use context::{Context, InFlight};
pub use explain::Explanation;
use flights::Choices;
pub use flights::{CHOICES_LIMIT, Chosen, Shown, Stage};
use forward::Origin;
pub(crate) use hygiene::is_host;
pub(crate) use intake::new_id;
use peer::ConnectionUses;
pub(crate) use reply::CODES;
use reply::REQUEST_ID;
pub use reply::Refusal;
use setup::Setup;
use tap::{Opening, Tap};
use trace::Trace;

/// More than this without an end is no event that anybody would wait for.
const HELD_LIMIT: usize = 64 * 1024;

/// The header that names the backend which answered.
const BACKEND: &str = "x-plimsoll-backend";

/// The proxy. Clones share everything.
#[derive(Clone)]
pub struct Proxy {
    setup: Arc<RwLock<Arc<Setup>>>,
    clock: Clock,
    metrics: Arc<Metrics>,
    room: Arc<Room>,
    budget: Arc<Mutex<Budget>>,
    uses: Arc<ConnectionUses>,
    in_flight: InFlight,
    choices: Arc<Choices>,
    records: Records,
}

impl Proxy {
    /// The proxy that `config` describes, over these upstreams; what becomes of requests
    /// stands in `records`.
    pub fn new(
        config: &config::Config,
        upstreams: Vec<Arc<Upstream>>,
        clock: Clock,
        metrics: Arc<Metrics>,
        records: Records,
    ) -> Self {
        for code in CODES {
            metrics.refusal(code);
        }
        let setup = Setup::new(config, upstreams, &metrics, None);
        Self {
            setup: Arc::new(RwLock::new(Arc::new(setup))),
            clock,
            room: Room::new(config.limits.buffered_bodies, metrics.buffered_body_bytes.clone()),
            metrics,
            budget: Arc::default(),
            uses: Arc::default(),
            in_flight: InFlight::default(),
            choices: Arc::default(),
            records,
        }
    }

    /// From now on requests go as `config` says, over these upstreams; those in flight end as they began.
    pub fn configure(&self, config: &config::Config, upstreams: Vec<Arc<Upstream>>) {
        let setup = Setup::new(config, upstreams, &self.metrics, Some(&self.setup.read()));
        self.room.resize(config.limits.buffered_bodies);
        *self.setup.write() = Arc::new(setup);
    }

    /// Whether the process has been told to stop.
    pub fn is_stopping(&self) -> bool {
        self.in_flight.is_stopping()
    }

    /// The upstreams, as they are now.
    pub fn upstreams(&self) -> Vec<Arc<Upstream>> {
        self.setup.read().upstreams.clone()
    }

    /// The requests in flight, for whoever has to wait for their end.
    pub fn in_flight(&self) -> InFlight {
        self.in_flight.clone()
    }

    /// The requests in flight as they are, the oldest first.
    pub fn requests(&self) -> Vec<Shown> {
        self.in_flight.shown(self.clock.now())
    }

    /// The last choices of a backend, at most `limit` and [`CHOICES_LIMIT`], the newest first.
    pub fn choices(&self, limit: usize) -> Vec<Chosen> {
        self.choices.shown(limit, self.clock.now())
    }

    /// For how long the process has run.
    pub fn uptime(&self) -> Duration {
        self.clock.now().since(Time::ZERO)
    }
}

#[async_trait]
impl ProxyHttp for Proxy {
    type CTX = Context;

    fn new_ctx(&self) -> Context {
        let now = self.clock.now();
        Context::new(self.setup.read().clone(), now, self.in_flight.enter(now))
    }

    async fn early_request_filter(&self, session: &mut Session, ctx: &mut Context) -> Result<()> {
        forward::to_origin_form(session.req_header_mut())?;
        ctx.id = intake::request_id(session.req_header());
        ctx.entered.flight.identify(&ctx.id);
        ctx.trace = self.trace(session.req_header_mut())?;
        let Setup { limits, trusted, .. } = &*ctx.setup;
        ctx.client = Origin::of(session, trusted).client(session.req_header(), trusted);
        session.set_write_timeout(Some(limits.client_write_timeout));
        // Pingora's own 60 s would end a patient upload before our deadline does, and silently.
        session.set_read_timeout(Some(body::longest(limits)));
        // Only if the client wants the connection kept at all.
        if session.get_keepalive().is_some() {
            session.set_keepalive(Some(limits.client_idle.as_secs().max(1)));
        }
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, ctx: &mut Context) -> Result<bool> {
        if self.refuse_flawed(session, ctx).await?
            || self.refuse_stranger(session, ctx).await?
            || self.answer_locally(session, ctx).await?
        {
            return Ok(true);
        }
        let refusal = match self.take_in(session, ctx).await {
            Ok(()) => return Ok(false),
            Err(Unread::Refused(refusal)) => refusal,
            Err(Unread::Failed(e)) => return Err(e.into_down()),
        };
        self.refuse(session, ctx, &refusal).await?;
        Ok(true)
    }

    async fn upstream_peer(&self, _session: &mut Session, ctx: &mut Context) -> Result<Box<HttpPeer>> {
        ctx.attempt = None;
        ctx.retry = None;
        let (Some(upstream), Some(digest)) = (&ctx.upstream, &ctx.digest) else {
            return Error::e_explain(ErrorType::InternalError, "the request was not routed");
        };
        let charge = match ctx.admitted.take() {
            Some(charge) => Some(charge),
            None => upstream.assign(&upstream.price(digest, ctx.session), &ctx.tried),
        };
        let Some((charge, live)) = charge.and_then(|c| c.live.clone().map(|live| (c, live))) else {
            return Error::e_explain(ErrorType::ConnectNoRoute, "no other backend is left")
                .map_err(|e: BError| e.into_up());
        };
        // A second attempt must not find its connection dead: nobody could tell whether an engine has had it.
        let fresh = ctx.attempts > 0 || upstream.config.keepalive.connections == 0;
        let peer = peer::peer(&upstream.config, &live, fresh);
        live.metrics.attempts.inc();
        let now = self.clock.now();
        ctx.entered.flight.send(&live);
        self.choices.add(&ctx.entered.flight, &live, &charge, now);
        ctx.attempts += 1;
        ctx.tries += 1;
        let span = ctx.trace.as_ref().and_then(Trace::attempt);
        ctx.attempt = Some(Attempt { close_after: fresh, span, ..Attempt::new(charge, live, now) });
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
            attempt.close_after |= self.uses.count(fd, timing.established_ts) >= most;
        }
        Ok(())
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        ctx: &mut Context,
    ) -> Result<()> {
        let (Some(upstream), Some(attempt)) = (&ctx.upstream, &ctx.attempt) else { return Ok(()) };
        request.remove_header(&header::EXPECT);
        request.remove_header(&header::TRANSFER_ENCODING);
        // What an engine answers has to be readable on its way (events, usage, errors), and stay HTTP.
        request.remove_header(&header::ACCEPT_ENCODING);
        request.remove_header(&header::UPGRADE);
        request.remove_header(&header::CONNECTION);
        if let Some(body) = &ctx.body {
            request.insert_header(header::CONTENT_LENGTH, body.bytes.len())?;
        }
        request.insert_header(REQUEST_ID, ctx.id.as_str())?;
        if let (Some(trace), Some(span)) = (&ctx.trace, attempt.span) {
            trace.announce(request, span)?;
        }
        Origin::of(session, &ctx.setup.trusted).announce(request)?;
        if ctx.setup.keys.is_some() {
            access::conceal(request);
        }
        if let Some(authorization) = &upstream.authorization {
            request.insert_header(header::AUTHORIZATION, authorization.as_str())?;
        }
        if upstream.config.tls.is_some() || !request.headers.contains_key(header::HOST) {
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
        if response.status == http::StatusCode::SWITCHING_PROTOCOLS {
            // Nobody asked for that, and what follows is not HTTP any more.
            ctx.last_failure = Some(Failure::Closed);
            ctx.retry = Some(false);
            return verdict::end_attempt(Failure::Closed);
        }
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
                return verdict::end_attempt(failure);
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
        forward::keep_end_to_end(response);
        response.insert_header(REQUEST_ID, ctx.id.as_str())?;
        if let Some(key) = &ctx.key {
            key.announce(response, self.clock.now())?;
        }
        self.close_if_stopping(session);
        let is_http10 = session.req_header().version == http::Version::HTTP_10;
        if is_http10 && response.remove_header(&header::TRANSFER_ENCODING).is_some() {
            // HTTP/1.0 knows no chunks: the end of the connection is the end of the answer.
            session.set_keepalive(None);
        }
        let Some(attempt) = &mut ctx.attempt else { return Ok(()) };
        if ctx.setup.observe.backend_header {
            response.insert_header(BACKEND, attempt.live.label.as_str())?;
        }
        let is_stream = is_event_stream(response);
        attempt.tap = Tap::new(is_stream);
        if is_stream && response.status == 200 && !is_http10 {
            session.set_ignore_info_resp(true);
            // Pingora writes this informational header instead, which a session that ignores them drops.
            let mut real = ResponseHeader::build(102, Some(0))?;
            std::mem::swap(response, &mut real);
            if !real.headers.contains_key(header::CONTENT_LENGTH) {
                real.insert_header(header::TRANSFER_ENCODING, "chunked")?;
                real.set_version(http::Version::HTTP_11);
            }
            attempt.held = Some((Box::new(real), Vec::new()));
        } else {
            let good = attempt.status < 500 && attempt.status != 429;
            self.commit(ctx, good);
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
            ctx.entered.flight.read();
            if attempt.tap.is_stream()
                && let Some(last) = attempt.last_read.replace(now)
            {
                metrics.event_gap.observe(now.since(last).as_secs_f64());
            }
            if attempt.tap.read(chunk) {
                attempt.charge.answer();
                ctx.entered.flight.answer();
                let ttft = now.since(arrived);
                if attempt.tap.is_stream() {
                    metrics.ttft.observe(ttft.as_secs_f64());
                }
                ctx.ttft = Some(ttft);
            }
        }
        if let Some((header, mut held)) = attempt.held.take() {
            held.extend_from_slice(body.take().as_deref().unwrap_or(&[]));
            let opening = attempt.tap.opening();
            if let Opening::Error(code) = opening {
                let failure = Failure::StreamError(code);
                if self.judge(ctx, failure, None) {
                    return verdict::end_attempt(failure);
                }
            } else if opening == Opening::Nothing && !end_of_stream && held.len() <= HELD_LIMIT {
                attempt.held = Some((header, held));
                return Ok(None);
            }
            self.commit(ctx, !matches!(opening, Opening::Error(_)));
            write_header_now(session, header)?;
            *body = (!held.is_empty()).then(|| Bytes::from(held));
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
        // Nothing was sent, so no engine has had this try. Our own troubles, such as a lack of descriptors, are
        // not the backend's.
        ctx.tries = ctx.tries.saturating_sub(1);
        ctx.detail = Some(e.to_string());
        let ours = *e.etype() == ErrorType::InternalError;
        e.set_retry(!ours && self.judge(ctx, Failure::Connect, None));
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
        let retry = match (ctx.retry.take(), verdict::classify(&e, ctx, reused, self.clock.now())) {
            (Some(retry), _) => retry && !ctx.committed,
            (None, None) => false,
            (None, Some(failure)) => {
                ctx.detail = Some(e.to_string());
                self.judge(ctx, failure, None)
            }
        };
        e.set_retry(retry);
        e
    }

    async fn fail_to_proxy(&self, session: &mut Session, e: &Error, ctx: &mut Context) -> FailToProxy {
        let nothing = FailToProxy { error_code: 0, can_reuse_downstream: false };
        if *e.esource() == ErrorSource::Downstream && (ctx.committed || is_gone(e)) {
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
            _ if *e.esource() == ErrorSource::Downstream => Refusal::bad_request(),
            (Some(Failure::Timeout), _) => Refusal::timeout(),
            (Some(Failure::Closed | Failure::StaleConnection), _) => Refusal::closed(),
            (Some(Failure::Connect), _) if !last_resort => Refusal::unreachable(),
            (_, Some(upstream)) => Refusal::no_backend(&upstream.name),
            _ => Refusal::internal(),
        };
        // Pingora closes the connection after an error, so the client had better know.
        session.set_keepalive(None);
        if let Err(e) = self.refuse(session, ctx, &refusal).await {
            log::debug!("error not delivered id={} error={e}", ctx.id);
        }
        FailToProxy { error_code: refusal.status, can_reuse_downstream: false }
    }

    async fn logging(&self, session: &mut Session, e: Option<&Error>, ctx: &mut Context) {
        if e.is_none() {
            // A stream without a single event: its header has not gone out yet.
            if let Some((header, _)) = ctx.attempt.as_mut().and_then(|attempt| attempt.held.take()) {
                self.commit(ctx, true);
                let written = session.write_response_header(header, true).await;
                log::debug!("empty stream id={} written={}", ctx.id, written.is_ok());
            }
        }
        self.blame(ctx);
        self.record(session, e, ctx);
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

/// Writes the header of a stream that was held back, from a hook that cannot wait: there is room for it in the
/// socket's buffer, since nothing has been written for this answer yet.
fn write_header_now(session: &mut Session, header: Box<ResponseHeader>) -> Result<()> {
    match session.as_downstream_mut() {
        ServerSession::H2(h2) => h2.write_response_header(header, false),
        // Unconstrained: an exhausted budget of the scheduler must not look like a full buffer.
        ds => {
            tokio::task::unconstrained(ds.write_response_header(header)).now_or_never().unwrap_or_else(|| {
                Error::e_explain(ErrorType::WriteError, "no room for the header")
                    .map_err(|e: BError| e.into_down())
            })
        }
    }
}

/// Whether an error of the client's connection means that there is nobody to answer.
fn is_gone(e: &Error) -> bool {
    use ErrorType::{ConnectionClosed, H2Error, ReadError, ReadTimedout, WriteError, WriteTimedout};
    matches!(e.etype(), ConnectionClosed | H2Error | ReadError | ReadTimedout | WriteError | WriteTimedout)
}

fn is_event_stream(response: &ResponseHeader) -> bool {
    let value = response.headers.get(header::CONTENT_TYPE).map_or(&[][..], |value| value.as_bytes());
    if response.headers.contains_key(header::CONTENT_ENCODING) {
        // Compressed in spite of what we asked for: it cannot be read, so nothing waits for its first event.
        return false;
    }
    value.get(..17).is_some_and(|kind| kind.eq_ignore_ascii_case(b"text/event-stream"))
}
