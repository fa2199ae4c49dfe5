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

    /// How many jobs have no token yet.
    pub fn unanswered(&self) -> usize {
        let silent = |slot: &&usize| self.sequences[**slot].emitted == 0;
        self.slots.values().filter(silent).count()
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
mod tests;
