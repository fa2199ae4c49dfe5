//! Where every metric is registered, and from where `docs/metrics.md` knows them all.
//!
//! The crate's own registry shows families that have series. A table of what there is must not depend on what has
//! happened, so the collectors are kept as well, and asked for their descriptions.

use parking_lot::Mutex;
use prometheus::core::Collector;
use prometheus::proto::{MetricFamily, MetricType};

/// A metric, as it is documented.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its whole name; a histogram's series end in `_bucket`, `_sum` and `_count` in addition.
    pub name: String,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// The names of its labels.
    pub labels: Vec<String>,
    /// What it counts or shows.
    pub help: String,
}

impl Row {
    /// What it is measured in, by the last word of its name, as Prometheus wants it; empty where the name says it.
    pub fn unit(&self) -> &'static str {
        let name = self.name.trim_end_matches("_total");
        match name.rsplit_once('_').map_or(name, |(_, last)| last) {
            "seconds" if name.ends_with("_timestamp_seconds") || name.ends_with("_time_seconds") => {
                "seconds since 1970"
            }
            "seconds" => "seconds",
            "bytes" => "bytes",
            "tokens" => "tokens",
            "requests" => "requests",
            "share" | "usage" => "0 to 1",
            _ => "",
        }
    }
}

/// The registered metrics.
#[derive(Default)]
pub(super) struct Registry {
    series: prometheus::Registry,
    collectors: Mutex<Vec<Box<dyn Collector>>>,
}

impl Registry {
    /// Registers a metric. Errors only if there is one of this name.
    pub(super) fn register<C: Collector + Clone + 'static>(&self, metric: C) -> prometheus::Result<C> {
        self.series.register(Box::new(metric.clone()))?;
        self.collectors.lock().push(Box::new(metric.clone()));
        Ok(metric)
    }

    /// Every family that has a series, in the order of names.
    pub(super) fn gather(&self) -> Vec<MetricFamily> {
        self.series.gather()
    }

    /// Every metric, whether it has a series yet or not, in the order of names.
    pub(super) fn rows(&self) -> Vec<Row> {
        let mut rows: Vec<_> =
            self.collectors.lock().iter().flat_map(|collector| rows(&**collector)).collect();
        rows.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        rows
    }
}

/// A collector without series still collects its families, which know their kind.
fn rows(collector: &dyn Collector) -> Vec<Row> {
    let families = collector.collect();
    let row = |(desc, family): (&prometheus::core::Desc, &MetricFamily)| Row {
        name: desc.fq_name.clone(),
        kind: match family.get_field_type() {
            MetricType::COUNTER => "counter",
            MetricType::GAUGE => "gauge",
            MetricType::HISTOGRAM => "histogram",
            MetricType::SUMMARY => "summary",
            MetricType::UNTYPED => "untyped",
        },
        labels: desc.variable_labels.clone(),
        help: desc.help.clone(),
    };
    collector.desc().into_iter().zip(&families).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::{HistogramOpts, HistogramVec, IntGauge};

    #[test]
    fn a_metric_without_a_series_is_in_the_table() {
        let registry = Registry::default();
        let opts = HistogramOpts::new("wait_seconds", "How long.");
        registry.register(HistogramVec::new(opts, &["of"]).unwrap()).unwrap();
        registry.register(IntGauge::new("held_bytes", "How many.").unwrap()).unwrap();
        assert_eq!(registry.gather().len(), 1);
        let rows = registry.rows();
        let shown: Vec<_> =
            rows.iter().map(|r| (r.name.as_str(), r.kind, r.labels.len(), r.unit())).collect();
        assert_eq!(shown, [("held_bytes", "gauge", 0, "bytes"), ("wait_seconds", "histogram", 1, "seconds")]);
    }
}
