//! The requests in flight and the last choices, for whoever asks how it goes.
//!
//! Each request has a [`Flight`], which is listed when it comes and struck off when it goes: two short locks. What is
//! learned in between is written where only this request writes, so a reader that takes its time is in nobody's way,
//! and a stream's event costs a counter. Names and numbers are kept; bodies, prompts and credentials never are.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::access::Key;
use crate::clock::Time;
use crate::policy::Reason;
use crate::upstream::{Charge, Live, Upstream};

/// How many choices are remembered.
pub const CHOICES_LIMIT: usize = 256;

/// The name of a model is shown up to so many characters: a client may send any.
const MODEL_LIMIT: usize = 128;

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It is being read.
    Reading,
    /// Every backend is full, and it waits.
    Queued,
    /// It was sent, and no content has come back.
    Waiting,
    /// Its answer is under way.
    Streaming,
}

impl Stage {
    /// All of them, in their order.
    pub const ALL: [Self; 4] = [Self::Reading, Self::Queued, Self::Waiting, Self::Streaming];

    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reading => "reading",
            Self::Queued => "queued",
            Self::Waiting => "waiting",
            Self::Streaming => "streaming",
        }
    }
}

/// A request in flight, as it is shown.
#[derive(Clone, Debug)]
pub struct Shown {
    /// The request's id.
    pub id: String,
    /// How long ago it came.
    pub age: Duration,
    /// How far it is.
    pub stage: Stage,
    /// The upstream it was routed to.
    pub upstream: Option<String>,
    /// The backend it was sent to last.
    pub backend: Option<String>,
    /// The model it asks for.
    pub model: Option<String>,
    /// The name of the key that it showed.
    pub key: Option<String>,
    /// Estimated prompt tokens.
    pub prompt_tokens: u64,
    /// Reads of its answer so far.
    pub reads: u64,
    /// Attempts so far.
    pub attempts: u32,
}

/// A choice of a backend, as it is shown.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// How long ago it was made.
    pub age: Duration,
    /// The request's id.
    pub id: String,
    /// The upstream.
    pub upstream: String,
    /// The backend that was chosen.
    pub backend: String,
    /// Why.
    pub reason: Reason,
    /// The model that was asked for.
    pub model: Option<String>,
    /// Estimated prompt tokens.
    pub prompt_tokens: u64,
    /// Of those, tokens that the backend had probably cached.
    pub matched_tokens: u64,
}

/// What is known of one request while it is in flight.
pub(super) struct Flight {
    arrived: Time,
    stage: AtomicU8,
    attempts: AtomicU32,
    reads: AtomicU64,
    facts: Mutex<Facts>,
}

#[derive(Default)]
struct Facts {
    id: String,
    key: Option<Arc<Key>>,
    upstream: Option<Arc<Upstream>>,
    model: Option<String>,
    prompt_tokens: u64,
    backend: Option<Arc<Live>>,
}

impl Flight {
    fn new(arrived: Time) -> Self {
        Self {
            arrived,
            stage: AtomicU8::new(Stage::Reading as u8),
            attempts: AtomicU32::new(0),
            reads: AtomicU64::new(0),
            facts: Mutex::default(),
        }
    }

    /// The request has this id.
    pub(super) fn identify(&self, id: &str) {
        id.clone_into(&mut self.facts.lock().id);
    }

    /// It showed this key.
    pub(super) fn show_key(&self, key: &Arc<Key>) {
        self.facts.lock().key = Some(key.clone());
    }

    /// It goes to this upstream, and waits for room there if it has to.
    pub(super) fn route(&self, upstream: &Arc<Upstream>, model: Option<&str>, prompt_tokens: u64) {
        let model = model.map(|model| model.chars().take(MODEL_LIMIT).collect());
        let mut facts = self.facts.lock();
        (facts.upstream, facts.model, facts.prompt_tokens) = (Some(upstream.clone()), model, prompt_tokens);
        drop(facts);
        self.reach(Stage::Queued);
    }

    /// It is sent to this backend.
    pub(super) fn send(&self, backend: &Arc<Live>) {
        self.facts.lock().backend = Some(backend.clone());
        self.attempts.fetch_add(1, Ordering::Relaxed);
        self.reads.store(0, Ordering::Relaxed);
        self.reach(Stage::Waiting);
    }

    /// Something of its answer was read. Only one task ever says so: no other's count can be lost.
    pub(super) fn read(&self) {
        self.reads.store(self.reads() + 1, Ordering::Relaxed);
    }

    /// The first content has come.
    pub(super) fn answer(&self) {
        self.reach(Stage::Streaming);
    }

    /// Reads of the present attempt's answer so far.
    pub(super) fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    fn reach(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
    }

    fn shown(&self, now: Time) -> Shown {
        let stage = usize::from(self.stage.load(Ordering::Relaxed));
        let facts = self.facts.lock();
        Shown {
            id: facts.id.clone(),
            age: now.since(self.arrived),
            stage: Stage::ALL.get(stage).copied().unwrap_or(Stage::Reading),
            upstream: facts.upstream.as_ref().map(|upstream| upstream.name.clone()),
            backend: facts.backend.as_ref().map(|backend| backend.label.clone()),
            model: facts.model.clone(),
            key: facts.key.as_ref().map(|key| key.name.clone()),
            prompt_tokens: facts.prompt_tokens,
            reads: self.reads(),
            attempts: self.attempts.load(Ordering::Relaxed),
        }
    }
}

/// All of them. A request's seat is its place in the list, so that it leaves without being looked for.
#[derive(Default)]
pub(super) struct Flights {
    seats: Mutex<Seats>,
}

#[derive(Default)]
struct Seats {
    taken: Vec<Option<Arc<Flight>>>,
    vacant: Vec<usize>,
}

impl Flights {
    /// A request has come; its seat.
    pub(super) fn enter(&self, arrived: Time) -> (Arc<Flight>, usize) {
        let flight = Arc::new(Flight::new(arrived));
        let mut seats = self.seats.lock();
        let Seats { taken, vacant } = &mut *seats;
        let seat = vacant.pop().unwrap_or_else(|| {
            taken.push(None);
            taken.len() - 1
        });
        taken[seat] = Some(flight.clone());
        (flight, seat)
    }

    /// The request with that seat has gone.
    pub(super) fn leave(&self, seat: usize) {
        let mut seats = self.seats.lock();
        // Dropped behind the lock, with all it holds.
        let _gone = seats.taken[seat].take();
        seats.vacant.push(seat);
        drop(seats);
    }

    /// The oldest first.
    pub(super) fn shown(&self, now: Time) -> Vec<Shown> {
        let flights: Vec<_> = self.seats.lock().taken.iter().flatten().cloned().collect();
        let mut shown: Vec<_> = flights.iter().map(|flight| flight.shown(now)).collect();
        shown.sort_by_key(|shown| std::cmp::Reverse(shown.age));
        shown
    }
}

/// The last choices of a backend. A choice refers to its request and its backend, so none is copied to remember it.
#[derive(Default)]
pub(super) struct Choices {
    last: Mutex<VecDeque<Choice>>,
}

#[derive(Clone)]
struct Choice {
    at: Time,
    flight: Arc<Flight>,
    backend: Arc<Live>,
    reason: Reason,
    matched_tokens: u64,
}

impl Choices {
    /// A backend was chosen for `flight`, and `charge`d.
    pub(super) fn add(&self, flight: &Arc<Flight>, backend: &Arc<Live>, charge: &Charge, at: Time) {
        let Charge { reason, matched_tokens, .. } = *charge;
        let choice = Choice { at, flight: flight.clone(), backend: backend.clone(), reason, matched_tokens };
        let mut last = self.last.lock();
        let forgotten = if last.len() >= CHOICES_LIMIT { last.pop_front() } else { None };
        last.push_back(choice);
        drop(last);
        // What is forgotten may be the last of its request.
        drop(forgotten);
    }

    /// The last `limit` of them, newest first.
    pub(super) fn shown(&self, limit: usize, now: Time) -> Vec<Chosen> {
        // Requests wait for this lock: nothing is made of a choice under it.
        let last: Vec<Choice> = self.last.lock().iter().rev().take(limit).cloned().collect();
        last.iter().map(|choice| choice.shown(now)).collect()
    }
}

impl Choice {
    fn shown(&self, now: Time) -> Chosen {
        let facts = self.flight.facts.lock();
        Chosen {
            age: now.since(self.at),
            id: facts.id.clone(),
            upstream: facts.upstream.as_ref().map(|upstream| upstream.name.clone()).unwrap_or_default(),
            backend: self.backend.label.clone(),
            reason: self.reason,
            model: facts.model.clone(),
            prompt_tokens: facts.prompt_tokens,
            matched_tokens: self.matched_tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_gone_is_listed_no_more_and_leaves_room() {
        let (flights, now) = (Flights::default(), Time::from_nanos(9));
        let (first, seat) = flights.enter(Time::from_nanos(1));
        let (second, _) = flights.enter(Time::from_nanos(2));
        first.identify("a");
        second.identify("b");
        let ids = |flights: &Flights| flights.shown(now).into_iter().map(|f| f.id).collect::<Vec<_>>();
        assert_eq!(ids(&flights), ["a", "b"]);
        flights.leave(seat);
        assert_eq!(ids(&flights), ["b"]);
        let (third, again) = flights.enter(Time::from_nanos(3));
        third.identify("c");
        assert_eq!((ids(&flights), again), (vec!["b".to_owned(), "c".to_owned()], seat));
        assert_eq!(flights.seats.lock().taken.len(), 2);
    }

    #[test]
    fn a_request_is_shown_as_far_as_it_has_come() {
        let flight = Flight::new(Time::ZERO);
        assert_eq!(flight.shown(Time::ZERO).stage, Stage::Reading);
        for stage in Stage::ALL {
            flight.reach(stage);
            assert_eq!(flight.shown(Time::ZERO).stage, stage);
        }
        flight.read();
        flight.read();
        assert_eq!(flight.shown(Time::from_nanos(7)).reads, 2);
        assert_eq!(flight.shown(Time::from_nanos(7)).age, Duration::from_nanos(7));
    }
}
