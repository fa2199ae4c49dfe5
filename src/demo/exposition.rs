//! The simulated engine's page of metrics: vLLM's names and labels, in Prometheus text.
//!
//! Only what a balancer may want to read, but each exactly as recorded (captures/vllm-0.32.0/metrics-*.txt),
//! with the `_created` gauges and the second series of waiting requests that a careless reader adds up.

use std::fmt::Write as _;

use super::vllm::Served;
use crate::sim::hardware::Hardware;
use crate::sim::replica::Stats;

impl Served<'_> {
    /// The answer to `GET /metrics`: the names a balancer may want, in Prometheus text.
    pub(super) fn metrics(&self, stats: &Stats, prompt_tokens: u64, aborted: u64) -> String {
        let mut page = Page { text: String::new(), model: self.model, created: self.started };
        let waiting = stats.waiting as f64;
        page.own(
            "process_start_time_seconds",
            "Start time of the process since unix epoch in seconds.",
            self.started,
        );
        page.gauge(
            "num_requests_running",
            "Number of requests in model execution batches.",
            stats.running as f64,
        );
        page.gauge("num_requests_waiting", "Number of requests waiting to be processed.", waiting);
        let reasons = [("reason=\"capacity\"", waiting), ("reason=\"deferred\"", 0.0)];
        page.family(
            "num_requests_waiting_by_reason",
            "gauge",
            "Number of waiting requests by reason.",
            &reasons,
        );
        page.gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", stats.kv_usage);
        page.counter("prefix_cache_queries", "Prefix cache queries, in tokens.", stats.queried_tokens);
        page.counter("prefix_cache_hits", "Prefix cache hits, in tokens.", stats.hit_tokens);
        page.counter(
            "num_preemptions",
            "Cumulative number of preemption from the engine.",
            stats.preemptions,
        );
        page.counter("prompt_tokens", "Number of prefill tokens processed.", prompt_tokens);
        page.counter("generation_tokens", "Number of generation tokens processed.", stats.generated_tokens);
        let reasons =
            [("finished_reason=\"length\"", stats.finished), ("finished_reason=\"abort\"", aborted)]
                .map(|(label, count)| (label, count as f64));
        page.family(
            "request_success_total",
            "counter",
            "Count of successfully processed requests.",
            &reasons,
        );
        let Hardware { block_tokens, kv_tokens, .. } = *self.hardware;
        let config = format!(
            "block_size=\"{block_tokens}\",enable_prefix_caching=\"True\",kv_cache_size_tokens=\"{kv_tokens}\",\
             num_gpu_blocks=\"{}\"",
            kv_tokens / block_tokens.max(1)
        );
        page.family(
            "cache_config_info",
            "gauge",
            "Information of the LLMEngine CacheConfig",
            &[(&config, 1.0)],
        );
        page.text
    }
}

/// A page of metrics in the making.
struct Page<'a> {
    text: String,
    model: &'a str,
    created: f64,
}

impl Page<'_> {
    fn own(&mut self, name: &str, help: &str, value: f64) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, "gauge", help, &[("", value)]);
    }

    /// A counter and, as the Python client writes it, the gauge of its creation.
    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(&format!("{name}_total"), "counter", help, &[("", value as f64)]);
        self.family(&format!("{name}_created"), "gauge", help, &[("", self.created)]);
    }

    fn family(&mut self, name: &str, kind: &str, help: &str, series: &[(&str, f64)]) {
        let _ = writeln!(self.text, "# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}");
        for (label, value) in series {
            let comma = if label.is_empty() { "" } else { "," };
            let model = self.model;
            let _ = writeln!(
                self.text,
                "vllm:{name}{{engine=\"0\",{label}{comma}model_name=\"{model}\"}} {value:?}"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_metrics_are_named_and_labelled_as_vllm_does() {
        let stats = Stats { running: 2, waiting: 6, kv_usage: 0.25, hit_tokens: 64, ..Stats::default() };
        let hardware = Hardware::default();
        let served = Served { model: "sim-8b", hardware: &hardware, started: 1_795_430_229.5 };
        let page = served.metrics(&stats, 279, 1);
        for line in [
            r#"vllm:num_requests_running{engine="0",model_name="sim-8b"} 2.0"#,
            r#"vllm:num_requests_waiting{engine="0",model_name="sim-8b"} 6.0"#,
            r#"vllm:num_requests_waiting_by_reason{engine="0",reason="capacity",model_name="sim-8b"} 6.0"#,
            r#"vllm:kv_cache_usage_perc{engine="0",model_name="sim-8b"} 0.25"#,
            r#"vllm:prefix_cache_hits_total{engine="0",model_name="sim-8b"} 64.0"#,
            r#"vllm:prompt_tokens_total{engine="0",model_name="sim-8b"} 279.0"#,
            r#"vllm:request_success_total{engine="0",finished_reason="abort",model_name="sim-8b"} 1.0"#,
            "process_start_time_seconds 1795430229.5",
        ] {
            assert!(page.lines().any(|it| it == line), "{line}\nnot in\n{page}");
        }
        assert!(page.contains(r#"kv_cache_size_tokens="400000",num_gpu_blocks="25000""#));
    }
}
