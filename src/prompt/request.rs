//! What a request body says about the work it asks for: one pass over the body, a second over its prompt.
//!
//! The members that matter are those of research/gateways.md s.4. What splits the engine's prefix cache
//! (model, salt, adapter) splits ours:
//!
//! ```text
//! partition = fold over the raw values, in fixed order, of p <- xxh3(value, seed = p)        p starts at 0
//! session   = xxh3(prompt_cache_key)       never `user`: one heavy user would be one hot backend
//! ```
//!
//! A body is never refused here: the engine knows best what it accepts. What is not understood is opaque,
//! priced by its length, and shares no prefix with anything.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::canon::Canon;
use super::json::{Cursor, Text, Value};
use super::{Digest, Endpoint};

/// Reads what `body` asks for; never fails.
pub(super) fn digest(endpoint: Endpoint, body: &[u8]) -> Digest {
    let mut fields = Fields::default();
    let whole = Cursor::new(body).object(|key, cursor| fields.member(key, cursor));
    let canon = whole.and_then(|()| fields.canon(endpoint));
    let (prompt_bytes, blocks) = canon.map_or((body.len() as u64, Vec::new()), Canon::finish);
    Digest {
        model: fields.model.map(Text::to_string_lossy),
        stream: fields.stream,
        max_tokens: fields.max_completion_tokens.or(fields.max_tokens).or(fields.max_output_tokens),
        choices: u32::try_from(fields.n.max(fields.best_of).max(1)).unwrap_or(u32::MAX),
        prompt_bytes,
        blocks,
        session: fields.session.map(|key| xxh3_64(&key.decoded())),
    }
}

/// The members of the body that matter; of a member that occurs twice the last counts, as in every engine.
#[derive(Default)]
struct Fields<'a> {
    model: Option<Text<'a>>,
    stream: bool,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    max_output_tokens: Option<u64>,
    n: u64,
    best_of: u64,
    session: Option<Text<'a>>,
    /// The raw values of what splits the cache, in the order of [`partition_index`].
    partition: [&'a [u8]; 6],
    tools: Option<&'a [u8]>,
    functions: Option<&'a [u8]>,
    system: Option<&'a [u8]>,
    instructions: Option<&'a [u8]>,
    messages: Option<&'a [u8]>,
    prompt: Option<&'a [u8]>,
    input: Option<&'a [u8]>,
}

/// The place of a member that splits the engine's prefix cache: the model, vLLM's salt, SGLang's extra key
/// and the adapter under its names.
fn partition_index(key: &[u8]) -> Option<usize> {
    let splitting: [&[u8]; 6] = [b"model", b"cache_salt", b"extra_key", b"lora_path", b"lora_name", b"lora"];
    splitting.iter().position(|&name| name == key)
}

impl<'a> Fields<'a> {
    /// Takes one member of the body's top level.
    fn member(&mut self, key: &[u8], cursor: &mut Cursor<'a>) -> Option<()> {
        if let Some(index) = partition_index(key) {
            let raw = cursor.raw()?;
            self.partition[index] = if raw == b"null" { b"" } else { raw };
            if key == b"model" {
                self.model = Cursor::new(raw).value()?.text();
            }
            return Some(());
        }
        match key {
            b"stream" => self.stream = cursor.value()? == Value::Bool(true),
            b"max_tokens" => self.max_tokens = cursor.value()?.whole(),
            b"max_completion_tokens" => self.max_completion_tokens = cursor.value()?.whole(),
            b"max_output_tokens" => self.max_output_tokens = cursor.value()?.whole(),
            b"n" => self.n = cursor.value()?.whole().unwrap_or_default(),
            b"best_of" => self.best_of = cursor.value()?.whole().unwrap_or_default(),
            b"prompt_cache_key" => self.session = cursor.value()?.text().filter(|key| !key.is_empty()),
            b"tools" => self.tools = Some(cursor.raw()?),
            b"functions" => self.functions = Some(cursor.raw()?),
            b"system" => self.system = Some(cursor.raw()?),
            b"instructions" => self.instructions = Some(cursor.raw()?),
            b"messages" => self.messages = Some(cursor.raw()?),
            b"prompt" => self.prompt = Some(cursor.raw()?),
            b"input" => self.input = Some(cursor.raw()?),
            _ => drop(cursor.value()?),
        }
        Some(())
    }

    /// The canonical prompt; none if the endpoint's prompt is missing or of a shape nobody knows.
    fn canon(&self, endpoint: Endpoint) -> Option<Canon> {
        let (system, turns) = match endpoint {
            Endpoint::ChatCompletions => (None, self.messages?),
            Endpoint::Completions => (None, self.prompt?),
            Endpoint::Embeddings => (None, self.input.or(self.messages)?),
            Endpoint::Responses => (self.instructions, self.input?),
            Endpoint::Messages => (self.system, self.messages?),
            Endpoint::Other => return None,
        };
        let partition = self.partition.iter().fold(0, |seed, value| xxh3_64_with_seed(value, seed));
        let mut canon = Canon::new(partition);
        for tools in [self.tools, self.functions].into_iter().flatten() {
            canon.tools(tools);
        }
        if let Some(system) = system {
            canon.system(system)?;
        }
        canon.turns(turns)?;
        Some(canon)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value as Tree, json};

    use super::*;

    fn chat(body: &Tree) -> Digest {
        digest(Endpoint::ChatCompletions, body.to_string().as_bytes())
    }

    fn of(endpoint: Endpoint, body: &Tree) -> Digest {
        digest(endpoint, body.to_string().as_bytes())
    }

    /// A text of `length` bytes that is not the same everywhere.
    fn text(length: usize) -> String {
        (0..length).map(|i| char::from(b'a' + (i * i / 7 % 26) as u8)).collect()
    }

    #[test]
    fn what_a_chat_asks_for_is_read() {
        let body = json!({
            "messages": [{"role": "system", "content": "short"}, {"role": "user", "content": "grüße\n"}],
            "model": "llama \"3\"", "stream": true, "max_tokens": 16.0, "n": 3, "user": "heavy",
            "prompt_cache_key": "k", "stream_options": {"include_usage": true, "model": "inner"},
        });
        let digest = chat(&body);
        assert_eq!(digest.model.as_deref(), Some("llama \"3\""));
        assert!(digest.stream);
        assert_eq!((digest.max_tokens, digest.choices), (Some(16), 3));
        assert_eq!(digest.prompt_bytes, 5 + 8, "UTF-8 bytes, escapes decoded");
        assert_eq!(digest.session, Some(xxh3_64(b"k")));
    }

    #[test]
    fn the_defaults_hold_for_what_is_absent_or_of_the_wrong_type() {
        let wrong = json!({"messages": [], "model": 7, "stream": "yes", "max_tokens": -1, "n": "x",
            "best_of": null, "prompt_cache_key": ""});
        for body in [json!({"messages": []}), wrong] {
            let want = Digest {
                model: None,
                stream: false,
                max_tokens: None,
                choices: 1,
                prompt_bytes: 0,
                blocks: vec![],
                session: None,
            };
            assert_eq!(chat(&body), want, "{body}");
        }
    }

    #[test]
    fn every_name_of_the_token_limit_counts_and_the_newer_one_first() {
        assert_eq!(chat(&json!({"max_completion_tokens": 5, "max_tokens": 9})).max_tokens, Some(5));
        assert_eq!(of(Endpoint::Responses, &json!({"max_output_tokens": 5})).max_tokens, Some(5));
        assert_eq!(of(Endpoint::Completions, &json!({"n": 2, "best_of": 4})).choices, 4);
    }

    #[test]
    fn a_member_that_occurs_twice_counts_as_the_last() {
        let body =
            br#"{"model":"a","messages":[{"content":"xx"}],"model":"b","messages":[{"content":"yyy"}]}"#;
        let digest = digest(Endpoint::ChatCompletions, body);
        assert_eq!((digest.model.as_deref(), digest.prompt_bytes), (Some("b"), 3));
        let escaped = br#"{"\u006dodel":"a","messages":[]}"#;
        assert_eq!(super::digest(Endpoint::ChatCompletions, escaped).model.as_deref(), Some("a"));
    }

    #[test]
    fn the_order_of_the_members_does_not_matter() {
        let long = text(2_000);
        let one = format!(r#"{{"model":"m","tools":[1],"messages":[{{"role":"user","content":"{long}"}}]}}"#);
        let two = format!(r#"{{"messages":[{{"content":"{long}","role":"user"}}],"tools":[1],"model":"m"}}"#);
        let digests = [one, two].map(|body| digest(Endpoint::ChatCompletions, body.as_bytes()));
        assert_eq!(digests[0], digests[1]);
        assert_eq!((digests[0].prompt_bytes, digests[0].blocks.len()), (2_003, 3));
    }

    #[test]
    fn a_conversation_that_grows_keeps_its_beginning() {
        let system = json!({"role": "system", "content": text(3_000)});
        let first = chat(&json!({"model": "m", "messages": [system, {"role": "user", "content": "hi"}]}));
        let second = chat(&json!({"model": "m", "messages": [system, {"role": "user", "content": "hi"},
            {"role": "assistant", "content": text(900)}, {"role": "user", "content": "go on"}]}));
        assert_eq!(first.blocks.len(), 5);
        assert_eq!(second.blocks[..5], first.blocks[..]);
        assert_eq!(second.blocks.len(), 7);
    }

    #[test]
    fn roles_and_boundaries_are_part_of_the_prefix() {
        let (head, tail) = (text(600), text(600));
        let two = |a: &str, b: &str, role: &str| {
            chat(&json!({"messages": [{"role": role, "content": a}, {"role": role, "content": b}]})).blocks
        };
        let shifted = two(&head[..599], &(head[599..].to_owned() + &tail), "user");
        assert_ne!(two(&head, &tail, "user"), shifted, "where one message ends matters");
        assert_ne!(two(&head, &tail, "user")[0], two(&head, &tail, "system")[0]);
    }

    #[test]
    fn what_splits_the_engines_cache_splits_the_blocks_from_the_first_on() {
        let body = |extra: Tree| {
            let mut body = json!({"model": "m", "messages": [{"role": "user", "content": text(2_000)}]});
            body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            chat(&body).blocks
        };
        let plain = body(json!({}));
        assert_eq!(plain.len(), 3);
        assert_eq!(body(json!({"cache_salt": null, "user": "u", "temperature": 1})), plain);
        let mut seen = vec![plain];
        for (name, value) in [("model", "n"), ("cache_salt", "m"), ("extra_key", "m"), ("lora_path", "m")] {
            let blocks = body(json!({name: value}));
            assert!(seen.iter().all(|other| other.iter().all(|hash| !blocks.contains(hash))), "{name}");
            seen.push(blocks);
        }
    }

    #[test]
    fn a_picture_costs_a_constant_and_its_encoding_is_no_text() {
        let with = |data: &str| {
            chat(&json!({"messages": [{"role": "user", "content": [
                {"type": "text", "text": "what is this"},
                {"type": "image_url", "image_url": {"url": format!("data:image/png;base64,{data}")}},
                {"type": "text", "text": text(1_000)},
            ]}]}))
        };
        let (small, large, again) = (with("AAAA"), with(&text(100_000)), with("AAAA"));
        assert_eq!(small.prompt_bytes, 12 + 4_096 + 1_000);
        assert_eq!(large.prompt_bytes, small.prompt_bytes);
        assert_eq!(
            (small.blocks.len(), large.blocks.len()),
            (2, 2),
            "8 bytes of hash, not 100,000 of base64"
        );
        assert_eq!(small, again);
        assert_ne!(small.blocks[0], large.blocks[0]);
    }

    #[test]
    fn a_list_with_one_text_is_that_text() {
        let plain = chat(&json!({"messages": [{"role": "user", "content": text(1_000)}]}));
        let parts = chat(
            &json!({"messages": [{"role": "user", "content": [{"type": "text", "text": text(1_000)}]}]}),
        );
        assert_eq!(plain, parts);
    }

    #[test]
    fn tools_and_their_calls_are_counted() {
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let body = json!({"tools": tools, "messages": [
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "done"}]});
        assert_eq!(chat(&body).prompt_bytes, tools.to_string().len() as u64 + 1 + 7 + 4);
    }

    #[test]
    fn every_shape_of_a_completion_prompt_is_read() {
        for (prompt, bytes) in [
            (json!("four"), 4),
            (json!(["four", "more"]), 8),
            (json!([1, 2, 300_000]), 12),
            (json!([[1, 2], [3]]), 12),
            (json!([]), 0),
        ] {
            assert_eq!(of(Endpoint::Completions, &json!({"prompt": prompt})).prompt_bytes, bytes, "{prompt}");
            assert_eq!(of(Endpoint::Embeddings, &json!({"input": prompt})).prompt_bytes, bytes, "{prompt}");
        }
        let ids: Vec<u32> = (0..300).collect();
        let long = of(Endpoint::Completions, &json!({"prompt": ids}));
        assert_eq!((long.prompt_bytes, long.blocks.len()), (1_200, 2));
    }

    #[test]
    fn the_responses_api_is_read() {
        let plain = of(Endpoint::Responses, &json!({"instructions": "be kind", "input": "hello"}));
        assert_eq!(plain.prompt_bytes, 12);
        let items = json!({"input": [
            {"role": "user", "content": [{"type": "input_text", "text": "12345"},
                {"type": "input_image", "image_url": "u"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1234"}]});
        assert_eq!(of(Endpoint::Responses, &items).prompt_bytes, 5 + 4_096 + 3 + 4);
    }

    #[test]
    fn the_messages_api_is_read() {
        let body = json!({"model": "c", "max_tokens": 9, "system": [{"type": "text", "text": "1234"}],
            "messages": [
            {"role": "user", "content": "56"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "789"},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t",
                "content": [{"type": "text", "text": "ok"},
                    {"type": "image", "source": {"data": "AAAA"}}]}]}]});
        assert_eq!(of(Endpoint::Messages, &body).prompt_bytes, 4 + 2 + 3 + 1 + 7 + 2 + 4_096);
    }

    #[test]
    fn what_is_not_understood_is_opaque_and_keeps_what_was() {
        for body in [
            &br#"{"model":"m","stream":true,"messages":[{"role":"user","content":"cut"#[..],
            br#"{"model":"m","stream":true,"messages":7}"#,
            br#"{"model":"m","stream":true,"prompt":"for another endpoint"}"#,
            br#"{"model":"m","stream":true}"#,
            br#"{"model":"m","stream":true,"#,
            b"{\"model\":\"m\",\"stream\":true,\xff}",
        ] {
            let digest = digest(Endpoint::ChatCompletions, body);
            assert_eq!((digest.model.as_deref(), digest.stream), (Some("m"), true));
            assert_eq!((digest.prompt_bytes, digest.blocks), (body.len() as u64, vec![]));
        }
        let other = of(Endpoint::Other, &json!({"model": "m", "query": text(9_000)}));
        assert_eq!((other.model.as_deref(), other.blocks.len()), (Some("m"), 0));
        assert!(other.prompt_bytes > 9_000);
        assert_eq!(digest(Endpoint::Other, b"--boundary\r\n").prompt_bytes, 12);
        assert_eq!(digest(Endpoint::ChatCompletions, b"").prompt_bytes, 0);
    }

    #[test]
    fn nesting_of_any_depth_is_survived() {
        for shape in ["[", "{\"content\":", "[{\"content\":", "[{\"function\":"] {
            let deep = shape.repeat(200_000);
            for head in ["{\"messages\":", "{\"messages\":[", "{\"tools\":", "{\"x\":", ""] {
                let body = format!("{head}{deep}");
                let digest = digest(Endpoint::ChatCompletions, body.as_bytes());
                assert_eq!(digest.prompt_bytes, body.len() as u64);
            }
        }
        for (open, close) in
            [("[", "]"), ("{\"content\":", "}"), ("[{\"content\":", "}]"), ("{\"function\":", "}")]
        {
            for member in ["messages", "system", "tools"] {
                let deep = open.repeat(100_000) + "1" + &close.repeat(100_000);
                let body = format!(r#"{{"messages":[{{"content":"hi"}}],"{member}":[{deep}]}}"#);
                let digest = digest(Endpoint::Messages, body.as_bytes());
                assert!(digest.prompt_bytes < body.len() as u64 + 4_096, "{open} in {member}");
            }
        }
    }

    #[test]
    fn random_bytes_and_cut_bodies_never_panic() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let endpoints = [
            Endpoint::ChatCompletions,
            Endpoint::Completions,
            Endpoint::Embeddings,
            Endpoint::Responses,
            Endpoint::Messages,
            Endpoint::Other,
        ];
        let body = json!({"model": "m\u{e9}", "system": [{"text": "s"}], "input": [[1, 2.5, -3]],
            "prompt": ["a"], "tools": [{}], "messages": [{"role": "user", "name": "n",
            "content": [{"text": "\"\\é😀\n"}, {"x": 1}],
            "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]})
        .to_string();
        for _ in 0..20_000 {
            let mut bytes = body.as_bytes()[..rng.usize(0..=body.len())].to_vec();
            for _ in 0..rng.usize(0..4) {
                if let Some(byte) = bytes.get_mut(rng.usize(0..body.len())) {
                    *byte = if rng.bool() { rng.u8(..) } else { *rng.choice(b"{}[]\",:\\u0n").unwrap() };
                }
            }
            let digest = digest(*rng.choice(&endpoints).unwrap(), &bytes);
            assert!(digest.choices >= 1 && digest.blocks.len() <= 8);
        }
    }
}
