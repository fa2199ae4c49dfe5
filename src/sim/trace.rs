//! Recorded traffic: when each request came, how long it was, and which prompts began alike.
//!
//! Two formats, both a JSON object per line, told apart by the first line:
//!
//! | format | header | request |
//! |---|---|---|
//! | ours | `{"trace", "block_tokens"}` | `{"t": ms, "in": tokens, "out": tokens, "h": [ids]}`, `h` may be absent |
//! | Mooncake's | none; 512 tokens per id | `{"timestamp": ms, "input_length", "output_length", "hash_ids": [ids]}` |
//!
//! Two prompts share a prefix for as long as their lists of ids agree from the left. Ids become chained
//! hashes, `hash_k = xxh3(id_k, seed hash_{k-1})`, so that one hash names all that comes before it too, as the
//! prefix index and the engine want it. Only whole blocks count, `in / block_tokens` of them: Mooncake lists
//! an id for the partial one at the end as well. What does not parse is refused with its line; nothing is
//! guessed and nothing is skipped except empty lines.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// A trace, in order of time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Its own name, if it has one.
    pub name: Option<String>,
    /// Tokens per block of shared prefix.
    pub block_tokens: u64,
    /// The requests; at least one.
    pub requests: Vec<Request>,
}

/// One request of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// When it came, after the start of the trace.
    pub at: Duration,
    /// Length of the prompt, at least 1.
    pub prompt_tokens: u64,
    /// Length of the answer, at least 1.
    pub output_tokens: u64,
    /// Chained hashes of the prompt's whole blocks, shallowest first.
    pub blocks: Vec<u64>,
}

/// Why a text is no trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.message)
    }
}

impl std::error::Error for Fault {}

impl Trace {
    /// Reads a whole trace.
    ///
    /// # Errors
    /// The first line that is not understood.
    pub fn parse(text: &[u8]) -> Result<Self, Fault> {
        let mut lines = (1..).zip(text.split(|byte| *byte == b'\n')).filter(|(_, line)| !is_empty(line));
        let Some((number, first)) = lines.next() else {
            return Err(Fault { line: 1, message: "an empty file, not a trace".to_owned() });
        };
        let mut trace = match serde_json::from_slice::<First>(first) {
            Ok(First { block_tokens: Some(0), .. }) => {
                return Err(Fault {
                    line: number,
                    message: "block_tokens is 0, a block has some".to_owned(),
                });
            }
            Ok(First { block_tokens: Some(block_tokens), trace, .. }) => {
                let mut ours = Self { name: trace, block_tokens, requests: Vec::new() };
                ours.read::<Line>(lines)?;
                ours
            }
            Ok(First { timestamp: Some(_), .. }) => {
                let mut theirs = Self { name: None, block_tokens: MOONCAKE_BLOCK, requests: Vec::new() };
                theirs.read::<MooncakeLine>(std::iter::once((number, first)).chain(lines))?;
                theirs
            }
            Ok(_) => return Err(Fault { line: number, message: FORMATS.to_owned() }),
            Err(error) => return Err(Fault { line: number, message: format!("{}; {FORMATS}", why(&error)) }),
        };
        if trace.requests.is_empty() {
            return Err(Fault { line: number, message: "a header without requests".to_owned() });
        }
        trace.requests.sort_by_key(|request| request.at);
        Ok(trace)
    }

    /// From the first request to the last.
    pub fn span(&self) -> Duration {
        let ends = self.requests.last().zip(self.requests.first());
        ends.map_or(Duration::ZERO, |(last, first)| last.at - first.at)
    }

    fn read<'a, L: Deserialize<'a> + Into<Line>>(
        &mut self,
        lines: impl Iterator<Item = (usize, &'a [u8])>,
    ) -> Result<(), Fault> {
        for (number, line) in lines {
            let line = serde_json::from_slice::<L>(line).map_err(|error| why(&error)).map(Into::into);
            let request = line.and_then(|line| line.request(self.block_tokens));
            self.requests.push(request.map_err(|message| Fault { line: number, message })?);
        }
        Ok(())
    }
}

/// Tokens per id in Mooncake's traces.
const MOONCAKE_BLOCK: u64 = 512;

const FORMATS: &str = "a trace begins with {\"trace\": .., \"block_tokens\": ..} or, in Mooncake's format, with \
                       {\"timestamp\": .., \"input_length\": .., ..}";

/// Bounds that no real request comes near, and within which no sum overflows.
const MOST_TOKENS: u64 = 100_000_000;
const LATEST_MS: f64 = 366.0 * 86_400_000.0;

/// What the first line may be.
#[derive(Deserialize)]
struct First {
    trace: Option<String>,
    block_tokens: Option<u64>,
    timestamp: Option<f64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    t: f64,
    #[serde(rename = "in")]
    input: u64,
    #[serde(rename = "out")]
    output: u64,
    #[serde(default)]
    h: Vec<u64>,
}

/// Mooncake's traces may carry keys beside these.
#[derive(Deserialize)]
struct MooncakeLine {
    timestamp: f64,
    input_length: u64,
    output_length: u64,
    hash_ids: Vec<u64>,
}

impl From<MooncakeLine> for Line {
    fn from(line: MooncakeLine) -> Self {
        Self { t: line.timestamp, input: line.input_length, output: line.output_length, h: line.hash_ids }
    }
}

impl Line {
    fn request(self, block_tokens: u64) -> Result<Request, String> {
        if !(0.0..=LATEST_MS).contains(&self.t) {
            return Err(format!("{} ms after the start is not within a year of it", self.t));
        }
        for tokens in [self.input, self.output] {
            if tokens > MOST_TOKENS {
                return Err(format!("{tokens} tokens in one request, at most {MOST_TOKENS}"));
            }
        }
        let most = self.input.div_ceil(block_tokens);
        if self.h.len() as u64 > most {
            let ids = self.h.len();
            return Err(format!("{ids} block ids for {} tokens, which have {most}", self.input));
        }
        let whole = usize::try_from(self.input / block_tokens).unwrap_or(usize::MAX);
        Ok(Request {
            at: Duration::from_secs_f64(self.t / 1e3),
            prompt_tokens: self.input.max(1),
            output_tokens: self.output.max(1),
            blocks: chain(&self.h[..whole.min(self.h.len())]),
        })
    }
}

/// The hash of a block with this id, after the block with the hash `parent`.
pub(super) fn chained(parent: u64, id: u64) -> u64 {
    xxh3_64_with_seed(&id.to_le_bytes(), parent)
}

fn chain(ids: &[u64]) -> Vec<u64> {
    let extend = |parent: &mut u64, id: &u64| {
        *parent = chained(*parent, *id);
        Some(*parent)
    };
    ids.iter().scan(0, extend).collect()
}

fn is_empty(line: &[u8]) -> bool {
    line.iter().all(u8::is_ascii_whitespace)
}

/// What `serde_json` says, without its own count of lines, which is that of a single one here.
fn why(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = r#"{"trace":"tiny","block_tokens":10,"unique_prompts":false}
{"t":1500.5,"in":35,"out":7,"h":[1,2,3,4]}

{"t":0,"in":25,"out":0,"h":[1,2]}
{"t":2000,"in":0,"out":1}
"#;

    fn fault(text: &str) -> String {
        Trace::parse(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn our_format_is_read_and_put_in_order() {
        let trace = Trace::parse(OURS.as_bytes()).unwrap();
        assert_eq!((trace.name.as_deref(), trace.block_tokens), (Some("tiny"), 10));
        let plain = |r: &Request| (r.at.as_micros(), r.prompt_tokens, r.output_tokens, r.blocks.len());
        let requests: Vec<_> = trace.requests.iter().map(plain).collect();
        assert_eq!(requests, [(0, 25, 1, 2), (1_500_500, 35, 7, 3), (2_000_000, 1, 1, 0)]);
        assert_eq!(trace.requests[0].blocks, trace.requests[1].blocks[..2]);
        assert_eq!(trace.span(), Duration::from_secs(2));
    }

    #[test]
    fn mooncakes_format_is_read_without_the_partial_block() {
        let text = r#"{"timestamp": 0, "input_length": 1100, "output_length": 3, "hash_ids": [0, 1, 2]}
{"timestamp": 3000, "input_length": 512, "output_length": 4, "hash_ids": [0], "more": true}"#;
        let trace = Trace::parse(text.as_bytes()).unwrap();
        assert_eq!((trace.name, trace.block_tokens), (None, 512));
        let [first, second] = &trace.requests[..] else { panic!("two requests") };
        assert_eq!((first.blocks.len(), second.blocks.len()), (2, 1));
        assert_eq!(first.blocks[0], second.blocks[0]);
        assert_eq!((second.at, second.output_tokens), (Duration::from_secs(3), 4));
    }

    #[test]
    fn the_hash_of_a_block_names_all_that_comes_before_it() {
        let (one, other) = (chain(&[1, 2, 3]), chain(&[9, 2, 3]));
        assert!(one.iter().all(|hash| !other.contains(hash)));
        assert_eq!(chain(&[1, 2]), one[..2]);
    }

    #[test]
    fn a_line_that_is_not_understood_is_named_with_the_reason() {
        let header = "{\"block_tokens\": 16}\n";
        for (line, why) in [
            ("{\"t\":1,\"in\":5}", "missing field `out`"),
            ("{\"t\":1,\"in\":5,\"out\":-1}", "invalid value: integer `-1`, expected u64"),
            ("{\"t\":1,\"in\":5,\"out\":1,\"hash\":[]}", "unknown field `hash`"),
            ("{\"t\":-1,\"in\":5,\"out\":1}", "-1 ms after the start is not within a year of it"),
            ("{\"t\":1,\"in\":5,\"out\":1,\"h\":[1,2]}", "2 block ids for 5 tokens, which have 1"),
            ("{\"t\":1,\"in\":500000000,\"out\":1}", "500000000 tokens in one request"),
            ("{\"t\":1,\"in\":5,\"ou", "EOF while parsing"),
            ("\u{1F6A2}", "expected value"),
        ] {
            let said = fault(&format!("{header}{{\"t\":0,\"in\":1,\"out\":1}}\n\n{line}\n"));
            assert!(said.starts_with("4: ") && said.contains(why), "{line}: {said}");
            assert!(!said.contains("line 1"), "{said}");
        }
    }

    #[test]
    fn what_is_no_trace_at_all_is_told_what_one_is() {
        assert_eq!(fault("\n \n"), "1: an empty file, not a trace");
        assert_eq!(fault("{\"block_tokens\": 16}\n"), "1: a header without requests");
        assert!(fault("{\"block_tokens\": 0}\n").starts_with("1: block_tokens is 0"));
        for text in ["{\"t\":0,\"in\":1,\"out\":1}", "[]", "hello", "t,in,out"] {
            assert!(fault(text).contains("a trace begins with"), "{text}: {}", fault(text));
        }
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut rng = fastrand::Rng::with_seed(5);
        for _ in 0..20_000 {
            let mut bytes = OURS.as_bytes().to_vec();
            for _ in 0..rng.usize(1..4) {
                let at = rng.usize(..bytes.len());
                bytes[at] = rng.u8(..);
            }
            let _ = Trace::parse(&bytes);
        }
    }
}
