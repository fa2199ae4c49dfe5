//! The queue of requests for which every backend is full.
//!
//! First come, first served, bounded in length; whoever waits too long, or whose client leaves, is dropped
//! from it. A settled charge wakes the first in line. New arrivals stand behind those who wait.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::RwLock;
use prometheus::IntGauge;
use tokio::sync::{Mutex, Notify};

/// Why a wait was in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The queue is at its length.
    Full,
    /// The time is up.
    Late,
    /// There is nobody to wait for: every backend is being drained.
    Drained,
}

/// How many may wait, and how long.
#[derive(Clone, Copy)]
struct Bounds {
    length: usize,
    timeout: Duration,
}

/// The queue of one upstream.
pub(super) struct Queue {
    bounds: RwLock<Bounds>,
    waiting: AtomicUsize,
    /// Held by the first in line; tokio's mutex is fair, so it is handed on in the order of arrival.
    turn: Mutex<()>,
    room: Notify,
    gauge: IntGauge,
}

impl Queue {
    /// A queue of at most `length` requests that each wait at most `timeout`.
    pub(super) fn new(length: usize, timeout: Duration, gauge: IntGauge) -> Self {
        let bounds = RwLock::new(Bounds { length, timeout });
        let (waiting, turn, room) = (AtomicUsize::new(0), Mutex::new(()), Notify::new());
        Self { bounds, waiting, turn, room, gauge }
    }

    /// Changes its bounds, for those who come from now on.
    pub(super) fn configure(&self, length: usize, timeout: Duration) {
        *self.bounds.write() = Bounds { length, timeout };
    }

    /// Whether nobody waits, so that an arrival may try at once.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Waits until `attempt` succeeds: tries when it is this request's turn, and whenever there may be room.
    pub(super) async fn wait<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> Result<T, Refusal> {
        let Bounds { length, timeout } = *self.bounds.read();
        let _place = Place::take(self, length)?;
        let served = async {
            let _turn = self.turn.lock().await;
            loop {
                // Room made after this attempt leaves a permit, so it cannot be missed: only one request waits
                // for it at a time.
                if let Some(value) = attempt() {
                    return value;
                }
                self.room.notified().await;
            }
        };
        tokio::time::timeout(timeout, served).await.map_err(|_| Refusal::Late)
    }

    /// A request has ended: there may be room for another.
    pub(super) fn wake(&self) {
        if !self.is_empty() {
            self.room.notify_one();
        }
    }
}

/// A place in the queue, given up when dropped.
struct Place<'a>(&'a Queue);

impl<'a> Place<'a> {
    fn take(queue: &'a Queue, length: usize) -> Result<Self, Refusal> {
        let one_more = |n| (n < length).then_some(n + 1);
        let taken = queue.waiting.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more);
        taken.map_err(|_| Refusal::Full)?;
        queue.gauge.inc();
        Ok(Self(queue))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
        self.0.gauge.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(length: usize, timeout: Duration) -> Queue {
        Queue::new(length, timeout, IntGauge::new("queued", "queued").unwrap())
    }

    #[tokio::test]
    async fn a_waiting_request_is_served_when_room_is_made() {
        let queue = queue(2, Duration::from_secs(10));
        let room = AtomicUsize::new(0);
        let attempt = || room.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).ok();
        let (first, second, ()) = tokio::join!(queue.wait(attempt), queue.wait(attempt), async {
            for _ in 0..2 {
                room.fetch_add(1, Ordering::SeqCst);
                queue.wake();
                tokio::task::yield_now().await;
            }
        });
        assert!(first.is_ok() && second.is_ok());
        assert!(queue.is_empty());
        assert_eq!(queue.gauge.get(), 0);
    }

    #[tokio::test]
    async fn requests_are_served_in_the_order_of_their_arrival_whoever_arrives_meanwhile() {
        let queue = queue(10, Duration::from_secs(10));
        let room = AtomicUsize::new(0);
        let served = std::cell::RefCell::new(Vec::new());
        let request = async |name: u32| {
            let attempt = || room.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).ok();
            queue.wait(attempt).await.unwrap();
            served.borrow_mut().push(name);
        };
        let opener = async {
            for _ in 0..4 {
                tokio::task::yield_now().await;
                room.fetch_add(1, Ordering::SeqCst);
                queue.wake();
            }
        };
        tokio::join!(request(1), request(2), request(3), request(4), opener);
        assert_eq!(*served.borrow(), [1, 2, 3, 4]);
    }

    #[tokio::test]
    async fn room_made_just_before_waiting_is_not_missed() {
        let queue = queue(1, Duration::from_secs(10));
        assert_eq!(queue.wait(|| Some(1)).await, Ok(1));
    }

    #[tokio::test]
    async fn a_full_queue_refuses_at_once_and_a_late_request_is_let_go() {
        let queue = queue(1, Duration::from_millis(20));
        let never = || None::<()>;
        let (first, second) = tokio::join!(queue.wait(never), queue.wait(never));
        assert_eq!((first, second), (Err(Refusal::Late), Err(Refusal::Full)));
        assert!(queue.is_empty());
    }
}
