//! An event stream: the same events wherever it is cut and as a simpler reader reads them, and the same said of them.

use plimsoll::prompt::{Kind, MAX_EVENT_BYTES, Sse, StreamError, Usage};
use plimsoll::proxy::tap::{Opening, Tap};
use serde_json::Value;

use super::cuttings;

/// As much of the end of an answer as the tap keeps for certain.
const TAIL: usize = 4 * 1024;

/// An event with its bytes copied: its name, its data, whether it was a comment.
type Seen = (Vec<u8>, Vec<u8>, bool);

/// Holds of any stream of up to 64 KiB.
pub fn holds(stream: &[u8]) {
    let stream = &stream[..stream.len().min(MAX_EVENT_BYTES)];
    let plain = plainly(stream);
    let mut said = None;
    for (nth, pieces) in cuttings(stream).enumerate() {
        let (mut sse, mut seen) = (Sse::new(), Vec::new());
        for piece in &pieces {
            sse.push(piece, &mut |event| {
                assert!(!event.truncated && event.data.len() < MAX_EVENT_BYTES);
                seen.push((event.name.to_vec(), event.data.to_vec(), event.comment));
                if nth == 0 {
                    means_one_thing(event.kind(), event.error(), event.data, event.name);
                }
            });
        }
        assert_eq!(seen, plain, "in {} pieces", pieces.len());
        let tap = tapped(&pieces);
        assert!(tap.mid_event || !sse.mid_event(), "an event of ours would end up in one of theirs");
        assert_eq!(*said.get_or_insert_with(|| tap.clone()), tap, "in {} pieces", pieces.len());
    }
    if !stream.contains(&b'\r') {
        for end in [&b"\r"[..], b"\r\n"] {
            let lines: Vec<&[u8]> = stream.split(|&byte| byte == b'\n').collect();
            assert_eq!(plainly(&lines.join(end)), plain, "the same lines with other ends");
        }
    }
    counts_what_is_counted(stream);
}

/// What the tap has learned of a whole answer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Learned {
    answered: bool,
    opening: Opening,
    mid_event: bool,
    error: Option<StreamError>,
}

fn tapped(pieces: &[&[u8]]) -> Learned {
    let (mut tap, mut firsts, mut length) = (Tap::new(true), 0, 0);
    for piece in pieces {
        firsts += u32::from(tap.read(piece));
        length += piece.len();
    }
    assert!(firsts <= 1, "the first content came {firsts} times");
    let _usage = tap.usage();
    Learned {
        answered: firsts == 1,
        opening: tap.opening(),
        mid_event: tap.mid_event(),
        // Of what came between the first content and the tail nothing is known.
        error: tap.stream_error().filter(|_| length <= TAIL),
    }
}

/// The events of a stream by the letter of the standard (WHATWG HTML, s.9.2.6), without an eye on speed; and beside
/// them, blocks of comments alone.
fn plainly(stream: &[u8]) -> Vec<Seen> {
    let (mut seen, mut lines, mut line) = (Vec::new(), Vec::new(), Vec::new());
    for (at, &byte) in stream.iter().enumerate() {
        match byte {
            b'\n' if at > 0 && stream[at - 1] == b'\r' => {}
            b'\n' | b'\r' if line.is_empty() => seen.extend(event(&std::mem::take(&mut lines))),
            b'\n' | b'\r' => lines.push(std::mem::take(&mut line)),
            _ => line.push(byte),
        }
    }
    seen
}

fn event(lines: &[Vec<u8>]) -> Option<Seen> {
    let (mut name, mut data, mut comment) = (Vec::new(), Vec::new(), false);
    for line in lines {
        let colon = line.iter().position(|&byte| byte == b':').unwrap_or(line.len());
        let value = line.get(colon + 1..).unwrap_or_default();
        let value = value.strip_prefix(b" ").unwrap_or(value).to_vec();
        match &line[..colon] {
            b"" => comment = true,
            b"data" => data.push(value),
            b"event" => name = value,
            _ => {}
        }
    }
    if data.is_empty() {
        comment.then(|| (vec![], vec![], true))
    } else {
        Some((name, data.join(&b'\n'), false))
    }
}

/// An error has words and perhaps a status, and what serde_json reads as one is one.
fn means_one_thing(kind: Kind, error: Option<StreamError>, data: &[u8], name: &[u8]) {
    assert_eq!(error.is_some(), kind == Kind::Error);
    if let Some(StreamError { code, .. }) = error {
        assert!(code.is_none_or(|code| (100..1_000).contains(&code)));
    }
    if let Ok(Value::Object(members)) = serde_json::from_slice(data) {
        if members.get("error").is_some_and(|error| !error.is_null()) || name == b"error" {
            assert_eq!(kind, Kind::Error, "{members:?}");
        }
        if kind == Kind::Usage {
            assert!(members.get("usage").is_some_and(Value::is_object), "{members:?}");
        }
    }
}

/// Generated text cannot pose as a count of tokens: only a member of that name is one.
fn counts_what_is_counted(data: &[u8]) {
    let Some(usage) = Usage::from_tail(data) else { return };
    assert_eq!(usage.merge(usage), usage);
    if let Ok(tree) = serde_json::from_slice::<Value>(data) {
        assert!(has_member(&tree, "usage"), "{usage:?} in {tree}");
    }
}

fn has_member(tree: &Value, name: &str) -> bool {
    match tree {
        Value::Object(members) => {
            members.contains_key(name) || members.values().any(|value| has_member(value, name))
        }
        Value::Array(items) => items.iter().any(|item| has_member(item, name)),
        _ => false,
    }
}
