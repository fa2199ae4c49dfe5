//! A scrape of the proxy, as numbers.

/// Every sample of one scrape.
pub struct Metrics {
    samples: Vec<Sample>,
}

/// Name, labels, value.
type Sample = (String, Vec<(String, String)>, f64);

impl Metrics {
    /// Reads the Prometheus text format; a line that is not a sample is a failure.
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self { samples: lines.map(sample).collect() }
    }

    /// The sum of the samples of that name that carry all of `labels`; 0 if there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(name, labels).map(|(_, _, value)| value).sum()
    }

    /// Whether there is any sample of that name with all of `labels`.
    pub fn has(&self, name: &str, labels: &[(&str, &str)]) -> bool {
        self.matching(name, labels).next().is_some()
    }

    /// The values of that label among the samples of that name, in order.
    pub fn values(&self, name: &str, label: &str) -> Vec<String> {
        let labels = self.matching(name, &[]).flat_map(|(_, labels, _)| labels);
        let mut values: Vec<_> =
            labels.filter(|(key, _)| key == label).map(|(_, value)| value.clone()).collect();
        values.sort_unstable();
        values.dedup();
        values
    }

    fn matching<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |(n, have, _)| {
            n == name && labels.iter().all(|(key, value)| have.iter().any(|(k, v)| k == key && v == value))
        })
    }
}

fn sample(line: &str) -> Sample {
    let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("not a sample: {line}"));
    let value = value.parse().unwrap_or_else(|_| panic!("not a number: {line}"));
    let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
    let labels = labels.trim_end_matches('}').split_terminator("\",").filter(|label| !label.is_empty());
    let labels = labels.map(|label| {
        let (key, value) = label.split_once("=\"").unwrap_or_else(|| panic!("not a label: {line}"));
        (key.trim_start_matches(',').to_owned(), value.trim_end_matches('"').to_owned())
    });
    (name.to_owned(), labels.collect(), value)
}
