//! The prompt room: what a request asks for and what an answer says, read from their bytes.
//!
//! Everything the balancer decides on comes from two texts: the body of the request (its model, its price,
//! the beginning it shares with others) and the stream of the answer (its first token, its errors, its true
//! count of tokens). This room reads both, in one pass and without a tree of values, and knows nothing else:
//! no sockets, no clock, no state between requests but the learned price of a token.

mod canon;
mod event;
mod json;
mod prefix;
mod price;
mod request;
mod sse;
mod stream_error;
mod usage;

#[cfg(test)]
mod captures;

pub use event::{Event, Kind};
pub use prefix::{BLOCK_BYTES, BlockHasher, MAX_BLOCKS};
pub use price::BytesPerToken;
pub use sse::{MAX_EVENT_BYTES, Sse};
pub use stream_error::{StreamError, stream_error};
pub use usage::Usage;

/// The API a request speaks, which says where in its body the prompt is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    ChatCompletions,
    /// `/v1/completions`
    Completions,
    /// `/v1/embeddings`
    Embeddings,
    /// `/v1/responses`
    Responses,
    /// `/v1/messages`, Anthropic's API
    Messages,
    /// Anything else: passed on by its model, priced by its length.
    Other,
}

impl Endpoint {
    /// The end of its path; none if it is none of ours.
    pub const fn name(self) -> Option<&'static str> {
        match self {
            Self::ChatCompletions => Some("/v1/chat/completions"),
            Self::Completions => Some("/v1/completions"),
            Self::Embeddings => Some("/v1/embeddings"),
            Self::Responses => Some("/v1/responses"),
            Self::Messages => Some("/v1/messages"),
            Self::Other => None,
        }
    }

    /// The endpoint of a request path, by its last segments, so that a prefix (`/openai/v1/...`) does not
    /// matter; a query is ignored.
    pub fn from_path(path: &str) -> Self {
        let path = path.split('?').next().unwrap_or_default().trim_end_matches('/');
        let names = [
            ("/chat/completions", Self::ChatCompletions),
            ("/completions", Self::Completions),
            ("/embeddings", Self::Embeddings),
            ("/responses", Self::Responses),
            ("/messages", Self::Messages),
        ];
        names.iter().find(|(name, _)| path.ends_with(name)).map_or(Self::Other, |&(_, endpoint)| endpoint)
    }
}

/// What a request body says about the work it asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    /// The `model` named; none if there is none or it is no string.
    pub model: Option<String>,
    /// Whether the answer is asked for as a stream.
    pub stream: bool,
    /// The most tokens to generate, under any of its three names.
    pub max_tokens: Option<u64>,
    /// Answers to generate per prompt: the larger of `n` and `best_of`, at least 1.
    pub choices: u32,
    /// The price: bytes of prompt text, with constants for what is no text; the body's length if it is
    /// opaque.
    pub prompt_bytes: u64,
    /// Chained hashes of the whole 512-byte blocks of the prompt, at most 1,024; empty if the body is opaque.
    pub blocks: Vec<u64>,
    /// A hash of `prompt_cache_key`, by which a client keeps a conversation together.
    pub session: Option<u64>,
}

/// Reads what `body` asks for. Never fails: what is not understood is opaque.
pub fn digest(endpoint: Endpoint, body: &[u8]) -> Digest {
    request::digest(endpoint, body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_endpoint_is_known_by_the_end_of_the_path() {
        for (path, endpoint) in [
            ("/v1/chat/completions", Endpoint::ChatCompletions),
            ("/openai/v1/chat/completions/?api-version=1", Endpoint::ChatCompletions),
            ("/v1/completions", Endpoint::Completions),
            ("/v1/embeddings", Endpoint::Embeddings),
            ("/v1/responses", Endpoint::Responses),
            ("/v1/messages?beta=true", Endpoint::Messages),
            ("/v1/messages/count_tokens", Endpoint::Other),
            ("/v1/models", Endpoint::Other),
            ("/completions_log", Endpoint::Other),
            ("/", Endpoint::Other),
            ("", Endpoint::Other),
        ] {
            assert_eq!(Endpoint::from_path(path), endpoint, "{path}");
        }
    }
}
