//! The spans of a request: one for the request, as its client saw it, and one below it for each attempt.
//!
//! They are told when they have ended, from what is known then, so that a request costs nothing for them before; and
//! only if its trace is one that is recorded (`trace.rs`). Attributes have the names of OpenTelemetry's semantic
//! conventions for HTTP and generative AI, or begin with `plimsoll.`. Prompts and credentials are in none of them.

use std::time::{Duration, SystemTime};

use http::Method;
use opentelemetry::KeyValue;
use opentelemetry::trace::SpanKind;
use pingora_proxy::Session;

use super::record::End;
use super::trace::Recorded;
use super::{Context, Proxy};
use crate::clock::{Clock, Time};
use crate::observe::traces::Span;
use crate::prompt::Endpoint;

impl Proxy {
    /// Tells of the present attempt, which has ended, once; with the failure, if it was one.
    pub(super) fn tell_attempt(&self, ctx: &mut Context, failure: Option<&str>) {
        let (Some(traces), Some((trace, recorded))) = (&self.records.traces, recorded(ctx)) else { return };
        let Some(attempt) = &mut ctx.attempt else { return };
        let Some(id) = attempt.span.take() else { return };
        let times = Times::until_now(&self.clock);
        let charge = &attempt.charge;
        let mut attributes = vec![
            KeyValue::new("server.address", attempt.live.label.clone()),
            KeyValue::new("plimsoll.reason", charge.reason.name()),
            KeyValue::new("plimsoll.matched_tokens", number(charge.matched_tokens)),
        ];
        if attempt.status > 0 {
            attributes.push(KeyValue::new("http.response.status_code", i64::from(attempt.status)));
        }
        if ctx.attempts > 1 {
            attributes.push(KeyValue::new("http.request.resend_count", i64::from(ctx.attempts - 1)));
        }
        attributes.extend(failure.map(|failure| KeyValue::new("error.type", failure.to_owned())));
        traces.tell(Span {
            trace,
            id,
            parent: Some(recorded.request),
            parent_is_remote: false,
            kind: SpanKind::Client,
            name: "attempt".to_owned(),
            began: times.at(attempt.started),
            ended: times.end,
            attributes,
            events: Vec::new(),
            failed: failure.is_some() || attempt.status >= 400,
        });
    }

    /// Tells of the request, which has ended.
    pub(super) fn tell_request(&self, session: &Session, ctx: &Context, end: &End) {
        let (Some(traces), Some((trace, recorded))) = (&self.records.traces, recorded(ctx)) else { return };
        let times = Times::until_now(&self.clock);
        let mut events = Vec::new();
        if ctx.attempts > 0 {
            events.push(("admitted", times.at(ctx.admitted_at)));
        }
        events.extend(ctx.ttft.map(|ttft| ("first token", times.at(ctx.arrived) + ttft)));
        traces.tell(Span {
            trace,
            id: recorded.request,
            parent: recorded.parent,
            parent_is_remote: recorded.parent.is_some(),
            kind: SpanKind::Server,
            name: name(session),
            began: times.at(ctx.arrived),
            ended: times.end,
            attributes: attributes(session, ctx, end),
            events,
            failed: end.status >= 500 || end.outcome.is_failure(),
        });
    }
}

/// The trace, if it is recorded, and what the spans of the request are bound together by.
fn recorded(ctx: &Context) -> Option<(u128, Recorded)> {
    ctx.trace.as_ref().and_then(|trace| Some((trace.id, trace.recorded?)))
}

fn attributes(session: &Session, ctx: &Context, end: &End) -> Vec<KeyValue> {
    let &End { status, outcome, usage, error } = end;
    let text = |key: &'static str, value: &str| KeyValue::new(key, value.to_owned());
    let request = session.req_header();
    let mut attributes = vec![
        text("http.request.method", request.method.as_str()),
        text("url.path", request.uri.path()),
        text("plimsoll.request_id", &ctx.id),
        text("plimsoll.outcome", outcome.name()),
        KeyValue::new("plimsoll.attempts", i64::from(ctx.attempts)),
    ];
    attributes.extend((status > 0).then(|| KeyValue::new("http.response.status_code", i64::from(status))));
    attributes.extend(ctx.client.map(|client| KeyValue::new("client.address", client.to_string())));
    attributes.extend(ctx.key.as_ref().map(|key| text("plimsoll.key", &key.name)));
    attributes.extend(ctx.upstream.as_ref().map(|upstream| text("plimsoll.upstream", &upstream.name)));
    if let Some(digest) = &ctx.digest {
        attributes.extend(digest.model.as_deref().map(|model| text("gen_ai.request.model", model)));
        attributes.push(KeyValue::new("plimsoll.prompt_tokens_estimate", number(ctx.prompt_tokens)));
    }
    if let Some(usage) = usage {
        attributes.push(KeyValue::new("gen_ai.usage.input_tokens", number(usage.prompt_tokens)));
        attributes.push(KeyValue::new("gen_ai.usage.output_tokens", number(usage.completion_tokens)));
    }
    attributes.extend(error.map(|error| text("error.type", error)));
    attributes
}

/// The method and the API, of which there are few; a path may be anything.
fn name(session: &Session) -> String {
    let request = session.req_header();
    let known = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::DELETE, Method::OPTIONS];
    let method = if known.contains(&request.method) { request.method.as_str() } else { "HTTP" };
    match Endpoint::from_path(request.uri.path()).name() {
        Some(api) => format!("{method} {api}"),
        None => method.to_owned(),
    }
}

/// What the collector's integers hold.
fn number(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Our clock in the calendar.
struct Times {
    now: Time,
    end: SystemTime,
}

impl Times {
    fn until_now(clock: &Clock) -> Self {
        Self { now: clock.now(), end: SystemTime::UNIX_EPOCH + clock.unix_time() }
    }

    fn at(&self, time: Time) -> SystemTime {
        let ago: Duration = self.now.since(time);
        self.end.checked_sub(ago).unwrap_or(self.end)
    }
}
