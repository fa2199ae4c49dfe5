//! The figures a run is judged by: quantiles of a set of durations, by nearest rank.
//!
//! Nearest rank returns a value that was really measured and needs no interpolation rule: the `q` quantile of
//! `n` samples is the `ceil(q * n)`-th smallest.

use std::time::Duration;

/// A set of measured durations.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    values: Vec<Duration>,
}

impl Samples {
    /// Adds one measurement.
    pub fn push(&mut self, value: Duration) {
        self.values.push(value);
    }

    /// Adds all measurements of another set.
    pub fn merge(&mut self, other: &Self) {
        self.values.extend_from_slice(&other.values);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The arithmetic mean; nothing if there are no samples.
    pub fn mean(&self) -> Option<Duration> {
        let total: Duration = self.values.iter().sum();
        let count = u32::try_from(self.values.len()).unwrap_or(u32::MAX);
        total.checked_div(count)
    }

    /// The quantiles `wanted` (each in 0..=1, in any order), sorting once; nothing if there are no samples.
    pub fn quantiles<const N: usize>(&self, wanted: [f64; N]) -> Option<[Duration; N]> {
        let mut sorted = self.values.clone();
        sorted.sort_unstable();
        let last = sorted.len().checked_sub(1)?;
        Some(wanted.map(|q| {
            let rank = (q * sorted.len() as f64).ceil() as usize;
            sorted[rank.saturating_sub(1).min(last)]
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(millis: impl IntoIterator<Item = u64>) -> Samples {
        Samples { values: millis.into_iter().map(Duration::from_millis).collect() }
    }

    #[test]
    fn the_quantile_of_a_hundred_values_is_the_value_of_that_rank() {
        let hundred = samples((1..=100).rev());
        let expected = [50, 90, 99, 1, 100].map(Duration::from_millis);
        assert_eq!(hundred.quantiles([0.5, 0.9, 0.99, 0.0, 1.0]), Some(expected));
    }

    #[test]
    fn a_quantile_is_always_a_measured_value() {
        let three = samples([10, 30, 20]);
        assert_eq!(three.quantiles([0.5, 0.99]), Some([20, 30].map(Duration::from_millis)));
        assert_eq!(three.mean(), Some(Duration::from_millis(20)));
    }

    #[test]
    fn nothing_measured_has_no_quantile() {
        assert_eq!(Samples::default().quantiles([0.5]), None);
        assert_eq!(Samples::default().mean(), None);
    }
}
