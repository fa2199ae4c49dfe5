//! The error an engine reports inside a stream whose status was 200.
//!
//! To HTTP such an answer is a success, so what failed is only in the event. The shapes seen (the captures of
//! vLLM, SGLang and Dynamo; the API documents of OpenAI and Anthropic; TGI's source):
//!
//! ```text
//! {"error": {"message": M, "type": T, "param": P, "code": 503}}            vLLM, SGLang, Dynamo, llama.cpp
//! {"error": M, "error_type": T}                                            TGI
//! {"type": "error", "error": {"type": T, "message": M}}                    Anthropic messages
//! {"type": "error", "code": T, "message": M}                               OpenAI responses
//! {"type": "response.failed", "response": {"error": {"code": T, "message": M}}}
//! {"object": "error", "message": M, "type": T, "code": 400}                vLLM before 0.10
//! ```
//!
//! `code` is the HTTP status the answer should have had: given as a number, or meant by one of the known
//! names.

use super::json::{Cursor, Value};

/// The statuses that documented names of errors stand for.
const NAMES: [(&[u8], u16); 9] = [
    (b"invalid_request_error", 400),
    (b"authentication_error", 401),
    (b"not_found_error", 404),
    (b"rate_limit_error", 429),
    (b"rate_limit_exceeded", 429),
    (b"overloaded", 429),
    (b"api_error", 500),
    (b"server_error", 500),
    (b"overloaded_error", 529),
];

/// An error from inside a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamError {
    /// The HTTP status it amounts to, 100 to 999, if the engine said.
    pub code: Option<u16>,
    /// The engine's words; empty if it had none.
    pub message: String,
}

/// Reads the error from an event's data; none if the data is no error.
pub fn stream_error(data: &[u8]) -> Option<StreamError> {
    let mut found = Found::default();
    Cursor::new(data).object(|key, cursor| found.member(key, cursor, 2))?;
    found.error.then_some(StreamError { code: found.code, message: found.message })
}

#[derive(Default)]
struct Found {
    error: bool,
    code: Option<u16>,
    message: String,
}

impl Found {
    /// Takes one member of the error or, `depth` levels deep, of an object that wraps it.
    fn member(&mut self, key: &[u8], cursor: &mut Cursor<'_>, depth: u32) -> Option<()> {
        let value = cursor.value()?;
        match (key, value) {
            (b"error", Value::String(message)) => {
                self.error = true;
                self.message = message.to_string_lossy();
            }
            (b"error" | b"response", Value::Object(inner)) if depth > 0 => {
                self.error |= key == b"error";
                Cursor::new(inner).object(|key, cursor| self.member(key, cursor, depth - 1))?;
            }
            (b"message", Value::String(message)) => self.message = message.to_string_lossy(),
            (b"code", Value::Number(_)) => self.code = value.whole().and_then(status).or(self.code),
            (b"type" | b"code" | b"error_type" | b"object", Value::String(name)) => {
                let name = name.decoded();
                self.error |= *name == *b"error";
                self.code = self.code.or_else(|| meaning(&name));
            }
            _ => {}
        }
        Some(())
    }
}

/// The status a name stands for; some engines write the number itself as a string.
fn meaning(name: &[u8]) -> Option<u16> {
    let known = NAMES.iter().find(|(known, _)| *known == name).map(|&(_, code)| code);
    known.or_else(|| status(std::str::from_utf8(name).ok()?.parse().ok()?))
}

fn status(code: u64) -> Option<u16> {
    u16::try_from(code).ok().filter(|code| (100..1_000).contains(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_every_engine_are_read() {
        for (data, code, message) in [
            (r#"{"error": {"message": "EngineCore", "param": null, "code": 500}}"#, Some(500), "EngineCore"),
            (r#"{"error":{"message":"m","type":"service_unavailable","code":"503"}}"#, Some(503), "m"),
            (r#"{"error":"overloaded \"now\"","error_type":"overloaded"}"#, Some(429), "overloaded \"now\""),
            (r#"{"type":"error","error":{"type":"overloaded_error","message":"m"}}"#, Some(529), "m"),
            (r#"{"type":"error","code":"server_error","message":"m","param":null}"#, Some(500), "m"),
            (
                concat!(
                    r#"{"type":"response.failed","response":"#,
                    r#"{"error":{"code":"rate_limit_exceeded","message":"m"}}}"#
                ),
                Some(429),
                "m",
            ),
            (r#"{"object":"error","message":"m","type":"BadRequestError","code":400}"#, Some(400), "m"),
            (r#"{"error":{"message":"m","code":99999}}"#, None, "m"),
            (r#"{"error":{}}"#, None, ""),
        ] {
            assert_eq!(
                stream_error(data.as_bytes()),
                Some(StreamError { code, message: message.into() }),
                "{data}"
            );
        }
    }

    #[test]
    fn what_is_no_error_is_none() {
        for data in
            ["", "[DONE]", "{}", r#"{"error":null}"#, r#"{"choices":[{"delta":{"content":"error"}}]}"#]
        {
            assert_eq!(stream_error(data.as_bytes()), None, "{data}");
        }
        assert_eq!(stream_error(br#"{"type":"response.created","response":{"error":null}}"#), None);
    }
}
