//! One server-sent event, and what it means for the balancer.
//!
//! HTTP says little about a stream: vLLM sends a 200 and queues for 15 seconds after it, an engine that
//! crashed ends its answer properly, and comments come while nothing was computed (research/engines.md s.3,
//! 5, 6, 16). So the first token, the end and the errors are taken from the events themselves, in the four
//! dialects engines speak: OpenAI chat and completions, OpenAI responses, Anthropic messages, and the native
//! ones of TGI, SGLang, llama.cpp.

use super::json::{Cursor, Value};
use super::stream_error::{StreamError, stream_error};

/// One event of a stream, borrowed from it where possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// The data, lines joined by LF; empty for a comment.
    pub data: &'a [u8],
    /// The name from the `event:` line; empty without one.
    pub name: &'a [u8],
    /// True if this was a block of comments, which carries nothing.
    pub comment: bool,
    /// True if the event was longer than [`super::MAX_EVENT_BYTES`] and its data ends early.
    pub truncated: bool,
}

/// What an event means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A comment, such as a keep-alive: no sign of work.
    Comment,
    /// Something was generated: text, reasoning, a refusal or a tool call.
    Content,
    /// No content, only the count of tokens.
    Usage,
    /// The request failed, although its status was 200; see [`Event::error`].
    Error,
    /// The stream is complete: `[DONE]`, `message_stop`, `response.completed` or `response.incomplete`.
    Done,
    /// Anything else: a role, a finish reason, a start of something.
    Other,
}

impl Event<'_> {
    /// Classifies the event; reads its data once.
    pub fn kind(&self) -> Kind {
        if self.comment {
            return Kind::Comment;
        }
        if self.data.trim_ascii() == b"[DONE]" {
            return Kind::Done;
        }
        if self.name == b"error" {
            return Kind::Error;
        }
        let mut signs = Signs::default();
        let whole = Cursor::new(self.data).object(|key, cursor| signs.member(key, cursor));
        match whole {
            Some(()) => signs.kind(),
            // Only content grows beyond all bounds; an error cut short still begins like one.
            None if self.truncated && !signs.error => Kind::Content,
            None if signs.error => Kind::Error,
            None => Kind::Other,
        }
    }

    /// Code and message, if this event is an error.
    pub fn error(&self) -> Option<StreamError> {
        match self.kind() {
            Kind::Error => Some(stream_error(self.data).unwrap_or_else(|| StreamError {
                code: None,
                message: String::from_utf8_lossy(self.data).into_owned(),
            })),
            _ => None,
        }
    }
}

/// What the members of an event's data showed.
#[derive(Default)]
struct Signs {
    typed: Option<Kind>,
    content: bool,
    choices: bool,
    usage: bool,
    error: bool,
}

impl Signs {
    fn kind(&self) -> Kind {
        match (self.error, self.typed, self.content, self.usage) {
            (true, ..) => Kind::Error,
            (false, Some(kind), ..) => kind,
            (false, None, true, _) => Kind::Content,
            (false, None, false, true) if !self.choices => Kind::Usage,
            _ => Kind::Other,
        }
    }

    fn member(&mut self, key: &[u8], cursor: &mut Cursor<'_>) -> Option<()> {
        match key {
            b"choices" if cursor.peek()? == b'[' => cursor.array(|choice| {
                self.choices = true;
                self.choice(choice)
            })?,
            b"token" if cursor.peek()? == b'{' => cursor.object(|key, cursor| {
                let value = cursor.value()?;
                self.content |= key == b"text" && says_something(value);
                Some(())
            })?,
            b"type" => self.typed = cursor.value()?.text().and_then(|name| typed(&name.decoded())),
            b"usage" => self.usage = matches!(cursor.value()?, Value::Object(_)),
            b"error" => {
                // Set before the value is read: a cut error event is still one.
                self.error |= cursor.peek()? != b'n';
                cursor.value()?;
            }
            b"object" => {
                self.error |= cursor.value()?.text().is_some_and(|name| *name.decoded() == *b"error")
            }
            b"text" | b"content" => self.content |= says_something(cursor.value()?),
            _ => drop(cursor.value()?),
        }
        Some(())
    }

    /// One element of OpenAI's `choices`: `text` beside it, or content inside its `delta`.
    fn choice(&mut self, cursor: &mut Cursor<'_>) -> Option<()> {
        if cursor.peek()? != b'{' {
            return cursor.value().map(drop);
        }
        cursor.object(|key, cursor| match key {
            b"delta" if cursor.peek()? == b'{' => cursor.object(|key, cursor| {
                let value = cursor.value()?;
                let carries = matches!(
                    key,
                    b"content"
                        | b"reasoning_content"
                        | b"reasoning"
                        | b"tool_calls"
                        | b"function_call"
                        | b"refusal"
                );
                self.content |= carries && says_something(value);
                Some(())
            }),
            b"text" => {
                self.content |= says_something(cursor.value()?);
                Some(())
            }
            _ => cursor.value().map(drop),
        })
    }
}

/// The meaning of a `type`, for the dialects that have one; none for a type of another kind of event.
fn typed(name: &[u8]) -> Option<Kind> {
    match name {
        b"error" | b"response.failed" => Some(Kind::Error),
        b"message_stop" | b"response.completed" | b"response.incomplete" => Some(Kind::Done),
        b"content_block_delta" => Some(Kind::Content),
        b"message_start" | b"message_delta" | b"content_block_start" | b"content_block_stop" | b"ping" => {
            Some(Kind::Other)
        }
        _ if name.starts_with(b"response.") => {
            Some(if name.ends_with(b".delta") { Kind::Content } else { Kind::Other })
        }
        _ => None,
    }
}

fn says_something(value: Value<'_>) -> bool {
    match value {
        Value::String(text) => !text.is_empty(),
        Value::Array(raw) => raw[1..raw.len() - 1].trim_ascii() != b"",
        Value::Object(_) => true,
        Value::Number(_) | Value::Bool(_) | Value::Null => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event<'a>(name: &'a str, data: &'a str) -> Event<'a> {
        Event { data: data.as_bytes(), name: name.as_bytes(), comment: false, truncated: false }
    }

    #[test]
    fn events_of_every_dialect_are_told_apart() {
        for (data, kind) in [
            (r#"{"choices":[{"index":0,"delta":{"content":"hi"}}]}"#, Kind::Content),
            (r#"{"choices":[{"delta":{"reasoning_content":"hm","content":null}}]}"#, Kind::Content),
            (r#"{"choices":[{"delta":{"reasoning":"hm"}}]}"#, Kind::Content),
            (r#"{"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}"#, Kind::Content),
            (r#"{"choices":[{"index":0,"text":" a"}],"usage":null}"#, Kind::Content),
            (r#"{"choices":[{"delta":{"content":"a"}}],"usage":{"prompt_tokens":1}}"#, Kind::Content),
            (r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#, Kind::Other),
            (r#"{"choices":[{"delta":{"role":"assistant","content":null,"tool_calls":[ ]}}]}"#, Kind::Other),
            (r#"{"choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":1}}"#, Kind::Other),
            (r#"{"choices":[],"usage":{"prompt_tokens":1}}"#, Kind::Usage),
            (r#"{"choices":[],"usage":null}"#, Kind::Other),
            (r#"{"error":{"message":"m","code":500}}"#, Kind::Error),
            (r#"{"error":null,"choices":[{"delta":{"content":"hi"}}]}"#, Kind::Content),
            (r#"{"error":"Request failed during generation","error_type":"generation"}"#, Kind::Error),
            (r#"{"object":"error","message":"m","code":400}"#, Kind::Error),
            ("[DONE]", Kind::Done),
            (r#"{"type":"message_start","message":{"usage":{"input_tokens":9}}}"#, Kind::Other),
            (r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":"a"}}"#, Kind::Content),
            (r#"{"type":"message_delta","usage":{"output_tokens":9}}"#, Kind::Other),
            (r#"{"type":"message_stop"}"#, Kind::Done),
            (r#"{"type":"error","error":{"type":"overloaded_error","message":"m"}}"#, Kind::Error),
            (r#"{"type":"response.created","response":{"error":null}}"#, Kind::Other),
            (r#"{"type":"response.output_text.delta","delta":"a"}"#, Kind::Content),
            (r#"{"type":"response.output_text.done","text":"a"}"#, Kind::Other),
            (r#"{"type":"response.failed","response":{"error":{"message":"m"}}}"#, Kind::Error),
            (r#"{"type":"response.completed","response":{"usage":{}}}"#, Kind::Done),
            (r#"{"type":"error","code":"server_error","message":"m"}"#, Kind::Error),
            (r#"{"index":1,"token":{"id":5,"text":" a","special":false},"details":null}"#, Kind::Content),
            (r#"{"token":{"id":2,"text":""}}"#, Kind::Other),
            (r#"{"content":" a","stop":false}"#, Kind::Content),
            (r#"{"content":"","stop":true}"#, Kind::Other),
            (r#"{"text":" a","meta_info":{}}"#, Kind::Content),
            ("", Kind::Other),
            ("not json", Kind::Other),
            (r#"{"choices":[{"delta":{"content":"hi"#, Kind::Other),
        ] {
            assert_eq!(event("", data).kind(), kind, "{data}");
        }
    }

    #[test]
    fn an_event_named_error_is_one_whatever_its_data() {
        assert_eq!(event("error", "out of memory").kind(), Kind::Error);
        assert_eq!(event("error", "out of memory").error().unwrap().message, "out of memory");
        assert_eq!(event("message", "{}").error(), None);
    }

    #[test]
    fn a_truncated_event_is_content_unless_it_begins_as_an_error() {
        let truncated = |data| Event { truncated: true, ..event("", data) }.kind();
        assert_eq!(truncated(r#"{"choices":[{"delta":{"content":"aaaa"#), Kind::Content);
        assert_eq!(truncated(r#"{"error":{"message":"aaaa"#), Kind::Error);
    }
}
