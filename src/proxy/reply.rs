//! The answers that the proxy itself gives: OpenAI-shaped JSON with a stable code.
//!
//! Clients of LLM servers parse `{"error": {"message", "type", "param", "code"}}`; a proxy that answers HTML
//! or nothing breaks them. The codes are part of the interface: they are listed in the README and do not
//! change.

use std::time::Duration;

use bytes::Bytes;
use pingora::http::ResponseHeader;
use pingora_proxy::Session;

use crate::config::Limits;

/// The header that carries the request's id, both ways.
pub(super) const REQUEST_ID: &str = "x-request-id";

/// A refusal: status, stable code, words, and when to try again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// The code, which does not change.
    pub code: &'static str,
    /// The words, which may.
    pub message: String,
    /// Seconds for `Retry-After`.
    pub retry_after: Option<u64>,
}

/// Every reason for which a request or a connection is refused: the codes of our answers, and then what ends
/// a connection without one.
pub(crate) const CODES: [&str; 29] = [
    "bad_request",
    "ambiguous_framing",
    "bad_host",
    "method_not_allowed",
    "header_timeout",
    "headers_too_large",
    "url_too_long",
    "body_timeout",
    "body_too_large",
    "length_required",
    "too_many_connections",
    "missing_api_key",
    "invalid_api_key",
    "rate_limited",
    "route_not_found",
    "model_not_found",
    "buffers_full",
    "no_backend",
    "draining",
    "queue_full",
    "queue_timeout",
    "upstream_unreachable",
    "upstream_closed",
    "upstream_timeout",
    "internal_error",
    "tls_failed",
    "tls_timeout",
    "http2_flood",
    "proxy_header",
];

impl Refusal {
    fn new(status: u16, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), retry_after: None }
    }

    const fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    pub(super) fn body_too_large(limit: u64) -> Self {
        Self::new(413, "body_too_large", format!("the request body is larger than {limit} bytes"))
    }

    pub(super) fn body_timeout() -> Self {
        Self::new(408, "body_timeout", "the request body did not arrive in time")
    }

    pub(super) fn bad_request() -> Self {
        Self::new(400, "bad_request", "the request is not well-formed HTTP")
    }

    pub(crate) fn malformed(what: &str) -> Self {
        Self::new(400, "bad_request", format!("the request is not well-formed HTTP: {what}"))
    }

    pub(crate) fn ambiguous_framing(why: &str) -> Self {
        Self::new(400, "ambiguous_framing", format!("the end of the request is not certain: {why}"))
    }

    pub(crate) fn bad_host(why: &str) -> Self {
        Self::new(400, "bad_host", format!("the host of the request is not certain: {why}"))
    }

    pub(crate) fn method_not_allowed() -> Self {
        Self::new(405, "method_not_allowed", "CONNECT and TRACE are not served here")
    }

    pub(crate) fn header_timeout() -> Self {
        Self::new(408, "header_timeout", "the head of the request did not arrive in time")
    }

    pub(crate) fn url_too_long(limit: u64) -> Self {
        Self::new(414, "url_too_long", format!("the URL is longer than {limit} bytes"))
    }

    pub(crate) fn headers_too_large(limits: &Limits) -> Self {
        let Limits { headers, header_count, .. } = limits;
        let message = format!("the headers are more than {header_count}, or larger than {headers} bytes");
        Self::new(431, "headers_too_large", message)
    }

    pub(crate) fn too_many_connections() -> Self {
        Self::new(429, "too_many_connections", "this client has too many connections already").retry_after(1)
    }

    pub(super) fn missing_api_key() -> Self {
        Self::new(401, "missing_api_key", "no API key was given; send `authorization: Bearer KEY`")
    }

    pub(super) fn invalid_api_key() -> Self {
        Self::new(401, "invalid_api_key", "the API key is not known here")
    }

    pub(super) fn rate_limited(what: &str, wait: Duration) -> Self {
        let message = format!("this API key has used up its {what} per minute");
        Self::new(429, "rate_limited", message).retry_after((wait.as_secs_f64().ceil() as u64).max(1))
    }

    pub(super) fn length_required() -> Self {
        Self::new(411, "length_required", "a body of this size needs a content-length")
    }

    pub(super) fn buffers_full() -> Self {
        Self::new(503, "buffers_full", "too many request bodies are in memory at the moment").retry_after(1)
    }

    pub(super) fn route_not_found() -> Self {
        Self::new(404, "route_not_found", "no route leads from this host and path to an upstream")
    }

    pub(super) fn model_not_found(model: &str) -> Self {
        // A name may be as long as a body.
        let name: String = model.chars().take(100).collect();
        Self::new(
            404,
            "model_not_found",
            format!("the model `{name}` does not exist here; see GET /v1/models"),
        )
    }

    pub(super) fn no_backend(upstream: &str) -> Self {
        let message = format!("no backend of `{upstream}` can take the request at the moment");
        Self::new(503, "no_backend", message).retry_after(5)
    }

    pub(super) fn draining(upstream: &str) -> Self {
        let message = format!("every backend of `{upstream}` is being drained");
        Self::new(503, "draining", message).retry_after(5)
    }

    pub(super) fn queue_full() -> Self {
        Self::new(503, "queue_full", "every backend is full and so is the queue").retry_after(5)
    }

    pub(super) fn queue_timeout() -> Self {
        Self::new(503, "queue_timeout", "every backend has been full for too long").retry_after(5)
    }

    pub(super) fn unreachable() -> Self {
        Self::new(502, "upstream_unreachable", "no backend could be reached")
    }

    pub(super) fn closed() -> Self {
        Self::new(502, "upstream_closed", "the backend closed the connection before it answered")
    }

    pub(super) fn timeout() -> Self {
        Self::new(504, "upstream_timeout", "the backend did not answer in time")
    }

    pub(super) fn internal() -> Self {
        Self::new(500, "internal_error", "the proxy failed; its log says why")
    }

    /// The whole answer, for a connection that Pingora has not seen; it closes after it.
    pub(crate) fn http1(&self, id: &str) -> String {
        let status = http::StatusCode::from_u16(self.status).unwrap_or_default();
        let retry_after = self.retry_after.map(|seconds| format!("retry-after: {seconds}\r\n"));
        let body = self.json();
        format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncache-control: no-store\r\n{REQUEST_ID}: {id}\r\n\
             {}connection: close\r\ncontent-length: {}\r\n\r\n{body}",
            retry_after.unwrap_or_default(),
            body.len(),
        )
    }

    /// The body of the answer.
    pub(super) fn json(&self) -> String {
        let kind = match self.status {
            401 => "authentication_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        };
        let error = serde_json::json!({
            "error": { "message": self.message, "type": kind, "param": null, "code": self.code }
        });
        error.to_string()
    }
}

/// Sends a refusal. The rest of the client's body, if any, is not read: the connection closes unless `keep`
/// says it was read.
pub(super) async fn refuse(
    session: &mut Session,
    id: &str,
    refusal: &Refusal,
    keep: bool,
) -> pingora::Result<()> {
    if !keep {
        session.set_keepalive(None);
    }
    let mut header = json_header(refusal.status, id)?;
    if refusal.status == 401 {
        header.insert_header("www-authenticate", "Bearer")?;
    }
    if let Some(seconds) = refusal.retry_after {
        header.insert_header("retry-after", seconds)?;
    }
    send(session, header, Bytes::from(refusal.json())).await
}

/// Sends `body` as JSON.
pub(super) async fn json(session: &mut Session, id: &str, status: u16, body: String) -> pingora::Result<()> {
    send(session, json_header(status, id)?, Bytes::from(body)).await
}

/// The last event of a stream that broke: an error that OpenAI clients raise, and an honest end. An event
/// that was broken off in the middle is ended first, lest the error become a part of it.
pub(super) fn stream_cut(mid_event: bool) -> Bytes {
    let error = Refusal::new(502, "stream_cut", "the backend broke off in the middle of its answer");
    let end = if mid_event { "\n\n" } else { "" };
    Bytes::from(format!("{end}data: {}\n\n", error.json()))
}

fn json_header(status: u16, id: &str) -> pingora::Result<ResponseHeader> {
    let mut header = ResponseHeader::build(status, Some(8))?;
    header.insert_header("content-type", "application/json")?;
    header.insert_header("cache-control", "no-store")?;
    header.insert_header(REQUEST_ID, id)?;
    Ok(header)
}

async fn send(session: &mut Session, mut header: ResponseHeader, body: Bytes) -> pingora::Result<()> {
    header.insert_header("content-length", body.len())?;
    let head_only = session.req_header().method == http::Method::HEAD;
    session.write_response_header(Box::new(header), head_only).await?;
    if !head_only {
        session.write_response_body(Some(body), true).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_the_shape_that_openai_clients_parse() {
        let value: serde_json::Value =
            serde_json::from_str(&Refusal::model_not_found("a\"b\n").json()).unwrap();
        assert_eq!(value["error"]["code"], "model_not_found");
        assert_eq!(value["error"]["type"], "not_found_error");
        assert!(value["error"]["message"].as_str().unwrap().contains("a\"b\n"));
        assert!(value["error"]["param"].is_null());
    }
}
