//! One scrape of an engine, reduced to the five numbers the balancer looks at.
//!
//! One process may run several schedulers (data parallelism), each with its own series, and one scheduler may
//! export its series more than once (SGLang per rank with `--enable-metrics-for-all-schedulers`). So:
//!
//! ```text
//! running, waiting, capacity = sum over schedulers of the largest of the scheduler's series
//! kv_usage                   = the largest of all series
//! ```
//!
//! The largest usage and not the mean, because the reading guards against preemption: a request goes to a
//! scheduler we cannot choose, and the fullest one preempts first, whatever room the others have.

use std::borrow::Cow;

use super::exposition::{Sample, samples};
use super::preset::Capacity;
use super::{Engine, Preset};

/// What an engine says about itself; what it does not say is none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reading {
    /// Requests in the running batches.
    pub running: Option<u64>,
    /// Requests that wait.
    pub waiting: Option<u64>,
    /// The part of the KV cache in use, 0 to 1, of the fullest scheduler.
    pub kv_usage: Option<f64>,
    /// The size of the KV cache in tokens, over all schedulers.
    pub kv_capacity_tokens: Option<u64>,
    /// When the process started, in seconds since 1970: another value means an empty cache.
    pub process_start: Option<f64>,
}

/// Reads one scrape, in Prometheus' text format. Lines that make no sense are passed over.
pub fn read(engine: Engine, exposition: &str) -> Reading {
    let preset = engine.preset();
    let [mut running, mut waiting, mut usage, mut capacity, mut start] =
        std::array::from_fn(|_| Tally::default());
    for sample in samples(exposition).filter(|sample| sample.value.is_finite() && sample.value >= 0.0) {
        running.offer(preset, preset.running, &sample, sample.value);
        waiting.offer(preset, preset.waiting, &sample, sample.value);
        usage.offer(preset, preset.kv_usage, &sample, sample.value);
        start.offer(preset, &["process_start_time_seconds"], &sample, sample.value);
        match preset.kv_capacity {
            Capacity::Unknown => {}
            Capacity::Gauge(name) => capacity.offer(preset, &[name], &sample, sample.value),
            Capacity::Labels(name) if sample.name == name => {
                if let Some(tokens) = capacity_in_labels(&sample) {
                    capacity.offer(preset, &[name], &sample, tokens);
                }
            }
            Capacity::Labels(_) => {}
        }
    }
    Reading {
        running: running.sum(),
        waiting: waiting.sum(),
        kv_usage: usage.largest().map(|usage| usage.min(1.0)),
        kv_capacity_tokens: capacity.sum(),
        process_start: start.largest(),
    }
}

/// The size vLLM states in the labels of its configuration; `None` there is the word of Python.
fn capacity_in_labels(sample: &Sample<'_>) -> Option<f64> {
    let number = |name: &str| sample.labels.value(name)?.parse::<u32>().ok().map(f64::from);
    number("kv_cache_size_tokens").or_else(|| Some(number("block_size")? * number("num_gpu_blocks")?))
}

/// The series of one metric, under the best of its names that was seen.
#[derive(Default)]
struct Tally<'a> {
    rank: usize,
    /// Each scheduler with the largest value of its series; rarely more than one.
    schedulers: Vec<(Option<Cow<'a, str>>, f64)>,
}

impl<'a> Tally<'a> {
    /// Takes `value` if `sample` is the metric of one of these `names`.
    fn offer(&mut self, preset: &Preset, names: &[&str], sample: &Sample<'a>, value: f64) {
        let Some(rank) = names.iter().position(|&name| name == sample.name) else { return };
        if rank > self.rank && !self.schedulers.is_empty() {
            return;
        }
        if rank != self.rank {
            self.rank = rank;
            self.schedulers.clear();
        }
        let scheduler = preset.scheduler.and_then(|label| sample.labels.value(label));
        let known =
            self.schedulers.iter_mut().find(|(known, _)| preset.scheduler.is_some() && *known == scheduler);
        match known {
            Some((_, largest)) => *largest = largest.max(value),
            None => self.schedulers.push((scheduler, value)),
        }
    }

    fn sum(&self) -> Option<u64> {
        (!self.schedulers.is_empty())
            .then(|| self.schedulers.iter().map(|(_, value)| *value).sum::<f64>() as u64)
    }

    fn largest(&self) -> Option<f64> {
        self.schedulers.iter().map(|(_, value)| *value).reduce(f64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture(file: &str) -> String {
        let folder =
            [env!("CARGO_MANIFEST_DIR"), "tests", "captures", file].iter().collect::<std::path::PathBuf>();
        std::fs::read_to_string(folder).unwrap()
    }

    #[test]
    fn the_captured_scrapes_read_as_they_stand() {
        let vllm = |running, waiting, kv_usage| Reading {
            running: Some(running),
            waiting: Some(waiting),
            kv_usage: Some(kv_usage),
            kv_capacity_tokens: Some(16_384),
            process_start: Some(1_795_430_364.49),
        };
        let sglang = |running, waiting| Reading {
            running: Some(running),
            waiting: Some(waiting),
            kv_usage: Some(0.0),
            kv_capacity_tokens: Some(65_536),
            process_start: None,
        };
        let llamacpp = |running, waiting| Reading {
            running: Some(running),
            waiting: Some(waiting),
            ..Reading::default()
        };
        for (engine, file, want) in [
            (Engine::Vllm, "vllm-0.32.0/metrics-idle.txt", vllm(0, 0, 0.0)),
            (Engine::Vllm, "vllm-0.32.0/metrics-under-load.txt", vllm(2, 6, 0.047_244_094_488_189_003)),
            (Engine::Vllm, "vllm-0.32.0/metrics-after-load.txt", vllm(0, 0, 0.0)),
            (
                Engine::Vllm,
                "vllm-0.32.0-flags/metrics-overload-503.txt",
                Reading {
                    kv_capacity_tokens: None,
                    process_start: None,
                    ..vllm(4, 2, 0.102_564_102_564_102_53)
                },
            ),
            (Engine::Sglang, "sglang-0.5.23/metrics-idle.txt", sglang(0, 0)),
            (Engine::Sglang, "sglang-0.5.23/metrics-under-load.txt", sglang(2, 4)),
            (Engine::Sglang, "sglang-0.5.23/metrics-after-load.txt", sglang(0, 0)),
            (Engine::Llamacpp, "llama.cpp-b11434/metrics-idle.txt", llamacpp(0, 0)),
            (Engine::Llamacpp, "llama.cpp-b11434/metrics-under-load.txt", llamacpp(2, 6)),
            (Engine::Llamacpp, "llama.cpp-b11434/metrics-after-load.txt", llamacpp(0, 0)),
            (Engine::Openai, "dynamo-1.6.1-mocker/metrics-idle.txt", Reading::default()),
            (Engine::Vllm, "dynamo-1.6.1-mocker/metrics-under-load.txt", Reading::default()),
        ] {
            assert_eq!(read(engine, &capture(file)), want, "{file}");
        }
    }

    #[test]
    fn schedulers_add_up_and_the_fullest_cache_counts() {
        let text = r#"
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:num_requests_waiting_created{engine="0"} 1.79e+09
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.75
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100",kv_cache_size_tokens="None"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="200"} 1.0
"#;
        let want = Reading {
            running: Some(7),
            waiting: Some(1),
            kv_usage: Some(0.75),
            kv_capacity_tokens: Some(4_800),
            process_start: None,
        };
        assert_eq!(read(Engine::Vllm, text), want);
    }

    #[test]
    fn ranks_of_one_scheduler_count_once() {
        let text = r#"
sglang:num_running_reqs{tp_rank="0",dp_rank="0"} 5
sglang:num_running_reqs{tp_rank="1",dp_rank="0"} 5
sglang:num_running_reqs{tp_rank="2",dp_rank="1"} 7
sglang:num_queue_reqs{tp_rank="0"} 2
sglang:num_queue_reqs{tp_rank="1"} 2
"#;
        let reading = read(Engine::Sglang, text);
        assert_eq!((reading.running, reading.waiting), (Some(12), Some(2)));
    }

    #[test]
    fn the_other_engines_and_the_old_names_are_read() {
        let of = |engine, text: &str| {
            let reading = read(engine, text);
            (reading.running, reading.waiting, reading.kv_usage)
        };
        assert_eq!(of(Engine::Tgi, "tgi_batch_current_size 4\ntgi_queue_size 2\n"), (Some(4), Some(2), None));
        let trtllm = "trtllm_num_requests_running{model_name=\"m\"} 3\ntrtllm_num_requests_waiting 1\n\
            trtllm_kv_cache_utilization 0.5\n";
        assert_eq!(of(Engine::Trtllm, trtllm), (Some(3), Some(1), Some(0.5)));
        let lmdeploy = "lmdeploy:num_requests_running{engine=\"0\"} 3\n\
            lmdeploy:num_requests_running{engine=\"1\"} 1\n\
            lmdeploy:num_requests_waiting 0\nlmdeploy:gpu_cache_usage_perc{engine=\"1\"} 0.5\n";
        assert_eq!(of(Engine::Lmdeploy, lmdeploy), (Some(4), Some(0), Some(0.5)));
        assert_eq!(of(Engine::Vllm, "vllm:gpu_cache_usage_perc 0.3\n").2, Some(0.3));
        let both = ["vllm:gpu_cache_usage_perc 0.3\n", "vllm:kv_cache_usage_perc 0.1\n"];
        for order in [both.concat(), [both[1], both[0]].concat()] {
            assert_eq!(of(Engine::Vllm, &order).2, Some(0.1), "{order}");
        }
        assert_eq!(of(Engine::Llamacpp, "llamacpp:kv_cache_usage_ratio 0.2\n").2, Some(0.2));
    }

    #[test]
    fn what_is_not_a_count_is_none() {
        let text = "tgi_queue_size NaN\ntgi_batch_current_size -1\ntgi_queue_size +Inf\ntgi_queue_size x\n";
        assert_eq!(read(Engine::Tgi, text), Reading::default());
        assert_eq!(read(Engine::Tgi, ""), Reading::default());
    }
}
