//! Cuts a `text/event-stream` into its events, wherever the network cut it.
//!
//! An event, a chunk and a read are three different things (research/engines.md s.3, 16), so the boundary is
//! found by the rules of the WHATWG HTML standard, s.9.2.6: lines end in LF, CR LF or CR, a blank line ends
//! the event, several `data:` lines are joined by LF, a line that begins with a colon is a comment. Two
//! things differ, for the balancer's sake: a block of comments alone is passed on too (it is a sign of life),
//! and an event is never longer than [`MAX_EVENT_BYTES`] here. The bytes themselves go downstream untouched;
//! this only looks at them.
//!
//! An event that lies within one chunk is borrowed from it; only what straddles chunks is copied.

use memchr::memchr2;

use super::event::Event;

/// The most bytes of one event that are looked at; the rest is passed over and the event flagged as
/// truncated.
pub const MAX_EVENT_BYTES: usize = 64 * 1024;

/// A splitter of one stream.
#[derive(Clone, Debug, Default)]
pub struct Sse {
    /// The unfinished event, at most [`MAX_EVENT_BYTES`] of it.
    carry: Vec<u8>,
    /// Whether the unfinished event was longer than that.
    truncated: bool,
    /// Whether the line under way has bytes already.
    in_line: bool,
    /// Whether the last byte was a CR, so that an LF now belongs to it.
    after_cr: bool,
    /// Room to join the data of an event with several data lines.
    joined: Vec<u8>,
}

impl Sse {
    /// A splitter at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes and calls `on_event` for every event that is complete with them.
    pub fn push(&mut self, chunk: &[u8], on_event: &mut dyn FnMut(Event<'_>)) {
        let mut rest = chunk;
        loop {
            if self.after_cr
                && self.carry.is_empty()
                && let Some(after) = rest.strip_prefix(b"\n")
            {
                self.after_cr = false;
                rest = after;
            }
            let Some(end) = self.block_end(rest) else { return self.keep(rest) };
            let (block, after) = rest.split_at(end);
            if self.carry.is_empty() {
                let seen = &block[..end.min(MAX_EVENT_BYTES)];
                dispatch(seen, seen.len() < end, &mut self.joined, on_event);
            } else {
                self.keep(block);
                dispatch(&self.carry, self.truncated, &mut self.joined, on_event);
                self.carry.clear();
                self.truncated = false;
            }
            rest = after;
        }
    }

    /// True if an event has begun and not ended: whoever wants to add an event of its own must end this one
    /// first.
    pub const fn mid_event(&self) -> bool {
        !self.carry.is_empty()
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = MAX_EVENT_BYTES - self.carry.len();
        self.carry.extend_from_slice(&bytes[..bytes.len().min(room)]);
        self.truncated |= bytes.len() > room;
    }

    /// Where in `bytes` the blank line that ends the event under way is over; none if that is yet to come.
    fn block_end(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        loop {
            let first = *bytes.get(at)?;
            if std::mem::take(&mut self.after_cr) && first == b'\n' {
                at += 1;
                continue;
            }
            let Some(length) = memchr2(b'\n', b'\r', &bytes[at..]) else {
                self.in_line = true;
                return None;
            };
            let blank = length == 0 && !self.in_line;
            at += length + 1;
            self.after_cr = bytes[at - 1] == b'\r';
            self.in_line = false;
            if blank {
                return Some(at);
            }
        }
    }
}

/// Reads the lines of a whole event and hands it out, if it is one: data, or comments alone.
fn dispatch(block: &[u8], truncated: bool, joined: &mut Vec<u8>, on_event: &mut dyn FnMut(Event<'_>)) {
    let (mut data, mut name, mut comment, mut lines) = (&b""[..], &b""[..], false, 0_usize);
    let mut rest = block;
    while !rest.is_empty() {
        let length = memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
        let line = &rest[..length];
        rest = rest.get(length + 1..).unwrap_or_default();
        if let Some(value) = field(line, b"data") {
            lines += 1;
            match lines {
                1 => data = value,
                2 => {
                    joined.clear();
                    joined.extend_from_slice(data);
                }
                _ => {}
            }
            if lines > 1 {
                joined.push(b'\n');
                joined.extend_from_slice(value);
            }
        } else if let Some(value) = field(line, b"event") {
            name = value;
        } else if line.starts_with(b":") {
            comment = true;
        }
    }
    match lines {
        0 if comment => on_event(Event { data: b"", name: b"", comment: true, truncated }),
        0 => {}
        1 => on_event(Event { data, name, comment: false, truncated }),
        _ => on_event(Event { data: joined, name, comment: false, truncated }),
    }
}

/// The value of a line `name: value`, of `name:value`, or of `name` alone; none if the field is another.
fn field<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    match line.strip_prefix(name)? {
        [] => Some(b""),
        [b':', b' ', value @ ..] | [b':', value @ ..] => Some(value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::captures;
    use super::super::event::Kind;
    use super::*;

    /// An event with its bytes copied, to be kept and compared.
    type Seen = (String, Vec<u8>, Kind, bool);

    fn split(chunks: &[&[u8]]) -> Vec<Seen> {
        let (mut sse, mut seen) = (Sse::new(), Vec::new());
        for chunk in chunks {
            sse.push(chunk, &mut |event| {
                let name = String::from_utf8_lossy(event.name).into_owned();
                seen.push((name, event.data.to_vec(), event.kind(), event.truncated));
            });
        }
        seen
    }

    fn data(text: &str) -> Vec<String> {
        split(&[text.as_bytes()]).iter().map(|seen| String::from_utf8_lossy(&seen.1).into_owned()).collect()
    }

    #[test]
    fn all_three_line_ends_end_lines() {
        for end in ["\n", "\r\n", "\r"] {
            let text = ["data: a", "data: b", "", "", ": x", "", "event: error", "data:c", "", ""].join(end);
            let seen = split(&[text.as_bytes()]);
            let names: Vec<_> = seen.iter().map(|(name, data, kind, _)| (&**name, &**data, *kind)).collect();
            let want: [(&str, &[u8], Kind); 3] =
                [("", b"a\nb", Kind::Other), ("", b"", Kind::Comment), ("error", b"c", Kind::Error)];
            assert_eq!(names, want, "{end:?}");
        }
    }

    #[test]
    fn fields_are_read_by_the_standard() {
        assert_eq!(data("data\n\ndata:\n\ndata:  two\n\n"), ["", "", " two"]);
        assert_eq!(data("dat: x\n\ndatax: y\n\nid: 7\nretry: 5\ndata: z\n\n"), ["z"]);
        assert_eq!(data("event: lonely\n\ndata: cut"), [""; 0]);
        assert_eq!(data("\n\n\r\n\rdata: x\n\n"), ["x"]);
    }

    #[test]
    fn every_capture_gives_the_same_events_wherever_it_is_cut() {
        let mut streams = 0;
        for (path, body) in captures::streams() {
            streams += 1;
            let whole = split(&[&body]);
            assert!(!whole.is_empty(), "{path}");
            for cut in 0..=body.len() {
                let (head, tail) = body.split_at(cut);
                assert_eq!(split(&[head, tail]), whole, "{path} cut at {cut}");
            }
            let bytes: Vec<&[u8]> = body.chunks(1).collect();
            assert_eq!(split(&bytes), whole, "{path} byte by byte");
            for ends in ["\r\n", "\r"] {
                let other = String::from_utf8_lossy(&body).replace('\n', ends);
                let bytes: Vec<&[u8]> = other.as_bytes().chunks(1).collect();
                assert_eq!(split(&bytes).len(), whole.len(), "{path} with {ends:?}");
            }
        }
        assert!(streams >= 24, "only {streams} streams among the captures");
    }

    #[test]
    fn the_captures_hold_the_kinds_that_were_seen() {
        let kinds = |file: &str| -> Vec<Kind> {
            split(&[&captures::body(file)]).into_iter().map(|seen| seen.2).collect()
        };
        let vllm = kinds("vllm-0.32.0/chat-stream-include-usage.http");
        assert_eq!((vllm[0], vllm[1]), (Kind::Other, Kind::Content), "a role comes first");
        assert_eq!(vllm[vllm.len() - 2..], [Kind::Usage, Kind::Done]);
        assert_eq!(vllm.iter().filter(|&&kind| kind == Kind::Content).count(), 12);
        assert_eq!(kinds("sglang-0.5.23/overload-chat-stream-queue-full.http"), [Kind::Error, Kind::Done]);
        assert_eq!(kinds("vllm-0.32.0-flags/sse-keep-alive-while-queued.http"), [Kind::Comment; 3]);
        assert_eq!(kinds("dynamo-1.6.1-mocker/chat-stream.http")[0], Kind::Content);
    }

    #[test]
    fn an_event_beyond_the_bound_is_truncated_the_same_however_it_is_cut() {
        let mut text = b"data: {\"choices\":[{\"delta\":{\"content\":\"".to_vec();
        text.resize(3 * MAX_EVENT_BYTES, b'x');
        text.extend_from_slice(b"\"}}]}\n\ndata: [DONE]\n\n");
        let whole = split(&[&text]);
        assert_eq!(whole.len(), 2);
        assert_eq!((whole[0].1.len(), whole[0].2, whole[0].3), (MAX_EVENT_BYTES - 6, Kind::Content, true));
        assert_eq!((whole[1].2, whole[1].3), (Kind::Done, false));
        for size in [1, 7, 4_096, MAX_EVENT_BYTES, MAX_EVENT_BYTES + 1] {
            assert_eq!(split(&text.chunks(size).collect::<Vec<_>>()), whole, "in chunks of {size}");
        }
    }

    #[test]
    fn an_unfinished_event_is_known() {
        let mut sse = Sse::new();
        for (chunk, mid) in
            [("data: x", true), ("\n", true), ("\n", false), ("data: y\r\n\r", false), ("\n", false)]
        {
            sse.push(chunk.as_bytes(), &mut |_| ());
            assert_eq!(sse.mid_event(), mid, "after {chunk:?}");
        }
    }

    #[test]
    fn noise_never_panics() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..2_000 {
            let noise: Vec<u8> =
                (0..rng.usize(0..200)).map(|_| *rng.choice(b"data:event\r\n\n {}\"\\[]").unwrap()).collect();
            let (head, tail) = noise.split_at(rng.usize(0..=noise.len()));
            assert_eq!(split(&[head, tail]), split(&[&noise]), "{:?}", String::from_utf8_lossy(&noise));
        }
    }
}
