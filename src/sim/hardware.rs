//! What one step of an engine costs on a given model and GPU, as a table of constants.
//!
//! The duration of a step of continuous batching is linear in five sums over its batch; the constants are
//! least-squares fits on NVIDIA AIConfigurator (research/routing.md s.6.2, error at most 7 % on the fitted
//! grid, up to 11 % beyond):
//!
//! ```text
//! step = base + token * P + attention * sum(c * pre + c^2 / 2) + sequence * D + context * sum(ctx)      [ms]
//! ```
//!
//! `P` prompt tokens computed in the step, in chunks of `c` after `pre` earlier tokens; `D` decoding
//! sequences with `ctx` tokens of context each. The limits of a batch are vLLM 0.32's defaults for the GPU.

use std::time::Duration;

/// One model on one GPU (or a tensor-parallel group of them) as its engine is usually started.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hardware {
    /// Name on the command line; that of constants from a file is none of these.
    pub name: &'static str,
    /// Milliseconds of any step.
    pub base_ms: f64,
    /// Milliseconds per prompt token computed.
    pub token_ms: f64,
    /// Milliseconds per pair of a prompt token and a token it attends to.
    pub attention_ms: f64,
    /// Milliseconds per decoding sequence.
    pub sequence_ms: f64,
    /// Milliseconds per token of context of the decoding sequences.
    pub context_ms: f64,
    /// Capacity of the KV cache, in tokens.
    pub kv_tokens: u64,
    /// Most tokens computed in one step (`max_num_batched_tokens`).
    pub batch_tokens: u64,
    /// Most sequences running at once (`max_num_seqs`).
    pub max_sequences: usize,
    /// Tokens per block of the prefix cache.
    pub block_tokens: u64,
}

/// The batch of one step, summed up as the cost formula needs it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Batch {
    /// Prompt tokens computed.
    pub prompt_tokens: u64,
    /// Sum over the chunks of `c * pre + c^2 / 2`.
    pub attended: f64,
    /// Decoding sequences.
    pub decoders: u64,
    /// Tokens of context of the decoding sequences.
    pub context: u64,
}

impl Batch {
    /// Adds a chunk of `tokens` prompt tokens that follow `earlier` ones.
    pub fn add_chunk(&mut self, earlier: u64, tokens: u64) {
        self.prompt_tokens += tokens;
        let (earlier, tokens) = (earlier as f64, tokens as f64);
        self.attended += tokens.mul_add(earlier, tokens * tokens / 2.0);
    }

    /// Adds one sequence that decodes a token with `context` tokens of context.
    pub fn add_decoder(&mut self, context: u64) {
        self.decoders += 1;
        self.context += context;
    }

    /// Tokens computed in the step; zero means there is no step.
    pub fn tokens(&self) -> u64 {
        self.prompt_tokens + self.decoders
    }
}

impl Hardware {
    /// Every row of the table; the first is the default.
    pub const ALL: [Self; 8] = [
        row("llama-8b-h100", [6.4, 0.0171, 9.8e-7, 0.010, 4.22e-5], 400_000, HOPPER),
        row("llama-8b-a100", [11.6, 0.0539, 3.08e-6, 0.030, 8.31e-5], 400_000, AMPERE),
        row("llama-8b-h200", [5.0, 0.0175, 9.8e-7, 0.0103, 2.99e-5], 900_000, HOPPER),
        row("llama-8b-l40s", [22.2, 0.0554, 3.9e-6, 0.0315, 1.95e-4], 190_000, AMPERE),
        row("qwen-32b-2xh100", [13.6, 0.0430, 2.0e-6, 0.026, 4.27e-5], 307_328, HOPPER),
        row("llama-70b-4xh100", [15.2, 0.0556, 1.28e-6, 0.032, 2.68e-5], 415_000, HOPPER),
        row("llama-70b-8xh100", [10.0, 0.0365, 5.7e-7, 0.0233, 1.37e-5], 1_270_000, HOPPER),
        row("llama-70b-4xa100", [27.8, 0.151, 3.6e-6, 0.0996, 5.5e-5], 415_000, AMPERE),
    ];

    /// The names of all rows.
    pub const NAMES: [&'static str; 8] = {
        let mut names = [""; 8];
        let mut index = 0;
        while index < names.len() {
            names[index] = Self::ALL[index].name;
            index += 1;
        }
        names
    };

    /// The row called `name`.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|row| row.name == name)
    }

    /// The same at `speed` times the speed, which is above 0.
    pub fn at_speed(self, speed: f64) -> Self {
        Self {
            base_ms: self.base_ms / speed,
            token_ms: self.token_ms / speed,
            attention_ms: self.attention_ms / speed,
            sequence_ms: self.sequence_ms / speed,
            context_ms: self.context_ms / speed,
            ..self
        }
    }

    /// How long a step with this batch takes.
    pub fn step_time(&self, batch: &Batch) -> Duration {
        let ms = self.base_ms
            + self.token_ms * batch.prompt_tokens as f64
            + self.attention_ms * batch.attended
            + self.sequence_ms * batch.decoders as f64
            + self.context_ms * batch.context as f64;
        Duration::from_nanos((ms * 1e6).round() as u64)
    }
}

impl Default for Hardware {
    /// Llama-3.1-8B on one H100.
    fn default() -> Self {
        Self::ALL[0]
    }
}

/// `max_num_batched_tokens` and `max_num_seqs` that vLLM 0.32 chooses on H100 and H200.
const HOPPER: (u64, usize) = (8192, 1024);
/// The same on A100 and smaller.
const AMPERE: (u64, usize) = (2048, 256);
/// vLLM's block size on GPUs.
const BLOCK_TOKENS: u64 = 16;

const fn row(name: &'static str, ms: [f64; 5], kv_tokens: u64, limits: (u64, usize)) -> Hardware {
    let [base_ms, token_ms, attention_ms, sequence_ms, context_ms] = ms;
    let (batch_tokens, max_sequences) = limits;
    Hardware {
        name,
        base_ms,
        token_ms,
        attention_ms,
        sequence_ms,
        context_ms,
        kv_tokens,
        batch_tokens,
        max_sequences,
        block_tokens: BLOCK_TOKENS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_costs_the_sum_of_its_five_terms() {
        let mut batch = Batch::default();
        batch.add_chunk(1000, 500);
        batch.add_decoder(2000);
        batch.add_decoder(3000);
        assert_eq!(batch.tokens(), 502);
        // 6.4 + 8.55 + 9.8e-7 * (500,000 + 125,000) + 0.02 + 0.211
        assert_eq!(Hardware::default().step_time(&batch), Duration::from_nanos(15_793_500));
    }

    #[test]
    fn every_row_is_found_by_its_own_name() {
        for row in Hardware::ALL {
            assert_eq!(Hardware::named(row.name), Some(row));
        }
        assert_eq!(Hardware::named("abacus"), None);
        assert_eq!(Hardware::NAMES.map(Hardware::named), Hardware::ALL.map(Some));
    }
}
