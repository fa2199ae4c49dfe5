//! One small exchange of our own with an HTTP server, for probes, polls and traces, on Pingora's own connector.
//!
//! HTTP/1.1 is spoken, answers are bounded, and the connection is not kept: a probe should find out whether one can be
//! made, and whoever asks once in a while has no use for it. The deadline is the caller's.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pingora::connectors::http::v1::Connector;
use pingora::http::RequestHeader;
use pingora::protocols::http::v1::client::HttpSession;
use pingora::upstreams::peer::HttpPeer;

/// The largest answer that is read; SGLang's metrics are about 90 kB.
const BODY_LIMIT: usize = 4 << 20;

/// A busy server is slow to answer, but its kernel is not slow to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Asks servers. To make one costs tens of milliseconds, since it reads the roots of the system's certificates.
pub(crate) struct Fetcher(Connector);

impl Default for Fetcher {
    fn default() -> Self {
        Self(Connector::new(None))
    }
}

impl Fetcher {
    /// The status and the body of the answer of `peer` to `request`, which lacks only what every request of ours has,
    /// and to its `body`, if that is not empty.
    ///
    /// # Errors
    /// There is no connection, no answer, or one of more than 4 MiB.
    pub(crate) async fn fetch(
        &self,
        mut peer: HttpPeer,
        mut request: RequestHeader,
        body: Bytes,
    ) -> pingora::Result<(u16, Bytes)> {
        peer.options.idle_timeout = Some(Duration::ZERO);
        peer.options.connection_timeout = Some(CONNECT_TIMEOUT);
        request.insert_header("user-agent", concat!("plimsoll/", env!("CARGO_PKG_VERSION")))?;
        request.insert_header("connection", "close")?;
        if !body.is_empty() {
            request.insert_header("content-length", body.len())?;
        }
        let (mut session, _) = self.0.get_http_session(&peer).await?;
        session.write_request_header(Box::new(request)).await?;
        if !body.is_empty() {
            session.write_body(&body).await?;
        }
        session.finish_body().await?;
        session.read_response().await?;
        let status = session.get_status().map_or(0, |status| status.as_u16());
        let body = read_body(&mut session).await?;
        session.shutdown().await;
        Ok((status, body))
    }
}

async fn read_body(session: &mut HttpSession) -> pingora::Result<Bytes> {
    let mut body = BytesMut::new();
    while let Some(chunk) = session.read_body_ref().await? {
        body.extend_from_slice(chunk);
        if body.len() > BODY_LIMIT {
            return pingora::Error::e_explain(pingora::ErrorType::ReadError, "answer too large");
        }
    }
    Ok(body.freeze())
}
