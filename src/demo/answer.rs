//! What the simulated engine says: the JSON of an answer, event by event or whole, in vLLM's order of fields.
//!
//! Written by hand and not through a map, because a balancer may read a stream without a JSON parser, and
//! then the order of fields is part of the dialect. Every string is known to need no escape, but the name of
//! the model.

use serde_json::Value;

use super::vllm::{Api, Question};

const FINGERPRINT: &str = r#""system_fingerprint":"plimsoll-sim""#;

/// The JSON of one answer, streamed or whole.
#[derive(Clone, Debug)]
pub(super) struct Answer<'a> {
    pub(super) question: &'a Question,
    pub(super) model: &'a str,
    pub(super) id: u64,
    /// Seconds since 1970.
    pub(super) created: u64,
}

impl Answer<'_> {
    /// The event that opens a chat stream; completions have none.
    pub(super) fn role_event(&self) -> Option<String> {
        let choice =
            r#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}"#;
        let chat = self.question.api == Api::Chat;
        chat.then(|| self.event(choice, r#","prompt_token_ids":null,"prompt_text":null"#))
    }

    /// The event of the `nth` token, counted from 1.
    pub(super) fn token_event(&self, nth: u64) -> String {
        let text = word(self.id, nth);
        let end = if nth == self.question.output_tokens {
            r#""finish_reason":"length","stop_reason":null"#
        } else {
            r#""finish_reason":null"#
        };
        let part = match self.question.api {
            Api::Chat => format!(r#""delta":{{"content":"{text}"}}"#),
            Api::Completions => format!(r#""text":"{text}""#),
        };
        self.event(&format!(r#"{{"index":0,{part},"logprobs":null,{end},"token_ids":null}}"#), "")
    }

    /// The last event before `[DONE]`, if the client asked for usage.
    pub(super) fn usage_event(&self, cached_tokens: u64) -> Option<String> {
        let rest = || format!("{},{FINGERPRINT}", self.usage(cached_tokens));
        self.question.include_usage.then(|| self.event("", &rest()))
    }

    /// The whole answer of a request that does not stream.
    pub(super) fn whole(&self, cached_tokens: u64) -> String {
        let text: String = (1..=self.question.output_tokens).map(|nth| word(self.id, nth)).collect();
        let part = match self.question.api {
            Api::Chat => format!(r#""message":{{"role":"assistant","content":"{text}","refusal":null}}"#),
            Api::Completions => format!(r#""text":"{text}""#),
        };
        let choice =
            format!(r#"{{"index":0,{part},"logprobs":null,"finish_reason":"length","stop_reason":null}}"#);
        self.json(&choice, &format!(r#","service_tier":null,{FINGERPRINT}{}"#, self.usage(cached_tokens)))
    }

    fn event(&self, choice: &str, rest: &str) -> String {
        format!("data: {}\n\n", self.json(choice, rest))
    }

    fn json(&self, choice: &str, rest: &str) -> String {
        let (prefix, object) = match (self.question.api, self.question.stream) {
            (Api::Chat, true) => ("chatcmpl", "chat.completion.chunk"),
            (Api::Chat, false) => ("chatcmpl", "chat.completion"),
            (Api::Completions, _) => ("cmpl", "text_completion"),
        };
        let (id, created, model) = (self.id, self.created, Value::from(self.model));
        format!(
            r#"{{"id":"{prefix}-{id:016x}","object":"{object}","created":{created},"model":{model},"choices":[{choice}]{rest}}}"#
        )
    }

    fn usage(&self, cached_tokens: u64) -> String {
        let Question { prompt_tokens, output_tokens, .. } = *self.question;
        let total = prompt_tokens + output_tokens;
        format!(
            r#","usage":{{"prompt_tokens":{prompt_tokens},"total_tokens":{total},"completion_tokens":{output_tokens},"prompt_tokens_details":{{"cached_tokens":{cached_tokens}}}}}"#
        )
    }
}

/// What a simulated engine has to say.
fn word(id: u64, nth: u64) -> &'static str {
    const WORDS: [&str; 8] = [" deep", " water", " carries", " any", " load", " the", " line", " allows"];
    WORDS[(id.wrapping_mul(7).wrapping_add(nth.wrapping_mul(nth)) % 8) as usize]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const QUESTION: Question = Question {
        api: Api::Chat,
        stream: true,
        include_usage: true,
        output_tokens: 2,
        prompt_tokens: 40,
        blocks: Vec::new(),
    };

    fn answer(question: &Question) -> Answer<'_> {
        Answer { question, model: "a \"b\"", id: 10, created: 5 }
    }

    fn parse(event: &str) -> Value {
        let json = event.strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap();
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_stream_opens_with_a_role_and_closes_with_usage() {
        let question = QUESTION;
        let answer = answer(&question);
        let role = parse(&answer.role_event().unwrap());
        assert_eq!(role["id"], "chatcmpl-000000000000000a");
        assert_eq!(role["model"], "a \"b\"");
        assert_eq!(role["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
        assert_eq!(parse(&answer.token_event(1))["choices"][0]["finish_reason"], Value::Null);
        let last = parse(&answer.token_event(2));
        assert_eq!(last["choices"][0]["finish_reason"], "length");
        assert_ne!(last["choices"][0]["delta"]["content"], "");
        let usage = parse(&answer.usage_event(16).unwrap());
        assert_eq!(usage["choices"], json!([]));
        assert_eq!(usage["usage"]["total_tokens"], 42);
        assert_eq!(usage["usage"]["prompt_tokens_details"]["cached_tokens"], 16);
    }

    #[test]
    fn a_completion_has_no_role_and_nobody_gets_usage_unasked() {
        let question = Question { api: Api::Completions, include_usage: false, ..QUESTION };
        let answer = answer(&question);
        assert_eq!((answer.role_event(), answer.usage_event(0)), (None, None));
        let first = parse(&answer.token_event(1));
        assert_eq!(
            (&first["id"], &first["object"]),
            (&json!("cmpl-000000000000000a"), &json!("text_completion"))
        );
        assert!(first["choices"][0]["text"].is_string());
    }

    #[test]
    fn a_token_event_has_the_recorded_fields_in_the_recorded_order() {
        let expected = concat!(
            r#"data: {"id":"chatcmpl-000000000000000a","object":"chat.completion.chunk","created":5,"#,
            r#""model":"a \"b\"","choices":[{"index":0,"delta":{"content":" line"},"logprobs":null,"#,
            r#""finish_reason":null,"token_ids":null}]}"#,
            "\n\n"
        );
        let question = QUESTION;
        assert_eq!(answer(&question).token_event(1).replace(word(10, 1), " line"), expected);
    }

    #[test]
    fn an_answer_that_does_not_stream_is_one_json_object() {
        let question = Question { stream: false, ..QUESTION };
        let whole: Value = serde_json::from_str(&answer(&question).whole(16)).unwrap();
        assert_eq!(whole["object"], "chat.completion");
        let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
        assert_eq!(text.split_whitespace().count(), 2);
        assert_eq!(whole["usage"]["prompt_tokens"], 40);
    }
}
