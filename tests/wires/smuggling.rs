//! Requests that were tampered with, hundreds of them, behind and inside each other: what the engine sees is what
//! one strict reading of the bytes says, and nothing that comes after the first fault.
//!
//! The reading is a second one, written for this test from RFC 9112, over the whole of the bytes at once. So two
//! readers that know nothing of each other have to agree on where each request ends.

use crate::support::client::Line;
use crate::support::engine::{Answer, Engine, Seen};
use crate::support::http1::Wire;
use crate::support::one_upstream;
use crate::support::proxy::Proxy;
use crate::support::raw::Raw;
use futures::future::join_all;

/// Proxies that are tried at a time, and seeds for each.
const LANES: u64 = 8;
const SEEDS: u64 = 250;

/// A request: method, path, body.
type Request = (String, String, Vec<u8>);

/// What a smuggler might add to a head.
const HOSTILE: [&str; 26] = [
    "content-length: 0",
    "content-length: 5",
    "content-length: 05",
    "content-length: 5, 5",
    "content-length: +5",
    "content-length : 5",
    " content-length: 5",
    "content_length: 5",
    "content-length: 5\u{b}",
    "content-length:\t5\t",
    "transfer-encoding: chunked",
    "Transfer-Encoding: CHUNKED",
    "transfer-encoding: identity",
    "transfer-encoding: chunked, identity",
    "transfer-encoding : chunked",
    "transfer-encoding: x\r\ntransfer-encoding: chunked",
    "transfer-encoding:\u{b}chunked",
    "transfer-encoding: \u{0}chunked",
    "x: y\rtransfer-encoding: chunked",
    "x: y\ntransfer-encoding: chunked",
    "x: y\r\n\ttransfer-encoding: chunked",
    "connection: transfer-encoding",
    "connection: close",
    "host: x",
    "expect: 100-continue",
    "upgrade: h2c\r\nconnection: upgrade",
];

/// Requests as a client would send them, with another request hidden in the bodies.
fn sound(rng: &mut fastrand::Rng) -> Vec<u8> {
    let hidden = "GET /hidden HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut all = String::new();
    for number in 0..rng.usize(1..5) {
        all += &match rng.u32(..4) {
            0 => format!("GET /{number} HTTP/1.1\r\nhost: x\r\n\r\n"),
            1 => format!("GET http://x/{number} HTTP/1.1\r\nhost: x\r\n\r\n"),
            2 => format!(
                "POST /{number} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{hidden}",
                hidden.len()
            ),
            _ => {
                let head =
                    format!("POST /{number} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
                format!("{head}5\r\nfirst\r\n{:x};a=b\r\n{hidden}\r\n0\r\nx-sum: 1\r\n\r\n", hidden.len())
            }
        };
    }
    (all + "GET /end HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").into_bytes()
}

/// The same after somebody has been at it.
fn tampered(rng: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = sound(rng);
    for _ in 0..rng.usize(..4) {
        let ends: Vec<usize> = (0..bytes.len() - 1).filter(|&at| bytes[at..].starts_with(b"\r\n")).collect();
        let Some(&end) = rng.choice(&ends) else { return bytes };
        let at = rng.usize(..bytes.len());
        match rng.u32(..8) {
            0 | 1 => {
                let line = format!("\r\n{}", HOSTILE[rng.usize(..HOSTILE.len())]);
                bytes.splice(end..end, line.bytes());
            }
            2 => drop(bytes.remove(end)),
            3 => drop(bytes.remove(end + 1)),
            4 => bytes.insert(at, *rng.choice(b"\r\n\0 \t:;,0aZ\x0b\x7f\xff").unwrap_or(&0)),
            5 => drop(bytes.remove(at)),
            6 => bytes[at] = *rng.choice(b"\r\n 059af;:").unwrap_or(&0),
            _ => bytes.splice(end..end, *b"\r\n").for_each(drop),
        }
    }
    bytes
}

/// The requests in `bytes`, up to the first that has more than one reading, or none.
fn strictly_read(mut bytes: &[u8]) -> Vec<Request> {
    let mut requests = Vec::new();
    while let Some((request, rest, last)) = next(bytes) {
        requests.push(request);
        if last {
            break;
        }
        bytes = rest;
    }
    requests
}

/// The first request in `bytes`, what follows it, and whether the connection ends with it.
fn next(mut bytes: &[u8]) -> Option<(Request, &[u8], bool)> {
    while let Some(rest) = bytes.strip_prefix(b"\r\n") {
        bytes = rest;
    }
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    let mut rest = &bytes[end + 4..];
    let head = latin1(&bytes[..end]);
    let mut lines = head.split("\r\n");
    let [method, target, version] = lines.next()?.split(' ').collect::<Vec<_>>().try_into().ok()?;
    let fields: Vec<(String, &str)> = lines.map(field).collect::<Option<_>>()?;
    let all =
        |name: &str| fields.iter().filter(|(n, _)| n == name).map(|(_, value)| *value).collect::<Vec<_>>();
    let (hosts, lengths, codings) = (all("host"), all("content-length"), all("transfer-encoding"));
    let is_visible = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
    if hosts.len() != 1 || !is_visible(method) || !is_visible(target) || version != "HTTP/1.1" {
        return None;
    }
    let body = match (&lengths[..], &codings[..]) {
        ([], []) => Vec::new(),
        ([length], []) if length.bytes().all(|b| b.is_ascii_digit()) => {
            let (body, after) = rest.split_at_checked(length.parse().ok()?)?;
            rest = after;
            body.to_vec()
        }
        ([], [coding]) if coding.eq_ignore_ascii_case("chunked") => chunked(&mut rest)?,
        _ => return None,
    };
    let closes = all("connection").iter().any(|value| value.eq_ignore_ascii_case("close"));
    let path = target.strip_prefix("http://x").unwrap_or(target);
    Some(((method.to_owned(), path.to_owned(), body), rest, closes))
}

/// One character for each byte.
fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| char::from(byte)).collect()
}

/// Whether nothing in `text` is a control character but the tab; above ASCII, anything is text (RFC 9110 s.5.5).
fn is_text(text: &str) -> bool {
    text.chars().all(|c| c == '\t' || (c >= ' ' && c != '\u{7f}'))
}

/// A header's name, in lower case, and its value.
fn field(line: &str) -> Option<(String, &str)> {
    let (name, value) = line.split_once(':')?;
    let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    let sound = !name.is_empty() && name.bytes().all(is_token);
    (sound && is_text(value)).then(|| (name.to_ascii_lowercase(), value.trim_matches([' ', '\t'])))
}

/// The body that `rest` begins with, which is cut to what follows it.
fn chunked(rest: &mut &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = line(rest)?;
        let (digits, _extension) = line.split_once(';').unwrap_or((&line, ""));
        let sound = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
        let size = usize::from_str_radix(digits, 16).ok().filter(|_| sound)?;
        if size == 0 {
            break;
        }
        let (data, after) = rest.split_at_checked(size)?;
        body.extend_from_slice(data);
        *rest = after.strip_prefix(b"\r\n")?;
    }
    while !line(rest)?.is_empty() {}
    Some(body)
}

/// The line that `rest` begins with, which is cut to what follows it.
fn line(rest: &mut &[u8]) -> Option<String> {
    let end = rest.windows(2).position(|two| two == b"\r\n")?;
    let (line, after) = rest.split_at(end);
    *rest = &after[2..];
    Some(latin1(line)).filter(|line| is_text(line))
}

/// How many requests the client was told were served, by the bytes of all answers.
async fn served(answers: &[u8]) -> usize {
    let mut wire = Wire::new(answers);
    let mut count = 0;
    while let Ok(Some(head)) = wire.head().await {
        let Ok(_body) = wire.body(head.response_framing().expect("one framing")).await else { break };
        count += usize::from(head.status() == 200);
    }
    count
}

/// Sends what seed makes of a connection; what is wrong with what the engine saw.
async fn fault(proxy: &Proxy, engine: &Engine, seed: u64) -> Option<String> {
    let bytes = tampered(&mut fastrand::Rng::with_seed(seed));
    engine.forget();
    let mut client = Raw::connect(proxy.address(Line::Http1)).await;
    // The proxy may have ended the connection before it has read all.
    let _cut = client.send(&bytes).await;
    let answers = client.until_ended().await;
    let request =
        |seen: Seen| (seen.head.method().to_owned(), seen.head.path().to_owned(), seen.body.to_vec());
    let seen: Vec<Request> = engine.seen().into_iter().map(request).collect();
    let read = strictly_read(&bytes);
    let told = served(&answers).await;
    let agree = read.starts_with(&seen) && told == seen.len();
    let shown = |requests: &[Request]| {
        requests
            .iter()
            .map(|(m, path, body)| format!("{m} {path} ({} bytes)", body.len()))
            .collect::<Vec<_>>()
    };
    (!agree).then(|| {
        format!(
            "seed {seed}: the engine saw {:?}, {:?} was sent, {told} were served\n{:?}\n{:?}",
            shown(&seen),
            shown(&read),
            String::from_utf8_lossy(&bytes),
            String::from_utf8_lossy(&answers)
        )
    })
}

/// `PLIMSOLL_SEED=N cargo test --test wires smuggling` tries one seed only.
#[tokio::test]
async fn nothing_that_was_tampered_with_reaches_an_engine_as_something_else() {
    let only: Option<u64> = std::env::var("PLIMSOLL_SEED").ok().and_then(|seed| seed.parse().ok());
    let lane = async |lane: u64| {
        let engine = Engine::start(|_| Answer::json(200, "{}"));
        let limits = "{ header_timeout: 200ms, body_timeout: 200ms, client_idle: 200ms }";
        let rest = one_upstream(&[engine.address()], "max_fails: 0");
        let proxy = Proxy::start(&format!("limits: {limits}\n{rest}")).await;
        let mut served = 0;
        for seed in only.map_or(lane * SEEDS..(lane + 1) * SEEDS, |seed| seed..seed + 1) {
            if let Some(fault) = fault(&proxy, &engine, seed).await {
                panic!("{fault}");
            }
            served += engine.count();
        }
        proxy.assert_at_rest().await;
        served
    };
    let lanes = 0..if only.is_some() { 1 } else { LANES };
    let served: usize = join_all(lanes.map(lane)).await.into_iter().sum();
    assert!(only.is_some() || served > 200, "only {served} requests were served at all");
}

#[test]
fn the_second_reading_takes_what_is_sound_and_stops_at_a_fault() {
    let paths = |text: &str| -> Vec<String> {
        strictly_read(text.as_bytes()).into_iter().map(|(_, path, _)| path).collect()
    };
    let get = "GET /a HTTP/1.1\r\nhost: x\r\n\r\n";
    let post =
        "POST /b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1;a\r\nx\r\n0\r\nt: 1\r\n\r\n";
    assert_eq!(paths(&format!("{get}\r\n{post}{get}")), ["/a", "/b", "/a"]);
    for fault in [
        "GET /c HTTP/1.1\nhost: x\r\n\r\n",
        "GET /c HTTP/1.1\r\n\r\n",
        "POST /c HTTP/1.1\r\nhost: x\r\nx\r\n\r\n",
    ] {
        assert_eq!(paths(&format!("{get}{fault}{get}")), ["/a"], "{fault:?}");
    }
    let both =
        "POST /c HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
    assert_eq!(paths(both), [""; 0]);
}
