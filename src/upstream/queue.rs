//! The queue of requests for which every backend is full.
//!
//! First come, first served, bounded in length; whoever waits too long, or whose client leaves, is dropped from it. A settled charge wakes
//! the first in line. New arrivals stand behind those who wait.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use prometheus::IntGauge;
use tokio::sync::Notify;

/// Why a wait was in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The queue is at its length.
    Full,
    /// The time is up.
    Late,
}

/// The queue of one upstream.
pub(super) struct Queue {
    length: usize,
    timeout: Duration,
    waiting: AtomicUsize,
    room: Notify,
    gauge: IntGauge,
}

impl Queue {
    /// A queue of at most `length` requests that each wait at most `timeout`.
    pub(super) fn new(length: usize, timeout: Duration, gauge: IntGauge) -> Self {
        Self { length, timeout, waiting: AtomicUsize::new(0), room: Notify::new(), gauge }
    }

    /// Whether nobody waits, so that an arrival may try at once.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) == 0
    }

    /// Waits until `attempt` succeeds, trying again whenever there may be room.
    pub(super) async fn wait<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> Result<T, Refusal> {
        let _place = Place::take(self)?;
        let patience = tokio::time::sleep(self.timeout);
        tokio::pin!(patience);
        loop {
            tokio::select! {
                () = self.room.notified() => {}
                () = &mut patience => return Err(Refusal::Late),
            }
            if let Some(value) = attempt() {
                return Ok(value);
            }
        }
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
    fn take(queue: &'a Queue) -> Result<Self, Refusal> {
        let taken = queue
            .waiting
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < queue.length).then_some(n + 1))
            .map_err(|_| Refusal::Full)?;
        queue.gauge.set(taken as i64 + 1);
        // Room made between the caller's attempt and this moment woke nobody: try once more at once.
        queue.room.notify_one();
        Ok(Self(queue))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let before = self.0.waiting.fetch_sub(1, Ordering::Relaxed);
        self.0.gauge.set(before as i64 - 1);
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
