//! What one request remembers, from its first byte to its log line.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pingora::http::ResponseHeader;
use tokio::sync::Notify;

use super::access::{Key, Spent};
use super::body::Body;
use super::setup::Setup;
use super::tap::Tap;
use crate::balance::retry::{self, Failure};
use crate::clock::Time;
use crate::policy::Slot;
use crate::prompt::Digest;
use crate::upstream::{Charge, Live, Upstream};

/// How many requests are in flight, and whether more are wanted.
#[derive(Clone, Default)]
pub struct InFlight(Arc<Count>);

#[derive(Default)]
struct Count {
    requests: AtomicUsize,
    stopping: AtomicBool,
    none: Notify,
}

impl InFlight {
    /// Requests in flight.
    pub fn count(&self) -> usize {
        self.0.requests.load(Ordering::Acquire)
    }

    /// The process has been told to stop: from now on answers say that their connection closes. Pingora's own flag
    /// follows only after the listeners have closed.
    pub fn stop(&self) {
        self.0.stopping.store(true, Ordering::Release);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.0.stopping.load(Ordering::Acquire)
    }

    /// Resolves when there is none.
    pub async fn none(&self) {
        loop {
            let changed = self.0.none.notified();
            tokio::pin!(changed);
            // Registered before the count is read, so that the last request cannot end unnoticed in between.
            changed.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            changed.await;
        }
    }

    pub(super) fn enter(&self) -> Entered {
        self.0.requests.fetch_add(1, Ordering::AcqRel);
        Entered(self.0.clone())
    }
}

/// One request in flight, until dropped.
pub(super) struct Entered(Arc<Count>);

impl Drop for Entered {
    fn drop(&mut self) {
        if self.0.requests.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.none.notify_waiters();
        }
    }
}

/// The context of one request. It owns every guard, so that dropping it gives everything back, after a panic
/// too.
pub struct Context {
    _in_flight: Entered,
    /// What it goes by.
    pub(super) setup: Arc<Setup>,
    pub(super) arrived: Time,
    /// When its body had been read and a backend had room.
    pub(super) admitted_at: Time,
    /// The request's id, from the client or made by us.
    pub(super) id: String,
    /// Who asked, as far as we believe those in between.
    pub(super) client: Option<IpAddr>,
    /// The key that was shown, where keys are asked for.
    pub(super) key: Option<Arc<Key>>,
    /// What it was charged.
    pub(super) spent: Option<Spent>,
    pub(super) body: Option<Body>,
    pub(super) body_bytes: usize,
    pub(super) digest: Option<Digest>,
    /// From a session header.
    pub(super) session: Option<u64>,
    pub(super) prompt_tokens: u64,
    pub(super) upstream: Option<Arc<Upstream>>,
    /// When another backend is tried: the route's own rule, or the upstream's.
    pub(super) retry_rule: Option<Arc<retry::Rule>>,
    /// Charged when the request was admitted, for the first attempt.
    pub(super) admitted: Option<Charge>,
    pub(super) attempt: Option<Attempt>,
    /// Attempts so far.
    pub(super) attempts: u32,
    /// Of those, attempts that may have reached an engine: all that had a connection.
    pub(super) tries: u32,
    /// Backends not to be tried again.
    pub(super) tried: Vec<Slot>,
    /// Faults that are held against a backend only if another one answers.
    pub(super) suspects: Vec<(SocketAddr, Slot, Failure)>,
    /// The verdict on an attempt that a hook of ours ended: whether another one follows.
    pub(super) retry: Option<bool>,
    pub(super) last_failure: Option<Failure>,
    /// What Pingora said of it.
    pub(super) detail: Option<String>,
    /// The code of our own refusal.
    pub(super) refused: Option<&'static str>,
    /// We answered without an upstream.
    pub(super) local: bool,
    /// A byte of an answer has gone downstream.
    pub(super) committed: bool,
    pub(super) ttft: Option<std::time::Duration>,
}

/// One try on one backend.
pub(super) struct Attempt {
    pub(super) charge: Charge,
    pub(super) live: Arc<Live>,
    pub(super) started: Time,
    /// Close the connection after this request: it has had its share, or is kept for nobody.
    pub(super) close_after: bool,
    /// The engine's header has come.
    pub(super) header_seen: bool,
    pub(super) status: u16,
    pub(super) tap: Tap,
    /// A stream's header and first bytes, until its first event has been looked at.
    pub(super) held: Option<(Box<ResponseHeader>, Vec<u8>)>,
    pub(super) last_read: Option<Time>,
    /// Reads of the answer so far.
    pub(super) reads: u64,
}

impl Attempt {
    pub(super) fn new(charge: Charge, live: Arc<Live>, started: Time) -> Self {
        Self {
            charge,
            live,
            started,
            close_after: false,
            header_seen: false,
            status: 0,
            tap: Tap::new(false),
            held: None,
            last_read: None,
            reads: 0,
        }
    }
}

impl Context {
    pub(super) fn new(setup: Arc<Setup>, arrived: Time, in_flight: Entered) -> Self {
        Self {
            _in_flight: in_flight,
            setup,
            arrived,
            admitted_at: arrived,
            id: String::new(),
            client: None,
            key: None,
            spent: None,
            body: None,
            body_bytes: 0,
            digest: None,
            session: None,
            prompt_tokens: 0,
            upstream: None,
            retry_rule: None,
            admitted: None,
            attempt: None,
            attempts: 0,
            tries: 0,
            tried: Vec::new(),
            suspects: Vec::new(),
            retry: None,
            last_failure: None,
            detail: None,
            refused: None,
            local: false,
            committed: false,
            ttft: None,
        }
    }
}
