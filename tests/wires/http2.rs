//! HTTP/2 that is not as RFC 9113 wants it, frame by frame: none of it reaches an engine, and what is only one
//! stream's fault costs only that stream.

use crate::support::client::Line;
use crate::support::engine::Engine;
use crate::support::frames::{Frames, Taken, block, flag, frame, kind};
use crate::support::proxy::Proxy;
use crate::support::stage::before;

/// What has to become of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It is a request like any other.
    Served,
    /// Stream 1 is refused or reset, and the connection lives on.
    Refused,
    /// As `Refused`, or else the connection is ended: the standard allows both (s.5.4.2), and the h2 library ends
    /// it for what it cannot decode.
    Either,
    /// The connection is ended.
    Ended,
}
use Fate::{Either, Ended, Refused, Served};

const GET: [(&str, &str); 4] =
    [(":method", "GET"), (":scheme", "http"), (":path", "/probe"), (":authority", "x")];
const POST: [(&str, &str); 4] =
    [(":method", "POST"), (":scheme", "http"), (":path", "/probe"), (":authority", "x")];

/// A whole request without a body on `stream`.
fn get(stream: u32) -> Vec<u8> {
    frame(kind::HEADERS, flag::WHOLE, stream, block(&GET))
}

/// The head of a request with a body on stream 1.
fn post() -> Vec<u8> {
    frame(kind::HEADERS, flag::END_HEADERS, 1, block(&POST))
}

/// A whole request on stream 1 with these headers more.
fn with(more: &[(&str, &str)]) -> Vec<u8> {
    frame(kind::HEADERS, flag::WHOLE, 1, block(&[&GET[..], more].concat()))
}

/// A whole request on stream 1 of which these headers are all.
fn only(fields: &[(&str, &str)]) -> Vec<u8> {
    frame(kind::HEADERS, flag::WHOLE, 1, block(fields))
}

/// A request on stream 1 with one of its pseudo-headers put differently.
fn changed(name: &str, value: &str) -> Vec<u8> {
    only(&GET.map(|(own, old)| (own, if own == name { value } else { old })))
}

fn without(name: &str) -> Vec<u8> {
    only(&GET.into_iter().filter(|(own, _)| *own != name).collect::<Vec<_>>())
}

/// One setting.
fn setting(id: u16, value: u32) -> Vec<u8> {
    frame(kind::SETTINGS, flag::NONE, 0, [&id.to_be_bytes()[..], &value.to_be_bytes()].concat())
}

fn data(flags: u8, payload: &str) -> Vec<u8> {
    frame(kind::DATA, flags, 1, payload)
}

/// Sends each probe on a connection of its own and looks what becomes of it; where only the stream may suffer,
/// another request follows on the connection.
async fn probe(probes: &[(&str, Fate, Vec<Vec<u8>>)]) {
    let engine = [Engine::good()];
    let proxy: Proxy = before(&engine, "").await;
    let mut misfits = Vec::new();
    for (name, fate, frames) in probes {
        engine[0].forget();
        let mut client = Frames::connect(proxy.address(Line::Http2)).await;
        client.send(&frames.concat()).await;
        let taken = client.taken(1).await;
        let seen = engine[0].count();
        let fits = match fate {
            Served => taken == Taken::Answered { well: true } && seen == 1,
            Ended => taken == Taken::Ended && seen == 0,
            Refused => matches!(taken, Taken::Reset | Taken::Answered { well: false }) && seen == 0,
            Either => taken != Taken::Answered { well: true } && seen == 0,
        };
        if !fits {
            misfits
                .push(format!("{name}: wanted {fate:?}, {taken:?} came, and the engine saw {seen} requests"));
        } else if matches!(fate, Served | Refused) {
            client.send(&get(101)).await;
            if client.taken(101).await != (Taken::Answered { well: true }) {
                misfits.push(format!("{name}: the connection does not live on"));
            }
        }
    }
    assert!(misfits.is_empty(), "{} of {}:\n{}", misfits.len(), probes.len(), misfits.join("\n"));
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn what_the_standard_allows_is_served() {
    let half = block(&GET).len() / 2;
    let (start, end) = (block(&GET)[..half].to_vec(), block(&GET)[half..].to_vec());
    let padded = |payload: &[u8]| [&[3], payload, &[0; 3]].concat();
    probe(&[
        ("a plain request", Served, vec![get(1)]),
        ("an unknown frame", Served, vec![frame(0x77, 0xff, 0, "?"), get(1)]),
        ("an unknown frame on a stream that is not open", Served, vec![frame(0x77, 0xff, 1, "?"), get(1)]),
        ("an unknown setting", Served, vec![setting(0x77, 1), get(1)]),
        ("a reserved bit", Served, vec![frame(kind::HEADERS, flag::WHOLE, 0x8000_0001, block(&GET))]),
        ("a PING", Served, vec![frame(kind::PING, flag::NONE, 0, [7; 8]), get(1)]),
        (
            "an answer to a PING that nobody sent",
            Served,
            vec![frame(kind::PING, flag::ACK, 0, [7; 8]), get(1)],
        ),
        ("an unknown flag", Served, vec![frame(kind::PING, 0x16, 0, [7; 8]), get(1)]),
        ("an unknown error code", Served, vec![frame(kind::HEADERS, flag::WHOLE, 1, block(&GET))]),
        (
            "a CONTINUATION",
            Served,
            vec![
                frame(kind::HEADERS, flag::END_STREAM, 1, &start),
                frame(kind::CONTINUATION, flag::END_HEADERS, 1, &end),
            ],
        ),
        (
            "two of them",
            Served,
            vec![
                frame(kind::HEADERS, flag::END_STREAM, 1, &start),
                frame(kind::CONTINUATION, flag::NONE, 1, []),
                frame(kind::CONTINUATION, flag::END_HEADERS, 1, &end),
            ],
        ),
        ("padding", Served, vec![frame(kind::HEADERS, flag::WHOLE | flag::PADDED, 1, padded(&block(&GET)))]),
        (
            "a priority",
            Served,
            vec![frame(
                kind::HEADERS,
                flag::WHOLE | flag::PRIORITY,
                1,
                [&[0, 0, 0, 3, 9], &block(&GET)[..]].concat(),
            )],
        ),
        (
            "a PRIORITY of a stream that is not open",
            Served,
            vec![frame(kind::PRIORITY, 0, 3, [0, 0, 0, 1, 9]), get(1)],
        ),
        ("a body", Served, vec![post(), data(flag::END_STREAM, "{}")]),
        (
            "a body with padding",
            Served,
            vec![post(), frame(kind::DATA, flag::END_STREAM | flag::PADDED, 1, padded(b"{}"))],
        ),
        (
            "trailers",
            Served,
            vec![
                post(),
                data(flag::NONE, "{}"),
                frame(kind::HEADERS, flag::WHOLE, 1, block(&[("x-sum", "1")])),
            ],
        ),
        (
            "a pseudo-header among the trailers, which nobody is shown",
            Served,
            vec![post(), frame(kind::HEADERS, flag::WHOLE, 1, block(&GET[..1]))],
        ),
        ("te: trailers", Served, vec![with(&[("te", "trailers")])]),
        (
            "a smaller table",
            Served,
            vec![frame(kind::HEADERS, flag::WHOLE, 1, [&[0x20], &block(&GET)[..]].concat())],
        ),
        ("a window update", Served, vec![frame(kind::WINDOW_UPDATE, 0, 0, [0, 0, 0, 9]), get(1)]),
    ])
    .await;
}

#[tokio::test]
async fn frames_that_break_the_rules_of_the_connection_end_it() {
    let large = vec![0; (16 << 10) + 1];
    let none = flag::NONE;
    let open = frame(kind::HEADERS, flag::END_STREAM, 1, block(&GET));
    probe(&[
        ("DATA beyond the size of a frame", Ended, vec![post(), frame(kind::DATA, none, 1, &large)]),
        ("HEADERS beyond the size of a frame", Ended, vec![frame(kind::HEADERS, flag::WHOLE, 1, &large)]),
        ("an index that no table has", Ended, vec![frame(kind::HEADERS, flag::WHOLE, 1, [0xff, 0x7f])]),
        ("the index 0", Ended, vec![frame(kind::HEADERS, flag::WHOLE, 1, [0x80])]),
        ("a header cut in the middle", Ended, vec![frame(kind::HEADERS, flag::WHOLE, 1, [0, 9, b'a'])]),
        (
            "a table larger than allowed",
            Ended,
            vec![frame(kind::HEADERS, flag::WHOLE, 1, [0x3f, 0xe1, 0xff, 0x03])],
        ),
        (
            "a table's size after a header",
            Ended,
            vec![frame(kind::HEADERS, flag::WHOLE, 1, [&block(&GET)[..], &[0x20]].concat())],
        ),
        (
            "a Huffman code that ends in zeros",
            Ended,
            vec![frame(
                kind::HEADERS,
                flag::WHOLE,
                1,
                [&block(&GET)[..], &[0, 1, b'a', 0x81, 0x18]].concat(),
            )],
        ),
        (
            "a frame between HEADERS and CONTINUATION",
            Ended,
            vec![
                open.clone(),
                frame(kind::PRIORITY, none, 1, [0, 0, 0, 3, 9]),
                frame(kind::CONTINUATION, flag::END_HEADERS, 1, []),
            ],
        ),
        ("another stream between them", Ended, vec![open.clone(), get(3)]),
        (
            "a CONTINUATION of another stream",
            Ended,
            vec![open, frame(kind::CONTINUATION, flag::END_HEADERS, 3, [])],
        ),
        (
            "a CONTINUATION of nothing",
            Ended,
            vec![frame(kind::CONTINUATION, flag::END_HEADERS, 1, block(&GET))],
        ),
        ("a CONTINUATION of no stream", Ended, vec![frame(kind::CONTINUATION, flag::END_HEADERS, 0, [])]),
        ("DATA on a stream that is not open", Ended, vec![data(none, "{}")]),
        ("RST_STREAM on one", Ended, vec![frame(kind::RST_STREAM, none, 1, [0, 0, 0, 8])]),
        ("WINDOW_UPDATE on one", Ended, vec![frame(kind::WINDOW_UPDATE, none, 1, [0, 0, 0, 1])]),
        ("a stream of even number", Ended, vec![get(2)]),
        ("DATA on no stream", Ended, vec![frame(kind::DATA, none, 0, "{}")]),
        ("HEADERS on no stream", Ended, vec![frame(kind::HEADERS, flag::WHOLE, 0, block(&GET))]),
        ("PRIORITY on no stream", Ended, vec![frame(kind::PRIORITY, none, 0, [0, 0, 0, 1, 9])]),
        ("RST_STREAM on no stream", Ended, vec![frame(kind::RST_STREAM, none, 0, [0, 0, 0, 8])]),
        ("RST_STREAM of a wrong size", Ended, vec![post(), frame(kind::RST_STREAM, none, 1, [0, 0, 8])]),
        ("more padding than DATA", Ended, vec![post(), frame(kind::DATA, flag::PADDED, 1, [9, 1])]),
        (
            "more padding than HEADERS",
            Ended,
            vec![frame(kind::HEADERS, flag::WHOLE | flag::PADDED, 1, [99, 1])],
        ),
        ("SETTINGS on a stream", Ended, vec![frame(kind::SETTINGS, none, 1, [])]),
        ("SETTINGS of a wrong size", Ended, vec![frame(kind::SETTINGS, none, 0, [0; 3])]),
        ("an acknowledgement with SETTINGS", Ended, vec![frame(kind::SETTINGS, flag::ACK, 0, [0; 6])]),
        ("a push that is neither on nor off", Ended, vec![setting(2, 2)]),
        ("a window beyond 2^31", Ended, vec![setting(4, 1 << 31)]),
        ("frames smaller than allowed", Ended, vec![setting(5, (16 << 10) - 1)]),
        ("frames larger than allowed", Ended, vec![setting(5, 1 << 24)]),
        ("PING on a stream", Ended, vec![frame(kind::PING, none, 1, [0; 8])]),
        ("PING of a wrong size", Ended, vec![frame(kind::PING, none, 0, [0; 6])]),
        ("GOAWAY on a stream", Ended, vec![frame(kind::GOAWAY, none, 1, [0; 8])]),
        ("WINDOW_UPDATE by nothing", Ended, vec![frame(kind::WINDOW_UPDATE, none, 0, [0; 4])]),
        ("WINDOW_UPDATE of a wrong size", Ended, vec![frame(kind::WINDOW_UPDATE, none, 0, [0; 3])]),
        (
            "a connection's window beyond 2^31",
            Ended,
            vec![
                frame(kind::WINDOW_UPDATE, none, 0, [0x7f, 0xff, 0xff, 0xff]),
                frame(kind::WINDOW_UPDATE, none, 0, [0x7f, 0xff, 0xff, 0xff]),
            ],
        ),
        (
            "PUSH_PROMISE of a client",
            Ended,
            vec![
                post(),
                frame(kind::PUSH_PROMISE, flag::END_HEADERS, 1, [&[0, 0, 0, 2], &block(&GET)[..]].concat()),
            ],
        ),
    ])
    .await;
}

#[tokio::test]
async fn a_stream_that_breaks_the_rules_is_refused_and_never_passed_on() {
    let none = flag::NONE;
    let update = |by: [u8; 4]| frame(kind::WINDOW_UPDATE, none, 1, by);
    probe(&[
        (
            "a stream that depends on itself",
            Either,
            vec![frame(
                kind::HEADERS,
                flag::END_HEADERS | flag::PRIORITY,
                1,
                [&[0, 0, 0, 1, 9], &block(&POST)[..]].concat(),
            )],
        ),
        ("PRIORITY of a wrong size", Either, vec![post(), frame(kind::PRIORITY, none, 1, [0; 4])]),
        ("WINDOW_UPDATE of a stream by nothing", Either, vec![post(), update([0; 4])]),
        (
            "a stream's window beyond 2^31",
            Either,
            vec![post(), update([0x7f, 0xff, 0xff, 0xff]), update([0, 0, 0, 9])],
        ),
        (
            "trailers that do not end the stream",
            Either,
            vec![post(), frame(kind::HEADERS, flag::END_HEADERS, 1, block(&[("x-sum", "1")]))],
        ),
        (
            "less than was declared",
            Refused,
            vec![
                frame(
                    kind::HEADERS,
                    flag::END_HEADERS,
                    1,
                    block(&[&POST[..], &[("content-length", "9")]].concat()),
                ),
                data(flag::END_STREAM, "{}"),
            ],
        ),
        (
            "more than was declared",
            Refused,
            vec![
                frame(
                    kind::HEADERS,
                    flag::END_HEADERS,
                    1,
                    block(&[&POST[..], &[("content-length", "1")]].concat()),
                ),
                data(flag::END_STREAM, "{}"),
            ],
        ),
        ("nothing where something was declared", Refused, vec![with(&[("content-length", "1")])]),
        ("a header with capitals", Either, vec![with(&[("X-Probe", "1")])]),
        ("an unknown pseudo-header", Either, vec![only(&[&GET[..], &[(":probe", "1")]].concat())]),
        ("a pseudo-header of answers", Refused, vec![only(&[&GET[..], &[(":status", "200")]].concat())]),
        ("a pseudo-header after a header", Refused, vec![only(&[&[("x-probe", "1")], &GET[..]].concat())]),
        ("a pseudo-header twice", Refused, vec![only(&[&GET[..], &GET[2..3]].concat())]),
        ("no method", Refused, vec![without(":method")]),
        ("no scheme", Refused, vec![without(":scheme")]),
        ("no path", Refused, vec![without(":path")]),
        ("an empty path", Refused, vec![changed(":path", "")]),
        ("connection: close", Refused, vec![with(&[("connection", "close")])]),
        ("keep-alive", Refused, vec![with(&[("keep-alive", "1")])]),
        ("proxy-connection", Refused, vec![with(&[("proxy-connection", "close")])]),
        ("upgrade", Refused, vec![with(&[("upgrade", "h2c")])]),
        ("transfer-encoding", Refused, vec![with(&[("transfer-encoding", "chunked")])]),
        ("te beside trailers", Refused, vec![with(&[("te", "trailers, deflate")])]),
        ("CONNECT", Refused, vec![changed(":method", "CONNECT")]),
        ("TRACE", Refused, vec![changed(":method", "TRACE")]),
    ])
    .await;
}

#[tokio::test]
async fn bytes_that_would_be_another_request_in_http1_are_refused() {
    let smuggled = "x\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut probes: Vec<(String, Fate, Vec<Vec<u8>>)> = Vec::new();
    for bad in ["\r\n", "\r", "\n", "\0", smuggled] {
        let shown = bad.escape_debug();
        for name in [":method", ":path", ":authority", ":scheme"] {
            let value = GET.iter().find(|(own, _)| *own == name).map_or("", |(_, value)| value);
            let put = [format!("{value}{bad}"), format!("{bad}{value}")];
            let fate = if name == ":method" { Either } else { Refused };
            probes.extend(put.map(|put| (format!("{shown} in {name}"), fate, vec![changed(name, &put)])));
        }
        probes.push((format!("{shown} in a value"), Either, vec![with(&[("x-probe", &format!("a{bad}b"))])]));
        probes.push((format!("{shown} in a name"), Either, vec![with(&[(&format!("a{bad}b"), "1")])]));
    }
    for (name, value) in [
        (":path", "/a b"),
        (":path", "/a HTTP/1.1"),
        (":path", "a"),
        (":path", "//x\\y /"),
        (":authority", "x y"),
        (":authority", "x/y"),
        (":authority", "a@x"),
        (":authority", "x, y"),
        (":authority", ""),
        (":scheme", "http://x/ GET"),
    ] {
        probes.push((format!("{name} {value:?}"), Refused, vec![changed(name, value)]));
    }
    for method in ["GET /smuggled HTTP/1.1", ""] {
        probes.push((format!("the method {method:?}"), Either, vec![changed(":method", method)]));
    }
    for name in ["a b", "a:b", "", " a"] {
        probes.push((format!("the name {name:?}"), Either, vec![with(&[(name, "1")])]));
    }
    for (name, value) in [
        ("content-length", "+0"),
        ("content-length", "0, 0"),
        ("content-length", "0x0"),
        ("content-length", ""),
        ("host", "y"),
        ("host", "x/y"),
    ] {
        probes.push((format!("{name:?}: {value:?}"), Refused, vec![with(&[(name, value)])]));
    }
    probes.push(("two hosts".to_owned(), Refused, vec![with(&[("host", "x"), ("host", "y")])]));
    let lengths = with(&[("content-length", "0"), ("content-length", "1")]);
    probes.push(("two lengths".to_owned(), Refused, vec![lengths]));
    let probes: Vec<_> =
        probes.iter().map(|(name, fate, bytes)| (name.as_str(), *fate, bytes.clone())).collect();
    probe(&probes).await;
}
