//! The frames of an HTTP/2 connection that cost us work and the client nothing, counted as they pass.
//!
//! SETTINGS and PING have to be answered, RST_STREAM throws work away (rapid reset, CVE-2023-44487),
//! PRIORITY, CONTINUATION, unknown and empty DATA frames are just looked at. Each takes one from a budget, of
//! which a tenth comes back every second; at zero the connection ends. A client that cancels all its streams
//! now and then stays well within it. WINDOW_UPDATE is free: a client sends one for nearly every event that
//! it is sent.

use prometheus::IntCounter;

use super::chunks::Malformed;
use crate::clock::{Clock, Time};

/// What comes before the first frame (RFC 9113 s.3.4).
const PREFACE_LENGTH: u64 = 24;
const HEADER_LENGTH: usize = 9;

/// Counts frames.
#[derive(Debug)]
pub struct Frames {
    /// Bytes up to the next frame.
    ahead: u64,
    /// The part of its header that has come.
    header: [u8; HEADER_LENGTH],
    known: usize,
    limit: u32,
    budget: f64,
    filled: Time,
    clock: Clock,
    floods: IntCounter,
}

impl Frames {
    /// Nothing of the connection has come yet; `floods` counts connections that go beyond `limit`.
    pub fn new(limit: u32, clock: Clock, floods: IntCounter) -> Self {
        Self {
            ahead: PREFACE_LENGTH,
            header: [0; HEADER_LENGTH],
            known: 0,
            limit,
            budget: f64::from(limit),
            filled: clock.now(),
            clock,
            floods,
        }
    }

    /// Follows the connection through `bytes`, which it takes all, unless they are too much of nothing.
    ///
    /// # Errors
    /// The budget is spent.
    pub fn follow(&mut self, mut bytes: &[u8]) -> Result<usize, Malformed> {
        let all = bytes.len();
        while !bytes.is_empty() {
            if self.ahead > 0 {
                let here = bytes.len().min(usize::try_from(self.ahead).unwrap_or(usize::MAX));
                self.ahead -= here as u64;
                bytes = &bytes[here..];
                continue;
            }
            let here = bytes.len().min(HEADER_LENGTH - self.known);
            self.header[self.known..self.known + here].copy_from_slice(&bytes[..here]);
            self.known += here;
            bytes = &bytes[here..];
            if self.known == HEADER_LENGTH {
                self.known = 0;
                self.begin()?;
            }
        }
        Ok(all)
    }

    /// A frame's header is there.
    fn begin(&mut self) -> Result<(), Malformed> {
        let [high, middle, low, kind, flags, ..] = self.header;
        self.ahead = u64::from(u32::from_be_bytes([0, high, middle, low]));
        // DATA, HEADERS, PUSH_PROMISE, GOAWAY, WINDOW_UPDATE; the answers to our own SETTINGS and PING.
        let is_free = match kind {
            0 => self.ahead > 0 || flags & 1 == 1,
            1 | 5 | 7 | 8 => true,
            4 | 6 => flags & 1 == 1,
            _ => false,
        };
        if is_free {
            return Ok(());
        }
        let now = self.clock.now();
        let limit = f64::from(self.limit);
        let back = now.since(self.filled).as_secs_f64() * limit / 10.0;
        (self.budget, self.filled) = ((self.budget + back).min(limit) - 1.0, now);
        if self.budget >= 0.0 {
            return Ok(());
        }
        self.floods.inc();
        Err(Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(limit: u32) -> Frames {
        Frames::new(limit, Clock::start(), IntCounter::new("floods", "floods").unwrap())
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let head = [0, 0, payload.len() as u8, kind, flags, 0, 0, 0, 1];
        [&head[..], payload].concat()
    }

    #[test]
    fn only_frames_that_cost_us_and_not_the_client_are_counted() {
        let free: Vec<u8> = [
            vec![b'P'; 24],
            frame(0, 0, b"data"),
            frame(0, 1, b""),
            frame(1, 4, b"headers"),
            frame(8, 0, b"1234"),
            frame(4, 1, b""),
            frame(6, 1, b"12345678"),
        ]
        .concat();
        for (kind, payload) in
            [(0, &b""[..]), (2, b"12345"), (3, b"1234"), (4, b""), (6, b"12345678"), (9, b"x"), (77, b"")]
        {
            for piece in [1, 7, 1000] {
                let mut frames = frames(2);
                let counted = frame(kind, 0, payload);
                let bytes = [&free[..], &counted[..], &free[24..], &counted[..]].concat();
                for part in bytes.chunks(piece) {
                    assert_eq!(frames.follow(part), Ok(part.len()), "{kind}");
                }
                assert_eq!(frames.follow(&counted), Err(Malformed), "{kind}");
                assert_eq!(frames.floods.get(), 1);
            }
        }
    }

    #[test]
    fn a_batch_of_cancelled_streams_is_no_flood() {
        let mut frames = frames(1000);
        let batch = [vec![b'P'; 24], frame(3, 0, b"1234").repeat(900)].concat();
        assert_eq!(frames.follow(&batch), Ok(batch.len()));
    }
}
