//! The poll: what does the engine say of itself?
//!
//! One task per backend scrapes the engine's metrics at a jittered interval and asks for its models now and
//! then. Readings never rank backends (they are 0.05 to 18 s old when they arrive, and deciding on them herds;
//! research/routing.md s.0): they bound the prefix index, reveal restarts, guard and correct
//! ([`crate::balance::gauge`]), and are shown with their age. A failed poll keeps what was known.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::{AbortHandle, abortable};
use futures::stream::FuturesUnordered;
use pingora::server::ShutdownWatch;

use super::client::Client;
use super::{Live, Upstream};
use crate::engine;
use crate::prompt::BytesPerToken;

/// How often a backend is asked for its models once they are known, and before.
const MODELS_INTERVAL: Duration = Duration::from_secs(10);
const MODELS_RETRY: Duration = Duration::from_secs(1);

/// How often it is looked whether a backend has stalled, for the log alone.
const STALLS_INTERVAL: Duration = Duration::from_secs(1);

/// A poll that is switched off still asks for models, with this patience.
const MODELS_TIMEOUT: Duration = Duration::from_secs(5);

/// The interval is stretched by up to this fraction, so that polls do not march in step. Never shortened:
/// llama.cpp notices that a client has left only when nobody asked it anything for a whole second.
const JITTER: f64 = 0.2;

/// Polls the backends of `upstream` until shutdown: those that there are, as they come and go.
pub(super) async fn run(upstream: &Upstream, shutdown: ShutdownWatch) {
    let mut views = upstream.views.subscribe();
    let mut polls = FuturesUnordered::new();
    let mut polled: HashMap<SocketAddr, (Arc<Live>, AbortHandle)> = HashMap::new();
    loop {
        let live = views.borrow_and_update().live.clone();
        polled.retain(|address, (before, poll)| {
            let stays = live.get(address).is_some_and(|now| Arc::ptr_eq(now, before));
            if !stays {
                poll.abort();
            }
            stays
        });
        for (address, live) in live {
            polled.entry(address).or_insert_with(|| {
                let (shutdown, backend) = (shutdown.clone(), live.clone());
                let (poll, handle) = abortable(async move { poll(upstream, &backend, shutdown).await });
                polls.push(poll);
                (live, handle)
            });
        }
        let changed = async {
            loop {
                tokio::select! {
                    changed = views.changed() => return changed.is_ok(),
                    Some(_ended) = polls.next() => {}
                }
            }
        };
        if !changed.await {
            return;
        }
    }
}

/// Polls one backend until shutdown.
async fn poll(upstream: &Upstream, live: &Live, mut shutdown: ShutdownWatch) {
    let client = Client::new(&upstream.config, upstream.authorization.clone(), upstream.fetcher.clone());
    tokio::select! {
        _ = async {
            futures::join!(metrics(upstream, &client, live), models(upstream, &client, live), stalls(upstream, live))
        } => {}
        _ = shutdown.changed() => {}
    }
}

async fn metrics(upstream: &Upstream, client: &Client, live: &Live) {
    let (Some(poll), Some(path)) = (&upstream.config.poll, upstream.config.poll_path()) else { return };
    let engine = upstream.config.engine;
    let (name, backend) = (&upstream.name, &live.label);
    let mut failing = false;
    let shared = &upstream.shared;
    loop {
        let before = shared.balancer.lock().account(&live.address);
        let error = match client.get(live, path, poll.timeout).await {
            Ok((200, body)) => {
                let reading = engine::read(engine, &String::from_utf8_lossy(&body));
                // The engine's own tokens, so the ratio of an unknown model is as good as any.
                let block_tokens = BytesPerToken::default().block_tokens();
                shared.balancer.lock().observe_reading(
                    &live.address,
                    reading,
                    &before,
                    block_tokens,
                    shared.clock.now(),
                );
                None
            }
            Ok((status, _)) => Some(format!("status {status}")),
            Err(no_answer) => Some(no_answer.to_string()),
        };
        if error.is_some() != failing {
            failing = error.is_some();
            match error {
                Some(error) => {
                    log::warn!("poll failing upstream={name} backend={backend} path={path} error={error:?}")
                }
                None => log::info!("poll working again upstream={name} backend={backend} path={path}"),
            }
        }
        pause(poll.interval).await;
    }
}

async fn models(upstream: &Upstream, client: &Client, live: &Live) {
    if !upstream.catalog.is_discovered() {
        return;
    }
    let timeout = upstream.config.poll.as_ref().map_or(MODELS_TIMEOUT, |poll| poll.timeout);
    loop {
        let interval = match client.get(live, "/v1/models", timeout).await {
            Ok((200, body)) if upstream.catalog.learn(live.address, &body) => {
                upstream.catalog.keep(|address| upstream.view().live.contains_key(address));
                MODELS_INTERVAL
            }
            _ if upstream.catalog.knows(&live.address) => MODELS_INTERVAL,
            _ => MODELS_RETRY,
        };
        pause(interval).await;
    }
}

/// Says when the backend stalls and when it has stopped to. Nothing else would: a stall is a silence.
async fn stalls(upstream: &Upstream, live: &Live) {
    let shared = &upstream.shared;
    let (name, backend) = (&upstream.name, &live.label);
    let mut stalled = false;
    loop {
        pause(STALLS_INTERVAL).await;
        let now = shared.balancer.lock().stalled(&live.address, shared.clock.now());
        if now != stalled {
            stalled = now;
            let silent_for = upstream.config.stall_timeout;
            match stalled {
                true => {
                    log::warn!("backend stalled upstream={name} backend={backend} silent_for={silent_for:?}")
                }
                false => log::info!("backend no longer stalled upstream={name} backend={backend}"),
            }
        }
    }
}

async fn pause(interval: Duration) {
    tokio::time::sleep(interval.mul_f64(1.0 + JITTER * fastrand::f64())).await;
}
