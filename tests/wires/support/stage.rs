//! What most tests of failures share: some engines behind one upstream, one chat, and the shape of an error.

use super::client::{Answer as Reply, Client, Line, Request};
use super::engine::{Answer, Engine, Seen, addresses};
use super::one_upstream;
use super::proxy::Proxy;

/// Both protocols; with TLS they differ only where a body is read.
pub const BOTH: [Line; 2] = [Line::Http1, Line::Http2];

/// A chat completion, not streamed.
pub fn chat() -> Request {
    Request::chat("tiny", "hello")
}

/// A proxy before one upstream of these engines; `more` as for [`one_upstream`].
pub async fn before(engines: &[Engine], more: &str) -> Proxy {
    Proxy::start(&one_upstream(&addresses(&engines.iter().collect::<Vec<_>>()), more)).await
}

/// Two engines that answer every request by `script`.
pub fn alike(script: impl Fn(&Seen) -> Answer + Clone + Send + Sync + 'static) -> [Engine; 2] {
    std::array::from_fn(|_| Engine::start(script.clone()))
}

/// How many requests each engine has seen.
pub fn counts(engines: &[Engine]) -> Vec<usize> {
    engines.iter().map(Engine::count).collect()
}

/// How many requests the engines have seen together.
pub fn total(engines: &[Engine]) -> usize {
    engines.iter().map(Engine::count).sum()
}

/// A chat that is under way.
pub async fn sent(proxy: &Proxy, line: Line) -> Client {
    let mut client = proxy.client(line).await;
    client.send(&chat()).await;
    client
}

/// The whole answer to a request that was sent.
pub async fn reply(client: &mut Client) -> Reply {
    let head = client.head().await;
    let (body, complete) = client.rest().await;
    Reply { status: head.status, headers: head.headers, body, complete }
}

/// The status of a request that was sent and whose answer comes to its proper end.
pub async fn answered(mut client: Client) -> u16 {
    let reply = reply(&mut client).await;
    assert!(reply.complete, "{}", reply.text());
    reply.status
}

/// Checks an answer of the proxy's own: status, code, and the shape that OpenAI's clients parse.
pub fn assert_error(reply: &Reply, status: u16, code: &str) {
    assert_eq!((reply.status, reply.code().as_str()), (status, code), "{}", reply.text());
    let error = &reply.value()["error"];
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
    assert!(error["type"].is_string() && error.get("param").is_some(), "{error}");
    assert!(reply.header("content-type").is_some_and(|kind| kind.starts_with("application/json")));
    assert!(reply.header("x-request-id").is_some_and(|id| !id.is_empty()));
    assert!(reply.complete);
}

/// The seconds of `retry-after`.
pub fn retry_after(reply: &Reply) -> u64 {
    reply.header("retry-after").and_then(|value| value.parse().ok()).expect("a retry-after in seconds")
}
