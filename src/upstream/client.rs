//! A small GET client for probes and polls, on Pingora's own connector.
//!
//! One deadline covers everything, bodies are bounded, HTTP/1.1 with a `Host` header is spoken (none of the
//! engines takes less, research/engines.md s.3), and connections are not kept: a probe should find out
//! whether one can be made.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pingora::connectors::http::Connector;
use pingora::http::RequestHeader;
use pingora::protocols::http::client::HttpSession;
use pingora::upstreams::peer::HttpPeer;

use super::Live;
use crate::config;

/// The largest answer that is read; SGLang's metrics are about 90 kB.
const BODY_LIMIT: usize = 4 << 20;

/// A busy engine is slow to answer, but its kernel is not slow to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Asks engines of one upstream.
pub(super) struct Client {
    connector: Connector,
    tls: bool,
    authorization: Option<String>,
}

/// Why there was no answer.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// The deadline passed first.
    Late,
    /// Pingora's reason.
    Failed(pingora::BError),
}

impl NoAnswer {
    /// Whether nobody listens.
    pub(super) fn is_refused(&self) -> bool {
        matches!(self, Self::Failed(e) if *e.etype() == pingora::ErrorType::ConnectRefused)
    }
}

impl std::fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Late => f.write_str("no answer in time"),
            Self::Failed(e) => f.write_str(e.to_string().trim()),
        }
    }
}

impl Client {
    pub(super) fn new(config: &config::Upstream, authorization: Option<String>) -> Self {
        Self { connector: Connector::new(None), tls: config.tls.is_some(), authorization }
    }

    /// The status and body of `GET path` at the backend `live`.
    pub(super) async fn get(
        &self,
        live: &Live,
        path: &str,
        timeout: Duration,
    ) -> Result<(u16, Bytes), NoAnswer> {
        match tokio::time::timeout(timeout, self.exchange(live, path)).await {
            Ok(answer) => answer.map_err(NoAnswer::Failed),
            Err(_) => Err(NoAnswer::Late),
        }
    }

    async fn exchange(&self, live: &Live, path: &str) -> pingora::Result<(u16, Bytes)> {
        let mut peer = HttpPeer::new(live.address, self.tls, live.server_name.clone());
        peer.options.idle_timeout = Some(Duration::ZERO);
        peer.options.connection_timeout = Some(CONNECT_TIMEOUT);
        let (mut session, _) = self.connector.get_http_session(&peer).await?;
        let mut request = RequestHeader::build("GET", path.as_bytes(), Some(4))?;
        request.insert_header("host", live.server_name.as_str())?;
        request.insert_header("user-agent", concat!("plimsoll/", env!("CARGO_PKG_VERSION")))?;
        request.insert_header("connection", "close")?;
        if let Some(authorization) = &self.authorization {
            request.insert_header("authorization", authorization.as_str())?;
        }
        session.write_request_header(Box::new(request)).await?;
        session.finish_request_body().await?;
        session.read_response_header().await?;
        let status = session.response_header().map_or(0, |header| header.status.as_u16());
        let body = read_body(&mut session).await?;
        session.shutdown().await;
        Ok((status, body))
    }
}

async fn read_body(session: &mut HttpSession) -> pingora::Result<Bytes> {
    let mut body = BytesMut::new();
    while let Some(chunk) = session.read_response_body().await? {
        body.extend_from_slice(&chunk);
        if body.len() > BODY_LIMIT {
            return pingora::Error::e_explain(pingora::ErrorType::ReadError, "answer too large");
        }
    }
    Ok(body.freeze())
}
