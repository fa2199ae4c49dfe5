//! A cursor over JSON text that hands out slices of it: nothing is copied, built or checked that nobody asked
//! for.
//!
//! A request body is mostly one long text of which the proxy wants the length and a hash, and a stream event
//! is mostly fields it ignores. A tree of values would copy all of it; `serde_json`'s raw values scan every
//! nesting level once more. The cursor scans a string once, skips a container by counting brackets (no
//! recursion, so no depth of nesting can exhaust the stack), and lets the caller descend where it wants to.
//!
//! It reads every valid document of RFC 8259 exactly; of an invalid one it may accept more (a number like
//! `1.2.3`, brackets that do not match), because refusing a document is the engine's business. `None` always
//! means that the text ended early or was not JSON.

use std::borrow::Cow;

use memchr::memchr;

/// A string as it stands between its quotes, escapes and all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Text<'a> {
    raw: &'a [u8],
}

/// One JSON value; containers are the bytes from bracket to bracket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Object(&'a [u8]),
    Array(&'a [u8]),
    String(Text<'a>),
    Number(&'a [u8]),
    Bool(bool),
    Null,
}

/// A position in JSON text.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// A cursor at the start of `text`.
    pub(super) const fn new(text: &'a [u8]) -> Self {
        Self { text, at: 0 }
    }

    /// The next byte that is not white space, without passing it.
    pub(super) fn peek(&mut self) -> Option<u8> {
        while let Some(&byte) = self.text.get(self.at) {
            if !matches!(byte, b' ' | b'\n' | b'\r' | b'\t') {
                return Some(byte);
            }
            self.at += 1;
        }
        None
    }

    /// Reads one whole value and stands behind it.
    pub(super) fn value(&mut self) -> Option<Value<'a>> {
        match self.peek()? {
            b'{' => self.container().map(Value::Object),
            b'[' => self.container().map(Value::Array),
            b'"' => self.string().map(Value::String),
            b't' => self.word(b"true", Value::Bool(true)),
            b'f' => self.word(b"false", Value::Bool(false)),
            b'n' => self.word(b"null", Value::Null),
            b'-' | b'0'..=b'9' => Some(Value::Number(self.number())),
            _ => None,
        }
    }

    /// The bytes of the next value, whatever it is.
    pub(super) fn raw(&mut self) -> Option<&'a [u8]> {
        self.peek()?;
        let start = self.at;
        self.value()?;
        Some(&self.text[start..self.at])
    }

    /// Reads an object; `each` gets every key with the cursor before its value, and must read exactly that
    /// value.
    pub(super) fn object(&mut self, mut each: impl FnMut(&[u8], &mut Self) -> Option<()>) -> Option<()> {
        self.take(b'{')?;
        if self.peek()? == b'}' {
            self.at += 1;
            return Some(());
        }
        loop {
            self.peek().filter(|&byte| byte == b'"')?;
            let key = self.string()?;
            self.take(b':')?;
            each(&key.decoded(), self)?;
            if self.another(b'}')? {
                continue;
            }
            return Some(());
        }
    }

    /// Reads an array; `each` gets the cursor before every element, and must read exactly that element.
    pub(super) fn array(&mut self, mut each: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        self.take(b'[')?;
        if self.peek()? == b']' {
            self.at += 1;
            return Some(());
        }
        loop {
            each(self)?;
            if self.another(b']')? {
                continue;
            }
            return Some(());
        }
    }

    /// After an element: true past a comma, false past the closing bracket.
    fn another(&mut self, close: u8) -> Option<bool> {
        let byte = self.peek()?;
        self.at += 1;
        match byte {
            b',' => Some(true),
            byte if byte == close => Some(false),
            _ => None,
        }
    }

    /// Passes the byte `wanted`, which must be next.
    pub(super) fn take(&mut self, wanted: u8) -> Option<()> {
        self.peek().filter(|&byte| byte == wanted)?;
        self.at += 1;
        Some(())
    }

    fn word(&mut self, word: &[u8], value: Value<'a>) -> Option<Value<'a>> {
        self.text[self.at..].starts_with(word).then(|| {
            self.at += word.len();
            value
        })
    }

    fn number(&mut self) -> &'a [u8] {
        let rest = &self.text[self.at..];
        let end =
            rest.iter().position(|byte| !matches!(byte, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E'));
        let number = &rest[..end.unwrap_or(rest.len())];
        self.at += number.len();
        number
    }

    /// Reads the string whose opening quote is next. It ends at the first quote that no odd number of
    /// backslashes stands before, so other escapes cost nothing here.
    fn string(&mut self) -> Option<Text<'a>> {
        let start = self.at + 1;
        let mut at = start;
        loop {
            at += memchr(b'"', self.text.get(at..)?)?;
            let raw = &self.text[start..at];
            at += 1;
            if raw.iter().rev().take_while(|&&byte| byte == b'\\').count() % 2 == 0 {
                self.at = at;
                return Some(Text { raw });
            }
        }
    }

    /// Passes the container whose opening bracket is next.
    fn container(&mut self) -> Option<&'a [u8]> {
        let start = self.at;
        let mut depth = 0_usize;
        loop {
            match *self.text.get(self.at)? {
                b'"' => {
                    self.string()?;
                    continue;
                }
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth -= 1,
                _ => {}
            }
            self.at += 1;
            if depth == 0 {
                return Some(&self.text[start..self.at]);
            }
        }
    }
}

impl<'a> Value<'a> {
    /// The string, if it is one.
    pub(super) const fn text(self) -> Option<Text<'a>> {
        if let Self::String(text) = self { Some(text) } else { None }
    }

    /// The number, if it is one that is whole and not negative; `16.0` and `1e3` are.
    pub(super) fn whole(self) -> Option<u64> {
        let Self::Number(digits) = self else { return None };
        let digits = std::str::from_utf8(digits).ok()?;
        digits.parse().ok().or_else(|| {
            let number: f64 = digits.parse().ok()?;
            (number >= 0.0 && number < u64::MAX as f64 && number.fract() == 0.0).then_some(number as u64)
        })
    }
}

impl<'a> Text<'a> {
    /// True for `""`.
    pub(super) const fn is_empty(self) -> bool {
        self.raw.is_empty()
    }

    /// The text itself, copied only if it holds escapes.
    pub(super) fn decoded(self) -> Cow<'a, [u8]> {
        if !self.raw.contains(&b'\\') {
            return Cow::Borrowed(self.raw);
        }
        let mut whole = Vec::with_capacity(self.raw.len());
        self.pieces(|piece| whole.extend_from_slice(piece));
        Cow::Owned(whole)
    }

    /// The text as a `String`; bytes that are not UTF-8 become U+FFFD.
    pub(super) fn to_string_lossy(self) -> String {
        String::from_utf8_lossy(&self.decoded()).into_owned()
    }

    /// Hands out the text piece by piece, escapes decoded; the pieces together are the text.
    pub(super) fn pieces(self, mut each: impl FnMut(&[u8])) {
        let plain = memchr(b'\\', self.raw).unwrap_or(self.raw.len());
        let (head, rest) = self.raw.split_at(plain);
        if !head.is_empty() {
            each(head);
        }
        if !rest.is_empty() {
            unescape(rest, each);
        }
    }
}

/// Bytes copied per step: two vectors on any x86-64, one where AVX2 may be used.
const STEP: usize = 32;

/// Decodes `rest` into a small buffer, handed out whenever it is full.
///
/// Lines are short and irregular: to find the next escape, then call and copy for each of them would cost more
/// than to hash it. So a whole step is copied before it is known to be plain, in a loop without other branches,
/// and what was copied too much is written over.
fn unescape(mut rest: &[u8], mut each: impl FnMut(&[u8])) {
    let mut buffer = [0; 1_024];
    let mut filled = 0;
    while !rest.is_empty() {
        while let Some((step, after)) = rest.split_first_chunk::<STEP>()
            && let Some(room) = buffer[filled..].first_chunk_mut::<STEP>()
        {
            *room = *step;
            if step.iter().fold(0, |any, &byte| any | u8::from(byte == b'\\')) == 0 {
                (filled, rest) = (filled + STEP, after);
                continue;
            }
            let plain = before_backslash(step);
            if let Some(&letter) = step.get(plain + 1)
                && SIMPLE[letter as usize] != 0
            {
                room[plain] = SIMPLE[letter as usize];
                (filled, rest) = (filled + plain + 1, &rest[plain + 2..]);
                continue;
            }
            (filled, rest) = (filled + plain, &rest[plain..]);
            // A text in `\u4e2d\u6587` has nothing to copy between its escapes.
            while let Some(room) = buffer.get_mut(filled..filled + 4) {
                let (decoded, length) = escape(rest);
                (filled, rest) = (filled + decoded.encode_utf8(room).len(), &rest[length..]);
                if length < 6 || rest.first() != Some(&b'\\') {
                    break;
                }
            }
        }
        if filled + STEP > buffer.len() {
            each(&buffer[..filled]);
            filled = 0;
        } else if rest.first() == Some(&b'\\') {
            let (decoded, length) = escape(rest);
            (filled, rest) = (filled + decoded.encode_utf8(&mut buffer[filled..]).len(), &rest[length..]);
        } else if let Some((&byte, after)) = rest.split_first() {
            buffer[filled] = byte;
            (filled, rest) = (filled + 1, after);
        }
    }
    if filled > 0 {
        each(&buffer[..filled]);
    }
}

/// How many bytes of `step` come before its first backslash, by Mycroft's test for a zero byte, whose lowest
/// mark is exact.
#[inline]
fn before_backslash(step: &[u8; STEP]) -> usize {
    const LOW: u64 = 0x0101_0101_0101_0101;
    let mut plain = 0;
    for word in step.as_chunks::<8>().0 {
        let word = u64::from_le_bytes(*word) ^ (LOW * u64::from(b'\\'));
        let marks = word.wrapping_sub(LOW) & !word & (LOW << 7);
        plain += marks.trailing_zeros() as usize / 8;
        if marks != 0 {
            break;
        }
    }
    plain
}

/// The character an escape stands for and the escape's length; `text` starts with its backslash. What is no
/// escape and half of a surrogate pair become U+FFFD, as in every lenient reader.
fn escape(text: &[u8]) -> (char, usize) {
    match text.get(1) {
        Some(b'u') => unicode_escape(text),
        Some(&letter) if SIMPLE[letter as usize] != 0 => (char::from(SIMPLE[letter as usize]), 2),
        Some(_) => (char::REPLACEMENT_CHARACTER, 1),
        None => (char::REPLACEMENT_CHARACTER, text.len()),
    }
}

/// What a backslash and one letter stand for, by the letter; 0 if they are not a whole escape.
const SIMPLE: [u8; 256] = {
    let mut meanings = [0; 256];
    let (letters, stand_for) = (b"ntrbf\"\\/", b"\n\t\r\x08\x0c\"\\/");
    let mut i = 0;
    while i < letters.len() {
        meanings[letters[i] as usize] = stand_for[i];
        i += 1;
    }
    meanings
};

fn unicode_escape(text: &[u8]) -> (char, usize) {
    match (unit(text), text.get(6..).and_then(unit)) {
        (Some(high @ 0xD800..0xDC00), Some(low @ 0xDC00..0xE000)) => {
            let code = 0x1_0000 + ((high - 0xD800) << 10) + (low - 0xDC00);
            (char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), 12)
        }
        (Some(code), _) => (char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), 6),
        (None, _) => (char::REPLACEMENT_CHARACTER, 2),
    }
}

/// The number in `\uXXXX`, with which `text` starts.
#[inline]
fn unit(text: &[u8]) -> Option<u32> {
    let [b'\\', b'u', a, b, c, d, ..] = *text else { return None };
    let [a, b, c, d] = [a, b, c, d].map(|digit| u32::from(HEX[digit as usize]));
    (a | b | c | d < 16).then_some(a << 12 | b << 8 | c << 4 | d)
}

/// The value of each hexadecimal digit; 255 for every other byte.
const HEX: [u8; 256] = {
    let mut values = [u8::MAX; 256];
    let mut value = 0;
    while value < 16 {
        let digit = b"0123456789abcdef"[value as usize];
        values[digit as usize] = value;
        values[digit.to_ascii_uppercase() as usize] = value;
        value += 1;
    }
    values
};

#[cfg(test)]
mod tests {
    use serde_json::Value as Tree;

    use super::*;

    /// What the cursor reads, as a tree, to compare it with `serde_json`'s.
    fn tree(cursor: &mut Cursor<'_>) -> Option<Tree> {
        Some(match cursor.peek()? {
            b'{' => {
                let mut members = serde_json::Map::new();
                cursor.object(|key, cursor| {
                    members.insert(String::from_utf8_lossy(key).into_owned(), tree(cursor)?);
                    Some(())
                })?;
                Tree::Object(members)
            }
            b'[' => {
                let mut elements = Vec::new();
                cursor.array(|cursor| {
                    elements.push(tree(cursor)?);
                    Some(())
                })?;
                Tree::Array(elements)
            }
            _ => match cursor.value()? {
                Value::String(text) => Tree::String(text.to_string_lossy()),
                Value::Number(digits) => serde_json::from_slice(digits).unwrap(),
                Value::Bool(truth) => Tree::Bool(truth),
                Value::Null => Tree::Null,
                Value::Object(_) | Value::Array(_) => unreachable!("peeked above"),
            },
        })
    }

    fn random(rng: &mut fastrand::Rng, depth: u32) -> Tree {
        match rng.u32(0..if depth == 0 { 5 } else { 8 }) {
            0 => Tree::Null,
            1 => Tree::Bool(rng.bool()),
            2 => Tree::from(rng.i64(..)),
            3 => Tree::from(f64::from(rng.i32(..)) / 64.0),
            4 | 5 => Tree::String((0..rng.usize(0..80)).map(|_| rng.char('\0'..'\u{250}')).collect()),
            6 => (0..rng.usize(0..6)).map(|_| random(rng, depth - 1)).collect(),
            _ => Tree::Object(
                (0..rng.usize(0..6)).map(|i| (format!("k\n{i}"), random(rng, depth - 1))).collect(),
            ),
        }
    }

    #[test]
    fn every_document_reads_as_serde_json_reads_it() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..500 {
            let document = random(&mut rng, 5);
            for text in [document.to_string(), serde_json::to_string_pretty(&document).unwrap()] {
                assert_eq!(tree(&mut Cursor::new(text.as_bytes())).as_ref(), Some(&document), "{text}");
                let mut whole = Cursor::new(text.as_bytes());
                assert_eq!(whole.raw(), Some(text.as_bytes()), "the extent of {text}");
            }
        }
    }

    #[test]
    fn a_cut_document_is_none_and_never_a_panic() {
        let text = br#"{"a":[1,{"b":"c\"\u00e9"},true],"d":{"e":null}}"#;
        for cut in 0..text.len() {
            assert_eq!(tree(&mut Cursor::new(&text[..cut])), None, "cut at {cut}");
            assert_eq!(Cursor::new(&text[..cut]).value(), None, "cut at {cut}");
        }
    }

    #[test]
    fn escapes_decode_to_their_characters() {
        for (raw, want) in [
            (r#""\"\\\/\b\f\n\r\t""#, "\"\\/\u{8}\u{c}\n\r\t"),
            (r#""\u00e9\u4e2d\ud83d\ude00""#, "é中😀"),
            (r#""a\ud83dz""#, "a\u{fffd}z"),
            (r#""\ude00""#, "\u{fffd}"),
            (r#""\q""#, "\u{fffd}q"),
            (r#""\u12""#, "\u{fffd}12"),
        ] {
            let text = Cursor::new(raw.as_bytes()).value().unwrap().text().unwrap();
            assert_eq!(text.to_string_lossy(), want, "{raw}");
        }
    }

    #[test]
    fn what_is_no_escape_is_replaced_wherever_it_stands() {
        for (raw, want) in [
            (r"\q", "\u{fffd}q"),
            (r"\u12", "\u{fffd}12"),
            (r"\u12\n", "\u{fffd}12\n"),
            (r"\ud83dz", "\u{fffd}z"),
            (r"\ude00", "\u{fffd}"),
            (r"\ud83d\ud83d\ude00", "\u{fffd}😀"),
        ] {
            for before in (0..70).chain(1_000..1_060) {
                for after in [0, 1, 40] {
                    let (before, after) = ("x".repeat(before), "y z".repeat(after));
                    let raw = format!("\"{before}{raw}{after}\"");
                    let text = Cursor::new(raw.as_bytes()).value().unwrap().text().unwrap();
                    assert_eq!(text.to_string_lossy(), format!("{before}{want}{after}"), "{raw}");
                }
            }
        }
    }

    #[test]
    fn escapes_are_decoded_wherever_they_stand() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        for round in 0..300 {
            let piece = [
                "x",
                "\\",
                "\"",
                "\n",
                "é",
                "中文",
                "😀",
                "plain text, rather longer than one step of the copy",
            ];
            let text: String =
                (0..rng.usize(0..400)).map(|_| *rng.choice(&piece[..1 + round % 8]).unwrap()).collect();
            let ascii: String = text.encode_utf16().map(|unit| format!("\\u{unit:04X}")).collect();
            for raw in [serde_json::to_string(&text).unwrap(), format!("\"{ascii}\"")] {
                let read = Cursor::new(raw.as_bytes()).value().unwrap().text().unwrap();
                assert_eq!(read.to_string_lossy(), text, "{raw}");
            }
        }
    }

    #[test]
    fn a_million_brackets_do_not_exhaust_the_stack() {
        let mut text = vec![b'['; 1_000_000];
        assert_eq!(Cursor::new(&text).value(), None);
        text.resize(2_000_000, b']');
        assert_eq!(Cursor::new(&text).raw().map(<[u8]>::len), Some(2_000_000));
    }

    #[test]
    fn whole_numbers_are_read_in_any_spelling() {
        for (raw, want) in [
            ("16", Some(16)),
            ("16.0", Some(16)),
            ("1e3", Some(1000)),
            ("18446744073709551615", Some(u64::MAX)),
            ("1e30", None),
            ("-1", None),
            ("1.5", None),
            ("-", None),
        ] {
            assert_eq!(Cursor::new(raw.as_bytes()).value().and_then(Value::whole), want, "{raw}");
        }
        assert_eq!(Cursor::new(b"\"16\"").value().and_then(Value::whole), None);
    }
}
