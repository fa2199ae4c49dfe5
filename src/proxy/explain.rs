//! The explanation: what would be done with a request if it came now.
//!
//! Found, priced and decided by the code that serves requests, up to the point where something would change.

use std::sync::Arc;

use pingora::http::RequestHeader;

use super::{Proxy, Refusal, intake};
use crate::balance::Explained;
use crate::upstream::Upstream;

/// What would be done with a request.
pub struct Explanation {
    /// The upstream it goes to.
    pub upstream: Arc<Upstream>,
    /// The model it asks for.
    pub model: Option<String>,
    /// Estimated prompt tokens.
    pub prompt_tokens: u64,
    /// Whether it belongs to a session.
    pub has_session: bool,
    /// The backends, and which of them it would go to.
    pub explained: Explained,
}

impl Proxy {
    /// What would be done with this request if it had shown the key of that name.
    ///
    /// # Errors
    /// Why it would be refused.
    pub fn explain(
        &self,
        request: &RequestHeader,
        body: &[u8],
        key: Option<&str>,
    ) -> Result<Explanation, Refusal> {
        let setup = self.setup.read().clone();
        let intake::Found { upstream, digest, session, .. } = intake::find(&setup, request, body, key)?;
        let priced = upstream.price(&digest, session);
        let explained = upstream.explain(&priced);
        let (prompt_tokens, has_session) = (priced.prompt_tokens, priced.session.is_some());
        Ok(Explanation { upstream, model: digest.model.clone(), prompt_tokens, has_session, explained })
    }

    /// The largest body that a request may have, in bytes.
    pub fn largest_body(&self) -> u64 {
        self.setup.read().limits.body
    }
}
