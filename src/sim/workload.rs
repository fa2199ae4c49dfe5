//! The demo's traffic: short chats, long documents and groups that share a long system prompt, from one seed.
//!
//! It is the mix that makes counting requests the wrong thing to do: a document costs a GPU what fifty chats
//! cost, and a group's next request costs almost nothing where its system prompt is cached and a lot
//! elsewhere. Arrivals are Poisson. A group lives for a number of requests and is then replaced by a new one,
//! as sessions are, so that the share of prompts seen before does not creep towards one however long the run
//! is.

use std::time::Duration;

use fastrand::Rng;

/// What the traffic consists of; ranges are in tokens, both ends included.
#[derive(Clone, Debug, PartialEq)]
pub struct Mix {
    /// Requests per second, on average.
    pub rate: f64,
    /// Share of requests that carry a long document, 0..=1.
    pub documents: f64,
    /// Share of requests that belong to a group, 0..=1. The rest are chats.
    pub grouped: f64,
    /// Groups alive at a time.
    pub groups: usize,
    /// Requests a group makes before another takes its place.
    pub group_requests: (u64, u64),
    /// Length of a chat or of the question in a group.
    pub chat_tokens: (u64, u64),
    /// Length of a document.
    pub document_tokens: (u64, u64),
    /// Length of the system prompt of a group.
    pub system_tokens: (u64, u64),
    /// Length of the answer.
    pub output_tokens: (u64, u64),
}

impl Default for Mix {
    /// What keeps four engines of the default hardware busy without drowning them: under round robin each
    /// spends close to half of its time on prompts, the rest on decoding.
    fn default() -> Self {
        Self {
            rate: 26.0,
            documents: 0.15,
            grouped: 0.5,
            groups: 16,
            group_requests: (8, 24),
            chat_tokens: (50, 400),
            document_tokens: (8000, 24_000),
            system_tokens: (4000, 8000),
            output_tokens: (20, 300),
        }
    }
}

/// A text of a given length that is the same for the same seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passage {
    /// What it is drawn from.
    pub seed: u64,
    /// Its length, at four bytes each.
    pub tokens: u64,
}

/// One request to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// When, after the start of the run.
    pub at: Duration,
    /// The system prompt it shares with its group.
    pub system: Option<Passage>,
    /// What nobody else asks.
    pub user: Passage,
    /// Tokens to generate.
    pub output_tokens: u64,
}

/// An endless sequence of requests, in order of time.
#[derive(Clone, Debug)]
pub struct Workload {
    mix: Mix,
    rng: Rng,
    clock: f64,
    groups: Vec<Group>,
}

#[derive(Clone, Copy, Debug)]
struct Group {
    system: Passage,
    left: u64,
}

impl Workload {
    /// The traffic of `mix`, a function of `seed` alone.
    pub fn new(mix: Mix, seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut groups: Vec<_> = (0..mix.groups).map(|_| Group::new(&mix, &mut rng)).collect();
        // A run begins in the middle of things: not all groups are young.
        for group in &mut groups {
            group.left = rng.u64(1..=group.left);
        }
        Self { mix, rng, clock: 0.0, groups }
    }

    fn system_prompt(&mut self) -> Option<Passage> {
        if self.groups.is_empty() {
            return None;
        }
        let chosen = self.rng.usize(..self.groups.len());
        let group = &mut self.groups[chosen];
        let system = group.system;
        group.left -= 1;
        if group.left == 0 {
            *group = Group::new(&self.mix, &mut self.rng);
        }
        Some(system)
    }
}

impl Iterator for Workload {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        // 1 - f64() is in (0, 1], so that the logarithm is finite.
        self.clock += -(1.0 - self.rng.f64()).ln() / self.mix.rate;
        let kind = self.rng.f64();
        let (system, length) = if kind < self.mix.documents {
            (None, self.mix.document_tokens)
        } else if kind < self.mix.documents + self.mix.grouped {
            (self.system_prompt(), self.mix.chat_tokens)
        } else {
            (None, self.mix.chat_tokens)
        };
        Some(Request {
            at: Duration::try_from_secs_f64(self.clock).unwrap_or(Duration::MAX),
            system,
            user: Passage::draw(length, &mut self.rng),
            output_tokens: between(self.mix.output_tokens, &mut self.rng),
        })
    }
}

impl Group {
    fn new(mix: &Mix, rng: &mut Rng) -> Self {
        Self { system: Passage::draw(mix.system_tokens, rng), left: between(mix.group_requests, rng).max(1) }
    }
}

impl Passage {
    fn draw(length: (u64, u64), rng: &mut Rng) -> Self {
        Self { seed: rng.u64(..), tokens: between(length, rng) }
    }

    /// The text itself: ASCII words, `4 * tokens` bytes.
    pub fn text(&self) -> String {
        let length = usize::try_from(self.tokens.saturating_mul(4)).unwrap_or(usize::MAX);
        let mut rng = Rng::with_seed(self.seed);
        let mut text = String::with_capacity(length + LONGEST_WORD);
        while text.len() < length {
            text.push_str(WORDS[rng.usize(..WORDS.len())]);
            text.push(' ');
        }
        text.truncate(length);
        text
    }
}

/// Cargo and ships; with a space each about four bytes on average.
const WORDS: [&str; 16] = [
    "load", "keel", "mast", "port", "crew", "tide", "hull", "deck", "bow", "sea", "rope", "sail", "ton",
    "line", "a", "plimsoll",
];
const LONGEST_WORD: usize = 16;

fn between((low, high): (u64, u64), rng: &mut Rng) -> u64 {
    rng.u64(low..=high.max(low))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_traffic() {
        let requests = |seed| Workload::new(Mix::default(), seed).take(500).collect::<Vec<_>>();
        assert_eq!(requests(1), requests(1));
        assert_ne!(requests(1), requests(2));
    }

    #[test]
    fn arrivals_come_at_the_rate_asked_for_and_in_order() {
        let requests: Vec<_> = Workload::new(Mix { rate: 50.0, ..Mix::default() }, 3).take(10_000).collect();
        let seconds = requests[9999].at.as_secs_f64();
        assert!((190.0..210.0).contains(&seconds), "{seconds}");
        assert!(requests.is_sorted_by_key(|request| request.at));
    }

    #[test]
    fn the_shares_and_lengths_are_those_of_the_mix() {
        let requests: Vec<_> = Workload::new(Mix::default(), 4).take(10_000).collect();
        let documents = requests.iter().filter(|it| it.user.tokens >= 8000).count();
        let grouped = requests.iter().filter(|it| it.system.is_some()).count();
        assert!((1400..1600).contains(&documents), "{documents}");
        assert!((4800..5200).contains(&grouped), "{grouped}");
        assert!(requests.iter().all(|it| (20..=300).contains(&it.output_tokens)));
        assert!(requests.iter().all(|it| (50..=24_000).contains(&it.user.tokens)));
    }

    #[test]
    fn a_group_is_replaced_when_it_has_made_its_requests() {
        let mut uses = std::collections::HashMap::new();
        for request in Workload::new(Mix::default(), 5).take(5000) {
            if let Some(system) = request.system {
                *uses.entry(system.seed).or_insert(0) += 1;
            }
        }
        assert!(uses.len() > 100, "{}", uses.len());
        assert!(uses.values().all(|count| *count <= 24));
    }

    #[test]
    fn a_text_has_four_bytes_per_token_and_depends_on_its_seed() {
        let text = |seed, tokens| Passage { seed, tokens }.text();
        assert_eq!(text(1, 250).len(), 1000);
        assert_eq!(text(1, 250), text(1, 250));
        assert_ne!(text(1, 250), text(2, 250));
        assert!(text(1, 250).starts_with(&text(1, 20)));
    }
}
