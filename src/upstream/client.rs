//! What a backend itself answers to a GET, for probes and polls.
//!
//! One deadline covers everything, and HTTP/1.1 with a `Host` header is spoken: none of the engines takes less
//! (research/engines.md s.3).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pingora::http::RequestHeader;
use pingora::upstreams::peer::HttpPeer;

use super::Live;
use crate::config;
use crate::fetch::Fetcher;

/// Asks engines of one upstream.
pub(super) struct Client {
    fetcher: Arc<Fetcher>,
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
    pub(super) fn new(
        config: &config::Upstream,
        authorization: Option<String>,
        fetcher: Arc<Fetcher>,
    ) -> Self {
        Self { fetcher, tls: config.tls.is_some(), authorization }
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
        let peer = HttpPeer::new(live.address, self.tls, live.server_name.clone());
        let mut request = RequestHeader::build("GET", path.as_bytes(), Some(4))?;
        request.insert_header("host", live.server_name.as_str())?;
        if let Some(authorization) = &self.authorization {
            request.insert_header("authorization", authorization.as_str())?;
        }
        self.fetcher.fetch(peer, request, Bytes::new()).await
    }
}
