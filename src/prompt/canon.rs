//! The canonical text of a prompt: every shape of request brought into one order, with one price.
//!
//! Two requests can share a prefix in the engine only if the engine's chat template renders the same
//! beginning for both, so the text follows the order of the templates (tools, system text, then each turn
//! with role and content) and not the order of the JSON. Its bytes are the price, its blocks the key of the
//! prefix index:
//!
//! ```text
//! price = UTF-8 bytes of text + raw bytes of tools + 4 per token id + 4096 per picture, sound or file
//! ```
//!
//! (research/routing.md s.7.1 and 7.2.) Between two pieces stands 0xFF, which no UTF-8 text contains, and a
//! letter for what follows: so no two prompts share a canonical text by accident, while roles and separators
//! cost nothing.

use xxhash_rust::xxh3::xxh3_64;

use super::json::{Cursor, Text, Value};
use super::prefix::BlockHasher;

/// The price in bytes of anything in a prompt that is not text: about 1,000 tokens, a picture of medium size.
const MEDIA_BYTES: u64 = 4_096;
/// Bytes per token id: at the starting price of four bytes per token, one token each.
const TOKEN_ID_BYTES: u64 = 4;
/// How deep content may hold content (a tool result in a message, a batch of token lists); deeper costs like
/// a picture.
const MAX_DEPTH: u32 = 4;

/// The canonical text on its way into the hasher, and its price.
pub(super) struct Canon {
    hasher: BlockHasher,
    bytes: u64,
}

impl Canon {
    /// An empty text of a prompt in `partition`.
    pub(super) const fn new(partition: u64) -> Self {
        Self { hasher: BlockHasher::new(partition), bytes: 0 }
    }

    /// The definitions of the tools, as they stand; no tools are the same as an empty list of them.
    pub(super) fn tools(&mut self, raw: &[u8]) {
        if !matches!(raw, b"[]" | b"null") {
            self.mark(b't');
            self.count(raw);
        }
    }

    /// The system text that stands beside the turns: a text or a list of parts.
    pub(super) fn system(&mut self, raw: &[u8]) -> Option<()> {
        self.mark(b's');
        self.content(Cursor::new(raw).value()?, MAX_DEPTH)
    }

    /// The turns of a conversation, or the inputs of a batch; none if `raw` is neither a text nor a list.
    pub(super) fn turns(&mut self, raw: &[u8]) -> Option<()> {
        matches!(raw.first()?, b'"' | b'[').then_some(())?;
        self.turn(&mut Cursor::new(raw), MAX_DEPTH)
    }

    /// The price in bytes and the blocks.
    pub(super) fn finish(self) -> (u64, Vec<u64>) {
        (self.bytes, self.hasher.finish())
    }

    /// Separates what came from what follows; costs nothing.
    fn mark(&mut self, kind: u8) {
        self.hasher.feed(&[0xFF, kind]);
    }

    /// Bytes of the prompt as they stand.
    fn count(&mut self, raw: &[u8]) {
        self.bytes += raw.len() as u64;
        self.hasher.feed(raw);
    }

    fn text(&mut self, kind: u8, text: Text<'_>) {
        self.mark(kind);
        text.pieces(|piece| self.count(piece));
    }

    /// Something that is not text: one hash, one constant price, however long its encoding.
    fn media(&mut self, raw: &[u8]) {
        self.mark(b'i');
        self.hasher.feed(&xxh3_64(raw).to_le_bytes());
        self.bytes += MEDIA_BYTES;
    }

    /// One element of a conversation or a batch: a text, a token id, a message, or a list of any of them.
    fn turn(&mut self, cursor: &mut Cursor<'_>, depth: u32) -> Option<()> {
        if depth > 0 && cursor.peek()? == b'[' {
            self.mark(b'l');
            return cursor.array(|element| self.turn(element, depth - 1));
        }
        if cursor.peek()? == b'{' {
            return self.message(cursor, depth);
        }
        match cursor.value()? {
            Value::String(text) => self.text(b'c', text),
            Value::Array(raw) => self.media(raw),
            id @ Value::Number(_) => {
                self.hasher.feed(&(id.whole().unwrap_or(u64::MAX) as u32).to_le_bytes());
                self.bytes += TOKEN_ID_BYTES;
            }
            Value::Object(_) | Value::Bool(_) | Value::Null => {}
        }
        Some(())
    }

    /// A message of the chat and messages APIs, or an input item of the responses API.
    fn message(&mut self, cursor: &mut Cursor<'_>, depth: u32) -> Option<()> {
        let [mut role, mut name, mut content, mut calls, mut call, mut arguments, mut output] =
            [Value::Null; 7];
        cursor.object(|key, cursor| {
            let value = cursor.value()?;
            match key {
                b"role" => role = value,
                b"name" => name = value,
                b"content" => content = value,
                b"tool_calls" => calls = value,
                b"function_call" => call = value,
                b"arguments" => arguments = value,
                b"output" => output = value,
                _ => {}
            }
            Some(())
        })?;
        self.mark(b'm');
        if let Value::String(role) = role {
            role.pieces(|piece| self.hasher.feed(piece));
        }
        if let Value::String(name) = name {
            self.text(b'n', name);
        }
        self.content(content, depth)?;
        if let Value::Array(calls) = calls {
            Cursor::new(calls).array(|call| {
                let call = call.value()?;
                self.tool_call(call)
            })?;
        }
        self.tool_call(call)?;
        if let Value::String(arguments) = arguments {
            self.text(b'a', arguments);
        }
        self.content(output, depth)
    }

    /// A call the model made earlier: `{"function": {"name", "arguments"}}`, or the inner object alone.
    fn tool_call(&mut self, call: Value<'_>) -> Option<()> {
        let Value::Object(raw) = call else { return Some(()) };
        let mut inner = raw;
        Cursor::new(raw).object(|key, cursor| {
            let value = cursor.value()?;
            if let (b"function", Value::Object(function)) = (key, value) {
                inner = function;
            }
            Some(())
        })?;
        let [mut name, mut arguments] = [Value::Null; 2];
        Cursor::new(inner).object(|key, cursor| {
            let value = cursor.value()?;
            match key {
                b"name" => name = value,
                b"arguments" => arguments = value,
                _ => {}
            }
            Some(())
        })?;
        for (kind, value) in [(b'n', name), (b'a', arguments)] {
            if let Value::String(text) = value {
                self.text(kind, text);
            }
        }
        Some(())
    }

    /// Content: a text, or a list of parts.
    fn content(&mut self, content: Value<'_>, depth: u32) -> Option<()> {
        match content {
            Value::String(text) => self.text(b'c', text),
            Value::Array(raw) | Value::Object(raw) if depth == 0 => self.media(raw),
            Value::Array(raw) => Cursor::new(raw).array(|part| self.part(part, depth - 1))?,
            Value::Object(raw) => self.part(&mut Cursor::new(raw), depth - 1)?,
            Value::Number(_) | Value::Bool(_) | Value::Null => {}
        }
        Some(())
    }

    /// One part of a list of content, known by its members: the types differ between the APIs.
    fn part(&mut self, cursor: &mut Cursor<'_>, depth: u32) -> Option<()> {
        if cursor.peek()? != b'{' {
            return self.content(cursor.value()?, depth);
        }
        let mut whole = cursor.clone();
        let [mut text, mut name] = [None; 2];
        let (mut content, mut input) = (None, None);
        cursor.object(|key, cursor| {
            match key {
                b"text" | b"thinking" | b"refusal" => text = cursor.value()?.text().or(text),
                b"content" => content = Some(cursor.value()?),
                b"name" => name = cursor.value()?.text(),
                b"input" => input = Some(cursor.raw()?),
                _ => drop(cursor.value()?),
            }
            Some(())
        })?;
        match (text, content, input) {
            (Some(text), _, _) => self.text(b'c', text),
            (None, Some(content), _) => self.content(content, depth)?,
            (None, None, Some(input)) => {
                if let Some(name) = name {
                    self.text(b'n', name);
                }
                self.mark(b'a');
                self.count(input);
            }
            (None, None, None) => self.media(whole.raw()?),
        }
        Some(())
    }
}
