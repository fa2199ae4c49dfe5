//! The head of an HTTP/1 request, as bytes: refused unless there is only one way to read it.
//!
//! Two readers that cut the same bytes differently are how requests are smuggled (RFC 9112 s.11.2), and a
//! parser that has put things right shows nobody what was wrong. So this looks before Pingora parses: lines
//! end in CRLF, names are tokens, nothing is folded, one Host, and at most one framing header, which says a
//! number or `chunked`.

use http::uri::PathAndQuery;
use memchr::{memchr, memchr_iter};

use super::Refusal;
use crate::config::Limits;

/// What of the first line is not its target: method, blanks, version.
const AROUND_TARGET: usize = 64;

/// How the body of a request is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    Bodiless,
    /// So many bytes.
    Length(u64),
    /// By chunks.
    Chunked,
}

/// How long the head is that `bytes` begin with; `None` if its end is not there yet. The first `searched`
/// bytes are known not to hold it.
///
/// # Errors
/// It is too long already, or has a line that does not end in CRLF.
pub fn length(bytes: &[u8], searched: usize, limits: &Limits) -> Result<Option<usize>, Refusal> {
    let mut at = searched;
    while let Some(lf) = memchr(b'\n', &bytes[at..]).map(|n| at + n) {
        if !bytes[..lf].ends_with(b"\r") {
            return Err(Refusal::malformed("a line that does not end in CRLF"));
        }
        at = lf + 1;
        if bytes[..lf].ends_with(b"\r\n\r") {
            return if at as u64 > limits.headers { Err(too_large(bytes, limits)) } else { Ok(Some(at)) };
        }
    }
    let line = memchr(b'\n', bytes).unwrap_or(bytes.len()) as u64;
    if line > longest_line(limits) || bytes.len() as u64 >= limits.headers {
        Err(too_large(bytes, limits))
    } else {
        Ok(None)
    }
}

/// The longest first line, in bytes, without its LF.
const fn longest_line(limits: &Limits) -> u64 {
    limits.url + AROUND_TARGET as u64
}

/// What is too large: the URL, if the first line alone is.
fn too_large(bytes: &[u8], limits: &Limits) -> Refusal {
    let line = bytes.iter().take_while(|&&b| b != b'\n').count();
    if line as u64 > longest_line(limits) {
        Refusal::url_too_long(limits.url)
    } else {
        Refusal::headers_too_large(limits)
    }
}

/// Reads a whole head, with its empty line at the end; how its body is delimited.
///
/// # Errors
/// It may be read in two ways, is malformed, or goes beyond the limits.
pub fn check(head: &[u8], limits: &Limits) -> Result<Framing, Refusal> {
    let mut at = 0;
    let mut lines = memchr_iter(b'\n', head).map(|lf| {
        let line = &head[at..lf];
        at = lf + 1;
        line.strip_suffix(b"\r").unwrap_or(line)
    });
    let line = RequestLine::read(lines.next().unwrap_or_default(), limits)?;
    let mut seen = Seen::default();
    let mut count = 0;
    for field in lines.take_while(|line| !line.is_empty()) {
        count += 1;
        if count > limits.header_count {
            return Err(Refusal::headers_too_large(limits));
        }
        seen.field(field)?;
    }
    seen.host(&line)?;
    seen.framing(line.is_http11)
}

struct RequestLine<'a> {
    authority: Option<&'a [u8]>,
    is_http11: bool,
}

impl<'a> RequestLine<'a> {
    fn read(line: &'a [u8], limits: &Limits) -> Result<Self, Refusal> {
        let mut parts = line.splitn(4, |&b| b == b' ');
        let (Some(method), Some(target), Some(version), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Refusal::malformed("a first line that is not method, target and version"));
        };
        if method.is_empty() || !method.iter().all(|&b| is_token(b)) {
            return Err(Refusal::malformed("a method that is not a token"));
        }
        let is_http11 = match version {
            b"HTTP/1.1" => true,
            b"HTTP/1.0" => false,
            _ => return Err(Refusal::malformed("a version that is neither HTTP/1.1 nor HTTP/1.0")),
        };
        if matches!(method, b"CONNECT" | b"TRACE") {
            return Err(Refusal::method_not_allowed());
        }
        // A line as long, with its CR, is not waited for either.
        if target.len() as u64 > limits.url || line.len() as u64 >= longest_line(limits) {
            return Err(Refusal::url_too_long(limits.url));
        }
        let (authority, path) = match target {
            b"*" if method == b"OPTIONS" => (None, target),
            [b'/', ..] => (None, target),
            _ => {
                let split = split(target).ok_or_else(|| Refusal::malformed("a target that is no path"))?;
                (Some(split.0), split.1)
            }
        };
        // What the parser behind would refuse without a word.
        if !target.iter().all(u8::is_ascii_graphic) || PathAndQuery::try_from(path).is_err() {
            return Err(Refusal::malformed("a target with characters that a URL cannot hold"));
        }
        Ok(Self { authority, is_http11 })
    }
}

/// The authority of a target in absolute form, and what follows it.
fn split(target: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = target.windows(3).position(|three| three == b"://")?;
    let (scheme, rest) = (&target[..at], &target[at + 3..]);
    let known = scheme.eq_ignore_ascii_case(b"http") || scheme.eq_ignore_ascii_case(b"https");
    let end = rest.iter().position(|b| b"/?#".contains(b)).unwrap_or(rest.len());
    known.then(|| rest.split_at(end))
}

/// The headers that decide where a request goes and where it ends.
#[derive(Default)]
struct Seen<'a> {
    host: Option<&'a [u8]>,
    length: Option<&'a [u8]>,
    coding: Option<&'a [u8]>,
}

impl<'a> Seen<'a> {
    fn field(&mut self, line: &'a [u8]) -> Result<(), Refusal> {
        if line.starts_with(b" ") || line.starts_with(b"\t") {
            return Err(Refusal::malformed("a header that is folded over two lines"));
        }
        let colon = memchr(b':', line);
        let (name, value) = colon.map_or((line, None), |at| (&line[..at], Some(&line[at + 1..])));
        let Some(value) = value.filter(|_| !name.is_empty() && name.iter().all(|&b| is_token(b))) else {
            return Err(Refusal::malformed("a header whose name is not a token before a colon"));
        };
        // To the end, whatever comes: so it is done sixteen at a time.
        if value.iter().fold(false, |found, &b| found | (b < b' ' && b != b'\t') | (b == 0x7f)) {
            return Err(Refusal::malformed("a control character in a header"));
        }
        let (place, twice): (_, fn() -> Refusal) = match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => {
                (&mut self.host, || Refusal::bad_host("there is more than one"))
            }
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                (&mut self.length, || Refusal::ambiguous_framing("content-length is there twice"))
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                (&mut self.coding, || Refusal::ambiguous_framing("transfer-encoding is there twice"))
            }
            _ => return Ok(()),
        };
        if place.replace(trim(value)).is_some() { Err(twice()) } else { Ok(()) }
    }

    fn host(&self, line: &RequestLine<'_>) -> Result<(), Refusal> {
        let Some(host) = self.host else {
            let may_lack = !line.is_http11 && line.authority.is_none();
            return if may_lack { Ok(()) } else { Err(Refusal::bad_host("there is none")) };
        };
        if !crate::proxy::is_host(host) {
            return Err(Refusal::bad_host("it is no host name, with or without a port"));
        }
        if line.authority.is_some_and(|authority| authority != host) {
            return Err(Refusal::bad_host("it is not the host of the URL"));
        }
        Ok(())
    }

    fn framing(&self, is_http11: bool) -> Result<Framing, Refusal> {
        match (self.length, self.coding) {
            (None, None) => Ok(Framing::Bodiless),
            (Some(_), Some(_)) => {
                Err(Refusal::ambiguous_framing("content-length and transfer-encoding exclude each other"))
            }
            (Some(length), None) => {
                let digits =
                    std::str::from_utf8(length).ok().filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
                let number = digits.and_then(|digits| digits.parse().ok()).map(Framing::Length);
                number.ok_or_else(|| Refusal::ambiguous_framing("content-length is not a number"))
            }
            (None, Some(coding)) if is_http11 && coding.eq_ignore_ascii_case(b"chunked") => {
                Ok(Framing::Chunked)
            }
            (None, Some(_)) if is_http11 => {
                Err(Refusal::ambiguous_framing("the only transfer-encoding is `chunked`"))
            }
            (None, Some(_)) => Err(Refusal::ambiguous_framing("HTTP/1.0 has no transfer-encoding")),
        }
    }
}

/// `value` without the blanks around it (RFC 9110 s.5.6.3); no other control characters, as `trim_ascii` would.
fn trim(value: &[u8]) -> &[u8] {
    let is_text = |b: &u8| !matches!(b, b' ' | b'\t');
    let start = value.iter().position(is_text).unwrap_or(value.len());
    let end = value.iter().rposition(is_text).map_or(start, |at| at + 1);
    &value[start..end]
}

/// RFC 9110 s.5.6.2.
const fn is_token(b: u8) -> bool {
    TOKEN[b as usize]
}

const TOKEN: [bool; 256] = {
    let mut table = [false; 256];
    let mut b = 0;
    while b < 256 {
        let byte = b as u8;
        table[b] = byte.is_ascii_alphanumeric()
            || matches!(byte, b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'^'..=b'`' | b'|' | b'~');
        b += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said of a head with these lines after the first, LF written for CRLF.
    fn checked(first: &str, fields: &str) -> Result<Framing, &'static str> {
        let head = format!("{first}\n{fields}\n\n").replace("\n\n\n", "\n\n").replace('\n', "\r\n");
        check(head.as_bytes(), &Limits::default()).map_err(|refusal| refusal.code)
    }

    const POST: &str = "POST /v1/x HTTP/1.1";

    #[test]
    fn one_framing_header_with_one_meaning_is_read() {
        assert_eq!(checked(POST, "Host: x"), Ok(Framing::Bodiless));
        assert_eq!(checked(POST, "Host: x\ncontent-LENGTH:\t12 "), Ok(Framing::Length(12)));
        assert_eq!(checked(POST, "Host: [::1]:80\nTransfer-Encoding: Chunked"), Ok(Framing::Chunked));
        assert_eq!(checked("GET / HTTP/1.0", ""), Ok(Framing::Bodiless));
        assert_eq!(checked("GET http://x:1/a HTTP/1.1", "host: x:1"), Ok(Framing::Bodiless));
        assert_eq!(checked("OPTIONS * HTTP/1.1", "host: x"), Ok(Framing::Bodiless));
    }

    #[test]
    fn a_framing_that_two_readers_could_read_differently_is_refused() {
        for fields in [
            "content-length: 5\ncontent-length: 5",
            "content-length: 5, 5",
            "content-length: +5",
            "content-length: 0x5",
            "content-length: ",
            "content-length: 18446744073709551616",
            "content-length: 5\ntransfer-encoding: chunked",
            "transfer-encoding: chunked\ntransfer-encoding: chunked",
            "transfer-encoding: chunked, identity",
            "transfer-encoding: gzip, chunked",
            "transfer-encoding: \"chunked\"",
            "transfer-encoding: \u{b}chunked",
            "transfer-encoding: \u{c}chunked",
            "transfer-encoding: chunked\r",
            "content-length: \u{c}5",
        ] {
            let code = checked(POST, &format!("host: x\n{fields}")).unwrap_err();
            assert!(["ambiguous_framing", "bad_request"].contains(&code), "{fields}: {code}");
        }
        let old = checked("POST / HTTP/1.0", "host: x\ntransfer-encoding: chunked");
        assert_eq!(old, Err("ambiguous_framing"));
    }

    #[test]
    fn a_head_that_is_not_written_as_the_standard_says_is_refused() {
        for fields in
            ["host : x", "host\n", " host: x", "host: x\n folded: y", "host: x\n: y", "host: x\na\u{b}: y"]
        {
            assert_eq!(checked(POST, fields), Err("bad_request"), "{fields:?}");
        }
        for first in [
            "GET /",
            "GET  / HTTP/1.1",
            "GET / HTTP/1.1 ",
            "GET / HTTP/1.2",
            "GET / http/1.1",
            "G@T / HTTP/1.1",
            " / HTTP/1.1",
            "GET x HTTP/1.1",
            "GET * HTTP/1.1",
            "GET /\u{7f} HTTP/1.1",
            "GET /ä HTTP/1.1",
            "GET ftp://x/ HTTP/1.1",
        ] {
            assert_eq!(checked(first, "host: x"), Err("bad_request"), "{first:?}");
        }
        let cut = |bytes: &[u8]| length(bytes, 0, &Limits::default()).map_err(|refusal| refusal.code);
        assert_eq!(cut(b"GET / HTTP/1.1\nhost: x\n\n"), Err("bad_request"));
        assert_eq!(checked("GET / HTTP/1.1", "host: x\na: b\rc: d"), Err("bad_request"));
        assert_eq!(checked("CONNECT x:1 HTTP/1.1", "host: x:1"), Err("method_not_allowed"));
    }

    #[test]
    fn a_host_that_is_missing_odd_or_there_twice_is_refused() {
        for fields in ["a: b", "host: ", "host: a b", "host: a,b", "host: a/b", "host: a@b", "host: a:b"] {
            assert_eq!(checked(POST, fields), Err("bad_host"), "{fields:?}");
        }
        assert_eq!(checked(POST, "host: x\nHOST: x"), Err("bad_host"));
        assert_eq!(checked("GET http://x/ HTTP/1.1", "host: y"), Err("bad_host"));
    }

    #[test]
    fn the_end_of_a_head_is_found_wherever_the_network_cut_it() {
        let limits = Limits::default();
        let bytes = b"GET / HTTP/1.1\r\nhost: x\r\n\r\nrest";
        let whole = bytes.len() - 4;
        for cut in 0..bytes.len() {
            assert_eq!(length(&bytes[..cut], 0, &limits), Ok((cut >= whole).then_some(whole)), "{cut}");
            assert_eq!(length(bytes, cut.min(whole - 1), &limits), Ok(Some(whole)), "{cut}");
        }
    }

    #[test]
    fn what_is_too_long_is_refused_before_it_has_all_come() {
        let limits = Limits { url: 100, headers: 400, header_count: 3, ..Limits::default() };
        let refused = |bytes: &[u8]| length(bytes, 0, &limits).map_err(|refusal| refusal.code);
        assert_eq!(refused(&[b'a'; 200]), Err("url_too_long"));
        assert_eq!(
            refused(format!("GET / HTTP/1.1\r\n{}", "a".repeat(400)).as_bytes()),
            Err("headers_too_large")
        );
        let dripped = (1..200).find(|&come| length(&[b'a'; 200][..come], come - 1, &limits).is_err());
        assert_eq!(dripped, Some(100 + AROUND_TARGET + 1), "however little comes at a time");
        assert_eq!(refused(&[&[b'a'; 200][..], b"\r\nhost: x"].concat()), Err("url_too_long"));
        let url = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(100));
        let method = format!("{} / HTTP/1.1\r\nhost: x\r\n\r\n", "A".repeat(160));
        for head in [url, method] {
            assert_eq!(check(head.as_bytes(), &limits).map_err(|refusal| refusal.code), Err("url_too_long"));
        }
        let many = format!("GET / HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(3));
        assert_eq!(check(many.as_bytes(), &limits).map_err(|refusal| refusal.code), Err("headers_too_large"));
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let pieces: [&[u8]; 12] = [
            b"GET ",
            b"/",
            b" HTTP/1.1\r\n",
            b"\r\n",
            b"\n",
            b":",
            b"host: x",
            b"content-length: ",
            b"://",
            b"9",
            b"\0",
            b"\xff",
        ];
        for _ in 0..20_000 {
            let bytes: Vec<u8> =
                (0..rng.usize(..20)).flat_map(|_| pieces[rng.usize(..pieces.len())]).copied().collect();
            let _verdict = length(&bytes, 0, &Limits::default());
            let _framing = check(&bytes, &Limits::default());
        }
    }
}
