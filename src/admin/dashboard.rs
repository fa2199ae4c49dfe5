//! The dashboard: one page that holds no data, and the headers under which a browser runs nothing but it.
//!
//! Whoever may connect gets the page; its numbers it has to ask for like any client, with the token if there is
//! one. The policy in its header names script and style by their hashes, forbids every other host, and takes from
//! the page the means to make HTML of text, because names of models are written by clients.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::{HeaderValue, StatusCode, header};
use ring::digest::{SHA256, digest};

use super::{Answer, answer};

/// The page as it is sent.
const PAGE: &str = include_str!("dashboard.html");

/// The headers with which the page is sent.
pub(super) struct Dashboard {
    policy: HeaderValue,
}

impl Dashboard {
    pub(super) fn new() -> Self {
        // Base64 and our own words are fit for a header; were they not, the page would do nothing rather than all.
        let policy = HeaderValue::from_str(&content_security_policy(PAGE));
        Self { policy: policy.unwrap_or(HeaderValue::from_static("default-src 'none'")) }
    }

    /// The answer to whoever asks for it.
    pub(super) fn page(&self) -> Answer {
        let mut page = answer(StatusCode::OK, "text/html; charset=utf-8", PAGE);
        let headers = page.headers_mut();
        headers.insert(header::CONTENT_SECURITY_POLICY, self.policy.clone());
        for (name, value) in [
            (header::CACHE_CONTROL, "no-store"),
            (header::X_FRAME_OPTIONS, "DENY"),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::REFERRER_POLICY, "no-referrer"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        page
    }
}

/// What a browser may do with `page`: run its own script, ask this listener, and nothing else.
fn content_security_policy(page: &str) -> String {
    format!(
        "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
        source(page, "script"),
        source(page, "style")
    )
}

/// The one inline element of this name, by its hash; without it, nothing.
fn source(page: &str, name: &str) -> String {
    let (start, end) = (format!("<{name}>"), format!("</{name}>"));
    let inner = page.split_once(&start).and_then(|(_, rest)| rest.split_once(&end));
    inner.map_or_else(
        || "'none'".to_owned(),
        |(inner, _)| format!("'sha256-{}'", BASE64_STANDARD.encode(digest(&SHA256, inner.as_bytes()))),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn script_and_style_are_named_by_their_hashes() {
        let policy = content_security_policy("<style>b{}</style><script>alert('Hello, world.');</script>");
        // The example of the specification.
        let hash = "script-src 'sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng=';";
        assert!(policy.contains(hash), "{policy}");
        assert!(content_security_policy("<style>b{}</style>").contains("script-src 'none';"));
    }

    #[test]
    fn the_page_asks_nobody_else_and_makes_no_html_of_text() {
        let page = Dashboard::new().page();
        let policy = page.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert_eq!(policy.matches("'sha256-").count(), 2, "{policy}");
        assert_eq!((PAGE.matches("<script").count(), PAGE.matches("<style").count()), (1, 1));
        let own = PAGE.replace("http://www.w3.org/2000/svg", "");
        for foreign in
            ["http:", "https:", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("]
        {
            assert!(!own.contains(foreign), "{foreign}");
        }
        // The policy would refuse a handler or a style in an attribute.
        for refused in [" style=", " onclick=", " onload=", " onerror="] {
            assert!(!own.contains(refused), "{refused}");
        }
    }
}
