//! `/explain`: where the posted request would go, what each backend would cost it, and why.
//!
//! The body and headers are those of the request in question; `path`, `host` and `key` say what this one cannot: where
//! it would be posted, which host it would ask for, and whose key it would show. Nothing is sent, charged or
//! remembered.

use std::time::Duration;

use bytes::BytesMut;
use http::{StatusCode, header};
use pingora::http::RequestHeader;
use pingora::protocols::http::ServerSession;
use serde_json::{Value, json};

use super::query::Query;
use super::{Admin, Answer, Flaw};
use crate::balance::{NoPick, Weighed};
use crate::proxy::Explanation;

/// Where a request is posted if nothing else is said.
const USUAL_PATH: &str = "/v1/chat/completions";

/// How long a body may take.
const PATIENCE: Duration = Duration::from_secs(30);

impl Admin {
    pub(super) async fn explain(&self, session: &mut ServerSession) -> Result<Answer, Flaw> {
        let query = Query::parse(session.req_header().uri.query(), &["path", "host", "key"])?;
        let whole = async {
            let turn = self.explaining.acquire().await;
            self.body(session).await.map(|body| (body, turn))
        };
        let whole = tokio::time::timeout(PATIENCE, whole).await;
        let (body, _turn) =
            whole.map_err(|_| Flaw(StatusCode::REQUEST_TIMEOUT, "the body takes too long".to_owned()))??;
        let asked = asked(session.req_header(), &query)?;
        match self.proxy.explain(&asked, &body, query.value("key")) {
            Ok(explanation) => Ok(super::of_json(&shown(&explanation))),
            Err(refusal) => {
                let status = StatusCode::from_u16(refusal.status).unwrap_or_default();
                Err(Flaw(status, format!("{}: {}", refusal.code, refusal.message)))
            }
        }
    }

    async fn body(&self, session: &mut ServerSession) -> Result<BytesMut, Flaw> {
        let (mut body, most) = (BytesMut::new(), self.proxy.largest_body());
        loop {
            match session.read_request_body().await {
                // What is too much is read and forgotten: a socket that is closed with bytes unread loses the answer.
                Ok(Some(chunk)) if body.len() as u64 <= most => body.extend_from_slice(&chunk),
                Ok(Some(_)) => {}
                Ok(None) if body.len() as u64 <= most => return Ok(body),
                Ok(None) => {
                    return Err(Flaw(StatusCode::PAYLOAD_TOO_LARGE, "larger than `limits.body`".to_owned()));
                }
                Err(e) => return Err(Flaw(StatusCode::BAD_REQUEST, format!("the body cannot be read: {e}"))),
            }
        }
    }
}

/// The request in question: ours, posted elsewhere.
fn asked(request: &RequestHeader, query: &Query) -> Result<RequestHeader, Flaw> {
    let path = query.value("path").unwrap_or(USUAL_PATH);
    let flawed = |e: pingora::BError| format!("`path` or `host` cannot stand in a request: {e}");
    if !path.starts_with('/') {
        return Err("`path` begins with a slash".to_owned().into());
    }
    let mut asked = RequestHeader::build("POST", path.as_bytes(), None).map_err(flawed)?;
    // What this listener asks for is none of the request's.
    for (name, value) in request.headers.iter().filter(|(name, _)| **name != header::AUTHORIZATION) {
        asked.append_header(name.clone(), value.clone()).map_err(flawed)?;
    }
    if let Some(host) = query.value("host") {
        asked.insert_header(header::HOST, host).map_err(flawed)?;
    }
    Ok(asked)
}

fn shown(explanation: &Explanation) -> Value {
    let Explanation { upstream, model, prompt_tokens, has_session, explained } = explanation;
    let nobody = explained.winner.as_ref().err().map(|why| match why {
        NoPick::Full => "every backend is full: the request would wait in the queue",
        NoPick::Drained => "every backend is being drained: the request would be refused",
        NoPick::Exhausted => "there is no backend: the request would be refused",
    });
    let (winner, reason) = explained.winner.as_ref().ok().copied().unzip();
    json!({
        "upstream": upstream.name,
        "policy": upstream.config.policy.name(),
        "model": model,
        "prompt_tokens": prompt_tokens,
        "session": has_session,
        "queued": upstream.queued(),
        "winner": winner.map(|address| address.to_string()),
        "reason": reason.map(|reason| reason.name()),
        "nobody": nobody,
        "backends": explained.backends.iter().map(backend).collect::<Vec<_>>(),
    })
}

fn backend(weighed: &Weighed) -> Value {
    json!({
        "address": weighed.state.address.to_string(),
        "state": weighed.state.standing.name(),
        "eligible": weighed.left_out.is_none(),
        "left_out": weighed.left_out,
        "weight": weighed.weight,
        "active_requests": weighed.state.account.active_requests,
        "pending_tokens": weighed.pending_tokens,
        "matched_tokens": weighed.matched_tokens,
        "uncached_tokens": weighed.uncached_tokens,
        "cost": weighed.cost,
    })
}
