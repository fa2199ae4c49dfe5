//! The tap: what we learn of an answer while it passes through untouched.
//!
//! It looks for the first content (the prefill is done), for errors inside a stream whose status said 200,
//! and for the engine's `usage`. Events are taken apart only until the first content; from then on a read
//! costs a copy of its last bytes, and the rest is read from that tail when the answer has ended. Nothing is
//! ever held back or changed here.

use crate::prompt::{Kind, Sse, StreamError, Usage};

/// Bytes of the end of an answer that are kept: enough for a final `usage`, whatever follows it.
const TAIL: usize = 4 * 1024;

/// Watches one answer.
pub struct Tap {
    /// Takes events apart until the first content; `None` afterwards, and for what is no stream.
    events: Option<Sse>,
    is_stream: bool,
    answered: bool,
    /// What the stream has begun with.
    opening: Opening,
    /// From an event before the content, as Anthropic's `message_start`.
    early_usage: Option<Usage>,
    error: Option<StreamError>,
    tail: Vec<u8>,
}

/// What a stream has begun with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// No event is complete yet.
    Nothing,
    /// An event or a comment that is no error.
    Event,
    /// An error, with its code if it names one.
    Error(Option<u16>),
}

impl Opening {
    /// What a stream begins with whose first event is this error, or none.
    fn with(error: Option<&StreamError>) -> Self {
        match error {
            // A mistake of the client's is an answer like any other.
            Some(StreamError { code: Some(400..=428 | 430..=499), .. }) | None => Self::Event,
            Some(error) => Self::Error(error.code),
        }
    }
}

impl Tap {
    /// A tap on an answer, which is an event stream or not.
    pub fn new(is_stream: bool) -> Self {
        Self {
            events: is_stream.then(Sse::new),
            is_stream,
            answered: false,
            opening: Opening::Nothing,
            early_usage: None,
            error: None,
            tail: Vec::new(),
        }
    }

    /// Whether the answer is an event stream.
    pub fn is_stream(&self) -> bool {
        self.is_stream
    }

    /// What the stream has begun with, as far as it has been read.
    pub fn opening(&self) -> Opening {
        self.opening
    }

    /// Takes in a read; true if it held the first content of the answer.
    pub fn read(&mut self, chunk: &[u8]) -> bool {
        self.keep(chunk);
        if self.answered {
            return false;
        }
        self.answered = match &mut self.events {
            None => true,
            Some(events) => {
                let (mut content, mut usage, mut error) = (false, None, None);
                let opening = &mut self.opening;
                events.push(chunk, &mut |event| {
                    match event.kind() {
                        Kind::Content => content = true,
                        Kind::Error => error = event.error(),
                        Kind::Other | Kind::Usage | Kind::Done => {
                            usage = Usage::from_tail(event.data).or(usage);
                        }
                        Kind::Comment => {}
                    }
                    if *opening == Opening::Nothing {
                        *opening = Opening::with(error.as_ref());
                    }
                });
                self.early_usage = usage.or(self.early_usage);
                self.error = error.or_else(|| self.error.take());
                content
            }
        };
        if self.answered {
            self.events = None;
        }
        self.answered
    }

    /// Whether the last event has not been ended by a blank line.
    pub fn mid_event(&self) -> bool {
        !self.tail.is_empty()
            && ![&b"\n\n"[..], b"\r\n\r\n", b"\r\r"].iter().any(|end| self.tail.ends_with(end))
    }

    /// What the engine counted, once the answer has ended.
    pub fn usage(&self) -> Option<Usage> {
        match (Usage::from_tail(&self.tail), self.early_usage) {
            (Some(late), Some(early)) => Some(early.merge(late)),
            (late, early) => late.or(early),
        }
    }

    /// The error inside a stream, once it has ended.
    pub fn stream_error(&self) -> Option<StreamError> {
        if !self.is_stream {
            return None;
        }
        let mut error = self.error.clone();
        // The tail may begin within an event: what comes before the first blank line is not looked at.
        let start = self.tail.windows(2).position(|w| w == b"\n\n").map_or(0, |at| at + 2);
        let start = if self.tail.len() < TAIL { 0 } else { start };
        Sse::new().push(&self.tail[start..], &mut |event| {
            if event.kind() == Kind::Error {
                error = event.error();
            }
        });
        error
    }

    fn keep(&mut self, chunk: &[u8]) {
        let chunk = &chunk[chunk.len().saturating_sub(TAIL)..];
        let excess = (self.tail.len() + chunk.len()).saturating_sub(TAIL);
        // Moved only when the tail has doubled, so that each byte is moved once at most.
        if excess >= TAIL || chunk.len() == TAIL {
            self.tail.drain(..excess.min(self.tail.len()));
        }
        self.tail.extend_from_slice(chunk);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLE: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n";
    const TOKEN: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"}}]}\n\n";
    const USAGE: &str =
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n";
    const ERROR: &str = "data: {\"error\":{\"message\":\"engine died\",\"code\":500}}\n\n";

    #[test]
    fn the_first_content_is_seen_once_and_a_role_or_comment_is_none() {
        let mut tap = Tap::new(true);
        let reads = [": keep-alive\n\n", ROLE, &TOKEN[..9], &TOKEN[9..], TOKEN];
        assert_eq!(reads.map(|read| tap.read(read.as_bytes())), [false, false, false, true, false]);
        let mut whole = Tap::new(false);
        assert_eq!([whole.read(b"{"), whole.read(b"}")], [true, false]);
    }

    #[test]
    fn usage_and_errors_are_found_at_the_end_of_a_long_stream() {
        let mut tap = Tap::new(true);
        for _ in 0..1_000 {
            tap.read(TOKEN.as_bytes());
        }
        assert_eq!((tap.usage(), tap.stream_error()), (None, None));
        tap.read(ERROR.as_bytes());
        tap.read(USAGE.as_bytes());
        let usage = tap.usage().unwrap();
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (7, 2));
        assert_eq!(tap.stream_error().unwrap().code, Some(500));
        assert!(tap.tail.len() < 2 * TAIL + USAGE.len());
    }

    #[test]
    fn an_opening_is_told_only_once_its_event_is_whole() {
        let mut tap = Tap::new(true);
        tap.read(&ERROR.as_bytes()[..20]);
        assert_eq!(tap.opening(), Opening::Nothing);
        tap.read(&ERROR.as_bytes()[20..]);
        assert_eq!(tap.opening(), Opening::Error(Some(500)));
        tap.read(TOKEN.as_bytes());
        assert_eq!(tap.opening(), Opening::Error(Some(500)));
        let opening = |bytes: &[u8]| {
            let mut tap = Tap::new(true);
            tap.read(bytes);
            tap.opening()
        };
        assert_eq!(opening(ROLE.as_bytes()), Opening::Event);
        assert_eq!(opening([TOKEN, ERROR].concat().as_bytes()), Opening::Event);
        assert_eq!(opening(b": ping\n\n"), Opening::Event);
        let mistake = b"data: {\"error\":{\"message\":\"too long\",\"code\":400}}\n\n";
        assert_eq!(opening(mistake), Opening::Event);
    }

    #[test]
    fn a_tail_holds_the_last_bytes_whatever_the_sizes_of_the_reads() {
        let mut rng = fastrand::Rng::with_seed(3);
        let all: Vec<u8> = (0..200_000).map(|_| rng.u8(..)).collect();
        let mut tap = Tap::new(false);
        let mut at = 0;
        while at < all.len() {
            let size = rng.usize(1..20_000).min(all.len() - at);
            tap.read(&all[at..at + size]);
            at += size;
            assert!(all[..at].ends_with(&tap.tail));
            assert!(tap.tail.len() >= at.min(TAIL));
        }
    }
}
