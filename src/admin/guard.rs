//! Who may ask: whoever has the token; and no web page.
//!
//! A browser on this machine reaches the listener too, and runs pages of everybody's. Two tricks of such a page are
//! refused with 403:
//!
//! * **Another site's request.** A page of `evil.example` may post a form to `http://127.0.0.1:9090/drain` without
//!   reading the answer. Browsers say then whose page it is, as `origin`: it has to be the host that is asked.
//! * **DNS rebinding.** A page of `evil.example:9090`, whose name suddenly means 127.0.0.1, is of the same origin as we
//!   are, and may read everything. Only its `host` gives it away. Where no token is asked for, a host is an address, or
//!   `localhost`, or the name under which we listen; a page at an address has been served by that very address. Where a
//!   token is asked for, any name may be ours, and the page has no token. A Unix socket is reached by no page at all.

use http::header;
use pingora::http::RequestHeader;

use crate::config::{AdminAddress, Secret};

/// What is asked of a request.
pub(super) struct Guard {
    token: Option<Secret>,
    /// The host under which we listen; `None` on a Unix socket.
    host: Option<String>,
}

impl Guard {
    /// The guard of a listener at `address`, with this token.
    pub(super) fn new(address: &AdminAddress, token: Option<Secret>) -> Self {
        let host = match address {
            AdminAddress::Tcp(address) => Some(host_of(address).to_owned()),
            AdminAddress::Unix(_) => None,
        };
        Self { token, host }
    }

    /// Whether the request shows the token, if one is asked for.
    pub(super) fn knows_token(&self, request: &RequestHeader) -> bool {
        let Some(token) = &self.token else { return true };
        let presented = request.headers.get(header::AUTHORIZATION).and_then(|value| bearer(value.as_bytes()));
        presented.is_some_and(|presented| token.is(presented))
    }

    /// What is wrong with where the request comes from, if anything.
    pub(super) fn is_foreign(&self, request: &RequestHeader) -> Option<&'static str> {
        let hosts = || request.headers.get_all(header::HOST).iter().map(|host| host.to_str().unwrap_or("?"));
        let named = self.host.as_deref().filter(|_| self.token.is_none());
        if let Some(ours) = named
            && !hosts().all(|host| is_ours(host_of(host), ours))
        {
            return Some("the host of the request is none of ours: ask for an address or localhost");
        }
        let is_host = |origin: &str| {
            let authority = origin.split_once("://").map_or("", |(_, authority)| authority);
            hosts().all(|host| host.eq_ignore_ascii_case(authority))
        };
        let mut origins =
            request.headers.get_all(header::ORIGIN).iter().map(|origin| origin.to_str().unwrap_or("?"));
        origins.any(|origin| !is_host(origin)).then_some("not from a page of another site")
    }
}

/// Whether a host that was asked for is an address, this machine, or the one under which we listen.
fn is_ours(host: &str, ours: &str) -> bool {
    let is_address = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>().is_ok();
    is_address || host.eq_ignore_ascii_case("localhost") || host.eq_ignore_ascii_case(ours)
}

/// The host of `host:port` or `host`.
fn host_of(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    }
}

/// The token of `authorization: Bearer TOKEN`.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn foreign(guard: &Guard, host: &str, origin: Option<&str>) -> bool {
        let mut request = RequestHeader::build("POST", b"/drain", None).unwrap();
        request.insert_header("host", host).unwrap();
        if let Some(origin) = origin {
            request.insert_header("origin", origin).unwrap();
        }
        guard.is_foreign(&request).is_some()
    }

    #[test]
    fn a_name_that_is_not_ours_is_a_rebound_one() {
        let guard = Guard::new(&AdminAddress::Tcp("gpu-1:9090".to_owned()), None);
        for ours in [
            "127.0.0.1:9090",
            "127.0.0.1",
            "[::1]:9090",
            "localhost",
            "LOCALHOST:80",
            "gpu-1:9090",
            "10.1.1.1",
        ] {
            assert!(!foreign(&guard, ours, None), "{ours}");
        }
        for theirs in [
            "evil.example:9090",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "",
            "127.1:x",
        ] {
            assert!(foreign(&guard, theirs, None), "{theirs}");
        }
        let socket = Guard::new(&AdminAddress::Unix("/run/a.sock".into()), None);
        assert!(!foreign(&socket, "anything", None));
    }

    #[test]
    fn a_page_of_another_site_may_not_ask() {
        let guard = Guard::new(&AdminAddress::Tcp("127.0.0.1:9090".to_owned()), None);
        let host = "127.0.0.1:9090";
        for own in ["http://127.0.0.1:9090", "https://127.0.0.1:9090"] {
            assert!(!foreign(&guard, host, Some(own)), "{own}");
        }
        for other in
            ["http://evil.example", "null", "", "http://127.0.0.1", "http://127.0.0.1:9091", "127.0.0.1:9090"]
        {
            assert!(foreign(&guard, host, Some(other)), "{other}");
        }
    }
}
