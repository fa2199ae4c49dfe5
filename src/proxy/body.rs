//! The request body: read once, whole, bounded, and kept until no retry can need it.
//!
//! A backend is chosen by what the prompt says, so the body must be here before the choice. Pingora gives a
//! body that was read in `request_filter` to nobody any more, unless its *retry buffer* holds something; then
//! it calls `request_body_filter` exactly once per attempt. That buffer takes 64 KiB and records only what is
//! read after it was switched on. So it is switched on for the last bytes only, and the stub it holds is
//! swapped for the whole body in `request_body_filter`, on every attempt and at any size. Proved for every
//! framing in research/pingora.md s.1; `tests/wires/bodies.rs` keeps it so.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pingora::protocols::http::ServerSession;
use pingora::protocols::http::v1::server::HttpSession as SessionV1;
use pingora::{ErrorType, OrErr};
use prometheus::IntGauge;

use super::reply::Refusal;
use crate::clock::{Clock, Time};
use crate::config::Limits;

/// What Pingora's retry buffer holds.
const RETRY_WINDOW: usize = 64 * 1024;

/// What keeps Pingora's timer for a single read from ringing before ours for the whole body.
const READ_MARGIN: Duration = Duration::from_secs(5);
const A_DAY: Duration = Duration::from_secs(24 * 3600);

/// Room made at first for a body that does not say its length, and at most for one that does.
const FIRST_ROOM: usize = 16 * 1024;
const FIRST_ROOM_LIMIT: usize = 1024 * 1024;

/// The memory that all buffered bodies may take together.
pub(super) struct Room {
    limit: AtomicU64,
    taken: AtomicU64,
    gauge: IntGauge,
}

impl Room {
    pub(super) fn new(limit: u64, gauge: IntGauge) -> Arc<Self> {
        Arc::new(Self { limit: AtomicU64::new(limit), taken: AtomicU64::new(0), gauge })
    }

    /// Changes its size; what is taken stays.
    pub(super) fn resize(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
    }
}

/// A part of the [`Room`], given back when dropped.
struct Reservation {
    room: Arc<Room>,
    bytes: u64,
}

impl Reservation {
    /// Grows to `bytes`; false if there is no room.
    fn grow(&mut self, bytes: u64) -> bool {
        let more = bytes.saturating_sub(self.bytes);
        let limit = self.room.limit.load(Ordering::Relaxed);
        let fits = |taken: u64| taken.checked_add(more).filter(|sum| *sum <= limit);
        if self.room.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_err() {
            return false;
        }
        self.room.gauge.add(more as i64);
        self.bytes += more;
        true
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.room.taken.fetch_sub(self.bytes, Ordering::Relaxed);
        self.room.gauge.sub(self.bytes as i64);
    }
}

/// A whole request body, and its place in the [`Room`].
pub(super) struct Body {
    /// The bytes, shared by all attempts.
    pub(super) bytes: Bytes,
    _reservation: Reservation,
}

/// Why a body could not be read.
pub(super) enum Unread {
    /// The client is told why.
    Refused(Refusal),
    /// The connection broke, or its framing did.
    Failed(pingora::BError),
}

impl From<pingora::BError> for Unread {
    fn from(e: pingora::BError) -> Self {
        // So the front door says that chunks are not chunks.
        let broken = e.root_cause().downcast_ref::<io::Error>().map(io::Error::kind);
        if broken == Some(io::ErrorKind::InvalidData) {
            Self::Refused(Refusal::bad_request())
        } else {
            Self::Failed(e)
        }
    }
}

/// How long a body may still take: `body_timeout` since it began, and what its bytes take at `body_rate`.
struct Pace<'a> {
    limits: &'a Limits,
    clock: Clock,
    began: Time,
}

impl Pace<'_> {
    fn left(&self, received: usize) -> Duration {
        let for_bytes = Duration::from_secs_f64(received as f64 / self.limits.body_rate as f64);
        (self.limits.body_timeout + for_bytes).saturating_sub(self.clock.now().since(self.began))
    }
}

/// Longer than any body may take, and not longer than a day.
pub(super) fn longest(limits: &Limits) -> Duration {
    let for_bytes = Duration::from_secs(limits.body / limits.body_rate);
    limits.body_timeout.saturating_add(for_bytes).min(A_DAY) + READ_MARGIN
}

/// Reads the whole body, within the limits; `None` if there is none.
pub(super) async fn read(
    ds: &mut ServerSession,
    limits: &Limits,
    clock: Clock,
    room: &Arc<Room>,
) -> Result<Option<Body>, Unread> {
    if ds.is_body_empty() {
        return Ok(None);
    }
    let limit = limits.body;
    let pace = Pace { limits, clock, began: clock.now() };
    let declared = declared_length(ds);
    let mut reservation = Reservation { room: room.clone(), bytes: 0 };
    // Refused by what is declared, but room is taken only by what has come.
    if declared.is_some_and(|length| length > limit) {
        return Err(Unread::Refused(Refusal::body_too_large(limit)));
    }
    send_continue(ds).await?;

    let declared = declared.map(|n| n as usize);
    let mut buffer = BytesMut::with_capacity(declared.unwrap_or(FIRST_ROOM).min(FIRST_ROOM_LIMIT));
    let mut buffering = false;
    loop {
        // One read never takes more than what is left or 64 KiB, so a declared body ends within the window.
        if !buffering && declared.is_none_or(|n| n.saturating_sub(buffer.len()) <= RETRY_WINDOW) {
            ds.enable_retry_buffering();
            buffering = true;
        }
        let reading = read_chunk(ds, declared.is_none());
        let Ok(chunk) = tokio::time::timeout(pace.left(buffer.len()), reading).await else {
            return Err(Unread::Refused(Refusal::body_timeout()));
        };
        let Some(chunk) = chunk? else { break };
        check((buffer.len() + chunk.len()) as u64, limit, &mut reservation)?;
        buffer.extend_from_slice(&chunk);
        if ds.is_body_done() {
            break;
        }
    }
    if buffer.is_empty() {
        return Ok(None);
    }
    if ds.get_retry_buffer().is_none() {
        restock(ds).await?;
    }
    Ok(Some(Body { bytes: buffer.freeze(), _reservation: reservation }))
}

fn declared_length(ds: &ServerSession) -> Option<u64> {
    ds.get_header(http::header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn check(length: u64, limit: u64, reservation: &mut Reservation) -> Result<(), Unread> {
    if length > limit {
        return Err(Unread::Refused(Refusal::body_too_large(limit)));
    }
    if !reservation.grow(length) {
        return Err(Unread::Refused(Refusal::buffers_full()));
    }
    Ok(())
}

/// Asks a client that waits for it to go on. Pingora's call switches keep-alive off, for no reason that holds
/// here.
async fn send_continue(ds: &mut ServerSession) -> pingora::Result<()> {
    let expects = |value: &http::HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"100-continue");
    // HTTP/1.0 knows no interim answers (RFC 9110 s.10.1.1).
    let understands = ds.req_header().version != http::Version::HTTP_10;
    if understands && ds.get_header(http::header::EXPECT).is_some_and(expects) {
        let keepalive = ds.get_keepalive();
        ds.write_continue_response().await?;
        ds.set_keepalive(keepalive);
    }
    Ok(())
}

async fn read_chunk(ds: &mut ServerSession, undeclared: bool) -> pingora::Result<Option<Bytes>> {
    match ds {
        // HTTP/2 without a length: once the retry buffer holds a stub, read past it, lest it overflow.
        ServerSession::H2(h2) if undeclared && h2.get_retry_buffer().is_some() => {
            let chunk = poll_fn(|cx| h2.poll_read_body_bytes(cx)).await;
            chunk
                .transpose()
                .or_err(ErrorType::ReadError, "reading an HTTP/2 body")
                .map_err(|e| e.into_down())
        }
        ds => ds.read_request_body().await.map_err(|e| e.into_down()),
    }
}

/// The retry buffer overflowed, as it does for HTTP/1 chunked bodies over 64 KiB: give it a stub to hold, by
/// letting the session read a stand-in request of one byte. Nothing else is lost: what a client sends after
/// its body waits at the front door.
async fn restock(ds: &mut ServerSession) -> Result<(), Unread> {
    let ServerSession::H1(h1) = ds else {
        return Err(Unread::Refused(Refusal::length_required()));
    };
    let h1: &mut SessionV1 = h1;
    let (header, keepalive) = (h1.req_header().clone(), h1.get_keepalive_timeout());
    let stand_in = &b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"[..];
    h1.set_pipelined_prefix(BytesMut::from(stand_in));
    h1.read_request().await?;
    h1.enable_retry_buffering();
    h1.read_body_bytes().await?;
    *h1.req_header_mut() = header;
    h1.set_server_keepalive(keepalive);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_take_room_together_and_give_it_back() {
        let gauge = IntGauge::new("bytes", "bytes").unwrap();
        let room = Room::new(100, gauge.clone());
        let mut first = Reservation { room: room.clone(), bytes: 0 };
        let mut second = Reservation { room: room.clone(), bytes: 0 };
        assert!(first.grow(60) && first.grow(60) && first.grow(70));
        assert!(!second.grow(31));
        assert!(second.grow(30));
        assert_eq!(gauge.get(), 100);
        drop(first);
        assert!(second.grow(100));
        drop(second);
        assert_eq!(gauge.get(), 0);
    }
}
