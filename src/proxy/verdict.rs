//! The verdict on an attempt: what failed, whether another backend is tried, and who is to blame.
//!
//! The hooks notice; `balance` decides: every failure, wherever it is noticed, goes through [`Proxy::judge`] to the
//! one function in `balance/retry.rs` and to the ejection record of the backend. A fault that may be the
//! request's own is held back until it is known whether another backend gives a good answer.

use std::net::SocketAddr;
use std::time::Duration;

use pingora::{Error, ErrorSource, ErrorType, Result};

use super::{Context, Proxy};
use crate::balance::Tier;
use crate::balance::retry::{self, Failure, Fault, Progress};
use crate::clock::Time;
use crate::policy::Slot;

/// How long a backend that says it is full, but not for how long, is left alone.
const COOL_DOWN: Duration = Duration::from_secs(1);

/// A pooled connection that was dead already shows it at once; one that breaks later broke under the request.
const STALE_WITHIN: Duration = Duration::from_secs(1);

impl Proxy {
    /// Whether the present attempt, which failed so, is followed by another. `wait` is what the engine asked for.
    pub(super) fn judge(&self, ctx: &mut Context, failure: Failure, wait: Option<Duration>) -> bool {
        ctx.last_failure = Some(failure);
        let (Some(upstream), Some(attempt), Some(rule)) = (&ctx.upstream, &ctx.attempt, &ctx.retry_rule)
        else {
            return false;
        };
        let (slot, address) = (attempt.charge.slot, attempt.charge.address);
        let is_stale = failure == Failure::StaleConnection;
        match failure.fault() {
            Fault::None if is_stale => ctx.suspects.push((address, slot, failure)),
            Fault::None => {}
            Fault::BackPressure => upstream.cool(slot, failure, wait.unwrap_or(COOL_DOWN)),
            Fault::Suspect => ctx.suspects.push((address, slot, failure)),
            Fault::Certain => upstream.fail(address, slot, failure, false),
        }
        ctx.tried.push(slot);
        let others = upstream.tier(&ctx.tried);
        // A dead connection is no reason to give up the last backend in rotation.
        let again = is_stale && others != Some(Tier::Available);
        let elapsed = self.clock.now().since(ctx.admitted_at);
        let progress = Progress { tries: ctx.tries, elapsed, committed: ctx.committed };
        let retry =
            (others.is_some() || again) && retry::retry(rule, failure, progress, &mut self.budget.lock());
        if retry {
            upstream.retried(failure);
            self.tell_attempt(ctx, Some(failure.name()));
        }
        if retry && again {
            // With the charge it has, lest its place go to another request.
            ctx.admitted = ctx.attempt.take().map(|attempt| attempt.charge);
        }
        ctx.retry = Some(retry);
        retry
    }

    /// A byte of the answer goes out: no other backend can be tried, so what was kept for that is let go. A `good`
    /// answer speaks for its backend, and against those that failed before.
    pub(super) fn commit(&self, ctx: &mut Context, good: bool) {
        ctx.committed = true;
        ctx.body = None;
        let (Some(upstream), Some(attempt)) = (&ctx.upstream, &ctx.attempt) else { return };
        if good {
            upstream.succeed(attempt.charge.slot);
            for (address, slot, failure) in ctx.suspects.drain(..).filter(is_fault) {
                upstream.fail(address, slot, failure, true);
            }
        }
    }

    /// At the end: a fault of the only backend that was tried is held against it; one that a second backend
    /// reproduced is the request's own.
    pub(super) fn blame(&self, ctx: &Context) {
        let Some(upstream) = &ctx.upstream else { return };
        if let [suspect @ (address, slot, failure)] = ctx.suspects[..]
            && is_fault(&suspect)
        {
            upstream.fail(address, slot, failure, false);
        }
    }
}

/// Whether it is held against the backend. A dead connection is not; but if the next try breaks too, the request may
/// have killed both.
fn is_fault((_, _, failure): &(SocketAddr, Slot, Failure)) -> bool {
    failure.fault() == Fault::Suspect
}

/// Ends the attempt; `error_while_proxy` finds the verdict in the context.
pub(super) fn end_attempt<T>(failure: Failure) -> Result<T> {
    Err(Error::explain(ErrorType::new("AttemptFailed"), failure.name()).into_up())
}

/// What an error of the connection says of the attempt; `None` if it is not the backend's.
pub(super) fn classify(e: &Error, ctx: &Context, reused: bool, now: Time) -> Option<Failure> {
    if *e.esource() != ErrorSource::Upstream {
        return None;
    }
    let attempt = ctx.attempt.as_ref()?;
    let at_once = !attempt.header_seen && now.since(attempt.started) < STALE_WITHIN;
    Some(match e.etype() {
        ErrorType::ReadTimedout => Failure::Timeout,
        ErrorType::WriteTimedout | ErrorType::InvalidHTTPHeader => Failure::Closed,
        _ if reused && at_once => Failure::StaleConnection,
        _ => Failure::Closed,
    })
}
