//! Bytes per token, learned from what the engines report: the price of a prompt without a tokenizer.
//!
//! A tokenizer was measured to be worth nothing for balancing (research/routing.md s.7.3), so prompt tokens
//! are estimated as UTF-8 bytes / r. Bytes and not characters: a Chinese character is three bytes and about
//! one token, so bytes / 4 stays in range where characters / 4 is off by a factor of three (s.7.1). `r`
//! follows `usage.prompt_tokens`:
//!
//! ```text
//! r <- r + 0.05 (clamp(bytes / tokens, 1, 16) - r)        r starts at 4
//! ```

use super::BLOCK_BYTES;

/// Where `r` starts: English text under current vocabularies.
const START: f64 = 4.0;
/// Weight of one sample: twenty requests move `r` most of the way to a new model.
const WEIGHT: f64 = 0.05;
/// Fewer prompt tokens than this say more about the chat template than about the text.
const LEAST_TOKENS: u64 = 64;
/// No text is denser than a byte per token; above 16 the sample is a picture or a mistake.
const RANGE: (f64, f64) = (1.0, 16.0);

/// The learned number of prompt bytes per token of one model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BytesPerToken {
    ratio: f64,
}

impl BytesPerToken {
    /// Four bytes per token, before anything was learned.
    pub const fn new() -> Self {
        Self { ratio: START }
    }

    /// What was learned elsewhere: `ratio` bytes per token, brought into range.
    pub fn from_ratio(ratio: f64) -> Self {
        Self { ratio: if ratio.is_finite() { ratio.clamp(RANGE.0, RANGE.1) } else { START } }
    }

    /// Learns from one answered request: the digest's `prompt_bytes` and the engine's prompt tokens, cached
    /// ones included. Samples of less than 64 tokens are ignored.
    pub fn learn(&mut self, prompt_bytes: u64, prompt_tokens: u64) {
        if prompt_tokens >= LEAST_TOKENS {
            let sample = (prompt_bytes as f64 / prompt_tokens as f64).clamp(RANGE.0, RANGE.1);
            self.ratio += WEIGHT * (sample - self.ratio);
        }
    }

    /// Bytes per token, 1.0 to 16.0.
    pub const fn ratio(&self) -> f64 {
        self.ratio
    }

    /// The tokens that one whole block of a prompt stands for.
    pub fn block_tokens(&self) -> f64 {
        BLOCK_BYTES as f64 / self.ratio
    }

    /// The estimated tokens of `bytes` bytes of prompt, rounded up, at least 1.
    pub fn tokens(&self, bytes: u64) -> u64 {
        ((bytes as f64 / self.ratio).ceil() as u64).max(1)
    }
}

impl Default for BytesPerToken {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_bytes_are_a_token_until_something_is_learned() {
        let price = BytesPerToken::new();
        assert_eq!(price.tokens(0), 1);
        assert_eq!(price.tokens(400), 100);
        assert_eq!(price.tokens(401), 101);
    }

    #[test]
    fn a_sample_moves_the_ratio_by_a_twentieth_of_the_difference() {
        let mut price = BytesPerToken::new();
        price.learn(600, 100);
        assert!((price.ratio() - 4.1).abs() < 1e-12);
        for _ in 0..400 {
            price.learn(600, 100);
        }
        assert!((price.ratio() - 6.0).abs() < 1e-6);
    }

    #[test]
    fn short_prompts_and_absurd_ratios_do_not_carry_it_away() {
        let mut price = BytesPerToken::new();
        price.learn(6_300, 63);
        assert_eq!(price, BytesPerToken::new());
        for _ in 0..1_000 {
            price.learn(u64::MAX, 64);
        }
        assert!((price.ratio() - 16.0).abs() < 1e-6);
        for _ in 0..1_000 {
            price.learn(0, u64::MAX);
        }
        assert!((price.ratio() - 1.0).abs() < 1e-6);
    }
}
