//! `/status`, `/choices`, `/requests`: how the backends are, where requests went, and which are under way.
//!
//! JSON for `plimsoll status`, `plimsoll top`, the dashboard and scripts. Counters count since the start of the
//! process: whoever wants a rate takes differences.

use serde_json::{Value, json};

use super::{Admin, Reloaded};
use crate::balance::State;
use crate::observe::metrics::BackendMetrics;
use crate::proxy::{Chosen, Shown};
use crate::upstream::Upstream;

impl Admin {
    pub(super) fn status(&self) -> Value {
        let upstreams: serde_json::Map<_, _> =
            self.proxy.upstreams().iter().map(|u| (u.name.clone(), upstream(u))).collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "uptime_seconds": self.proxy.uptime().as_secs_f64(),
            "in_flight": self.proxy.in_flight().count(),
            "reload": self.process.last_reload().as_ref().map(reloaded),
            "upstreams": upstreams,
        })
    }

    pub(super) fn choices(&self, limit: usize) -> Value {
        let choices: Vec<_> = self.proxy.choices(limit).iter().map(choice).collect();
        json!({ "choices": choices })
    }

    pub(super) fn requests(&self) -> Value {
        let requests: Vec<_> = self.proxy.requests().iter().map(request).collect();
        json!({ "requests": requests })
    }
}

/// What came of a reload.
pub(super) fn reloaded(last: &Reloaded) -> Value {
    json!({ "ok": last.ok, "said": last.said, "ago_seconds": last.ago.as_secs_f64() })
}

fn upstream(upstream: &Upstream) -> Value {
    let backends: Vec<_> = upstream.states().iter().map(|state| backend(upstream, state)).collect();
    json!({ "policy": upstream.config.policy.name(), "queued": upstream.queued(), "backends": backends })
}

fn backend(upstream: &Upstream, state: &State) -> Value {
    let reading = state.reading.map(|(reading, age)| {
        json!({
            "running": reading.running,
            "waiting": reading.waiting,
            "kv_usage": reading.kv_usage,
            "age_seconds": age.as_secs_f64(),
        })
    });
    let mut shown = json!({
        "address": state.address.to_string(),
        "weight": state.weight,
        "state": state.standing.name(),
        "reason": state.reason,
        "since_seconds": state.for_span.map(|span| span.as_secs_f64()),
        "draining": state.draining,
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
    });
    // One that leaves at this moment has no counters any more.
    if let Some(live) = upstream.live(&state.address) {
        count(&mut shown, &live.metrics);
    }
    shown
}

fn count(shown: &mut Value, metrics: &BackendMetrics) {
    let outcomes: serde_json::Map<_, _> =
        metrics.outcomes().map(|(outcome, count)| (outcome.name().to_owned(), count.into())).collect();
    let ttft = &metrics.ttft;
    shown["requests"] = outcomes.into();
    shown["ttft_seconds"] = json!({ "count": ttft.get_sample_count(), "sum": ttft.get_sample_sum() });
    shown["tokens"] = json!({
        "prompt": metrics.prompt_tokens.get(),
        "completion": metrics.completion_tokens.get(),
        "cached": metrics.cached_tokens.get(),
    });
}

fn choice(chosen: &Chosen) -> Value {
    json!({
        "ago_seconds": chosen.age.as_secs_f64(),
        "id": chosen.id,
        "upstream": chosen.upstream,
        "backend": chosen.backend,
        "reason": chosen.reason.name(),
        "model": chosen.model,
        "prompt_tokens": chosen.prompt_tokens,
        "matched_tokens": chosen.matched_tokens,
    })
}

fn request(shown: &Shown) -> Value {
    json!({
        "id": shown.id,
        "age_seconds": shown.age.as_secs_f64(),
        "stage": shown.stage.name(),
        "upstream": shown.upstream,
        "backend": shown.backend,
        "model": shown.model,
        "key": shown.key,
        "prompt_tokens": shown.prompt_tokens,
        "reads": shown.reads,
        "attempts": shown.attempts,
    })
}
