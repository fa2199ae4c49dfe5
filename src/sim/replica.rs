//! One inference engine in virtual time: continuous batching with chunked prefill, a prefix cache and
//! preemption.
//!
//! The only event is the end of a step. A step, within a budget of `batch_tokens`, (1) decodes one token of
//! every sequence that has its prompt behind it, (2) goes on with the chunks of running prefills, (3) admits
//! from the waiting queue, first come first served, while budget, `max_sequences` and KV memory allow; a
//! prefix found in the cache is skipped, in whole blocks and never the whole prompt. A decoding sequence that
//! finds no memory preempts the newest, which goes back to the head of the queue and is recomputed; a step
//! that preempts admits nobody (vLLM does the same). Tokens come out at the end of the step, whose duration
//! is [`Hardware::step_time`].
//!
//! Known simplifications (research/routing.md s.6.4): a block counts as cached from the admission of the
//! sequence that computes it, and memory for a whole prompt is taken at admission. The model knows no network
//! and no tokenizer.
//!
//! It is a state machine: whoever drives it calls [`Replica::advance`] at or after [`Replica::next_step`],
//! and before each [`Replica::submit`] and [`Replica::cancel`].

use std::collections::{HashMap, VecDeque};

use super::blocks::BlockCache;
use super::hardware::{Batch, Hardware};
use crate::clock::Time;

/// A request as the engine sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Job {
    /// The caller's name for it, unique among the jobs in the engine.
    pub id: u64,
    /// Tokens of the prompt; 0 counts as 1.
    pub prompt_tokens: u64,
    /// Identities of the prompt's whole blocks of `block_tokens`, each naming all that comes before it too.
    /// What exceeds the prompt is ignored; blocks that are missing at the end are never shared.
    pub blocks: Vec<u64>,
    /// Tokens to generate; 0 counts as 1.
    pub output_tokens: u64,
}

/// Something that came out of the engine at the end of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Emission {
    /// The job it belongs to.
    pub id: u64,
    /// The end of the step.
    pub at: Time,
    /// What came out.
    pub kind: Kind,
}

/// What came out of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The first token, and how many prompt tokens the cache had when the job was first admitted.
    First {
        /// Prompt tokens that were not computed.
        cached_tokens: u64,
    },
    /// A further token.
    Token,
    /// The job is done; follows its last token at the same moment.
    Finished,
}

/// Why a job was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Prompt and output together exceed the KV memory.
    TooLong,
    /// A job of this id is in the engine.
    Duplicate,
}

/// The gauges and counters of an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Sequences in the batch.
    pub running: usize,
    /// Sequences in the queue.
    pub waiting: usize,
    /// Share of the KV memory in use, 0..=1; cached blocks nobody uses do not count.
    pub kv_usage: f64,
    /// Prompt tokens looked up in the prefix cache, at first admissions.
    pub queried_tokens: u64,
    /// Prompt tokens found there.
    pub hit_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Jobs finished.
    pub finished: u64,
    /// Sequences thrown out of the batch for want of memory.
    pub preemptions: u64,
    /// Time spent in steps, in nanoseconds.
    pub busy_nanos: u64,
}

/// An engine: submit jobs, advance time, collect tokens.
#[derive(Clone, Debug)]
pub struct Replica {
    hardware: Hardware,
    cache: BlockCache,
    /// Slots of sequences; `slots` finds one by job id, `vacant` lists the unused.
    sequences: Vec<Sequence>,
    vacant: Vec<usize>,
    slots: HashMap<u64, usize>,
    waiting: VecDeque<usize>,
    /// In order of admission, so that the newest is the last.
    running: Vec<usize>,
    /// How many of `running` still have prompt to compute.
    prefilling: usize,
    /// The head of the queue did not fit, and nothing has been released since.
    blocked: bool,
    step_end: Option<Time>,
    counters: Stats,
}

#[derive(Clone, Debug, Default)]
struct Sequence {
    job: Job,
    /// Tokens generated so far; after a preemption they are recomputed with the prompt.
    emitted: u64,
    /// Tokens whose KV is there.
    computed: u64,
    /// Tokens being computed in the current step.
    scheduled: u64,
    /// Tokens of memory taken beside the blocks.
    private: u64,
    /// Prompt tokens the cache had at the first admission.
    cached: Option<u64>,
}

impl Sequence {
    fn tokens(&self) -> u64 {
        self.job.prompt_tokens + self.emitted
    }

    fn is_decoding(&self) -> bool {
        self.emitted > 0 && self.computed + 1 == self.tokens()
    }
}

impl Replica {
    /// An idle engine with an empty cache.
    pub fn new(hardware: Hardware) -> Self {
        Self {
            hardware,
            cache: BlockCache::new(hardware.kv_tokens, hardware.block_tokens.max(1)),
            sequences: Vec::new(),
            vacant: Vec::new(),
            slots: HashMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            prefilling: 0,
            blocked: false,
            step_end: None,
            counters: Stats::default(),
        }
    }

    /// Puts a job at the end of the queue; an idle engine starts a step with it at `now`.
    ///
    /// # Errors
    /// If the job can never fit, or its id is taken.
    pub fn submit(&mut self, now: Time, mut job: Job) -> Result<(), Refusal> {
        job.prompt_tokens = job.prompt_tokens.max(1);
        job.output_tokens = job.output_tokens.max(1);
        if job.prompt_tokens.saturating_add(job.output_tokens) > self.hardware.kv_tokens {
            return Err(Refusal::TooLong);
        }
        if self.slots.contains_key(&job.id) {
            return Err(Refusal::Duplicate);
        }
        let whole = job.prompt_tokens / self.hardware.block_tokens.max(1);
        job.blocks.truncate(usize::try_from(whole).unwrap_or(usize::MAX));
        let slot = self.vacant.pop().unwrap_or_else(|| {
            self.sequences.push(Sequence::default());
            self.sequences.len() - 1
        });
        self.slots.insert(job.id, slot);
        self.sequences[slot] = Sequence { job, ..Sequence::default() };
        self.waiting.push_back(slot);
        if self.step_end.is_none() {
            self.begin_step(now);
        }
        Ok(())
    }

    /// Takes a job out at once, wherever it is, and frees its memory; `false` if it is not in the engine. The
    /// step it was part of still takes as long.
    pub fn cancel(&mut self, id: u64) -> bool {
        let Some(slot) = self.slots.remove(&id) else { return false };
        if let Some(place) = self.waiting.iter().position(|waiting| *waiting == slot) {
            self.waiting.remove(place);
            // The next in the queue may be smaller.
            self.blocked &= place != 0;
        } else {
            self.running.retain(|running| *running != slot);
            self.prefilling -= usize::from(!self.sequences[slot].is_decoding());
            self.release(slot);
        }
        self.vacant.push(slot);
        true
    }

    /// The end of the step in progress; nothing if the engine is idle.
    pub fn next_step(&self) -> Option<Time> {
        self.step_end
    }

    /// Completes every step that ends at or before `now`, appending what came out to `out` in order of time.
    pub fn advance(&mut self, now: Time, out: &mut Vec<Emission>) {
        while let Some(end) = self.step_end.filter(|end| *end <= now) {
            self.finish_step(end, out);
            self.begin_step(end);
        }
    }

    /// The gauges and counters.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            kv_usage: self.cache.used() as f64 / self.hardware.kv_tokens.max(1) as f64,
            ..self.counters
        }
    }

    /// Forgets every cached block that no sequence uses.
    pub fn clear_cache(&mut self) {
        self.cache.clear();
    }

    fn begin_step(&mut self, at: Time) {
        let mut batch = Batch::default();
        let preempted = self.schedule_decodes(&mut batch);
        self.schedule_chunks(&mut batch);
        if !preempted || self.running.is_empty() {
            self.admit(&mut batch);
        }
        self.step_end = (batch.tokens() > 0).then(|| {
            let length = self.hardware.step_time(&batch);
            let end = at + length;
            self.counters.busy_nanos += end.since(at).as_nanos() as u64;
            end
        });
    }

    /// One token for every decoding sequence, oldest first. Says whether any sequence was preempted.
    fn schedule_decodes(&mut self, batch: &mut Batch) -> bool {
        let before = self.counters.preemptions;
        let mut index = 0;
        while index < self.running.len() && batch.tokens() < self.hardware.batch_tokens {
            let slot = self.running[index];
            index += 1;
            if !self.sequences[slot].is_decoding() || !self.make_room(slot) {
                continue;
            }
            let sequence = &mut self.sequences[slot];
            sequence.private += 1;
            sequence.scheduled = 1;
            batch.add_decoder(sequence.tokens());
        }
        self.counters.preemptions > before
    }

    /// Takes one more token of memory for `slot`, preempting the newest until there is one; `false` if the
    /// newest was `slot` itself. Whoever is newer than `slot` has not been scheduled yet.
    fn make_room(&mut self, slot: usize) -> bool {
        while !self.cache.grow() {
            let Some(newest) = self.running.pop() else { return false };
            self.counters.preemptions += 1;
            self.prefilling -= usize::from(!self.sequences[newest].is_decoding());
            self.release(newest);
            self.waiting.push_front(newest);
            if newest == slot {
                return false;
            }
        }
        true
    }

    fn schedule_chunks(&mut self, batch: &mut Batch) {
        let mut left = self.prefilling;
        for index in 0..self.running.len() {
            if left == 0 || batch.tokens() >= self.hardware.batch_tokens {
                break;
            }
            let slot = self.running[index];
            if !self.sequences[slot].is_decoding() {
                left -= 1;
                self.schedule_chunk(slot, batch);
            }
        }
    }

    fn schedule_chunk(&mut self, slot: usize, batch: &mut Batch) {
        let sequence = &mut self.sequences[slot];
        let budget = self.hardware.batch_tokens - batch.tokens();
        sequence.scheduled = budget.min(sequence.tokens() - sequence.computed);
        batch.add_chunk(sequence.computed, sequence.scheduled);
    }

    fn admit(&mut self, batch: &mut Batch) {
        let block_tokens = self.hardware.block_tokens.max(1);
        while batch.tokens() < self.hardware.batch_tokens
            && self.running.len() < self.hardware.max_sequences
            && !self.blocked
        {
            let Some(&slot) = self.waiting.front() else { break };
            let sequence = &mut self.sequences[slot];
            // At least one token has to be computed, for there is no output without a last token.
            let limit = usize::try_from((sequence.tokens() - 1) / block_tokens).unwrap_or(usize::MAX);
            let private = sequence.tokens() - sequence.job.blocks.len() as u64 * block_tokens;
            let Some(matched) = self.cache.admit(&sequence.job.blocks, limit, private) else {
                self.blocked = true;
                break;
            };
            sequence.private = private;
            sequence.computed = matched as u64 * block_tokens;
            if sequence.cached.is_none() {
                sequence.cached = Some(sequence.computed);
                self.counters.queried_tokens += sequence.job.prompt_tokens;
                self.counters.hit_tokens += sequence.computed;
            }
            self.waiting.pop_front();
            self.running.push(slot);
            // A preempted sequence whose blocks are all still there has one token to compute: it is decoding
            // again.
            self.prefilling += usize::from(!sequence.is_decoding());
            self.schedule_chunk(slot, batch);
        }
    }

    fn finish_step(&mut self, at: Time, out: &mut Vec<Emission>) {
        let mut kept = 0;
        for index in 0..self.running.len() {
            let slot = self.running[index];
            if self.finish_sequence(slot, at, out) {
                self.release(slot);
                self.slots.remove(&self.sequences[slot].job.id);
                self.vacant.push(slot);
            } else {
                self.running[kept] = slot;
                kept += 1;
            }
        }
        self.running.truncate(kept);
    }

    /// Books what the step computed for one sequence; `true` if it is done.
    fn finish_sequence(&mut self, slot: usize, at: Time, out: &mut Vec<Emission>) -> bool {
        let sequence = &mut self.sequences[slot];
        if sequence.scheduled == 0 {
            return false;
        }
        let was_decoding = sequence.is_decoding();
        sequence.computed += sequence.scheduled;
        sequence.scheduled = 0;
        if sequence.computed < sequence.tokens() {
            return false;
        }
        self.prefilling -= usize::from(!was_decoding);
        sequence.emitted += 1;
        self.counters.generated_tokens += 1;
        let id = sequence.job.id;
        let first = Kind::First { cached_tokens: sequence.cached.unwrap_or(0) };
        let kind = if sequence.emitted == 1 { first } else { Kind::Token };
        out.push(Emission { id, at, kind });
        let done = sequence.emitted == sequence.job.output_tokens;
        if done {
            self.counters.finished += 1;
            out.push(Emission { id, at, kind: Kind::Finished });
        }
        done
    }

    /// Frees the memory of a sequence; what it had computed of its blocks stays in the cache.
    fn release(&mut self, slot: usize) {
        let sequence = &mut self.sequences[slot];
        let computed =
            usize::try_from(sequence.computed / self.hardware.block_tokens.max(1)).unwrap_or(usize::MAX);
        self.cache.release(&sequence.job.blocks, computed, sequence.private);
        (sequence.computed, sequence.scheduled, sequence.private) = (0, 0, 0);
        self.blocked = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Room for 64 tokens in blocks of 4, steps of 10 ms whatever the batch.
    const SMALL: Hardware = Hardware {
        name: "small",
        base_ms: 10.0,
        token_ms: 0.0,
        attention_ms: 0.0,
        sequence_ms: 0.0,
        context_ms: 0.0,
        kv_tokens: 64,
        batch_tokens: 32,
        max_sequences: 8,
        block_tokens: 4,
    };

    fn job(id: u64, prompt_tokens: u64, blocks: impl IntoIterator<Item = u64>, output_tokens: u64) -> Job {
        Job { id, prompt_tokens, blocks: blocks.into_iter().collect(), output_tokens }
    }

    fn millis(ms: u64) -> Time {
        Time::from_nanos(ms * 1_000_000)
    }

    /// Runs until nothing is left, returning what came out as (id, milliseconds, kind).
    fn drain(replica: &mut Replica) -> Vec<(u64, u64, Kind)> {
        let mut out = Vec::new();
        while let Some(end) = replica.next_step() {
            replica.advance(end, &mut out);
        }
        out.iter().map(|it| (it.id, it.at.as_nanos() / 1_000_000, it.kind)).collect()
    }

    fn first_token(prompt_tokens: u64) -> f64 {
        let mut replica = Replica::new(Hardware::default());
        replica.submit(Time::ZERO, job(1, prompt_tokens, [], 1)).unwrap();
        let mut out = Vec::new();
        replica.advance(Time::from_nanos(u64::MAX), &mut out);
        assert_eq!(out[0].kind, Kind::First { cached_tokens: 0 });
        out[0].at.as_nanos() as f64 / 1e6
    }

    #[test]
    fn a_job_alone_takes_the_time_the_formula_says() {
        let mut replica = Replica::new(Hardware::default());
        replica.submit(Time::ZERO, job(7, 100, [], 3)).unwrap();
        let mut out = Vec::new();
        replica.advance(Time::from_nanos(u64::MAX), &mut out);
        // 6.4 + 1.71 + 0.0049 ms; then twice 6.4 + 0.01 + 4.22e-5 times 101 and 102 tokens of context.
        let moments: Vec<_> = out.iter().map(|it| it.at.as_nanos()).collect();
        assert_eq!(moments, [8_114_900, 14_529_162, 20_943_466, 20_943_466]);
        assert_eq!(out[3].kind, Kind::Finished);
        assert_eq!(replica.next_step(), None);
    }

    #[test]
    fn prefill_times_lie_within_twelve_percent_of_the_published_anchors() {
        for (prompt_tokens, anchor_ms) in [(1024, 22.0), (8192, 200.0), (65_536, 3056.0)] {
            let ratio = first_token(prompt_tokens) / anchor_ms;
            assert!((0.88..1.12).contains(&ratio), "{prompt_tokens} tokens: {ratio:.3} of the anchor");
        }
    }

    #[test]
    fn a_long_prompt_is_computed_in_chunks_and_others_decode_beside_it() {
        let mut replica = Replica::new(SMALL);
        replica.submit(millis(0), job(1, 4, [], 5)).unwrap();
        replica.submit(millis(0), job(2, 40, [], 1)).unwrap();
        let out = drain(&mut replica);
        let of = |id| out.iter().filter(|it| it.0 == id).map(|it| it.1).collect::<Vec<_>>();
        assert_eq!(of(1), [10, 20, 30, 40, 50, 50]);
        // 31 of its 40 tokens fit beside the decoding sequence, the other 9 in the next step.
        assert_eq!(of(2), [30, 30]);
    }

    #[test]
    fn a_known_prefix_is_skipped_in_whole_blocks_and_never_the_whole_prompt() {
        let mut replica = Replica::new(SMALL);
        let mut cached = |id, prompt_tokens, blocks: &[u64]| {
            replica.submit(millis(0), job(id, prompt_tokens, blocks.to_vec(), 1)).unwrap();
            match drain(&mut replica)[0].2 {
                Kind::First { cached_tokens } => cached_tokens,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(cached(1, 10, &[1, 2]), 0);
        assert_eq!(cached(2, 10, &[1, 2]), 8);
        assert_eq!(cached(3, 8, &[1, 2]), 4, "the last token has to be computed");
        assert_eq!(cached(4, 16, &[1, 3, 2]), 4, "a block counts only behind the same prefix");
        assert_eq!(cached(5, 7, &[1, 2]), 4, "half a block is none");
        let stats = replica.stats();
        assert_eq!((stats.queried_tokens, stats.hit_tokens), (51, 20));
    }

    #[test]
    fn the_least_recently_used_prefix_makes_room() {
        let mut replica = Replica::new(SMALL);
        for (id, base) in [(1, 100), (2, 200), (3, 300)] {
            replica.submit(millis(0), job(id, 24, base..base + 6, 1)).unwrap();
            drain(&mut replica);
        }
        // 72 tokens in 64: the last two blocks of the first prompt went.
        replica.submit(millis(0), job(4, 24, 100..106, 1)).unwrap();
        assert_eq!(drain(&mut replica)[0].2, Kind::First { cached_tokens: 16 });
        replica.clear_cache();
        replica.submit(millis(0), job(5, 24, 100..106, 1)).unwrap();
        assert_eq!(drain(&mut replica)[0].2, Kind::First { cached_tokens: 0 });
    }

    #[test]
    fn when_memory_runs_out_the_newest_starts_again_and_loses_nothing() {
        let mut replica = Replica::new(SMALL);
        replica.submit(millis(0), job(1, 28, [], 20)).unwrap();
        replica.submit(millis(0), job(2, 28, [], 20)).unwrap();
        let out = drain(&mut replica);
        let of = |id| out.iter().filter(|it| it.0 == id).map(|it| it.1).collect::<Vec<_>>();
        // 28 + 28 tokens leave 8: the fourth decode of job 2 does not fit beside the fifth of job 1.
        assert_eq!(replica.stats().preemptions, 1);
        assert_eq!(of(1), (1..=20).map(|step| step * 10).chain([200]).collect::<Vec<_>>());
        assert_eq!(of(2).len(), 21);
        assert!(of(2)[3] == 50 && of(2)[4] == 210, "{:?}", of(2));
        let firsts = out.iter().filter(|it| matches!(it.2, Kind::First { .. })).count();
        assert_eq!(firsts, 2, "a recomputed job has one first token");
        assert_eq!(replica.stats().kv_usage, 0.0);
    }

    #[test]
    fn a_job_that_does_not_fit_waits_and_those_behind_it_too() {
        let mut replica = Replica::new(SMALL);
        replica.submit(millis(0), job(1, 30, [], 3)).unwrap();
        replica.submit(millis(0), job(2, 40, [], 1)).unwrap();
        replica.submit(millis(0), job(3, 4, [], 1)).unwrap();
        replica.advance(millis(10), &mut Vec::new());
        assert_eq!((replica.stats().running, replica.stats().waiting), (1, 2));
        assert!(replica.cancel(2));
        let order: Vec<_> = drain(&mut replica).into_iter().filter(|it| it.2 == Kind::Finished).collect();
        assert_eq!(order, [(1, 30, Kind::Finished), (3, 30, Kind::Finished)]);
    }

    #[test]
    fn a_cancelled_job_frees_its_memory_and_says_no_more() {
        let mut replica = Replica::new(SMALL);
        replica.submit(millis(0), job(1, 40, 1..11, 9)).unwrap();
        replica.submit(millis(0), job(2, 40, 21..31, 1)).unwrap();
        replica.advance(millis(20), &mut Vec::new());
        assert_eq!(replica.stats().waiting, 1);
        assert!(replica.cancel(1));
        assert!(!replica.cancel(1));
        assert_eq!(replica.stats().kv_usage, 0.0);
        let out = drain(&mut replica);
        assert_eq!(out, [(2, 50, Kind::First { cached_tokens: 0 }), (2, 50, Kind::Finished)]);
    }

    #[test]
    fn what_can_never_fit_and_what_is_already_there_is_refused() {
        let mut replica = Replica::new(SMALL);
        assert_eq!(replica.submit(millis(0), job(1, 60, [], 5)), Err(Refusal::TooLong));
        assert_eq!(replica.submit(millis(0), job(1, u64::MAX, [], 5)), Err(Refusal::TooLong));
        assert_eq!(replica.submit(millis(0), job(1, 60, [], 4)), Ok(()));
        assert_eq!(replica.submit(millis(0), job(1, 1, [], 1)), Err(Refusal::Duplicate));
    }

    #[test]
    fn no_token_is_lost_or_invented_by_any_schedule() {
        let mut preemptions = 0;
        for seed in 0..200 {
            println!("seed {seed}");
            preemptions += random_schedule(&mut fastrand::Rng::with_seed(seed));
        }
        assert!(preemptions > 0, "the schedules are too easy");
    }

    /// Submits and cancels at random, checks the books, and says how many preemptions there were.
    fn random_schedule(rng: &mut fastrand::Rng) -> u64 {
        let mut replica = Replica::new(Hardware { max_sequences: rng.usize(1..8), ..SMALL });
        let mut expected = HashMap::new();
        let mut out = Vec::new();
        let mut now = Time::ZERO;
        for id in 0..60 {
            now = now + std::time::Duration::from_millis(rng.u64(0..40));
            replica.advance(now, &mut out);
            let prompt_tokens = rng.u64(1..40);
            let chain = rng.u64(0..4) * 100;
            let output_tokens = rng.u64(1..24);
            replica.submit(now, job(id, prompt_tokens, chain..chain + 20, output_tokens)).unwrap();
            expected.insert(id, output_tokens);
            if rng.u8(0..4) == 0 {
                let victim = rng.u64(0..=id);
                if replica.cancel(victim) {
                    let emitted =
                        out.iter().filter(|it| it.id == victim && it.kind != Kind::Finished).count();
                    expected.insert(victim, emitted as u64);
                }
            }
            let stats = replica.stats();
            assert!(stats.kv_usage <= 1.0 && stats.running <= 8, "{stats:?}");
        }
        replica.advance(Time::from_nanos(u64::MAX), &mut out);
        assert_eq!(replica.next_step(), None);
        let stats = replica.stats();
        assert_eq!((stats.running, stats.waiting, stats.kv_usage), (0, 0, 0.0));
        assert_eq!(stats.generated_tokens, expected.values().sum::<u64>());
        assert!(out.is_sorted_by_key(|it| it.at));
        for (id, tokens) in expected {
            let emitted = out.iter().filter(|it| it.id == id && it.kind != Kind::Finished).count();
            assert_eq!(emitted as u64, tokens, "job {id}");
        }
        stats.preemptions
    }
}
