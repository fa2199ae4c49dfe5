//! Built-in traffic for a replay, from one seed: chats, agents at work, and questions about long documents.
//!
//! What a balancer meets is not requests but sessions: each prompt repeats what was said before and adds a
//! little, so where the last one went decides what the next one costs. Three kinds, and a mixture:
//!
//! | kind | a prompt begins with | then, request by request |
//! |---|---|---|
//! | chat | one of 8 system prompts | a question and its answer, some 5 times, half a minute apart |
//! | agents | one of 6 long tool prompts | a tool's output and a short call, some 12 times, seconds apart |
//! | documents | a document of its own | nothing: some 4 people ask one question each |
//! | mixed | | 60 % of the requests are chats, 30 % agents, 10 % about documents |
//!
//! Sessions begin as a Poisson process, lengths are log-normal, the number of requests is geometric; the
//! scales are those of the traces in research/routing.md s.5.2. Time is open: a request comes a pause after
//! the answer before it *should* have been read, whenever that answer really comes. A run begins in the
//! middle of things, with sessions of all ages.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::f64::consts::TAU;
use std::time::Duration;

use fastrand::Rng;

use super::trace::{self, Trace};

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// People talk with applications, each of which has a system prompt of its own.
    Chat,
    /// Programs work with tools, with long prompts in quick succession.
    Agents,
    /// A few people ask about the same long document.
    Documents,
    /// All of it at once.
    Mixed,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Chat, Self::Agents, Self::Documents, Self::Mixed];

    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Agents => "agents",
            Self::Documents => "documents",
            Self::Mixed => "mixed",
        }
    }

    /// The kind of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Requests per second and engine of the default hardware at which a policy shows what it is worth: eight
    /// of them miss the usual SLO for some requests under round robin, and for almost none under the default.
    pub const fn rate_per_engine(self) -> f64 {
        match self {
            Self::Chat => 13.0,
            Self::Agents => 2.0,
            Self::Documents => 0.9,
            Self::Mixed => 3.0,
        }
    }

    /// `requests` requests, at least one, that come at `rate` per second, above 0, on average; a function of
    /// `seed`.
    pub fn trace(self, rate: f64, requests: usize, seed: u64) -> Trace {
        Trace {
            name: Some(self.name().to_owned()),
            block_tokens: BLOCK_TOKENS,
            requests: Crowd::new(self.shares(), rate, seed).take(requests.max(1)).collect(),
        }
    }

    /// Which sessions there are, and their share of the requests.
    const fn shares(self) -> &'static [(Shape, f64)] {
        match self {
            Self::Chat => &[(CHAT, 1.0)],
            Self::Agents => &[(AGENTS, 1.0)],
            Self::Documents => &[(DOCUMENTS, 1.0)],
            Self::Mixed => &[(CHAT, 0.6), (AGENTS, 0.3), (DOCUMENTS, 0.1)],
        }
    }
}

/// Tokens per block of shared prefix: those of the 512 bytes in which the proxy hashes prompts.
const BLOCK_TOKENS: u64 = 128;

/// A session ends before its prompt is longer: the context window of today's models.
const LONGEST_PROMPT: u64 = 128_000;

/// How long a reader takes per token of an answer, at 50 tokens per second.
const READING: f64 = 0.02;

/// Sessions begin this much before the trace does, in seconds: some three times as long as the mean chat.
const WARM_UP: f64 = 600.0;

/// At rates at which that would be more requests than this, the warm-up is shorter.
const WARM_UP_REQUESTS: f64 = 300_000.0;

/// What the sessions of one kind are like.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// How many beginnings the sessions share; with none, each has its own.
    openings: u64,
    opening: Length,
    /// What a request adds to its prompt.
    turn: Length,
    output: Length,
    /// Requests of a session, on average.
    turns: f64,
    /// From the end of an answer to the next request, in seconds on average.
    pause: f64,
    /// Whether what was said before stays in the prompt.
    grows: bool,
}

/// A number of tokens: log-normal with this median and deviation of the logarithm, at most so many.
#[derive(Clone, Copy, Debug)]
struct Length {
    median: f64,
    deviation: f64,
    most: f64,
}

const CHAT: Shape = Shape {
    openings: 8,
    opening: length(600.0, 0.7, 4_000.0),
    turn: length(60.0, 1.2, 8_000.0),
    output: length(220.0, 0.8, 2_000.0),
    turns: 5.0,
    pause: 30.0,
    grows: true,
};

const AGENTS: Shape = Shape {
    openings: 6,
    opening: length(5_000.0, 0.4, 12_000.0),
    turn: length(500.0, 1.1, 12_000.0),
    output: length(50.0, 1.2, 2_000.0),
    turns: 12.0,
    pause: 3.0,
    grows: true,
};

const DOCUMENTS: Shape = Shape {
    openings: 0,
    opening: length(16_000.0, 0.6, 100_000.0),
    turn: length(50.0, 0.6, 500.0),
    output: length(200.0, 0.7, 1_500.0),
    turns: 4.0,
    pause: 20.0,
    grows: false,
};

const fn length(median: f64, deviation: f64, most: f64) -> Length {
    Length { median, deviation, most }
}

impl Length {
    fn draw(self, rng: &mut Rng) -> u64 {
        // Box and Muller; 1 - f64() is in (0, 1], so that the logarithm is finite.
        let normal = (-2.0 * (1.0 - rng.f64()).ln()).sqrt() * (TAU * rng.f64()).cos();
        (self.median * (self.deviation * normal).exp()).clamp(1.0, self.most) as u64
    }
}

/// All sessions of a trace; its requests, in order of time, without end.
struct Crowd {
    streams: Vec<Stream>,
    sessions: Vec<Option<Session>>,
    /// Where in `sessions` one has ended.
    free: Vec<usize>,
    /// What happens next; at the same moment, in the order in which it was planned.
    calendar: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    planned: u64,
    /// What comes before this is not told.
    warm_up: Duration,
    /// The number of the next text.
    texts: u64,
    rng: Rng,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A session of that stream begins.
    Begins(usize),
    /// That session makes its next request.
    Asks(usize),
}

/// The sessions of one shape.
struct Stream {
    shape: Shape,
    /// Sessions per second.
    rate: f64,
    openings: Vec<Prompt>,
}

struct Session {
    stream: usize,
    prompt: Prompt,
}

impl Crowd {
    fn new(shares: &[(Shape, f64)], rate: f64, seed: u64) -> Self {
        let mut crowd = Self {
            streams: Vec::new(),
            sessions: Vec::new(),
            free: Vec::new(),
            calendar: BinaryHeap::new(),
            planned: 0,
            warm_up: Duration::from_secs_f64(WARM_UP.min(WARM_UP_REQUESTS / rate)),
            texts: 0,
            rng: Rng::with_seed(seed),
        };
        for (number, (shape, share)) in shares.iter().enumerate() {
            let openings = (0..shape.openings).map(|_| crowd.opening(shape)).collect();
            let rate = rate * share / shape.turns;
            crowd.streams.push(Stream { shape: *shape, rate, openings });
            crowd.plan(Duration::ZERO, 1.0 / rate, Event::Begins(number));
        }
        crowd
    }

    /// Lets `event` happen after an exponential time of `mean` seconds from `now` on.
    fn plan(&mut self, now: Duration, mean: f64, event: Event) {
        let wait = -(1.0 - self.rng.f64()).ln() * mean;
        let at = now.saturating_add(Duration::try_from_secs_f64(wait).unwrap_or(Duration::MAX));
        self.calendar.push(Reverse((at, self.planned, event)));
        self.planned += 1;
    }

    fn opening(&mut self, shape: &Shape) -> Prompt {
        let mut opening = Prompt::default();
        let tokens = shape.opening.draw(&mut self.rng);
        self.add(&mut opening, tokens);
        opening
    }

    /// Adds a text that was never seen before.
    fn add(&mut self, prompt: &mut Prompt, tokens: u64) {
        self.texts += 1;
        prompt.add(self.texts, tokens);
    }

    fn begin(&mut self, stream: usize, now: Duration) {
        let Stream { shape, rate, ref openings } = self.streams[stream];
        let shared = (!openings.is_empty()).then(|| openings[self.rng.usize(..openings.len())].clone());
        let prompt = shared.unwrap_or_else(|| self.opening(&shape));
        let number = self.free.pop().unwrap_or_else(|| {
            self.sessions.push(None);
            self.sessions.len() - 1
        });
        self.sessions[number] = Some(Session { stream, prompt });
        self.plan(now, 0.0, Event::Asks(number));
        self.plan(now, 1.0 / rate, Event::Begins(stream));
    }

    fn ask(&mut self, number: usize, now: Duration) -> Option<trace::Request> {
        let mut session = self.sessions[number].take()?;
        let shape = self.streams[session.stream].shape;
        let (question, output_tokens) = (shape.turn.draw(&mut self.rng), shape.output.draw(&mut self.rng));
        let mut prompt = session.prompt.clone();
        self.add(&mut prompt, question);
        let request = trace::Request {
            at: now,
            prompt_tokens: prompt.tokens,
            output_tokens,
            blocks: prompt.blocks.clone(),
        };
        if shape.grows {
            self.add(&mut prompt, output_tokens);
            session.prompt = prompt;
        }
        // Geometric: after each request, as likely as after the one before, it is over.
        if self.rng.f64() * shape.turns >= 1.0 && session.prompt.tokens < LONGEST_PROMPT {
            self.sessions[number] = Some(session);
            let read = now + Duration::from_secs_f64(output_tokens as f64 * READING);
            self.plan(read, shape.pause, Event::Asks(number));
        } else {
            self.free.push(number);
        }
        Some(request)
    }
}

impl Iterator for Crowd {
    type Item = trace::Request;

    fn next(&mut self) -> Option<trace::Request> {
        let warm_up = self.warm_up;
        loop {
            let Reverse((now, _, event)) = self.calendar.pop()?;
            match event {
                Event::Begins(stream) => self.begin(stream, now),
                Event::Asks(session) => {
                    let request = self.ask(session, now);
                    if let Some(request) = request.filter(|request| request.at >= warm_up) {
                        return Some(trace::Request { at: request.at - warm_up, ..request });
                    }
                }
            }
        }
    }
}

/// A prompt as a row of texts, each known by its number.
#[derive(Clone, Debug, Default)]
struct Prompt {
    tokens: u64,
    /// Chained hashes of its whole blocks.
    blocks: Vec<u64>,
    /// What stands in the block after them, so far.
    partial: u64,
}

impl Prompt {
    /// Adds `tokens` tokens of the text with that number, from its first.
    fn add(&mut self, text: u64, tokens: u64) {
        let mut added = 0;
        while added < tokens {
            let part = (BLOCK_TOKENS - self.tokens % BLOCK_TOKENS).min(tokens - added);
            self.partial = [text, added, part].into_iter().fold(self.partial, trace::chained);
            self.tokens += part;
            added += part;
            if self.tokens.is_multiple_of(BLOCK_TOKENS) {
                let parent = self.blocks.last().copied().unwrap_or(0);
                self.blocks.push(trace::chained(parent, self.partial));
                self.partial = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{HashMap, HashSet};

    /// Share of the prompt tokens that a cache without end would have held.
    fn reuse(trace: &Trace) -> f64 {
        let mut seen = HashSet::new();
        let (mut hits, mut all) = (0, 0);
        for request in &trace.requests {
            hits += request.blocks.iter().filter(|block| !seen.insert(**block)).count() as u64 * BLOCK_TOKENS;
            all += request.prompt_tokens;
        }
        hits as f64 / all as f64
    }

    #[test]
    fn a_seed_decides_everything() {
        for kind in Kind::ALL {
            let trace = kind.trace(10.0, 500, 7);
            assert_eq!(trace, kind.trace(10.0, 500, 7), "{}", kind.name());
            assert_ne!(trace, kind.trace(10.0, 500, 8), "{}", kind.name());
            assert_eq!(Kind::named(kind.name()), Some(kind));
        }
    }

    #[test]
    fn requests_come_in_order_and_at_the_rate_from_the_start() {
        for kind in Kind::ALL {
            let trace = kind.trace(25.0, 10_000, 3);
            assert!(trace.requests.is_sorted_by_key(|request| request.at));
            let seconds = |count: usize| trace.requests[count - 1].at.as_secs_f64();
            // Sessions make their requests in bursts, so the rate varies more than that of single ones.
            assert!((340.0..460.0).contains(&seconds(10_000)), "{}: {}", kind.name(), seconds(10_000));
            assert!((28.0..55.0).contains(&seconds(1_000)), "{}: {}", kind.name(), seconds(1_000));
        }
    }

    #[test]
    fn every_prompt_has_a_hash_for_each_of_its_whole_blocks() {
        for kind in Kind::ALL {
            for request in kind.trace(10.0, 2_000, 1).requests {
                assert_eq!(request.blocks.len() as u64, request.prompt_tokens / BLOCK_TOKENS);
                assert!(request.prompt_tokens < LONGEST_PROMPT + 20_000 && request.output_tokens > 0);
            }
        }
    }

    #[test]
    fn the_kinds_differ_in_length_and_in_what_is_said_again() {
        let figures = Kind::ALL.map(|kind| {
            let trace = kind.trace(20.0, 10_000, 5);
            let mean = |tokens: fn(&trace::Request) -> u64| {
                trace.requests.iter().map(tokens).sum::<u64>() as f64 / 10_000.0
            };
            (mean(|request| request.prompt_tokens), mean(|request| request.output_tokens), reuse(&trace))
        });
        let [chat, agents, documents, mixed] = figures;
        assert!((1_500.0..4_000.0).contains(&chat.0) && (250.0..350.0).contains(&chat.1), "{chat:?}");
        assert!((8_000.0..20_000.0).contains(&agents.0) && (80.0..130.0).contains(&agents.1), "{agents:?}");
        assert!((15_000.0..25_000.0).contains(&documents.0), "{documents:?}");
        assert!((4_000.0..12_000.0).contains(&mixed.0), "{mixed:?}");
        assert!((0.7..0.95).contains(&chat.2) && (0.8..0.97).contains(&agents.2), "{figures:?}");
        assert!((0.6..0.85).contains(&documents.2), "{documents:?}");
    }

    #[test]
    fn a_chat_begins_with_all_that_was_said_in_it_and_another_only_with_the_system_prompt() {
        let trace = Kind::Chat.trace(20.0, 3_000, 2);
        let mut longest: HashMap<u64, &trace::Request> = HashMap::new();
        let mut grown = 0;
        for request in &trace.requests {
            let Some(last) = request.blocks.last() else { continue };
            // The blocks of an earlier request, if it was of the same session.
            if let Some(before) = request.blocks.iter().rev().find_map(|block| longest.get(block)) {
                assert!(request.blocks.starts_with(&before.blocks));
                grown += usize::from(request.prompt_tokens > before.prompt_tokens);
            }
            longest.insert(*last, request);
        }
        assert!(grown > 1_500, "{grown}");
        let openings: HashSet<_> =
            trace.requests.iter().filter_map(|request| request.blocks.first()).collect();
        assert!(openings.len() <= 30, "eight system prompts, {} first blocks", openings.len());
    }

    #[test]
    fn texts_that_begin_alike_agree_up_to_the_block_in_which_they_part() {
        let prompt = |parts: &[(u64, u64)]| {
            let mut prompt = Prompt::default();
            parts.iter().for_each(|(text, tokens)| prompt.add(*text, *tokens));
            prompt
        };
        let (one, other) = (prompt(&[(1, 300), (2, 500)]), prompt(&[(1, 300), (3, 500)]));
        assert_eq!((one.tokens, one.blocks.len()), (800, 6));
        assert_eq!(one.blocks[..2], other.blocks[..2]);
        assert!(one.blocks[2..].iter().all(|block| !other.blocks.contains(block)));
        assert_ne!(prompt(&[(1, 128)]).blocks, prompt(&[(1, 64), (1, 64)]).blocks);
    }
}
