//! Requests: chat completions of a given size, each different, half of them with a long beginning in common.
//!
//! A request tells the engine what to do in the first words of the user's message: who it is, and how many events it
//! wants at which pace. There, because some routers read a body and write it anew, without what they do not know. From
//! those words on no cache knows a request. Its text is drawn once per size and shared, so that one of 256 KB costs the
//! client a system call and not a copy.

use std::time::Duration;

use bytes::{Buf, Bytes};
use fastrand::Rng;
use memchr::memmem;

/// Where requests go.
pub const PATH: &str = "/v1/chat/completions";
/// How the user's message begins.
const QUESTION: &str = "Question ";
/// Texts per size; a request takes one of them.
const TEXTS: usize = 16;
/// Beginnings that requests have in common.
const SHARED: usize = 4;
/// What is needed beside the text, at least.
const FRAME: usize = 320;

const WORDS: &str = "the of and to in is that for it as was with be by on not he his but at are this have from or had \
    an which you were there one all been their has when who will no more if out so said what up its about than into \
    them can only other time new some could these two may first then do any like my now over such our man me even \
    most made after also did many off before must well back through years where much your way down should because \
    long each just state those people too mr how little good world make very year still see own work men day get \
    here old between both life being under three never know same last another while us great against came right take";

/// What a request wants to have: no events are one JSON document.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// No other request has it.
    pub nonce: u64,
    /// Events with content.
    pub events: u64,
    /// From one to the next.
    pub pace: Duration,
}

impl Plan {
    /// What a body asks for, and how long the text is in which it does.
    pub fn find(body: &[u8]) -> Option<(Self, usize)> {
        let start = memmem::find(body, QUESTION.as_bytes())? + QUESTION.len();
        let text = &body[start..start + memchr::memchr(b'"', &body[start..])?];
        let mut parts = std::str::from_utf8(&text[..memchr::memchr(b':', text)?]).ok()?.split('/');
        let nonce = u64::from_str_radix(parts.next()?, 16).ok()?;
        let events = parts.next()?.parse().ok()?;
        let pace = Duration::from_micros(parts.next()?.parse().ok()?);
        Some((Self { nonce, events, pace }, text.len()))
    }

    /// The words that say so, always as many bytes.
    fn words(&self) -> String {
        format!("{:016x}/{:06}/{:09}", self.nonce, self.events, self.pace.as_micros())
    }
}

/// All requests of one size.
pub struct Prompts {
    /// Before the nonce, and after it.
    texts: Vec<(Bytes, Bytes)>,
}

impl Prompts {
    /// Requests whose bodies have `size` bytes; those for streams have a few more.
    pub fn new(size: usize, seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let shared: Vec<String> =
            (0..SHARED).map(|_| text(&mut rng, (size / 2).saturating_sub(FRAME))).collect();
        let (bare_frame, words) = (frame(&Plan::default()).len(), Plan::default().words().len());
        let texts = (0..TEXTS).map(|number| {
            let before = match number % 2 {
                0 => format!(r#"{{"role":"system","content":"{}"}},"#, shared[number / 2 % SHARED]),
                _ => String::new(),
            };
            let before = before + r#"{"role":"user","content":""# + QUESTION;
            let after_text = r#""}]}"#;
            let room = size.saturating_sub(bare_frame + before.len() + words + 2 + after_text.len());
            let after = format!(": {}{after_text}", text(&mut rng, room));
            (before.into(), after.into())
        });
        Self { texts: texts.collect() }
    }

    /// A request for `plan`. The connection is to stay open if it `keeps`.
    pub fn request(&self, plan: &Plan, keeps: bool) -> impl Buf + use<> {
        let body = self.body(plan);
        let length = body.remaining();
        let connection = if keeps { "" } else { "connection: close\r\n" };
        let head = format!(
            "POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1:7700\r\nuser-agent: wire/1\r\naccept: */*\r\n\
             authorization: Bearer sk-wire\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\
             {connection}\r\n",
        );
        Bytes::from(head).chain(body)
    }

    /// Its body.
    pub fn body(&self, plan: &Plan) -> impl Buf + use<> {
        let (before, after) = self.texts[plan.nonce as usize % TEXTS].clone();
        Bytes::from(frame(plan)).chain(before).chain(Bytes::from(plan.words())).chain(after)
    }

    /// How long the text is that an engine gets with the request `nonce`.
    pub fn length(&self, nonce: u64) -> usize {
        let end = br#""}]}"#.len();
        Plan::default().words().len() + self.texts[nonce as usize % TEXTS].1.len() - end
    }
}

/// The beginning of a body.
fn frame(plan: &Plan) -> String {
    let stream = if plan.events > 0 {
        r#""stream":true,"stream_options":{"include_usage":true}"#
    } else {
        r#""stream":false"#
    };
    format!(r#"{{"model":"llama-3.1-8b","max_tokens":512,"temperature":0.7,{stream},"messages":["#)
}

/// So many bytes of words.
fn text(rng: &mut Rng, bytes: usize) -> String {
    let words: Vec<&str> = WORDS.split_ascii_whitespace().collect();
    let mut text = String::with_capacity(bytes + 16);
    while text.len() < bytes {
        text.push_str(words[rng.usize(..words.len())]);
        text.push(if rng.u8(..12) == 0 { '.' } else { ' ' });
    }
    text.truncate(bytes);
    text
}
