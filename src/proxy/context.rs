//! What one request remembers, from its first byte to its log line.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pingora::http::ResponseHeader;
use tokio::sync::Notify;

use super::access::{Key, Spent};
use super::body::Body;
use super::flights::{Flight, Flights, Shown};
use super::setup::Setup;
use super::tap::Tap;
use super::trace::Trace;
use crate::balance::retry::{self, Failure};
use crate::clock::Time;
use crate::policy::Slot;
use crate::prompt::Digest;
use crate::upstream::{Charge, Live, Upstream};

/// How many requests and connections there are, and whether more are wanted.
#[derive(Clone, Default)]
pub struct InFlight(Arc<Count>);

#[derive(Default)]
struct Count {
    requests: AtomicUsize,
    connections: AtomicUsize,
    stopping: AtomicBool,
    handed_over: AtomicBool,
    /// One of the counts has become zero, or another process serves in our place.
    changed: Notify,
    flights: Flights,
}

impl InFlight {
    /// Requests in flight.
    pub fn count(&self) -> usize {
        self.0.requests.load(Ordering::Acquire)
    }

    /// Open connections of clients.
    pub fn connections(&self) -> usize {
        self.0.connections.load(Ordering::Acquire)
    }

    /// The process has been told to stop: from now on answers say that their connection closes. Pingora's own flag
    /// follows only after the listeners have closed.
    pub fn stop(&self) {
        self.0.stopping.store(true, Ordering::Release);
    }

    /// Another process serves in our place: we stop, but there is no hurry with connections that are idle.
    pub fn hand_over(&self) {
        self.0.handed_over.store(true, Ordering::Release);
        self.stop();
        self.0.changed.notify_waiters();
    }

    /// Whether another process serves in our place.
    pub fn is_handed_over(&self) -> bool {
        self.0.handed_over.load(Ordering::Acquire)
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.0.stopping.load(Ordering::Acquire)
    }

    /// Resolves when there is no request, and, of a process that has handed over, no connection either.
    pub async fn none(&self) {
        self.until(Self::is_none).await;
    }

    /// Resolves when another process serves in our place.
    pub async fn handed_over(&self) {
        self.until(Self::is_handed_over).await;
    }

    async fn until(&self, is_so: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.0.changed.notified();
            tokio::pin!(changed);
            // Registered before it is looked at, so that no change goes unnoticed in between.
            changed.as_mut().enable();
            if is_so(self) {
                return;
            }
            changed.await;
        }
    }

    /// Whether [`InFlight::none`] would resolve at once.
    pub fn is_none(&self) -> bool {
        self.count() == 0 && (!self.is_handed_over() || self.connections() == 0)
    }

    /// Each request as it is at `now`, the oldest first.
    pub fn shown(&self, now: Time) -> Vec<Shown> {
        self.0.flights.shown(now)
    }

    /// A client has connected.
    pub fn connect(&self) -> Connected {
        self.0.connections.fetch_add(1, Ordering::AcqRel);
        Connected(self.0.clone())
    }

    pub(super) fn enter(&self, now: Time) -> Entered {
        self.0.requests.fetch_add(1, Ordering::AcqRel);
        let (flight, seat) = self.0.flights.enter(now);
        Entered { count: self.0.clone(), flight, seat }
    }
}

impl Count {
    fn leave(&self, which: &AtomicUsize) {
        if which.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.changed.notify_waiters();
        }
    }
}

/// One open connection of a client, until dropped.
pub struct Connected(Arc<Count>);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.leave(&self.0.connections);
    }
}

/// One request in flight, until dropped.
pub(super) struct Entered {
    count: Arc<Count>,
    /// What is told of it meanwhile.
    pub(super) flight: Arc<Flight>,
    seat: usize,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.count.flights.leave(self.seat);
        self.count.leave(&self.count.requests);
    }
}

/// The context of one request. It owns every guard, so that dropping it gives everything back, after a panic
/// too.
pub struct Context {
    /// That it is in flight, and how far it has come.
    pub(super) entered: Entered,
    /// What it goes by.
    pub(super) setup: Arc<Setup>,
    pub(super) arrived: Time,
    /// When its body had been read and a backend had room.
    pub(super) admitted_at: Time,
    /// The request's id, from the client or made by us.
    pub(super) id: String,
    /// The trace that it is part of.
    pub(super) trace: Option<Trace>,
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
    /// What its span goes by, if there will be one, until it has been told.
    pub(super) span: Option<u64>,
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
            span: None,
        }
    }
}

impl Context {
    pub(super) fn new(setup: Arc<Setup>, arrived: Time, entered: Entered) -> Self {
        Self {
            entered,
            setup,
            arrived,
            admitted_at: arrived,
            id: String::new(),
            trace: None,
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
