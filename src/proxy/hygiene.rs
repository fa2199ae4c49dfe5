//! What a request must be like, whichever protocol it came by, before anything is done for it.
//!
//! HTTP/1 heads have been looked at by then, as bytes (`ingress/head.rs`); HTTP/2 has one form only, but the
//! same limits, and an authority that may be as odd as a Host.

use http::header;
use pingora::http::RequestHeader;

use super::Refusal;
use crate::config::Limits;

/// Pingora gives up at ten.
const NAMED_LIMIT: usize = 8;

/// Why `request` is refused, if it is.
pub fn flaw(request: &RequestHeader, limits: &Limits) -> Option<Refusal> {
    if matches!(request.method, http::Method::CONNECT | http::Method::TRACE) {
        return Some(Refusal::method_not_allowed());
    }
    if request.raw_path().len() as u64 > limits.url {
        return Some(Refusal::url_too_long(limits.url));
    }
    if request.headers.len() as u64 > u64::from(limits.header_count) {
        return Some(Refusal::headers_too_large(limits));
    }
    let host = request.headers.get(header::HOST).map(header::HeaderValue::as_bytes);
    let authority = request.uri.authority().map(|authority| authority.as_str().as_bytes());
    if [host, authority].into_iter().flatten().any(|host| !is_host(host)) {
        return Some(Refusal::bad_host("it is no host name, with or without a port"));
    }
    let named = request.headers.get_all(header::CONNECTION).iter().flat_map(names);
    for (count, name) in (1..).zip(named) {
        if count > NAMED_LIMIT {
            return Some(Refusal::malformed("`connection` names too many headers"));
        }
        if may_not_be_named(name) {
            let name = String::from_utf8_lossy(name);
            return Some(Refusal::malformed(&format!("`connection` may not name `{name}`")));
        }
    }
    None
}

/// The names in a value of `Connection`.
pub(super) fn names(value: &header::HeaderValue) -> impl Iterator<Item = &[u8]> {
    value.as_bytes().split(|&b| b == b',').map(<[u8]>::trim_ascii).filter(|name| !name.is_empty())
}

/// What `Connection` takes away is gone for the engine; these are ours to say.
fn may_not_be_named(name: &[u8]) -> bool {
    let is_token = http::HeaderName::from_bytes(name).is_ok() && !name.contains(&b'"');
    let is = |other: &[u8]| name.eq_ignore_ascii_case(other);
    let begins = |start: &[u8]| name.len() >= start.len() && name[..start.len()].eq_ignore_ascii_case(start);
    !is_token
        || is(b"host")
        || is(b"forwarded")
        || is(b"via")
        || begins(b"content-")
        || begins(b"x-forwarded-")
}

/// Whether `host` is a name, an IPv4 address or an IPv6 address in brackets, with or without a port.
pub fn is_host(host: &[u8]) -> bool {
    let colon = host.iter().rposition(|&b| b == b':').filter(|_| !host.ends_with(b"]"));
    let (name, port) = colon.map_or((host, None), |at| (&host[..at], Some(&host[at + 1..])));
    let is_port = |port: &[u8]| (1..=5).contains(&port.len()) && port.iter().all(u8::is_ascii_digit);
    let is_name = match name {
        [b'[', address @ .., b']'] => {
            std::str::from_utf8(address).is_ok_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok())
        }
        _ => !name.is_empty() && name.iter().all(|&b| b.is_ascii_alphanumeric() || b"-._~".contains(&b)),
    };
    is_name && port.is_none_or(is_port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_may_name_what_is_of_the_connection_only() {
        let flaw = |value: &str| {
            let mut request = RequestHeader::build("POST", b"/", None).unwrap();
            request.insert_header("connection", value).unwrap();
            flaw(&request, &Limits::default()).map(|refusal| refusal.code)
        };
        for fine in ["close", "keep-alive, X-Own", "Upgrade, HTTP2-Settings", "TE,,close"] {
            assert_eq!(flaw(fine), None, "{fine}");
        }
        for odd in
            ["host", "close, Content-Length", "X-Forwarded-For", "\"x-forwarded-for\"", "a b", ":authority"]
        {
            assert_eq!(flaw(odd), Some("bad_request"), "{odd}");
        }
        assert_eq!(flaw(&["a"; 9].join(",")), Some("bad_request"));
        assert_eq!(flaw(&["a"; 8].join(",")), None);
    }

    #[test]
    fn a_host_is_a_name_or_an_address_with_or_without_a_port() {
        for host in ["x", "api.example.com.", "a_b-c", "10.0.0.1:80", "[::1]", "[fe80::1]:65535"] {
            assert!(is_host(host.as_bytes()), "{host}");
        }
        for host in [
            "", ":80", "x:", "x:a", "x:123456", "a b", "a,b", "a/b", "a@b", "::1", "[::1", "[x]", "[::1]x",
            "é",
        ] {
            assert!(!is_host(host.as_bytes()), "{host}");
        }
    }
}
