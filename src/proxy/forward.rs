//! What is passed on of who asked, and what is not: forwarding headers and those that end at each hop.
//!
//! The engine is told who the client is, by which scheme and host it came: `X-Forwarded-For`, `-Proto`,
//! `-Host` and `Forwarded` (RFC 7239). Only a proxy that we trust may say so of somebody else; what anybody
//! else sends of the kind is dropped, with the spellings that some frameworks take for the same
//! (`X_Forwarded_For`). `Via` is added to requests, as RFC 9110 s.7.6.3 asks of a gateway, and not to
//! answers, where it may be left out and would tell strangers what we are.

use std::net::IpAddr;

use http::header::{self, HeaderName, HeaderValue};
use pingora::Result;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::ServerSession;

use super::hygiene;
use crate::config::Network;

const FOR: &str = "x-forwarded-for";
const PROTO: &str = "x-forwarded-proto";
const HOST: &str = "x-forwarded-host";
/// What we call ourselves in `Via`, by the version of HTTP that the request came by.
const VIA_10: &str = "1.0 plimsoll";
const VIA_11: &str = "1.1 plimsoll";
const VIA_2: &str = "2 plimsoll";

/// Headers of an answer that speak of the engine's connection (RFC 9110 s.7.6.1), beside those `Connection`
/// names.
const OF_THE_CONNECTION: [HeaderName; 5] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::UPGRADE,
];

/// Headers that `Connection` may not take away, because they say what the answer is and where it ends.
const NOT_TO_BE_NAMED: [HeaderName; 4] =
    [header::CONTENT_LENGTH, header::CONTENT_TYPE, header::CONTENT_ENCODING, header::TRANSFER_ENCODING];

/// Room for a usual element of `Forwarded`.
const FORWARDED_BYTES: usize = 96;

/// Where a request comes from, as far as we know ourselves.
pub struct Origin {
    /// The other end of the connection.
    pub peer: Option<IpAddr>,
    /// Whether it is a proxy that we believe.
    pub is_trusted: bool,
    /// Whether it came by TLS.
    pub is_tls: bool,
    /// The version of HTTP that is spoken there.
    pub version: http::Version,
}

impl Origin {
    /// What the connection of `session` shows, if the proxies in `trusted` are believed.
    pub fn of(session: &ServerSession, trusted: &[Network]) -> Self {
        let peer = session.client_addr().and_then(|address| address.as_inet()).map(|a| a.ip().to_canonical());
        let is_trusted = peer.is_some_and(|peer| Network::any_contains(trusted, peer));
        let is_tls = session.digest().is_some_and(|digest| digest.ssl_digest.is_some());
        Self { peer, is_trusted, is_tls, version: session.req_header().version }
    }

    /// Who asked: the last address of `X-Forwarded-For` that is not a proxy we trust, if one of those
    /// connected.
    pub fn client(&self, request: &RequestHeader, trusted: &[Network]) -> Option<IpAddr> {
        if !self.is_trusted {
            return self.peer;
        }
        let hops = request.headers.get_all(FOR).iter().rev();
        let mut client = self.peer;
        for hop in hops.flat_map(|value| value.as_bytes().rsplit(|&b| b == b',')) {
            // What cannot be read hides who came before it.
            let address =
                std::str::from_utf8(hop.trim_ascii()).ok().and_then(|hop| hop.parse::<IpAddr>().ok());
            let Some(address) = address else { return client };
            client = Some(address.to_canonical());
            if !Network::any_contains(trusted, address) {
                break;
            }
        }
        client
    }

    /// Makes the forwarding headers of `request` say what we know, and no more.
    ///
    /// # Errors
    /// None, as long as its host is one (`hygiene::is_host`).
    pub fn announce(&self, request: &mut RequestHeader) -> Result<()> {
        let spoofs: Vec<HeaderName> =
            request.headers.keys().filter(|name| self.may_not_say(name.as_str())).cloned().collect();
        for name in spoofs {
            request.remove_header(&name);
        }
        let scheme = if self.is_tls { "https" } else { "http" };
        let host = request.headers.get(header::HOST).filter(|host| host.to_str().is_ok()).cloned();
        let authority = || request.uri.authority().and_then(|a| HeaderValue::from_str(a.as_str()).ok());
        let host = host.or_else(authority);
        if let Some(peer) = self.peer {
            let address = peer.to_string();
            let mut element = Vec::with_capacity(FORWARDED_BYTES);
            let around: [&[u8]; 2] = if peer.is_ipv4() { [b"for=", b""] } else { [b"for=\"[", b"]\""] };
            for part in [around[0], address.as_bytes(), around[1], b";proto=", scheme.as_bytes()] {
                element.extend_from_slice(part);
            }
            if let Some(host) = &host {
                for part in [b";host=\"", host.as_bytes(), b"\""] {
                    element.extend_from_slice(part);
                }
            }
            append(request, FOR, address)?;
            append(request, "forwarded", element)?;
        }
        if !request.headers.contains_key(PROTO) {
            request.insert_header(PROTO, HeaderValue::from_static(scheme))?;
        }
        if let Some(host) = host.filter(|_| !request.headers.contains_key(HOST)) {
            request.insert_header(HOST, host)?;
        }
        let via = match self.version {
            http::Version::HTTP_2 => VIA_2,
            http::Version::HTTP_10 => VIA_10,
            _ => VIA_11,
        };
        append(request, "via", HeaderValue::from_static(via))
    }

    /// Whether this header may not come from there.
    fn may_not_say(&self, name: &str) -> bool {
        // Most names end here, before one is copied.
        if !name.starts_with(['x', 'f']) {
            return false;
        }
        let is_odd = name.contains('_');
        let name = name.replace('_', "-");
        let speaks_of_clients =
            name.starts_with("x-forwarded-") || ["forwarded", "x-real-ip"].contains(&name.as_str());
        speaks_of_clients && (is_odd || !self.is_trusted)
    }
}

/// Adds `element` to the list in the header `name`, as one header.
fn append<T>(request: &mut RequestHeader, name: &'static str, element: T) -> Result<()>
where
    T: AsRef<[u8]> + TryInto<HeaderValue>,
{
    let mut values = request.headers.get_all(name).iter().peekable();
    if values.peek().is_none() {
        return request.insert_header(name, element);
    }
    let mut list = Vec::new();
    for value in values {
        list.extend_from_slice(value.as_bytes());
        list.extend_from_slice(b", ");
    }
    list.extend_from_slice(element.as_ref());
    request.insert_header(name, list)
}

/// A target in absolute form (`http://host/path`), whose host is that of the request, becomes its path.
///
/// # Errors
/// None, as long as the target is one.
pub fn to_origin_form(request: &mut RequestHeader) -> Result<()> {
    let target = request.raw_path();
    if target.starts_with(b"/") {
        return Ok(());
    }
    let Some(host) = target.windows(3).position(|three| three == b"://").map(|at| at + 3) else {
        return Ok(());
    };
    let path = match target[host..].iter().position(|b| b"/?".contains(b)).map(|at| &target[host + at..]) {
        Some(path) if path.starts_with(b"/") => path.to_vec(),
        query => [b"/", query.unwrap_or_default()].concat(),
    };
    request.set_raw_path(&path)
}

/// Takes from an answer what speaks of the engine's connection, which is not the client's.
pub fn keep_end_to_end(response: &mut ResponseHeader) {
    let mut named: Vec<HeaderName> = Vec::new();
    for value in response.headers.get_all(header::CONNECTION) {
        named.extend(hygiene::names(value).filter_map(|name| HeaderName::from_bytes(name).ok()));
    }
    for name in named.iter().filter(|name| !NOT_TO_BE_NAMED.contains(name)) {
        response.remove_header(name);
    }
    for name in OF_THE_CONNECTION {
        response.remove_header(&name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trusted() -> Vec<Network> {
        serde_yaml::from_str("['10.0.0.0/8']").unwrap()
    }

    fn origin(peer: &str) -> Origin {
        let peer: IpAddr = peer.parse().unwrap();
        Origin {
            peer: Some(peer),
            is_trusted: Network::any_contains(&trusted(), peer),
            is_tls: true,
            version: http::Version::HTTP_2,
        }
    }

    fn request(headers: &[(&'static str, &str)]) -> RequestHeader {
        let mut request = RequestHeader::build("POST", b"/", None).unwrap();
        for (name, value) in headers {
            request.append_header(*name, *value).unwrap();
        }
        request
    }

    fn announced(peer: &str, headers: &[(&'static str, &str)]) -> Vec<String> {
        let mut request = request(headers);
        origin(peer).announce(&mut request).unwrap();
        let mut all: Vec<String> = request
            .headers
            .iter()
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
            .collect();
        all.sort();
        all
    }

    const SPOOFS: [(&str, &str); 6] = [
        ("host", "api.example.com"),
        (FOR, "1.2.3.4"),
        (PROTO, "ftp"),
        ("forwarded", "for=1.2.3.4"),
        ("x-real-ip", "1.2.3.4"),
        ("x_forwarded_host", "evil"),
    ];

    #[test]
    fn a_stranger_may_not_say_who_it_is() {
        assert_eq!(
            announced("2001:db8::1", &SPOOFS),
            [
                "forwarded: for=\"[2001:db8::1]\";proto=https;host=\"api.example.com\"",
                "host: api.example.com",
                "via: 2 plimsoll",
                "x-forwarded-for: 2001:db8::1",
                "x-forwarded-host: api.example.com",
                "x-forwarded-proto: https",
            ]
        );
    }

    #[test]
    fn a_trusted_proxy_is_believed_and_added_to() {
        assert_eq!(
            announced("10.0.0.1", &SPOOFS),
            [
                "forwarded: for=1.2.3.4, for=10.0.0.1;proto=https;host=\"api.example.com\"",
                "host: api.example.com",
                "via: 2 plimsoll",
                "x-forwarded-for: 1.2.3.4, 10.0.0.1",
                "x-forwarded-host: api.example.com",
                "x-forwarded-proto: ftp",
                "x-real-ip: 1.2.3.4",
            ]
        );
    }

    #[test]
    fn the_client_is_the_last_one_that_a_trusted_proxy_names_and_we_do_not_trust() {
        for (peer, list, client) in [
            ("192.0.2.1", "1.2.3.4", "192.0.2.1"),
            ("10.0.0.1", "1.2.3.4", "1.2.3.4"),
            ("10.0.0.1", "6.6.6.6, 1.2.3.4, 10.0.0.2", "1.2.3.4"),
            ("10.0.0.1", "6.6.6.6, unknown, 10.0.0.2", "10.0.0.2"),
            ("10.0.0.1", "", "10.0.0.1"),
        ] {
            let found = origin(peer).client(&request(&[(FOR, list)]), &trusted());
            assert_eq!(found, Some(client.parse().unwrap()), "{peer} {list}");
        }
    }

    #[test]
    fn a_target_in_absolute_form_becomes_its_path() {
        for (target, path) in [
            ("http://x/a?b=c", "/a?b=c"),
            ("https://x:1", "/"),
            ("http://x?b=/c", "/?b=/c"),
            ("/a?b=http://x/", "/a?b=http://x/"),
            ("*", "*"),
        ] {
            let mut request = RequestHeader::build("GET", target.as_bytes(), None).unwrap();
            to_origin_form(&mut request).unwrap();
            assert_eq!(request.raw_path(), path.as_bytes(), "{target}");
            assert!(path == "*" || request.uri.path().starts_with('/'), "{target}");
        }
    }

    #[test]
    fn what_the_engine_says_of_its_connection_goes_no_further() {
        let mut response = ResponseHeader::build(200, None).unwrap();
        for (name, value) in [
            ("connection", "close, X-Own, content-length"),
            ("x-own", "1"),
            ("keep-alive", "timeout=5"),
            ("content-length", "2"),
            ("x-kept", "1"),
        ] {
            response.append_header(name, value).unwrap();
        }
        keep_end_to_end(&mut response);
        let mut names: Vec<&str> = response.headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["content-length", "x-kept"]);
    }
}
