//! What differs between engines, as one table: paths, and the exact names of metrics.
//!
//! Sources: research/routing.md s.3.1 and engines.md "Names to read" (captures of vLLM 0.32, SGLang 0.5.23,
//! llama.cpp b11434), the engines' own source for the rest. Names are matched whole:
//! `vllm:num_requests_waiting` has a sibling `..._by_reason` that repeats its count. Where a metric has
//! several names, the newest comes first and the first one that an engine exports is the one that is read.

use super::Engine;

/// How one engine is probed, polled and read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preset {
    /// What a health probe gets (GET: vLLM and SGLang answer HEAD with 405).
    pub probe_path: &'static str,
    /// Where the metrics are; none if there are none.
    pub metrics_path: Option<&'static str>,
    /// Names of the gauge of requests in the running batch.
    pub running: &'static [&'static str],
    /// Names of the gauge of requests that wait for a place in it.
    pub waiting: &'static [&'static str],
    /// Names of the gauge of the KV cache in use, 0 to 1.
    pub kv_usage: &'static [&'static str],
    /// Where the size of the KV cache is found.
    pub kv_capacity: Capacity,
    /// The label that tells schedulers of one process apart: their requests add up. Series that agree in it
    /// describe the same scheduler (as the tensor-parallel ranks of SGLang do) and count once. None: every
    /// series counts.
    pub scheduler: Option<&'static str>,
}

/// Where the size of the KV cache in tokens is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capacity {
    /// Nowhere.
    Unknown,
    /// In the gauge of this name.
    Gauge(&'static str),
    /// In the labels of the metric of this name: `kv_cache_size_tokens`, else `block_size` times
    /// `num_gpu_blocks`.
    Labels(&'static str),
}

/// The preset of `engine`.
pub(super) const fn of(engine: Engine) -> &'static Preset {
    match engine {
        Engine::Vllm => &VLLM,
        Engine::Sglang => &SGLANG,
        Engine::Tgi => &TGI,
        Engine::Trtllm => &TRTLLM,
        Engine::Llamacpp => &LLAMACPP,
        Engine::Lmdeploy => &LMDEPLOY,
        Engine::Openai => &OPENAI,
    }
}

const VLLM: Preset = Preset {
    probe_path: "/health",
    metrics_path: Some("/metrics"),
    running: &["vllm:num_requests_running"],
    waiting: &["vllm:num_requests_waiting"],
    // The second name is that of vLLM before 0.9.
    kv_usage: &["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"],
    kv_capacity: Capacity::Labels("vllm:cache_config_info"),
    scheduler: Some("engine"),
};

const SGLANG: Preset = Preset {
    probe_path: "/health",
    metrics_path: Some("/metrics"),
    running: &["sglang:num_running_reqs"],
    waiting: &["sglang:num_queue_reqs"],
    kv_usage: &["sglang:token_usage"],
    kv_capacity: Capacity::Gauge("sglang:max_total_num_tokens"),
    scheduler: Some("dp_rank"),
};

const TGI: Preset = Preset {
    probe_path: "/health",
    metrics_path: Some("/metrics"),
    running: &["tgi_batch_current_size"],
    waiting: &["tgi_queue_size"],
    kv_usage: &[],
    kv_capacity: Capacity::Unknown,
    scheduler: None,
};

const TRTLLM: Preset = Preset {
    probe_path: "/health",
    // `/metrics` is there too, but answers with JSON.
    metrics_path: Some("/prometheus/metrics"),
    running: &["trtllm_num_requests_running"],
    waiting: &["trtllm_num_requests_waiting"],
    kv_usage: &["trtllm_kv_cache_utilization"],
    kv_capacity: Capacity::Unknown,
    scheduler: None,
};

const LLAMACPP: Preset = Preset {
    probe_path: "/health",
    metrics_path: Some("/metrics"),
    running: &["llamacpp:requests_processing"],
    waiting: &["llamacpp:requests_deferred"],
    // Gone from current builds.
    kv_usage: &["llamacpp:kv_cache_usage_ratio"],
    kv_capacity: Capacity::Unknown,
    scheduler: None,
};

const LMDEPLOY: Preset = Preset {
    probe_path: "/health",
    metrics_path: Some("/metrics"),
    running: &["lmdeploy:num_requests_running"],
    waiting: &["lmdeploy:num_requests_waiting"],
    kv_usage: &["lmdeploy:gpu_cache_usage_perc"],
    kv_capacity: Capacity::Unknown,
    scheduler: Some("engine"),
};

const OPENAI: Preset = Preset {
    probe_path: "/v1/models",
    metrics_path: None,
    running: &[],
    waiting: &[],
    kv_usage: &[],
    kv_capacity: Capacity::Unknown,
    scheduler: None,
};
