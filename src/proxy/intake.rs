//! The intake: everything between a request's head and its first attempt.
//!
//! What needs no engine is answered on the spot. Everything else is read whole, digested, routed, priced and
//! admitted, in this order, or refused with the reason.

use std::sync::Arc;
use std::time::Duration;

use pingora::http::RequestHeader;
use pingora::protocols::http::ServerSession;
use pingora::{BError, Error, ErrorType, Result};
use pingora_proxy::Session;

use super::body::{self, Unread};
use super::reply::{self, REQUEST_ID, Refusal};
use super::setup::Setup;
use super::{Context, Proxy, hygiene};
use crate::balance::retry;
use crate::prompt::{self, Digest, Endpoint};
use crate::upstream::{self, Upstream};

/// The header by which a client keeps a conversation together, beside `prompt_cache_key` in the body.
const SESSION: &str = "x-session-id";

/// Whether there is anybody to answer, asked by balancers.
const HEALTH: &str = "/health";

/// What a client that was refused in the middle of its body may still send, and for how long.
const LINGER_BYTES: usize = 1 << 20;
const LINGER: Duration = Duration::from_secs(2);

impl Proxy {
    /// Refuses what is no request for anybody; false if nothing is wrong with it.
    pub(super) async fn refuse_flawed(&self, session: &mut Session, ctx: &mut Context) -> Result<bool> {
        let Some(refusal) = hygiene::flaw(session.req_header(), &ctx.setup.limits) else { return Ok(false) };
        self.refuse(session, ctx, &refusal).await?;
        Ok(true)
    }

    /// Refuses who shows no key, where keys are asked for; false if the request may go on. `/health` is for
    /// balancers in front of us, which have none.
    pub(super) async fn refuse_stranger(&self, session: &mut Session, ctx: &mut Context) -> Result<bool> {
        let Some(keys) = &ctx.setup.keys else { return Ok(false) };
        let request = session.req_header();
        if request.uri.path() == HEALTH && is_question(request) {
            return Ok(false);
        }
        match keys.find(&request.headers) {
            Ok(key) => {
                ctx.entered.flight.show_key(&key);
                ctx.key = Some(key);
                Ok(false)
            }
            Err(refusal) => {
                self.refuse(session, ctx, &refusal).await?;
                Ok(true)
            }
        }
    }

    /// Answers what needs no engine; false if the request is not such a one.
    pub(super) async fn answer_locally(&self, session: &mut Session, ctx: &mut Context) -> Result<bool> {
        let request = session.req_header();
        if !is_question(request) {
            return Ok(false);
        }
        let key = ctx.key.as_ref().map(|key| key.name.as_str());
        let (status, body) = match request.uri.path() {
            HEALTH if ctx.setup.upstreams.iter().any(|upstream| upstream.is_available()) => {
                (200, r#"{"status":"ok"}"#.to_owned())
            }
            HEALTH => (503, r#"{"status":"no backend"}"#.to_owned()),
            "/v1/models" => {
                let models: Vec<_> = ctx.setup.routes.models(request, key).into_values().collect();
                (200, format!(r#"{{"object":"list","data":[{}]}}"#, models.join(",")))
            }
            path => {
                let Some(model) = path.strip_prefix("/v1/models/") else { return Ok(false) };
                // Ids such as `meta-llama/Llama-3.1-8B` come with their slash or with `%2F`.
                let model = model.replace("%2F", "/").replace("%2f", "/");
                match ctx.setup.routes.models(request, key).remove(&model) {
                    Some(json) => (200, json),
                    None => (404, Refusal::model_not_found(&model).json()),
                }
            }
        };
        ctx.local = true;
        self.close_if_stopping(session);
        reply::json(session, &ctx.id, status, body).await?;
        Ok(true)
    }

    /// Reads, digests, routes, prices and admits the request, or says why not.
    pub(super) async fn take_in(&self, session: &mut Session, ctx: &mut Context) -> Result<(), Unread> {
        let key = ctx.key.clone();
        if let Some(key) = &key {
            key.admit(self.clock.now()).map_err(Unread::Refused)?;
        }
        ctx.body = body::read(session.as_downstream_mut(), &ctx.setup.limits, self.clock, &self.room).await?;
        let bytes = ctx.body.as_ref().map_or(&[][..], |body| &body.bytes);
        ctx.body_bytes = bytes.len();
        let name = key.as_ref().map(|key| key.name.as_str());
        let found = find(&ctx.setup, session.req_header(), bytes, name).map_err(Unread::Refused)?;
        let upstream = found.upstream;
        ctx.retry_rule = Some(found.retry);
        ctx.session = found.session;
        ctx.upstream = Some(upstream.clone());
        let digest = ctx.digest.insert(found.digest);
        let request = upstream.price(digest, ctx.session);
        ctx.prompt_tokens = request.prompt_tokens;
        ctx.entered.flight.route(&upstream, digest.model.as_deref(), ctx.prompt_tokens);
        if let Some(key) = &key {
            ctx.spent = Some(key.spend(ctx.prompt_tokens, self.clock.now()).map_err(Unread::Refused)?);
        }
        let admitted = tokio::select! {
            biased;
            admitted = upstream.admit(&request) => admitted,
            gone = client_gone(session.as_downstream_mut()) => return Err(Unread::Failed(gone)),
        };
        ctx.admitted = match admitted {
            Ok(Some(charge)) => Some(charge),
            Ok(None) => return Err(Unread::Refused(Refusal::no_backend(&upstream.name))),
            Err(upstream::Refusal::Drained) => {
                return Err(Unread::Refused(Refusal::draining(&upstream.name)));
            }
            Err(upstream::Refusal::Full) => return Err(Unread::Refused(Refusal::queue_full())),
            Err(upstream::Refusal::Late) => return Err(Unread::Refused(Refusal::queue_timeout())),
        };
        ctx.admitted_at = self.clock.now();
        self.budget.lock().deposit();
        Ok(())
    }

    /// Once the process has been told to stop, an answer says that its connection closes.
    pub(super) fn close_if_stopping(&self, session: &mut Session) {
        if self.in_flight.is_stopping() {
            session.set_keepalive(None);
        }
    }

    /// Tells the client why its request goes nowhere.
    pub(super) async fn refuse(
        &self,
        session: &mut Session,
        ctx: &mut Context,
        refusal: &Refusal,
    ) -> Result<()> {
        ctx.refused = Some(refusal.code);
        self.metrics.refusal(refusal.code).inc();
        let was_read = ctx.body.is_some() || session.is_body_done();
        self.close_if_stopping(session);
        reply::refuse(session, &ctx.id, refusal, was_read).await?;
        if !was_read && let ServerSession::H1(_) = session.as_downstream() {
            // Closing a socket with unread bytes resets it, and the reset overtakes the answer.
            let _in_vain = tokio::time::timeout(LINGER, read_on(session.as_downstream_mut())).await;
        }
        Ok(())
    }
}

/// What a request is, and where it goes.
pub(super) struct Found {
    pub(super) upstream: Arc<Upstream>,
    pub(super) retry: Arc<retry::Rule>,
    pub(super) digest: Digest,
    /// From a session header.
    pub(super) session: Option<u64>,
}

/// Digests the body of a request that showed `key`, and finds out where it goes.
pub(super) fn find(
    setup: &Setup,
    request: &RequestHeader,
    body: &[u8],
    key: Option<&str>,
) -> Result<Found, Refusal> {
    let digest = prompt::digest(Endpoint::from_path(request.uri.path()), body);
    let way = setup.routes.resolve(request, digest.model.as_deref(), key)?;
    let (upstream, retry) = (way.upstream.clone(), way.retry.clone());
    let session = request.headers.get(SESSION).map(|value| xxhash_rust::xxh3::xxh3_64(value.as_bytes()));
    Ok(Found { upstream, retry, digest, session })
}

/// Whether it only asks, and nothing is to be done: what may be answered on the spot.
fn is_question(request: &RequestHeader) -> bool {
    request.method == http::Method::GET || request.method == http::Method::HEAD
}

/// The client's id if it is one (1 to 128 visible ASCII characters), else a new one.
pub(super) fn request_id(request: &RequestHeader) -> String {
    let given = request.headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let fits = |id: &&str| (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
    given.filter(fits).map_or_else(new_id, str::to_owned)
}

/// An id that no other request has.
pub(crate) fn new_id() -> String {
    format!("{:032x}", fastrand::u128(..))
}

/// Reads what a refused client still sends, and forgets it.
async fn read_on(ds: &mut ServerSession) {
    let mut read = 0;
    while let Ok(Some(chunk)) = ds.read_request_body().await {
        read += chunk.len();
        if read > LINGER_BYTES || ds.is_body_done() {
            return;
        }
    }
}

/// Resolves when the client has gone; pends for as long as it waits.
async fn client_gone(ds: &mut ServerSession) -> BError {
    match ds.read_body_or_idle(true).await {
        Err(e) => e.into_down(),
        Ok(_) => Error::explain(ErrorType::ConnectionClosed, "the request has ended twice").into_down(),
    }
}
