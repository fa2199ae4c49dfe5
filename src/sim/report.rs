//! The figures a run is judged by: how long users waited, whether that was soon enough, what the fleet did.
//!
//! Quantiles are by nearest rank, which returns a value that was really measured and needs no interpolation
//! rule: the `q` quantile of `n` samples is the `ceil(q * n)`-th smallest. A request is *good* if it met the
//! [`Slo`]; capacity and goodput are counted in good requests, because a mean hides those who gave up.

use std::time::Duration;

/// What users are promised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slo {
    /// Longest time to the first token.
    pub first_token: Duration,
    /// Longest mean time between the tokens after the first.
    pub per_token: Duration,
    /// Share of the requests that must keep both, 0..=1.
    pub share: f64,
}

/// What happened to one answered request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// From its arrival to its first token.
    pub first_token: Duration,
    /// From its arrival to its last token.
    pub whole: Duration,
    /// Length of the answer.
    pub output_tokens: u64,
}

impl Timing {
    /// Mean time between the tokens; nothing if there was only one.
    pub fn per_token(&self) -> Option<Duration> {
        let gaps = self.output_tokens.checked_sub(1).filter(|gaps| *gaps > 0)?;
        Some((self.whole - self.first_token).div_f64(gaps as f64))
    }

    /// Whether it kept the promise.
    pub fn is_good(&self, slo: &Slo) -> bool {
        self.first_token <= slo.first_token && self.per_token().is_none_or(|gap| gap <= slo.per_token)
    }
}

/// The figures of one run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// Requests sent.
    pub requests: u64,
    /// Those the engine refused because they could never fit.
    pub refused: u64,
    /// Those that met the SLO.
    pub good: u64,
    /// Time to the first token (TTFT).
    pub first_token: Samples,
    /// Time per further token (TPOT), of answers with more than one.
    pub per_token: Samples,
    /// Time to the last token (E2E).
    pub whole: Samples,
    /// From the first arrival to the last token.
    pub lasted: Duration,
    /// Share of the prompt tokens that the engines had cached, 0..=1.
    pub hit_ratio: f64,
    /// Share of the requests that the most used backend got, 0..=1.
    pub largest_share: f64,
    /// Sequences thrown out of a batch for want of memory.
    pub preemptions: u64,
}

impl Figures {
    /// Books an answered request.
    pub fn book(&mut self, timing: &Timing, slo: &Slo) {
        self.first_token.push(timing.first_token);
        self.whole.push(timing.whole);
        if let Some(gap) = timing.per_token() {
            self.per_token.push(gap);
        }
        self.good += u64::from(timing.is_good(slo));
    }

    /// Share of the requests that met the SLO; one that was refused did not.
    pub fn good_share(&self) -> f64 {
        self.good as f64 / self.requests.max(1) as f64
    }

    /// Good requests per second.
    pub fn goodput(&self) -> f64 {
        if self.lasted.is_zero() { 0.0 } else { self.good as f64 / self.lasted.as_secs_f64() }
    }
}

/// A set of measured durations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    fn a_request_is_good_if_its_first_token_and_its_gaps_are() {
        let millis = Duration::from_millis;
        let slo = Slo { first_token: millis(100), per_token: millis(10), share: 0.9 };
        let timing = |first, whole, output_tokens| Timing {
            first_token: millis(first),
            whole: millis(whole),
            output_tokens,
        };
        assert_eq!(timing(100, 140, 5).per_token(), Some(millis(10)));
        assert_eq!(timing(100, 100, 1).per_token(), None);
        let mut figures = Figures { requests: 5, lasted: Duration::from_secs(4), ..Figures::default() };
        for timing in [timing(100, 140, 5), timing(100, 100, 1), timing(101, 101, 1), timing(100, 141, 5)] {
            figures.book(&timing, &slo);
        }
        assert_eq!((figures.good, figures.good_share(), figures.goodput()), (2, 0.4, 0.5));
        assert_eq!((figures.first_token.len(), figures.per_token.len()), (4, 2));
    }

    #[test]
    fn nothing_measured_has_no_quantile() {
        assert_eq!(Samples::default().quantiles([0.5]), None);
        assert_eq!(Samples::default().mean(), None);
    }
}
