//! Capacity: the largest speed-up of a trace at which the fleet still keeps its promise.
//!
//! Doubling or halving from the recorded speed finds a bracket, bisection narrows it: after seven halvings
//! the answer is known to 0.8 %. Whether the promise is kept need not be monotonous in the speed, so the
//! answer is *a* speed-up that keeps it beside one that does not; the noise of that is about 3 %
//! (research/routing.md s.8).

/// The speed-ups that are looked at.
pub const SPEEDUPS: std::ops::RangeInclusive<f64> = 0.01..=1000.0;

const HALVINGS: u32 = 7;

/// The largest speed-up found for which `keeps` is true; nothing if there is none.
pub fn largest(mut keeps: impl FnMut(f64) -> bool) -> Option<f64> {
    let (mut low, mut high) = (1.0, 1.0);
    if keeps(low) {
        loop {
            high = low * 2.0;
            if high > *SPEEDUPS.end() {
                return Some(low);
            }
            if !keeps(high) {
                break;
            }
            low = high;
        }
    } else {
        loop {
            low = high / 2.0;
            if low < *SPEEDUPS.start() {
                return None;
            }
            if keeps(low) {
                break;
            }
            high = low;
        }
    }
    for _ in 0..HALVINGS {
        let middle = low.midpoint(high);
        if keeps(middle) { low = middle } else { high = middle }
    }
    Some(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_found_to_a_hundredth_wherever_it_is() {
        for limit in [0.02, 0.3, 1.0, 1.01, 3.3, 64.0, 500.0] {
            let mut asked = 0;
            let found = largest(|speedup| {
                asked += 1;
                speedup <= limit
            });
            let found = found.expect("there is one");
            assert!((limit * 0.99..=limit).contains(&found), "{found} for {limit}");
            assert!(asked <= 18, "{asked} runs");
        }
    }

    #[test]
    fn a_promise_that_is_never_kept_has_no_capacity_and_one_always_kept_the_last_tried() {
        assert_eq!(largest(|_| false), None);
        assert_eq!(largest(|_| true), Some(512.0));
    }
}
