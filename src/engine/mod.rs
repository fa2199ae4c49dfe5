//! The engine room: the dialects of inference engines, as data, and the reader of their metrics.
//!
//! Metric names changed twice in vLLM alone, so what differs between engines is one table ([`Preset`]) and
//! the code that reads it is the same for all. An engine's gauges are 0.05 to 18 s old (research/routing.md
//! s.4), late or wrong at times (research/engines.md s.3, 10): a [`Reading`] guards and corrects a choice, it
//! never makes one.

mod exposition;
mod preset;
mod reading;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use exposition::{Labels, Sample, samples};
pub use preset::{Capacity, Preset};
pub use reading::{Reading, read};

/// The dialect of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// vLLM
    Vllm,
    /// SGLang
    Sglang,
    /// Text Generation Inference
    Tgi,
    /// TensorRT-LLM's `trtllm-serve`
    Trtllm,
    /// llama.cpp's `llama-server`, started with `--metrics`
    Llamacpp,
    /// LMDeploy
    Lmdeploy,
    /// Anything with OpenAI's API and no metrics.
    #[default]
    Openai,
}

impl Engine {
    /// Every engine there is.
    pub const ALL: [Self; 7] =
        [Self::Vllm, Self::Sglang, Self::Tgi, Self::Trtllm, Self::Llamacpp, Self::Lmdeploy, Self::Openai];

    /// The name, as it stands in a configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
            Self::Tgi => "tgi",
            Self::Trtllm => "trtllm",
            Self::Llamacpp => "llamacpp",
            Self::Lmdeploy => "lmdeploy",
            Self::Openai => "openai",
        }
    }

    /// Where this engine is probed and polled, and what its metrics are called.
    pub const fn preset(self) -> &'static Preset {
        preset::of(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_the_one_in_the_configuration() {
        for engine in Engine::ALL {
            let json = serde_json::to_string(&engine).unwrap();
            assert_eq!(json, format!("\"{}\"", engine.name()));
            assert_eq!(serde_json::from_str::<Engine>(&json).unwrap(), engine);
        }
        assert!(serde_json::from_str::<Engine>("\"vLLM\"").is_err());
    }

    #[test]
    fn every_engine_is_probed_and_only_the_bare_one_is_not_polled() {
        for engine in Engine::ALL {
            let preset = engine.preset();
            assert!(preset.probe_path.starts_with('/'), "{}", engine.name());
            assert_eq!(preset.metrics_path.is_none(), engine == Engine::Openai, "{}", engine.name());
            assert_eq!(preset.running.is_empty(), engine == Engine::Openai, "{}", engine.name());
        }
    }
}
