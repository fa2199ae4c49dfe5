//! What may come before or between requests: a header of the PROXY protocol, and the frames of HTTP/2.

use plimsoll::clock::Clock;
use plimsoll::ingress::frames::Frames;
use plimsoll::ingress::proxy_header::header;
use prometheus::IntCounter;

use super::cuttings;

/// Frames that may cost something.
const BUDGET: u32 = 3;

/// The preface of HTTP/2, and the header of a frame.
const PREFACE: usize = 24;
const FRAME: usize = 9;

/// Holds of whatever a connection begins with.
pub fn holds(bytes: &[u8]) {
    ends_where_it_says(bytes);
    counts_alike(bytes);
}

/// No beginning of a PROXY header is refused or taken for a whole one, and what follows it changes nothing.
fn ends_where_it_says(bytes: &[u8]) {
    let Ok(Some((length, client))) = header(bytes) else { return };
    assert!((1..=bytes.len()).contains(&length));
    for cut in 0..length {
        assert_eq!(header(&bytes[..cut]), Ok(None), "cut at {cut} of {length}");
    }
    assert_eq!(header(&bytes[..length]), Ok(Some((length, client))));
    let is_text = bytes.starts_with(b"PROXY ") && bytes[..length].ends_with(b"\r\n");
    let is_binary = bytes.starts_with(b"\r\n\r\n\0\r\nQUIT\n")
        && length == 16 + usize::from(u16::from_be_bytes([bytes[14], bytes[15]]));
    assert!(is_text || is_binary, "neither version 1 nor 2");
    if let (true, Some(client)) = (is_text, client) {
        let text = String::from_utf8_lossy(&bytes[..length]);
        let words: Vec<&str> = text.trim_end().split(' ').collect();
        assert_eq!((words[2].parse(), words[4].parse()), (Ok(client.ip()), Ok(client.port())));
    }
}

/// Frames are counted the same wherever they are cut, and as a reader counts them that has them all before it.
fn counts_alike(bytes: &[u8]) {
    let is_flood = costly(bytes) > BUDGET;
    for pieces in cuttings(bytes) {
        let floods = IntCounter::new("floods", "floods").expect("a name");
        let mut frames = Frames::new(BUDGET, Clock::start(), floods.clone());
        let stopped = pieces.iter().any(|piece| match frames.follow(piece) {
            Ok(taken) => {
                assert_eq!(taken, piece.len());
                false
            }
            Err(_) => true,
        });
        assert_eq!((stopped, floods.get()), (is_flood, u64::from(is_flood)), "in {} pieces", pieces.len());
    }
}

/// The frames that cost us and not the client, of those whose header is there.
fn costly(bytes: &[u8]) -> u32 {
    let (mut at, mut count) = (PREFACE, 0);
    while let Some(&[high, middle, low, kind, flags, ..]) = bytes.get(at..at + FRAME) {
        let length = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        let is_set = flags & 1 != 0;
        count += u32::from(match kind {
            // DATA without data, unless it ends the stream; SETTINGS and PING that are no answers.
            0 => length == 0 && !is_set,
            4 | 6 => !is_set,
            // HEADERS, PUSH_PROMISE, GOAWAY, WINDOW_UPDATE.
            1 | 5 | 7 | 8 => false,
            _ => true,
        });
        at += FRAME + length;
    }
    count
}
