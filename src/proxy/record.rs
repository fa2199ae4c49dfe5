//! The record of a request that has ended: its outcome, the counters, the line in the access log.

use pingora::{Error, ErrorSource};
use pingora_proxy::Session;

use super::{Context, Proxy};
use crate::balance::retry::Failure;
use crate::clock::Time;
use crate::observe::Outcome;
use crate::observe::access_log::Entry;
use crate::prompt::Usage;

/// How a request has ended.
pub(super) struct End {
    /// The status that went to the client; 0 if none did.
    pub(super) status: u16,
    pub(super) outcome: Outcome,
    /// As the engine counted.
    pub(super) usage: Option<Usage>,
    /// Why we refused, or the last failure.
    pub(super) error: Option<&'static str>,
}

impl Proxy {
    /// Counts the request and writes it down.
    pub(super) fn record(&self, session: &Session, e: Option<&Error>, ctx: &mut Context) {
        let outcome = outcome(e, ctx);
        let usage = ctx.attempt.as_ref().and_then(|attempt| attempt.tap.usage());
        self.count(ctx, outcome, usage);
        settle(ctx, outcome, usage, self.clock.now());
        let end = End { status: status(session), outcome, usage, error: error(outcome, ctx) };
        if ctx.setup.observe.access_log {
            self.log(session, ctx, &end);
        }
        self.tell_attempt(ctx, outcome.is_failure().then(|| end.error.unwrap_or_else(|| outcome.name())));
        self.tell_request(session, ctx, &end);
    }

    fn count(&self, ctx: &Context, outcome: Outcome, usage: Option<Usage>) {
        let upstream = ctx.upstream.as_ref();
        let Some(attempt) = &ctx.attempt else {
            self.metrics.count_without_backend(upstream.map_or("", |u| &u.name), outcome);
            return;
        };
        let metrics = &attempt.live.metrics;
        metrics.count(outcome);
        let Some(usage) = usage else { return };
        metrics.prompt_tokens.inc_by(usage.prompt_tokens);
        metrics.completion_tokens.inc_by(usage.completion_tokens);
        metrics.cached_tokens.inc_by(usage.cached_tokens.unwrap_or(0));
        if let (Some(upstream), Some(digest)) = (upstream, &ctx.digest) {
            upstream.learn(digest, usage.prompt_tokens);
        }
    }

    fn log(&self, session: &Session, ctx: &Context, end: &End) {
        let request = session.req_header();
        let attempt = ctx.attempt.as_ref();
        let digest = ctx.digest.as_ref();
        let entry = Entry {
            id: &ctx.id,
            trace: ctx.trace.as_ref().map(|trace| trace.id),
            client: ctx.client.map(|client| client.to_string()),
            key: ctx.key.as_ref().map(|key| key.name.as_str()),
            method: request.method.as_str(),
            path: request.uri.path(),
            status: end.status,
            outcome: end.outcome,
            upstream: ctx.upstream.as_ref().map(|upstream| upstream.name.as_str()),
            backend: attempt.map(|attempt| attempt.live.label.as_str()),
            reason: attempt.map(|attempt| attempt.charge.reason.name()),
            attempts: ctx.attempts,
            model: digest.and_then(|digest| digest.model.as_deref()),
            stream: digest.is_some_and(|digest| digest.stream),
            prompt_estimate: ctx.prompt_tokens,
            matched_estimate: attempt.map_or(0, |attempt| attempt.charge.matched_tokens),
            ttft: ctx.ttft,
            duration: self.clock.now().since(ctx.arrived),
            bytes_in: ctx.body_bytes,
            bytes_out: session.body_bytes_sent(),
            tokens: end.usage.map(|u| (u.prompt_tokens, u.completion_tokens, u.cached_tokens)),
            error: end.error,
            detail: ctx.detail.as_deref(),
        };
        self.records.access_log.write(&entry, self.clock.unix_time());
    }
}

fn status(session: &Session) -> u16 {
    session.response_written().map_or(0, |response| response.status.as_u16())
}

/// Puts in place of the estimate that the key was charged what the engine counted. Of an answer without
/// `usage`, or that its client did not wait for, the prompt is as it was estimated and each read of a stream is
/// a token. A request that came to nothing costs nothing.
fn settle(ctx: &Context, outcome: Outcome, usage: Option<Usage>, now: Time) {
    use Outcome::{ClientGone, Cut, Ok};
    let Some(key) = &ctx.key else { return };
    key.metrics.count(outcome);
    let is_stream = ctx.attempt.as_ref().is_some_and(|attempt| attempt.tap.is_stream());
    let reads = if is_stream { ctx.entered.flight.reads() } else { 0 };
    let (prompt, completion) = match usage {
        Some(usage) => (usage.prompt_tokens, usage.completion_tokens),
        None if ctx.attempts > 0 && matches!(outcome, Ok | Cut | ClientGone) => (ctx.prompt_tokens, reads),
        None => (0, 0),
    };
    key.metrics.prompt_tokens.inc_by(prompt);
    key.metrics.completion_tokens.inc_by(completion);
    if let Some(spent) = ctx.spent {
        key.settle(spent, prompt.saturating_add(completion), now);
    }
}

/// Why we refused, or the last failure; an error late in a stream is one that nobody could act on.
fn error(outcome: Outcome, ctx: &Context) -> Option<&'static str> {
    let late = (outcome == Outcome::EngineError).then_some(Failure::StreamError(None));
    ctx.refused.or_else(|| ctx.last_failure.or(late).map(Failure::name))
}

fn outcome(e: Option<&Error>, ctx: &Context) -> Outcome {
    if ctx.local {
        return Outcome::Local;
    }
    if ctx.refused.is_some() && ctx.attempts == 0 {
        return Outcome::Refused;
    }
    if e.is_some_and(|e| *e.esource() == ErrorSource::Downstream) {
        return Outcome::ClientGone;
    }
    match (&ctx.attempt, e) {
        (Some(attempt), None) => {
            match attempt.tap.stream_error().map_or(attempt.status, |e| e.code.unwrap_or(500)) {
                ..400 => Outcome::Ok,
                400..500 => Outcome::ClientError,
                500.. => Outcome::EngineError,
            }
        }
        (_, None) => Outcome::Ok,
        (_, Some(_)) if ctx.committed => Outcome::Cut,
        _ => Outcome::Unreachable,
    }
}
