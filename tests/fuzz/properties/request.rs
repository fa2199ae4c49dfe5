//! A request on the wire: judged the same in pieces as whole, and read by Pingora, which stands behind us, exactly as
//! we read it: the same headers, the same body, the same end.

use std::future::Future;
use std::io::Cursor;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use http::{Version, header};
use pingora::http::RequestHeader;
use pingora::protocols::http::v1::server::HttpSession;
use plimsoll::config::Limits;
use plimsoll::ingress::chunks::{Chunks, Malformed};
use plimsoll::ingress::head::{self, Framing};
use plimsoll::proxy::forward::{Origin, to_origin_form};
use plimsoll::proxy::hygiene;

use super::cuttings;

const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

/// What the front door says of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// More has to come.
    Waiting,
    Refused,
    /// A head of that length, and where its body ends.
    Head(usize, Framing),
}

/// Holds of whatever a client sends.
pub fn holds(wire: &[u8]) {
    let limits = Limits { url: 256, headers: 1024, header_count: 12, ..Limits::default() };
    let verdict = arrives(&[wire], &limits);
    for pieces in cuttings(wire) {
        assert_eq!(arrives(&pieces, &limits), verdict, "in {} pieces", pieces.len());
    }
    let Verdict::Head(length, framing) = verdict else { return };
    let (head, rest) = wire.split_at(length);
    is_strict(head, framing);
    let body = match framing {
        Framing::Bodiless => Some(&rest[..0]),
        Framing::Length(length) => usize::try_from(length).ok().and_then(|length| rest.get(..length)),
        Framing::Chunked => chunked(rest),
    };
    let Some(body) = body else { return };
    is_read_by_pingora(head, body, framing);
}

/// As `ingress` does it, a read at a time.
fn arrives(pieces: &[&[u8]], limits: &Limits) -> Verdict {
    let (mut ahead, mut searched) = (Vec::new(), 0);
    for piece in pieces {
        ahead.extend_from_slice(piece);
        match head::length(&ahead, searched, limits) {
            Err(refusal) => {
                assert!(matches!(refusal.status, 400 | 414 | 431), "{refusal:?}");
                return Verdict::Refused;
            }
            Ok(Some(length)) => {
                let framing = head::check(&ahead[..length], limits);
                return framing.map_or(Verdict::Refused, |framing| Verdict::Head(length, framing));
            }
            Ok(None) => searched = ahead.len().saturating_sub(1),
        }
    }
    Verdict::Waiting
}

/// By the letter of RFC 9112, without an eye on speed or words.
fn is_strict(head: &[u8], framing: Framing) {
    let text = head.strip_suffix(b"\r\n\r\n").expect("it ends in an empty line");
    let lines: Vec<&[u8]> = split(text, b"\r\n");
    let (first, fields) = lines.split_first().expect("a first line");
    assert!(lines.iter().all(|line| !line.is_empty() && !line.iter().any(|b| b"\r\n\0".contains(b))));
    assert_eq!(first.iter().filter(|&&b| b == b' ').count(), 2);
    let named = |wanted: &str| -> Vec<String> {
        let pairs =
            fields.iter().map(|line| line.split_at(line.iter().position(|&b| b == b':').expect("a colon")));
        let same = pairs.filter(|(name, _)| name.eq_ignore_ascii_case(wanted.as_bytes()));
        same.map(|(_, value)| String::from_utf8_lossy(&value[1..]).trim_matches([' ', '\t']).to_owned())
            .collect()
    };
    let is_new = first.ends_with(b" HTTP/1.1");
    assert!(named("host").len() <= 1 && (!is_new || named("host").len() == 1));
    let (lengths, codings) = (named("content-length"), named("transfer-encoding"));
    match framing {
        Framing::Bodiless => assert!(lengths.is_empty() && codings.is_empty()),
        Framing::Length(length) => {
            assert!(codings.is_empty() && lengths.len() == 1, "{lengths:?} {codings:?}");
            assert_eq!(lengths[0].trim_start_matches('0'), length.to_string().trim_start_matches('0'));
        }
        Framing::Chunked => {
            assert!(lengths.is_empty() && codings.len() == 1 && is_new, "{lengths:?} {codings:?}");
            assert!(codings[0].eq_ignore_ascii_case("chunked"));
        }
    }
}

fn split<'a>(mut text: &'a [u8], end: &[u8]) -> Vec<&'a [u8]> {
    let mut lines = Vec::new();
    while let Some(at) = text.windows(end.len()).position(|window| window == end) {
        lines.push(&text[..at]);
        text = &text[at + end.len()..];
    }
    lines.push(text);
    lines
}

/// The bytes of a chunked body with which `rest` begins, if they are all there and sound; wherever they are cut.
fn chunked(rest: &[u8]) -> Option<&[u8]> {
    let mut end = None;
    for pieces in cuttings(rest) {
        let followed = follow(&pieces);
        assert_eq!(*end.get_or_insert(followed), followed, "in {} pieces", pieces.len());
    }
    match end? {
        Ok((length, Chunks::Done)) => Some(&rest[..length]),
        _ => None,
    }
}

fn follow(pieces: &[&[u8]]) -> Result<(usize, Chunks), Malformed> {
    let (mut chunks, mut length) = (Chunks::START, 0);
    for piece in pieces {
        let taken = chunks.follow(piece)?;
        assert!(taken == piece.len() || chunks == Chunks::Done);
        length += taken;
    }
    Ok((length, chunks))
}

/// The data of chunks that are known to be sound.
fn data(mut chunks: &[u8]) -> Vec<u8> {
    let mut data = Vec::new();
    loop {
        let end = chunks.windows(2).position(|two| two == b"\r\n").expect("the end of a size");
        let size = chunks[..end].split(|&b| b == b';').next().expect("a size");
        let size = usize::from_str_radix(std::str::from_utf8(size).expect("digits"), 16).expect("a size");
        if size == 0 {
            return data;
        }
        data.extend_from_slice(&chunks[end + 2..end + 2 + size]);
        chunks = &chunks[end + 2 + size + 2..];
    }
}

fn is_read_by_pingora(head: &[u8], body: &[u8], framing: Framing) {
    let wire = [head, body].concat();
    let mut session = HttpSession::new(Box::new(Cursor::new(wire)));
    let length = at_once(session.read_request()).unwrap_or_else(|e| panic!("Pingora refuses it: {e}"));
    assert_eq!(length, Some(head.len()), "another end of the head");
    let lines = head.windows(2).filter(|two| two == b"\r\n").count();
    assert_eq!(session.req_header().headers.len(), lines - 2, "another number of headers");

    let mut read = Vec::new();
    while let Some(bytes) =
        at_once(session.read_body_bytes()).unwrap_or_else(|e| panic!("Pingora fails: {e}"))
    {
        read.extend_from_slice(&bytes);
    }
    assert!(session.is_body_done());
    let expected = if framing == Framing::Chunked { data(body) } else { body.to_vec() };
    assert_eq!(read, expected, "another body");
    is_passed_on(session.req_header_mut());
}

/// What the engine is told: who asked in our words alone, a path, and nothing that could end a line.
fn is_passed_on(request: &mut RequestHeader) {
    if hygiene::flaw(request, &Limits::default()).is_some() {
        return;
    }
    to_origin_form(request).expect("a path is a target");
    assert!(request.raw_path().starts_with(b"/") || request.raw_path() == b"*", "{request:?}");
    let trusted = Origin { peer: Some(PEER), is_trusted: true, is_tls: false, version: Version::HTTP_11 };
    let mut believed = request.clone();
    trusted.announce(&mut believed).expect("what came can be passed on");
    ends_with(&believed, "x-forwarded-for", PEER.to_string().as_bytes());

    let stranger = Origin { is_trusted: false, is_tls: true, ..trusted };
    assert_eq!(stranger.client(request, &[]), Some(PEER));
    stranger.announce(request).expect("our own words can be passed on");
    let all = |name: &str| -> Vec<&[u8]> {
        request.headers.get_all(name).iter().map(header::HeaderValue::as_bytes).collect()
    };
    assert_eq!(all("x-forwarded-for"), [PEER.to_string().as_bytes()]);
    assert_eq!(all("x-forwarded-proto"), [b"https"]);
    assert_eq!(all("forwarded").len(), 1);
    assert!(all("x-forwarded-host").len() <= 1 && all("x-real-ip").is_empty());
    assert!(request.headers.keys().all(|name| !name.as_str().starts_with("x_")
        || !name.as_str().replace('_', "-").starts_with("x-forwarded-")));
    assert!(request.headers.values().all(|value| !value.as_bytes().iter().any(|b| b"\r\n\0".contains(b))));
    ends_with(request, "via", b" plimsoll");
}

fn ends_with(request: &RequestHeader, name: &str, end: &[u8]) {
    let all: Vec<_> = request.headers.get_all(name).iter().collect();
    assert!(matches!(all.as_slice(), [one] if one.as_bytes().ends_with(end)), "{name}: {all:?}");
}

/// What `future` gives, which waits for nobody: its bytes are all there.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it waits for more than there is"),
    }
}
