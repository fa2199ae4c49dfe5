//! The true count of tokens, from the last bytes of an answer.
//!
//! Engines report what a request cost in a `usage` object: at the end of a whole answer, or in one of the
//! last events of a stream. It is exact and free, so it teaches the price ([`super::BytesPerToken`]) and
//! shows what the prefix cache was worth (research/routing.md s.3.3). The proxy keeps a few KiB of tail and
//! searches them once, backwards, for the last key `"usage"` whose value is an object that counts tokens.
//! Generated text cannot pose as one: inside a JSON string every quote is escaped.

use memchr::memmem;

use super::json::{Cursor, Value};

/// The key, with its quotes.
const KEY: &[u8] = b"\"usage\"";

/// What one request cost, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt, cached ones included.
    pub prompt_tokens: u64,
    /// Tokens generated, over all choices.
    pub completion_tokens: u64,
    /// Prompt tokens that came from the engine's prefix cache; none if the engine does not say.
    pub cached_tokens: Option<u64>,
}

impl Usage {
    /// The last usage in `tail`, the last bytes of an answer, streamed or not; also of a single event's data.
    pub fn from_tail(tail: &[u8]) -> Option<Self> {
        let mut end = tail.len();
        loop {
            let at = memmem::rfind(&tail[..end], KEY)?;
            let escapes = tail[..at].iter().rev().take_while(|&&byte| byte == b'\\').count();
            let mut value = Cursor::new(&tail[at + KEY.len()..]);
            let usage = value.take(b':').and_then(|()| Self::read(&mut value));
            if escapes % 2 == 0 && usage.is_some() {
                return usage;
            }
            end = at;
        }
    }

    /// Both halves of a stream that reports in two events, as Anthropic's does: the prompt with
    /// `message_start`, what was generated with `message_delta`. Counts only grow within a stream, so the
    /// larger one is the later one.
    pub fn merge(self, other: Self) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens.max(other.prompt_tokens),
            completion_tokens: self.completion_tokens.max(other.completion_tokens),
            cached_tokens: self.cached_tokens.max(other.cached_tokens),
        }
    }

    /// OpenAI's names, or those of the responses and messages APIs. Anthropic counts what was read from or
    /// written to its cache beside `input_tokens`, everyone else within.
    fn read(cursor: &mut Cursor<'_>) -> Option<Self> {
        let [mut prompt, mut completion, mut within, mut read, mut written] = [None; 5];
        cursor.object(|key, cursor| {
            let value = cursor.value()?;
            match (key, value) {
                (b"prompt_tokens" | b"input_tokens", _) => prompt = value.whole().or(prompt),
                (b"completion_tokens" | b"output_tokens", _) => completion = value.whole().or(completion),
                (b"cache_read_input_tokens", _) => read = value.whole(),
                (b"cache_creation_input_tokens", _) => written = value.whole(),
                (b"prompt_tokens_details" | b"input_tokens_details", Value::Object(details)) => {
                    Cursor::new(details).object(|key, cursor| {
                        let value = cursor.value()?;
                        if key == b"cached_tokens" {
                            within = value.whole();
                        }
                        Some(())
                    })?;
                }
                _ => {}
            }
            Some(())
        })?;
        prompt.or(completion)?;
        let beside = [read, written].into_iter().flatten().fold(0, u64::saturating_add);
        let beside = if within.is_some() { 0 } else { beside };
        Some(Self {
            prompt_tokens: prompt.unwrap_or_default().saturating_add(beside),
            completion_tokens: completion.unwrap_or_default(),
            cached_tokens: within.or(read),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::captures;
    use super::*;

    fn usage(prompt_tokens: u64, completion_tokens: u64, cached_tokens: Option<u64>) -> Option<Usage> {
        Some(Usage { prompt_tokens, completion_tokens, cached_tokens })
    }

    fn of(text: &str) -> Option<Usage> {
        Usage::from_tail(text.as_bytes())
    }

    #[test]
    fn the_captured_answers_give_the_counts_that_stand_in_them() {
        for (file, want) in [
            ("vllm-0.32.0/chat-nonstream.http", usage(21, 12, None)),
            ("vllm-0.32.0/chat-stream-include-usage.http", usage(21, 12, None)),
            ("vllm-0.32.0-flags/chat-stream-continuous-usage.http", usage(21, 4, Some(0))),
            ("vllm-0.32.0-flags/chat-prefix-2nd.http", usage(775, 2, Some(640))),
            ("sglang-0.5.23/chat-nonstream.http", usage(21, 12, None)),
            ("sglang-0.5.23/chat-stream-include-usage.http", usage(21, 12, None)),
            ("llama.cpp-b11434/chat-nonstream.http", usage(21, 12, Some(4))),
            ("llama.cpp-b11434/chat-stream-include-usage.http", usage(21, 12, Some(20))),
            ("dynamo-1.6.1-mocker/chat-nonstream.http", usage(21, 12, Some(0))),
            ("dynamo-1.6.1-mocker/chat-stream-include-usage.http", usage(21, 12, Some(16))),
            ("vllm-0.32.0/chat-stream.http", None),
            ("sglang-0.5.23/completions-stream.http", usage(5, 12, None)),
            ("sglang-0.5.23/chat-stream.http", None),
        ] {
            let body = captures::body(file);
            let tail = &body[body.len().saturating_sub(4_096)..];
            assert_eq!(Usage::from_tail(tail), want, "{file}");
        }
    }

    #[test]
    fn every_api_is_read() {
        let responses = r#"{"response":{"usage":{
            "input_tokens":50,"input_tokens_details":{"cached_tokens":40},
            "output_tokens":7,"output_tokens_details":{"reasoning_tokens":3},"total_tokens":57}}}"#;
        assert_eq!(of(responses), usage(50, 7, Some(40)));
        let messages = r#""usage" : {"input_tokens":10,"cache_read_input_tokens":30,
            "cache_creation_input_tokens":5,"output_tokens":2}"#;
        assert_eq!(of(messages), usage(45, 2, Some(30)));
        assert_eq!(of(r#"{"data":[],"usage":{"prompt_tokens":8,"total_tokens":8}}"#), usage(8, 0, None));
    }

    #[test]
    fn the_two_halves_of_a_messages_stream_merge() {
        let start =
            of(r#"{"type":"message_start","message":{"usage":{"input_tokens":25,"output_tokens":1}}}"#)
                .unwrap();
        let delta = of(r#"{"type":"message_delta","usage":{"output_tokens":15}}"#).unwrap();
        assert_eq!(Some(start.merge(delta)), usage(25, 15, None));
    }

    #[test]
    fn the_last_one_that_counts_wins() {
        let mut text =
            r#"{"usage":{"prompt_tokens":1}} {"usage":{"prompt_tokens":2}} {"usage":null}"#.to_owned();
        assert_eq!(of(&text), usage(2, 0, None));
        text.push_str(r#"{"usage":{"prompt_tok"#);
        assert_eq!(of(&text), usage(2, 0, None), "one that is cut does not count");
        text.push_str(r#"{"usage":{"prompt_tokens":"many"}}{"usage":{}}{"usage":[1]}"#);
        assert_eq!(of(&text), usage(2, 0, None));
    }

    #[test]
    fn generated_text_does_not_pose_as_usage() {
        let content = r#"{"usage":{"prompt_tokens":666}}"#;
        let answer = serde_json::json!({"choices": [{"message": {"content": content}}]}).to_string();
        assert_eq!(of(&answer), None);
        assert_eq!(of(&serde_json::to_string(&answer).unwrap()), None, "nested once more");
        assert_eq!(of(r#"{"content":"usage","x":{"prompt_tokens":1}}"#), None);
        assert_eq!(of(r#"...\"usage":{"prompt_tokens":1}"#), None);
    }

    #[test]
    fn a_tail_may_begin_anywhere() {
        let body = captures::body("llama.cpp-b11434/chat-stream-include-usage.http");
        let whole = Usage::from_tail(&body);
        let key = body.windows(7).rposition(|window| window == KEY).unwrap();
        for start in 0..=key {
            assert_eq!(Usage::from_tail(&body[start..]), whole, "from {start}");
        }
        assert_eq!(Usage::from_tail(&body[key + 1..]), None);
    }
}
