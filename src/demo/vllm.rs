//! The dialect the simulated engine speaks: vLLM 0.32's OpenAI server, field by field.
//!
//! The balancer under test must not be able to tell; so shapes, names and error messages are copied from
//! recorded bytes (captures/vllm-0.32.0). Only `server` and `system_fingerprint` say that this is a
//! simulation. Pure: a body goes in, a question or a refusal comes out. What is said back: `answer.rs`,
//! `exposition.rs`.

use std::fmt::Write as _;

use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::sim::hardware::Hardware;

/// Longest context the engine accepts, in tokens, if its memory holds that much.
const CONTEXT_TOKENS: u64 = 131_072;
/// Answers are this long when the request does not say.
const DEFAULT_OUTPUT_TOKENS: u64 = 128;
/// What a token is worth in bytes of text.
const TOKEN_BYTES: usize = 4;

/// Which of the two generating endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Api {
    Chat,
    Completions,
}

/// What a client wants generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) api: Api,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) output_tokens: u64,
    pub(super) prompt_tokens: u64,
    /// One chained hash per whole block of the prompt.
    pub(super) blocks: Vec<u64>,
}

/// A request the engine does not serve, as its JSON error says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) status: u16,
    kind: &'static str,
    message: String,
    param: Option<&'static str>,
}

/// The model an engine serves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Served<'a> {
    pub(super) model: &'a str,
    pub(super) hardware: &'a Hardware,
    /// Seconds since 1970 at which the engine was started.
    pub(super) started: f64,
}

impl Served<'_> {
    fn context_tokens(&self) -> u64 {
        CONTEXT_TOKENS.min(self.hardware.kv_tokens)
    }

    /// Reads the body of a generating request.
    pub(super) fn question(&self, api: Api, body: &[u8]) -> Result<Question, Fault> {
        if body.is_empty() {
            return Err(Fault::field("body", "missing", "Field required"));
        }
        let body: Value = serde_json::from_slice(body).map_err(|_| Fault::json())?;
        let text = match api {
            Api::Chat => chat_text(&body),
            Api::Completions => completion_text(&body),
        };
        let text = text.ok_or_else(|| match api {
            Api::Chat => Fault::field("body.messages", "missing", "Field required"),
            Api::Completions => Fault::field("body.prompt", "missing", "Field required"),
        })?;
        if let Some(model) = body["model"].as_str().filter(|model| *model != self.model) {
            return Err(Fault::unknown_model(model, self.model));
        }
        if body["n"].as_u64().is_some_and(|n| n > 1) {
            return Err(Fault::bad(
                None,
                format!("n must be 1 when using greedy sampling, got {}.", body["n"]),
            ));
        }
        let prompt_tokens = (text.len().div_ceil(TOKEN_BYTES) as u64).max(1);
        Ok(Question {
            api,
            stream: body["stream"] == true,
            include_usage: body["stream_options"]["include_usage"] == true,
            output_tokens: self.output_tokens(&body, prompt_tokens)?,
            prompt_tokens,
            blocks: block_hashes(text.as_bytes(), self.hardware.block_tokens),
        })
    }

    fn output_tokens(&self, body: &Value, prompt_tokens: u64) -> Result<u64, Fault> {
        let longest = self.context_tokens();
        let left = longest.saturating_sub(prompt_tokens);
        let asked =
            [&body["max_completion_tokens"], &body["max_tokens"]].into_iter().find(|it| !it.is_null());
        let Some(asked) = asked else {
            return if left > 0 {
                Ok(DEFAULT_OUTPUT_TOKENS.min(left))
            } else {
                Err(Fault::too_long(longest))
            };
        };
        let Some(tokens) = asked.as_i64() else {
            return Err(Fault::field("body.max_tokens", "int_parsing", "Input should be a valid integer"));
        };
        let value = format!("(parameter=max_tokens, value={tokens})");
        match u64::try_from(tokens) {
            Err(_) | Ok(0) => Err(Fault::bad(
                Some("max_tokens"),
                format!("max_tokens must be at least 1, got {tokens}. {value}"),
            )),
            Ok(tokens) if tokens > longest => Err(Fault::bad(
                Some("max_tokens"),
                format!(
                    "max_tokens={tokens} cannot be greater than max_model_len={longest}. Please request fewer \
                     output tokens. {value}"
                ),
            )),
            Ok(tokens) if tokens > left => Err(Fault::too_long(longest)),
            Ok(tokens) => Ok(tokens),
        }
    }

    /// The answer to `GET /v1/models`.
    pub(super) fn models(&self) -> String {
        let (model, created, longest) = (json!(self.model), self.started as u64, self.context_tokens());
        format!(
            r#"{{"object":"list","data":[{{"id":{model},"object":"model","created":{created},"owned_by":"vllm","root":{model},"parent":null,"max_model_len":{longest}}}]}}"#
        )
    }
}

impl Fault {
    /// The JSON body that tells the client.
    pub(super) fn body(&self) -> String {
        let (message, kind, param) = (json!(self.message), json!(self.kind), json!(self.param));
        let code = self.status;
        format!(r#"{{"error":{{"message":{message},"type":{kind},"param":{param},"code":{code}}}}}"#)
    }

    /// The prompt, or prompt and answer together, exceed what the engine holds.
    pub(super) fn too_long(longest: u64) -> Self {
        let message = format!(
            "This model's maximum context length is {longest} tokens. Please reduce the length of the input prompt or \
             the number of requested output tokens."
        );
        Self::bad(Some("input_tokens"), message)
    }

    /// The body exceeds what the engine reads.
    pub(super) fn too_large() -> Self {
        Self { status: 413, ..Self::bad(None, "Request body too large".to_owned()) }
    }

    fn bad(param: Option<&'static str>, message: String) -> Self {
        Self { status: 400, kind: "BadRequestError", message, param }
    }

    fn field(place: &'static str, kind: &str, problem: &str) -> Self {
        let message =
            format!("1 validation error:\n  {{'type': '{kind}', 'loc': '{place}', 'msg': '{problem}'}}");
        Self { kind: "Bad Request", ..Self::bad(Some(place), message) }
    }

    fn json() -> Self {
        Self::field("body", "json_invalid", "JSON decode error")
    }

    fn unknown_model(asked: &str, served: &str) -> Self {
        let message = format!("The model `{asked}` does not exist. Valid aliases: {served}.");
        Self { status: 404, kind: "NotFoundError", message, param: Some("model") }
    }
}

/// The text of a chat as a template would lay it out: tools, then role and content of each message.
fn chat_text(body: &Value) -> Option<String> {
    let messages = body["messages"].as_array()?;
    let mut text = String::new();
    if let Some(tools) = body["tools"].as_array() {
        for tool in tools {
            let _ = writeln!(text, "{tool}");
        }
    }
    for message in messages {
        let _ = writeln!(text, "<{}>", message["role"].as_str().unwrap_or_default());
        match &message["content"] {
            Value::String(content) => text.push_str(content),
            Value::Array(parts) => text.extend(parts.iter().filter_map(|part| part["text"].as_str())),
            _ => {}
        }
        text.push('\n');
    }
    Some(text)
}

/// The prompt of a completion: a string, strings, or token ids.
fn completion_text(body: &Value) -> Option<String> {
    match &body["prompt"] {
        Value::String(prompt) => Some(prompt.clone()),
        Value::Array(parts) => Some(parts.iter().map(part_text).collect()),
        _ => None,
    }
}

/// A part of a prompt that is a list: a string as it is, a token id as the four bytes a token is worth.
fn part_text(part: &Value) -> String {
    match part {
        Value::String(text) => text.clone(),
        other => format!("{:>TOKEN_BYTES$.TOKEN_BYTES$}", other.to_string()),
    }
}

/// One hash per whole block of the text, each continuing the one before, so that it names everything up to
/// its end.
fn block_hashes(text: &[u8], block_tokens: u64) -> Vec<u64> {
    let bytes = usize::try_from(block_tokens).unwrap_or(usize::MAX).saturating_mul(TOKEN_BYTES).max(1);
    let chain = |hash: &mut u64, block: &[u8]| {
        *hash = xxh3_64_with_seed(block, *hash);
        Some(*hash)
    };
    text.chunks_exact(bytes).scan(0, chain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HARDWARE: Hardware = Hardware::ALL[0];

    fn served() -> Served<'static> {
        Served { model: "sim-8b", hardware: &HARDWARE, started: 1_795_430_229.5 }
    }

    fn chat(body: &str) -> Result<Question, Fault> {
        served().question(Api::Chat, body.as_bytes())
    }

    #[test]
    fn prompts_that_begin_alike_share_their_first_blocks() {
        let ask = |question: &str| {
            let system = "You are the mate of a ship. ".repeat(20);
            let body = json!({"model": "sim-8b", "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": [{"type": "text", "text": question}]},
            ]});
            chat(&body.to_string()).unwrap()
        };
        let (one, two) = (ask(&"north ".repeat(30)), ask(&"south ".repeat(30)));
        // 9 + 560 + 1 + 7 bytes are alike: nine whole blocks of 64.
        let alike = one.blocks.iter().zip(&two.blocks).take_while(|(a, b)| a == b).count();
        assert_eq!(alike, 9);
        assert_eq!(one.blocks.len(), 11);
        assert_eq!(one.prompt_tokens, (9 + 560 + 1 + 7 + 180 + 1_u64).div_ceil(4));
    }

    #[test]
    fn a_question_says_what_it_wants() {
        let plain = chat(r#"{"messages":[]}"#).unwrap();
        assert_eq!((plain.stream, plain.include_usage, plain.output_tokens), (false, false, 128));
        let body = r#"{"messages":[],"stream":true,"stream_options":{"include_usage":true},"max_tokens":7,"ignore_eos":true}"#;
        let full = chat(body).unwrap();
        assert_eq!((full.stream, full.include_usage, full.output_tokens), (true, true, 7));
        let ids = served().question(Api::Completions, br#"{"prompt":[1,22,333333]}"#).unwrap();
        assert_eq!(ids.prompt_tokens, 3);
    }

    #[test]
    fn the_list_of_models_names_the_one_it_serves() {
        let models: Value = serde_json::from_str(&served().models()).unwrap();
        assert_eq!(models["data"][0]["id"], "sim-8b");
        assert_eq!(models["data"][0]["max_model_len"], 131_072);
    }

    #[test]
    fn refusals_have_the_recorded_status_and_shape() {
        let refused = |body: &str| {
            let fault = chat(body).unwrap_err();
            let error: Value = serde_json::from_str(&fault.body()).unwrap();
            assert_eq!(error["error"]["code"], fault.status);
            (
                fault.status,
                error["error"]["type"].as_str().unwrap().to_owned(),
                error["error"]["param"].clone(),
            )
        };
        let bad = |kind: &str, param| (400, kind.to_owned(), param);
        assert_eq!(refused(""), bad("Bad Request", json!("body")));
        assert_eq!(refused("{"), bad("Bad Request", json!("body")));
        assert_eq!(refused("[1]"), bad("Bad Request", json!("body.messages")));
        assert_eq!(refused("{}"), bad("Bad Request", json!("body.messages")));
        assert_eq!(refused(r#"{"messages":[],"max_tokens":0}"#), bad("BadRequestError", json!("max_tokens")));
        assert_eq!(
            refused(r#"{"messages":[],"max_tokens":999999}"#),
            bad("BadRequestError", json!("max_tokens"))
        );
        assert_eq!(
            refused(r#"{"messages":[],"max_tokens":"ten"}"#),
            bad("Bad Request", json!("body.max_tokens"))
        );
        assert_eq!(refused(r#"{"messages":[],"n":2}"#), bad("BadRequestError", Value::Null));
        let nope = r#"{"messages":[],"model":"nope"}"#;
        assert_eq!(refused(nope), (404, "NotFoundError".to_owned(), json!("model")));
        assert_eq!(
            chat(nope).unwrap_err().body(),
            r#"{"error":{"message":"The model `nope` does not exist. Valid aliases: sim-8b.","type":"NotFoundError","param":"model","code":404}}"#
        );
        let long = json!({"messages": [{"role": "user", "content": "x".repeat(600_000)}]}).to_string();
        assert_eq!(refused(&long), bad("BadRequestError", json!("input_tokens")));
    }
}
